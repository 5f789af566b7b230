#pragma once
// Derived error bounds. With u the unit roundoff, a score q.k/sqrt(d) + bias is off by at most delta = (d + 3) u max_j (sum_c |q_c k_jc|
// scale + |bias|), so a weight is off by a factor within 1 +- eps, eps = 2 delta + 8 (1 + keys) u (exponential, sum and quotient
// included). A result is a sum of products of such factors; its error is at most (number of factors) eps times the same sum
// with all terms taken by magnitude, which this header computes in double.

#include <polyattn/backend/head.hpp>

#include <cmath>

struct Bounds2D {
    std::vector<double> out, d_q, d_k, d_v;  // per entry, row-major
};

/// Bounds for one head. `rounding` is u of the tested type.
template <class Bias>
Bounds2D error_bounds(const polyattn::detail::Head<double, Bias>& head, const polyattn::MatrixView<const double>* d_out, double rounding) {
    using polyattn::index_t;
    const index_t n = head.q.rows, keys = head.k.rows, d = head.q.cols, e = head.v.cols;
    const auto at = [](index_t row, index_t columns, index_t c) { return static_cast<std::size_t>(row) * static_cast<std::size_t>(columns) + static_cast<std::size_t>(c); };
    std::vector<std::vector<std::pair<index_t, double>>> rows(static_cast<std::size_t>(n));
    double delta = 0, most_keys = 0, highest_logsumexp = 0;
    for (index_t i = 0; i < head.query_length; ++i) {
        auto& row = rows[static_cast<std::size_t>(i)];
        double highest = -1e300, sum = 0;
        head.plan->for_each_key(i, [&](index_t j) {
            if (j >= head.key_length) return;
            double score = 0, magnitude = 0;
            for (index_t c = 0; c < d; ++c) {
                score += head.q(i, c) * head.k(j, c);
                magnitude += std::abs(head.q(i, c) * head.k(j, c));
            }
            const double bias = (*head.bias)(head.batch, head.head, i, j);
            delta = std::max(delta, (d + 3) * rounding * (magnitude * std::abs(head.scale) + std::abs(bias)));
            row.emplace_back(j, score * head.scale + bias);
            highest = std::max(highest, row.back().second);
        });
        for (auto& [j, weight] : row) sum += weight = std::exp(weight - highest);
        for (auto& [j, weight] : row) weight *= (head.dropout.drops_weights() ? head.dropout.weight(i, j) : 1) / sum;
        if (!row.empty()) highest_logsumexp = std::max(highest_logsumexp, std::abs(highest + std::log(sum)));
        most_keys = std::max(most_keys, double(row.size()));
    }
    const auto& hops = head.recursion->hops;
    const double count = double(hops.size());
    const double eps = 2 * delta + 8 * (1 + most_keys) * rounding;
    const double eps_backward = eps + 4 * rounding * (1 + highest_logsumexp);  // weights from the saved logsumexp
    // Z_k and G_k by magnitude.
    const auto mask = [&](std::size_t k, index_t i, index_t c) {
        return head.dropout.drops_values() ? head.dropout.values_of_four(static_cast<int>(k), i, c / 4)[static_cast<std::size_t>(c % 4)] : 1.;
    };
    std::vector<std::vector<double>> z(hops.size() + 1);
    z[0].resize(static_cast<std::size_t>(keys) * static_cast<std::size_t>(e));
    for (index_t j = 0; j < keys; ++j)
        for (index_t c = 0; c < e; ++c) z[0][at(j, e, c)] = std::abs(head.recursion->start * head.v(j, c));
    for (std::size_t k = 0; k < hops.size(); ++k) {
        z[k + 1].assign(static_cast<std::size_t>(n) * static_cast<std::size_t>(e), 0);
        for (index_t i = 0; i < n; ++i) {
            if (rows[static_cast<std::size_t>(i)].empty()) continue;
            for (index_t c = 0; c < e; ++c) {
                double sum = 0;
                for (const auto& [j, weight] : rows[static_cast<std::size_t>(i)]) sum += weight * z[k][at(j, e, c)];
                z[k + 1][at(i, e, c)] = mask(k, i, c) * (std::abs(hops[k].walk) * sum + (hops[k].teleport != 0 ? std::abs(hops[k].teleport * head.v(i, c)) : 0));
            }
        }
    }
    Bounds2D bounds;
    for (const double value : z.back()) bounds.out.push_back((count + 1) * eps * value + 1e-300);
    if (!d_out) return bounds;

    std::vector<double> g(static_cast<std::size_t>(n) * static_cast<std::size_t>(e)), d_v(static_cast<std::size_t>(keys) * static_cast<std::size_t>(e), 0), mean(static_cast<std::size_t>(n), 0);
    std::vector<std::vector<double>> d_weight(static_cast<std::size_t>(n));
    for (index_t i = 0; i < n; ++i) {
        d_weight[static_cast<std::size_t>(i)].assign(rows[static_cast<std::size_t>(i)].size(), 0);
        for (index_t c = 0; c < e; ++c) g[at(i, e, c)] = std::abs((*d_out)(i, c));
    }
    for (std::size_t k = hops.size(); k-- > 0;) {
        std::vector<double> next(static_cast<std::size_t>(keys) * static_cast<std::size_t>(e), 0);
        for (index_t i = 0; i < n; ++i) {
            const auto& row = rows[static_cast<std::size_t>(i)];
            if (row.empty()) continue;
            for (index_t c = 0; c < e; ++c) {
                const double own = mask(k, i, c) * g[at(i, e, c)];
                const double teleport = hops[k].teleport != 0 ? std::abs(hops[k].teleport * head.v(i, c)) : 0;
                mean[static_cast<std::size_t>(i)] += g[at(i, e, c)] * z[k + 1][at(i, e, c)] + own * teleport;
                if (hops[k].teleport != 0) d_v[at(i, e, c)] += std::abs(hops[k].teleport) * own;
                for (std::size_t s = 0; s < row.size(); ++s) {
                    next[at(row[s].first, e, c)] += std::abs(hops[k].walk) * row[s].second * own;
                    d_weight[static_cast<std::size_t>(i)][s] += std::abs(hops[k].walk) * own * z[k][at(row[s].first, e, c)] *
                                                                (head.dropout.drops_weights() ? head.dropout.weight(i, row[s].first) : 1);
                }
            }
        }
        g = std::move(next);
    }
    for (std::size_t x = 0; x < d_v.size(); ++x) d_v[x] += std::abs(head.recursion->start) * g[x];
    // Longest sum of a gradient: over all queries, or over K e columns.
    const double sums = (2. * double(n + keys) + (count + 1) * double(e + d) + 16) * rounding;
    std::vector<double> d_q(static_cast<std::size_t>(n) * static_cast<std::size_t>(d), 0), d_k(static_cast<std::size_t>(keys) * static_cast<std::size_t>(d), 0);
    for (index_t i = 0; i < n; ++i) {
        const auto& row = rows[static_cast<std::size_t>(i)];
        for (std::size_t s = 0; s < row.size(); ++s) {
            const auto [j, weight] = row[s];
            // A dropped weight still has its part of the softmax's row sum.
            const double plain = head.dropout.drops_weights() ? 1 : weight;
            const double d_score = plain * (d_weight[static_cast<std::size_t>(i)][s] + mean[static_cast<std::size_t>(i)]) * std::abs(head.scale);
            for (index_t c = 0; c < d; ++c) {
                d_q[at(i, d, c)] += d_score * std::abs(head.k(j, c));
                d_k[at(j, d, c)] += d_score * std::abs(head.q(i, c));
            }
        }
    }
    const double factor = (2 * count + 3) * eps_backward + sums;
    for (const double value : d_q) bounds.d_q.push_back(factor * value + 1e-300);
    for (const double value : d_k) bounds.d_k.push_back(factor * value + 1e-300);
    for (const double value : d_v) bounds.d_v.push_back(factor * value + 1e-300);
    return bounds;
}
