#pragma once

#include <polyattn/backend/simd/vector.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

inline constexpr double log2_e = 1.4426950408889634074;
inline constexpr double ln_2 = 0.69314718055994530942;

// Minimax polynomials of 2^f (relative error, Remez exchange): float on [0, 1), 7.5e-8; double on [-1/2, 1/2], 3.1e-18.
template <class T>
inline constexpr T exp2_coefficients[1] = {};
template <>
inline constexpr float exp2_coefficients<float>[6] = {0.999999925067f, 0.693153073129f, 0.240153617398f,
                                                      0.0558263171427f, 0.00898934111513f, 0.00187757628181f};
template <>
inline constexpr double exp2_coefficients<double>[12] = {
    0.9999999999999999971, 0.69314718055994533046, 0.24022650695910156205, 0.055504108664819921483,
    0.0096181291075883350833, 0.0013333558146789950323, 0.00015403530462514613026, 0.0000152527334899608046,
    1.3215433089594629037e-6, 1.0178198033328527662e-7, 7.0741056262456593708e-9, 4.4352809446103361611e-10};

/// 2^t. Below the smallest normal number, -infinity included, the result is exactly 0; NaN stays NaN; t < 128 (float), 1024
/// (double). Relative error at most 2e-7 (float), 3e-16 (double).
template <class T, class A>
POLYATTN_ALWAYS_INLINE Vec<T, A> pow2(Vec<T, A> t) {
    using V = Vec<T, A>;
    using I = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
    constexpr bool single = sizeof(T) == 4;
    constexpr int mantissa = single ? 23 : 52, exponent_bias = single ? 127 : 1023;
    constexpr auto& c = exp2_coefficients<T>;
    constexpr int degree = static_cast<int>(std::size(c)) - 1;

    const auto polynomial = [&](V f) POLYATTN_INLINE_LAMBDA {
        V p(c[degree]);
        unroll<degree>([&](auto k) POLYATTN_INLINE_LAMBDA { p = multiply_add(p, f, V(c[degree - 1 - k])); });
        return p;
    };
#if XSIMD_WITH_AVX512DQ
    // Fraction and scaling by 2^floor(t) are one instruction each.
    if constexpr (is_avx512<A> && single) {
        const V p = polynomial(V(_mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)));
        return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(t, V(-126.f), _CMP_NLT_UQ), p, t);
    }
#endif
    const V whole = single ? xsimd::floor(t) : xsimd::nearbyint(t);
    const V p = polynomial(t - whole);
    // 2^whole by its bits: adding 1.5 * 2^mantissa leaves whole + bias in the low ones. A product keeps NaN what it is.
    const V low_bits = whole + V(static_cast<T>(3 * (I{1} << (mantissa - 1)) + exponent_bias));
    const V scale = bit_cast<T>(bit_cast<I>(low_bits) << mantissa);
    return xsimd::select(t < V(static_cast<T>(1 - exponent_bias)), V(T(0)), p * scale);
}

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
