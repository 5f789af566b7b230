#pragma once

#include <polyattn/nn/loss.hpp>
#include <polyattn/nn/token_encoder.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace nn {

/// Tokens to logits over the vocabulary: token encoder and a linear head. With a causal attention a decoder, as SSA (KDD 2023) trains on
/// text: pre-LN, ALiBi, GELU, plain embedding and softmax.
template <class T, class Attention>
class LanguageModel {
public:
    LanguageModel(const Attention& attention, index_t vocabulary, const TransformerOptions& options, index_t positions = 0)
        : encoder(attention, vocabulary, options, positions), head("head", options.dim, vocabulary, options.deviation, options.seed) {}

    struct Saved {
        typename TokenEncoder<T, Attention>::Saved encoder;
        Tensor<T> logits, d_features;
    };

    /// Logits [batch x tokens, vocabulary], in saved.logits. tokens [batch, tokens], one item after the other. Throws invalid_input.
    MatrixView<T> forward(std::span<const index_t> tokens, index_t batch, Saved& saved, const Pass& pass) const {
        const MatrixView<const T> features = encoder.forward(tokens, batch, saved.encoder, pass);
        detail::reshape(saved.logits, {features.rows, head.out()});
        head.forward(features, detail::rows_of(saved.logits), *pass.workspace);
        return detail::rows_of(saved.logits);
    }
    /// Adds to all gradients, from d_logits in place of the logits (as cross_entropy leaves them).
    void backward(Saved& saved, const Pass& pass) {
        pass.require_workspace();
        const MatrixView<const T> features = encoder.features(saved.encoder);
        detail::reshape(saved.d_features, {features.rows, features.cols});
        head.backward(features, detail::rows_of(std::as_const(saved.logits)), detail::rows_of(saved.d_features), false, *pass.workspace);
        encoder.backward(detail::rows_of(std::as_const(saved.d_features)), saved.encoder, pass);
    }

    /// Forward, mean cross-entropy to `targets` in nats, backward.
    double train(std::span<const index_t> tokens, std::span<const index_t> targets, index_t batch, Saved& saved, const Pass& pass) {
        const double loss = cross_entropy(forward(tokens, batch, saved, pass), targets);
        backward(saved, pass);
        return loss;
    }

    template <class F>
    void for_each_parameter(F&& f) {
        encoder.for_each_parameter(f);
        head.for_each_parameter(f);
    }

    TokenEncoder<T, Attention> encoder;
    Linear<T> head;
};

}  // namespace nn

POLYATTN_END_NAMESPACE
