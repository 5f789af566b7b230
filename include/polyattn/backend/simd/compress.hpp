#pragma once
// Compressions along the tokens: the policies' own loops, or faster ones where rows have unit stride.

#include <polyattn/backend/simd/matrix_product.hpp>
#include <polyattn/core/tensor.hpp>
#include <polyattn/policy/compression/compression.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// y[j] = mean of rows [j length, (j + 1) length) of x, a vector of columns at a time: at the speed of a copy.
template <class A, class T>
void segment_means(MatrixView<const T> x, index_t length, MatrixView<T> y) {
    using V = Vec<T, A>;
    constexpr int width = lanes<T, A>;
    if (x.col_stride != 1 || y.col_stride != 1) return SegmentMeans<1>::mean(x, length, y);
    for (index_t j = 0; j < y.rows; ++j) {
        const index_t first = j * length, count = std::min(length, x.rows - first);
        const T factor = 1 / static_cast<T>(count);
        T* const to = y.row(j);
        index_t c = 0;
        for (; c + width <= x.cols; c += width) {
            V sum = V::load_unaligned(x.row(first) + c);
            for (index_t i = 1; i < count; ++i) sum = sum + V::load_unaligned(x.row(first + i) + c);
            (sum * V(factor)).store_unaligned(to + c);
        }
        for (; c < x.cols; ++c) {
            T sum = x(first, c);
            for (index_t i = 1; i < count; ++i) sum += x(first + i, c);
            to[c] = sum * factor;
        }
    }
}
/// d_x rows += d_y of their segment / its tokens.
template <class A, class T>
void spread_segments(index_t tokens, index_t length, MatrixView<const T> d_y, MatrixView<T> d_x) {
    if (d_y.col_stride != 1 || d_x.col_stride != 1) return SegmentMeans<1>::spread(tokens, length, d_y, d_x);
    for (index_t i = 0; i < tokens; ++i) {
        const index_t j = i / length, count = std::min(length, tokens - j * length);
        add_scaled<T, A>(1 / static_cast<T>(count), d_y.row(j), d_x.cols, d_x.row(i));
    }
}

/// LinearProjection as products of matrices, one head after the other, with threads inside the products. Its weights in T, [landmarks][tokens];
/// their gradient is summed over heads in T as well.
template <class T, class A>
class Projection {
public:
    Projection(const LinearProjection& policy, Compressed what) : policy_(policy), what_(what), weights_({policy.rows, policy.tokens}) {
        std::copy_n(policy.table.begin() + static_cast<std::ptrdiff_t>(policy.at(what, 0, 0)), weights_.values.size(), weights_.values.begin());
    }
    void compress(MatrixView<const T> x, MatrixView<T> y, Workspace& workspace) const { MatrixProduct<T, A>::run(of(x.rows, y.rows), x, y, false, workspace); }
    /// Adds to d_x and to the gradient of the weights.
    void adjoint(MatrixView<const T> x, MatrixView<const T> d_y, MatrixView<T> d_x, Workspace& workspace) {
        if (d_weights_.values.empty()) d_weights_ = Tensor<T>(weights_.shape);
        const MatrixView<const T> back = transposed(of(x.rows, d_y.rows));
        if (d_x.col_stride == 1) MatrixProduct<T, A>::run(back, d_y, d_x, true, workspace);
        else {  // products write rows of unit stride
            Tensor<T> rows({d_x.rows, d_x.cols});
            MatrixProduct<T, A>::run(back, d_y, rows.view().head(0, 0), false, workspace);
            for (index_t i = 0; i < d_x.rows; ++i) add_row_to<T>(rows.view().head(0, 0), i, T(1), d_x, i);
        }
        MatrixProduct<T, A>::run(d_y, transposed(x), {d_weights_.data(), d_y.rows, x.rows, policy_.tokens, 1}, true, workspace);
    }
    void add_gradient(std::span<double> d_table) const {
        double* const to = d_table.data() + policy_.at(what_, 0, 0);
        for (std::size_t i = 0; i < d_weights_.values.size(); ++i) to[i] += double(d_weights_.values[i]);
    }

private:
    MatrixView<const T> of(index_t tokens, index_t landmarks) const { return {weights_.data(), landmarks, tokens, policy_.tokens, 1}; }

    const LinearProjection& policy_;
    Compressed what_;
    Tensor<T> weights_, d_weights_;
};

template <class A, class T, class Policy>
void compress(const Policy& policy, MatrixView<const T> x, Compressed what, MatrixView<T> y) {
    if constexpr (segment_lengths<Policy> > 0) segment_means<A>(x, Policy::lengths[0], y);
    else policy.compress(x, what, y);
}
template <class A, class T, class Policy>
void compress_adjoint(const Policy& policy, MatrixView<const T> x, Compressed what, MatrixView<const T> d_y, MatrixView<T> d_x, std::span<double> d_table) {
    if constexpr (segment_lengths<Policy> > 0) spread_segments<A>(x.rows, Policy::lengths[0], d_y, d_x);
    else policy.compress_adjoint(x, what, d_y, d_x, d_table);
}

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
