#pragma once
// Plans whose edges are drawn, joined and transposed where they are used. Tiles are descriptions of O(rows) numbers, which the host makes, as it makes the single pairs that
// are left over where tiles cut each other. The pairs, and so all results, are those of pattern.plan(). Thrust alone, as in sampling.cuh, and with the same last argument: the
// execution policy.

#include <polyattn/backend/cuda/plan_arrays.cuh>
#include <polyattn/backend/cuda/sampling.cuh>
#include <polyattn/policy/pattern/combine.hpp>
#include <polyattn/policy/pattern/dense.hpp>
#include <polyattn/policy/pattern/local_global_random.hpp>
#include <polyattn/policy/set.hpp>

#include <thrust/device_allocator.h>
#include <thrust/device_ptr.h>
#include <thrust/remove.h>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// Row of an edge.
POLYATTN_HOST_DEVICE inline index_t row_of_edge(const offset_t* offsets, index_t rows, offset_t edge) {
    return static_cast<index_t>(first_not_below(offsets, offset_t{rows} + 1, edge + 1) - 1);
}

/// Tells whether an edge is fit for a plan; `offsets` are.
struct EdgeFits {
    const offset_t* offsets;
    const index_t* to;
    index_t rows, keys;
    POLYATTN_HOST_DEVICE bool operator()(offset_t edge) const {
        if (to[edge] < 0 || to[edge] >= keys) return false;
        return edge == offsets[row_of_edge(offsets, rows, edge)] || to[edge - 1] < to[edge];
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
    POLYATTN_HOST_DEVICE std::uint64_t operator()(offset_t edge) const { return JoinPair()(row_of_edge(offsets, rows, edge), to[edge]); }
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

/// A plan in the making.
struct PlanParts {
    Plan tiles;       // without edges
    CudaEdges edges;  // no offsets if there are none
};
inline Plan tiles_of(const Plan& plan) { return unchecked_plan(plan.queries(), plan.keys(), {plan.tiles().begin(), plan.tiles().end()}, {}); }

/// With copies of the edges, which the plan keeps on the device or on the host.
template <class Execution>
PlanParts parts_of(const Execution& execution, const Plan& plan) {
    PlanParts parts{tiles_of(plan), {}};
    if (const DeviceEdges* kept = plan.find_lowered<DeviceEdges>()) {
        if (kept->count() == 0) return parts;
        parts.edges = {thrust::device_vector<offset_t>(static_cast<std::size_t>(plan.queries()) + 1), thrust::device_vector<index_t>(static_cast<std::size_t>(kept->count()))};
        thrust::copy_n(execution, thrust::device_pointer_cast(kept->by_query().offsets), parts.edges.offsets.size(), parts.edges.offsets.begin());
        thrust::copy_n(execution, thrust::device_pointer_cast(kept->by_query().to), parts.edges.keys.size(), parts.edges.keys.begin());
    } else if (plan.edges().count() > 0)
        parts.edges = {{plan.edges().offsets.begin(), plan.edges().offsets.end()}, {plan.edges().keys.begin(), plan.edges().keys.end()}};
    return parts;
}
/// Appends the edges of a plan with these queries.
template <class Execution>
void append_pairs(const Execution& execution, const CudaEdges& edges, index_t queries, thrust::device_vector<std::uint64_t>& pairs) {
    const std::size_t before = pairs.size();
    const thrust::counting_iterator<offset_t> edge(0);
    pairs.resize(before + edges.keys.size());
    thrust::transform(execution, edge, edge + static_cast<offset_t>(edges.keys.size()), pairs.begin() + static_cast<std::ptrdiff_t>(before), PairOfEdge{raw(edges.offsets), raw(edges.keys), queries});
}
/// Tiles, and pairs in any order, repeats allowed.
template <class Execution>
PlanParts parts_of(const Execution& execution, const Plan& tiles, thrust::device_vector<std::uint64_t>& pairs) {
    if (pairs.empty()) return {tiles, {}};
    thrust::sort(execution, pairs.begin(), pairs.end());
    return {tiles, edges_of_sorted_pairs(execution, pairs.begin(), thrust::unique(execution, pairs.begin(), pairs.end()), tiles.queries())};
}

template <class Execution>
PlanParts unite_parts(const Execution& execution, const PlanParts& a, const PlanParts& b) {
    const Plan united = unite(a.tiles, b.tiles);
    const PlanParts cut = parts_of(execution, united);
    thrust::device_vector<std::uint64_t> pairs;
    for (const CudaEdges* edges : {&cut.edges, &a.edges, &b.edges}) append_pairs(execution, *edges, united.queries(), pairs);
    const TilesOnDevice tiles(cut.tiles);
    pairs.erase(thrust::remove_if(execution, pairs.begin(), pairs.end(), tiles.view()), pairs.end());
    return parts_of(execution, cut.tiles, pairs);
}
template <class Execution>
PlanParts intersect_parts(const Execution& execution, const PlanParts& a, const PlanParts& b) {
    const Plan tiles = intersect(a.tiles, b.tiles);
    thrust::device_vector<std::uint64_t> pairs;
    const auto keep_common = [&](const PlanParts& from, const PlanParts& other) {
        const auto before = static_cast<std::ptrdiff_t>(pairs.size());
        append_pairs(execution, from.edges, tiles.queries(), pairs);
        const TilesOnDevice of_other(other.tiles);
        pairs.erase(thrust::remove_if(execution, pairs.begin() + before, pairs.end(), NotInPlan{of_other.view(), other.edges.keys.empty() ? nullptr : raw(other.edges.offsets), raw(other.edges.keys)}), pairs.end());
    };
    keep_common(a, b);
    keep_common(b, a);
    return parts_of(execution, tiles, pairs);
}

/// Memory of a plan goes where an exception is under way, or the runtime is gone already: what can't be given back then is left.
template <class T>
struct QuietAllocator : thrust::device_allocator<T> {
    template <class U>
    struct rebind {
        using other = QuietAllocator<U>;
    };
    QuietAllocator() = default;
    template <class U>
    QuietAllocator(const QuietAllocator<U>&) {}

    void deallocate(typename thrust::device_allocator<T>::pointer memory, std::size_t size) noexcept {
        try {
            thrust::device_allocator<T>::deallocate(memory, size);
        } catch (...) {
        }
    }
};
template <class T>
using PlanMemory = thrust::device_vector<T, QuietAllocator<T>>;

/// The plan, with its edges and their transpose on the device.
template <class Execution>
Plan plan_of(const Execution& execution, const PlanParts& parts) {
    const CudaEdges& edges = parts.edges;
    if (edges.keys.empty()) return parts.tiles;
    struct Graph {
        PlanMemory<offset_t> offsets;
        PlanMemory<index_t> keys;
        PlanMemory<offset_t> transposed_offsets;
        PlanMemory<index_t> queries;
        PlanMemory<offset_t> forward;
    };
    const CudaTransposedEdges by_key = transpose_on_device(edges, parts.tiles.keys(), execution);
    const auto graph = std::make_shared<const Graph>(Graph{edges.offsets, edges.keys, by_key.offsets, by_key.queries, by_key.forward});
    const auto at = [](const auto& memory) { return thrust::raw_pointer_cast(memory.data()); };
    Plan plan = Plan::with_edges_elsewhere(parts.tiles.queries(), parts.tiles.keys(), {parts.tiles.tiles().begin(), parts.tiles.tiles().end()}, [graph] {
        Edges fetched{std::vector<offset_t>(graph->offsets.size()), std::vector<index_t>(graph->keys.size())};
        thrust::copy(graph->offsets.begin(), graph->offsets.end(), fetched.offsets.begin());
        thrust::copy(graph->keys.begin(), graph->keys.end(), fetched.keys.begin());
        return fetched;
    });
    plan.adopt(std::make_shared<const DeviceEdges>(graph, static_cast<offset_t>(graph->keys.size()), EdgeView{at(graph->offsets), at(graph->keys), nullptr},
                                                   EdgeView{at(graph->transposed_offsets), at(graph->queries), at(graph->forward)}));
    return plan;
}

/// Which patterns have edges that are made on the device; those of others the host makes.
template <class Pattern>
struct PlannerOnDevice {
    template <class Execution>
    static PlanParts parts(const Pattern& pattern, index_t queries, index_t keys, const Execution& execution) { return parts_of(execution, pattern.plan(queries, keys)); }
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
    return plan_of(execution, {empty, std::move(edges)});
}

/// unite(a, b), of edges that may be on the device. O(edges) for a radix sort, O(edges (log queries + tiles of a query x log of their lists)); tiles as there. Throws invalid_input.
template <class Execution = detail::cuda::DefaultExecution>
Plan unite_on_device(const Plan& a, const Plan& b, const Execution& execution = thrust::device) {
    using namespace detail::cuda;
    return plan_of(execution, unite_parts(execution, parts_of(execution, a), parts_of(execution, b)));
}
/// intersect(a, b), as unite_on_device().
template <class Execution = detail::cuda::DefaultExecution>
Plan intersect_on_device(const Plan& a, const Plan& b, const Execution& execution = thrust::device) {
    using namespace detail::cuda;
    return plan_of(execution, intersect_parts(execution, parts_of(execution, a), parts_of(execution, b)));
}

/// pattern.plan(queries, keys) with its edges on the device: those of RandomTokens, UniformTokens, ErdosRenyi and LocalGlobalRandom, alone and within Union, Intersection and
/// Prefix, are made there, those of other patterns by the host. The host fetches them when it asks for the plan's pairs. Throws what pattern.plan() throws.
/// Drawing, O(edges) for radix sorts, and the tiles on the host. Hand it to calls in CudaOptions::plan.
template <SparsityPattern Pattern, class Execution = detail::cuda::DefaultExecution>
Plan plan_on_device(const Pattern& pattern, index_t queries, index_t keys, const Execution& execution = thrust::device) {
    using namespace detail::cuda;
    return plan_of(execution, PlannerOnDevice<Pattern>::parts(pattern, queries, keys, execution));
}
/// layer.plan(queries, keys, draw) in the same way.
template <class Pattern, class Sampler, class Diffusion, class Score, class Bias, class Backend, class Execution = detail::cuda::DefaultExecution>
Plan plan_on_device(const AttentionLayer<Pattern, Sampler, Diffusion, Score, Bias, Backend>& layer, index_t queries, index_t keys, const Draw& draw = {}, const Execution& execution = thrust::device) {
    using namespace detail::cuda;
    if constexpr (std::is_same_v<Sampler, AllSources>) return plan_on_device(layer.pattern(), queries, keys, execution);
    else {
        const Plan sampled = layer.sampler().sample(queries, keys, draw, detail::is_causal<Pattern>());
        if constexpr (std::is_same_v<Pattern, Dense>) return sampled;
        else return plan_of(execution, intersect_parts(execution, PlannerOnDevice<Pattern>::parts(layer.pattern(), queries, keys, execution), parts_of(execution, sampled)));
    }
}

namespace detail::cuda {

template <>
struct PlannerOnDevice<RandomTokens> {
    template <class Execution>
    static PlanParts parts(const RandomTokens& pattern, index_t queries, index_t keys, const Execution& execution) {
        CudaEdges edges = random_tokens_on_device(pattern, queries, keys, execution);
        return {PlanBuilder(queries, keys).build(), std::move(edges)};
    }
};
template <>
struct PlannerOnDevice<UniformTokens> {
    template <class Execution>
    static PlanParts parts(const UniformTokens& pattern, index_t queries, index_t keys, const Execution& execution) {
        const Plan empty = PlanBuilder(queries, keys).build();
        const UniformPair pair{queries, keys, std::min<offset_t>(pattern.count, std::max<offset_t>(offset_t{keys} - 1, 0))};
        thrust::device_vector<std::uint64_t> pairs(static_cast<std::size_t>(queries) * static_cast<std::size_t>(pair.picks));
        thrust::tabulate(execution, pairs.begin(), pairs.end(), pair);
        return parts_of(execution, empty, pairs);
    }
};
template <>
struct PlannerOnDevice<ErdosRenyi> {
    template <class Execution>
    static PlanParts parts(const ErdosRenyi& pattern, index_t queries, index_t keys, const Execution& execution) {
        CudaEdges edges = erdos_renyi_on_device(pattern, queries, keys, execution);
        return {PlanBuilder(queries, keys).build(), std::move(edges)};
    }
};
template <class... Patterns>
struct PlannerOnDevice<Union<Patterns...>> {
    template <class Execution>
    static PlanParts parts(const Union<Patterns...>& pattern, index_t queries, index_t keys, const Execution& execution) {
        return join_plans(pattern.patterns, [&]<class P>(const P& part) { return PlannerOnDevice<P>::parts(part, queries, keys, execution); },
                          [&](const PlanParts& a, const PlanParts& b) { return unite_parts(execution, a, b); });
    }
};
template <>
struct PlannerOnDevice<LocalGlobalRandom> {
    template <class Execution>
    static PlanParts parts(const LocalGlobalRandom& pattern, index_t queries, index_t keys, const Execution& execution) {
        return PlannerOnDevice<decltype(pattern.parts())>::parts(pattern.parts(), queries, keys, execution);
    }
};
template <class... Patterns>
struct PlannerOnDevice<Intersection<Patterns...>> {
    template <class Execution>
    static PlanParts parts(const Intersection<Patterns...>& pattern, index_t queries, index_t keys, const Execution& execution) {
        return join_plans(pattern.patterns, [&]<class P>(const P& part) { return PlannerOnDevice<P>::parts(part, queries, keys, execution); },
                          [&](const PlanParts& a, const PlanParts& b) { return intersect_parts(execution, a, b); });
    }
};
template <class Pattern>
struct PlannerOnDevice<Prefix<Pattern>> {
    template <class Execution>
    static PlanParts parts(const Prefix<Pattern>& pattern, index_t queries, index_t keys, const Execution& execution) {
        require_square("Prefix", queries, keys);
        const PlanParts whole = PlannerOnDevice<Pattern>::parts(pattern.pattern, pattern.length, pattern.length, execution);
        const Plan tiles = prefix(whole.tiles, queries, keys);
        thrust::device_vector<std::uint64_t> pairs;
        append_pairs(execution, whole.edges, whole.tiles.queries(), pairs);
        pairs.erase(thrust::remove_if(execution, pairs.begin(), pairs.end(), Outside{queries, keys}), pairs.end());
        return parts_of(execution, tiles, pairs);
    }
};

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
