#pragma once
// Plans whose edges are drawn, joined and transposed where they are used. Tiles are descriptions of O(rows) numbers, which the host makes; pairs never go through it.
// The pairs, and so all results, are those of pattern.plan(). Thrust alone, as in sampling.cuh, and with the same last argument: the execution policy.

#include <polyattn/backend/cuda/plan_arrays.cuh>
#include <polyattn/backend/cuda/sampling.cuh>
#include <polyattn/policy/pattern/combine.hpp>
#include <polyattn/policy/pattern/local_global_random.hpp>
#include <polyattn/policy/set.hpp>

#include <thrust/remove.h>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// Position of the first of `size` ascending numbers that is >= value.
template <class T>
POLYATTN_HOST_DEVICE offset_t first_not_below(const T* numbers, offset_t size, T value) {
    offset_t at = 0;
    for (offset_t end = size; at < end;) {
        const offset_t middle = at + (end - at) / 2;
        if (numbers[middle] < value) at = middle + 1;
        else end = middle;
    }
    return at;
}

/// Tells whether an edge is fit for a plan; `offsets` are.
struct EdgeFits {
    const offset_t* offsets;
    const index_t* to;
    index_t rows, keys;
    POLYATTN_HOST_DEVICE bool operator()(offset_t edge) const {
        if (to[edge] < 0 || to[edge] >= keys) return false;
        const offset_t row_begins = offsets[first_not_below(offsets, offset_t{rows} + 1, edge + 1) - 1];
        return edge == row_begins || to[edge - 1] < to[edge];
    }
};
struct OffsetFits {
    const offset_t* offsets;
    POLYATTN_HOST_DEVICE bool operator()(offset_t row) const { return offsets[row] <= offsets[row + 1]; }
};
/// Edge e of rows as a pair.
struct PairOfEdge {
    const offset_t* offsets;
    const index_t* to;
    index_t rows;
    POLYATTN_HOST_DEVICE std::uint64_t operator()(offset_t edge) const {
        return JoinPair()(static_cast<index_t>(first_not_below(offsets, offset_t{rows} + 1, edge + 1) - 1), to[edge]);
    }
};
/// Pairs of a plan's tiles.
struct InTiles {
    const DeviceTile* tiles;
    const index_t* lists;
    const Bounds* bounds;
    const std::uint32_t* excluded;
    const offset_t* offsets;  // of each query's entries of `rows`
    const Plan::TileRow* rows;

    POLYATTN_HOST_DEVICE bool operator()(std::uint64_t pair) const {
        const auto query = static_cast<index_t>(pair >> 32);
        const index_t key = KeyOfPair()(pair);
        for (offset_t at = offsets[query]; at < offsets[query + 1]; ++at) {
            const DeviceTile& tile = tiles[rows[at].tile];
            offset_t position = offset_t{key} - tile.first_key;
            if (tile.key_list >= 0) {
                position = first_not_below(lists + tile.key_list, offset_t{tile.keys}, key);
                if (position == tile.keys || lists[tile.key_list + position] != key) continue;
            }
            const Bounds seen = tile.bounds >= 0 ? bounds[tile.bounds + rows[at].row] : Bounds{0, tile.keys};
            if (position < seen.begin || position >= seen.end) continue;
            if (tile.excluded < 0 || !(excluded[tile.excluded + position / 32] >> position % 32 & 1)) return true;
        }
        return false;
    }
};
/// Pairs that a plan doesn't have.
struct NotInPlan {
    InTiles in_tiles;
    const offset_t* offsets;  // null: no edges
    const index_t* to;
    POLYATTN_HOST_DEVICE bool operator()(std::uint64_t pair) const {
        if (in_tiles(pair)) return false;
        if (!offsets) return true;
        const auto query = static_cast<index_t>(pair >> 32);
        const offset_t begin = offsets[query], size = offsets[query + 1] - begin, at = first_not_below(to + begin, size, KeyOfPair()(pair));
        return at == size || to[begin + at] != KeyOfPair()(pair);
    }
};
struct Outside {
    index_t queries, keys;
    POLYATTN_HOST_DEVICE bool operator()(std::uint64_t pair) const { return pair >= FirstOfRow()(queries) || KeyOfPair()(pair) >= keys; }
};
/// UniformTokens' m-th pick of a query.
struct UniformPair {
    index_t queries, keys;
    offset_t picks;
    POLYATTN_HOST_DEVICE std::uint64_t operator()(offset_t at) const {
        const offset_t query = at / picks, m = at % picks + 1, key = (query + keys - queries + m * keys / (picks + 1)) % keys;
        return JoinPair()(static_cast<index_t>(query), static_cast<index_t>(key < 0 ? key + keys : key));
    }
};

/// A plan's tiles for InTiles.
class TilesOnDevice {
public:
    explicit TilesOnDevice(const Plan& plan) : TilesOnDevice(plan, TileArrays(plan)) {}
    InTiles view() const { return {raw(tiles_), raw(lists_), raw(bounds_), raw(excluded_), raw(offsets_), raw(rows_)}; }

private:
    TilesOnDevice(const Plan& plan, const TileArrays& arrays)
        : tiles_(arrays.tiles.begin(), arrays.tiles.end()), lists_(arrays.lists.begin(), arrays.lists.end()), bounds_(arrays.bounds.begin(), arrays.bounds.end()), excluded_(arrays.excluded.begin(), arrays.excluded.end()) {
        std::vector<offset_t> offsets{0};
        std::vector<Plan::TileRow> rows;
        for (index_t query = 0; query < plan.queries(); ++query) {
            const auto of_query = plan.tile_rows(query);
            rows.insert(rows.end(), of_query.begin(), of_query.end());
            offsets.push_back(static_cast<offset_t>(rows.size()));
        }
        offsets_.assign(offsets.begin(), offsets.end());
        rows_.assign(rows.begin(), rows.end());
    }

    thrust::device_vector<DeviceTile> tiles_;
    thrust::device_vector<index_t> lists_;
    thrust::device_vector<Bounds> bounds_;
    thrust::device_vector<std::uint32_t> excluded_;
    thrust::device_vector<offset_t> offsets_;
    thrust::device_vector<Plan::TileRow> rows_;
};

/// A plan's edges, if it has any: those it keeps on the device, or copies of the host's.
class EdgesOfPlan {
public:
    explicit EdgesOfPlan(const Plan& plan) : rows_(plan.queries()) {
        if (const DeviceEdges* kept = plan.find_lowered<DeviceEdges>()) {
            count_ = kept->count();
            offsets_ = kept->by_query().offsets;
            to_ = kept->by_query().to;
        } else if (plan.edges().count() > 0) {
            copies_ = {{plan.edges().offsets.begin(), plan.edges().offsets.end()}, {plan.edges().keys.begin(), plan.edges().keys.end()}};
            count_ = plan.edges().count();
            offsets_ = raw(std::as_const(copies_.offsets));
            to_ = raw(std::as_const(copies_.keys));
        }
    }

    const offset_t* offsets() const { return offsets_; }
    const index_t* to() const { return to_; }
    /// Appends them.
    template <class Execution>
    void pairs(const Execution& execution, thrust::device_vector<std::uint64_t>& to) const {
        const std::size_t before = to.size();
        const thrust::counting_iterator<offset_t> edge(0);
        to.resize(before + static_cast<std::size_t>(count_));
        thrust::transform(execution, edge, edge + count_, to.begin() + static_cast<std::ptrdiff_t>(before), PairOfEdge{offsets_, to_, rows_});
    }

private:
    CudaEdges copies_;
    index_t rows_;
    offset_t count_ = 0;
    const offset_t* offsets_ = nullptr;
    const index_t* to_ = nullptr;
};

inline Plan tiles_alone(const Plan& plan) { return Plan(plan.queries(), plan.keys(), {plan.tiles().begin(), plan.tiles().end()}, {}); }

/// The tiles of a plan, and edges that are known to be right.
template <class Execution>
Plan plan_of(const Execution& execution, const Plan& tiles, CudaEdges edges) {
    if (edges.keys.empty()) return tiles_alone(tiles);
    struct Graph {
        CudaEdges by_query;
        CudaTransposedEdges by_key;
    };
    const auto graph = std::make_shared<Graph>(Graph{std::move(edges), {}});
    graph->by_key = transpose_on_device(graph->by_query, tiles.keys(), execution);
    Plan plan = Plan::with_edges_elsewhere(tiles.queries(), tiles.keys(), {tiles.tiles().begin(), tiles.tiles().end()}, [graph] { return graph->by_query.to_host(); });
    const Graph& made = *graph;
    plan.adopt(std::make_shared<const DeviceEdges>(graph, static_cast<offset_t>(made.by_query.keys.size()), EdgeView{raw(made.by_query.offsets), raw(made.by_query.keys), nullptr},
                                                   EdgeView{raw(made.by_key.offsets), raw(made.by_key.queries), raw(made.by_key.forward)}));
    return plan;
}
/// The tiles of a plan, and pairs in any order, repeats allowed.
template <class Execution>
Plan plan_of(const Execution& execution, const Plan& tiles, thrust::device_vector<std::uint64_t>& pairs) {
    thrust::sort(execution, pairs.begin(), pairs.end());
    return plan_of(execution, tiles, edges_of_sorted_pairs(execution, pairs.begin(), thrust::unique(execution, pairs.begin(), pairs.end()), tiles.queries()));
}

/// Which patterns have a plan of their own on the device; of others the host makes it.
template <class Pattern>
struct PlannerOnDevice {
    template <class Execution>
    static Plan plan(const Pattern& pattern, index_t queries, index_t keys, const Execution&) { return pattern.plan(queries, keys); }
};

}  // namespace detail::cuda

/// The plan of a graph on the device. Throws invalid_input, as PlanBuilder::edges does, unless there are queries + 1 ascending offsets from 0 to the number of keys and every row
/// is strictly ascending and in range. O(edges) for a radix sort, O(edges log queries).
template <class Execution = detail::cuda::DefaultExecution>
Plan plan_of_edges_on_device(CudaEdges edges, index_t queries, index_t keys, const Execution& execution = thrust::device) {
    using namespace detail::cuda;
    const Plan empty = PlanBuilder(queries, keys).build();
    const thrust::counting_iterator<offset_t> first(0);
    const auto count = static_cast<offset_t>(edges.keys.size());
    const bool fits = edges.offsets.size() == static_cast<std::size_t>(queries) + 1 && value_at(execution, raw(std::as_const(edges.offsets))) == 0 &&
                      value_at(execution, raw(std::as_const(edges.offsets)) + queries) == count &&
                      thrust::count_if(execution, first, first + queries, OffsetFits{raw(edges.offsets)}) == queries &&
                      thrust::count_if(execution, first, first + count, EdgeFits{raw(edges.offsets), raw(edges.keys), queries, keys}) == count;
    if (!fits) return PlanBuilder(queries, keys).edges(edges.to_host()).build();  // says what is wrong
    return plan_of(execution, empty, std::move(edges));
}

/// unite(a, b), without the host seeing an edge that is on the device. O(edges) for a radix sort, O(edges (log queries + tiles of a query x log of their lists)); tiles as there.
template <class Execution = detail::cuda::DefaultExecution>
Plan unite_on_device(const Plan& a, const Plan& b, const Execution& execution = thrust::device) {
    using namespace detail::cuda;
    const Plan tiles = unite(tiles_alone(a), tiles_alone(b));
    thrust::device_vector<std::uint64_t> pairs;
    for (const Plan* plan : {&tiles, &a, &b}) EdgesOfPlan(*plan).pairs(execution, pairs);
    const TilesOnDevice on_device(tiles);
    pairs.erase(thrust::remove_if(execution, pairs.begin(), pairs.end(), on_device.view()), pairs.end());
    return plan_of(execution, tiles, pairs);
}

/// intersect(a, b), as unite_on_device().
template <class Execution = detail::cuda::DefaultExecution>
Plan intersect_on_device(const Plan& a, const Plan& b, const Execution& execution = thrust::device) {
    using namespace detail::cuda;
    thrust::device_vector<std::uint64_t> pairs;
    const auto keep_common = [&](const Plan& from, const Plan& other) {
        const auto before = static_cast<std::ptrdiff_t>(pairs.size());
        EdgesOfPlan(from).pairs(execution, pairs);
        const TilesOnDevice tiles(other);
        const EdgesOfPlan edges(other);
        pairs.erase(thrust::remove_if(execution, pairs.begin() + before, pairs.end(), NotInPlan{tiles.view(), edges.offsets(), edges.to()}), pairs.end());
    };
    keep_common(a, b);
    keep_common(b, a);
    return plan_of(execution, intersect(tiles_alone(a), tiles_alone(b)), pairs);
}

/// pattern.plan(queries, keys), with the edges of RandomTokens, UniformTokens, ErdosRenyi and LocalGlobalRandom, alone and within Union, Intersection and Prefix, made on the
/// device and left there; the host copies them if it asks for Plan::edges(). Of other patterns the host makes the plan. Throws what pattern.plan() throws.
/// Drawing, O(edges) for radix sorts, and the tiles on the host. Hand it to calls in CudaOptions::plan.
template <SparsityPattern Pattern, class Execution = detail::cuda::DefaultExecution>
Plan plan_on_device(const Pattern& pattern, index_t queries, index_t keys, const Execution& execution = thrust::device) {
    return detail::cuda::PlannerOnDevice<Pattern>::plan(pattern, queries, keys, execution);
}
/// layer.plan(queries, keys, draw) in the same way.
template <class Pattern, class Sampler, class Diffusion, class Score, class Bias, class Backend, class Execution = detail::cuda::DefaultExecution>
Plan plan_on_device(const AttentionLayer<Pattern, Sampler, Diffusion, Score, Bias, Backend>& layer, index_t queries, index_t keys, const Draw& draw = {}, const Execution& execution = thrust::device) {
    if constexpr (std::is_same_v<Sampler, AllSources>) return plan_on_device(layer.pattern(), queries, keys, execution);
    else {
        const Plan sampled = layer.sampler().sample(queries, keys, draw, detail::is_causal<Pattern>());
        return intersect_on_device(plan_on_device(layer.pattern(), queries, keys, execution), sampled, execution);
    }
}

namespace detail::cuda {

template <>
struct PlannerOnDevice<RandomTokens> {
    template <class Execution>
    static Plan plan(const RandomTokens& pattern, index_t queries, index_t keys, const Execution& execution) {
        return plan_of(execution, Plan(queries, keys, {}, {}), random_tokens_on_device(pattern, queries, keys, execution));
    }
};
template <>
struct PlannerOnDevice<UniformTokens> {
    template <class Execution>
    static Plan plan(const UniformTokens& pattern, index_t queries, index_t keys, const Execution& execution) {
        const UniformPair pair{queries, keys, std::min<offset_t>(pattern.count, std::max<offset_t>(offset_t{keys} - 1, 0))};
        thrust::device_vector<std::uint64_t> pairs(static_cast<std::size_t>(queries) * static_cast<std::size_t>(pair.picks));
        thrust::tabulate(execution, pairs.begin(), pairs.end(), pair);
        return plan_of(execution, Plan(queries, keys, {}, {}), pairs);
    }
};
template <>
struct PlannerOnDevice<ErdosRenyi> {
    template <class Execution>
    static Plan plan(const ErdosRenyi& pattern, index_t queries, index_t keys, const Execution& execution) {
        return plan_of(execution, Plan(queries, keys, {}, {}), erdos_renyi_on_device(pattern, queries, keys, execution));
    }
};
template <>
struct PlannerOnDevice<LocalGlobalRandom> {
    template <class Execution>
    static Plan plan(const LocalGlobalRandom& pattern, index_t queries, index_t keys, const Execution& execution) { return plan_on_device(pattern.parts(), queries, keys, execution); }
};
template <class... Patterns>
struct PlannerOnDevice<Union<Patterns...>> {
    template <class Execution>
    static Plan plan(const Union<Patterns...>& pattern, index_t queries, index_t keys, const Execution& execution) {
        return join_plans(pattern.patterns, [&](const auto& part) { return plan_on_device(part, queries, keys, execution); }, [&](const Plan& a, const Plan& b) { return unite_on_device(a, b, execution); });
    }
};
template <class... Patterns>
struct PlannerOnDevice<Intersection<Patterns...>> {
    template <class Execution>
    static Plan plan(const Intersection<Patterns...>& pattern, index_t queries, index_t keys, const Execution& execution) {
        return join_plans(pattern.patterns, [&](const auto& part) { return plan_on_device(part, queries, keys, execution); }, [&](const Plan& a, const Plan& b) { return intersect_on_device(a, b, execution); });
    }
};
template <class Pattern>
struct PlannerOnDevice<Prefix<Pattern>> {
    template <class Execution>
    static Plan plan(const Prefix<Pattern>& pattern, index_t queries, index_t keys, const Execution& execution) {
        require_square("Prefix", queries, keys);
        const Plan whole = plan_on_device(pattern.pattern, pattern.length, pattern.length, execution);
        thrust::device_vector<std::uint64_t> pairs;
        const Plan tiles = prefix(tiles_alone(whole), queries, keys);
        EdgesOfPlan(whole).pairs(execution, pairs);
        pairs.erase(thrust::remove_if(execution, pairs.begin(), pairs.end(), Outside{queries, keys}), pairs.end());
        return plan_of(execution, tiles, pairs);
    }
};

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
