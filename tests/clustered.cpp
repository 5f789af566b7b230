// Clustered attention: the definition by plain loops, the paper's two propositions, gradients, padding.
#include "support/errors.hpp"
#include "support/finite_differences.hpp"
#include "support/random.hpp"

#include <polyattn/clustered_attention.hpp>
#include <polyattn/nn/classifier.hpp>

#include <doctest/doctest.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

using namespace polyattn;

namespace {

/// Softmax rows of q k^T / sqrt(d), [rows][keys].
std::vector<std::vector<double>> softmax_rows(const Tensor<double>& q, const Tensor<double>& k) {
    const auto d = static_cast<std::size_t>(q.shape[1]);
    std::vector<std::vector<double>> rows(static_cast<std::size_t>(q.shape[0]), std::vector<double>(static_cast<std::size_t>(k.shape[0])));
    for (std::size_t i = 0; i < rows.size(); ++i) {
        double sum = 0;
        for (std::size_t j = 0; j < rows[i].size(); ++j) {
            double dot = 0;
            for (std::size_t c = 0; c < d; ++c) dot += q.values[i * d + c] * k.values[j * d + c];
            sum += rows[i][j] = std::exp(dot / std::sqrt(double(d)));
        }
        for (double& weight : rows[i]) weight /= sum;
    }
    return rows;
}
Tensor<double> identity(index_t n) {
    Tensor<double> eye({n, n});
    for (index_t i = 0; i < n; ++i) eye.values[static_cast<std::size_t>(i * n + i)] = 1;
    return eye;
}
template <class Saved>
Tensor<double> means(const Tensor<double>& q, const Saved& head) {
    const auto d = static_cast<std::size_t>(q.shape[1]);
    Tensor<double> of({static_cast<offset_t>(head.sizes.size()), q.shape[1]});
    for (std::size_t i = 0; i < head.cluster.size(); ++i)
        for (std::size_t c = 0; c < d; ++c) of.values[static_cast<std::size_t>(head.cluster[i]) * d + c] += q.values[i * d + c] / head.sizes[static_cast<std::size_t>(head.cluster[i])];
    return of;
}

}  // namespace

TEST_CASE("clusters: queries in one direction are together, numbers have no gaps, sizes add up") {
    POLYATTN_RANDOM(random);
    Workspace workspace;
    for (const index_t n : {1, 2, 31, 64, 200}) {
        const index_t d = 6, directions = 5;
        const auto base = random.tensor<double>({directions, d});
        Tensor<double> q({n, d});
        for (index_t i = 0; i < n; ++i) {
            const double length = .1 + random.uniform();  // signs of projections don't hang on it
            for (index_t c = 0; c < d; ++c) q.values[static_cast<std::size_t>(i * d + c)] = length * base.values[static_cast<std::size_t>(i % directions * d + c)];
        }
        for (const index_t clusters : {1, 4, 300}) {
            const auto of = Clusters{.clusters = clusters, .seed = random.seed()}.assign<double>(detail::matrix_of(std::as_const(q)), workspace);
            std::vector<bool> seen(static_cast<std::size_t>(std::min({clusters, n, directions})));
            for (index_t i = 0; i < n; ++i) {
                REQUIRE(of[static_cast<std::size_t>(i)] < static_cast<index_t>(seen.size()));
                seen[static_cast<std::size_t>(of[static_cast<std::size_t>(i)])] = true;
                CHECK(of[static_cast<std::size_t>(i)] == of[static_cast<std::size_t>(i % directions)]);
            }
            const auto used = std::find(seen.begin(), seen.end(), false) - seen.begin();
            CHECK(std::count(seen.begin(), seen.end(), true) == used);
            if (clusters == 300 && n >= directions) CHECK(used == directions);
        }
    }
}

TEST_CASE("the definition by plain loops") {
    POLYATTN_RANDOM(random);
    for (const index_t n : {1, 7, 33, 80})
        for (const index_t top : {0, 1, 5, 80}) {
            const index_t d = 5, e = 3;
            const auto q = random.tensor<double>({n, d}), k = random.tensor<double>({n, d}), v = random.tensor<double>({n, e});
            const ClusteredAttention layer({.clusters = 6, .top = top, .seed = random.seed()});
            const auto [out, saved] = layer.forward(q.view(), k.view(), v.view());
            const auto& head = saved.head(0, 0);
            REQUIRE(std::accumulate(head.sizes.begin(), head.sizes.end(), 0) == n);
            const auto of_means = softmax_rows(means(q, head), k), exact = softmax_rows(q, k);
            double largest = 0;
            for (const double x : v.values) largest = std::max(largest, std::abs(x));
            for (index_t i = 0; i < n; ++i) {
                const auto at = static_cast<std::size_t>(i), j = static_cast<std::size_t>(head.cluster[at]);
                std::vector<double> weights = of_means[j];
                if (top > 0) {
                    double mass = 0, own = 0;
                    for (const index_t l : head.top[j]) mass += weights[static_cast<std::size_t>(l)], own += exact[at][static_cast<std::size_t>(l)];
                    for (index_t l = 0; l < n; ++l) {  // none that is left out is heavier
                        const bool in = std::binary_search(head.top[j].begin(), head.top[j].end(), l);
                        for (const index_t t : head.top[j]) CHECK((in || weights[static_cast<std::size_t>(l)] <= weights[static_cast<std::size_t>(t)] * (1 + 1e-12)));
                    }
                    for (const index_t l : head.top[j]) weights[static_cast<std::size_t>(l)] = mass * exact[at][static_cast<std::size_t>(l)] / own;
                }
                for (index_t c = 0; c < e; ++c) {
                    double wanted = 0;
                    for (index_t l = 0; l < n; ++l) wanted += weights[static_cast<std::size_t>(l)] * v.values[static_cast<std::size_t>(l * e + c)];
                    // A score of d products, and its exponential, are off by some d + 10 roundings of at most |q| |k| <= 100; sums by n more.
                    CHECK(std::abs(out.values[static_cast<std::size_t>(i * e + c)] - wanted) < (4 * (d + 10) * 100 + 4 * n) * 0x1p-53 * largest);
                }
            }
        }
}

TEST_CASE("with all keys at the top it is softmax attention; rows sum to 1") {
    POLYATTN_RANDOM(random);
    const auto q = random.tensor<float>({2, 4, 50, 16}), k = random.tensor<float>({2, 2, 50, 16}), v = random.tensor<float>({2, 2, 50, 8});
    const auto exact = Attention<>{}(q.view(), k.view(), v.view()), all = ClusteredAttention({.clusters = 3, .top = 50})(q.view(), k.view(), v.view());
    for (std::size_t i = 0; i < all.values.size(); ++i) CHECK(std::abs(all.values[i] - exact.values[i]) < 60 * 0x1p-24 * 5);  // the mass, a sum of 50 shares
    Tensor<float> ones({2, 2, 50, 1});
    for (float& one : ones.values) one = 1;
    for (const index_t top : {0, 7})
        for (const float x : ClusteredAttention({.clusters = 5, .top = top})(q.view(), k.view(), ones.view()).values) CHECK(std::abs(x - 1) < 4 * 60 * 0x1p-24);
}

TEST_CASE("the paper's propositions: rows are as near as queries, and the top keys bring them nearer") {
    POLYATTN_RANDOM(random);
    const index_t n = 60, d = 8;
    const auto q = random.tensor<double>({n, d}), k = random.tensor<double>({n, d}), eye = identity(n);
    const std::uint64_t seed = random.seed();
    const auto exact = softmax_rows(q, k);
    double keys = 0;  // Frobenius norm, at least the spectral one
    for (const double x : k.values) keys += x * x;
    const auto rows = [&](index_t top) { return ClusteredAttention({.clusters = 7, .top = top, .seed = seed}).forward(q.view(), k.view(), eye.view()); };
    const auto plain = rows(0), improved = rows(6);
    const auto& head = plain.saved.head(0, 0);
    REQUIRE(head.cluster == improved.saved.head(0, 0).cluster);
    const auto centers = means(q, head);
    for (index_t i = 0; i < n; ++i) {
        double apart = 0, two = 0, one = 0, better = 0;
        for (index_t c = 0; c < d; ++c) {
            const double x = q.values[static_cast<std::size_t>(i * d + c)] - centers.values[static_cast<std::size_t>(head.cluster[static_cast<std::size_t>(i)] * d + c)];
            apart += x * x;
        }
        for (index_t l = 0; l < n; ++l) {
            const auto at = static_cast<std::size_t>(i * n + l);
            const double wanted = exact[static_cast<std::size_t>(i)][static_cast<std::size_t>(l)], off = std::abs(plain.out.values[at] - wanted);
            two += off * off;
            one += off;
            better += std::abs(improved.out.values[at] - wanted);
        }
        CHECK(std::sqrt(two) <= std::sqrt(apart * keys / d) + 1e-12);  // proposition 1
        CHECK(better <= one + 1e-12);                                   // proposition 2
    }
}

TEST_CASE("gradients by finite differences, shared keys, padding") {
    POLYATTN_RANDOM(random);
    for (const index_t n : {1, 11})
        for (const index_t top : {0, 3}) {
            const ClusteredAttention layer({.clusters = 4, .top = top, .seed = random.seed()});
            CallOptions options;
            options.key_lengths = {n, n / 2};
            auto q = random.tensor<double>({2, 4, n, 3}), k = random.tensor<double>({2, 2, n, 3}), v = random.tensor<double>({2, 2, n, 2});
            const auto d_out = random.tensor<double>({2, 4, n, 2});
            const auto loss = [&] {
                const auto out = layer(q.view(), k.view(), v.view(), options);
                return std::inner_product(out.values.begin(), out.values.end(), d_out.values.begin(), 0.);
            };
            const auto gradient = layer.backward(layer.forward(q.view(), k.view(), v.view(), options).saved, d_out.view());
            const auto compare = [&](auto& values, const auto& got, const char* what) {
                for (int s = 0; s < 8; ++s) {
                    const auto at = static_cast<std::size_t>(random.below(static_cast<index_t>(values.size())));
                    INFO(what, " entry ", at, " of ", n, " tokens, top ", top);
                    CHECK(std::abs(derivative(values[at], loss) - got[at]) < 1e-6 * (1 + std::abs(loss()) + std::abs(got[at])));
                }
            };
            compare(q.values, gradient.q.values, "q");
            compare(k.values, gradient.k.values, "k");
            compare(v.values, gradient.v.values, "v");
            auto bad_q = q, bad_k = k, bad_v = v;
            for (auto* x : {&bad_q, &bad_k, &bad_v})
                for (offset_t h = x->shape[1]; h < 2 * x->shape[1]; ++h)
                    for (offset_t i = (h * n + n / 2) * x->shape[3]; i < (h + 1) * n * x->shape[3]; ++i) x->values[static_cast<std::size_t>(i)] = std::nan("");
            const auto padded = layer.forward(bad_q.view(), bad_k.view(), bad_v.view(), options);
            CHECK(padded.out.values == layer(q.view(), k.view(), v.view(), options).values);
            const auto behind = layer.backward(padded.saved, d_out.view());
            CHECK(behind.q.values == gradient.q.values);
            CHECK(behind.v.values == gradient.v.values);
        }
}

TEST_CASE("the same bits for any number of threads, a NaN stays in its item") {
    POLYATTN_RANDOM(random);
    auto q = random.tensor<float>({2, 3, 70, 16}), k = random.tensor<float>({2, 3, 70, 16}), v = random.tensor<float>({2, 3, 70, 16});
    const ClusteredAttention layer({.clusters = 9, .top = 4});
    const auto run = [&]([[maybe_unused]] int threads) {
#if defined(_OPENMP)
        omp_set_num_threads(threads);
#endif
        auto pass = layer.forward(q.view(), k.view(), v.view());
        auto gradient = layer.backward(pass.saved, v.view());
        return std::tuple(pass.out.values, gradient.q.values, gradient.k.values, gradient.v.values);
    };
    const auto one = run(1);
    CHECK(one == run(3));
    const std::size_t item = q.values.size() / 2;
    q.values[item] = k.values[item + 100] = std::nanf("");
    const AlignedVector<float> with_nan = std::get<0>(run(1)), &clean = std::get<0>(one);
    CHECK(std::equal(with_nan.begin(), with_nan.begin() + static_cast<std::ptrdiff_t>(item), clean.begin()));
    CHECK(std::isnan(with_nan[item]));
}

TEST_CASE("what a pass was moved out of is no pass") {
    POLYATTN_RANDOM(random);
    const auto x = random.tensor<float>({1, 1, 20, 8});
    const ClusteredAttention layer({.clusters = 4, .top = 4});
    auto pass = layer.forward(x.view(), x.view(), x.view());
    const auto kept = std::move(pass.saved);
    CHECK_THROWS_AS(layer.backward(pass.saved, x.view()), invalid_input);
    CHECK(layer.backward(kept, x.view()).q.values.size() == x.values.size());
}

TEST_CASE("in a model") {
    Workspace workspace;
    const std::vector<index_t> tokens = {1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6};
    nn::Classifier<float, ClusteredAttention> model(ClusteredAttention({.clusters = 3, .top = 2}), 10, 3, {.layers = 1, .dim = 8, .heads = 2});
    nn::Classifier<float, ClusteredAttention>::Saved saved;
    const nn::Pass pass{.workspace = &workspace, .training = true, .lengths = {6, 4}};
    const MatrixView<float> out = model.forward(tokens, 2, saved, pass);
    nn::cross_entropy(out, std::span<const index_t>(tokens).first(2));
    model.backward(saved, pass);
    std::size_t touched = 0;
    model.for_each_parameter([&](auto& parameter) { touched += std::any_of(parameter.gradient.values.begin(), parameter.gradient.values.end(), [](float x) { return x != 0; }); });
    CHECK(touched >= 15);
}

TEST_CASE("errors name the argument") {
    const Tensor<float> x({1, 1, 6, 4}), y({1, 1, 5, 4}), empty({1, 1, 0, 4});
    CHECK(argument([] { ClusteredAttention({.clusters = 0}); }) == "clusters");
    CHECK(argument([] { ClusteredAttention({.iterations = -1}); }) == "iterations");
    CHECK(argument([] { ClusteredAttention({.bits = 65}); }) == "bits");
    CHECK(argument([] { ClusteredAttention({.top = -1}); }) == "top");
    CHECK(argument([&] { ClusteredAttention()(x.view(), y.view(), y.view()); }) == "k");
    CHECK(argument([&] { ClusteredAttention()(x.view(), x.view(), x.view(), {.key_lengths = {7}}); }) == "key_lengths");
    CHECK(argument([&] { ClusteredAttention()(x.view(), x.view(), x.view(), {.dropout = {.weights = .1}}); }) == "dropout");
    CHECK(argument([&] { ClusteredAttention()(x.view(), x.view(), x.view(), {.plan = Dense{}.plan(6, 6)}); }) == "plan");
    CHECK(ClusteredAttention()(empty.view(), empty.view(), empty.view()).values.empty());
}
