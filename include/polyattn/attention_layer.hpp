#pragma once

#include <polyattn/backend/head.hpp>
#include <polyattn/backend/reference/attention.hpp>
#include <polyattn/backend/simd/attention.hpp>
#include <polyattn/backend/simd/decode.hpp>
#include <polyattn/backend/simd/recurrent_step.hpp>
#include <polyattn/interface/adapt.hpp>
#include <polyattn/layer_policies.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

/// q, k and v of a forward pass: copies, or views of the caller's memory.
template <class T>
class SavedInputs {
public:
    TensorView<const T> q() const { return view(0); }
    TensorView<const T> k() const { return view(1); }
    TensorView<const T> v() const { return view(2); }

    /// Raw views are borrowed, everything else is copied.
    template <class Q, class K, class V>
    void keep(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v) {
        constexpr bool borrow = is_raw_view<Q> && is_raw_view<K> && is_raw_view<V>;
        std::size_t at = 0;
        for (const auto* input : {&q, &k, &v}) {
            if constexpr (borrow) owned_[at].reset();
            else owned_[at] = copy_of(*input);
            borrowed_[at++] = *input;
        }
    }

private:
    TensorView<const T> view(std::size_t at) const { return owned_[at] ? owned_[at]->view() : borrowed_[at]; }
    std::array<std::optional<Tensor<T>>, 3> owned_;
    std::array<TensorView<const T>, 3> borrowed_{};
};

/// Of what points into itself: moved, never copied.
struct MoveOnly {
    MoveOnly() = default;
    MoveOnly(MoveOnly&&) = default;
    MoveOnly& operator=(MoveOnly&&) = default;
};

}  // namespace detail

/// What backward needs of a forward pass. Owns copies of q, k and v; of raw views it keeps the views, whose memory must then stay
/// as it is until the last backward().
template <class T>
class Saved {
public:
    TensorView<const T> q() const { return inputs_.q(); }
    TensorView<const T> k() const { return inputs_.k(); }
    TensorView<const T> v() const { return inputs_.v(); }
    /// The plan of a batch item's head.
    const Plan& plan(index_t b = 0, index_t h = 0) const { return options_.item_plans.empty() ? *options_.plan : detail::plan_of(options_.item_plans, q(), b, h); }
    /// [batch * heads * queries], natural log. Of kernel scores: 1 / denominator, the lowest number for a row that is a mean, -infinity for an empty one.
    std::span<const T> logsumexp() const { return logsumexp_; }

private:
    template <class...>
    friend class AttentionLayer;

    detail::SavedInputs<T> inputs_;
    CallOptions options_;  // with the plans
    std::vector<T> logsumexp_;
    AlignedVector<T> hops_;  // Z_1 .. Z_K: [batch * heads][K][queries][value dim]
    AlignedVector<T> states_;  // of kernel scores: what the operator keeps
    static constexpr std::size_t unfinished = std::numeric_limits<std::size_t>::max();
    std::size_t hop_count_ = 0;
};

/// What a causal kernel layer remembers of the tokens so far: sums of a fixed size for each head and hop. Made by start(), moved on by step().
template <class T>
class RecurrentState {
public:
    /// Tokens so far.
    index_t tokens() const { return tokens_; }

private:
    template <class...>
    friend class AttentionLayer;

    std::array<index_t, 4> q_{};  // batch, heads, 1, dim
    index_t key_heads_ = 0, value_dim_ = 0, tokens_ = 0;
    std::vector<T> sums_;
    Workspace workspace_;
};

/// Gradients with the shapes of q, k and v, and of the tables of bias and compression (empty if they are not learned).
template <class TensorType>
struct Gradients {
    TensorType q, k, v;
    std::vector<double> bias;
    std::vector<double> compression = {};
};

namespace detail {

/// Where gradients go.
template <class T>
struct GradientViews {
    TensorView<T> q, k, v;
};
/// Throws invalid_input unless d_out has the output's shape and the gradients those of q, k and v.
template <class T, class TensorType>
GradientViews<T> views_of(Gradients<TensorType>& gradients, const TensorView<const T>& d_out, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v) {
    require_shape(d_out, {q.extents[0], q.extents[1], q.extents[2], v.extents[3]}, q.rank, "d_out");
    const GradientViews<T> to{memory_of(gradients.q), memory_of(gradients.k), memory_of(gradients.v)};
    require_shape(to.q, q.extents, q.rank, "gradients.q");
    require_shape(to.k, k.extents, k.rank, "gradients.k");
    require_shape(to.v, v.extents, v.rank, "gradients.v");
    return to;
}

}  // namespace detail

template <class TensorType, class T, class SavedType = Saved<T>>
struct Forward {
    TensorType out;
    SavedType saved;
};

template <class TensorType, class LogsumexpType>
struct OutputAndLogsumexp {
    TensorType out;
    LogsumexpType logsumexp;
};

/// The layer of the CPU backends.
template <class Pattern, class Sampler, class Diffusion, class Score, class Bias, class Backend>
    requires(!std::same_as<Backend, Cuda>)
class AttentionLayer<Pattern, Sampler, Diffusion, Score, Bias, Backend> : public detail::LayerPolicies<Pattern, Sampler, Diffusion, Score, Bias> {
    template <class...>
    friend class CompressedLayer;
    using Base = detail::LayerPolicies<Pattern, Sampler, Diffusion, Score, Bias>;
    using typename Base::Plans;
    using Base::bias_, Base::bind, Base::bind_items, Base::check, Base::check_shapes, Base::feature_count, Base::kernel, Base::pattern_, Base::recursion_, Base::score_, Base::valid_of;

public:
    template <class T>
    using SavedOf = Saved<T>;
    using Base::Base;

    /// This layer with another bias of the same type: a table that training changed. Shares the plans. Throws invalid_input.
    AttentionLayer with_bias(Bias bias) const {
        detail::validate(bias);
        AttentionLayer other = *this;
        other.bias_ = std::move(bias);
        return other;
    }

    /// out = polynomial in A of V.
    /// Shapes: q [.., heads, queries, d], k [.., key heads, keys, d], v [.., key heads, keys, e] -> [.., heads, queries, e], rank
    /// 2 to 4, any expressions of xtensor or raw views (tensor_view); key heads divide heads (grouped-query attention).
    /// Throws invalid_input. Bitwise the same for any number of threads. O(pairs (d + K e)) flops, O(n (d + e)) memory and one
    /// head's weights a thread (of tiles at most CallOptions::weight_budget). Source: Diffuser (AAAI 2023), "attention diffusion".
    template <class Q, class K, class V>
    auto operator()(const Q& q, const K& k, const V& v, const CallOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        const detail::Adapted<T> aq(q, "q"), ak(k, "k"), av(v, "v");
        check_shapes(aq.view(), ak.view(), av.view());
        auto out = detail::make_result<Q, T>(detail::shape_like(aq.view(), {aq.view().tokens(), av.view().dim()}));
        run<T>(aq.view(), ak.view(), av.view(), detail::memory_of(out), options, nullptr, nullptr, false);
        return out;
    }

    /// The same, and log(sum_j exp(score_ij)) of every query, natural log, [.., heads, queries]; -inf for a query without keys.
    template <class Q, class K, class V>
    auto with_logsumexp(const Q& q, const K& k, const V& v, const CallOptions& options = {}) const {
        static_assert(!kernel, "polyattn: with_logsumexp() is of Softmax; kernel scores have no logarithm");
        using T = common_element<Q, K, V>;
        const detail::Adapted<T> aq(q, "q"), ak(k, "k"), av(v, "v");
        check_shapes(aq.view(), ak.view(), av.view());
        auto out = detail::make_result<Q, T>(detail::shape_like(aq.view(), {aq.view().tokens(), av.view().dim()}));
        auto logsumexp = detail::make_result<Q, T, 1>(detail::shape_like(aq.view(), {aq.view().tokens()}));
        run<T>(aq.view(), ak.view(), av.view(), detail::memory_of(out), options, logsumexp.data(), nullptr, false);
        return OutputAndLogsumexp<decltype(out), decltype(logsumexp)>{std::move(out), std::move(logsumexp)};
    }

    /// The same, written to `out`, which must not overlap the inputs: a tensor or view with memory, or a raw view. With a plan
    /// and a workspace in `options` and inputs that have memory, a repeated call allocates nothing. Throws invalid_input.
    template <class Out, class Q, class K, class V>
    void into(Out&& out, const Q& q, const K& k, const V& v, const CallOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        static_assert(detail::has_memory<Out>, "polyattn: into() writes to tensors, views with strides, or raw views; assign other expressions from the result");
        static_assert(std::is_same_v<detail::element_t<Out>, T>, "polyattn: out must have the inputs' value type");
        const detail::Adapted<T> aq(q, "q"), ak(k, "k"), av(v, "v");
        run<T>(aq.view(), ak.view(), av.view(), detail::memory_view(out, "out"), options, nullptr, nullptr, options.accumulate);
    }

    /// Forward pass for training: the output and what backward() needs. Memory O(K n e) a head for Z_1 .. Z_K. Throws invalid_input.
    template <class Q, class K, class V>
    auto forward(const Q& q, const K& k, const V& v, const CallOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        const detail::Adapted<T> aq(q, "q"), ak(k, "k"), av(v, "v");
        check_shapes(aq.view(), ak.view(), av.view());
        auto out = detail::make_result<Q, T>(detail::shape_like(aq.view(), {aq.view().tokens(), av.view().dim()}));
        Saved<T> saved;
        train<Q, K, V>(detail::memory_of(out), saved, aq.view(), ak.view(), av.view(), options, false);
        return Forward<decltype(out), T>{std::move(out), std::move(saved)};
    }

    /// The same, written to `out` and to a `saved` of an earlier pass, whose memory is used again. Throws invalid_input.
    template <class Out, class T, class Q, class K, class V>
    void forward_into(Out&& out, Saved<T>& saved, const Q& q, const K& k, const V& v, const CallOptions& options = {}) const {
        static_assert(std::is_same_v<common_element<Q, K, V>, T> && std::is_same_v<detail::element_t<Out>, T>, "polyattn: out and saved must have the inputs' value type");
        const detail::Adapted<T> aq(q, "q"), ak(k, "k"), av(v, "v");
        train<Q, K, V>(detail::memory_view(out, "out"), saved, aq.view(), ak.view(), av.view(), options, options.accumulate);
    }

    /// Gradients of q, k, v and a learned bias from d_out = dL/dout, in tensors like d_out. `saved` must come from forward() of
    /// this layer or a copy; its options hold, of `options` only the workspace is used. Repeatable; deterministic, without atomics.
    /// Throws invalid_input unless d_out has the output's shape and `saved` fits. (4 K + 4) d flops a pair and the scores again.
    template <class T, class D>
    auto backward(const Saved<T>& saved, const D& d_out, const CallOptions& options = {}) const {
        const auto like = [](const TensorView<const T>& view) { return detail::make_result<D, T>(detail::shape_like(view, {view.tokens(), view.dim()})); };
        Gradients<decltype(like(saved.q()))> gradients{like(saved.q()), like(saved.k()), like(saved.v()), {}, {}};
        backward_into(gradients, saved, d_out, options);
        return gradients;
    }

    /// The same, written to `gradients`, whose tensors must have the shapes of q, k and v: as backward() returned them before. With a
    /// workspace in `options` a repeated call allocates little more than a few numbers a head. Throws invalid_input.
    template <class TensorType, class T, class D>
    void backward_into(Gradients<TensorType>& gradients, const Saved<T>& saved, const D& d_out, const CallOptions& options = {}) const {
        static_assert(std::is_same_v<detail::element_t<D>, T>, "polyattn: d_out must have the inputs' value type");
        static_assert(std::is_same_v<decltype(detail::memory_of(gradients.q)), TensorView<T>>, "polyattn: gradients must have the inputs' value type");
        const detail::Adapted<T> ad(d_out, "d_out");
        detail::require(saved.hop_count_ != Saved<T>::unfinished, "saved", "a forward pass", "one that threw");
        detail::require(saved.hop_count_ == recursion_.hops.size(), "saved", [&] { return detail::text("a forward pass of this layer, with ", recursion_.hops.size(), " hops"); },
                        saved.hop_count_);
        const TensorView<const T> q = saved.q(), k = saved.k(), v = saved.v(), d = ad.view();
        const std::size_t heads_of_all = static_cast<std::size_t>(offset_t{q.batch()} * q.heads());
        detail::require(saved.states_.size() == heads_of_all * static_cast<std::size_t>(state_size<T>(q.dim(), v.dim())), "saved", "a forward pass of this layer", "another's");
        if constexpr (requires { bias_.check_heads(q.heads()); }) bias_.check_heads(q.heads());
        const detail::GradientViews<T> into = detail::views_of(gradients, d, q, k, v);
        const auto bound = bind_items(q, k, saved.options_);
        std::vector<double>& d_bias = gradients.bias;
        d_bias.clear();
        if constexpr (LearnedBias<std::remove_cvref_t<decltype(bound.first)>>) d_bias.resize(bound.first.gradient_size(), 0.);

        Workspace own;
        Workspace& workspace = options.workspace ? *options.workspace : own;
        const index_t group = k.heads() == 0 ? 0 : q.heads() / k.heads();
        const offset_t items = group == 0 ? 0 : offset_t{k.batch()} * k.heads();
        if (group == 0)  // no head of q writes them
            for (const TensorView<T>& view : {into.k, into.v}) detail::fill_with_zeros(view);
        // Each run of items adds to a bias gradient of its own, and these are added in order: the order never depends on threads.
        const offset_t runs = d_bias.empty() ? items : std::min<offset_t>(items, 16);
        std::vector<double> bias_parts(static_cast<std::size_t>(runs) * d_bias.size(), 0.);
        const offset_t hop_rows = static_cast<offset_t>(recursion_.hops.size()) * q.tokens();
        const auto hops_of = [&](index_t b, index_t h) { return saved.hops_.data() + (offset_t{b} * q.heads() + h) * hop_rows * v.dim(); };
        const auto first_of = [&](offset_t run) { return items * run / runs * group; };
        const offset_t in_turn = worker_count();
        // A pass backwards takes two and a half times a pass forwards and meets as much more often.
        const auto work = [&] {
            return work_of_heads<T>(q, k, v, saved.options_.item_plans.empty(), [&](index_t b, index_t h) -> const Plan& { return saved.plan(b, h); })
                .times(2.5 * static_cast<double>(items * group) / static_cast<double>(runs));
        };
        for_each_item(runs, work, workspace, options.workspace != nullptr, [&](offset_t run, detail::Workers& workers) {
            for (offset_t query_item = first_of(run); query_item < first_of(run + 1); ++query_item) {
                const auto [b, h, kh] = head_at(query_item, k.heads(), group);
                const offset_t line = offset_t{b} * q.heads() + h;
                auto head = make_head<T>(q, k, v, saved.plan(b, h), bound.of(b), saved.options_, b, h, kh);
                std::array<MatrixView<const T>, 8> next;
                if constexpr (!kernel)
                    if (const offset_t after = query_item + 1 < first_of(run + 1) ? query_item + 1 : first_of(run + in_turn); after < items * group) {
                        const auto [nb, nh, nk] = head_at(after, k.heads(), group);
                        head.next = next = {q.head(nb, nh), k.head(nb, nk), v.head(nb, nk), d.head(nb, nh), MatrixView<const T>{hops_of(nb, nh), static_cast<index_t>(hop_rows), v.dim(), v.dim(), 1},
                                            into.q.head(nb, nh), into.k.head(nb, nk), into.v.head(nb, nk)};
                    }
                detail::HeadGradient<T> gradient{d.head(b, h), saved.logsumexp_.data() + line * q.tokens(), hops_of(b, h), saved.states_.data() + line * state_size<T>(q.dim(), v.dim()),
                                                 into.q.head(b, h), into.k.head(b, kh), into.v.head(b, kh), h % group != 0,
                                                 std::span<double>(bias_parts).subspan(static_cast<std::size_t>(run) * d_bias.size(), d_bias.size())};
                detail::Workers scratch = workers.nested();
                if constexpr (std::is_same_v<Backend, Reference>) detail::reference::backward(head, gradient, scratch);
                else detail::simd::backward<Arch>(head, gradient, scratch);
            }
        });
        for (std::size_t at = 0; at < bias_parts.size(); ++at) d_bias[at % d_bias.size()] += bias_parts[at];
    }

    /// The state in front of the first token, for step().
    template <class T>
    RecurrentState<T> start(index_t batch, index_t heads, index_t key_heads, index_t dim, index_t value_dim) const {
        static_assert(kernel && detail::is_causal<Pattern>() && !std::is_same_v<Backend, Reference>, "polyattn: start() and step() are of causal kernel scores: Attention<Kernel<Features>, Causal>");
        Base::check_recurrent(batch, heads, key_heads, dim, value_dim);
        RecurrentState<T> state;
        state.q_ = {batch, heads, 1, dim};
        state.key_heads_ = key_heads;
        state.value_dim_ = value_dim;
        state.sums_.assign(static_cast<std::size_t>(offset_t{batch} * heads * detail::simd::recurrent_size<T, Arch>(feature_count(dim), value_dim, recursion_.hops.size())), T(0));
        return state;
    }
    /// The next token of every sequence: q [.., heads, 1, d], k [.., key heads, 1, d], v [.., key heads, 1, e] -> [.., heads, 1, e], what the causal
    /// layer gives for the last of all tokens so far, up to rounding. O(f e) a head and hop, for f features, whatever came before. Throws
    /// invalid_input. Source: Katharopoulos et al., "Transformers are RNNs" (2020), equations 16 to 20.
    template <class T, class Q, class K, class V>
    auto step(RecurrentState<T>& state, const Q& q, const K& k, const V& v) const {
        static_assert(std::is_same_v<common_element<Q, K, V>, T>, "polyattn: state must have the inputs' value type");
        const detail::Adapted<T> aq(q, "q"), ak(k, "k"), av(v, "v");
        const TensorView<const T> vq = aq.view(), vk = ak.view(), vv = av.view();
        check_shapes(vq, vk, vv);
        detail::require_shape(vq, state.q_, vq.rank, "q");
        detail::require_shape(vk, {state.q_[0], state.key_heads_, 1, state.q_[3]}, vk.rank, "k");
        detail::require_shape(vv, {state.q_[0], state.key_heads_, 1, state.value_dim_}, vv.rank, "v");
        auto out = detail::make_result<Q, T>(detail::shape_like(vq, {1, vv.dim()}));
        const TensorView<T> to = detail::memory_of(out);
        const auto& bound = bind(vq, vk);
        const Plan plan = pattern_.plan(1, 1);
        const index_t heads = vq.heads(), group = heads / state.key_heads_;
        const offset_t size = detail::simd::recurrent_size<T, Arch>(feature_count(vq.dim()), vv.dim(), recursion_.hops.size());
        detail::require(state.sums_.size() == static_cast<std::size_t>(offset_t{vq.batch()} * heads * size), "state", "one that start() of this layer made", "another's");
        ++state.tokens_;
        const auto work = [&] { return work_of_head<T>(vq, vk, vv, plan); };
        for_each_item(offset_t{vq.batch()} * heads, work, state.workspace_, true, [&](offset_t item, detail::Workers& workers) {
            const auto b = static_cast<index_t>(item / heads), h = static_cast<index_t>(item % heads);
            const auto head = make_head<T>(vq, vk, vv, plan, bound, {}, b, h, h / group);
            detail::simd::recurrent_step<Arch>(head, state.tokens_, state.sums_.data() + item * size, to.head(b, h), workers[0]);
        });
        return out;
    }

    /// Does all the checks of operator() on the same arguments and returns the options with the plans that it would use. Throws invalid_input.
    template <class Q, class K, class V>
    CallOptions planned(const Q& q, const K& k, const V& v, CallOptions options) const {
        using T = common_element<Q, K, V>;
        const detail::Adapted<T> aq(q, "q"), ak(k, "k"), av(v, "v");
        Plans plans = this->template check<T>(aq.view(), ak.view(), av.view(), options);
        if (!plans.drawn.empty()) options.item_plans = std::move(plans.drawn);
        else if (options.item_plans.empty()) options.plan = std::move(plans.shared);
        return options;
    }

private:
    static constexpr bool is_reference = std::is_same_v<Backend, Reference>;
    template <class B>
    struct arch_of {
        using type = void;
    };
    template <class A>
    struct arch_of<Simd<A>> {
        using type = detail::simd::arch_or_default<A>;
    };
    using Arch = typename arch_of<Backend>::type;

    template <class Q, class K, class V>
    struct same_elements {
        using T = detail::element_t<Q>;
        static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>, "polyattn: tensors of float or double are wanted; cast q, k and v");
        static_assert(std::is_same_v<T, detail::element_t<K>> && std::is_same_v<T, detail::element_t<V>>, "polyattn: q, k and v must have one value type; cast them");
    };
    template <class Q, class K, class V>
    using common_element = typename same_elements<Q, K, V>::T;

    template <class T, class Bound>
    auto make_head(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const Plan& plan, const Bound& bound, const CallOptions& options,
                   index_t b, index_t h, index_t kh) const {
        const auto [queries, keys] = valid_of(options, b, q.tokens(), k.tokens());
        const detail::DropoutMask dropout(options.dropout, options.draw, offset_t{b} * q.heads() + h);
        if constexpr (kernel) {
            const detail::ZeroRow zero = detail::zero_row(score_, !std::is_same_v<Diffusion, NoDiffusion>);
            return detail::KernelHead<T, Bound>{q.head(b, h), k.head(b, kh), v.head(b, kh), &plan, &recursion_, &bound, zero, detail::epsilon_of(score_, zero),
                                                detail::is_causal<Pattern>(), b, h, queries, keys, dropout};
        } else
            return detail::Head<T, Bound>{q.head(b, h), k.head(b, kh), v.head(b, kh), &plan, &recursion_, &bound, score_.factor(q.dim()), b, h, queries, keys, dropout,
                                          options.weight_budget};
    }
    /// Numbers that the operator of a head keeps for backward.
    template <class T>
    offset_t state_size([[maybe_unused]] index_t dim, [[maybe_unused]] index_t value_dim) const {
        if constexpr (kernel && !std::is_same_v<Backend, Reference>) {
            using Bound = decltype(detail::bind_features(score_.features, dim));
            return detail::simd::KernelAttention<T, Arch, Bound>::state_size(feature_count(dim), value_dim, recursion_.hops.size(), detail::is_causal<Pattern>());
        } else return 0;
    }
    struct HeadIndex {
        index_t batch, head, key_head;
    };
    /// Heads in order, `group` of them to a head of keys.
    static HeadIndex head_at(offset_t item, index_t key_heads, index_t group) {
        const offset_t heads = offset_t{key_heads} * group;
        return {static_cast<index_t>(item / heads), static_cast<index_t>(item % heads), static_cast<index_t>(item % heads / group)};
    }
    /// Work of a head with this plan.
    template <class T>
    detail::Work work_of_head(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const Plan& plan) const {
        const double hops = static_cast<double>(std::max<std::size_t>(recursion_.hops.size(), 1)), e = v.dim();
        if constexpr (kernel) {
            const double flops = 4. * hops * feature_count(q.dim()) * e * (double(q.tokens()) + k.tokens());
            return {flops, is_reference || detail::is_causal<Pattern>() ? detail::Work::serial : hops};
        } else {
            const double flops = 2. * static_cast<double>(plan.count()) * (q.dim() + hops * e);
            return {flops, is_reference ? detail::Work::serial : hops * (plan.edges().count() > 0 ? 2 : 1)};
        }
    }
    /// That of the largest head, which the others wait for; plan_of(b, h), where `same` of all.
    template <class T, class PlanOf>
    detail::Work work_of_heads(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, bool same, const PlanOf& plan_of) const {
        detail::Work most{0, 0};
        for (index_t b = 0; b < (same ? 1 : q.batch()); ++b)
            for (index_t h = 0; h < (same ? 1 : q.heads()); ++h)
                if (const detail::Work work = work_of_head(q, k, v, plan_of(b, h)); work.flops >= most.flops) most = work;
        return most;
    }

    /// f(item, workers): items side by side, or, where they are fewer than threads, one after the other, with all threads inside or with one, if that is faster. `work()` is that of an item.
    template <class WorkOf, class F>
    static void for_each_item(offset_t items, const WorkOf& work, Workspace& workspace, bool reused, const F& f) {
        const detail::FlushDenormals flush;  // of what the calling thread does itself, too
        const int threads = worker_count();
        workspace.prepare(threads);
        const auto alone = [&](offset_t item, int worker) {
            const detail::OneThread guard;
            detail::Workers workers(workspace, worker, 1);
            f(item, workers);
        };
        if (items > 0 && items < threads) {
            const detail::Work item_work = work();
            if (item_work.gains_from_threads(items, threads)) {
                for (offset_t item = 0; item < items; ++item) {
                    detail::Workers workers(workspace, 0, threads);
                    f(item, workers);
                }
                return;
            }
            if (items == 1 || item_work.is_little(items)) {
                for (offset_t item = 0; item < items; ++item) alone(item, 0);
                return;
            }
        }
        parallel_for(items, alone);
        if (reused) workspace.level();
    }

    template <class Q, class K, class V, class T>
    void train(const TensorView<T>& out, Saved<T>& saved, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CallOptions& options, bool accumulate) const {
        CallOptions with_plans = planned(q, k, v, options);  // throws before anything is changed
        detail::require_shape(out, {q.extents[0], q.extents[1], q.extents[2], v.extents[3]}, q.rank, "out");
        saved.hop_count_ = Saved<T>::unfinished;  // should one's own bias throw on the way
        saved.inputs_.template keep<Q, K, V>(q, k, v);
        const auto lines = static_cast<std::size_t>(q.batch()) * static_cast<std::size_t>(q.heads()) * static_cast<std::size_t>(q.tokens());
        saved.logsumexp_.resize(lines);
        saved.hops_.resize(lines * recursion_.hops.size() * static_cast<std::size_t>(v.dim()));
        saved.states_.resize(static_cast<std::size_t>(offset_t{q.batch()} * q.heads() * state_size<T>(q.dim(), v.dim())));
        run<T>(q, k, v, out, with_plans, saved.logsumexp_.data(), saved.hops_.data(), accumulate, saved.states_.data());
        with_plans.workspace = nullptr;
        saved.options_ = std::move(with_plans);
        saved.hop_count_ = recursion_.hops.size();
    }

    template <class T>
    void run(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const TensorView<T>& out, const CallOptions& options, T* logsumexp,
             T* hops, bool accumulate, T* states = nullptr) const {
        const Plans plans = this->template check<T>(q, k, v, options);
        detail::require_shape(out, {q.extents[0], q.extents[1], q.extents[2], v.extents[3]}, q.rank, "out");
        const auto bound = bind_items(q, k, options);
        Workspace own;
        Workspace& workspace = options.workspace ? *options.workspace : own;
        const index_t group = k.heads() == 0 ? 0 : q.heads() / k.heads();
        const offset_t states_of_head = states ? state_size<T>(q.dim(), v.dim()) : 0;
        const auto lines = static_cast<offset_t>(recursion_.hops.size()) * q.tokens() * v.dim();
        const auto plan_of = [&](index_t b, index_t h) -> const Plan& { return plans.of(q, b, h); };
        if constexpr (!std::is_same_v<Backend, Reference> && !kernel && detail::may_have_one_hop<Diffusion>())
            if (q.tokens() == 1 && group > 0 && q.batch() > 0 && plans.same_for_heads(q.batch()) && detail::simd::is_decoding(make_head<T>(q, k, v, plans.of(q, 0, 0), bound.of(0), options, 0, 0, 0))) {
                // Heads that share keys read them once.
                // Reading keys and values takes as long as the arithmetic of some four heads.
                const auto work = [&] {
                    offset_t most = 0;
                    for (index_t b = 0; b < q.batch(); ++b) most = std::max(most, plan_of(b, 0).count());
                    return detail::Work{2. * static_cast<double>(most) * (q.dim() + v.dim()) * (group + 4), 1};
                };
                for_each_item(offset_t{k.batch()} * k.heads(), work, workspace, options.workspace != nullptr, [&](offset_t item, detail::Workers& workers) {
                    using Head = decltype(make_head<T>(q, k, v, plans.of(q, 0, 0), bound.of(0), options, 0, 0, 0));
                    const auto heads = workers[0].template take<Head>(group);
                    const auto results = workers[0].template take<detail::HeadResult<T>>(group);
                    const auto b = static_cast<index_t>(item / k.heads()), kh = static_cast<index_t>(item % k.heads());
                    for (index_t m = 0; m < group; ++m) {
                        const index_t h = kh * group + m;
                        const offset_t line = offset_t{b} * q.heads() + h;
                        heads[static_cast<std::size_t>(m)] = make_head<T>(q, k, v, plans.of(q, b, h), bound.of(b), options, b, h, kh);
                        results[static_cast<std::size_t>(m)] = {out.head(b, h), accumulate, logsumexp ? logsumexp + line : nullptr, hops ? hops + line * lines : nullptr, nullptr};
                    }
                    detail::simd::decode<Arch>(std::span<const Head>(heads), std::span<const detail::HeadResult<T>>(results), workers);
                });
                return;
            }
        const offset_t items = offset_t{q.batch()} * q.heads(), in_turn = worker_count();
        for_each_item(items, [&] { return work_of_heads<T>(q, k, v, plans.items.empty(), plan_of); }, workspace, options.workspace != nullptr, [&](offset_t item, detail::Workers& workers) {
            const auto [b, h, kh] = head_at(item, k.heads(), group);
            auto head = make_head<T>(q, k, v, plans.of(q, b, h), bound.of(b), options, b, h, kh);
            std::array<MatrixView<const T>, 4> next;
            if constexpr (!kernel)
                if (item + in_turn < items) {
                    const auto [nb, nh, nk] = head_at(item + in_turn, k.heads(), group);
                    head.next = next = {q.head(nb, nh), k.head(nb, nk), v.head(nb, nk), out.head(nb, nh)};
                }
            const detail::HeadResult<T> result{out.head(b, h), accumulate, logsumexp ? logsumexp + item * q.tokens() : nullptr, hops ? hops + item * lines : nullptr,
                                               states ? states + item * states_of_head : nullptr};
            if constexpr (std::is_same_v<Backend, Reference>) detail::reference::forward(head, result, workers);
            else detail::simd::forward<Arch>(head, result, workers);
        });
    }
};

POLYATTN_END_NAMESPACE
