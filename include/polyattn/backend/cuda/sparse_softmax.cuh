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
    using Number = arithmetic_t<T>;
    Rows<T> q, k;
    index_t dim;   // padded
    Number scale;  // log2(e) / sqrt(d)
    Bias bias;
    CallDropout dropout;
    Lengths query_lengths, key_lengths;
    index_t queries, keys;
    index_t first_item;  // of the launch
    Number* logsumexp;   // [item][queries]

    __device__ Number score(Number dot, index_t item, index_t query, index_t key) const {
        Number s = dot * scale;
        if constexpr (!std::is_same_v<Bias, NoBias>) s += static_cast<Number>(bias(item / q.heads, item % q.heads, query, key)) * log2_of_e<Number>;
        return s;
    }
    /// What a weight is multiplied with.
    __device__ Number mask(index_t item, index_t query, index_t key) const { return static_cast<Number>(dropout.of(item, q.heads).weight(query, key)); }
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
    arithmetic_t<T> *highest, *sum;  // [item][queries]
    arithmetic_t<T>* partial;        // [item][own tokens][value_columns]; null: rows are finished here
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
                    // Biases are not asked for padded tokens, which full chunks may have among their own.
                    const bool allowed = (full && std::is_same_v<Bias, NoBias>) || mask.allows(i, seen);
                    if constexpr (std::is_same_v<Bias, NoBias>) s[i][j] *= op.scale;
                    else if (allowed) {
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
        const bool valid = token < own_length;
        // Padded keys give nothing, but their rows may have teleports to finish with.
        if (Transposed) a.finish.store(item, token, panel + c, valid ? value : Vector<T>{}, true);
        else a.finish.store(item, token, panel + c, value, valid && (a.online ? totals[slot] != 0 : !is_empty(op.logsumexp[row])));
    });
}

inline constexpr index_t no_token = 0x7fffffff;
inline constexpr int edge_warps = 4, edge_threads = 32 * edge_warps;
/// Blocks that a multiprocessor should hold at least: leaves each thread 168 registers, with 128 some architectures spill a few.
inline constexpr int edge_blocks = 3;

/// How a warp walks over 32 edges of a row: eight threads read a row of 16 vectors, two each, so four edges at a time, in eight steps.
template <class T>
struct EdgeWalk {
    using Number = arithmetic_t<T>;
    static constexpr int vector = 16 / sizeof(T), lanes = 8, rows = 32 / lanes, steps = 32 / rows, width = 2 * lanes * vector;

    const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / lanes, part = lane % lanes * vector;

    /// This thread's two vectors of a row, columns [panel, panel + width) of `columns`.
    template <bool checked>
    __device__ void load(Vector<T> (&to)[2], const T* from, index_t panel, index_t columns) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const index_t column = panel + part + i * lanes * vector;
            if (!checked || column < columns) to[i] = load_vector(from + column);
            else to[i] = {};
        }
    }
    /// f(step, other, two vectors of the other's row) for the first `count` edges. `to` is each thread's edge's token.
    template <class F>
    __device__ void for_each(index_t to, int count, const T* values, std::ptrdiff_t stride, index_t panel, index_t columns, F&& f) const {
        if (count == 32 && panel + width <= columns) {
#pragma unroll
            for (int s = 0; s < steps; ++s) {
                Vector<T> value[2];
                load<false>(value, values + __shfl_sync(~0u, to, s * rows + row) * stride, panel, columns);
                f(s, value);
            }
            return;
        }
#pragma unroll
        for (int s = 0; s < steps; ++s) {
            if (s * rows >= count) break;
            const index_t j = __shfl_sync(~0u, to, s * rows + row);
            Vector<T> value[2] = {};
            if (s * rows + row < count) load<true>(value, values + j * stride, panel, columns);
            f(s, value);
        }
    }
    static __device__ void add_product(Number& dot, const Vector<T> (&x)[2], const Vector<T> (&y)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int l = 0; l < vector; ++l) dot += x[i].at[l] * y[i].at[l];
    }
    /// Each thread's edge's sum over the eight threads that hold parts of it: halves are exchanged, so that few shuffles serve all 32 edges.
    __device__ Number collect(Number (&dot)[steps]) const {
#pragma unroll
        for (int width = steps / 2; width > 0; width /= 2)
#pragma unroll
            for (int i = 0; i < width; ++i) {
                const bool upper = (lane & width) != 0;
                const Number keep = upper ? dot[i + width] : dot[i], send = upper ? dot[i] : dot[i + width];
                dot[i] = keep + __shfl_xor_sync(~0u, send, width);
            }
        return __shfl_sync(~0u, dot[0], lane % rows * lanes + lane / rows);
    }
};

template <class T, class Bias>
struct ScoreArguments {
    Operator<T, Bias> op;
    EdgeView edges;
    offset_t edge_count;
    bool online;                     // scores, and highest and sum of each row; else weights
    arithmetic_t<T>* weights;        // [item][edges]
    arithmetic_t<T> *highest, *sum;  // [item][queries]
};

/// Scores of the edges, one row a warp.
template <class T, class Bias>
__global__ void __launch_bounds__(edge_threads, edge_blocks) score_edges(const __grid_constant__ ScoreArguments<T, Bias> a) {
    using Number = arithmetic_t<T>;
    using Walk = EdgeWalk<T>;
    __shared__ typename cub::WarpReduce<Number>::TempStorage reduction[edge_warps];
    const Operator<T, Bias>& op = a.op;
    const Walk walk;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = walk.lane;
    const index_t query = static_cast<index_t>(blockIdx.x) * edge_warps + warp, item = op.first_item + static_cast<index_t>(blockIdx.y), b = item / op.q.heads;
    if (query >= op.queries) return;
    const T *const q = op.q.head(item) + query * op.q.row_stride, *const k = op.k.head(item);
    const offset_t row = offset_t{item} * op.queries + query, begin = a.edges.offsets[query], end = a.edges.offsets[query + 1];
    const index_t key_length = query < op.query_lengths(b) ? op.key_lengths(b) : 0;
    Number* const weights = a.weights + offset_t{item} * a.edge_count;
    const Number reference = a.online ? Number(0) : reference_of(op.logsumexp[row]);
    Number highest = lowest<Number>(), total = 0;
    Vector<T> x[2];
    walk.template load<true>(x, q, 0, op.dim);
    for (offset_t first = begin; first < end; first += 32) {
        const index_t key = first + lane < end ? a.edges.to[first + lane] : op.keys;
        const int count = __popc(__ballot_sync(~0u, key < key_length));  // keys ascend
        if (count == 0) break;
        Number dot[Walk::steps] = {};
        for (index_t panel = 0; panel < op.dim; panel += Walk::width) {
            if (op.dim > Walk::width) walk.template load<true>(x, q, panel, op.dim);
            walk.for_each(key, count, k, op.k.row_stride, panel, op.dim, [&](int s, const Vector<T>(&y)[2]) { Walk::add_product(dot[s], x, y); });
        }
        const Number mine = walk.collect(dot);
        Number score = lane < count ? op.score(mine, item, query, key) : minus_infinity<Number>();
        if (a.online) {
            const Number most = __shfl_sync(~0u, cub::WarpReduce<Number>(reduction[warp]).Reduce(score, [](Number x, Number y) { return y > x ? y : x; }), 0);
            __syncwarp();
            if (most > highest) {
                total *= exp_base2(highest - most);
                highest = most;
            }
            total += __shfl_sync(~0u, cub::WarpReduce<Number>(reduction[warp]).Sum(exp_base2(score - highest)), 0);
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
    using Number = arithmetic_t<T>;
    EdgeView edges;
    offset_t edge_count;
    Number* weights;  // [item][edges]
    bool masks;       // weights are those of A: dropout applies
    bool transposed;
    CallDropout dropout;
    Lengths own_lengths, other_lengths;
    index_t own, heads, first_item;
    Rows<T> values;
    index_t value_columns;
    bool online;                  // weights are scores yet; the row's logsumexp comes from highest and sum
    const Number *highest, *sum;  // [item][own]
    Number* logsumexp;            // [item][own]; null: no row is empty
    const Number* partial;        // [item][own][value_columns]: what tiles made of the row; null for nothing
    Finish<T> finish;
};

/// sum += weights of the edges x rows of values, one row a warp; finishes the row.
template <class T>
__global__ void __launch_bounds__(edge_threads, edge_blocks) apply_edges(const __grid_constant__ EdgeArguments<T> a) {
    using Number = arithmetic_t<T>;
    using Walk = EdgeWalk<T>;
    const Walk walk;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = walk.lane;
    const index_t own = static_cast<index_t>(blockIdx.x) * edge_warps + warp, item = a.first_item + static_cast<index_t>(blockIdx.y), b = item / a.heads;
    if (own >= a.own) return;
    const offset_t row = offset_t{item} * a.own + own, begin = a.edges.offsets[own], end = a.edges.offsets[own + 1];
    const bool valid = own < a.own_lengths(b);
    const index_t other_length = valid ? a.other_lengths(b) : 0;
    Number* const weights = a.weights + offset_t{item} * a.edge_count;
    const T* const values = a.values.head(item);
    bool alive = valid || a.transposed;  // padded keys give nothing, but may have teleports to finish with
    Number logsumexp = 0, of_tiles = 1;
    if (a.online) {
        const Number total = a.sum[row];
        alive = valid && total != 0;
        of_tiles = alive ? Number(1) / total : Number(0);
        logsumexp = alive ? a.highest[row] + log_base2(total) : minus_infinity<Number>();
        if (lane == 0) a.logsumexp[row] = logsumexp;
    } else if (a.logsumexp) alive = valid && !is_empty(a.logsumexp[row]);
    for (index_t panel = 0; panel < a.value_columns; panel += Walk::width) {
        Vector<T> sum[2] = {};
        for (offset_t first = begin; first < end; first += 32) {
            const index_t to = first + lane < end ? a.edges.to[first + lane] : no_token;
            const int count = __popc(__ballot_sync(~0u, to < other_length));  // tokens ascend
            if (count == 0) break;
            Number weight = 0;
            if (lane < count) {
                Number& stored = weights[a.edges.index ? a.edges.index[first + lane] : first + lane];
                weight = stored;
                if (a.online && panel == 0) stored = weight = alive ? exp_base2(weight - logsumexp) : Number(0);
                if (a.masks && a.dropout.drops_weights()) weight *= static_cast<Number>(a.dropout.of(item, a.heads).weight(a.transposed ? to : own, a.transposed ? own : to));
            }
            walk.for_each(to, count, values, a.values.row_stride, panel, a.value_columns, [&](int s, const Vector<T>(&value)[2]) {
                const Number w = __shfl_sync(~0u, weight, s * Walk::rows + walk.row);
#pragma unroll
                for (int i = 0; i < 2; ++i)
#pragma unroll
                    for (int l = 0; l < Walk::vector; ++l) sum[i].at[l] += w * value[i].at[l];
            });
            if (count < 32) break;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int l = 0; l < Walk::vector; ++l) {
                sum[i].at[l] += __shfl_xor_sync(~0u, sum[i].at[l], Walk::lanes);
                sum[i].at[l] += __shfl_xor_sync(~0u, sum[i].at[l], 2 * Walk::lanes);
            }
        // The first two rows of threads store one vector each.
        const index_t column = panel + walk.part + walk.row * Walk::lanes * Walk::vector;
        if (walk.row > 1 || column >= a.value_columns) continue;
        Vector<T> value;
#pragma unroll
        for (int l = 0; l < Walk::vector; ++l) value.at[l] = walk.row == 0 ? sum[0].at[l] : sum[1].at[l];
        if (a.partial && valid) {
            const Vector<T> before = load_numbers<T>(a.partial + row * a.value_columns + column);
#pragma unroll
            for (int l = 0; l < Walk::vector; ++l) value.at[l] += before.at[l] * of_tiles;
        }
        a.finish.store(item, own, column, value, alive);
    }
}

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
