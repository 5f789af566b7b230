#pragma once
// Graphs and draws made with Thrust, whichever device system runs it, against the CPU's: everything must be equal.
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
    const auto transposed = transpose_on_device(edges, keys);
    const TransposedEdges expected(PlanBuilder(queries, keys).edges(edges.to_host()).build());
    CHECK(on_host(transposed.offsets) == expected.offsets);
    CHECK(on_host(transposed.queries) == expected.queries);
    CHECK(on_host(transposed.forward) == expected.forward);
}

void check_random_tokens(const RandomTokens& pattern, index_t queries, index_t keys) {
    CAPTURE(queries);
    CAPTURE(keys);
    CAPTURE(pattern.count);
    const auto made = random_tokens_on_device(pattern, queries, keys);
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
                const auto made = edges_from_pairs_on_device(device_rows, device_keys, queries);
                CHECK(on_host(made.offsets) == expected.offsets);
                CHECK(on_host(made.keys) == expected.keys);
                check_transpose(made, queries, keys);
            }
    const thrust::device_vector<index_t> none, zero(1, 0), below(1, -1), one(1, 1);
    CHECK_THROWS_AS(edges_from_pairs_on_device(zero, none, 1), invalid_input);
    CHECK_THROWS_AS(edges_from_pairs_on_device(below, zero, 1), invalid_input);
    CHECK_THROWS_AS(edges_from_pairs_on_device(one, zero, 1), invalid_input);
}

TEST_CASE("noisy orders") {
    POLYATTN_RANDOM(random);
    for (const index_t count : {0, 1, 2, 3, 4, 5, 61, 1021, 5003})
        for (const double sigma : {0., 1e-9, .3, 12.75, 3000., infinite_sigma}) {
            CAPTURE(count);
            CAPTURE(sigma);
            const Draw draw{random.seed(), 3, 1, 4, 1};
            const auto line = static_cast<std::uint32_t>(random.below(1000));
            const auto made = on_host(noisy_order_on_device(draw, random_stream::shuffled_columns, sigma, count, line));
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
                CHECK(on_host(unbiased_sources_on_device(sampler, keys, draw, item)) == (keys == 0 ? std::vector<index_t>() : indices(plan.tiles()[0].keys)));
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
                const Edges made = locally_biased_sources_on_device(sampler, keys, draw, causal).to_host();
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
