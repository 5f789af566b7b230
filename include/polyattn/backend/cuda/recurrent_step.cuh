#pragma once
// One token of causal kernel attention from the sums over the tokens before.

#include <polyattn/backend/cuda/kernel_attention.cuh>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// What becomes of a token's row: sums divided by the denominator, the mean of all values so far, or 0.
enum class RecurrentRow : int { sums, mean, empty };

/// One head a warp: adds phi(k) to the head's sum of such features, phi(q) times that is the denominator.
template <class T>
struct RecurrentDenominators {
    Rows<T> q, k;  // features
    T* sums;       // [item][width], at distances of `stride`
    offset_t stride;
    index_t width, items;
    T epsilon;
    ZeroRow zero;
    T* denominators;      // [item]
    RecurrentRow* kinds;  // [item]
};

template <class T>
__global__ void __launch_bounds__(128) recurrent_denominators(const __grid_constant__ RecurrentDenominators<T> a) {
    const index_t item = static_cast<index_t>(blockIdx.x) * 4 + static_cast<index_t>(threadIdx.x) / 32, lane = static_cast<index_t>(threadIdx.x) % 32;
    if (item >= a.items) return;
    T* const sums = a.sums + item * a.stride;
    T denominator = 0;
    for (index_t f = lane; f < a.width; f += 32) denominator += a.q.head(item)[f] * (sums[f] += a.k.head(item)[f]);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) denominator += __shfl_xor_sync(~0u, denominator, step);
    denominator += a.epsilon;
    if (lane != 0) return;
    a.denominators[item] = denominator;
    a.kinds[item] = denominator != 0 ? RecurrentRow::sums : a.zero == ZeroRow::mean ? RecurrentRow::mean : RecurrentRow::empty;
}

inline constexpr int recurrent_warps = 8;

/// One hop: adds phi(k) z^T and z to the hop's sums and makes the next z, walk A z + teleport v.
template <class T>
struct RecurrentHop {
    Rows<T> q, k, v;
    const T* z;  // [item][columns], or null: start v
    T start, walk, teleport;
    T* sums;     // [item][features + 1][columns], at distances of `stride`; the last row is the sum of z
    offset_t stride;
    index_t features, columns, heads, tokens;
    const T* denominators;
    const RecurrentRow* kinds;
    T* next;     // may be z, or the caller's: at item / heads and item % heads strides
    std::ptrdiff_t next_batch, next_head, next_column;
};

/// 32 columns of one head a block, which no other block meets; warps share the features, and their parts are added in order.
template <class T>
__global__ void __launch_bounds__(32 * recurrent_warps) recurrent_hop(const __grid_constant__ RecurrentHop<T> a) {
    __shared__ T parts[recurrent_warps][32];
    const auto item = static_cast<index_t>(blockIdx.x);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const index_t c = static_cast<index_t>(blockIdx.y) * 32 + lane;
    const bool there = c < a.columns;
    const T v = there ? a.v.head(item)[c] : T(0), z = !there ? T(0) : a.z ? a.z[offset_t{item} * a.columns + c] : a.start * v;
    T* const sums = a.sums + item * a.stride + c;
    T part = 0;
    if (there)
        for (index_t f = warp; f < a.features; f += recurrent_warps) {
            T& sum = sums[offset_t{f} * a.columns];
            sum += a.k.head(item)[f] * z;
            part += a.q.head(item)[f] * sum;
        }
    parts[warp][lane] = part;
    __syncthreads();
    if (warp != 0 || !there) return;
    T& total = sums[offset_t{a.features} * a.columns];
    total += z;
    T made = 0;
    if (a.kinds[item] == RecurrentRow::sums) {
#pragma unroll
        for (int w = 0; w < recurrent_warps; ++w) made += parts[w][lane];
        made *= a.walk / a.denominators[item];
    } else if (a.kinds[item] == RecurrentRow::mean) made = total * (a.walk / static_cast<T>(a.tokens));
    if (a.kinds[item] != RecurrentRow::empty && a.teleport != 0) made += a.teleport * v;
    a.next[item / a.heads * a.next_batch + item % a.heads * a.next_head + c * a.next_column] = made;
}

/// What a step of all heads takes, and the layout of their states: phi(K)^T 1, then phi(K)^T Z_k and the sum of Z_k for each hop.
template <class T, class Features>
class RecurrentStep {
public:
    /// `call` has one query and one key; `directions` are those of random features, by columns. The carver may only count.
    RecurrentStep(Carver& carver, const OperatorCall<T>& call, index_t value_columns, const Features& features, const T* directions, ZeroRow zero, double epsilon, std::size_t hops)
        : call_(call), columns_(value_columns), features_(carver, call, features, zero, true, directions), zero_(zero), epsilon_(epsilon),
          of_hop_((offset_t{features_.count()} + 1) * columns_), size_(features_.width() + static_cast<offset_t>(hops) * of_hop_) {
        denominators_ = carver.template take<T>(call.items());
        kinds_ = carver.template take<RecurrentRow>(call.items());
        z_ = carver.template take<T>(offset_t{call.items()} * columns_);
    }

    /// Numbers of one head's state.
    offset_t size() const { return size_; }

    /// The token is the `tokens`-th. `out` has one row a head.
    void run(const Recursion& recursion, const Rows<T>& v, index_t tokens, T* state, const TensorView<T>& out) const {
        if (call_.items() == 0) return;
        features_.make();
        const RecurrentDenominators<T> first{features_.query_rows(), features_.key_rows(), state, size_, features_.width(), call_.items(), static_cast<T>(epsilon_), zero_, denominators_, kinds_};
        launch("recurrent_denominators", recurrent_denominators<T>, dim3(blocks_for(call_.items(), 4)), 128, 0, call_.stream, first);
        if (columns_ == 0) return;
        if (recursion.hops.empty()) {
            Finish<T> finish;
            finish.factor = static_cast<T>(recursion.start);
            finish_heads(v, 1, out, Lengths{nullptr, 1}, finish, call_.stream);
        }
        RecurrentHop<T> arguments{};
        arguments.q = features_.query_rows();
        arguments.k = features_.key_rows();
        arguments.v = v;
        arguments.start = static_cast<T>(recursion.start);
        arguments.stride = size_;
        arguments.features = features_.count();
        arguments.columns = columns_;
        arguments.heads = call_.heads;
        arguments.tokens = tokens;
        arguments.denominators = denominators_;
        arguments.kinds = kinds_;
        for (std::size_t hop = 0; hop < recursion.hops.size(); ++hop) {
            const bool last = hop + 1 == recursion.hops.size();
            arguments.z = hop == 0 ? nullptr : z_;
            arguments.walk = static_cast<T>(recursion.hops[hop].walk);
            arguments.teleport = static_cast<T>(recursion.hops[hop].teleport);
            arguments.sums = state + features_.width() + static_cast<offset_t>(hop) * of_hop_;
            arguments.next = last ? out.data : z_;
            arguments.next_batch = last ? out.strides[0] : std::ptrdiff_t{call_.heads} * columns_;
            arguments.next_head = last ? out.strides[1] : columns_;
            arguments.next_column = last ? out.strides[3] : 1;
            launch("recurrent_hop", recurrent_hop<T>, dim3(static_cast<unsigned>(call_.items()), blocks_for(columns_, 32)), 32 * recurrent_warps, 0, call_.stream, arguments);
        }
    }

private:
    OperatorCall<T> call_;
    index_t columns_;
    KernelFeatures<T, Features> features_;
    ZeroRow zero_;
    double epsilon_;
    offset_t of_hop_, size_;
    T *denominators_, *z_;
    RecurrentRow* kinds_;
};

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
