#pragma once
// What every backend's softmax must do. The including file declares `Tested`, a layer with any diffusion, and the sizes and dims to try.

#include "cases.hpp"
#include "layers.hpp"

namespace {

template <class T>
void check_case(const Case& c, Random& random, bool backward = true) {
    check_case<T>(c, random, backward, Tested{AnyDiffusion{c.recursion}}, Exact{AnyDiffusion{c.recursion}});
}

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
        // More valid queries than keys: their teleports count all the same.
        c.options.query_lengths = {n, n, n / 3};
        check_case<float>(c, random);
        c.options.dropout = {};
        c.plan = Dense{}.plan(n, n);
        check_case<double>(c, random);
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
        for (const auto& [heads, key_heads] : {std::pair{1, 1}, std::pair{2, 1}, std::pair{3, 1}, std::pair{4 + random.below(13), 1}, std::pair{10, 2}, std::pair{17, 1}})
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
    const Tested attention{AnyDiffusion{NoDiffusion{}.recursion()}};
    CallOptions options;
    options.plan = Dense{}.plan(1, keys);
    options.key_lengths = {keys - 100};
    const auto clean = attention(q.view(), k.view(), v.view(), options);
    for (std::size_t i = static_cast<std::size_t>(keys - 100) * 16; i < k.values.size(); ++i) k.values[i] = v.values[i] = std::numeric_limits<float>::quiet_NaN();
    CHECK(attention(q.view(), k.view(), v.view(), options).values == clean.values);
    // NaN among them reaches every output, in whatever part of the keys it stands.
    k = random.tensor<float>({1, keys, 16}), v = random.tensor<float>({1, keys, 16});
    for (const auto& [plan, bad] : {std::pair{Dense{}.plan(1, keys), index_t{17}}, std::pair{Dense{}.plan(1, keys), keys - 200}, std::pair{Longformer{.window = 20, .tokens = {3}}.plan(1, keys), index_t{3}},
                                    std::pair{Longformer{.window = 20, .tokens = {3}}.plan(1, keys), keys - 2}})
        for (auto* tensor : {&k, &v}) {
            options = {};
            options.plan = plan;
            const AlignedVector<float> row(tensor->values.begin() + bad * 16, tensor->values.begin() + bad * 16 + 16);
            std::fill_n(tensor->values.begin() + bad * 16, 16, std::numeric_limits<float>::quiet_NaN());
            for (const float value : attention(q.view(), k.view(), v.view(), options).values) CHECK(detail::is_nan(value));
            std::copy(row.begin(), row.end(), tensor->values.begin() + bad * 16);
        }
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
    const Tensor<float> out = Tested{AnyDiffusion{NoDiffusion{}.recursion()}}(q.view(), k.view(), v.view());
    for (index_t i = 0; i < n * 4; ++i) {  // weight and sum are the same number; product and quotient round
        const double wanted = v.values[static_cast<std::size_t>(4 * leader + i % 4)];
        CHECK(std::abs(double(out.values[static_cast<std::size_t>(i)]) - wanted) <= 4 * unit<float> * std::abs(wanted));
    }
}

TEST_CASE("NaN and infinities reach the rows that see them and no other, bit for bit") {
    POLYATTN_RANDOM(random);
    const index_t n = 70, d = 12;
    const auto same_bits = [](float a, float b) { return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b); };
    for (const NamedPlan& named : every_square_plan(n, random.seed()))
        for (const int hops : {1, 3}) {
            INFO(named.name, ", hops ", hops);
            const Recursion recursion{1, std::vector<Hop>(static_cast<std::size_t>(hops), Hop{.9, hops == 1 ? 0. : .1})};
            const Tested attention{AnyDiffusion{recursion}};
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
    const Tested attention{AnyDiffusion{PPR<2>{}.recursion()}};
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
    const Tested none{AnyDiffusion{PPR<0>{}.recursion()}};
    CHECK(none(q.view(), q.view(), v.view(), options).values == v.values);
}
