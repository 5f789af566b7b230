#pragma once

#include <polyattn/policy/diffusion/concept.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <string>

POLYATTN_BEGIN_NAMESPACE

/// out = A V: plain attention.
struct NoDiffusion {
    using policy_kind = diffusion_kind;
    static constexpr int hops = 1;
    Recursion recursion() const { return {1, {Hop{1, 0}}}; }
};

/// Personalised PageRank, truncated: Z_0 = V, Z_{k+1} = (1 - alpha) A Z_k + alpha V, K times. The weights of V, A V, .. A^K V
/// are alpha (1 - alpha)^k for k < K and (1 - alpha)^K: they sum to 1. alpha in [0, 1]; K = 0 returns V.
/// Source: Diffuser (AAAI 2023), equations of "attention diffusion"; there K = 5, alpha = 0.1.
template <int K>
struct PPR {
    static_assert(K >= 0, "polyattn: PPR<K> needs K >= 0 hops");
    using policy_kind = diffusion_kind;
    static constexpr int hops = K;
    double alpha = .1;

    void validate() const { detail::require_in_range(alpha, 0, 1, "alpha", "a teleport probability from 0 to 1"); }
    Recursion recursion() const { return {1, std::vector<Hop>(static_cast<std::size_t>(K), Hop{1 - alpha, alpha})}; }
};

/// out = sum_k theta_k A^k V with theta_k = e^-t t^k / k!, k = 0..K, normalised to sum 1. t >= 0.
/// Source: Chung, "The heat kernel as the pagerank of a graph" (2007).
template <int K>
struct HeatKernel {
    static_assert(K >= 0, "polyattn: HeatKernel<K> needs K >= 0 hops");
    using policy_kind = diffusion_kind;
    static constexpr int hops = K;
    double t = 3;

    void validate() const { detail::require_in_range(t, 0, 1e3, "t", "a diffusion time from 0 to 1000"); }
    Recursion recursion() const {
        std::array<double, K + 1> theta{};
        theta[0] = 1;
        if (t > 0) {
            // By logarithms, relative to the largest: t^k overflows, e^-t underflows.
            for (int k = 0; k <= K; ++k) theta[static_cast<std::size_t>(k)] = k * std::log(t) - std::lgamma(k + 1.);
            const double largest = *std::max_element(theta.begin(), theta.end());
            for (double& coefficient : theta) coefficient = std::exp(coefficient - largest);
        }
        const double sum = std::accumulate(theta.begin(), theta.end(), 0.);
        for (double& coefficient : theta) coefficient /= sum;
        return Recursion::from_polynomial(theta);
    }
};

/// out = sum_k theta[k] A^k V with one's own coefficients. Constant V is kept if they sum to 1; any finite ones are allowed.
template <int K>
struct Polynomial {
    static_assert(K >= 0, "polyattn: Polynomial<K> needs K >= 0 hops");
    using policy_kind = diffusion_kind;
    static constexpr int hops = K;
    std::array<double, K + 1> theta;

    void validate() const { (void)recursion(); }
    Recursion recursion() const { return Recursion::from_polynomial(theta); }
};

static_assert(DiffusionPolicy<NoDiffusion> && DiffusionPolicy<PPR<5>> && DiffusionPolicy<HeatKernel<5>> && DiffusionPolicy<Polynomial<2>>);

POLYATTN_END_NAMESPACE
