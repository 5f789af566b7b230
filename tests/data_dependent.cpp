// Patterns made from q and k: hashing, clusters, Sinkhorn matching; and the Synthesizer, which looks at neither.
#include "support/errors.hpp"
#include "support/layers.hpp"
#include "support/random.hpp"

#include <polyattn/policy/bias/bias.hpp>
#include <polyattn/policy/pattern/data_dependent.hpp>

#include <doctest/doctest.h>

using namespace polyattn;

namespace {

/// Softmax attention of one head over a plan, in double.
Tensor<double> along(const Plan& plan, MatrixView<const double> q, MatrixView<const double> k, MatrixView<const double> v, index_t valid) {
    Tensor<double> out({q.rows, v.cols});
    for (index_t i = 0; i < valid; ++i) {
        std::vector<std::pair<index_t, double>> row;
        double sum = 0;
        plan.for_each_key(i, [&](index_t j) {
            double dot = 0;
            for (index_t c = 0; c < q.cols; ++c) dot += q(i, c) * k(j, c);
            row.emplace_back(j, std::exp(dot / std::sqrt(double(q.cols))));
            sum += row.back().second;
        });
        for (const auto& [j, weight] : row)
            for (index_t c = 0; c < v.cols; ++c) out.view().head(0, 0)(i, c) += weight / sum * v(j, c);
    }
    return out;
}

template <class Pattern>
void check_layer(Random& random, const Pattern& pattern) {
    const index_t n = 45, d = 6, e = 5, batch = 2, heads = 4, key_heads = 2;
    const auto q = random.tensor<double>({batch, heads, n, d}), k = random.tensor<double>({batch, key_heads, n, d}), v = random.tensor<double>({batch, key_heads, n, e}), d_out = random.tensor<double>({batch, heads, n, e});
    const CallOptions options{.key_lengths = {n, 31}};
    const Attention<Pattern> fast{pattern};
    const Attention<Pattern, Reference> exact{pattern};
    const auto [out, saved] = fast.forward(q.view(), k.view(), v.view(), options);
    const auto [exact_out, exact_saved] = exact.forward(q.view(), k.view(), v.view(), options);
    for (index_t b = 0; b < batch; ++b)
        for (index_t h = 0; h < heads; ++h) {
            const index_t valid = options.key_lengths[static_cast<std::size_t>(b)];
            const Plan plan = pattern.plan_for(q.view().head(b, h), k.view().head(b, h / 2), valid, valid, {});
            CHECK(plan.is_disjoint());
            CHECK(saved.plan(b, h).count() == plan.count());
            const auto wanted = along(plan, q.view().head(b, h), k.view().head(b, h / 2), v.view().head(b, h / 2), valid);
            for (index_t i = 0; i < n; ++i)
                for (index_t c = 0; c < e; ++c) {
                    CHECK(out.view().head(b, h)(i, c) == doctest::Approx(wanted.view().head(0, 0)(i, c)).epsilon(1e-11));
                    CHECK(exact_out.view().head(b, h)(i, c) == doctest::Approx(wanted.view().head(0, 0)(i, c)).epsilon(1e-11));
                }
        }
    const auto gradient = fast.backward(saved, d_out.view()), exact_gradient = exact.backward(exact_saved, d_out.view());
    for (std::size_t i = 0; i < gradient.k.values.size(); ++i) CHECK(gradient.k.values[i] == doctest::Approx(exact_gradient.k.values[i]).epsilon(1e-10));
    // Diffusion on it, and a plan of one's own instead.
    const Attention<Pattern, PPR<3>> diffused{pattern};
    CHECK(diffused(q.view(), k.view(), v.view(), options).values != out.values);
    CHECK(fast(q.view(), k.view(), v.view(), {.plan = Dense{}.plan(n, n)}).values == Attention<>{}(q.view(), k.view(), v.view()).values);
}

}  // namespace

TEST_CASE("layers build a plan for each head") {
    POLYATTN_RANDOM(random);
    check_layer(random, LocalitySensitiveHashing{.buckets = 4, .rounds = 2, .seed = random.seed()});
    check_layer(random, LocalitySensitiveHashing{.buckets = 6, .rounds = 1, .causal = true, .seed = random.seed()});
    check_layer(random, RoutedClusters{.clusters = 4});
    check_layer(random, SinkhornBlocks{.block = 8});
}

TEST_CASE("hashing: lengths don't matter, opposite vectors part, close ones meet") {
    POLYATTN_RANDOM(random);
    const index_t n = 40, d = 8;
    const auto x = random.tensor<double>({n, d});
    auto longer = x, opposite = x;
    for (double& entry : longer.values) entry *= 3.5;
    for (double& entry : opposite.values) entry = -entry;
    const LocalitySensitiveHashing hash{.buckets = 8, .rounds = 1, .seed = random.seed()};
    const auto of = [&](const Tensor<double>& t, index_t round) { return hash.buckets_of(std::as_const(t).view().head(0, 0), n, round); };
    CHECK(of(x, 0) == of(longer, 0));
    CHECK(of(x, 0) != of(x, 1));
    for (index_t i = 0; i < n; ++i) CHECK(of(opposite, 0)[static_cast<std::size_t>(i)] == (of(x, 0)[static_cast<std::size_t>(i)] + 4) % 8);
    // More rounds see more pairs, each once; every token sees itself.
    offset_t before = 0;
    for (const index_t rounds : {1, 2, 4}) {
        const Plan plan = LocalitySensitiveHashing{.buckets = 8, .rounds = rounds, .seed = 3}.plan_for(x.view().head(0, 0), x.view().head(0, 0), n, n, {});
        CHECK(plan.is_disjoint());
        CHECK(plan.count() > before);
        before = plan.count();
        for (index_t i = 0; i < n; ++i) CHECK(plan.contains(i, i));
    }
    // Two buckets are the sides of one random hyperplane: vectors at angle t share one with probability 1 - t / pi.
    Tensor<double> pair({2, 2});
    const double angle = .3 + 2.4 * random.uniform();
    pair.values = {1, 0, std::cos(angle), std::sin(angle)};
    const int repeats = 4000;
    double met = 0;
    for (int r = 0; r < repeats; ++r) {
        const auto buckets = LocalitySensitiveHashing{.buckets = 2, .seed = random.seed()}.buckets_of(std::as_const(pair).view().head(0, 0), 2, 0);
        met += buckets[0] == buckets[1];
    }
    const double p = 1 - angle / 3.14159265358979;
    CHECK(std::abs(met / repeats - p) < 7 * std::sqrt(p * (1 - p) / repeats));  // of a binomial: once in 4e11
}

TEST_CASE("hashing, causal: later tokens change no bit of earlier outputs") {
    POLYATTN_RANDOM(random);
    const index_t n = 50, d = 6;
    const Attention layer{LocalitySensitiveHashing{.buckets = 4, .rounds = 3, .causal = true, .seed = random.seed()}};
    for (int repeat = 0; repeat < 10; ++repeat) {
        auto x = random.tensor<float>({n, d}), v = random.tensor<float>({n, d});
        const auto before = layer(x.view(), x.view(), v.view());
        const index_t changed = random.below(n);
        for (auto* tensor : {&x, &v}) tensor->values[static_cast<std::size_t>(changed * d)] += 3;
        const auto after = layer(x.view(), x.view(), v.view());
        CHECK(std::equal(before.values.begin(), before.values.begin() + changed * d, after.values.begin()));
    }
}

TEST_CASE("hashing, causal: lengths of queries and keys move no position where both are equally many") {
    POLYATTN_RANDOM(random);
    const index_t n = 12;
    const Attention layer{LocalitySensitiveHashing{.buckets = 2, .rounds = 40, .causal = true, .seed = random.seed()}};  // nearly every pair
    const auto x = random.tensor<float>({1, 1, n, 3});
    for (const auto& [queries, keys] : {std::pair{7, n}, std::pair{n, 7}, std::pair{9, 9}}) {
        const Plan plan = layer.forward(x.view(), x.view(), x.view(), {.key_lengths = {keys}, .query_lengths = {queries}}).saved.plan();
        for (index_t i = 0; i < n; ++i) {
            plan.for_each_key(i, [&](index_t j) { CHECK(j <= i); });
            CHECK(plan.contains(i, i) == (i < std::min(queries, keys)));
        }
    }
}

TEST_CASE("clusters: keys that lie apart are seen by the queries beside them alone") {
    POLYATTN_RANDOM(random);
    const index_t n = 30, d = 3;
    auto q = random.tensor<double>({n, d}, .01), k = random.tensor<double>({n, d}, .01);
    for (index_t i = 0; i < n; ++i) {
        q.values[static_cast<std::size_t>(i * d)] += 5. * (i % 3);
        k.values[static_cast<std::size_t>(i * d)] += 5. * (i % 3);
    }
    const Plan plan = RoutedClusters{.clusters = 3}.plan_for(std::as_const(q).view().head(0, 0), std::as_const(k).view().head(0, 0), n, n, {});
    for (index_t i = 0; i < n; ++i)
        for (index_t j = 0; j < n; ++j) CHECK(plan.contains(i, j) == (i % 3 == j % 3));
}

TEST_CASE("Sinkhorn: a doubly stochastic matrix, and the matching that was put in") {
    POLYATTN_RANDOM(random);
    const index_t blocks = 5, block = 4, n = blocks * block, d = 16;
    auto k = random.tensor<double>({n, d}, .05), q = k;
    for (index_t b = 0; b < blocks; ++b)
        for (index_t i = 0; i < block; ++i) k.values[static_cast<std::size_t>((b * block + i) * d + b)] += 3;
    // Query block b is like key block b + 2.
    for (index_t i = 0; i < n; ++i)
        for (index_t c = 0; c < d; ++c) q.values[static_cast<std::size_t>(i * d + c)] = k.values[static_cast<std::size_t>((i + 2 * block) % n * d + c)];
    const SinkhornBlocks pattern{.block = block};
    // Columns come last, so they sum to 1; rows do in the limit, soon where the entries are near each other.
    const auto weights = SinkhornBlocks{.block = block, .iterations = 40, .temperature = 30}.matching_weights(std::as_const(q).view().head(0, 0), std::as_const(k).view().head(0, 0), n);
    for (std::size_t a = 0; a < blocks; ++a) {
        double row = 0, column = 0;
        for (std::size_t b = 0; b < blocks; ++b) {
            row += weights[a * blocks + b];
            column += weights[b * blocks + a];
        }
        CHECK(row == doctest::Approx(1).epsilon(1e-9));
        CHECK(column == doctest::Approx(1).epsilon(1e-12));
    }
    const Plan plan = pattern.plan_for(std::as_const(q).view().head(0, 0), std::as_const(k).view().head(0, 0), n, n, {});
    for (index_t i = 0; i < n; ++i)
        for (index_t j = 0; j < n; ++j) CHECK(plan.contains(i, j) == (j / block == i / block || j / block == (i / block + 2) % blocks));
}

TEST_CASE("random Synthesizer: softmax(R) V, with R as a learned table and q = 0") {
    // Source: Tay et al., "Synthesizer" (2021), section 3.1, random synthesizer.
    POLYATTN_RANDOM(random);
    const index_t n = 9, e = 4;
    TableBias synthesizer{[](index_t, index_t query, index_t key) { return query * 9 + key; }, 1, std::vector<double>(n * n)};
    for (double& entry : synthesizer.table) entry = random.normal();
    const Tensor<double> zeros({n, 3});
    const auto k = random.tensor<double>({n, 3}), v = random.tensor<double>({n, e}), d_out = random.tensor<double>({n, e});
    const Attention layer{synthesizer};
    const auto [out, saved] = layer.forward(zeros.view(), k.view(), v.view());
    const auto gradient = layer.backward(saved, d_out.view());
    for (std::size_t i = 0; i < n; ++i) {
        double sum = 0;
        for (std::size_t j = 0; j < n; ++j) sum += std::exp(synthesizer.table[i * n + j]);
        std::vector<double> own(e, 0), d_weight(n, 0);
        double mean = 0;
        for (std::size_t j = 0; j < n; ++j)
            for (std::size_t c = 0; c < e; ++c) {
                own[c] += std::exp(synthesizer.table[i * n + j]) / sum * v.values[j * e + c];
                d_weight[j] += d_out.values[i * e + c] * v.values[j * e + c];
            }
        for (std::size_t c = 0; c < e; ++c) CHECK(out.values[i * e + c] == doctest::Approx(own[c]).epsilon(1e-12));
        for (std::size_t j = 0; j < n; ++j) mean += std::exp(synthesizer.table[i * n + j]) / sum * d_weight[j];
        for (std::size_t j = 0; j < n; ++j) CHECK(std::abs(gradient.bias[i * n + j] - std::exp(synthesizer.table[i * n + j]) / sum * (d_weight[j] - mean)) < 1e-12);
    }
}

TEST_CASE("errors name the argument") {
    CHECK(argument([] { Attention{LocalitySensitiveHashing{.buckets = 3}}; }) == "buckets");
    CHECK(argument([] { Attention{LocalitySensitiveHashing{.rounds = 0}}; }) == "rounds");
    CHECK(argument([] { Attention{RoutedClusters{.clusters = 0}}; }) == "clusters");
    CHECK(argument([] { Attention{SinkhornBlocks{.block = 0}}; }) == "block");
    CHECK(argument([] { Attention{SinkhornBlocks{.temperature = 0}}; }) == "temperature");
    const Tensor<float> x({1, 1, 6, 4}), y({1, 1, 5, 4});
    CHECK(argument([&] { Attention<SinkhornBlocks>{}(x.view(), y.view(), y.view()); }) == "SinkhornBlocks");
}

TEST_CASE("key heads that no query head reads") {
    POLYATTN_RANDOM(random);
    const Tensor<float> q({1, 0, 20, 8});
    const auto k = random.tensor<float>({1, 1, 20, 8});
    const Attention<LocalitySensitiveHashing> layer;
    const auto [out, saved] = layer.forward(q.view(), k.view(), k.view());
    const auto gradient = layer.backward(saved, out.view());
    for (const float entry : gradient.k.values) CHECK(entry == 0);
}
