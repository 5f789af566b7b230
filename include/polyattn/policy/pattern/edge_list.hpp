#pragma once

#include <polyattn/policy/pattern/concept.hpp>

POLYATTN_BEGIN_NAMESPACE

/// A caller's graph in compressed sparse rows: query i sees keys[offsets[i] .. offsets[i + 1]), strictly ascending. It stays where it is
/// for every batch item: those of other lengths see its first rows and keys.
struct EdgeList {
    using policy_kind = sparsity_pattern_kind;
    std::vector<offset_t> offsets = {};
    std::vector<index_t> keys = {};

    /// Throws invalid_input unless there are queries + 1 ascending offsets from 0 to the number of keys, and every row is
    /// strictly ascending and in range.
    Plan plan(index_t queries, index_t key_count) const { return PlanBuilder(queries, key_count).edges({offsets, keys}).build(); }
    Plan plan_padded(index_t, index_t, index_t queries, index_t key_count) const { return plan(queries, key_count); }
};

static_assert(SparsityPattern<EdgeList>);

POLYATTN_END_NAMESPACE
