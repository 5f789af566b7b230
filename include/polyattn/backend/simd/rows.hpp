#pragma once
// Rows as kernels want them: unit stride, padded to whole vectors, listed rows gathered, non-finite ones marked.

#include <polyattn/backend/simd/vector.hpp>
#include <polyattn/core/view.hpp>
#include <polyattn/core/workspace.hpp>
#include <polyattn/plan/part.hpp>

#include <algorithm>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// Rows of unit stride whose columns may be read up to the next whole vector.
template <class T>
struct Rows {
    const T* data = nullptr;
    std::ptrdiff_t stride = 0;
    const T* row(index_t i) const { return data + i * stride; }
};

constexpr index_t padded(index_t columns, int lanes) { return (columns + lanes - 1) / lanes * lanes; }

/// f(position, vector of `from`) over whole vectors, then once over the rest, padded with zeros; f returns what belongs to `to`.
template <class T, class A, class F>
POLYATTN_ALWAYS_INLINE void map_row(const T* from, T* to, index_t columns, F&& f) {
    using V = Vec<T, A>;
    constexpr int width = lanes<T, A>;
    index_t c = 0;
    for (; c + width <= columns; c += width) f(V::load_unaligned(from + c), V::load_unaligned(to + c)).store_unaligned(to + c);
    if (c == columns) return;
    alignas(64) T a[width] = {}, b[width] = {};
    std::copy_n(from + c, columns - c, a);
    std::copy_n(to + c, columns - c, b);
    f(V::load_aligned(a), V::load_aligned(b)).store_aligned(b);
    std::copy_n(b, columns - c, to + c);
}
/// to = factor * from.
template <class T, class A>
void scale_row(const T* from, T factor, index_t columns, T* to) {
    using V = Vec<T, A>;
    map_row<T, A>(from, to, columns, [&](V x, V) POLYATTN_INLINE_LAMBDA { return x * V(factor); });
}
/// to += factor * from, rounded as the tiles round it: the bits of a row must not depend on which of them works on it.
template <class T, class A>
void add_scaled(T factor, const T* from, index_t columns, T* to) {
    using V = Vec<T, A>;
    map_row<T, A>(from, to, columns, [&](V x, V y) POLYATTN_INLINE_LAMBDA { return multiply_add(V(factor), x, y); });
}
/// The memory of a matrix whose rows of `columns` columns, whole vectors, lie one behind the other; null for another.
template <class T>
T* packed_rows(MatrixView<T> rows, index_t columns) {
    return rows.col_stride == 1 && rows.cols == columns && rows.row_stride == columns ? rows.data : nullptr;
}
/// Row i of `to` += factor * from.
template <class A, class T>
void add_row(MatrixView<T> to, index_t i, T factor, const T* from) {
    if (to.col_stride == 1) return add_scaled<T, A>(factor, from, to.cols, &to(i, 0));
    for (index_t c = 0; c < to.cols; ++c) add_scaled<T, A>(factor, from + c, 1, &to(i, c));
}
/// Row i of `to` = (`adds`: +=) from.
template <class A, class T>
void store_row(MatrixView<T> to, index_t i, const T* from, bool adds) {
    if (adds) return add_row<A>(to, i, T(1), from);
    if (to.col_stride == 1) std::copy_n(from, to.cols, &to(i, 0));
    else
        for (index_t c = 0; c < to.cols; ++c) to(i, c) = from[c];
}
template <class T, class A>
T dot(const T* a, const T* b, index_t columns) {
    using V = Vec<T, A>;
    constexpr int width = lanes<T, A>;
    V sum(T(0));
    index_t c = 0;
    for (; c + width <= columns; c += width) sum = multiply_add(V::load_unaligned(a + c), V::load_unaligned(b + c), sum);
    T rest = 0;
    for (; c < columns; ++c) rest += a[c] * b[c];
    return lane_sum(sum) + rest;
}

/// The rows themselves if kernels can read them, else a copy. Copied are: other inner strides, columns that do not fill whole
/// vectors if `whole_vectors`, strides of 4 KiB, which would share one set of the first-level cache, and rows with others between them (of
/// the other heads, say) if they are read `often`: they take more of the caches, and nothing fetches them ahead.
template <class T>
Rows<T> readable_rows(MatrixView<const T> view, bool whole_vectors, int lanes, Arena& arena, bool often = false) {
    const bool apart = view.rows > 8 && view.row_stride != 0 && (often ? view.row_stride != view.cols : view.row_stride * static_cast<std::ptrdiff_t>(sizeof(T)) % 4096 == 0);
    if ((view.col_stride == 1 || view.cols <= 1) && !apart && !(whole_vectors && view.cols % lanes != 0)) return {view.data, view.row_stride};
    const index_t stride = padded(view.cols, lanes);
    T* const copy = arena.take<T>(offset_t{view.rows} * stride).data();
    parallel_rows(view.rows, [&](index_t i) {
        T* const to = copy + offset_t{i} * stride;
        if (view.col_stride == 1) std::copy_n(view.row(i), view.cols, to);
        else
            for (index_t c = 0; c < view.cols; ++c) to[c] = view(i, c);
        std::fill(to + view.cols, to + stride, T(0));
    });
    return {copy, stride};
}

/// A number of at least `limit` (> 0) in magnitude, or a NaN, is among `count` values, a multiple of the lanes. By their bits: comparisons fold away under -ffast-math.
template <class T, class A>
bool has_magnitude(const T* values, offset_t count, T limit) {
    using Bits = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
    using I = Vec<Bits, A>;
    const I magnitude(std::numeric_limits<Bits>::max()), below(std::bit_cast<Bits>(limit) - 1);
    auto found = I(Bits{0}) == I(Bits{1});
    for (offset_t c = 0; c < count; c += lanes<T, A>) found = found | ((bit_cast<Bits>(Vec<T, A>::load_unaligned(values + c)) & magnitude) > below);
    return xsimd::any(found);
}
template <class T, class A>
bool has_non_finite(const T* values, offset_t count) {
    return has_magnitude<T, A>(values, count, std::numeric_limits<T>::infinity());
}

/// Which rows hold a NaN or an infinity. A weight of 0 must not meet them.
class NonFiniteRows {
public:
    NonFiniteRows() = default;

    /// `columns` are padded to whole vectors.
    template <class A, class T>
    void mark(Rows<T> rows, index_t count, index_t columns, Arena& arena) {
        if (marks_.size() < static_cast<std::size_t>(count)) marks_ = arena.take<std::uint8_t>(count);
        // Two of these, times the columns, stay finite.
        constexpr T large = sizeof(T) == 4 ? T(0x1p48) : T(0x1p496);
        parallel_rows(count, [&](index_t i) {
            const T* const row = rows.row(i);
            marks_[static_cast<std::size_t>(i)] = !has_magnitude<T, A>(row, columns, large) ? none : has_non_finite<T, A>(row, columns) ? non_finite : finite_but_large;
        });
        highest_ = none;
        for (index_t i = 0; i < count; ++i) highest_ = std::max(highest_, marks_[static_cast<std::size_t>(i)]);
    }
    bool any() const { return highest_ == non_finite; }
    bool operator[](index_t row) const { return any() && marks_[static_cast<std::size_t>(row)] == non_finite; }
    /// A row is not finite, or products of its numbers may not be.
    bool any_large() const { return highest_ != none; }

private:
    static constexpr std::uint8_t none = 0, finite_but_large = 1, non_finite = 2;
    std::span<std::uint8_t> marks_;
    std::uint8_t highest_ = none;
};

/// Copies of listed rows, kept while tiles ask for the same list again: gathered once for all groups that share it.
template <class T>
class GatheredRows {
public:
    void prepare(std::span<const index_t> capacity, index_t columns, Arena& arena) {
        columns_ = columns;
        buffers_ = arena.take<Buffer>(static_cast<offset_t>(capacity.size()));
        for (std::size_t b = 0; b < capacity.size(); ++b) buffers_[b] = {arena.take<T>(offset_t{capacity[b]} * columns).data(), nullptr};
    }
    void forget() {
        for (Buffer& buffer : buffers_) buffer.list = nullptr;
    }
    /// Rows of a key sequence by position. `slot` is the piece's list_slot, -1 for a range, which is read in place.
    Rows<T> get(const IndexSequence& keys, int slot, Rows<T> rows) {
        if (slot < 0) return keys.empty() ? rows : Rows<T>{rows.row(keys.front()), rows.stride};
        Buffer& buffer = buffers_[static_cast<std::size_t>(slot)];
        if (buffer.list != keys.identity()) {
            for (index_t p = 0; p < keys.size(); ++p) std::copy_n(rows.row(keys[p]), columns_, buffer.rows + offset_t{p} * columns_);
            buffer.list = keys.identity();
        }
        return {buffer.rows, columns_};
    }

private:
    struct Buffer {
        T* rows;
        const void* list;
    };
    std::span<Buffer> buffers_;
    index_t columns_ = 0;
};

/// The reverse: sums for listed rows collect in a buffer and are added to their rows when another list comes, or at the end.
template <class T>
class ScatteredRows {
public:
    void prepare(std::span<const index_t> capacity, index_t columns, Arena& arena) {
        columns_ = columns;
        buffers_ = arena.take<Buffer>(static_cast<offset_t>(capacity.size()));
        for (std::size_t b = 0; b < capacity.size(); ++b) buffers_[b] = {arena.take<T>(offset_t{capacity[b]} * columns).data(), nullptr};
    }
    T* get(const IndexSequence& keys, int slot, T* rows, std::ptrdiff_t stride, std::ptrdiff_t& out_stride) {
        if (slot < 0) {
            out_stride = stride;
            return rows + keys.front() * stride;
        }
        Buffer& buffer = buffers_[static_cast<std::size_t>(slot)];
        if (!buffer.list || !buffer.list->same_as(keys)) {
            flush(buffer, rows, stride);
            std::fill_n(buffer.rows, offset_t{keys.size()} * columns_, T(0));
            buffer.list = &keys;
        }
        out_stride = columns_;
        return buffer.rows;
    }
    void flush(T* rows, std::ptrdiff_t stride) {
        for (Buffer& buffer : buffers_) flush(buffer, rows, stride);
    }

private:
    struct Buffer {
        T* rows;
        const IndexSequence* list;
    };
    void flush(Buffer& buffer, T* rows, std::ptrdiff_t stride) {
        if (!buffer.list) return;
        for (index_t p = 0; p < buffer.list->size(); ++p) {
            T* to = rows + (*buffer.list)[p] * stride;
            const T* from = buffer.rows + offset_t{p} * columns_;
            for (index_t c = 0; c < columns_; ++c) to[c] += from[c];
        }
        buffer.list = nullptr;
    }
    std::span<Buffer> buffers_;
    index_t columns_ = 0;
};

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
