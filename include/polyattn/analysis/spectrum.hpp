#pragma once

#include <polyattn/core/rng.hpp>
#include <polyattn/plan/plan.hpp>
#include <polyattn/policy/diffusion/concept.hpp>

#include <cmath>
#include <complex>

POLYATTN_BEGIN_NAMESPACE

/// The random walk on a plan that takes each key of a row with the same probability: A with all scores equal. Every row needs a key.
class UniformWalk {
public:
    /// Throws invalid_input unless the plan is square and every query sees a key.
    explicit UniformWalk(const Plan& plan) : csr_(plan.to_csr()), tokens_(static_cast<std::size_t>(plan.queries())) {
        detail::require(plan.queries() == plan.keys(), "plan", "as many queries as keys", plan.queries());
        for (std::size_t i = 0; i < tokens_; ++i) detail::require(degree(i) > 0, "plan", "at least one key a query", std::string("a query without keys"));
    }
    std::size_t tokens() const { return tokens_; }
    offset_t degree(std::size_t i) const { return csr_.offsets[i + 1] - csr_.offsets[i]; }
    const Csr& csr() const { return csr_; }

    /// A x. Throws invalid_input unless x has a number for each token.
    std::vector<double> apply(const std::vector<double>& x) const {
        check(x);
        std::vector<double> y(tokens_, 0.);
        for (std::size_t i = 0; i < tokens_; ++i) {
            for (offset_t e = csr_.offsets[i]; e < csr_.offsets[i + 1]; ++e) y[i] += x[static_cast<std::size_t>(csr_.keys[static_cast<std::size_t>(e)])];
            y[i] /= double(degree(i));
        }
        return y;
    }
    /// x A: a distribution after one step.
    std::vector<double> step(const std::vector<double>& x) const {
        check(x);
        std::vector<double> y(tokens_, 0.);
        for (std::size_t i = 0; i < tokens_; ++i)
            for (offset_t e = csr_.offsets[i]; e < csr_.offsets[i + 1]; ++e) y[static_cast<std::size_t>(csr_.keys[static_cast<std::size_t>(e)])] += x[i] / double(degree(i));
        return y;
    }
    /// j sees i whenever i sees j.
    bool is_symmetric() const {
        for (std::size_t i = 0; i < tokens_; ++i)
            for (offset_t e = csr_.offsets[i]; e < csr_.offsets[i + 1]; ++e) {
                const auto j = static_cast<std::size_t>(csr_.keys[static_cast<std::size_t>(e)]);
                if (!std::binary_search(csr_.keys.begin() + csr_.offsets[j], csr_.keys.begin() + csr_.offsets[j + 1], static_cast<index_t>(i))) return false;
            }
        return true;
    }

private:
    void check(const std::vector<double>& x) const { detail::require(x.size() == tokens_, "x", [&] { return detail::text(tokens_, " numbers"); }, x.size()); }

    Csr csr_;
    std::size_t tokens_;
};

namespace detail {

inline double dot(const std::vector<double>& a, const std::vector<double>& b) {
    double sum = 0;
    for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum;
}
inline void add_scaled(std::vector<double>& a, double factor, const std::vector<double>& b) {
    for (std::size_t i = 0; i < a.size(); ++i) a[i] += factor * b[i];
}
inline std::vector<double> start_vector(std::size_t n) {
    std::vector<double> x(n);
    for (std::size_t i = 0; i < n; ++i) x[i] = double(philox({static_cast<std::uint32_t>(i), 0, 0, 0}, {0x706f6c79u, 0x6174746eu})[0]) / 2147483648. - 1;
    return x;
}

/// Number of eigenvalues of a symmetric tridiagonal matrix below x (Sturm sequence).
inline std::size_t eigenvalues_below(const std::vector<double>& diagonal, const std::vector<double>& off, double x) {
    std::size_t count = 0;
    double pivot = 1;
    for (std::size_t i = 0; i < diagonal.size(); ++i) {
        pivot = diagonal[i] - x - (i > 0 ? off[i - 1] * off[i - 1] / pivot : 0);
        if (pivot == 0) pivot = 1e-300;
        count += pivot < 0;
    }
    return count;
}
/// The `index`-th smallest eigenvalue of a symmetric tridiagonal matrix within [-1.5, 1.5], by bisection.
inline double tridiagonal_eigenvalue(const std::vector<double>& diagonal, const std::vector<double>& off, std::size_t index) {
    double low = -1.5, high = 1.5;
    while (high - low > 1e-15) {
        const double middle = (low + high) / 2;
        if (middle <= low || middle >= high) break;
        (eigenvalues_below(diagonal, off, middle) > index ? high : low) = middle;
    }
    return (low + high) / 2;
}

}  // namespace detail

/// The extreme eigenvalues of a walk besides the eigenvalue 1 of the constant vector.
struct WalkExtremes {
    double smallest, largest;
    double second() const { return std::max(std::abs(smallest), std::abs(largest)); }
};

/// Extremes of a symmetric plan's uniform walk by Lanczos iteration on D^(1/2) A D^(-1/2), with full reorthogonalisation.
/// O(steps x (pairs + steps n)) time, O(steps n) memory. Throws invalid_input unless the plan is symmetric with at least two tokens,
/// and steps >= 1.
inline WalkExtremes walk_extremes(const Plan& plan, int steps = 400) {
    detail::require(steps >= 1, "steps", "a number >= 1", steps);
    const UniformWalk walk(plan);
    const std::size_t n = walk.tokens();
    detail::require(n >= 2, "plan", "at least two tokens", n);
    detail::require(walk.is_symmetric(), "plan", "a symmetric one: j sees i whenever i sees j", std::string("a directed one"));
    std::vector<double> root(n), x = detail::start_vector(n);
    for (std::size_t i = 0; i < n; ++i) root[i] = std::sqrt(double(walk.degree(i)));
    const double norm = std::sqrt(detail::dot(root, root));
    std::vector<double> top = root;
    for (double& t : top) t /= norm;
    std::vector<std::vector<double>> basis;
    std::vector<double> diagonal, off;
    const auto clean = [&](std::vector<double>& y) {
        for (int twice = 0; twice < 2; ++twice) {
            detail::add_scaled(y, -detail::dot(y, top), top);
            for (const auto& b : basis) detail::add_scaled(y, -detail::dot(y, b), b);
        }
    };
    clean(x);
    for (int step = 0; step < steps && static_cast<std::size_t>(step) + 1 < n; ++step) {
        const double length = std::sqrt(detail::dot(x, x));
        if (length < 1e-13) break;  // an invariant subspace: nothing is left
        if (step > 0) off.push_back(length);
        for (double& value : x) value /= length;
        basis.push_back(x);
        std::vector<double> scaled = x;
        for (std::size_t i = 0; i < n; ++i) scaled[i] /= root[i];
        x = walk.apply(scaled);
        for (std::size_t i = 0; i < n; ++i) x[i] *= root[i];
        diagonal.push_back(detail::dot(x, basis.back()));
        clean(x);
    }
    if (diagonal.empty()) return {0, 0};
    return {detail::tridiagonal_eigenvalue(diagonal, off, 0), detail::tridiagonal_eigenvalue(diagonal, off, diagonal.size() - 1)};
}

/// |second eigenvalue| of the uniform walk: by Lanczos for a symmetric plan, else by power iteration on A without its stationary
/// part, as the mean growth over the last half of the steps (complex pairs rotate, so single steps mislead): two to three digits.
/// O(steps x pairs). Throws invalid_input unless the plan is square, every query sees a key, and steps >= 10.
inline double second_eigenvalue(const Plan& plan, int steps = 400) {
    detail::require(steps >= 10, "steps", "a number >= 10", steps);
    const UniformWalk walk(plan);
    if (walk.is_symmetric()) return walk_extremes(plan, steps).second();
    const std::size_t n = walk.tokens();
    std::vector<double> stationary(n, 1. / double(n));
    for (int step = 0; step < steps; ++step) stationary = walk.step(stationary);
    std::vector<double> x = detail::start_vector(n);
    double growth = 0;
    int counted = 0;
    for (int step = 0; step < steps; ++step) {
        const double mean = detail::dot(stationary, x);
        for (double& value : x) value -= mean;
        const double length = std::sqrt(detail::dot(x, x));
        if (length == 0) return 0;
        for (double& value : x) value /= length;
        if (step > steps / 2) {
            growth += std::log(length);
            ++counted;
        }
        x = walk.apply(x);
    }
    return std::exp(growth / counted);
}

/// What a diffusion does to an eigenvector of A with eigenvalue mu: p(mu) of out = p(A) V. For PPR with K to infinity this is
/// alpha / (1 - (1 - alpha) mu). Source: Diffuser (AAAI 2023), "spectral" view of the diffusion.
template <class Number>
Number diffusion_filter(const Recursion& recursion, Number mu) {
    Number z = static_cast<Number>(recursion.start);
    for (const Hop& hop : recursion.hops) z = static_cast<Number>(hop.walk) * mu * z + static_cast<Number>(hop.teleport);
    return z;
}

POLYATTN_END_NAMESPACE
