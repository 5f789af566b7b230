#pragma once
// Products of matrices for layers with parameters: Y = X W^T, dX = dY W, dW = dY^T X, on the tiles of the attention kernels.

#include <polyattn/backend/simd/rows.hpp>
#include <polyattn/backend/simd/tiles.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// Does nothing to a finished row of a product.
struct KeepResult {
    template <class T>
    void operator()(index_t, index_t, std::span<T>) const {}
};

/// c = a b, or c += a b if `add`, for any strides of a and b and unit column stride of c. a is cut into blocks of rows, which threads share;
/// b is packed once. Each element is one chain of multiply-adds over blocks of the inner dimension, added to c in order: bitwise the same
/// for any number of threads. `finish(row, column, values)` gets the results piece by piece, each once, while they are in the first-level
/// cache.
template <class T, class A>
class MatrixProduct {
    using V = Vec<T, A>;
    using Tiles = Tiling<T, A>;
    static constexpr int panel = Tiles::columns * Tiles::lanes;
    /// A panel of b and half a group of rows of a fit the first-level cache, the packed rows of a the second.
    static constexpr index_t inner_block = 16384 / (panel * static_cast<index_t>(sizeof(T))) * 2 / 8 * 8;
    static constexpr index_t row_block = 64;
    /// What is packed of b stays in the second-level cache.
    static constexpr offset_t packed_values = (offset_t{1} << 20) / static_cast<offset_t>(sizeof(T));

public:
    template <class Finish = KeepResult>
    static void run(MatrixView<const T> a, MatrixView<const T> b, MatrixView<T> c, bool add, Workspace& workspace, Finish&& finish = {}) {
        if (c.rows == 0 || c.cols == 0) return;
        const index_t inner = a.cols;
        const int threads = worker_count();
        workspace.prepare(threads);
        Workers workers(workspace, 0, threads);
        const index_t panels = (c.cols + panel - 1) / panel, blocks = std::max(index_t{1}, (inner + inner_block - 1) / inner_block);
        // Blocks of b that are packed at a time, so that the packed form never leaves the caches.
        const auto together = static_cast<index_t>(std::clamp<offset_t>(packed_values / (offset_t{panels} * panel * inner_block), 1, blocks));
        const std::span<T> packed = workers[0].take<T>(offset_t{panels} * panel * inner_block * together);
        const auto rows = workers[0].take<T*>(threads);
        for (int w = 0; w < threads; ++w) rows[static_cast<std::size_t>(w)] = workers[w].take<T>(offset_t{row_block} * inner_block + offset_t{group_size} * panel).data();
        for (index_t first_block = 0; first_block < blocks; first_block += together) {
            const index_t last_block = std::min(first_block + together, blocks);
            // [inner block][panel][inner][column]: what one pass over a block of rows reads lies together.
            const auto panel_of = [&](index_t block, index_t p) { return packed.data() + (offset_t{block - first_block} * panels + p) * inner_block * panel; };
            parallel_for(panels, [&](offset_t p, int) {
                for (index_t block = first_block; block < last_block; ++block)
                    pack_columns(b, piece(inner, blocks, block), static_cast<index_t>(p) * panel, panel_of(block, static_cast<index_t>(p)));
            });
            parallel_for((c.rows + row_block - 1) / row_block, [&](offset_t unit, int worker) {
                const auto first = static_cast<index_t>(unit) * row_block, last = std::min(first + row_block, c.rows);
                T* const own = rows[static_cast<std::size_t>(worker)];
                for (index_t block = first_block; block < last_block; ++block) {
                    const Bounds k = piece(inner, blocks, block);
                    pack_block(a, {first, last}, k, own);
                    // What is packed next, this block of rows' next columns or the next rows' first, comes in bit by bit meanwhile.
                    const bool more = block + 1 < last_block;
                    const Bounds next_rows = more ? Bounds{first, last} : Bounds{last, std::min(last + row_block, c.rows)}, next = piece(inner, blocks, more ? block + 1 : first_block);
                    const index_t tiles = panels * (row_block / group_size);
                    index_t tile = 0;
                    for (index_t p = 0; p < panels; ++p)
                        for (index_t i = first; i < last; i += group_size) {
                            fetch(a, next_rows, next, tile++, tiles);
                            if (add || block > 0) {
                                const bool below = i + group_size < last;
                                fetch_result(c, below ? i + group_size : first, last, (below ? p : p + 1) * panel);
                            }
                            multiply(own + (i - first) * k.size(), panel_of(block, p), k.size(), c, i, p * panel, add || block > 0, own + row_block * inner_block);
                            if constexpr (!std::is_same_v<std::remove_cvref_t<Finish>, KeepResult>)
                                if (block + 1 == blocks)
                                    for (index_t row = i; row < std::min(i + group_size, last); ++row)
                                        finish(row, p * panel, std::span<T>(c.row(row) + p * panel, static_cast<std::size_t>(std::min<index_t>(panel, c.cols - p * panel))));
                        }
                }
            });
        }
    }

private:
    static Bounds piece(index_t size, index_t pieces, index_t i) {
        return {static_cast<index_t>(offset_t{size} * i / pieces), static_cast<index_t>(offset_t{size} * (i + 1) / pieces)};
    }

    template <int Vectors>
    static void copy(const T* from, T* to) {
        unroll<Vectors>([&](auto v) POLYATTN_INLINE_LAMBDA { V::load_unaligned(from + v * Tiles::lanes).store_aligned(to + v * Tiles::lanes); });
    }

    /// Fetches part `part` of `parts` of a block of a into the second-level cache.
    static void fetch(MatrixView<const T> a, Bounds rows, Bounds k, index_t part, index_t parts) {
        const bool by_rows = a.col_stride == 1;
        if (rows.empty() || k.empty() || (!by_rows && a.row_stride != 1)) return;
        const Bounds own = piece(by_rows ? rows.size() : k.size(), parts, part);
        for (index_t i = own.begin; i < own.end; ++i) {
            const T* const from = by_rows ? &a(rows.begin + i, k.begin) : &a(rows.begin, k.begin + i);
            for (index_t c = 0; c < (by_rows ? k.size() : rows.size()); c += cache_line<T>) prefetch(from + c);
        }
    }

    /// Fetches what a group of rows and a panel will be added to.
    static void fetch_result(MatrixView<T> c, index_t first, index_t last, index_t column) {
        for (index_t i = first; i < std::min(first + group_size, last); ++i)
            for (index_t j = column; j < std::min<index_t>(column + panel, c.cols); j += Tiles::lanes) prefetch(c.row(i) + j);
    }

    /// Rows of a, 16 at a time, transposed to [group][inner][16]; rows behind the last are zeros.
    static void pack_block(MatrixView<const T> a, Bounds rows, Bounds k, T* packed) {
        index_t first = rows.begin;
        if (a.col_stride == 1)
            for (; first + group_size <= rows.end; first += group_size, packed += k.size() * group_size) {
                std::array<index_t, group_size> group;
                std::iota(group.begin(), group.end(), first);
                pack_rows<T, A>(group, {a.data + k.begin, a.row_stride}, k.size(), T(1), packed);
            }
        for (index_t t = k.begin; t < k.end; ++t, packed += group_size) {  // a line of a serves all groups
            T* to = packed;
            for (index_t i = first; i < rows.end; i += group_size, to += k.size() * group_size) {
                const index_t count = std::min<index_t>(group_size, rows.end - i);
                if (a.row_stride == 1 && count == group_size) copy<group_size / Tiles::lanes>(&a(i, t), to);
                else {
                    for (index_t lane = 0; lane < count; ++lane) to[lane] = a(i + lane, t);
                    std::fill(to + count, to + group_size, T(0));
                }
            }
        }
    }

    /// Columns [first, first + panel) of b to [inner][panel]; columns behind the last are zeros.
    static void pack_columns(MatrixView<const T> b, Bounds k, index_t first, T* packed) {
        constexpr int width = Tiles::lanes;
        const index_t count = std::min<index_t>(panel, b.cols - first);
        index_t t = k.begin;
        if (count == panel && b.row_stride == 1)
            for (; t + width <= k.end; t += width)
                for (index_t column = 0; column < panel; column += width)
                    transpose_block<T, A>([&](auto i) POLYATTN_INLINE_LAMBDA { return V::load_unaligned(&b(t, first + column + i)); }, packed + (t - k.begin) * panel + column, panel);
        for (; t < k.end; ++t) {
            T* const to = packed + (t - k.begin) * panel;
            if (b.col_stride == 1 && count == panel) copy<Tiles::columns>(&b(t, first), to);
            else {
                for (index_t j = 0; j < count; ++j) to[j] = b(t, first + j);
                std::fill(to + count, to + panel, T(0));
            }
        }
    }

    /// One group of 16 rows times one panel.
    static void multiply(const T* a, const T* b, index_t inner, MatrixView<T> c, index_t row, index_t column, bool add, T* spare) {
        const index_t rows = std::min<index_t>(group_size, c.rows - row), columns = std::min<index_t>(panel, c.cols - column);
        const bool whole = rows == group_size && columns % Tiles::lanes == 0;
        T* const out = whole ? c.row(row) + column : spare;
        const std::ptrdiff_t stride = whole ? c.row_stride : panel;
        if (!whole && add)
            for (index_t i = 0; i < rows; ++i) std::copy_n(c.row(row + i) + column, columns, out + i * stride);
        with_count<Tiles::columns>(static_cast<int>((columns + Tiles::lanes - 1) / Tiles::lanes), [&](auto width) POLYATTN_INLINE_LAMBDA {
            for (int part = 0; part < rows; part += Tiles::rows)
                weighted_sum_tile<Tiles::rows, width, T, A>(a + part, b, panel, inner, out + part * stride, stride, add);
        });
        if (!whole)
            for (index_t i = 0; i < rows; ++i) std::copy_n(out + i * stride, columns, c.row(row + i) + column);
    }
};

}  // namespace detail::simd

namespace detail {

using Keep = simd::KeepResult;

/// c = a b, or c += a b, as compiled for this translation unit.
template <class T, class Finish = Keep>
void multiply(MatrixView<const T> a, MatrixView<const T> b, MatrixView<T> c, bool add, Workspace& workspace, Finish&& finish = {}) {
    simd::MatrixProduct<T, xsimd::default_arch>::run(a, b, c, add, workspace, finish);
}

}  // namespace detail

POLYATTN_END_NAMESPACE
