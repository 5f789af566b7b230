#pragma once
// What calls of the device's layers take and give, and what all kinds of layers check.

#include <polyattn/backend/cuda/rows.cuh>
#include <polyattn/backend/cuda/runtime.cuh>
#include <polyattn/backend/cuda/tensor.cuh>
#include <polyattn/call_options.hpp>
#include <polyattn/policy/set.hpp>

#include <array>

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
    /// What kind of layer a pass was of; none until there is one, and after one that threw.
    enum class Kind { none, softmax, kernel, compressed_softmax, compressed_kernel };

public:
    TensorView<const T> q() const { return q_; }
    TensorView<const T> k() const { return k_; }
    TensorView<const T> v() const { return v_; }
    /// The plan of a batch item's head.
    const Plan& plan(index_t b = 0, index_t h = 0) const { return options_.item_plans.empty() ? *options_.plan : detail::plan_of(options_.item_plans, q_, b, h); }

private:
    template <class...>
    friend class AttentionLayer;
    template <class...>
    friend class CompressedLayer;

    TensorView<const T> q_, k_, v_;
    CudaOptions options_;                                  // with the plans
    CudaTensor<detail::cuda::arithmetic_t<T>> logsumexp_;  // of the operator, [items][queries]
    CudaTensor<T> hops_;                                   // Z_1 .. Z_K, [items][K][queries][padded columns]
    std::size_t hop_count_ = 0;
    Kind kind_ = Kind::none;

    void require(Kind kind, std::size_t hops) const {
        detail::require(kind_ != Kind::none, "saved", "a forward pass", "none, or one that threw");
        detail::require(kind_ == kind, "saved", "a forward pass of this layer", "another's");
        detail::require(hop_count_ == hops, "saved", [&] { return detail::text("a forward pass of this layer, with ", hops, " hops"); }, hop_count_);
    }
};

/// Gradients with the shapes of q, k and v, and of the tables of a learned bias and a learned compression (empty if there is none).
template <class T>
struct CudaGradients {
    CudaTensor<T> q, k, v;
    std::vector<double> bias = {};
    std::vector<double> compression = {};
};

/// What a causal kernel layer remembers of the tokens so far, on the device: sums of a fixed size for each head and hop, the directions of random features, and the
/// scratch memory of a step. Made by start(), moved on by step(). Belongs to one stream.
template <class T>
class CudaRecurrentState {
public:
    /// Tokens so far.
    index_t tokens() const { return tokens_; }

private:
    template <class...>
    friend class AttentionLayer;

    std::array<index_t, 4> q_{};  // batch, heads, 1, dim
    index_t key_heads_ = 0, value_dim_ = 0, tokens_ = 0;
    std::size_t hop_count_ = 0;
    offset_t of_head_ = 0;  // numbers of one head's state
    CudaTensor<T> sums_, directions_;
    CudaWorkspace workspace_;
};

template <class T, class Saved = CudaSaved<T>>
struct CudaForward {
    CudaTensor<T> out;
    Saved saved;
};
template <class T>
struct CudaOutputAndLogsumexp {
    CudaTensor<T> out;
    CudaTensor<detail::cuda::arithmetic_t<T>> logsumexp;  // of half and bfloat16 in float
};

namespace detail::cuda {

/// f(carver) once to count and once to work, in the call's workspace or in one of its own.
template <class F>
void with_workspace(const CudaOptions& options, F&& f) {
    CudaWorkspace own;
    CudaWorkspace& workspace = options.device_workspace ? *options.device_workspace : own;
    workspace.reserve(std::max<std::size_t>(f(Carver()), 1));
    f(Carver(workspace.data()));
    if (!options.device_workspace) check_cuda(cudaStreamSynchronize(options.stream), "cudaStreamSynchronize");
}

/// What every kind of layer checks of a call, beside the shapes of q, k and v.
template <class T>
void check_memory(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const TensorView<T>& out) {
    require_shape(out, {q.extents[0], q.extents[1], q.extents[2], v.extents[3]}, q.rank, "out");
    require_device_memory(q, "q");
    require_device_memory(k, "k");
    require_device_memory(v, "v");
    require_device_memory(out, "out");
}
/// And of backward() with these inputs.
template <class T>
void check_gradients(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const TensorView<const T>& d_out, const CudaGradients<T>& gradients) {
    require_shape(d_out, {q.extents[0], q.extents[1], q.extents[2], v.extents[3]}, q.rank, "d_out");
    require_device_memory(d_out, "d_out");
    require_shape(gradients.q.view(), q.extents, q.rank, "gradients.q");
    require_shape(gradients.k.view(), k.extents, k.rank, "gradients.k");
    require_shape(gradients.v.view(), v.extents, v.rank, "gradients.v");
}
template <class T>
CudaGradients<T> gradients_like(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v) {
    const auto like = [](const TensorView<const T>& view) { return CudaTensor<T>(shape_like(view, {view.tokens(), view.dim()})); };
    return {like(q), like(k), like(v)};
}
/// A gradient of the output that takes the most workspace: rows that have to be copied.
template <class T>
TensorView<const T> any_d_out(const TensorView<const T>& q, const TensorView<const T>& v) {
    return {nullptr, {q.batch(), q.heads(), q.tokens(), v.dim()}, {1, 1, 1, 2}, 4};
}

/// The value type of a call. Not in the layer: what nvcc writes for the host names types of kernels as they were spelt, private ones too.
template <bool kernel, class Q, class K, class V>
struct same_elements {
    using T = std::remove_const_t<Q>;
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, double> || is_narrow<T>, "polyattn: tensors of float, double, __half or __nv_bfloat16 are wanted");
    static_assert(!kernel || !is_narrow<T>, "polyattn: kernel scores take tensors of float or double");
    static_assert(std::is_same_v<T, std::remove_const_t<K>> && std::is_same_v<T, std::remove_const_t<V>>, "polyattn: q, k and v must have one value type");
};
template <class Element>
struct trained_elements {
    using T = Element;
    static_assert(!is_narrow<T>, "polyattn: __half and __nv_bfloat16 are for inference only; train with tensors of float or double");
};

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
