#pragma once

#include <polyattn/plan/part.hpp>

#include <functional>
#include <map>
#include <mutex>

POLYATTN_BEGIN_NAMESPACE

/// Compressed sparse rows of a whole plan, keys ascending.
struct Csr {
    std::vector<offset_t> offsets;
    std::vector<index_t> keys;
};

class Plan;
class PlanBuilder;
namespace detail {
/// A plan of parts that are known to fit: nothing is checked.
Plan unchecked_plan(index_t queries, index_t keys, std::vector<Tile> tiles, Edges edges);
}  // namespace detail

/// Which keys every query sees, as disjoint parts: dense tiles and gathered edges. A value: copies share one immutable
/// state, and so do heads, batches, layers and threads. A function of (pattern, sampler draw, queries, keys) only. PlanBuilder makes it.
class Plan {
public:
    Plan() : Plan(0, 0, {}, {}) {}

    /// A plan whose edges a backend keeps (adopt()); `fetch` copies them, when the host asks for the first time.
    static Plan with_edges_elsewhere(index_t queries, index_t keys, std::vector<Tile> tiles, std::function<Edges()> fetch) {
        Plan plan(queries, keys, std::move(tiles), {});
        plan.state_->fetch = std::move(fetch);
        return plan;
    }

    index_t queries() const { return state_->queries; }
    index_t keys() const { return state_->keys; }
    std::span<const Tile> tiles() const { return state_->tiles; }
    const Edges& edges() const {
        if (state_->fetch) std::call_once(state_->fetched, [this] { state_->edges = state_->fetch(); });
        return state_->edges;
    }

    /// Pairs (query, key). O(rows of all tiles).
    offset_t count() const {
        offset_t total = edges().count();
        for (const Tile& tile : tiles()) {
            if (tile.bounds.empty()) total += offset_t{tile.rows.size()} * tile.row_count(0);
            else
                for (index_t r = 0; r < tile.rows.size(); ++r) total += tile.row_count(r);
        }
        return total;
    }
    /// Share of all queries x keys pairs, 0 for an empty plan.
    double density() const {
        const double all = double(queries()) * double(keys());
        return all > 0 ? double(count()) / all : 0;
    }

    /// Calls f(key) for every key of a query: tile by tile, then edges; ascending within a part only.
    template <class F>
    void for_each_key(index_t query, F&& f) const {
        for (const TileRow& at : tile_rows(query)) tiles()[static_cast<std::size_t>(at.tile)].for_each_key(at.row, f);
        for (const index_t key : edges().row(query)) f(key);
    }
    bool contains(index_t query, index_t key) const { return tile_of(query, key) >= 0 || edges().contains(query, key); }

    /// Ascending keys of every query. O(count).
    Csr to_csr() const {
        Csr csr;
        csr.offsets.reserve(static_cast<std::size_t>(queries()) + 1);
        csr.offsets.push_back(0);
        for (index_t i = 0; i < queries(); ++i) {
            const auto first = static_cast<std::ptrdiff_t>(csr.keys.size());
            for_each_key(i, [&](index_t key) { csr.keys.push_back(key); });
            std::sort(csr.keys.begin() + first, csr.keys.end());
            csr.offsets.push_back(static_cast<offset_t>(csr.keys.size()));
        }
        return csr;
    }

    /// True if no (query, key) pair is in two parts. The library's own patterns always are; for tests of one's own. O(count).
    bool is_disjoint() const {
        const Csr csr = to_csr();
        for (index_t i = 0; i < queries(); ++i) {
            const auto first = csr.keys.begin() + csr.offsets[static_cast<std::size_t>(i)];
            const auto last = csr.keys.begin() + csr.offsets[static_cast<std::size_t>(i) + 1];
            if (std::adjacent_find(first, last) != last) return false;
        }
        return true;
    }

    /// A tile and the position of one query among its rows.
    struct TileRow {
        index_t tile, row;
    };
    /// The tiles in which a query sees at least one key.
    std::span<const TileRow> tile_rows(index_t query) const {
        const auto& index = lowered<RowIndex>();
        const auto first = index.offsets[static_cast<std::size_t>(query)], last = index.offsets[static_cast<std::size_t>(query) + 1];
        return std::span<const TileRow>(index.rows).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(last - first));
    }
    /// The tile that holds a pair, -1 if none does.
    index_t tile_of(index_t query, index_t key) const {
        for (const TileRow& at : tile_rows(query))
            if (tiles()[static_cast<std::size_t>(at.tile)].contains_key(at.row, key)) return at.tile;
        return -1;
    }

    /// A backend's own schedule of this plan, `L(plan)`, built at first use and kept beside it. Thread-safe.
    template <class L>
    const L& lowered() const {
        const void* const key = &type_tag<L>;
        const std::lock_guard lock(state_->mutex);
        auto& slot = state_->lowerings[key];
        if (!slot) {
            // Building may ask for another lowering of the same plan, hence the recursive mutex.
            auto built = std::make_shared<const L>(*this);
            state_->lowerings[key] = built;
            return *built;
        }
        return *static_cast<const L*>(slot.get());
    }
    /// The schedule if it was built or adopted before, otherwise null.
    template <class L>
    const L* find_lowered() const {
        const std::lock_guard lock(state_->mutex);
        const auto found = state_->lowerings.find(&type_tag<L>);
        return found == state_->lowerings.end() ? nullptr : static_cast<const L*>(found->second.get());
    }
    /// Keeps a schedule that was made elsewhere than from the plan's parts on the host, for lowered() to find, unless one is there already.
    template <class L>
    void adopt(std::shared_ptr<const L> lowering) const {
        const std::lock_guard lock(state_->mutex);
        auto& slot = state_->lowerings[&type_tag<L>];
        if (!slot) slot = std::move(lowering);
    }

private:
    friend class PlanBuilder;
    friend Plan detail::unchecked_plan(index_t, index_t, std::vector<Tile>, Edges);
    Plan(index_t queries, index_t keys, std::vector<Tile> tiles, Edges edges) : state_(std::make_shared<State>(queries, keys, std::move(tiles), std::move(edges))) {}

    template <class L>
    static inline char type_tag = 0;

    struct State {
        State(index_t q, index_t k, std::vector<Tile> t, Edges e) : queries(q), keys(k), tiles(std::move(t)), edges(std::move(e)) {}
        index_t queries, keys;
        std::vector<Tile> tiles;
        Edges edges;
        std::function<Edges()> fetch;
        std::once_flag fetched;
        std::recursive_mutex mutex;
        std::map<const void*, std::shared_ptr<const void>> lowerings;
    };

    struct RowIndex {
        explicit RowIndex(const Plan& plan) : offsets(static_cast<std::size_t>(plan.queries()) + 1, 0) {
            const auto visit = [&](auto&& f) {
                for (std::size_t t = 0; t < plan.tiles().size(); ++t) {
                    const Tile& tile = plan.tiles()[t];
                    for (index_t r = 0; r < tile.rows.size(); ++r)
                        if (tile.row_count(r) > 0) f(static_cast<std::size_t>(tile.rows[r]), TileRow{static_cast<index_t>(t), r});
                }
            };
            visit([&](std::size_t row, TileRow) { ++offsets[row + 1]; });
            std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
            rows.resize(static_cast<std::size_t>(offsets.back()));
            std::vector<offset_t> next(offsets.begin(), offsets.end() - 1);
            visit([&](std::size_t row, TileRow at) { rows[static_cast<std::size_t>(next[row]++)] = at; });
        }
        std::vector<offset_t> offsets;
        std::vector<TileRow> rows;
    };

    std::shared_ptr<State> state_;
};

inline Plan detail::unchecked_plan(index_t queries, index_t keys, std::vector<Tile> tiles, Edges edges) { return Plan(queries, keys, std::move(tiles), std::move(edges)); }

/// Edges by key instead of by query, for the backward pass: rows of transposed edge e' and the forward edge it is.
struct TransposedEdges {
    explicit TransposedEdges(const Plan& plan) : offsets(static_cast<std::size_t>(plan.keys()) + 1, 0) {
        const Edges& edges = plan.edges();
        for (const index_t key : edges.keys) ++offsets[static_cast<std::size_t>(key) + 1];
        std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
        queries.resize(edges.keys.size());
        forward.resize(edges.keys.size());
        std::vector<offset_t> next(offsets.begin(), offsets.end() - 1);
        if (edges.offsets.empty()) return;
        for (index_t i = 0; i < plan.queries(); ++i)
            for (offset_t e = edges.offsets[static_cast<std::size_t>(i)]; e < edges.offsets[static_cast<std::size_t>(i) + 1]; ++e) {
                const auto to = static_cast<std::size_t>(next[static_cast<std::size_t>(edges.keys[static_cast<std::size_t>(e)])]++);
                queries[to] = i;
                forward[to] = e;
            }
    }
    std::vector<offset_t> offsets;  // keys + 1
    std::vector<index_t> queries;   // ascending within a key
    std::vector<offset_t> forward;
};

/// Collects the parts of a plan and checks them. All parts must be disjoint (Plan::is_disjoint tells, unite() makes them so).
class PlanBuilder {
public:
    PlanBuilder(index_t queries, index_t keys) : queries_(queries), keys_(keys) {
        detail::require(queries >= 0, "queries", "a number >= 0", queries);
        detail::require(keys >= 0, "keys", "a number >= 0", keys);
    }

    /// Every query i sees the contiguous keys [begin, end) = bounds(i), clipped to the keys that exist.
    template <class F>
    PlanBuilder& range(F&& bounds) {
        Tile tile{IndexSequence::range(0, queries_), IndexSequence::range(0, keys_), {}, {}};
        tile.bounds.reserve(static_cast<std::size_t>(queries_));
        bool full = true;
        for (index_t i = 0; i < queries_; ++i) {
            const auto [begin, end] = bounds(i);
            const Bounds clipped{static_cast<index_t>(std::clamp<offset_t>(begin, 0, keys_)),
                                 static_cast<index_t>(std::clamp<offset_t>(end, 0, keys_))};
            full &= clipped == Bounds{0, keys_};
            tile.bounds.push_back(clipped);
        }
        if (full) tile.bounds.clear();
        return add(std::move(tile));
    }

    /// Rows of a tile see a whole key sequence.
    PlanBuilder& tile(IndexSequence rows, IndexSequence keys) { return add(Tile{std::move(rows), std::move(keys), {}, {}}); }

    /// The row at position r sees the positions bounds(r) of the key sequence.
    template <class F>
    PlanBuilder& tile(IndexSequence rows, IndexSequence keys, F&& bounds) {
        Tile tile{std::move(rows), std::move(keys), {}, {}};
        for (index_t r = 0; r < tile.rows.size(); ++r) {
            const auto [begin, end] = bounds(r);
            tile.bounds.push_back({static_cast<index_t>(std::clamp<offset_t>(begin, 0, tile.keys.size())),
                                   static_cast<index_t>(std::clamp<offset_t>(end, 0, tile.keys.size()))});
        }
        return add(std::move(tile));
    }

    /// Throws invalid_input if rows or keys are not strictly ascending or out of range, or the bounds do not fit.
    PlanBuilder& add(Tile tile) {
        check_sequence(tile.rows, queries_, "rows of a tile");
        check_sequence(tile.keys, keys_, "keys of a tile");
        detail::require(tile.bounds.empty() || tile.bounds.size() == static_cast<std::size_t>(tile.rows.size()), "bounds of a tile",
                        "none or one a row", tile.bounds.size());
        for (const Bounds& range : tile.bounds)
            if (range.begin < 0 || range.end > tile.keys.size()) throw invalid_input("bounds of a tile", "positions of its keys", detail::text("[", range.begin, ", ", range.end, ")"));
        detail::require(tile.excluded.empty() || !tile.keys.is_list(), "excluded keys of a tile", "none beside listed keys",
                        tile.excluded.size());
        check_ascending(tile.excluded, keys_, "excluded keys of a tile");
        if (tile.has_any()) tiles_.push_back(std::move(tile));
        return *this;
    }

    /// Edges in compressed sparse rows. Throws invalid_input unless offsets fit and every row is strictly ascending in range.
    PlanBuilder& edges(Edges edges) {
        detail::require(edges_.keys.empty(), "edges", "one edge list a plan", "a second one");
        detail::require(edges.offsets.size() == static_cast<std::size_t>(queries_) + 1 || (edges.offsets.empty() && edges.keys.empty()),
                        "edge offsets", [&] { return detail::text(queries_, " + 1 of them"); }, edges.offsets.size());
        if (!edges.offsets.empty()) {
            detail::require(edges.offsets.front() == 0, "edge offsets", "0 first", edges.offsets.front());
            detail::require(edges.offsets.back() == edges.count(), "edge offsets", "the number of edges last", edges.offsets.back());
            for (std::size_t i = 0; i + 1 < edges.offsets.size(); ++i)
                detail::require(edges.offsets[i] <= edges.offsets[i + 1], "edge offsets", "ascending offsets", edges.offsets[i + 1]);
            for (index_t i = 0; i < queries_; ++i) check_ascending(edges.row(i), keys_, "edge keys of a row");
        }
        edges_ = std::move(edges);
        return *this;
    }

    /// The plan; the builder is empty afterwards.
    Plan build() { return Plan(queries_, keys_, std::move(tiles_), std::move(edges_)); }

private:
    static void check_ascending(std::span<const index_t> indices, index_t limit, const char* argument) {
        for (std::size_t i = 0; i < indices.size(); ++i) {
            if (indices[i] < 0 || indices[i] >= limit)
                throw invalid_input(argument, detail::text("indices of [0, ", limit, ")"), std::to_string(indices[i]));
            if (i > 0 && indices[i] <= indices[i - 1])
                throw invalid_input(argument, "strictly ascending indices, no duplicates",
                                    detail::text(indices[i], " after ", indices[i - 1]));
        }
    }
    static void check_sequence(const IndexSequence& sequence, index_t limit, const char* argument) {
        if (sequence.is_list()) return check_ascending(sequence.elements(), limit, argument);
        if (!sequence.empty() && (sequence.front() < 0 || sequence.back() >= limit))
            throw invalid_input(argument, detail::text("indices of [0, ", limit, ")"),
                                detail::text(sequence.front(), " to ", sequence.back()));
    }

    index_t queries_, keys_;
    std::vector<Tile> tiles_;
    Edges edges_;
};

POLYATTN_END_NAMESPACE
