#pragma once
// What attentions share whose heads are several steps each, one head after the other: NystromAttention, ClusteredAttention.

#include <polyattn/attention.hpp>
#include <polyattn/policy/compression/compression.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

/// The calls of a layer with as many keys as queries, of which those behind an item's key length are padding: their rows of the output are 0. A Layer has
///   template <class T> struct HeadSaved;                    what its backward needs of a head
///   std::size_t learned() const;                            numbers it learns, in gradients.compression
///   check(q, k, v, options) const;                          throws invalid_input
///   forward_head(h, q, k, v, out, head, workspace) const;   adds to out, of valid tokens alone, at least one
///   backward_head(h, q, k, v, d_out, head, d_q, d_k, d_v, d_learned, workspace) const;   adds as well
template <class Layer>
class HeadwiseAttention {
public:
    /// What backward needs.
    template <class T>
    class SavedOf : MoveOnly {
        friend HeadwiseAttention;
        SavedInputs<T> inputs_;
        std::vector<index_t> lengths_;
        std::vector<typename Layer::template HeadSaved<T>> heads_;
        bool finished_ = false;  // false of a pass that threw on the way

    public:
        /// Of head h of batch item b.
        const auto& head(index_t b, index_t h) const { return heads_[static_cast<std::size_t>(offset_t{b} * inputs_.q().heads() + h)]; }
    };

    template <class Q, class K, class V>
    auto operator()(const Q& q, const K& k, const V& v, const CallOptions& options = {}) const {
        return forward(q, k, v, options).out;
    }
    template <class Q, class K, class V>
    auto forward(const Q& q, const K& k, const V& v, const CallOptions& options = {}) const {
        using T = element_t<Q>;
        const Adapted<T> aq(q, "q"), av(v, "v");
        auto out = make_result<Q, T>(shape_like(aq.view(), {aq.view().tokens(), av.view().dim()}));
        SavedOf<T> saved;
        train<Q, K, V>(memory_of(out), saved, aq.view(), Adapted<T>(k, "k").view(), av.view(), options, false);
        return Forward<decltype(out), T, SavedOf<T>>{std::move(out), std::move(saved)};
    }
    template <class Out, class T, class Q, class K, class V>
    void forward_into(Out&& out, SavedOf<T>& saved, const Q& q, const K& k, const V& v, const CallOptions& options = {}) const {
        const Adapted<T> aq(q, "q"), ak(k, "k"), av(v, "v");
        train<Q, K, V>(memory_view(out, "out"), saved, aq.view(), ak.view(), av.view(), options, options.accumulate);
    }
    template <class T, class D>
    auto backward(const SavedOf<T>& saved, const D& d_out, const CallOptions& options = {}) const {
        const auto like = [](const TensorView<const T>& view) { return make_result<D, T>(shape_like(view, {view.tokens(), view.dim()})); };
        Gradients<decltype(like(saved.inputs_.q()))> gradients{like(saved.inputs_.q()), like(saved.inputs_.k()), like(saved.inputs_.v()), {}, {}};
        backward_into(gradients, saved, d_out, options);
        return gradients;
    }
    template <class TensorType, class T, class D>
    void backward_into(Gradients<TensorType>& gradients, const SavedOf<T>& saved, const D& d_out, const CallOptions& = {}) const {
        const Adapted<T> ad(d_out, "d_out");
        const TensorView<const T> q = saved.inputs_.q(), k = saved.inputs_.k(), v = saved.inputs_.v(), d = ad.view();
        static_assert(std::is_same_v<element_t<D>, T>, "polyattn: d_out must have the inputs' value type");
        require(saved.finished_ && saved.heads_.size() == static_cast<std::size_t>(offset_t{q.batch()} * q.heads()), "saved", "a forward pass of this layer", "none, or one that threw");
        const GradientViews<T> into = views_of(gradients, d, q, k, v);
        const index_t heads = q.heads(), group = heads / k.heads(), n = q.tokens();
        const std::size_t learned = layer().learned();
        gradients.bias.clear();
        gradients.compression.assign(learned, 0.);
        std::vector<double> parts(static_cast<std::size_t>(q.batch() * k.heads()) * learned, 0.);
        std::vector<Workspace> workspaces(static_cast<std::size_t>(worker_count()));
        parallel_for(offset_t{k.batch()} * k.heads(), [&](offset_t item, int worker) {
            const auto b = static_cast<index_t>(item / k.heads()), kh = static_cast<index_t>(item % k.heads());
            const index_t valid = valid_tokens(saved.lengths_, b, n);
            const auto rows = [&](auto matrix) { return row_range(matrix, 0, valid); };
            const MatrixView<T> d_k = into.k.head(b, kh), d_v = into.v.head(b, kh);
            fill_with_zeros(d_k);
            fill_with_zeros(d_v);
            for (index_t h = kh * group; h < (kh + 1) * group; ++h) {
                const MatrixView<T> d_q = into.q.head(b, h);
                fill_with_zeros(d_q);
                if (valid > 0)
                    layer().backward_head(h, rows(q.head(b, h)), rows(k.head(b, kh)), rows(v.head(b, kh)), rows(d.head(b, h)), saved.head(b, h), rows(d_q), rows(d_k), rows(d_v),
                                          std::span(parts).subspan(static_cast<std::size_t>(item) * learned, learned), workspaces[static_cast<std::size_t>(worker)]);
            }
        });
        for (std::size_t at = 0; at < parts.size(); ++at) gradients.compression[at % learned] += parts[at];
    }

private:
    const Layer& layer() const { return static_cast<const Layer&>(*this); }
    static index_t valid_tokens(const std::vector<index_t>& lengths, index_t b, index_t tokens) { return lengths.empty() ? tokens : lengths[static_cast<std::size_t>(b)]; }
    template <class Q, class K, class V, class T>
    void train(const TensorView<T>& to, SavedOf<T>& saved, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CallOptions& options, bool accumulate) const {
        layer().check(q, k, v, options);  // throws before anything is changed
        require_shape(to, {q.extents[0], q.extents[1], q.extents[2], v.extents[3]}, q.rank, "out");
        saved.finished_ = false;
        saved.inputs_.template keep<Q, K, V>(q, k, v);
        saved.lengths_ = options.key_lengths;
        const TensorView<const T> vq = saved.inputs_.q(), vk = saved.inputs_.k(), vv = saved.inputs_.v();
        const index_t heads = vq.heads(), group = heads / vk.heads(), n = vq.tokens();
        saved.heads_.resize(static_cast<std::size_t>(offset_t{vq.batch()} * heads));
        std::vector<Workspace> workspaces(static_cast<std::size_t>(worker_count()));
        parallel_for(offset_t{vq.batch()} * heads, [&](offset_t item, int worker) {
            const auto b = static_cast<index_t>(item / heads), h = static_cast<index_t>(item % heads);
            const index_t valid = valid_tokens(saved.lengths_, b, n);
            const auto rows = [&](auto matrix) { return row_range(matrix, 0, valid); };
            const MatrixView<T> own = to.head(b, h);
            if (!accumulate) fill_with_zeros(own);
            if (valid > 0)
                layer().forward_head(h, rows(vq.head(b, h)), rows(vk.head(b, h / group)), rows(vv.head(b, h / group)), rows(own), saved.heads_[static_cast<std::size_t>(item)],
                                     workspaces[static_cast<std::size_t>(worker)]);
        });
        saved.finished_ = true;
    }
};

template <class T>
MatrixView<T> matrix_of(Tensor<T>& tensor) {
    return tensor.view().head(0, 0);
}
template <class T>
MatrixView<const T> matrix_of(const Tensor<T>& tensor) {
    return tensor.view().head(0, 0);
}
template <class T>
TensorView<T> tensor_of(MatrixView<T> rows) {
    return make_view<T>(rows.data, std::array<index_t, 2>{rows.rows, rows.cols}, std::array<std::ptrdiff_t, 2>{rows.row_stride, rows.col_stride}, "rows");
}
/// to += from.
template <class T>
void add_matrix(const Tensor<T>& from, MatrixView<T> to) {
    const MatrixView<const T> rows = matrix_of(from);
    for (index_t i = 0; i < to.rows; ++i) add_row_to(rows, i, T(1), to, i);
}

}  // namespace detail

POLYATTN_END_NAMESPACE
