#pragma once
// The softmax operator A: scores, weights, and A Z or its transpose, over the tiles of a plan and over its edges.

#include <polyattn/backend/cuda/tile.cuh>
#include <polyattn/policy/bias/concept.hpp>

#include <cub/warp/warp_reduce.cuh>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// What both kinds of kernels need of A. Scores are in units of log 2.
template <class T, class Bias>
struct Operator {
    Rows<T> q, k;
    index_t dim;  // padded
    T scale;      // log2(e) / sqrt(d)
    Bias bias;
    DropoutMask dropout;
    Lengths query_lengths, key_lengths;
    index_t queries, keys;
    index_t first_item;  // of the launch
    T* logsumexp;        // [item][queries]

    __device__ T score(T dot, index_t item, index_t query, index_t key) const {
        T s = dot * scale;
        if constexpr (!std::is_same_v<Bias, NoBias>) s += static_cast<T>(bias(item / q.heads, item % q.heads, query, key)) * log2_of_e<T>;
        return s;
    }
    /// What a weight is multiplied with.
    __device__ T mask(index_t item, index_t query, index_t key) const { return static_cast<T>(dropout.of_item(item).weight(query, key)); }
};

/// What is subtracted from a row's scores: of a row without keys infinity, so that its weights are 0.
template <class T>
__device__ T reference_of(T logsumexp) {
    return is_empty(logsumexp) ? -logsumexp : logsumexp;
}

template <class T, class Bias>
struct TileArguments {
    Operator<T, Bias> op;
    PlanView plan;
    index_t first_group;
    Rows<T> values;  // what is summed
    index_t value_columns;
    index_t first_panel;
    bool online;        // logsumexp is not known yet
    bool continues;     // highest, sum and partial hold what came before
    bool begins_state;  // highest and sum do, partial does not
    T *highest, *sum;   // [item][queries]
    T* partial;         // [item][own tokens][value_columns]; null: rows are finished here
    bool stores_state;
    Finish<T> finish;
};

/// One group of queries against all keys that they see (transposed: of keys against queries). Weights are exp2(score - reference); the reference
/// is the highest score so far, or the logsumexp where that is known. Source: Milakov and Gimelshein, "Online normalizer calculation for softmax"
/// (2018); Dao, "FlashAttention-2" (2023).
template <class T, class Bias, bool Transposed>
__global__ void __launch_bounds__(tile_threads, 2) apply_tiles(const __grid_constant__ TileArguments<T, Bias> a) {
    using S = TileShape<T>;
    extern __shared__ __align__(16) unsigned char memory[];
    T* const own_rows = reinterpret_cast<T*>(memory);
    T* const other_rows = own_rows + S::buffer;  // then the weights
    T* const value_rows = other_rows + S::buffer;
    __shared__ T totals[S::side];

    const Operator<T, Bias>& op = a.op;
    const DeviceGroup group = a.plan.groups[a.first_group + static_cast<index_t>(blockIdx.x)];
    const index_t item = op.first_item + static_cast<index_t>(blockIdx.y), b = item / op.q.heads;
    const index_t panel = (a.first_panel + static_cast<index_t>(blockIdx.z)) * S::width;
    const Rows<T>&own = Transposed ? op.k : op.q, &other = Transposed ? op.q : op.k;
    const index_t own_length = Transposed ? op.key_lengths(b) : op.query_lengths(b), other_length = Transposed ? op.query_lengths(b) : op.key_lengths(b);
    const Sequence own_tokens{group.first, group.list < 0 ? nullptr : a.plan.lists + group.list};
    const int first_row = static_cast<int>(threadIdx.x) / 16 * S::rows_each, column = panel + static_cast<int>(threadIdx.x) % 16 * S::values_each;
    const auto active = [&](int i) { return (group.active >> (first_row + i) & 1) != 0; };
    const auto known = [&](index_t query) { return reference_of(op.logsumexp[offset_t{item} * op.queries + query]); };

    T sum[S::rows_each][S::values_each], highest[S::rows_each], total[S::rows_each];
#pragma unroll
    for (int i = 0; i < S::rows_each; ++i) {
        highest[i] = lowest<T>();
        total[i] = 0;
#pragma unroll
        for (int c = 0; c < S::values_each; ++c) sum[i][c] = 0;
        if (!active(i)) continue;
        const offset_t row = offset_t{item} * (Transposed ? op.keys : op.queries) + own_tokens[first_row + i];
        if (!Transposed) {
            if (!a.online) highest[i] = known(own_tokens[first_row + i]);
            else if (a.begins_state) {
                highest[i] = a.highest[row];
                total[i] = a.sum[row];
            }
        }
        if (a.continues && column < a.value_columns) {
            const Vector<T> before = load_vector(a.partial + row * a.value_columns + column);
#pragma unroll
            for (int c = 0; c < S::values_each; ++c) sum[i][c] = before.at[c];
        }
    }

    const T *const own_head = own.head(item), *const other_head = other.head(item), *const value_head = a.values.head(item);
    const bool one_load = op.dim <= S::width;
    if (one_load) load_tile(own_rows, own_head, own.row_stride, own_tokens, 0, group.count, 0, op.dim);
    for (index_t g = group.first_segment; g < group.last_segment; ++g) {
        const Segment segment = a.plan.segments[g];
        const DeviceTile tile = a.plan.tiles[segment.tile];
        const PairMask<T, Transposed> mask(a.plan, tile, segment, group, own_tokens, own_length, other_length);
        for (index_t begin = segment.begin; begin < segment.end; begin += S::side) {
            T s[S::rows_each][S::columns_each] = {};
            bool odd = load_tile(value_rows, value_head, a.values.row_stride, mask.others(), begin, segment.end, panel, a.value_columns);
            for (index_t k = 0; k < op.dim; k += S::width) {
                if (!one_load) load_tile(own_rows, own_head, own.row_stride, own_tokens, 0, group.count, k, op.dim);
                load_tile(other_rows, other_head, other.row_stride, mask.others(), begin, segment.end, k, op.dim);
                odd = __syncthreads_or(odd);
                multiply_transposed(s, own_rows, other_rows, min(S::width, op.dim - k));
                __syncthreads();
            }
            const bool full = mask.is_full(segment, begin);
#pragma unroll
            for (int j = 0; j < S::columns_each; ++j) {
                const int n = static_cast<int>(threadIdx.x) % 16 + 16 * j;
                const auto seen = mask.column(begin, n);
                T reference = 0;
                index_t other_token = 0;
                if (full || begin + n < segment.end) {
                    other_token = mask.others()[begin + n];
                    if (Transposed && other_token < other_length) reference = known(other_token);
                }
#pragma unroll
                for (int i = 0; i < S::rows_each; ++i) {
                    const bool allowed = full || mask.allows(i, seen);
                    if constexpr (std::is_same_v<Bias, NoBias>) s[i][j] *= op.scale;
                    else if (allowed && first_row + i < group.count) {
                        const index_t own_token = own_tokens[first_row + i];
                        s[i][j] = op.score(s[i][j], item, Transposed ? other_token : own_token, Transposed ? own_token : other_token);
                    }
                    if (Transposed) s[i][j] = allowed ? exp_base2(s[i][j] - reference) : T(0);
                    else if (!allowed) s[i][j] = minus_infinity<T>();
                }
            }
            if (!Transposed) {
#pragma unroll
                for (int i = 0; i < S::rows_each; ++i) {
                    if (a.online) {
                        T most = s[i][0];
#pragma unroll
                        for (int j = 1; j < S::columns_each; ++j) most = s[i][j] > most ? s[i][j] : most;
                        most = largest_of_row(most);
                        if (most > highest[i]) {
                            const T shrink = exp_base2(highest[i] - most);
                            total[i] *= shrink;
#pragma unroll
                            for (int c = 0; c < S::values_each; ++c) sum[i][c] *= shrink;
                            highest[i] = most;
                        }
                    }
                    T added = 0;
#pragma unroll
                    for (int j = 0; j < S::columns_each; ++j) added += s[i][j] = exp_base2(s[i][j] - highest[i]);
                    if (a.online) total[i] += sum_of_row(added);
                }
            }
            store_weights(other_rows, s);
            __syncthreads();
            const int others = min(S::side, segment.end - begin);
            if (op.dropout.drops_weights()) {
                scale_weights(other_rows, group.count, others, [&](int slot, int n) {
                    const index_t own_token = own_tokens[slot], other_token = mask.others()[begin + n];
                    return op.mask(item, Transposed ? other_token : own_token, Transposed ? own_token : other_token);
                });
                __syncthreads();
            }
            if (odd && !full) multiply<true>(sum, other_rows, value_rows, others, [&](int i, int n) { return mask.allows(i, mask.column(begin, n)); });
            else multiply<false>(sum, other_rows, value_rows, others, [](int, int) { return true; });
            __syncthreads();
        }
    }

    if (!Transposed && a.online) {
#pragma unroll
        for (int i = 0; i < S::rows_each; ++i) {
            if (!active(i)) continue;
            const index_t token = own_tokens[first_row + i];
            const offset_t row = offset_t{item} * op.queries + token;
            if (token >= own_length) total[i] = 0;
            if (!a.partial) {
                const T inverse = T(1) / total[i];
#pragma unroll
                for (int c = 0; c < S::values_each; ++c) sum[i][c] *= inverse;
            }
            if (threadIdx.x % 16 != 0) continue;
            totals[first_row + i] = total[i];
            if (!a.stores_state || blockIdx.z > 0) continue;
            if (a.partial) {
                a.highest[row] = highest[i];
                a.sum[row] = total[i];
            } else op.logsumexp[row] = total[i] != 0 ? highest[i] + log_base2(total[i]) : minus_infinity<T>();
        }
    }
    for_each_row(value_rows, sum, group.active, [&](int slot, int c, const Vector<T>& value) {
        const index_t token = own_tokens[slot];
        const offset_t row = offset_t{item} * (Transposed ? op.keys : op.queries) + token;
        if (a.partial) {
            if (panel + c < a.value_columns) store_vector(a.partial + row * a.value_columns + panel + c, value);
            return;
        }
        bool alive = token < own_length;
        if (!Transposed && alive) alive = a.online ? totals[slot] != 0 : !is_empty(op.logsumexp[row]);
        a.finish.store(item, token, panel + c, value, alive);
    });
}

inline constexpr index_t no_token = 0x7fffffff;
inline constexpr int edge_warps = 4, edge_threads = 32 * edge_warps, edge_lanes = 16;  // half a warp reads a row

/// Sum over the half of a warp that reads one row, in all its threads.
template <class T>
__device__ T sum_of_half(T value) {
    return sum_of_row(value);
}

template <class T, class Bias>
struct ScoreArguments {
    Operator<T, Bias> op;
    EdgeView edges;
    offset_t edge_count;
    bool online;        // scores, and highest and sum of each row; else weights
    T* weights;         // [item][edges]
    T *highest, *sum;   // [item][queries]
};

/// Scores of the edges, one row a warp, two edges at a time.
template <class T, class Bias>
__global__ void __launch_bounds__(edge_threads, 4) score_edges(const __grid_constant__ ScoreArguments<T, Bias> a) {
    constexpr int vector = 16 / sizeof(T);
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ typename cub::WarpReduce<T>::TempStorage reduction[edge_warps];
    const Operator<T, Bias>& op = a.op;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, half = lane / edge_lanes, part = lane % edge_lanes * vector;
    const index_t query = static_cast<index_t>(blockIdx.x) * edge_warps + warp, item = op.first_item + static_cast<index_t>(blockIdx.y), b = item / op.q.heads;
    if (query >= op.queries) return;
    T* const q = reinterpret_cast<T*>(memory) + warp * op.dim;
    for (index_t c = lane * vector; c < op.dim; c += 32 * vector) store_vector(q + c, load_vector(op.q.head(item) + query * op.q.row_stride + c));
    __syncwarp();
    const T* const k = op.k.head(item);
    const offset_t row = offset_t{item} * op.queries + query, begin = a.edges.offsets[query], end = a.edges.offsets[query + 1];
    const index_t key_length = query < op.query_lengths(b) ? op.key_lengths(b) : 0;
    T* const weights = a.weights + offset_t{item} * a.edge_count;
    const T reference = a.online ? T(0) : reference_of(op.logsumexp[row]);
    T highest = lowest<T>(), total = 0;
    for (offset_t first = begin; first < end; first += 32) {
        const index_t key = first + lane < end ? a.edges.to[first + lane] : op.keys;
        const int count = __popc(__ballot_sync(~0u, key < key_length));  // keys ascend
        T mine = 0;
#pragma unroll 4
        for (int s = 0; s < count; s += 2) {
            const index_t j = __shfl_sync(~0u, key, s + half);
            T dot = 0;
            if (s + half < count)
                for (index_t c = part; c < op.dim; c += edge_lanes * vector) {
                    const Vector<T> x = load_vector(q + c), y = load_vector(k + j * op.k.row_stride + c);
#pragma unroll
                    for (int l = 0; l < vector; ++l) dot += x.at[l] * y.at[l];
                }
            dot = sum_of_half(dot);
            const T other = __shfl_xor_sync(~0u, dot, edge_lanes);
            if (lane / 2 == s / 2) mine = lane % 2 == half ? dot : other;
        }
        if (count == 0) break;
        T score = lane < count ? op.score(mine, item, query, key) : minus_infinity<T>();
        if (a.online) {
            const T most = __shfl_sync(~0u, cub::WarpReduce<T>(reduction[warp]).Reduce(score, [](T x, T y) { return y > x ? y : x; }), 0);
            __syncwarp();
            if (most > highest) {
                total *= exp_base2(highest - most);
                highest = most;
            }
            total += __shfl_sync(~0u, cub::WarpReduce<T>(reduction[warp]).Sum(exp_base2(score - highest)), 0);
            __syncwarp();
        } else score = exp_base2(score - reference);
        if (lane < count) weights[first + lane] = score;
        if (count < 32) break;
    }
    if (a.online && lane == 0) {
        a.highest[row] = highest;
        a.sum[row] = total;
    }
}

template <class T>
struct EdgeArguments {
    EdgeView edges;
    offset_t edge_count;
    T* weights;  // [item][edges]
    bool masks;  // weights are those of A: dropout applies
    bool transposed;
    DropoutMask dropout;
    Lengths own_lengths, other_lengths;
    index_t own, heads, first_item;
    Rows<T> values;
    index_t value_columns;
    bool online;               // weights are scores yet; the row's logsumexp comes from highest and sum
    const T *highest, *sum;    // [item][own]
    T* logsumexp;              // [item][own]; null: no row is empty
    const T* partial;          // [item][own][value_columns]: what tiles made of the row; null for nothing
    Finish<T> finish;
};

/// sum += weights of the edges x rows of values, one row a warp, two edges at a time; finishes the row.
template <class T>
__global__ void __launch_bounds__(edge_threads, 4) apply_edges(const __grid_constant__ EdgeArguments<T> a) {
    constexpr int vector = 16 / sizeof(T);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, half = lane / edge_lanes, part = lane % edge_lanes * vector;
    const index_t own = static_cast<index_t>(blockIdx.x) * edge_warps + warp, item = a.first_item + static_cast<index_t>(blockIdx.y), b = item / a.heads;
    if (own >= a.own) return;
    const offset_t row = offset_t{item} * a.own + own, begin = a.edges.offsets[own], end = a.edges.offsets[own + 1];
    const bool valid = own < a.own_lengths(b);
    const index_t other_length = valid ? a.other_lengths(b) : 0;
    T* const weights = a.weights + offset_t{item} * a.edge_count;
    const T* const values = a.values.head(item);
    bool alive = valid;
    T logsumexp = 0, of_tiles = 1;
    if (a.online) {
        const T total = a.sum[row];
        alive = valid && total != 0;
        of_tiles = alive ? T(1) / total : T(0);
        logsumexp = alive ? a.highest[row] + log_base2(total) : minus_infinity<T>();
        if (lane == 0) a.logsumexp[row] = logsumexp;
    } else if (a.logsumexp) alive = valid && !is_empty(a.logsumexp[row]);
    for (index_t panel = 0; panel < a.value_columns; panel += edge_lanes * vector) {
        const index_t column = panel + part;
        Vector<T> sum{};
        for (offset_t first = begin; first < end; first += 32) {
            const index_t to = first + lane < end ? a.edges.to[first + lane] : no_token;
            const int count = __popc(__ballot_sync(~0u, to < other_length));  // tokens ascend
            if (count == 0) break;
            T weight = 0;
            if (lane < count) {
                T& stored = weights[a.edges.index ? a.edges.index[first + lane] : first + lane];
                weight = stored;
                if (a.online && panel == 0) stored = weight = alive ? exp_base2(weight - logsumexp) : T(0);
                if (a.masks && a.dropout.drops_weights()) weight *= static_cast<T>(a.dropout.of_item(item).weight(a.transposed ? to : own, a.transposed ? own : to));
            }
#pragma unroll 4
            for (int s = 0; s < count; s += 2) {
                const index_t j = __shfl_sync(~0u, to, s + half);
                const T w = __shfl_sync(~0u, weight, s + half);
                if (s + half < count && column < a.value_columns) {
                    const Vector<T> value = load_vector(values + j * a.values.row_stride + column);
#pragma unroll
                    for (int l = 0; l < vector; ++l) sum.at[l] += w * value.at[l];
                }
            }
            if (count < 32) break;
        }
#pragma unroll
        for (int l = 0; l < vector; ++l) sum.at[l] += __shfl_xor_sync(~0u, sum.at[l], edge_lanes);
        if (half == 1 || column >= a.value_columns) continue;
        if (a.partial) {
            const Vector<T> before = load_vector(a.partial + row * a.value_columns + column);
#pragma unroll
            for (int l = 0; l < vector; ++l) sum.at[l] += before.at[l] * of_tiles;
        }
        a.finish.store(item, own, column, sum, alive);
    }
}

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
