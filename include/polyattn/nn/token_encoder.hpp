#pragma once

#include <polyattn/nn/transformer.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace nn {

/// Tokens to features: embedding, learned positions if `positions` is their number, layer norm if the options want it, dropout,
/// transformer. What a language model and a classifier have in common.
template <class T, class Attention>
class TokenEncoder {
public:
    TokenEncoder(const Attention& attention, index_t vocabulary, const TransformerOptions& options, index_t positions)
        : embedding("embedding", vocabulary, options.dim, options.deviation, options.seed), transformer("block", attention, options), dropout_(options.dropout) {
        if (positions > 0) position.emplace_back("position", positions, options.dim, options.deviation, options.seed);
        if (options.embedding_norm) norm.emplace_back("embedding_norm", options.dim, options.norm_epsilon);
    }

    struct Saved {
        typename Transformer<T, Attention>::Saved transformer;
        std::vector<index_t> tokens, places;
        Tensor<T> embedded, d_in, d_embedded;  // in front of the layer norm, if there is one
        typename LayerNorm<T>::Saved norm;
        index_t batch = 0;
        detail::ActivationDropout dropout;
    };

    index_t dim() const { return static_cast<index_t>(embedding.weight.value.shape[1]); }

    /// Features [batch x tokens, dim]. tokens [batch, tokens], one item after the other. Throws invalid_input.
    MatrixView<const T> forward(std::span<const index_t> tokens, index_t batch, Saved& saved, const Pass& pass) const {
        detail::require(batch >= 1 && tokens.size() % static_cast<std::size_t>(batch) == 0, "tokens", [&] { return detail::text("batch ", batch, " times a number of tokens"); }, tokens.size());
        pass.require_workspace();
        const auto rows = static_cast<index_t>(tokens.size()), length = rows / batch;
        saved.batch = batch;
        saved.tokens.assign(tokens.begin(), tokens.end());
        const MatrixView<T> x = transformer.input(saved.transformer, rows, dim());
        if (!norm.empty()) detail::reshape(saved.embedded, {rows, dim()});
        const MatrixView<T> embedded = norm.empty() ? x : detail::rows_of(saved.embedded);
        embedding.forward(saved.tokens, embedded);
        if (!position.empty()) {
            saved.places.resize(tokens.size());
            for (index_t i = 0; i < rows; ++i) saved.places[static_cast<std::size_t>(i)] = i % length;
            position[0].forward(saved.places, embedded, true);
        }
        if (!norm.empty()) norm[0].forward(embedded, x, saved.norm);
        saved.dropout = {dropout_, pass, detail::DropSite::embedding};
        if (saved.dropout.active()) detail::parallel_rows(rows, [&](index_t i) { saved.dropout.apply(i, 0, std::span<T>(x.row(i), static_cast<std::size_t>(x.cols))); });
        return transformer.forward(batch, saved.transformer, pass);
    }
    /// Adds to all gradients.
    void backward(MatrixView<const T> d_features, Saved& saved, const Pass& pass) {
        pass.require_workspace();
        MatrixView<const T> d_in = detail::dropped(transformer.backward(d_features, saved.batch, saved.transformer, pass), saved.dropout, saved.d_in);
        if (!norm.empty()) {
            detail::reshape(saved.d_embedded, saved.embedded.shape);
            const MatrixView<T> d_embedded = detail::rows_of(saved.d_embedded);
            norm[0].backward(detail::rows_of(std::as_const(saved.embedded)), d_in, saved.norm, d_embedded);
            d_in = d_embedded;
        }
        embedding.backward(saved.tokens, d_in);
        if (!position.empty()) position[0].backward(saved.places, d_in);
    }
    /// What forward() returned.
    MatrixView<const T> features(const Saved& saved) const { return transformer.output(saved.transformer); }

    template <class F>
    void for_each_parameter(F&& f) {
        embedding.for_each_parameter(f);
        for (auto& table : position) table.for_each_parameter(f);
        for (auto& layer : norm) layer.for_each_parameter(f);
        transformer.for_each_parameter(f);
    }

    Embedding<T> embedding;
    std::vector<Embedding<T>> position;  // one or none, as is ..
    std::vector<LayerNorm<T>> norm;      // .. the norm
    Transformer<T, Attention> transformer;

private:
    double dropout_;
};

}  // namespace nn

POLYATTN_END_NAMESPACE
