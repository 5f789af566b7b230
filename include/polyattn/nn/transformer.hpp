#pragma once

#include <polyattn/nn/adaptive_multi_resolution.hpp>
#include <polyattn/nn/embedding.hpp>
#include <polyattn/nn/feed_forward.hpp>
#include <polyattn/nn/layer_norm.hpp>
#include <polyattn/nn/multi_head.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

/// The layer that mixes tokens in a block.
template <class T, class Attention>
struct token_mixer {
    using type = nn::MultiHeadAttention<T, Attention>;
};
template <class T, class... Parts>
struct token_mixer<T, MultiResolution<Parts...>> {
    using type = nn::AdaptiveMultiResolution<T, MultiResolution<Parts...>>;
};

}  // namespace detail

namespace nn {

/// Sizes of a transformer, and how it starts.
struct TransformerOptions {
    index_t layers = 4;
    index_t dim = 128;
    index_t heads = 4;
    /// 0: as many as heads.
    index_t key_heads = 0;
    /// Columns of the feed-forward layers. 0: 4 dim.
    index_t hidden = 0;
    /// Layer norms in front of each branch, and one at the end (pre-LN); else behind each sum (post-LN).
    bool pre_norm = true;
    /// A layer norm on the embeddings, as BERT has it.
    bool embedding_norm = false;
    /// What layer norms add to variances.
    double norm_epsilon = 1e-5;
    /// Dropout on embeddings and branches, and on attention's weights and Z.
    double dropout = 0;
    Dropout attention_dropout = {};
    /// Deviation of the initial weights.
    double deviation = .02;
    /// The last products of branches start smaller by 1 / sqrt(2 layers), as deep pre-LN networks want it; else all weights have the same deviation.
    bool scaled_branches = true;
    std::uint64_t seed = 1;

    /// Diffuser's text model (AAAI 2023), beside window, global and random tokens of 64 each: post-LN, all weights N(0, .02), dropout .1.
    static TransformerOptions diffuser() { return {.layers = 12, .dim = 768, .heads = 12, .hidden = 3072, .pre_norm = false, .dropout = .1, .scaled_branches = false}; }

    void validate() const {
        detail::require(layers >= 1, "layers", "a number >= 1", layers);
        detail::require(key_heads >= 0, "key_heads", "a number >= 0", key_heads);
        detail::require(dim >= 1, "dim", "a number of columns >= 1", dim);
        detail::require(hidden >= 0, "hidden", "a number of columns >= 0", hidden);
        detail::require_in_range(dropout, 0, .999, "dropout", "a probability of [0, 1)");
        detail::require_in_range(deviation, 0, 1e3, "deviation", "a deviation >= 0");
        detail::require_in_range(norm_epsilon, 0, 1, "norm_epsilon", "a number of [0, 1]");
        attention_dropout.validate();
    }
};

/// Attention and feed-forward branches with residuals and layer norms: h = x + attention(norm(x)), y = h + feed_forward(norm(h)), or with the
/// norms behind the sums. Sources: Vaswani et al. (2017); Xiong et al., "On layer normalization in the transformer architecture" (2020).
/// `Attention` is an Attention<...>, for multi-head attention, or a MultiResolution<...>.
template <class T, class Attention>
class TransformerBlock {
public:
    using Mixer = typename detail::token_mixer<T, Attention>::type;

    TransformerBlock(const std::string& name, Attention layer, const TransformerOptions& options)
        : attention(name + ".attention", std::move(layer), options.dim, options.heads, options.key_heads > 0 ? options.key_heads : options.heads, options.deviation, scale(options), options.seed),
          feed_forward(name + ".feed_forward", options.dim, options.hidden > 0 ? options.hidden : 4 * options.dim, options.deviation, scale(options), options.seed),
          attention_norm(name + ".attention_norm", options.dim, options.norm_epsilon), feed_forward_norm(name + ".feed_forward_norm", options.dim, options.norm_epsilon), pre_norm_(options.pre_norm),
          dropout_(options.dropout), attention_dropout_(options.attention_dropout) {}

    struct Saved {
        Tensor<T> attended, middle, fed;  // pre-LN: norm(x), h, norm(h); post-LN: the first sum, h, the second sum
        typename LayerNorm<T>::Saved attention_norm, feed_forward_norm;
        typename Mixer::Saved attention;
        typename FeedForward<T>::Saved feed_forward;
        Tensor<T> d_middle, d_branch;
    };

    /// Rows of x and y are batch x tokens; `pass.draw` is this layer's.
    void forward(MatrixView<const T> x, MatrixView<T> y, index_t batch, Saved& saved, const Pass& pass) const {
        for (Tensor<T>* tensor : {&saved.attended, &saved.middle, &saved.fed}) detail::reshape(*tensor, {x.rows, x.cols});
        const MatrixView<T> attended = detail::rows_of(saved.attended), middle = detail::rows_of(saved.middle), fed = detail::rows_of(saved.fed);
        const detail::ActivationDropout attention_drop(dropout_, pass, detail::DropSite::attention), feed_drop(dropout_, pass, detail::DropSite::feed_forward);
        CallOptions options{.key_lengths = pass.lengths, .draw = pass.draw, .workspace = pass.workspace};
        if (pass.training) options.dropout = attention_dropout_;
        if (pass.plans) {
            std::vector<Plan> plans = pass.plans({static_cast<index_t>(pass.draw.layer), batch, batch > 0 ? x.rows / batch : 0, pass.lengths, pass.draw});
            if (plans.size() == 1) options.plan = std::move(plans[0]);
            else options.item_plans = std::move(plans);
        }
        if (pre_norm_) {
            attention_norm.forward(x, attended, saved.attention_norm);
            attention.forward(attended, x, middle, batch, saved.attention, options, attention_drop);
            feed_forward_norm.forward(middle, fed, saved.feed_forward_norm);
            feed_forward.forward(fed, middle, y, saved.feed_forward, feed_drop, *pass.workspace);
        } else {
            attention.forward(x, x, attended, batch, saved.attention, options, attention_drop);
            attention_norm.forward(attended, middle, saved.attention_norm);
            feed_forward.forward(middle, middle, fed, saved.feed_forward, feed_drop, *pass.workspace);
            feed_forward_norm.forward(fed, y, saved.feed_forward_norm);
        }
    }

    /// Adds to the gradients of the parameters; d_x = dL/dx.
    void backward(MatrixView<const T> x, MatrixView<const T> d_y, MatrixView<T> d_x, index_t batch, Saved& saved, const Pass& pass) {
        pass.require_workspace();
        detail::reshape(saved.d_middle, saved.middle.shape);
        detail::reshape(saved.d_branch, saved.middle.shape);
        const MatrixView<T> d_middle = detail::rows_of(saved.d_middle), d_branch = detail::rows_of(saved.d_branch);
        const auto attended = detail::rows_of(std::as_const(saved.attended)), middle = detail::rows_of(std::as_const(saved.middle)), fed = detail::rows_of(std::as_const(saved.fed));
        const auto add = [](MatrixView<const T> from, MatrixView<T> to) {
            detail::parallel_rows(to.rows, [&](index_t i) { detail::simd::add_scaled<T, xsimd::default_arch>(T(1), from.row(i), to.cols, to.row(i)); });
        };
        if (pre_norm_) {
            feed_forward.backward(fed, d_y, d_branch, saved.feed_forward, *pass.workspace);
            feed_forward_norm.backward(middle, d_branch, saved.feed_forward_norm, d_middle, d_y);
            attention.backward(attended, d_middle, d_branch, batch, saved.attention, *pass.workspace);
            attention_norm.backward(x, d_branch, saved.attention_norm, d_x, d_middle);
        } else {
            feed_forward_norm.backward(fed, d_y, saved.feed_forward_norm, d_middle);
            feed_forward.backward(middle, d_middle, d_branch, saved.feed_forward, *pass.workspace);
            add(d_branch, d_middle);
            attention_norm.backward(attended, d_middle, saved.attention_norm, d_x);
            attention.backward(x, d_x, d_branch, batch, saved.attention, *pass.workspace);
            add(d_branch, d_x);
        }
    }

    template <class F>
    void for_each_parameter(F&& f) {
        attention.for_each_parameter(f);
        feed_forward.for_each_parameter(f);
        attention_norm.for_each_parameter(f);
        feed_forward_norm.for_each_parameter(f);
    }

    Mixer attention;
    FeedForward<T> feed_forward;
    LayerNorm<T> attention_norm, feed_forward_norm;

private:
    static double scale(const TransformerOptions& options) { return options.scaled_branches ? 1 / std::sqrt(2. * options.layers) : 1; }
    bool pre_norm_;
    double dropout_;
    Dropout attention_dropout_;
};

/// Blocks one after the other, and with pre-LN a layer norm at the end: [batch x tokens, dim] -> the same.
template <class T, class Attention>
class Transformer {
public:
    Transformer(const std::string& name, const Attention& layer, const TransformerOptions& options)
        : last_norm(name + ".norm", options.dim, options.norm_epsilon), pre_norm_(options.pre_norm) {
        options.validate();
        for (index_t l = 0; l < options.layers; ++l) blocks.emplace_back(detail::text(name, ".", l), layer, options);
    }

    struct Saved {
        std::vector<Tensor<T>> inputs;  // of each block, and the last output
        std::vector<typename TransformerBlock<T, Attention>::Saved> blocks;
        typename LayerNorm<T>::Saved last_norm;
        Tensor<T> out, d_x[2];
    };

    /// The tensor to fill before forward(): [batch x tokens, dim].
    static MatrixView<T> input(Saved& saved, index_t rows, index_t dim) {
        saved.inputs.resize(std::max<std::size_t>(saved.inputs.size(), 1));
        detail::reshape(saved.inputs[0], {rows, dim});
        return detail::rows_of(saved.inputs[0]);
    }
    MatrixView<const T> forward(index_t batch, Saved& saved, const Pass& pass) const {
        saved.inputs.resize(blocks.size() + 1);
        saved.blocks.resize(blocks.size());
        Pass own = pass;
        for (std::size_t l = 0; l < blocks.size(); ++l) {
            own.draw.layer = static_cast<std::uint32_t>(l);
            detail::reshape(saved.inputs[l + 1], saved.inputs[0].shape);
            blocks[l].forward(detail::rows_of(std::as_const(saved.inputs[l])), detail::rows_of(saved.inputs[l + 1]), batch, saved.blocks[l], own);
        }
        if (pre_norm_) {
            detail::reshape(saved.out, saved.inputs[0].shape);
            last_norm.forward(detail::rows_of(std::as_const(saved.inputs.back())), detail::rows_of(saved.out), saved.last_norm);
        }
        return output(saved);
    }
    /// What forward() returned.
    MatrixView<const T> output(const Saved& saved) const { return detail::rows_of(pre_norm_ ? saved.out : saved.inputs.back()); }
    /// Adds to the gradients; the gradient of the input.
    MatrixView<const T> backward(MatrixView<const T> d_out, index_t batch, Saved& saved, const Pass& pass) {
        for (Tensor<T>& tensor : saved.d_x) detail::reshape(tensor, saved.inputs[0].shape);
        int turn = 0;
        MatrixView<const T> d = d_out;
        if (pre_norm_) {
            last_norm.backward(detail::rows_of(std::as_const(saved.inputs.back())), d_out, saved.last_norm, detail::rows_of(saved.d_x[0]));
            d = detail::rows_of(saved.d_x[0]);
            turn = 1;
        }
        for (std::size_t l = blocks.size(); l-- > 0; turn = 1 - turn) {
            blocks[l].backward(detail::rows_of(std::as_const(saved.inputs[l])), d, detail::rows_of(saved.d_x[turn]), batch, saved.blocks[l], pass);
            d = detail::rows_of(saved.d_x[turn]);
        }
        return d;
    }

    template <class F>
    void for_each_parameter(F&& f) {
        for (auto& block : blocks) block.for_each_parameter(f);
        if (pre_norm_) last_norm.for_each_parameter(f);
    }

    std::vector<TransformerBlock<T, Attention>> blocks;
    LayerNorm<T> last_norm;

private:
    bool pre_norm_;
};

}  // namespace nn

POLYATTN_END_NAMESPACE
