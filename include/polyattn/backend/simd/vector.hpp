#pragma once
// xsimd 8 to 14 behind a few functions, and what it has no operation for.

#include <polyattn/core/config.hpp>

#include <xsimd/xsimd.hpp>

#include <bit>
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

/// Calls f(integral_constant 0), .. f(integral_constant N - 1): unrolled by every compiler, which loops with pragmas are not.
template <int N, class F>
POLYATTN_ALWAYS_INLINE void unroll(F&& f) {
    [&]<int... I>(std::integer_sequence<int, I...>) POLYATTN_INLINE_LAMBDA { (f(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
