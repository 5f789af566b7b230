#pragma once

#include <polyattn/plan/plan.hpp>

#include <iterator>

POLYATTN_BEGIN_NAMESPACE

// Unions and intersections of plans, in parts: tiles stay tiles wherever the result has that form, the rest becomes edges at
// O(edges). No step looks at all queries x keys pairs.

namespace detail {

inline std::vector<index_t> common(std::span<const index_t> a, std::span<const index_t> b) {
    std::vector<index_t> out;
    std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(out));
    return out;
}

/// Positions of `inner` keys that lie in the absolute key range [first, last).
inline Bounds positions(const IndexSequence& inner, index_t first, index_t last) {
    return {inner.lower_bound(first), inner.lower_bound(std::max(first, last))};
}

/// Absolute key range that positions of a non-empty `bounds` span; {0, 0} for none.
inline Bounds key_range(const Tile& tile, Bounds bounds) {
    if (bounds.empty()) return {};
    return {tile.keys[bounds.begin], tile.keys[bounds.end - 1] + 1};
}

inline Bounds overlap(Bounds a, Bounds b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

/// Rows of both tiles.
inline IndexSequence common_rows(const IndexSequence& a, const IndexSequence& b) {
    if (a.same_as(b)) return a;
    if (!a.is_list() && !b.is_list()) {
        if (a.empty() || b.empty()) return {};
        return IndexSequence::range(std::max(a.front(), b.front()), std::min(a.back(), b.back()) + 1);
    }
    const bool walk_a = a.is_list() && (!b.is_list() || a.size() <= b.size());
    const IndexSequence& list = walk_a ? a : b;
    const IndexSequence& other = walk_a ? b : a;
    std::vector<index_t> rows;
    for (const index_t row : list.elements())
        if (other.find(row) >= 0) rows.push_back(row);
    if (rows.size() == list.elements().size()) return list;
    return IndexSequence::list(std::move(rows));
}

/// Keys of both tiles as a sequence; exclusions are folded into a list, and returned for a range.
inline IndexSequence common_keys(const Tile& a, const Tile& b, std::vector<index_t>& excluded) {
    std::set_union(a.excluded.begin(), a.excluded.end(), b.excluded.begin(), b.excluded.end(), std::back_inserter(excluded));
    if (!a.keys.is_list() && !b.keys.is_list()) {
        if (a.keys.empty() || b.keys.empty()) return {};
        return IndexSequence::range(std::max(a.keys.front(), b.keys.front()), std::min(a.keys.back(), b.keys.back()) + 1);
    }
    const IndexSequence& list = a.keys.is_list() ? a.keys : b.keys;
    const IndexSequence& other = a.keys.is_list() ? b.keys : a.keys;
    if (excluded.empty() && a.keys.same_as(b.keys)) return a.keys;
    std::vector<index_t> keys;
    for (const index_t key : list.elements())
        if (other.find(key) >= 0 && !std::binary_search(excluded.begin(), excluded.end(), key)) keys.push_back(key);
    excluded.clear();
    if (keys.size() == list.elements().size()) return list;  // keeps the identity that kernels share gathers by
    return IndexSequence::list(std::move(keys));
}

/// The pairs of both tiles, always a tile.
inline Tile intersect(const Tile& a, const Tile& b) {
    Tile out;
    out.rows = common_rows(a.rows, b.rows);
    out.keys = common_keys(a, b, out.excluded);
    if (out.rows.empty() || out.keys.empty()) return {};
    for (index_t r = 0; r < out.rows.size(); ++r) {
        const index_t row = out.rows[r];
        const Bounds in_a = key_range(a, a.row_bounds(a.rows.find(row)));
        const Bounds in_b = key_range(b, b.row_bounds(b.rows.find(row)));
        const Bounds both = overlap(in_a, in_b);
        out.bounds.push_back(both.empty() ? Bounds{} : positions(out.keys, both.begin, both.end));
    }
    return out;
}

inline void keep_if_any(Tile&& part, std::vector<Tile>& out) {
    if (part.has_any()) out.push_back(std::move(part));
}
/// Bounds of a row of the plan in a tile; none if the tile has no such row.
inline Bounds bounds_of_row(const Tile& tile, index_t row) {
    const index_t at = tile.rows.find(row);
    return at < 0 ? Bounds{} : tile.row_bounds(at);
}

/// subtract() of a contiguous range: it splits a row into what lies before and behind it, and the keys that `minus` leaves out inside its range stay.
inline void subtract_range(const Tile& tile, const Tile& minus, std::vector<Tile>& out) {
    Tile before = tile, behind = tile;
    before.bounds.clear();
    behind.bounds.clear();
    for (index_t r = 0; r < tile.rows.size(); ++r) {
        const Bounds own = tile.row_bounds(r);
        const Bounds taken = key_range(minus, bounds_of_row(minus, tile.rows[r]));
        const Bounds hole = taken.empty() ? Bounds{own.end, own.end} : positions(tile.keys, taken.begin, taken.end);
        before.bounds.push_back({own.begin, std::clamp(hole.begin, own.begin, std::max(own.begin, own.end))});
        behind.bounds.push_back({std::clamp(hole.end, own.begin, std::max(own.begin, own.end)), own.end});
    }
    keep_if_any(std::move(before), out);
    keep_if_any(std::move(behind), out);
    if (minus.excluded.empty()) return;
    Tile holes{common_rows(tile.rows, minus.rows), IndexSequence::list(minus.excluded), {}, {}};
    for (index_t r = 0; r < holes.rows.size(); ++r) {
        const Bounds range = key_range(minus, bounds_of_row(minus, holes.rows[r]));
        holes.bounds.push_back(range.empty() ? Bounds{} : positions(holes.keys, range.begin, range.end));
    }
    keep_if_any(intersect(tile, holes), out);
}

/// The tile without a list of its keys, in the same rows.
inline Tile without_keys(Tile tile, const std::vector<index_t>& keys) {
    if (!tile.keys.is_list()) {
        std::vector<index_t> excluded;
        std::set_union(tile.excluded.begin(), tile.excluded.end(), keys.begin(), keys.end(), std::back_inserter(excluded));
        tile.excluded = std::move(excluded);
        return tile;
    }
    std::vector<index_t> left;
    std::set_difference(tile.keys.elements().begin(), tile.keys.elements().end(), keys.begin(), keys.end(), std::back_inserter(left));
    const IndexSequence rest = IndexSequence::list(std::move(left));
    for (Bounds& bounds : tile.bounds) {
        const Bounds range = key_range(tile, bounds);
        bounds = range.empty() ? Bounds{} : positions(rest, range.begin, range.end);
    }
    tile.keys = rest;
    return tile;
}

/// subtract() of a list of keys: rows of which it takes all of the list's keys in reach exclude them, rows of which it takes none keep theirs; a row in between becomes pairs.
inline void subtract_list(const Tile& tile, const Tile& minus, std::vector<Tile>& out, std::vector<Pair>& pairs) {
    std::vector<index_t> reachable;
    for (const index_t key : minus.keys.elements())
        if (tile.keys.find(key) >= 0 && !std::binary_search(tile.excluded.begin(), tile.excluded.end(), key)) reachable.push_back(key);
    const IndexSequence listed = IndexSequence::list(reachable);
    Tile covered = tile, untouched = tile;
    covered.bounds.clear();
    untouched.bounds.clear();
    for (index_t r = 0; r < tile.rows.size(); ++r) {
        const Bounds own = tile.row_bounds(r);
        const Bounds in_reach = own.empty() ? Bounds{} : positions(listed, key_range(tile, own).begin, key_range(tile, own).end);
        const Bounds taken_keys = key_range(minus, bounds_of_row(minus, tile.rows[r]));
        const Bounds taken = taken_keys.empty() ? Bounds{} : overlap(in_reach, positions(listed, taken_keys.begin, taken_keys.end));
        const bool all = taken.size() == in_reach.size(), none = taken.empty();
        covered.bounds.push_back(all ? own : Bounds{});
        untouched.bounds.push_back(none && !all ? own : Bounds{});
        if (!all && !none)
            tile.for_each_key(r, [&](index_t key) {
                const index_t position = listed.find(key);
                if (position < taken.begin || position >= taken.end) pairs.push_back({tile.rows[r], key});
            });
    }
    keep_if_any(without_keys(std::move(covered), reachable), out);
    keep_if_any(std::move(untouched), out);
}

/// What is left of a tile when another's pairs are taken away: tiles, and pairs where it has no tile form.
inline void subtract(const Tile& tile, const Tile& minus, std::vector<Tile>& out, std::vector<Pair>& pairs) {
    if (minus.keys.is_list()) subtract_list(tile, minus, out, pairs);
    else subtract_range(tile, minus, out);
}

/// Tiles of a plan that share a row with `tile`, ascending.
inline std::vector<index_t> tiles_on_rows(const Plan& plan, const Tile& tile) {
    std::vector<index_t> found;
    if (plan.tiles().size() <= 4) {
        found.resize(plan.tiles().size());
        std::iota(found.begin(), found.end(), 0);
        return found;
    }
    for (index_t r = 0; r < tile.rows.size(); ++r)
        for (const Plan::TileRow& at : plan.tile_rows(tile.rows[r])) found.push_back(at.tile);
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    return found;
}

inline void require_same_shape(const Plan& a, const Plan& b) {
    if (a.queries() != b.queries() || a.keys() != b.keys())
        throw invalid_input("plan", detail::text(a.queries(), " queries x ", a.keys(), " keys"),
                            detail::text(b.queries(), " x ", b.keys()));
}

}  // namespace detail

/// Pairs of either plan, each once. For each tile of the plan with more tiles O(its rows x tiles of the other on these rows), the
/// edges, and the pairs of rows that lose their tile form.
inline Plan unite(const Plan& a, const Plan& b) {
    detail::require_same_shape(a, b);
    // Tiles of b are cut by those of a: many small ones must not cut a large one again and again.
    if (a.tiles().size() > 16 && a.tiles().size() > b.tiles().size()) return unite(b, a);
    std::vector<Tile> tiles(a.tiles().begin(), a.tiles().end());
    std::vector<detail::Pair> pairs;
    for (const Tile& tile : b.tiles()) {
        std::vector<Tile> rest{tile};
        for (const index_t t : detail::tiles_on_rows(a, tile)) {
            std::vector<Tile> next;
            for (const Tile& part : rest) detail::subtract(part, a.tiles()[static_cast<std::size_t>(t)], next, pairs);
            rest = std::move(next);
        }
        std::move(rest.begin(), rest.end(), std::back_inserter(tiles));
    }
    const Plan dense = detail::unchecked_plan(a.queries(), a.keys(), std::move(tiles), {});
    // Pairs that left a tile of b may still be in another tile of a; edges may be in any tile.
    for (const Plan* plan : {&a, &b}) {
        if (plan->edges().count() == 0) continue;
        for (index_t i = 0; i < plan->queries(); ++i)
            for (const index_t key : plan->edges().row(i)) pairs.push_back({i, key});
    }
    std::erase_if(pairs, [&](const detail::Pair& pair) { return dense.tile_of(pair.row, pair.key) >= 0; });
    return detail::unchecked_plan(a.queries(), a.keys(), {dense.tiles().begin(), dense.tiles().end()}, detail::edges_from_pairs(pairs, a.queries()));
}

/// Pairs of both plans. O(rows that pairs of tiles share + edges).
inline Plan intersect(const Plan& a, const Plan& b) {
    detail::require_same_shape(a, b);
    std::vector<Tile> tiles;
    for (const Tile& tile : a.tiles())
        for (const index_t t : detail::tiles_on_rows(b, tile)) {
            Tile both = detail::intersect(tile, b.tiles()[static_cast<std::size_t>(t)]);
            if (both.has_any()) tiles.push_back(std::move(both));
        }
    std::vector<detail::Pair> pairs;
    const auto keep_common = [&](const Plan& from, const Plan& other) {
        if (from.edges().count() == 0) return;
        for (index_t i = 0; i < from.queries(); ++i)
            for (const index_t key : from.edges().row(i))
                if (other.contains(i, key)) pairs.push_back({i, key});
    };
    keep_common(a, b);
    keep_common(b, a);
    return detail::unchecked_plan(a.queries(), a.keys(), std::move(tiles), detail::edges_from_pairs(pairs, a.queries()));
}

/// True if two plans of the same numbers of queries and keys show the same pairs, however they are cut into parts. O(pairs) time and one
/// row of memory, O(rows of all tiles + edges) where the parts are the same.
inline bool same_pairs(const Plan& a, const Plan& b) {
    detail::require_same_shape(a, b);
    const auto same_tile = [](const Tile& x, const Tile& y) {
        return x.rows.same_elements_as(y.rows) && x.keys.same_elements_as(y.keys) && x.bounds == y.bounds && x.excluded == y.excluded;
    };
    if (std::equal(a.tiles().begin(), a.tiles().end(), b.tiles().begin(), b.tiles().end(), same_tile) && a.edges().keys == b.edges().keys && a.edges().offsets == b.edges().offsets) return true;
    if (a.count() != b.count()) return false;
    std::vector<index_t> of_a, of_b;
    const auto read_row = [](const Plan& plan, index_t i, std::vector<index_t>& keys) {
        keys.clear();
        plan.for_each_key(i, [&](index_t key) { keys.push_back(key); });
        std::sort(keys.begin(), keys.end());
    };
    for (index_t i = 0; i < a.queries(); ++i) {
        read_row(a, i, of_a);
        read_row(b, i, of_b);
        if (of_a != of_b) return false;
    }
    return true;
}

/// The first `queries` queries and `keys` keys of a plan. Throws invalid_input if it has fewer.
inline Plan prefix(const Plan& plan, index_t queries, index_t keys) {
    detail::require(queries >= 0 && keys >= 0 && queries <= plan.queries() && keys <= plan.keys(), "prefix",
                    [&] { return detail::text("at most ", plan.queries(), " queries x ", plan.keys(), " keys"); },
                    detail::text(queries, " x ", keys));
    const Tile corner{IndexSequence::range(0, queries), IndexSequence::range(0, keys), {}, {}};
    std::vector<Tile> tiles;
    for (const Tile& tile : plan.tiles()) {
        Tile part = detail::intersect(tile, corner);
        if (part.has_any()) tiles.push_back(std::move(part));
    }
    std::vector<detail::Pair> pairs;
    if (plan.edges().count() > 0)
        for (index_t i = 0; i < queries; ++i)
            for (const index_t key : plan.edges().row(i))
                if (key < keys) pairs.push_back({i, key});
    return detail::unchecked_plan(queries, keys, std::move(tiles), detail::edges_from_pairs(pairs, queries));
}

/// The same pairs among more queries and keys, behind the plan's own. Throws invalid_input if there are less.
inline Plan extended(const Plan& plan, index_t queries, index_t keys) {
    detail::require(queries >= plan.queries() && keys >= plan.keys(), "extended", [&] { return detail::text("at least ", plan.queries(), " queries x ", plan.keys(), " keys"); },
                    detail::text(queries, " x ", keys));
    Edges edges = plan.edges();
    if (!edges.offsets.empty()) edges.offsets.resize(static_cast<std::size_t>(queries) + 1, edges.offsets.back());
    return detail::unchecked_plan(queries, keys, {plan.tiles().begin(), plan.tiles().end()}, std::move(edges));
}

POLYATTN_END_NAMESPACE
