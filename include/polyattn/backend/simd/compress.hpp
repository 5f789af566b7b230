#pragma once
// Compressions along the tokens: the policies' own loops, or faster ones where rows have unit stride.

#include <polyattn/backend/simd/rows.hpp>
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
