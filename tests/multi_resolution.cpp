// AdaMRA's layer: the paper's numbers, gradients of every parameter, and what must not matter.
#include "support/errors.hpp"
#include "support/finite_differences.hpp"
#include "support/random.hpp"

#include <polyattn/nn/classifier.hpp>
#include <polyattn/nn/optimizer.hpp>
#include <polyattn/policy/compression/compression.hpp>

#include <doctest/doctest.h>

#include <functional>
#if defined(_OPENMP)
#include <omp.h>
#endif

using namespace polyattn;

namespace {

template <class Recipe, class T = double>
struct Net {
    using Layer = nn::AdaptiveMultiResolution<T, Recipe>;
    Layer layer;
    typename Layer::Saved saved;
    Workspace workspace;
    Tensor<T> x, y, d_x;
    index_t batch;
    CallOptions options;

    Net(Recipe recipe, index_t dim, index_t heads, index_t items, index_t tokens, std::uint64_t seed = 1)
        : layer("layer", std::move(recipe), dim, heads, heads, .3, 1, seed), x({items * tokens, dim}), y({items * tokens, dim}), d_x({items * tokens, dim}), batch(items) {
        options.workspace = &workspace;
    }
    const Tensor<T>& forward() {
        layer.forward(detail::rows_of(std::as_const(x)), {}, detail::rows_of(y), batch, saved, options, {});
        return y;
    }
    void backward(const Tensor<T>& d_y) {
        nn::zero_gradients(layer);
        layer.backward(detail::rows_of(std::as_const(x)), detail::rows_of(d_y), detail::rows_of(d_x), batch, saved, workspace);
    }
    std::vector<index_t> routes() const { return {layer.routes(saved).begin(), layer.routes(saved).end()}; }
};

template <class T>
void make_identity(nn::Parameter<T>& weight) {
    std::fill(weight.value.values.begin(), weight.value.values.end(), T(0));
    for (offset_t i = 0; i < std::min(weight.value.shape[0], weight.value.shape[1]); ++i) weight.value.values[static_cast<std::size_t>(i * weight.value.shape[1] + i)] = 1;
}
template <class Layer>
void make_identities(Layer& layer) {
    layer.for_each_parameter([](auto& parameter) {
        if (parameter.value.shape.size() == 2) make_identity(parameter);
        else std::fill(parameter.value.values.begin(), parameter.value.values.end(), 0);
    });
}
void check_equal(std::span<const double> got, const std::vector<double>& wanted, double factor = 1) {
    REQUIRE(got.size() == wanted.size());
    for (std::size_t i = 0; i < got.size(); ++i) CHECK(got[i] == doctest::Approx(factor * wanted[i]).epsilon(1e-14));
}

/// A smooth map: differences of maps that bend are off where a step crosses the bend.
struct Exponential {
    double operator()(double x) const { return std::exp(x); }
    double derivative(double x) const { return std::exp(x); }
};

template <class Gate>
using TwoByHand = MultiResolution<SegmentMeans<1, 2>, TopOne<Gate>, Kernel<ReLU, ExactOrZero>>;

/// Loss = sum of d_y * y; compares gradients of x and of all parameters for which `learns(name)`.
template <class Recipe>
void check_gradients(Random& random, const Recipe& recipe, index_t tokens, const std::vector<index_t>& key_lengths, bool router_by_differences) {
    Net<Recipe> net(recipe, 6, 2, 2, tokens, random.seed());
    net.options.key_lengths = key_lengths;
    net.options.draw.seed = random.seed();
    net.x = random.tensor<double>({2 * tokens, 6});
    const auto d_y = random.tensor<double>({2 * tokens, 6});
    net.forward();
    const std::vector<index_t> routes = net.routes();
    const auto loss = [&] {
        net.forward();
        double sum = net.layer.balance_loss(net.saved);
        for (std::size_t i = 0; i < net.y.values.size(); ++i) sum += net.y.values[i] * d_y.values[i];
        return sum;
    };
    net.backward(d_y);
    const auto compare = [&](double& value, double got, const std::string& what) {
        bool same_route = true;
        const double difference = derivative(value, [&] {
            const double changed = loss();
            same_route = same_route && net.routes() == routes;
            return changed;
        });
        if (!same_route) return;  // the loss jumps there
        INFO(what, ", ", tokens, " tokens");
        CHECK(std::abs(difference - got) < 1e-6 * (1 + std::abs(loss()) + std::abs(got)));
    };
    const auto sample = [&](auto& values, const auto& got, const std::string& what) {
        for (int s = 0; s < 4; ++s) {
            const auto at = static_cast<std::size_t>(random.below(static_cast<index_t>(values.size())));
            compare(values[at], got[at], what);
        }
    };
    const auto d_x = net.d_x.values;
    // Straight-through gates learn as if the row were multiplied: no difference of the loss shows that, neither in x nor in what makes Q.
    if (router_by_differences) sample(net.x.values, d_x, "x");
    net.layer.for_each_parameter([&](nn::Parameter<double>& parameter) {
        if (!router_by_differences && (parameter.name == "layer.router" || parameter.name == "layer.query")) return;
        const auto got = parameter.gradient.values;
        sample(parameter.value.values, got, parameter.name);
    });
}

}  // namespace

TEST_CASE("two resolutions by hand") {
    const auto net_of = [](auto gate) {
        Net<TwoByHand<decltype(gate)>> net({}, 2, 1, 1, 4);
        make_identities(net.layer);
        net.x.values = {1, 0, 0, 1, 2, 1, 1, 2};
        return net;
    };
    const std::vector<double> wanted = {1.5, 1, 1.25, 1.25, 4. / 3, 7. / 6, 1.25, 1.25};
    Tensor<double> ones({4, 2});
    std::fill(ones.values.begin(), ones.values.end(), 1.);
    // L = sum of outputs: dW = 0.98305966.. [[1, -1], [-1, 1]] in the paper's layout, ours is transposed (and symmetric).
    const auto check = [&](auto gate, double factor, double router) {
        auto net = net_of(gate);
        check_equal(net.forward().values, wanted, factor);
        CHECK(net.routes() == std::vector<index_t>{0, 1, 0, 1});
        net.backward(ones);
        check_equal(net.layer.router[0].gradient.values, {1, -1, -1, 1}, router);
    };
    check(Literal{}, 1, 0);
    double expected = 0;
    {  // g_i P_i (1 - P_i) (x_i0 - x_i1's share): computed here from the formula
        const std::vector<std::array<double, 2>> x = {{1, 0}, {0, 1}, {2, 1}, {1, 2}};
        const std::vector<int> route = {0, 1, 0, 1};
        double d00 = 0;
        for (std::size_t i = 0; i < 4; ++i) {
            const double g = wanted[2 * i] + wanted[2 * i + 1], p0 = 1 / (1 + std::exp(x[i][1] - x[i][0])), chosen = route[i] == 0 ? p0 : 1 - p0;
            d00 += g * chosen * ((route[i] == 0 ? 1 : 0) - p0) * x[i][0];
        }
        expected = d00;
    }
    CHECK(expected == doctest::Approx(0.98305966).epsilon(2e-8));
    check(StraightThrough{}, 1, expected);
    check(Switch{}, 0.7310585786300049, expected);
}

static_assert(!std::is_copy_constructible_v<Net<MultiResolution<>>::Layer::Saved> && std::is_move_constructible_v<Net<MultiResolution<>>::Layer::Saved>);

TEST_CASE("parameters") {
    nn::AdaptiveMultiResolution<float, MultiResolution<SegmentMeans<2, 4, 8, 16>>> layer("layer", {}, 64, 2, 2, .02, 1, 1);
    CHECK(nn::parameter_count(layer) == 65792 + 64);  // the paper's, and a bias of Wo
}

TEST_CASE("gradients by finite differences, every parameter") {
    POLYATTN_RANDOM(random);
    for (const index_t n : {1, 8, 17}) {
        const std::vector<index_t> lengths = random.below(2) ? std::vector<index_t>{n, n / 2} : std::vector<index_t>{};
        check_gradients(random, MultiResolution<SegmentMeans<1, 3>, TopOne<Switch>, Kernel<Exponential>>{}, n, lengths, true);
        check_gradients(random, MultiResolution<SegmentMeans<2, 4, 8>, TopOne<Switch>, Kernel<Exponential>>{.router = {.balance = .7}}, n, lengths, true);
        check_gradients(random, MultiResolution<SegmentMeans<1, 4>, TopOne<Switch>, Softmax>{}, n, lengths, true);
        check_gradients(random, MultiResolution<SegmentMeans<2, 5>, TopOne<Literal>, Kernel<Exponential>>{}, n, lengths, true);
        check_gradients(random, MultiResolution<SegmentMeans<2, 5>, RandomRoute, Kernel<Exponential>>{.router = {.seed = random.seed()}}, n, lengths, true);
        check_gradients(random, MultiResolution<SegmentMeans<1, 2, 5>, ConcatenateAll, Kernel<Exponential>>{}, n, lengths, true);
        check_gradients(random, MultiResolution<SegmentMeans<2, 5>, TopOne<StraightThrough>, Kernel<Exponential>>{}, n, lengths, false);
    }
}

TEST_CASE("the straight-through gradient of the router is Switch's formula") {
    POLYATTN_RANDOM(random);
    const index_t n = 17, dim = 4;
    Net<MultiResolution<SegmentMeans<1, 4>>> net({}, dim, 2, 1, n, random.seed());
    net.x = random.tensor<double>({n, dim});
    const auto d_y = random.tensor<double>({n, dim});
    net.forward();
    net.backward(d_y);
    // dL/d(gated row) = d_y Wo; logits = R q with q = Wq x.
    const auto& wo = net.layer.merge.weight.value.values;
    const auto& wq = net.layer.query.value.values;
    std::vector<double> d_router(2 * dim, 0), magnitude(2 * dim, 0);
    for (index_t i = 0; i < n; ++i) {
        double g = 0;
        for (index_t c = 0; c < dim; ++c)
            for (index_t o = 0; o < dim; ++o)
                g += d_y.values[static_cast<std::size_t>(i * dim + o)] * wo[static_cast<std::size_t>(o * dim + c)] * net.saved.context.values[static_cast<std::size_t>(i * dim + c)];
        const index_t route = net.routes()[static_cast<std::size_t>(i)];
        const double* p = &net.saved.probabilities.values[static_cast<std::size_t>(2 * i)];
        for (index_t h = 0; h < 2; ++h)
            for (index_t c = 0; c < dim; ++c) {
                double q = 0;
                for (index_t t = 0; t < dim; ++t) q += wq[static_cast<std::size_t>(c * dim + t)] * net.x.values[static_cast<std::size_t>(i * dim + t)];
                const double term = g * p[route] * ((h == route ? 1 : 0) - p[h]) * q;
                d_router[static_cast<std::size_t>(h * dim + c)] += term;
                magnitude[static_cast<std::size_t>(h * dim + c)] += std::abs(term);
            }
    }
    for (std::size_t at = 0; at < d_router.size(); ++at) CHECK(std::abs(net.layer.router[0].gradient.values[at] - d_router[at]) < 1e-12 * (1 + magnitude[at]));
}

TEST_CASE("one resolution without compression is plain linear attention") {
    POLYATTN_RANDOM(random);
    const index_t n = 19, dim = 6;
    Net<MultiResolution<SegmentMeans<1>>> net({}, dim, 3, 2, n, random.seed());
    net.x = random.tensor<double>({2 * n, dim});
    net.forward();
    const auto map = [&](const Tensor<double>& x, const Tensor<double>& w) {  // x W^T
        Tensor<double> y({x.shape[0], w.shape[0]});
        for (offset_t i = 0; i < x.shape[0]; ++i)
            for (offset_t o = 0; o < w.shape[0]; ++o)
                for (offset_t c = 0; c < dim; ++c) y.values[static_cast<std::size_t>(i * w.shape[0] + o)] += x.values[static_cast<std::size_t>(i * dim + c)] * w.values[static_cast<std::size_t>(o * dim + c)];
        return y;
    };
    auto q = map(map(net.x, net.layer.query.value), net.layer.own[0].value), k = map(map(net.x, net.layer.key.value), net.layer.own[1].value), v = map(map(net.x, net.layer.value.value), net.layer.own[2].value);
    const auto heads = [&](Tensor<double>& x) { return tensor_view<const double>(x.data(), {2, 3, n, 2}, {n * dim, 2, dim, 1}); };
    const auto out = Attention<Kernel<ReLU>>{}(heads(q), heads(k), heads(v));
    Tensor<double> context({2 * n, dim});
    for (index_t b = 0; b < 2; ++b)
        for (index_t h = 0; h < 3; ++h)
            for (index_t i = 0; i < n; ++i)
                for (index_t c = 0; c < 2; ++c) context.values[static_cast<std::size_t>((b * n + i) * dim + 2 * h + c)] = out.view().head(b, h)(i, c);
    const auto wanted = map(context, net.layer.merge.weight.value);
    for (std::size_t i = 0; i < wanted.values.size(); ++i) CHECK(net.y.values[i] == doctest::Approx(wanted.values[i]).epsilon(1e-10));
}

TEST_CASE("routing: gathered is masked, equal resolutions make the router idle") {
    POLYATTN_RANDOM(random);
    const index_t n = 27, dim = 6;
    const auto x = random.tensor<double>({2 * n, dim});
    Net<MultiResolution<SegmentMeans<1, 2, 8>>> routed({}, dim, 2, 2, n, 7);
    Net<MultiResolution<SegmentMeans<1, 2, 8>, ConcatenateAll>> everything({}, dim, 2, 2, n, 7);
    everything.layer.query.value = routed.layer.query.value;
    everything.layer.key.value = routed.layer.key.value;
    everything.layer.value.value = routed.layer.value.value;
    for (std::size_t i = 0; i < routed.layer.own.size(); ++i) everything.layer.own[i].value = routed.layer.own[i].value;
    routed.x = everything.x = x;
    routed.options.key_lengths = everything.options.key_lengths = {n, n - 5};
    routed.forward();
    everything.forward();
    std::array<int, 3> used{};
    for (index_t row = 0; row < 2 * n; ++row) {
        const index_t h = routed.routes()[static_cast<std::size_t>(row)];
        if (h < 0) continue;
        ++used[static_cast<std::size_t>(h)];
        for (index_t c = 0; c < dim; ++c)
            CHECK(routed.saved.context.values[static_cast<std::size_t>(row * dim + c)] == doctest::Approx(everything.saved.context.values[static_cast<std::size_t>((row * 3 + h) * dim + c)]).epsilon(1e-12));
    }
    CHECK(used[0] + used[1] + used[2] == 2 * n - 5);

    Net<MultiResolution<SegmentMeans<2, 2>>> equal({}, dim, 2, 2, n, 7);
    for (std::size_t i = 0; i < 3; ++i) equal.layer.own[i + 3].value = equal.layer.own[i].value;
    equal.x = x;
    const auto before = equal.forward().values;
    const std::vector<index_t> routes = equal.routes();
    for (double& weight : equal.layer.router[0].value.values) weight = -weight;
    const auto after = equal.forward().values;
    CHECK(routes != equal.routes());
    for (std::size_t i = 0; i < before.size(); ++i) CHECK(before[i] == doctest::Approx(after[i]).epsilon(1e-12));
    // But with Switch, which multiplies rows by their router's probability.
    Net<MultiResolution<SegmentMeans<2, 2>, TopOne<Switch>>> gated({}, dim, 2, 2, n, 7);
    for (std::size_t i = 0; i < 3; ++i) gated.layer.own[i + 3].value = gated.layer.own[i].value;
    gated.x = x;
    const auto sure = gated.forward().values;
    for (double& weight : gated.layer.router[0].value.values) weight *= 3;
    CHECK(gated.forward().values != sure);
}

TEST_CASE("the load-balance loss by hand") {
    // Three of four tokens prefer the first resolution, by 1, 2, 1 and -1.
    Net<TwoByHand<Switch>> net({.router = {.balance = .7}}, 2, 1, 1, 4);
    make_identities(net.layer);
    net.x.values = {1, 0, 2, 0, 2, 1, 1, 2};
    net.forward();
    CHECK(net.routes() == std::vector<index_t>{0, 0, 0, 1});
    const auto first = [](double lead) { return 1 / (1 + std::exp(-lead)); };
    const double mean = (first(1) + first(2) + first(1) + first(-1)) / 4;
    CHECK(net.layer.balance_loss(net.saved) == doctest::Approx(.7 * 2 * (.75 * mean + .25 * (1 - mean))).epsilon(1e-14));
}

TEST_CASE("padding, an item without tokens, random routes as functions of the draw") {
    POLYATTN_RANDOM(random);
    const index_t n = 20, dim = 4;
    Net<MultiResolution<SegmentMeans<2, 8>, RandomRoute>, float> net({}, dim, 2, 3, n);
    net.x = random.tensor<float>({3 * n, dim});
    net.options.key_lengths = {n, 11, 0};
    net.options.draw = {.seed = 5, .step = 3};
    const auto before = net.forward().values;
    const std::vector<index_t> routes = net.routes();
    Tensor<float> d_y({3 * n, dim});
    std::fill(d_y.values.begin(), d_y.values.end(), 1.f);
    net.backward(d_y);
    const auto d_before = net.d_x.values;
    for (index_t row = n + 11; row < 3 * n; ++row) {
        CHECK(routes[static_cast<std::size_t>(row)] == -1);
        for (index_t c = 0; c < dim; ++c) {
            CHECK(before[static_cast<std::size_t>(row * dim + c)] == 0);
            CHECK(d_before[static_cast<std::size_t>(row * dim + c)] == 0);
            net.x.values[static_cast<std::size_t>(row * dim + c)] = 1e30f;
        }
    }
    CHECK(net.forward().values == before);
    net.options.draw.step = 4;
    net.forward();
    CHECK(net.routes() != routes);
}

TEST_CASE("padding that is not a number reaches no gradient of a learned router") {
    POLYATTN_RANDOM(random);
    const index_t n = 12, dim = 4;
    Net<MultiResolution<SegmentMeans<1, 4>>> net({}, dim, 2, 2, n, random.seed());
    net.x = random.tensor<double>({2 * n, dim});
    net.options.key_lengths = {n, 7};
    const auto d_y = random.tensor<double>({2 * n, dim});
    const auto run = [&] {
        net.forward();
        net.backward(d_y);
        auto all = net.layer.router[0].gradient.values;
        all.insert(all.end(), net.layer.query.gradient.values.begin(), net.layer.query.gradient.values.end());
        return all;
    };
    const auto before = run();
    std::fill(net.x.values.begin() + (n + 7) * dim, net.x.values.end(), std::nan(""));
    CHECK(run() == before);
}

TEST_CASE("a model learns with it, the same bits for any number of threads") {
    using Model = nn::Classifier<float, MultiResolution<SegmentMeans<2, 8>>>;
    const std::uint64_t seed = 1;  // whether a model learns in so few steps hangs on its start
    const auto train = [&]([[maybe_unused]] int threads) {
#if defined(_OPENMP)
        omp_set_num_threads(threads);
#endif
        Model model({}, 5, 2, {.layers = 2, .dim = 16, .heads = 2, .hidden = 32, .deviation = .1, .seed = seed});
        nn::AdamW<float> optimizer;
        typename Model::Saved saved;
        Workspace workspace;
        std::vector<double> losses;
        for (std::uint32_t step = 0; step < 120; ++step) {  // is token 4 among 24?
            std::vector<index_t> tokens, labels;
            for (std::uint32_t b = 0; b < 16; ++b) {
                RandomRow row(seed, step * 16 + b, 77);
                for (int i = 0; i < 24; ++i) tokens.push_back(static_cast<index_t>(row.below(4)));
                labels.push_back(static_cast<index_t>(row.below(2)));
                if (labels.back()) tokens[tokens.size() - 1 - row.below(24)] = 4;
            }
            const nn::Pass pass{.workspace = &workspace, .draw = {.seed = seed, .step = step}, .training = true};
            const MatrixView<float> logits = model.forward(tokens, 16, saved, pass);
            losses.push_back(nn::cross_entropy(logits, std::span<const index_t>(labels)));
            model.backward(saved, pass);
            optimizer.step(model, 3e-3);
        }
        return losses;
    };
    const std::vector<double> losses = train(1);
    CHECK(train(2) == losses);
    double first = 0, last = 0;
    for (std::size_t i = 0; i < 10; ++i) {
        first += losses[i] / 10;
        last += losses[losses.size() - 1 - i] / 10;
    }
    CHECK(last < .5 * first);
}

TEST_CASE("errors name the argument") {
    using Layer = nn::AdaptiveMultiResolution<float, MultiResolution<>>;
    CHECK(argument([] { Layer("layer", {}, 6, 4, 4, .02, 1, 1); }) == "heads");
    CHECK(argument([] { Layer("layer", {}, 8, 4, 2, .02, 1, 1); }) == "key_heads");
    Net<MultiResolution<>> net({}, 4, 2, 2, 10);
    net.options.key_lengths = {11, 3};
    CHECK(argument([&] { net.forward(); }) == "key_lengths");
    net.options.key_lengths = {3};
    CHECK(argument([&] { net.forward(); }) == "key_lengths");
    net.options.key_lengths = {};
    net.options.plan = Dense{}.plan(10, 10);
    CHECK(argument([&] { net.forward(); }) == "plan");
    CHECK(argument([] { Layer("layer", {.router = {.balance = -1}}, 8, 4, 4, .02, 1, 1); }) == "balance");
}
