#pragma once
// The decoder of SSA's text experiments with made-up tokens: 256 columns, 4 heads, 4 layers, and its training step.

#include "common.hpp"

#include <polyattn/nn/language_model.hpp>
#include <polyattn/nn/optimizer.hpp>
#include <polyattn/nn/subsampling.hpp>

namespace bench {

/// SSA in all layers; dense for one window.
inline nn::PlanSource sampled_plans(index_t windows, index_t layers) {
    const OverDepth sigma = linear(.05, .25, layers);
    if (windows == 2) return nn::subsampled(Causal{}, LocallyBiased<2>{sigma});
    if (windows == 4) return nn::subsampled(Causal{}, LocallyBiased<4>{sigma});
    if (windows == 8) return nn::subsampled(Causal{}, LocallyBiased<8>{sigma});
    return {};
}

template <class Layer>
struct Decoder {
    static constexpr index_t dim = 256, layers = 4, heads = 4;
    nn::LanguageModel<float, Layer> model;
    nn::AdamW<float> optimizer;
    typename nn::LanguageModel<float, Layer>::Saved saved;
    Workspace workspace;
    std::vector<index_t> text, targets;
    index_t batch;
    std::uint32_t steps = 0;

    Decoder(const Layer& attention, index_t n, index_t batch_in) : model(attention, 256, {.layers = layers, .dim = dim, .heads = heads}), batch(batch_in) {
        for (index_t i = 0; i < n * batch; ++i) {
            const auto token = [](index_t at) { return static_cast<index_t>(static_cast<std::uint32_t>(at) * 2654435761u >> 8 & 255); };
            text.push_back(token(i));
            targets.push_back(token(i + 1));
        }
    }
    double step(const nn::PlanSource& plans) {
        const double loss = model.train(text, targets, batch, saved, {.workspace = &workspace, .draw = {.seed = 1, .step = ++steps}, .training = true, .plans = plans});
        nn::clip_gradients(model, 1);
        optimizer.step(model, 1e-3);
        return loss;
    }
};

}  // namespace bench
