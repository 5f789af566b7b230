#pragma once
// xsimd 8 to 14 behind a few functions, and what it has no operation for.

#include <polyattn/core/config.hpp>

#include <xsimd/xsimd.hpp>

#include <bit>
#include <cstring>
#include <limits>
#include <utility>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

template <class Arch>
using arch_or_default = std::conditional_t<std::is_void_v<Arch>, xsimd::default_arch, Arch>;

template <class T, class A>
using Vec = xsimd::batch<T, A>;

template <class T, class A>
inline constexpr int lanes = static_cast<int>(Vec<T, A>::size);

#if XSIMD_WITH_AVX512F
template <class A>
inline constexpr bool is_avx512 = std::is_base_of_v<xsimd::avx512f, A>;
#else
template <class A>
inline constexpr bool is_avx512 = false;
#endif

#if XSIMD_WITH_AVX
template <class A>
inline constexpr bool is_avx = std::is_base_of_v<xsimd::avx, A>;
#endif

/// a * b + c. xsimd 8 has no AVX-512 form of it: a product and a sum become one operation only by contraction, and bits must
/// not hang on that.
template <class T, class A>
POLYATTN_ALWAYS_INLINE Vec<T, A> multiply_add(Vec<T, A> a, Vec<T, A> b, Vec<T, A> c) {
#if XSIMD_WITH_AVX512F
    if constexpr (is_avx512<A>) {
        if constexpr (std::is_same_v<T, float>) return _mm512_fmadd_ps(a, b, c);
        else return _mm512_fmadd_pd(a, b, c);
    } else
#endif
        return xsimd::fma(a, b, c);
}

template <class T, class A>
POLYATTN_ALWAYS_INLINE T lane_sum(Vec<T, A> a) {
#if XSIMD_VERSION_MAJOR >= 10
    return xsimd::reduce_add(a);
#else
    return xsimd::hadd(a);
#endif
}

template <class To, class T, class A>
POLYATTN_ALWAYS_INLINE Vec<To, A> bit_cast(Vec<T, A> a) {
#if XSIMD_VERSION_MAJOR >= 10
    return xsimd::bitwise_cast<To>(a);
#else
    return xsimd::bitwise_cast<Vec<To, A>>(a);
#endif
}

/// a0 b0 a1 b1 .. of the lower halves, or of the upper ones. xsimd 8 interleaves within parts of 128 bits on AVX.
template <bool Upper, class T, class A>
POLYATTN_ALWAYS_INLINE Vec<T, A> interleave(Vec<T, A> a, Vec<T, A> b) {
#if XSIMD_WITH_AVX512F
    if constexpr (is_avx512<A>) {
        if constexpr (std::is_same_v<T, float>) {
            constexpr int i = Upper ? 8 : 0;
            return _mm512_permutex2var_ps(a, _mm512_setr_epi32(i, i + 16, i + 1, i + 17, i + 2, i + 18, i + 3, i + 19, i + 4, i + 20, i + 5, i + 21, i + 6, i + 22, i + 7, i + 23), b);
        } else {
            constexpr int i = Upper ? 4 : 0;
            return _mm512_permutex2var_pd(a, _mm512_setr_epi64(i, i + 8, i + 1, i + 9, i + 2, i + 10, i + 3, i + 11), b);
        }
    } else
#endif
#if XSIMD_WITH_AVX
    if constexpr (is_avx<A>) {
        constexpr int halves = Upper ? 0x31 : 0x20;
        if constexpr (std::is_same_v<T, float>) return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), halves);
        else return _mm256_permute2f128_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b), halves);
    } else
#endif
    if constexpr (Upper) return xsimd::zip_hi(a, b);
    else return xsimd::zip_lo(a, b);
}

/// a0 + a1, a2 + a3, .. then b0 + b1, b2 + b3, ..
template <class A>
POLYATTN_ALWAYS_INLINE Vec<float, A> pair_sums(Vec<float, A> a, Vec<float, A> b) {
#if XSIMD_WITH_AVX512F
    if constexpr (is_avx512<A>) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        return Vec<float, A>(_mm512_permutex2var_ps(a, even, b)) + Vec<float, A>(_mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b));
    } else
#endif
#if XSIMD_WITH_AVX
    if constexpr (is_avx<A>) return _mm256_hadd_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    else
#endif
    {
        // Interleaved once more than log2(lanes) times, all would be in its place again: so often, the even ones are first.
        for (int round = 1; round < lanes<float, A>; round *= 2) {
            const Vec<float, A> lower = interleave<false, float, A>(a, b);
            b = interleave<true, float, A>(a, b);
            a = lower;
        }
        return a + b;
    }
}

/// from[0], .. from[Count - 1] again and again.
template <int Count, class T, class A>
POLYATTN_ALWAYS_INLINE Vec<T, A> repeat(const T* from) {
    if constexpr (Count == 1) return Vec<T, A>(*from);
    else if constexpr (Count == lanes<T, A>) return Vec<T, A>::load_unaligned(from);
    else {
        static_assert(Count * sizeof(T) == sizeof(double));
        double both;
        std::memcpy(&both, from, sizeof both);
        return bit_cast<T>(Vec<double, A>(both));
    }
}

/// The vector in a register of its own. With 16 registers GCC would rather load a value again for each use, and tiles are bound by loads.
template <class T, class A>
POLYATTN_ALWAYS_INLINE Vec<T, A> in_register(Vec<T, A> a) {
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
    if constexpr (!is_avx512<A>) {
        typename Vec<T, A>::register_type held = a;
        asm("" : "+x"(held));
        return held;
    }
#endif
    return a;
}

/// Numbers of a line of the caches.
template <class T>
inline constexpr index_t cache_line = 64 / sizeof(T);
/// Fetches the line into the second-level cache, one that will be written to into the first.
template <bool Write = false>
POLYATTN_ALWAYS_INLINE void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address, Write, Write ? 3 : 2);
    asm volatile("");  // GCC takes a function that only fetches for one without effect, and drops its calls
#endif
}

/// Calls f(integral_constant 0), .. f(integral_constant N - 1): unrolled by every compiler, which loops with pragmas are not.
template <int N, class F>
POLYATTN_ALWAYS_INLINE void unroll(F&& f) {
    [&]<int... I>(std::integer_sequence<int, I...>) POLYATTN_INLINE_LAMBDA { (f(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

/// Calls f(integer_sequence 0, .., N - 1) for a fold expression over all of them: one function to compile where unroll() makes N.
template <int N, class F>
POLYATTN_ALWAYS_INLINE void expand(F&& f) {
    f(std::make_integer_sequence<int, N>{});
}
template <int... I>
using Ints = std::integer_sequence<int, I...>;

/// Calls f(integral_constant N) for the N of 1 .. Most that `count` is.
template <int Most, class F>
POLYATTN_ALWAYS_INLINE void with_count(int count, F&& f) {
    [&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((count == I + 1 ? f(std::integral_constant<int, I + 1>{}) : void()), ...); }(std::make_integer_sequence<int, Most>{});
}

/// As many vectors (or other things) as a vector has lanes.
template <class T, class A, class Element = Vec<T, A>>
using PerLane = Element[static_cast<std::size_t>(lanes<T, A>)];

/// Transposes lanes x lanes values in registers: each round interleaves the first half with the second.
template <class T, class A>
POLYATTN_ALWAYS_INLINE void transpose(PerLane<T, A>& rows) {
    constexpr int width = lanes<T, A>;
    constexpr int rounds = std::bit_width(static_cast<unsigned>(width)) - 1;
    for (int round = 0; round < rounds; ++round)
        expand<width>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA {
            const PerLane<T, A> next = {interleave<I % 2 == 1, T, A>(rows[I / 2], rows[I / 2 + width / 2])...};
            ((rows[I] = next[I]), ...);
        });
}

/// to[i][..] = column i of the vectors row(0), row(1), ..: lanes x lanes values; `to` is aligned.
template <class T, class A, class Row>
POLYATTN_ALWAYS_INLINE void transpose_block(Row&& row, T* to, std::ptrdiff_t stride) {
    constexpr int width = lanes<T, A>;
    PerLane<T, A> block;
    expand<width>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((block[I] = row(std::integral_constant<int, I>{})), ...); });
    transpose<T, A>(block);
    expand<width>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { (block[I].store_aligned(to + I * stride), ...); });
}

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
