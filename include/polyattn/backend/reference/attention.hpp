#pragma once
// The definition of every operator and gradient, in plain double-precision loops. Deliberately dumb: speed is not wanted here.

#include <polyattn/backend/head.hpp>

#include <cmath>
#include <limits>

POLYATTN_BEGIN_NAMESPACE

namespace detail::reference {

struct Edge {
    index_t key;
    double score, weight, mask;  // natural-log score; A_ij; dropout's factor
};

/// The rows of A, with logsumexp; a row without keys (or with scores of -infinity only) is empty.
struct Operator {
    std::vector<std::vector<Edge>> rows;
    std::vector<double> logsumexp;
    std::vector<bool> alive;
};

template <class T, class Bias>
Operator make_operator(const Head<T, Bias>& head) {
    const auto queries = static_cast<std::size_t>(head.q.rows);
    Operator op{std::vector<std::vector<Edge>>(queries), std::vector<double>(queries, empty_row<double>()),
                std::vector<bool>(queries, false)};
    for (index_t i = 0; i < head.query_length; ++i) {
        auto& row = op.rows[static_cast<std::size_t>(i)];
        head.plan->for_each_key(i, [&](index_t j) {
            if (j >= head.key_length) return;
            double dot = 0;
            for (index_t c = 0; c < head.q.cols; ++c) dot += double(head.q(i, c)) * double(head.k(j, c));
            row.push_back({j, dot * head.scale + double((*head.bias)(head.batch, head.head, i, j)), 0, 1});
        });
        if (row.empty()) continue;
        double highest = -std::numeric_limits<double>::max(), sum = 0;
        for (const Edge& edge : row) highest = std::max(highest, edge.score);
        for (Edge& edge : row) sum += edge.weight = std::exp(edge.score - highest);
        if (sum == 0) {
            row.clear();
            continue;
        }
        for (Edge& edge : row) {
            edge.weight /= sum;
            if (head.dropout.drops_weights()) edge.mask = head.dropout.weight(i, edge.key);
        }
        op.alive[static_cast<std::size_t>(i)] = true;
        op.logsumexp[static_cast<std::size_t>(i)] = highest + std::log(sum);
    }
    return op;
}

/// Kernel scores: weight = phi(q) . phi(k) / denominator; what backward needs beside.
struct KernelOperator : Operator {
    std::vector<std::vector<double>> q, k;  // features
    std::vector<double> denominators;       // 0: the row is a mean, or empty
};

/// log phi, before the shift: w_r . y - |y|^2 / 2 - log(m) / 2.
template <class T>
std::vector<double> log_features(const RandomDirections& directions, const MatrixView<const T>& x, index_t i) {
    std::vector<double> exponents(static_cast<std::size_t>(directions.count));
    const double scale = std::pow(double(directions.dim), -.25);
    double square = 0;
    for (index_t c = 0; c < x.cols; ++c) square += double(x(i, c)) * scale * double(x(i, c)) * scale;
    for (std::size_t r = 0; r < exponents.size(); ++r) {
        double dot = 0;
        for (index_t c = 0; c < x.cols; ++c) dot += directions.w[r * static_cast<std::size_t>(x.cols) + static_cast<std::size_t>(c)] * double(x(i, c)) * scale;
        exponents[r] = dot - square / 2 - std::log(double(directions.count)) / 2;
    }
    return exponents;
}

/// Features of rows [0, length). Random features of queries are shifted by their largest exponent.
template <class T, class Features>
std::vector<std::vector<double>> features_of(const Features& features, const MatrixView<const T>& x, index_t length, bool queries, bool causal) {
    std::vector<std::vector<double>> rows(static_cast<std::size_t>(length));
    double highest = -std::numeric_limits<double>::max();
    for (index_t i = 0; i < length; ++i) {
        auto& row = rows[static_cast<std::size_t>(i)];
        if constexpr (has_directions<Features>) {
            row = log_features(*features, x, i);
            for (const double exponent : row) highest = std::max(highest, exponent);
        } else
            for (index_t c = 0; c < x.cols; ++c) row.push_back(double(features(double(x(i, c)))));
    }
    if constexpr (has_directions<Features>)
        for (auto& row : rows) {
            const double shift = queries ? *std::max_element(row.begin(), row.end()) : causal ? features->fixed_shift : highest;
            for (double& exponent : row) exponent = std::exp(exponent - shift);
        }
    return rows;
}

template <class T, class Features>
KernelOperator make_operator(const KernelHead<T, Features>& head) {
    const auto queries = static_cast<std::size_t>(head.q.rows);
    KernelOperator op;
    op.rows.resize(queries);
    op.logsumexp.assign(queries, empty_row<double>());
    op.alive.assign(queries, false);
    op.denominators.assign(queries, 0);
    op.q = features_of(*head.features, head.q, head.query_length, true, head.causal);
    op.k = features_of(*head.features, head.k, head.key_length, false, head.causal);
    for (index_t i = 0; i < head.query_length; ++i) {
        const auto at = static_cast<std::size_t>(i);
        auto& row = op.rows[at];
        double sum = 0;
        head.plan->for_each_key(i, [&](index_t j) {
            if (j >= head.key_length) return;
            double dot = 0;
            for (std::size_t c = 0; c < op.q[at].size(); ++c) dot += op.q[at][c] * op.k[static_cast<std::size_t>(j)][c];
            row.push_back({j, 0, dot, 1});
            sum += dot;
        });
        if (row.empty()) continue;
        const double denominator = head.zero == ZeroRow::epsilon ? sum + head.epsilon : sum;
        if (denominator == 0 && head.zero != ZeroRow::mean) {
            row.clear();
            continue;
        }
        op.denominators[at] = denominator;
        op.logsumexp[at] = denominator == 0 ? mean_row<double>() : 1 / denominator;
        op.alive[at] = true;
        for (Edge& edge : row) edge.weight = denominator == 0 ? 1 / double(row.size()) : edge.weight / denominator;
    }
    return op;
}

template <class Head, class T>
void forward(const Head& head, const HeadResult<T>& result, Workers&) {
    const auto op = make_operator(head);
    const index_t queries = head.q.rows, dim = head.v.cols;
    const auto width = static_cast<std::size_t>(dim);
    std::vector<double> z(static_cast<std::size_t>(head.v.rows) * width);
    for (index_t j = 0; j < head.v.rows; ++j)
        for (index_t c = 0; c < dim; ++c) z[static_cast<std::size_t>(j) * width + static_cast<std::size_t>(c)] = head.recursion->start * double(head.v(j, c));
    if (head.recursion->hops.empty())
        for (index_t i = head.query_length; i < queries; ++i)
            for (index_t c = 0; c < dim; ++c) z[static_cast<std::size_t>(i) * width + static_cast<std::size_t>(c)] = 0;
    for (std::size_t k = 0; k < head.recursion->hops.size(); ++k) {
        const Hop& hop = head.recursion->hops[k];
        std::vector<double> next(static_cast<std::size_t>(queries) * width, 0);
        for (index_t i = 0; i < queries; ++i) {
            if (!op.alive[static_cast<std::size_t>(i)]) continue;
            double* row = &next[static_cast<std::size_t>(i) * width];
            for (const Edge& edge : op.rows[static_cast<std::size_t>(i)])
                for (std::size_t c = 0; c < width; ++c) row[c] += edge.weight * edge.mask * z[static_cast<std::size_t>(edge.key) * width + c];
            for (index_t c = 0; c < dim; ++c) {
                row[c] *= hop.walk;
                if (hop.teleport != 0) row[c] += hop.teleport * double(head.v(i, c));
                if (head.dropout.drops_values()) row[c] *= head.dropout.values_of_four(static_cast<int>(k), i, c / 4)[static_cast<std::size_t>(c % 4)];
            }
        }
        z = std::move(next);
        if (result.hops)
            for (std::size_t at = 0; at < z.size(); ++at) result.hops[k * z.size() + at] = static_cast<T>(z[at]);
    }
    for (index_t i = 0; i < queries; ++i) {
        if (result.logsumexp) result.logsumexp[i] = op.alive[static_cast<std::size_t>(i)] ? static_cast<T>(op.logsumexp[static_cast<std::size_t>(i)]) : empty_row<T>();
        for (index_t c = 0; c < dim; ++c) {
            const double value = z[static_cast<std::size_t>(i) * width + static_cast<std::size_t>(c)];
            result.out(i, c) = static_cast<T>(result.accumulate ? double(result.out(i, c)) + value : value);
        }
    }
}

/// From dL/dA_ij on the edges to d_q, d_k and a learned bias.
template <class T, class Bias>
void scores_backward(const Head<T, Bias>& head, const Operator& op, const std::vector<std::vector<double>>& d_weight, const HeadGradient<T>& gradient) {
    const index_t queries = head.q.rows, keys = head.k.rows;
    std::vector<double> d_k(static_cast<std::size_t>(keys) * static_cast<std::size_t>(head.k.cols), 0);
    for (index_t i = 0; i < queries; ++i) {
        const auto& row = op.rows[static_cast<std::size_t>(i)];
        double mean = 0;
        for (std::size_t e = 0; e < row.size(); ++e) mean += row[e].weight * d_weight[static_cast<std::size_t>(i)][e];
        std::vector<double> d_q(static_cast<std::size_t>(head.q.cols), 0);
        for (std::size_t e = 0; e < row.size(); ++e) {
            const double d_score = row[e].weight * (d_weight[static_cast<std::size_t>(i)][e] - mean);
            if constexpr (LearnedBias<Bias>) head.bias->accumulate_gradient(gradient.bias_gradient, head.batch, head.head, i, row[e].key, d_score);
            for (index_t c = 0; c < head.q.cols; ++c) {
                d_q[static_cast<std::size_t>(c)] += d_score * head.scale * double(head.k(row[e].key, c));
                d_k[static_cast<std::size_t>(row[e].key) * static_cast<std::size_t>(head.k.cols) + static_cast<std::size_t>(c)] += d_score * head.scale * double(head.q(i, c));
            }
        }
        for (index_t c = 0; c < head.q.cols; ++c) gradient.d_q(i, c) = static_cast<T>(double(gradient.d_q(i, c)) + d_q[static_cast<std::size_t>(c)]);
    }
    for (index_t j = 0; j < keys; ++j)
        for (index_t c = 0; c < head.k.cols; ++c)
            gradient.d_k(j, c) = static_cast<T>(double(gradient.d_k(j, c)) + d_k[static_cast<std::size_t>(j) * static_cast<std::size_t>(head.k.cols) + static_cast<std::size_t>(c)]);
}

/// dL/dw_ij = (dL/dA_ij - sum_l A_il dL/dA_il) / denominator for w_ij = phi(q_i) . phi(k_j); a row that is a mean has none.
template <class T, class Features>
void scores_backward(const KernelHead<T, Features>& head, const KernelOperator& op, const std::vector<std::vector<double>>& d_weight, const HeadGradient<T>& gradient) {
    std::vector<std::vector<double>> d_q(op.q.size()), d_k(op.k.size());
    for (std::size_t i = 0; i < op.q.size(); ++i) d_q[i].assign(op.q[i].size(), 0);
    for (std::size_t j = 0; j < op.k.size(); ++j) d_k[j].assign(op.k[j].size(), 0);
    for (std::size_t i = 0; i < op.q.size(); ++i) {
        if (op.denominators[i] == 0) continue;
        const auto& row = op.rows[i];
        double mean = 0;
        for (std::size_t e = 0; e < row.size(); ++e) mean += row[e].weight * d_weight[i][e];
        for (std::size_t e = 0; e < row.size(); ++e) {
            const auto j = static_cast<std::size_t>(row[e].key);
            const double d_dot = (d_weight[i][e] - mean) / op.denominators[i];
            for (std::size_t c = 0; c < op.q[i].size(); ++c) {
                d_q[i][c] += d_dot * op.k[j][c];
                d_k[j][c] += d_dot * op.q[i][c];
            }
        }
    }
    const auto through = [&](const MatrixView<const T>& x, const std::vector<std::vector<double>>& features, const std::vector<std::vector<double>>& d_features, const MatrixView<T>& d_x) {
        for (std::size_t i = 0; i < features.size(); ++i) {
            const auto row = static_cast<index_t>(i);
            // What nobody sees may be NaN, and its derivative with it.
            if (std::all_of(d_features[i].begin(), d_features[i].end(), [](double d) { return d == 0; })) continue;
            for (index_t c = 0; c < x.cols; ++c) {
                double d = 0;
                if constexpr (has_directions<Features>) {  // shifts cancel, so they count as constants
                    const double scale = std::pow(double(x.cols), -.25);
                    for (std::size_t r = 0; r < features[i].size(); ++r)
                        d += d_features[i][r] * features[i][r] * ((*head.features)->w[r * static_cast<std::size_t>(x.cols) + static_cast<std::size_t>(c)] - double(x(row, c)) * scale) * scale;
                } else d = d_features[i][static_cast<std::size_t>(c)] * double(head.features->derivative(double(x(row, c))));
                d_x(row, c) = static_cast<T>(double(d_x(row, c)) + d);
            }
        }
    };
    through(head.q, op.q, d_q, gradient.d_q);
    through(head.k, op.k, d_k, gradient.d_k);
}

/// G_K = dL/dZ_K; G_k = walk A^T G_{k+1}; dV = start G_0 + sum_k teleport G_{k+1}; dA_ij = sum_k walk G_{k+1}[i] . Z_k[j] on the
/// edges; then the softmax of each row and dQ, dK. Z_k is computed anew, so nothing but q, k, v and dOut goes in.
template <class Head, class T>
void backward(const Head& head, const HeadGradient<T>& gradient, Workers&) {
    start_gradients(gradient);
    const auto op = make_operator(head);
    const index_t queries = head.q.rows, keys = head.k.rows, dim = head.v.cols;
    const auto width = static_cast<std::size_t>(dim), hops = head.recursion->hops.size();
    const auto value_mask = [&](std::size_t k, index_t i, index_t c) {
        return head.dropout.drops_values() ? head.dropout.values_of_four(static_cast<int>(k), i, c / 4)[static_cast<std::size_t>(c % 4)] : 1.;
    };
    std::vector<std::vector<double>> z(hops + 1);
    z[0].resize(static_cast<std::size_t>(keys) * width);
    for (index_t j = 0; j < keys; ++j)
        for (index_t c = 0; c < dim; ++c) z[0][static_cast<std::size_t>(j) * width + static_cast<std::size_t>(c)] = head.recursion->start * double(head.v(j, c));
    for (std::size_t k = 0; k < hops; ++k) {
        z[k + 1].assign(static_cast<std::size_t>(queries) * width, 0);
        for (index_t i = 0; i < queries; ++i) {
            if (!op.alive[static_cast<std::size_t>(i)]) continue;
            for (index_t c = 0; c < dim; ++c) {
                double sum = 0;
                for (const Edge& edge : op.rows[static_cast<std::size_t>(i)])
                    sum += edge.weight * edge.mask * z[k][static_cast<std::size_t>(edge.key) * width + static_cast<std::size_t>(c)];
                const Hop& hop = head.recursion->hops[k];
                const double teleported = hop.teleport != 0 ? hop.teleport * double(head.v(i, c)) : 0;
                z[k + 1][static_cast<std::size_t>(i) * width + static_cast<std::size_t>(c)] = value_mask(k, i, c) * (hop.walk * sum + teleported);
            }
        }
    }
    std::vector<double> g(static_cast<std::size_t>(queries) * width);
    for (index_t i = 0; i < queries; ++i)
        for (index_t c = 0; c < dim; ++c)
            g[static_cast<std::size_t>(i) * width + static_cast<std::size_t>(c)] = hops == 0 && i >= head.query_length ? 0 : double(gradient.d_out(i, c));
    std::vector<double> d_v(static_cast<std::size_t>(keys) * width, 0);
    std::vector<std::vector<double>> d_weight(static_cast<std::size_t>(queries));
    for (index_t i = 0; i < queries; ++i) d_weight[static_cast<std::size_t>(i)].assign(op.rows[static_cast<std::size_t>(i)].size(), 0);
    for (std::size_t k = hops; k-- > 0;) {
        const Hop& hop = head.recursion->hops[k];
        std::vector<double> next(static_cast<std::size_t>(keys) * width, 0);
        for (index_t i = 0; i < queries; ++i) {
            if (!op.alive[static_cast<std::size_t>(i)]) continue;
            double* gi = &g[static_cast<std::size_t>(i) * width];
            for (index_t c = 0; c < dim; ++c) {
                gi[c] *= value_mask(k, i, c);
                if (hop.teleport != 0) d_v[static_cast<std::size_t>(i) * width + static_cast<std::size_t>(c)] += hop.teleport * gi[c];
            }
            const auto& row = op.rows[static_cast<std::size_t>(i)];
            for (std::size_t e = 0; e < row.size(); ++e) {
                double* to = &next[static_cast<std::size_t>(row[e].key) * width];
                const double* zj = &z[k][static_cast<std::size_t>(row[e].key) * width];
                for (std::size_t c = 0; c < width; ++c) {
                    to[c] += hop.walk * row[e].weight * row[e].mask * gi[c];
                    d_weight[static_cast<std::size_t>(i)][e] += hop.walk * row[e].mask * gi[c] * zj[c];
                }
            }
        }
        g = std::move(next);
    }
    for (std::size_t at = 0; at < d_v.size(); ++at) d_v[at] += head.recursion->start * g[at];
    for (index_t j = 0; j < keys; ++j)
        for (index_t c = 0; c < dim; ++c)
            gradient.d_v(j, c) = static_cast<T>(double(gradient.d_v(j, c)) + d_v[static_cast<std::size_t>(j) * width + static_cast<std::size_t>(c)]);
    scores_backward(head, op, d_weight, gradient);
}

}  // namespace detail::reference

POLYATTN_END_NAMESPACE
