#pragma once

#include <polyattn/nn/loss.hpp>
#include <polyattn/nn/token_encoder.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace nn {

/// A batch item's tokens to a row of outputs: token encoder, mean over its valid tokens, linear head. Logits of classes, or values to
/// regress. An item without tokens has features 0.
template <class T, class Attention>
class Classifier {
public:
    Classifier(const Attention& attention, index_t vocabulary, index_t outputs, const TransformerOptions& options, index_t positions = 0)
        : encoder(attention, vocabulary, options, positions), head("head", options.dim, outputs, options.deviation, options.seed) {}

    struct Saved {
        typename TokenEncoder<T, Attention>::Saved encoder;
        Tensor<T> pooled, outputs, d_pooled, d_features;
    };

    /// Outputs [batch, outputs], in saved.outputs. tokens [batch, tokens]; those of an item beyond pass.lengths do not count. Throws
    /// invalid_input.
    MatrixView<T> forward(std::span<const index_t> tokens, index_t batch, Saved& saved, const Pass& pass) const {
        const MatrixView<const T> features = encoder.forward(tokens, batch, saved.encoder, pass);
        const index_t length = features.rows / batch;
        detail::reshape(saved.pooled, {batch, features.cols});
        detail::reshape(saved.outputs, {batch, head.out()});
        const MatrixView<T> pooled = detail::rows_of(saved.pooled);
        parallel_for(batch, [&](offset_t b, int) {
            const index_t valid = valid_tokens(pass, static_cast<index_t>(b), length);
            T* const mean = pooled.row(static_cast<index_t>(b));
            std::fill_n(mean, pooled.cols, T(0));
            for (index_t i = 0; i < valid; ++i)
                detail::simd::add_scaled<T, xsimd::default_arch>(1 / static_cast<T>(valid), features.row(static_cast<index_t>(b) * length + i), pooled.cols, mean);
        });
        head.forward(pooled, detail::rows_of(saved.outputs), *pass.workspace);
        return detail::rows_of(saved.outputs);
    }
    /// Adds to all gradients, from d_outputs in place of the outputs (as the losses leave them).
    void backward(Saved& saved, const Pass& pass) {
        detail::reshape(saved.d_pooled, saved.pooled.shape);
        const MatrixView<T> d_pooled = detail::rows_of(saved.d_pooled);
        head.backward(detail::rows_of(std::as_const(saved.pooled)), detail::rows_of(std::as_const(saved.outputs)), d_pooled, false, *pass.workspace);
        const MatrixView<const T> features = encoder.features(saved.encoder);
        const index_t batch = d_pooled.rows, length = features.rows / batch;
        detail::reshape(saved.d_features, {features.rows, features.cols});
        const MatrixView<T> d_features = detail::rows_of(saved.d_features);
        parallel_for(batch, [&](offset_t b, int) {
            const index_t valid = valid_tokens(pass, static_cast<index_t>(b), length);
            for (index_t i = 0; i < length; ++i) {
                T* const row = d_features.row(static_cast<index_t>(b) * length + i);
                if (i < valid) detail::simd::scale_row<T, xsimd::default_arch>(d_pooled.row(static_cast<index_t>(b)), 1 / static_cast<T>(valid), d_features.cols, row);
                else std::fill_n(row, d_features.cols, T(0));
            }
        });
        encoder.backward(d_features, saved.encoder, pass);
    }

    template <class F>
    void for_each_parameter(F&& f) {
        encoder.for_each_parameter(f);
        head.for_each_parameter(f);
    }

    TokenEncoder<T, Attention> encoder;
    Linear<T> head;

private:
    static index_t valid_tokens(const Pass& pass, index_t item, index_t length) { return pass.lengths.empty() ? length : pass.lengths[static_cast<std::size_t>(item)]; }
};

}  // namespace nn

POLYATTN_END_NAMESPACE
