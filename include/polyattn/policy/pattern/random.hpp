#pragma once

#include <polyattn/core/rng.hpp>
#include <polyattn/policy/pattern/concept.hpp>

#include <string>

POLYATTN_BEGIN_NAMESPACE

/// Tokens whose whole row and whole column are edges: `tokens` if given (ascending), else `count` of the keys drawn at random.
/// When there are fewer keys than `count`, all of them are global. An empty list is none given: for no global tokens at all set `count` to 0 as well.
/// 2 g n - g^2 pairs. Of given tokens a batch item has those that are valid keys of it.
struct GlobalTokens {
    using policy_kind = sparsity_pattern_kind;
    index_t count = 96;
    std::uint64_t seed = 1;
    std::vector<index_t> tokens = {};

    void validate() const {
        detail::require(count >= 0, "count", "a number of tokens >= 0", count);
        for (std::size_t i = 0; i < tokens.size(); ++i)
            detail::require(tokens[i] >= 0 && (i == 0 || tokens[i] > tokens[i - 1]), "tokens", "strictly ascending indices >= 0", tokens[i]);
    }
    /// Throws invalid_input if a given token is not a key.
    Plan plan(index_t queries, index_t keys) const {
        std::vector<index_t> chosen = tokens;
        if (chosen.empty()) RandomRow(seed, 0, random_stream::global_tokens).distinct(keys, count, chosen);
        PlanBuilder builder(queries, keys);
        if (chosen.empty()) return builder.build();
        const auto rows = detail::Alignment{queries, keys}.queries_at(chosen);
        if (!rows.empty()) builder.tile(IndexSequence::list(rows), IndexSequence::range(0, keys));
        const auto all = static_cast<index_t>(chosen.size());
        builder.tile(IndexSequence::range(0, queries), IndexSequence::list(std::move(chosen)), [&](index_t i) {
            return std::pair{index_t{0}, std::binary_search(rows.begin(), rows.end(), i) ? index_t{0} : all};
        });
        return builder.build();
    }
    Plan plan_padded(index_t valid_queries, index_t valid_keys, index_t queries, index_t keys) const {
        detail::require(tokens.empty() || tokens.back() < keys, "tokens", [&] { return detail::text("indices of [0, ", keys, ")"); }, tokens.empty() ? 0 : tokens.back());
        GlobalTokens own = *this;
        std::erase_if(own.tokens, [&](index_t token) { return token >= valid_keys; });
        if (own.tokens.empty() && !tokens.empty()) own.count = 0;
        return extended(own.plan(valid_queries, valid_keys), queries, keys);
    }
};

/// Each query sees `count` other tokens drawn at random, a fresh draw for each position (directed edges); all others when there
/// are not more. count x n pairs.
/// Source: Diffuser (AAAI 2023), section "random attention".
struct RandomTokens {
    using policy_kind = sparsity_pattern_kind;
    index_t count = 96;
    std::uint64_t seed = 1;

    void validate() const { detail::require(count >= 0, "count", "a number of tokens >= 0", count); }
    Plan plan(index_t queries, index_t keys) const {
        const detail::Alignment at{queries, keys};
        Edges edges;
        edges.offsets.reserve(static_cast<std::size_t>(queries) + 1);
        edges.offsets.push_back(0);
        edges.keys.reserve(static_cast<std::size_t>(queries) * static_cast<std::size_t>(std::min(count, keys)));
        std::vector<index_t> chosen;
        for (index_t i = 0; i < queries; ++i) {
            const offset_t self = at.position(i);
            const bool inside = self >= 0 && self < keys;
            RandomRow(seed, static_cast<std::uint32_t>(self), random_stream::random_tokens).distinct(keys - (inside ? 1 : 0), count, chosen);
            for (const index_t key : chosen) edges.keys.push_back(inside && key >= self ? key + 1 : key);
            edges.offsets.push_back(edges.count());
        }
        return PlanBuilder(queries, keys).edges(std::move(edges)).build();
    }
};

/// Each query sees `count` others, all of them where there are not more, at equal distances around the sequence: (p + floor(m n / (count + 1))) mod n, m = 1..count.
/// Source: Diffuser (AAAI 2023), table 7, row 5.
struct UniformTokens {
    using policy_kind = sparsity_pattern_kind;
    index_t count = 96;

    void validate() const { detail::require(count >= 0, "count", "a number of tokens >= 0", count); }
    Plan plan(index_t queries, index_t keys) const {
        const detail::Alignment at{queries, keys};
        const offset_t picks = std::min<offset_t>(count, std::max<offset_t>(offset_t{keys} - 1, 0));
        std::vector<detail::Pair> pairs;
        pairs.reserve(static_cast<std::size_t>(queries) * static_cast<std::size_t>(picks));
        for (index_t i = 0; i < queries; ++i)
            for (offset_t m = 1; m <= picks; ++m) {
                const offset_t key = (at.position(i) + m * keys / (picks + 1)) % keys;
                pairs.push_back({i, static_cast<index_t>(key < 0 ? key + keys : key)});
            }
        return PlanBuilder(queries, keys).edges(detail::edges_from_pairs(pairs, queries)).build();
    }
};

/// G(n, m): `per_token` x queries cells of the whole matrix, drawn without replacement (every cell when there are not more). For sparse graphs: O(m) draws
/// up to half of all cells, O(m log keys) close to all of them, where cells that repeat are drawn again and again.
/// Source: Erdos and Renyi (1959); the random part of Diffuser's published code, there drawn at 4096 and sliced: see Prefix.
struct ErdosRenyi {
    using policy_kind = sparsity_pattern_kind;
    index_t per_token = 96;
    std::uint64_t seed = 1;

    void validate() const { detail::require(per_token >= 0, "per_token", "a number of cells >= 0", per_token); }
    Plan plan(index_t queries, index_t keys) const {
        if (per_token >= keys) {
            std::vector<detail::Pair> every;
            for (index_t i = 0; i < queries; ++i)
                for (index_t j = 0; j < keys; ++j) every.push_back({i, j});
            return PlanBuilder(queries, keys).edges(detail::edges_from_pairs(every, queries)).build();
        }
        const auto wanted = static_cast<std::size_t>(queries) * static_cast<std::size_t>(per_token);
        RandomRow random(seed, 0, random_stream::erdos_renyi);
        std::vector<detail::Pair> cells;
        cells.reserve(wanted);
        Edges edges;
        // Cells that repeat are drawn again, in rounds: the same distribution as one by one.
        while (cells.size() < wanted) {
            while (cells.size() < wanted)
                cells.push_back({static_cast<index_t>(random.below(static_cast<std::uint32_t>(queries))),
                                 static_cast<index_t>(random.below(static_cast<std::uint32_t>(keys)))});
            edges = detail::edges_from_pairs(cells, queries);
            cells.clear();
            for (index_t i = 0; i < queries; ++i)
                for (const index_t key : edges.row(i)) cells.push_back({i, key});
        }
        return PlanBuilder(queries, keys).edges(std::move(edges)).build();
    }
};

/// An undirected random graph in which every token has exactly `degree` neighbours, self not among them: degree / 2 random
/// permutations and their inverses, collisions and self-loops redrawn. What Diffuser's theorems assume (AAAI 2023, definition 1).
struct RandomRegular {
    using policy_kind = sparsity_pattern_kind;
    index_t degree = 64;
    std::uint64_t seed = 1;

    void validate() const { detail::require(degree >= 0 && degree % 2 == 0, "degree", "an even number of neighbours >= 0", degree); }
    /// Throws invalid_input unless queries == keys and the degree is below half of them.
    Plan plan(index_t queries, index_t keys) const {
        detail::require_square("RandomRegular", queries, keys);
        detail::require(degree == 0 || offset_t{degree} * 2 < keys, "degree", [&] { return detail::text("less than half of ", keys, " tokens"); }, degree);
        const auto n = static_cast<std::size_t>(keys);
        std::vector<std::vector<index_t>> neighbours;
        for (std::uint32_t attempt = 0;; ++attempt)
            if (draw(n, attempt, neighbours)) break;
        Edges edges;
        edges.offsets.push_back(0);
        for (auto& row : neighbours) {
            std::sort(row.begin(), row.end());
            edges.keys.insert(edges.keys.end(), row.begin(), row.end());
            edges.offsets.push_back(edges.count());
        }
        return PlanBuilder(queries, keys).edges(std::move(edges)).build();
    }

private:
    // False if some token found no partner in many tries: then everything is drawn again.
    bool draw(std::size_t n, std::uint32_t attempt, std::vector<std::vector<index_t>>& neighbours) const {
        neighbours.assign(n, {});
        std::vector<index_t> to(n);
        for (index_t p = 0; p < degree / 2; ++p) {
            RandomRow random(seed, static_cast<std::uint32_t>(p), random_stream::random_regular, attempt);
            std::iota(to.begin(), to.end(), 0);
            for (std::size_t i = n; i > 1; --i) std::swap(to[i - 1], to[random.below(static_cast<std::uint32_t>(i))]);
            const auto bad = [&](std::size_t i) {
                const auto j = static_cast<std::size_t>(to[i]);
                return i == j || static_cast<std::size_t>(to[j]) == i ||
                       std::find(neighbours[i].begin(), neighbours[i].end(), to[i]) != neighbours[i].end();
            };
            for (bool clean = false; !clean;) {
                clean = true;
                for (std::size_t i = 0; i < n; ++i)
                    for (int tries = 0; bad(i); ++tries) {
                        if (tries == 1000) return false;
                        std::swap(to[i], to[random.below(static_cast<std::uint32_t>(n))]);
                        clean = false;  // the swap may have spoilt another token
                    }
            }
            for (std::size_t i = 0; i < n; ++i) {
                neighbours[i].push_back(to[i]);
                neighbours[static_cast<std::size_t>(to[i])].push_back(static_cast<index_t>(i));
            }
        }
        return true;
    }
};

static_assert(SparsityPattern<GlobalTokens> && SparsityPattern<RandomTokens> && SparsityPattern<UniformTokens> &&
              SparsityPattern<ErdosRenyi> && SparsityPattern<RandomRegular>);

POLYATTN_END_NAMESPACE
