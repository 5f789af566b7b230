#pragma once

#include <polyattn/policy/pattern/concept.hpp>

POLYATTN_BEGIN_NAMESPACE

/// Causal: the last `stride` positions and every stride-th one before. Source: Child et al., Sparse Transformers (2019), "strided".
struct Strided {
    using policy_kind = sparsity_pattern_kind;
    static constexpr bool is_causal = true;
    index_t stride = 64;

    void validate() const { detail::require(stride >= 1, "stride", "a step >= 1", stride); }
    Plan plan(index_t queries, index_t keys) const {
        const detail::Alignment at{queries, keys};
        PlanBuilder builder(queries, keys);
        builder.range([&](index_t i) { return std::pair{at.position(i) - stride + 1, at.position(i) + 1}; });
        for (index_t residue = 0; residue < std::min(stride, keys); ++residue) {
            std::vector<index_t> rows, column;
            const offset_t first = at.position(0);
            for (offset_t i = ((residue - first) % stride + stride) % stride; i < queries; i += stride) rows.push_back(static_cast<index_t>(i));
            for (offset_t j = residue; j < keys; j += stride) column.push_back(static_cast<index_t>(j));
            if (rows.empty()) continue;
            const auto row_list = IndexSequence::list(rows);
            builder.tile(row_list, IndexSequence::list(std::move(column)),
                         [&](index_t r) { return std::pair{offset_t{0}, (at.position(row_list[r]) - residue) / stride}; });
        }
        return builder.build();
    }
};

/// Causal: a query's own block of `stride` positions, and the last `summary` positions of every block before.
/// Source: Child et al., Sparse Transformers (2019), "fixed".
struct Fixed {
    using policy_kind = sparsity_pattern_kind;
    static constexpr bool is_causal = true;
    index_t stride = 64;
    index_t summary = 8;

    void validate() const {
        detail::require(stride >= 1, "stride", "a step >= 1", stride);
        detail::require(summary >= 0 && summary <= stride, "summary", "a number of positions from 0 to stride", summary);
    }
    Plan plan(index_t queries, index_t keys) const {
        const detail::Alignment at{queries, keys};
        PlanBuilder builder(queries, keys);
        builder.range([&](index_t i) {
            const offset_t position = at.position(i);
            return position < 0 ? std::pair{offset_t{0}, offset_t{0}} : std::pair{position / stride * stride, position + 1};
        });
        std::vector<index_t> columns;
        for (index_t j = 0; j < keys; ++j)
            if (j % stride >= stride - summary) columns.push_back(j);
        if (!columns.empty())
            builder.tile(IndexSequence::range(0, queries), IndexSequence::list(std::move(columns)), [&](index_t i) {
                const offset_t position = at.position(i);
                return std::pair{offset_t{0}, position < 0 ? offset_t{0} : position / stride * summary};
            });
        return builder.build();
    }
};

static_assert(SparsityPattern<Strided> && SparsityPattern<Fixed>);

POLYATTN_END_NAMESPACE
