#pragma once
// Tensors of the caller as the kernels want them, and small kernels on whole rows.

#include <polyattn/backend/cuda/tile.cuh>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// Columns of a row that is padded to whole vectors.
template <class T>
constexpr index_t padded(index_t columns) {
    constexpr index_t vector = 16 / sizeof(T);
    return (columns + vector - 1) / vector * vector;
}

template <class T>
bool has_vector_rows(const TensorView<const T>& view) {
    const auto whole = [](std::ptrdiff_t elements) { return elements % static_cast<std::ptrdiff_t>(16 / sizeof(T)) == 0; };
    return (view.strides[3] == 1 || view.dim() <= 1) && whole(view.dim()) && whole(view.strides[0]) && whole(view.strides[1]) && whole(view.strides[2]) &&
           reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0;
}

/// What device code sees of a TensorView.
template <class T>
struct StridedRows {
    const T* data;
    index_t heads, tokens, columns;
    std::ptrdiff_t batch_stride, head_stride, row_stride, column_stride;
};

template <class T>
__global__ void pack_rows(StridedRows<T> from, T* to, index_t columns, offset_t count) {
    const offset_t at = offset_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (at >= count) return;
    const auto c = static_cast<index_t>(at % columns);
    const offset_t row = at / columns, head = row / from.tokens;
    to[at] = c < from.columns ? from.data[head / from.heads * from.batch_stride + head % from.heads * from.head_stride + row % from.tokens * from.row_stride + c * from.column_stride] : T{};
}

/// [items][tokens][columns], contiguous, one head for each of `heads` query heads.
template <class T>
Rows<T> packed_rows(const T* data, index_t heads, offset_t item_stride, index_t columns) {
    return {data, heads * item_stride, item_stride, columns, heads, 1};
}

/// A copy of a tensor's rows, [batch x heads][tokens][padded columns].
template <class T>
T* packed_copy(const TensorView<const T>& view, Carver& carver, cudaStream_t stream) {
    const index_t columns = padded<T>(view.dim());
    const offset_t count = offset_t{view.batch()} * view.heads() * view.tokens() * columns;
    T* const to = carver.take<T>(count);
    if (!carver.counts() && count > 0) {
        const StridedRows<T> from{view.data, view.heads(), view.tokens(), view.dim(), view.strides[0], view.strides[1], view.strides[2], view.strides[3]};
        launch("pack_rows", pack_rows<T>, dim3(blocks_for(count, 256)), 256, 0, stream, from, to, columns, count);
    }
    return to;
}

/// A tensor's rows as kernels read them: where they lie if that fits, else copied.
template <class T>
Rows<T> as_rows(const TensorView<const T>& view, index_t query_heads, Carver& carver, cudaStream_t stream) {
    const index_t group = view.heads() == 0 ? 1 : query_heads / view.heads();
    if (has_vector_rows(view)) return {view.data, view.strides[0], view.strides[1], view.strides[2], query_heads, group};
    const index_t columns = padded<T>(view.dim());
    const std::ptrdiff_t head = std::ptrdiff_t{view.tokens()} * columns;
    return {packed_copy(view, carver, stream), view.heads() * head, head, columns, query_heads, group};
}

/// finish() with the caller's tensor as its target.
template <class T>
void set_target(Finish<T>& finish, const TensorView<T>& out) {
    finish.out = out.data;
    finish.out_batch = out.strides[0];
    finish.out_head = out.strides[1];
    finish.out_row = out.strides[2];
    finish.out_column = out.dim() <= 1 ? 1 : out.strides[3];
    finish.out_vectors = has_vector_rows(TensorView<const T>(out));
    finish.heads = out.heads();
    finish.columns = out.dim();
    finish.packed_columns = padded<T>(out.dim());
}

/// To, or onto, [items][tokens][columns], columns padded.
template <class T>
Finish<T> packed_finish(T* to, index_t tokens, index_t columns, index_t heads, bool adds = false) {
    Finish<T> finish;
    finish.packed_stride = offset_t{tokens} * columns;
    finish.packed_columns = finish.columns = columns;
    finish.heads = heads;
    if (!adds) finish.packed = to;
    else {
        finish.out = to;
        finish.out_batch = heads * finish.packed_stride;
        finish.out_head = finish.packed_stride;
        finish.out_row = columns;
        finish.out_vectors = finish.accumulate = true;
    }
    return finish;
}

/// finish(sum over the heads of a group), one row a warp.
template <class T>
__global__ void __launch_bounds__(128) finish_rows(const __grid_constant__ Rows<T> from, index_t group, index_t tokens, index_t heads, index_t first_item, const __grid_constant__ Lengths lengths,
                                                   const __grid_constant__ Finish<T> finish) {
    constexpr int vector = 16 / sizeof(T);
    const index_t token = static_cast<index_t>(blockIdx.x) * 4 + static_cast<index_t>(threadIdx.x) / 32, item = first_item + static_cast<index_t>(blockIdx.y);
    if (token >= tokens) return;
    for (index_t c = static_cast<index_t>(threadIdx.x) % 32 * vector; c < finish.packed_columns; c += 32 * vector) {
        Vector<T> sum{};
        for (index_t m = 0; m < group; ++m) {
            const Vector<T> value = load_vector(from.head(item * group + m) + token * from.row_stride + c);
#pragma unroll
            for (int l = 0; l < vector; ++l) sum.at[l] += value.at[l];
        }
        finish.store(item, token, c, sum, token < lengths(item / heads));
    }
}

/// f(first item, items) for as many items as a grid has room for.
template <class F>
void for_each_grid(index_t first, index_t last, F&& f) {
    constexpr index_t most = 65535;
    for (; first < last; first += most) f(first, static_cast<unsigned>(std::min(most, last - first)));
}

/// out = finish(sum over the heads of a group).
template <class T>
void finish_heads(const Rows<T>& from, index_t group, const TensorView<T>& out, Lengths lengths, Finish<T> finish, cudaStream_t stream) {
    set_target(finish, out);
    if (out.size() == 0) return;
    for_each_grid(0, out.batch() * out.heads(), [&](index_t item, unsigned count) {
        launch("finish_rows", finish_rows<T>, dim3(blocks_for(out.tokens(), 4), count), 128, 0, stream, from, group, out.tokens(), out.heads(), item, lengths, finish);
    });
}

template <class T>
void fill_zeros(T* to, offset_t count, cudaStream_t stream) {
    if (count > 0) check_cuda(cudaMemsetAsync(to, 0, static_cast<std::size_t>(count) * sizeof(T), stream), "cudaMemsetAsync");
}

template <class T>
__global__ void natural_logarithms(const T* from, T* to, offset_t count) {
    const offset_t at = offset_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (at < count) to[at] = from[at] * log_of_2<T>;
}

/// What an operator is told of a call.
template <class T>
struct OperatorCall {
    Rows<T> q, k;
    index_t batch, heads, key_heads, queries, keys, dim, columns;  // columns: of the values, padded
    Lengths query_lengths, key_lengths;
    CallDropout dropout;
    cudaStream_t stream;
    index_t items() const { return batch * heads; }
    index_t group() const { return key_heads == 0 ? 1 : heads / key_heads; }
};

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
