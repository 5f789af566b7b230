#pragma once
// Graphs and draws made with Thrust, whichever device system runs it, against the CPU's: everything must be equal. The including file declares execution(), the
// policy to work under.
#include "support/random.hpp"

#include <doctest/doctest.h>
#include <polyattn/backend/cuda/sampling.cuh>

namespace {

using namespace polyattn;

template <class T>
std::vector<T> on_host(const thrust::device_vector<T>& from) {
    std::vector<T> to(from.size());
    thrust::copy(from.begin(), from.end(), to.begin());
    return to;
}
std::vector<index_t> indices(const IndexSequence& sequence) {
    std::vector<index_t> all;
    for (index_t i = 0; i < sequence.size(); ++i) all.push_back(sequence[i]);
    return all;
}

void check_transpose(const CudaEdges& edges, index_t queries, index_t keys) {
    const auto transposed = transpose_on_device(edges, keys, execution());
    const TransposedEdges expected(PlanBuilder(queries, keys).edges(edges.to_host()).build());
    CHECK(on_host(transposed.offsets) == expected.offsets);
    CHECK(on_host(transposed.queries) == expected.queries);
    CHECK(on_host(transposed.forward) == expected.forward);
}

void check_random_tokens(const RandomTokens& pattern, index_t queries, index_t keys) {
    CAPTURE(queries);
    CAPTURE(keys);
    CAPTURE(pattern.count);
    const auto made = random_tokens_on_device(pattern, queries, keys, execution());
    const Plan plan = pattern.plan(queries, keys);
    CHECK(on_host(made.offsets) == plan.edges().offsets);
    CHECK(on_host(made.keys) == plan.edges().keys);
    check_transpose(made, queries, keys);
}

}  // namespace

TEST_CASE("random tokens and their transpose") {
    POLYATTN_RANDOM(random);
    for (const index_t keys : {0, 1, 2, 3, 7, 61, 101})
        for (const index_t count : {0, 1, 5, 60, 200}) {
            const RandomTokens pattern{.count = count, .seed = random.seed()};
            check_random_tokens(pattern, keys, keys);
            check_random_tokens(pattern, 13, keys);
            check_random_tokens(pattern, 0, keys);
        }
    for (const index_t keys : {512, 513, 514, 997})
        for (const index_t count : {511, 512, 513, 700}) check_random_tokens({.count = count, .seed = random.seed()}, 3, keys);
    // Rows before the first key, some whose own token is no key, and more bits than edges: several batches of rows.
    check_random_tokens({.count = 513, .seed = random.seed()}, 520, 517);
    check_random_tokens({.count = 520, .seed = random.seed()}, 70, 40009);
}

TEST_CASE("edges from pairs") {
    POLYATTN_RANDOM(random);
    for (const index_t queries : {0, 1, 2, 31, 257})
        for (const index_t keys : {1, 2, 97})
            for (const index_t count : {0, 1, 2, 40, 1009}) {
                if (queries == 0 && count > 0) continue;
                CAPTURE(queries);
                CAPTURE(keys);
                CAPTURE(count);
                std::vector<detail::Pair> pairs;
                std::vector<index_t> rows, keys_of_pairs;
                for (index_t p = 0; p < count; ++p) {
                    pairs.push_back({random.below(queries), random.below(keys)});
                    rows.push_back(pairs.back().row);
                    keys_of_pairs.push_back(pairs.back().key);
                }
                Edges expected = detail::edges_from_pairs(pairs, queries);
                if (expected.offsets.empty()) expected.offsets.assign(static_cast<std::size_t>(queries) + 1, 0);
                const thrust::device_vector<index_t> device_rows(rows.begin(), rows.end()), device_keys(keys_of_pairs.begin(), keys_of_pairs.end());
                const auto made = edges_from_pairs_on_device(device_rows, device_keys, queries, execution());
                CHECK(on_host(made.offsets) == expected.offsets);
                CHECK(on_host(made.keys) == expected.keys);
                check_transpose(made, queries, keys);
            }
    const thrust::device_vector<index_t> none, zero(1, 0), below(1, -1), one(1, 1);
    CHECK_THROWS_AS(edges_from_pairs_on_device(zero, none, 1, execution()), invalid_input);
    CHECK_THROWS_AS(edges_from_pairs_on_device(below, zero, 1, execution()), invalid_input);
    CHECK_THROWS_AS(edges_from_pairs_on_device(one, zero, 1, execution()), invalid_input);
}

TEST_CASE("noisy orders") {
    POLYATTN_RANDOM(random);
    for (const index_t count : {0, 1, 2, 3, 4, 5, 61, 1021, 5003})
        for (const double sigma : {0., 1e-9, .3, 12.75, 3000., infinite_sigma}) {
            CAPTURE(count);
            CAPTURE(sigma);
            const Draw draw{random.seed(), 3, 1, 4, 1};
            const auto line = static_cast<std::uint32_t>(random.below(1000));
            const auto made = on_host(noisy_order_on_device(draw, random_stream::shuffled_columns, sigma, count, line, execution()));
            detail::NoisyOrder order(draw, random_stream::shuffled_columns, sigma);
            const auto expected = order(count, line);
            CHECK(made == std::vector<index_t>(expected.begin(), expected.end()));
        }
}

TEST_CASE("unbiased sources") {
    POLYATTN_RANDOM(random);
    for (const index_t keys : {0, 1, 2, 61, 512, 1021, 3001})
        for (const double drop : {0., .1, .5, .97, 1.}) {
            CAPTURE(keys);
            CAPTURE(drop);
            const Unbiased sampler{.drop = drop, .per_item = true};
            const Draw draw{random.seed(), 2, 0, 1, 0};
            for (const index_t item : {0, 5}) {
                const Plan plan = sampler.sample_item(1, keys, item, keys, draw, false);
                CHECK(on_host(unbiased_sources_on_device(sampler, keys, draw, item, execution())) == (keys == 0 ? std::vector<index_t>() : indices(plan.tiles()[0].keys)));
            }
        }
}

namespace {

template <int L>
void check_locally_biased(Random& random) {
    for (const index_t keys : {0, 1, 2, 3, 4, 61, 1021}) {
        if (keys > 0 && keys < L) continue;
        for (const double sigma : {0., .01, .3, infinite_sigma})
            for (const bool causal : {false, true}) {
                CAPTURE(L);
                CAPTURE(keys);
                CAPTURE(sigma);
                CAPTURE(causal);
                const LocallyBiased<L> sampler{.sigma = sigma};
                const Draw draw{random.seed(), 7, 2, 0, 3};
                const Edges made = locally_biased_sources_on_device(sampler, keys, draw, causal, execution()).to_host();
                REQUIRE(made.offsets.size() == L + 1);
                REQUIRE(made.count() == keys);
                const Plan plan = sampler.sample(keys, keys, draw, causal);
                REQUIRE(plan.tiles().size() == (keys == 0 ? 0 : L));
                for (index_t b = 0; b < static_cast<index_t>(plan.tiles().size()); ++b) {
                    const auto row = made.row(b);
                    CHECK(std::vector<index_t>(row.begin(), row.end()) == indices(plan.tiles()[static_cast<std::size_t>(b)].keys));
                }
            }
    }
}

}  // namespace

TEST_CASE("locally biased sources") {
    POLYATTN_RANDOM(random);
    check_locally_biased<1>(random);
    check_locally_biased<3>(random);
    check_locally_biased<4>(random);
    CHECK_THROWS_AS(locally_biased_sources_on_device(LocallyBiased<4>(), 3, Draw{}), invalid_input);
}

namespace {

void check_erdos_renyi(const ErdosRenyi& pattern, index_t queries, index_t keys) {
    CAPTURE(queries);
    CAPTURE(keys);
    CAPTURE(pattern.per_token);
    const auto made = erdos_renyi_on_device(pattern, queries, keys, execution());
    Edges expected = pattern.plan(queries, keys).edges();
    if (expected.offsets.empty()) expected.offsets.assign(static_cast<std::size_t>(queries) + 1, 0);
    CHECK(on_host(made.offsets) == expected.offsets);
    CHECK(on_host(made.keys) == expected.keys);
}

void check_grid(Random& random, Grid2D sampler, bool causal) {
    for (const OverDepth& sigma : {OverDepth(0.), OverDepth(.3, .9, 4), OverDepth(infinite_sigma)}) {
        sampler.sigma = sigma;
        CAPTURE(sampler.height);
        CAPTURE(sampler.width);
        CAPTURE(sampler.row_windows);
        CAPTURE(sampler.window);
        CAPTURE(sampler.shift);
        CAPTURE(sigma.first());
        CAPTURE(causal);
        const index_t keys = sampler.height * sampler.width;
        const Draw draw{random.seed(), 7, 2, 0, 3};
        const CudaWindows windows = grid_windows_on_device(sampler, keys, draw, causal, execution());
        const CudaEdges queries{windows.offsets, windows.queries}, sources{windows.offsets, windows.sources};
        const Edges made_queries = queries.to_host(), made_sources = sources.to_host();
        const Plan plan = sampler.sample(keys, keys, draw, causal);
        REQUIRE(made_sources.offsets.size() == plan.tiles().size() + 1);
        REQUIRE(made_sources.offsets.back() == keys);
        for (std::size_t w = 0; w < plan.tiles().size(); ++w) {
            const auto rows = made_queries.row(static_cast<index_t>(w)), seen = made_sources.row(static_cast<index_t>(w));
            CHECK(std::vector<index_t>(rows.begin(), rows.end()) == indices(plan.tiles()[w].rows));
            CHECK(std::vector<index_t>(seen.begin(), seen.end()) == indices(plan.tiles()[w].keys));
        }
    }
}

}  // namespace

TEST_CASE("Erdos and Renyi's graph") {
    POLYATTN_RANDOM(random);
    for (const index_t queries : {0, 1, 2, 31, 257})
        for (const index_t keys : {0, 1, 2, 61, 128})
            for (const index_t count : {0, 1, 60, 127}) check_erdos_renyi({.per_token = count, .seed = random.seed()}, queries, keys);
    // Every fourth word for a key is refused, and every third, the most that there can be.
    check_erdos_renyi({.per_token = 40, .seed = random.seed()}, 3, (index_t{1} << 30) + 1);
    check_erdos_renyi({.per_token = 700, .seed = random.seed()}, 5, 1431655766);
    CHECK_THROWS_AS(erdos_renyi_on_device({.per_token = -1}, 3, 3, execution()), invalid_input);
    CHECK_THROWS_AS(erdos_renyi_on_device({}, -1, 3, execution()), invalid_input);
    CHECK_THROWS_AS(erdos_renyi_on_device({}, 3, -1, execution()), invalid_input);
}

TEST_CASE("windows of a picture") {
    POLYATTN_RANDOM(random);
    for (const auto& [height, width] : {std::pair{1, 1}, std::pair{1, 9}, std::pair{7, 1}, std::pair{5, 13}, std::pair{16, 16}, std::pair{33, 6}}) {
        for (const index_t windows : {1, 5, 33}) {
            if (windows > height) continue;
            check_grid(random, {.height = height, .width = width, .row_windows = windows}, false);
            check_grid(random, {.height = height, .width = width, .row_windows = windows}, true);
        }
        for (const index_t window : {2, 14})
            for (const index_t shift : {0, 1, 13})
                if (shift < window) check_grid(random, {.height = height, .width = width, .window = window, .shift = shift}, false);
    }
    const Draw draw;
    CHECK_THROWS_AS(grid_windows_on_device({.height = 2, .width = 3, .row_windows = 2}, 7, draw, false, execution()), invalid_input);
    CHECK_THROWS_AS(grid_windows_on_device({.height = 4, .width = 4, .window = 2}, 16, draw, true, execution()), invalid_input);
    CHECK_THROWS_AS(grid_windows_on_device({.height = 4, .width = 4}, 16, draw, false, execution()), invalid_input);
}

TEST_CASE("without an execution policy the results are the same") {
    POLYATTN_RANDOM(random);
    const Draw draw{random.seed(), 1, 2, 3, 4};
    const std::uint64_t seed = random.seed();
    const auto same = [](const CudaEdges& a, const CudaEdges& b) { return on_host(a.offsets) == on_host(b.offsets) && on_host(a.keys) == on_host(b.keys); };
    const CudaEdges tokens = random_tokens_on_device({.count = 5, .seed = seed}, 20, 20);
    CHECK(same(tokens, random_tokens_on_device({.count = 5, .seed = seed}, 20, 20, execution())));
    CHECK(same(erdos_renyi_on_device({.per_token = 5, .seed = seed}, 20, 20), erdos_renyi_on_device({.per_token = 5, .seed = seed}, 20, 20, execution())));
    CHECK(on_host(transpose_on_device(tokens, 20).queries) == on_host(transpose_on_device(tokens, 20, execution()).queries));
    CHECK(same(edges_from_pairs_on_device(tokens.keys, tokens.keys, 20), edges_from_pairs_on_device(tokens.keys, tokens.keys, 20, execution())));
    CHECK(on_host(noisy_order_on_device(draw, random_stream::shuffled_keys, 3., 50, 1)) == on_host(noisy_order_on_device(draw, random_stream::shuffled_keys, 3., 50, 1, execution())));
    CHECK(on_host(unbiased_sources_on_device({}, 50, draw)) == on_host(unbiased_sources_on_device({}, 50, draw, 0, execution())));
    CHECK(same(locally_biased_sources_on_device(LocallyBiased<4>(), 50, draw), locally_biased_sources_on_device(LocallyBiased<4>(), 50, draw, false, execution())));
    const Grid2D grid{.row_windows = 2};
    CHECK(on_host(grid_windows_on_device(grid, 64, draw).sources) == on_host(grid_windows_on_device(grid, 64, draw, false, execution()).sources));
}
