#pragma once

#include <polyattn/policy/pattern/concept.hpp>

POLYATTN_BEGIN_NAMESPACE

/// Every query sees every key. n^2 pairs.
struct Dense {
    using policy_kind = sparsity_pattern_kind;

    Plan plan(index_t queries, index_t keys) const {
        return PlanBuilder(queries, keys).tile(IndexSequence::range(0, queries), IndexSequence::range(0, keys)).build();
    }
};

/// Every query sees the keys up to its own position; the last query sees the last key. n(n + 1)/2 pairs.
struct Causal {
    using policy_kind = sparsity_pattern_kind;
    static constexpr bool is_causal = true;

    Plan plan(index_t queries, index_t keys) const {
        const detail::Alignment at{queries, keys};
        return PlanBuilder(queries, keys).range([&](index_t i) { return std::pair{offset_t{0}, at.position(i) + 1}; }).build();
    }
};

static_assert(SparsityPattern<Dense> && SparsityPattern<Causal>);

POLYATTN_END_NAMESPACE
