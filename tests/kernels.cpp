// SIMD kernels against the double-precision reference, within derived bounds and an estimated allowance for flushed weights. Built once for each architecture and once under
// -Ofast: everything here must hold for all of them.
#include "support/bounds.hpp"
#include "support/layers.hpp"
#include "support/patterns.hpp"
#include "support/random.hpp"

#include <polyattn/policy/bias/bias.hpp>

#include <doctest/doctest.h>

using namespace polyattn;

namespace {

template <class T>
constexpr double unit = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;

struct Case {
    std::string name;
    Plan plan;
    Recursion recursion;
    index_t d, e;
    index_t batch = 1, heads = 1, key_heads = 1;
    CallOptions options = {};
    double scale = 1;
};

/// |got - exact| <= bound for all entries; in double the reference rounds as well.
template <class T>
void check_close(const Tensor<T>& got, const Tensor<double>& exact, const std::vector<double>& bound, const char* what, double flushed) {
    REQUIRE(got.values.size() == exact.values.size());
    const double slack = sizeof(T) == 8 ? 2 : 1;
    double worst = 0;
    std::size_t where = 0;
    for (std::size_t i = 0; i < exact.values.size(); ++i) {
        const double share = std::abs(double(got.values[i]) - exact.values[i]) / (slack * bound[i] + unit<T> * std::abs(exact.values[i]) + flushed);
        if (!(share <= worst)) {
            worst = share;
            where = i;
        }
    }
    INFO(what, " entry ", where, ": got ", got.values.empty() ? 0 : double(got.values[where]), ", exact ", exact.values.empty() ? 0 : exact.values[where]);
    CHECK(worst <= 1);
}

template <class T, class Layer = Fast, class ExactLayer = Exact>
void check_case(const Case& c, Random& random, bool backward, const Layer& fast, const ExactLayer& exact) {
    const index_t n = c.plan.queries(), keys = c.plan.keys();
    INFO(c.name, ", ", n, " queries, ", keys, " keys, d = ", c.d, ", e = ", c.e, ", hops ", c.recursion.hops.size());
    const auto q = random.tensor<T>({c.batch, c.heads, n, c.d}, c.scale), k = random.tensor<T>({c.batch, c.key_heads, keys, c.d}),
               v = random.tensor<T>({c.batch, c.key_heads, keys, c.e}), d_out = random.tensor<T>({c.batch, c.heads, n, c.e});
    const auto q2 = in_double(q), k2 = in_double(k), v2 = in_double(v), d_out2 = in_double(d_out);
    CallOptions options = c.options;
    options.plan = c.plan;
    const auto out = fast(q.view(), k.view(), v.view(), options);
    const auto [exact_out, exact_saved] = exact.forward(q2.view(), k2.view(), v2.view(), options);

    // Bounds head by head; key heads collect those of their queries.
    Tensor<double> b_out(out.shape), b_q(q.shape), b_k(k.shape), b_v(v.shape);
    const auto bound_bias = detail::bind_bias(fast.bias(), n, keys);
    for (index_t b = 0; b < c.batch; ++b)
        for (index_t h = 0; h < c.heads; ++h) {
            const index_t kh = h / (c.heads / c.key_heads);
            const index_t key_length = options.key_lengths.empty() ? keys : options.key_lengths[static_cast<std::size_t>(b)];
            const index_t query_length = n == keys ? key_length : n;
            const detail::Head<double, decltype(bound_bias)> head{std::as_const(q2).view().head(b, h), std::as_const(k2).view().head(b, kh), std::as_const(v2).view().head(b, kh),
                                                                 &c.plan, &c.recursion, &bound_bias, 1 / std::sqrt(double(c.d)), b, h, query_length, key_length,
                                                                 detail::DropoutMask(options.dropout, options.draw, offset_t{b} * c.heads + h), 0};
            const auto d_view = std::as_const(d_out2).view().head(b, h);
            const Bounds2D bounds = error_bounds(head, &d_view, unit<T>);
            const auto add = [&](Tensor<double>& to, const std::vector<double>& from, index_t head_index, index_t heads) {
                const auto start = (static_cast<std::size_t>(b) * static_cast<std::size_t>(heads) + static_cast<std::size_t>(head_index)) * from.size();
                for (std::size_t i = 0; i < from.size(); ++i) to.values[start + i] += from[i];
            };
            add(b_out, bounds.out, h, c.heads);
            add(b_q, bounds.d_q, h, c.heads);
            add(b_k, bounds.d_k, kh, c.key_heads);
            add(b_v, bounds.d_v, kh, c.key_heads);
        }
    // Weights below the smallest normal number are flushed to 0: each takes that times a value, or times dL/dA and a query or key,
    // from an entry. Inputs are standard normal times the scale, so the other factors stay below 1e4.
    const double flushed = double(std::numeric_limits<T>::min()) * 1e4 * c.scale * (n + keys + 1);
    check_close(out, exact_out, b_out.values, "out", flushed);
    if (!backward) return;
    const auto [trained_out, saved] = fast.forward(q.view(), k.view(), v.view(), options);
    check_close(trained_out, exact_out, b_out.values, "out of forward()", flushed);
    const auto gradient = fast.backward(saved, d_out.view());
    const auto exact_gradient = exact.backward(exact_saved, d_out2.view());
    check_close(gradient.q, exact_gradient.q, b_q.values, "d_q", flushed);
    check_close(gradient.k, exact_gradient.k, b_k.values, "d_k", flushed);
    check_close(gradient.v, exact_gradient.v, b_v.values, "d_v", flushed);
}

template <class T>
void check_case(const Case& c, Random& random, bool backward = true) {
    check_case<T>(c, random, backward, Fast{AnyDiffusion{c.recursion}}, Exact{AnyDiffusion{c.recursion}});
}

const std::vector<std::pair<std::string, Recursion>>& diffusions() {
    static const std::vector<std::pair<std::string, Recursion>> all = {{"none", NoDiffusion{}.recursion()},
                                                                       {"PPR<5>", PPR<5>{}.recursion()},
                                                                       {"PPR<1>, alpha 0", PPR<1>{.alpha = 0}.recursion()},
                                                                       {"PPR<2>, alpha 1", PPR<2>{.alpha = 1}.recursion()},
                                                                       {"PPR<0>", PPR<0>{}.recursion()},
                                                                       {"HeatKernel<3>", HeatKernel<3>{}.recursion()},
                                                                       {"Polynomial<2>", Polynomial<2>{{.5, -1, 1.5}}.recursion()}};
    return all;
}

/// Sizes around the group of 16 queries and the score tiles, primes, 0 and 1.
constexpr index_t sizes[] = {0, 1, 2, 7, 15, 16, 17, 31, 33, 61};
constexpr index_t dims[] = {1, 3, 4, 8, 15, 16, 17, 40, 64};

template <class T>
void every_pattern() {
    POLYATTN_RANDOM(random);
    for (const index_t n : sizes)
        for (const NamedPlan& named : every_square_plan(n, random.seed())) {
            // One diffusion and one pair of dimensions each, drawn anew in every run.
            const auto& [name, recursion] = diffusions()[static_cast<std::size_t>(random.below(static_cast<index_t>(diffusions().size())))];
            Case c{named.name + " with " + name, named.plan, recursion, dims[random.below(std::size(dims))], dims[random.below(std::size(dims))]};
            if (random.below(3) == 0) c.options.weight_budget = 0;
            check_case<T>(c, random);
        }
}

}  // namespace

TEST_CASE("every pattern with some diffusion, float") { every_pattern<float>(); }
TEST_CASE("every pattern with some diffusion, double") { every_pattern<double>(); }

TEST_CASE("every diffusion on Diffuser's pattern, stored and recomputed weights") {
    POLYATTN_RANDOM(random);
    for (const auto& [name, recursion] : diffusions())
        for (const std::size_t budget : {std::size_t{0}, std::size_t{1} << 28}) {
            const index_t n = 90 + random.below(40);
            Case c{"LocalGlobalRandom with " + name, LocalGlobalRandom{.window = 16, .globals = 7, .randoms = 6, .seed = random.seed()}.plan(n, n), recursion, 24, 20};
            c.options.weight_budget = budget;
            check_case<float>(c, random);
            check_case<double>(c, random);
        }
}

TEST_CASE("batches, grouped-query heads, padding and dropout") {
    POLYATTN_RANDOM(random);
    for (const index_t n : {1, 20, 53}) {
        Case c{"LocalGlobalRandom", LocalGlobalRandom{.window = 8, .globals = 4, .randoms = 3, .seed = random.seed()}.plan(n, n), PPR<3>{}.recursion(), 12, 10, 3, 6, 2};
        c.options.key_lengths = {n, n / 2, 0};
        check_case<float>(c, random);
        c.options.draw = {.seed = random.seed(), .step = 3};
        c.options.dropout = {.weights = .3};
        check_case<float>(c, random);
        c.options.dropout = {.values = .3};
        check_case<double>(c, random);
        c.options.dropout = {.weights = .2, .values = .1};
        c.options.weight_budget = 0;
        check_case<double>(c, random);
        c.plan = Union{Strided{.stride = 4}, SlidingWindow{.window = 6, .dilation = 2}, RandomTokens{.count = 3, .seed = random.seed()}}.plan(n, n);
        check_case<float>(c, random);
    }
}

TEST_CASE("other numbers of queries than keys") {
    POLYATTN_RANDOM(random);
    for (const auto& [queries, keys] : {std::pair{1, 100}, std::pair{5, 64}, std::pair{40, 17}, std::pair{3, 0}, std::pair{0, 3}})
        for (const Plan& plan : {Dense{}.plan(queries, keys), Causal{}.plan(queries, keys), SlidingWindow{.window = 10}.plan(queries, keys),
                                 LocalGlobalRandom{.window = 8, .globals = 4, .randoms = 3}.plan(queries, keys), Strided{.stride = 5}.plan(queries, keys)}) {
            Case c{"cross", plan, NoDiffusion{}.recursion(), 16, 8, 2, 4, 1};
            if (keys > 0) c.options.key_lengths = {keys, keys / 2};
            check_case<float>(c, random);
            check_case<double>(c, random);
        }
}

TEST_CASE("sizes around the key blocks") {
    POLYATTN_RANDOM(random);
    for (const index_t keys : {79, 81, 127, 129, 161, 255, 257, 271, 273, 543, 545, 1087}) {
        Case c{"dense", Dense{}.plan(20, keys), NoDiffusion{}.recursion(), 16, 16};
        check_case<float>(c, random);
        check_case<double>(c, random);
        c.plan = Causal{}.plan(20, keys);
        check_case<float>(c, random);
    }
    // Several blocks of a stored or recomputed head: a window, listed columns and edges, each over more than one block.
    const index_t n = 620;
    for (const std::size_t budget : {std::size_t{0}, std::size_t{1} << 28}) {
        Case c{"wide", LocalGlobalRandom{.window = 560, .globals = 530, .randoms = 3, .seed = random.seed()}.plan(n, n), PPR<2>{}.recursion(), 8, 8};
        c.options.weight_budget = budget;
        c.options.key_lengths = {n - random.below(40)};
        check_case<float>(c, random);
    }
}

TEST_CASE("units of several groups share their key blocks") {
    POLYATTN_RANDOM(random);
    // Long rows: more than 1024 keys, enough queries for units of several groups, ends around groups, tiles and blocks.
    for (const index_t n : {1024, 1033, 1055}) {
        Case c{"dense", Dense{}.plan(n, n), NoDiffusion{}.recursion(), 4, 4};
        check_case<float>(c, random);
        c.plan = Causal{}.plan(n, n);
        c.options.key_lengths = {n - random.below(300)};
        check_case<float>(c, random);
    }
    const index_t n = 1040 + random.below(30);
    for (const std::size_t budget : {std::size_t{0}, std::size_t{1} << 28}) {
        Case c{"global rows", LocalGlobalRandom{.window = 16, .globals = 40, .randoms = 3, .seed = random.seed()}.plan(n, n), PPR<2>{}.recursion(), 4, 6};
        c.options.weight_budget = budget;
        check_case<float>(c, random);
    }
    Case c{"windows", SlidingWindow{.window = 100}.plan(300, 300), PPR<3>{}.recursion(), 40, 72};
    check_case<double>(c, random);
    check_case<float>(c, random);
}

TEST_CASE("one query: all ways through the keys") {
    POLYATTN_RANDOM(random);
    for (const index_t keys : {1, 15, 16, 17, 63, 64, 65, 129, 4096, 4097, 9000})
        for (const auto& [heads, key_heads] : {std::pair{1, 1}, std::pair{2, 1}, std::pair{3, 1}, std::pair{10, 2}, std::pair{17, 1}})
            for (const Plan& plan : {Dense{}.plan(1, keys), LocalGlobalRandom{.window = 40, .globals = std::min(keys, 9), .randoms = 5, .seed = random.seed()}.plan(1, keys)}) {
                if (keys > 1000 && heads > 3) continue;
                const index_t d = keys > 1000 ? 4 : dims[random.below(std::size(dims))];
                Case c{"one query", plan, NoDiffusion{}.recursion(), d, dims[random.below(std::size(dims))], 2, heads, key_heads};
                if (keys > 1) c.options.key_lengths = {keys, random.below(keys)};
                check_case<float>(c, random, keys < 1000);
                if (keys < 1000) check_case<double>(c, random, false);
            }
    // More keys and values than caches hold are fetched ahead.
    check_case<float>({"one query, far from the caches", Dense{}.plan(1, 33000), NoDiffusion{}.recursion(), 32, 32, 1, 3, 1}, random, false);
    // NaN behind the valid keys stays there; large scores and leaders far on.
    const index_t keys = 5000;
    auto q = random.tensor<float>({8, 1, 16}), k = random.tensor<float>({1, keys, 16}), v = random.tensor<float>({1, keys, 16});
    for (float& value : q.values) value *= 100;
    const Fast attention{AnyDiffusion{NoDiffusion{}.recursion()}};
    CallOptions options;
    options.plan = Dense{}.plan(1, keys);
    options.key_lengths = {keys - 100};
    const auto clean = attention(q.view(), k.view(), v.view(), options);
    for (std::size_t i = static_cast<std::size_t>(keys - 100) * 16; i < k.values.size(); ++i) k.values[i] = v.values[i] = std::numeric_limits<float>::quiet_NaN();
    CHECK(attention(q.view(), k.view(), v.view(), options).values == clean.values);
}

TEST_CASE("biases") {
    POLYATTN_RANDOM(random);
    const auto check = [&]<class Bias>(const Bias& bias, const char* name) {
        for (const index_t n : {1, 19, 40}) {
            const Recursion recursion = PPR<2>{}.recursion();
            Case c{name, LocalGlobalRandom{.window = 8, .globals = 3, .randoms = 3, .seed = random.seed()}.plan(n, n), recursion, 8, 8, 2, 2, 2};
            if (n == 40) c.options.key_lengths = {33, 40};
            const Attention<AnyDiffusion, Bias> fast{AnyDiffusion{recursion}, bias};
            const Attention<AnyDiffusion, Bias, Reference> exact{AnyDiffusion{recursion}, bias};
            check_case<float>(c, random, true, fast, exact);
            c.options.weight_budget = 0;
            check_case<double>(c, random, true, fast, exact);
        }
    };
    // By the table of distances: whole groups, listed rows and keys, edges, and other numbers of queries than keys.
    for (const Plan& plan : {Dense{}.plan(70, 70), Dense{}.plan(40, 75), Causal{}.plan(33, 60), SlidingWindow{.window = 30}.plan(100, 100), Strided{.stride = 7}.plan(64, 64),
                             GlobalTokens{.tokens = {1, 20, 40, 65}}.plan(66, 66), RandomTokens{.count = 9, .seed = random.seed()}.plan(50, 50)}) {
        Case c{"Alibi by distances", plan, NoDiffusion{}.recursion(), 8, 8, 2, 2, 2};
        check_case<float>(c, random, true, Attention<AnyDiffusion, Alibi>{AnyDiffusion{c.recursion}, Alibi(2)}, Attention<AnyDiffusion, Alibi, Reference>{AnyDiffusion{c.recursion}, Alibi(2)});
    }
    check(Alibi(2), "Alibi");
    RelativePosition table{.heads = 2, .reach = 4, .table = std::vector<double>(18)};
    for (double& entry : table.table) entry = random.normal();
    check(table, "RelativePosition");
    RelativePosition2D picture{.heads = 2, .width = 6, .reach = 2, .table = std::vector<double>(50)};
    for (double& entry : picture.table) entry = random.normal();
    check(picture, "RelativePosition2D");
    TableBias rows{[](index_t batch, index_t query, index_t key) { return (batch + 2 * query + key) % 4; }, 2, std::vector<double>(8)};
    for (double& entry : rows.table) entry = random.normal();
    check(rows, "TableBias");
    check(FunctionBias{[](index_t, index_t head, index_t query, index_t key) { return (query + 2 * key + head) % 5 - 2.; }}, "FunctionBias");
}

TEST_CASE("large scores stay finite and exact where the arithmetic allows") {
    POLYATTN_RANDOM(random);
    for (const double scale : {30., 1e3, 1e4}) {
        for (const Plan& plan : {Dense{}.plan(50, 50), LocalGlobalRandom{.window = 10, .globals = 3, .randoms = 5, .seed = random.seed()}.plan(50, 50)}) {
            Case c{"scores of 1e1 to 1e5", plan, PPR<2>{}.recursion(), 16, 16};
            c.scale = scale;
            check_case<float>(c, random);
            check_case<double>(c, random);
        }
    }
    // One key leads by thousands of nats: its value comes out to the last digits, whatever the bound allows.
    const index_t n = 40;
    Tensor<float> q({n, 4}), k({n, 4});
    const auto v = random.tensor<float>({n, 4});
    for (index_t i = 0; i < n; ++i) q.values[static_cast<std::size_t>(4 * i)] = 100;
    const index_t leader = random.below(n);
    for (index_t j = 0; j < n; ++j) k.values[static_cast<std::size_t>(4 * j)] = j == leader ? 200.f : -200.f;  // scores of +-1e4
    const Tensor<float> out = Fast{AnyDiffusion{NoDiffusion{}.recursion()}}(q.view(), k.view(), v.view());
    for (index_t i = 0; i < n * 4; ++i) {  // weight and sum are the same number; product and quotient round
        const double wanted = v.values[static_cast<std::size_t>(4 * leader + i % 4)];
        CHECK(std::abs(double(out.values[static_cast<std::size_t>(i)]) - wanted) <= 4 * unit<float> * std::abs(wanted));
    }
}

TEST_CASE("scores that rise and fall by 100 nats from tile to tile") {
    POLYATTN_RANDOM(random);
    const index_t n = 200;
    for (const double slope : {100. / 16, -100. / 16, 40., -40.}) {
        const FunctionBias bias{[slope](index_t, index_t, index_t, index_t key) { return slope * key; }};
        using Bias = std::remove_const_t<decltype(bias)>;
        for (const Plan& plan : {Dense{}.plan(n, n), SlidingWindow{.window = 60}.plan(n, n), LocalGlobalRandom{.window = 20, .globals = 5, .randoms = 5}.plan(n, n)}) {
            Case c{"rising", plan, NoDiffusion{}.recursion(), 8, 8};
            check_case<float>(c, random, true, Attention<AnyDiffusion, Bias>{AnyDiffusion{c.recursion}, bias}, Attention<AnyDiffusion, Bias, Reference>{AnyDiffusion{c.recursion}, bias});
            c.recursion = PPR<2>{}.recursion();
            check_case<float>(c, random, true, Attention<AnyDiffusion, Bias>{AnyDiffusion{c.recursion}, bias}, Attention<AnyDiffusion, Bias, Reference>{AnyDiffusion{c.recursion}, bias});
        }
    }
}

TEST_CASE("queries that see nothing of the first tiles, far below the others' references") {
    POLYATTN_RANDOM(random);
    const index_t n = 40;
    PlanBuilder builder(n, n);
    builder.tile(IndexSequence::range(0, 5), IndexSequence::range(0, 8));
    builder.tile(IndexSequence::range(0, n), IndexSequence::list({8, 10, 13, 20, 30, 31}));
    for (const double level : {-300., 300.}) {
        const FunctionBias bias{[level](index_t, index_t, index_t query, index_t) { return query % 2 ? level : 0.; }};
        using Bias = std::remove_const_t<decltype(bias)>;
        Case c{"late queries", PlanBuilder(builder).build(), PPR<2>{}.recursion(), 8, 8};
        check_case<float>(c, random, true, Attention<AnyDiffusion, Bias>{AnyDiffusion{c.recursion}, bias}, Attention<AnyDiffusion, Bias, Reference>{AnyDiffusion{c.recursion}, bias});
    }
}

TEST_CASE("pow2: relative error, exact zeros, NaN") {
    using A = xsimd::default_arch;
    const auto check = []<class T>(T, double bound, double low, double high) {
        using V = xsimd::batch<T, A>;
        constexpr std::size_t width = V::size;
        T in[width], out[width];
        double worst = 0;
        for (int step = 0; step < 200000; ++step) {
            for (std::size_t l = 0; l < width; ++l) in[l] = static_cast<T>(low + (high - low) * (step + double(l) / width) / 200000);
            detail::simd::pow2(V::load_unaligned(in)).store_unaligned(out);
            for (std::size_t l = 0; l < width; ++l) worst = std::max(worst, std::abs(double(out[l] / std::exp2(static_cast<long double>(in[l])) - 1)));
        }
        CHECK(worst < bound);
        for (std::size_t l = 0; l < width; ++l) in[l] = l % 2 ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::lowest();
        detail::simd::pow2(V::load_unaligned(in)).store_unaligned(out);
        for (const T value : out) CHECK(detail::simd::is_zero(value));
        for (std::size_t l = 0; l < width; ++l) in[l] = std::numeric_limits<T>::quiet_NaN();
        detail::simd::pow2(V::load_unaligned(in)).store_unaligned(out);
        for (const T value : out) CHECK_FALSE(detail::is_finite(value));
    };
    check(float{}, 2e-7, -125, 64);  // below, results are denormal and may be flushed
    check(double{}, 3e-16, -1021, 64);
}

TEST_CASE("NaN and infinities reach the rows that see them and no other, bit for bit") {
    POLYATTN_RANDOM(random);
    const index_t n = 70, d = 12;
    const auto same_bits = [](float a, float b) { return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b); };
    for (const NamedPlan& named : every_square_plan(n, random.seed()))
        for (const int hops : {1, 3}) {
            INFO(named.name, ", hops ", hops);
            const Recursion recursion{1, std::vector<Hop>(static_cast<std::size_t>(hops), Hop{.9, hops == 1 ? 0. : .1})};
            const Fast attention{AnyDiffusion{recursion}};
            CallOptions options;
            options.plan = named.plan;
            const auto q = random.tensor<float>({n, d}), k = random.tensor<float>({n, d}), v = random.tensor<float>({n, d}), d_out = random.tensor<float>({n, d});
            const auto clean = attention(q.view(), k.view(), v.view(), options);
            const index_t bad = random.below(n);
            const float poison = random.below(2) ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
            // Who can be touched: after each hop those that see a touched row, and the row itself by its teleport.
            std::vector<bool> touched(static_cast<std::size_t>(n), false);
            touched[static_cast<std::size_t>(bad)] = true;
            for (int hop = 0; hop < hops; ++hop) {
                std::vector<bool> next(static_cast<std::size_t>(n), false);
                for (index_t i = 0; i < n; ++i) named.plan.for_each_key(i, [&](index_t j) { if (touched[static_cast<std::size_t>(j)]) next[static_cast<std::size_t>(i)] = true; });
                if (hops > 1) next[static_cast<std::size_t>(bad)] = true;
                touched = next;
            }
            std::vector<bool> sees_key(static_cast<std::size_t>(n), false), spoiled(static_cast<std::size_t>(n), false);
            for (index_t i = 0; i < n; ++i) sees_key[static_cast<std::size_t>(i)] = named.plan.contains(i, bad);
            auto bad_v = v, bad_k = k, bad_q = q;
            for (index_t c = 0; c < d; ++c) bad_v.values[static_cast<std::size_t>(bad * d + c)] = poison;
            bad_k.values[static_cast<std::size_t>(bad * d + 3)] = std::numeric_limits<float>::quiet_NaN();
            bad_q.values[static_cast<std::size_t>(bad * d + 3)] = std::numeric_limits<float>::quiet_NaN();
            const auto from_v = attention(q.view(), k.view(), bad_v.view(), options);
            for (index_t i = 0; i < n; ++i)
                if (!touched[static_cast<std::size_t>(i)])
                    for (index_t c = 0; c < d; ++c) CHECK(same_bits(from_v.values[static_cast<std::size_t>(i * d + c)], clean.values[static_cast<std::size_t>(i * d + c)]));
                else if (hops == 1) CHECK_FALSE(detail::is_finite(from_v.values[static_cast<std::size_t>(i * d)]));
            if (hops > 1) continue;
            const auto from_k = attention(q.view(), bad_k.view(), v.view(), options), from_q = attention(bad_q.view(), k.view(), v.view(), options);
            for (index_t i = 0; i < n; ++i)
                for (index_t c = 0; c < d; ++c) {
                    const auto at = static_cast<std::size_t>(i * d + c);
                    if (sees_key[static_cast<std::size_t>(i)]) CHECK_FALSE(detail::is_finite(from_k.values[at]));
                    else CHECK(same_bits(from_k.values[at], clean.values[at]));
                    if (i != bad) CHECK(same_bits(from_q.values[at], clean.values[at]));
                }
            // Gradients: a bad row of d_out spoils d_v of the keys it sees, and d_q of its own row only.
            auto bad_d = d_out;
            bad_d.values[static_cast<std::size_t>(bad * d)] = std::numeric_limits<float>::quiet_NaN();
            const auto saved = attention.forward(q.view(), k.view(), v.view(), options).saved;
            const auto good = attention.backward(saved, d_out.view()), spoilt = attention.backward(saved, bad_d.view());
            for (index_t i = 0; i < n; ++i)
                for (index_t c = 0; c < d; ++c) {
                    const auto at = static_cast<std::size_t>(i * d + c);
                    if (i != bad) CHECK(same_bits(good.q.values[at], spoilt.q.values[at]));
                    if (!named.plan.contains(bad, i)) {
                        CHECK(same_bits(good.v.values[at], spoilt.v.values[at]));
                        CHECK(same_bits(good.k.values[at], spoilt.k.values[at]));
                    }
                }
        }
}

TEST_CASE("rows without keys: output 0, logsumexp -infinity, no gradient through them") {
    POLYATTN_RANDOM(random);
    const index_t n = 37, d = 8;
    EdgeList edges{{0}, {}};
    for (index_t i = 0; i < n; ++i) {
        if (i % 4) edges.keys.insert(edges.keys.end(), {i / 2, i / 2 + 5});
        edges.offsets.push_back(static_cast<offset_t>(edges.keys.size()));
    }
    const Fast attention{AnyDiffusion{PPR<2>{}.recursion()}};
    CallOptions options;
    options.plan = edges.plan(n, n);
    const auto q = random.tensor<float>({n, d}), v = random.tensor<float>({n, d});
    const auto [out, logsumexp] = attention.with_logsumexp(q.view(), q.view(), v.view(), options);
    const auto saved = attention.forward(q.view(), q.view(), v.view(), options).saved;
    const auto gradient = attention.backward(saved, v.view());
    for (index_t i = 0; i < n; i += 4) {
        CHECK(detail::is_empty_row(logsumexp.values[static_cast<std::size_t>(i)]));
        for (index_t c = 0; c < d; ++c) {
            CHECK(out.values[static_cast<std::size_t>(i * d + c)] == 0);
            CHECK(gradient.q.values[static_cast<std::size_t>(i * d + c)] == 0);
        }
    }
    const Fast none{AnyDiffusion{PPR<0>{}.recursion()}};
    CHECK(none(q.view(), q.view(), v.view(), options).values == v.values);
}

TEST_CASE("a bias of -infinity removes pairs, whole rows too") {
    POLYATTN_RANDOM(random);
    const index_t n = 40;
    const FunctionBias bias{[](index_t, index_t, index_t query, index_t key) {
        return query % 5 == 0 || (query + key) % 3 == 0 ? -std::numeric_limits<double>::infinity() : 0.;
    }};
    EdgeList edges{{0}, {}};
    for (index_t i = 0; i < n; ++i) {
        for (index_t j = 0; j < n; ++j)
            if (i % 5 && (i + j) % 3) edges.keys.push_back(j);
        edges.offsets.push_back(static_cast<offset_t>(edges.keys.size()));
    }
    const auto q = random.tensor<double>({n, 8});
    const auto masked = Attention{bias}(q.view(), q.view(), q.view());
    const auto listed = Attention{edges}(q.view(), q.view(), q.view());
    for (std::size_t i = 0; i < masked.values.size(); ++i) CHECK(masked.values[i] == doctest::Approx(listed.values[i]).epsilon(1e-12));
}
