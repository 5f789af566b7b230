#pragma once
// mask(A B^T) Z for rows A, B and Z, without forming A B^T: sums of b z^T over chunks of tokens, their running sums, and what is left on
// the diagonal by pairs. All of kernel attention, its adjoint and its normalisation are such products.
// Source: Katharopoulos et al., "Transformers are RNNs" (2020), equations 5 to 12, in chunks.

#include <polyattn/backend/cuda/rows.cuh>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// Which others an own token sees: all; those up to own + offset; or those from own - offset on.
enum class Sees { all, earlier, later };

template <class T>
struct LinearProduct {
    Rows<T> own, other, values;
    index_t inner, columns;  // padded: of own and other; of values
    index_t own_tokens, other_tokens;
    Lengths own_lengths, other_lengths;
    Sees sees;
    offset_t offset;
    index_t heads, first_item;
    index_t chunk;       // tokens of the others in a chunk, whole tiles
    T* states;           // [item][chunks + 1][columns][inner]
    const T* marks;      // [item][own_tokens]: rows without keys are finished as 0; null: there are none
    Finish<T> finish;

    __host__ __device__ index_t chunks() const { return (other_tokens + chunk - 1) / chunk; }
    __host__ __device__ offset_t state_size() const { return offset_t{columns} * inner; }
    __device__ T* state(index_t item, index_t c) const { return states + (offset_t{item} * (chunks() + 1) + c) * state_size(); }
};

/// One tile of the sum of z b^T over a chunk.
template <class T>
__global__ void __launch_bounds__(tile_threads, 2) sum_chunks(const __grid_constant__ LinearProduct<T> a) {
    using S = TileShape<T>;
    extern __shared__ __align__(16) unsigned char memory[];
    T* const values = reinterpret_cast<T*>(memory);
    T* const others = values + S::buffer;
    const index_t chunk = static_cast<index_t>(blockIdx.x), item = a.first_item + static_cast<index_t>(blockIdx.y);
    const index_t inner_tiles = (a.inner + S::width - 1) / S::width, row = static_cast<index_t>(blockIdx.z) / inner_tiles * S::width, column = static_cast<index_t>(blockIdx.z) % inner_tiles * S::width;
    const index_t end = min(min((chunk + 1) * a.chunk, a.other_tokens), a.other_lengths(item / a.heads));
    const Sequence tokens{0, nullptr};
    T sum[S::rows_each][S::values_each] = {};
    for (index_t begin = chunk * a.chunk; begin < end; begin += S::side) {
        load_tile(values, a.values.head(item), a.values.row_stride, tokens, begin, end, row, a.columns);
        load_tile(others, a.other.head(item), a.other.row_stride, tokens, begin, end, column, a.inner);
        __syncthreads();
        multiply<false>(sum, values, others, min(S::side, end - begin), [](int, int) { return true; });
        __syncthreads();
    }
    T* const state = a.state(item, chunk);
    for_each_row(values, sum, ~std::uint64_t{0}, [&](int slot, int c, const Vector<T>& value) {
        if (row + slot < a.columns && column + c < a.inner) store_vector(state + offset_t{row + slot} * a.inner + column + c, value);
    });
}

/// Sums over chunks to sums over all chunks before each (later: from each on), in order; one more state at the end.
template <class T>
__global__ void scan_chunks(const __grid_constant__ LinearProduct<T> a) {
    const offset_t at = offset_t{blockIdx.x} * blockDim.x + threadIdx.x;
    const index_t item = a.first_item + static_cast<index_t>(blockIdx.y), chunks = a.chunks();
    if (at >= a.state_size()) return;
    T sum = 0;
    if (a.sees == Sees::later) {
        a.state(item, chunks)[at] = 0;
        for (index_t c = chunks; c-- > 0;) a.state(item, c)[at] = sum += a.state(item, c)[at];
    } else {
        for (index_t c = 0; c < chunks; ++c) {
            const T own = a.state(item, c)[at];
            a.state(item, c)[at] = sum;
            sum += own;
        }
        a.state(item, chunks)[at] = sum;
    }
}

/// A tile of own tokens: times the state of all chunks that each of them sees whole, then the tiles on the diagonal.
template <class T>
__global__ void __launch_bounds__(tile_threads, 2) apply_states(const __grid_constant__ LinearProduct<T> a) {
    using S = TileShape<T>;
    extern __shared__ __align__(16) unsigned char memory[];
    T* const own_rows = reinterpret_cast<T*>(memory);
    T* const other_rows = own_rows + S::buffer;
    T* const value_rows = other_rows + S::buffer;
    const index_t first = static_cast<index_t>(blockIdx.x) * S::side, item = a.first_item + static_cast<index_t>(blockIdx.y), panel = static_cast<index_t>(blockIdx.z) * S::width;
    const index_t own_length = a.own_lengths(item / a.heads), other_end = min(a.other_tokens, a.other_lengths(item / a.heads)), chunks = a.chunks();
    const int first_row = static_cast<int>(threadIdx.x) / 16 * S::rows_each, lane = static_cast<int>(threadIdx.x) % 16;
    const Sequence tokens{0, nullptr};
    const index_t last = min(first + S::side, a.own_tokens) - 1;
    // Tiles [from, to) of the others are left for the diagonal; chunks are single tiles there.
    index_t state = chunks, from = 0, to = 0;
    const auto tile_of = [&](offset_t token) { return static_cast<index_t>(token <= 0 ? 0 : token >= a.other_tokens ? (a.other_tokens + S::side - 1) / S::side : token / S::side); };
    if (a.sees == Sees::earlier) {
        from = state = min(tile_of(first + a.offset + 1), chunks);  // each own token sees the tiles before
        to = min(tile_of(last + a.offset + S::side), chunks);
    } else if (a.sees == Sees::later) {
        from = tile_of(first - a.offset);
        to = state = min(tile_of(last - a.offset + S::side - 1), chunks);
    }

    T s[S::rows_each][S::columns_each] = {};
    for (index_t k = 0; k < a.inner; k += S::width) {
        load_tile(own_rows, a.own.head(item), a.own.row_stride, tokens, first, last + 1, k, a.inner);
        load_tile(other_rows, a.state(item, state), a.inner, tokens, panel, a.columns, k, a.inner);
        __syncthreads();
        multiply_transposed(s, own_rows, other_rows, min(S::width, a.inner - k));
        __syncthreads();
    }
    T sum[S::rows_each][S::values_each];
    to_neighbours(value_rows, s, sum);
    for (index_t tile = from; tile < to; ++tile) {
        const index_t begin = tile * S::side;
        T p[S::rows_each][S::columns_each] = {};
        bool odd = load_tile(value_rows, a.values.head(item), a.values.row_stride, tokens, begin, other_end, panel, a.columns);
        for (index_t k = 0; k < a.inner; k += S::width) {
            if (a.inner > S::width) load_tile(own_rows, a.own.head(item), a.own.row_stride, tokens, first, last + 1, k, a.inner);
            load_tile(other_rows, a.other.head(item), a.other.row_stride, tokens, begin, other_end, k, a.inner);
            odd = __syncthreads_or(odd);
            multiply_transposed(p, own_rows, other_rows, min(S::width, a.inner - k));
            __syncthreads();
        }
        const auto sees = [&](int i, int n) {
            const offset_t own = first + first_row + i, other = begin + n;
            return other < other_end && (a.sees == Sees::earlier ? other <= own + a.offset : other >= own - a.offset);
        };
#pragma unroll
        for (int i = 0; i < S::rows_each; ++i)
#pragma unroll
            for (int j = 0; j < S::columns_each; ++j)
                if (!sees(i, lane + 16 * j)) p[i][j] = 0;
        store_weights(other_rows, p);
        __syncthreads();
        const int others = max(0, min(S::side, other_end - begin));
        if (odd) multiply<true>(sum, other_rows, value_rows, others, sees);
        else multiply<false>(sum, other_rows, value_rows, others, [](int, int) { return true; });
        __syncthreads();
    }
    for_each_row(value_rows, sum, ~std::uint64_t{0}, [&](int slot, int c, const Vector<T>& value) {
        const index_t token = first + slot;
        if (token >= a.own_tokens) return;
        // Padded keys give nothing, but their rows may have teleports to finish with.
        const bool valid = token < own_length, alive = !a.marks || (valid && !is_empty(a.marks[offset_t{item} * a.own_tokens + token]));
        a.finish.store(item, token, panel + c, valid ? value : Vector<T>{}, alive);
    });
}

/// Tokens of a chunk: of causal products one tile, else as few whole tiles as leave at most `most` chunks.
template <class T>
index_t chunk_of(Sees sees, index_t tokens, index_t most = 32) {
    constexpr index_t side = TileShape<T>::side;
    if (sees != Sees::all) return side;
    const index_t tiles = (tokens + side - 1) / side;
    return std::max<index_t>(1, (tiles + most - 1) / most) * side;
}
/// Numbers that the states of one item take. Fewer tokens may make more chunks, but never take more.
template <class T>
offset_t states_size(Sees sees, index_t other_tokens, index_t inner, index_t columns, index_t most = 32) {
    constexpr index_t side = TileShape<T>::side;
    const index_t tiles = (other_tokens + side - 1) / side;
    return (offset_t{sees == Sees::all ? std::min(tiles, most) : tiles} + 1) * inner * columns;
}

/// Sums over chunks, then over chunks before, of `count` items.
template <class T>
void make_states(const LinearProduct<T>& product, unsigned count, cudaStream_t stream) {
    using S = TileShape<T>;
    if (product.inner == 0) return;
    if (product.chunks() > 0)
        launch("sum_chunks", sum_chunks<T>, dim3(static_cast<unsigned>(product.chunks()), count, blocks_for(product.columns, S::width) * blocks_for(product.inner, S::width)), tile_threads, 2 * S::buffer * sizeof(T), stream, product);
    launch("scan_chunks", scan_chunks<T>, dim3(blocks_for(product.state_size(), 256), count), 256, 0, stream, product);
}

/// finish(mask(own other^T) values), for `items` heads.
template <class T>
void linear_product(LinearProduct<T> product, index_t items, cudaStream_t stream) {
    using S = TileShape<T>;
    constexpr std::size_t buffer = S::buffer * sizeof(T);
    if (product.own_tokens == 0 || product.columns == 0) return;
    product.chunk = chunk_of<T>(product.sees, product.other_tokens);
    for_each_grid(0, items, [&](index_t item, unsigned count) {
        product.first_item = item;
        make_states(product, count, stream);
        launch("apply_states", apply_states<T>, dim3(blocks_for(product.own_tokens, S::side), count, blocks_for(product.columns, S::width)), tile_threads, 3 * buffer, stream, product);
    });
}

/// The sum over all items and tokens of z b^T, rows z of `values` and b of `other`: a weight's gradient.
template <class T>
struct TokenSum {
    Rows<T> values, other;
    index_t columns, inner;  // padded: of values; of other
    index_t items, tokens;
    Lengths lengths;
    /// Of contiguous rows.
    static TokenSum of_rows(const T* values, index_t columns, const T* other, index_t inner, index_t rows) {
        return {packed_rows<T>(values, 1, 0, columns), packed_rows<T>(other, 1, 0, inner), columns, inner, 1, rows, {nullptr, rows}};
    }
    /// Of an item, at most: with as many tiles of partial sums as keep any GPU busy. More would only take memory.
    index_t chunks() const {
        constexpr index_t width = TileShape<T>::width, blocks = 1024;
        const offset_t tiles = offset_t{items} * blocks_for(columns, width) * blocks_for(inner, width);
        return static_cast<index_t>(std::clamp<offset_t>(blocks / std::max<offset_t>(tiles, 1), 1, 32));
    }
    /// Numbers of scratch memory: each item's sum, and partial sums of 1024 tiles (17 MB, double 8 MB) or of one chunk an item, at most. Fewer tokens never take
    /// more.
    offset_t states_size() const { return items * detail::cuda::states_size<T>(Sees::all, tokens, inner, columns, chunks()); }
};

/// To `to` [columns][inner] (or less of both, where the rest is padding), or onto it. Items one after the other, each in chunks.
template <class T>
void sum_over_tokens(const TokenSum<T>& sum, T* states, const TensorView<T>& to, bool adds, cudaStream_t stream) {
    LinearProduct<T> product{};
    product.other = sum.other;
    product.values = sum.values;
    product.inner = sum.inner;
    product.columns = sum.columns;
    product.other_tokens = sum.tokens;
    product.other_lengths = sum.lengths;
    product.sees = Sees::all;
    product.heads = 1;
    product.states = states;
    product.chunk = chunk_of<T>(product.sees, sum.tokens, sum.chunks());
    for_each_grid(0, sum.items, [&](index_t item, unsigned count) {
        product.first_item = item;
        make_states(product, count, stream);
    });
    Finish<T> finish;
    finish.accumulate = adds;
    const index_t chunks = product.chunks();
    finish_heads(packed_rows<T>(states + chunks * product.state_size(), sum.items, (offset_t{chunks} + 1) * product.state_size(), sum.inner), sum.items, to, Lengths{nullptr, to.tokens()}, finish, stream);
}

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
