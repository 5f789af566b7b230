#pragma once
// Nystrom attention on the device: three softmax operators between tokens and landmarks, with the pseudo-inverse between them.

#include <polyattn/backend/cuda/attention_layer.cuh>
#include <polyattn/backend/cuda/compress.cuh>
#include <polyattn/backend/cuda/pseudo_inverse.cuh>
#include <polyattn/policy/attention.hpp>
#include <polyattn/policy/nystrom.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// The value type of a call.
template <class Q, class K, class V>
struct nystrom_elements {
    using T = typename same_elements<false, Q, K, V>::T;
    static_assert(!is_narrow<T>, "polyattn: Nystrom attention takes tensors of float or double");
};

/// What a pass makes, in memory of its own or in the workspace. Items are the query heads.
template <class T>
struct NystromPass {
    index_t batch, heads, key_heads, tokens, segments, marks, dim;  // segments: as the parameters have them; marks: the most landmarks of an item
    index_t dim_columns, value_columns, mark_columns;               // padded
    Lengths lengths, mark_lengths;  // tokens and landmarks of a batch item
    index_t* length_memory;         // of both
    T *query_marks, *key_marks;     // [items][marks][dim columns], [batch x key heads][marks][dim columns]
    T* identity;                    // [marks][mark columns]
    PseudoInverse<T> inverse;       // of A = softmax(Q~ K~^T)
    T *summary, *values;            // softmax(Q~ K^T) V and Z times that, [items][marks][value columns]
    T* out;                         // softmax(Q K~^T) values, [items][tokens][value columns]; null unless backward follows
    T *of_landmarks, *of_reading, *of_writing;  // logsumexp of the three softmaxes, [items][queries]

    index_t items() const { return batch * heads; }
    bool is_empty() const { return items() == 0 || tokens == 0; }
    index_t group() const { return heads / key_heads; }
    EvenMeansForm<T> means() const { return {segments, lengths}; }
    /// [items][tokens or marks][columns], and what becomes of such rows.
    Rows<T> token_rows(const T* data, index_t columns) const { return packed_rows(data, heads, offset_t{tokens} * columns, columns); }
    Rows<T> mark_rows(const T* data, index_t columns) const { return packed_rows(data, heads, offset_t{marks} * columns, columns); }
    Finish<T> to_marks(T* data, index_t columns, bool adds = false) const { return packed_finish(data, marks, columns, heads, adds); }
    Rows<T> key_mark_rows() const {
        const std::ptrdiff_t head = std::ptrdiff_t{marks} * dim_columns;
        return {key_marks, key_heads * head, head, dim_columns, heads, group()};
    }
    Rows<T> identity_rows() const { return {identity, 0, 0, mark_columns, heads, 1}; }
};

}  // namespace detail::cuda

/// NystromAttention on the device, with gradients of q, k, v and of the convolution. Immutable; copies share plans; all calls are const.
/// Source: Xiong et al., "Nystromformer" (2021), equations 8 to 14.
class CudaNystromAttention {
    template <class Q, class K, class V>
    using common_element = typename detail::cuda::nystrom_elements<Q, K, V>::T;
    using Carver = detail::cuda::Carver;
    template <class T>
    using Pass = detail::cuda::NystromPass<T>;

public:
    explicit CudaNystromAttention(Nystrom parameters = {}) : parameters_(std::move(parameters)) { parameters_.validate(); }

    const NoBias& bias() const { return landmarks_.bias(); }
    /// The learned convolution, if there is one, is what trains.
    const Nystrom& compression() const { return parameters_; }
    /// This layer with other parameters: weights that training changed. Throws invalid_input.
    CudaNystromAttention with_compression(Nystrom parameters) const {
        parameters.validate();
        CudaNystromAttention other = *this;
        other.parameters_ = std::move(parameters);
        return other;
    }

    /// What backward needs of a forward pass. Borrows q, k and v: their memory must stay as it is until the last backward(). Handed to one forward pass after
    /// the other, it allocates nothing once it has met the largest.
    template <class T>
    class SavedOf {
        friend class CudaNystromAttention;
        TensorView<const T> q_, k_, v_;
        std::vector<Plan> plans_;  // what the device has of them stays
        Pass<T> pass_{};
        CudaWorkspace memory_;
    };

    /// softmax(Q K~^T) softmax(Q~ K~^T)^+ (softmax(Q~ K^T) V), all scaled by 1 / sqrt(d), with segment means Q~, K~ as landmarks, plus the convolution of V.
    /// Shapes: q [.., heads, tokens, d], k [.., key heads, tokens, d], v [.., key heads, tokens, e] -> [.., heads, tokens, e], rank 2 to 4, of float or double.
    /// Of `options` key_lengths, the stream and the workspace are used; there are no plans and no dropout. Throws invalid_input, as the CPU's, and cuda_error.
    /// Deterministic. O(n m (d + e) + iterations m^3) flops and O(m (d + e + m)) memory a head, for m landmarks.
    template <class Q, class K, class V>
    auto operator()(const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        detail::check_nystrom<T>(parameters_, q, k, v, options);
        CudaTensor<T> out(detail::shape_like(q, {q.tokens(), v.dim()}));
        run<T>(out.view(), nullptr, q, k, v, options, false);
        return out;
    }
    /// The same, written to `out`, which must not overlap the inputs; with CallOptions::accumulate added to it. With a workspace a repeated call
    /// allocates nothing on the device, and waits for it only where lengths or weights have to be copied there.
    template <class O, class Q, class K, class V>
    void into(const TensorView<O>& out, const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        static_assert(std::is_same_v<O, T>, "polyattn: out must have the inputs' value type");
        run<T>(out, nullptr, q, k, v, options, options.accumulate);
    }
    /// Forward pass for training. Memory O(n e + m (d + e + iterations m)) a head.
    template <class Q, class K, class V>
    auto forward(const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        detail::check_nystrom<T>(parameters_, q, k, v, options);
        CudaForward<T, SavedOf<T>> result{CudaTensor<T>(detail::shape_like(q, {q.tokens(), v.dim()})), {}};
        run<T>(result.out.view(), &result.saved, q, k, v, options, false);
        return result;
    }
    /// The same, written to `out`, or with CallOptions::accumulate added to it, and to a `saved` of an earlier pass, whose memory is used again.
    template <class T, class Q, class K, class V>
    void forward_into(const TensorView<T>& out, SavedOf<T>& saved, const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        static_assert(std::is_same_v<common_element<Q, K, V>, T>, "polyattn: out and saved must have the inputs' value type");
        run<T>(out, &saved, q, k, v, options, options.accumulate);
    }

    /// Gradients of q, k, v from d_out = dL/dout, and of the convolution's weights (gradients.compression), whose sums are made in double and brought to the
    /// host, for which the call waits; without a convolution it does not wait. `saved` must come from forward() of this layer or a copy; of `options` the stream
    /// and the workspace are used. Repeatable; deterministic. Throws as operator().
    template <class T, class D>
    CudaGradients<T> backward(const SavedOf<T>& saved, const TensorView<D>& d_out, const CudaOptions& options = {}) const {
        check_saved(saved);
        CudaGradients<T> gradients = detail::cuda::gradients_like(saved.q_, saved.k_, saved.v_);
        backward_into(gradients, saved, d_out, options);
        return gradients;
    }
    /// The same, written to `gradients`, as backward() returned them before.
    template <class T, class D>
    void backward_into(CudaGradients<T>& gradients, const SavedOf<T>& saved, const TensorView<D>& d_out, const CudaOptions& options = {}) const {
        static_assert(std::is_same_v<std::remove_const_t<D>, T>, "polyattn: d_out must have the inputs' value type");
        const TensorView<const T> d = d_out;
        check_saved(saved);
        detail::cuda::check_gradients(saved.q_, saved.k_, saved.v_, d, gradients);
        const TensorView<T> d_q = gradients.q.view(), d_k = gradients.k.view(), d_v = gradients.v.view();
        gradients.bias.clear();
        detail::cuda::with_workspace(options, [&](Carver carver) { return work_backward(carver, saved, d, d_q, d_k, d_v, gradients.compression, options.stream); });
    }

    /// Bytes of workspace that the same call takes. Throws invalid_input.
    template <class Q, class K, class V>
    std::size_t workspace_bytes(const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        detail::check_nystrom<T>(parameters_, q, k, v, options);
        return work<T>({}, {}, nullptr, q, k, v, options, plans_for(q.tokens(), most_marks(q.tokens(), options)), false);
    }
    /// Bytes of workspace that backward() takes.
    template <class T>
    std::size_t backward_workspace_bytes(const SavedOf<T>& saved) const {
        check_saved(saved);
        std::vector<double> none;
        return work_backward({}, saved, detail::cuda::any_d_out(saved.q_, saved.v_), TensorView<T>{}, TensorView<T>{}, TensorView<T>{}, none, nullptr);
    }

private:
    /// With lengths the most that any have, so that plans and workspaces don't hang on them.
    index_t most_marks(index_t tokens, const CallOptions& options) const { return options.key_lengths.empty() ? marks_of(tokens) : std::min(parameters_.landmarks, tokens); }
    index_t marks_of(index_t tokens) const { return tokens == 0 ? 0 : detail::segments(tokens, parameters_.segment_length(tokens)); }
    /// Of landmarks to landmarks, landmarks to tokens and tokens to landmarks. Each comes from a layer of its own, since layers keep a few.
    std::vector<Plan> plans_for(index_t tokens, index_t marks) const { return {landmarks_.plan(marks, marks), reading_.plan(marks, tokens), writing_.plan(tokens, marks)}; }

    template <class T>
    void check_saved(const SavedOf<T>& saved) const {
        detail::require(!saved.plans_.empty(), "saved", "a forward pass of this layer", "none");
        parameters_.check_heads(saved.q_.heads());
    }

    template <class T>
    void run(const TensorView<T>& out, SavedOf<T>* saved, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CudaOptions& options, bool accumulate) const {
        detail::check_nystrom(parameters_, q, k, v, options);
        detail::cuda::check_memory(q, k, v, out);
        const std::vector<Plan> plans = plans_for(q.tokens(), most_marks(q.tokens(), options));
        if (saved) {
            saved->plans_.clear();  // nothing is saved, should the device fail
            Carver counter;
            take_pass(counter, q, k, v, options, true);
            saved->memory_.reserve(std::max<std::size_t>(counter.used(), 1));
            Carver kept(saved->memory_.data());
            saved->pass_ = take_pass(kept, q, k, v, options, true);
            saved->q_ = q;
            saved->k_ = k;
            saved->v_ = v;
        }
        detail::cuda::with_workspace(options, [&](Carver carver) { return work<T>(carver, out, saved, q, k, v, options, plans, accumulate); });
        if (saved) saved->plans_ = plans;
    }

    /// Memory of a pass, without its contents.
    template <class T>
    Pass<T> take_pass(Carver& carver, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CallOptions& options, bool keeps) const {
        using detail::cuda::padded;
        Pass<T> pass{};
        pass.batch = q.batch();
        pass.heads = q.heads();
        pass.key_heads = k.heads();
        pass.tokens = q.tokens();
        pass.segments = parameters_.landmarks;
        pass.marks = most_marks(q.tokens(), options);
        pass.dim = q.dim();
        pass.dim_columns = padded<T>(q.dim());
        pass.value_columns = padded<T>(v.dim());
        pass.mark_columns = padded<T>(pass.marks);
        const offset_t lines = offset_t{pass.items()} * pass.marks;
        pass.lengths = {nullptr, pass.tokens};
        pass.mark_lengths = {nullptr, pass.marks};
        if (!options.key_lengths.empty()) {
            pass.length_memory = carver.take<index_t>(2 * offset_t{pass.batch});
            pass.lengths.of_batch = pass.length_memory;
            pass.mark_lengths.of_batch = pass.length_memory + pass.batch;
        }
        pass.query_marks = carver.take<T>(lines * pass.dim_columns);
        pass.key_marks = carver.take<T>(offset_t{pass.batch} * pass.key_heads * pass.marks * pass.dim_columns);
        pass.identity = carver.take<T>(offset_t{pass.marks} * pass.mark_columns);
        pass.inverse = {carver, pass.items(), pass.marks, parameters_.iterations, keeps};
        pass.summary = carver.take<T>(lines * pass.value_columns);
        pass.values = carver.take<T>(lines * pass.value_columns);
        if (keeps) pass.out = carver.take<T>(offset_t{pass.items()} * pass.tokens * pass.value_columns);
        pass.of_landmarks = carver.take<T>(lines);
        pass.of_reading = carver.take<T>(lines);
        pass.of_writing = carver.take<T>(offset_t{pass.items()} * pass.tokens);
        return pass;
    }

    // The three softmaxes, as operators are told of them.

    template <class T>
    static detail::cuda::OperatorCall<T> landmarks_call(const Pass<T>& pass, cudaStream_t stream) {
        return {pass.mark_rows(pass.query_marks, pass.dim_columns), pass.key_mark_rows(), pass.batch, pass.heads, pass.key_heads, pass.marks, pass.marks, pass.dim, pass.mark_columns, pass.mark_lengths, pass.mark_lengths, {}, stream};
    }
    template <class T>
    static detail::cuda::OperatorCall<T> reading_call(const Pass<T>& pass, const detail::cuda::Rows<T>& k, cudaStream_t stream) {
        return {pass.mark_rows(pass.query_marks, pass.dim_columns), k, pass.batch, pass.heads, pass.key_heads, pass.marks, pass.tokens, pass.dim, pass.value_columns, pass.mark_lengths, pass.lengths, {}, stream};
    }
    template <class T>
    static detail::cuda::OperatorCall<T> writing_call(const Pass<T>& pass, const detail::cuda::Rows<T>& q, cudaStream_t stream) {
        return {q, pass.key_mark_rows(), pass.batch, pass.heads, pass.key_heads, pass.tokens, pass.marks, pass.dim, pass.value_columns, pass.lengths, pass.mark_lengths, {}, stream};
    }
    /// f(operator, carver) of a call.
    template <class T, class F>
    static void with_operator(Carver carver, const detail::cuda::OperatorCall<T>& call, const Plan& plan, T* logsumexp, bool backward, F&& f) {
        using namespace detail::cuda;
        using Softmaxes = SoftmaxOperator<T, NoBias>;
        const typename Softmaxes::Runs runs{{&plan.lowered<DevicePlan<Softmaxes::side>>(), 0, call.items()}};
        const Softmaxes op(carver, call, runs, Softmax{}.factor(call.dim), NoBias{}, logsumexp, backward);
        f(op, carver);
    }

    /// The convolution's weights on the device, [heads][width].
    template <class T>
    detail::cuda::ConvolutionForm<T> put_table(Carver& carver, cudaStream_t stream) const {
        T* const to = carver.take<T>(static_cast<offset_t>(parameters_.table.size()));
        if (!carver.counts() && !parameters_.table.empty()) {
            const std::vector<T> weights(parameters_.table.begin(), parameters_.table.end());
            detail::cuda::check_cuda(cudaMemcpyAsync(to, weights.data(), weights.size() * sizeof(T), cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync of a convolution's table");
        }
        return {1, parameters_.width, to, parameters_.width / 2, parameters_.width};
    }
    template <class T>
    static detail::cuda::CompressionCall convolution_call(const Pass<T>& pass, cudaStream_t stream) {
        return {pass.batch, pass.heads, pass.tokens, pass.tokens, pass.value_columns, pass.lengths, stream};
    }
    template <class T>
    static detail::cuda::CompressionCall means_call(const Pass<T>& pass, index_t heads, cudaStream_t stream) {
        return {pass.batch, heads, pass.tokens, pass.marks, pass.dim_columns, pass.lengths, stream};
    }
    /// Of a tensor of keys: one head a key head.
    template <class T>
    static detail::cuda::Rows<T> by_key_heads(detail::cuda::Rows<T> rows, const Pass<T>& pass) {
        rows.heads = pass.key_heads;
        rows.group = 1;
        return rows;
    }
    template <class T>
    static detail::cuda::MatrixProduct<T> product(const Pass<T>& pass, const detail::cuda::Rows<T>& first, const detail::cuda::Rows<T>& second, index_t columns, index_t inner, T* to) {
        return {first, second, pass.marks, columns, inner, 0, 0, pass.to_marks(to, detail::cuda::padded<T>(columns))};
    }

    /// The forward pass, or, with a carver that counts, only the bytes that it takes.
    template <class T>
    std::size_t work(Carver carver, const TensorView<T>& out, SavedOf<T>* saved, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CudaOptions& options,
                     const std::vector<Plan>& plans, bool accumulate) const {
        using namespace detail::cuda;
        const cudaStream_t stream = options.stream;
        const Pass<T> pass = saved ? saved->pass_ : take_pass(carver, q, k, v, options, false);
        const Rows<T> q_rows = as_rows(q, q.heads(), carver, stream), k_rows = as_rows(k, q.heads(), carver, stream), v_rows = as_rows(v, q.heads(), carver, stream);
        const ConvolutionForm<T> convolution = put_table<T>(carver, stream);
        T* const of_inverse = pass.inverse.take_scratch(carver, false);
        const bool works = !carver.counts() && !pass.is_empty();
        std::size_t most = carver.used();
        const auto apply = [&](const OperatorCall<T>& call, const Plan& plan, T* logsumexp, const Rows<T>& values, const Finish<T>& finish) {
            with_operator(carver, call, plan, logsumexp, false, [&](const auto& op, const Carver& scratch) {
                most = std::max(most, scratch.used());
                if (works) op.apply(true, values, finish);
            });
        };
        if (works) {
            put_lengths(pass, options);
            compress_with<false>(pass.means(), CompressArguments<T>{q_rows, {}, means_call(pass, pass.heads, stream), 0, pass.to_marks(pass.query_marks, pass.dim_columns)});
            compress_with<false>(pass.means(), CompressArguments<T>{by_key_heads(k_rows, pass), {}, means_call(pass, pass.key_heads, stream), 0, packed_finish(pass.key_marks, pass.marks, pass.dim_columns, pass.key_heads)});
            launch("fill_identity", fill_identity<T>, dim3(blocks_for(offset_t{pass.marks} * pass.mark_columns, 256)), 256, 0, stream, pass.identity, pass.marks, pass.mark_columns);
        }
        apply(landmarks_call(pass, stream), plans[0], pass.of_landmarks, pass.identity_rows(), pass.to_marks(pass.inverse.matrices(), pass.mark_columns));
        apply(reading_call(pass, k_rows, stream), plans[1], pass.of_reading, v_rows, pass.to_marks(pass.summary, pass.value_columns));
        if (works) {
            pass.inverse.run(of_inverse, stream);
            const Rows<T> inverse = pass.mark_rows(pass.inverse.result(), pass.mark_columns), summary = pass.mark_rows(pass.summary, pass.value_columns);
            multiply_items<TransposedFactor::none>(product(pass, inverse, summary, pass.value_columns, pass.marks, pass.values), pass.items(), stream);
        }
        Finish<T> finish;
        set_target(finish, out);
        finish.accumulate = accumulate;
        if (saved) {
            finish.packed = pass.out;
            finish.packed_stride = offset_t{pass.tokens} * pass.value_columns;
        }
        apply(writing_call(pass, q_rows, stream), plans[2], pass.of_writing, pass.mark_rows(pass.values, pass.value_columns), finish);
        if (works && parameters_.width > 0) {
            finish.packed = nullptr;
            finish.accumulate = true;
            compress_with<false>(convolution, CompressArguments<T>{v_rows, {}, convolution_call(pass, stream), 0, finish});
        }
        return most;
    }
    /// Tokens, then landmarks of each batch item.
    template <class T>
    void put_lengths(const Pass<T>& pass, const CudaOptions& options) const {
        if (options.key_lengths.empty()) return;
        std::vector<index_t> lengths = options.key_lengths;
        for (const index_t tokens : options.key_lengths) lengths.push_back(marks_of(tokens));
        detail::cuda::check_cuda(cudaMemcpyAsync(pass.length_memory, lengths.data(), lengths.size() * sizeof(index_t), cudaMemcpyHostToDevice, options.stream), "cudaMemcpyAsync of lengths");
    }

    /// The backward pass, or only the bytes that it takes. Back through writing, Z times summary, reading, the pseudo-inverse and A, to the landmarks and from
    /// them to the tokens.
    template <class T>
    std::size_t work_backward(Carver carver, const SavedOf<T>& saved, const TensorView<const T>& d_out, const TensorView<T>& d_q, const TensorView<T>& d_k, const TensorView<T>& d_v, std::vector<double>& d_table,
                              cudaStream_t stream) const {
        using namespace detail::cuda;
        const Pass<T>& pass = saved.pass_;
        const index_t items = pass.items(), marks = pass.marks, heads = pass.heads, dim_columns = pass.dim_columns, value_columns = pass.value_columns, mark_columns = pass.mark_columns, group = pass.group();
        const offset_t of_marks = offset_t{items} * marks, of_tokens = offset_t{items} * pass.tokens, entries = static_cast<offset_t>(parameters_.table.size()) * pass.batch;
        const Rows<T> q_rows = as_rows(saved.q_, heads, carver, stream), k_rows = as_rows(saved.k_, heads, carver, stream), v_rows = as_rows(saved.v_, heads, carver, stream);
        const Rows<T> d_rows = as_rows(d_out, heads, carver, stream);
        T* const d_values = carver.take<T>(of_marks * value_columns);
        T* const d_summary = carver.take<T>(of_marks * value_columns);
        T* const d_query_marks = carver.take<T>(of_marks * dim_columns);
        T* const d_key_marks = carver.take<T>(of_marks * dim_columns);
        T* const d_inverse = carver.take<T>(pass.inverse.size());
        T* const d_a = carver.take<T>(pass.inverse.size());
        // Where query heads share those of keys: of each of them, and of landmarks their sum.
        T* const k_of_heads = carver.take<T>(group > 1 ? of_tokens * dim_columns : 0);
        T* const v_of_heads = carver.take<T>(group > 1 ? of_tokens * value_columns : 0);
        T* const d_shared_marks = carver.take<T>(group > 1 ? of_marks / group * dim_columns : 0);
        const ConvolutionForm<T> convolution = put_table<T>(carver, stream);
        double* const table_sums = carver.take<double>(entries);
        const bool works = !carver.counts() && !pass.is_empty();
        std::size_t most = carver.used();
        const auto go_back = [&](const OperatorCall<T>& call, const Plan& plan, T* logsumexp, const Rows<T>& g, const Rows<T>& made, const Rows<T>& values, const Finish<T>* to_values, const Finish<T>& to_q,
                                 const Finish<T>& to_k) {
            with_operator(carver, call, plan, logsumexp, true, [&](const auto& op, Carver& scratch) {
                T* const of_product = op.take_product_gradient(scratch);
                most = std::max(most, scratch.used());
                if (works) op.product_gradient(of_product, g, made, values, to_values, to_q, to_k);
            });
        };
        const auto onto_caller = [](const TensorView<T>& view, bool adds) {
            Finish<T> finish;
            set_target(finish, view);
            finish.accumulate = adds;
            return finish;
        };
        const auto to_tokens = [&](const TensorView<T>& view, T* of_heads, index_t columns, bool adds) {
            return group > 1 ? packed_finish(of_heads, pass.tokens, columns, heads, adds) : onto_caller(view, adds);
        };
        const auto add_heads = [&](const T* of_heads, index_t columns, const TensorView<T>& to) {
            finish_heads(pass.token_rows(of_heads, columns), group, to, Lengths{nullptr, pass.tokens}, Finish<T>{}, stream);
        };

        const Finish<T> finish_values = pass.to_marks(d_values, value_columns), finish_v = to_tokens(d_v, v_of_heads, value_columns, false);
        const Rows<T> a = pass.mark_rows(pass.inverse.matrices(), mark_columns), inverse = pass.mark_rows(pass.inverse.result(), mark_columns);
        const Rows<T> summary = pass.mark_rows(pass.summary, value_columns), values = pass.mark_rows(pass.values, value_columns), d_value_rows = pass.mark_rows(d_values, value_columns);
        go_back(writing_call(pass, q_rows, stream), saved.plans_[2], pass.of_writing, d_rows, pass.token_rows(pass.out, value_columns), values, &finish_values, onto_caller(d_q, false), pass.to_marks(d_key_marks, dim_columns));
        if (works) {
            multiply_items<TransposedFactor::first>(product(pass, inverse, d_value_rows, value_columns, marks, d_summary), items, stream);
            multiply_items<TransposedFactor::second>(product(pass, d_value_rows, summary, marks, value_columns, d_inverse), items, stream);
        }
        go_back(reading_call(pass, k_rows, stream), saved.plans_[1], pass.of_reading, pass.mark_rows(d_summary, value_columns), summary, v_rows, &finish_v, pass.to_marks(d_query_marks, dim_columns),
                to_tokens(d_k, k_of_heads, dim_columns, false));
        {
            Carver scratch = carver;
            T* const of_inverse = pass.inverse.take_scratch(scratch, true);
            most = std::max(most, scratch.used());
            if (works) pass.inverse.backward(d_inverse, d_a, of_inverse, stream);
        }
        go_back(landmarks_call(pass, stream), saved.plans_[0], pass.of_landmarks, pass.mark_rows(d_a, mark_columns), a, pass.identity_rows(), nullptr, pass.to_marks(d_query_marks, dim_columns, true),
                pass.to_marks(d_key_marks, dim_columns, true));
        if (carver.counts()) return most;
        d_table.assign(parameters_.table.size(), 0.);
        if (pass.is_empty()) {  // without query heads there may be keys
            for (const TensorView<T>& view : {d_q, d_k, d_v})
                fill_zeros(view.data, view.size(), stream);
            return most;
        }

        compress_with<true>(pass.means(), CompressArguments<T>{q_rows, pass.mark_rows(d_query_marks, dim_columns), means_call(pass, heads, stream), 0, onto_caller(d_q, true)});
        if (group > 1) {
            finish_heads(pass.mark_rows(d_key_marks, dim_columns), group, tensor_view(d_shared_marks, {pass.batch, pass.key_heads, marks, dim_columns}), Lengths{nullptr, marks}, Finish<T>{}, stream);
            add_heads(k_of_heads, dim_columns, d_k);
        }
        const Rows<T> d_marks = packed_rows(static_cast<const T*>(group > 1 ? d_shared_marks : d_key_marks), pass.key_heads, offset_t{marks} * dim_columns, dim_columns);
        compress_with<true>(pass.means(), CompressArguments<T>{by_key_heads(k_rows, pass), d_marks, means_call(pass, pass.key_heads, stream), 0, onto_caller(d_k, true)});
        if (parameters_.width > 0) compress_with<true>(convolution, CompressArguments<T>{v_rows, d_rows, convolution_call(pass, stream), 0, to_tokens(d_v, v_of_heads, value_columns, true)});
        if (group > 1) add_heads(v_of_heads, value_columns, d_v);
        if (entries > 0) {
            const TableGradientArguments<T> arguments{v_rows, d_rows, convolution_call(pass, stream), parameters_.width, items, table_sums, true};
            launch("table_gradient", table_gradient<T, ConvolutionPairs>, dim3(static_cast<unsigned>(entries)), table_threads, 0, stream, arguments, ConvolutionPairs{1, parameters_.width / 2});
            std::vector<double> sums(static_cast<std::size_t>(entries));
            check_cuda(cudaMemcpyAsync(sums.data(), table_sums, sums.size() * sizeof(double), cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync of a table's gradient");
            check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
            for (std::size_t at = 0; at < sums.size(); ++at) d_table[at % d_table.size()] += sums[at];
        }
        return most;
    }

    Nystrom parameters_;
    Attention<Cuda> landmarks_, reading_, writing_;
};

POLYATTN_END_NAMESPACE
