// The samplers of SSA: numbers that follow from the definition, distributions with bounds from their own variance, and what any draw obeys.
#include "support/layers.hpp"
#include "support/random.hpp"

#include <polyattn/analysis/sampling.hpp>
#include <polyattn/polyattn.hpp>

#include <doctest/doctest.h>

#include <numbers>
#include <set>

using namespace polyattn;

namespace {

/// A share of `trials` independent events of probability p stays within this of p but for once in 10^9 tests (six deviations).
double allowance(double p, double trials) { return 6 * std::sqrt(std::max(0., p * (1 - p)) / trials) + 6 / trials; }

std::vector<index_t> keys_of(const Plan& plan, index_t query) {
    std::vector<index_t> keys;
    plan.for_each_key(query, [&](index_t j) { keys.push_back(j); });
    std::sort(keys.begin(), keys.end());
    return keys;
}

/// Attention with q = 0 over values v_j = j: the mean of the indices that a query sees.
template <class Sampler>
AlignedVector<double> means(const Sampler& sampler, index_t n) {
    Tensor<double> zero({n, 1}), v({n, 1});
    for (index_t j = 0; j < n; ++j) v.values[static_cast<std::size_t>(j)] = j;
    return Attention<Sampler>{sampler}(zero.view(), zero.view(), v.view()).values;
}

/// slot -> source of LocallyBiased, from as many windows as keys.
template <int L>
std::array<index_t, L> permutation(double sigma, std::uint64_t seed, std::uint32_t sample) {
    const Plan plan = LocallyBiased<L>{.sigma = sigma}.sample(L, L, {.seed = seed, .sample = sample}, false);
    std::array<index_t, L> order;
    for (index_t slot = 0; slot < L; ++slot) order[static_cast<std::size_t>(slot)] = keys_of(plan, slot).at(0);
    return order;
}

}  // namespace

TEST_CASE("indices handed in: means of the keys that remain") {
    const auto check = [](const Given& given, const std::vector<double>& wanted) {
        const auto out = means(given, 8);
        for (std::size_t i = 0; i < 8; ++i) CHECK(std::abs(out[i] - wanted[i % wanted.size()]) < 1e-14);
    };
    const index_t a[] = {3, 6, 1, 5, 2, 7, 0, 4}, b[] = {6, 7, 1, 2, 3, 0, 4, 5}, c[] = {1, 3, 0, 4, 2, 6, 7, 5}, d[] = {0, 1, 2, 6, 3, 5, 4, 7};
    check(Given::first_of(a, 4), {3.75});
    check(Given::first_of(b, 4), {4.});
    check(Given::windows_of(c, 4), {2, 2, 2, 2, 4, 4, 6, 6});
    check(Given::windows_of(d, 4), {.5, .5, 4, 4, 4, 4, 5.5, 5.5});
    check(Given{{{1, 2}, {}}}, {1.5, 1.5, 1.5, 1.5, 0, 0, 0, 0});  // a window without keys
    // Fewer queries than keys stand at the last positions.
    const Plan few = Given{{{0}, {1, 7}, {2}, {5}}}.sample(3, 8, {}, false);
    CHECK(keys_of(few, 0) == std::vector<index_t>{2});
    CHECK(keys_of(few, 1) == std::vector<index_t>{5});
    CHECK(keys_of(few, 2) == std::vector<index_t>{5});
    CHECK_THROWS_AS((Given{{{0}, {1}}}.sample(9, 8, {}, false)), invalid_input);
    CHECK(Given{{{0, 4}}}.sample(9, 8, {}, false).count() == 18);  // one list is for all queries
}

TEST_CASE("normal deviates: quantiles, symmetry, moments") {
    double worst = 0;
    for (std::uint64_t step = 0; step < 1000000; ++step) {
        const auto word = static_cast<std::uint32_t>(step < 4000 ? step : step * 4294 % 2147483648u);
        const double z = normal_deviate(word) / 16777216., p = (word + .5) / 4294967296.;
        worst = std::max(worst, std::abs(std::erfc(-z / std::numbers::sqrt2) / 2 - p) * std::sqrt(2 * std::numbers::pi) * std::exp(z * z / 2));
        if (normal_deviate(~word) != -normal_deviate(word)) FAIL("not symmetric at ", word);
    }
    CHECK(worst < 2e-6);
    POLYATTN_RANDOM(random);
    const int count = 1 << 18;
    RandomRow row(random.seed(), 0, 99);
    double sum[5] = {};
    for (int i = 0; i < count; ++i) {
        const double z = normal_deviate(row.next()) / 16777216.;
        for (int k = 1; k < 5; ++k) sum[k] += std::pow(z, k) / count;
    }
    // Variances of z^k: 1, 2, 15, 96.
    CHECK(std::abs(sum[1]) < 6 * std::sqrt(1. / count));
    CHECK(std::abs(sum[2] - 1) < 6 * std::sqrt(2. / count));
    CHECK(std::abs(sum[3]) < 6 * std::sqrt(15. / count));
    CHECK(std::abs(sum[4] - 3) < 6 * std::sqrt(96. / count));
}

TEST_CASE("sigma in tokens: swaps, inversions, displacements") {
    POLYATTN_RANDOM(random);
    const std::uint64_t seed = random.seed();
    const int draws = 20000;
    for (const auto& [sigma, wanted] : {std::pair{1., .239750}, std::pair{.5, .078650}}) {
        int swaps = 0;
        for (int s = 0; s < draws; ++s) swaps += permutation<2>(sigma / 2, seed, static_cast<std::uint32_t>(s))[0] == 1;
        CHECK(std::abs(wanted - std::erfc(1 / (sigma * std::numbers::sqrt2) / std::numbers::sqrt2) / 2) < 5e-7);
        CHECK(std::abs(double(swaps) / draws - wanted) < allowance(wanted, draws));
    }
    for (const auto& [sigma, wanted] : {std::pair{.5, .56464}, std::pair{1., 2.24487}, std::pair{2., 5.16428}, std::pair{4., 8.59057}, std::pair{double(infinite_sigma), 14.}}) {
        double sum = 0, squares = 0, exact = 0;
        for (int i = 0; i < 8; ++i)
            for (int j = i + 1; j < 8; ++j) exact += sigma == infinite_sigma ? .5 : std::erfc((j - i) / (sigma * std::numbers::sqrt2) / std::numbers::sqrt2) / 2;
        CHECK(std::abs(exact - wanted) < 5e-6);
        for (int s = 0; s < draws; ++s) {
            const auto order = permutation<8>(sigma / 8, seed, static_cast<std::uint32_t>(s));
            int inversions = 0;
            for (std::size_t i = 0; i < 8; ++i)
                for (std::size_t j = i + 1; j < 8; ++j) inversions += order[i] > order[j];
            sum += inversions;
            squares += inversions * inversions;
        }
        const double mean = sum / draws, variance = squares / draws - mean * mean;
        CHECK(std::abs(mean - wanted) < 6 * std::sqrt(variance / draws));
    }
    // Mean |displacement| / n, and squared displacement away from the ends.
    for (const auto& [f, wanted] : {std::pair{.01, .00762}, std::pair{.05, .03792}, std::pair{.1, .07233}, std::pair{.25, .15352}, std::pair{.5, .22654}, std::pair{1., .27762}}) {
        double sum = 0, squares = 0;
        const int networks = 400;
        for (int s = 0; s < networks; ++s) {
            const auto order = permutation<256>(f, seed, static_cast<std::uint32_t>(s));
            double displacement = 0;
            for (index_t slot = 0; slot < 256; ++slot) displacement += std::abs(slot - order[static_cast<std::size_t>(slot)]) / 256. / 256.;
            sum += displacement;
            squares += displacement * displacement;
        }
        const double mean = sum / networks, deviation = std::sqrt((squares / networks - mean * mean) / networks);
        CHECK(std::abs(mean - wanted) < 6 * deviation + 5e-6);
    }
    for (const double sigma : {1., 4.}) {
        double sum = 0, squares = 0;
        const int networks = 400;
        for (int s = 0; s < networks; ++s) {
            const auto order = permutation<256>(sigma / 256, seed, static_cast<std::uint32_t>(s));
            double displacement = 0;
            for (index_t slot = 64; slot < 192; ++slot) displacement += std::pow(slot - order[static_cast<std::size_t>(slot)], 2) / 128.;
            sum += displacement;
            squares += displacement * displacement;
        }
        const double mean = sum / networks, deviation = std::sqrt((squares / networks - mean * mean) / networks);
        CHECK(std::abs(mean - (sigma * sigma - 1. / 12)) < 6 * deviation + .01);  // the formula holds to a hundredth at sigma = 1
    }
}

TEST_CASE("probabilities of the sources of a window, computed and drawn") {
    POLYATTN_RANDOM(random);
    const std::uint64_t seed = random.seed();
    const double first[] = {.94452, .74187, .25238, .05385, .00687, .00049, .00002, 0}, second[] = {.05499, .25117, .69297, .69014, .24914, .05416, .00694, .00049};
    const double causal_first[] = {1, 1}, causal_second[] = {.05468, .25448, .74552, .94532}, causal_third[] = {.00049, .00687, .05385, .25238, .74188, .94452};
    const ShareMatrix p = sampling_probability(8, 4, 1. / 8), causal = sampling_probability(8, 4, 1. / 8, true);
    for (index_t j = 0; j < 8; ++j) {
        CHECK(std::abs(p(0, j) - first[j]) < 6e-6);
        CHECK(std::abs(p(1, j) - second[j]) < 6e-6);
        CHECK(std::abs(p(3, 7 - j) - first[j]) < 6e-6);
        CHECK(std::abs(p(2, 7 - j) - second[j]) < 6e-6);
        CHECK(std::abs(p(0, j) + p(1, j) + p(2, j) + p(3, j) - 1) < 1e-9);
        if (j < 2) CHECK(std::abs(causal(0, j) - causal_first[j]) < 1e-9);
        if (j < 4) CHECK(std::abs(causal(1, j) - causal_second[j]) < 6e-6);
        if (j < 6) CHECK(std::abs(causal(2, j) - causal_third[j]) < 6e-6);
        if (j >= 6) CHECK(causal(2, j) == 0);
    }
    const int draws = 20000;
    for (const double sigma : {0., .02, .125, .5, double(infinite_sigma)}) {
        const ShareMatrix expected = sampling_probability(10, 4, sigma), counted = sampling_frequency(LocallyBiased<4>{.sigma = sigma}, 10, 10, false, draws, seed);
        const ShareMatrix causal_expected = sampling_probability(10, 4, sigma, true), causal_counted = sampling_frequency(LocallyBiased<4>{.sigma = sigma}, 10, 10, true, draws, seed);
        for (index_t b = 0; b < 4; ++b) {
            const Bounds window = detail::window_of(10, 4, b);
            double sum = 0;
            for (index_t j = 0; j < 10; ++j) {
                sum += expected(b, j);
                for (index_t i = window.begin; i < window.end; ++i) {
                    CHECK(std::abs(counted(i, j) - expected(b, j)) < allowance(expected(b, j), draws));
                    CHECK(std::abs(causal_counted(i, j) - (j <= i ? causal_expected(b, j) : 0)) < allowance(causal_expected(b, j), draws));
                }
            }
            CHECK(std::abs(sum - window.size()) < 1e-8);
        }
    }
    // Each rank is one key's: over all keys the shares of a window are as many as its sources. Far more keys than a coarse integration follows.
    const index_t keys = 150 + random.below(20);
    const ShareMatrix many = sampling_probability(keys, 5, .5);
    for (index_t b = 0; b < 5; ++b) {
        double sum = 0;
        for (index_t j = 0; j < keys; ++j) sum += many(b, j);
        CHECK(std::abs(sum - detail::window_of(keys, 5, b).size()) < 1e-9 * keys);
    }
}

TEST_CASE("reachable keys after one to six layers") {
    POLYATTN_RANDOM(random);
    const auto check = [&](double sigma, bool causal, const std::vector<double>& wanted) {
        const int rounds = 30, networks = 10;
        std::vector<double> sum(wanted.size(), 0), squares(wanted.size(), 0);
        for (int round = 0; round < rounds; ++round) {
            const auto share = reachable_share(LocallyBiased<4>{.sigma = sigma}, 64, static_cast<int>(wanted.size()), causal, networks, random.seed());
            for (std::size_t k = 0; k < wanted.size(); ++k) {
                sum[k] += share[k] / rounds;
                squares[k] += share[k] * share[k] / rounds;
            }
        }
        for (std::size_t k = 0; k < wanted.size(); ++k) {
            INFO("sigma ", sigma, ", causal ", causal, ", ", k + 1, " layers: ", sum[k], " wanted ", wanted[k]);
            // Wanted numbers are given to three digits.
            CHECK(std::abs(sum[k] - wanted[k]) < 8 * std::sqrt(std::max(0., squares[k] - sum[k] * sum[k]) / rounds) + 1e-3);
        }
    };
    check(0, false, {.25, .25, .25, .25, .25, .25});
    check(.05, false, {.252, .582, .813, .949, .989, .998});
    check(.1, false, {.254, .627, .876, .997, 1, 1});
    check(infinite_sigma, false, {.262, .997, 1, 1, 1, 1});
    check(.1, true, {.278, .604, .845, .974, .991, .996});
}

TEST_CASE("what every draw obeys: distinct sources, equal counts, causal rows with keys") {
    POLYATTN_RANDOM(random);
    for (const index_t n : {8, 13, 64, 97, 101})
        for (const double sigma : {0., .003, .1, 1., double(infinite_sigma)}) {
            const LocallyBiased<8> sampler{.sigma = sigma};
            const Draw draw{.seed = random.seed(), .step = 3, .layer = 2};
            INFO("n = ", n, ", sigma = ", sigma);
            const Plan plan = sampler.sample(n, n, draw, false), causal = sampler.sample(n, n, draw, true);
            CHECK(plan.is_disjoint());
            CHECK(causal.is_disjoint());
            std::multiset<index_t> used;
            for (index_t b = 0; b < 8; ++b) {
                const Bounds window = detail::window_of(n, 8, b);
                const auto sources = keys_of(plan, window.begin);
                CHECK(static_cast<index_t>(sources.size()) == window.size());
                used.insert(sources.begin(), sources.end());
                for (index_t i = window.begin; i < window.end; ++i) {
                    CHECK(keys_of(plan, i) == sources);
                    const auto seen = keys_of(causal, i);
                    CHECK(static_cast<index_t>(seen.size()) >= i - window.begin + 1);
                    CHECK(static_cast<index_t>(seen.size()) <= window.size());
                    CHECK(seen.back() <= i);
                    if (sigma == 0) CHECK(static_cast<index_t>(seen.size()) == i - window.begin + 1);
                }
            }
            CHECK(static_cast<index_t>(used.size()) == n);
            CHECK(static_cast<index_t>(std::set<index_t>(used.begin(), used.end()).size()) == n);
            if (sigma == 0) CHECK(keys_of(plan, 0).back() == detail::window_of(n, 8, 0).end - 1);
        }
    // Valid causal pairs of 64 tokens in 4 windows.
    CHECK(LocallyBiased<4>{.sigma = 0.}.sample(64, 64, {}, true).count() == 544);
    CHECK(Causal{}.plan(64, 64).count() == 2080);
    double sum = 0, squares = 0;
    const int draws = 2000;
    for (int s = 0; s < draws; ++s) {
        const double count = double(LocallyBiased<4>{.sigma = infinite_sigma}.sample(64, 64, {.seed = random.seed()}, true).count());
        sum += count / draws;
        squares += count * count / draws;
    }
    CHECK(std::abs(sum - 774) < 6 * std::sqrt((squares - sum * sum) / draws));
    // Shares of the dense causal pairs as the text grows.
    const auto share = [&]<index_t L>(std::integral_constant<index_t, L>, double wanted) {
        const index_t n = 1024, repeats = 8;
        double mean = 0, variance = 0;
        std::vector<double> shares;
        for (int s = 0; s < repeats; ++s) shares.push_back(double(LocallyBiased<L>{.sigma = infinite_sigma}.sample(n, n, {.seed = random.seed()}, true).count()) / double(Causal{}.plan(n, n).count()));
        for (const double value : shares) mean += value / repeats;
        for (const double value : shares) variance += (value - mean) * (value - mean) / (repeats - 1);
        // The wanted numbers have three digits, and n is not infinite.
        CHECK(std::abs(mean - wanted) < 6e-4 + 2. / n + 10 * std::sqrt(variance / repeats));
    };
    share(std::integral_constant<index_t, 2>{}, .625);
    share(std::integral_constant<index_t, 4>{}, .370);
    share(std::integral_constant<index_t, 8>{}, .208);
    // Fewer queries than keys: the last ones, as everywhere.
    const Plan whole = LocallyBiased<3>{}.sample(20, 20, {.seed = 5}, true), tail = LocallyBiased<3>{}.sample(4, 20, {.seed = 5}, true);
    for (index_t i = 0; i < 4; ++i) CHECK(keys_of(tail, i) == keys_of(whole, 16 + i));
    CHECK(LocallyBiased<3>{}.sample(0, 0, {}, true).count() == 0);
}

TEST_CASE("draws hang on seed, step, layer and sample, and on nothing else") {
    POLYATTN_RANDOM(random);
    const Draw draw{.seed = random.seed(), .step = 7, .layer = 1, .sample = 2};
    const auto keys = [](const auto& sampler, const Draw& d) { return sampler.sample(96, 96, d, false).to_csr().keys; };
    const auto check = [&](const auto& sampler) {
        const auto own = keys(sampler, draw);
        CHECK(own == keys(sampler, draw));
        for (const int member : {0, 1, 2, 3, 4}) {
            Draw other = draw;
            if (member == 0) ++other.seed;
            if (member == 1) ++other.step;
            if (member == 2) ++other.layer;
            if (member == 3) ++other.sample;
            if (member == 4) ++other.worker;
            CHECK(own != keys(sampler, other));
        }
    };
    check(Unbiased{.drop = .5});
    check(LocallyBiased<4>{.sigma = .2});
    check(LocallyBiased<4>{.sigma = infinite_sigma});
    check(Grid2D{.height = 8, .width = 12, .row_windows = 4});
    check(Grid2D{.height = 8, .width = 12, .window = 4, .shift = 2, .sigma = .75});
    // A fixed draw, for ever: the same on every machine, compiler and backend.
    const Plan plan = LocallyBiased<3>{.sigma = .25}.sample(12, 12, {.seed = 1, .step = 2, .layer = 3, .sample = 4}, false);
    CHECK(keys_of(plan, 0) == std::vector<index_t>{0, 2, 3, 4});
    CHECK(keys_of(plan, 4) == std::vector<index_t>{1, 5, 6, 7});
}

TEST_CASE("unbiased: counts, shares, a draw for each item of a ragged batch") {
    POLYATTN_RANDOM(random);
    for (const index_t n : {1, 2, 7, 40})
        for (const double drop : {0., .25, .5, .9, 1.}) {
            const Plan plan = Unbiased{.drop = drop}.sample(5, n, {.seed = random.seed()}, false);
            const auto kept = std::max(index_t{1}, static_cast<index_t>(std::lround((1 - drop) * n)));
            CHECK(plan.count() == offset_t{5} * kept);
            CHECK(keys_of(plan, 0) == keys_of(plan, 4));
        }
    const ShareMatrix share = sampling_frequency(Unbiased{.drop = .75}, 1, 16, false, 20000, random.seed());
    for (index_t j = 0; j < 16; ++j) CHECK(std::abs(share(0, j) - .25) < allowance(.25, 20000));

    // Items of 9, 1, 0 and 4 tokens: each sees max(1, half) of its own keys; the mean of the indices tells which.
    const Unbiased sampler{.drop = .5, .per_item = true};
    const Attention<Unbiased, Reference> exact{sampler};
    const Attention<Unbiased> fast{sampler};
    const auto q = random.tensor<double>({4, 2, 9, 3}), k = random.tensor<double>({4, 2, 9, 3}), v = random.tensor<double>({4, 2, 9, 2}), d_out = random.tensor<double>({4, 2, 9, 2});
    CallOptions options{.key_lengths = {9, 1, 0, 4}, .draw = {.seed = random.seed()}};
    const auto saved = fast.forward(q.view(), k.view(), v.view(), options).saved;
    CHECK(keys_of(saved.plan(0), 0).size() == 5);  // 4.5 rounds up
    CHECK(keys_of(saved.plan(1), 0) == std::vector<index_t>{0});
    CHECK(saved.plan(2).count() == 0);
    CHECK(keys_of(saved.plan(3), 8).size() == 2);
    CHECK(keys_of(saved.plan(3), 8).back() < 4);
    const auto gradient = fast.backward(saved, d_out.view());
    const auto [exact_out, exact_saved] = exact.forward(q.view(), k.view(), v.view(), options);
    const auto exact_gradient = exact.backward(exact_saved, d_out.view());
    const auto out = fast(q.view(), k.view(), v.view(), options);
    for (std::size_t i = 0; i < out.values.size(); ++i) CHECK(std::abs(out.values[i] - exact_out.values[i]) < 1e-12);
    for (std::size_t i = 0; i < gradient.k.values.size(); ++i) CHECK(std::abs(gradient.k.values[i] - exact_gradient.k.values[i]) < 1e-12);
    // Drawn once, handed in again.
    const CallOptions planned = fast.planned(q.view(), k.view(), v.view(), options);
    REQUIRE(planned.item_plans.size() == 4);
    CHECK(fast(q.view(), k.view(), v.view(), planned).values == out.values);
    CHECK(Attention<>{}(q.view(), k.view(), v.view(), planned).values == out.values);
    auto wrong = planned;
    wrong.item_plans.pop_back();
    CHECK_THROWS_AS(fast(q.view(), k.view(), v.view(), wrong), invalid_input);
    wrong = planned;
    wrong.plan = Dense{}.plan(9, 9);
    CHECK_THROWS_AS(fast(q.view(), k.view(), v.view(), wrong), invalid_input);
    wrong = planned;
    wrong.item_plans[2] = Dense{}.plan(9, 8);
    CHECK_THROWS_AS(fast(q.view(), k.view(), v.view(), wrong), invalid_input);
}

TEST_CASE("pictures: windows of rows, sub-windows inside shifted windows") {
    POLYATTN_RANDOM(random);
    const index_t height = 6, width = 5, n = height * width;
    const Draw draw{.seed = random.seed(), .layer = 1};
    for (const double sigma : {0., .25, double(infinite_sigma)}) {
        const Grid2D rows{.height = height, .width = width, .row_windows = 3, .sigma = sigma};
        const Plan plan = rows.sample(n, n, draw, false), causal = rows.sample(n, n, draw, true);
        std::set<index_t> used;
        for (index_t b = 0; b < 3; ++b) {
            const auto sources = keys_of(plan, b * 2 * width);
            CHECK(sources.size() == 2u * width);
            used.insert(sources.begin(), sources.end());
            for (index_t i = b * 2 * width; i < (b + 1) * 2 * width; ++i) {
                CHECK(keys_of(plan, i) == sources);
                const auto seen = keys_of(causal, i);
                CHECK(static_cast<index_t>(seen.size()) >= i - b * 2 * width + 1);
                CHECK(seen.back() <= i);
            }
            if (sigma == 0) CHECK((sources.front() == b * 2 * width && sources.back() == (b + 1) * 2 * width - 1));
        }
        CHECK(static_cast<index_t>(used.size()) == n);
        // Columns shuffle within rows, rows within columns: the first window of whole rows holds two tokens of every column slot, so
        // each row of the picture gives as many as it gives away.
        const Grid2D parts{.height = height, .width = width, .window = 4, .shift = 2, .sigma = sigma};
        const Plan inside = parts.sample(n, n, draw, false), swin = ShiftedWindows2D{.height = height, .width = width, .window = 4, .shift = 2}.plan(n, n);
        CHECK(inside.is_disjoint());
        CHECK(intersect(inside, swin).count() == inside.count());
        std::vector<int> times(static_cast<std::size_t>(n), 0);
        for (index_t i = 0; i < n; ++i) {
            const auto sources = keys_of(inside, i);
            CHECK(!sources.empty());
            for (const index_t j : sources) ++times[static_cast<std::size_t>(j)];
            if (sigma == 0) CHECK(std::binary_search(sources.begin(), sources.end(), i));
        }
        // Every source serves one sub-window: as many targets as that has tokens, and it has as many sources.
        offset_t pairs = 0;
        for (const index_t y : {0, 2, 4})
            for (const index_t x : {0, 2, 4}) {
                const offset_t tokens = std::min(index_t{2}, height - y) * std::min(index_t{2}, width - x);
                pairs += tokens * tokens;
            }
        CHECK(inside.count() == pairs);
        for (const int count : times) CHECK((count == 4 || count == 2));
    }
    // Both shuffles do move tokens, and only along their lines where the other has nothing to move.
    const Plan line = Grid2D{.height = 1, .width = 64, .row_windows = 1, .sigma = .25}.sample(64, 64, draw, false);
    CHECK(line.count() == 64 * 64);
    const Plan column = Grid2D{.height = 64, .width = 1, .row_windows = 8, .sigma = .25}.sample(64, 64, draw, false);
    CHECK(keys_of(column, 0) != keys_of(Grid2D{.height = 64, .width = 1, .row_windows = 8, .sigma = 0.}.sample(64, 64, draw, false), 0));
}

TEST_CASE("samplers compose: patterns, biases, diffusion, grouped queries, padding; fast against reference") {
    POLYATTN_RANDOM(random);
    const index_t n = 45;
    const auto q = random.tensor<double>({2, 4, n, 8}), k = random.tensor<double>({2, 2, n, 8}), v = random.tensor<double>({2, 2, n, 6}), d_out = random.tensor<double>({2, 4, n, 6});
    const CallOptions options{.key_lengths = {n, 31}, .draw = {.seed = random.seed(), .step = 4}};
    const auto check = [&](const auto& sampler, const auto& pattern, bool causal) {
        const Plan sampled = sampler.sample(n, n, options.draw, causal);
        const Attention sampled_layer{sampler, pattern, PPR<2>{}, Alibi(4)};
        const Attention<AnyDiffusion, Alibi, Reference> exact{AnyDiffusion{PPR<2>{}.recursion()}, Alibi(4)};
        auto planned = options;
        planned.plan = intersect(pattern.plan(n, n), sampled);
        const auto [out, saved] = sampled_layer.forward(q.view(), k.view(), v.view(), options);
        const auto [exact_out, exact_saved] = exact.forward(q.view(), k.view(), v.view(), planned);
        const auto gradient = sampled_layer.backward(saved, d_out.view()), exact_gradient = exact.backward(exact_saved, d_out.view());
        CHECK(saved.plan().count() == planned.plan->count());
        for (std::size_t i = 0; i < out.values.size(); ++i) CHECK(std::abs(out.values[i] - exact_out.values[i]) < 1e-11);
        for (std::size_t i = 0; i < gradient.q.values.size(); ++i) CHECK(std::abs(gradient.q.values[i] - exact_gradient.q.values[i]) < 1e-10);
        for (std::size_t i = 0; i < gradient.k.values.size(); ++i) CHECK(std::abs(gradient.k.values[i] - exact_gradient.k.values[i]) < 1e-10);
        for (std::size_t i = 0; i < gradient.v.values.size(); ++i) CHECK(std::abs(gradient.v.values[i] - exact_gradient.v.values[i]) < 1e-10);
    };
    check(LocallyBiased<4>{.sigma = .1}, Causal{}, true);
    check(LocallyBiased<4>{.sigma = infinite_sigma}, Dense{}, false);
    check(LocallyBiased<3>{.sigma = .2}, CausalSlidingWindow{.window = 9}, true);
    check(LocallyBiased<2>{.sigma = .2}, LocalGlobalRandom{.window = 8, .globals = 3, .randoms = 5, .seed = random.seed()}, false);
    check(Unbiased{.drop = .6}, SlidingWindow{.window = 20}, false);
    check(Grid2D{.height = 9, .width = 5, .row_windows = 3}, Causal{}, true);
    check(Grid2D{.height = 9, .width = 5, .window = 4, .shift = 1, .sigma = .75}, ShiftedWindows2D{.height = 9, .width = 5, .window = 4, .shift = 1}, false);
    // Relative biases come from original indices: -m (i - j) and m j differ by a number a row.
    const Attention<Causal, LocallyBiased<4>, Alibi> by_distance{Alibi(4), LocallyBiased<4>{.sigma = .2}};
    const auto slope = Alibi(4);
    const Attention by_key{Causal{}, LocallyBiased<4>{.sigma = .2}, FunctionBias{[&](index_t, index_t head, index_t, index_t key) { return slope.slope(head) * key; }}};
    const auto a = by_distance(q.view(), k.view(), v.view(), options), b = by_key(q.view(), k.view(), v.view(), options);
    for (std::size_t i = 0; i < a.values.size(); ++i) CHECK(std::abs(a.values[i] - b.values[i]) < 1e-12);
    // One window, or all keys kept, is dense attention; no noise is attention within blocks.
    const auto same = [&](const auto& layer, const auto& other) {
        const auto x = layer(q.view(), k.view(), v.view(), options), y = other(q.view(), k.view(), v.view(), options);
        CHECK(x.values == y.values);
    };
    same(Attention{LocallyBiased<1>{.sigma = .7}}, Attention<>{});
    same(Attention{Unbiased{.drop = 0}}, Attention<>{});
    same(Attention{LocallyBiased<1>{.sigma = infinite_sigma}, Causal{}}, Attention<Causal>{});
    same(Attention{AllSources{}, Causal{}}, Attention<Causal>{});
    const Plan still = LocallyBiased<5>{.sigma = 0.}.sample(n, n, options.draw, false), blocks = BlockLocal{.block = 9}.plan(n, n);
    for (index_t row = 0; row < n; ++row) CHECK(keys_of(still, row) == keys_of(blocks, row));
    // The same pairs as other tiles: sums may be cut elsewhere.
    const auto in_windows = Attention{LocallyBiased<5>{.sigma = 0.}}(q.view(), k.view(), v.view(), options), in_blocks = Attention{BlockLocal{.block = 9}}(q.view(), k.view(), v.view(), options);
    for (std::size_t i = 0; i < in_windows.values.size(); ++i) CHECK(std::abs(in_windows.values[i] - in_blocks.values[i]) < 1e-12);
}

TEST_CASE("causal samplers leak nothing: earlier outputs keep every bit when later tokens change") {
    POLYATTN_RANDOM(random);
    const index_t n = 48;
    const auto q = random.tensor<float>({2, n, 16}), k = random.tensor<float>({2, n, 16}), v = random.tensor<float>({2, n, 16});
    const CallOptions options{.draw = {.seed = random.seed()}};
    const auto check = [&](const auto& layer) {
        const auto [out, saved] = layer.forward(q.view(), k.view(), v.view(), options);
        bool any = false;
        for (const index_t changed : {1, 11, 12, 30, n - 1}) {
            auto q2 = q, k2 = k, v2 = v;
            for (index_t h = 0; h < 2; ++h)
                for (index_t c = 0; c < 16; ++c) {
                    const auto at = static_cast<std::size_t>((h * n + changed) * 16 + c);
                    q2.values[at] += 3;
                    k2.values[at] -= 5;
                    v2.values[at] = 100;
                }
            const auto other = layer(q2.view(), k2.view(), v2.view(), options);
            bool earlier = true, later = false;
            for (index_t h = 0; h < 2; ++h)
                for (index_t i = 0; i < n; ++i) {
                    const auto first = static_cast<std::size_t>((h * n + i) * 16);
                    const bool equal = std::equal(out.values.begin() + static_cast<std::ptrdiff_t>(first), out.values.begin() + static_cast<std::ptrdiff_t>(first) + 16, other.values.begin() + static_cast<std::ptrdiff_t>(first));
                    if (i < changed) earlier &= equal;
                    if (i >= changed) later |= !equal;
                }
            CHECK(earlier);
            // One may fall on a key that nobody drew, in a row that sees a single other key.
            bool visible = keys_of(saved.plan(), changed).size() > 1;
            for (index_t i = changed; i < n && !visible; ++i)
                for (const index_t key : keys_of(saved.plan(), i)) visible |= key == changed;
            if (visible) CHECK(later);
            any |= visible;
        }
        CHECK(any);
    };
    check(Attention{Causal{}, LocallyBiased<4>{.sigma = .2}});
    check(Attention{Causal{}, LocallyBiased<4>{.sigma = infinite_sigma}, Alibi(2), PPR<3>{}});
    check(Attention{CausalSlidingWindow{.window = 20}, LocallyBiased<3>{.sigma = .3}, PPR<2>{}});
    check(Attention{Causal{}, Grid2D{.height = 8, .width = 6, .row_windows = 4}});
    check(Attention{Intersection{Causal{}, LocalGlobalRandom{.window = 8, .globals = 3, .randoms = 4}}, PPR<5>{}});
    check(Attention{Causal{}, Given::windows_of(permutation<48>(infinite_sigma, random.seed(), 0), 1)});
}

TEST_CASE("an ensemble is not dense attention") {
    Tensor<double> q({1, 1}), k({4, 1}), v({4, 1});
    q.values = {1};
    for (std::size_t j = 0; j < 4; ++j) {
        k.values[j] = std::log(double(j) + 1);
        v.values[j] = 10. * (double(j) + 1);
    }
    const double wanted[] = {25, 28.452381, 29.513889, 30};
    for (int kept = 1; kept <= 4; ++kept) {
        double sum = 0;
        int subsets = 0;
        for (unsigned set = 0; set < 16; ++set) {
            if (std::popcount(set) != kept) continue;
            Given given{{{}}};
            for (index_t j = 0; j < 4; ++j)
                if (set >> j & 1) given.sources[0].push_back(j);
            sum += Attention<Given>{given}(q.view(), k.view(), v.view()).values[0];
            ++subsets;
        }
        CHECK(std::abs(sum / subsets - wanted[kept - 1]) < 5e-7);
    }
    double sum = 0, squares = 0;
    for (unsigned set = 0; set < 256; ++set) {
        if (std::popcount(set) != 4) continue;
        Given given{{{}}};
        for (index_t j = 0; j < 8; ++j)
            if (set >> j & 1) given.sources[0].push_back(j);
        const double mean = means(given, 8)[0];
        sum += mean / 70;
        squares += mean * mean / 70;
    }
    CHECK(std::abs(sum - 3.5) < 1e-12);
    CHECK(std::abs(squares - sum * sum - .75) < 1e-12);
}

TEST_CASE("compute relative to dense training") {
    CHECK(std::abs(relative_compute(16, 16, 2, 3072, 1024) - .833) < 5e-4);
    CHECK(std::abs(relative_compute(16, 16, 4, 3072, 1024) - .750) < 1e-12);
    CHECK(std::abs(relative_compute(16, 12, 4, 3072, 1024) - .8125) < 1e-12);
    CHECK(std::abs(relative_compute(16, 16, 6, 3072, 1024) - .722) < 5e-4);
    CHECK(std::abs(relative_compute(16, 16, 8, 3072, 1024) - .708) < 5e-4);
    CHECK(std::abs(relative_compute(12, 12, 2, 4096, 1024) - .800) < 1e-12);
    CHECK(std::abs(relative_compute(12, 12, 4, 4096, 1024) - .700) < 1e-12);
    CHECK(std::abs(relative_compute(12, 9, 4, 4096, 1024) - .775) < 1e-12);
    CHECK(std::abs(relative_compute(16, 16, 4, 3072, 1024, .1) - (.9 * .75 + .1)) < 1e-12);
}

TEST_CASE("sigma over depth, and what samplers refuse") {
    CHECK(OverDepth(.3).at(100) == .3);
    const OverDepth growing = linear(.1, .4, 4);
    CHECK(std::abs(growing.at(0) - .1) < 1e-15);
    CHECK(std::abs(growing.at(1) - .2) < 1e-15);
    CHECK(std::abs(growing.at(3) - .4) < 1e-15);
    const auto refuses = [](const std::string& argument, auto&& f) {
        try {
            f();
            FAIL("accepted, though ", argument, " is wrong");
        } catch (const invalid_input& error) {
            CHECK(error.argument() == argument);
        }
    };
    const double nan = std::numeric_limits<double>::quiet_NaN();
    refuses("draw.layer", [&] { growing.at(4); });
    refuses("drop", [] { Attention{Unbiased{.drop = 1.5}}; });
    refuses("drop", [&] { Attention{Unbiased{.drop = nan}}; });
    refuses("sigma", [] { Attention{LocallyBiased<2>{.sigma = -.1}}; });
    refuses("sigma", [&] { Attention{LocallyBiased<2>{.sigma = nan}}; });
    refuses("sigma", [] { Attention{LocallyBiased<2>{.sigma = 17.}}; });
    refuses("sigma", [] { Attention{LocallyBiased<2>{.sigma = linear(0, infinite_sigma, 3)}}; });
    refuses("layers of sigma", [] { Attention{LocallyBiased<2>{.sigma = linear(0, 1, -1)}}; });
    refuses("L of LocallyBiased", [] { LocallyBiased<9>{}.sample(8, 8, {}, false); });
    refuses("LocallyBiased", [] { LocallyBiased<2>{}.sample(9, 8, {}, false); });
    refuses("row_windows and window", [] { Attention{Grid2D{}}; });
    refuses("row_windows and window", [] { Attention{Grid2D{.row_windows = 2, .window = 2}}; });
    refuses("row_windows", [] { Attention{Grid2D{.height = 4, .row_windows = 5}}; });
    refuses("height", [] { Attention{Grid2D{.height = 0, .row_windows = 1}}; });
    refuses("width", [] { Attention{Grid2D{.width = 0, .row_windows = 1}}; });
    refuses("window", [] { Attention{Grid2D{.window = 3}}; });
    refuses("shift", [] { Attention{Grid2D{.window = 4, .shift = 4}}; });
    refuses("shift", [] { Attention{Grid2D{.row_windows = 4, .shift = 1}}; });
    refuses("window", [] { Grid2D{.window = 4}.sample(64, 64, {}, true); });
    refuses("height x width", [] { Grid2D{.row_windows = 4}.sample(63, 63, {}, false); });
    refuses("Grid2D", [] { Grid2D{.row_windows = 4}.sample(63, 64, {}, false); });
    refuses("sources", [] { Attention{Given{}}; });
    refuses("sources", [] { Given{{{0, 8}}}.sample(8, 8, {}, false); });
    refuses("sources", [] { Given{{{-1}}}.sample(8, 8, {}, false); });
    refuses("sources", [] { Given{{{3, 1, 3}}}.sample(8, 8, {}, false); });
    refuses("windows of sources", [] { Given{{{0}, {0}, {1}}}.sample(2, 2, {}, false); });
    const index_t order[] = {1, 0};
    refuses("k", [&] { Given::first_of(order, 3); });
    refuses("windows", [&] { Given::windows_of(order, 3); });
    refuses("n", [] { relative_compute(2, 1, 2, 0, 8); });
    refuses("d", [] { relative_compute(2, 1, 2, 8, 0); });
    refuses("fine_tuned", [] { relative_compute(2, 1, 2, 8, 8, 7); });
    refuses("windows", [] { sampling_probability(4, 5, .1); });
    refuses("draws", [] { sampling_frequency(Unbiased{}, 4, 4, false, 0, 1); });
    refuses("layers", [] { reachable_share(Unbiased{}, 4, 0, false, 1, 1); });
    refuses("pixel", [] { heat_map({}, 0); });
}

TEST_CASE("heat maps") {
    const Picture map = heat_map(sampling_probability(4, 2, 0), 3);
    CHECK((map.width == 12 && map.height == 6));
    CHECK((map.pixels.front() == 0 && map.pixels.back() == 0 && map.pixels[11] == 255));
}
