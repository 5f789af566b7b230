#pragma once

#include <polyattn/nn/loss.hpp>
#include <polyattn/nn/token_encoder.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace nn {

/// What a Classifier makes of an item's tokens. `first`, the head of BERT and of Diffuser's authors: token 0, dropout, a linear layer, tanh, dropout.
enum class Pooling { mean, first };

/// A batch item's tokens to a row of outputs: token encoder, pooling of its valid tokens, linear head. Logits of classes, or values to
/// regress. An item without tokens has features 0.
template <class T, class Attention>
class Classifier {
public:
    Classifier(const Attention& attention, index_t vocabulary, index_t outputs, const TransformerOptions& options, index_t positions = 0, Pooling pooling = Pooling::mean)
        : encoder(attention, vocabulary, options, positions), head("head", options.dim, outputs, options.deviation, options.seed), dropout_(options.dropout) {
        if (pooling == Pooling::first) pooler.emplace_back("pooler", options.dim, options.dim, options.deviation, options.seed);
    }

    struct Saved {
        typename TokenEncoder<T, Attention>::Saved encoder;
        Tensor<T> pooled, bent, kept, outputs, d_pooled, d_bent, d_features;  // bent: by tanh; kept: what dropout leaves of it
        detail::ActivationDropout pooled_dropout, head_dropout;
        std::vector<index_t> lengths;
    };

    /// Outputs [batch, outputs], in saved.outputs. tokens [batch, tokens]; those of an item beyond pass.lengths do not count. Throws
    /// invalid_input.
    MatrixView<T> forward(std::span<const index_t> tokens, index_t batch, Saved& saved, const Pass& pass) const {
        const MatrixView<const T> features = encoder.forward(tokens, batch, saved.encoder, pass);
        const index_t length = features.rows / batch;
        saved.lengths = pass.lengths;
        detail::reshape(saved.pooled, {batch, features.cols});
        detail::reshape(saved.outputs, {batch, head.out()});
        const MatrixView<T> pooled = detail::rows_of(saved.pooled);
        parallel_for(batch, [&](offset_t b, int) {
            const index_t pooling = pooled_tokens(saved, static_cast<index_t>(b), length);
            T* const mean = pooled.row(static_cast<index_t>(b));
            std::fill_n(mean, pooled.cols, T(0));
            for (index_t i = 0; i < pooling; ++i)
                detail::simd::add_scaled<T, xsimd::default_arch>(1 / static_cast<T>(pooling), features.row(static_cast<index_t>(b) * length + i), pooled.cols, mean);
        });
        if (!pooler.empty()) bend(saved, pass);
        head.forward(detail::rows_of(std::as_const(pooler.empty() ? saved.pooled : saved.kept)), detail::rows_of(saved.outputs), *pass.workspace);
        return detail::rows_of(saved.outputs);
    }
    /// Adds to all gradients, from d_outputs in place of the outputs (as the losses leave them).
    void backward(Saved& saved, const Pass& pass) {
        pass.require_workspace();
        detail::reshape(saved.d_pooled, saved.pooled.shape);
        const MatrixView<T> d_pooled = detail::rows_of(saved.d_pooled);
        if (pooler.empty()) head.backward(detail::rows_of(std::as_const(saved.pooled)), detail::rows_of(std::as_const(saved.outputs)), d_pooled, false, *pass.workspace);
        else unbend(saved, pass);
        const MatrixView<const T> features = encoder.features(saved.encoder);
        const index_t batch = d_pooled.rows, length = features.rows / batch;
        detail::reshape(saved.d_features, {features.rows, features.cols});
        const MatrixView<T> d_features = detail::rows_of(saved.d_features);
        parallel_for(batch, [&](offset_t b, int) {
            const index_t pooling = pooled_tokens(saved, static_cast<index_t>(b), length);
            for (index_t i = 0; i < length; ++i) {
                T* const row = d_features.row(static_cast<index_t>(b) * length + i);
                if (i < pooling) detail::simd::scale_row<T, xsimd::default_arch>(d_pooled.row(static_cast<index_t>(b)), 1 / static_cast<T>(pooling), d_features.cols, row);
                else std::fill_n(row, d_features.cols, T(0));
            }
        });
        encoder.backward(d_features, saved.encoder, pass);
    }

    template <class F>
    void for_each_parameter(F&& f) {
        encoder.for_each_parameter(f);
        for (Linear<T>& layer : pooler) layer.for_each_parameter(f);
        head.for_each_parameter(f);
    }

    TokenEncoder<T, Attention> encoder;
    std::vector<Linear<T>> pooler;  // one or none
    Linear<T> head;

private:
    /// Tokens whose mean is taken.
    index_t pooled_tokens(const Saved& saved, index_t item, index_t length) const {
        const index_t valid = saved.lengths.empty() ? length : saved.lengths[static_cast<std::size_t>(item)];
        return pooler.empty() ? valid : std::min(valid, index_t{1});
    }
    void bend(Saved& saved, const Pass& pass) const {
        saved.pooled_dropout = {dropout_, pass, detail::DropSite::pooled};
        saved.head_dropout = {dropout_, pass, detail::DropSite::head};
        for (Tensor<T>* tensor : {&saved.bent, &saved.kept}) detail::reshape(*tensor, saved.pooled.shape);
        drop_rows(saved.pooled_dropout, saved.pooled);
        pooler[0].forward(detail::rows_of(std::as_const(saved.pooled)), detail::rows_of(saved.bent), *pass.workspace);
        for (T& entry : saved.bent.values) entry = std::tanh(entry);
        saved.kept.values = saved.bent.values;
        drop_rows(saved.head_dropout, saved.kept);
    }
    void unbend(Saved& saved, const Pass& pass) {
        detail::reshape(saved.d_bent, saved.bent.shape);
        head.backward(detail::rows_of(std::as_const(saved.kept)), detail::rows_of(std::as_const(saved.outputs)), detail::rows_of(saved.d_bent), false, *pass.workspace);
        drop_rows(saved.head_dropout, saved.d_bent);
        for (std::size_t i = 0; i < saved.bent.values.size(); ++i) saved.d_bent.values[i] *= 1 - saved.bent.values[i] * saved.bent.values[i];
        pooler[0].backward(detail::rows_of(std::as_const(saved.pooled)), detail::rows_of(std::as_const(saved.d_bent)), detail::rows_of(saved.d_pooled), false, *pass.workspace);
        drop_rows(saved.pooled_dropout, saved.d_pooled);
    }
    static void drop_rows(const detail::ActivationDropout& dropout, Tensor<T>& tensor) {
        if (!dropout.active()) return;
        const MatrixView<T> rows = detail::rows_of(tensor);
        for (index_t i = 0; i < rows.rows; ++i) dropout.apply(i, 0, std::span<T>(rows.row(i), static_cast<std::size_t>(rows.cols)));
    }

    double dropout_;
};

}  // namespace nn

POLYATTN_END_NAMESPACE
