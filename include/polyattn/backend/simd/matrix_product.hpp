#pragma once
// Products of matrices for layers with parameters: Y = X W^T, dX = dY W, dW = dY^T X, on the tiles of the attention kernels.

#include <polyattn/backend/simd/fetch_ahead.hpp>
#include <polyattn/backend/simd/rows.hpp>
#include <polyattn/backend/simd/tiles.hpp>
#include <polyattn/backend/simd/unit_product.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// Does nothing to a finished row of a product.
struct KeepResult {
    template <class T>
    void operator()(index_t, index_t, std::span<T>) const {}
};

/// What finishes the rows of a product and reads the same part of another matrix for it, or writes it (T is not const), which is fetched meanwhile.
template <class T, class F>
struct Beside {
    MatrixView<T> beside;
    F f;

    void operator()(index_t row, index_t column, std::span<std::remove_const_t<T>> values) const { f(row, column, values); }
};
template <class T, class F>
Beside(MatrixView<T>, F) -> Beside<T, F>;
/// `f`, beside what `other` is.
template <class Other, class F>
auto beside_of(const Other& other, F f) {
    if constexpr (requires { other.beside; }) return Beside{other.beside, f};
    else return f;
}

/// c = a b, or c += a b if `add`, for any strides of a and b and unit column stride of c. a is cut into blocks of rows, which threads share;
/// b is packed block by block of the inner dimension. Each element is one chain of multiply-adds a block, added to c in order: bitwise the same
/// for any number of threads. `finish(row, column, values)` gets the results piece by piece, each once, while they are in the first-level
/// cache. What comes next (rows of a, b and c) is fetched line by line inside the tiles.
template <class T, class A, class MatrixUnit = MatrixUnitOf<T, A>>
class MatrixProduct {
    using V = Vec<T, A>;
    using Tiles = Tiling<T, A>;
    static constexpr int panel = Tiles::columns * Tiles::lanes;
    /// A panel of b and a group of rows of a fit a first-level cache of 32 KB; with 24 accumulators the second is fast enough. The packed
    /// rows of a stay in the second.
    static constexpr index_t inner_block = Tiles::registers == 32 ? 256 : 16384 / (panel * static_cast<index_t>(sizeof(T))) / 8 * 8;
    static constexpr index_t row_block = 64;
    /// Up to so many values of b are packed while others are worked on, as both stay in the second-level cache.
    static constexpr offset_t packed_values = (offset_t{640} << 10) / static_cast<offset_t>(sizeof(T));

public:
    template <class Finish = KeepResult>
    static void run(MatrixView<const T> a, MatrixView<const T> b, MatrixView<T> c, bool add, Workspace& workspace, Finish&& finish = {}) {
        if (c.rows == 0 || c.cols == 0) return;
        constexpr bool finishes = !std::is_same_v<std::remove_cvref_t<Finish>, KeepResult>;
        const auto beside = [&] {
            if constexpr (requires { finish.beside; }) return finish.beside;
            else return MatrixView<const T>{};
        }();
        if constexpr (!std::is_void_v<MatrixUnit>)
            if (UnitProduct<A, MatrixUnit>::pays(c.rows, c.cols, a.cols)) return UnitProduct<A, MatrixUnit>::run(a, b, c, add, workspace, finish, beside);
        using LinesBeside = LinesOf<T, requires { *beside.data = T(0); }>;
        const index_t inner = a.cols;
        const int threads = worker_count();
        workspace.prepare(threads);
        Workers workers(workspace, 0, threads);
        const index_t vectors = (c.cols + Tiles::lanes - 1) / Tiles::lanes, panels = (vectors + Tiles::columns - 1) / Tiles::columns;
        const index_t blocks = std::max(index_t{1}, (inner + inner_block - 1) / inner_block), units = (c.rows + row_block - 1) / row_block;
        const offset_t block_values = offset_t{panels} * panel * inner_block;
        const bool ahead = blocks > 1 && block_values <= packed_values;  // the next block of b is packed meanwhile, which wants room for both
        const std::span<T> packed = workers[0].take<T>(block_values * (ahead ? 2 : 1));
        const auto rows = workers[0].take<T*>(threads);
        for (int w = 0; w < threads; ++w) rows[static_cast<std::size_t>(w)] = workers[w].take<T>(offset_t{row_block} * inner_block + offset_t{group_size} * panel).data();
        const auto columns_of = [&](index_t p) { return Bounds{piece(vectors, panels, p).begin * Tiles::lanes, std::min(piece(vectors, panels, p).end * Tiles::lanes, c.cols)}; };
        const auto panel_of = [&](index_t block, index_t p) { return packed.data() + (ahead ? block % 2 * block_values : 0) + offset_t{p} * inner_block * panel; };  // [inner][column]
        const auto pack = [&](index_t block, index_t p) { pack_columns(b, piece(inner, blocks, block), columns_of(p), panel_of(block, p)); };
        for (index_t block = 0; block < blocks; ++block) {
            if (block == 0 || !ahead) parallel_for(panels, [&](offset_t p, int) { pack(block, static_cast<index_t>(p)); });
            const Bounds k = piece(inner, blocks, block), next_k = block + 1 < blocks ? piece(inner, blocks, block + 1) : Bounds{};
            parallel_for(units, [&](offset_t unit, int worker) {
                const auto first = static_cast<index_t>(unit) * row_block, last = std::min(first + row_block, c.rows);
                T* const own = rows[static_cast<std::size_t>(worker)];
                pack_block(a, {first, last}, k, own);
                const Bounds share = ahead && !next_k.empty() ? piece(panels, units, static_cast<index_t>(unit)) : Bounds{};  // the next block's panels that this unit packs
                index_t fetched = share.begin;
                NextRows<T> next = rows_of(a, {last, std::min(last + row_block, c.rows)}, k), next_result, next_beside;
                for (index_t p = 0; p < panels; ++p) {
                    const Bounds columns = columns_of(p), next_columns = p + 1 < panels ? columns_of(p + 1) : Bounds{};
                    for (index_t i = first; i < last; i += group_size) {
                        if (next.empty() && fetched < share.end) next = rows_of(b, next_k, columns_of(fetched++));
                        const index_t below = i + group_size;
                        next_result = below < last ? rows_of(c, {below, std::min(below + group_size, last)}, columns) : rows_of(c, {first, std::min(first + group_size, last)}, next_columns);
                        if (finishes && block + 1 == blocks) next_beside = rows_of(beside, {i, std::min(below, last)}, columns);
                        multiply(own + (i - first) * k.size(), panel_of(block, p), k.size(), c, i, columns, add || block > 0, own + row_block * inner_block, LinesOf<T>{&next}, LinesOf<T, true>{&next_result},
                                 LinesBeside{&next_beside});
                        if constexpr (finishes)
                            if (block + 1 == blocks)
                                for (index_t row = i; row < std::min(below, last); ++row) finish(row, columns.begin, std::span<T>(c.row(row) + columns.begin, static_cast<std::size_t>(columns.size())));
                    }
                }
                for (index_t p = share.begin; p < share.end; ++p) pack(block + 1, p);
            });
        }
    }

private:
    static Bounds piece(index_t size, index_t pieces, index_t i) {
        return {static_cast<index_t>(offset_t{size} * i / pieces), static_cast<index_t>(offset_t{size} * (i + 1) / pieces)};
    }
    /// A part of a matrix as rows to be fetched.
    template <class Value>
    static NextRows<T> rows_of(MatrixView<Value> m, Bounds rows, Bounds columns) {
        if (!m.data || rows.empty() || columns.empty() || (m.col_stride != 1 && m.row_stride != 1)) return {};
        const T* const first = &m(rows.begin, columns.begin);
        return m.col_stride == 1 ? NextRows<T>(first, m.row_stride, rows.size(), columns.size()) : NextRows<T>(first, m.col_stride, columns.size(), rows.size());
    }

    template <int Vectors>
    static void copy(const T* from, T* to) {
        unroll<Vectors>([&](auto v) POLYATTN_INLINE_LAMBDA { V::load_unaligned(from + v * Tiles::lanes).store_aligned(to + v * Tiles::lanes); });
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

    /// Columns of b to [inner][panel]; the lanes behind the last are zeros.
    static void pack_columns(MatrixView<const T> b, Bounds k, Bounds columns, T* packed) {
        constexpr int width = Tiles::lanes;
        const index_t whole = columns.size() / width * width, padded = (columns.size() + width - 1) / width * width;
        index_t t = k.begin;
        if (b.row_stride == 1)
            for (; t + width <= k.end && whole == padded; t += width)
                for (index_t column = 0; column < whole; column += width)
                    transpose_block<T, A>([&](auto i) POLYATTN_INLINE_LAMBDA { return V::load_unaligned(&b(t, columns.begin + column + i)); }, packed + (t - k.begin) * panel + column, panel);
        for (; t < k.end; ++t) {
            T* const to = packed + (t - k.begin) * panel;
            index_t j = 0;
            if (b.col_stride == 1)
                for (; j < whole; j += width) V::load_unaligned(&b(t, columns.begin + j)).store_aligned(to + j);
            for (; j < columns.size(); ++j) to[j] = b(t, columns.begin + j);
            std::fill(to + columns.size(), to + padded, T(0));
        }
    }

    /// One group of 16 rows times one panel, and a line of each of `runs` every four steps.
    template <class... Runs>
    static void multiply(const T* a, const T* b, index_t inner, MatrixView<T> c, index_t row, Bounds columns, bool add, T* spare, Runs... runs) {
        const index_t rows = std::min<index_t>(group_size, c.rows - row);
        const bool whole = rows == group_size && columns.size() % Tiles::lanes == 0;
        T* const out = whole ? c.row(row) + columns.begin : spare;
        const std::ptrdiff_t stride = whole ? c.row_stride : panel;
        if (!whole && add)
            for (index_t i = 0; i < rows; ++i) std::copy_n(c.row(row + i) + columns.begin, columns.size(), out + i * stride);
        with_count<Tiles::columns>(static_cast<int>((columns.size() + Tiles::lanes - 1) / Tiles::lanes), [&](auto width) POLYATTN_INLINE_LAMBDA {
            for (int part = 0; part < rows; part += Tiles::rows)
                weighted_sum_tile<Tiles::rows, width, T, A>(a + part, b, panel, inner, out + part * stride, stride, add, group_size, runs...);
        });
        if (!whole)
            for (index_t i = 0; i < rows; ++i) std::copy_n(out + i * stride, columns.size(), c.row(row + i) + columns.begin);
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
