#pragma once
// The dense micro-kernels, in registers. Every dense flop of forward and backward is done by one of these three.

#include <polyattn/backend/simd/schedule.hpp>
#include <polyattn/backend/simd/vector.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// Tile sizes of a type and architecture: as many accumulators as the register file carries beside the operands.
template <class T, class A>
struct Tiling {
    static constexpr int lanes = simd::lanes<T, A>;
    static_assert(group_size % lanes == 0, "polyattn: vectors of more than 16 lanes are not supported");
    static constexpr int registers = is_avx512<A> ? 32 : 16;
    /// Vectors that hold one value of each query of a group.
    static constexpr int group_vectors = group_size / lanes;
    /// Keys of a score tile.
    static constexpr int score_keys = registers == 32 ? (group_vectors == 1 ? 8 : 16 / group_vectors) : (group_vectors >= 8 ? 1 : 8 / group_vectors + (group_vectors == 2 ? 2 : 0));
    /// Rows and vectors of columns of an output tile.
    static constexpr int rows = 4;
    static constexpr int columns = registers == 32 ? 4 : 2;
    /// Keys whose weights are worked on while they are in the first-level cache.
    static constexpr int key_block = sizeof(T) == 4 ? 512 : 256;
};

/// One value of each query of a group, and those of M keys.
template <class T, class A>
using GroupVectors = Vec<T, A>[Tiling<T, A>::group_vectors];
template <class T, class A, int M>
using TileScores = GroupVectors<T, A>[M];

/// acc[key][query] += sum over t of keys[key][t] * queries[t][query]: M keys as stored, 16 queries transposed.
template <int M, class T, class A>
POLYATTN_ALWAYS_INLINE void score_tile(TileScores<T, A, M>& acc, const T* keys, std::ptrdiff_t stride, const T* queries, index_t dim) {
    using V = Vec<T, A>;
    constexpr int vectors = Tiling<T, A>::group_vectors, lanes = Tiling<T, A>::lanes;
    // Four base pointers and one offset address all rows; a row stride known only at run time costs nothing then.
    const T* const base[4] = {keys, keys + stride, keys + 2 * stride, keys + 3 * stride};
    const std::ptrdiff_t four = 4 * stride;
    for (index_t t = 0; t < dim; ++t) {
        V query[vectors];
        unroll<vectors>([&](auto v) POLYATTN_INLINE_LAMBDA { query[v] = V::load_aligned(queries + t * group_size + v * lanes); });
        unroll<M>([&](auto i) POLYATTN_INLINE_LAMBDA {
            const V key(base[i % 4][i / 4 * four + t]);
            unroll<vectors>([&](auto v) POLYATTN_INLINE_LAMBDA { acc[i][v] = multiply_add(key, query[v], acc[i][v]); });
        });
    }
}

/// out[row][columns] (+)= sum over keys of weights[key][row] * x[key][columns], M rows x N vectors. Weights lie 16 queries a key.
template <int M, int N, class T, class A>
POLYATTN_ALWAYS_INLINE void weighted_sum_tile(const T* weights, const T* x, std::ptrdiff_t x_stride, index_t keys, T* out,
                                              std::ptrdiff_t out_stride, bool add) {
    using V = Vec<T, A>;
    constexpr int lanes = Tiling<T, A>::lanes;
    V acc[M][N];
    unroll<M>([&](auto i) POLYATTN_INLINE_LAMBDA {
        unroll<N>([&](auto v) POLYATTN_INLINE_LAMBDA { acc[i][v] = add ? V::load_unaligned(out + i * out_stride + v * lanes) : V(T(0)); });
    });
    for (index_t key = 0; key < keys; ++key) {
        V row[N];
        unroll<N>([&](auto v) POLYATTN_INLINE_LAMBDA { row[v] = V::load_unaligned(x + v * lanes); });
        unroll<M>([&](auto i) POLYATTN_INLINE_LAMBDA {
            const V weight(weights[i]);
            unroll<N>([&](auto v) POLYATTN_INLINE_LAMBDA { acc[i][v] = multiply_add(weight, row[v], acc[i][v]); });
        });
        weights += group_size;
        x += x_stride;
    }
    unroll<M>([&](auto i) POLYATTN_INLINE_LAMBDA {
        unroll<N>([&](auto v) POLYATTN_INLINE_LAMBDA { acc[i][v].store_unaligned(out + i * out_stride + v * lanes); });
    });
}

/// out[key][columns] += sum over the 16 queries of weights[key][query] * x[query][columns], M keys x N vectors.
template <int M, int N, class T, class A>
POLYATTN_ALWAYS_INLINE void transposed_sum_tile(const T* weights, const T* x, std::ptrdiff_t x_stride, T* out, std::ptrdiff_t out_stride) {
    using V = Vec<T, A>;
    constexpr int lanes = Tiling<T, A>::lanes;
    V acc[M][N];
    unroll<M>([&](auto i) POLYATTN_INLINE_LAMBDA {
        unroll<N>([&](auto v) POLYATTN_INLINE_LAMBDA { acc[i][v] = V::load_unaligned(out + i * out_stride + v * lanes); });
    });
    for (int query = 0; query < group_size; ++query) {
        V row[N];
        unroll<N>([&](auto v) POLYATTN_INLINE_LAMBDA { row[v] = V::load_unaligned(x + query * x_stride + v * lanes); });
        unroll<M>([&](auto i) POLYATTN_INLINE_LAMBDA {
            const V weight(weights[i * group_size + query]);
            unroll<N>([&](auto v) POLYATTN_INLINE_LAMBDA { acc[i][v] = multiply_add(weight, row[v], acc[i][v]); });
        });
    }
    unroll<M>([&](auto i) POLYATTN_INLINE_LAMBDA {
        unroll<N>([&](auto v) POLYATTN_INLINE_LAMBDA { acc[i][v].store_unaligned(out + i * out_stride + v * lanes); });
    });
}

/// out += factor * x, rounded as the tiles round it: the bits of a row must not depend on which of them works on it.
template <class T, class A>
void add_scaled(T factor, const T* x, index_t columns, T* out) {
    using V = Vec<T, A>;
    for (index_t c = 0; c < columns; c += Tiling<T, A>::lanes) multiply_add(V(factor), V::load_unaligned(x + c), V::load_unaligned(out + c)).store_unaligned(out + c);
}

/// Calls f(integral_constant width, column) so that widths of up to N vectors cover `columns`, a multiple of the lanes.
template <int N, int Lanes, class F>
POLYATTN_ALWAYS_INLINE void for_column_panels(index_t columns, F&& f) {
    index_t column = 0;
    for (; column + N * Lanes <= columns; column += N * Lanes) f(std::integral_constant<int, N>{}, column);
    if constexpr (N > 1)
        if (column < columns) for_column_panels<N / 2, Lanes>(columns - column, [&](auto width, index_t at) POLYATTN_INLINE_LAMBDA { f(width, column + at); });
}

/// out[16 rows][columns] (+)= weights^T x over the keys [0, keys) of a block. Four rows at a time skip the keys that none of
/// them sees: `lanes` are the rows' bounds, relative to the block.
template <class T, class A>
void weighted_sum(const T* weights, const T* x, std::ptrdiff_t x_stride, const std::array<Bounds, group_size>& lanes, index_t columns,
                  T* out, std::ptrdiff_t out_stride, bool add) {
    using K = Tiling<T, A>;
    for (int row = 0; row < group_size; row += K::rows) {
        Bounds seen = lanes[static_cast<std::size_t>(row)];
        for (int i = 1; i < K::rows; ++i) {
            const Bounds lane = lanes[static_cast<std::size_t>(row + i)];
            if (lane.empty()) continue;
            seen = seen.empty() ? lane : Bounds{std::min(seen.begin, lane.begin), std::max(seen.end, lane.end)};
        }
        if (seen.empty()) {
            if (add) continue;
            seen = {0, 0};
        }
        for_column_panels<K::columns, K::lanes>(columns, [&](auto width, index_t column) POLYATTN_INLINE_LAMBDA {
            weighted_sum_tile<K::rows, width, T, A>(weights + seen.begin * group_size + row, x + seen.begin * x_stride + column, x_stride,
                                                    seen.size(), out + row * out_stride + column, out_stride, add);
        });
    }
}

/// out[keys][columns] += weights x for the keys of a block.
template <class T, class A>
void transposed_sum(const T* weights, index_t keys, const T* x, std::ptrdiff_t x_stride, index_t columns, T* out, std::ptrdiff_t out_stride) {
    using K = Tiling<T, A>;
    for_column_panels<K::columns, K::lanes>(columns, [&](auto width, index_t column) POLYATTN_INLINE_LAMBDA {
        index_t key = 0;
        for (; key + K::rows <= keys; key += K::rows)
            transposed_sum_tile<K::rows, width, T, A>(weights + key * group_size, x + column, x_stride, out + key * out_stride + column, out_stride);
        for (; key < keys; ++key)
            transposed_sum_tile<1, width, T, A>(weights + key * group_size, x + column, x_stride, out + key * out_stride + column, out_stride);
    });
}

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
