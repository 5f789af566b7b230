#pragma once

#include <polyattn/core/error.hpp>

#include <algorithm>
#include <memory>
#include <numeric>
#include <span>
#include <vector>

POLYATTN_BEGIN_NAMESPACE

/// Ascending token indices: a range [first, first + size), or a sorted list (shared, not copied: tiles that name the same
/// list share what kernels gather for it).
class IndexSequence {
public:
    IndexSequence() = default;

    static IndexSequence range(index_t first, index_t last) {
        IndexSequence sequence;
        sequence.first_ = first;
        sequence.size_ = std::max(last - first, index_t{0});
        return sequence;
    }
    /// The list must be strictly ascending; PlanBuilder checks it.
    static IndexSequence list(std::vector<index_t> indices) {
        IndexSequence sequence;
        sequence.size_ = static_cast<index_t>(indices.size());
        sequence.list_ = std::make_shared<const std::vector<index_t>>(std::move(indices));
        return sequence;
    }

    bool is_list() const { return list_ != nullptr; }
    index_t size() const { return size_; }
    bool empty() const { return size_ == 0; }
    index_t operator[](index_t position) const {
        return list_ ? (*list_)[static_cast<std::size_t>(position)] : first_ + position;
    }
    index_t front() const { return (*this)[0]; }
    index_t back() const { return (*this)[size_ - 1]; }

    /// Position of the first index >= value; size() if there is none. O(1) for a range, O(log size) for a list.
    index_t lower_bound(index_t value) const {
        if (!list_) return std::clamp(value - first_, index_t{0}, size_);
        return static_cast<index_t>(std::lower_bound(list_->begin(), list_->end(), value) - list_->begin());
    }
    /// Position of `index`, -1 if it is not in the sequence.
    index_t find(index_t index) const {
        const index_t position = lower_bound(index);
        return position < size_ && (*this)[position] == index ? position : -1;
    }
    /// The list's identity and elements; null and empty for a range.
    const void* identity() const { return list_.get(); }
    std::span<const index_t> elements() const { return list_ ? std::span<const index_t>(*list_) : std::span<const index_t>(); }
    /// The same elements, wherever they lie.
    bool same_elements_as(const IndexSequence& other) const {
        return same_as(other) || (list_ && other.list_ && *list_ == *other.list_);
    }
    bool same_as(const IndexSequence& other) const {
        return list_ == other.list_ && size_ == other.size_ && (list_ || first_ == other.first_);
    }

private:
    index_t first_ = 0, size_ = 0;
    std::shared_ptr<const std::vector<index_t>> list_;
};

/// A half-open range of positions in a tile's key sequence.
struct Bounds {
    index_t begin = 0, end = 0;
    bool empty() const { return begin >= end; }
    index_t size() const { return empty() ? 0 : end - begin; }
    friend bool operator==(const Bounds&, const Bounds&) = default;
};

/// Dense work: rows x a sequence of keys. Row r sees the keys at positions bounds[r] of the sequence, all of them if
/// `bounds` is empty. `excluded` (ascending keys) is seen by no row of the tile; only with a contiguous key sequence.
struct Tile {
    IndexSequence rows, keys;
    std::vector<Bounds> bounds;
    std::vector<index_t> excluded;

    Bounds row_bounds(index_t row_position) const {
        return bounds.empty() ? Bounds{0, keys.size()} : bounds[static_cast<std::size_t>(row_position)];
    }
    /// Excluded keys in a range of positions.
    index_t excluded_in(Bounds range) const {
        if (excluded.empty() || range.empty()) return 0;
        const auto from = std::lower_bound(excluded.begin(), excluded.end(), keys[range.begin]);
        return static_cast<index_t>(std::upper_bound(from, excluded.end(), keys[range.end - 1]) - from);
    }
    index_t row_count(index_t row_position) const {
        const Bounds range = row_bounds(row_position);
        return range.size() - excluded_in(range);
    }
    bool contains_key(index_t row_position, index_t key) const {
        const index_t position = keys.find(key);
        const Bounds range = row_bounds(row_position);
        return position >= range.begin && position < range.end && !std::binary_search(excluded.begin(), excluded.end(), key);
    }
    template <class F>
    void for_each_key(index_t row_position, F&& f) const {
        const Bounds range = row_bounds(row_position);
        if (range.empty()) return;
        auto skip = std::lower_bound(excluded.begin(), excluded.end(), keys[range.begin]);
        for (index_t position = range.begin; position < range.end; ++position) {
            const index_t key = keys[position];
            if (skip != excluded.end() && *skip == key) ++skip;
            else f(key);
        }
    }
    bool has_any() const {
        for (index_t r = 0; r < rows.size(); ++r)
            if (row_count(r) > 0) return true;
        return false;
    }
};

/// Gathered work: keys of every row in compressed sparse rows, ascending within a row.
struct Edges {
    std::vector<offset_t> offsets;  // rows + 1, or empty for no edges
    std::vector<index_t> keys;

    offset_t count() const { return static_cast<offset_t>(keys.size()); }
    std::span<const index_t> row(index_t i) const {
        if (offsets.empty()) return {};
        const auto r = static_cast<std::size_t>(i);
        return std::span<const index_t>(keys).subspan(static_cast<std::size_t>(offsets[r]),
                                                      static_cast<std::size_t>(offsets[r + 1] - offsets[r]));
    }
    bool contains(index_t i, index_t key) const {
        const auto keys_of_row = row(i);
        return std::binary_search(keys_of_row.begin(), keys_of_row.end(), key);
    }
};

namespace detail {

struct Pair {
    index_t row, key;
    friend auto operator<=>(const Pair&, const Pair&) = default;
};

/// Pairs in any order, repeats allowed, to sorted unique rows. O(pairs + rows) plus the sort within each row.
inline Edges edges_from_pairs(std::span<const Pair> pairs, index_t rows) {
    Edges edges;
    if (pairs.empty()) return edges;
    std::vector<offset_t> next(static_cast<std::size_t>(rows) + 1, 0);
    for (const Pair& pair : pairs) ++next[static_cast<std::size_t>(pair.row) + 1];
    std::partial_sum(next.begin(), next.end(), next.begin());
    std::vector<offset_t> starts = next;
    edges.keys.resize(pairs.size());
    for (const Pair& pair : pairs) edges.keys[static_cast<std::size_t>(next[static_cast<std::size_t>(pair.row)]++)] = pair.key;
    edges.offsets.assign(static_cast<std::size_t>(rows) + 1, 0);
    auto out = edges.keys.begin();
    for (std::size_t i = 0; i < static_cast<std::size_t>(rows); ++i) {
        const auto first = edges.keys.begin() + starts[i], last = edges.keys.begin() + starts[i + 1];
        std::sort(first, last);
        out = std::copy(first, std::unique(first, last), out);
        edges.offsets[i + 1] = out - edges.keys.begin();
    }
    edges.keys.erase(out, edges.keys.end());
    return edges;
}

}  // namespace detail

POLYATTN_END_NAMESPACE
