// SIMD kernels against the double-precision reference, within derived bounds and an estimated allowance for flushed weights. Built once for each architecture and once under
// -Ofast: everything here must hold for all of them.
#include "support/biases.hpp"

using Tested = Fast;

namespace {

using polyattn::index_t;

/// Sizes around the group of 16 queries and the score tiles, primes, 0 and 1.
constexpr index_t sizes[] = {0, 1, 2, 7, 15, 16, 17, 31, 33, 61};
constexpr index_t dims[] = {1, 3, 4, 8, 15, 16, 17, 40, 64};

}  // namespace

#include "support/softmax_table.hpp"

TEST_CASE("biases: by distance, learned and not, and by a function") {  // the other kinds: biases.cpp
    POLYATTN_RANDOM(random);
    // By the table of distances: whole groups, listed rows and keys, edges, and other numbers of queries than keys.
    for (const Plan& plan : {Dense{}.plan(70, 70), Dense{}.plan(40, 75), Causal{}.plan(33, 60), SlidingWindow{.window = 30}.plan(100, 100), Strided{.stride = 7}.plan(64, 64),
                             GlobalTokens{.tokens = {1, 20, 40, 65}}.plan(66, 66), RandomTokens{.count = 9, .seed = random.seed()}.plan(50, 50)})
        check_bias<float>(Case{"Alibi by distances", plan, NoDiffusion{}.recursion(), 8, 8, 2, 2, 2}, random, Alibi(2));
    check_bias<float>("Alibi", random, Alibi(2));
    check_bias<double>("RelativePosition", random, RelativePosition{.heads = 2, .reach = 4, .table = random_table(random, 18)});
    check_bias<float>("FunctionBias", random, AnyBias{[](index_t, index_t head, index_t query, index_t key) { return (query + 2 * key + head) % 5 - 2.; }});
}

TEST_CASE("scores that rise and fall by 100 nats from tile to tile") {
    POLYATTN_RANDOM(random);
    const index_t n = 200;
    for (const double slope : {100. / 16, -100. / 16, 40., -40.}) {
        const AnyBias bias{[slope](index_t, index_t, index_t, index_t key) { return slope * key; }};
        for (const Plan& plan : {Dense{}.plan(n, n), SlidingWindow{.window = 60}.plan(n, n), LocalGlobalRandom{.window = 20, .globals = 5, .randoms = 5}.plan(n, n)}) {
            Case c{"rising", plan, NoDiffusion{}.recursion(), 8, 8};
            check_bias<float>(c, random, bias);
            c.recursion = PPR<2>{}.recursion();
            check_bias<float>(c, random, bias);
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
        const AnyBias bias{[level](index_t, index_t, index_t query, index_t) { return query % 2 ? level : 0.; }};
        Case c{"late queries", PlanBuilder(builder).build(), PPR<2>{}.recursion(), 8, 8};
        check_bias<float>(c, random, bias);
    }
}

TEST_CASE("one hop over ranges of keys: sizes around tiles of 16 and 32, biases, padding") {
    POLYATTN_RANDOM(random);
    for (const index_t n : {15, 31, 32, 33, 63, 65, 96, 131})
        for (const Plan& plan : {Dense{}.plan(n, n), Causal{}.plan(n, n), SlidingWindow{.window = 50}.plan(n, n), Dense{}.plan(n, 2 * n + 5), BlockLocal{.block = 37}.plan(n, n)}) {
            Case c{"one hop", plan, NoDiffusion{}.recursion(), dims[random.below(std::size(dims))], dims[random.below(std::size(dims))], 2, 2, 1};
            check_case<float>(c, random);
            c.options.key_lengths = {plan.keys(), plan.keys() - n / 3};
            check_case<float>(c, random, false);
            check_bias<float>(c, random, Alibi(2));
        }
    check_case<float>({"many keys", Causal{}.plan(200, 1100), NoDiffusion{}.recursion(), 5, 20}, random, false);
}

TEST_CASE("queries of one tile that see far-apart keys") {
    POLYATTN_RANDOM(random);
    const index_t n = 700;
    for (const bool by_group : {false, true}) {  // groups of 16 queries, or neighbours
        PlanBuilder builder(n, n);
        builder.range([&](index_t i) { return (by_group ? i / 16 : i) % 2 == 0 ? Bounds{i % 5, 40} : Bounds{600 + i % 3, n}; });
        for (const Recursion& recursion : {NoDiffusion{}.recursion(), PPR<2>{}.recursion()}) check_case<float>({"far apart", PlanBuilder(builder).build(), recursion, 5, 6}, random);
    }
}

TEST_CASE("gradients do not depend on what scratch memory held: gaps between the keys of a group") {
    POLYATTN_RANDOM(random);
    const index_t n = 1088;
    PlanBuilder builder(n, n);
    builder.range([](index_t i) {
        if (i < 32) return i == 15 ? Bounds{540, 552} : Bounds{0, 8};
        if (i < 64) return i % 2 ? Bounds{96, 112} : Bounds{1080, 1088};
        return Bounds{i, i + 1};
    });
    const auto check = [&]<class T>(T) {
        const Fast layer{AnyDiffusion{PPR<2>{}.recursion()}};
        const auto q = random.tensor<T>({n, 8});
        Tensor<T> soil({n, 8});
        std::fill(soil.values.begin(), soil.values.end(), std::numeric_limits<T>::quiet_NaN());
        Workspace soiled;
        CallOptions options;
        options.plan = PlanBuilder(builder).build();
        const auto clean = layer.backward(layer.forward(q.view(), q.view(), q.view(), options).saved, q.view());
        const auto saved = layer.forward(q.view(), q.view(), q.view(), options).saved;
        options.workspace = &soiled;
        layer.backward(layer.forward(soil.view(), soil.view(), soil.view(), options).saved, soil.view(), options);
        const auto again = layer.backward(saved, q.view(), options);
        CHECK(again.q.values == clean.q.values);
        CHECK(again.k.values == clean.k.values);
        CHECK(again.v.values == clean.v.values);
    };
    check(float{});
    check(double{});
}

TEST_CASE("large values that a query does not see leave its gradients alone") {
    POLYATTN_RANDOM(random);
    const index_t n = 16, dim = 8;
    const auto q = random.tensor<float>({n, dim}), k = random.tensor<float>({n, dim}), d_out = random.tensor<float>({n, dim}, 10);
    auto v = random.tensor<float>({n, dim}), plain = v;
    std::fill(v.values.begin() + 13 * dim, v.values.end(), 1e38f);
    const Fast layer{AnyDiffusion{NoDiffusion{}.recursion()}};
    for (const Plan& plan : {Dense{}.plan(n, n), Causal{}.plan(n, n)}) {
        CallOptions options;
        options.plan = plan;
        options.key_lengths = {13};
        const auto padded = layer.backward(layer.forward(q.view(), k.view(), v.view(), options).saved, d_out.view());
        const auto wanted = layer.backward(layer.forward(q.view(), k.view(), plain.view(), options).saved, d_out.view());
        CHECK(padded.q.values == wanted.q.values);
        CHECK(padded.k.values == wanted.k.values);
        CHECK(padded.v.values == wanted.v.values);
    }
    const auto causal = [&](const Tensor<float>& values) {
        const Attention<Causal> attention;
        auto upstream = d_out;
        std::fill(upstream.values.begin() + 13 * dim, upstream.values.end(), 0.f);
        return attention.backward(attention.forward(q.view(), k.view(), values.view()).saved, upstream.view()).q.values;
    };
    const auto got = causal(v), wanted = causal(plain);
    CHECK(std::equal(got.begin(), got.begin() + 13 * dim, wanted.begin()));
}

TEST_CASE("decoding reads no more of a cache than its valid keys, whatever the strides") {
    POLYATTN_RANDOM(random);
    const index_t capacity = 20000, valid = 70;
    for (const auto& [dim, stride] : {std::pair{64, 1024}, std::pair{64, 64}, std::pair{20, 20}, std::pair{20, 1024}, std::pair{15, 15}}) {
        const auto q = random.tensor<float>({1, dim});
        Tensor<float> cache({capacity, stride});
        std::fill(cache.values.begin(), cache.values.end(), std::numeric_limits<float>::quiet_NaN());
        auto packed = random.tensor<float>({valid, dim});
        for (index_t i = 0; i < valid; ++i) std::copy_n(packed.data() + i * dim, dim, cache.data() + offset_t{i} * stride);
        const Fast layer{AnyDiffusion{NoDiffusion{}.recursion()}};
        Workspace workspace;
        CallOptions options;
        options.workspace = &workspace;
        options.plan = Dense{}.plan(1, valid);
        const auto wanted = layer(q.view(), packed.view(), packed.view(), options);
        options.plan = Dense{}.plan(1, capacity);
        options.key_lengths = {valid};
        const auto view = tensor_view<const float>(cache.data(), {capacity, dim}, {stride, 1});
        CHECK(layer(q.view(), view, view, options).values == wanted.values);
        CHECK(workspace.capacity() < 256u << 10);
    }
}

TEST_CASE("numbers that are infinite, or nearly so, reach whoever sees them and nobody else") {
    POLYATTN_RANDOM(random);
    const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    const index_t n = 80, dim = 20, odd = 40 + random.below(20);
    const auto q = random.tensor<float>({n, dim}), k = random.tensor<float>({n, dim}), v = random.tensor<float>({n, dim});
    const Attention<Causal> layer;
    const auto plain = layer(q.view(), k.view(), v.view());
    const auto at = [&](index_t row, index_t column) { return static_cast<std::size_t>(row * dim + column); };
    const auto same_rows = [&](const Tensor<float>& out, index_t first, index_t last) {
        return std::equal(out.values.begin() + first * dim, out.values.begin() + last * dim, plain.values.begin() + first * dim);
    };
    for (const float value : {infinity, -infinity, nan, 3e30f}) {
        auto values = v;
        values.values[at(odd, 3)] = value;
        const auto out = layer(q.view(), k.view(), values.view());
        CHECK(same_rows(out, 0, odd));
        bool right = true;
        for (index_t i = odd; i < n; ++i)
            for (index_t c = 0; c < dim; ++c) {
                const float x = out.values[at(i, c)];
                // Whole vectors of a row may be summed in another way once a row of values is not finite.
                if (c != 3) right &= std::abs(x - plain.values[at(i, c)]) <= 1e-5f;
                else if (detail::is_finite(value)) right &= x > 1e20f && x < value;
                else right &= detail::is_nan(value) ? detail::is_nan(x) : std::bit_cast<std::uint32_t>(x) == std::bit_cast<std::uint32_t>(value);
            }
        CHECK(right);
    }
    for (const float value : {infinity, nan, 3e30f}) {
        auto keys = k, queries = q;
        for (index_t c = 0; c < dim; ++c) keys.values[at(odd, c)] = c == 5 ? value : 0;
        const auto out = layer(q.view(), keys.view(), v.view());
        CHECK(same_rows(out, 0, odd));
        bool right = true;
        for (index_t i = odd; i < n; ++i) {
            const float x = out.values[at(i, 1)];
            if (detail::is_nan(value)) right &= detail::is_nan(x);
            else if (q.values[at(i, 5)] < 0) right &= detail::is_finite(x);
            else if (detail::is_finite(value)) right &= std::abs(x - v.values[at(odd, 1)]) <= 4 * 0x1p-24f * std::abs(v.values[at(odd, 1)]);  // p v / p
            else right &= detail::is_nan(x);  // infinity - infinity
        }
        CHECK(right);
        queries.values[at(odd, 5)] = value;
        const auto others = layer(queries.view(), k.view(), v.view());
        CHECK(same_rows(others, 0, odd));
        CHECK(same_rows(others, odd + 1, n));
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

TEST_CASE("a bias of -infinity removes pairs, whole rows too") {
    POLYATTN_RANDOM(random);
    const index_t n = 40;
    const AnyBias bias{[](index_t, index_t, index_t query, index_t key) {
        return query % 5 == 0 || (query + key) % 3 == 0 ? -std::numeric_limits<double>::infinity() : 0.;
    }};
    EdgeList edges{{0}, {}};
    for (index_t i = 0; i < n; ++i) {
        for (index_t j = 0; j < n; ++j)
            if (i % 5 && (i + j) % 3) edges.keys.push_back(j);
        edges.offsets.push_back(static_cast<offset_t>(edges.keys.size()));
    }
    const auto q = random.tensor<double>({n, 8});
    const AnyDiffusion plain{NoDiffusion{}.recursion()};
    const auto masked = Attention{plain, bias}(q.view(), q.view(), q.view());
    const auto listed = Attention{plain}(q.view(), q.view(), q.view(), {.plan = edges.plan(n, n)});
    for (std::size_t i = 0; i < masked.values.size(); ++i) CHECK(masked.values[i] == doctest::Approx(listed.values[i]).epsilon(1e-12));
}
