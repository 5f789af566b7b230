// nn::LanguageModel on the device against the CPU, both in double.
#include "cuda/device_model.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"

#include <polyattn/nn/language_model.hpp>
#include <polyattn/polyattn.hpp>

#include <doctest/doctest.h>

using namespace polyattn;

namespace {

template <class Layer>
void check(Random& random, const Layer& layer, index_t reach, index_t dim, index_t heads, index_t key_heads, bool pre_norm, index_t positions) {
    INFO("dim ", dim, ", heads ", heads, ", key heads ", key_heads, ", pre-norm ", pre_norm, ", positions ", positions);
    const index_t vocabulary = 11, batch = 2, length = 9;
    nn::LanguageModel<double, Layer> model(layer, vocabulary, {.layers = 2, .dim = dim, .heads = heads, .key_heads = key_heads, .hidden = dim + 3, .pre_norm = pre_norm, .embedding_norm = !pre_norm, .deviation = .3, .seed = random.seed()},
                                           positions);
    model.for_each_parameter([&](nn::Parameter<double>& parameter) {
        for (double& value : parameter.value.values) value += .1 * random.normal();
    });
    std::vector<index_t> tokens;
    for (index_t i = 0; i < batch * length; ++i) tokens.push_back(random.below(vocabulary));
    const std::vector<index_t> lengths = {length, length - 3};
    typename nn::LanguageModel<double, Layer>::Saved saved;
    Workspace workspace;
    const MatrixView<double> wanted = model.forward(tokens, batch, saved, {.workspace = &workspace, .lengths = lengths});
    std::map<std::string, Tensor<double>> parameters;
    model.for_each_parameter([&](const nn::Parameter<double>& parameter) { parameters.emplace(parameter.name, parameter.value); });
    const auto got = device_logits(parameters, {heads, key_heads, pre_norm, reach}, tokens, batch, lengths);
    REQUIRE(got.size() == static_cast<std::size_t>(batch * length * vocabulary));
    double largest = 0;
    for (const double value : got) largest = std::max(largest, std::abs(value));
    // Two layers of some hundred roundings each, which layer norms may enlarge a hundredfold: an estimate.
    for (index_t i = 0; i < wanted.rows; ++i)
        for (index_t c = 0; c < vocabulary; ++c) CHECK(std::abs(got[static_cast<std::size_t>(i * vocabulary + c)] - wanted(i, c)) <= 1e5 * 0x1p-53 * largest);
    const auto shape_refused = [&](const char* name) {
        auto others = parameters;
        auto& shape = others.at(name).shape;
        ++shape.back();
        others.at(name) = random.tensor<double>(shape);
        CHECK(argument([&] { device_logits(others, {heads, key_heads, pre_norm, reach}, tokens, batch, lengths); }) == name);
    };
    for (const char* name : {"head.weight", "head.bias", "block.0.attention.project.weight", "block.1.attention.merge.weight", "block.0.feed_forward.down.weight", "block.1.feed_forward.up.bias", "block.1.attention_norm.weight"}) shape_refused(name);
    if (positions > 0) shape_refused("position.weight");
    if (reach >= 0) shape_refused("block.1.attention.bias_table");
    if (key_heads > 1) CHECK(argument([&] { device_logits(parameters, {heads, 1, pre_norm, reach}, tokens, batch, lengths); }) == "block.0.attention.project.weight");
    auto missing = parameters;
    missing.erase("head.bias");
    CHECK(argument([&] { device_logits(missing, {heads, key_heads, pre_norm, reach}, tokens, batch, lengths); }) == "parameters");
}

}  // namespace

TEST_CASE("logits of a language model") {
    POLYATTN_RANDOM(random);
    check(random, Attention<Causal, Alibi>{Alibi(2)}, -1, 6, 2, 2, true, 0);
    check(random, Attention<Causal, Alibi>{Alibi(4)}, -1, 40, 4, 2, true, 12);
    const LocalGlobalRandom pattern{.window = 4, .globals = 2, .randoms = 2};
    check(random, Attention<LocalGlobalRandom, PPR<2>, RelativePosition>{pattern, RelativePosition{2, 3, std::vector<double>(14)}}, 3, 70, 2, 1, false, 9);
}
