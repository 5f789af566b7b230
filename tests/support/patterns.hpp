#pragma once
// Every pattern of the library, as data: a plan and, by another route, the mask that it must equal.

#include <polyattn/policy/pattern/big_bird.hpp>
#include <polyattn/policy/pattern/combine.hpp>
#include <polyattn/policy/pattern/dense.hpp>
#include <polyattn/policy/pattern/edge_list.hpp>
#include <polyattn/policy/pattern/grid.hpp>
#include <polyattn/policy/pattern/local_global_random.hpp>
#include <polyattn/policy/pattern/random.hpp>
#include <polyattn/policy/pattern/sparse_transformer.hpp>
#include <polyattn/policy/pattern/window.hpp>

#include <string>
#include <vector>

struct NamedPlan {
    std::string name;
    polyattn::Plan plan;
};

/// Plans of every pattern for n tokens, with small parameters so that every form of part turns up.
inline std::vector<NamedPlan> every_square_plan(polyattn::index_t n, std::uint64_t seed) {
    using namespace polyattn;
    std::vector<NamedPlan> plans;
    const auto add = [&](std::string name, const auto& pattern) {
        pattern.validate();
        plans.push_back({std::move(name), pattern.plan(n, n)});
    };
    plans.push_back({"Dense", Dense{}.plan(n, n)});
    plans.push_back({"Causal", Causal{}.plan(n, n)});
    add("SlidingWindow", SlidingWindow{.window = 6});
    add("SlidingWindow dilated", SlidingWindow{.window = 4, .dilation = 3});
    add("CausalSlidingWindow", CausalSlidingWindow{.window = 5});
    add("OverlappingBlocks", OverlappingBlocks{.window = 10});
    add("BlockLocal", BlockLocal{.block = 7});
    add("GlobalTokens", GlobalTokens{.count = 3, .seed = seed});
    add("RandomTokens", RandomTokens{.count = 4, .seed = seed});
    add("UniformTokens", UniformTokens{.count = 3});
    add("ErdosRenyi", ErdosRenyi{.per_token = 3, .seed = seed});
    if (n > 8) add("RandomRegular", RandomRegular{.degree = 4, .seed = seed});
    add("Prefix", Prefix<ErdosRenyi>{.length = n + 20, .pattern = {.per_token = 5, .seed = seed}});
    add("LocalGlobalRandom", LocalGlobalRandom{.window = 8, .globals = 4, .randoms = 5, .seed = seed});
    if (n > 0) add("Longformer", Longformer{.window = 6, .dilation = 2, .tokens = {n / 2}});
    add("BigBird", BigBird<4>{.window = 3, .globals = 1, .randoms = 2, .seed = seed});
    add("Strided", Strided{.stride = 5});
    add("Fixed", Fixed{.stride = 6, .summary = 2});
    add("ShiftedWindows2D", ShiftedWindows2D{.height = n, .width = 1, .window = 6, .shift = 2});
    if (n % 5 == 0) add("ShiftedWindows2D 5 wide", ShiftedWindows2D{.height = n / 5, .width = 5, .window = 3, .shift = 1});
    add("Union, shared rows", Union{Strided{.stride = 4}, SlidingWindow{.window = 6, .dilation = 3}, RandomTokens{.count = 2, .seed = seed}, GlobalTokens{.count = 2, .seed = seed}});
    add("Intersection", Intersection{Causal{}, LocalGlobalRandom{.window = 12, .globals = 5, .randoms = 5, .seed = seed}});
    // Rows without keys: every third token sees nothing.
    EdgeList some{{0}, {}};
    for (index_t i = 0; i < n; ++i) {
        if (i % 3 != 0)
            for (index_t j = i % 2; j < n; j += 4) some.keys.push_back(j);
        some.offsets.push_back(static_cast<offset_t>(some.keys.size()));
    }
    plans.push_back({"EdgeList with empty rows", some.plan(n, n)});
    return plans;
}
