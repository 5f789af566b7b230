#pragma once

#include <polyattn/plan/plan.hpp>

#include <array>
#include <bit>
#include <limits>
#include <map>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// Queries whose scores lie side by side in vectors. The same for every type and architecture, so a plan is lowered once.
inline constexpr int group_size = 16;
/// Spans of keys begin and end at multiples of this where the keys do not end before, so that tiles have no small remainders.
inline constexpr index_t span_unit = 8;

/// What each query of a group sees; nothing is begin = end = 0.
struct Lanes {
    std::array<index_t, group_size> begin{}, end{};

    Bounds operator[](std::size_t lane) const { return {begin[lane], end[lane]}; }
    void set(std::size_t lane, Bounds bounds) {
        begin[lane] = bounds.begin;
        end[lane] = bounds.end;
    }
};

/// A group's share of one tile: the span of key positions that any of its queries sees.
struct Piece {
    index_t tile;
    Bounds span;                             // in the tile's key sequence, rounded outwards to span_unit
    Lanes lanes;                             // what each query sees, in the tile's key sequence
    offset_t weights;                        // where its stored weights begin, in rows of group_size
    bool masked;                             // some query does not see the whole span
    int list_slot;                           // which gather buffer a listed key sequence uses; -1 for a range
};

/// 16 queries that are worked on together. An idle lane repeats a working one and is not stored.
struct Group {
    std::array<index_t, group_size> rows;
    std::uint32_t active;  // bit a lane
    bool consecutive;      // rows follow one another
    std::size_t first_piece, last_piece;
};

/// Consecutive groups that look at the same tiles and are worked on together. Wide ones (long spans) take one block of keys after
/// the other, all groups each time; the others (windows) forward two groups at a time at most, backward together.
struct Unit {
    std::size_t first, last;
    bool wide;
    std::size_t groups() const { return last - first; }
};

/// A plan in the order in which the SIMD kernels work: groups of queries, each with its pieces of the tiles. O(rows of tiles).
class Schedule {
public:
    static constexpr std::size_t most_groups = 8;         // of a wide unit
    static constexpr std::size_t most_narrow_groups = 4;  // of another

    explicit Schedule(const Plan& plan) {
        add_contiguous_rows(plan);
        add_listed_rows(plan);
        place(plan);
        form_units(plan);
    }

    std::span<const Group> groups() const { return groups_; }
    std::span<const Unit> units() const { return units_; }
    std::span<const Piece> pieces(const Group& group) const {
        return std::span<const Piece>(pieces_).subspan(group.first_piece, group.last_piece - group.first_piece);
    }

    /// Where a query's lanes are: group * group_size + lane.
    std::span<const offset_t> slots(index_t row) const {
        const auto r = static_cast<std::size_t>(row);
        return std::span<const offset_t>(slots_).subspan(static_cast<std::size_t>(slot_offsets_[r]),
                                                         static_cast<std::size_t>(slot_offsets_[r + 1] - slot_offsets_[r]));
    }
    /// A query in several groups, as unions of differently listed rows have it: then groups add to it one after the other.
    bool has_shared_rows() const { return shared_rows_; }
    /// Some tile shows its queries different keys, so zero weights may meet rows that hold NaN.
    bool is_masked() const { return masked_; }
    offset_t weight_rows() const { return weight_rows_; }
    /// Longest key list that each gather buffer must hold.
    std::span<const index_t> list_capacity() const { return list_capacity_; }

    /// Partial results that a transposed product is summed in: a function of the plan only, so every number of threads
    /// adds in the same order.
    int chunks() const {
        if (shared_rows_) return 1;
        return static_cast<int>(std::clamp<std::size_t>(groups_.size() / 32, 1, 4));
    }
    std::span<const Unit> chunk(int index) const {
        const std::size_t count = units_.size(), parts = static_cast<std::size_t>(chunks()), i = static_cast<std::size_t>(index);
        return std::span<const Unit>(units_).subspan(count * i / parts, count * (i + 1) / parts - count * i / parts);
    }
    /// Keys that a chunk's groups look at lie in this range.
    Bounds chunk_keys(int index) const { return chunk_keys_[static_cast<std::size_t>(index)]; }
    /// Lowest and highest query - key of any span.
    std::pair<index_t, index_t> distances() const { return distances_; }

private:
    struct Entry {
        std::size_t group;
        Piece piece;
    };

    // Rows [16 g, 16 g + 16) of all tiles with contiguous rows meet in group g.
    void add_contiguous_rows(const Plan& plan) {
        std::vector<Entry> entries;
        for (std::size_t t = 0; t < plan.tiles().size(); ++t) {
            const Tile& tile = plan.tiles()[t];
            if (tile.rows.is_list() || tile.rows.empty()) continue;
            const index_t first = tile.rows.front(), last = tile.rows.back() + 1;
            for (index_t g = first / group_size; g * group_size < last; ++g) {
                Piece piece{};
                if (make_piece(static_cast<index_t>(t), tile, [&](int lane) { return tile.rows.find(g * group_size + lane); }, piece))
                    entries.push_back({static_cast<std::size_t>(g), piece});
            }
        }
        // By group, tiles in their order.
        std::vector<std::size_t> starts(static_cast<std::size_t>((plan.queries() + group_size - 1) / group_size) + 1, 0), order(entries.size());
        for (const Entry& entry : entries) ++starts[entry.group + 1];
        std::partial_sum(starts.begin(), starts.end(), starts.begin());
        std::vector<std::size_t> next = starts;
        for (std::size_t e = 0; e < entries.size(); ++e) order[next[entries[e].group]++] = e;
        std::vector<Entry> of_group;
        for (std::size_t g = 0; g + 1 < starts.size(); ++g) {
            if (starts[g] == starts[g + 1]) continue;
            std::array<index_t, group_size> rows;
            for (int lane = 0; lane < group_size; ++lane) rows[static_cast<std::size_t>(lane)] = static_cast<index_t>(g) * group_size + lane;
            of_group.clear();
            for (std::size_t at = starts[g]; at < starts[g + 1]; ++at) of_group.push_back(entries[order[at]]);
            add_group(rows, of_group);
        }
    }

    // Every 16 rows of a list, for all tiles with that list.
    void add_listed_rows(const Plan& plan) {
        // Lists are told apart by their elements, not by where they lie, and ordered by their first row and length: the order of
        // groups is the order of sums.
        std::map<std::pair<index_t, index_t>, std::vector<std::vector<std::size_t>>> lists;  // tiles with the same list
        for (std::size_t t = 0; t < plan.tiles().size(); ++t) {
            const IndexSequence& rows = plan.tiles()[t].rows;
            if (!rows.is_list()) continue;
            auto& candidates = lists[{rows.front(), rows.size()}];
            std::size_t same = 0;
            while (same < candidates.size() && !plan.tiles()[candidates[same][0]].rows.same_elements_as(rows)) ++same;
            if (same == candidates.size()) candidates.emplace_back();
            candidates[same].push_back(t);
        }
        for (const auto& [key, candidates] : lists)
            for (const std::vector<std::size_t>& tiles : candidates) {
                const IndexSequence& rows = plan.tiles()[tiles[0]].rows;
                for (index_t at = 0; at < rows.size(); at += group_size) {
                    std::vector<Entry> entries;
                    const auto position = [&](int lane) { return at + lane < rows.size() ? at + lane : -1; };
                    for (const std::size_t t : tiles) {
                        Piece piece{};
                        if (make_piece(static_cast<index_t>(t), plan.tiles()[t], position, piece)) entries.push_back({0, piece});
                    }
                    std::array<index_t, group_size> group_rows;
                    for (int lane = 0; lane < group_size; ++lane) group_rows[static_cast<std::size_t>(lane)] = position(lane) < 0 ? 0 : rows[position(lane)];
                    if (!entries.empty()) add_group(group_rows, entries);
                }
            }
    }

    template <class Position>
    static bool make_piece(index_t t, const Tile& tile, Position position, Piece& piece) {
        piece = {t, {}, {}, 0, false, tile.keys.is_list() ? 0 : -1};
        bool any = false;
        for (int lane = 0; lane < group_size; ++lane) {
            const index_t at = position(lane);
            if (at < 0 || tile.row_count(at) == 0) continue;
            const Bounds bounds = tile.row_bounds(at);
            piece.lanes.set(static_cast<std::size_t>(lane), bounds);
            piece.span = any ? Bounds{std::min(piece.span.begin, bounds.begin), std::max(piece.span.end, bounds.end)} : bounds;
            any = true;
        }
        piece.span.begin -= piece.span.begin % span_unit;
        piece.span.end = std::min((piece.span.end + span_unit - 1) / span_unit * span_unit, tile.keys.size());
        return any;
    }

    void add_group(std::array<index_t, group_size> rows, std::span<const Entry> entries) {
        Group group{rows, 0, false, pieces_.size(), pieces_.size() + entries.size()};
        for (const Entry& entry : entries) pieces_.push_back(entry.piece);
        int worker = -1;
        for (int lane = 0; lane < group_size; ++lane)
            for (const Entry& entry : entries)
                if (!entry.piece.lanes[static_cast<std::size_t>(lane)].empty()) {
                    group.active |= 1u << lane;
                    worker = lane;
                }
        for (int lane = 0; lane < group_size; ++lane)
            if (!(group.active >> lane & 1)) {
                group.rows[static_cast<std::size_t>(lane)] = group.rows[static_cast<std::size_t>(worker)];
                for (std::size_t p = group.first_piece; p < group.last_piece; ++p)
                    pieces_[p].lanes.set(static_cast<std::size_t>(lane), pieces_[p].lanes[static_cast<std::size_t>(worker)]);
            }
        group.consecutive = true;
        for (std::size_t lane = 1; lane < group_size; ++lane) group.consecutive &= group.rows[lane] == group.rows[0] + static_cast<index_t>(lane);
        groups_.push_back(group);
    }

    void place(const Plan& plan) {
        slot_offsets_.assign(static_cast<std::size_t>(plan.queries()) + 1, 0);
        const auto visit = [&](auto&& f) {
            for (std::size_t g = 0; g < groups_.size(); ++g)
                for (int lane = 0; lane < group_size; ++lane)
                    if (groups_[g].active >> lane & 1)
                        f(static_cast<std::size_t>(groups_[g].rows[static_cast<std::size_t>(lane)]), static_cast<offset_t>(g) * group_size + lane);
        };
        visit([&](std::size_t row, offset_t) { ++slot_offsets_[row + 1]; });
        for (const offset_t count : slot_offsets_) shared_rows_ |= count > 1;
        std::partial_sum(slot_offsets_.begin(), slot_offsets_.end(), slot_offsets_.begin());
        slots_.resize(static_cast<std::size_t>(slot_offsets_.back()));
        std::vector<offset_t> next(slot_offsets_.begin(), slot_offsets_.end() - 1);
        visit([&](std::size_t row, offset_t slot) { slots_[static_cast<std::size_t>(next[row]++)] = slot; });

        for (const Group& group : groups_) {
            int slot = 0;
            for (std::size_t p = group.first_piece; p < group.last_piece; ++p) {
                Piece& piece = pieces_[p];
                const Tile& tile = plan.tiles()[static_cast<std::size_t>(piece.tile)];
                piece.weights = weight_rows_;
                weight_rows_ += piece.span.size();
                const auto [lowest, highest] = std::minmax_element(group.rows.begin(), group.rows.end());
                distances_ = {std::min(distances_.first, *lowest - tile.keys[piece.span.end - 1]), std::max(distances_.second, *highest - tile.keys[piece.span.begin])};
                for (std::size_t lane = 0; lane < group_size; ++lane) piece.masked |= !(piece.lanes[lane] == piece.span);
                masked_ |= piece.masked || tile.excluded_in(piece.span) > 0;
                if (piece.list_slot < 0) continue;
                piece.list_slot = slot++ % gather_buffers;
                const auto at = static_cast<std::size_t>(piece.list_slot);
                if (list_capacity_.size() <= at) list_capacity_.resize(at + 1, 0);
                list_capacity_[at] = std::max(list_capacity_[at], tile.keys.size());
            }
        }
    }

    void form_units(const Plan& plan) {
        constexpr index_t wide_keys = 1024;
        const auto keys_of = [&](const Group& group) {
            offset_t keys = 0;
            for (const Piece& piece : pieces(group)) keys += piece.span.size();
            return keys;
        };
        const auto same_tiles = [&](const Group& a, const Group& b) {
            return std::ranges::equal(pieces(a), pieces(b), {}, &Piece::tile, &Piece::tile);
        };
        // Enough units for some threads, whatever their number.
        const std::size_t wide_groups = std::clamp<std::size_t>(groups_.size() / 16, 2, most_groups);
        for (std::size_t g = 0; g < groups_.size(); ++g) {
            const bool wide = keys_of(groups_[g]) >= wide_keys;
            if (!units_.empty() && units_.back().wide == wide && units_.back().groups() < (wide ? wide_groups : most_narrow_groups) &&
                same_tiles(groups_[units_.back().first], groups_[g]))
                units_.back().last = g + 1;
            else units_.push_back({g, g + 1, wide});
        }
        for (int c = 0; c < chunks(); ++c) {
            Bounds keys{std::numeric_limits<index_t>::max(), 0};
            for (const Unit& unit : chunk(c))
                for (std::size_t p = groups_[unit.first].first_piece; p < groups_[unit.last - 1].last_piece; ++p) {
                    const IndexSequence& sequence = plan.tiles()[static_cast<std::size_t>(pieces_[p].tile)].keys;
                    // A list is scattered as a whole.
                    const Bounds span = sequence.is_list() ? Bounds{0, sequence.size()} : pieces_[p].span;
                    keys = {std::min(keys.begin, sequence[span.begin]), std::max(keys.end, sequence[span.end - 1] + 1)};
                }
            chunk_keys_.push_back(keys.empty() ? Bounds{} : keys);
        }
    }

    static constexpr int gather_buffers = 4;  // a group with more lists gathers some of them again
    std::vector<Group> groups_;
    std::vector<Piece> pieces_;
    std::vector<Unit> units_;
    std::vector<Bounds> chunk_keys_;
    std::pair<index_t, index_t> distances_{0, 0};
    std::vector<offset_t> slot_offsets_, slots_;
    std::vector<index_t> list_capacity_;
    offset_t weight_rows_ = 0;
    bool shared_rows_ = false, masked_ = false;
};

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
