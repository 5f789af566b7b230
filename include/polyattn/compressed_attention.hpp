#pragma once
// The layer behind Attention<...> with a CompressionPolicy: keys and values are shortened, then any layer without one attends to the landmarks.

#include <polyattn/attention_layer.hpp>
#include <polyattn/backend/simd/compress.hpp>

POLYATTN_BEGIN_NAMESPACE

/// What backward needs of a forward pass through compressed keys: as Saved (raw views are borrowed), with one pass of the inner layer a hop: memory
/// O(K (n e + m e)) a head for m landmarks. Moved, not copied.
template <class T>
class CompressedSaved : detail::MoveOnly {
    template <class...>
    friend class CompressedLayer;

    detail::SavedInputs<T> inputs_;
    CallOptions options_;
    Tensor<T> keys_;                       // landmarks of the keys
    std::vector<Tensor<T>> values_, z_;    // landmarks of Z_k; Z_1 .. Z_K, the last is the output
    std::vector<Saved<T>> inner_;
    bool finished_ = false;                // false of a pass that threw on the way
};

/// `Inner` is the layer of one hop on the landmarks.
template <class Compression, class Diffusion, class Inner>
class CompressedLayer<Compression, Diffusion, Inner> {
    static constexpr bool reference = Inner::is_reference;
    static constexpr bool projects = !reference && std::is_same_v<Compression, LinearProjection>;
    template <class Q, class K, class V>
    using common_element = typename Inner::template common_element<Q, K, V>;

public:
    template <class T>
    using SavedOf = CompressedSaved<T>;

    CompressedLayer(Compression compression, Diffusion diffusion, Inner inner) : compression_(std::move(compression)), diffusion_(std::move(diffusion)), inner_(std::move(inner)) {
        detail::validate(compression_);
        recursion_ = detail::checked_recursion(diffusion_);
    }

    const Compression& compression() const { return compression_; }
    const Diffusion& diffusion() const { return diffusion_; }
    const NoBias& bias() const { return inner_.bias(); }
    const Recursion& recursion() const { return recursion_; }
    /// This layer with another compression of the same type: a table that training changed. Throws invalid_input.
    CompressedLayer with_compression(Compression compression) const {
        detail::validate(compression);
        CompressedLayer other = *this;
        other.compression_ = std::move(compression);
        return other;
    }

    /// As the layers without compression; queries see landmarks(keys) rows. Key lengths count tokens. Shapes, errors and determinism as there.
    template <class Q, class K, class V>
    auto operator()(const Q& q, const K& k, const V& v, const CallOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        const detail::Adapted<T> aq(q, "q"), ak(k, "k"), av(v, "v");
        auto out = result<Q, T>(aq.view(), ak.view(), av.view());
        CompressedSaved<T> saved;
        run(detail::memory_of(out), saved, aq.view(), ak.view(), av.view(), options, false);
        return out;
    }
    /// The same, written to `out`.
    template <class Out, class Q, class K, class V>
    void into(Out&& out, const Q& q, const K& k, const V& v, const CallOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        static_assert(detail::has_memory<Out> && std::is_same_v<detail::element_t<Out>, T>, "polyattn: into() writes to tensors, views with strides, or raw views of the inputs' value type");
        const detail::Adapted<T> aq(q, "q"), ak(k, "k"), av(v, "v");
        CompressedSaved<T> saved;
        run(detail::memory_view(out, "out"), saved, aq.view(), ak.view(), av.view(), options, options.accumulate);
    }
    /// Forward pass for training.
    template <class Q, class K, class V>
    auto forward(const Q& q, const K& k, const V& v, const CallOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        const detail::Adapted<T> aq(q, "q"), ak(k, "k"), av(v, "v");
        auto out = result<Q, T>(aq.view(), ak.view(), av.view());
        CompressedSaved<T> saved;
        train<Q, K, V>(detail::memory_of(out), saved, aq.view(), ak.view(), av.view(), options, false);
        return Forward<decltype(out), T, CompressedSaved<T>>{std::move(out), std::move(saved)};
    }
    /// The same, written to `out` and `saved`.
    template <class Out, class T, class Q, class K, class V>
    void forward_into(Out&& out, CompressedSaved<T>& saved, const Q& q, const K& k, const V& v, const CallOptions& options = {}) const {
        static_assert(std::is_same_v<common_element<Q, K, V>, T> && std::is_same_v<detail::element_t<Out>, T>, "polyattn: out and saved must have the inputs' value type");
        const detail::Adapted<T> aq(q, "q"), ak(k, "k"), av(v, "v");
        train<Q, K, V>(detail::memory_view(out, "out"), saved, aq.view(), ak.view(), av.view(), options, options.accumulate);
    }

    /// Gradients of q, k, v and of learned weights (gradients.compression). Repeatable.
    template <class T, class D>
    auto backward(const CompressedSaved<T>& saved, const D& d_out, const CallOptions& options = {}) const {
        const auto like = [](const TensorView<const T>& view) { return detail::make_result<D, T>(detail::shape_like(view, {view.tokens(), view.dim()})); };
        Gradients<decltype(like(saved.inputs_.q()))> gradients{like(saved.inputs_.q()), like(saved.inputs_.k()), like(saved.inputs_.v()), {}, {}};
        backward_into(gradients, saved, d_out, options);
        return gradients;
    }
    /// The same, written to `gradients`.
    template <class TensorType, class T, class D>
    void backward_into(Gradients<TensorType>& gradients, const CompressedSaved<T>& saved, const D& d_out, const CallOptions& options = {}) const {
        static_assert(std::is_same_v<detail::element_t<D>, T>, "polyattn: d_out must have the inputs' value type");
        const detail::Adapted<T> ad(d_out, "d_out");
        const std::size_t hops = recursion_.hops.size();
        detail::require(saved.finished_, "saved", "a forward pass", "none, or one that threw");
        detail::require(saved.inner_.size() == hops, "saved", [&] { return detail::text("a forward pass of this layer, with ", hops, " hops"); }, saved.inner_.size());
        const TensorView<const T> q = saved.inputs_.q(), k = saved.inputs_.k(), v = saved.inputs_.v(), d = ad.view();
        const detail::GradientViews<T> into = detail::views_of(gradients, d, q, k, v);
        for (const TensorView<T>& view : {into.q, into.k, into.v}) detail::fill_with_zeros(view);
        gradients.bias.clear();
        gradients.compression.assign(table_size(), 0.);
        Workspace own_workspace;
        Workspace& workspace = options.workspace ? *options.workspace : own_workspace;

        const CallOptions& given = saved.options_;
        const index_t batch = q.batch(), heads = q.heads(), n = q.tokens(), e = v.dim(), used = used_heads(heads, k.heads());
        Tensor<T> g({batch, heads, n, e}), d_keys(saved.keys_.shape);
        for_each_head(batch, heads, [&](index_t b, index_t h) {
            const MatrixView<const T> from = d.head(b, h);
            const MatrixView<T> to = g.view().head(b, h);
            for (index_t i = 0; i < n; ++i)
                for (index_t c = 0; c < e; ++c) to(i, c) = hops == 0 && i >= valid_queries(given, b, n, k.tokens()) ? T(0) : from(i, c);
        });
        for (std::size_t step = hops; step-- > 0;) {
            const Hop& hop = recursion_.hops[step];
            // The row's own gradient to V, then the hop's.
            for_each_key_head(batch, k.heads(), heads, [&](index_t b, index_t h, index_t kh) {
                const MatrixView<T> own = g.view().head(b, h);
                const detail::DropoutMask mask = mask_of(given, b, h, heads);
                for (index_t i = 0; i < n; ++i) {
                    const bool alive = is_alive(saved.inner_[step], b, h, heads, i, n);
                    if (mask.drops_values()) drop(mask, step, i, own.row(i), e);
                    if (!alive) std::fill_n(own.row(i), e, T(0));
                    else if (hop.teleport != 0) detail::add_row_to<T>(own, i, static_cast<T>(hop.teleport), into.v.head(b, kh), i);
                    for (index_t c = 0; c < e; ++c) own(i, c) *= static_cast<T>(hop.walk);
                }
            });
            auto inner = inner_.backward(saved.inner_[step], std::as_const(g).view(), {.workspace = &workspace});
            add(inner.q, into.q);
            for (std::size_t at = 0; at < d_keys.values.size(); ++at) d_keys.values[at] += inner.k.values[at];
            if (step == 0) {
                adjoint(saved, k, v, Compressed::values, inner.v, into.v, static_cast<T>(recursion_.start), gradients.compression, used, workspace);
                break;
            }
            std::fill(g.values.begin(), g.values.end(), T(0));
            adjoint(saved, k, std::as_const(saved.z_[step - 1]).view(), Compressed::values, inner.v, g.view(), T(1), gradients.compression, used, workspace);
        }
        if (hops == 0)
            for_each_key_head(batch, k.heads(), heads, [&](index_t b, index_t h, index_t kh) {
                for (index_t i = 0; i < n; ++i) detail::add_row_to<T>(g.view().head(b, h), i, static_cast<T>(recursion_.start), into.v.head(b, kh), i);
            });
        else adjoint(saved, k, k, Compressed::keys, d_keys, into.k, T(1), gradients.compression, used, workspace);
    }

    /// Does all the checks of operator(). Throws invalid_input.
    template <class Q, class K, class V>
    CallOptions planned(const Q& q, const K& k, const V& v, CallOptions options) const {
        using T = common_element<Q, K, V>;
        const detail::Adapted<T> aq(q, "q"), ak(k, "k"), av(v, "v");
        check(aq.view(), ak.view(), av.view(), options);
        return options;
    }

private:
    template <class Q, class T>
    auto result(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v) const {
        inner_.check_shapes(q, k, v);
        return detail::make_result<Q, T>(detail::shape_like(q, {q.tokens(), v.dim()}));
    }
    std::size_t table_size() const {
        if constexpr (detail::LearnedCompression<Compression>) return compression_.table.size();
        else return 0;
    }
    bool needs_square() const { return recursion_.hops.size() != 1 || recursion_.hops[0].teleport != 0; }
    /// Z of later hops differs from query head to query head.
    index_t used_heads(index_t heads, index_t key_heads) const { return recursion_.hops.size() > 1 ? heads : key_heads; }

    template <class T>
    void check(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CallOptions& options) const {
        inner_.check_shapes(q, k, v);
        if (needs_square() && q.tokens() != k.tokens())
            throw invalid_input("k", detail::text("as many keys as queries for diffusion, ", q.tokens()), std::to_string(k.tokens()));
        detail::check_lengths(options.key_lengths, q.batch(), k.tokens(), "key_lengths");
        detail::check_lengths(options.query_lengths, q.batch(), q.tokens(), "query_lengths");
        options.dropout.validate();
        detail::require(!options.plan, "plan", "none with compressed keys", "one");
        detail::require(options.item_plans.empty(), "item_plans", "none with compressed keys", options.item_plans.size());
        if constexpr (requires { compression_.check_tokens(k.tokens()); }) compression_.check_tokens(k.tokens());
    }
    static index_t valid_keys(const CallOptions& options, index_t b, index_t keys) { return options.key_lengths.empty() ? keys : options.key_lengths[static_cast<std::size_t>(b)]; }
    static index_t valid_queries(const CallOptions& options, index_t b, index_t queries, index_t keys) {
        return !options.query_lengths.empty() ? options.query_lengths[static_cast<std::size_t>(b)] : queries == keys ? valid_keys(options, b, keys) : queries;
    }
    template <class F>
    static void for_each_head(index_t batch, index_t heads, F&& f) {
        parallel_for(offset_t{batch} * heads, [&](offset_t item, int) { f(static_cast<index_t>(item / heads), static_cast<index_t>(item % heads)); });
    }
    /// f(batch, head, key head); the heads of a key head one after the other.
    template <class F>
    static void for_each_key_head(index_t batch, index_t key_heads, index_t heads, F&& f) {
        for_each_head(batch, key_heads, [&](index_t b, index_t kh) {
            for (index_t h = kh * (heads / key_heads); h < (kh + 1) * (heads / key_heads); ++h) f(b, h, kh);
        });
    }
    template <class T>
    static bool is_alive(const Saved<T>& inner, index_t b, index_t h, index_t heads, index_t i, index_t n) {
        return !detail::is_empty_row(inner.logsumexp()[static_cast<std::size_t>((offset_t{b} * heads + h) * n + i)]);
    }
    static detail::DropoutMask mask_of(const CallOptions& options, index_t b, index_t h, index_t heads) {
        return {{.values = options.dropout.values}, options.draw, offset_t{b} * heads + h};
    }
    template <class T>
    static void drop(const detail::DropoutMask& mask, std::size_t hop, index_t i, T* row, index_t columns) {
        detail::simd::drop_values(mask, static_cast<int>(hop), i, row, columns);
    }
    template <class T>
    static void add(const Tensor<T>& from, const TensorView<T>& to) {
        const TensorView<const T> view = detail::make_view<const T>(from.data(), to.extents, detail::row_major_strides(to.extents), "gradient");
        for_each_head(to.batch(), to.heads(), [&](index_t b, index_t h) {
            for (index_t i = 0; i < to.tokens(); ++i) detail::add_row_to<T>(view.head(b, h), i, T(1), to.head(b, h), i);
        });
    }

    /// Landmarks of x, [batch, heads, landmarks, dim]; heads beyond x's share its.
    template <class T>
    void compress(Tensor<T>& to, const TensorView<const T>& keys, const TensorView<const T>& x, Compressed what, const CallOptions& options, index_t heads) const {
        const index_t rows = compression_.landmarks(keys.tokens());
        to = Tensor<T>({keys.batch(), heads, rows, x.dim()});
        const TensorView<T> view = to.view();
        if constexpr (projects) {
            Workspace own;
            const detail::simd::Projection<T, typename Inner::Arch> projection(compression_, what);
            for (index_t b = 0; b < keys.batch(); ++b)
                for (index_t h = 0; h < heads; ++h) {
                    const index_t valid = valid_keys(options, b, keys.tokens());
                    projection.compress(detail::row_range(x.head(b, h / (heads / x.heads())), 0, valid), detail::row_range(view.head(b, h), 0, compression_.landmarks(valid)),
                                        options.workspace ? *options.workspace : own);
                }
            return;
        }
        for_each_head(keys.batch(), heads, [&](index_t b, index_t h) {
            const index_t valid = valid_keys(options, b, keys.tokens());
            const auto& bound = detail::bind_compression(compression_, detail::row_range(keys.head(b, h / (heads / keys.heads())), 0, valid));
            const MatrixView<const T> from = detail::row_range(x.head(b, h / (heads / x.heads())), 0, valid);
            const MatrixView<T> made = detail::row_range(view.head(b, h), 0, compression_.landmarks(valid));
            if constexpr (reference) bound.compress(from, what, made);
            else detail::simd::compress<typename Inner::Arch>(bound, from, what, made);
        });
    }
    /// to += factor * adjoint of d_rows; x is what was compressed.
    template <class T>
    void adjoint(const CompressedSaved<T>& saved, const TensorView<const T>& keys, const TensorView<const T>& x, Compressed what, Tensor<T>& d_rows, const TensorView<T>& to, T factor,
                 std::vector<double>& d_table, index_t heads, Workspace& workspace) const {
        if (factor != 1)
            for (T& entry : d_rows.values) entry *= factor;
        const TensorView<const T> d_view = std::as_const(d_rows).view();
        if (heads == 0) return;
        const index_t group = heads / to.heads();
        if constexpr (projects) {
            detail::simd::Projection<T, typename Inner::Arch> projection(compression_, what);
            for (index_t b = 0; b < keys.batch(); ++b)
                for (index_t h = 0; h < heads; ++h) {
                    const index_t valid = valid_keys(saved.options_, b, keys.tokens());
                    projection.adjoint(detail::row_range(x.head(b, h / (heads / x.heads())), 0, valid), detail::row_range(d_view.head(b, h), 0, compression_.landmarks(valid)),
                                       detail::row_range(to.head(b, h / group), 0, valid), workspace);
                }
            return projection.add_gradient(d_table);
        }
        // Runs of heads add to sums of their own, and these are added in order: the order never depends on threads.
        const offset_t items = offset_t{keys.batch()} * to.heads(), runs = d_table.empty() ? items : std::min<offset_t>(items, 16);
        std::vector<double> parts(static_cast<std::size_t>(runs) * d_table.size(), 0.);
        const auto head = [&](index_t b, index_t h, index_t target, std::span<double> own) {
            const index_t valid = valid_keys(saved.options_, b, keys.tokens());
            const auto& bound = detail::bind_compression(compression_, detail::row_range(keys.head(b, h / (heads / keys.heads())), 0, valid));
            const MatrixView<const T> from = detail::row_range(x.head(b, h / (heads / x.heads())), 0, valid), d = detail::row_range(d_view.head(b, h), 0, compression_.landmarks(valid));
            if constexpr (reference) bound.compress_adjoint(from, what, d, to.head(b, target), own);
            else detail::simd::compress_adjoint<typename Inner::Arch>(bound, from, what, d, to.head(b, target), own);
        };
        parallel_for(runs, [&](offset_t run, int) {
            const std::span<double> own = std::span(parts).subspan(static_cast<std::size_t>(run) * d_table.size(), d_table.size());
            for (offset_t item = items * run / runs; item < items * (run + 1) / runs; ++item)
                for (index_t g = 0; g < group; ++g) {
                    const auto target = static_cast<index_t>(item % to.heads());
                    head(static_cast<index_t>(item / to.heads()), target * group + g, target, own);
                }
        });
        for (std::size_t at = 0; at < parts.size(); ++at) d_table[at % d_table.size()] += parts[at];
    }

    template <class Q, class K, class V, class T>
    void train(const TensorView<T>& out, CompressedSaved<T>& saved, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CallOptions& options,
               bool accumulate) const {
        check_call(out, q, k, v, options);  // throws before anything is changed
        saved.finished_ = false;
        saved.inputs_.template keep<Q, K, V>(q, k, v);
        run(out, saved, saved.inputs_.q(), saved.inputs_.k(), saved.inputs_.v(), options, accumulate);
        saved.finished_ = true;
    }
    template <class T>
    void check_call(const TensorView<T>& out, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CallOptions& options) const {
        check(q, k, v, options);
        detail::require_shape(out, {q.extents[0], q.extents[1], q.extents[2], v.extents[3]}, q.rank, "out");
    }
    template <class T>
    void run(const TensorView<T>& out, CompressedSaved<T>& saved, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CallOptions& options,
             bool accumulate) const {
        check_call(out, q, k, v, options);
        const index_t batch = q.batch(), heads = q.heads(), n = q.tokens(), e = v.dim(), used = used_heads(heads, k.heads());
        const std::size_t hops = recursion_.hops.size();
        saved.options_ = options;
        saved.options_.workspace = nullptr;
        CallOptions inner{.draw = options.draw, .dropout = {.weights = options.dropout.weights}, .workspace = options.workspace, .weight_budget = options.weight_budget};
        for (index_t b = 0; b < batch; ++b) {
            inner.key_lengths.push_back(compression_.landmarks(valid_keys(options, b, k.tokens())));
            inner.query_lengths.push_back(valid_queries(options, b, n, k.tokens()));
        }
        saved.values_.resize(hops);
        saved.z_.resize(hops);
        saved.inner_.resize(hops);
        if (hops > 0) compress(saved.keys_, k, k, Compressed::keys, options, used);
        // Queries as rank 4, beside landmarks of rank 4.
        TensorView<const T> q4 = q;
        q4.rank = 4;
        for (std::size_t step = 0; step < hops; ++step) {
            const Hop& hop = recursion_.hops[step];
            compress(saved.values_[step], k, step == 0 ? v : std::as_const(saved.z_[step - 1]).view(), Compressed::values, options, used);
            if (step == 0 && recursion_.start != 1)
                for (T& entry : saved.values_[0].values) entry *= static_cast<T>(recursion_.start);
            saved.z_[step] = Tensor<T>({batch, heads, n, e});
            inner_.forward_into(saved.z_[step].view(), saved.inner_[step], q4, std::as_const(saved.keys_).view(), std::as_const(saved.values_[step]).view(), inner);
            for_each_key_head(batch, k.heads(), heads, [&](index_t b, index_t h, index_t kh) {
                const MatrixView<T> z = saved.z_[step].view().head(b, h);
                const detail::DropoutMask mask = mask_of(options, b, h, heads);
                for (index_t i = 0; i < n; ++i) {
                    if (!is_alive(saved.inner_[step], b, h, heads, i, n)) continue;
                    if (hop.walk != 1)
                        for (index_t c = 0; c < e; ++c) z(i, c) *= static_cast<T>(hop.walk);
                    if (hop.teleport != 0) detail::add_row_to(v.head(b, kh), i, static_cast<T>(hop.teleport), z, i);
                    if (mask.drops_values()) drop(mask, step, i, z.row(i), e);
                }
            });
        }
        for_each_key_head(batch, k.heads(), heads, [&](index_t b, index_t h, index_t kh) {
            const MatrixView<T> to = out.head(b, h);
            const MatrixView<const T> from = hops > 0 ? MatrixView<const T>(saved.z_.back().view().head(b, h)) : v.head(b, kh);
            const T factor = hops > 0 ? T(1) : static_cast<T>(recursion_.start);
            const index_t valid = hops > 0 ? n : inner.query_lengths[static_cast<std::size_t>(b)];
            if (!accumulate) detail::fill_with_zeros(to);
            for (index_t i = 0; i < valid; ++i) detail::add_row_to<T>(from, i, factor, to, i);
        });
    }

    Compression compression_;
    Diffusion diffusion_;
    Inner inner_;
    Recursion recursion_;
};

POLYATTN_END_NAMESPACE
