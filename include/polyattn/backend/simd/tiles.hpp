#pragma once
// The dense micro-kernels, in registers. Every dense flop of forward and backward is done by one of these, but for single queries
// (decode.hpp).

#include <polyattn/backend/simd/rows.hpp>
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
    /// Groups whose scores with the same keys are made at once, where that can be: two vectors of queries share a broadcast key.
    static constexpr int score_groups = registers == 32 && group_vectors == 1 ? 2 : 1;
    /// Keys of a score tile.
    static constexpr int score_keys = registers == 32 ? 8 : group_vectors == 1 ? 12 : group_vectors == 2 ? 6 : group_vectors == 4 ? 2 : 1;
    /// Rows and vectors of columns of an output tile.
    static constexpr int rows = registers == 32 ? 8 : 4;
    static constexpr int columns = 3;
    /// Keys whose values all rows of a group use before the next ones come into the first-level cache.
    static constexpr index_t value_keys = 80;
    /// Keys whose weights are worked on at once: of one group of queries, so that a window of 512 is one block ..
    static constexpr int key_block = sizeof(T) == 4 ? 544 : 272;
    /// .. and of several groups, so that the keys and values stay in the second-level cache meanwhile.
    static constexpr int shared_key_block = sizeof(T) == 4 ? 256 : 128;
    static_assert(score_groups * shared_key_block <= key_block);
};

/// Scores of M keys and the queries of G groups: vector n belongs to key n / (G group_vectors), and of its queries to those from
/// n % (G group_vectors) * lanes on.
template <class T, class A, int M, int G = 1>
using TileScores = Vec<T, A>[M * G * Tiling<T, A>::group_vectors];

/// acc (key, query) += sum over t of keys[key][t] * queries[group][t][query]: M keys as stored, 16 queries a group transposed, groups `group_stride` apart.
template <int M, int G, class T, class A>
POLYATTN_ALWAYS_INLINE void score_tile(TileScores<T, A, M, G>& acc, const T* keys, std::ptrdiff_t stride, const T* queries, std::ptrdiff_t group_stride, index_t dim) {
    using V = Vec<T, A>;
    constexpr int of_group = Tiling<T, A>::group_vectors, vectors = G * of_group, lanes = Tiling<T, A>::lanes;
    // Four base pointers and one offset address all rows; a row stride known only at run time costs nothing then.
    const T* const base[4] = {keys, keys + stride, keys + 2 * stride, keys + 3 * stride};
    const std::ptrdiff_t four = 4 * stride;
    POLYATTN_UNROLL_4
    for (index_t t = 0; t < dim; ++t) {
        V query[vectors];
        expand<vectors>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((query[I] = V::load_aligned(queries + I / of_group * group_stride + t * group_size + I % of_group * lanes)), ...); });
        expand<M * vectors>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA {
            ((acc[I] = multiply_add(V(base[I / vectors % 4][I / vectors / 4 * four + t]), query[I % vectors], acc[I])), ...);
        });
    }
}

/// Calls step(0), .., step(count - 1), four a round, and fetch() of each of `runs` once a round.
template <class Step, class... Runs>
POLYATTN_ALWAYS_INLINE void in_steps(index_t count, Step&& step, Runs&... runs) {
    index_t t = 0;
    if constexpr (sizeof...(Runs) > 0)
        for (; t + 4 <= count; t += 4) {
            (runs.fetch(), ...);
            POLYATTN_UNROLL_4
            for (index_t i = 0; i < 4; ++i) step(t + i);
        }
    POLYATTN_UNROLL_4
    for (; t < count; ++t) step(t);
}

/// out[row][columns] (+)= sum over keys of weights[key][row] * x[key][columns], M rows x N vectors. Weights of attention lie 16 queries a key.
/// Beside them a line of each of `runs` is fetched every four keys.
template <int M, int N, class T, class A, class... Runs>
POLYATTN_ALWAYS_INLINE void weighted_sum_tile(const T* weights, const T* x, std::ptrdiff_t x_stride, index_t keys, T* out,
                                              std::ptrdiff_t out_stride, bool add, std::ptrdiff_t weight_stride = group_size, Runs... runs) {
    using V = Vec<T, A>;
    constexpr int lanes = Tiling<T, A>::lanes;
    V acc[M * N];
    if (add) expand<M * N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((acc[I] = V::load_unaligned(out + I / N * out_stride + I % N * lanes)), ...); });
    else expand<M * N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((acc[I] = V(T(0))), ...); });
    in_steps(keys, [&](index_t) POLYATTN_INLINE_LAMBDA {
        V row[N];
        expand<N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((row[I] = in_register<T, A>(V::load_unaligned(x + I * lanes))), ...); });
        expand<M * N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((acc[I] = multiply_add(V(weights[I / N]), row[I % N], acc[I])), ...); });
        weights += weight_stride;
        x += x_stride;
    }, runs...);
    expand<M * N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { (acc[I].store_unaligned(out + I / N * out_stride + I % N * lanes), ...); });
}

/// acc[row][columns] += sum over t of a[row][t] * x[t][columns], M rows as they are stored x N vectors, and a line of each of `runs` every four t.
template <int M, int N, class T, class A, class... Runs>
POLYATTN_ALWAYS_INLINE void row_sum_tile(Vec<T, A> (&acc)[M * N], const T* a, std::ptrdiff_t a_stride, const T* x, std::ptrdiff_t x_stride, index_t inner, Runs... runs) {
    using V = Vec<T, A>;
    constexpr int lanes = Tiling<T, A>::lanes;
    const T* const base[4] = {a, a + a_stride, a + 2 * a_stride, a + 3 * a_stride};
    const std::ptrdiff_t four = 4 * a_stride;
    in_steps(inner, [&](index_t t) POLYATTN_INLINE_LAMBDA {
        V row[N];
        expand<N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((row[I] = in_register<T, A>(V::load_unaligned(x + I * lanes))), ...); });
        expand<M * N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((acc[I] = multiply_add(V(base[I / N % 4][I / N / 4 * four + t]), row[I % N], acc[I])), ...); });
        x += x_stride;
    }, runs...);
}

/// The weights of one group that a transposed sum reads, and the rows that they multiply.
template <class T>
struct WeightPlane {
    const T* weights;            // of the first of `keys`, 16 queries a key
    const T* x;                  // [16][columns]
    Bounds keys;
    const Lanes* lanes;          // what each query sees, relative to the first of `keys`; null: all of them
};

/// acc[key][columns] += sum over queries [first, last) of weights[key][query] * x[query][columns], M keys x N vectors.
template <int M, int N, class T, class A>
POLYATTN_ALWAYS_INLINE void transposed_sum_tile(Vec<T, A> (&acc)[M * N], const T* weights, const T* x, std::ptrdiff_t x_stride, int first, int last) {
    using V = Vec<T, A>;
    constexpr int lanes = Tiling<T, A>::lanes;
    x += first * x_stride;
    POLYATTN_UNROLL_4
    for (int query = first; query < last; ++query) {
        V row[N];
        expand<N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((row[I] = in_register<T, A>(V::load_unaligned(x + I * lanes))), ...); });
        expand<M * N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((acc[I] = multiply_add(V(weights[I / N * group_size + query]), row[I % N], acc[I])), ...); });
        x += x_stride;
    }
}

/// Calls f(integral_constant keys, position) so that tiles of M keys, then of four, then of one cover `keys`. With `Whole`, tiles of M alone do, which keeps the code
/// small. A flat function: what inlines f is optimised again with every function around it.
template <int M, bool Whole = false, class F>
POLYATTN_ALWAYS_INLINE void for_each_key_tile(index_t keys, F&& f) {
    index_t position = 0;
    for (; Whole ? position < keys : position + M <= keys; position += M) f(std::integral_constant<int, M>{}, position);
    if constexpr (M > 4 && !Whole)
        for (; position + 4 <= keys; position += 4) f(std::integral_constant<int, 4>{}, position);
    if constexpr (M > 1 && !Whole)
        for (; position < keys; ++position) f(std::integral_constant<int, 1>{}, position);
}

/// Transposes 16 rows to [column][16], times `factor`.
template <class T, class A>
void pack_rows(const std::array<index_t, group_size>& rows, Rows<T> from, index_t columns, T factor, T* packed) {
    using V = Vec<T, A>;
    constexpr int width = lanes<T, A>;
    index_t c = 0;
    for (; c + width <= columns; c += width)
        for (int part = 0; part < group_size; part += width)
            transpose_block<T, A>([&](auto i) POLYATTN_INLINE_LAMBDA { return V::load_unaligned(from.row(rows[static_cast<std::size_t>(part + i)]) + c) * V(factor); },
                                  packed + c * group_size + part, group_size);
    for (; c < columns; ++c)
        for (int lane = 0; lane < group_size; ++lane) packed[c * group_size + lane] = from.row(rows[static_cast<std::size_t>(lane)])[c] * factor;
}

/// Calls f(integral_constant width, column) for panels of nearly equal widths of up to N vectors that cover `columns`, a multiple of
/// the lanes.
template <int N, int Lanes, class F>
POLYATTN_ALWAYS_INLINE void for_column_panels(index_t columns, F&& f) {
    const index_t vectors = columns / Lanes, panels = (vectors + N - 1) / N;
    for (index_t panel = 0; panel < panels; ++panel) {
        const index_t first = vectors * panel / panels, last = vectors * (panel + 1) / panels;
        with_count<N>(last - first, [&](auto width) POLYATTN_INLINE_LAMBDA { f(width, first * Lanes); });
    }
}

/// Calls f(integral_constant M, integral_constant N, row, column) for tiles of M rows x N vectors that cover `rows` x `columns`, panel by panel: M is Tiling::rows, then 4,
/// then 1, or always 1 if `one_by_one`. As flat as can be, like for_each_key_tile().
template <class T, class A, class F>
POLYATTN_ALWAYS_INLINE void for_each_tile(index_t rows, index_t columns, F&& f, bool one_by_one = false) {
    using K = Tiling<T, A>;
    const index_t vectors = columns / K::lanes, panels = (vectors + K::columns - 1) / K::columns, tiled = one_by_one ? 0 : rows;
    const auto panel_of = [&](auto width, index_t column) POLYATTN_INLINE_LAMBDA {
        index_t row = 0;
        for (; row + K::rows <= tiled; row += K::rows) f(std::integral_constant<int, K::rows>{}, width, row, column);
        if constexpr (K::rows > 4)
            for (; row + 4 <= tiled; row += 4) f(std::integral_constant<int, 4>{}, width, row, column);
        for (; row < rows; ++row) f(std::integral_constant<int, 1>{}, width, row, column);
    };
    static_assert(K::columns == 3);
    for (index_t panel = 0; panel < panels; ++panel) {
        const index_t first = vectors * panel / panels, width = vectors * (panel + 1) / panels - first;
        if (width == 3) panel_of(std::integral_constant<int, 3>{}, first * K::lanes);
        else if (width == 2) panel_of(std::integral_constant<int, 2>{}, first * K::lanes);
        else panel_of(std::integral_constant<int, 1>{}, first * K::lanes);
    }
}

/// out[16 rows][columns] (+)= weights^T x over the keys [0, keys) of a block. Some rows at a time skip the keys that none of
/// them sees: `lanes` are the rows' bounds, relative to the block; null: every row sees all keys.
template <class T, class A>
void weighted_sum(const T* weights, const T* x, std::ptrdiff_t x_stride, index_t keys, const Lanes* lanes, index_t columns, T* out, std::ptrdiff_t out_stride, bool add) {
    using K = Tiling<T, A>;
    static_assert(group_size % K::rows == 0);
    Bounds seen[group_size / K::rows];
    for (int part = 0; part < group_size / K::rows; ++part) {
        index_t begin = lanes ? keys : 0, end = lanes ? 0 : keys;
        for (int i = 0; lanes && i < K::rows; ++i) {
            const auto lane = static_cast<std::size_t>(part * K::rows + i);
            begin = std::min(begin, lanes->end[lane] > 0 ? lanes->begin[lane] : keys);
            end = std::max(end, lanes->end[lane]);
        }
        seen[part] = begin < end ? Bounds{begin, end} : Bounds{};
    }
    const index_t rounds = std::max(index_t{1}, (keys + K::value_keys - 1) / K::value_keys), step = std::max(index_t{1}, (keys + rounds - 1) / rounds);
    for_column_panels<K::columns, K::lanes>(columns, [&](auto width, index_t column) POLYATTN_INLINE_LAMBDA {
        for (index_t first = 0; first == 0 || first < keys; first += step)
            for (int part = 0; part < group_size / K::rows; ++part) {
                const int row = part * K::rows;
                const index_t begin = std::max(seen[part].begin, first), end = std::min(seen[part].end, first + step);
                if (begin >= end && (add || first > 0)) continue;
                weighted_sum_tile<K::rows, width, T, A>(weights + begin * group_size + row, x + begin * x_stride + column, x_stride, std::max(end - begin, index_t{0}),
                                                        out + row * out_stride + column, out_stride, add || first > 0);
            }
    });
}

/// Queries [first, last) of the 16 that see any of the keys [begin, end).
inline std::pair<int, int> lanes_that_see(const Lanes& lanes, index_t begin, index_t end) {
    std::uint32_t seen = 0;
    for (std::uint32_t lane = 0; lane < group_size; ++lane) seen |= (std::uint32_t{lanes.begin[lane] < end} & std::uint32_t{lanes.end[lane] > begin}) << lane;
    return {std::countr_zero(seen | 1u << group_size), std::bit_width(seen)};
}

/// out[keys][columns] += weights x for the keys of a block, over all groups of `planes`: a row of out is read and written once.
template <class T, class A>
void transposed_sum(std::span<const WeightPlane<T>> planes, Bounds keys, std::ptrdiff_t x_stride, index_t columns, T* out, std::ptrdiff_t out_stride) {
    using V = Vec<T, A>;
    using K = Tiling<T, A>;
    struct Share {  // of a plane in a tile: the queries [first, last) that see any of its keys
        const T *weights, *x;
        int first, last;
    };
    const auto tile = [&]<int M>(std::integral_constant<int, M>, index_t key) POLYATTN_INLINE_LAMBDA {
        Share shares[Schedule::most_groups];
        int count = 0;
        for (const WeightPlane<T>& plane : planes) {
            if (key < plane.keys.begin || key >= plane.keys.end) continue;
            const index_t at = key - plane.keys.begin;
            const auto [first, last] = plane.lanes ? lanes_that_see(*plane.lanes, at, at + M) : std::pair{0, group_size};
            if (first < last) shares[count++] = {plane.weights + at * group_size, plane.x, first, last};
        }
        if (count == 0) return;
        for_column_panels<K::columns, K::lanes>(columns, [&](auto width, index_t column) POLYATTN_INLINE_LAMBDA {
            constexpr int N = width;
            V acc[M * N];
            T* const to = out + key * out_stride + column;
            expand<M * N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((acc[I] = V::load_unaligned(to + I / N * out_stride + I % N * K::lanes)), ...); });
            for (int s = 0; s < count; ++s) transposed_sum_tile<M, N, T, A>(acc, shares[s].weights, shares[s].x + column, x_stride, shares[s].first, shares[s].last);
            expand<M * N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { (acc[I].store_unaligned(to + I / N * out_stride + I % N * K::lanes), ...); });
        });
    };
    index_t key = keys.begin;
    for (; key + K::rows <= keys.end; key += K::rows) tile(std::integral_constant<int, K::rows>{}, key);
    for (; key < keys.end; ++key) tile(std::integral_constant<int, 1>{}, key);
}

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
