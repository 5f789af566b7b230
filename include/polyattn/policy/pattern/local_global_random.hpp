#pragma once

#include <polyattn/policy/pattern/combine.hpp>
#include <polyattn/policy/pattern/random.hpp>
#include <polyattn/policy/pattern/window.hpp>

POLYATTN_BEGIN_NAMESPACE

/// Diffuser's pattern: a sliding window (window / 2 tokens on each side), `globals` random tokens that see and are seen by
/// all, and `randoms` random tokens a query. An edge counts once. Where a text has fewer tokens than `globals` or `randoms`,
/// all of them are taken. Defaults: table 1. Source: Diffuser (AAAI 2023), figure 2 and section "sparse attention pattern".
struct LocalGlobalRandom {
    using policy_kind = sparsity_pattern_kind;
    index_t window = 128;
    index_t globals = 96;
    index_t randoms = 96;
    std::uint64_t seed = 1;

    void validate() const {
        detail::validate_even_window(window);
        detail::require(globals >= 0, "globals", "a number of tokens >= 0", globals);
        detail::require(randoms >= 0, "randoms", "a number of tokens >= 0", randoms);
    }
    /// The patterns that it is the union of.
    auto parts() const {
        // Global tokens first: the window then leaves out their rows and columns and stays one tile.
        return Union(GlobalTokens{.count = globals, .seed = seed}, SlidingWindow{.window = window}, RandomTokens{.count = randoms, .seed = seed});
    }
    Plan plan(index_t queries, index_t keys) const { return parts().plan(queries, keys); }
};

/// Sliding window, dilated if wanted, and given global tokens. Source: Beltagy et al., Longformer (2020).
struct Longformer {
    using policy_kind = sparsity_pattern_kind;
    index_t window = 512;
    index_t dilation = 1;
    std::vector<index_t> tokens = {0};

    void validate() const {
        detail::validate_even_window(window, dilation);
        GlobalTokens{.count = 0, .tokens = tokens}.validate();
    }
    /// The patterns that it is the union of.
    auto parts() const { return Union(GlobalTokens{.count = 0, .tokens = tokens}, SlidingWindow{.window = window, .dilation = dilation}); }
    Plan plan(index_t queries, index_t keys) const { return parts().plan(queries, keys); }
    Plan plan_padded(index_t valid_queries, index_t valid_keys, index_t queries, index_t keys) const { return parts().plan_padded(valid_queries, valid_keys, queries, keys); }
};

static_assert(SparsityPattern<LocalGlobalRandom> && SparsityPattern<Longformer>);

POLYATTN_END_NAMESPACE
