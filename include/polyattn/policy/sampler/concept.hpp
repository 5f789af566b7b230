#pragma once

#include <polyattn/core/rng.hpp>
#include <polyattn/plan/set_algebra.hpp>
#include <polyattn/policy/concept.hpp>

POLYATTN_BEGIN_NAMESPACE

/// A SamplerPolicy re-draws which keys each query may see: sample(queries, keys, draw, causal) yields a plan that is a pure
/// function of its arguments. `causal` is true if the pattern beside it is causal: then the sampler draws its causal form
/// itself. The result is intersected with the pattern. Optional members:
/// - `static constexpr bool has_causal_form = false`: beside a causal pattern it is one static_assert.
/// - sample_padded(valid_queries, valid_keys, queries, keys, draw, causal): as plan_padded() of patterns.
/// - draws_per_item() and sample_item(queries, keys, batch item, valid keys, draw, causal): where the first is true, every item of the batch
///   has a plan of its own. Where queries and keys are not equally many, these two numbers are the item's valid ones.
template <class P>
concept SamplerPolicy = PolicyOf<P, sampler_kind> && requires(const P& sampler, index_t n, const Draw& draw) {
    { sampler.sample(n, n, draw, true) } -> std::same_as<Plan>;
};

template <class P>
concept PerItemSampler = requires(const P& sampler, index_t n, const Draw& draw) {
    { sampler.draws_per_item() } -> std::same_as<bool>;
    { sampler.sample_item(n, n, n, n, draw, true) } -> std::same_as<Plan>;
};

namespace detail {

template <class P>
constexpr bool has_causal_form() {
    if constexpr (requires { P::has_causal_form; }) return P::has_causal_form;
    else return true;
}

}  // namespace detail

namespace detail {

/// sample_padded(), or what stands for it.
template <class P>
Plan padded_sample(const P& sampler, index_t valid_queries, index_t valid_keys, index_t queries, index_t keys, const Draw& draw, bool causal) {
    if (valid_queries == queries && valid_keys == keys) return sampler.sample(queries, keys, draw, causal);
    if constexpr (requires { sampler.sample_padded(valid_queries, valid_keys, queries, keys, draw, causal); }) return sampler.sample_padded(valid_queries, valid_keys, queries, keys, draw, causal);
    else return extended(sampler.sample(valid_queries, valid_keys, draw, causal), queries, keys);
}

}  // namespace detail

/// No sampling.
struct AllSources {
    using policy_kind = sampler_kind;
    Plan sample(index_t queries, index_t keys, const Draw&, bool) const {
        return PlanBuilder(queries, keys).tile(IndexSequence::range(0, queries), IndexSequence::range(0, keys)).build();
    }
};

static_assert(SamplerPolicy<AllSources>);

POLYATTN_END_NAMESPACE
