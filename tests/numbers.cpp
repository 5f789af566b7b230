// Numbers that follow from the definition of attention diffusion by hand or to many digits, for both backends.
#include "support/layers.hpp"
#include "support/patterns.hpp"
#include "support/random.hpp"

#include <doctest/doctest.h>

// Another backend's test names its own layer.
#if !defined(POLYATTN_TEST_OF_OTHER_LAYER)
using Tested = Fast;
#endif

using namespace polyattn;

namespace {

/// The operator p(A) as a matrix: attention with V = identity. q = k = 0 makes all scores equal.
template <class Layer = Tested>
std::vector<std::vector<double>> operator_of(const Plan& plan, const Recursion& recursion) {
    const index_t n = plan.queries();
    Tensor<double> zero({n, 1}), identity({n, n});
    for (index_t i = 0; i < n; ++i) identity.values[static_cast<std::size_t>(i * n + i)] = 1;
    CallOptions options;
    options.plan = plan;
    const auto out = Layer{AnyDiffusion{recursion}}(zero.view(), zero.view(), identity.view(), options);
    std::vector<std::vector<double>> rows;
    for (index_t i = 0; i < n; ++i) rows.emplace_back(out.values.begin() + i * n, out.values.begin() + (i + 1) * n);
    return rows;
}

Plan edges(index_t n, const std::vector<std::vector<index_t>>& rows) {
    EdgeList list{{0}, {}};
    for (const auto& row : rows) {
        list.keys.insert(list.keys.end(), row.begin(), row.end());
        list.offsets.push_back(static_cast<offset_t>(list.keys.size()));
    }
    return list.plan(n, n);
}

constexpr double digits = 1e-14;  // sums of a few numbers below 1 in double

}  // namespace

TEST_CASE_TEMPLATE("cyclic shift: PPR<5> weighs distance k by alpha (1 - alpha)^k, the last by (1 - alpha)^K", Layer, Tested, Exact) {
    const auto rows = operator_of<Layer>(edges(8, {{1}, {2}, {3}, {4}, {5}, {6}, {7}, {0}}), PPR<5>{}.recursion());
    const double wanted[] = {.1, .09, .081, .0729, .06561, .59049, 0, 0};
    for (std::size_t i = 0; i < 8; ++i)
        for (std::size_t k = 0; k < 8; ++k) CHECK(std::abs(rows[i][(i + k) % 8] - wanted[k]) < digits);
}

TEST_CASE_TEMPLATE("three tokens on a path", Layer, Tested, Exact) {
    const Plan path = edges(3, {{0, 1}, {0, 1, 2}, {1, 2}});
    const auto column = [&](const Recursion& recursion) {
        const auto rows = operator_of<Layer>(path, recursion);
        return std::array{rows[0][0], rows[1][0], rows[2][0]};
    };
    const auto check = [&](const Recursion& recursion, std::array<double, 3> wanted) {
        const auto got = column(recursion);
        for (std::size_t i = 0; i < 3; ++i) CHECK(std::abs(got[i] - wanted[i]) < digits);
    };
    check(PPR<1>{}.recursion(), {11. / 20, 3. / 10, 0});
    check(PPR<2>{}.recursion(), {193. / 400, 51. / 200, 27. / 200});
    check(PPR<5>{}.recursion(), {1288931. / 3200000, 417423. / 1600000, 1647. / 8000});
}

TEST_CASE_TEMPLATE("circulant of 16 tokens, neighbours within 2", Layer, Tested, Exact) {
    std::vector<std::vector<index_t>> ring(16);
    for (index_t i = 0; i < 16; ++i) {
        for (index_t d = -2; d <= 2; ++d) ring[static_cast<std::size_t>(i)].push_back((i + d + 16) % 16);
        std::sort(ring[static_cast<std::size_t>(i)].begin(), ring[static_cast<std::size_t>(i)].end());
    }
    const auto rows = operator_of<Layer>(edges(16, ring), PPR<5>{}.recursion());
    double trace = 0, second = 0;
    for (std::size_t i = 0; i < 16; ++i) trace += rows[i][i];
    for (std::size_t j = 0; j < 16; ++j) second += rows[0][j] * std::cos(2 * std::acos(-1.) * double(j) / 16);
    CHECK(std::abs(trace - 3.6191408128) < 1e-10);
    CHECK(std::abs(second - .5810685674) < 1e-10);
    CHECK(std::abs(rows[0][0] - .2261963008) < 1e-10);
    CHECK(std::abs(rows[0][2] - .104072544) < 1e-10);
    CHECK(std::abs(rows[0][8] - .005878656) < 1e-10);
}

TEST_CASE_TEMPLATE("a two by two operator and its limit", Layer, Tested, Exact) {
    // Scores log(.7), log(.3); log(.4), log(.6): one column of queries (1, 0), (0, 1) against keys of logarithms.
    Tensor<double> q({2, 2}), k({2, 2}), v({2, 2});
    q.values = {1, 0, 0, 1};
    v.values = {1, 0, 0, 1};
    const double root = std::sqrt(2.);
    k.values = {root * std::log(.7), root * std::log(.4), root * std::log(.3), root * std::log(.6)};
    const auto a = Layer{AnyDiffusion{NoDiffusion{}.recursion()}}(q.view(), k.view(), v.view());
    for (std::size_t i = 0; i < 4; ++i) CHECK(std::abs(a.values[i] - std::array{.7, .3, .4, .6}[i]) < digits);
    const auto limit = Layer{AnyDiffusion{PPR<400>{}.recursion()}}(q.view(), k.view(), v.view());
    for (std::size_t i = 0; i < 4; ++i) CHECK(std::abs(limit.values[i] - std::array{.63013699, .36986301, .49315068, .50684932}[i]) < 5e-9);
    // Z_K - Z_inf = ((1 - alpha) A)^K (V - Z_inf): below 1 % of the first difference only from K = 44 on.
    const auto five = Layer{AnyDiffusion{PPR<5>{}.recursion()}}(q.view(), k.view(), v.view());
    std::array<double, 4> rest;
    for (std::size_t i = 0; i < 4; ++i) rest[i] = v.values[i] - limit.values[i];
    for (int step = 0; step < 5; ++step) rest = {.9 * (.7 * rest[0] + .3 * rest[2]), .9 * (.7 * rest[1] + .3 * rest[3]), .9 * (.4 * rest[0] + .6 * rest[2]), .9 * (.4 * rest[1] + .6 * rest[3])};
    for (std::size_t i = 0; i < 4; ++i) CHECK(std::abs(five.values[i] - limit.values[i] - rest[i]) < digits);
    CHECK(std::abs(std::pow(.9, 5) - .59049) < digits);
    CHECK((std::pow(.9, 43) > .01 && std::pow(.9, 44) < .01));
}

TEST_CASE_TEMPLATE("equal scores everywhere: Z_K = .1 V + .9 mean(V) for every K >= 1", Layer, Tested, Exact) {
    for (const int hops : {1, 2, 5}) {
        const auto rows = operator_of<Layer>(Dense{}.plan(23, 23), {1, std::vector<Hop>(static_cast<std::size_t>(hops), Hop{.9, .1})});
        for (std::size_t i = 0; i < 23; ++i)
            for (std::size_t j = 0; j < 23; ++j) CHECK(std::abs(rows[i][j] - ((i == j ? .1 : 0) + .9 / 23)) < digits);
    }
}

TEST_CASE("ends of alpha and K: V, A V, dense softmax attention") {
    POLYATTN_RANDOM(random);
    const auto q = random.tensor<double>({19, 6}), k = random.tensor<double>({19, 6}), v = random.tensor<double>({19, 4});
    const auto run = [&](const Recursion& recursion) { return Tested{AnyDiffusion{recursion}}(q.view(), k.view(), v.view()).values; };
    CHECK(run(PPR<4>{.alpha = 1}.recursion()) == v.values);
    CHECK(run(PPR<0>{}.recursion()) == v.values);
    CHECK(run(PPR<1>{.alpha = 0}.recursion()) == run(NoDiffusion{}.recursion()));
    const auto out = run(NoDiffusion{}.recursion());
    for (index_t i = 0; i < 19; ++i) {
        double sum = 0, wanted[4] = {};
        for (index_t j = 0; j < 19; ++j) {
            double score = 0;
            for (index_t c = 0; c < 6; ++c) score += q.values[static_cast<std::size_t>(6 * i + c)] * k.values[static_cast<std::size_t>(6 * j + c)];
            const double weight = std::exp(score / std::sqrt(6.));
            sum += weight;
            for (index_t c = 0; c < 4; ++c) wanted[c] += weight * v.values[static_cast<std::size_t>(4 * j + c)];
        }
        for (index_t c = 0; c < 4; ++c) CHECK(std::abs(out[static_cast<std::size_t>(4 * i + c)] - wanted[c] / sum) < 1e-13);
    }
}

TEST_CASE("coefficients: PPR, heat kernel and own polynomials as sums of theta_k A^k") {
    const auto theta_of = [](const Recursion& recursion) {  // by running the recursion on polynomials
        std::vector<double> z{recursion.start};
        for (const Hop& hop : recursion.hops) {
            std::vector<double> next(z.size() + 1, 0.);
            for (std::size_t k = 0; k < z.size(); ++k) next[k + 1] = hop.walk * z[k];
            next[0] += hop.teleport;
            z = next;
        }
        return z;
    };
    const auto ppr = theta_of(PPR<5>{}.recursion());
    for (int k = 0; k < 5; ++k) CHECK(std::abs(ppr[static_cast<std::size_t>(k)] - .1 * std::pow(.9, k)) < digits);
    CHECK(std::abs(ppr[5] - std::pow(.9, 5)) < digits);
    const auto heat = theta_of(HeatKernel<4>{.t = 2}.recursion());
    const double terms[] = {1, 2, 2, 4. / 3, 2. / 3};
    for (std::size_t k = 0; k < 5; ++k) CHECK(std::abs(heat[k] - terms[k] / 7) < digits);
    for (const double t : {0., 1e-3, 900.}) {
        const auto h = theta_of(HeatKernel<3>{.t = t}.recursion());
        CHECK(std::abs(std::accumulate(h.begin(), h.end(), 0.) - 1) < digits);
        if (t > 0) CHECK(std::abs(h[2] / h[3] * t / 3 - 1) < 1e3 * digits);  // theta_2 / theta_3 = 3 / t, however large t is
    }
    for (const std::array<double, 4>& wanted : {std::array{.1, .2, .3, .4}, {1., 0., 0., 0.}, {0., 0., 1., 0.}, {.5, -1., 0., 1.5}, {0., 0., 0., 0.}, {2., 1., 1., 0.}}) {
        const auto got = theta_of(Polynomial<3>{wanted}.recursion());
        for (std::size_t k = 0; k < 4; ++k) CHECK(std::abs(got[k] - wanted[k]) < digits);
    }
    CHECK(Polynomial<0>{{3}}.recursion().start == 3);
}

TEST_CASE("receptive field: the gradient is exactly 0 beyond K hops, and one global token reaches all in 2") {
    const index_t n = 96, half = 8;
    const Plan blocks = OverlappingBlocks{2 * half}.plan(n, n);
    for (const int hops : {1, 2, 3, 5}) {
        const auto rows = operator_of(blocks, {1, std::vector<Hop>(static_cast<std::size_t>(hops), Hop{.9, .1})});
        for (index_t i = 0; i < n; ++i)
            for (index_t j = 0; j < n; ++j) {
                const index_t distance = std::max(index_t{1}, std::abs(i / half - j / half));
                CHECK((rows[static_cast<std::size_t>(i)][static_cast<std::size_t>(j)] > 0) == (distance <= hops));
            }
    }
    const auto rows = operator_of(Union{OverlappingBlocks{2 * half}, GlobalTokens{.tokens = {50}}}.plan(n, n), PPR<2>{}.recursion());
    for (const auto& row : rows)
        for (const double weight : row) CHECK(weight > 0);
}

TEST_CASE("properties on every pattern: rows sum to 1, outputs lie in the hull of V, constants stay") {
    POLYATTN_RANDOM(random);
    for (const index_t n : {1, 20, 45})
        for (const NamedPlan& named : every_square_plan(n, random.seed()))
            for (const Recursion& recursion : {NoDiffusion{}.recursion(), PPR<5>{}.recursion(), HeatKernel<4>{}.recursion()}) {
                INFO(named.name, ", n = ", n);
                const auto q = random.tensor<double>({n, 8}), k = random.tensor<double>({n, 8});
                auto v = random.tensor<double>({n, 3});
                for (index_t i = 0; i < n; ++i) v.values[static_cast<std::size_t>(3 * i)] = 7.25;
                CallOptions options;
                options.plan = named.plan;
                const auto out = Tested{AnyDiffusion{recursion}}(q.view(), k.view(), v.view(), options);
                // Rows without keys are 0, which every row that sees them feels: then the hull includes 0.
                bool empty_rows = false;
                std::vector<bool> has_keys(static_cast<std::size_t>(n), false);
                for (index_t i = 0; i < n; ++i) {
                    named.plan.for_each_key(i, [&](index_t) { has_keys[static_cast<std::size_t>(i)] = true; });
                    empty_rows |= !has_keys[static_cast<std::size_t>(i)];
                }
                for (index_t c = 0; c < 3; ++c) {
                    double low = 1e300, high = -1e300;
                    for (index_t i = 0; i < n; ++i) {
                        low = std::min(low, v.values[static_cast<std::size_t>(3 * i + c)]);
                        high = std::max(high, v.values[static_cast<std::size_t>(3 * i + c)]);
                    }
                    if (empty_rows) low = std::min(low, 0.), high = std::max(high, 0.);
                    for (index_t i = 0; i < n; ++i) {
                        CHECK(out.values[static_cast<std::size_t>(3 * i + c)] >= low - 1e-12);
                        CHECK(out.values[static_cast<std::size_t>(3 * i + c)] <= high + 1e-12);
                    }
                }
                if (!empty_rows)
                    for (index_t i = 0; i < n; ++i) CHECK(std::abs(out.values[static_cast<std::size_t>(3 * i)] - 7.25) < 1e-12);
            }
}

TEST_CASE("permuting tokens permutes the output") {
    POLYATTN_RANDOM(random);
    const index_t n = 50;
    const Plan plan = LocalGlobalRandom{.window = 8, .globals = 3, .randoms = 4, .seed = random.seed()}.plan(n, n);
    std::vector<index_t> order(static_cast<std::size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    for (index_t i = n; i > 1; --i) std::swap(order[static_cast<std::size_t>(i - 1)], order[static_cast<std::size_t>(random.below(i))]);
    std::vector<std::vector<index_t>> rows(static_cast<std::size_t>(n));
    for (index_t i = 0; i < n; ++i) {
        auto& row = rows[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])];
        plan.for_each_key(i, [&](index_t j) { row.push_back(order[static_cast<std::size_t>(j)]); });
        std::sort(row.begin(), row.end());
    }
    const auto q = random.tensor<double>({n, 8}), v = random.tensor<double>({n, 8});
    auto permuted_q = q, permuted_v = v;
    for (index_t i = 0; i < n; ++i)
        for (index_t c = 0; c < 8; ++c) {
            permuted_q.values[static_cast<std::size_t>(order[static_cast<std::size_t>(i)] * 8 + c)] = q.values[static_cast<std::size_t>(i * 8 + c)];
            permuted_v.values[static_cast<std::size_t>(order[static_cast<std::size_t>(i)] * 8 + c)] = v.values[static_cast<std::size_t>(i * 8 + c)];
        }
    CallOptions options, permuted;
    options.plan = plan;
    permuted.plan = edges(n, rows);
    const Tested attention{AnyDiffusion{PPR<3>{}.recursion()}};
    const auto a = attention(q.view(), q.view(), v.view(), options), b = attention(permuted_q.view(), permuted_q.view(), permuted_v.view(), permuted);
    for (index_t i = 0; i < n; ++i)
        for (index_t c = 0; c < 8; ++c)
            CHECK(std::abs(a.values[static_cast<std::size_t>(i * 8 + c)] - b.values[static_cast<std::size_t>(order[static_cast<std::size_t>(i)] * 8 + c)]) < 1e-12);
}

TEST_CASE("causality: a later token changes no earlier output, bit for bit") {
    POLYATTN_RANDOM(random);
    const index_t n = 60;
    std::vector<NamedPlan> plans = {{"Causal", Causal{}.plan(n, n)}, {"CausalSlidingWindow", CausalSlidingWindow{.window = 9}.plan(n, n)}, {"Strided", Strided{.stride = 5}.plan(n, n)},
                                    {"Fixed", Fixed{.stride = 6, .summary = 2}.plan(n, n)}};
    for (const NamedPlan& named : every_square_plan(n, random.seed())) plans.push_back({named.name + " & Causal", intersect(named.plan, Causal{}.plan(n, n))});
    for (const NamedPlan& named : plans) {
        INFO(named.name);
        const Tested attention{AnyDiffusion{PPR<3>{}.recursion()}};
        CallOptions options;
        options.plan = named.plan;
        auto q = random.tensor<float>({n, 8}), k = random.tensor<float>({n, 8}), v = random.tensor<float>({n, 8});
        const auto before = attention(q.view(), k.view(), v.view(), options);
        const index_t changed = random.below(n);
        for (index_t c = 0; c < 8; ++c)
            for (auto* tensor : {&q, &k, &v}) tensor->values[static_cast<std::size_t>(changed * 8 + c)] += 3;
        const auto after = attention(q.view(), k.view(), v.view(), options);
        for (index_t i = 0; i < changed * 8; ++i) CHECK(before.values[static_cast<std::size_t>(i)] == after.values[static_cast<std::size_t>(i)]);
    }
}

TEST_CASE("padding equals a shorter text") {
    POLYATTN_RANDOM(random);
    const index_t n = 48, length = 29;
    for (const Recursion& recursion : {NoDiffusion{}.recursion(), PPR<4>{}.recursion(), PPR<0>{}.recursion()}) {
        const Tested attention{AnyDiffusion{recursion}};
        const auto q = random.tensor<float>({n, 8}), v = random.tensor<float>({n, 8});
        for (const NamedPlan& named : every_square_plan(n, random.seed())) {
            INFO(named.name);
            CallOptions padded, exact;
            padded.plan = named.plan;
            padded.key_lengths = {length};
            exact.plan = prefix(named.plan, length, length);
            const auto short_q = tensor_view(q.data(), {length, 8}), short_v = tensor_view(v.data(), {length, 8});
            const auto a = attention(q.view(), q.view(), v.view(), padded), b = attention(short_q, short_q, short_v, exact);
            for (index_t i = 0; i < n * 8; ++i) {
                if (i < length * 8) CHECK(a.values[static_cast<std::size_t>(i)] == doctest::Approx(b.values[static_cast<std::size_t>(i)]).epsilon(1e-5));
                else CHECK(a.values[static_cast<std::size_t>(i)] == 0);
            }
        }
    }
}

TEST_CASE("logsumexp in natural logarithms") {
    Tensor<double> zero({10, 4}), v({10, 2});
    CallOptions options;
    options.plan = Causal{}.plan(10, 10);
    const auto [out, logsumexp] = Tested{AnyDiffusion{NoDiffusion{}.recursion()}}.with_logsumexp(zero.view(), zero.view(), v.view(), options);
    for (index_t i = 0; i < 10; ++i) CHECK(std::abs(logsumexp.values[static_cast<std::size_t>(i)] - std::log(i + 1.)) < digits);
}
