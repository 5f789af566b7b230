#pragma once

#include <polyattn/core/error.hpp>
#include <polyattn/policy/concept.hpp>

#include <concepts>
#include <numeric>
#include <span>
#include <vector>

POLYATTN_BEGIN_NAMESPACE

/// One step Z' = walk * A Z + teleport * V.
struct Hop {
    double walk = 1;
    double teleport = 0;
};

/// A polynomial in the attention operator A, evaluated by recursion: Z_0 = start * V, one Hop after the other; the last Z is
/// the output. On a row without keys every Z_k, k >= 1, is 0.
struct Recursion {
    double start = 1;
    std::vector<Hop> hops;

    /// out = sum_k theta[k] A^k V. With theta >= 0 every Z_k is a convex combination (up to the sum of theta at the end), so
    /// nothing grows on the way; otherwise plain Horner. Throws invalid_input for no coefficients or one that is not finite.
    static Recursion from_polynomial(std::span<const double> theta) {
        detail::require(!theta.empty(), "theta", "at least one coefficient", theta.size());
        bool convex = true;
        for (const double coefficient : theta) {
            detail::require(detail::is_finite(coefficient), "theta", "finite coefficients", "one that is not");
            convex &= coefficient >= 0;
        }
        const std::size_t degree = theta.size() - 1;
        Recursion recursion;
        if (degree == 0) return {theta[0], {}};
        if (!convex) {
            recursion.start = theta[degree];
            for (std::size_t k = degree; k-- > 0;) recursion.hops.push_back({1, theta[k]});
            return recursion;
        }
        // Z_j stands for (sum_{m >= k} theta_m A^(m-k) V) / (sum_{m >= k} theta_m): both parts of a step stay weights.
        double tail = theta[degree];
        recursion.start = tail > 0 ? 1 : 0;
        for (std::size_t k = degree; k-- > 0;) {
            const double next = tail + theta[k];
            const double scale = k == 0 || next == 0 ? 1 : next;  // the last step keeps the sum of theta
            recursion.hops.push_back({tail / scale, theta[k] / scale});
            tail = next;
        }
        return recursion;
    }
};

/// A DiffusionPolicy turns the attention operator A into a polynomial of it: recursion() gives the steps. A policy that
/// thinks in coefficients returns Recursion::from_polynomial(theta). One that always has the same number of hops may say so, `static constexpr int hops`: layers
/// then compile faster.
template <class P>
concept DiffusionPolicy = PolicyOf<P, diffusion_kind> && requires(const P& policy) {
    { policy.recursion() } -> std::same_as<Recursion>;
};

namespace detail {

/// A static member, whose address is plain, not one of each object that happens to be called so.
template <class Diffusion>
concept SaysHops = requires {
    { &Diffusion::hops } -> std::same_as<const int*>;
};

template <class Diffusion>
constexpr bool may_have_one_hop() {
    if constexpr (SaysHops<Diffusion>) return Diffusion::hops == 1;
    else return true;
}

}  // namespace detail

POLYATTN_END_NAMESPACE
