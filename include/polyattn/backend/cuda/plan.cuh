#pragma once
// A plan in device memory, in the order in which thread blocks work.

#include <polyattn/backend/cuda/plan_arrays.cuh>
#include <polyattn/backend/cuda/runtime.cuh>

#include <algorithm>
#include <limits>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// Ascending tokens: first, first + 1, .. or a list.
struct Sequence {
    index_t first;
    const index_t* list;
    __device__ index_t operator[](index_t position) const { return list ? list[position] : first + position; }
};

/// What a group has to do with one tile. "Own" tokens are the group's (queries, or keys when transposed), the "others" are walked over.
struct Segment {
    index_t tile;
    index_t own;                   // position of the group's first token in the tile, maybe below 0
    index_t begin, end;            // positions of the others that any own token sees
    index_t full_begin, full_end;  // those that all of them see
};

/// Up to `side` tokens that one thread block works on. Tokens that are not active belong to other groups and are not stored.
struct DeviceGroup {
    index_t first;
    index_t count;
    offset_t list;  // -1: consecutive tokens
    index_t first_segment, last_segment;
    std::uint64_t active;
};

/// What kernels see of a plan, in one direction.
struct PlanView {
    const DeviceTile* tiles;
    const index_t* lists;
    const Bounds* bounds;
    const std::uint32_t* excluded;
    const DeviceGroup* groups;
    const Segment* segments;
};

// DeviceEdges of a plan whose edges the host has.
struct CopiedEdges {
    DeviceArray<offset_t> offsets;
    DeviceArray<index_t> keys;
    DeviceArray<offset_t> transposed_offsets;
    DeviceArray<index_t> queries;
    DeviceArray<offset_t> forward;
};
inline DeviceEdges::DeviceEdges(const Plan& plan) : count_(plan.edges().count()) {
    const Edges& edges = plan.edges();
    const auto& transposed = plan.lowered<TransposedEdges>();
    // Without edges there are offsets still: kernels finish rows by them that tiles do not.
    const std::vector<offset_t> none(edges.offsets.empty() ? static_cast<std::size_t>(plan.queries()) + 1 : 0, 0);
    const auto copies = std::make_shared<const CopiedEdges>(CopiedEdges{DeviceArray<offset_t>(edges.offsets.empty() ? none : edges.offsets), DeviceArray<index_t>(edges.keys),
                                                                        DeviceArray<offset_t>(transposed.offsets), DeviceArray<index_t>(transposed.queries), DeviceArray<offset_t>(transposed.forward)});
    by_query_ = {copies->offsets.data(), copies->keys.data(), nullptr};
    by_key_ = {copies->transposed_offsets.data(), copies->queries.data(), copies->forward.data()};
    owner_ = copies;
}

/// A range of groups; those from `first_single` on are single tokens.
struct Wave {
    index_t first, first_single, last;
};

/// Groups of one direction. Each token is active in at most one group of a wave; waves run one after the other.
struct Direction {
    std::vector<DeviceGroup> groups;
    std::vector<Segment> segments;
    std::vector<Wave> waves;
    bool complete = false;  // one wave covers all tokens
    DeviceArray<DeviceGroup> device_groups;
    DeviceArray<Segment> device_segments;
};

/// A plan lowered for tiles of `side` x `side` pairs. O(rows of tiles + rows x key groups they reach).
template <int side>
class DevicePlan {
    static_assert(side <= 64);

public:
    explicit DevicePlan(const Plan& plan) {
        const TileArrays arrays(plan);
        lower(plan, arrays.tiles, rows_, false, plan.queries());
        lower(plan, arrays.tiles, columns_, true, plan.keys());
        tiles_ = DeviceArray<DeviceTile>(arrays.tiles);
        lists_ = DeviceArray<index_t>(arrays.lists);
        bounds_ = DeviceArray<Bounds>(arrays.bounds);
        excluded_ = DeviceArray<std::uint32_t>(arrays.excluded);
        edges_ = &plan.lowered<DeviceEdges>();
    }

    const Direction& rows() const { return rows_; }
    const Direction& columns() const { return columns_; }
    offset_t edge_count() const { return edges_->count(); }
    /// Every query's row is finished by the edges' kernel, unless tiles alone finish all of them.
    bool finished_by_edges(bool transposed) const { return edge_count() > 0 || !(transposed ? columns_ : rows_).complete; }

    PlanView view(bool transposed) const {
        const Direction& direction = transposed ? columns_ : rows_;
        return {tiles_.data(), lists_.data(), bounds_.data(), excluded_.data(), direction.device_groups.data(), direction.device_segments.data()};
    }
    EdgeView edges(bool transposed) const { return transposed ? edges_->by_key() : edges_->by_query(); }

private:
    /// A list of at most `most_single` tokens that see sequences longer than `short_others` is worked on token by token: as groups it would keep one or
    /// two blocks busy with long walks while all other multiprocessors wait. Longer lists fill groups enough of their own.
    static constexpr index_t most_single = 128, short_others = 4 * side;

    struct Key {
        offset_t list;          // -1: consecutive tokens
        index_t length, chunk;  // tokens in a chunk: `side`, or 1
        friend auto operator<=>(const Key&, const Key&) = default;
    };
    struct Entry {
        Key group;
        Segment segment;
        std::uint64_t active;
    };

    static void lower(const Plan& plan, const std::vector<DeviceTile>& tiles, Direction& direction, bool transposed, index_t tokens) {
        std::vector<Entry> entries;
        for (std::size_t t = 0; t < tiles.size(); ++t) {
            const Tile& tile = plan.tiles()[t];
            const offset_t list = transposed ? tiles[t].key_list : tiles[t].row_list;
            const IndexSequence &own = transposed ? tile.keys : tile.rows, &others = transposed ? tile.rows : tile.keys;
            if (own.empty()) continue;
            const index_t length = list >= 0 && own.size() <= most_single && others.size() > short_others ? 1 : side;
            // Chunks of consecutive tokens lie at multiples of `side`, so that tiles of the same tokens meet in one group.
            const index_t base = list < 0 ? own.front() : 0, first = base / length, last = (base + own.size() - 1) / length;
            std::vector<Entry> made(static_cast<std::size_t>(last - first + 1));
            for (index_t chunk = first; chunk <= last; ++chunk)
                made[static_cast<std::size_t>(chunk - first)] = {{list, length, chunk}, {static_cast<index_t>(t), chunk * length - base, std::numeric_limits<index_t>::max(), 0, 0, 0}, 0};
            if (transposed) fill_columns(tile, length, base, first, made);
            else fill_rows(tile, length, made);
            for (Entry& entry : made)
                if (entry.active) {
                    if (!tile.excluded.empty()) entry.segment.full_begin = entry.segment.full_end = 0;
                    entries.push_back(entry);
                }
        }
        std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.group < b.group; });
        std::vector<std::pair<std::pair<index_t, bool>, DeviceGroup>> groups;  // by wave, single tokens last
        std::vector<index_t> waves_of(static_cast<std::size_t>(tokens), 0);
        index_t most = 0;
        for (std::size_t at = 0; at < entries.size();) {
            const Key key = entries[at].group;
            std::size_t end = at;
            std::uint64_t active = 0;
            for (; end < entries.size() && entries[end].group == key; ++end) active |= entries[end].active;
            const Tile& tile = plan.tiles()[static_cast<std::size_t>(entries[at].segment.tile)];
            const IndexSequence& own = transposed ? tile.keys : tile.rows;
            const index_t begin = key.chunk * key.length, count = std::min(key.length, (key.list < 0 ? tokens : own.size()) - begin);
            DeviceGroup group{key.list < 0 ? begin : own[begin], count, key.list < 0 ? -1 : key.list + begin,
                              static_cast<index_t>(direction.segments.size()), 0, active};
            for (; at < end; ++at) {
                Segment segment = entries[at].segment;
                if (active & ~entries[at].active) segment.full_begin = segment.full_end = 0;  // some token sees nothing of this tile
                direction.segments.push_back(segment);
            }
            group.last_segment = static_cast<index_t>(direction.segments.size());
            const auto for_each_active = [&](auto&& f) {
                for (index_t s = 0; s < count; ++s)
                    if (active >> s & 1) f(waves_of[static_cast<std::size_t>(key.list < 0 ? begin + s : own[begin + s])]);
            };
            index_t wave = 0;
            for_each_active([&](index_t known) { wave = std::max(wave, known); });
            for_each_active([&](index_t& known) { known = wave + 1; });
            most = std::max(most, wave + 1);
            groups.emplace_back(std::pair{wave, key.length == 1}, group);
        }
        std::stable_sort(groups.begin(), groups.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
        for (const auto& [place, group] : groups) {
            const auto at = static_cast<index_t>(direction.groups.size());
            if (static_cast<index_t>(direction.waves.size()) <= place.first) direction.waves.push_back({at, at, at});
            direction.groups.push_back(group);
            direction.waves.back().last = at + 1;
            if (!place.second) direction.waves.back().first_single = at + 1;
        }
        direction.complete = most <= 1 && std::find(waves_of.begin(), waves_of.end(), 0) == waves_of.end();
        direction.device_groups = DeviceArray<DeviceGroup>(direction.groups);
        direction.device_segments = DeviceArray<Segment>(direction.segments);
    }

    /// Own tokens are the tile's rows.
    static void fill_rows(const Tile& tile, index_t length, std::vector<Entry>& made) {
        for (Entry& entry : made) {
            Segment& segment = entry.segment;
            Bounds full{0, tile.keys.size()};
            for (index_t s = 0; s < length; ++s) {
                const index_t r = segment.own + s;
                if (r < 0 || r >= tile.rows.size() || tile.row_count(r) == 0) continue;
                const Bounds range = tile.row_bounds(r);
                entry.active |= std::uint64_t{1} << s;
                segment.begin = std::min(segment.begin, range.begin);
                segment.end = std::max(segment.end, range.end);
                full = {std::max(full.begin, range.begin), std::min(full.end, range.end)};
            }
            if (!full.empty()) {
                segment.full_begin = full.begin;
                segment.full_end = full.end;
            }
        }
    }
    /// Own tokens are the tile's keys.
    static void fill_columns(const Tile& tile, index_t length, index_t base, index_t first_chunk, std::vector<Entry>& made) {
        std::vector<index_t> starts(static_cast<std::size_t>(tile.keys.size()) + 1, 0);
        for (index_t r = 0; r < tile.rows.size(); ++r) {
            const Bounds range = tile.row_bounds(r);
            if (range.empty()) continue;
            ++starts[static_cast<std::size_t>(range.begin)];
            --starts[static_cast<std::size_t>(range.end)];
            for (index_t chunk = (range.begin + base) / length; chunk <= (range.end - 1 + base) / length; ++chunk) {
                Segment& segment = made[static_cast<std::size_t>(chunk - first_chunk)].segment;
                segment.begin = std::min(segment.begin, r);
                segment.end = r + 1;
                const bool covers = range.begin <= std::max(segment.own, 0) && range.end >= std::min(segment.own + length, tile.keys.size());
                if (!covers) continue;
                if (segment.full_end == r && segment.full_end > segment.full_begin) segment.full_end = r + 1;
                else if (segment.full_end == segment.full_begin) {
                    segment.full_begin = r;
                    segment.full_end = r + 1;
                }
            }
        }
        index_t seen = 0;
        auto skip = tile.excluded.begin();
        for (index_t c = 0; c < tile.keys.size(); ++c) {
            seen += starts[static_cast<std::size_t>(c)];
            const index_t key = tile.keys[c];
            while (skip != tile.excluded.end() && *skip < key) ++skip;
            if (seen == 0 || (skip != tile.excluded.end() && *skip == key)) continue;
            Entry& entry = made[static_cast<std::size_t>((c + base) / length - first_chunk)];
            entry.active |= std::uint64_t{1} << (c - entry.segment.own);
        }
    }

    Direction rows_, columns_;
    DeviceArray<DeviceTile> tiles_;
    DeviceArray<index_t> lists_;
    DeviceArray<Bounds> bounds_;
    DeviceArray<std::uint32_t> excluded_;
    const DeviceEdges* edges_;  // beside this in the plan
};

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
