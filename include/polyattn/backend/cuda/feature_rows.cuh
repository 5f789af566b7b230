#pragma once
// Feature maps of kernel attention and their adjoints, row by row: phi of queries and keys, the denominators, and what backward makes of them.

#include <polyattn/backend/cuda/rows.cuh>
#include <polyattn/backend/head.hpp>

#include <cub/block/block_reduce.cuh>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

template <class T, class F>
__device__ T feature(const F& map, T x) {
    if constexpr (std::is_same_v<F, ReLU>) return x < 0 ? T(0) : x;
    else if constexpr (std::is_same_v<F, EluPlusOne>) return x > 0 ? x + 1 : exp(x);
    else return static_cast<T>(map(double(x)));
}
template <class T, class F>
__device__ T feature_derivative(const F& map, T x) {
    if constexpr (std::is_same_v<F, ReLU>) return x > 0 ? T(1) : T(0);
    else if constexpr (std::is_same_v<F, EluPlusOne>) return x > 0 ? T(1) : exp(x);
    else return static_cast<T>(map.derivative(double(x)));
}

/// Features of one tensor: [item][tokens][columns], zero from `count` on but for a column of ones where rows that are means need it, and zero in
/// padded rows.
template <class T>
struct FeatureArguments {
    Rows<T> x;
    T* to;
    index_t dim, count, columns, tokens, heads, first_item;
    Lengths lengths;
    bool ones;
};

/// 1, 0, .. in each row: what sums rows in a linear product.
template <class T>
__global__ void fill_ones(T* ones, offset_t count) {
    const offset_t at = offset_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (at < count) ones[at] = at % static_cast<offset_t>(16 / sizeof(T)) == 0 ? T(1) : T(0);
}

template <class T, class F>
__global__ void feature_rows(const __grid_constant__ FeatureArguments<T> a, F map) {
    const offset_t at = offset_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (at >= offset_t{a.tokens} * a.columns) return;
    const index_t item = a.first_item + static_cast<index_t>(blockIdx.y), row = static_cast<index_t>(at / a.columns), c = static_cast<index_t>(at % a.columns);
    T value = 0;
    if (row < a.lengths(item / a.heads)) {
        if (c < a.count) value = feature(map, a.x.head(item)[row * a.x.row_stride + c]);
        else if (c == a.count && a.ones) value = 1;
    }
    a.to[offset_t{item} * a.tokens * a.columns + at] = value;
}

/// What is subtracted from exponents before exp: of each row its largest, a constant, or (in a second pass) the largest of the head.
enum class Shift { row, constant, head };

inline constexpr int feature_block_rows = 8, feature_threads = 128;

/// phi_r(x) = exp(w_r . y - |y|^2 / 2 - log(m) / 2 - shift), y = x d^(-1/4).
template <class T>
struct RandomFeatureArguments {
    FeatureArguments<T> rows;
    const T* directions;  // [dim][count]
    Shift shift;
    T constant;
    T* block_largest;  // [item][blocks], with Shift::head: the exponents stay
};

template <class T>
__global__ void __launch_bounds__(feature_threads, 4) random_features(const __grid_constant__ RandomFeatureArguments<T> a) {
    using Reduce = cub::BlockReduce<T, feature_threads>;
    __shared__ typename Reduce::TempStorage reduction;
    __shared__ T largest_of[feature_block_rows];
    extern __shared__ __align__(16) unsigned char memory[];
    T* const y = reinterpret_cast<T*>(memory);  // [dim][rows]
    const FeatureArguments<T>& r = a.rows;
    const index_t item = r.first_item + static_cast<index_t>(blockIdx.y), first = static_cast<index_t>(blockIdx.x) * feature_block_rows, end = min(r.tokens, r.lengths(item / r.heads));
    const T scale = rsqrt(sqrt(T(r.dim)));
    for (int at = static_cast<int>(threadIdx.x); at < r.dim * feature_block_rows; at += feature_threads) {
        const index_t row = first + at % feature_block_rows;
        y[at] = row < end ? r.x.head(item)[row * r.x.row_stride + at / feature_block_rows] * scale : T(0);
    }
    __syncthreads();
    T half[feature_block_rows] = {}, most[feature_block_rows];
    for (index_t c = 0; c < r.dim; ++c)
#pragma unroll
        for (int i = 0; i < feature_block_rows; ++i) half[i] += y[c * feature_block_rows + i] * y[c * feature_block_rows + i];
#pragma unroll
    for (int i = 0; i < feature_block_rows; ++i) {
        half[i] = half[i] / 2 + log(T(r.count)) / 2;
        most[i] = lowest<T>();
    }
    T* const to = r.to + (offset_t{item} * r.tokens + first) * r.columns;
    for (index_t f = static_cast<index_t>(threadIdx.x); f < r.count; f += feature_threads) {
        T dot[feature_block_rows] = {};
        for (index_t c = 0; c < r.dim; ++c) {
            const T w = a.directions[offset_t{c} * r.count + f];
#pragma unroll
            for (int i = 0; i < feature_block_rows; ++i) dot[i] += w * y[c * feature_block_rows + i];
        }
#pragma unroll
        for (int i = 0; i < feature_block_rows; ++i)
            if (first + i < end) {
                dot[i] -= half[i];
                most[i] = dot[i] > most[i] ? dot[i] : most[i];
                to[offset_t{i} * r.columns + f] = dot[i];
            }
    }
    T block_most = lowest<T>();
#pragma unroll
    for (int i = 0; i < feature_block_rows; ++i) {
        if (a.shift != Shift::constant) {
            const T of_row = Reduce(reduction).Reduce(most[i], [](T x, T z) { return z > x ? z : x; });
            __syncthreads();
            if (threadIdx.x == 0) largest_of[i] = of_row;
            block_most = of_row > block_most ? of_row : block_most;  // thread 0
        }
    }
    __syncthreads();
    if (a.shift == Shift::head && threadIdx.x == 0) a.block_largest[offset_t{item} * gridDim.x + blockIdx.x] = block_most;
    for (int i = 0; i < feature_block_rows && first + i < r.tokens; ++i) {
        const T shift = a.shift == Shift::row ? largest_of[i] : a.constant;
        for (index_t f = static_cast<index_t>(threadIdx.x); f < r.columns; f += feature_threads) {
            T& value = to[offset_t{i} * r.columns + f];
            if (first + i >= end || f >= r.count) value = first + i < end && f == r.count && r.ones ? T(1) : T(0);
            else if (a.shift != Shift::head) value = exp(value - shift);
        }
    }
}

/// The second pass of Shift::head.
template <class T>
__global__ void __launch_bounds__(feature_threads) exponents_to_features(const __grid_constant__ FeatureArguments<T> a, const T* block_largest, index_t blocks) {
    using Reduce = cub::BlockReduce<T, feature_threads>;
    __shared__ typename Reduce::TempStorage reduction;
    __shared__ T shared_shift;
    const index_t item = a.first_item + static_cast<index_t>(blockIdx.y), first = static_cast<index_t>(blockIdx.x) * feature_block_rows, end = min(a.tokens, a.lengths(item / a.heads));
    T most = lowest<T>();
    for (index_t b = static_cast<index_t>(threadIdx.x); b < blocks; b += feature_threads) {
        const T value = block_largest[offset_t{item} * blocks + b];
        most = value > most ? value : most;
    }
    most = Reduce(reduction).Reduce(most, [](T x, T y) { return y > x ? y : x; });
    if (threadIdx.x == 0) shared_shift = most;
    __syncthreads();
    for (index_t row = first; row < min(first + feature_block_rows, end); ++row)
        for (index_t f = static_cast<index_t>(threadIdx.x); f < a.count; f += feature_threads) {
            T& value = a.to[(offset_t{item} * a.tokens + row) * a.columns + f];
            value = exp(value - shared_shift);
        }
}

/// Divides the features of queries by their denominators.
template <class T>
struct NormaliseArguments {
    T* a;                   // [item][queries][columns]
    const T* denominators;  // [item][queries][4 or 2], the first entry
    T *inverse, *marks;     // [item][queries]: 1 / denominator, 0 for rows that have no gradient; -infinity for rows without keys
    index_t count, columns, queries, keys, heads, first_item;
    Lengths query_lengths, key_lengths;
    bool causal;
    ZeroRow zero;
    T epsilon;
};

template <class T>
__global__ void __launch_bounds__(128) normalise_features(const __grid_constant__ NormaliseArguments<T> a) {
    constexpr int vector = 16 / sizeof(T);
    const index_t query = static_cast<index_t>(blockIdx.x) * 4 + static_cast<index_t>(threadIdx.x) / 32, item = a.first_item + static_cast<index_t>(blockIdx.y), b = item / a.heads;
    if (query >= a.queries) return;
    const offset_t row = offset_t{item} * a.queries + query, reach = a.causal ? offset_t{query} + 1 + a.keys - a.queries : a.keys;
    const index_t key_length = a.key_lengths(b), seen = query < a.query_lengths(b) ? static_cast<index_t>(reach < 0 ? 0 : reach < key_length ? reach : key_length) : 0;
    const T denominator = a.denominators[row * vector] + a.epsilon;
    const bool zero = denominator == 0, mean = zero && a.zero == ZeroRow::mean && seen > 0, empty = seen == 0 || (zero && !mean);
    const T inverse = zero || empty ? T(0) : T(1) / denominator;
    for (index_t c = static_cast<index_t>(threadIdx.x) % 32; c < a.columns; c += 32) {
        T& value = a.a[row * a.columns + c];
        value = empty ? T(0) : mean ? (c == a.count ? T(1) / T(seen) : T(0)) : value * inverse;
    }
    if (threadIdx.x % 32 == 0) {
        a.inverse[row] = inverse;
        a.marks[row] = empty ? minus_infinity<T>() : T(0);
    }
}

/// With a_i = phi(q_i) / (phi(q_i) . s_i), s_i the sum of the keys' features that i sees: g_i = -(dL/da_i . a_i), of which dL/dphi(q_i) =
/// (dL/da_i + g_i s_i) / denominator and dL/dphi(k_j) += g_i a_i.
template <class T>
__global__ void __launch_bounds__(128) normaliser_gradient(const T* a, const T* d_a, const T* inverse, T* g, index_t count, index_t columns, offset_t rows) {
    constexpr int vector = 16 / sizeof(T);
    const offset_t row = offset_t{blockIdx.x} * 4 + threadIdx.x / 32;
    if (row >= rows) return;
    T sum = 0;
    for (index_t c = static_cast<index_t>(threadIdx.x) % 32; c < count; c += 32) sum += a[row * columns + c] * d_a[row * columns + c];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % 32 < vector) g[row * vector + threadIdx.x % 32] = threadIdx.x % 32 == 0 && inverse[row] != 0 ? -sum : T(0);
}

/// From gradients of features to gradients of q or k. For queries `g`, `sums` and `inverse` are there; for keys the heads of a group are added.
template <class T>
struct FeatureGradientArguments {
    FeatureArguments<T> rows;  // x, and where the gradient goes: packed [item][tokens][padded dim]
    index_t dim_columns;
    const T* phi;        // [item][tokens][columns]; of queries a_i
    const T* d_phi;      // [item x group][tokens][columns]
    index_t group;
    const T *g, *sums, *inverse;
    const T* directions;  // [count][dim]
    Finish<T> finish;

    /// dL/dphi, of queries times the denominator.
    __device__ T gradient(index_t item, offset_t row, index_t f) const {
        constexpr int vector = 16 / sizeof(T);
        if (g) return d_phi[row * rows.columns + f] + g[row * vector] * sums[row * rows.columns + f];
        T sum = 0;
        for (index_t m = 0; m < group; ++m) sum += d_phi[((offset_t{item} * group + m) * rows.tokens + row % rows.tokens) * rows.columns + f];
        return sum;
    }
};

template <class T, class F>
__global__ void __launch_bounds__(128) feature_gradient(const __grid_constant__ FeatureGradientArguments<T> a, F map) {
    constexpr int vector = 16 / sizeof(T);
    const index_t token = static_cast<index_t>(blockIdx.x) * 4 + static_cast<index_t>(threadIdx.x) / 32, item = a.rows.first_item + static_cast<index_t>(blockIdx.y);
    if (token >= a.rows.tokens) return;
    const offset_t row = offset_t{item} * a.rows.tokens + token;
    const bool alive = token < a.rows.lengths(item / a.rows.heads) && (!a.inverse || a.inverse[row] != 0);
    for (index_t c = static_cast<index_t>(threadIdx.x) % 32 * vector; c < a.dim_columns; c += 32 * vector) {
        Vector<T> d{};
        if (alive)
#pragma unroll
            for (int l = 0; l < vector; ++l)
                if (c + l < a.rows.dim) d.at[l] = a.gradient(item, row, c + l) * (a.inverse ? a.inverse[row] : T(1)) * feature_derivative(map, a.rows.x.head(item)[token * a.rows.x.row_stride + c + l]);
        a.finish.store(item, token, c, d, alive);
    }
}

/// t_r = dL/dphi_r phi_r; dL/dx = d^(-1/4) sum_r t_r (w_r - y): shifts cancel, so they count as constants.
template <class T>
__global__ void __launch_bounds__(feature_threads) random_feature_gradient(const __grid_constant__ FeatureGradientArguments<T> a) {
    constexpr int vector = 16 / sizeof(T);
    using Reduce = cub::BlockReduce<T, feature_threads>;
    __shared__ typename Reduce::TempStorage reduction;
    __shared__ T total;
    extern __shared__ __align__(16) unsigned char memory[];
    T* const t = reinterpret_cast<T*>(memory);  // [count], then [padded dim]
    T* const d = t + (a.rows.count + vector - 1) / vector * vector;
    const index_t token = static_cast<index_t>(blockIdx.x), item = a.rows.first_item + static_cast<index_t>(blockIdx.y);
    const offset_t row = offset_t{item} * a.rows.tokens + token;
    const bool alive = token < a.rows.lengths(item / a.rows.heads) && (!a.inverse || a.inverse[row] != 0);
    T sum = 0;
    for (index_t f = static_cast<index_t>(threadIdx.x); f < a.rows.count; f += feature_threads) sum += t[f] = alive ? a.gradient(item, row, f) * a.phi[row * a.rows.columns + f] : T(0);
    sum = Reduce(reduction).Sum(sum);
    if (threadIdx.x == 0) total = sum;
    __syncthreads();
    const T scale = rsqrt(sqrt(T(a.rows.dim)));
    for (index_t c = static_cast<index_t>(threadIdx.x); c < a.dim_columns; c += feature_threads) {
        T value = 0;
        if (alive && c < a.rows.dim) {
            for (index_t f = 0; f < a.rows.count; ++f) value += t[f] * a.directions[offset_t{f} * a.rows.dim + c];
            value = (value - total * a.rows.x.head(item)[token * a.rows.x.row_stride + c] * scale) * scale;
        }
        d[c] = value;
    }
    __syncthreads();
    for (index_t c = static_cast<index_t>(threadIdx.x) * vector; c < a.dim_columns; c += feature_threads * vector) a.finish.store(item, token, c, load_vector(d + c), alive);
}

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
