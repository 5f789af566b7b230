#pragma once
// What the dense kernels are made of: 128 threads as 8 x 16 work on square tiles of pairs held in shared memory. A thread owns side / 8
// neighbouring rows and every 16th column of scores, so that all its reads of 16 bytes are free of bank conflicts.

#include <polyattn/backend/cuda/numbers.cuh>
#include <polyattn/backend/cuda/plan.cuh>
#include <polyattn/core/dropout.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

inline constexpr int tile_threads = 128;

/// `side` pairs each way, `width` columns of rows at a time: three buffers fit 64 KB, what the smallest GPUs have.
template <class T>
struct TileShape {
    static constexpr int side = sizeof(T) == 8 ? 32 : 64, width = side;
    static constexpr int vector = 16 / sizeof(T);
    static constexpr int rows_each = side / 8, columns_each = side / 16, values_each = width / 16;
    static constexpr int stride = width + vector, buffer = side * stride;
};

__device__ inline bool is_not_finite(float value) { return (__float_as_uint(value) >> 23 & 0xff) == 0xff; }
__device__ inline bool is_not_finite(double value) { return (__double2hiint(value) >> 20 & 0x7ff) == 0x7ff; }
template <class T>
__device__ T minus_infinity() {
    if constexpr (sizeof(T) == 4) return __uint_as_float(0xff800000u);
    else return __longlong_as_double(static_cast<long long>(0xfff0000000000000ull));
}
/// The mark of a row without keys.
__device__ inline bool is_empty(float logsumexp) { return __float_as_uint(logsumexp) == 0xff800000u; }
__device__ inline bool is_empty(double logsumexp) { return static_cast<unsigned long long>(__double_as_longlong(logsumexp)) == 0xfff0000000000000ull; }
/// Below every score; finite, so that differences of references are.
template <class T>
__device__ constexpr T lowest() {
    return sizeof(T) == 4 ? T(-3.402823466e38) : T(-1.7976931348623157e308);
}
__device__ inline float exp_base2(float x) { return exp2f(x); }
__device__ inline double exp_base2(double x) { return exp2(x); }
__device__ inline float log_base2(float x) { return log2f(x); }
__device__ inline double log_base2(double x) { return log2(x); }
template <class T>
inline constexpr T log2_of_e = T(1.4426950408889634074);
template <class T>
inline constexpr T log_of_2 = T(0.69314718055994530942);

/// [batch, heads, tokens, dim] with rows that are contiguous, at multiples of 16 bytes, and padded with zeros to whole vectors.
/// `group` query heads share one head.
template <class T>
struct Rows {
    const T* data;
    std::ptrdiff_t batch_stride, head_stride, row_stride;
    index_t heads, group;  // query heads
    __device__ const T* head(index_t item) const { return data + item / heads * batch_stride + item % heads / group * head_stride; }
};

/// Rows [begin, begin + side) of a sequence and columns [column, column + width) to shared memory; zeros from `end` and from `columns` on.
/// True if this thread met a number that is not finite.
template <class T>
__device__ bool load_tile(T* to, const T* head, std::ptrdiff_t row_stride, Sequence tokens, index_t begin, index_t end, index_t column, index_t columns) {
    using S = TileShape<T>;
    constexpr int per_row = S::width / S::vector;
    const int c = static_cast<int>(threadIdx.x) % per_row * S::vector;
    bool odd = false;
#pragma unroll 4
    for (int r = static_cast<int>(threadIdx.x) / per_row; r < S::side; r += tile_threads / per_row) {
        Vector<T> value{};
        if (begin + r < end && column + c < columns) value = load_vector(head + tokens[begin + r] * row_stride + column + c);
#pragma unroll
        for (int i = 0; i < S::vector; ++i) odd |= is_not_finite(value.at[i]);
        store_vector(to + r * S::stride + c, value);
    }
    return odd;
}

/// s += a b^T over `depth` columns of two tiles.
template <class T>
__device__ void multiply_transposed(T (&s)[TileShape<T>::rows_each][TileShape<T>::columns_each], const T* a, const T* b, int depth) {
    using S = TileShape<T>;
    a += static_cast<int>(threadIdx.x) / 16 * S::rows_each * S::stride;
    b += static_cast<int>(threadIdx.x) % 16 * S::stride;
#pragma unroll 2
    for (int k = 0; k < depth; k += S::vector) {
        Vector<T> x[S::rows_each], y[S::columns_each];
#pragma unroll
        for (int i = 0; i < S::rows_each; ++i) x[i] = load_vector(a + i * S::stride + k);
#pragma unroll
        for (int j = 0; j < S::columns_each; ++j) y[j] = load_vector(b + j * 16 * S::stride + k);
#pragma unroll
        for (int l = 0; l < S::vector; ++l)
#pragma unroll
            for (int i = 0; i < S::rows_each; ++i)
#pragma unroll
                for (int j = 0; j < S::columns_each; ++j) s[i][j] += x[i].at[l] * y[j].at[l];
    }
}

/// sum += a v over `depth` columns of a, which are rows of v.
template <class T>
__device__ void multiply_rows(T (&sum)[TileShape<T>::rows_each][TileShape<T>::values_each], const T* a, const T* v, int depth) {
    using S = TileShape<T>;
    a += static_cast<int>(threadIdx.x) / 16 * S::rows_each * S::stride;
    v += static_cast<int>(threadIdx.x) % 16 * S::values_each;
#pragma unroll 2
    for (int k = 0; k < depth; k += S::vector) {
        Vector<T> x[S::rows_each];
#pragma unroll
        for (int i = 0; i < S::rows_each; ++i) x[i] = load_vector(a + i * S::stride + k);
#pragma unroll
        for (int l = 0; l < S::vector; ++l) {
            const Vector<T> y = load_vector(v + (k + l) * S::stride);
#pragma unroll
            for (int i = 0; i < S::rows_each; ++i)
#pragma unroll
                for (int c = 0; c < S::values_each; ++c) sum[i][c] += x[i].at[l] * y.at[c];
        }
    }
}

/// From every 16th column, as multiply_transposed() leaves them, to neighbouring columns, through a tile of shared memory.
template <class T>
__device__ void to_neighbours(T* tile, const T (&s)[TileShape<T>::rows_each][TileShape<T>::columns_each], T (&sum)[TileShape<T>::rows_each][TileShape<T>::values_each]) {
    using S = TileShape<T>;
    const int row = static_cast<int>(threadIdx.x) / 16 * S::rows_each, lane = static_cast<int>(threadIdx.x) % 16;
#pragma unroll
    for (int i = 0; i < S::rows_each; ++i)
#pragma unroll
        for (int j = 0; j < S::columns_each; ++j) tile[(row + i) * S::stride + lane + 16 * j] = s[i][j];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < S::rows_each; ++i) {
        const Vector<T> value = load_vector(tile + (row + i) * S::stride + lane * S::values_each);
#pragma unroll
        for (int c = 0; c < S::values_each; ++c) sum[i][c] = value.at[c];
    }
    __syncthreads();
}

/// Writes a thread's weights where multiply() reads them: [others][own].
template <class T>
__device__ void store_weights(T* to, const T (&p)[TileShape<T>::rows_each][TileShape<T>::columns_each]) {
    using S = TileShape<T>;
    const int row = static_cast<int>(threadIdx.x) / 16 * S::rows_each, column = static_cast<int>(threadIdx.x) % 16;
#pragma unroll
    for (int j = 0; j < S::columns_each; ++j)
#pragma unroll
        for (int i = 0; i < S::rows_each; i += S::vector) {
            Vector<T> value;
#pragma unroll
            for (int l = 0; l < S::vector; ++l) value.at[l] = p[i + l][j];
            store_vector(to + (column + 16 * j) * S::stride + row + i, value);
        }
}

/// sum += p v over the first `others` rows of v; p as store_weights() wrote it. With `Select`, only pairs for which allows(row, other) holds
/// count: a weight of 0 times NaN is NaN.
template <bool Select, class T, class Allows>
__device__ void multiply(T (&sum)[TileShape<T>::rows_each][TileShape<T>::values_each], const T* p, const T* v, int others, Allows&& allows) {
    using S = TileShape<T>;
    p += static_cast<int>(threadIdx.x) / 16 * S::rows_each;
    v += static_cast<int>(threadIdx.x) % 16 * S::values_each;
#pragma unroll 4
    for (int n = 0; n < others; ++n) {
        T x[S::rows_each];
#pragma unroll
        for (int i = 0; i < S::rows_each; i += S::vector) {
            const Vector<T> value = load_vector(p + n * S::stride + i);
#pragma unroll
            for (int l = 0; l < S::vector; ++l) x[i + l] = value.at[l];
        }
        const Vector<T> y = load_vector(v + n * S::stride);
#pragma unroll
        for (int i = 0; i < S::rows_each; ++i) {
            if (Select && !allows(i, n)) continue;
#pragma unroll
            for (int c = 0; c < S::values_each; ++c) sum[i][c] += x[i] * y.at[c];
        }
    }
}

/// Over the 16 threads that share rows.
template <class T>
__device__ T largest_of_row(T value) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
        const T other = __shfl_xor_sync(~0u, value, step);
        value = other > value ? other : value;
    }
    return value;
}
template <class T>
__device__ T sum_of_row(T value) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

/// The slots of own tokens whose pairs a thread holds.
template <class T>
struct TileSlots {
    static constexpr int count = TileShape<T>::rows_each;
    static __device__ int slot(int i) { return static_cast<int>(threadIdx.x) / 16 * count + i; }
};

/// Which pairs of a segment exist, for one thread. Positions are those in the tile's sequences; -1 stands for none.
template <class T, bool Transposed, class Slots = TileSlots<T>>
struct PairMask {

    __device__ PairMask(const PlanView& plan, const DeviceTile& tile, const Segment& segment, const DeviceGroup& group, Sequence own_tokens, index_t own_length, index_t other_length)
        : bounds_(tile.bounds < 0 ? nullptr : plan.bounds + tile.bounds), excluded_(tile.excluded < 0 ? nullptr : plan.excluded + tile.excluded), keys_(tile.keys),
          others_{Transposed ? tile.first_row : tile.first_key, list_of(plan, Transposed ? tile.row_list : tile.key_list)}, end_(segment.end), other_length_(other_length) {
        const index_t all = Transposed ? tile.keys : tile.rows;
#pragma unroll
        for (int i = 0; i < Slots::count; ++i) {
            const int slot = Slots::slot(i);
            const index_t position = segment.own + slot;
            const bool there = slot < group.count && position >= 0 && position < all && own_tokens[slot] < own_length;
            if constexpr (Transposed) own_[i] = there && !is_excluded(position) ? position : -1;
            else range_[i] = there ? row_bounds(position) : Bounds{0, 0};
        }
    }

    __device__ Sequence others() const { return others_; }

    /// A column of the chunk that begins at `begin`, kept in registers for all rows.
    struct Column {
        index_t position;  // of the other, or -1
        Bounds range;      // transposed: the keys that this row sees
    };
    __device__ Column column(index_t begin, int n) const {
        const index_t position = begin + n;
        const bool there = position < end_ && others_[position] < other_length_;
        if constexpr (Transposed) return {position, there ? row_bounds(position) : Bounds{0, 0}};
        else return {there && !is_excluded(position) ? position : -1, {}};
    }
    __device__ bool allows(int i, const Column& column) const {
        if constexpr (Transposed) return own_[i] >= column.range.begin && own_[i] < column.range.end;
        else return column.position >= range_[i].begin && column.position < range_[i].end;
    }
    /// All pairs of the chunk exist, for the own tokens that are valid.
    __device__ bool is_full(const Segment& segment, index_t begin) const {
        return begin >= segment.full_begin && begin + TileShape<T>::side <= segment.full_end && others_[begin + TileShape<T>::side - 1] < other_length_;
    }

private:
    static __device__ const index_t* list_of(const PlanView& plan, offset_t list) { return list < 0 ? nullptr : plan.lists + list; }
    __device__ Bounds row_bounds(index_t row) const { return bounds_ ? bounds_[row] : Bounds{0, keys_}; }
    __device__ bool is_excluded(index_t key) const { return excluded_ && (excluded_[key / 32] >> key % 32 & 1); }

    const Bounds* bounds_;
    const std::uint32_t* excluded_;
    index_t keys_;
    Sequence others_;
    index_t end_, other_length_;
    Bounds range_[Slots::count];
    index_t own_[Slots::count];
};

/// Dropout of a call: (batch, head) counts through all items of one draw, or, with `draws`, heads count through those of each batch item's own draw.
struct CallDropout {
    DropoutMask mask{};
    const std::uint32_t* draws = nullptr;  // hashes, [batch]

    __host__ __device__ bool drops_weights() const { return mask.drops_weights(); }
    __host__ __device__ bool drops_values() const { return mask.drops_values(); }
    /// With `draws`.
    __device__ DropoutMask of_head(index_t b, index_t head) const { return mask.of_item(head).of_draw(draws[b]); }
    __device__ DropoutMask of(index_t item, index_t heads) const { return draws ? of_head(item / heads, item % heads) : mask.of_item(item); }
};

/// Dropout of neighbouring columns, up to four of which one Philox block serves.
template <class T, int count>
__device__ void value_mask(const DropoutMask& dropout, int hop, index_t row, index_t column, T (&mask)[count]) {
    if constexpr (count > 4) {
        T first[4], second[4];
        value_mask(dropout, hop, row, column, first);
        value_mask(dropout, hop, row, column + 4, second);
#pragma unroll
        for (int l = 0; l < 4; ++l) {
            mask[l] = first[l];
            mask[4 + l] = second[l];
        }
    } else {
#pragma unroll
        for (int l = 0; l < count; ++l) mask[l] = 1;
        if (dropout.drops_values()) dropout.values(hop, row, column, mask);
    }
}

/// Multiplies a tile of weights in shared memory, [others][own], with factor(own slot, other). A loop of its own: Philox, unrolled with the scores, would
/// be most of the kernel.
template <class T, class Factor>
__device__ void scale_weights(T* weights, int own, int others, Factor&& factor) {
    using S = TileShape<T>;
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x); at < S::side * others; at += tile_threads)
        if (at % S::side < own) weights[at / S::side * S::stride + at % S::side] *= factor(at % S::side, at / S::side);
}

/// A tile of sums, [own][columns], from registers to shared memory and, row after row, to f(slot, first column, vector).
template <class T, class F>
__device__ void for_each_row(T* tile, const T (&sum)[TileShape<T>::rows_each][TileShape<T>::values_each], std::uint64_t active, F&& f) {
    using S = TileShape<T>;
    const int row = static_cast<int>(threadIdx.x) / 16 * S::rows_each, column = static_cast<int>(threadIdx.x) % 16 * S::values_each;
#pragma unroll
    for (int i = 0; i < S::rows_each; ++i) {
        Vector<T> value;
#pragma unroll
        for (int c = 0; c < S::values_each; ++c) value.at[c] = sum[i][c];
        store_vector(tile + (row + i) * S::stride + column, value);
    }
    __syncthreads();
#pragma unroll 1
    for (int slot = static_cast<int>(threadIdx.x) / 16; slot < S::side; slot += tile_threads / 16)
        if (active >> slot & 1) f(slot, column, load_vector(tile + slot * S::stride + column));
}

/// What becomes of a finished row: dropout(factor * sum + teleport * values), to a packed tensor and to the caller's.
template <class T>
struct Finish {
    using Number = arithmetic_t<T>;
    Number factor = 1;
    Number teleport = 0;
    Rows<T> values{};
    T* packed = nullptr;  // [tokens][packed_columns] of each item
    offset_t packed_stride = 0;
    index_t packed_columns = 0;
    T* out = nullptr;  // of the caller
    std::ptrdiff_t out_batch = 0, out_head = 0, out_row = 0, out_column = 1;
    bool out_vectors = false;  // whole vectors can be stored
    bool accumulate = false;
    index_t heads = 1, columns = 0;
    CallDropout dropout{};
    int hop = 0;

    /// One vector of columns; rows that are not alive become 0.
    __device__ void store(index_t item, index_t token, index_t column, Vector<T> sum, bool alive) const {
        constexpr int vector = 16 / sizeof(T);
        if (column >= packed_columns) return;
        Vector<T> v{};
        if (teleport != 0) v = load_vector(values.head(item) + token * values.row_stride + column);
        Number mask[vector];
        value_mask(dropout.of(item, heads), hop, token, column, mask);
#pragma unroll
        for (int l = 0; l < vector; ++l) {
            Number value = factor * sum.at[l];
            if (teleport != 0) value += teleport * v.at[l];
            sum.at[l] = alive && column + l < columns ? value * mask[l] : Number(0);
        }
        if (packed) store_vector(packed + item * packed_stride + offset_t{token} * packed_columns + column, sum);
        if (!out) return;
        T* const to = out + item / heads * out_batch + item % heads * out_head + token * out_row + column * out_column;
        if (out_vectors && column + vector <= columns) {
            if (accumulate) {
                const Vector<T> old = load_vector(to);
#pragma unroll
                for (int l = 0; l < vector; ++l) sum.at[l] += old.at[l];
            }
            store_vector(to, sum);
        } else
#pragma unroll
            for (int l = 0; l < vector; ++l)
                if (column + l < columns) to[l * out_column] = narrow<T>(accumulate ? widen(to[l * out_column]) + sum.at[l] : sum.at[l]);
    }
};

/// Valid tokens of each batch item; null stands for all.
struct Lengths {
    const index_t* of_batch;
    index_t all;
    __device__ index_t operator()(index_t b) const { return of_batch ? of_batch[b] : all; }
};

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
