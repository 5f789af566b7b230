#pragma once
// Tiles of few own tokens that see long sequences, such as global tokens: one block works on one own token, so that all of them are worked on at
// once. Its warps take 32 others in turn, each with a state of its own, and the states are merged at the end in a fixed order.

#include <polyattn/backend/cuda/sparse_softmax_gradient.cuh>

#include <cub/block/block_reduce.cuh>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// Two blocks fit on a multiprocessor and leave each thread 168 registers: a thread reads parts of 8 rows at once, for which the 128 of 8 warps are too few.
inline constexpr int single_warps = 6, single_threads = 32 * single_warps, single_blocks = 2;

struct SingleSlot {
    static constexpr int count = 1;
    static __device__ int slot(int) { return 0; }
};

template <class Number, class Reduction>
__device__ Number reduce_block(Number value, Reduction reduction) {
    using Reduce = cub::BlockReduce<Number, single_threads>;
    __shared__ typename Reduce::TempStorage memory;
    __shared__ Number result;
    value = Reduce(memory).Reduce(value, reduction);
    if (threadIdx.x == 0) result = value;
    __syncthreads();
    return result;
}

/// f(other, count) for each 32 positions of this warp among which there are others: the pairs that exist are those of the first `count` threads.
template <class T, bool Transposed, class F>
__device__ void for_each_other(const PlanView& plan, const DeviceGroup& group, index_t own_length, index_t other_length, F&& f) {
    __shared__ index_t found[single_warps][32];
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    for (index_t g = group.first_segment; g < group.last_segment; ++g) {
        const Segment segment = plan.segments[g];
        const PairMask<T, Transposed, SingleSlot> mask(plan, plan.tiles[segment.tile], segment, group, {group.first, nullptr}, own_length, other_length);
        for (index_t begin = segment.begin + 32 * warp; begin < segment.end; begin += single_threads) {
            const bool exists = mask.allows(0, mask.column(begin, lane));
            const unsigned all = __ballot_sync(~0u, exists);
            if (all == 0) continue;
            index_t other = exists ? mask.others()[begin + lane] : no_token;
            if (all & (all + 1)) {  // gaps
                if (exists) found[warp][__popc(all & ((1u << lane) - 1))] = other;
                __syncwarp();
                other = lane < __popc(all) ? found[warp][lane] : no_token;
                __syncwarp();
            }
            f(other, __popc(all));
        }
    }
}

/// dot += own row x the others' rows.
template <class T>
__device__ void add_products(const EdgeWalk<T>& walk, arithmetic_t<T> (&dot)[EdgeWalk<T>::steps], const T* own, index_t to, int count, const T* others, std::ptrdiff_t stride, index_t columns) {
    for (index_t panel = 0; panel < columns; panel += EdgeWalk<T>::width) {
        Vector<T> x[2];
        walk.template load<true>(x, own, panel, columns);
        walk.for_each(to, count, others, stride, panel, columns, [&](int s, const Vector<T>(&y)[2]) { EdgeWalk<T>::add_product(dot[s], x, y); });
    }
}
/// sum += weights x the others' rows, one panel; each thread has the weight of its other.
template <class T>
__device__ void add_weighted(const EdgeWalk<T>& walk, Vector<T> (&sum)[2], arithmetic_t<T> weight, index_t to, int count, const T* others, std::ptrdiff_t stride, index_t panel, index_t columns) {
    walk.for_each(to, count, others, stride, panel, columns, [&](int s, const Vector<T>(&value)[2]) {
        const arithmetic_t<T> w = __shfl_sync(~0u, weight, s * EdgeWalk<T>::rows + walk.row);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int l = 0; l < EdgeWalk<T>::vector; ++l) sum[i].at[l] += w * value[i].at[l];
    });
}
template <class T>
__device__ void scale(Vector<T> (&sum)[2], arithmetic_t<T> factor) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int l = 0; l < EdgeWalk<T>::vector; ++l) sum[i].at[l] *= factor;
}

/// What came before, as the first warp's sum; all others begin with 0.
template <class T>
__device__ void begin_sum(const EdgeWalk<T>& walk, Vector<T> (&sum)[2], const arithmetic_t<T>* before, index_t panel, index_t columns) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        sum[i] = {};
        const index_t column = panel + walk.part + i * EdgeWalk<T>::lanes * EdgeWalk<T>::vector;
        if (before && static_cast<int>(threadIdx.x) < EdgeWalk<T>::lanes && column < columns) sum[i] = load_numbers<T>(before + column);
    }
}
/// f(column, vector) with the sums over all warps.
template <class T, class F>
__device__ void end_sum(const EdgeWalk<T>& walk, Vector<T> (&sum)[2], index_t panel, index_t columns, F&& f) {
    using Walk = EdgeWalk<T>;
    __shared__ __align__(16) arithmetic_t<T> sums[single_warps][Walk::width];
    const int column = static_cast<int>(threadIdx.x) * Walk::vector;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int l = 0; l < Walk::vector; ++l) {
            sum[i].at[l] += __shfl_xor_sync(~0u, sum[i].at[l], Walk::lanes);
            sum[i].at[l] += __shfl_xor_sync(~0u, sum[i].at[l], 2 * Walk::lanes);
        }
        if (walk.row == i) store_numbers<T>(&sums[threadIdx.x / 32][walk.part + i * Walk::lanes * Walk::vector], sum[i]);
    }
    __syncthreads();
    if (column >= Walk::width || panel + column >= columns) return;
    Vector<T> all{};
    for (int warp = 0; warp < single_warps; ++warp) {
        const Vector<T> one = load_numbers<T>(&sums[warp][column]);
#pragma unroll
        for (int l = 0; l < Walk::vector; ++l) all.at[l] += one.at[l];
    }
    f(panel + column, all);
}

/// apply_tiles() for a group of one token; panels are EdgeWalk<T>::width wide.
template <class T, class Bias, bool Transposed>
__global__ void __launch_bounds__(single_threads, single_blocks) apply_single_rows(const __grid_constant__ TileArguments<T, Bias> a) {
    using Number = arithmetic_t<T>;
    using Walk = EdgeWalk<T>;
    const Operator<T, Bias>& op = a.op;
    const Walk walk;
    const DeviceGroup group = a.plan.groups[a.first_group + static_cast<index_t>(blockIdx.x)];
    const index_t token = group.first, item = op.first_item + static_cast<index_t>(blockIdx.y), b = item / op.q.heads, panel = (a.first_panel + static_cast<index_t>(blockIdx.z)) * Walk::width;
    const Rows<T>&own = Transposed ? op.k : op.q, &other = Transposed ? op.q : op.k;
    const index_t own_length = Transposed ? op.key_lengths(b) : op.query_lengths(b), other_length = Transposed ? op.query_lengths(b) : op.key_lengths(b);
    const offset_t row = offset_t{item} * (Transposed ? op.keys : op.queries) + token;
    const T *const own_row = own.head(item) + token * own.row_stride, *const other_head = other.head(item), *const value_head = a.values.head(item);
    const auto known = [&](index_t query) { return reference_of(op.logsumexp[offset_t{item} * op.queries + query]); };
    const bool valid = token < own_length, online = !Transposed && a.online;

    Number highest = lowest<Number>(), total = 0;
    if (online && a.begins_state) {
        highest = a.highest[row];
        if (threadIdx.x == 0) total = a.sum[row];
    } else if (!Transposed && !online) highest = known(token);
    Vector<T> sum[2];
    begin_sum(walk, sum, a.continues ? a.partial + row * a.value_columns : nullptr, panel, a.value_columns);
    if (valid)
        for_each_other<T, Transposed>(a.plan, group, own_length, other_length, [&](index_t to, int count) {
            Number dot[Walk::steps] = {};
            add_products(walk, dot, own_row, to, count, other_head, other.row_stride, op.dim);
            const Number product = walk.collect(dot);
            const index_t query = Transposed ? to : token, key = Transposed ? token : to;
            const bool there = walk.lane < count;
            const Number score = there ? op.score(product, item, query, key) : minus_infinity<Number>();
            if (online && __any_sync(~0u, score > highest)) {
                Number most = largest_of_row(score);
                const Number rest = __shfl_xor_sync(~0u, most, 16);
                most = rest > most ? rest : most;
                const Number shrink = exp_base2(highest - most);
                total *= shrink;
                scale(sum, shrink);
                highest = most;
            }
            Number weight = 0;
            if (there) weight = exp_base2(score - (Transposed ? known(to) : highest));
            total += weight;
            if (there && op.dropout.drops_weights()) weight *= op.mask(item, query, key);
            add_weighted(walk, sum, weight, to, count, value_head, a.values.row_stride, panel, a.value_columns);
        });

    bool alive = valid || Transposed;  // padded keys give nothing, but may have teleports to finish with
    if (online) {
        const Number most = reduce_block(highest, [](Number x, Number y) { return y > x ? y : x; }), shrink = exp_base2(highest - most);
        total = reduce_block(total * shrink, [](Number x, Number y) { return x + y; });
        if (!valid) total = 0;
        alive = total != 0;
        scale(sum, a.partial ? shrink : shrink / total);
        if (threadIdx.x == 0 && a.stores_state && blockIdx.z == 0) {
            if (a.partial) {
                a.highest[row] = most;
                a.sum[row] = total;
            } else op.logsumexp[row] = alive ? most + log_base2(total) : minus_infinity<Number>();
        }
    } else if (!Transposed && valid) alive = !is_empty(op.logsumexp[row]);
    end_sum(walk, sum, panel, a.value_columns, [&](index_t column, const Vector<T>& value) {
        if (a.partial) store_numbers<T>(a.partial + row * a.value_columns + column, value);
        else a.finish.store(item, token, column, value, alive);
    });
}

/// gradient_tiles() for a group of one token.
template <class T, class Bias, bool Transposed>
__global__ void __launch_bounds__(single_threads, single_blocks) gradient_single_rows(const __grid_constant__ TileGradientArguments<T, Bias> a) {
    using Walk = EdgeWalk<T>;
    const Operator<T, Bias>& op = a.op;
    const Hops<T>& hops = a.hops;
    const Walk walk;
    const DeviceGroup group = a.plan.groups[a.first_group + static_cast<index_t>(blockIdx.x)];
    const index_t token = group.first, item = op.first_item + static_cast<index_t>(blockIdx.y), b = item / op.q.heads, panel = static_cast<index_t>(blockIdx.z) * Walk::width;
    const Rows<T>&own = Transposed ? op.k : op.q, &other = Transposed ? op.q : op.k;
    const index_t own_length = Transposed ? op.key_lengths(b) : op.query_lengths(b), other_length = Transposed ? op.query_lengths(b) : op.key_lengths(b);
    const T *const own_row = own.head(item) + token * own.row_stride, *const other_head = other.head(item);
    T* const partial = a.partial ? a.partial + (offset_t{item} * (Transposed ? op.keys : op.queries) + token) * op.dim : nullptr;

    Vector<T> sum[2];
    begin_sum(walk, sum, a.continues ? partial : nullptr, panel, op.dim);
    if (token < own_length)
        for_each_other<T, Transposed>(a.plan, group, own_length, other_length, [&](index_t to, int count) {
            T d_weights[Walk::steps] = {}, products[Walk::steps] = {};
            for (int hop = 0; hop < hops.count; ++hop) {
                const T *const h = hops.h_of(item, hop), *const z = hops.z_of(item, hop);
                if constexpr (Transposed) add_products(walk, d_weights, z + token * hops.z_stride(hop), to, count, h, hops.columns, hops.columns);
                else add_products(walk, d_weights, h + offset_t{token} * hops.columns, to, count, z, hops.z_stride(hop), hops.columns);
            }
            T d_score = walk.collect(d_weights);
            add_products(walk, products, own_row, to, count, other_head, other.row_stride, op.dim);
            const T product = walk.collect(products);
            if (walk.lane < count) {
                const index_t query = Transposed ? to : token, key = Transposed ? token : to;
                const offset_t row = offset_t{item} * op.queries + query;
                if (op.dropout.drops_weights()) d_score *= op.mask(item, query, key);
                d_score = exp_base2(op.score(product, item, query, key) - reference_of(op.logsumexp[row])) * (d_score - hops.row_sums[row]);
                if constexpr (!Transposed && LearnedDeviceBias<Bias>)
                    if (blockIdx.z == 0) a.bias_sums.add(op.bias.entry(b, item % op.q.heads, query, key), double(d_score));
            } else d_score = 0;
            add_weighted(walk, sum, d_score, to, count, other_head, other.row_stride, panel, op.dim);
        });
    end_sum(walk, sum, panel, op.dim, [&](index_t column, const Vector<T>& value) {
        if (partial) store_vector(partial + column, value);
        else a.finish.store(item, token, column, value, true);
    });
}

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
