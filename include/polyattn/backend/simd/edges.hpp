#pragma once
// Gathered work: dot products along edges (SDDMM) and weighted sums of rows (SpMM). What is gathered lies in parts of two cache
// lines a row, since the footprint decides the speed of gathers, not their length.

#include <polyattn/backend/simd/rows.hpp>
#include <polyattn/backend/simd/vector.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// Rows split into parts of up to 128 bytes of columns, [part][row][columns of the part].
template <class T>
struct Parts {
    static constexpr index_t part_columns = 128 / sizeof(T);

    T* data = nullptr;
    index_t rows = 0, columns = 0;  // columns are padded to whole vectors

    index_t count() const { return (columns + part_columns - 1) / part_columns; }
    index_t width(index_t part) const { return std::min(part_columns, columns - part * part_columns); }
    T* part(index_t p) const { return data + offset_t{p} * part_columns * rows; }
};

template <class T>
Parts<T> take_parts(index_t rows, index_t columns, Arena& arena) {
    return {arena.take<T>(offset_t{rows} * columns).data(), rows, columns};
}

/// Calls f(integral_constant vectors, part) for all parts.
template <class T, class A, class F>
void for_each_part(const Parts<T>& parts, F&& f) {
    constexpr int most = static_cast<int>(Parts<T>::part_columns) / lanes<T, A>;
    for (index_t p = 0; p < parts.count(); ++p)
        with_count<most>(static_cast<int>(parts.width(p)) / lanes<T, A>, [&](auto vectors) POLYATTN_INLINE_LAMBDA { f(vectors, p); });
}

/// Copies row i of x to the parts.
template <class T>
void split_row(const T* x, index_t i, const Parts<T>& parts) {
    for (index_t p = 0; p < parts.count(); ++p) std::copy_n(x + p * Parts<T>::part_columns, parts.width(p), parts.part(p) + offset_t{i} * parts.width(p));
}

/// Gathers run this many edges ahead of the sums ..
inline constexpr offset_t gather_ahead = 32;
/// .. once a part exceeds half of a usual second-level cache. Not on Intel's cores since Sapphire Rapids, which see 512 operations ahead, and so as many misses as they
/// can wait for: there fetching costs sums up to a fifth.
template <class T>
bool fetches_gathers([[maybe_unused]] const Parts<T>& parts) {
#if defined(__AMX_BF16__)
    return false;
#else
    return offset_t{parts.rows} * static_cast<offset_t>(sizeof(T)) * parts.width(0) > offset_t{512} << 10;
#endif
}

template <int N, class T, class A>
POLYATTN_ALWAYS_INLINE void prefetch_row(const T* row) {
    for (int c = 0; c < N * lanes<T, A>; c += cache_line<T>) prefetch(row + c);
}

/// sum += sum over e < count of weights[e] * part[keys[e]]. `known` keys may be read for fetching ahead; 0 fetches nothing ahead.
template <int N, class T, class A>
POLYATTN_ALWAYS_INLINE void gather_sum(Vec<T, A> (&sum)[N], const index_t* keys, const T* weights, offset_t count, const T* part, offset_t known) {
    using V = Vec<T, A>;
    constexpr int width = lanes<T, A>, sets = N >= 8 ? 1 : 8 / N;
    V acc[sets * N];
    const auto row = [&](offset_t e) POLYATTN_INLINE_LAMBDA { return part + offset_t{keys[e]} * (N * width); };
    expand<sets * N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((acc[I] = V(T(0))), ...); });
    offset_t e = 0;
    for (; e + sets <= count; e += sets) {
        if (e + sets + gather_ahead <= known)
            for (int s = 0; s < sets; ++s) prefetch_row<N, T, A>(row(e + s + gather_ahead));
        expand<sets * N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA {
            ((acc[I] = multiply_add(V(weights[e + I / N]), V::load_aligned(row(e + I / N) + I % N * width), acc[I])), ...);
        });
    }
    for (; e < count; ++e)
        expand<N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((acc[I] = multiply_add(V(weights[e]), V::load_aligned(row(e) + I * width), acc[I])), ...); });
    expand<sets * N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((sum[I % N] = sum[I % N] + acc[I]), ...); });
}

/// Sums of the lanes of each vector, in order.
template <class T, class A>
POLYATTN_ALWAYS_INLINE Vec<T, A> lane_sums(PerLane<T, A>& x) {
    if constexpr (!is_avx512<A>) return xsimd::haddp(x);
    // Rounds of halves, as in a transposition: fewer operations than xsimd's form.
    constexpr int rounds = std::bit_width(static_cast<unsigned>(lanes<T, A>)) - 1;
    unroll<rounds>([&](auto r) POLYATTN_INLINE_LAMBDA {
        constexpr int half = lanes<T, A> >> (r + 1);
        expand<half>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((x[I] = interleave<false, T, A>(x[I], x[I + half]) + interleave<true, T, A>(x[I], x[I + half])), ...); });
    });
    return x[0];
}

/// dots[e] (+)= factor * a . part[keys[e]] for e < count.
template <int N, class T, class A>
void gather_dots(const T* a, T factor, const index_t* keys, offset_t count, const T* part, offset_t known, T* dots, bool add) {
    using V = Vec<T, A>;
    constexpr int width = lanes<T, A>;
    V own[N];
    expand<N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((own[I] = V::load_unaligned(a + I * width) * V(factor)), ...); });
    index_t rest[width];
    for (offset_t e = 0; e < count; e += width) {
        const index_t* row = keys + e;
        const auto there = static_cast<int>(std::min<offset_t>(width, count - e));
        if (there < width) {  // behind the end the last edge is repeated
            for (int l = 0; l < width; ++l) rest[l] = row[std::min(l, there - 1)];
            row = rest;
        } else if (e + width + gather_ahead <= known)
            for (int l = 0; l < width; ++l) prefetch_row<N, T, A>(part + offset_t{row[l + gather_ahead]} * (N * width));
        PerLane<T, A> product;
        expand<width>([&]<int... L>(Ints<L...>) POLYATTN_INLINE_LAMBDA {
            ((product[L] = own[0] * V::load_aligned(part + offset_t{row[L]} * (N * width))), ...);
            for (int v = 1; v < N; ++v) ((product[L] = multiply_add(own[v], V::load_aligned(part + offset_t{row[L]} * (N * width) + v * width), product[L])), ...);
        });
        V sums = lane_sums<T, A>(product);
        if (there == width) {
            if (add) sums = sums + V::load_unaligned(dots + e);
            sums.store_unaligned(dots + e);
        } else {
            alignas(64) T last[width];
            sums.store_aligned(last);
            for (int l = 0; l < there; ++l) dots[e + l] = add ? dots[e + l] + last[l] : last[l];
        }
    }
}

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
