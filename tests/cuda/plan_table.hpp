#pragma once
// Plans whose edges are made with Thrust against the host's: part by part the same. Included behind sampling_table.hpp.

#include <polyattn/backend/cuda/plan_building.cuh>
#include <polyattn/policy/pattern/big_bird.hpp>
#include <polyattn/policy/pattern/dense.hpp>
#include <polyattn/policy/pattern/edge_list.hpp>

#include <string>

namespace {

template <class T>
std::vector<T> on_host(const T* numbers, offset_t count) {
    std::vector<T> to(static_cast<std::size_t>(count));
    thrust::copy_n(thrust::device_pointer_cast(numbers), count, to.begin());
    return to;
}

void check_same_plan(const Plan& made, const Plan& expected) {
    REQUIRE(made.queries() == expected.queries());
    REQUIRE(made.keys() == expected.keys());
    REQUIRE(made.tiles().size() == expected.tiles().size());
    for (std::size_t t = 0; t < made.tiles().size(); ++t) {
        const Tile &a = made.tiles()[t], &b = expected.tiles()[t];
        CHECK(indices(a.rows) == indices(b.rows));
        CHECK(indices(a.keys) == indices(b.keys));
        CHECK(a.bounds == b.bounds);
        CHECK(a.excluded == b.excluded);
    }
    const auto* kept = made.find_lowered<detail::cuda::DeviceEdges>();
    if (kept) {  // before the host asks
        const TransposedEdges transposed(expected);
        REQUIRE(kept->count() == expected.edges().count());
        CHECK(on_host(kept->by_query().offsets, offset_t{made.queries()} + 1) == expected.edges().offsets);
        CHECK(on_host(kept->by_query().to, kept->count()) == expected.edges().keys);
        CHECK(kept->by_query().index == nullptr);
        CHECK(on_host(kept->by_key().offsets, offset_t{made.keys()} + 1) == transposed.offsets);
        CHECK(on_host(kept->by_key().to, kept->count()) == transposed.queries);
        CHECK(on_host(kept->by_key().index, kept->count()) == transposed.forward);
    }
    CHECK(made.edges().keys == expected.edges().keys);
    CHECK(made.count() == expected.count());
    CHECK(made.to_csr().keys == expected.to_csr().keys);
}
template <class Pattern>
void check_plan(const Pattern& pattern, index_t queries, index_t keys) {
    CAPTURE(queries);
    CAPTURE(keys);
    const Plan made = plan_on_device(pattern, queries, keys, execution()), expected = pattern.plan(queries, keys);
    CHECK((made.find_lowered<detail::cuda::DeviceEdges>() != nullptr) == (expected.edges().count() > 0));
    check_same_plan(made, expected);
}

/// Every third key, each query more of them than the one before.
struct Staircase {
    using policy_kind = sparsity_pattern_kind;
    Plan plan(index_t queries, index_t keys) const {
        std::vector<index_t> steps;
        for (index_t key = 0; key < keys; key += 3) steps.push_back(key);
        return PlanBuilder(queries, keys).tile(IndexSequence::range(0, queries), IndexSequence::list(std::move(steps)), [](index_t i) { return std::pair{0, i / 3}; }).build();
    }
};

/// Any edges.
EdgeList random_graph(Random& random, index_t queries, index_t keys, index_t per_row) {
    EdgeList list;
    list.offsets.push_back(0);
    for (index_t i = 0; i < queries; ++i) {
        for (index_t key = 0; key < keys; ++key)
            if (random.below(keys) < per_row) list.keys.push_back(key);
        list.offsets.push_back(static_cast<offset_t>(list.keys.size()));
    }
    return list;
}

}  // namespace

TEST_CASE("plans made on the device") {
    POLYATTN_RANDOM(random);
    for (const index_t keys : {0, 1, 2, 7, 61, 130})
        for (const index_t queries : {keys, keys / 2, keys + 3}) {
            const std::uint64_t seed = random.seed();
            check_plan(RandomTokens{.count = 5, .seed = seed}, queries, keys);
            check_plan(UniformTokens{.count = 5}, queries, keys);
            check_plan(ErdosRenyi{.per_token = 3, .seed = seed}, queries, keys);
            check_plan(LocalGlobalRandom{.window = 4, .globals = 3, .randoms = 6, .seed = seed}, queries, keys);
            check_plan(Union(SlidingWindow{.window = 6}, RandomTokens{.count = 4, .seed = seed}, GlobalTokens{.count = 2, .seed = seed}, UniformTokens{.count = 3}), queries, keys);
            check_plan(Intersection(LocalGlobalRandom{.window = 4, .globals = 3, .randoms = 40, .seed = seed}, Causal()), queries, keys);
            check_plan(Intersection(RandomTokens{.count = 40, .seed = seed}, Union(ErdosRenyi{.per_token = 20, .seed = seed}, SlidingWindow{.window = 8})), queries, keys);
            check_plan(Union(random_graph(random, queries, keys, 4), CausalSlidingWindow{.window = 3}, RandomTokens{.count = 4, .seed = seed}), queries, keys);
        }
    check_plan(Prefix<RandomTokens>{.length = 64, .pattern = {.count = 9, .seed = random.seed()}}, 37, 37);
    check_plan(Prefix<LocalGlobalRandom>{.length = 64, .pattern = {.window = 4, .globals = 5, .randoms = 7, .seed = random.seed()}}, 64, 64);
    CHECK_THROWS_AS(plan_on_device(Prefix<RandomTokens>{.length = 64}, 5, 6, execution()), invalid_input);
    // Many tiles, and patterns that the host plans.
    check_plan(Union(BigBird<8>{.window = 3, .globals = 1, .randoms = 2, .seed = random.seed()}, RandomTokens{.count = 6, .seed = random.seed()}), 173, 173);
    check_plan(Union(RandomTokens{.count = 6, .seed = random.seed()}, SlidingWindow{.window = 8, .dilation = 20}), 67, 67);
    check_plan(RandomRegular{.degree = 6, .seed = random.seed()}, 31, 31);
    check_plan(SlidingWindow{.window = 4}, 31, 31);
    // Tiles of which single pairs are left over.
    const Union tiles(Staircase(), SlidingWindow{.window = 20});
    CHECK(tiles.plan(33, 33).edges().count() > 0);
    check_plan(Union(tiles, RandomTokens{.count = 12, .seed = random.seed()}), 33, 33);
    check_plan(tiles, 33, 33);
}

TEST_CASE("graphs on the device as plans") {
    POLYATTN_RANDOM(random);
    const auto on_device = [](const EdgeList& list) {
        return CudaEdges{thrust::device_vector<offset_t>(list.offsets.begin(), list.offsets.end()), thrust::device_vector<index_t>(list.keys.begin(), list.keys.end())};
    };
    for (const index_t queries : {0, 1, 2, 40, 131})
        for (const index_t keys : {1, 5, 97}) {
            const EdgeList list = random_graph(random, queries, keys, keys / 2);
            check_same_plan(plan_of_edges_on_device(on_device(list), queries, keys, execution()), list.plan(queries, keys));
        }
    const auto message = [](auto&& f) {
        try {
            f();
        } catch (const invalid_input& error) { return std::string(error.what()); }
        return std::string("nothing thrown");
    };
    for (const EdgeList& wrong : {EdgeList{{0, 2, 3}, {1, 1, 0}}, EdgeList{{0, 2, 3}, {2, 1, 0}}, EdgeList{{0, 2, 3}, {1, 4, 0}}, EdgeList{{0, 2, 3}, {-1, 1, 0}}, EdgeList{{0, 2, 4}, {0, 1, 0}}, EdgeList{{1, 2, 3}, {0, 1, 0}},
                                  EdgeList{{0, 4, 3}, {0, 1, 0}}, EdgeList{{0, 3}, {0, 1, 2}}, EdgeList{{}, {0, 1}}, EdgeList{{}, {}}}) {
        const std::string expected = message([&] { wrong.plan(2, 4); });
        CHECK(message([&] { plan_of_edges_on_device(on_device(wrong), 2, 4, execution()); }) == expected);
    }
    CHECK_THROWS_AS(plan_of_edges_on_device({}, -1, 4, execution()), invalid_input);
    CHECK_THROWS_AS(plan_of_edges_on_device({}, 1, -4, execution()), invalid_input);
    // Without an execution policy.
    const EdgeList list = random_graph(random, 9, 9, 4);
    const Plan plan = plan_of_edges_on_device(on_device(list), 9, 9), window = SlidingWindow{.window = 4}.plan(9, 9);
    check_same_plan(unite_on_device(window, plan), unite(window, list.plan(9, 9)));
    check_same_plan(intersect_on_device(window, plan), intersect(window, list.plan(9, 9)));
    check_same_plan(plan_on_device(RandomTokens{.count = 3}, 9, 9), RandomTokens{.count = 3}.plan(9, 9));
    CHECK_THROWS_AS(unite_on_device(window, SlidingWindow().plan(8, 9)), invalid_input);
    CHECK_THROWS_AS(intersect_on_device(window, SlidingWindow().plan(8, 9)), invalid_input);
    const Plan random_tokens = plan_on_device(RandomTokens{.count = 3}, 9, 9);
    CHECK_THROWS_AS(intersect_on_device(random_tokens, SlidingWindow().plan(8, 9)), invalid_input);
    CHECK_THROWS_AS(unite_on_device(random_tokens, SlidingWindow().plan(8, 9)), invalid_input);
    CHECK_THROWS_AS(plan_on_device(UniformTokens{}, -1, 1), invalid_input);
    CHECK_THROWS_AS(plan_on_device(RandomTokens{}, 1, -1), invalid_input);
    // What was found first stays: others hold on to it.
    const auto* kept = random_tokens.find_lowered<detail::cuda::DeviceEdges>();
    random_tokens.adopt(std::make_shared<const detail::cuda::DeviceEdges>(*kept));
    CHECK(random_tokens.find_lowered<detail::cuda::DeviceEdges>() == kept);
}
