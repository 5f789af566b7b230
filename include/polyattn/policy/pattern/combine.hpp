#pragma once

#include <polyattn/policy/pattern/concept.hpp>

#include <tuple>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

/// join() of the plans that plan_of() makes of the patterns, from the first to the last.
template <class... Ps, class PlanOf, class Join>
auto join_plans(const std::tuple<Ps...>& patterns, PlanOf plan_of, Join join) {
    return std::apply(
        [&](const auto& first, const auto&... rest) {
            auto plan = plan_of(first);
            ((plan = join(plan, plan_of(rest))), ...);
            return plan;
        },
        patterns);
}

template <class... Ps>
struct Combination {
    static_assert((!DataDependentPattern<Ps> && ...), "polyattn: patterns that depend on q and k have no plan to combine; give forward() the plans of a pass as CallOptions::item_plans");
    using policy_kind = sparsity_pattern_kind;
    std::tuple<Ps...> patterns;

    void validate() const {
        std::apply([](const auto&... pattern) { (detail::validate(pattern), ...); }, patterns);
    }
};

}  // namespace detail

/// Keys that any of the patterns shows.  Union{SlidingWindow{.window = 64}, GlobalTokens{.count = 8}}
template <SparsityPattern First, SparsityPattern... Rest>
struct Union : detail::Combination<First, Rest...> {
    static constexpr bool is_causal = (detail::is_causal<First>() && ... && detail::is_causal<Rest>());

    Union() = default;
    Union(First first, Rest... rest) : detail::Combination<First, Rest...>{{std::move(first), std::move(rest)...}} {}
    Plan plan(index_t queries, index_t keys) const {
        return plan_padded(queries, keys, queries, keys);
    }
    Plan plan_padded(index_t valid_queries, index_t valid_keys, index_t queries, index_t keys) const {
        const auto plan_of = [&](const auto& pattern) { return detail::padded_plan(pattern, valid_queries, valid_keys, queries, keys); };
        return detail::join_plans(this->patterns, plan_of, [](const Plan& a, const Plan& b) { return unite(a, b); });
    }
};

/// Keys that all of the patterns show.  Intersection{LocalGlobalRandom{}, Causal{}}
template <SparsityPattern First, SparsityPattern... Rest>
struct Intersection : detail::Combination<First, Rest...> {
    static constexpr bool is_causal = (detail::is_causal<First>() || ... || detail::is_causal<Rest>());

    Intersection() = default;
    Intersection(First first, Rest... rest) : detail::Combination<First, Rest...>{{std::move(first), std::move(rest)...}} {}
    Plan plan(index_t queries, index_t keys) const {
        return plan_padded(queries, keys, queries, keys);
    }
    Plan plan_padded(index_t valid_queries, index_t valid_keys, index_t queries, index_t keys) const {
        const auto plan_of = [&](const auto& pattern) { return detail::padded_plan(pattern, valid_queries, valid_keys, queries, keys); };
        return detail::join_plans(this->patterns, plan_of, [](const Plan& a, const Plan& b) { return intersect(a, b); });
    }
};

/// A pattern drawn for `length` tokens, of which shorter texts use the first: every length sees the same graph.
/// Diffuser's published code draws its graph so, at 4096.  Prefix<RandomTokens>{.length = 4096}
template <SparsityPattern P>
struct Prefix {
    static_assert(!DataDependentPattern<P>, "polyattn: Prefix is of patterns that do not depend on q and k");
    using policy_kind = sparsity_pattern_kind;
    static constexpr bool is_causal = detail::is_causal<P>();
    index_t length = 4096;
    P pattern = {};

    void validate() const {
        detail::require(length >= 0, "length", "a number of tokens >= 0", length);
        detail::validate(pattern);
    }
    /// Throws invalid_input unless queries == keys <= length.
    Plan plan(index_t queries, index_t keys) const {
        detail::require_square("Prefix", queries, keys);
        return prefix(pattern.plan(length, length), queries, keys);
    }
};

POLYATTN_END_NAMESPACE
