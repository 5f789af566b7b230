#pragma once
// Plans of the patterns that depend on q and k: the device finds groups of tokens, in double and in the CPU's order without contraction, so that they are those of
// the CPU; a copy brings the groups of all heads to the host, which makes plans of them.

#include <polyattn/backend/cuda/clusters.cuh>
#include <polyattn/core/parallel.hpp>
#include <polyattn/policy/pattern/data_dependent.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

inline constexpr int group_threads = 256;

template <class T>
struct HashArguments {
    Rows<T> x;
    Lengths lengths;
    index_t heads, tokens, columns, rounds, half, first_item;
    const double* directions;  // [rounds][half][columns]
    index_t* buckets;          // [items][rounds x tokens], of which an item fills [rounds][its tokens]
};

/// The bucket of a row in a round, a thread each.
template <class T>
__global__ void __launch_bounds__(group_threads) hash_rows(const __grid_constant__ HashArguments<T> a) {
    constexpr int vector = 16 / sizeof(T);
    const offset_t at = offset_t{blockIdx.x} * group_threads + threadIdx.x;
    const index_t item = a.first_item + static_cast<index_t>(blockIdx.y), valid = a.lengths(item / a.heads);
    if (at >= offset_t{a.rounds} * valid) return;
    const T* const row = a.x.head(item) + at % valid * a.x.row_stride;
    const double* direction = a.directions + at / valid * a.half * a.columns;
    double most = 0;
    index_t found = 0;
    for (index_t r = 0; r < a.half; ++r, direction += a.columns) {
        double dot = 0;
        for (index_t c = 0; c < a.columns; c += vector) {
            const Vector<T> x = load_vector(row + c);
#pragma unroll
            for (int l = 0; l < vector; ++l) dot = __dadd_rn(dot, __dmul_rn(direction[c + l], double(x.at[l])));
        }
        if (r == 0 || fabs(dot) > most) {
            most = fabs(dot);
            found = dot >= 0 ? r : a.half + r;
        }
    }
    a.buckets[offset_t{item} * a.rounds * a.tokens + at] = found;
}

/// Tokens of a batch item that both q and k have, and the blocks that they make.
struct TokenBlocks {
    Lengths query_lengths, key_lengths;
    index_t block, most;  // tokens of a block; blocks of an item that is full
    __device__ index_t valid(index_t b) const { return min(query_lengths(b), key_lengths(b)); }
    __device__ index_t count(index_t b) const {
        const index_t tokens = valid(b);
        return tokens / block + (tokens % block != 0);
    }
};

template <class T>
struct BlockMeanArguments {
    Rows<T> x;
    TokenBlocks blocks;
    index_t heads, columns, first_item;
    double* means;  // [items][blocks][columns]
};

/// A column of a block's mean, a thread each.
template <class T>
__global__ void __launch_bounds__(group_threads) block_means(const __grid_constant__ BlockMeanArguments<T> a) {
    const offset_t at = offset_t{blockIdx.x} * group_threads + threadIdx.x;
    const index_t item = a.first_item + static_cast<index_t>(blockIdx.y), b = item / a.heads;
    if (at >= offset_t{a.blocks.count(b)} * a.columns) return;
    const index_t first = static_cast<index_t>(at / a.columns) * a.blocks.block, count = min(a.blocks.block, a.blocks.valid(b) - first);
    double sum = 0;
    for (index_t i = 0; i < count; ++i) sum = __dadd_rn(sum, entry_of(a.x, item, first + i, static_cast<index_t>(at % a.columns)));
    a.means[offset_t{item} * a.blocks.most * a.columns + at] = __ddiv_rn(sum, double(count));
}

template <class Number>
struct BlockProductArguments {
    const Number *q, *k;  // means, of query heads and of key heads
    TokenBlocks blocks;
    index_t heads, key_heads, columns, first_item;
    Number temperature;
    Number* products;  // [items][blocks x blocks], of which an item fills [its blocks][its blocks]
};

/// The product of a query block's mean and a key block's, a thread each.
template <class Number>
__global__ void __launch_bounds__(group_threads) multiply_blocks(const __grid_constant__ BlockProductArguments<Number> a) {
    const offset_t at = offset_t{blockIdx.x} * group_threads + threadIdx.x;
    const index_t item = a.first_item + static_cast<index_t>(blockIdx.y), b = item / a.heads, count = a.blocks.count(b);
    if (at >= offset_t{count} * count) return;
    const offset_t of_item = offset_t{a.blocks.most} * a.columns;
    const Number* const q = a.q + item * of_item + at / count * a.columns;
    const Number* const k = a.k + (offset_t{b} * a.key_heads + item % a.heads / (a.heads / a.key_heads)) * of_item + at % count * a.columns;
    Number product = 0;
    for (index_t c = 0; c < a.columns; ++c) product = __dadd_rn(product, __dmul_rn(q[c], k[c]));
    a.products[offset_t{item} * a.blocks.most * a.blocks.most + at] = __ddiv_rn(product, a.temperature);
}

/// What the device found, on the host: one copy, for which the stream is waited for.
template <class T>
std::vector<T> copy_to_host(const T* from, offset_t count, cudaStream_t stream) {
    std::vector<T> to(static_cast<std::size_t>(count));
    check_cuda(cudaMemcpyAsync(to.data(), from, to.size() * sizeof(T), cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync of groups");
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    return to;
}
/// plan(batch, head) of every item.
template <class F>
std::vector<Plan> plans_of_items(index_t batch, index_t heads, F&& plan) {
    std::vector<Plan> plans(static_cast<std::size_t>(offset_t{batch} * heads));
    parallel_for(static_cast<offset_t>(plans.size()), [&](offset_t item, int) { plans[static_cast<std::size_t>(item)] = plan(static_cast<index_t>(item / heads), static_cast<index_t>(item % heads)); });
    return plans;
}

/// The group of each query and key: numbers [query items][rounds x queries], then [key items][rounds x keys].
template <class T>
class TokenGroups {
public:
    TokenGroups(Carver& carver, const OperatorCall<T>& call, index_t rounds)
        : of_query_(offset_t{rounds} * call.queries), of_key_(offset_t{rounds} * call.keys), rounds_(rounds), numbers_(carver.template take<index_t>(size(call))) {}

    index_t* of_queries() const { return numbers_; }
    index_t* of_keys(const OperatorCall<T>& call) const { return numbers_ + call.items() * of_query_; }

    /// plan(groups of an item's valid queries, of its valid keys, round by round).
    template <class Valid, class F>
    std::vector<Plan> plans(const OperatorCall<T>& call, const Valid& valid, F&& plan) const {
        const std::vector<index_t> found = copy_to_host(numbers_, size(call), call.stream);
        const auto part = [&](offset_t first, index_t tokens) { return std::span(found).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(offset_t{rounds_} * tokens)); };
        return plans_of_items(call.batch, call.heads, [&](index_t b, index_t h) {
            const auto [queries, keys] = valid(b);
            return plan(part((offset_t{b} * call.heads + h) * of_query_, queries), part(call.items() * of_query_ + (offset_t{b} * call.key_heads + h / call.group()) * of_key_, keys));
        });
    }

private:
    offset_t size(const OperatorCall<T>& call) const { return call.items() * of_query_ + offset_t{call.batch} * call.key_heads * of_key_; }

    offset_t of_query_, of_key_;  // numbers of an item
    index_t rounds_;
    index_t* numbers_;
};

/// Rows of key heads, without the query heads that share them.
template <class T>
Rows<T> of_key_heads(const OperatorCall<T>& call) {
    Rows<T> rows = call.k;
    rows.heads = call.key_heads;
    rows.group = 1;
    return rows;
}

// plans_on_device(carver, pattern, call, valid): the plans of all heads of a call; valid(batch item) are its numbers of queries and keys. The carver may only count.

template <class T, class Valid>
std::vector<Plan> plans_on_device(Carver& carver, const LocalitySensitiveHashing& pattern, const OperatorCall<T>& call, const Valid& valid) {
    const index_t columns = padded<T>(call.dim), half = pattern.buckets / 2;
    const TokenGroups<T> groups(carver, call, pattern.rounds);
    double* const directions = carver.template take<double>(offset_t{pattern.rounds} * half * columns);
    if (carver.counts() || call.items() == 0) return {};
    std::vector<double> drawn(static_cast<std::size_t>(offset_t{pattern.rounds} * half * columns), 0.);
    for (index_t round = 0; round < pattern.rounds; ++round) {
        const std::vector<double> of_round = pattern.directions(round, call.dim);
        for (index_t r = 0; r < half; ++r)
            std::copy_n(of_round.begin() + offset_t{r} * call.dim, call.dim, drawn.begin() + (offset_t{round} * half + r) * columns);
    }
    check_cuda(cudaMemcpyAsync(directions, drawn.data(), drawn.size() * sizeof(double), cudaMemcpyHostToDevice, call.stream), "cudaMemcpyAsync of directions");
    const auto hash = [&](const Rows<T>& x, Lengths lengths, index_t heads, index_t tokens, index_t* buckets) {
        HashArguments<T> arguments{x, lengths, heads, tokens, columns, pattern.rounds, half, 0, directions, buckets};
        if (tokens == 0) return;
        for_each_grid(0, call.batch * heads, [&](index_t item, unsigned count) {
            arguments.first_item = item;
            launch("hash_rows", hash_rows<T>, dim3(blocks_for(offset_t{pattern.rounds} * tokens, group_threads), count), group_threads, 0, call.stream, arguments);
        });
    };
    hash(call.q, call.query_lengths, call.heads, call.queries, groups.of_queries());
    hash(of_key_heads(call), call.key_lengths, call.key_heads, call.keys, groups.of_keys(call));
    return groups.plans(call, valid, [&](std::span<const index_t> of_query, std::span<const index_t> of_key) { return pattern.plan_of(of_query, of_key, call.queries, call.keys); });
}

template <class T, class Valid>
std::vector<Plan> plans_on_device(Carver& carver, const RoutedClusters& pattern, const OperatorCall<T>& call, const Valid& valid) {
    const TokenGroups<T> groups(carver, call, 1);
    const DeviceClusters<T> clusters(carver, call.batch, call.key_heads, call.keys, std::min(pattern.clusters, call.keys), padded<T>(call.dim), groups.of_keys(call));
    if (carver.counts() || call.items() == 0) return {};
    const ClusteredRows<T> queries{call.q, call.query_lengths, call.heads, call.queries, groups.of_queries(), nullptr};
    clusters.find(of_key_heads(call), call.key_lengths, pattern.iterations, call.stream, &queries);
    return groups.plans(call, valid, [&](std::span<const index_t> of_query, std::span<const index_t> of_key) { return pattern.plan_of(of_query, of_key, call.queries, call.keys); });
}

template <class T, class Valid>
std::vector<Plan> plans_on_device(Carver& carver, const SinkhornBlocks& pattern, const OperatorCall<T>& call, const Valid& valid) {
    if (call.items() == 0) return {};
    require_square("SinkhornBlocks", call.queries, call.keys);
    const TokenBlocks blocks{call.query_lengths, call.key_lengths, pattern.block, segments(call.keys, pattern.block)};
    const index_t columns = padded<T>(call.dim);
    const offset_t key_items = offset_t{call.batch} * call.key_heads, pairs = offset_t{blocks.most} * blocks.most;
    double* const products = carver.template take<double>(call.items() * pairs);
    double* const q_means = carver.template take<double>(offset_t{call.items()} * blocks.most * columns);
    double* const k_means = carver.template take<double>(key_items * blocks.most * columns);
    if (carver.counts()) return {};
    const auto make_means = [&](const Rows<T>& x, index_t heads, double* to) {
        BlockMeanArguments<T> arguments{x, blocks, heads, columns, 0, to};
        for_each_grid(0, call.batch * heads, [&](index_t item, unsigned count) {
            arguments.first_item = item;
            launch("block_means", block_means<T>, dim3(blocks_for(offset_t{blocks.most} * columns, group_threads), count), group_threads, 0, call.stream, arguments);
        });
    };
    if (pairs > 0) {
        make_means(call.q, call.heads, q_means);
        make_means(of_key_heads(call), call.key_heads, k_means);
        BlockProductArguments<double> arguments{q_means, k_means, blocks, call.heads, call.key_heads, columns, 0, pattern.temperature, products};
        for_each_grid(0, call.items(), [&](index_t item, unsigned count) {
            arguments.first_item = item;
            launch("multiply_blocks", multiply_blocks<double>, dim3(blocks_for(pairs, group_threads), count), group_threads, 0, call.stream, arguments);
        });
    }
    const std::vector<double> found = copy_to_host(products, call.items() * pairs, call.stream);
    return plans_of_items(call.batch, call.heads, [&](index_t b, index_t h) {
        const auto [queries, keys] = valid(b);
        const index_t tokens = std::min(queries, keys);
        const offset_t own = segments(tokens, pattern.block);
        const auto first = found.begin() + (offset_t{b} * call.heads + h) * pairs;
        return pattern.plan_of({first, first + own * own}, tokens, call.keys);
    });
}

/// Patterns that depend on q and k and whose groups the device finds.
template <class P>
concept GroupedOnDevice = requires(Carver& carver, const P& pattern, const OperatorCall<float>& call, std::pair<index_t, index_t> (&valid)(index_t)) { plans_on_device(carver, pattern, call, valid); };

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
