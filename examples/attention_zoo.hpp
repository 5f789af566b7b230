#pragma once
// The kinds of attention that examples and benchmarks compare in one and the same model.

#include <polyattn/clustered_attention.hpp>
#include <polyattn/models.hpp>
#include <polyattn/nn/classifier.hpp>
#include <polyattn/nystrom_attention.hpp>
#include <polyattn/polyattn.hpp>

#include <functional>

/// A pattern and a diffusion as data: one layer type for all of them.
struct AnyPattern {
    using policy_kind = polyattn::sparsity_pattern_kind;
    std::function<polyattn::Plan(polyattn::index_t, polyattn::index_t)> make;
    polyattn::Plan plan(polyattn::index_t queries, polyattn::index_t keys) const { return make(queries, keys); }
};
struct AnyDiffusion {
    using policy_kind = polyattn::diffusion_kind;
    polyattn::Recursion steps;
    polyattn::Recursion recursion() const { return steps; }
};
using Patterned = polyattn::Attention<AnyPattern, AnyDiffusion>;

template <class Pattern, class Diffusion = polyattn::NoDiffusion>
Patterned patterned(Pattern pattern, Diffusion diffusion = {}) {
    return Patterned{AnyPattern{[pattern](polyattn::index_t queries, polyattn::index_t keys) { return pattern.plan(queries, keys); }}, AnyDiffusion{diffusion.recursion()}};
}

/// Sizes of patterns and landmarks for texts of so many tokens.
struct ZooSizes {
    polyattn::index_t tokens = 0, window = 0, globals = 0, randoms = 0, landmarks = 0;
    static ZooSizes of(polyattn::index_t tokens) {
        const auto share = [&](polyattn::index_t divisor, polyattn::index_t least) { return std::max(least, tokens / divisor); };
        return {tokens, share(16, 4) / 2 * 2, share(32, 2), share(32, 2), share(16, 8)};
    }
};

/// f(name, attention) for softmax attention on patterns, with and without diffusion.
template <class F>
void for_each_pattern(const ZooSizes& s, F&& f) {
    using namespace polyattn;
    const SlidingWindow local{.window = s.window};
    const GlobalTokens global{.count = s.globals};
    const RandomTokens random{.count = s.randoms};
    const LocalGlobalRandom all{.window = s.window, .globals = s.globals, .randoms = s.randoms};
    const Longformer longformer{.window = s.window};
    const BigBird<4> big_bird{.window = 3, .globals = 1, .randoms = 1};
    f("dense", patterned(Dense{}));
    f("sliding window", patterned(local));
    f("local + global + random", patterned(all));
    f("local + global + random, PPR<5>", patterned(all, PPR<5>{}));
    f("without local, PPR<5>", patterned(Union(global, random), PPR<5>{}));
    f("without global, PPR<5>", patterned(Union(local, random), PPR<5>{}));
    f("without random, PPR<5>", patterned(Union(global, local), PPR<5>{}));
    f("BigBird", patterned(big_bird));
    f("BigBird, PPR<5>", patterned(big_bird, PPR<5>{}));
    f("Longformer", patterned(longformer));
    f("Longformer, PPR<5>", patterned(longformer, PPR<5>{}));
}

/// f(name, attention) for attention whose work grows with the tokens only: kernels and compressions.
template <class F>
void for_each_linear(const ZooSizes& s, F&& f) {
    using namespace polyattn;
    f("linear, elu + 1", LinearTransformer<>{});
    f("linear, ReLU", Attention<Kernel<ReLU>>{});
    f("Performer", Performer<>{});
    f("Linformer", Linformer<>{LinearProjection::drawn(s.tokens, s.landmarks)});
    f("Nystrom", NystromAttention({.landmarks = s.landmarks}));
    f("clustered", ClusteredAttention({.clusters = std::min<index_t>(100, 2 * s.landmarks), .top = std::min<index_t>(32, s.landmarks)}));
}
