// Kernel (linear) attention's SIMD kernels: against the double-precision reference within derived bounds, and bits that may not hang on what is masked, on threads or on
// old contents. Built for several architectures and under -Ofast: everything here must hold for all of them.
#include "support/layers.hpp"
#include "support/overwritten.hpp"
#include "support/random.hpp"

#include <doctest/doctest.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

using namespace polyattn;

namespace {

template <class Score, class Pattern>
auto tested_layer(const Score& score, const Pattern& pattern, const Recursion& recursion) {
    if constexpr (requires { score.denominator.epsilon; }) return Attention<Score, Pattern>{score, pattern};
    else return Attention<Score, Pattern, AnyDiffusion>{score, pattern, AnyDiffusion{recursion}};
}

}  // namespace

#include "support/kernel_cases.hpp"

namespace {

/// The layers of check_sizes(), so that nothing more is compiled.
template <class Score, class Pattern = Dense>
auto with(const Recursion& recursion, const Score& score = {}) {
    return tested_layer(score, Pattern{}, recursion);
}
const Recursion once = NoDiffusion{}.recursion(), twice = PPR<2>{}.recursion();

}  // namespace

// Numbers, maps, patterns and denominators take turns, since each quadruple is a layer to compile; kernels get the denominator as data.
TEST_CASE_TEMPLATE("simd against reference: ReLU", T, float, double) {
    POLYATTN_RANDOM(random);
    check_sizes<T>(random, Kernel<ReLU, ExactOrMean>{}, Dense{});
    if constexpr (std::is_same_v<T, float>) {
        check_sizes<T>(random, Kernel<ReLU, ExactOrMean>{}, Causal{});
        check_sizes<T>(random, Kernel<ReLU, AddEpsilon>{}, Causal{});
    } else {
        check_sizes<T>(random, Kernel<ReLU, ExactOrZero>{}, Causal{});
        // Long sums of several chunks.
        for (const auto& [queries, keys] : {std::pair{5, 4100}, {4100, 5}}) check_against_reference<T>(random, Kernel<ReLU, ExactOrMean>{}, Dense{}, once, queries, keys, 3, 2, true);
    }
}
TEST_CASE_TEMPLATE("simd against reference: ELU + 1", T, float, double) {
    POLYATTN_RANDOM(random);
    check_sizes<T>(random, Kernel<EluPlusOne, ExactOrZero>{}, Dense{});
    check_sizes<T>(random, Kernel<EluPlusOne, ExactOrZero>{}, Causal{});
}
TEST_CASE_TEMPLATE("simd against reference: random features, causal and not", T, float, double) {
    POLYATTN_RANDOM(random);
    check_sizes<T>(random, Kernel<PositiveRandomFeatures, ExactOrZero>{{.features = 19, .seed = random.seed()}}, Dense{});
    check_sizes<T>(random, Kernel<PositiveRandomFeatures, ExactOrZero>{{.seed = random.seed()}}, Causal{});
}
TEST_CASE("simd against reference: a caller's map") {
    POLYATTN_RANDOM(random);
    check_sizes<double>(random, Kernel<Quartic>{}, Dense{});
}

TEST_CASE_TEMPLATE("causal: later tokens, even NaN, change no bit of earlier outputs and gradients", Score, Kernel<ReLU, ExactOrMean>, Kernel<EluPlusOne, ExactOrZero>, Kernel<PositiveRandomFeatures, ExactOrZero>) {
    POLYATTN_RANDOM(random);
    const index_t n = 75, d = 6, e = 5;
    const auto check = [&](const auto& layer) {
        auto q = random.tensor<float>({n, d}), k = random.tensor<float>({n, d}), v = random.tensor<float>({n, e});
        const auto out = layer(q.view(), k.view(), v.view());
        const index_t changed = random.below(n);
        const float value = random.below(2) ? std::numeric_limits<float>::quiet_NaN() : 7.f;
        for (auto* x : {&q, &k, &v}) x->values[static_cast<std::size_t>(changed * x->shape[1])] = value;
        const auto other = layer(q.view(), k.view(), v.view());
        INFO("token ", changed, " became ", value);
        CHECK(std::equal(out.values.begin(), out.values.begin() + changed * e, other.values.begin()));
        // And backwards: what a query's gradient says does not reach later keys.
        auto d_out = random.tensor<float>({n, e});
        q = random.tensor<float>({n, d}), k = random.tensor<float>({n, d}), v = random.tensor<float>({n, e});
        const auto saved = layer.forward(q.view(), k.view(), v.view()).saved;
        const auto before = layer.backward(saved, d_out.view());
        d_out.values[static_cast<std::size_t>(changed * e)] = value;
        const auto after = layer.backward(saved, d_out.view());
        CHECK(std::equal(before.k.values.begin() + (changed + 1) * d, before.k.values.end(), after.k.values.begin() + (changed + 1) * d));
        CHECK(std::equal(before.v.values.begin() + (changed + 1) * e, before.v.values.end(), after.v.values.begin() + (changed + 1) * e));
    };
    for (int repeat = 0; repeat < 10; ++repeat) {
        check(with<Score, Causal>(once));
        check(with<Score, Causal>(twice));
    }
}

TEST_CASE_TEMPLATE("queries without a part in any sum spoil nobody's gradient", T, float, double) {
    POLYATTN_RANDOM(random);
    const auto finite = [](const auto& values) { return std::all_of(values.begin(), values.end(), [](T x) { return detail::is_finite(x); }); };
    for (const index_t n : {5, 20, 70}) {
        const index_t row = random.below(n), d = 5;
        auto q = random.tensor<T>({n, d}), k = random.tensor<T>({n, d}), v = random.tensor<T>({n, 3}), d_out = random.tensor<T>({n, 3});
        const auto at = [&](Tensor<T>& x) { return x.values.begin() + row * x.shape[1]; };
        CallOptions padded;
        padded.key_lengths = {n - 1};
        padded.query_lengths = {n};
#if !(defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
        // An infinite feature makes the denominator infinite, its inverse 0.
        at(q)[2] = std::numeric_limits<T>::infinity();
        const auto infinite = [&](const auto& layer, const CallOptions& options) {
            INFO("row ", row, " of ", n);
            const auto gradient = layer.backward(layer.forward(q.view(), k.view(), v.view(), options).saved, d_out.view());
            CHECK(finite(gradient.q.values));
            CHECK(finite(gradient.k.values));
            CHECK(finite(gradient.v.values));
        };
        infinite(with<Kernel<EluPlusOne, ExactOrZero>>(once), {});
        infinite(with<Kernel<EluPlusOne, ExactOrZero>>(once), padded);
        infinite(with<Kernel<EluPlusOne, ExactOrZero>, Causal>(once), {});
        infinite(with<Kernel<EluPlusOne, ExactOrZero>, Causal>(once), padded);
#endif
        // A row that is a mean of the values hangs on no key: a gradient of NaN reaches values alone.
        std::fill_n(at(q), d, T(-1));
        std::fill_n(at(d_out), 3, std::numeric_limits<T>::quiet_NaN());
        const auto mean = [&](const auto& layer, const CallOptions& options) {
            INFO("row ", row, " of ", n);
            const auto gradient = layer.backward(layer.forward(q.view(), k.view(), v.view(), options).saved, d_out.view());
            CHECK(finite(gradient.q.values));
            CHECK(finite(gradient.k.values));
            CHECK(!detail::is_finite(gradient.v.values[0]));
        };
        mean(with<Kernel<ReLU, ExactOrMean>>(once), {});
        mean(with<Kernel<ReLU, ExactOrMean>>(once), padded);
        mean(with<Kernel<ReLU, ExactOrMean>, Causal>(once), {});
    }
}

TEST_CASE("padding never counts, whatever it holds") {
    POLYATTN_RANDOM(random);
    const index_t n = 90, valid = 41;
    auto q = random.tensor<float>({1, 1, n, 8}), k = q, v = q;
    const CallOptions options{.key_lengths = {valid}};
    const auto check = [&](const auto& layer) {
        const auto before = layer.forward(q.view(), k.view(), v.view(), options);
        const auto d_before = layer.backward(before.saved, q.view());
        auto bad = q;
        std::fill(bad.values.begin() + valid * 8, bad.values.end(), std::numeric_limits<float>::quiet_NaN());
        const auto after = layer.forward(bad.view(), bad.view(), bad.view(), options);
        const auto d_after = layer.backward(after.saved, q.view());
        CHECK(before.out.values == after.out.values);
        CHECK(std::all_of(after.out.values.begin() + valid * 8, after.out.values.end(), [](float x) { return x == 0; }));
        CHECK(d_before.q.values == d_after.q.values);
        CHECK(d_before.k.values == d_after.k.values);
        CHECK(d_before.v.values == d_after.v.values);
    };
    check(with<Kernel<ReLU, ExactOrMean>>(once));
    check(with<Kernel<ReLU, AddEpsilon>, Causal>(once));
    check(with<Kernel<EluPlusOne, ExactOrZero>>(twice));
    check(with<Kernel<PositiveRandomFeatures, ExactOrZero>>(once));
}

TEST_CASE("gradients overwrite what is there") {
    POLYATTN_RANDOM(random);
    CallOptions lengths;
    lengths.key_lengths = {33, 0};
    for (const index_t d : {5, 16, 32}) {
        check_overwrites<float>(with<Kernel<ReLU, ExactOrMean>>(once), random, 33, 33, d, d, lengths);
        check_overwrites<float>(with<Kernel<EluPlusOne, ExactOrZero>>(once), random, 70, 129, d, 16);
        check_overwrites<float>(with<Kernel<ReLU, ExactOrMean>>(twice), random, 40, 40, d, d, lengths);
        check_overwrites<double>(with<Kernel<ReLU, AddEpsilon>, Causal>(once), random, 70, 33, d, d);  // queries in front of the first key
        check_overwrites<float>(with<Kernel<ReLU, AddEpsilon>, Causal>(once), random, 33, 33, d, d, lengths);
        check_overwrites<float>(with(once, Kernel<PositiveRandomFeatures, ExactOrZero>{{.features = 16}}), random, 33, 65, d, d);
        check_overwrites<float>(with<Kernel<ReLU, ExactOrMean>>(PPR<0>{}.recursion()), random, 9, 9, d, d);
    }
}

TEST_CASE("the same bits for one thread and several") {
#if defined(_OPENMP)
    POLYATTN_RANDOM(random);
    const index_t n = 5001;
    const auto q = random.tensor<float>({1, 1, n, 24}), k = random.tensor<float>({1, 1, n, 24}), v = random.tensor<float>({1, 1, n, 16}), d_out = random.tensor<float>({1, 1, n, 16});
    const auto run = [&](const auto& layer, int threads) {
        omp_set_num_threads(threads);
        auto [out, saved] = layer.forward(q.view(), k.view(), v.view());
        const auto gradient = layer.backward(saved, d_out.view());
        auto all = out.values;
        for (const auto* part : {&gradient.q, &gradient.k, &gradient.v}) all.insert(all.end(), part->values.begin(), part->values.end());
        return all;
    };
    const auto check = [&](const auto& layer) {
        const auto one = run(layer, 1);
        CHECK(run(layer, 2) == one);
        CHECK(run(layer, 3) == one);
    };
    const int threads = omp_get_max_threads();
    check(with<Kernel<ReLU, ExactOrMean>>(once));
    check(with<Kernel<ReLU, ExactOrMean>>(twice));
    check(with(once, Kernel<PositiveRandomFeatures, ExactOrZero>{{.features = 40}}));
    omp_set_num_threads(threads);
#endif
}
