#pragma once

#include <polyattn/nn/linear.hpp>
#include <polyattn/nn/pass.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

/// A bias whose entries backward() can learn: a `table`, and the layer's copy of it.
template <class Bias>
concept Learns = LearnedBias<std::remove_cvref_t<decltype(bind_bias(std::declval<const Bias&>(), 0, 0))>>;
template <class Bias>
concept HasTable = Learns<Bias> && requires(Bias bias) { bias.table.assign(std::size_t{}, double{}); };

}  // namespace detail

namespace nn {

/// y = residual + drop(Wo attention(Wq x, Wk x, Wv x) + bo) with heads of dim / heads columns, and any Attention<...>. Projections of
/// queries, keys and values are one product. A learned bias or compression table of the attention is one more parameter. key_heads below heads is
/// grouped-query attention. Source: Vaswani et al., "Attention is all you need" (2017), section 3.2.2.
template <class T, class Attention>
class MultiHeadAttention {
    using Bias = std::remove_cvref_t<decltype(std::declval<const Attention&>().bias())>;
    static constexpr bool learns_bias = detail::HasTable<Bias>;
    static_assert(learns_bias || !detail::Learns<Bias>, "polyattn: nn trains a learned bias through its member `std::vector<double> table`; give it one, or leave out gradient_size()");
    static constexpr bool learns_compression = requires(const Attention& layer) { layer.compression().table; };

public:
    MultiHeadAttention(const std::string& name, Attention attention, index_t dim, index_t heads, index_t key_heads, double deviation, double scale, std::uint64_t seed)
        : project(name + ".project", dim, checked_dim(dim, heads) * (heads + 2 * checked_key_heads(heads, key_heads)), deviation, seed),
          merge(name + ".merge", dim, dim, deviation * scale, seed), attention_(std::move(attention)), heads_(heads), key_heads_(key_heads), head_dim_(dim / heads) {
        const auto learn = [&](const std::vector<double>& start, const char* what, bool decays) {
            table.emplace_back(name + what, std::vector<offset_t>{static_cast<offset_t>(start.size())}, decays);
            std::copy(start.begin(), start.end(), table[0].value.values.begin());
        };
        if constexpr (learns_bias) learn(attention_.bias().table, ".bias_table", false);
        if constexpr (learns_compression) learn(attention_.compression().table, ".compression_table", true);
    }

    const Attention& attention() const { return attention_; }
    index_t heads() const { return heads_; }

    struct Saved : detail::MoveOnly {
        Tensor<T> projected, context, d_projected, d_context, d_merge;
        typename Attention::template SavedOf<T> attention;
        Gradients<TensorView<T>> gradients;
        detail::ActivationDropout dropout;
    };

    /// Rows of x and y are batch x tokens. `options` go to the attention.
    void forward(MatrixView<const T> x, MatrixView<const T> residual, MatrixView<T> y, index_t batch, Saved& saved, const CallOptions& options,
                 const detail::ActivationDropout& dropout) const {
        Workspace& workspace = detail::workspace_of(options, x, batch);
        saved.dropout = dropout;
        detail::reshape(saved.projected, {x.rows, project.out()});
        detail::reshape(saved.context, {x.rows, offset_t{heads_} * head_dim_});
        project.forward(x, detail::rows_of(saved.projected), workspace);
        const TensorView<T> q = part(saved.projected, batch, 0, heads_), k = part(saved.projected, batch, heads_, key_heads_), v = part(saved.projected, batch, heads_ + key_heads_, key_heads_);
        with_table().forward_into(part(saved.context, batch, 0, heads_), saved.attention, q, k, v, options);
        merge.forward(detail::rows_of(std::as_const(saved.context)), y, workspace, detail::add_residual(residual, dropout));
    }
    /// d_x of the branch alone.
    void backward(MatrixView<const T> x, MatrixView<const T> d_y, MatrixView<T> d_x, index_t batch, Saved& saved, Workspace& workspace) {
        const MatrixView<const T> d_merge = detail::dropped(d_y, saved.dropout, saved.d_merge);
        detail::reshape(saved.d_context, saved.context.shape);
        detail::reshape(saved.d_projected, saved.projected.shape);
        merge.backward(detail::rows_of(std::as_const(saved.context)), d_merge, detail::rows_of(saved.d_context), false, workspace);
        saved.gradients.q = part(saved.d_projected, batch, 0, heads_);
        saved.gradients.k = part(saved.d_projected, batch, heads_, key_heads_);
        saved.gradients.v = part(saved.d_projected, batch, heads_ + key_heads_, key_heads_);
        with_table().backward_into(saved.gradients, saved.attention, part(saved.d_context, batch, 0, heads_), {.workspace = &workspace});
        if constexpr (learns_bias || learns_compression) {
            const std::vector<double>& d_table = learns_bias ? saved.gradients.bias : saved.gradients.compression;
            for (std::size_t i = 0; i < d_table.size(); ++i) table[0].gradient.values[i] += static_cast<T>(d_table[i]);
        }
        project.backward(x, detail::rows_of(std::as_const(saved.d_projected)), d_x, false, workspace);
    }

    template <class F>
    void for_each_parameter(F&& f) {
        project.for_each_parameter(f);
        merge.for_each_parameter(f);
        for (Parameter<T>& parameter : table) f(parameter);
    }

    /// Rows of project's weights: queries of all heads, keys of all key heads, values.
    Linear<T> project, merge;
    /// The learned bias or compression, if there is one.
    std::vector<Parameter<T>> table;

private:
    static index_t checked_dim(index_t dim, index_t heads) {
        detail::require(heads >= 1 && dim >= 1 && dim % heads == 0, "heads", [&] { return detail::text("a number that divides dim, ", dim); }, heads);
        return dim / heads;
    }
    static index_t checked_key_heads(index_t heads, index_t key_heads) {
        detail::require(key_heads >= 1 && heads % key_heads == 0, "key_heads", [&] { return detail::text("a number that divides the ", heads, " heads"); }, key_heads);
        return key_heads;
    }
    /// Some heads of [batch x tokens, heads x head dim] as [batch, heads, tokens, head dim].
    TensorView<T> part(Tensor<T>& rows, index_t batch, index_t first_head, index_t count) const {
        const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(rows.shape[1]);
        const auto tokens = static_cast<index_t>(batch > 0 ? rows.shape[0] / batch : 0);
        const std::array<index_t, 4> extents{batch, count, tokens, head_dim_};
        return detail::make_view<T>(rows.data() + offset_t{first_head} * head_dim_, extents, std::array<std::ptrdiff_t, 4>{stride * tokens, head_dim_, stride, 1}, "projected");
    }
    /// The attention with the table as it is now.
    decltype(auto) with_table() const {
        if constexpr (learns_bias) {
            Bias bias = attention_.bias();
            bias.table.assign(table[0].value.values.begin(), table[0].value.values.end());
            return attention_.with_bias(std::move(bias));
        } else if constexpr (learns_compression) {
            auto compression = attention_.compression();
            compression.table.assign(table[0].value.values.begin(), table[0].value.values.end());
            return attention_.with_compression(std::move(compression));
        } else return (attention_);
    }

    Attention attention_;
    index_t heads_, key_heads_, head_dim_;
};

}  // namespace nn

POLYATTN_END_NAMESPACE
