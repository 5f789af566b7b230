#pragma once
// The assumptions and bounds of Diffuser's theorems (AAAI 2023, definition 1, theorems 2 and 3), checked on a given plan.

#include <polyattn/analysis/spectrum.hpp>

POLYATTN_BEGIN_NAMESPACE

/// What the theorems assume of a pattern, and what this one has. O(n log n).
struct TheoremAssumptions {
    bool sees_itself;       // every token attends to itself
    bool hamiltonian_band;  // every token attends to its neighbours, which gives a Hamiltonian path
};
inline TheoremAssumptions theorem_assumptions(const Plan& plan) {
    TheoremAssumptions found{true, true};
    for (index_t i = 0; i < std::min(plan.queries(), plan.keys()); ++i) {
        found.sees_itself &= plan.contains(i, i);
        if (i > 0) found.hamiltonian_band &= plan.contains(i, i - 1) && plan.contains(i - 1, i);
    }
    return found;
}

/// Definition 1: a (degree, epsilon)-expander is an undirected graph with `degree` neighbours a token whose adjacency
/// eigenvalues, the first apart, are at most epsilon * degree in magnitude. Here the least such epsilon.
struct Expander {
    offset_t degree;
    double epsilon;
};
/// Throws invalid_input unless the plan is symmetric and regular and has two tokens or more.
inline Expander expander(const Plan& plan) {
    const UniformWalk walk(plan);
    detail::require(walk.tokens() >= 2, "plan", "at least 2 tokens", walk.tokens());
    for (std::size_t i = 1; i < walk.tokens(); ++i)
        detail::require(walk.degree(i) == walk.degree(0), "plan", "a regular one: the same number of keys a query", walk.degree(i));
    return {walk.degree(0), walk_extremes(plan).second()};
}

/// Theorem 2: an expander epsilon-approximates the complete graph: for every x the quadratic forms of their Laplacians, the
/// expander's times n / degree, have a ratio within 1 +- epsilon. The ratio for one x; x must not be constant.
inline double laplacian_ratio(const Plan& plan, const std::vector<double>& x) {
    const UniformWalk walk(plan);
    const double n = double(walk.tokens());
    const std::vector<double> ax = walk.apply(x);
    double mean = 0, graph = 0, complete = 0;
    for (const double value : x) mean += value / n;
    for (std::size_t i = 0; i < walk.tokens(); ++i) {
        graph += x[i] * n * (x[i] - ax[i]);
        complete += n * (x[i] - mean) * (x[i] - mean);
    }
    detail::require(complete > 0, "x", "numbers that are not all the same", std::string("equal ones"));
    return graph / complete;
}

/// Theorem 3: after t steps from token `start` the walk's distribution differs from its stationary one by at most
/// sqrt(n) beta^t (in sum of magnitudes) on a regular graph, beta the second eigenvalue's magnitude. The measured difference for
/// t = 0 .. steps. O(steps x pairs). Throws invalid_input unless the plan is symmetric and `start` a token of it.
inline std::vector<double> mixing_distance(const Plan& plan, index_t start, int steps) {
    const UniformWalk walk(plan);
    detail::require(start >= 0 && static_cast<std::size_t>(start) < walk.tokens(), "start", "a token of the plan", start);
    detail::require(walk.is_symmetric(), "plan", "a symmetric one: j sees i whenever i sees j", std::string("a directed one"));
    std::vector<double> at(walk.tokens(), 0.), distances;
    offset_t all = 0;
    for (std::size_t i = 0; i < walk.tokens(); ++i) all += walk.degree(i);
    at[static_cast<std::size_t>(start)] = 1;
    for (int t = 0; t <= steps; ++t) {
        double distance = 0;
        for (std::size_t i = 0; i < walk.tokens(); ++i) distance += std::abs(at[i] - double(walk.degree(i)) / double(all));
        distances.push_back(distance);
        at = walk.step(at);
    }
    return distances;
}
/// Theorem 3's bound.
inline double mixing_bound(index_t tokens, double beta, int t) { return std::sqrt(double(tokens)) * std::pow(beta, t); }

POLYATTN_END_NAMESPACE
