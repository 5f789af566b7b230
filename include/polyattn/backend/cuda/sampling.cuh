#pragma once
// Random graphs, edge lists and samplers' draws, made where they are used and bit for bit those of the CPU. All of it is Thrust, so other device
// systems than CUDA (THRUST_DEVICE_SYSTEM: CPP, OMP) run it too, built without nvcc. Everything runs on the default stream and is done on return,
// and the device system does not change the results. Scratch and results are allocated by Thrust, which throws when there is no memory.

#include <polyattn/policy/pattern/random.hpp>
#include <polyattn/policy/sampler/sampler.hpp>

#include <thrust/binary_search.h>
#include <thrust/copy.h>
#include <thrust/device_vector.h>
#include <thrust/execution_policy.h>
#include <thrust/fill.h>
#include <thrust/for_each.h>
#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>
#include <thrust/sequence.h>
#include <thrust/sort.h>
#include <thrust/tabulate.h>
#include <thrust/transform.h>
#include <thrust/unique.h>

#include <algorithm>

POLYATTN_BEGIN_NAMESPACE

/// Edges on the device. Unlike Edges, there are always rows + 1 offsets.
struct CudaEdges {
    thrust::device_vector<offset_t> offsets;
    thrust::device_vector<index_t> keys;

    /// A copy for PlanBuilder::edges.
    Edges to_host() const {
        Edges edges{std::vector<offset_t>(offsets.size()), std::vector<index_t>(keys.size())};
        thrust::copy(offsets.begin(), offsets.end(), edges.offsets.begin());
        thrust::copy(keys.begin(), keys.end(), edges.keys.begin());
        return edges;
    }
};

/// TransposedEdges on the device.
struct CudaTransposedEdges {
    thrust::device_vector<offset_t> offsets;  // keys + 1
    thrust::device_vector<index_t> queries;   // ascending within a key
    thrust::device_vector<offset_t> forward;
};

namespace detail::cuda {

template <class T>
T* raw(thrust::device_vector<T>& vector) {
    return thrust::raw_pointer_cast(vector.data());
}
template <class T>
const T* raw(const thrust::device_vector<T>& vector) {
    return thrust::raw_pointer_cast(vector.data());
}

/// A set of numbers as an ascending list, in memory with room for them.
struct SortedNumbers {
    index_t* numbers;
    index_t size;

    POLYATTN_HOST_DEVICE bool operator()(index_t number) {
        index_t at = 0, end = size;
        while (at < end) {
            const index_t middle = at + (end - at) / 2;
            if (numbers[middle] < number) at = middle + 1;
            else end = middle;
        }
        if (at < size && numbers[at] == number) return false;
        for (index_t i = size; i > at; --i) numbers[i] = numbers[i - 1];
        numbers[at] = number;
        ++size;
        return true;
    }
};
/// A set of numbers as bits.
struct NumberBits {
    std::uint32_t* words;

    POLYATTN_HOST_DEVICE bool operator()(index_t number) {
        const std::uint32_t bit = 1u << number % 32;
        if (words[number / 32] & bit) return false;
        words[number / 32] |= bit;
        return true;
    }
};
POLYATTN_HOST_DEVICE constexpr offset_t words_of(index_t numbers) { return (offset_t{numbers} + 31) / 32; }

/// RandomRow::distinct, count <= bound. Long draws need `bits`, zeros for all numbers below bound, which are zeros again afterwards.
POLYATTN_HOST_DEVICE inline void draw_distinct(RandomRow random, index_t bound, index_t count, std::uint32_t* bits, index_t* out) {
    if (count == bound) {
        for (index_t number = 0; number < bound; ++number) out[number] = number;
    } else if (!bits) {
        random.insert_distinct(bound, count, SortedNumbers{out, 0});
    } else {
        random.insert_distinct(bound, count, NumberBits{bits});
        for (offset_t word = 0; word < words_of(bound); ++word) {
            offset_t number = 32 * word;
            for (std::uint32_t rest = bits[word]; rest; rest >>= 1, ++number)
                if (rest & 1) *out++ = static_cast<index_t>(number);
            bits[word] = 0;
        }
    }
}

/// Edges of RandomTokens before a row. Rows before the first key have all keys to choose from, the others all but their own.
struct TokenOffset {
    index_t outside, count_outside, count;

    POLYATTN_HOST_DEVICE offset_t operator()(offset_t row) const {
        const offset_t before = row < outside ? row : outside;
        return before * count_outside + (row - before) * count;
    }
};
struct DrawTokens {
    std::uint64_t seed;
    index_t queries, keys;
    offset_t first, words;  // first row of this batch; words of its bits for each row
    const offset_t* offsets;
    index_t* edges;
    std::uint32_t* bits;

    POLYATTN_HOST_DEVICE void operator()(offset_t row_of_batch) const {
        const offset_t row = first + row_of_batch, self = row + keys - queries;
        const bool inside = self >= 0;
        index_t* const out = edges + offsets[row];
        const auto count = static_cast<index_t>(offsets[row + 1] - offsets[row]);
        const RandomRow random(seed, static_cast<std::uint32_t>(self), random_stream::random_tokens);
        draw_distinct(random, inside ? keys - 1 : keys, count, bits ? bits + row_of_batch * words : nullptr, out);
        if (!inside) return;
        for (index_t i = 0; i < count; ++i)
            if (out[i] >= self) ++out[i];
    }
};

struct DrawSources {
    RandomRow random;
    index_t keys, count;
    std::uint32_t* bits;
    index_t* out;

    POLYATTN_HOST_DEVICE void operator()(offset_t) const { draw_distinct(random, keys, count, bits, out); }
};

/// A pair as one number that sorts by row, then by key.
struct JoinPair {
    POLYATTN_HOST_DEVICE std::uint64_t operator()(index_t row, index_t key) const { return std::uint64_t{static_cast<std::uint32_t>(row)} << 32 | static_cast<std::uint32_t>(key); }
};
struct KeyOfPair {
    POLYATTN_HOST_DEVICE index_t operator()(std::uint64_t pair) const { return static_cast<index_t>(static_cast<std::uint32_t>(pair)); }
};
struct FirstOfRow {
    POLYATTN_HOST_DEVICE std::uint64_t operator()(index_t row) const { return JoinPair()(row, 0); }
};

/// Places of four tokens, those of one call of Philox.
struct PlaceTokens {
    std::uint64_t seed;
    std::uint32_t line, stream, hash;
    NoisyPlace place;
    index_t count;
    const std::int32_t* quantiles;
    const std::int32_t* slopes;
    std::int64_t* places;

    POLYATTN_HOST_DEVICE void operator()(std::uint32_t four) const {
        std::uint32_t words[4] = {four, line, stream, hash};
        philox_rounds(words, static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
        const auto first = static_cast<index_t>(4 * four);
        for (index_t i = 0; i < 4 && i < count - first; ++i) places[first + i] = place(first + i, words[i], quantiles, slopes);
    }
};

/// detail::NoisyOrder on the device.
class DeviceNoisyOrder {
public:
    DeviceNoisyOrder(const Draw& draw, std::uint32_t stream, double sigma)
        : seed_(draw.seed), stream_(stream), hash_(draw.hash()), place_(sigma), quantiles_(normal_quantiles.begin(), normal_quantiles.end()), slopes_(normal_slopes.begin(), normal_slopes.end()) {}

    thrust::device_vector<index_t> operator()(index_t count, std::uint32_t line) const {
        thrust::device_vector<index_t> order(static_cast<std::size_t>(count));
        thrust::sequence(order.begin(), order.end());
        if (!place_.moves()) return order;
        thrust::device_vector<std::int64_t> places(order.size());
        const PlaceTokens place{seed_, line, stream_, hash_, place_, count, raw(quantiles_), raw(slopes_), raw(places)};
        thrust::for_each_n(thrust::device, thrust::counting_iterator<std::uint32_t>(0), (offset_t{count} + 3) / 4, place);
        thrust::stable_sort_by_key(places.begin(), places.end(), order.begin());
        return order;
    }

private:
    std::uint64_t seed_;
    std::uint32_t stream_, hash_;
    NoisyPlace place_;
    thrust::device_vector<std::int32_t> quantiles_, slopes_;
};

}  // namespace detail::cuda

/// The edges of pattern.plan(queries, keys), (queries + 1) offsets and the keys of each row in ascending order.
/// Throws invalid_input for numbers below 0.
/// One thread draws a row: O(count^2) steps up to RandomRow::longest_sorted numbers, beyond O(count + keys) with scratch of at most the edges' size
/// (or one row's). Source: Diffuser (AAAI 2023), section "random attention"; distinct numbers: Floyd (CACM 30(9), 1987).
inline CudaEdges random_tokens_on_device(const RandomTokens& pattern, index_t queries, index_t keys) {
    pattern.validate();
    detail::require(queries >= 0, "queries", "a number >= 0", queries);
    detail::require(keys >= 0, "keys", "a number >= 0", keys);
    const detail::cuda::TokenOffset offset{std::max(queries - keys, index_t{0}), std::min(pattern.count, keys), std::min(pattern.count, std::max(keys - 1, index_t{0}))};
    const offset_t total = offset(queries);
    CudaEdges edges{thrust::device_vector<offset_t>(static_cast<std::size_t>(queries) + 1), thrust::device_vector<index_t>(static_cast<std::size_t>(total))};
    thrust::tabulate(edges.offsets.begin(), edges.offsets.end(), offset);
    const bool sorts = pattern.count <= RandomRow::longest_sorted;
    const offset_t words = sorts ? 0 : detail::cuda::words_of(keys);
    const offset_t batch = words == 0 ? offset_t{queries} : std::clamp(total / words, offset_t{1}, std::max(offset_t{queries}, offset_t{1}));
    thrust::device_vector<std::uint32_t> bits(static_cast<std::size_t>(batch * words), 0u);
    for (offset_t first = 0; first < queries; first += batch)
        thrust::for_each_n(thrust::device, thrust::counting_iterator<offset_t>(0), std::min(batch, queries - first),
                           detail::cuda::DrawTokens{pattern.seed, queries, keys, first, words, detail::cuda::raw(edges.offsets), detail::cuda::raw(edges.keys),
                                                    words == 0 ? nullptr : detail::cuda::raw(bits)});
    return edges;
}

/// Pairs (rows[p], keys[p]) in any order, repeats allowed, to sorted unique rows: detail::edges_from_pairs. Keys must be >= 0.
/// Throws invalid_input if there are not as many keys as rows, or a row is not one of [0, queries).
/// O(pairs) for a radix sort of 64-bit numbers, O(queries log pairs) for the offsets.
inline CudaEdges edges_from_pairs_on_device(const thrust::device_vector<index_t>& rows, const thrust::device_vector<index_t>& keys, index_t queries) {
    detail::require(queries >= 0, "queries", "a number >= 0", queries);
    detail::require(rows.size() == keys.size(), "keys of pairs", [&] { return detail::text("one for each of ", rows.size(), " rows"); }, keys.size());
    thrust::device_vector<std::uint64_t> pairs(rows.size());
    thrust::transform(rows.begin(), rows.end(), keys.begin(), pairs.begin(), detail::cuda::JoinPair());
    thrust::sort(pairs.begin(), pairs.end());
    if (!pairs.empty()) {
        // A row below 0 became one of the largest.
        const std::uint64_t last = pairs.back();
        const auto row = static_cast<index_t>(static_cast<std::uint32_t>(last >> 32));
        detail::require(row >= 0 && row < queries, "rows of pairs", [&] { return detail::text("indices of [0, ", queries, ")"); }, row);
    }
    pairs.erase(thrust::unique(pairs.begin(), pairs.end()), pairs.end());
    CudaEdges edges{thrust::device_vector<offset_t>(static_cast<std::size_t>(queries) + 1), thrust::device_vector<index_t>(pairs.size())};
    thrust::transform(pairs.begin(), pairs.end(), edges.keys.begin(), detail::cuda::KeyOfPair());
    const auto first = thrust::make_transform_iterator(thrust::counting_iterator<index_t>(0), detail::cuda::FirstOfRow());
    thrust::lower_bound(pairs.begin(), pairs.end(), first, first + edges.offsets.size(), edges.offsets.begin());
    return edges;
}

/// Edges by key: TransposedEdges of a plan with these edges. The edges' keys must lie in [0, keys).
/// Throws invalid_input if keys < 0. O(edges) for a radix sort, O((edges + keys) log edges) for the rows and the offsets.
inline CudaTransposedEdges transpose_on_device(const CudaEdges& edges, index_t keys) {
    detail::require(keys >= 0, "keys", "a number >= 0", keys);
    const std::size_t count = edges.keys.size();
    CudaTransposedEdges transposed{thrust::device_vector<offset_t>(static_cast<std::size_t>(keys) + 1), thrust::device_vector<index_t>(count), thrust::device_vector<offset_t>(count)};
    if (count == 0) return transposed;
    thrust::device_vector<index_t> sorted = edges.keys;
    thrust::sequence(transposed.forward.begin(), transposed.forward.end());
    thrust::stable_sort_by_key(sorted.begin(), sorted.end(), transposed.forward.begin());
    const thrust::counting_iterator<index_t> key(0);
    thrust::lower_bound(sorted.begin(), sorted.end(), key, key + transposed.offsets.size(), transposed.offsets.begin());
    // As many rows end before an edge as there are rows before its own.
    thrust::upper_bound(edges.offsets.begin() + 1, edges.offsets.end(), transposed.forward.begin(), transposed.forward.end(), transposed.queries.begin());
    return transposed;
}

/// The stable order of i + noise_i, i < count: slot -> source, `count` numbers; detail::NoisyOrder. The noise is normal with deviation
/// `sigma_in_tokens`; infinite_sigma: all orders are equally likely. A pure function of the arguments. O(count), a radix sort of 64-bit numbers.
/// Throws invalid_input if count < 0. Source: SSA (KDD 2023), section 3.2.
inline thrust::device_vector<index_t> noisy_order_on_device(const Draw& draw, std::uint32_t stream, double sigma_in_tokens, index_t count, std::uint32_t line) {
    detail::require(count >= 0, "count", "a number >= 0", count);
    return detail::cuda::DeviceNoisyOrder(draw, stream, sigma_in_tokens)(count, line);
}

/// The keys that all queries see under Unbiased, ascending: kept(keys) numbers. A sampler with per_item: of batch item `item`, `keys` its own number.
/// Throws invalid_input for invalid arguments. One thread draws, O(keys). Source: SSA (KDD 2023), section 3.1.
inline thrust::device_vector<index_t> unbiased_sources_on_device(const Unbiased& sampler, index_t keys, const Draw& draw, index_t item = 0) {
    sampler.validate();
    detail::require(keys >= 0, "keys", "a number >= 0", keys);
    const index_t count = sampler.kept(keys);
    thrust::device_vector<index_t> sources(static_cast<std::size_t>(count));
    thrust::device_vector<std::uint32_t> bits(static_cast<std::size_t>(detail::cuda::words_of(keys)), 0u);
    const RandomRow random(draw.seed, static_cast<std::uint32_t>(item), random_stream::sampled_keys, draw.hash());
    thrust::for_each_n(thrust::device, thrust::counting_iterator<offset_t>(0), 1, detail::cuda::DrawSources{random, keys, count, detail::cuda::raw(bits), detail::cuda::raw(sources)});
    return sources;
}

/// The sources of each window of LocallyBiased, ascending: row b of the result is window b of L. In the causal form a query of the window sees those
/// up to its own position. Throws invalid_input for invalid arguments or fewer keys than windows.
/// O(keys), causal O(L keys), of radix sorts. Source: SSA (KDD 2023), sections 3.1 and 3.2.
template <int L>
CudaEdges locally_biased_sources_on_device(const LocallyBiased<L>& sampler, index_t keys, const Draw& draw, bool causal = false) {
    sampler.validate();
    detail::require(keys >= 0, "keys", "a number >= 0", keys);
    detail::require_windows("L of LocallyBiased", L, keys);
    const detail::cuda::DeviceNoisyOrder noisy(draw, random_stream::shuffled_keys, sampler.sigma.at(draw.layer) * keys);
    thrust::device_vector<index_t> sources(static_cast<std::size_t>(keys)), windows(static_cast<std::size_t>(keys));
    if (!causal) sources = noisy(keys, 0);
    for (index_t b = 0; b < L; ++b) {
        const Bounds window = detail::window_of(keys, L, b);
        thrust::fill(windows.begin() + window.begin, windows.begin() + window.end, b);
        if (!causal) continue;
        const thrust::device_vector<index_t> order = noisy(window.end, static_cast<std::uint32_t>(b));
        thrust::copy(order.begin() + window.begin, order.end(), sources.begin() + window.begin);
    }
    return edges_from_pairs_on_device(windows, sources, L);
}

POLYATTN_END_NAMESPACE
