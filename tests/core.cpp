#include "support/random.hpp"

#include <polyattn/core/parallel.hpp>
#include <polyattn/core/view.hpp>
#include <polyattn/core/workspace.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <limits>
#include <set>

using namespace polyattn;

TEST_CASE("Philox 4x32-10: known answers of its authors") {
    using Four = std::array<std::uint32_t, 4>;
    CHECK(philox({0, 0, 0, 0}, {0, 0}) == Four{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u});
    CHECK(philox({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}) == Four{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu});
    CHECK(philox({0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}, {0xa4093822u, 0x299f31d0u}) == Four{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u});
}

TEST_CASE("bounded integers are uniform: chi-square") {
    POLYATTN_RANDOM(random);
    for (const std::uint32_t bound : {1u, 2u, 3u, 7u, 100u}) {
        RandomRow row(random.seed(), 0, 99);
        std::vector<double> counts(bound, 0);
        const int draws = 20000;
        for (int i = 0; i < draws; ++i) {
            const auto x = row.below(bound);
            REQUIRE(x < bound);
            ++counts[x];
        }
        double chi = 0;
        for (const double count : counts) chi += (count - double(draws) / bound) * (count - double(draws) / bound) / (double(draws) / bound);
        // Laurent and Massart (2000), lemma 1: each of the two fails by chance once in e^25 = 7e10 runs.
        const double freedom = bound - 1., spread = 2 * std::sqrt(25 * freedom);
        CHECK(chi - freedom <= spread + 2 * 25);
        CHECK(freedom - chi <= spread);
    }
    // Bounds that do not divide 2^32 reject: the largest possible rejection rate still ends.
    RandomRow row(random.seed(), 1, 99);
    for (int i = 0; i < 100; ++i) CHECK(row.below(0x80000001u) <= 0x80000000u);
}

TEST_CASE("distinct draws: ascending, in range, complete, each number equally likely") {
    POLYATTN_RANDOM(random);
    std::vector<index_t> picks;
    for (const auto& [bound, count] : {std::pair{0, 3}, {1, 1}, {5, 9}, {50, 0}, {50, 49}, {2000, 700}, {100, 10}}) {
        RandomRow(random.seed(), 0, 99).distinct(bound, count, picks);
        CHECK(picks.size() == static_cast<std::size_t>(std::min(bound, count)));
        CHECK(std::adjacent_find(picks.begin(), picks.end(), std::greater_equal<>()) == picks.end());
        if (!picks.empty()) CHECK((picks.front() >= 0 && picks.back() < bound));
    }
    std::vector<double> hits(20, 0);
    const int rounds = 4000;
    for (int r = 0; r < rounds; ++r) {
        RandomRow(random.seed(), static_cast<std::uint32_t>(r), 99).distinct(20, 5, picks);
        for (const index_t p : picks) ++hits[static_cast<std::size_t>(p)];
    }
    const double expected = rounds * 5. / 20, deviation = std::sqrt(rounds * .25 * .75);
    for (const double h : hits) CHECK(std::abs(h - expected) <= 6 * deviation);
}

TEST_CASE("a draw's hash depends on each of its members") {
    const Draw base{1, 2, 3, 4, 5};
    std::set<std::uint32_t> hashes{base.hash()};
    for (Draw other : {Draw{2, 2, 3, 4, 5}, Draw{1, 3, 3, 4, 5}, Draw{1, 2, 4, 4, 5}, Draw{1, 2, 3, 5, 5}, Draw{1, 2, 3, 4, 6}}) hashes.insert(other.hash());
    CHECK(hashes.size() == 6);
}

TEST_CASE("views: strides, heads, axes of one") {
    std::vector<float> memory(2 * 3 * 4 * 5);
    std::iota(memory.begin(), memory.end(), 0.f);
    const auto view = tensor_view(memory.data(), {2, 3, 4, 5});
    CHECK(view.head(1, 2)(3, 4) == 119);
    CHECK(view.head(0, 1).row(2)[3] == 33);
    const auto swapped = tensor_view(memory.data(), {2, 4, 3, 5}, {60, 5, 20, 1});
    CHECK(swapped.head(1, 3)(2, 4) == 119);
    const auto one = tensor_view(memory.data(), {1, 5}, {1000, 1});
    CHECK(one.strides[2] == 0);
    CHECK(tensor_view(memory.data(), {4, 5}).rank == 2);
}

#if defined(__SSE__)
TEST_CASE("numbers below the smallest normal one are 0 in parallel_for, and nowhere else") {
    const volatile float smallest = std::numeric_limits<float>::min(), half = .5f, denormal = std::numeric_limits<float>::denorm_min(), one = 1;
    const auto kept = [&] { return smallest * half != 0 && denormal * one != 0; };
    std::atomic<int> not_flushed = 0;
    const auto body = [&](offset_t i, int) {
        if (smallest * half != 0 || denormal * one != 0) ++not_flushed;
        if (i == 50) throw std::runtime_error("fifty");
    };
    CHECK(kept());
    for (const offset_t count : {1, 50}) parallel_for(count, body);
    CHECK(kept());
    CHECK_THROWS_AS(parallel_for(60, body), std::runtime_error);
    CHECK(kept());
    CHECK(not_flushed == 0);
    // A caller who wants the mode keeps it.
    const detail::FlushDenormals outer;
    parallel_for(3, [](offset_t, int) {});
    CHECK(!kept());
}
#endif

TEST_CASE("parallel_for: every index once, nested calls, exceptions carried out") {
    std::vector<std::atomic<int>> seen(1000);
    parallel_for(1000, [&](offset_t i, int worker) {
        CHECK(worker >= 0);
        ++seen[static_cast<std::size_t>(i)];
        parallel_for(2, [&](offset_t, int inner) { CHECK(inner == 0); });
    });
    for (const auto& count : seen) CHECK(count == 1);
    CHECK_THROWS_WITH_AS(parallel_for(100, [](offset_t i, int) { if (i == 37) throw std::runtime_error("thirty-seven"); }), "thirty-seven", std::runtime_error);
    parallel_for(0, [](offset_t, int) { FAIL("no index to call"); });
}

TEST_CASE("arena: aligned, stacked, one block after the first round") {
    detail::Arena arena;
    std::size_t capacity = 0;
    for (int round = 0; round < 3; ++round) {
        const auto outer = arena.mark();
        const auto a = arena.take<float>(100);
        std::fill(a.begin(), a.end(), 1.f);
        const auto inner = arena.mark();
        const auto b = arena.take<double>(100000);
        b[0] = b[99999] = 2;
        CHECK(reinterpret_cast<std::uintptr_t>(b.data()) % 64 == 0);
        arena.release(inner);
        const auto c = arena.take<std::uint8_t>(3);
        CHECK(c.size() == 3);
        CHECK(a[99] == 1);
        arena.release(outer);
        if (round > 0) CHECK(arena.capacity() == capacity);
        capacity = arena.capacity();
    }
}

TEST_CASE("tensors begin with a line of the caches, large ones with a huge page") {
    for (const offset_t size : {0, 1, 17, 4096, 524287, 524288, 1000000}) {
        const Tensor<float> x({size});
        const auto at = reinterpret_cast<std::uintptr_t>(x.data());
        CHECK(at % 64 == 0);
        if (x.values.size() * sizeof(float) >= detail::huge_page) CHECK(at % detail::huge_page == 0);
        CHECK(std::all_of(x.values.begin(), x.values.end(), [](float value) { return value == 0; }));
    }
}
