// The softmax operator on the device: the CPU's table of cases, executed natively or by an emulator, whose checks are on.
#include "cuda/device_layer.hpp"
#include "support/layers.hpp"

using Tested = DeviceLayer<>;

namespace {

using polyattn::index_t;

/// Sizes around the tiles of 32 and 64 pairs and the edges' 32, primes, 0 and 1; dims around the vectors and the panels of 32 and 64.
constexpr index_t sizes[] = {0, 1, 2, 7, 31, 33, 63, 64, 65, 97};
constexpr index_t dims[] = {1, 3, 4, 8, 16, 17, 40, 64, 65, 70};

}  // namespace

#include "support/softmax_table.hpp"

/// Tokens that blocks of their own work on, in float, of queries or of keys. In device_layer.cu.
index_t single_tokens(const Plan& plan, bool transposed);

TEST_CASE("biases and their gradients") {
    POLYATTN_RANDOM(random);
    const auto check = [&]<class Bias>(const Bias& bias, const char* name) {
        for (const index_t n : {1, 40, 71, 290}) {
            const Recursion recursion = PPR<2>{}.recursion();
            Case c{name, LocalGlobalRandom{.window = 8, .globals = 3, .randoms = 3, .seed = random.seed()}.plan(n, n), recursion, 8, 8, 2, 2, 2};
            if (n == 40) c.options.key_lengths = {33, 40};
            const Attention<AnyDiffusion, Bias, Reference> exact{AnyDiffusion{recursion}, bias};
            check_case<float>(c, random, true, DeviceLayer<Bias>{AnyDiffusion{recursion}, bias}, exact);
            // Sums of float terms, exact but for the terms' own rounding; compared with the reference on the same numbers.
            const auto q = random.tensor<float>({2, 2, n, 8}), d_out = random.tensor<float>({2, 2, n, 8});
            CallOptions options = c.options;
            options.plan = c.plan;
            const DeviceLayer<Bias> tested{AnyDiffusion{recursion}, bias};
            const auto gradient = tested.backward(tested.forward(q.view(), q.view(), q.view(), options).saved, d_out.view());
            const auto q2 = in_double(q), d_out2 = in_double(d_out);
            const auto exact_gradient = exact.backward(exact.forward(q2.view(), q2.view(), q2.view(), options).saved, d_out2.view());
            REQUIRE(gradient.bias.size() == exact_gradient.bias.size());
            for (std::size_t i = 0; i < gradient.bias.size(); ++i) CHECK(gradient.bias[i] == doctest::Approx(exact_gradient.bias[i]).epsilon(1e-3));
            // Padding changes no bit, whatever it holds; what is seen and no number makes no number.
            auto spoilt = q;
            const auto put = [&](index_t row, float value) { spoilt.values[static_cast<std::size_t>(row * 8 + 3)] = value; };
            const auto bias_gradient = [&] { return tested.backward(tested.forward(q.view(), q.view(), spoilt.view(), options).saved, d_out.view()).bias; };
            if (n == 40) {
                put(34, std::numeric_limits<float>::quiet_NaN());
                put(39, 1e30f);
                CHECK(bias_gradient() == gradient.bias);
            }
            put(0, std::numeric_limits<float>::quiet_NaN());
            for (const double entry : bias_gradient()) CHECK(std::isnan(entry));
        }
    };
    check(Alibi(2), "Alibi");
    RelativePosition table{.heads = 2, .reach = 4, .table = std::vector<double>(18)};
    for (double& entry : table.table) entry = random.normal();
    check(table, "RelativePosition");
    RelativePosition2D picture{.heads = 2, .width = 6, .reach = 2, .table = std::vector<double>(50)};
    for (double& entry : picture.table) entry = random.normal();
    check(picture, "RelativePosition2D");
}

TEST_CASE("few tokens with long sequences have blocks of their own") {
    POLYATTN_RANDOM(random);
    const index_t n = 260 + random.below(60), globals = 12;
    const GlobalTokens some{.count = globals, .seed = random.seed()};
    const LocalGlobalRandom mixed{.window = 16, .globals = globals, .randoms = 4, .seed = random.seed()};
    CHECK(single_tokens(some.plan(n, n), false) == globals);
    CHECK(single_tokens(some.plan(n, n), true) == globals);
    CHECK(single_tokens(mixed.plan(n, n), false) == globals);
    CHECK(single_tokens(some.plan(200, 200), false) == 0);
    CHECK(single_tokens(GlobalTokens{.count = 150, .seed = some.seed}.plan(n, n), false) == 0);

    // Alone; beside tiles and edges; with ranges of their own; with gaps; of 129 to 255 others, short for float.
    const std::pair<const char*, Plan> plans[] = {{"GlobalTokens", some.plan(n, n)},
                                                  {"LocalGlobalRandom", mixed.plan(n, n)},
                                                  {"causal", Intersection{mixed, Causal{}}.plan(n, n)},
                                                  {"with gaps", Union{Strided{.stride = 40}, some}.plan(n, n)},
                                                  {"more keys", mixed.plan(n - 100, n)},
                                                  {"short", some.plan(129 + n % 127, 129 + n % 127)}};
    for (const auto& [name, plan] : plans) {
        const Recursion recursion = plan.queries() == plan.keys() ? PPR<2>{}.recursion() : NoDiffusion{}.recursion();
        check_case<float>({name, plan, recursion, 24, 70}, random);
        check_case<double>({name, plan, recursion, 70, 24}, random);
    }
    Case c{"padding, shared heads and dropout", mixed.plan(n, n), PPR<3>{}.recursion(), 24, 70, 3, 2, 1};
    c.options.key_lengths = {n, n - 1 - random.below(n / 2), 0};
    check_case<double>(c, random);
    c.options.draw = {.seed = random.seed(), .step = 3};
    c.options.dropout = {.weights = .3, .values = .1};
    check_case<float>(c, random);
    c.plan = some.plan(n, n);
    check_case<double>(c, random);

    // What a token does not see does not touch it.
    const Tested attention{AnyDiffusion{NoDiffusion{}.recursion()}};
    const index_t dim = 12, bad = n / 2;
    const auto q = random.tensor<float>({n, dim}), k = random.tensor<float>({n, dim}), v = random.tensor<float>({n, dim}), d_out = random.tensor<float>({n, dim});
    auto bad_k = k, bad_v = v, bad_d = d_out;
    for (auto* tensor : {&bad_k, &bad_v, &bad_d}) tensor->values[static_cast<std::size_t>(bad * dim + 3)] = std::numeric_limits<float>::quiet_NaN();
    for (const auto& [name, plan] : {plans[0], plans[2], plans[3]}) {
        INFO(name);
        CallOptions options;
        options.plan = plan;
        const auto [clean, saved] = attention.forward(q.view(), k.view(), v.view(), options);
        const auto from_k = attention(q.view(), bad_k.view(), v.view(), options), from_v = attention(q.view(), k.view(), bad_v.view(), options);
        const auto good = attention.backward(saved, d_out.view()), spoilt = attention.backward(saved, bad_d.view());
        for (index_t i = 0; i < n; ++i) {
            const auto at = static_cast<std::size_t>(i * dim + 3);
            if (plan.contains(i, bad)) {
                CHECK_FALSE(detail::is_finite(from_k.values[at]));
                CHECK_FALSE(detail::is_finite(from_v.values[at]));
            } else {
                CHECK(from_k.values[at] == clean.values[at]);
                CHECK(from_v.values[at] == clean.values[at]);
            }
            if (i != bad) CHECK(good.q.values[at] == spoilt.q.values[at]);
            if (plan.contains(bad, i)) continue;
            CHECK(good.k.values[at] == spoilt.k.values[at]);
            CHECK(good.v.values[at] == spoilt.v.values[at]);
        }
    }
}
