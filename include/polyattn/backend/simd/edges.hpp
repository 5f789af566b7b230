#pragma once
// Gathered work: dot products along edges (SDDMM) and weighted sums of rows (SpMM). Columns are padded to whole vectors.

#include <polyattn/backend/simd/rows.hpp>
#include <polyattn/backend/simd/vector.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// The product of two rows of `columns`, a multiple of the lanes.
template <class T, class A>
POLYATTN_ALWAYS_INLINE T dot(const T* a, const T* b, index_t columns) {
    using V = Vec<T, A>;
    constexpr int width = lanes<T, A>;
    V even(T(0)), odd(T(0));
    index_t c = 0;
    for (; c + 2 * width <= columns; c += 2 * width) {
        even = multiply_add(V::load_unaligned(a + c), V::load_unaligned(b + c), even);
        odd = multiply_add(V::load_unaligned(a + c + width), V::load_unaligned(b + c + width), odd);
    }
    if (c < columns) even = multiply_add(V::load_unaligned(a + c), V::load_unaligned(b + c), even);
    return lane_sum(even + odd);
}

/// out[columns] += factor * sum over e < count of weight(e) * x[row(e)].
template <class T, class A, class Row, class Weight>
POLYATTN_ALWAYS_INLINE void gather_sum(offset_t count, Row row, Weight weight, Rows<T> x, T factor, index_t columns, T* out) {
    using V = Vec<T, A>;
    constexpr int width = lanes<T, A>, panel = 4;
    const auto sum = [&]<int N>(std::integral_constant<int, N>, index_t column) POLYATTN_INLINE_LAMBDA {
        V acc[N];
        unroll<N>([&](auto v) POLYATTN_INLINE_LAMBDA { acc[v] = V(T(0)); });
        for (offset_t e = 0; e < count; ++e) {
            const V w(weight(e));
            const T* from = x.row(row(e)) + column;
            unroll<N>([&](auto v) POLYATTN_INLINE_LAMBDA { acc[v] = multiply_add(w, V::load_unaligned(from + v * width), acc[v]); });
        }
        unroll<N>([&](auto v) POLYATTN_INLINE_LAMBDA {
            multiply_add(V(factor), acc[v], V::load_unaligned(out + column + v * width)).store_unaligned(out + column + v * width);
        });
    };
    index_t column = 0;
    for (; column + panel * width <= columns; column += panel * width) sum(std::integral_constant<int, panel>{}, column);
    for (; column < columns; column += width) sum(std::integral_constant<int, 1>{}, column);
}

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
