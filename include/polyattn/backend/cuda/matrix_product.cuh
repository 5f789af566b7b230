#pragma once
// Products of matrices that each item of a call has of its own.

#include <polyattn/backend/cuda/rows.cuh>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// Which factor is transposed: its rows are those of the inner dimension, or columns of the product.
enum class TransposedFactor { none, first, second };

/// Rows of the factors are padded with zeros to whole vectors.
template <class T>
struct MatrixProduct {
    Rows<T> first, second;
    index_t rows, columns, inner;
    T diagonal;  // is added to entries (i, i) of the product
    index_t first_item;
    Finish<T> finish;
};

/// finish(a tile of the product). Each entry is one chain of multiply-adds over the inner dimension, in order.
template <TransposedFactor transposed, class T>
__global__ void __launch_bounds__(tile_threads, 2) multiply_matrices(const __grid_constant__ MatrixProduct<T> a) {
    using S = TileShape<T>;
    extern __shared__ __align__(16) unsigned char memory[];
    T* const first_tile = reinterpret_cast<T*>(memory);
    T* const second_tile = first_tile + S::buffer;
    const index_t row = static_cast<index_t>(blockIdx.x) * S::side, item = a.first_item + static_cast<index_t>(blockIdx.y), column = static_cast<index_t>(blockIdx.z) * S::width;
    const T *const first = a.first.head(item), *const second = a.second.head(item);
    const Sequence all{0, nullptr};
    T sum[S::rows_each][S::values_each] = {};
    for (index_t k = 0; k < a.inner; k += S::side) {
        if constexpr (transposed == TransposedFactor::first) load_tile(first_tile, first, a.first.row_stride, all, k, a.inner, row, a.rows);
        else load_tile(first_tile, first, a.first.row_stride, all, row, a.rows, k, a.inner);
        if constexpr (transposed == TransposedFactor::second) load_tile(second_tile, second, a.second.row_stride, all, column, a.columns, k, a.inner);
        else load_tile(second_tile, second, a.second.row_stride, all, k, a.inner, column, a.columns);
        __syncthreads();
        const int depth = min(S::side, a.inner - k);
        if constexpr (transposed == TransposedFactor::none) multiply_rows(sum, first_tile, second_tile, depth);
        else if constexpr (transposed == TransposedFactor::first) multiply<false>(sum, first_tile, second_tile, depth, [](int, int) { return true; });
        else multiply_transposed(sum, first_tile, second_tile, depth);
        __syncthreads();
    }
    if constexpr (transposed == TransposedFactor::second) to_neighbours(first_tile, sum, sum);
    for_each_row(first_tile, sum, ~std::uint64_t{0}, [&](int slot, int c, Vector<T> value) {
        const index_t i = row + slot;
        if (i >= a.rows) return;
#pragma unroll
        for (int l = 0; l < S::vector; ++l)
            if (column + c + l == i && i < a.columns) value.at[l] += a.diagonal;
        a.finish.store(item, i, column + c, value, true);
    });
}

template <TransposedFactor transposed, class T>
void multiply_items(MatrixProduct<T> product, index_t items, cudaStream_t stream) {
    using S = TileShape<T>;
    if (product.rows == 0 || product.columns == 0) return;
    for_each_grid(0, items, [&](index_t item, unsigned count) {
        product.first_item = item;
        launch("multiply_matrices", multiply_matrices<transposed, T>, dim3(blocks_for(product.rows, S::side), count, blocks_for(product.columns, S::width)), tile_threads, 2 * S::buffer * sizeof(T), stream, product);
    });
}

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
