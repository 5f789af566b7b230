// Layers with parameters: finite differences of everything that is learned, training steps that repeat
// to the last bit, files, schedules and ensembles.
#include "support/random.hpp"

#include <polyattn/nn/classifier.hpp>
#include <polyattn/nn/language_model.hpp>
#include <polyattn/nn/optimizer.hpp>
#include <polyattn/nn/safetensors.hpp>
#include <polyattn/nn/subsampling.hpp>
#include <polyattn/polyattn.hpp>

#include <doctest/doctest.h>

#include <filesystem>

using namespace polyattn;

namespace {

constexpr double unit = 0x1p-53;

void use_threads([[maybe_unused]] int count) {
#if defined(_OPENMP)
    omp_set_num_threads(count);
#endif
}

/// For all parameters of a model, and for `inputs`: gradients of loss() against central differences in a few random entries of each. The
/// gradients are there when this is called; loss() may overwrite none of them.
template <class Model, class Loss>
void check_gradients(Random& random, Model& model, const std::vector<std::pair<std::span<double>, std::span<const double>>>& inputs, Loss&& loss) {
    const auto check = [&](const std::string& name, std::span<double> values, std::span<const double> gradient) {
        for (int tries = 0; tries < 6; ++tries) {
            const auto at = static_cast<std::size_t>(random.below(static_cast<index_t>(values.size())));
            const double kept = values[at], step = 1e-5 * std::max(1., std::abs(kept));
            // A second difference of twice the width takes away the error of third order.
            double slope[2];
            for (const int width : {1, 2}) {
                values[at] = kept + width * step;
                const double above = loss();
                values[at] = kept - width * step;
                slope[width - 1] = (above - loss()) / (2 * width * step);
            }
            values[at] = kept;
            const double numeric = (4 * slope[0] - slope[1]) / 3;
            // Rounding of the loss by some thousand operations, over the step.
            const double allowed = 1e3 * unit * std::max(1., std::abs(loss())) / step + 1e-7 * std::abs(numeric);
            INFO(name, "[", at, "]: by hand ", gradient[at], ", by differences ", numeric);
            CHECK(std::abs(gradient[at] - numeric) <= allowed);
        }
    };
    model.for_each_parameter([&](nn::Parameter<double>& parameter) {
        check(parameter.name, parameter.value.values, parameter.gradient.values);
        CHECK(std::any_of(parameter.gradient.values.begin(), parameter.gradient.values.end(), [](double g) { return g != 0; }));
    });
    for (const auto& [values, gradient] : inputs) check("input", values, gradient);
}

/// sum over weights * y: a loss whose gradient is `weights`.
double weighted(const Tensor<double>& weights, const Tensor<double>& y) { return std::inner_product(y.values.begin(), y.values.end(), weights.values.begin(), 0.); }

/// Parameters drawn anew, so that nothing is 0 or 1 by chance.
template <class Model>
void shake(Model& model, Random& random, double scale = .5) {
    model.for_each_parameter([&](auto& parameter) {
        for (auto& value : parameter.value.values) value += scale * random.normal();
    });
}

struct TwoLayers {
    nn::Linear<double>&one, &two;
    template <class F>
    void for_each_parameter(F&& f) {
        one.for_each_parameter(f);
        two.for_each_parameter(f);
    }
};

}  // namespace

TEST_CASE("linear, layer norm, embedding, feed-forward: finite differences") {
    POLYATTN_RANDOM(random);
    Workspace workspace;
    for (const index_t rows : {1, 7, 131}) {
        auto x = random.tensor<double>({rows, 11});
        Tensor<double> y({rows, 13}), d_x({rows, 11});
        const auto rows_of = [](Tensor<double>& t) { return detail::rows_of(t); };
        {
            nn::Linear<double> layer("linear", 11, 13, .3, random.seed());
            shake(layer, random);
            const auto d_y = random.tensor<double>({rows, 13});
            layer.backward(rows_of(x), detail::rows_of(d_y), rows_of(d_x), false, workspace);
            check_gradients(random, layer, {{x.values, d_x.values}}, [&] {
                layer.forward(rows_of(x), rows_of(y), workspace);
                return weighted(d_y, y);
            });
        }
        {
            nn::LayerNorm<double> layer("norm", 11);
            shake(layer, random);
            const auto d_y = random.tensor<double>({rows, 11});
            nn::LayerNorm<double>::Saved saved;
            Tensor<double> z({rows, 11});
            const auto loss = [&] {
                layer.forward(rows_of(x), rows_of(z), saved);
                return weighted(d_y, z);
            };
            loss();
            layer.backward(rows_of(x), detail::rows_of(d_y), saved, rows_of(d_x));
            const auto once = d_x;
            check_gradients(random, layer, {{x.values, once.values}}, loss);
            nn::zero_gradients(layer);
            layer.backward(rows_of(x), detail::rows_of(d_y), saved, rows_of(d_x), detail::rows_of(d_y));
            for (std::size_t i = 0; i < once.values.size(); ++i) CHECK(d_x.values[i] == once.values[i] + d_y.values[i]);
        }
        {
            nn::FeedForward<double> layer("feed", 11, 29, .3, 1, random.seed());
            shake(layer, random, .2);
            const auto d_y = random.tensor<double>({rows, 11});
            Tensor<double> z({rows, 11});
            nn::FeedForward<double>::Saved saved;
            const nn::Pass pass{.workspace = &workspace, .draw = {.seed = random.seed()}, .training = true};
            const detail::ActivationDropout dropout(.3, pass, detail::DropSite::feed_forward);
            const auto loss = [&] {
                layer.forward(rows_of(x), rows_of(x), rows_of(z), saved, dropout, workspace);
                return weighted(d_y, z);
            };
            loss();
            layer.backward(rows_of(x), detail::rows_of(d_y), rows_of(d_x), saved, workspace);
            for (std::size_t i = 0; i < d_x.values.size(); ++i) d_x.values[i] += d_y.values[i];  // the residual's
            check_gradients(random, layer, {{x.values, d_x.values}}, loss);
        }
    }
    nn::Embedding<double> table("table", 5, 3, .4, random.seed());
    const std::vector<index_t> numbers{4, 0, 4, 2, 1, 3, 4};
    const auto d_y = random.tensor<double>({7, 3});
    Tensor<double> y({7, 3});
    table.backward(numbers, detail::rows_of(d_y));
    check_gradients(random, table, {}, [&] {
        table.forward(numbers, detail::rows_of(y));
        return weighted(d_y, y);
    });
    CHECK_THROWS_AS(table.forward(std::vector<index_t>{5}, detail::rows_of(y)), invalid_input);
}

TEST_CASE_TEMPLATE("GELU by its definition, relative to the value in the tails too", T, float, double) {
    POLYATTN_RANDOM(random);
    constexpr long double u = std::numeric_limits<T>::epsilon() / 2;
    constexpr long double least = std::is_same_v<T, float> ? 13 : 37;  // e^(-x^2 / 2) is a normal number up to here
    for (int i = 0; i < 2000; ++i) {
        const T x = static_cast<T>(i < 9 ? -4 + i : (2 * random.uniform() - 1) * double(least));
        T y = 0, slope = 1;
        detail::gelu(&x, 1, &y);
        detail::multiply_gelu_slope(&x, 1, &slope);
        const long double z = x, p = std::erfc(-z / std::numbers::sqrt2_v<long double>) / 2, density = std::exp(-z * z / 2) / std::sqrt(2 * std::numbers::pi_v<long double>);
        // Roundings of the exponent, x^2 / 2 times 5/2, and of the other factors.
        const long double relative = (1.25L * z * z + 16) * u;
        INFO("x = " << x);
        CHECK(std::abs(y - z * p) <= (relative + u) * std::abs(z * p));
        CHECK(std::abs(slope - (p + z * density)) <= relative * (p + std::abs(z) * density) + 2 * u * std::abs(p + z * density));
    }
    for (const T x : {T(-1e30), T(-50), T(50), T(1e30)}) {
        T y = 0, slope = 1;
        detail::gelu(&x, 1, &y);
        detail::multiply_gelu_slope(&x, 1, &slope);
        CHECK(y == (x > 0 ? x : T(0)));
        CHECK(slope == T(x > 0));
    }
    const T nan = std::numeric_limits<T>::quiet_NaN();
    T y = 0;
    detail::gelu(&nan, 1, &y);
    CHECK(std::isnan(y));
}

TEST_CASE("losses: values and gradients") {
    POLYATTN_RANDOM(random);
    auto logits = random.tensor<double>({5, 7}, 3);
    const std::vector<index_t> targets{0, 6, nn::ignored, 3, 3};
    const auto loss_of = [&](Tensor<double> at) { return nn::cross_entropy(detail::rows_of(at), targets); };
    auto gradient = logits;
    double wanted = 0;
    for (std::size_t i = 0; i < 5; ++i) {
        if (targets[i] == nn::ignored) continue;
        double sum = 0;
        for (std::size_t c = 0; c < 7; ++c) sum += std::exp(logits.values[7 * i + c]);
        wanted += (std::log(sum) - logits.values[7 * i + static_cast<std::size_t>(targets[i])]) / 4;
    }
    CHECK(std::abs(nn::cross_entropy(detail::rows_of(gradient), targets) - wanted) < 1e-13);
    for (std::size_t i = 0; i < 35; ++i) {
        auto above = logits, below = logits;
        above.values[i] += 1e-5;
        below.values[i] -= 1e-5;
        CHECK(std::abs((loss_of(above) - loss_of(below)) / 2e-5 - gradient.values[i]) < 1e-9);
    }
    CHECK(nn::cross_entropy(detail::rows_of(logits), std::vector<index_t>(5, nn::ignored)) == 0);
    CHECK(std::all_of(logits.values.begin(), logits.values.end(), [](double g) { return g == 0; }));
    CHECK_THROWS_AS(nn::cross_entropy(detail::rows_of(logits), std::vector<index_t>{0, 1, 2, 3, 7}), invalid_input);
    CHECK_THROWS_AS(nn::cross_entropy(detail::rows_of(logits), std::vector<index_t>{0}), invalid_input);
    Tensor<double> no_classes({5, 0});
    CHECK_THROWS_AS(nn::cross_entropy(MatrixView<double>{no_classes.data(), 5, 0, 0, 1}, std::vector<index_t>(5, nn::ignored)), invalid_input);
    std::vector<double> values{1, -2, 5}, errors = values;
    const std::vector<double> goals{2, -2, 1};
    CHECK(std::abs(nn::mean_squared_error<double>(errors, goals) - 17. / 3) < 1e-15);
    CHECK((std::abs(errors[0] + 2. / 3) < 1e-15 && errors[1] == 0 && std::abs(errors[2] - 8. / 3) < 1e-15));
    errors = values;
    CHECK(std::abs(nn::mean_absolute_error<double>(errors, goals) - 5. / 3) < 1e-15);
    CHECK((std::abs(errors[0] + 1. / 3) < 1e-15 && errors[1] == 0 && std::abs(errors[2] - 1. / 3) < 1e-15));
    CHECK_THROWS_AS(nn::mean_squared_error<double>(errors, std::vector<double>{1}), invalid_input);
}

TEST_CASE("whole models: finite differences of every parameter") {
    POLYATTN_RANDOM(random);
    Workspace workspace;
    const auto check = [&](const auto& attention, nn::TransformerOptions options, nn::Pass pass, index_t positions = 0) {
        using Model = nn::LanguageModel<double, std::remove_cvref_t<decltype(attention)>>;
        Model model(attention, 9, options, positions);
        shake(model, random, .2);
        const index_t batch = 2, tokens = 13;
        std::vector<index_t> text, targets;
        for (index_t i = 0; i < batch * tokens; ++i) {
            text.push_back(i < 9 ? i : random.below(9));
            targets.push_back(i % tokens < 11 ? random.below(9) : nn::ignored);
        }
        typename Model::Saved saved;
        pass.workspace = &workspace;
        pass.draw.seed = random.seed();
        model.train(text, targets, batch, saved, pass);
        check_gradients(random, model, {}, [&] { return nn::cross_entropy(model.forward(text, batch, saved, pass), targets); });
    };
    const nn::TransformerOptions small{.layers = 2, .dim = 8, .heads = 2, .hidden = 10, .deviation = .3, .seed = random.seed()};
    check(Attention<Causal, Alibi>{Alibi(2)}, small, {});
    auto options = small;
    options.pre_norm = false;
    check(Attention<>{}, options, {.lengths = {13, 11}}, 13);
    options = small;
    options.heads = 4;
    options.key_heads = 2;
    options.dropout = .2;
    options.attention_dropout = {.weights = .2, .values = .1};
    check(Attention{Causal{}, PPR<2>{}}, options, {.training = true});
    options.pre_norm = false;
    options.embedding_norm = true;
    options.norm_epsilon = 1e-3;
    check(Attention{SlidingWindow{.window = 6}}, options, {.training = true}, 13);
    // Three items of up to 7 tokens, as regression: the tokens.
    const auto check_items = [&]<class Model>(Model& model, const nn::Pass& pass, typename Model::Saved& saved) {
        shake(model, random, .2);
        std::vector<index_t> items;
        for (index_t i = 0; i < 21; ++i) items.push_back(i < 5 ? i : random.below(5));
        const auto goals = random.tensor<double>({3, 3});
        const auto loss = [&] {
            const MatrixView<double> outputs = model.forward(items, 3, saved, pass);
            return nn::mean_squared_error<double>({outputs.data, 9}, goals.values);
        };
        loss();
        model.backward(saved, {.workspace = pass.workspace});  // what was saved says the rest
        check_gradients(random, model, {}, loss);
        CHECK_THROWS_AS(model.forward(items, 3, saved, {}), invalid_input);
        CHECK_THROWS_AS(model.backward(saved, {}), invalid_input);
        return items;
    };
    {
        // A ragged batch of graphs: a learned bias by distance, every item its own.
        const auto distance = [](index_t batch, index_t query, index_t key) { return (query + key + batch) % 4; };
        TableBias bias{distance, 2, std::vector<double>(8)};
        for (double& entry : bias.table) entry = random.normal();
        const Attention attention{bias, Unbiased{.drop = .4, .per_item = true}};
        using Model = nn::Classifier<double, std::remove_const_t<decltype(attention)>>;
        Model model(attention, 5, 3, small, 7);
        const nn::Pass pass{.workspace = &workspace, .draw = {.seed = random.seed()}, .lengths = {7, 4, 1}};
        typename Model::Saved saved;
        auto nodes = check_items(model, pass, saved);
        // Tokens behind an item's length change nothing.
        const auto before = [&] {
            model.forward(nodes, 3, saved, pass);
            return saved.outputs.values;
        }();
        nodes[20] = (nodes[20] + 1) % 5;
        model.forward(nodes, 3, saved, pass);
        CHECK(saved.outputs.values == before);
    }
    {
        // The head of token 0, with dropout; an item without tokens.
        using Model = nn::Classifier<double, Attention<>>;
        auto dropping = small;
        dropping.dropout = .3;
        Model model(Attention<>{}, 5, 3, dropping, 7, nn::Pooling::first);
        nn::Pass pass{.workspace = &workspace, .draw = {.seed = random.seed()}, .training = true, .lengths = {7, 4, 0}};
        typename Model::Saved saved;
        const auto tokens = check_items(model, pass, saved);
        pass.training = false;
        model.forward(tokens, 3, saved, pass);
        const MatrixView<const double> features = model.encoder.features(saved.encoder);
        const auto &w = model.pooler[0].weight.value.values, &b = model.pooler[0].bias.value.values;
        for (index_t item = 0; item < 3; ++item)
            for (index_t o = 0; o < 3; ++o) {
                double sum = model.head.bias.value.values[static_cast<std::size_t>(o)];
                for (index_t c = 0; c < small.dim; ++c) {
                    double bent = b[static_cast<std::size_t>(c)];
                    for (index_t t = 0; t < small.dim && item < 2; ++t) bent += w[static_cast<std::size_t>(c * small.dim + t)] * features(item * 7, t);
                    sum += model.head.weight.value.values[static_cast<std::size_t>(o * small.dim + c)] * std::tanh(bent);
                }
                CHECK(saved.outputs.values[static_cast<std::size_t>(item * 3 + o)] == doctest::Approx(sum).epsilon(1e-12));
            }
    }
    // A learned bias, and sampled attention in the second layer.
    RelativePosition bias{.heads = 2, .reach = 3, .table = std::vector<double>(14)};
    for (double& entry : bias.table) entry = random.normal();
    check(Attention{Causal{}, bias}, small, {.plans = nn::subsampled(Causal{}, LocallyBiased<3>{.sigma = .3}, {1, 2})});
    CHECK_THROWS_AS((nn::LanguageModel<double, Attention<>>(Attention<>{}, 9, {.dim = 12, .heads = 5})), invalid_input);
    CHECK_THROWS_AS((nn::LanguageModel<double, Attention<>>(Attention<>{}, 9, {.dim = 12, .heads = 4, .key_heads = 3})), invalid_input);
    CHECK_THROWS_AS((nn::LanguageModel<double, Attention<>>(Attention<>{}, 9, {.layers = 0})), invalid_input);
}

namespace {

/// Parameters and losses after some steps of training with everything random that there is.
std::pair<std::vector<float>, std::vector<double>> trained(int threads, const std::string& file = "", int first = 0, int last = 6) {
    use_threads(threads);
    const Attention<Causal, Alibi> attention{Alibi(4)};
    nn::LanguageModel<float, Attention<Causal, Alibi>> model(attention, 40, {.layers = 2, .dim = 48, .heads = 4, .dropout = .1, .attention_dropout = {.weights = .1}, .seed = 3});
    nn::AdamW<float> optimizer;
    optimizer.weight_decay = .1;
    if (first > 0) nn::load_parameters(model, nn::TensorFile<float>::read(file), &optimizer);
    typename decltype(model)::Saved saved;
    Workspace workspace;
    const nn::SubsampledTraining recipe{nn::subsampled(Causal{}, LocallyBiased<4>{.sigma = linear(.05, .25, 2)}), .3};
    std::vector<double> losses;
    for (int step = first; step < last; ++step) {
        std::vector<index_t> text, targets;
        for (index_t i = 0; i < 2 * 75; ++i) {
            text.push_back((i * i + step) % 40);
            targets.push_back(((i + 1) * (i + 1) + step) % 40);
        }
        losses.push_back(model.train(text, targets, 2, saved, {.workspace = &workspace, .draw = {.seed = 5, .step = static_cast<std::uint32_t>(step)}, .training = true, .plans = recipe.at(step, 6)}));
        nn::clip_gradients(model, 1);
        optimizer.step(model, nn::LearningRate{.peak = 1e-2, .warmup = 2, .steps = 6}.at(step));
    }
    if (!file.empty() && first == 0) nn::parameters_of(model, &optimizer).write(file);
    std::vector<float> values;
    model.for_each_parameter([&](nn::Parameter<float>& parameter) { values.insert(values.end(), parameter.value.values.begin(), parameter.value.values.end()); });
    use_threads(worker_count());
    return {values, losses};
}

struct Scratch {
    std::filesystem::path folder = std::filesystem::temp_directory_path() / ("polyattn_nn_" + std::to_string(std::random_device{}()));
    Scratch() { std::filesystem::create_directories(folder); }
    ~Scratch() { std::filesystem::remove_all(folder); }
};

}  // namespace

TEST_CASE("training steps are the same to the last bit for any number of threads, and after a stop") {
    const int before = worker_count();
    const auto one = trained(1), three = trained(3);
    CHECK(one.first == three.first);
    CHECK(one.second == three.second);
    const Scratch scratch;
    const std::string file = (scratch.folder / "run.safetensors").string();
    const auto half = trained(2, file, 0, 3), rest = trained(2, file, 3, 6);
    CHECK(rest.first == one.first);
    CHECK(rest.second.back() == one.second.back());
    CHECK(half.second[0] == one.second[0]);
    use_threads(before);
}

TEST_CASE("the optimizer against its formulas, decay and clipping") {
    nn::Linear<double> layer("layer", 3, 7, 1, 1);
    const auto start = layer.weight.value.values;
    for (std::size_t i = 0; i < 21; ++i) layer.weight.gradient.values[i] = double(i) - 10;
    const auto gradient = layer.weight.gradient.values;
    nn::AdamW<double> optimizer;
    optimizer.weight_decay = .1;
    optimizer.step(layer, .01);
    for (std::size_t i = 0; i < 21; ++i) {  // the first step: m / (1 - beta1) = g, s / (1 - beta2) = g^2
        const double g = gradient[i];
        CHECK(std::abs(layer.weight.value.values[i] - (start[i] * (1 - .01 * .1) - .01 * g / (std::abs(g) + 1e-8))) < 1e-14);
        CHECK(layer.weight.gradient.values[i] == 0);
    }
    CHECK(std::all_of(layer.bias.value.values.begin(), layer.bias.value.values.end(), [](double b) { return b == 0; }));
    layer.weight.gradient.values = gradient;
    layer.bias.gradient.values[0] = 3;
    double squares = 9;
    for (const double g : gradient) squares += g * g;
    CHECK(std::abs(nn::clip_gradients(layer, 2.) - std::sqrt(squares)) < 1e-12);
    CHECK(std::abs(nn::clip_gradients(layer, 5.) - 2) < 1e-12);
    CHECK(std::abs(layer.bias.gradient.values[0] - 3 * 2 / std::sqrt(squares)) < 1e-14);
    const nn::LearningRate rate{.peak = 2, .last = 1, .warmup = 4, .steps = 14};
    CHECK((rate.at(0) == .5 && rate.at(3) == 2 && rate.at(4) == 2 && std::abs(rate.at(9) - 1.5) < 1e-15 && std::abs(rate.at(14) - 1) < 1e-15 && rate.at(99) == rate.at(14)));
    const nn::LearningRate line{.peak = 2, .last = 1, .steps = 10, .cosine = false};
    CHECK((line.at(0) == 2 && std::abs(line.at(3) - 1.7) < 1e-15));
    CHECK_THROWS_AS((nn::LearningRate{.peak = 0}.validate()), invalid_input);
    CHECK_THROWS_AS((nn::LearningRate{.warmup = 3, .steps = 2}.validate()), invalid_input);
    CHECK_THROWS_AS(nn::clip_gradients(layer, 0), invalid_input);
    CHECK_THROWS_AS((nn::LearningRate{.peak = 1e-3}.at(3)), invalid_input);  // of how many steps?
    nn::Linear<double> other("other", 2, 7, 1, 1);
    const auto untouched = other.weight.value.values;
    CHECK_THROWS_AS(optimizer.step(other, .1), invalid_input);
    CHECK(other.weight.value.values == untouched);
    CHECK_THROWS_AS(nn::parameters_of(other, &optimizer), invalid_input);
    TwoLayers more{layer, other};
    CHECK_THROWS_AS(optimizer.step(more, .1), invalid_input);
    CHECK_THROWS_AS(nn::parameters_of(more, &optimizer), invalid_input);
    optimizer.beta2 = 1;
    CHECK_THROWS_AS(optimizer.step(layer, .1), invalid_input);
    nn::AdamW<float> narrow;
    narrow.epsilon = 1e-40;  // no normal number of float
    CHECK_THROWS_AS(narrow.validate(), invalid_input);
    nn::AdamW<double> wide;
    wide.epsilon = 1e-40;
    CHECK_NOTHROW(wide.validate());
    // Rows that do not fit.
    Workspace workspace;
    Tensor<double> few({2, other.in()}), many({5, other.out()});
    CHECK_THROWS_AS(other.forward(detail::rows_of(std::as_const(few)), detail::rows_of(many), workspace), invalid_input);
    CHECK_THROWS_AS(other.backward(detail::rows_of(std::as_const(few)), detail::rows_of(std::as_const(many)), {}, false, workspace), invalid_input);
}

TEST_CASE("sizes that parameters can't have") {
    CHECK_THROWS_AS((nn::Linear<float>("a", -1, 2, 1, 1)), invalid_input);
    CHECK_THROWS_AS((nn::Linear<float>("a", 2, 0, 1, 1)), invalid_input);
    CHECK_THROWS_AS((nn::Embedding<float>("a", -3, 2, 1, 1)), invalid_input);
    CHECK_THROWS_AS((nn::Embedding<float>("a", 3, -2, 1, 1)), invalid_input);
    CHECK_THROWS_AS((nn::LayerNorm<float>("a", -4)), invalid_input);
    CHECK_THROWS_AS((nn::LayerNorm<float>("a", 4, -1e-5)), invalid_input);
    CHECK_THROWS_AS((nn::LayerNorm<float>("a", 4, std::nan(""))), invalid_input);
    CHECK_THROWS_AS((Tensor<float>({2, -1})), invalid_input);
}

TEST_CASE("initial values hang on seed and name, not on order") {
    nn::Linear<float> a("a", 30, 40, .02, 7), b("b", 30, 40, .02, 7), again("a", 30, 40, .02, 7);
    CHECK(a.weight.value.values == again.weight.value.values);
    CHECK(a.weight.value.values != b.weight.value.values);
    double squares = 0;
    for (const float w : a.weight.value.values) squares += double(w) * double(w) / 1200;
    CHECK(std::abs(squares / (.02 * .02) - 1) < 6 * std::sqrt(2. / 1200));
    // Branches end smaller, or as all weights are.
    for (const bool scaled : {true, false}) {
        nn::TransformerBlock<float, Attention<>> block("block", {}, {.layers = 8, .dim = 40, .heads = 2, .scaled_branches = scaled});
        double merge = 0, down = 0;
        for (const float w : block.attention.merge.weight.value.values) merge += double(w) * double(w) / (40 * 40);
        for (const float w : block.feed_forward.down.weight.value.values) down += double(w) * double(w) / (40 * 160);
        const double wanted = .02 * .02 / (scaled ? 16 : 1);
        CHECK(std::abs(merge / wanted - 1) < 6 * std::sqrt(2. / 1600));
        CHECK(std::abs(down / wanted - 1) < 6 * std::sqrt(2. / 6400));
    }
    const auto paper = nn::TransformerOptions::diffuser();
    CHECK_NOTHROW(paper.validate());
    CHECK((paper.layers == 12 && paper.dim == 768 && paper.heads == 12 && paper.hidden == 3072 && !paper.pre_norm && !paper.scaled_branches));
}

TEST_CASE("files: what numpy wrote, names of someone else, and what is refused") {
    // The bytes that Python writes: json.dumps(header) padded with spaces, then array.tobytes().
    const Scratch scratch;
    const auto path = scratch.folder / "other.safetensors";
    const auto write = [&](const std::string& header, const std::vector<unsigned char>& data) {
        std::ofstream out(path, std::ios::binary);
        const std::uint64_t length = header.size();
        out.write(reinterpret_cast<const char*>(&length), 8);
        out << header;
        out.write(reinterpret_cast<const char*>(data.data()), static_cast<std::streamsize>(data.size()));
    };
    // numpy.float32([[1, -2], [0.5, 3], [0, 1e-3]]), numpy.float64([1.5, -0.25, 7]), numpy.float16([1, -0.5, 65504, 6e-8]), bfloat16 1 and -3,
    // numpy.int64([5, -2]), numpy.int32([-7]).
    const std::string header = R"({"__metadata__": {"from": "numpy"}, "encoder.w": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}, )"
                               R"("encoder.b": {"dtype": "F64", "shape": [3], "data_offsets": [24, 48]}, "half": {"dtype": "F16", "shape": [4], "data_offsets": [48, 56]}, )"
                               R"("brain": {"dtype": "BF16", "shape": [2], "data_offsets": [56, 60]}, "places": {"dtype": "I64", "shape": [2], "data_offsets": [60, 76]}, )"
                               R"("place": {"dtype": "I32", "shape": [], "data_offsets": [76, 80]}}   )";
    const std::vector<unsigned char> data{0, 0, 128, 63, 0, 0, 0, 192, 0, 0, 0, 63, 0, 0, 64, 64, 0, 0, 0, 0, 111, 18, 131, 58,              // float32
                                          0, 0, 0, 0, 0, 0, 248, 63, 0, 0, 0, 0, 0, 0, 208, 191, 0, 0, 0, 0, 0, 0, 28, 64,                 // float64
                                          0, 60, 0, 184, 255, 123, 1, 0,                                                                   // float16
                                          128, 63, 64, 192,                                                                                // bfloat16
                                          5, 0, 0, 0, 0, 0, 0, 0, 254, 255, 255, 255, 255, 255, 255, 255, 249, 255, 255, 255};             // int64, int32
    write(header, data);
    const auto file = nn::TensorFile<float>::read(path);
    CHECK(file.metadata.at("from") == "numpy");
    CHECK(file.at("half").values == AlignedVector<float>{1, -.5f, 65504, 0x1p-24f});
    CHECK(file.at("brain").values == AlignedVector<float>{1, -3});
    CHECK(file.at("places").values == AlignedVector<float>{5, -2});
    CHECK(file.at("place").values == AlignedVector<float>{-7});
    nn::Linear<float> layer("mine", 2, 3, 1, 1);
    const std::map<std::string, std::string> names{{"mine.weight", "encoder.w"}, {"mine.bias", "encoder.b"}};
    nn::load_parameters(layer, file, static_cast<nn::AdamW<float>*>(nullptr), [&](const std::string& name) { return names.at(name); });
    CHECK(layer.weight.value.values == AlignedVector<float>{1, -2, .5, 3, 0, 1e-3f});
    CHECK(layer.bias.value.values == AlignedVector<float>{1.5, -.25, 7});
    const std::vector<float> x{2, 1};
    std::vector<float> y(3);
    Workspace workspace;
    layer.forward({x.data(), 1, 2, 2, 1}, MatrixView<float>{y.data(), 1, 3, 3, 1}, workspace);
    CHECK((y[0] == 1.5f && y[1] == 3.75f && std::abs(y[2] - 7.001f) <= 8 * 0x1p-24f));
    CHECK_THROWS_AS(nn::load_parameters(layer, file), invalid_input);                        // no such names
    nn::AdamW<float> optimizer;
    CHECK_THROWS_AS(nn::load_parameters(layer, file, &optimizer), invalid_input);            // no state
    CHECK_THROWS_AS(file.at("encoder.w", {2, 3}), invalid_input);
    // Back and forth, with the state of an optimizer.
    layer.weight.gradient.values[3] = 1;
    optimizer.step(layer, .1);
    nn::parameters_of(layer, &optimizer).write(path);
    nn::Linear<float> copy("mine", 2, 3, 1, 9);
    nn::AdamW<float> resumed;
    nn::load_parameters(copy, nn::TensorFile<float>::read(path), &resumed);
    CHECK(copy.weight.value.values == layer.weight.value.values);
    CHECK(resumed.steps == 1);
    CHECK(resumed.moments[0].mean == optimizer.moments[0].mean);
    // What can't be loaded changes nothing.
    const auto refuses = [&](auto&& spoil) {
        auto spoilt = nn::TensorFile<float>::read(path);
        for (auto& [name, tensor] : spoilt.tensors) std::fill(tensor.values.begin(), tensor.values.end(), 7.f);
        spoil(spoilt);
        CHECK_THROWS_AS(nn::load_parameters(copy, spoilt, &resumed), invalid_input);
        CHECK(copy.weight.value.values == layer.weight.value.values);
        CHECK(resumed.steps == 1);
        CHECK(resumed.moments.size() == 2);
        CHECK(resumed.moments[0].mean == optimizer.moments[0].mean);
    };
    for (const char* steps : {"-1", "abc", "12abc", "", " 3", "99999999999999999999"}) refuses([&](auto& spoilt) { spoilt.metadata["adam_steps"] = steps; });
    for (const char* name : {"mine.bias", "mine.bias.adam_mean", "mine.weight.adam_square"}) refuses([&](auto& spoilt) { spoilt.tensors.erase(name); });
    refuses([](auto& spoilt) { spoilt.tensors["mine.bias"].shape = {1, 3}; });
    CHECK(!std::filesystem::exists(path.string() + ".part"));
    // Broken ones.
    using File = nn::TensorFile<double>;
    CHECK_THROWS_AS(File::read(scratch.folder / "none"), nn::file_error);
    CHECK_THROWS_AS(File::read(scratch.folder), nn::file_error);
    for (const char* broken : {"{", "[]", R"({"a": 3})", R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}})", R"({"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}})",
                               R"({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}})", R"({"a": {"dtype": "F32", "shape": [9000000000, 9000000000], "data_offsets": [0, 4]}})",
                               R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}})", R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}})"}) {
        write(broken, {0, 0, 0, 0});
        INFO(broken);
        CHECK_THROWS_AS(File::read(path), nn::file_error);
    }
    {
        std::ofstream out(path, std::ios::binary);
        out << "\xff\xff\xff\xff\xff\xff\xff\x7f{}";
    }
    CHECK_THROWS_AS(File::read(path), nn::file_error);
}

TEST_CASE("which layers sample, and when") {
    const auto plans = nn::subsampled(Causal{}, LocallyBiased<4>{.sigma = linear(.1, .2, 6)}, nn::LayerRange::last_of(2, 6));
    for (index_t layer = 0; layer < 6; ++layer) {
        const auto plan = plans({layer, 3, 40, {}, {.seed = 1, .layer = static_cast<std::uint32_t>(layer)}});
        CHECK(plan.size() == (layer >= 4 ? 1 : 0));
        if (!plan.empty()) CHECK(plan[0].count() == LocallyBiased<4>{.sigma = linear(.1, .2, 6)}.sample(40, 40, {.seed = 1, .layer = static_cast<std::uint32_t>(layer)}, true).count());
    }
    // A draw for each item of a ragged batch.
    const std::vector<index_t> lengths{10, 3, 8};
    const auto items = nn::subsampled(Dense{}, Unbiased{.drop = .5, .per_item = true})({0, 3, 10, lengths, {.seed = 1}});
    REQUIRE(items.size() == 3);
    for (std::size_t b = 0; b < 3; ++b) CHECK(items[b].count() == 10 * ((lengths[b] + 1) / 2));
    // All but the last two of the lower ten; a mask.
    const auto called = [](const auto& source, index_t layer) { return !source({layer, 1, 16, {}, {.seed = 1}}).empty(); };
    const auto lower = nn::subsampled(Causal{}, LocallyBiased<2>{}, nn::LayerRange{0, 8}), some = nn::subsampled(Causal{}, LocallyBiased<2>{}, nn::LayerMask{{true, false, true}});
    for (index_t layer = 0; layer < 10; ++layer) {
        CHECK(called(lower, layer) == (layer < 8));
        CHECK(called(some, layer) == (layer == 0 || layer == 2));
    }
    const nn::SubsampledTraining recipe{plans};
    CHECK_THROWS_AS((nn::SubsampledTraining{plans, std::nan("")}.samples_at(0, 1)), invalid_input);
    CHECK((recipe.samples_at(0, 100) && recipe.samples_at(89, 100) && !recipe.samples_at(90, 100)));
    CHECK(!recipe.at(95, 100));
    CHECK_THROWS_AS(nn::LayerRange::last_of(7, 6), invalid_input);
    CHECK_THROWS_AS(nn::subsampled(Causal{}, LocallyBiased<4>{.sigma = -1.}), invalid_input);
}

TEST_CASE("self-ensembles: means, variances, inequalities") {
    POLYATTN_RANDOM(random);
    // Probabilities of 5 classes for 8 rows in 12 samples.
    nn::SelfEnsemble all, first, second;
    std::vector<AlignedVector<double>> samples;
    for (int s = 0; s < 12; ++s) {
        auto p = random.tensor<double>({8, 5}, 2);
        nn::softmax_rows(detail::rows_of(p));
        samples.push_back(p.values);
        all.add(std::span<const double>(p.values));
        (s < 5 ? first : second).add(std::span<const double>(p.values));
    }
    // As if another process had collected the second part.
    first.merge(nn::SelfEnsemble(second.samples(), {second.mean().begin(), second.mean().end()}, {second.squares().begin(), second.squares().end()}));
    CHECK_THROWS_AS(nn::SelfEnsemble(2, {1.}, {}), invalid_input);
    CHECK(first.samples() == 12);
    const auto variance = all.variance(), merged = first.variance();
    for (std::size_t i = 0; i < 40; ++i) {
        double mean = 0, squares = 0;
        for (const auto& p : samples) mean += p[i] / 12;
        for (const auto& p : samples) squares += (p[i] - mean) * (p[i] - mean) / 11;
        CHECK(std::abs(all.mean()[i] - mean) < 1e-14);
        CHECK(std::abs(variance[i] - squares) < 1e-14);
        CHECK(std::abs(first.mean()[i] - mean) < 1e-14);
        CHECK(std::abs(merged[i] - squares) < 1e-14);
        // Jensen: -log of the mean <= the mean of -log; the squared error of the mean <= the mean squared error.
        double logs = 0, errors = 0;
        for (const auto& p : samples) {
            logs -= std::log(p[i]) / 12;
            errors += (p[i] - .3) * (p[i] - .3) / 12;
        }
        CHECK(-std::log(all.mean()[i]) <= logs + 1e-14);
        CHECK((all.mean()[i] - .3) * (all.mean()[i] - .3) <= errors + 1e-14);
    }
    CHECK(nn::SelfEnsemble{}.variance().empty());
    CHECK_THROWS_AS(all.add(std::span<const double>(samples[0]).first(3)), invalid_input);
    // The variance of an ensemble's output falls as 1 / samples: q = 0, v = 0 .. 7, 4 of 8 keys, variance .75 of one sample.
    const Attention<Unbiased> attention{Unbiased{.drop = .5}};
    Tensor<double> zero({8, 1}), v({8, 1});
    std::iota(v.values.begin(), v.values.end(), 0.);
    const int ensembles = 4000;
    for (const int size : {1, 4}) {
        nn::SelfEnsemble outputs;
        for (int e = 0; e < ensembles; ++e) {
            nn::SelfEnsemble own;
            const std::uint64_t seed = random.seed();
            for (int s = 0; s < size; ++s)
                own.add(std::span<const double>(attention(zero.view(), zero.view(), v.view(), {.draw = {.seed = seed, .sample = static_cast<std::uint32_t>(s)}}).values).first(1));
            outputs.add(own.mean());
        }
        CHECK(std::abs(outputs.mean()[0] - 3.5) < 6 * std::sqrt(.75 / size / ensembles));
        CHECK(std::abs(outputs.variance()[0] - .75 / size) < 6 * .75 / size * std::sqrt(2. / ensembles));
    }
    CHECK_THROWS_AS((nn::SelfEnsemble(2, {1.}, {-5.})), invalid_input);
}

TEST_CASE("sliding windows count every token once, with context in front") {
    for (const offset_t tokens : {0, 1, 9, 10, 11, 57})
        for (const index_t stride : {1, 3, 10}) {
            std::vector<int> counted(static_cast<std::size_t>(tokens), 0);
            nn::sliding_windows(tokens, 10, stride, [&](offset_t first, offset_t last, offset_t from) {
                CHECK(last - first <= 10);
                CHECK((first == 0 || from - first >= 10 - stride));
                for (offset_t i = from; i < last; ++i) ++counted[static_cast<std::size_t>(i)];
            });
            CHECK(std::all_of(counted.begin(), counted.end(), [](int times) { return times == 1; }));
        }
    CHECK_THROWS_AS(nn::sliding_windows(5, 4, 5, [](offset_t, offset_t, offset_t) {}), invalid_input);
    CHECK_THROWS_AS(nn::sliding_windows(5, 0, 1, [](offset_t, offset_t, offset_t) {}), invalid_input);
}

TEST_CASE("causal models leak nothing") {
    POLYATTN_RANDOM(random);
    const nn::LanguageModel<float, Attention<Causal, Alibi>> model(Attention<Causal, Alibi>{Alibi(2)}, 20, {.layers = 2, .dim = 16, .heads = 2, .deviation = .3});
    typename std::remove_const_t<decltype(model)>::Saved saved;
    Workspace workspace;
    std::vector<index_t> text;
    for (index_t i = 0; i < 60; ++i) text.push_back(random.below(20));
    const nn::Pass pass{.workspace = &workspace, .draw = {.seed = random.seed()}, .plans = nn::subsampled(Causal{}, LocallyBiased<4>{.sigma = .3})};
    model.forward(text, 1, saved, pass);
    const auto before = saved.logits.values;
    for (const index_t changed : {5, 31, 59}) {
        auto other = text;
        other[static_cast<std::size_t>(changed)] = (other[static_cast<std::size_t>(changed)] + 1) % 20;
        model.forward(other, 1, saved, pass);
        CHECK(std::equal(before.begin(), before.begin() + changed * 20, saved.logits.values.begin()));
        CHECK(!std::equal(before.begin() + changed * 20, before.begin() + (changed + 1) * 20, saved.logits.values.begin() + changed * 20));
    }
    CHECK_THROWS_AS(model.forward(std::vector<index_t>{20}, 1, saved, pass), invalid_input);
    CHECK_THROWS_AS(model.forward(text, 7, saved, pass), invalid_input);
    CHECK_THROWS_AS(model.forward(text, 1, saved, {}), invalid_input);
}
