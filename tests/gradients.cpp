// Gradients by central differences in double, of both backends.
#include "support/finite_differences.hpp"
#include "support/layers.hpp"
#include "support/overwritten.hpp"
#include "support/patterns.hpp"
#include "support/random.hpp"

#include <polyattn/policy/bias/bias.hpp>

#include <doctest/doctest.h>


using namespace polyattn;

namespace {

/// Loss = sum of d_out * out. Compares gradients at `samples` places of q, k, v and of a bias table.
template <class MakeLayer>
void check_gradients(MakeLayer make_layer, const Plan& plan, CallOptions options, Random& random, index_t heads, index_t key_heads, std::vector<double>* table = nullptr) {
    const index_t n = plan.queries(), keys = plan.keys(), d = 5, e = 3, batch = 2;
    options.plan = plan;
    auto q = random.tensor<double>({batch, heads, n, d}), k = random.tensor<double>({batch, key_heads, keys, d}), v = random.tensor<double>({batch, key_heads, keys, e});
    const auto d_out = random.tensor<double>({batch, heads, n, e});
    const auto loss = [&] {
        const auto out = make_layer()(q.view(), k.view(), v.view(), options);
        double sum = 0;
        for (std::size_t i = 0; i < out.values.size(); ++i) sum += out.values[i] * d_out.values[i];
        return sum;
    };
    const auto layer = make_layer();
    const auto saved = layer.forward(q.view(), k.view(), v.view(), options).saved;
    const auto gradient = layer.backward(saved, d_out.view());
    const auto again = layer.backward(saved, d_out.view());  // repeatable, to the bit
    CHECK(gradient.q.values == again.q.values);
    CHECK(gradient.k.values == again.k.values);
    CHECK(gradient.v.values == again.v.values);
    // With h = 1e-3 the differences carry 2^-52 |loss| / h, below 1e-12 |loss|, and h^4 / 480 times a fifth derivative of the loss, below
    // 1e-9 as long as that is below 5e5: inputs are standard normal. A wrong term is of the order of the gradient itself.
    const double tolerance = 1e-8 * (1 + std::abs(loss()));
    const auto compare = [&](auto& values, const auto& got, const char* what) {
        if (values.empty()) return;
        for (int s = 0; s < 6; ++s) {
            const auto at = static_cast<std::size_t>(random.below(static_cast<index_t>(values.size())));
            INFO(what, " entry ", at);
            CHECK(std::abs(derivative(values[at], loss, 1e-3) - got[at]) < tolerance);
        }
    };
    compare(q.values, gradient.q.values, "q");
    compare(k.values, gradient.k.values, "k");
    compare(v.values, gradient.v.values, "v");
    if (table) compare(*table, gradient.bias, "bias");
}

const std::vector<Recursion> recursions = {NoDiffusion{}.recursion(), PPR<3>{.alpha = .2}.recursion(), HeatKernel<2>{}.recursion(), Polynomial<2>{{.3, -.5, 1.1}}.recursion(), PPR<0>{}.recursion()};

}  // namespace

TEST_CASE_TEMPLATE("gradients of q, k and v", Layer, Fast, Exact) {
    POLYATTN_RANDOM(random);
    for (const index_t n : {1, 7, 21})
        for (const NamedPlan& named : every_square_plan(n, random.seed())) {
            const Recursion& recursion = recursions[static_cast<std::size_t>(random.below(static_cast<index_t>(recursions.size())))];
            INFO(named.name, ", n = ", n, ", hops ", recursion.hops.size());
            CallOptions options;
            if (random.below(2)) options.key_lengths = {n, n / 2};
            if (random.below(2)) options.weight_budget = 0;
            if (random.below(3) == 0) options.dropout = {.weights = .2, .values = .1};
            options.draw.seed = random.seed();
            check_gradients([&] { return Layer{AnyDiffusion{recursion}}; }, named.plan, options, random, 2, random.below(2) ? 2 : 1);
        }
}

TEST_CASE_TEMPLATE("every diffusion on Diffuser's pattern", Layer, Fast, Exact) {
    POLYATTN_RANDOM(random);
    for (const Recursion& recursion : recursions)
        check_gradients([&] { return Layer{AnyDiffusion{recursion}}; }, LocalGlobalRandom{.window = 6, .globals = 2, .randoms = 3, .seed = random.seed()}.plan(18, 18), {}, random, 2, 1);
}

TEST_CASE_TEMPLATE("cross-attention", Layer, Fast, Exact) {
    POLYATTN_RANDOM(random);
    for (const auto& [queries, keys] : {std::pair{1, 20}, {6, 17}, {20, 3}})
        check_gradients([&] { return Layer{AnyDiffusion{recursions[0]}}; }, SlidingWindow{.window = 12}.plan(queries, keys), {}, random, 4, 2);
}

TEST_CASE("gradients overwrite what is there") {
    POLYATTN_RANDOM(random);
    CallOptions lengths;
    lengths.key_lengths = {33, 0};
    for (const index_t d : {5, 16}) {
        check_overwrites<float>(Attention<>{}, random, 33, 33, d, d, lengths);
        check_overwrites<double>(Attention<SlidingWindow>{SlidingWindow{.window = 12}}, random, 530, 530, d, d);  // several chunks of keys
        check_overwrites<float>(Attention<LocalGlobalRandom>{LocalGlobalRandom{.window = 8, .globals = 3, .randoms = 4}}, random, 70, 90, d, d);
        check_overwrites<float>(Attention<LocalGlobalRandom, PPR<2>>{LocalGlobalRandom{.window = 8, .globals = 3, .randoms = 4}, PPR<2>{}}, random, 33, 33, d, d, lengths);
        check_overwrites<float>(Attention<PPR<0>>{}, random, 9, 9, d, d);
        check_overwrites<float>(Attention<Reference>{}, random, 9, 11, d, d);
    }
}

TEST_CASE_TEMPLATE("gradients of learned biases", Backend, Simd<>, Reference) {
    POLYATTN_RANDOM(random);
    const Plan plan = LocalGlobalRandom{.window = 6, .globals = 2, .randoms = 3, .seed = random.seed()}.plan(16, 16);
    CallOptions options;
    options.key_lengths = {16, 11};
    const auto fill = [&](std::vector<double>& table) {
        for (double& entry : table) entry = random.normal();
    };
    for (const Recursion& recursion : recursions) {
        RelativePosition position{.heads = 2, .reach = 3, .table = std::vector<double>(14)};
        fill(position.table);
        check_gradients([&] { return Attention<AnyDiffusion, RelativePosition, Backend>{AnyDiffusion{recursion}, position}; }, plan, options, random, 2, 1, &position.table);
    }
    RelativePosition2D picture{.heads = 2, .width = 4, .reach = 2, .table = std::vector<double>(50)};
    fill(picture.table);
    check_gradients([&] { return Attention<AnyDiffusion, RelativePosition2D, Backend>{AnyDiffusion{recursions[1]}, picture}; }, plan, options, random, 2, 2, &picture.table);
    TableBias table{[](index_t batch, index_t query, index_t key) { return (batch + query * 3 + key) % 5; }, 2, std::vector<double>(10)};
    fill(table.table);
    check_gradients([&] { return Attention<AnyDiffusion, decltype(table), Backend>{AnyDiffusion{recursions[1]}, table}; }, plan, options, random, 2, 1, &table.table);
    options.dropout = {.weights = .3};
    check_gradients([&] { return Attention<AnyDiffusion, decltype(table), Backend>{AnyDiffusion{recursions[1]}, table}; }, plan, options, random, 2, 1, &table.table);
}
