#pragma once

#include <polyattn/backend/simd/matrix_product.hpp>
#include <polyattn/nn/parameter.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

/// to[j] += sum over rows of x. Each column is summed in the order of the rows.
template <class T>
void add_column_sums(MatrixView<const T> x, T* to) {
    using V = simd::Vec<T, xsimd::default_arch>;
    constexpr int vectors = 4;
    constexpr index_t width = vectors * static_cast<index_t>(V::size);
    parallel_for((x.cols + width - 1) / width, [&](offset_t part, int) {
        const auto first = static_cast<index_t>(part) * width, count = std::min(width, x.cols - first);
        alignas(64) T total[width] = {};
        if (count == width) {
            V sum[vectors] = {V(T(0)), V(T(0)), V(T(0)), V(T(0))};
            for (index_t i = 0; i < x.rows; ++i)
                simd::unroll<vectors>([&](auto v) POLYATTN_INLINE_LAMBDA { sum[v] = sum[v] + V::load_unaligned(x.row(i) + first + v * static_cast<index_t>(V::size)); });
            simd::unroll<vectors>([&](auto v) POLYATTN_INLINE_LAMBDA { sum[v].store_aligned(total + v * V::size); });
        } else
            for (index_t i = 0; i < x.rows; ++i)
                for (index_t c = 0; c < count; ++c) total[c] += x(i, first + c);
        for (index_t c = 0; c < count; ++c) to[first + c] += total[c];
    });
}

inline void require_rows(index_t rows, index_t wanted, const char* argument) {
    require(rows == wanted, argument, [&] { return text(wanted, " rows"); }, rows);
}
inline void require_columns(index_t columns, index_t wanted, const char* argument) {
    require(columns == wanted, argument, [&] { return text(wanted, " columns"); }, columns);
}

}  // namespace detail

namespace nn {

/// y = x W^T + b. W [out, in], b [out]; x [rows, in], y [rows, out], unit column strides. 2 in out flops a row. Weights start as normal
/// deviates times `deviation`, b as 0. Bitwise the same for any number of threads.
template <class T>
class Linear {
public:
    Linear(const std::string& name, index_t in, index_t out, double deviation, std::uint64_t seed)
        : weight(name + ".weight", {detail::positive(out, "out"), detail::positive(in, "in")}, true), bias(name + ".bias", {out}, false) {
        weight.draw(deviation, seed);
    }

    index_t in() const { return static_cast<index_t>(weight.value.shape[1]); }
    index_t out() const { return static_cast<index_t>(weight.value.shape[0]); }

    /// then(row, column, values) gets the finished pieces of y. Throws invalid_input if the columns do not fit.
    template <class Then = detail::Keep>
    void forward(MatrixView<const T> x, MatrixView<T> y, Workspace& workspace, Then&& then = {}) const {
        using V = detail::simd::Vec<T, xsimd::default_arch>;
        detail::require_columns(x.cols, in(), "x");
        detail::require_columns(y.cols, out(), "y");
        detail::require_rows(y.rows, x.rows, "y");
        const auto finish = [&](index_t row, index_t column, std::span<T> values) {
            detail::simd::map_row<T, xsimd::default_arch>(bias.value.data() + column, values.data(), static_cast<index_t>(values.size()), [](V b, V value) { return value + b; });
            then(row, column, values);
        };
        detail::multiply(x, detail::transposed(detail::rows_of(weight.value)), y, false, workspace, detail::simd::beside_of(then, finish));
    }

    /// Adds to the gradients of W and b, and sets d_x (or adds to it), unless it has no memory. then(row, column, values) gets the finished
    /// pieces of d_x. 4 in out flops a row.
    template <class Then = detail::Keep>
    void backward(MatrixView<const T> x, MatrixView<const T> d_y, MatrixView<T> d_x, bool add, Workspace& workspace, Then&& then = {}) {
        detail::require_columns(x.cols, in(), "x");
        detail::require_columns(d_y.cols, out(), "d_y");
        detail::require_rows(d_y.rows, x.rows, "d_y");
        if (d_x.data) {
            detail::require_columns(d_x.cols, in(), "d_x");
            detail::require_rows(d_x.rows, x.rows, "d_x");
        }
        detail::multiply(detail::transposed(d_y), x, detail::rows_of(weight.gradient), true, workspace);
        detail::add_column_sums(d_y, bias.gradient.data());
        if (d_x.data) detail::multiply(d_y, detail::rows_of(std::as_const(weight.value)), d_x, add, workspace, then);
    }

    template <class F>
    void for_each_parameter(F&& f) {
        f(weight);
        f(bias);
    }

    Parameter<T> weight, bias;
};

}  // namespace nn

POLYATTN_END_NAMESPACE
