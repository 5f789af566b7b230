#pragma once
// A plan's parts as plain arrays: what its lowering, its kernels, and set algebra on the device read. Without CUDA's headers.

#include <polyattn/plan/plan.hpp>

#include <map>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// A tile: offsets into the plan's arrays, -1 for none.
struct DeviceTile {
    index_t first_row, rows, first_key, keys;
    offset_t row_list, key_list;
    offset_t bounds;    // one a row
    offset_t excluded;  // bits, one a position of the keys
};

/// The tiles of a plan; lists that tiles share are there once.
struct TileArrays {
    explicit TileArrays(const Plan& plan) {
        std::map<const void*, offset_t> known;
        const auto place = [&](const IndexSequence& sequence) -> offset_t {
            if (!sequence.is_list()) return -1;
            const auto [at, added] = known.try_emplace(sequence.identity(), static_cast<offset_t>(lists.size()));
            if (added) lists.insert(lists.end(), sequence.elements().begin(), sequence.elements().end());
            return at->second;
        };
        for (const Tile& tile : plan.tiles()) {
            DeviceTile made{tile.rows.empty() ? 0 : tile.rows.front(), tile.rows.size(), tile.keys.empty() ? 0 : tile.keys.front(), tile.keys.size(), place(tile.rows), place(tile.keys), -1, -1};
            if (!tile.bounds.empty()) {
                made.bounds = static_cast<offset_t>(bounds.size());
                bounds.insert(bounds.end(), tile.bounds.begin(), tile.bounds.end());
            }
            if (!tile.excluded.empty()) {
                made.excluded = static_cast<offset_t>(excluded.size());
                excluded.resize(excluded.size() + static_cast<std::size_t>(tile.keys.size() + 31) / 32, 0);
                for (const index_t key : tile.excluded)
                    if (const index_t position = tile.keys.find(key); position >= 0)
                        excluded[static_cast<std::size_t>(made.excluded + position / 32)] |= 1u << position % 32;
            }
            tiles.push_back(made);
        }
    }

    std::vector<DeviceTile> tiles;
    std::vector<index_t> lists;
    std::vector<Bounds> bounds;
    std::vector<std::uint32_t> excluded;
};

/// Compressed sparse rows in device memory: edge e of row i leads to token to[e]; its weight is number index[e], e itself without an index.
struct EdgeView {
    const offset_t* offsets;
    const index_t* to;
    const offset_t* index;
};

/// A plan's edges in device memory, kept beside the plan: copies of the host's, or made there.
class DeviceEdges {
public:
    explicit DeviceEdges(const Plan& plan);  // in plan.cuh
    DeviceEdges(std::shared_ptr<const void> owner, offset_t count, EdgeView by_query, EdgeView by_key) : owner_(std::move(owner)), count_(count), by_query_(by_query), by_key_(by_key) {}

    offset_t count() const { return count_; }
    EdgeView by_query() const { return by_query_; }
    EdgeView by_key() const { return by_key_; }

private:
    std::shared_ptr<const void> owner_;
    offset_t count_;
    EdgeView by_query_, by_key_;
};

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
