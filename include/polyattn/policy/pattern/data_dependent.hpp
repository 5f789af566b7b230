#pragma once
// Patterns made from q and k, for each head: queries see the keys that fell into the same group. Gradients take the groups as fixed. plan_for() is groups, then
// plan_of() of them; on Cuda the device finds the same groups. They are the same to the last bit for every compiler flag but -ffast-math.

#include <polyattn/policy/compression/compression.hpp>
#include <polyattn/policy/pattern/dense.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

inline std::vector<std::vector<index_t>> members_of(std::span<const index_t> groups, index_t count) {
    std::vector<std::vector<index_t>> lists(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < groups.size(); ++i) lists[static_cast<std::size_t>(groups[i])].push_back(static_cast<index_t>(i));
    return lists;
}
/// Query i sees key j if their groups are equal; groups are numbers of [0, count). A tile a group.
inline Plan same_group(std::span<const index_t> of_query, std::span<const index_t> of_key, index_t count, index_t queries, index_t keys) {
    auto rows = members_of(of_query, count), columns = members_of(of_key, count);
    PlanBuilder builder(queries, keys);
    for (std::size_t g = 0; g < rows.size(); ++g)
        if (!rows[g].empty() && !columns[g].empty()) builder.tile(IndexSequence::list(std::move(rows[g])), IndexSequence::list(std::move(columns[g])));
    return builder.build();
}

}  // namespace detail

/// Reformer: token i sees the tokens that fell into its bucket in any of the rounds; bucket of x = argmax of (x R, -x R) for a random R of
/// buckets / 2 normal columns a round. Pairs in several rounds count once. Meant for q = k (the paper's shared projections); with others both are
/// hashed alike, and a query may see nothing. O(rounds (n buckets d + pairs)) to make. Source: Kitaev et al., "Reformer" (2020), equations 3 to 5 and section 2.
struct LocalitySensitiveHashing {
    using policy_kind = sparsity_pattern_kind;
    index_t buckets = 8;
    index_t rounds = 2;
    bool causal = false;
    std::uint64_t seed = 1;

    void validate() const {
        detail::require(buckets >= 2 && buckets % 2 == 0, "buckets", "an even number >= 2", buckets);
        detail::require(rounds >= 1, "rounds", "a number >= 1", rounds);
    }
    /// The random directions of a round, [buckets / 2][dim].
    std::vector<double> directions(index_t round, index_t dim) const {
        RandomRow random(seed, static_cast<std::uint32_t>(round), random_stream::hash_directions);
        std::vector<double> drawn(static_cast<std::size_t>(buckets / 2) * static_cast<std::size_t>(dim));
        for (double& entry : drawn) entry = normal_deviate(random.next()) * 0x1p-24;
        return drawn;
    }
    /// Buckets of the first `valid` rows in a round.
    template <class T>
    std::vector<index_t> buckets_of(MatrixView<const T> x, index_t valid, index_t round) const {
        const index_t half = buckets / 2;
        const std::vector<double> drawn = directions(round, x.cols);
        std::vector<index_t> found(static_cast<std::size_t>(valid));
        for (index_t i = 0; i < valid; ++i) {
            double most = 0;
            for (index_t r = 0; r < half; ++r) {
                double dot = 0;
                for (index_t c = 0; c < x.cols; ++c) dot += detail::rounded_product(drawn[static_cast<std::size_t>(r) * static_cast<std::size_t>(x.cols) + static_cast<std::size_t>(c)], double(x(i, c)));
                if (r == 0 || std::abs(dot) > most) {
                    most = std::abs(dot);
                    found[static_cast<std::size_t>(i)] = dot >= 0 ? r : half + r;
                }
            }
        }
        return found;
    }
    template <class T>
    Plan plan_for(MatrixView<const T> q, MatrixView<const T> k, index_t valid_queries, index_t valid_keys, const Draw&) const {
        std::vector<index_t> of_query, of_key;
        const auto append = [](std::vector<index_t>& to, const std::vector<index_t>& more) { to.insert(to.end(), more.begin(), more.end()); };
        for (index_t round = 0; round < rounds; ++round) {
            append(of_query, buckets_of(q, valid_queries, round));
            append(of_key, buckets_of(k, valid_keys, round));
        }
        return plan_of(of_query, of_key, q.rows, k.rows);
    }
    /// The plan of buckets [rounds][valid queries] and [rounds][valid keys].
    Plan plan_of(std::span<const index_t> of_query, std::span<const index_t> of_key, index_t queries, index_t keys) const {
        const auto in_round = [&](std::span<const index_t> of, index_t round) {
            const std::size_t valid = of.size() / static_cast<std::size_t>(rounds);
            return of.subspan(static_cast<std::size_t>(round) * valid, valid);
        };
        const Plan first = detail::same_group(in_round(of_query, 0), in_round(of_key, 0), buckets, queries, keys);
        // What later rounds add are edges: few pairs share several of their buckets.
        Edges more;
        more.offsets.assign(1, 0);
        std::vector<std::vector<index_t>> members;
        for (index_t round = 1; round < rounds; ++round)
            for (auto& bucket : detail::members_of(in_round(of_key, round), buckets)) members.push_back(std::move(bucket));
        const auto valid_queries = static_cast<index_t>(in_round(of_query, 0).size());
        for (index_t i = 0; i < queries; ++i) {
            const auto start = static_cast<std::ptrdiff_t>(more.keys.size());
            for (index_t round = 1; i < valid_queries && round < rounds; ++round)
                for (const index_t j : members[static_cast<std::size_t>(round - 1) * static_cast<std::size_t>(buckets) + static_cast<std::size_t>(in_round(of_query, round)[static_cast<std::size_t>(i)])]) {
                    bool known = false;
                    for (index_t before = 0; before < round && !known; ++before)
                        known = in_round(of_query, before)[static_cast<std::size_t>(i)] == in_round(of_key, before)[static_cast<std::size_t>(j)];
                    if (!known) more.keys.push_back(j);
                }
            std::sort(more.keys.begin() + start, more.keys.end());
            more.offsets.push_back(more.count());
        }
        const Plan all = detail::unchecked_plan(queries, keys, {first.tiles().begin(), first.tiles().end()}, std::move(more));
        if (!causal) return all;
        // The last valid query stands at the last valid key; with as many queries as keys each stands at its own, whatever is valid.
        const auto valid_keys = static_cast<index_t>(in_round(of_key, 0).size());
        return intersect(all, queries == keys ? Causal{}.plan(queries, keys) : extended(Causal{}.plan(valid_queries, valid_keys), queries, keys));
    }
};

/// Routing transformer: queries see the keys of the cluster whose centroid is nearest to them. Centroids are those of the head's keys (KMeans), where
/// the paper learns them by moving averages over batches; so there is no causal form: centroids know all keys. A query may see nothing.
/// O(iterations n clusters d) to make. Source: Roy et al., "Efficient content-based
/// sparse attention with routing transformers" (2021), section 4.1.
struct RoutedClusters {
    using policy_kind = sparsity_pattern_kind;
    index_t clusters = 8;
    index_t iterations = 5;

    void validate() const { KMeans{clusters, iterations}.validate(); }
    template <class T>
    Plan plan_for(MatrixView<const T> q, MatrixView<const T> k, index_t valid_queries, index_t valid_keys, const Draw&) const {
        const MatrixView<const T> keys = detail::row_range(k, 0, valid_keys);
        const KMeans::Bound bound = KMeans{clusters, iterations}.bind(keys);
        std::vector<index_t> of_query(static_cast<std::size_t>(valid_queries), 0);
        for (index_t i = 0; i < valid_queries; ++i) of_query[static_cast<std::size_t>(i)] = bound.nearest(q, i).first;
        return plan_of(of_query, bound.cluster, q.rows, k.rows);
    }
    /// The plan of the valid queries' and keys' clusters.
    Plan plan_of(std::span<const index_t> of_query, std::span<const index_t> of_key, index_t queries, index_t keys) const {
        const index_t count = std::min(clusters, static_cast<index_t>(of_key.size()));
        return count == 0 ? PlanBuilder(queries, keys).build() : detail::same_group(of_query, of_key, count, queries, keys);
    }
};

/// Sparse Sinkhorn attention in its hard form: a query's block of tokens, and the block that a matching of blocks assigns to it. The matching
/// starts from the products of the blocks' mean queries and keys, makes them doubly stochastic by normalising rows and columns in turn, and
/// takes the largest entries one by one. The paper mixes blocks by a learned soft matrix in training. As many keys as queries, of which those count that are valid as both.
/// O((n / block)^2 (d + iterations + log n)) to make, and (n / block)^2 numbers of memory. Source: Tay et al., "Sparse Sinkhorn attention" (2020), sections 3.1 and 3.2.
struct SinkhornBlocks {
    using policy_kind = sparsity_pattern_kind;
    index_t block = 16;
    index_t iterations = 8;
    double temperature = .75;

    void validate() const {
        detail::require(block >= 1, "block", "a number of tokens >= 1", block);
        detail::require(iterations >= 0, "iterations", "a number >= 0", iterations);
        detail::require_in_range(temperature, 1e-3, 1e3, "temperature", "a number from 0.001 to 1000");
    }
    /// Products of the blocks' mean queries and keys, over the temperature, [blocks][blocks].
    template <class T>
    std::vector<double> block_products(MatrixView<const T> q, MatrixView<const T> k, index_t valid) const {
        const index_t blocks = detail::segments(valid, block);
        const auto mean = [&](MatrixView<const T> x, index_t b, index_t c) {
            double sum = 0;
            const index_t last = std::min((b + 1) * block, valid);
            for (index_t i = b * block; i < last; ++i) sum += double(x(i, c));
            return sum / (last - b * block);
        };
        std::vector<double> products;
        products.reserve(static_cast<std::size_t>(blocks) * static_cast<std::size_t>(blocks));
        std::vector<double> q_means, k_means;
        for (index_t b = 0; b < blocks; ++b)
            for (index_t c = 0; c < q.cols; ++c) {
                q_means.push_back(mean(q, b, c));
                k_means.push_back(mean(k, b, c));
            }
        for (index_t a = 0; a < blocks; ++a)
            for (index_t b = 0; b < blocks; ++b) {
                double product = 0;
                for (index_t c = 0; c < q.cols; ++c) product += detail::rounded_product(q_means[static_cast<std::size_t>(a * q.cols + c)], k_means[static_cast<std::size_t>(b * q.cols + c)]);
                products.push_back(product / temperature);
            }
        return products;
    }
    template <class T>
    std::vector<double> matching_weights(MatrixView<const T> q, MatrixView<const T> k, index_t valid) const {
        return matching_weights(block_products(q, k, valid), detail::segments(valid, block));
    }
    /// The doubly stochastic matrix, [blocks][blocks]. Source: equation 2, in logarithms.
    std::vector<double> matching_weights(std::vector<double> logits, index_t blocks) const {
        const auto at = [&](index_t a, index_t b) -> double& { return logits[static_cast<std::size_t>(a) * static_cast<std::size_t>(blocks) + static_cast<std::size_t>(b)]; };
        const auto normalise = [&](auto&& entry) {
            for (index_t a = 0; a < blocks; ++a) {
                double highest = entry(a, 0), sum = 0;
                for (index_t b = 1; b < blocks; ++b) highest = std::max(highest, entry(a, b));
                for (index_t b = 0; b < blocks; ++b) sum += std::exp(entry(a, b) - highest);
                for (index_t b = 0; b < blocks; ++b) entry(a, b) -= highest + std::log(sum);
            }
        };
        for (index_t i = 0; i < iterations; ++i) {
            normalise([&](index_t a, index_t b) -> double& { return at(a, b); });
            normalise([&](index_t a, index_t b) -> double& { return at(b, a); });
        }
        for (double& entry : logits) entry = std::exp(entry);
        return logits;
    }
    template <class T>
    Plan plan_for(MatrixView<const T> q, MatrixView<const T> k, index_t valid_queries, index_t valid_keys, const Draw&) const {
        detail::require_square("SinkhornBlocks", q.rows, k.rows);
        const index_t valid = std::min(valid_queries, valid_keys);
        return plan_of(block_products(q, k, valid), valid, q.rows);
    }
    /// The plan of the products of the valid tokens' blocks.
    Plan plan_of(std::vector<double> products, index_t valid, index_t tokens) const {
        const index_t blocks = detail::segments(valid, block);
        const std::vector<double> weights = matching_weights(std::move(products), blocks);
        std::vector<std::size_t> order(weights.size());
        std::iota(order.begin(), order.end(), std::size_t{0});
        std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return weights[a] > weights[b]; });
        std::vector<index_t> match(static_cast<std::size_t>(blocks), -1);
        std::vector<bool> taken(static_cast<std::size_t>(blocks), false);
        for (const std::size_t entry : order) {
            const std::size_t row = entry / static_cast<std::size_t>(blocks), column = entry % static_cast<std::size_t>(blocks);
            if (match[row] >= 0 || taken[column]) continue;
            match[row] = static_cast<index_t>(column);
            taken[column] = true;
        }
        PlanBuilder builder(tokens, tokens);
        for (index_t b = 0; b < blocks; ++b) {
            std::vector<index_t> keys;
            const index_t other = match[static_cast<std::size_t>(b)];
            const auto add = [&](index_t part) {
                for (index_t j = part * block; j < std::min((part + 1) * block, valid); ++j) keys.push_back(j);
            };
            add(std::min(b, other));
            if (other != b) add(std::max(b, other));
            builder.tile(IndexSequence::range(b * block, std::min((b + 1) * block, valid)), IndexSequence::list(std::move(keys)));
        }
        return builder.build();
    }
};

static_assert(DataDependentPattern<LocalitySensitiveHashing> && DataDependentPattern<RoutedClusters> && DataDependentPattern<SinkhornBlocks>);

POLYATTN_END_NAMESPACE
