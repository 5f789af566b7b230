#pragma once
// Kernel attention of any backend against the reference within derived bounds. The including file declares tested_layer(score, pattern, recursion).

#include "layers.hpp"
#include "quartic.hpp"
#include "random.hpp"

#include <doctest/doctest.h>

using namespace polyattn;

/// Layers whose scores add an epsilon take no diffusion.
template <class Score>
inline constexpr bool takes_diffusion = !requires(const Score& score) { score.denominator.epsilon; };

namespace {

template <class T>
constexpr double unit = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;

/// Rounding of one head: with weights w_ij = phi(q_i) . phi(k_j) >= 0 and |fl(phi) - phi| <= `relative` phi, every sum has non-negative terms, so a
/// numerator, a denominator and their quotient are off by relative factors. A result of K hops is off by at most (K + 1) times that factor,
/// times the same expression with all values taken by magnitude.
struct Magnitudes {
    std::vector<double> out, d_q, d_k, d_v;
};

template <class Features>
Magnitudes magnitudes(const detail::KernelHead<double, Features>& head, const MatrixView<const double>& d_out) {
    const detail::reference::KernelOperator op = detail::reference::make_operator(head);
    const auto n = static_cast<std::size_t>(head.q.rows), keys = static_cast<std::size_t>(head.k.rows), e = static_cast<std::size_t>(head.v.cols), hops = head.recursion->hops.size();
    using Rows = std::vector<std::vector<double>>;
    const auto rows = [&](std::size_t count, auto&& entry) {
        Rows made(count, std::vector<double>(e));
        for (std::size_t i = 0; i < count; ++i)
            for (std::size_t c = 0; c < e; ++c) made[i][c] = std::abs(entry(static_cast<index_t>(i), static_cast<index_t>(c)));
        return made;
    };
    std::vector<Rows> z{rows(keys, [&](index_t j, index_t c) { return head.recursion->start * head.v(j, c); })};
    for (const Hop& hop : head.recursion->hops) {
        Rows next(n, std::vector<double>(e, 0));
        for (std::size_t i = 0; i < n; ++i)
            if (op.alive[i])
                for (std::size_t c = 0; c < e; ++c) {
                    for (const auto& edge : op.rows[i]) next[i][c] += std::abs(hop.walk) * edge.weight * z.back()[static_cast<std::size_t>(edge.key)][c];
                    if (hop.teleport != 0) next[i][c] += std::abs(hop.teleport * head.v(static_cast<index_t>(i), static_cast<index_t>(c)));
                }
        z.push_back(next);
    }
    Rows g = rows(n, [&](index_t i, index_t c) { return d_out(i, c); }), d_v(keys, std::vector<double>(e, 0));
    std::vector<std::vector<double>> d_pair(n);
    for (std::size_t i = 0; i < n; ++i) d_pair[i].assign(op.rows[i].size(), 0);
    std::vector<double> mean(n, 0);
    for (std::size_t k = hops; k-- > 0;) {
        const Hop& hop = head.recursion->hops[k];
        Rows next(keys, std::vector<double>(e, 0));
        for (std::size_t i = 0; i < n; ++i)
            if (op.alive[i])
                for (std::size_t c = 0; c < e; ++c) {
                    mean[i] += g[i][c] * (z[k + 1][i][c] + (hop.teleport != 0 ? std::abs(hop.teleport * head.v(static_cast<index_t>(i), static_cast<index_t>(c))) : 0));
                    if (hop.teleport != 0) d_v[i][c] += std::abs(hop.teleport) * g[i][c];
                    for (std::size_t s = 0; s < op.rows[i].size(); ++s) {
                        const auto j = static_cast<std::size_t>(op.rows[i][s].key);
                        next[j][c] += std::abs(hop.walk) * op.rows[i][s].weight * g[i][c];
                        d_pair[i][s] += std::abs(hop.walk) * g[i][c] * z[k][j][c];
                    }
                }
        g = next;
    }
    for (std::size_t j = 0; j < keys; ++j)
        for (std::size_t c = 0; c < e; ++c) d_v[j][c] += std::abs(head.recursion->start) * g[j][c];
    std::vector<std::vector<double>> d_q(op.q.size()), d_k(op.k.size());
    for (std::size_t i = 0; i < d_q.size(); ++i) d_q[i].assign(op.q[i].size(), 0);
    for (std::size_t j = 0; j < d_k.size(); ++j) d_k[j].assign(op.k[j].size(), 0);
    for (std::size_t i = 0; i < d_q.size(); ++i)
        if (op.denominators[i] != 0)
            for (std::size_t s = 0; s < op.rows[i].size(); ++s) {
                const auto j = static_cast<std::size_t>(op.rows[i][s].key);
                for (std::size_t c = 0; c < op.q[i].size(); ++c) {
                    d_q[i][c] += (d_pair[i][s] + mean[i]) / op.denominators[i] * op.k[j][c];
                    d_k[j][c] += (d_pair[i][s] + mean[i]) / op.denominators[i] * op.q[i][c];
                }
            }
    const auto through = [&](const MatrixView<const double>& x, const std::vector<std::vector<double>>& phi, const std::vector<std::vector<double>>& d_phi) {
        std::vector<double> d(static_cast<std::size_t>(x.rows) * static_cast<std::size_t>(x.cols), 0);
        for (std::size_t i = 0; i < phi.size(); ++i)
            for (index_t c = 0; c < x.cols; ++c) {
                double& to = d[i * static_cast<std::size_t>(x.cols) + static_cast<std::size_t>(c)];
                if constexpr (detail::has_directions<Features>) {
                    const double scale = std::pow(double(x.cols), -.25);
                    for (std::size_t r = 0; r < phi[i].size(); ++r)
                        to += d_phi[i][r] * phi[i][r] * scale * (std::abs((*head.features)->w[r * static_cast<std::size_t>(x.cols) + static_cast<std::size_t>(c)]) + std::abs(x(static_cast<index_t>(i), c)) * scale);
                } else to = d_phi[i][static_cast<std::size_t>(c)] * std::abs(head.features->derivative(x(static_cast<index_t>(i), c)));
            }
        return d;
    };
    Magnitudes result;
    for (const auto& row : z.back()) result.out.insert(result.out.end(), row.begin(), row.end());
    for (const auto& row : d_v) result.d_v.insert(result.d_v.end(), row.begin(), row.end());
    result.d_q = through(head.q, op.q, d_q);
    result.d_k = through(head.k, op.k, d_k);
    return result;
}

template <class Features>
index_t feature_count(const Features& features, index_t dim) {
    if constexpr (detail::has_directions<Features>) return features->count;
    else return dim;
}

/// A relative bound of fl(phi). Of e^x by 2^(x log2 e): the product's rounding, |x| log2(e) u, and 2e-7 (float) or 3e-16 of the power. Random
/// features: the exponents' dot products, d + 4 roundings of sums by magnitude, and the shift of the same size.
template <class T, class Features>
double feature_error(const Features& features, const MatrixView<const double>& q, const MatrixView<const double>& k) {
    const double u = unit<T>, power = sizeof(T) == 4 ? 3e-7 : 4e-16;
    double highest = 0;
    for (const auto* x : {&q, &k})
        for (index_t i = 0; i < x->rows; ++i) {
            if constexpr (detail::has_directions<Features>) {
                for (index_t r = 0; r < features->count; ++r) {
                    double sum = 0;
                    for (index_t c = 0; c < x->cols; ++c) {
                        const double y = std::abs((*x)(i, c)) * std::pow(double(x->cols), -.25);
                        sum += std::abs(features->w[static_cast<std::size_t>(r * x->cols + c)]) * y + y * y;
                    }
                    highest = std::max(highest, (x->cols + 8) * (sum + features->fixed_shift));
                }
            } else
                for (index_t c = 0; c < x->cols; ++c) highest = std::max(highest, 4 * std::abs((*x)(i, c)));
        }
    if constexpr (std::is_same_v<Features, ReLU>) return 0;
    else return 2 * highest * u + power;
}

template <class T, class Score, class Pattern>
void check_against_reference(Random& random, const Score& score, const Pattern& pattern, const Recursion& recursion, index_t queries, index_t keys, index_t d, index_t e, bool diffuses) {
    INFO(queries, " queries, ", keys, " keys, d = ", d, ", e = ", e, ", hops ", recursion.hops.size());
    const index_t batch = 2, heads = 2, key_heads = 1;
    CallOptions options;
    const bool may_be_ragged = queries == keys || !std::is_same_v<Pattern, Causal>;  // else refused
    if (may_be_ragged && random.below(2)) options.key_lengths = {keys, random.below(keys + 1)};
    const auto q = random.tensor<T>({batch, heads, queries, d}), k = random.tensor<T>({batch, key_heads, keys, d}), v = random.tensor<T>({batch, key_heads, keys, e}),
               d_out = random.tensor<T>({batch, heads, queries, e});
    const auto q2 = in_double(q), k2 = in_double(k), v2 = in_double(v), d_out2 = in_double(d_out);
    const auto fast = tested_layer(score, pattern, recursion);
    const auto exact = [&] {
        if constexpr (requires { score.denominator.epsilon; }) return Attention<Score, Pattern, Reference>{score, pattern};
        else return Attention<Score, Pattern, AnyDiffusion, Reference>{score, pattern, AnyDiffusion{recursion}};
    }();
    const auto [out, saved] = fast.forward(q.view(), k.view(), v.view(), options);
    const auto [exact_out, exact_saved] = exact.forward(q2.view(), k2.view(), v2.view(), options);
    CHECK(fast(q.view(), k.view(), v.view(), options).values == out.values);
    const auto gradient = fast.backward(saved, d_out.view());
    CHECK(gradient.q.values == fast.backward(saved, d_out.view()).q.values);
    const auto exact_gradient = exact.backward(exact_saved, d_out2.view());

    const auto features = detail::bind_features(score.features, d);
    using Features = std::remove_cvref_t<decltype(features)>;
    const Plan plan = pattern.plan(queries, keys);
    const detail::ZeroRow zero = detail::zero_row(score, diffuses);
    Tensor<double> b_out(exact_out.shape), b_q(q2.shape), b_k(k2.shape), b_v(v2.shape);
    double hops = double(exact.recursion().hops.size());
    for (index_t b = 0; b < batch; ++b)
        for (index_t h = 0; h < heads; ++h) {
            const index_t length = options.key_lengths.empty() ? keys : options.key_lengths[static_cast<std::size_t>(b)];
            const detail::KernelHead<double, Features> head{q2.view().head(b, h), k2.view().head(b, 0), v2.view().head(b, 0), &plan, &exact.recursion(), &features, zero,
                                                            detail::epsilon_of(score, zero), std::is_same_v<Pattern, Causal>, b, h, queries == keys ? length : queries, length, {}};
            const Magnitudes m = magnitudes(head, std::as_const(d_out2).view().head(b, h));
            // Sums over features, keys, queries and value columns, in any order; a quotient; the features twice.
            const double relative = 2 * feature_error<T>(features, head.q, head.k) + (2. * (feature_count(features, d) + keys) + queries + e + 12) * unit<T>;
            const auto add = [&](Tensor<double>& to, index_t head_at, const std::vector<double>& by, double factor) {
                for (std::size_t i = 0; i < by.size(); ++i) to.values[static_cast<std::size_t>(head_at) * by.size() + i] += factor * relative * by[i] + 1e-300;
            };
            add(b_out, b * heads + h, m.out, hops + 1);
            add(b_q, b * heads + h, m.d_q, 2 * hops + 2);
            add(b_k, b, m.d_k, 2 * hops + 2);
            add(b_v, b, m.d_v, 2 * hops + 2);
        }
    const auto compare = [&](const Tensor<T>& got, const Tensor<double>& wanted, const Tensor<double>& bound, const char* what) {
        REQUIRE(got.values.size() == wanted.values.size());
        double worst = 0;
        std::size_t where = 0;
        for (std::size_t i = 0; i < wanted.values.size(); ++i) {
            const double share = std::abs(double(got.values[i]) - wanted.values[i]) / (bound.values[i] * (sizeof(T) == 8 ? 2 : 1) + unit<T> * std::abs(wanted.values[i]) + 1e-300);
            if (!(share <= worst) && !std::isnan(worst)) worst = share, where = i;
        }
        INFO(what, " entry ", where, ": got ", got.values.empty() ? 0 : double(got.values[where]), ", wanted ", wanted.values.empty() ? 0 : wanted.values[where]);
        CHECK(worst <= 1);
    };
    compare(out, exact_out, b_out, "out");
    compare(gradient.q, exact_gradient.q, b_q, "d_q");
    compare(gradient.k, exact_gradient.k, b_k, "d_k");
    compare(gradient.v, exact_gradient.v, b_v, "d_v");
}

const std::vector<Recursion> recursions = {NoDiffusion{}.recursion(), PPR<3>{.alpha = .2}.recursion(), HeatKernel<2>{}.recursion(), PPR<0>{}.recursion()};

template <class T, class Score, class Pattern>
void check_sizes(Random& random, const Score& score, const Pattern& pattern) {
    constexpr bool diffuses = !requires { score.denominator.epsilon; };
    for (const index_t n : {0, 1, 2, 31, 32, 33, 63, 65, 129})
        check_against_reference<T>(random, score, pattern, diffuses ? recursions[static_cast<std::size_t>(random.below(4))] : recursions[0], n, n, 1 + random.below(20), random.below(20), diffuses);
    for (const auto& [queries, keys] : {std::pair{1, 70}, {40, 101}, {101, 40}, {33, 0}, {0, 5}})
        check_against_reference<T>(random, score, pattern, recursions[0], queries, keys, 16, 8, diffuses);
}

}  // namespace
