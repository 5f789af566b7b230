#pragma once

#include <polyattn/backend/simd/fetch_ahead.hpp>
#include <polyattn/backend/simd/matrix_unit.hpp>
#include <polyattn/core/view.hpp>
#include <polyattn/core/workspace.hpp>
#include <polyattn/plan/part.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// MatrixProduct of floats on the matrix unit. Rows of a are cut into blocks, which threads share; both factors are split into parts block by block of the inner dimension.
/// Each element is summed in the same order for any number of threads.
template <class A, class MatrixUnit>
class UnitProduct {
    static constexpr index_t row_block = 64, column_block = 512, inner_block = 256;
    static constexpr index_t most_steps = inner_block / unit_inner;

public:
    static bool pays(index_t rows, index_t columns, index_t inner) {
        return rows >= MatrixUnit::least_rows && columns >= MatrixUnit::least_columns && inner >= MatrixUnit::least_terms && MatrixUnit::is_available();
    }

    /// `finish` reads or writes the same part of `beside`, which like the next tiles of c is fetched line by line while the unit works.
    template <class Finish, class Other>
    static void run(MatrixView<const float> a, MatrixView<const float> b, MatrixView<float> c, bool add, Workspace& workspace, Finish& finish, MatrixView<Other> beside) {
        const int threads = worker_count();
        workspace.prepare(threads);
        Workers workers(workspace, 0, threads);
        const index_t blocks = (a.cols + inner_block - 1) / inner_block, units = (c.rows + row_block - 1) / row_block;
        const index_t most_tiles = (std::min(c.cols, column_block) + unit_side - 1) / unit_side;
        const auto packed = workers[0].take<SplitImage>(offset_t{most_tiles} * most_steps);
        const auto odd_columns = workers[0].take<std::uint8_t>(most_tiles);
        const auto scratch = workers[0].take<Scratch*>(threads);
        for (Scratch*& own : scratch) own = workers[static_cast<int>(&own - scratch.data())].template take<Scratch>(1).data();
        for (index_t column = 0; column < c.cols; column += column_block) {
            const Bounds columns{column, std::min(column + column_block, c.cols)};
            const index_t tiles = (columns.size() + unit_side - 1) / unit_side;
            for (index_t block = 0; block < blocks; ++block) {
                const Bounds inner{block * inner_block, std::min((block + 1) * inner_block, a.cols)};
                const index_t steps = (inner.size() + unit_inner - 1) / unit_inner;
                parallel_for(tiles, [&](offset_t tile, int) {
                    const auto first = columns.begin + static_cast<index_t>(tile) * unit_side;
                    bool odd = false;
                    for (index_t step = 0; step < steps; ++step)
                        odd |= split_second_factor<A>(b, inner.begin + step * unit_inner, first, packed[static_cast<std::size_t>(tile * most_steps + step)]);
                    odd_columns[static_cast<std::size_t>(tile)] = odd;
                });
                const bool odd_b = std::any_of(odd_columns.begin(), odd_columns.begin() + tiles, [](std::uint8_t odd) { return odd != 0; });
                parallel_for(units, [&](offset_t unit, int worker) {
                    const Bounds rows{static_cast<index_t>(unit) * row_block, std::min((static_cast<index_t>(unit) + 1) * row_block, c.rows)};
                    Scratch& own = *scratch[static_cast<std::size_t>(worker)];
                    bool odd = odd_b;
                    for (index_t row = rows.begin; row < rows.end; row += unit_side)
                        for (index_t step = 0; step < steps; ++step) odd |= split_first_factor<A>(a, row, inner.begin + step * unit_inner, own.rows[(row - rows.begin) / unit_side][step]);
                    MatrixUnit matrix_unit;
                    for (index_t j = columns.begin; j < columns.end; j += 2 * unit_side) {
                        const Bounds tile_columns{j, std::min(j + 2 * unit_side, columns.end)};
                        for (index_t i = rows.begin; i < rows.end; i += 2 * unit_side) {
                            const Bounds tile_rows{i, std::min(i + 2 * unit_side, rows.end)};
                            NextRows<float> next = tile_rows.end < rows.end ? rows_of(c, {tile_rows.end, std::min(tile_rows.end + 2 * unit_side, rows.end)}, tile_columns)
                                                                            : rows_of(c, {rows.begin, std::min(rows.begin + 2 * unit_side, rows.end)}, {tile_columns.end, std::min(tile_columns.end + 2 * unit_side, columns.end)});
                            NextRows<float> next_beside = block + 1 == blocks ? rows_of(beside, tile_rows, tile_columns) : NextRows<float>{};
                            multiply(matrix_unit, own.rows[(i - rows.begin) / unit_side], &packed[static_cast<std::size_t>((j - columns.begin) / unit_side * most_steps)], steps, c, tile_rows, tile_columns,
                                     add || block > 0, own, [&]() POLYATTN_INLINE_LAMBDA {
                                         next.line<true>();
                                         next_beside.template line<!std::is_const_v<Other>>();
                                     });
                            if (odd) [[unlikely]] add_unsplittable(a, b, inner, c, tile_rows, tile_columns);
                            if (block + 1 == blocks)
                                for (index_t row = tile_rows.begin; row < tile_rows.end; ++row) finish(row, j, std::span<float>(c.row(row) + j, static_cast<std::size_t>(tile_columns.size())));
                        }
                    }
                });
            }
        }
    }

private:
    struct alignas(64) Scratch {
        SplitImage rows[row_block / unit_side][most_steps];
        float out[2 * unit_side * 2 * unit_side];
    };

    template <class Value>
    static NextRows<float> rows_of(MatrixView<Value> m, Bounds rows, Bounds columns) {
        if (!m.data || m.col_stride != 1 || rows.empty() || columns.empty()) return {};
        return {m.row(rows.begin) + columns.begin, m.row_stride, rows.size(), columns.size()};
    }

    /// Up to 32 x 32 of c.
    template <class Between>
    static void multiply(MatrixUnit& unit, const SplitImage* a, const SplitImage* b, index_t steps, MatrixView<float> c, Bounds rows, Bounds columns, bool add, Scratch& scratch, Between&& between) {
        const bool whole = rows.size() % unit_side == 0 && columns.size() % unit_side == 0;
        float* const out = whole ? c.row(rows.begin) + columns.begin : scratch.out;
        const std::ptrdiff_t stride = whole ? c.row_stride : 2 * unit_side;
        if (!whole && add)
            for (index_t i = 0; i < rows.size(); ++i) std::copy_n(c.row(rows.begin + i) + columns.begin, columns.size(), out + i * stride);
        with_count<2>(rows.size() > unit_side ? 2 : 1, [&](auto r) POLYATTN_INLINE_LAMBDA {
            with_count<2>(columns.size() > unit_side ? 2 : 1, [&](auto n) POLYATTN_INLINE_LAMBDA { multiply_images<r, n>(unit, {a, most_steps}, {b, most_steps}, steps, {out, stride, unit_side * stride, unit_side}, add, between); });
        });
        if (!whole)
            for (index_t i = 0; i < rows.size(); ++i) std::copy_n(out + i * stride, columns.size(), c.row(rows.begin + i) + columns.begin);
    }

    /// The products that images left out.
    static void add_unsplittable(MatrixView<const float> a, MatrixView<const float> b, Bounds inner, MatrixView<float> c, Bounds rows, Bounds columns) {
        for (index_t i = rows.begin; i < rows.end; ++i)
            for (index_t t = inner.begin; t < inner.end; ++t)
                for (index_t j = columns.begin; j < columns.end; ++j)
                    if (!is_splittable(a(i, t)) || !is_splittable(b(t, j))) c(i, j) += a(i, t) * b(t, j);
    }
};

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
