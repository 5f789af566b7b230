#pragma once

#include <polyattn/nn/loss.hpp>
#include <polyattn/nn/transformer.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace nn {

/// Tokens to logits over the vocabulary: embedding (and learned positions, if `positions` is their number), transformer, linear head. With
/// a causal attention a decoder, as SSA (KDD 2023) trains on text: pre-LN, ALiBi, GELU, plain embedding and softmax.
template <class T, class Attention>
class LanguageModel {
public:
    LanguageModel(const Attention& attention, index_t vocabulary, const TransformerOptions& options, index_t positions = 0)
        : embedding("embedding", vocabulary, options.dim, options.deviation, options.seed), transformer("block", attention, options),
          head("head", options.dim, vocabulary, options.deviation, options.seed), dropout_(options.dropout) {
        if (positions > 0) position.emplace_back("position", positions, options.dim, options.deviation, options.seed);
    }

    struct Saved {
        typename Transformer<T, Attention>::Saved transformer;
        std::vector<index_t> tokens, places;
        Tensor<T> logits, d_out, d_in;
        index_t batch = 0;
        detail::ActivationDropout dropout;
    };

    /// Logits [batch x tokens, vocabulary] in saved.logits. tokens [batch, tokens], one item after the other. Throws invalid_input.
    MatrixView<T> forward(std::span<const index_t> tokens, index_t batch, Saved& saved, const Pass& pass) const {
        detail::require(batch >= 1 && tokens.size() % static_cast<std::size_t>(batch) == 0, "tokens", [&] { return detail::text("batch ", batch, " times a number of tokens"); }, tokens.size());
        detail::require(pass.workspace, "pass.workspace", "a workspace", "none");
        const auto rows = static_cast<index_t>(tokens.size()), length = rows / batch;
        saved.batch = batch;
        saved.tokens.assign(tokens.begin(), tokens.end());
        const MatrixView<T> x = transformer.input(saved.transformer, rows, transformer.last_norm.weight.value.shape[0]);
        embedding.forward(saved.tokens, x);
        if (!position.empty()) {
            saved.places.resize(tokens.size());
            for (index_t i = 0; i < rows; ++i) saved.places[static_cast<std::size_t>(i)] = i % length;
            position[0].forward(saved.places, x, true);
        }
        saved.dropout = {dropout_, pass, detail::DropSite::embedding};
        if (saved.dropout.active()) detail::parallel_rows(rows, [&](index_t i) { saved.dropout.apply(i, 0, std::span<T>(x.row(i), static_cast<std::size_t>(x.cols))); });
        const MatrixView<const T> out = transformer.forward(batch, saved.transformer, pass);
        detail::reshape(saved.logits, {rows, head.out()});
        head.forward(out, detail::rows_of(saved.logits), *pass.workspace);
        return detail::rows_of(saved.logits);
    }
    /// Adds to all gradients, from d_logits in place of the logits (as cross_entropy leaves them).
    void backward(Saved& saved, const Pass& pass) {
        const MatrixView<const T> d_logits = detail::rows_of(std::as_const(saved.logits));
        auto& inner = saved.transformer;
        const Tensor<T>& out = transformer_out(inner);
        detail::reshape(saved.d_out, out.shape);
        head.backward(detail::rows_of(out), d_logits, detail::rows_of(saved.d_out), false, *pass.workspace);
        const MatrixView<const T> d_in = detail::dropped(transformer.backward(detail::rows_of(std::as_const(saved.d_out)), saved.batch, inner, pass), saved.dropout, saved.d_in);
        embedding.backward(saved.tokens, d_in);
        if (!position.empty()) position[0].backward(saved.places, d_in);
    }

    /// Forward, mean cross-entropy to `targets` in nats, backward.
    double train(std::span<const index_t> tokens, std::span<const index_t> targets, index_t batch, Saved& saved, const Pass& pass) {
        const double loss = cross_entropy(forward(tokens, batch, saved, pass), targets);
        backward(saved, pass);
        return loss;
    }

    template <class F>
    void for_each_parameter(F&& f) {
        embedding.for_each_parameter(f);
        for (auto& table : position) table.for_each_parameter(f);
        transformer.for_each_parameter(f);
        head.for_each_parameter(f);
    }

    Embedding<T> embedding;
    std::vector<Embedding<T>> position;
    Transformer<T, Attention> transformer;
    Linear<T> head;

private:
    static const Tensor<T>& transformer_out(const typename Transformer<T, Attention>::Saved& saved) { return saved.out.shape.empty() ? saved.inputs.back() : saved.out; }
    double dropout_;
};

}  // namespace nn

POLYATTN_END_NAMESPACE
