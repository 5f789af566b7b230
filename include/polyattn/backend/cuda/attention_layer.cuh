#pragma once
// Attention<..., Cuda> with softmax scores: the stages in order, as launches on the caller's stream.

#include <polyattn/backend/cuda/rows.cuh>
#include <polyattn/backend/cuda/sparse_softmax_gradient.cuh>
#include <polyattn/backend/cuda/tensor.cuh>
#include <polyattn/layer_policies.hpp>

POLYATTN_BEGIN_NAMESPACE

/// What one call on the device may set beside CallOptions; its `workspace` and `weight_budget` are of the CPU and do nothing here.
struct CudaOptions : CallOptions {
    /// All work of the call is put here; the call returns before it is done.
    cudaStream_t stream = nullptr;
    /// Scratch memory to reuse; without one each call allocates its own and waits for the stream.
    CudaWorkspace* device_workspace = nullptr;
};

/// What backward needs of a forward pass. Borrows q, k and v: their memory must stay as it is until the last backward().
template <class T>
class CudaSaved {
public:
    TensorView<const T> q() const { return q_; }
    TensorView<const T> k() const { return k_; }
    TensorView<const T> v() const { return v_; }
    /// The plan of a batch item's head.
    const Plan& plan(index_t b = 0, index_t h = 0) const { return options_.item_plans.empty() ? *options_.plan : detail::plan_of(options_.item_plans, q_, b, h); }

private:
    template <class...>
    friend class AttentionLayer;

    TensorView<const T> q_, k_, v_;
    CudaOptions options_;             // with the plans
    CudaTensor<T> logsumexp_, hops_;  // of the operator, [items][queries]; Z_1 .. Z_K, [items][K][queries][padded columns]
    std::size_t hop_count_ = 0;
};

/// Gradients with the shapes of q, k and v, and of a learned bias's table (empty if there is none).
template <class T>
struct CudaGradients {
    CudaTensor<T> q, k, v;
    std::vector<double> bias = {};
};

template <class T>
struct CudaForward {
    CudaTensor<T> out;
    CudaSaved<T> saved;
};
template <class T>
struct CudaOutputAndLogsumexp {
    CudaTensor<T> out, logsumexp;
};

namespace detail::cuda {

/// Runs a kernel with dynamic shared memory on a grid.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared, cudaStream_t stream, const Arguments&... arguments) {
    if (shared > 48 * 1024) check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
    kernel<<<grid, static_cast<unsigned>(threads), shared, stream>>>(arguments...);
    check_launch(name);
}

/// One plan and the (batch, head) pairs that it is for.
template <int side>
struct PlannedItems {
    const DevicePlan<side>* plan;
    index_t first, last;
};

}  // namespace detail::cuda

template <class Pattern, class Sampler, class Diffusion, class Bias>
class AttentionLayer<Pattern, Sampler, Diffusion, Softmax, Bias, Cuda> : public detail::LayerPolicies<Pattern, Sampler, Diffusion, Softmax, Bias> {
    using Base = detail::LayerPolicies<Pattern, Sampler, Diffusion, Softmax, Bias>;
    using typename Base::Plans;
    using Base::bias_, Base::check_shapes, Base::recursion_, Base::require_shape, Base::score_, Base::valid_of;
    static_assert(!DataDependentPattern<Pattern>, "polyattn::Attention: a pattern that depends on q and k is planned on the CPU; give Cuda its plans in CudaOptions::item_plans");

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
    /// Throws invalid_input for shapes, lengths and memory that is not the device's, cuda_error with the call that failed. The same bits for every
    /// device of one architecture and every schedule. O(pairs (d + K e)) flops; weights of tiles are computed anew for each hop, those of edges
    /// are stored. Source: Diffuser (AAAI 2023), "attention diffusion".
    template <class Q, class K, class V>
    auto operator()(const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        check_shapes<T>(q, k, v);
        CudaTensor<T> out(shape_like(q, {q.tokens(), v.dim()}));
        run<T>(q, k, v, out.view(), options, nullptr, nullptr, false);
        return out;
    }
    /// The same, and log(sum_j exp(score_ij)) of every query, natural log, [.., heads, queries]; -inf for a query without keys.
    template <class Q, class K, class V>
    auto with_logsumexp(const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        check_shapes<T>(q, k, v);
        CudaOutputAndLogsumexp<T> result{CudaTensor<T>(shape_like(q, {q.tokens(), v.dim()})), CudaTensor<T>(shape_like(q, {q.tokens()}))};
        run<T>(q, k, v, result.out.view(), options, result.logsumexp.data(), nullptr, false);
        return result;
    }
    /// The same, written to `out`, which must not overlap the inputs; with CallOptions::accumulate added to it. With a plan and a workspace a repeated
    /// call allocates nothing and does not wait for the device.
    template <class O, class Q, class K, class V>
    void into(const TensorView<O>& out, const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        static_assert(std::is_same_v<O, T>, "polyattn: out must have the inputs' value type");
        run<T>(q, k, v, out, options, nullptr, nullptr, options.accumulate);
    }
    /// Forward pass for training.
    template <class Q, class K, class V>
    auto forward(const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        check_shapes<T>(q, k, v);
        CudaForward<T> result{CudaTensor<T>(shape_like(q, {q.tokens(), v.dim()})), {}};
        forward_into(result.out.view(), result.saved, q, k, v, options);
        return result;
    }
    /// The same, written to `out` and to a `saved` of an earlier pass, whose memory is used again.
    template <class T, class Q, class K, class V>
    void forward_into(const TensorView<T>& out, CudaSaved<T>& saved, const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        static_assert(std::is_same_v<common_element<Q, K, V>, T>, "polyattn: out and saved must have the inputs' value type");
        saved.q_ = q;
        saved.k_ = k;
        saved.v_ = v;
        Plans plans = Base::check(saved.q_, saved.k_, saved.v_, options);
        saved.options_ = options;
        if (!plans.drawn.empty()) saved.options_.item_plans = std::move(plans.drawn);
        else if (options.item_plans.empty()) saved.options_.plan = std::move(plans.shared);
        const offset_t lines = offset_t{q.batch()} * q.heads() * q.tokens();
        saved.hop_count_ = recursion_.hops.size();
        resize(saved.logsumexp_, lines);
        resize(saved.hops_, lines * static_cast<offset_t>(saved.hop_count_) * detail::cuda::padded<T>(v.dim()));
        run<T>(q, k, v, out, saved.options_, nullptr, &saved, options.accumulate);
        saved.options_.device_workspace = nullptr;
    }

    /// Gradients of q, k, v and a learned bias from d_out = dL/dout. `saved` must come from forward() of this layer or a copy; of `options` the stream
    /// and the workspace are used. Repeatable; deterministic, without atomics on floating point. A learned bias's gradient is brought to the
    /// host, for which the call waits. Throws as operator().
    template <class T, class D>
    CudaGradients<T> backward(const CudaSaved<T>& saved, const TensorView<D>& d_out, const CudaOptions& options = {}) const {
        const auto like = [](const TensorView<const T>& view) { return CudaTensor<T>(shape_like(view, {view.tokens(), view.dim()})); };
        CudaGradients<T> gradients{like(saved.q_), like(saved.k_), like(saved.v_)};
        backward_into(gradients, saved, d_out, options);
        return gradients;
    }
    /// The same, written to `gradients`, as backward() returned them before.
    template <class T, class D>
    void backward_into(CudaGradients<T>& gradients, const CudaSaved<T>& saved, const TensorView<D>& d_out, const CudaOptions& options = {}) const {
        static_assert(std::is_same_v<std::remove_const_t<D>, T>, "polyattn: d_out must have the inputs' value type");
        const TensorView<const T> d = d_out;
        require_shape(d, {saved.q_.extents[0], saved.q_.extents[1], saved.q_.extents[2], saved.v_.extents[3]}, saved.q_.rank, "d_out");
        detail::cuda::require_device_memory(d, "d_out");
        detail::require(saved.hop_count_ == recursion_.hops.size(), "saved", [&] { return detail::text("a forward pass of this layer, with ", recursion_.hops.size(), " hops"); }, saved.hop_count_);
        const TensorView<T> d_q = gradients.q.view(), d_k = gradients.k.view(), d_v = gradients.v.view();
        require_shape(d_q, saved.q_.extents, saved.q_.rank, "gradients.q");
        require_shape(d_k, saved.k_.extents, saved.k_.rank, "gradients.k");
        require_shape(d_v, saved.v_.extents, saved.v_.rank, "gradients.v");
        CudaOptions call = saved.options_;
        call.stream = options.stream;
        call.device_workspace = options.device_workspace;
        with_workspace(call, [&](detail::cuda::Carver carver) { return work_backward(carver, saved, d, d_q, d_k, d_v, gradients.bias, call); });
    }

    /// Bytes of workspace that the same call takes. Throws invalid_input.
    template <class Q, class K, class V>
    std::size_t workspace_bytes(const TensorView<Q>& q, const TensorView<K>& k, const TensorView<V>& v, const CudaOptions& options = {}) const {
        using T = common_element<Q, K, V>;
        const TensorView<const T> vq = q, vk = k, vv = v;
        const Plans plans = Base::check(vq, vk, vv, options);
        return work<T>({}, vq, vk, vv, {}, plans, options, nullptr, nullptr, false);
    }
    /// Bytes of workspace that backward() takes.
    template <class T>
    std::size_t backward_workspace_bytes(const CudaSaved<T>& saved) const {
        std::vector<double> none;
        return work_backward({}, saved, TensorView<const T>{nullptr, {saved.q_.batch(), saved.q_.heads(), saved.q_.tokens(), saved.v_.dim()}, {1, 1, 1, 2}, 4}, TensorView<T>{}, TensorView<T>{}, TensorView<T>{}, none,
                             saved.options_);
    }

private:
    template <class Q, class K, class V>
    struct same_elements {
        using T = std::remove_const_t<Q>;
        static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>, "polyattn: tensors of float or double are wanted");
        static_assert(std::is_same_v<T, std::remove_const_t<K>> && std::is_same_v<T, std::remove_const_t<V>>, "polyattn: q, k and v must have one value type");
    };
    template <class Q, class K, class V>
    using common_element = typename same_elements<Q, K, V>::T;
    template <class T>
    static constexpr int side = detail::cuda::TileShape<T>::side;
    template <class T>
    static constexpr std::size_t tile_memory = 3 * detail::cuda::TileShape<T>::buffer * sizeof(T);
    using DeviceBias = decltype(detail::cuda::on_device(std::declval<const Bias&>(), index_t{}, index_t{}, std::declval<detail::cuda::BiasMemory>()));

    template <class T>
    static std::vector<offset_t> shape_like(const TensorView<T>& view, std::initializer_list<offset_t> last) {
        std::vector<offset_t> shape(view.extents.begin() + (4 - view.rank), view.extents.begin() + 2);
        shape.insert(shape.end(), last);
        return shape;
    }
    template <class T>
    static void resize(CudaTensor<T>& tensor, offset_t size) {
        if (tensor.size() != size) tensor = CudaTensor<T>(std::vector<offset_t>{size});
    }
    template <class T>
    void check_shapes(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v) const {
        Base::check_shapes(q, k, v);
    }

    /// f(carver) once to count and once to work, in the call's workspace or in one of its own.
    template <class F>
    static void with_workspace(const CudaOptions& options, F&& f) {
        CudaWorkspace own;
        CudaWorkspace& workspace = options.device_workspace ? *options.device_workspace : own;
        workspace.reserve(std::max<std::size_t>(f(detail::cuda::Carver()), 1));
        f(detail::cuda::Carver(workspace.data()));
        if (!options.device_workspace) detail::cuda::check_cuda(cudaStreamSynchronize(options.stream), "cudaStreamSynchronize");
    }

    template <class T>
    void run(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const TensorView<T>& out, const CudaOptions& options, T* logsumexp, CudaSaved<T>* saved,
             bool accumulate) const {
        const Plans plans = Base::check(q, k, v, options);
        require_shape(out, {q.extents[0], q.extents[1], q.extents[2], v.extents[3]}, q.rank, "out");
        detail::require(detail::cuda::padded<T>(q.dim()) * sizeof(T) * detail::cuda::edge_warps <= 48 * 1024, "q", "a head dimension up to 3072 (float) or 1536 (double)", q.dim());
        detail::cuda::require_device_memory(q, "q");
        detail::cuda::require_device_memory(k, "k");
        detail::cuda::require_device_memory(v, "v");
        detail::cuda::require_device_memory(out, "out");
        with_workspace(options, [&](detail::cuda::Carver carver) { return work<T>(carver, q, k, v, out, plans, options, logsumexp, saved, accumulate); });
    }

    template <class T>
    static std::vector<detail::cuda::PlannedItems<side<T>>> planned_items(const TensorView<const T>& q, const Plans& plans) {
        std::vector<detail::cuda::PlannedItems<side<T>>> runs;
        for (index_t b = 0; b < q.batch(); ++b)
            for (index_t h = 0; h < q.heads(); ++h) {
                const auto* plan = &plans.of(q, b, h).template lowered<detail::cuda::DevicePlan<side<T>>>();
                const index_t item = b * q.heads() + h;
                if (!runs.empty() && runs.back().plan == plan) runs.back().last = item + 1;
                else runs.push_back({plan, item, item + 1});
            }
        return runs;
    }

    /// What forward and backward share: the operator, with everything that it needs on the device.
    template <class T>
    auto make_operator(detail::cuda::Carver& carver, const TensorView<const T>& q, const TensorView<const T>& k, const CudaOptions& options) const {
        detail::cuda::Operator<T, DeviceBias> op{detail::cuda::as_rows(q, q.heads(), carver, options.stream),
                                                 detail::cuda::as_rows(k, q.heads(), carver, options.stream),
                                                 detail::cuda::padded<T>(q.dim()),
                                                 static_cast<T>(score_.factor(q.dim()) * 1.4426950408889634074),
                                                 detail::cuda::on_device(bias_, q.tokens(), k.tokens(), {&carver, options.stream}),
                                                 detail::DropoutMask(options.dropout, options.draw, 0),
                                                 {nullptr, q.tokens()},
                                                 {nullptr, k.tokens()},
                                                 q.tokens(),
                                                 k.tokens(),
                                                 0,
                                                 nullptr};
        const auto put = [&](const std::vector<index_t>& lengths, detail::cuda::Lengths& to) {
            index_t* const at = carver.template take<index_t>(static_cast<offset_t>(lengths.size()));
            if (carver.counts()) return;
            detail::cuda::check_cuda(cudaMemcpyAsync(at, lengths.data(), lengths.size() * sizeof(index_t), cudaMemcpyHostToDevice, options.stream), "cudaMemcpyAsync of lengths");
            to.of_batch = at;
        };
        if (!options.key_lengths.empty()) put(options.key_lengths, op.key_lengths);
        if (!options.query_lengths.empty()) put(options.query_lengths, op.query_lengths);
        else if (q.tokens() == k.tokens()) op.query_lengths = op.key_lengths;
        return op;
    }

    /// Z_0 = start V enters only through the first hop, which takes the factor.
    double walk_of(std::size_t hop) const { return hop == 0 ? recursion_.hops[0].walk * recursion_.start : recursion_.hops[hop].walk; }

    template <class T>
    static detail::cuda::EdgeArguments<T> edge_arguments(const detail::cuda::Operator<T, DeviceBias>& op, const detail::cuda::DevicePlan<side<T>>& plan, bool transposed, T* weights, offset_t stride) {
        return {.edges = plan.edges(transposed),
                .edge_count = stride,
                .weights = weights,
                .masks = true,
                .transposed = transposed,
                .dropout = op.dropout,
                .own_lengths = transposed ? op.key_lengths : op.query_lengths,
                .other_lengths = transposed ? op.query_lengths : op.key_lengths,
                .own = transposed ? op.keys : op.queries,
                .heads = op.q.heads,
                .first_item = 0,
                .values = {},
                .value_columns = 0,
                .online = false,
                .highest = nullptr,
                .sum = nullptr,
                .logsumexp = nullptr,
                .partial = nullptr,
                .finish = {}};
    }
    template <class T>
    static void launch_apply_edges(detail::cuda::EdgeArguments<T> arguments, index_t first, index_t last, cudaStream_t stream) {
        using namespace detail::cuda;
        for_each_grid(first, last, [&](index_t item, unsigned items) {
            arguments.first_item = item;
            launch("apply_edges", apply_edges<T>, dim3(blocks_for(arguments.own, edge_warps), items), edge_threads, 0, stream, arguments);
        });
    }
    template <class T>
    static void launch_score_edges(detail::cuda::ScoreArguments<T, DeviceBias> arguments, index_t first, index_t last, cudaStream_t stream) {
        using namespace detail::cuda;
        for_each_grid(first, last, [&](index_t item, unsigned items) {
            arguments.op.first_item = item;
            launch("score_edges", score_edges<T, DeviceBias>, dim3(blocks_for(arguments.op.queries, edge_warps), items), edge_threads, static_cast<std::size_t>(edge_warps * arguments.op.dim) * sizeof(T), stream, arguments);
        });
    }
    /// One hop, or one transposed hop, over the tiles.
    template <bool Transposed, class T>
    static void launch_apply_tiles(detail::cuda::TileArguments<T, DeviceBias> arguments, const detail::cuda::DevicePlan<side<T>>& plan, index_t first, index_t last, cudaStream_t stream) {
        using namespace detail::cuda;
        const Direction& direction = Transposed ? plan.columns() : plan.rows();
        const unsigned panels = std::max(1u, blocks_for(arguments.value_columns, TileShape<T>::width));
        const bool one_by_one = arguments.partial && arguments.online && panels > 1;  // each panel needs the row's state as it was
        for (const auto& [begin, end] : direction.waves)
            for (unsigned panel = 0; panel < (one_by_one ? panels : 1); ++panel)
                for_each_grid(first, last, [&](index_t item, unsigned items) {
                    arguments.op.first_item = item;
                    arguments.first_group = begin;
                    arguments.first_panel = static_cast<index_t>(panel);
                    arguments.stores_state = !one_by_one || panel + 1 == panels;
                    launch(Transposed ? "apply_tiles, transposed" : "apply_tiles", apply_tiles<T, DeviceBias, Transposed>, dim3(static_cast<unsigned>(end - begin), items, one_by_one ? 1 : panels), tile_threads,
                           tile_memory<T>, stream, arguments);
                });
    }
    template <bool Transposed, class T>
    static void launch_gradient_tiles(detail::cuda::TileGradientArguments<T, DeviceBias> arguments, const detail::cuda::DevicePlan<side<T>>& plan, index_t first, index_t last, cudaStream_t stream) {
        using namespace detail::cuda;
        const Direction& direction = Transposed ? plan.columns() : plan.rows();
        for (const auto& [begin, end] : direction.waves)
            for_each_grid(first, last, [&](index_t item, unsigned items) {
                arguments.op.first_item = item;
                arguments.first_group = begin;
                launch(Transposed ? "gradient_tiles, transposed" : "gradient_tiles", gradient_tiles<T, DeviceBias, Transposed>,
                       dim3(static_cast<unsigned>(end - begin), items, blocks_for(arguments.op.dim, TileShape<T>::width)), tile_threads, tile_memory<T>, stream, arguments);
            });
    }
    /// dL/dq, or (transposed) dL/dk, from the tiles and from dL/dscore of the edges.
    template <bool Transposed, class T>
    static void gradient_of_rows(const detail::cuda::TileGradientArguments<T, DeviceBias>& given, const std::vector<detail::cuda::PlannedItems<side<T>>>& runs, T* d_scores, offset_t edges, cudaStream_t stream) {
        using namespace detail::cuda;
        const index_t tokens = Transposed ? given.op.keys : given.op.queries;
        if (tokens == 0) return;
        for (const auto& run : runs) {
            const bool by_edges = run.plan->finished_by_edges(Transposed);
            const Direction& direction = Transposed ? run.plan->columns() : run.plan->rows();
            TileGradientArguments<T, DeviceBias> arguments = given;
            arguments.plan = run.plan->view(Transposed);
            arguments.continues = !direction.complete;
            if (!by_edges) arguments.partial = nullptr;
            const bool tiles = begin_partial(direction, given.partial, tokens, given.op.dim, run.first, run.last, stream);
            if (tiles) launch_gradient_tiles<Transposed, T>(arguments, *run.plan, run.first, run.last, stream);
            if (!by_edges) continue;
            auto last = edge_arguments<T>(given.op, *run.plan, Transposed, d_scores, edges);
            last.masks = false;
            last.values = Transposed ? given.op.q : given.op.k;
            last.value_columns = given.op.dim;
            last.partial = tiles ? given.partial : nullptr;
            last.finish = given.finish;
            launch_apply_edges(last, run.first, run.last, stream);
        }
    }
    /// Rows that tiles add to wave by wave begin as 0.
    template <class T>
    static bool begin_partial(const detail::cuda::Direction& direction, T* partial, index_t tokens, index_t columns, index_t first, index_t last, cudaStream_t stream) {
        if (direction.waves.empty()) return false;
        const offset_t item = offset_t{tokens} * columns;
        if (!direction.complete) detail::cuda::check_cuda(cudaMemsetAsync(partial + first * item, 0, static_cast<std::size_t>((last - first) * item) * sizeof(T), stream), "cudaMemsetAsync");
        return true;
    }

    /// The forward pass, or, with a carver that counts, only the bytes that it takes.
    template <class T>
    std::size_t work(detail::cuda::Carver carver, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const TensorView<T>& out, const Plans& plans, const CudaOptions& options,
                     T* logsumexp, CudaSaved<T>* saved, bool accumulate) const {
        using namespace detail::cuda;
        const auto stream = options.stream;
        const index_t items = q.batch() * q.heads(), queries = q.tokens(), columns = padded<T>(v.dim());
        const auto runs = planned_items<T>(q, plans);
        offset_t edges = 0;
        bool partials = false;
        for (const auto& run : runs) {
            edges = std::max(edges, run.plan->edge_count());
            partials |= run.plan->finished_by_edges(false);
        }
        auto op = make_operator(carver, q, k, options);
        const Rows<T> values = as_rows(v, q.heads(), carver, stream);
        const std::size_t hops = recursion_.hops.size();
        const offset_t lines = offset_t{items} * queries, of_item = offset_t{queries} * columns;
        op.logsumexp = saved ? saved->logsumexp_.data() : carver.template take<T>(lines);
        T* const highest = carver.template take<T>(partials ? lines : 0);
        T* const sum = carver.template take<T>(partials ? lines : 0);
        T* const partial = carver.template take<T>(partials ? lines * columns : 0);
        T* const weights = carver.template take<T>(items * edges);
        // Z_k of the hops but the last, two by turns; or all of them for backward.
        T* const between = carver.template take<T>(saved || hops < 2 ? 0 : lines * columns * (hops > 2 ? 2 : 1));
        if (carver.counts() || lines == 0) return carver.used();
        if (out.size() == 0 && !logsumexp) return carver.used();

        const auto hop_rows = [&](std::size_t hop) {  // Z_hop, hop >= 1
            if (saved) return packed_rows<T>(saved->hops_.data() + static_cast<offset_t>(hop - 1) * of_item, q.heads(), static_cast<offset_t>(hops) * of_item, columns);
            return packed_rows<T>(between + static_cast<offset_t>((hop - 1) % 2) * lines * columns, q.heads(), of_item, columns);
        };
        if (hops == 0) {
            Finish<T> finish{.factor = static_cast<T>(recursion_.start), .accumulate = accumulate};
            set_target(finish, out);
            for_each_grid(0, items, [&](index_t item, unsigned count) {
                launch("finish_rows", finish_rows<T>, dim3(blocks_for(queries, 4), count), 128, 0, stream, values, index_t{1}, queries, q.heads(), item, op.query_lengths, finish);
            });
        }
        // Without hops the weights still exist, for the logsumexp.
        for (std::size_t hop = 0; hop < (hops == 0 && (logsumexp || saved) ? 1 : hops); ++hop) {
            Finish<T> finish;
            set_target(finish, out);
            if (hops == 0) finish.out = nullptr;
            else {
                finish.factor = static_cast<T>(walk_of(hop));
                finish.teleport = static_cast<T>(recursion_.hops[hop].teleport);
                finish.values = values;
                finish.accumulate = accumulate;
                finish.dropout = op.dropout;
                finish.hop = static_cast<int>(hop);
                if (hop + 1 < hops) finish.out = nullptr;
                if (saved || hop + 1 < hops) {
                    const Rows<T> to = hop_rows(hop + 1);
                    finish.packed = const_cast<T*>(to.data);
                    finish.packed_stride = to.head_stride;
                }
            }
            for (const auto& run : runs) {
                const bool by_edges = run.plan->finished_by_edges(false), online = hop == 0;
                if (online && by_edges) launch_score_edges<T>({op, run.plan->edges(false), edges, true, weights, highest, sum}, run.first, run.last, stream);
                const bool tiles = begin_partial(run.plan->rows(), partial, queries, columns, run.first, run.last, stream);
                if (tiles)
                    launch_apply_tiles<false, T>({op, run.plan->view(false), 0, hop == 0 ? values : hop_rows(hop), columns, 0, online, !run.plan->rows().complete, by_edges, highest, sum, by_edges ? partial : nullptr, true, finish}, *run.plan,
                                                 run.first, run.last, stream);
                if (!by_edges) continue;
                auto last = edge_arguments<T>(op, *run.plan, false, weights, edges);
                last.values = hop == 0 ? values : hop_rows(hop);
                last.value_columns = columns;
                last.online = online;
                last.highest = highest;
                last.sum = sum;
                last.logsumexp = op.logsumexp;
                last.partial = tiles ? partial : nullptr;
                last.finish = finish;
                launch_apply_edges(last, run.first, run.last, stream);
            }
        }
        if (logsumexp) launch("natural_logarithms", natural_logarithms<T>, dim3(blocks_for(lines, 256)), 256, 0, stream, op.logsumexp, logsumexp, lines);
        return carver.used();
    }

    /// The backward pass, or only the bytes that it takes.
    template <class T>
    std::size_t work_backward(detail::cuda::Carver carver, const CudaSaved<T>& saved, const TensorView<const T>& d_out, const TensorView<T>& d_q, const TensorView<T>& d_k, const TensorView<T>& d_v,
                              std::vector<double>& d_bias, const CudaOptions& options) const {
        using namespace detail::cuda;
        const auto stream = options.stream;
        const TensorView<const T> q = saved.q_, k = saved.k_, v = saved.v_;
        const index_t items = q.batch() * q.heads(), queries = q.tokens(), keys = k.tokens(), columns = padded<T>(v.dim()), group = k.heads() == 0 ? 1 : q.heads() / k.heads();
        Plans plans;
        if (options.item_plans.empty()) plans.shared = options.plan;
        else plans.items = options.item_plans;
        const auto runs = planned_items<T>(q, plans);
        offset_t edges = 0;
        for (const auto& run : runs) edges = std::max(edges, run.plan->edge_count());
        auto op = make_operator(carver, q, k, options);
        op.logsumexp = const_cast<T*>(saved.logsumexp_.data());
        const Rows<T> values = as_rows(v, q.heads(), carver, stream), d = as_rows(d_out, q.heads(), carver, stream);
        const index_t hops = static_cast<index_t>(recursion_.hops.size()), longest = std::max(queries, keys), wide = std::max(columns, op.dim);
        const offset_t of_item = offset_t{queries} * columns, of_keys = offset_t{keys} * columns;
        bool teleports = false;
        for (const Hop& hop : recursion_.hops) teleports |= hop.teleport != 0;
        T* const h = carver.template take<T>(items * of_item * hops);
        T* const g = carver.template take<T>(hops > 1 ? items * of_keys : 0);
        T* const row_sums = carver.template take<T>(offset_t{items} * queries);
        T* const teleported = carver.template take<T>(teleports ? items * of_item : 0);
        T* const partial = carver.template take<T>(offset_t{items} * longest * wide);
        T* const weights = carver.template take<T>(items * edges);
        T* const d_scores = carver.template take<T>(items * edges);
        T* const of_heads = carver.template take<T>(group > 1 ? offset_t{items} * keys * wide : 0);
        constexpr bool learned = LearnedDeviceBias<DeviceBias>;
        offset_t entries = 0;
        if constexpr (learned) entries = static_cast<offset_t>(detail::bind_bias(bias_, queries, keys).gradient_size());
        auto* const bias_sums = carver.template take<unsigned long long>(entries);
        auto* const bias_bounds = carver.template take<double>(learned ? 2 * hops + 1 : 0);
        if (carver.counts()) return carver.used();
        d_bias.assign(static_cast<std::size_t>(entries), 0.);
        const auto zero = [&](const TensorView<T>& view) {
            if (view.size() > 0) check_cuda(cudaMemsetAsync(view.data, 0, static_cast<std::size_t>(view.size()) * sizeof(T), stream), "cudaMemsetAsync");
        };
        if (items == 0 || queries == 0 || hops == 0) {
            zero(d_q);
            zero(d_k);
            zero(d_v);
            if (hops > 0 || d_v.size() == 0) return carver.used();
            Finish<T> finish{.factor = static_cast<T>(recursion_.start)};
            set_target(finish, d_v);
            for_each_grid(0, q.batch() * k.heads(), [&](index_t item, unsigned count) {
                launch("finish_rows", finish_rows<T>, dim3(blocks_for(keys, 4), count), 128, 0, stream, d, group, keys, k.heads(), item, op.query_lengths, finish);
            });
            return carver.used();
        }

        // Adds the heads of a group, or nothing where each key head has one query head and rows went straight to the caller's tensor.
        const auto target = [&](const TensorView<T>& view) {
            Finish<T> finish;
            set_target(finish, view);
            if (group > 1) {
                finish.packed = of_heads;
                finish.packed_stride = offset_t{keys} * finish.packed_columns;
                finish.out = nullptr;
                finish.heads = q.heads();
            }
            return finish;
        };
        const auto add_heads = [&](const TensorView<T>& view) {
            if (group == 1 || view.size() == 0) return;
            Finish<T> finish;
            set_target(finish, view);
            const Rows<T> from = packed_rows<T>(of_heads, q.heads(), offset_t{keys} * finish.packed_columns, finish.packed_columns);
            for_each_grid(0, q.batch() * k.heads(), [&](index_t item, unsigned count) {
                launch("finish_rows", finish_rows<T>, dim3(blocks_for(keys, 4), count), 128, 0, stream, from, group, keys, k.heads(), item, Lengths{nullptr, keys}, finish);
            });
        };

        for (const auto& run : runs)
            if (run.plan->edge_count() > 0) launch_score_edges<T>({op, run.plan->edges(false), edges, false, weights, nullptr, nullptr}, run.first, run.last, stream);
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
            arguments.dropout = op.dropout;
            arguments.hop = static_cast<int>(hop);
            arguments.queries = queries;
            arguments.columns = columns;
            arguments.heads = q.heads();
            arguments.query_lengths = op.query_lengths;
            arguments.logsumexp = op.logsumexp;
            arguments.h = h + hop * of_item;
            arguments.h_stride = hops * of_item;
            arguments.row_sums = row_sums;
            arguments.d_v = teleports ? teleported : nullptr;
            arguments.first = hop == hops - 1;
            for_each_grid(0, items, [&](index_t item, unsigned count) {
                arguments.first_item = item;
                launch("hop_gradient", hop_gradient<T>, dim3(blocks_for(queries, edge_warps), count), edge_threads, 0, stream, arguments);
            });
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
            for (const auto& run : runs) {
                const bool by_edges = run.plan->finished_by_edges(true);
                const bool tiles = begin_partial(run.plan->columns(), partial, keys, columns, run.first, run.last, stream);
                if (tiles)
                    launch_apply_tiles<true, T>({op, run.plan->view(true), 0, hop_rows(h, hop), columns, 0, false, !run.plan->columns().complete, false, nullptr, nullptr, by_edges ? partial : nullptr, false, finish}, *run.plan, run.first,
                                                run.last, stream);
                if (!by_edges) continue;
                auto last = edge_arguments<T>(op, *run.plan, true, weights, edges);
                last.values = hop_rows(h, hop);
                last.value_columns = columns;
                last.partial = tiles ? partial : nullptr;
                last.finish = finish;
                launch_apply_edges(last, run.first, run.last, stream);
            }
        }
        add_heads(d_v);

        const Hops<T> all{static_cast<int>(hops), h, saved.hops_.data(), values, queries, columns, row_sums};
        const BiasSums sums{bias_sums, bias_bounds ? bias_bounds + 2 * hops : nullptr};
        if constexpr (learned) begin_bias_sums(all, keys, items, op.dropout.drops_weights() ? 1 / (1 - options.dropout.weights) : 1, bias_sums, entries, bias_bounds, stream);
        for (const auto& run : runs)
            if (run.plan->edge_count() > 0)
                for_each_grid(run.first, run.last, [&](index_t item, unsigned count) {
                    EdgeGradientArguments<T, DeviceBias> arguments{op, run.plan->edges(false), edges, all, weights, d_scores, sums};
                    arguments.op.first_item = item;
                    launch("gradient_edges", gradient_edges<T, DeviceBias>, dim3(blocks_for(queries, edge_warps), count), edge_threads, 0, stream, arguments);
                });
        const auto scale = static_cast<T>(score_.factor(q.dim()));
        Finish<T> finish_q;
        set_target(finish_q, d_q);
        finish_q.factor = scale;
        Finish<T> finish_k = target(d_k);
        finish_k.factor = scale;
        gradient_of_rows<false, T>({op, {}, 0, all, partial, false, finish_q, sums}, runs, d_scores, edges, stream);
        gradient_of_rows<true, T>({op, {}, 0, all, partial, false, finish_k, sums}, runs, d_scores, edges, stream);
        add_heads(d_k);
        if constexpr (learned) end_bias_sums(d_bias, bias_sums, bias_bounds + 2 * hops, stream);
        return carver.used();
    }
};

POLYATTN_END_NAMESPACE
