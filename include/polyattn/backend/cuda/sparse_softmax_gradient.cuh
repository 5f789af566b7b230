#pragma once
// The adjoint of the softmax operator: dL/dA from the hops, through the softmax to the scores, to q and k. Sums are made by the rows and
// columns of the plan, each by one block or warp in a fixed order, so there are no atomics on floating point and the bits never change.

#include <polyattn/backend/cuda/bias.cuh>
#include <polyattn/backend/cuda/rows.cuh>
#include <polyattn/backend/cuda/sparse_softmax.cuh>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// With H_k = walk_k dropout(G_k), G_k = dL/dZ_k: dL/dA_ij = sum_k H_k[i] . Z_{k-1}[j], and the softmax's row sum is sum_j A_ij dL/dA_ij =
/// sum_k G_k[i] . Z_k[i] - teleport dropout(G_k[i]) . V[i]: no pass over pairs.
template <class T>
struct HopGradientArguments {
    Rows<T> g;                     // G_k, one a query head
    Rows<T> z, v;                  // Z_k, V
    T walk, teleport;
    CallDropout dropout;
    int hop;
    index_t queries, columns, heads, first_item;
    Lengths query_lengths;
    const T* logsumexp;  // [item][queries]
    T* h;                // [item][hops][queries][columns], of this hop
    offset_t h_stride;   // from item to item
    T* row_sums;         // [item][queries]
    T* d_v;              // [item][queries][columns]: teleport dropout(G_k), summed over hops; null without teleports
    bool first;          // row_sums and d_v are set, not added to
};

template <class T>
__global__ void __launch_bounds__(edge_threads, edge_blocks) hop_gradient(const __grid_constant__ HopGradientArguments<T> a) {
    constexpr int vector = 16 / sizeof(T);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const index_t query = static_cast<index_t>(blockIdx.x) * edge_warps + warp, item = a.first_item + static_cast<index_t>(blockIdx.y);
    if (query >= a.queries) return;
    const offset_t row = offset_t{item} * a.queries + query;
    const bool alive = query < a.query_lengths(item / a.heads) && !is_empty(a.logsumexp[row]);
    T sum = 0;
    for (index_t c = lane * vector; c < a.columns; c += 32 * vector) {
        Vector<T> h{}, tele{};
        if (alive) {
            const Vector<T> g = load_vector(a.g.head(item) + query * a.g.row_stride + c), z = load_vector(a.z.head(item) + query * a.z.row_stride + c);
            const Vector<T> v = a.teleport != 0 ? load_vector(a.v.head(item) + query * a.v.row_stride + c) : Vector<T>{};
            T mask[vector];
            value_mask(a.dropout.of(item, a.heads), a.hop, query, c, mask);
#pragma unroll
            for (int l = 0; l < vector; ++l) {
                const T dropped = g.at[l] * mask[l];
                h.at[l] = a.walk * dropped;
                sum += g.at[l] * z.at[l];
                if (a.teleport != 0) {
                    tele.at[l] = a.teleport * dropped;
                    sum -= tele.at[l] * v.at[l];
                }
            }
        }
        store_vector(a.h + offset_t{item} * a.h_stride + offset_t{query} * a.columns + c, h);
        if (a.d_v) {
            T* const to = a.d_v + row * a.columns + c;
            if (!a.first) {
                const Vector<T> before = load_vector(to);
#pragma unroll
                for (int l = 0; l < vector; ++l) tele.at[l] += before.at[l];
            }
            store_vector(to, tele);
        }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) a.row_sums[row] = a.first ? sum : a.row_sums[row] + sum;
}

template <class T>
void apply_hop_gradient(HopGradientArguments<T> arguments, index_t items, cudaStream_t stream) {
    for_each_grid(0, items, [&](index_t item, unsigned count) {
        arguments.first_item = item;
        launch("hop_gradient", hop_gradient<T>, dim3(blocks_for(arguments.queries, edge_warps), count), edge_threads, 0, stream, arguments);
    });
}

/// H_k and Z_k of all hops.
template <class T>
struct Hops {
    int count;
    const T *h, *z;       // [item][hops][queries][columns]; z holds Z_1 ..
    Rows<T> v;            // Z_0
    index_t queries, columns;
    const T* row_sums;    // [item][queries]

    __device__ const T* of(const T* hops, index_t item, int hop) const { return hops + (offset_t{item} * count + hop) * queries * columns; }
    __device__ const T* h_of(index_t item, int hop) const { return of(h, item, hop); }
    /// Z_hop and its rows' stride.
    __device__ const T* z_of(index_t item, int hop) const { return hop == 0 ? v.head(item) : of(z, item, hop - 1); }
    __device__ std::ptrdiff_t z_stride(int hop) const { return hop == 0 ? v.row_stride : columns; }
};

template <class T, class Bias>
struct TileGradientArguments {
    Operator<T, Bias> op;
    PlanView plan;
    index_t first_group;
    Hops<T> hops;
    T* partial;      // [item][own tokens][dim]; null: rows are finished here
    bool continues;  // partial holds what came before
    bool keeps;      // there is a fourth buffer, which keeps the own rows of q or k, that is, one panel of columns
    Finish<T> finish;
    BiasSums bias_sums;
};

/// dL/dq of a group of queries, or (transposed) dL/dk of a group of keys.
template <class T, class Bias, bool Transposed>
__global__ void __launch_bounds__(tile_threads, 2) gradient_tiles(const __grid_constant__ TileGradientArguments<T, Bias> a) {
    using S = TileShape<T>;
    extern __shared__ __align__(16) unsigned char memory[];
    T* const own_rows = reinterpret_cast<T*>(memory);
    T* const other_rows = own_rows + S::buffer;  // then dL/dscore
    T* const summed_rows = other_rows + S::buffer;  // the others' rows of k or q, which with one panel are those of the scores as well
    T* const score_rows = a.keeps ? summed_rows + S::buffer : own_rows;

    const Operator<T, Bias>& op = a.op;
    const Hops<T>& hops = a.hops;
    const bool one_panel = op.dim <= S::width, one_hop = a.keeps && hops.count == 1 && hops.columns <= S::width;
    const DeviceGroup group = a.plan.groups[a.first_group + static_cast<index_t>(blockIdx.x)];
    const index_t item = op.first_item + static_cast<index_t>(blockIdx.y), b = item / op.q.heads, panel = static_cast<index_t>(blockIdx.z) * S::width;
    const Rows<T>&own = Transposed ? op.k : op.q, &other = Transposed ? op.q : op.k;
    const index_t own_length = Transposed ? op.key_lengths(b) : op.query_lengths(b), other_length = Transposed ? op.query_lengths(b) : op.key_lengths(b);
    const Sequence own_tokens{group.first, group.list < 0 ? nullptr : a.plan.lists + group.list};
    const int first_row = static_cast<int>(threadIdx.x) / 16 * S::rows_each, column = panel + static_cast<int>(threadIdx.x) % 16 * S::values_each;
    const T *const own_head = own.head(item), *const other_head = other.head(item);
    const auto of_query = [&](index_t query) { return offset_t{item} * op.queries + query; };

    T sum[S::rows_each][S::values_each] = {}, reference[S::rows_each] = {}, row_sum[S::rows_each] = {};
#pragma unroll
    for (int i = 0; i < S::rows_each; ++i) {
        if (!(group.active >> (first_row + i) & 1)) continue;
        const index_t token = own_tokens[first_row + i];
        if (!Transposed) {
            reference[i] = reference_of(op.logsumexp[of_query(token)]);
            row_sum[i] = hops.row_sums[of_query(token)];
        }
        if (a.continues && column < op.dim) {
            const Vector<T> before = load_vector(a.partial + (offset_t{item} * (Transposed ? op.keys : op.queries) + token) * op.dim + column);
#pragma unroll
            for (int c = 0; c < S::values_each; ++c) sum[i][c] = before.at[c];
        }
    }
    if (a.keeps) load_tile(score_rows, own_head, own.row_stride, own_tokens, 0, group.count, 0, op.dim);
    if (one_hop) load_tile(own_rows, Transposed ? hops.z_of(item, 0) : hops.h_of(item, 0), Transposed ? hops.z_stride(0) : hops.columns, own_tokens, 0, group.count, 0, hops.columns);
    for (index_t g = group.first_segment; g < group.last_segment; ++g) {
        const Segment segment = a.plan.segments[g];
        const DeviceTile tile = a.plan.tiles[segment.tile];
        const PairMask<T, Transposed> mask(a.plan, tile, segment, group, own_tokens, own_length, other_length);
        for (index_t begin = segment.begin; begin < segment.end; begin += S::side) {
            T s[S::rows_each][S::columns_each] = {}, d[S::rows_each][S::columns_each] = {};
            bool odd = load_tile(summed_rows, other_head, other.row_stride, mask.others(), begin, segment.end, panel, op.dim);
            for (index_t k = 0; k < op.dim; k += S::width) {
                if (!a.keeps) load_tile(own_rows, own_head, own.row_stride, own_tokens, 0, group.count, k, op.dim);
                if (!one_panel) load_tile(other_rows, other_head, other.row_stride, mask.others(), begin, segment.end, k, op.dim);
                odd = __syncthreads_or(odd);
                multiply_transposed(s, score_rows, one_panel ? summed_rows : other_rows, min(S::width, op.dim - k));
                if (!a.keeps || !one_panel) __syncthreads();
            }
            for (int hop = 0; hop < hops.count; ++hop) {
                const T *const h = hops.h_of(item, hop), *const z = hops.z_of(item, hop);
                const std::ptrdiff_t z_stride = hops.z_stride(hop);
                for (index_t c = 0; c < hops.columns; c += S::width) {
                    if (!one_hop) load_tile(own_rows, Transposed ? z : h, Transposed ? z_stride : hops.columns, own_tokens, 0, group.count, c, hops.columns);
                    load_tile(other_rows, Transposed ? h : z, Transposed ? hops.columns : z_stride, mask.others(), begin, segment.end, c, hops.columns);
                    __syncthreads();
                    multiply_transposed(d, own_rows, other_rows, min(S::width, hops.columns - c));
                    __syncthreads();
                }
            }
            if (op.dropout.drops_weights()) {
                store_weights(other_rows, d);
                __syncthreads();
                scale_weights(other_rows, group.count, min(S::side, segment.end - begin), [&](int slot, int n) {
                    const index_t own_token = own_tokens[slot], other_token = mask.others()[begin + n];
                    return op.mask(item, Transposed ? other_token : own_token, Transposed ? own_token : other_token);
                });
                __syncthreads();
#pragma unroll
                for (int j = 0; j < S::columns_each; ++j)
#pragma unroll
                    for (int i = 0; i < S::rows_each; ++i) d[i][j] = other_rows[(static_cast<int>(threadIdx.x) % 16 + 16 * j) * S::stride + first_row + i];
                __syncthreads();
            }
#pragma unroll
            for (int j = 0; j < S::columns_each; ++j) {
                const int n = static_cast<int>(threadIdx.x) % 16 + 16 * j;
                const auto seen = mask.column(begin, n);
                const bool there = begin + n < segment.end;
                const index_t other_token = there ? mask.others()[begin + n] : 0;
                T of_other = 0, sum_of_other = 0;
                if (Transposed && there && other_token < other_length) {
                    of_other = reference_of(op.logsumexp[of_query(other_token)]);
                    sum_of_other = hops.row_sums[of_query(other_token)];
                }
#pragma unroll
                for (int i = 0; i < S::rows_each; ++i) {
                    if (!mask.allows(i, seen)) {
                        s[i][j] = 0;
                        continue;
                    }
                    index_t query = 0, key = 0;
                    if (!std::is_same_v<Bias, NoBias>) {
                        const index_t own_token = own_tokens[first_row + i];
                        query = Transposed ? other_token : own_token;
                        key = Transposed ? own_token : other_token;
                    }
                    const T weight = exp_base2(op.score(s[i][j], item, query, key) - (Transposed ? of_other : reference[i]));
                    s[i][j] = weight * (d[i][j] - (Transposed ? sum_of_other : row_sum[i]));
                    if constexpr (!Transposed && LearnedDeviceBias<Bias>)
                        if (blockIdx.z == 0 && (group.active >> (first_row + i) & 1)) a.bias_sums.add(op.bias.entry(b, item % op.q.heads, query, key), double(s[i][j]));
                }
            }
            store_weights(other_rows, s);
            __syncthreads();
            const int others = min(S::side, segment.end - begin);
            if (odd && !mask.is_full(segment, begin)) multiply<true>(sum, other_rows, summed_rows, others, [&](int i, int n) { return mask.allows(i, mask.column(begin, n)); });
            else multiply<false>(sum, other_rows, summed_rows, others, [](int, int) { return true; });
            __syncthreads();
        }
    }
    for_each_row(summed_rows, sum, group.active, [&](int slot, int c, const Vector<T>& value) {
        const index_t token = own_tokens[slot];
        if (!a.partial) a.finish.store(item, token, panel + c, value, true);
        else if (panel + c < op.dim) store_vector(a.partial + (offset_t{item} * (Transposed ? op.keys : op.queries) + token) * op.dim + panel + c, value);
    });
}

template <class T, class Bias>
struct EdgeGradientArguments {
    Operator<T, Bias> op;
    EdgeView edges;
    offset_t edge_count;
    Hops<T> hops;
    const T* weights;  // [item][edges]
    T* d_scores;       // [item][edges]
    BiasSums bias_sums;
};

/// dL/dscore of the edges, one row a warp.
template <class T, class Bias>
__global__ void __launch_bounds__(edge_threads, edge_blocks) gradient_edges(const __grid_constant__ EdgeGradientArguments<T, Bias> a) {
    using Walk = EdgeWalk<T>;
    const Operator<T, Bias>& op = a.op;
    const Walk walk;
    const int lane = walk.lane;
    const index_t query = static_cast<index_t>(blockIdx.x) * edge_warps + static_cast<int>(threadIdx.x) / 32, item = op.first_item + static_cast<index_t>(blockIdx.y), b = item / op.q.heads;
    if (query >= op.queries) return;
    const offset_t begin = a.edges.offsets[query], end = a.edges.offsets[query + 1];
    const index_t key_length = query < op.query_lengths(b) ? op.key_lengths(b) : 0;
    const T row_sum = a.hops.row_sums[offset_t{item} * op.queries + query];
    for (offset_t first = begin; first < end; first += 32) {
        const index_t key = first + lane < end ? a.edges.to[first + lane] : op.keys;
        const int count = __popc(__ballot_sync(~0u, key < key_length));
        if (count == 0) break;
        T dot[Walk::steps] = {};
        for (int hop = 0; hop < a.hops.count; ++hop) {
            const T *const h = a.hops.h_of(item, hop) + offset_t{query} * a.hops.columns, *const z = a.hops.z_of(item, hop);
            for (index_t panel = 0; panel < a.hops.columns; panel += Walk::width) {
                Vector<T> x[2];
                walk.template load<true>(x, h, panel, a.hops.columns);
                walk.for_each(key, count, z, a.hops.z_stride(hop), panel, a.hops.columns, [&](int s, const Vector<T>(&y)[2]) { Walk::add_product(dot[s], x, y); });
            }
        }
        T mine = walk.collect(dot);
        if (lane < count) {
            const offset_t at = offset_t{item} * a.edge_count + first + lane;
            if (op.dropout.drops_weights()) mine *= op.mask(item, query, key);
            const T d_score = a.weights[at] * (mine - row_sum);
            a.d_scores[at] = d_score;
            if constexpr (LearnedDeviceBias<Bias>) a.bias_sums.add(op.bias.entry(b, item % op.q.heads, query, key), double(d_score));
        }
        if (count < 32) break;
    }
}

/// bounds[2 hop] = max_i |H_hop+1[i]|_1, bounds[2 hop + 1] = max_j |Z_hop[j]|_max, of keys within their length; maxima of numbers >= 0 may be taken in any
/// order.
template <class T>
__global__ void __launch_bounds__(256) hop_bounds(const __grid_constant__ Hops<T> hops, index_t heads, const __grid_constant__ Lengths key_lengths, index_t first_item, double* bounds) {
    const index_t item = first_item + static_cast<index_t>(blockIdx.y), keys = key_lengths(item / heads);
    const int hop = static_cast<int>(blockIdx.z);
    const auto larger = [](double a, double b) { return a != a || b <= a ? a : b; };  // keeps NaN
    double most_h = 0, most_z = 0;
    for (index_t row = static_cast<index_t>(blockIdx.x * blockDim.x + threadIdx.x); row < max(hops.queries, keys); row += static_cast<index_t>(gridDim.x * blockDim.x)) {
        double sum = 0;
        if (row < hops.queries)
            for (index_t c = 0; c < hops.columns; ++c) sum += fabs(double(hops.h_of(item, hop)[offset_t{row} * hops.columns + c]));
        most_h = larger(most_h, sum);
        if (row < keys)
            for (index_t c = 0; c < hops.columns; ++c) most_z = larger(most_z, fabs(double(hops.z_of(item, hop)[row * hops.z_stride(hop) + c])));
    }
    // Bit patterns of numbers >= 0 are in their order, NaN last.
    const auto keep = [](double* to, double value) { atomicMax(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(__double_as_longlong(fabs(value)))); };
    keep(bounds + 2 * hop, most_h);
    keep(bounds + 2 * hop + 1, most_z);
}
/// The power of two that fits: |dL/dscore| <= 2 A mask max |dL/dA|, and the weights of a row sum to 1. NaN if the bounds are not finite.
static __global__ void bias_scale(double* bounds, int hops, double rows) {
    double most = 0;
    for (int hop = 0; hop < hops; ++hop) most += bounds[2 * hop] * bounds[2 * hop + 1];
    most *= 2 * rows;
    bounds[2 * hops] = is_not_finite(most) ? __longlong_as_double(0x7ff8000000000000ll) : most > 0 ? exp2(61 - ceil(log2(most))) : 1;
}

template <class T>
void begin_bias_sums(const Hops<T>& hops, const OperatorCall<T>& call, double mask, unsigned long long* sums, offset_t entries, double* bounds) {
    const cudaStream_t stream = call.stream;
    check_cuda(cudaMemsetAsync(sums, 0, static_cast<std::size_t>(entries) * sizeof(*sums), stream), "cudaMemsetAsync");
    check_cuda(cudaMemsetAsync(bounds, 0, static_cast<std::size_t>(2 * hops.count + 1) * sizeof(double), stream), "cudaMemsetAsync");
    for_each_grid(0, call.items(), [&](index_t item, unsigned count) {
        const dim3 grid(std::min(blocks_for(std::max(call.queries, call.keys), 256), 64u), count, static_cast<unsigned>(hops.count));
        launch("hop_bounds", hop_bounds<T>, grid, 256, 0, stream, hops, call.heads, call.key_lengths, item, bounds);
    });
    launch("bias_scale", bias_scale, dim3(1), 1, 0, stream, bounds, hops.count, double(call.items()) * call.queries * mask);
}
inline void end_bias_sums(std::vector<double>& to, const unsigned long long* sums, const double* scale, cudaStream_t stream) {
    std::vector<long long> host(to.size());
    double factor = 0;
    check_cuda(cudaMemcpyAsync(host.data(), sums, host.size() * sizeof(long long), cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync of a bias gradient");
    check_cuda(cudaMemcpyAsync(&factor, scale, sizeof factor, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync of a bias gradient");
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    for (std::size_t i = 0; i < to.size(); ++i) to[i] = double(host[i]) / factor;
}

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
