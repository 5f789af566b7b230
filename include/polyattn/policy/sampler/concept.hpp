#pragma once

#include <polyattn/core/rng.hpp>
#include <polyattn/plan/plan.hpp>
#include <polyattn/policy/concept.hpp>

POLYATTN_BEGIN_NAMESPACE

/// A SamplerPolicy re-draws which keys each query may see: sample(queries, keys, draw, causal) yields a plan that is a pure
/// function of its arguments. `causal` is true if the pattern beside it is causal: then the sampler draws its causal form
/// itself. The result is intersected with the pattern.
template <class P>
concept SamplerPolicy = PolicyOf<P, sampler_kind> && requires(const P& sampler, index_t n, const Draw& draw) {
    { sampler.sample(n, n, draw, true) } -> std::same_as<Plan>;
};

/// No sampling.
struct AllSources {
    using policy_kind = sampler_kind;
    Plan sample(index_t queries, index_t keys, const Draw&, bool) const {
        return PlanBuilder(queries, keys).tile(IndexSequence::range(0, queries), IndexSequence::range(0, keys)).build();
    }
};

static_assert(SamplerPolicy<AllSources>);

POLYATTN_END_NAMESPACE
