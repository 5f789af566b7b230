#pragma once

#include <polyattn/backend/simd/exp2.hpp>
#include <polyattn/backend/simd/rows.hpp>

#include <numbers>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

// P(z < -y) e^(y^2 / 2) (y + 4) / 4 for y >= 0 as a polynomial of (y - 4) / (y + 4), from Chebyshev series. Relative error 4e-8 (float), 1.2e-16
// (double). The form of Shepherd and Laframboise, "Chebyshev approximation of (1 + 2x) exp(x^2) erfc x" (1981).
template <class T>
inline constexpr T normal_tail_coefficients[1] = {};
template <>
inline constexpr float normal_tail_coefficients<float>[10] = {0.188821282f,  -0.151974101f,   0.0967843907f,   -0.0466316777f, 0.015098824f,
                                                              -0.00187805785f, -0.000869041974f, 0.000390946725f, 3.23314203e-5f, -3.93301424e-5f};
template <>
inline constexpr double normal_tail_coefficients<double>[24] = {
    0.188821282603937863,     -0.151974160492973075,    0.0967843501855566505,   -0.046630464489909153,   0.0150991437225902296,   -0.00188504724184657814,
    -0.000869923089162875655, 0.000407704616852477115,  0.0000333360522900369482, -0.0000577737543406935645, -4.76919007679774537e-7, 8.78627797570941282e-6,
    1.78650538281686543e-7,   -1.48040276148099434e-6,  -1.56238776939129447e-7, 2.56196275413819335e-7,  6.61834320494966956e-8,  -3.99434903555980512e-8,
    -1.96959008567340945e-8,  4.46123194324535405e-9,   4.01684673933235045e-9,  -1.46840669124679767e-10, -4.22164424169668373e-10, -2.99944550781327365e-11};

/// P(z < x) and the density at x of a standard normal z. Relative errors of at most (1.25 x^2 + 16) units of rounding, in the far tail too, until
/// e^(-x^2 / 2) leaves the normal numbers and counts as 0.
template <class T, class A>
struct Normal {
    using V = simd::Vec<T, A>;
    V probability, density;

    POLYATTN_ALWAYS_INLINE explicit Normal(V x) {
        constexpr auto& c = normal_tail_coefficients<T>;
        constexpr int degree = static_cast<int>(std::size(c)) - 1;
        const V y = xsimd::abs(x), share = V(T(4)) / (y + V(T(4))), s = V(T(1)) - (share + share);
        V p(c[degree]);
        simd::unroll<degree>([&](auto k) POLYATTN_INLINE_LAMBDA { p = simd::multiply_add(p, s, V(c[degree - 1 - k])); });
        const V power = simd::pow2<T, A>(x * x * V(static_cast<T>(-.5 * std::numbers::log2e)));
        const V tail = power * share * p;
        probability = xsimd::select(x < V(T(0)), tail, V(T(1)) - tail);
        density = power * V(static_cast<T>(std::numbers::inv_sqrtpi / std::numbers::sqrt2));
    }
};

/// y = x P(z < x), z standard normal. Source: Hendrycks and Gimpel, "Gaussian error linear units" (2016), the exact form.
template <class T>
void gelu(const T* x, index_t count, T* y) {
    using A = xsimd::default_arch;
    simd::map_row<T, A>(x, y, count, [](simd::Vec<T, A> value, simd::Vec<T, A>) { return value * Normal<T, A>(value).probability; });
}
/// d_y *= gelu'(x).
template <class T>
void multiply_gelu_slope(const T* x, index_t count, T* d_y) {
    using A = xsimd::default_arch;
    simd::map_row<T, A>(x, d_y, count, [](simd::Vec<T, A> value, simd::Vec<T, A> gradient) {
        const Normal<T, A> normal(value);
        return gradient * simd::multiply_add(value, normal.density, normal.probability);
    });
}

}  // namespace detail

POLYATTN_END_NAMESPACE
