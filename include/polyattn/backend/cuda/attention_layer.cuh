#pragma once
// Attention<..., Cuda>: the stages in order, as launches on the caller's stream. A recursion asks an operator for A Z, A^T G and the gradient of A;
// the operators are softmax_operator.cuh and kernel_attention.cuh; step() is recurrent_step.cuh.

#include <polyattn/backend/cuda/calls.cuh>
#include <polyattn/backend/cuda/groups.cuh>
#include <polyattn/backend/cuda/recurrent_step.cuh>
#include <polyattn/backend/cuda/softmax_operator.cuh>
#include <polyattn/layer_policies.hpp>

#include <limits>

POLYATTN_BEGIN_NAMESPACE

namespace nn {

template <class T, class Attention>
class CudaAdaptiveMultiResolution;  // multi_resolution.cuh

}  // namespace nn

template <class Pattern, class Sampler, class Diffusion, class Score, class Bias>
class AttentionLayer<Pattern, Sampler, Diffusion, Score, Bias, Cuda> : public detail::LayerPolicies<Pattern, Sampler, Diffusion, Score, Bias> {
    using Base = detail::LayerPolicies<Pattern, Sampler, Diffusion, Score, Bias>;
    using typename Base::Plans;
    using Base::bias_, Base::check_shapes, Base::kernel, Base::recursion_, Base::score_;
    static constexpr bool groups_tokens = detail::cuda::GroupedOnDevice<Pattern>;
    static_assert(!DataDependentPattern<Pattern> || groups_tokens,
                  "polyattn::Attention: Cuda finds the groups of LocalitySensitiveHashing, RoutedClusters and SinkhornBlocks on the device; plan_for() of your own pattern reads q and k on the host: "
                  "use Simd<>, or Attention<Cuda> with its plans in CudaOptions::item_plans");

public:
    template <class T>
    using SavedOf = CudaSaved<T>;
    using Base::Base;

    /// This layer with another bias of the same type. Shares the plans. Throws invalid_input.
    AttentionLayer with_bias(Bias bias) const {
        detail::validate(bias);
        AttentionLayer other = *this;
        other.bias_ = std::move(bias);
        return other;
    }

    /// out = polynomial in A of V, all in device memory.
    /// Shapes: q [.., heads, queries, d], k [.., key heads, keys, d], v [.., key heads, keys, e] -> [.., heads, queries, e], rank 2 to 4, views with
    /// strides (tensor_view); key heads divide heads. Rows at multiples of 16 bytes are read where they lie, others are copied first.
    /// Values: float, double, __half or __nv_bfloat16 (compute capability 8.0). Of the last two products run on tensor cores, sums, scores and the
    /// softmax in float; weights of tiles and Z after each hop are rounded to the type.
    /// Throws invalid_input for shapes, lengths and memory that is not the device's, cuda_error with the call that failed. The same bits for every
    /// device of one architecture and every schedule. O(pairs (d + K e)) flops; weights of tiles are computed anew for each hop, those of edges
    /// are stored. Source: Diffuser (AAAI 2023), "attention diffusion".
    template <class Q, class K, class V>
    auto operator()(const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        check_shapes<T>(q, k, v);
        CudaTensor<T> out(detail::shape_like(q, {q.tokens(), v.dim()}));
        run<T>(q, k, v, out.view(), options, nullptr, nullptr, false);
        return out;
    }
    /// The same, and log(sum_j exp(score_ij)) of every query, natural log, [.., heads, queries]; -inf for a query without keys.
    template <class Q, class K, class V>
    auto with_logsumexp(const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        static_assert(!kernel, "polyattn: with_logsumexp() is of Softmax; kernel scores have no logarithm");
        using T = common_element<Q, K, V>;
        check_shapes<T>(q, k, v);
        CudaOutputAndLogsumexp<T> result{CudaTensor<T>(detail::shape_like(q, {q.tokens(), v.dim()})), CudaTensor<Number<T>>(detail::shape_like(q, {q.tokens()}))};
        run<T>(q, k, v, result.out.view(), options, result.logsumexp.data(), nullptr, false);
        return result;
    }
    /// The same, written to `out`, which must not overlap the inputs; with CallOptions::accumulate added to it. With a plan and a workspace a repeated
    /// call allocates nothing on the device, and waits for it only where lengths or a table have to be copied there.
    template <class O, class Q, class K, class V>
    void into(const TensorView<O>& out, const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        static_assert(std::is_same_v<O, T>, "polyattn: out must have the inputs' value type");
        run<T>(q, k, v, out, options, nullptr, nullptr, options.accumulate);
    }
    /// Forward pass for training, of float or double.
    template <class Q, class K, class V>
    auto forward(const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        using T = typename trained_elements<common_element<Q, K, V>>::T;
        check_shapes<T>(q, k, v);
        CudaForward<T> result{CudaTensor<T>(detail::shape_like(q, {q.tokens(), v.dim()})), {}};
        train<T>(result.out.view(), result.saved, q, k, v, options, false);
        return result;
    }
    /// The same, written to `out`, or with CallOptions::accumulate added to it, and to a `saved` of an earlier pass, whose memory is used again.
    template <class T, class Q, class K, class V>
    void forward_into(const TensorView<T>& out, CudaSaved<T>& saved, const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        static_assert(std::is_same_v<typename trained_elements<common_element<Q, K, V>>::T, T>, "polyattn: out and saved must have the inputs' value type");
        train<T>(out, saved, q, k, v, options, options.accumulate);
    }

    /// Gradients of q, k, v and a learned bias from d_out = dL/dout. `saved` must come from forward() of this layer or a copy; of `options` the stream
    /// and the workspace are used. Repeatable; deterministic, without atomics on floating point. A learned bias's gradient is brought to the
    /// host, for which the call waits. Throws as operator().
    template <class T, class D>
    CudaGradients<T> backward(const CudaSaved<T>& saved, const TensorView<D>& d_out, const CudaOptions& options = {}) const {
        check_saved(saved);
        CudaGradients<T> gradients = detail::cuda::gradients_like(saved.q_, saved.k_, saved.v_);
        backward_into(gradients, saved, d_out, options);
        return gradients;
    }
    /// The same, written to `gradients`, as backward() returned them before.
    template <class T, class D>
    void backward_into(CudaGradients<T>& gradients, const CudaSaved<T>& saved, const TensorView<D>& d_out, const CudaOptions& options = {}) const {
        static_assert(std::is_same_v<std::remove_const_t<D>, typename trained_elements<T>::T>, "polyattn: d_out must have the inputs' value type");
        const TensorView<const T> d = d_out;
        check_saved(saved);
        detail::cuda::check_gradients(saved.q_, saved.k_, saved.v_, d, gradients);
        const TensorView<T> d_q = gradients.q.view(), d_k = gradients.k.view(), d_v = gradients.v.view();
        CudaOptions call = saved.options_;
        call.stream = options.stream;
        call.device_workspace = options.device_workspace;
        if constexpr (!detail::cuda::is_narrow<T>)
            detail::cuda::with_workspace(call, [&](detail::cuda::Carver carver) { return work_backward(carver, saved, d, d_q, d_k, d_v, gradients.bias, call); });
    }

    /// The state in front of the first token, for step(). Set to zero on the stream, to which directions of random features are copied as well. Throws invalid_input, cuda_error.
    template <class T>
    CudaRecurrentState<T> start(index_t batch, index_t heads, index_t key_heads, index_t dim, index_t value_dim, cudaStream_t stream = nullptr) const {
        static_assert(kernel && detail::is_causal<Pattern>(), "polyattn: start() and step() are of causal kernel scores: Attention<Kernel<Features>, Causal>");
        static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>, "polyattn: kernel scores take tensors of float or double");
        Base::check_recurrent(batch, heads, key_heads, dim, value_dim);
        CudaRecurrentState<T> state;
        state.q_ = {batch, heads, 1, dim};
        state.key_heads_ = key_heads;
        state.value_dim_ = value_dim;
        state.hop_count_ = recursion_.hops.size();
        // Rows that have to be copied.
        const auto rows = [&](index_t of_heads, index_t columns) { return TensorView<const T>{nullptr, {batch, of_heads, 1, columns}, {1, 1, 1, 2}, 4}; };
        if constexpr (detail::has_directions<decltype(detail::bind_features(score_.features, dim))>) {
            const std::vector<T> directions = detail::cuda::directions_by_columns<T>(*this->bind(rows(heads, dim), rows(key_heads, dim)));
            resize(state.directions_, static_cast<offset_t>(directions.size()));
            detail::cuda::check_cuda(cudaMemcpyAsync(state.directions_.data(), directions.data(), directions.size() * sizeof(T), cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync of directions");
        }
        detail::cuda::Carver counter;
        with_step<T>(counter, rows(heads, dim), rows(key_heads, dim), rows(key_heads, value_dim), state.directions_.data(), stream, [&](const auto& step, const auto&) {
            state.of_head_ = step.size();
            resize(state.sums_, offset_t{batch} * heads * step.size());
        });
        state.workspace_.reserve(std::max<std::size_t>(counter.used(), 1));
        detail::cuda::fill_zeros(state.sums_.data(), state.sums_.size(), stream);
        return state;
    }
    /// The next token of every sequence: q [.., heads, 1, d], k [.., key heads, 1, d], v [.., key heads, 1, e] -> [.., heads, 1, e], what the causal layer
    /// gives for the last of all tokens so far, up to rounding. O(f e) a head and hop, for f features, whatever came before. Of `options` the stream is
    /// used. Throws invalid_input, cuda_error. Deterministic. Source: Katharopoulos et al., "Transformers are RNNs" (2020), equations 16 to 20.
    template <class T, class Q, class K, class V>
    CudaTensor<T> step(CudaRecurrentState<T>& state, const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        CudaTensor<T> out(detail::shape_like(q, {1, v.dim()}));
        step_into(out.view(), state, q, k, v, options);
        return out;
    }
    /// The same, written to `out`. Allocates nothing on the device, copies nothing from the host and does not wait.
    template <class T, class Q, class K, class V>
    void step_into(const TensorView<T>& out, CudaRecurrentState<T>& state, const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        static_assert(std::is_same_v<common_element<Q, K, V>, T>, "polyattn: state and out must have the inputs' value type");
        const TensorView<const T> vq = q, vk = k, vv = v;
        check_shapes<T>(vq, vk, vv);
        detail::require_shape(vq, state.q_, vq.rank, "q");
        detail::require_shape(vk, {state.q_[0], state.key_heads_, 1, state.q_[3]}, vk.rank, "k");
        detail::require_shape(vv, {state.q_[0], state.key_heads_, 1, state.value_dim_}, vv.rank, "v");
        detail::require_shape(out, {state.q_[0], state.q_[1], 1, state.value_dim_}, vq.rank, "out");
        detail::cuda::require_device_memory(vq, "q");
        detail::cuda::require_device_memory(vk, "k");
        detail::cuda::require_device_memory(vv, "v");
        detail::cuda::require_device_memory(out, "out");
        detail::cuda::Carver carver(state.workspace_.data());
        with_step<T>(carver, vq, vk, vv, state.directions_.data(), options.stream, [&](const auto& step, const auto& values) {
            detail::require(step.size() == state.of_head_ && recursion_.hops.size() == state.hop_count_, "state", "one that start() of this layer made", "another's");
            step.run(recursion_, values, ++state.tokens_, state.sums_.data(), out);
        });
    }

    /// Bytes of workspace that the same call takes; a pattern that depends on q and k plans for it as the call does. Throws invalid_input.
    template <class Q, class K, class V>
    std::size_t workspace_bytes(const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        const TensorView<const T> vq = q, vk = k, vv = v;
        const Plans plans = check(vq, vk, vv, options);
        std::size_t bytes = work<T>({}, vq, vk, vv, {}, plans, options, static_cast<Number<T>*>(nullptr), nullptr, false);
        if constexpr (groups_tokens)
            if (!plans.drawn.empty()) bytes = std::max(bytes, find_groups({}, vq, vk, vv, options).first);
        return bytes;
    }
    /// Bytes of workspace that backward() takes.
    template <class T>
    std::size_t backward_workspace_bytes(const CudaSaved<T>& saved) const {
        check_saved(saved);
        std::vector<double> none;
        return work_backward({}, saved, detail::cuda::any_d_out(saved.q_, saved.v_), TensorView<T>{}, TensorView<T>{}, TensorView<T>{}, none,
                             saved.options_);
    }

private:
    template <class...>
    friend class CompressedLayer;
    template <class, class>
    friend class nn::CudaAdaptiveMultiResolution;
    template <class Q, class K, class V>
    using common_element = typename detail::cuda::same_elements<kernel, Q, K, V>::T;
    template <class T>
    using trained_elements = detail::cuda::trained_elements<T>;
    /// What scores, weights and sums of tensors of T are made in.
    template <class T>
    using Number = detail::cuda::arithmetic_t<T>;
    using DeviceBias = decltype(detail::cuda::on_device(std::declval<const Bias&>(), index_t{}, index_t{}, std::declval<detail::cuda::BiasMemory>()));

    template <class T>
    static void resize(CudaTensor<T>& tensor, offset_t size) {
        if (tensor.size() != size) tensor = CudaTensor<T>(std::vector<offset_t>{size});
    }
    template <class T>
    void check_shapes(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v) const {
        Base::check_shapes(q, k, v);
    }

    template <class T>
    static constexpr auto kind = kernel ? CudaSaved<T>::Kind::kernel : CudaSaved<T>::Kind::softmax;
    template <class T>
    void check_saved(const CudaSaved<T>& saved) const {
        saved.require(kind<T>, recursion_.hops.size());
        if constexpr (requires { bias_.check_heads(index_t{}); }) bias_.check_heads(saved.q_.heads());
    }

    template <class T>
    void train(const TensorView<T>& out, CudaSaved<T>& saved, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CudaOptions& options, bool accumulate) const {
        Plans plans = check(q, k, v, options);
        detail::cuda::check_memory(q, k, v, out);  // throws before anything is changed
        saved.kind_ = CudaSaved<T>::Kind::none;
        saved.q_ = q;
        saved.k_ = k;
        saved.v_ = v;
        saved.options_ = options;
        if (!plans.drawn.empty()) saved.options_.item_plans = std::move(plans.drawn);
        else if (options.item_plans.empty()) saved.options_.plan = std::move(plans.shared);
        const offset_t lines = offset_t{q.batch()} * q.heads() * q.tokens();
        resize(saved.logsumexp_, lines);
        resize(saved.hops_, lines * static_cast<offset_t>(recursion_.hops.size()) * detail::cuda::padded<T>(v.dim()));
        run<T>(q, k, v, out, saved.options_, nullptr, &saved, accumulate);
        saved.options_.device_workspace = nullptr;
        saved.hop_count_ = recursion_.hops.size();
        saved.kind_ = kind<T>;
    }

    template <class T>
    void run(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const TensorView<T>& out, const CudaOptions& options, Number<T>* logsumexp, CudaSaved<T>* saved,
             bool accumulate) const {
        const Plans plans = check(q, k, v, options);
        detail::cuda::check_memory(q, k, v, out);
        if constexpr (std::is_same_v<T, __nv_bfloat16>) {
            cudaFuncAttributes attributes{};
            detail::cuda::check_cuda(cudaFuncGetAttributes(&attributes, detail::cuda::apply_tiles_half<T, DeviceBias>), "cudaFuncGetAttributes of apply_tiles_half");
            detail::require(attributes.ptxVersion >= 80, "q", "__half or float instead of __nv_bfloat16 on code for a compute capability below 8.0", attributes.ptxVersion);
        }
        detail::cuda::with_workspace(options, [&](detail::cuda::Carver carver) { return work<T>(carver, q, k, v, out, plans, options, logsumexp, saved, accumulate); });
        // Plans of this call alone go with it, and what the device has of them.
        if (!plans.drawn.empty()) detail::cuda::check_cuda(cudaStreamSynchronize(options.stream), "cudaStreamSynchronize");
    }

    template <class T>
    Plans check(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CudaOptions& options) const {
        detail::require(offset_t{q.batch()} * q.heads() <= std::numeric_limits<index_t>::max(), "q", [&] { return detail::text("at most ", std::numeric_limits<index_t>::max(), " batch items times heads"); }, offset_t{q.batch()} * q.heads());
        if constexpr (Base::positioned_bias)
            detail::require(!Base::positions_differ(options, q.tokens(), k.tokens()), "key_lengths", "all queries and keys where a bias by position has other numbers of queries than keys", "less");
        if constexpr (!groups_tokens) return Base::check(q, k, v, options);
        else
            return Base::check(q, k, v, options, [&] {
                detail::cuda::require_device_memory(q, "q");
                detail::cuda::require_device_memory(k, "k");
                std::vector<Plan> plans;
                detail::cuda::with_workspace(options, [&](detail::cuda::Carver carver) {
                    auto [bytes, found] = find_groups(carver, q, k, v, options);
                    plans = std::move(found);
                    return bytes;
                });
                return plans;
            });
    }
    /// The bytes that it takes, and, with a carver that does not only count, plans from q and k. Waits for the stream.
    template <class T>
    std::pair<std::size_t, std::vector<Plan>> find_groups(detail::cuda::Carver carver, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CudaOptions& options) const {
        const auto call = make_call(carver, q, k, v, options);
        auto plans = detail::cuda::plans_on_device(carver, Base::pattern_, call, [&](index_t b) {
            const auto valid = Base::valid_of(options, b, q.tokens(), k.tokens());
            return std::pair{valid.queries, valid.keys};
        });
        return {carver.used(), std::move(plans)};
    }

    template <class T>
    static auto planned_items(const TensorView<const T>& q, const Plans& plans) {
        constexpr int side = detail::cuda::TileShape<T>::side;
        std::vector<detail::cuda::PlannedItems<side>> runs;
        if constexpr (!kernel)  // kernel scores see all keys, or all earlier ones
            for (index_t b = 0; b < q.batch(); ++b)
                for (index_t h = 0; h < q.heads(); ++h) {
                    const auto* plan = &plans.of(q, b, h).template lowered<detail::cuda::DevicePlan<side>>();
                    const index_t item = b * q.heads() + h;
                    if (!runs.empty() && runs.back().plan == plan) runs.back().last = item + 1;
                    else runs.push_back({plan, item, item + 1});
                }
        return runs;
    }

    /// Rows of q and k, and the lengths, on the device.
    template <class T>
    static auto make_call(detail::cuda::Carver& carver, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CudaOptions& options) {
        using namespace detail::cuda;
        OperatorCall<T> call{as_rows(q, q.heads(), carver, options.stream), as_rows(k, q.heads(), carver, options.stream), q.batch(), q.heads(), k.heads(), q.tokens(), k.tokens(), q.dim(), padded<T>(v.dim()), {nullptr, q.tokens()},
                             {nullptr, k.tokens()}, {detail::DropoutMask(options.dropout, options.draw, 0)}, options.stream};
        const auto put = [&](const std::vector<index_t>& lengths, Lengths& to) {
            index_t* const at = carver.template take<index_t>(static_cast<offset_t>(lengths.size()));
            if (carver.counts()) return;
            check_cuda(cudaMemcpyAsync(at, lengths.data(), lengths.size() * sizeof(index_t), cudaMemcpyHostToDevice, options.stream), "cudaMemcpyAsync of lengths");
            to.of_batch = at;
        };
        if (!options.key_lengths.empty()) put(options.key_lengths, call.key_lengths);
        if (!options.query_lengths.empty()) put(options.query_lengths, call.query_lengths);
        else if (q.tokens() == k.tokens()) call.query_lengths = call.key_lengths;
        return call;
    }
    /// f(operator): that of the layer's scores. `logsumexp` [items][queries], of softmax.
    template <class T, class Runs, class F>
    void with_operator(detail::cuda::Carver& carver, const detail::cuda::OperatorCall<T>& call, const TensorView<const T>& q, const TensorView<const T>& k, const Runs& runs, Number<T>* logsumexp, bool backward, F&& f) const {
        using namespace detail::cuda;
        if constexpr (kernel) {
            const detail::ZeroRow zero = detail::zero_row(score_, !std::is_same_v<Diffusion, NoDiffusion>);
            const auto features = this->bind(q, k);
            f(KernelAttention<T, std::remove_const_t<decltype(features)>>(carver, call, features, zero, detail::epsilon_of(score_, zero), detail::is_causal<Pattern>()));
        } else f(SoftmaxOperator<T, DeviceBias>(carver, call, runs, score_.factor(q.dim()), on_device(bias_, q.tokens(), k.tokens(), {&carver, call.stream}), logsumexp, backward));
    }

    /// f(one token's step, rows of v). `directions` are those of the state.
    template <class T, class F>
    void with_step(detail::cuda::Carver& carver, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const T* directions, cudaStream_t stream, F&& f) const {
        using namespace detail::cuda;
        CudaOptions options;
        options.stream = stream;
        const OperatorCall<T> call = make_call(carver, q, k, v, options);
        const Rows<T> values = as_rows(v, q.heads(), carver, stream);
        const detail::ZeroRow zero = detail::zero_row(score_, !std::is_same_v<Diffusion, NoDiffusion>);
        const auto features = this->bind(q, k);
        f(RecurrentStep<T, std::remove_const_t<decltype(features)>>(carver, call, v.dim(), features, directions, zero, detail::epsilon_of(score_, zero), recursion_.hops.size()), values);
    }

    /// Z_0 = start V enters only through the first hop, which takes the factor.
    double walk_of(std::size_t hop) const { return hop == 0 ? recursion_.hops[0].walk * recursion_.start : recursion_.hops[hop].walk; }

    /// out = start * sum over the heads of a group: what is left without hops.
    template <class T>
    void finish_without_hops(const detail::cuda::Rows<T>& from, index_t group, const TensorView<T>& out, bool accumulate, detail::cuda::Lengths lengths, cudaStream_t stream) const {
        detail::cuda::Finish<T> finish;
        finish.factor = static_cast<decltype(finish.factor)>(recursion_.start);
        finish.accumulate = accumulate;
        detail::cuda::finish_heads(from, group, out, lengths, finish, stream);
    }

    /// The forward pass, or, with a carver that counts, only the bytes that it takes.
    template <class T>
    std::size_t work(detail::cuda::Carver carver, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const TensorView<T>& out, const Plans& plans, const CudaOptions& options,
                     Number<T>* logsumexp, CudaSaved<T>* saved, bool accumulate) const {
        using namespace detail::cuda;
        const auto runs = planned_items<T>(q, plans);
        const OperatorCall<T> call = make_call(carver, q, k, v, options);
        const Rows<T> values = as_rows(v, q.heads(), carver, options.stream);
        const std::size_t hops = recursion_.hops.size();
        const offset_t lines = offset_t{call.items()} * call.queries, of_item = offset_t{call.queries} * call.columns;
        Number<T>* const sums = saved ? saved->logsumexp_.data() : carver.template take<Number<T>>(lines);
        // Z_k of the hops but the last, two by turns; or all of them for backward.
        T* const between = carver.template take<T>(saved || hops < 2 ? 0 : lines * call.columns * (hops > 2 ? 2 : 1));
        with_operator(carver, call, q, k, runs, sums, false, [&](const auto& op) {
            if (carver.counts() || lines == 0 || (out.size() == 0 && !logsumexp && !saved)) return;
            const auto hop_rows = [&](std::size_t hop) {  // Z_hop
                if (hop == 0) return values;
                if (saved) return packed_rows<T>(saved->hops_.data() + static_cast<offset_t>(hop - 1) * of_item, q.heads(), static_cast<offset_t>(hops) * of_item, call.columns);
                return packed_rows<T>(between + static_cast<offset_t>((hop - 1) % 2) * lines * call.columns, q.heads(), of_item, call.columns);
            };
            if (hops == 0) finish_without_hops(values, 1, out, accumulate, call.query_lengths, options.stream);
            if (hops == 0 && !logsumexp && !saved) return;
            op.prepare();
            // Without hops the weights still exist, for the logsumexp.
            for (std::size_t hop = 0; hop < std::max<std::size_t>(hops, 1); ++hop) {
                Finish<T> finish;
                set_target(finish, out);
                if (hop + 1 < hops || hops == 0) finish.out = nullptr;
                if (hops > 0) {
                    finish.factor = static_cast<Number<T>>(walk_of(hop));
                    finish.teleport = static_cast<Number<T>>(recursion_.hops[hop].teleport);
                    finish.values = values;
                    finish.accumulate = accumulate;
                    finish.dropout = call.dropout;
                    finish.hop = static_cast<int>(hop);
                    if (saved || hop + 1 < hops) {
                        const Rows<T> to = hop_rows(hop + 1);
                        finish.packed = const_cast<T*>(to.data);
                        finish.packed_stride = to.head_stride;
                    }
                }
                op.apply(hop == 0, hop_rows(hop), finish);
            }
            if (logsumexp) launch("natural_logarithms", natural_logarithms<Number<T>>, dim3(blocks_for(lines, 256)), 256, 0, options.stream, static_cast<const Number<T>*>(sums), logsumexp, lines);
        });
        return carver.used();
    }

    /// The backward pass, or only the bytes that it takes. With G_K = d_out and H_k = walk_k dropout(G_k): G_{k-1} = A^T H_k, dV = G_0 + sum_k teleport_k
    /// dropout(G_k), dA = sum_k H_k Z_{k-1}^T.
    template <class T>
    std::size_t work_backward(detail::cuda::Carver carver, const CudaSaved<T>& saved, const TensorView<const T>& d_out, const TensorView<T>& d_q, const TensorView<T>& d_k, const TensorView<T>& d_v,
                              std::vector<double>& d_bias, const CudaOptions& options) const {
        using namespace detail::cuda;
        const auto stream = options.stream;
        const TensorView<const T> q = saved.q_, k = saved.k_, v = saved.v_;
        Plans plans;
        if (options.item_plans.empty()) plans.shared = options.plan;
        else plans.items = options.item_plans;
        const auto runs = planned_items<T>(q, plans);
        const OperatorCall<T> call = make_call(carver, q, k, v, options);
        const Rows<T> values = as_rows(v, q.heads(), carver, stream), d = as_rows(d_out, q.heads(), carver, stream);
        const index_t items = call.items(), queries = call.queries, keys = call.keys, columns = call.columns, hops = static_cast<index_t>(recursion_.hops.size());
        const offset_t of_item = offset_t{queries} * columns, of_keys = offset_t{keys} * columns;
        bool teleports = false;
        for (const Hop& hop : recursion_.hops) teleports |= hop.teleport != 0;
        T* const h = carver.template take<T>(items * of_item * hops);
        T* const g = carver.template take<T>(hops > 1 ? items * of_keys : 0);
        T* const row_sums = carver.template take<T>(offset_t{items} * queries);
        T* const teleported = carver.template take<T>(teleports ? items * of_item : 0);
        T* const of_heads = carver.template take<T>(call.group() > 1 ? offset_t{items} * keys * std::max(columns, padded<T>(q.dim())) : 0);
        offset_t entries = 0;
        if constexpr (LearnedDeviceBias<DeviceBias>) entries = static_cast<offset_t>(detail::bind_bias(bias_, queries, keys).gradient_size());
        auto* const bias_sums = carver.template take<unsigned long long>(entries);
        auto* const bias_bounds = carver.template take<double>(entries > 0 ? 2 * hops + 1 : 0);
        with_operator(carver, call, q, k, runs, const_cast<T*>(saved.logsumexp_.data()), true, [&](const auto& op) {
            const auto scratch = op.take_gradient(carver);
            if (carver.counts()) return;
            d_bias.assign(static_cast<std::size_t>(entries), 0.);
            if (items == 0 || queries == 0 || hops == 0) {
                for (const TensorView<T>& view : {d_q, d_k, d_v}) fill_zeros(view.data, view.size(), stream);
                if (hops == 0 && d_v.size() > 0) finish_without_hops(d, call.group(), d_v, false, call.query_lengths, stream);
                return;
            }
            // Gradients of keys go straight to the caller's tensor, or, where query heads share them, through rows of their own.
            const auto target = [&](const TensorView<T>& view) {
                Finish<T> finish;
                set_target(finish, view);
                if (call.group() > 1) {
                    finish.packed = of_heads;
                    finish.packed_stride = offset_t{keys} * finish.packed_columns;
                    finish.out = nullptr;
                    finish.heads = q.heads();
                }
                return finish;
            };
            const auto add_heads = [&](const TensorView<T>& view) {
                if (call.group() > 1) finish_heads(packed_rows<T>(of_heads, q.heads(), offset_t{keys} * padded<T>(view.dim()), padded<T>(view.dim())), call.group(), view, Lengths{nullptr, keys}, Finish<T>{}, stream);
            };

            op.prepare_backward();
            const auto hop_rows = [&](const T* base, index_t hop) { return packed_rows<T>(base + hop * of_item, q.heads(), hops * of_item, columns); };
            for (index_t hop = hops; hop-- > 0;) {
                const Hop& step = recursion_.hops[static_cast<std::size_t>(hop)];
                HopGradientArguments<T> arguments{};
                if (hop == hops - 1) arguments.g = d;
                else arguments.g = packed_rows<T>(g, q.heads(), of_keys, columns);
                arguments.z = hop_rows(saved.hops_.data(), hop);
                arguments.v = values;
                arguments.walk = static_cast<T>(walk_of(static_cast<std::size_t>(hop)));
                arguments.teleport = static_cast<T>(step.teleport);
                arguments.dropout = call.dropout;
                arguments.hop = static_cast<int>(hop);
                arguments.queries = queries;
                arguments.columns = columns;
                arguments.heads = q.heads();
                arguments.query_lengths = call.query_lengths;
                arguments.logsumexp = op.marks();
                arguments.h = h + hop * of_item;
                arguments.h_stride = hops * of_item;
                arguments.row_sums = row_sums;
                arguments.d_v = teleports ? teleported : nullptr;
                arguments.first = hop == hops - 1;
                apply_hop_gradient(arguments, items, stream);
                Finish<T> finish;
                if (hop > 0) {
                    finish.packed = g;
                    finish.packed_stride = of_keys;
                    finish.packed_columns = columns;
                    finish.heads = q.heads();
                    finish.columns = v.dim();
                } else {
                    finish = target(d_v);
                    if (teleports) {
                        finish.teleport = 1;
                        finish.values = packed_rows<T>(teleported, q.heads(), of_item, columns);
                    }
                }
                op.apply_transposed(hop_rows(h, hop), finish);
            }
            add_heads(d_v);

            const Hops<T> all{static_cast<int>(hops), h, saved.hops_.data(), values, queries, columns, row_sums};
            [[maybe_unused]] BiasSums sums;
            if constexpr (LearnedDeviceBias<DeviceBias>) {
                begin_bias_sums(all, call, call.dropout.drops_weights() ? 1 / (1 - options.dropout.weights) : 1, bias_sums, entries, bias_bounds);
                sums = {bias_sums, bias_bounds + 2 * hops};
            }
            Finish<T> finish_q;
            set_target(finish_q, d_q);
            if constexpr (kernel) op.gradient(scratch, all, finish_q, d_k);
            else {
                op.gradient(all, finish_q, target(d_k), sums);
                add_heads(d_k);
            }
            if constexpr (LearnedDeviceBias<DeviceBias>) end_bias_sums(d_bias, bias_sums, bias_bounds + 2 * hops, stream);
        });
        return carver.used();
    }
};

POLYATTN_END_NAMESPACE
