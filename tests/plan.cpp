#include "support/patterns.hpp"
#include "support/random.hpp"

#include <polyattn/plan/picture.hpp>

#include <doctest/doctest.h>

#include <thread>

using namespace polyattn;

namespace {

using Mask = std::vector<char>;

Mask mask_of(const Plan& plan) {
    Mask mask(static_cast<std::size_t>(plan.queries()) * static_cast<std::size_t>(plan.keys()), 0);
    for (index_t i = 0; i < plan.queries(); ++i)
        plan.for_each_key(i, [&](index_t j) { ++mask[static_cast<std::size_t>(i) * static_cast<std::size_t>(plan.keys()) + static_cast<std::size_t>(j)]; });
    return mask;
}

/// Against a rule (i, position of i, j): every pair in exactly one part, and count, density, contains and CSR agree.
template <class Rule>
void check_plan(const std::string& name, const Plan& plan, Rule rule) {
    INFO(name, ": ", plan.queries(), " x ", plan.keys());
    const Mask mask = mask_of(plan);
    offset_t wrong = 0, repeated = 0, pairs = 0, contains_wrong = 0;
    for (index_t i = 0; i < plan.queries(); ++i)
        for (index_t j = 0; j < plan.keys(); ++j) {
            const char times = mask[static_cast<std::size_t>(i) * static_cast<std::size_t>(plan.keys()) + static_cast<std::size_t>(j)];
            const bool wanted = rule(i, i + plan.keys() - plan.queries(), j);
            wrong += (times > 0) != wanted;
            repeated += times > 1;
            pairs += times;
            contains_wrong += plan.contains(i, j) != wanted;
        }
    CHECK(wrong == 0);
    CHECK(repeated == 0);
    CHECK(contains_wrong == 0);
    CHECK(plan.count() == pairs);
    CHECK(plan.is_disjoint());
    const Csr csr = plan.to_csr();
    CHECK(csr.offsets.back() == pairs);
    if (pairs > 0) CHECK(plan.density() == doctest::Approx(double(pairs) / (double(plan.queries()) * plan.keys())));
    // The transpose holds the same edges.
    const TransposedEdges transposed(plan);
    for (index_t j = 0; j < plan.keys(); ++j)
        for (offset_t e = transposed.offsets[static_cast<std::size_t>(j)]; e < transposed.offsets[static_cast<std::size_t>(j) + 1]; ++e) {
            CHECK(plan.edges().contains(transposed.queries[static_cast<std::size_t>(e)], j));
            CHECK(plan.edges().keys[static_cast<std::size_t>(transposed.forward[static_cast<std::size_t>(e)])] == j);
        }
}

index_t floor_div(index_t a, index_t b) { return (a - (a < 0 ? b - 1 : 0)) / b; }

}  // namespace

TEST_CASE("patterns with a closed form equal their rule, for any numbers of queries and keys") {
    for (const index_t queries : {0, 1, 2, 5, 16, 33, 97})
        for (const index_t keys : {0, 1, 7, 33, 97}) {
            check_plan("Dense", Dense{}.plan(queries, keys), [](index_t, index_t, index_t) { return true; });
            check_plan("Causal", Causal{}.plan(queries, keys), [](index_t, index_t p, index_t j) { return j <= p; });
            for (const index_t window : {0, 2, 6, 200})
                for (const index_t dilation : {1, 2, 5}) {
                    check_plan("SlidingWindow", SlidingWindow{window, dilation}.plan(queries, keys), [=](index_t, index_t p, index_t j) {
                        return (j - p) % dilation == 0 && std::abs(j - p) <= window / 2 * dilation;
                    });
                    check_plan("CausalSlidingWindow", CausalSlidingWindow{window, dilation}.plan(queries, keys), [=](index_t, index_t p, index_t j) {
                        return (j - p) % dilation == 0 && j <= p && p - j <= window * dilation;
                    });
                }
            for (const index_t half : {1, 3, 8})
                check_plan("OverlappingBlocks", OverlappingBlocks{2 * half}.plan(queries, keys),
                           [=](index_t, index_t p, index_t j) { return std::abs(floor_div(p, half) - floor_div(j, half)) <= 1; });
            for (const index_t block : {1, 4, 50})
                check_plan("BlockLocal", BlockLocal{block}.plan(queries, keys), [=](index_t, index_t p, index_t j) { return p >= 0 && p / block == j / block; });
            for (const index_t stride : {1, 4, 9}) {
                check_plan("Strided", Strided{stride}.plan(queries, keys), [=](index_t, index_t p, index_t j) { return j <= p && (p - j < stride || (p - j) % stride == 0); });
                for (const index_t summary : {0, 1, stride})
                    check_plan("Fixed", Fixed{stride, summary}.plan(queries, keys), [=](index_t, index_t p, index_t j) {
                        return p >= 0 && j <= p && (p / stride == j / stride || (j / stride < p / stride && j % stride >= stride - summary));
                    });
            }
            if (keys > 5)
                check_plan("GlobalTokens", GlobalTokens{.tokens = {1, 5}}.plan(queries, keys), [](index_t, index_t p, index_t j) { return j == 1 || j == 5 || p == 1 || p == 5; });
            for (const index_t count : {0, 3, 500})
                check_plan("UniformTokens", UniformTokens{count}.plan(queries, keys), [=](index_t, index_t p, index_t j) {
                    const index_t picks = std::min(count, keys - 1);
                    for (index_t m = 1; m <= picks; ++m)
                        if (((p + m * keys / (picks + 1)) % keys + keys) % keys == j) return true;
                    return false;
                });
        }
}

TEST_CASE("pictures in shifted windows") {
    for (const index_t window : {1, 3, 4})
        for (index_t shift = 0; shift < window; ++shift) {
            const index_t height = 7, width = 9;
            const auto part = [=](index_t x) { return floor_div(x - shift, window); };
            check_plan("ShiftedWindows2D", ShiftedWindows2D{height, width, window, shift}.plan(63, 63), [=](index_t i, index_t, index_t j) {
                return part(i / width) == part(j / width) && part(i % width) == part(j % width);
            });
        }
}

TEST_CASE("random patterns: counts, distinctness, seeds") {
    POLYATTN_RANDOM(random);
    const std::uint64_t seed = random.seed();
    for (const index_t n : {1, 2, 20, 97}) {
        const auto count = [&](index_t wanted, index_t most) { return offset_t{n} * std::min(wanted, most); };
        const Plan tokens = RandomTokens{.count = 5, .seed = seed}.plan(n, n);
        CHECK(tokens.count() == count(5, n - 1));
        for (index_t i = 0; i < n; ++i) CHECK_FALSE(tokens.contains(i, i));
        CHECK(ErdosRenyi{.per_token = 4, .seed = seed}.plan(n, n).count() == count(4, n));
        const index_t g = std::min<index_t>(n, 3);
        CHECK(GlobalTokens{.count = 3, .seed = seed}.plan(n, n).count() == 2 * offset_t{g} * n - g * g);
        CHECK(mask_of(RandomTokens{.count = 5, .seed = seed}.plan(n, n)) == mask_of(tokens));
        if (n > 50) CHECK(mask_of(RandomTokens{.count = 5, .seed = seed + 1}.plan(n, n)) != mask_of(tokens));
    }
    for (const auto& [n, degree] : {std::pair{17, 8}, {40, 2}, {64, 12}, {9, 0}}) {
        const Plan regular = RandomRegular{.degree = degree, .seed = seed}.plan(n, n);
        for (index_t i = 0; i < n; ++i) {
            CHECK(regular.edges().row(i).size() == static_cast<std::size_t>(degree));
            CHECK_FALSE(regular.contains(i, i));
            for (const index_t j : regular.edges().row(i)) CHECK(regular.contains(j, i));
        }
    }
}

TEST_CASE("composed patterns equal the same set operations on masks") {
    POLYATTN_RANDOM(random);
    for (const index_t n : {1, 3, 16, 40, 71}) {
        const std::uint64_t seed = random.seed();
        const Mask local = mask_of(SlidingWindow{.window = 8}.plan(n, n)), global = mask_of(GlobalTokens{.count = 4, .seed = seed}.plan(n, n)),
                   tokens = mask_of(RandomTokens{.count = 5, .seed = seed}.plan(n, n));
        const auto at = [n](index_t i, index_t j) { return static_cast<std::size_t>(i * n + j); };
        const LocalGlobalRandom pattern{.window = 8, .globals = 4, .randoms = 5, .seed = seed};
        const auto in = [&](index_t i, index_t, index_t j) { return local[at(i, j)] || global[at(i, j)] || tokens[at(i, j)]; };
        check_plan("LocalGlobalRandom", pattern.plan(n, n), in);
        check_plan("Intersection with Causal", Intersection{pattern, Causal{}}.plan(n, n), [&](index_t i, index_t p, index_t j) { return in(i, p, j) && j <= p; });
        check_plan("Longformer", Longformer{.window = 4, .dilation = 2, .tokens = {0}}.plan(n, n), [](index_t, index_t p, index_t j) {
            return p == 0 || j == 0 || ((j - p) % 2 == 0 && std::abs(j - p) <= 4);
        });
        check_plan("Prefix", Prefix<LocalGlobalRandom>{.length = 80, .pattern = pattern}.plan(n, n), [&, full = pattern.plan(80, 80)](index_t i, index_t, index_t j) { return full.contains(i, j); });
        const index_t blocks = (n + 3) / 4;
        const Plan big = BigBird<4>{.window = 3, .globals = 1, .randoms = 2, .seed = seed}.plan(n, n);
        CHECK(big.is_disjoint());
        for (index_t i = 0; i < n; ++i) {
            index_t seen_blocks = 0;
            for (index_t b = 0; b < blocks; ++b) {
                index_t seen = 0;
                for (index_t j = 4 * b; j < std::min(n, 4 * b + 4); ++j) seen += big.contains(i, j);
                CHECK((seen == 0 || seen == std::min(n, 4 * b + 4) - 4 * b));  // whole blocks only
                seen_blocks += seen > 0;
                if (std::abs(i / 4 - b) <= 1 || b == 0 || i / 4 == 0) CHECK(seen > 0);
            }
            if (i >= 4) {
                index_t fixed = 0;
                for (index_t b = 0; b < blocks; ++b) fixed += std::abs(i / 4 - b) <= 1 || b == 0;
                CHECK(seen_blocks == std::min(blocks, fixed + 2));
            }
        }
    }
}

TEST_CASE("unions and intersections of every pair of patterns, and of three") {
    POLYATTN_RANDOM(random);
    for (const index_t n : {10, 35}) {
        const auto plans = every_square_plan(n, random.seed());
        std::vector<Mask> masks;
        for (const auto& named : plans) masks.push_back(mask_of(named.plan));
        for (std::size_t a = 0; a < plans.size(); ++a)
            for (std::size_t b = 0; b < plans.size(); ++b) {
                const auto at = [n](index_t i, index_t j) { return static_cast<std::size_t>(i * n + j); };
                const Plan both = unite(plans[a].plan, plans[b].plan);
                check_plan(plans[a].name + " | " + plans[b].name, both, [&](index_t i, index_t, index_t j) { return masks[a][at(i, j)] || masks[b][at(i, j)]; });
                check_plan(plans[a].name + " & " + plans[b].name, intersect(plans[a].plan, plans[b].plan),
                           [&](index_t i, index_t, index_t j) { return masks[a][at(i, j)] && masks[b][at(i, j)]; });
                const std::size_t c = (a * 7 + b * 3) % plans.size();
                check_plan(plans[a].name + " | " + plans[b].name + " & " + plans[c].name, intersect(both, plans[c].plan),
                           [&](index_t i, index_t, index_t j) { return (masks[a][at(i, j)] || masks[b][at(i, j)]) && masks[c][at(i, j)]; });
            }
    }
}

TEST_CASE("the same pairs, however they are cut into parts") {
    POLYATTN_RANDOM(random);
    const index_t n = 50;
    const Plan plan = LocalGlobalRandom{.window = 8, .globals = 3, .randoms = 4, .seed = random.seed()}.plan(n, n);
    const Csr csr = plan.to_csr();
    const auto edges = [&](std::vector<index_t> keys) { return EdgeList{csr.offsets, std::move(keys)}.plan(n, n); };
    CHECK(same_pairs(plan, plan));
    CHECK(same_pairs(plan, edges(csr.keys)));
    CHECK(same_pairs(Dense{}.plan(3, 0), PlanBuilder(3, 0).build()));
    CHECK_FALSE(same_pairs(plan, Dense{}.plan(n, n)));
    // As many pairs, one of them another.
    auto moved = csr.keys;
    for (std::size_t row = 0; row < static_cast<std::size_t>(n); ++row)
        if (const auto last = static_cast<std::size_t>(csr.offsets[row + 1]) - 1; moved[last] + 1 < n) {
            ++moved[last];
            break;
        }
    REQUIRE(moved != csr.keys);
    CHECK_FALSE(same_pairs(plan, edges(moved)));
    CHECK_THROWS_AS(same_pairs(plan, Dense{}.plan(n, n + 1)), invalid_input);
}

TEST_CASE("unions keep tiles: Diffuser's pattern is three tiles and edges") {
    const Plan plan = LocalGlobalRandom{}.plan(2048, 2048);
    CHECK(plan.tiles().size() == 3);
    CHECK(plan.edges().count() <= 2048 * 96);
    CHECK(intersect(plan, Causal{}.plan(2048, 2048)).tiles().size() == 3);
    // Any order of the parts gives the same pairs, and only the random ones are edges.
    const Plan other = Union{SlidingWindow{}, RandomTokens{}, GlobalTokens{}}.plan(2048, 2048);
    CHECK(mask_of(other) == mask_of(plan));
    CHECK(other.edges().count() == plan.edges().count());
}

TEST_CASE("building costs O(pairs): two hundred thousand tokens") {
    const index_t n = 200'000;
    const Plan plan = LocalGlobalRandom{.window = 128, .globals = 16, .randoms = 16}.plan(n, n);
    CHECK(plan.count() > offset_t{n} * (129 + 32 + 15));
    CHECK(plan.count() < offset_t{n} * (129 + 32 + 16) + 1);
    CHECK(plan.edges().count() <= offset_t{n} * 16);
}

TEST_CASE("edge counts of overlapping blocks, strided and fixed patterns") {
    for (const auto& [n, w, edges] : {std::tuple{64, 64, 4096}, {128, 64, 10240}, {256, 64, 22528}, {1024, 64, 96256}, {4096, 64, 391168}})
        CHECK(OverlappingBlocks{w}.plan(n, n).count() == edges);
    CHECK(Strided{4}.plan(16, 16).count() == 82);
    CHECK(Fixed{4, 1}.plan(16, 16).count() == 64);
}

TEST_CASE("density of Diffuser's table 1") {
    const index_t full = 4096;
    POLYATTN_RANDOM(random);
    const std::uint64_t seed = random.seed();
    const Plan global = GlobalTokens{.count = 96, .seed = seed}.plan(full, full), cells = ErdosRenyi{.per_token = 96, .seed = seed}.plan(full, full);
    const struct { index_t n; double local, random, global, global_deviation; } rows[] = {{1024, 17.969, 1.92, 3.7, .6}, {2048, 9.180, 2.13, 4.1, .4}, {4096, 4.639, 2.24, 4.3, .1}};
    for (const auto& row : rows) {
        const Plan local = OverlappingBlocks{128}.plan(row.n, row.n);
        const Plan local_random = unite(local, prefix(cells, row.n, row.n)), all = unite(local_random, prefix(global, row.n, row.n));
        CHECK(std::abs(100 * local.density() - row.local) <= 5e-4);  // printed to three decimals
        // Cells of an n x n corner: hypergeometric, standard deviation below sqrt(count) of about 2 % of n^2.
        CHECK(std::abs(100 * (local_random.density() - local.density()) - row.random) < .01 + 6 * 100 * std::sqrt(.0235) / row.n);
        // Of the global tokens those of the corner survive, and add what local and random tokens have not seen, whose share hardly differs between rows.
        const auto added = [&](const Plan& globals) { return 100 * prefix(globals, row.n, row.n).density() * (1 - local_random.density()); };
        CHECK(std::abs(100 * (all.density() - local_random.density()) - added(global)) < .1);
        double mean = 0;
        const int draws = 30;
        for (int draw = 0; draw < draws; ++draw) mean += added(GlobalTokens{.count = 96, .seed = random.seed()}.plan(full, full)) / draws;
        CHECK(std::abs(mean - row.global) < .05 + 6 * row.global_deviation / std::sqrt(draws));  // printed to one decimal
        CHECK(all.is_disjoint());
    }
    // A fresh draw at each length instead: 1 - (1 - local)(1 - random)(1 - global) to the parts' overlap, which varies by tenths.
    for (const auto& [n, percent] : {std::pair{1024, 38.9}, {2048, 21.4}, {4096, 11.2}})
        CHECK(std::abs(100 * Union{OverlappingBlocks{128}, GlobalTokens{.count = 96, .seed = seed}, RandomTokens{.count = 96, .seed = seed}}.plan(n, n).density() - percent) < .6);
    for (const auto& [n, percent] : {std::pair{1024, 62.5}, {2048, 34.375}, {4096, 17.969}}) CHECK(std::abs(100 * OverlappingBlocks{512}.plan(n, n).density() - percent) <= 5e-4);
}

TEST_CASE("plans are values: shared by threads, lowered once") {
    const Plan plan = LocalGlobalRandom{.window = 16, .globals = 4, .randoms = 4}.plan(500, 500);
    std::vector<const TransposedEdges*> seen(4);
    std::vector<std::thread> threads;
    for (auto& slot : seen) threads.emplace_back([&slot, copy = plan] { slot = &copy.lowered<TransposedEdges>(); });
    for (auto& thread : threads) thread.join();
    for (const auto* lowered : seen) CHECK(lowered == seen[0]);
}

TEST_CASE("pictures: size, and dark where the pattern is dense") {
    const Picture small = picture(SlidingWindow{.window = 2}.plan(8, 8));
    CHECK((small.width == 8 && small.height == 8));
    CHECK(small.pixels[0] == 0);
    CHECK(small.pixels[7] == 255);
    const Picture large = picture(Dense{}.plan(1000, 700), 100);
    CHECK((large.width == 100 && large.height == 100));
    for (const auto pixel : large.pixels) CHECK(pixel == 0);
    CHECK(picture(Dense{}.plan(0, 0)).pixels.empty());
}
