// Kernel (linear) attention: the numbers of the papers' examples, gradients by finite differences, properties, random features, token by token.
#include "support/cases.hpp"
#include "support/errors.hpp"
#include "support/finite_differences.hpp"
#include "support/random.hpp"

#include <polyattn/attention.hpp>

#include <doctest/doctest.h>

#include <functional>

#if defined(_OPENMP)
#include <omp.h>
#endif

using namespace polyattn;

namespace {

/// Every row of a column.
Tensor<double> column(AlignedVector<double> values) {
    Tensor<double> x({static_cast<offset_t>(values.size()), 1});
    x.values = std::move(values);
    return x;
}
template <class Layer>
AlignedVector<double> self(const Layer& layer, const Tensor<double>& x, index_t length = -1) {
    CallOptions options;
    if (length >= 0) options.key_lengths = {length};
    return layer(x.view(), x.view(), x.view(), options).values;
}
void check_equal(std::span<const double> got, const std::vector<double>& wanted) {
    REQUIRE(got.size() == wanted.size());
    for (std::size_t i = 0; i < got.size(); ++i) CHECK(got[i] == doctest::Approx(wanted[i]).epsilon(1e-14));
}

}  // namespace

TEST_CASE_TEMPLATE("one dimension by hand", Backend, Simd<>, Reference) {
    const Tensor<double> x = column({1, 2, 3, 4}), mixed = column({1, -2, 3, -4}), five = column({1, 2, 3, 4, 5});
    check_equal(self(Attention<Kernel<ReLU, ExactOrZero>, Backend>{}, x), {3, 3, 3, 3});
    check_equal(self(Attention<Kernel<EluPlusOne, ExactOrZero>, Backend>{}, x), {20. / 7, 20. / 7, 20. / 7, 20. / 7});
    check_equal(self(Attention<Kernel<ReLU, ExactOrZero>, Backend>{}, mixed), {2.5, 0, 2.5, 0});
    check_equal(self(Attention<Kernel<ReLU, ExactOrMean>, Backend>{}, mixed), {2.5, -.5, 2.5, -.5});
    check_equal(self(Attention<Kernel<ReLU, AddEpsilon>, Backend>{}, mixed), {10 / (4 + 1e-6), 0, 30 / (12 + 1e-6), 0});
    check_equal(self(Attention<Kernel<ReLU, ExactOrZero>, Causal, Backend>{}, x), {1, 5. / 3, 14. / 6, 3});
    check_equal(self(Attention<Kernel<ReLU, ExactOrZero>, Backend>{}, five, 3), {14. / 6, 14. / 6, 14. / 6, 0, 0});
    // A padded query is empty; with no valid key every row is.
    check_equal(self(Attention<Kernel<ReLU, ExactOrMean>, Backend>{}, five, 0), {0, 0, 0, 0, 0});
}

TEST_CASE_TEMPLATE("gradients by finite differences", Score, Kernel<ReLU, AddEpsilon>, Kernel<ReLU, ExactOrMean>, Kernel<EluPlusOne, ExactOrZero>, Kernel<PositiveRandomFeatures, ExactOrZero>) {
    POLYATTN_RANDOM(random);
    const auto check = [&](const auto& layer, index_t n, const CallOptions& options) {
        auto q = random.tensor<double>({2, 2, n, 4}), k = random.tensor<double>({2, 1, n, 4}), v = random.tensor<double>({2, 1, n, 3});
        const auto d_out = random.tensor<double>({2, 2, n, 3});
        // ReLU bends at 0: no step of a difference may cross it.
        for (auto* x : {&q, &k})
            for (double& entry : x->values) entry += entry > 0 ? .05 : -.05;
        const auto loss = [&] {
            const auto out = layer(q.view(), k.view(), v.view(), options);
            double sum = 0;
            for (std::size_t i = 0; i < out.values.size(); ++i) sum += out.values[i] * d_out.values[i];
            return sum;
        };
        const auto gradient = layer.backward(layer.forward(q.view(), k.view(), v.view(), options).saved, d_out.view());
        const auto compare = [&](auto& values, const auto& got, const char* what) {
            for (int s = 0; s < 8; ++s) {
                const auto at = static_cast<std::size_t>(random.below(static_cast<index_t>(values.size())));
                INFO(what, " entry ", at, " of ", n, " tokens");
                CHECK(std::abs(derivative(values[at], loss, 1e-4) - got[at]) < 1e-7 * (1 + std::abs(loss()) + std::abs(got[at])));
            }
        };
        compare(q.values, gradient.q.values, "q");
        compare(k.values, gradient.k.values, "k");
        compare(v.values, gradient.v.values, "v");
    };
    for (const index_t n : {1, 9, 40}) {
        CallOptions options;
        if (random.below(2)) options.key_lengths = {n, n / 2 + 1};
        check(Attention<Score>{}, n, options);
        check(Attention<Score, Causal>{}, n, options);
        if constexpr (std::is_same_v<Score, Kernel<ReLU, ExactOrMean>>) {
            options.dropout.values = .2;
            check(Attention<Score, PPR<3>>{}, n, options);
            check(Attention<Score, PPR<3>, Causal>{}, n, options);
            check(Attention<Score, PPR<3>, Reference>{}, n, options);
        }
    }
}

TEST_CASE_TEMPLATE("diffusion is a polynomial of the operator's matrix", Pattern, Dense, Causal) {
    POLYATTN_RANDOM(random);
    const index_t n = 37, d = 5, e = 4;
    const auto q = random.tensor<double>({n, d}), k = random.tensor<double>({n, d}), v = random.tensor<double>({n, e});
    Tensor<double> identity({n, n});
    for (index_t i = 0; i < n; ++i) identity.values[static_cast<std::size_t>(i * n + i)] = 1;
    const auto a = Attention<Kernel<ReLU, ExactOrMean>, Pattern>{}(q.view(), k.view(), identity.view());
    for (index_t i = 0; i < n; ++i) {
        double sum = 0;
        for (index_t j = 0; j < n; ++j) {
            const double entry = a.values[static_cast<std::size_t>(i * n + j)];
            CHECK(entry >= 0);
            sum += entry;
        }
        CHECK(std::abs(sum - 1) < (2 * n + d + 4) * 0x1p-53);
    }
    auto z = v.values;
    for (int hop = 0; hop < 4; ++hop) {
        AlignedVector<double> next(z.size());
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t c = 0; c < e; ++c) {
                for (std::size_t j = 0; j < n; ++j) next[i * e + c] += .9 * a.values[i * n + j] * z[j * e + c];
                next[i * e + c] += .1 * v.values[i * e + c];
            }
        z = next;
    }
    const auto out = Attention<Kernel<ReLU>, PPR<4>, Pattern>{}(q.view(), k.view(), v.view());
    double most = 0;
    for (const double entry : v.values) most = std::max(most, std::abs(entry));
    // All weights of a hop sum to 1: five hops of relative errors of n + d roundings, here and there.
    for (std::size_t i = 0; i < z.size(); ++i) CHECK(std::abs(out.values[i] - z[i]) < 2 * 5 * (2 * n + d + 8) * 0x1p-53 * most);
}

TEST_CASE("properties: scales cancel, constant values stay, keys may be permuted") {
    POLYATTN_RANDOM(random);
    const index_t n = 150, d = 12, e = 7;
    const auto q = random.tensor<double>({n, d}), k = random.tensor<double>({n, d}), v = random.tensor<double>({n, e});
    const Attention<Kernel<ReLU, ExactOrMean>> layer;
    const auto out = layer(q.view(), k.view(), v.view());
    auto q4 = q, k8 = k;
    for (double& entry : q4.values) entry *= 4;
    for (double& entry : k8.values) entry *= 8;
    CHECK(layer(q4.view(), k8.view(), v.view()).values == out.values);  // powers of two: to the bit
    Tensor<double> ones({n, e});
    std::fill(ones.values.begin(), ones.values.end(), 1.);
    for (const double entry : layer(q.view(), k.view(), ones.view()).values) CHECK(std::abs(entry - 1) < (2 * n + d + 4) * 0x1p-53);
    auto k_turned = k, v_turned = v;
    for (index_t i = 0; i < n; ++i) {
        std::copy_n(&k.values[static_cast<std::size_t>(i * d)], d, &k_turned.values[static_cast<std::size_t>((n - 1 - i) * d)]);
        std::copy_n(&v.values[static_cast<std::size_t>(i * e)], e, &v_turned.values[static_cast<std::size_t>((n - 1 - i) * e)]);
    }
    const auto turned = layer(q.view(), k_turned.view(), v_turned.view());
    for (std::size_t i = 0; i < out.values.size(); ++i) CHECK(std::abs(turned.values[i] - out.values[i]) < 2 * (2 * n + d + 4) * 0x1p-53 * 6.5);
}

TEST_CASE_TEMPLATE("token by token is the causal layer", T, float, double) {
    POLYATTN_RANDOM(random);
    const index_t n = 70, batch = 2, heads = 4, key_heads = 2, d = 6, e = 5;
    const auto check = [&](const auto& layer) {
        const auto q = random.tensor<T>({batch, heads, n, d}), k = random.tensor<T>({batch, key_heads, n, d}), v = random.tensor<T>({batch, key_heads, n, e});
        const auto out = layer(q.view(), k.view(), v.view());
        auto state = layer.template start<T>(batch, heads, key_heads, d, e);
        const auto token = [](const Tensor<T>& x, index_t t) {
            const TensorView<const T> all = x.view();
            return tensor_view(all.data + t * all.strides[2], {all.extents[0], all.extents[1], 1, all.extents[3]}, {all.strides[0], all.strides[1], all.strides[2], 1});
        };
        double worst = 0;
        for (index_t t = 0; t < n; ++t) {
            const auto row = layer.step(state, token(q, t), token(k, t), token(v, t));
            for (index_t b = 0; b < batch; ++b)
                for (index_t h = 0; h < heads; ++h)
                    for (index_t c = 0; c < e; ++c) worst = std::max(worst, std::abs(double(row.view().head(b, h)(0, c)) - double(out.view().head(b, h)(t, c))));
        }
        CHECK(state.tokens() == n);
        // Both are within (hops + 1) (2 n + 3 d + ..) u of values below 6.5 (normal deviates of this size are); random features carry their exponents' errors.
        CHECK(worst < 2 * 4 * (2 * n + 400) * unit<T> * 6.5);
    };
    check(Attention<Kernel<ReLU>, Causal>{});
    check(Attention<Kernel<ReLU>, PPR<2>, Causal>{});
    check(Attention<Kernel<EluPlusOne>, Causal>{});
    check(Attention<Kernel<PositiveRandomFeatures, ExactOrMean>, Causal>{});
    const Attention<Kernel<ReLU>, Causal> layer;
    auto state = layer.template start<T>(1, 2, 1, 4, 4);
    const auto wrong = random.tensor<T>({1, 2, 1, 5});
    CHECK_THROWS_AS(layer.step(state, wrong.view(), wrong.view(), wrong.view()), invalid_input);
    CHECK_THROWS_AS(layer.template start<T>(1, 3, 2, 4, 4), invalid_input);
    const auto one = random.tensor<T>({1, 1, 1, 4});
    auto others = layer.template start<T>(1, 1, 1, 4, 4);
    CHECK_THROWS_AS((Attention<Kernel<ReLU>, PPR<2>, Causal>{}.step(others, one.view(), one.view(), one.view())), invalid_input);
}

TEST_CASE("random features estimate the exponential kernel") {
    POLYATTN_RANDOM(random);
    // Over iid directions phi(q) . phi(k) has mean e^(q.k) and variance e^(2 q.k) (e^(|q + k|^2) - 1) / m (scaled by sqrt(d)), from log-normal terms. With
    // exponents this small the terms are near normal (skewness below 2, kurtosis below 10), so 7 deviations of a mean over thousands of them are passed
    // less than once in 1e9 runs.
    const index_t d = 4, m = 8, repeats = 4000;
    std::vector<double> q(d), k(d);
    for (double& entry : q) entry = .2 * (2 * random.uniform() - 1);  // |q + k|^2 / sqrt(d) below .32
    for (double& entry : k) entry = .2 * (2 * random.uniform() - 1);
    double dot = 0, square = 0;
    for (std::size_t c = 0; c < d; ++c) {
        dot += q[c] * k[c] / 2;  // sqrt(d) = 2
        square += (q[c] + k[c]) * (q[c] + k[c]) / 2;
    }
    const auto estimate = [&](bool orthogonal, std::uint64_t seed) {
        const auto directions = PositiveRandomFeatures{.features = m, .orthogonal = orthogonal, .seed = seed}.bind(d);
        const auto exponents = [&](const std::vector<double>& x) { return detail::reference::log_features(*directions, MatrixView<const double>{x.data(), 1, d, d, 1}, 0); };
        const auto a = exponents(q), b = exponents(k);
        double sum = 0;
        for (std::size_t r = 0; r < a.size(); ++r) sum += std::exp(a[r] + b[r]);
        return sum;
    };
    const double exact = std::exp(dot), variance = std::exp(2 * dot) * (std::exp(square) - 1) / m;
    double mean = 0, squares = 0, orthogonal_mean = 0, orthogonal_squares = 0;
    for (index_t s = 0; s < repeats; ++s) {
        const double iid = estimate(false, random.seed()) - exact, orthogonal = estimate(true, random.seed()) - exact;
        mean += iid / repeats;
        squares += iid * iid / repeats;
        orthogonal_mean += orthogonal / repeats;
        orthogonal_squares += orthogonal * orthogonal / repeats;
    }
    CHECK(std::abs(mean) < 7 * std::sqrt(variance / repeats));
    CHECK(std::abs(orthogonal_mean) < 7 * std::sqrt(variance / repeats));
    // Log-normal summands: the estimate's kurtosis is bounded by 3 + (e^(4 s) + 2 e^(3 s) + 3 e^(2 s) - 6) / m with s = |q + k|^2; the spread of a variance follows.
    const double kurtosis = 3 + (std::exp(4 * square) + 2 * std::exp(3 * square) + 3 * std::exp(2 * square) - 6) / m;
    CHECK(std::abs(squares / variance - 1) < 7 * std::sqrt((kurtosis - 1) / repeats));
    CHECK(orthogonal_squares < variance * (1 + 7 * std::sqrt((kurtosis - 1) / repeats)));
    // Directions of a block are orthogonal.
    const auto directions = PositiveRandomFeatures{.features = 7, .seed = random.seed()}.bind(d);
    for (index_t a = 0; a < 4; ++a)
        for (index_t b = 0; b < a; ++b) {
            double product = 0, lengths = 0;
            for (std::size_t c = 0; c < d; ++c) {
                product += directions->w[static_cast<std::size_t>(a * d) + c] * directions->w[static_cast<std::size_t>(b * d) + c];
                lengths += std::abs(directions->w[static_cast<std::size_t>(a * d) + c] * directions->w[static_cast<std::size_t>(b * d) + c]);
            }
            CHECK(std::abs(product) < 64 * d * 0x1p-53 * (lengths + 1));
        }
}

TEST_CASE("random features: rows sum to 1 with the defaults, causal or not; many features are softmax attention") {
    POLYATTN_RANDOM(random);
    for (const index_t d : {4, 64, 128}) {
        const index_t n = 60;
        const auto q = random.tensor<float>({n, d}), k = random.tensor<float>({n, d});
        Tensor<float> ones({n, 3});
        std::fill(ones.values.begin(), ones.values.end(), 1.f);
        const auto check = [&](const auto& layer) {
            for (const float value : layer(q.view(), k.view(), ones.view()).values) CHECK(std::abs(value - 1) < 1e-3);
        };
        INFO("d = ", d);
        check(Attention<Kernel<PositiveRandomFeatures>>{});
        check(Attention<Kernel<PositiveRandomFeatures>, Causal>{});
        check(Attention<Kernel<PositiveRandomFeatures>, Causal, PPR<2>>{});
    }
    // The estimate of a weight is off by about sqrt(e^(|q + k|^2 / sqrt(d)) / m), a hundredth: its outputs are nearer to the right scale's than to any other's.
    const index_t n = 40, d = 4;
    const auto q = random.tensor<double>({n, d}, .7), k = random.tensor<double>({n, d}, .7), v = random.tensor<double>({n, 4});
    int nearest = 0;
    for (int draw = 0; draw < 3; ++draw) {  // few large features make one of some hundred draws bad
        const auto estimate = Attention{Kernel<PositiveRandomFeatures>{{.features = 60000, .seed = random.seed()}}}(q.view(), k.view(), v.view());
        const auto apart = [&](double scale) {
            const auto exact = Attention{Softmax{.scale = scale}}(q.view(), k.view(), v.view());
            double squares = 0;
            for (std::size_t i = 0; i < exact.values.size(); ++i) squares += (exact.values[i] - estimate.values[i]) * (exact.values[i] - estimate.values[i]);
            return std::sqrt(squares / double(exact.values.size()));
        };
        bool right = true;
        for (const double wrong : {1e-9, 1. / d, 1., std::sqrt(double(d))}) right = right && apart(1 / std::sqrt(double(d))) < .8 * apart(wrong);
        nearest += right;
    }
    CHECK(nearest >= 2);
    // A copy with other parameters draws other directions.
    PositiveRandomFeatures first{.features = 64};
    first.bind(4);
    PositiveRandomFeatures second = first;
    second.features = 4;
    second.seed = 9;
    CHECK(second.bind(4)->count == 4);
    CHECK(second.bind(4)->w[0] != first.bind(4)->w[0]);
    const Tensor<float> wide({4, 1000});
    CHECK_THROWS_AS((Attention<Kernel<PositiveRandomFeatures>, Causal>{Kernel<PositiveRandomFeatures>{{.features = 8}}, Causal{}}(wide.view(), wide.view(), wide.view())), invalid_input);
}

TEST_CASE("rows without a denominator under diffusion: output 0, and their values feed the others") {
    POLYATTN_RANDOM(random);
    const index_t n = 40, d = 5;
    auto q = random.tensor<double>({n, d}), k = random.tensor<double>({n, d}), v = random.tensor<double>({n, 3}), d_out = random.tensor<double>({n, 3});
    // Far from 0, so that no denominator is small; of every third query ReLU leaves nothing.
    for (double& entry : k.values) entry = .1 + std::abs(entry);
    for (index_t i = 0; i < n; ++i)
        for (index_t c = 0; c < d; ++c) {
            double& entry = q.values[static_cast<std::size_t>(i * d + c)];
            entry = (i % 3 == 0 ? -1 : 1) * (.1 + std::abs(entry));
        }
    const auto check = [&](const auto& fast, const auto& exact) {
        const auto [out, saved] = fast.forward(q.view(), k.view(), v.view());
        const auto [wanted, exact_saved] = exact.forward(q.view(), k.view(), v.view());
        const auto gradient = fast.backward(saved, d_out.view()), wanted_gradient = exact.backward(exact_saved, d_out.view());
        const auto near = [](const Tensor<double>& got, const Tensor<double>& from) {
            for (std::size_t i = 0; i < from.values.size(); ++i) CHECK(std::abs(got.values[i] - from.values[i]) < 1e-11 * (1 + std::abs(from.values[i])));
        };
        near(out, wanted);
        near(gradient.q, wanted_gradient.q);
        near(gradient.k, wanted_gradient.k);
        near(gradient.v, wanted_gradient.v);
        for (index_t i = 0; i < n; i += 3)
            for (index_t c = 0; c < 3; ++c) CHECK(out.values[static_cast<std::size_t>(i * 3 + c)] == 0);
        auto moved = v;
        moved.values[0] += 1;  // of row 0, which is empty
        CHECK(fast(q.view(), k.view(), moved.view()).values != out.values);
    };
    check(Attention<Kernel<ReLU, ExactOrZero>, PPR<3>>{}, Attention<Kernel<ReLU, ExactOrZero>, PPR<3>, Reference>{});
    check(Attention<Kernel<ReLU, ExactOrZero>, PPR<3>, Causal>{}, Attention<Kernel<ReLU, ExactOrZero>, PPR<3>, Causal, Reference>{});
}

TEST_CASE("without hops the denominators are known all the same") {
    POLYATTN_RANDOM(random);
    const auto q = random.tensor<double>({2, 33, 4}), k = random.tensor<double>({2, 33, 4}), v = random.tensor<double>({2, 33, 3});
    const auto check = [&](const auto& fast, const auto& exact) {
        const auto got = fast.forward(q.view(), k.view(), v.view()), wanted = exact.forward(q.view(), k.view(), v.view());
        CHECK(got.out.values == v.values);
        for (std::size_t i = 0; i < 66; ++i) {
            if (detail::is_finite(wanted.saved.logsumexp()[i])) CHECK(got.saved.logsumexp()[i] == doctest::Approx(wanted.saved.logsumexp()[i]).epsilon(1e-12));
            else CHECK(got.saved.logsumexp()[i] == wanted.saved.logsumexp()[i]);
        }
    };
    check(Attention<Kernel<ReLU, ExactOrZero>, PPR<0>>{}, Attention<Kernel<ReLU, ExactOrZero>, PPR<0>, Reference>{});
    check(Attention<Kernel<ReLU, ExactOrZero>, PPR<0>, Causal>{}, Attention<Kernel<ReLU, ExactOrZero>, PPR<0>, Causal, Reference>{});
}

#if defined(_OPENMP) && defined(__SSE2__)
TEST_CASE("numbers below the smallest normal one count as 0 whatever the number of threads") {
    const int before = worker_count();
    const Attention<Kernel<ReLU, ExactOrZero>, Causal> attention;
    Tensor<float> x({1, 64, 8}), v({1, 64, 3});
    std::fill(x.values.begin(), x.values.end(), 1e-20f);  // products of two are too small
    std::fill(v.values.begin(), v.values.end(), 1.f);
    for (const int threads : {1, 2, 3}) {
        omp_set_num_threads(threads);
        for (const float value : attention(x.view(), x.view(), v.view()).values) CHECK(value == 0);
        auto state = attention.start<float>(1, 1, 1, 8, 3);
        Tensor<float> token({1, 1, 8}), of({1, 1, 3});
        std::fill(token.values.begin(), token.values.end(), 1e-20f);
        std::fill(of.values.begin(), of.values.end(), 1.f);
        for (const float value : attention.step(state, token.view(), token.view(), of.view()).values) CHECK(value == 0);
    }
    omp_set_num_threads(before);
}
#endif

TEST_CASE_TEMPLATE("what stands behind the last valid query of a causal layer, or anywhere if none is valid, has no gradient", Backend, Simd<>, Reference) {
    POLYATTN_RANDOM(random);
    const index_t n = 49;
    const auto check = [&](const auto& layer, index_t queries, index_t unseen) {
        auto q = random.tensor<double>({n, 6}), k = random.tensor<double>({n, 6}), v = random.tensor<double>({n, 5}), d_out = random.tensor<double>({n, 5});
        for (Tensor<double>* tensor : {&k, &v}) std::fill_n(tensor->values.begin() + unseen * tensor->shape[1], tensor->shape[1], std::numeric_limits<double>::quiet_NaN());
        CallOptions options;
        options.query_lengths = {queries};
        options.key_lengths = {n};
        const auto gradient = layer.backward(layer.forward(q.view(), k.view(), v.view(), options).saved, d_out.view());
        INFO(queries, " queries, NaN at ", unseen);
        for (const Tensor<double>* tensor : {&gradient.k, &gradient.v})
            for (index_t j = 0; j < n; ++j)
                for (offset_t c = 0; c < tensor->shape[1]; ++c) {
                    const double x = tensor->values[static_cast<std::size_t>(j * tensor->shape[1] + c)];
                    CHECK(detail::is_finite(x));
                    if (j >= queries && (queries == 0 || j >= unseen)) CHECK(x == 0);
                }
    };
    for (const index_t unseen : {10, 11, 31, 48}) {
        check(Attention<Causal, Kernel<EluPlusOne>, Backend>{}, 10, unseen);
        check(Attention<Causal, Kernel<ReLU, ExactOrZero>, Backend>{}, 10, unseen);
    }
    check(Attention<Kernel<ReLU>, Backend>{}, 0, 20);
    check(Attention<Kernel<EluPlusOne, ExactOrMean>, Backend>{}, 0, 20);
    check(Attention<Causal, Kernel<EluPlusOne>, Backend>{}, 0, 20);
}

TEST_CASE("errors name the argument") {
    const Tensor<float> x({1, 1, 4, 4});
    const Attention<Kernel<ReLU>> layer;
    CHECK(argument([&] { layer(x.view(), x.view(), x.view(), {.dropout = {.weights = .1}}); }) == "dropout.weights");
    CHECK(argument([&] { layer(x.view(), x.view(), x.view(), {.plan = Causal{}.plan(4, 4)}); }) == "plan");
    CHECK(argument([&] { layer(x.view(), x.view(), x.view(), {.item_plans = {Dense{}.plan(4, 4)}}); }) == "item_plans");
    CHECK(argument([] { Attention<Kernel<PositiveRandomFeatures>>{Kernel<PositiveRandomFeatures>{{.features = -1}}}; }) == "features");
    CHECK(argument([] { Attention<Kernel<ReLU, AddEpsilon>>{Kernel<ReLU, AddEpsilon>{{}, {.epsilon = std::nan("")}}}; }) == "epsilon");
}
