#pragma once
// Attention<..., Cuda> with a CompressionPolicy: keys and values are shortened, and the operators of the layers without one run on the landmarks.

#include <polyattn/backend/cuda/attention_layer.cuh>
#include <polyattn/backend/cuda/compress.cuh>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// The value type of a call with compressed keys.
template <bool kernel, class Q, class K, class V>
struct compressed_elements {
    using T = typename same_elements<kernel, Q, K, V>::T;
    static_assert(!is_narrow<T>, "polyattn: compressed keys and values take tensors of float or double");
};

/// Of one call: the operator's view of it, whose keys are landmarks, and the tokens.
template <class T, class Compression>
struct CompressedCall {
    OperatorCall<T> op;
    Rows<T> keys, values;  // tokens, of key heads and as query heads see them
    Lengths lengths;       // of tokens
    index_t tokens, key_columns;
    T *key_landmarks, *value_landmarks;  // [batch x key heads][landmarks][key columns], [items][landmarks][columns]
    DeviceCompression<T, Compression> compression;

    CompressionCall of_keys() const { return {op.batch, op.key_heads, tokens, op.keys, key_columns, lengths, op.stream}; }
    /// Values of the first hop are those of key heads, later ones differ from query head to query head.
    CompressionCall of_values(bool by_key_heads) const { return {op.batch, by_key_heads ? op.key_heads : op.heads, tokens, op.keys, op.columns, lengths, op.stream}; }
    void compress_keys() const {
        compression.look_at_keys(of_keys(), keys);
        compression.compress(of_keys(), Compressed::keys, keys, key_landmarks);
    }
    /// The landmarks of a hop's values: of V, or of z, [items][tokens][columns].
    Rows<T> compress_values(const T* z) const {
        Rows<T> from = values;
        if (z) from = packed_rows<T>(z, op.heads, offset_t{tokens} * op.columns, op.columns);
        else {
            from.heads = op.key_heads;
            from.group = 1;
        }
        compression.compress(of_values(!z), Compressed::values, from, value_landmarks);
        const offset_t of_item = offset_t{op.keys} * op.columns;
        if (z) return packed_rows<T>(value_landmarks, op.heads, of_item, op.columns);
        return {value_landmarks, op.key_heads * of_item, of_item, op.columns, op.heads, op.group()};
    }
};

}  // namespace detail::cuda

template <class Compression, class Diffusion, class Score>
class CompressedLayer<Compression, Diffusion, AttentionLayer<Dense, AllSources, NoDiffusion, Score, NoBias, Cuda>> {
    using Inner = AttentionLayer<Dense, AllSources, NoDiffusion, Score, NoBias, Cuda>;
    template <class Q, class K, class V>
    using common_element = typename detail::cuda::compressed_elements<detail::is_kernel<Score>, Q, K, V>::T;

public:
    /// As of the layers without compression, whose pass this is; its plan() is that of queries and landmarks.
    template <class T>
    using SavedOf = CudaSaved<T>;

    /// `inner` is the layer of one hop on the landmarks.
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

    /// As the layers without compression, for float and double; queries see landmarks(keys) rows. Key lengths count tokens. Shapes, errors and determinism as
    /// there. Memory O(n e + m e) a head for m landmarks, with any number of hops.
    template <class Q, class K, class V>
    auto operator()(const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        inner_.template check_shapes<T>(q, k, v);
        CudaTensor<T> out(detail::shape_like(q, {q.tokens(), v.dim()}));
        run<T>(out.view(), nullptr, q, k, v, options, false);
        return out;
    }
    /// The same, written to `out`, which must not overlap the inputs; with CallOptions::accumulate added to it. With a workspace a repeated call
    /// allocates nothing and does not wait for the device.
    template <class O, class Q, class K, class V>
    void into(const TensorView<O>& out, const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        static_assert(std::is_same_v<O, T>, "polyattn: out must have the inputs' value type");
        run<T>(out, nullptr, q, k, v, options, options.accumulate);
    }
    /// Forward pass for training.
    template <class Q, class K, class V>
    auto forward(const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        inner_.template check_shapes<T>(q, k, v);
        CudaForward<T> result{CudaTensor<T>(detail::shape_like(q, {q.tokens(), v.dim()})), {}};
        run<T>(result.out.view(), &result.saved, q, k, v, options, false);
        return result;
    }
    /// The same, written to `out`, or with CallOptions::accumulate added to it, and to a `saved` of an earlier pass, whose memory is used again.
    template <class T, class Q, class K, class V>
    void forward_into(const TensorView<T>& out, CudaSaved<T>& saved, const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        static_assert(std::is_same_v<common_element<Q, K, V>, T>, "polyattn: out and saved must have the inputs' value type");
        run<T>(out, &saved, q, k, v, options, options.accumulate);
    }

    /// Gradients of q, k, v and of learned weights (gradients.compression), whose sums are made in double and brought to the host, for which the call
    /// waits. `saved` must come from forward() of this layer or a copy; of `options` the stream and the workspace are used. Repeatable; deterministic.
    template <class T, class D>
    CudaGradients<T> backward(const CudaSaved<T>& saved, const TensorView<D>& d_out, const CudaOptions& options = {}) const {
        saved.require(kind<T>, recursion_.hops.size());
        CudaGradients<T> gradients = detail::cuda::gradients_like(saved.q_, saved.k_, saved.v_);
        backward_into(gradients, saved, d_out, options);
        return gradients;
    }
    /// The same, written to `gradients`, as backward() returned them before.
    template <class T, class D>
    void backward_into(CudaGradients<T>& gradients, const CudaSaved<T>& saved, const TensorView<D>& d_out, const CudaOptions& options = {}) const {
        static_assert(std::is_same_v<std::remove_const_t<D>, T>, "polyattn: d_out must have the inputs' value type");
        const TensorView<const T> d = d_out;
        saved.require(kind<T>, recursion_.hops.size());
        detail::cuda::check_gradients(saved.q_, saved.k_, saved.v_, d, gradients);
        const TensorView<T> d_q = gradients.q.view(), d_k = gradients.k.view(), d_v = gradients.v.view();
        gradients.bias.clear();
        CudaOptions call = saved.options_;
        call.stream = options.stream;
        call.device_workspace = options.device_workspace;
        detail::cuda::with_workspace(call, [&](detail::cuda::Carver carver) { return work_backward(carver, saved, d, d_q, d_k, d_v, gradients.compression, call); });
    }

    /// Bytes of workspace that the same call takes. Throws invalid_input.
    template <class Q, class K, class V>
    std::size_t workspace_bytes(const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        const TensorView<const T> vq = q, vk = k, vv = v;
        return work<T>({}, vq, vk, vv, {}, check<T>(vq, vk, vv, options), options, nullptr, false);
    }
    /// Bytes of workspace that backward() takes.
    template <class T>
    std::size_t backward_workspace_bytes(const CudaSaved<T>& saved) const {
        saved.require(kind<T>, recursion_.hops.size());
        std::vector<double> none;
        return work_backward({}, saved, detail::cuda::any_d_out(saved.q_, saved.v_), TensorView<T>{}, TensorView<T>{}, TensorView<T>{}, none, saved.options_);
    }

private:
    using Plans = typename Inner::Plans;
    template <class T>
    static constexpr auto kind = detail::is_kernel<Score> ? CudaSaved<T>::Kind::compressed_kernel : CudaSaved<T>::Kind::compressed_softmax;

    bool needs_square() const { return recursion_.hops.size() != 1 || recursion_.hops[0].teleport != 0; }
    std::size_t table_size() const {
        if constexpr (detail::LearnedCompression<Compression>) return compression_.table.size();
        else return 0;
    }

    /// A call's options as the operator has them: lengths are those of landmarks. Both are there, or neither.
    CudaOptions of_landmarks(const CudaOptions& options, index_t batch, index_t queries, index_t keys) const {
        CudaOptions made;
        made.draw = options.draw;
        made.dropout = options.dropout;
        made.stream = options.stream;
        if (options.key_lengths.empty() && options.query_lengths.empty()) return made;
        for (index_t b = 0; b < batch; ++b) {
            const auto valid = Inner::valid_of(options, b, queries, keys);
            made.key_lengths.push_back(compression_.landmarks(valid.keys));
            made.query_lengths.push_back(valid.queries);
        }
        return made;
    }
    template <class T>
    Plans check(const TensorView<const T>& q, TensorView<const T> k, TensorView<const T> v, const CudaOptions& options) const {
        inner_.template check_shapes<T>(q, k, v);
        if (needs_square() && q.tokens() != k.tokens()) throw invalid_input("k", detail::text("as many keys as queries for diffusion, ", q.tokens()), std::to_string(k.tokens()));
        detail::check_lengths(options.key_lengths, q.batch(), k.tokens(), "key_lengths");
        detail::check_lengths(options.query_lengths, q.batch(), q.tokens(), "query_lengths");
        detail::require(!options.plan, "plan", "none with compressed keys", "one");
        detail::require(options.item_plans.empty(), "item_plans", "none with compressed keys", options.item_plans.size());
        if constexpr (requires { compression_.check_tokens(k.tokens()); }) compression_.check_tokens(k.tokens());
        return landmark_plans(q, k, v, of_landmarks(options, q.batch(), q.tokens(), k.tokens()));
    }
    /// The plan of queries and landmarks, with the checks of the layer on them.
    template <class T>
    Plans landmark_plans(const TensorView<const T>& q, TensorView<const T> k, TensorView<const T> v, const CudaOptions& options) const {
        k.extents[2] = v.extents[2] = compression_.landmarks(k.tokens());
        return inner_.check(q, k, v, options);
    }

    template <class T>
    void run(const TensorView<T>& out, CudaSaved<T>* saved, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CudaOptions& options, bool accumulate) const {
        const Plans plans = check<T>(q, k, v, options);
        detail::cuda::check_memory(q, k, v, out);
        if (saved) {
            saved->kind_ = CudaSaved<T>::Kind::none;  // should memory run out
            saved->q_ = q;
            saved->k_ = k;
            saved->v_ = v;
            saved->options_ = options;
            saved->options_.device_workspace = nullptr;
            saved->options_.plan = plans.shared;
            const offset_t lines = offset_t{q.batch()} * q.heads() * q.tokens();
            Inner::resize(saved->logsumexp_, lines);
            Inner::resize(saved->hops_, lines * static_cast<offset_t>(recursion_.hops.size()) * detail::cuda::padded<T>(v.dim()));
        }
        detail::cuda::with_workspace(options, [&](detail::cuda::Carver carver) { return work<T>(carver, q, k, v, out, plans, options, saved, accumulate); });
        if (saved) {
            saved->hop_count_ = recursion_.hops.size();
            saved->kind_ = kind<T>;
        }
    }

    template <class T>
    auto make_call(detail::cuda::Carver& carver, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CudaOptions& options, bool backward) const {
        using namespace detail::cuda;
        const index_t landmarks = compression_.landmarks(k.tokens()), key_columns = padded<T>(k.dim()), columns = padded<T>(v.dim()), heads = q.heads();
        const offset_t items = offset_t{q.batch()} * heads, key_items = offset_t{k.batch()} * k.heads();
        const CudaOptions of_operator = of_landmarks(options, q.batch(), q.tokens(), k.tokens());
        const auto put = [&](const std::vector<index_t>& lengths, index_t all) {
            index_t* const at = carver.template take<index_t>(static_cast<offset_t>(lengths.size()));
            if (lengths.empty()) return Lengths{nullptr, all};
            if (!carver.counts()) check_cuda(cudaMemcpyAsync(at, lengths.data(), lengths.size() * sizeof(index_t), cudaMemcpyHostToDevice, options.stream), "cudaMemcpyAsync of lengths");
            return Lengths{at, all};
        };
        T* const key_landmarks = carver.template take<T>(key_items * landmarks * key_columns);
        T* const value_landmarks = carver.template take<T>((recursion_.hops.size() > 1 ? items : key_items) * landmarks * columns);
        const std::ptrdiff_t of_head = std::ptrdiff_t{landmarks} * key_columns;
        const index_t group = k.heads() == 0 ? 1 : heads / k.heads();
        const Rows<T> key_rows{key_landmarks, k.heads() * of_head, of_head, key_columns, heads, group};
        const OperatorCall<T> op{as_rows(q, heads, carver, options.stream), key_rows, q.batch(), heads, k.heads(), q.tokens(), landmarks, q.dim(), columns, put(of_operator.query_lengths, q.tokens()),
                                 put(of_operator.key_lengths, landmarks), {detail::DropoutMask(options.dropout, options.draw, 0)}, options.stream};
        const Lengths lengths = put(options.key_lengths, k.tokens());
        const CompressionCall of_keys{k.batch(), k.heads(), k.tokens(), landmarks, key_columns, lengths, options.stream};
        return CompressedCall<T, Compression>{op, as_rows(k, k.heads(), carver, options.stream), as_rows(v, heads, carver, options.stream), lengths, k.tokens(), key_columns,
                                              key_landmarks, value_landmarks, DeviceCompression<T, Compression>(carver, compression_, of_keys, heads, backward)};
    }

    /// Z_0 = start V enters only through the first hop, which takes the factor.
    double walk_of(std::size_t hop) const { return hop == 0 ? recursion_.hops[0].walk * recursion_.start : recursion_.hops[hop].walk; }

    /// out = start * sum over the heads of a group: what is left without hops.
    template <class T>
    void finish_without_hops(const detail::cuda::Rows<T>& from, index_t group, const TensorView<T>& out, bool accumulate, const detail::cuda::OperatorCall<T>& op) const {
        detail::cuda::Finish<T> finish;
        finish.factor = static_cast<T>(recursion_.start);
        finish.accumulate = accumulate;
        detail::cuda::finish_heads(from, group, out, op.query_lengths, finish, op.stream);
    }

    /// The forward pass, or, with a carver that counts, only the bytes that it takes.
    template <class T>
    std::size_t work(detail::cuda::Carver carver, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const TensorView<T>& out, const Plans& plans, const CudaOptions& options,
                     CudaSaved<T>* saved, bool accumulate) const {
        using namespace detail::cuda;
        const auto runs = Inner::template planned_items<T>(q, plans);
        const auto call = make_call<T>(carver, q, k, v, options, false);
        const OperatorCall<T>& op_call = call.op;
        const std::size_t hops = recursion_.hops.size();
        const offset_t lines = offset_t{op_call.items()} * op_call.queries, of_item = offset_t{op_call.queries} * op_call.columns;
        T* const sums = saved ? saved->logsumexp_.data() : carver.template take<T>(lines);
        T* const between = carver.template take<T>(saved || hops < 2 ? 0 : lines * op_call.columns);
        inner_.template with_operator<T>(carver, op_call, q, k, runs, sums, false, [&](const auto& op) {
            if (carver.counts() || lines == 0 || (out.size() == 0 && !saved)) return;
            if (hops == 0) {
                finish_without_hops(call.values, 1, out, accumulate, op_call);
                return;
            }
            call.compress_keys();
            op.prepare();
            const auto z_of = [&](std::size_t hop) -> T* { return hop == 0 ? nullptr : saved ? saved->hops_.data() + static_cast<offset_t>(hop - 1) * lines * op_call.columns : between; };
            for (std::size_t hop = 0; hop < hops; ++hop) {
                Finish<T> finish;
                set_target(finish, out);
                if (hop + 1 < hops) finish.out = nullptr;
                finish.factor = static_cast<T>(walk_of(hop));
                finish.teleport = static_cast<T>(recursion_.hops[hop].teleport);
                finish.values = call.values;
                finish.accumulate = accumulate;
                finish.dropout = op_call.dropout;
                finish.hop = static_cast<int>(hop);
                if (saved || hop + 1 < hops) {
                    finish.packed = z_of(hop + 1);
                    finish.packed_stride = of_item;
                }
                op.apply(hop == 0, call.compress_values(z_of(hop)), finish);
            }
        });
        return carver.used();
    }

    /// The backward pass, or only the bytes that it takes. As that of the layers without compression, S between the hops: with H_k = walk_k dropout(G_k),
    /// G_{k-1} = S^T A^T H_k, and dA = sum_k H_k (S Z_{k-1})^T. Landmarks are made anew.
    template <class T>
    std::size_t work_backward(detail::cuda::Carver carver, const CudaSaved<T>& saved, const TensorView<const T>& d_out, const TensorView<T>& d_q, const TensorView<T>& d_k, const TensorView<T>& d_v,
                              std::vector<double>& d_table, const CudaOptions& options) const {
        using namespace detail::cuda;
        const auto stream = options.stream;
        const TensorView<const T> q = saved.q_, k = saved.k_, v = saved.v_;
        const Plans plans = landmark_plans(q, k, v, of_landmarks(options, q.batch(), q.tokens(), k.tokens()));
        const auto runs = Inner::template planned_items<T>(q, plans);
        const auto call = make_call<T>(carver, q, k, v, options, true);
        const OperatorCall<T>& op_call = call.op;
        const Rows<T> d = as_rows(d_out, q.heads(), carver, stream);
        const index_t items = op_call.items(), queries = op_call.queries, landmarks = op_call.keys, columns = op_call.columns, hops = static_cast<index_t>(recursion_.hops.size()), tokens = call.tokens, heads = q.heads();
        const offset_t lines = offset_t{items} * queries, of_item = offset_t{queries} * columns, of_tokens = offset_t{tokens} * columns, of_marks = offset_t{landmarks} * columns;
        const offset_t key_numbers = offset_t{op_call.batch} * op_call.key_heads * landmarks * call.key_columns;
        bool teleports = false;
        for (const Hop& hop : recursion_.hops) teleports |= hop.teleport != 0;
        T* const h = carver.template take<T>(items * of_item);
        T* const g = carver.template take<T>(hops > 1 ? items * of_tokens : 0);
        T* const d_values = carver.template take<T>(items * of_marks);
        T* const row_sums = carver.template take<T>(lines);
        T* const teleported = carver.template take<T>(teleports ? items * of_item : 0);
        T* const of_heads = carver.template take<T>(op_call.group() > 1 ? items * of_tokens : 0);
        T* const d_keys = carver.template take<T>(key_numbers);
        // Landmarks' gradient of one hop: of kernel scores that of key heads, of softmax that of query heads.
        const offset_t hop_numbers = detail::is_kernel<Score> ? key_numbers : offset_t{items} * landmarks * call.key_columns;
        T* const d_hop_keys = carver.template take<T>(hop_numbers);
        inner_.template with_operator<T>(carver, op_call, q, k, runs, const_cast<T*>(saved.logsumexp_.data()), true, [&](const auto& op) {
            [[maybe_unused]] const auto scratch = op.take_gradient(carver);
            if (carver.counts()) return;
            d_table.assign(table_size(), 0.);
            if (items == 0 || queries == 0 || hops == 0) {
                for (const TensorView<T>& view : {d_q, d_k, d_v}) fill_zeros(view.data, view.size(), stream);
                if (hops == 0 && d_v.size() > 0) finish_without_hops(d, op_call.group(), d_v, false, op_call);
                return;
            }
            const auto landmark_view = [&](T* data, index_t dim) {
                const std::ptrdiff_t of_head = std::ptrdiff_t{landmarks} * call.key_columns;
                return detail::make_view<T>(data, std::array<index_t, 4>{op_call.batch, op_call.key_heads, landmarks, dim}, std::array<std::ptrdiff_t, 4>{op_call.key_heads * of_head, of_head, call.key_columns, 1}, "landmarks");
            };
            const TensorView<T> d_key_landmarks = landmark_view(d_keys, call.key_columns);

            call.compress_keys();
            op.prepare_backward();
            fill_zeros(teleported, teleports ? items * of_item : 0, stream);
            fill_zeros(d_hop_keys, hop_numbers, stream);  // what is behind the last column stays 0
            for (index_t hop = hops; hop-- > 0;) {
                const bool last = hop == hops - 1;
                const T* const z_before = hop == 0 ? nullptr : saved.hops_.data() + (hop - 1) * lines * columns;
                HopGradientArguments<T> arguments{};
                arguments.g = last ? d : packed_rows<T>(g, heads, of_tokens, columns);
                arguments.z = packed_rows<T>(saved.hops_.data() + hop * lines * columns, heads, of_item, columns);
                arguments.v = call.values;
                arguments.walk = static_cast<T>(walk_of(static_cast<std::size_t>(hop)));
                arguments.teleport = static_cast<T>(recursion_.hops[static_cast<std::size_t>(hop)].teleport);
                arguments.dropout = op_call.dropout;
                arguments.hop = static_cast<int>(hop);
                arguments.queries = queries;
                arguments.columns = columns;
                arguments.heads = heads;
                arguments.query_lengths = op_call.query_lengths;
                arguments.logsumexp = op.marks();
                arguments.h = h;
                arguments.h_stride = of_item;
                arguments.row_sums = row_sums;
                arguments.d_v = teleports ? teleported : nullptr;
                fill_zeros(row_sums, lines, stream);  // of this hop alone
                apply_hop_gradient(arguments, items, stream);
                const Rows<T> values = call.compress_values(z_before), h_rows = packed_rows<T>(h, heads, of_item, columns);
                Finish<T> to_landmarks;
                to_landmarks.packed = d_values;
                to_landmarks.packed_stride = of_marks;
                to_landmarks.packed_columns = columns;
                to_landmarks.heads = heads;
                to_landmarks.columns = v.dim();
                op.apply_transposed(h_rows, to_landmarks);

                const Hops<T> one{1, h, nullptr, values, queries, columns, row_sums};
                Finish<T> finish_q, onto;
                set_target(finish_q, d_q);
                finish_q.accumulate = onto.accumulate = !last;
                const Lengths all{nullptr, landmarks};
                const offset_t of_key_landmarks = offset_t{landmarks} * call.key_columns;
                if constexpr (detail::is_kernel<Score>) {
                    op.gradient(scratch, one, finish_q, landmark_view(d_hop_keys, k.dim()));
                    finish_heads(packed_rows<T>(d_hop_keys, op_call.key_heads, of_key_landmarks, call.key_columns), 1, d_key_landmarks, all, onto, stream);
                } else {
                    Finish<T> finish_k;
                    finish_k.packed = d_hop_keys;
                    finish_k.packed_stride = of_key_landmarks;
                    finish_k.packed_columns = call.key_columns;
                    finish_k.heads = heads;
                    finish_k.columns = k.dim();
                    op.gradient(one, finish_q, finish_k, BiasSums{});
                    finish_heads(packed_rows<T>(d_hop_keys, heads, of_key_landmarks, call.key_columns), op_call.group(), d_key_landmarks, all, onto, stream);
                }

                // Back to the tokens of each query head.
                const CompressionCall by_heads = call.of_values(false);
                const Rows<T> compressed = z_before ? packed_rows<T>(z_before, heads, of_tokens, columns) : call.values, d_compressed = packed_rows<T>(d_values, heads, of_marks, columns);
                call.compression.add_table_gradient(by_heads, Compressed::values, compressed, d_compressed, last);
                Finish<T> finish;
                if (hop > 0 || op_call.group() > 1) {
                    finish.packed = hop > 0 ? g : of_heads;
                    finish.packed_stride = of_tokens;
                    finish.packed_columns = columns;
                    finish.heads = heads;
                    finish.columns = v.dim();
                } else set_target(finish, d_v);
                if (hop == 0 && teleports) {
                    finish.teleport = 1;
                    finish.values = packed_rows<T>(teleported, heads, of_item, columns);
                }
                call.compression.adjoint(by_heads, Compressed::values, compressed, d_compressed, finish);
            }
            if (op_call.group() > 1) finish_heads(packed_rows<T>(of_heads, heads, of_tokens, columns), op_call.group(), d_v, Lengths{nullptr, tokens}, Finish<T>{}, stream);

            const Rows<T> d_key_rows = packed_rows<T>(d_keys, op_call.key_heads, offset_t{landmarks} * call.key_columns, call.key_columns);
            Finish<T> finish_k;
            set_target(finish_k, d_k);
            call.compression.add_table_gradient(call.of_keys(), Compressed::keys, call.keys, d_key_rows, true);
            call.compression.adjoint(call.of_keys(), Compressed::keys, call.keys, d_key_rows, finish_k);
            call.compression.read_table_gradient(d_table, stream);
        });
        return carver.used();
    }

    Compression compression_;
    Diffusion diffusion_;
    Inner inner_;
    Recursion recursion_;
};

POLYATTN_END_NAMESPACE
