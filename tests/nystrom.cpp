// Nystrom attention: the iteration's numbers, the definition by matrices, gradients, padding.
#include "support/errors.hpp"
#include "support/finite_differences.hpp"
#include "support/random.hpp"

#include <polyattn/models.hpp>
#include <polyattn/nn/classifier.hpp>
#include <polyattn/nystrom_attention.hpp>

#include <doctest/doctest.h>

using namespace polyattn;

TEST_CASE("the iteration towards the pseudo-inverse") {
    // [[a, 1 - a], [1 - a, a]] with a = 3/4 has eigenvalues 1 and 1/2; the first is right from the start, the second's residual is known.
    Tensor<double> a({2, 2});
    a.values = {.75, .25, .25, .75};
    Workspace workspace;
    const std::vector<double> residuals = {.75, .395508, .0525182, 1.10542e-4, 1.01312e-12};
    for (index_t t = 0; t <= 4; ++t) {
        detail::PseudoInverse<double> inverse;
        inverse.run(detail::matrix_of(a), t, workspace);
        const MatrixView<const double> z = inverse.result();
        // On (1, -1): A Z is 1 - residual.
        const double along = .5 * (z(0, 0) - z(0, 1));
        // A step's four products have entries up to 15, of two terms each: their rounding stays below 4 x 15 x 2 x 2^-53.
        const double wanted = residuals[static_cast<std::size_t>(t)];
        CHECK(std::abs(1 - along - wanted) < 1e-5 * wanted + 120 * 0x1p-53);
    }
}

TEST_CASE("with as many landmarks as tokens, and enough steps, it is softmax attention") {
    POLYATTN_RANDOM(random);
    const index_t n = 12, d = 4;
    const auto q = random.tensor<double>({2, n, d}), k = q, v = random.tensor<double>({2, n, d});
    const auto exact = Attention<>{}(q.view(), k.view(), v.view());
    const auto error = [&](index_t steps) {
        const auto out = NystromAttention({.landmarks = n, .iterations = steps})(q.view(), k.view(), v.view());
        double worst = 0;
        for (std::size_t i = 0; i < out.values.size(); ++i) worst = std::max(worst, std::abs(out.values[i] - exact.values[i]));
        return worst;
    };
    // q = k: the matrix has a positive spectrum, so the iteration converges; how fast hangs on its smallest eigenvalue. Rounding is amplified by the condition.
    CHECK(error(40) < 1e-6);
    CHECK(error(40) <= error(2) + 1e-12);
}

TEST_CASE("the definition by matrices") {
    POLYATTN_RANDOM(random);
    for (const index_t n : {1, 7, 20}) {
        const index_t d = 5, e = 3, m = 4;
        const auto q = random.tensor<double>({n, d}), k = random.tensor<double>({n, d}), v = random.tensor<double>({n, e});
        const index_t length = (n + m - 1) / m;
        const auto means = [&](const Tensor<double>& x) {
            const index_t rows = (n + length - 1) / length;
            Tensor<double> y({rows, d});
            for (index_t i = 0; i < n; ++i)
                for (index_t c = 0; c < d; ++c) y.values[static_cast<std::size_t>(i / length * d + c)] += x.values[static_cast<std::size_t>(i * d + c)] / double(std::min(length, n - i / length * length));
            return y;
        };
        const auto softmax = [&](const Tensor<double>& a, const Tensor<double>& b) {
            Tensor<double> p({a.shape[0], b.shape[0]});
            for (offset_t i = 0; i < a.shape[0]; ++i) {
                double sum = 0;
                for (offset_t j = 0; j < b.shape[0]; ++j) {
                    double dot = 0;
                    for (index_t c = 0; c < d; ++c) dot += a.values[static_cast<std::size_t>(i * d + c)] * b.values[static_cast<std::size_t>(j * d + c)];
                    sum += p.values[static_cast<std::size_t>(i * b.shape[0] + j)] = std::exp(dot / std::sqrt(double(d)));
                }
                for (offset_t j = 0; j < b.shape[0]; ++j) p.values[static_cast<std::size_t>(i * b.shape[0] + j)] /= sum;
            }
            return p;
        };
        const auto times = [](const Tensor<double>& a, const Tensor<double>& b) {
            Tensor<double> c({a.shape[0], b.shape[1]});
            for (offset_t i = 0; i < a.shape[0]; ++i)
                for (offset_t t = 0; t < a.shape[1]; ++t)
                    for (offset_t j = 0; j < b.shape[1]; ++j) c.values[static_cast<std::size_t>(i * b.shape[1] + j)] += a.values[static_cast<std::size_t>(i * a.shape[1] + t)] * b.values[static_cast<std::size_t>(t * b.shape[1] + j)];
            return c;
        };
        const auto ql = means(q), kl = means(k);
        auto a = softmax(ql, kl);
        Workspace workspace;
        detail::PseudoInverse<double> inverse;
        inverse.run(detail::matrix_of(a), 6, workspace);
        Tensor<double> z(a.shape);
        for (index_t i = 0; i < a.shape[0]; ++i)
            for (index_t j = 0; j < a.shape[0]; ++j) z.values[static_cast<std::size_t>(i * a.shape[0] + j)] = inverse.result()(i, j);
        auto wanted = times(softmax(q, kl), times(z, times(softmax(ql, k), v)));
        Nystrom parameters{.landmarks = m, .width = 3, .table = {.1, -.2, .3}};
        for (index_t i = 0; i < n; ++i)
            for (index_t t = 0; t < 3; ++t)
                if (const index_t from = i + t - 1; from >= 0 && from < n)
                    for (index_t c = 0; c < e; ++c) wanted.values[static_cast<std::size_t>(i * e + c)] += parameters.table[static_cast<std::size_t>(t)] * v.values[static_cast<std::size_t>(from * e + c)];
        const auto out = NystromAttention(parameters)(q.view(), k.view(), v.view());
        double largest = 1;
        for (index_t i = 0; i < a.shape[0]; ++i)
            for (index_t j = 0; j < a.shape[0]; ++j) largest = std::max(largest, std::abs(inverse.result()(i, j)));
        // The pseudo-inverse amplifies roundings of A by its square: some hundred of them here.
        for (std::size_t i = 0; i < out.values.size(); ++i) CHECK(std::abs(out.values[i] - wanted.values[i]) < 1e3 * 0x1p-53 * largest * largest * 10);
    }
}

TEST_CASE("gradients by finite differences, padding") {
    POLYATTN_RANDOM(random);
    for (const index_t n : {1, 11}) {
        Nystrom parameters{.landmarks = 4, .iterations = 3, .width = 3, .table = std::vector<double>(12)};
        for (double& weight : parameters.table) weight = random.normal();
        CallOptions options;
        options.key_lengths = {n, n / 2};
        auto q = random.tensor<double>({2, 4, n, 3}), k = random.tensor<double>({2, 2, n, 3}), v = random.tensor<double>({2, 2, n, 2});
        const auto d_out = random.tensor<double>({2, 4, n, 2});
        NystromAttention layer(parameters);
        const auto loss = [&] {
            const auto out = layer(q.view(), k.view(), v.view(), options);
            double sum = 0;
            for (std::size_t i = 0; i < out.values.size(); ++i) sum += out.values[i] * d_out.values[i];
            return sum;
        };
        const auto gradient = layer.backward(layer.forward(q.view(), k.view(), v.view(), options).saved, d_out.view());
        const auto compare = [&](auto& values, const auto& got, const char* what, auto&& changed) {
            for (int s = 0; s < 8; ++s) {
                const auto at = static_cast<std::size_t>(random.below(static_cast<index_t>(values.size())));
                const double difference = derivative(values[at], [&] {
                    changed();
                    return loss();
                });
                changed();
                INFO(what, " entry ", at, " of ", n, " tokens");
                CHECK(std::abs(difference - got[at]) < 1e-6 * (1 + std::abs(loss()) + std::abs(got[at])));
            }
        };
        const auto nothing = [] {};
        compare(q.values, gradient.q.values, "q", nothing);
        compare(k.values, gradient.k.values, "k", nothing);
        compare(v.values, gradient.v.values, "v", nothing);
        compare(parameters.table, gradient.compression, "table", [&] { layer = layer.with_compression(parameters); });
        auto bad = k;
        for (index_t h = 0; h < 2; ++h)
            for (index_t i = (2 + h) * n + n / 2; i < (3 + h) * n; ++i)
                for (index_t c = 0; c < 3; ++c) bad.values[static_cast<std::size_t>(i * 3 + c)] = std::nan("");
        CHECK(layer(q.view(), bad.view(), v.view(), options).values == layer(q.view(), k.view(), v.view(), options).values);
    }
}

TEST_CASE("in a model; the other papers' layers are one line") {
    Workspace workspace;
    const std::vector<index_t> tokens = {1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6};
    const auto run = [&](const auto& attention) {
        using Layer = std::remove_cvref_t<decltype(attention)>;
        nn::Classifier<float, Layer> model(attention, 10, 3, {.layers = 1, .dim = 8, .heads = 2});
        typename nn::Classifier<float, Layer>::Saved saved;
        const nn::Pass pass{.workspace = &workspace, .training = true, .lengths = {6, 4}};
        const MatrixView<float> out = model.forward(tokens, 2, saved, pass);
        CHECK(std::isfinite(out(1, 2)));
        nn::cross_entropy(out, std::span<const index_t>(tokens).first(2));
        model.backward(saved, pass);
        std::size_t touched = 0;
        model.for_each_parameter([&](auto& parameter) { touched += std::any_of(parameter.gradient.values.begin(), parameter.gradient.values.end(), [](float x) { return x != 0; }); });
        return touched;
    };
    CHECK(run(NystromAttention({.landmarks = 3, .width = 3, .table = std::vector<double>(6, .1)})) >= 16);
    CHECK(run(LinearTransformer<>{}) >= 15);
    CHECK(run(Performer<>{}) >= 15);
    CHECK(run(Linformer<>{LinearProjection::drawn(6, 2)}) >= 16);
    CHECK(run(MemoryCompressed<>{StridedConvolution::means(2)}) >= 16);
}

#if defined(_OPENMP)
TEST_CASE("the same bits for any number of threads: landmarks of every kind") {
    POLYATTN_RANDOM(random);
    const int before = worker_count();
    const index_t n = 150;
    const auto q = random.tensor<float>({2, 6, n, 16}), k = random.tensor<float>({2, 3, n, 16}), v = random.tensor<float>({2, 3, n, 16}), d_out = random.tensor<float>({2, 6, n, 16});
    const auto check = [&](const char* name, const auto& layer) {
        const auto results = [&] {
            const auto [out, saved] = layer.forward(q.view(), k.view(), v.view(), {.key_lengths = {n, 101}});
            const auto gradient = layer.backward(saved, d_out.view());
            return std::tuple{out.values, gradient.q.values, gradient.k.values, gradient.v.values, gradient.compression};
        };
        INFO(name);
        omp_set_num_threads(1);
        const auto one = results();
        for (const int threads : {2, 3, 8}) {
            omp_set_num_threads(threads);
            CHECK(results() == one);
        }
    };
    std::vector<double> table(6);
    for (double& weight : table) weight = random.normal();
    check("SegmentMeans", Attention<SegmentMeans<4>, Kernel<ReLU>>{});
    check("SegmentMax", Attention<SegmentMax<4>>{});
    check("StridedConvolution", Attention{StridedConvolution::means(3)});
    check("LinearProjection", Attention{LinearProjection::drawn(n, 20, random.seed())});
    check("KMeans", Attention{KMeans{.clusters = 12}});
    check("NystromAttention", NystromAttention({.landmarks = 10, .width = 1, .table = table}));
    omp_set_num_threads(before);
}
#endif

TEST_CASE("errors name the argument") {
    const Tensor<float> x({1, 1, 6, 4}), y({1, 1, 5, 4});
    CHECK(argument([] { NystromAttention({.landmarks = 0}); }) == "landmarks");
    CHECK(argument([] { NystromAttention({.width = 2, .table = {1, 1}}); }) == "width");
    CHECK(argument([] { NystromAttention({.width = 3}); }) == "table");
    CHECK(argument([&] { NystromAttention()(x.view(), y.view(), y.view()); }) == "k");
    CHECK(argument([&] { NystromAttention()(x.view(), x.view(), x.view(), {.dropout = {.weights = .1}}); }) == "dropout");
}
