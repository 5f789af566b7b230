#pragma once

#include <polyattn/core/rng.hpp>
#include <polyattn/core/view.hpp>
#include <polyattn/plan/set_algebra.hpp>
#include <polyattn/policy/concept.hpp>

POLYATTN_BEGIN_NAMESPACE

/// A SparsityPattern says which keys each query sees: plan(queries, keys) yields the parts, disjoint, as a pure function of
/// the pattern's members and the two numbers. With unequal numbers, query i stands at position i + keys - queries, so the
/// last query stands at the last key (decoding).
/// Optional: `static constexpr bool is_causal = true` if no query ever sees a key behind its own position (samplers ask). And
/// plan_padded(valid_queries, valid_keys, queries, keys), the plan of a batch item of which the first valid ones count, where that is not
/// plan(valid_queries, valid_keys): layers ask where queries and keys are not equally many, so that lengths move positions.
///
/// A data-dependent pattern offers, instead of plan(), plan_for(q, k, valid_queries, valid_keys, draw): the parts of one head from its q and k
/// (MatrixView of float or double), of which the first valid rows count. Layers call it for every (batch, head). On Cuda only the library's own can
/// do it, whose groups the device finds; of others it takes the plans (CudaOptions::item_plans).
template <class P>
concept DataDependentPattern = PolicyOf<P, sparsity_pattern_kind> && requires(const P& pattern, MatrixView<const float> x, index_t n) {
    { pattern.plan_for(x, x, n, n, Draw{}) } -> std::same_as<Plan>;
};
template <class P>
concept SparsityPattern = DataDependentPattern<P> || (PolicyOf<P, sparsity_pattern_kind> && requires(const P& pattern, index_t n) {
    { pattern.plan(n, n) } -> std::same_as<Plan>;
});

namespace detail {

template <class P>
constexpr bool is_causal() {
    if constexpr (requires { P::is_causal; }) return P::is_causal;
    else return false;
}

/// Position of query i on the axis of the keys.
struct Alignment {
    index_t queries, keys;
    offset_t position(index_t query) const { return offset_t{query} + keys - queries; }
    /// The query at a key's position, -1 if there is none.
    index_t query_at(index_t key) const {
        const offset_t query = offset_t{key} - keys + queries;
        return query >= 0 && query < queries ? static_cast<index_t>(query) : -1;
    }
    /// Ascending queries at ascending positions.
    std::vector<index_t> queries_at(std::span<const index_t> positions) const {
        std::vector<index_t> found;
        for (const index_t position : positions)
            if (const index_t query = query_at(position); query >= 0) found.push_back(query);
        return found;
    }
};

/// plan_padded(), or what stands for it.
template <class P>
Plan padded_plan(const P& pattern, index_t valid_queries, index_t valid_keys, index_t queries, index_t keys) {
    if (valid_queries == queries && valid_keys == keys) return pattern.plan(queries, keys);
    if constexpr (requires { pattern.plan_padded(valid_queries, valid_keys, queries, keys); }) return pattern.plan_padded(valid_queries, valid_keys, queries, keys);
    else return extended(pattern.plan(valid_queries, valid_keys), queries, keys);
}

inline void require_square(const char* pattern, index_t queries, index_t keys) {
    if (queries != keys)
        throw invalid_input(pattern, "as many queries as keys", detail::text(queries, " queries, ", keys, " keys"));
}

}  // namespace detail

POLYATTN_END_NAMESPACE
