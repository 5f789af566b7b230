#pragma once
// The pseudo-inverse of Nystrom attention, for all items of a call at once: the iteration of the CPU's, and its gradient.

#include <polyattn/backend/cuda/matrix_product.cuh>

#include <cub/block/block_reduce.cuh>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

template <class T>
struct LargestSum {
    T sum;
    index_t at;
};
/// Of a matrix of numbers >= 0.
template <class T>
struct LargestSums {
    LargestSum<T> row, column;
};

inline constexpr int inverse_threads = 256;

/// The rows and columns of the largest sums, the first of equal ones; the sums in order, as the CPU makes them. A matrix a block.
template <class T>
__global__ void __launch_bounds__(inverse_threads) largest_sums(const T* matrices, index_t side, index_t columns, LargestSums<T>* to) {
    using Reduce = cub::BlockReduce<LargestSum<T>, inverse_threads>;
    __shared__ typename Reduce::TempStorage storage;
    const T* const a = matrices + offset_t{blockIdx.x} * side * columns;
    const auto larger = [&](const LargestSum<T>& x, const LargestSum<T>& y) {
        if (x.at >= side || y.at >= side) return x.at >= side ? y : x;  // a thread without sums
        return y.sum > x.sum || (y.sum == x.sum && y.at < x.at) ? y : x;
    };
    const auto find = [&](std::ptrdiff_t step, std::ptrdiff_t inner_step) {
        LargestSum<T> found{0, side};
        for (auto i = static_cast<index_t>(threadIdx.x); i < side; i += inverse_threads) {
            T sum = 0;
            for (index_t j = 0; j < side; ++j) sum += a[i * step + j * inner_step];
            found = larger(found, {sum, i});
        }
        return Reduce(storage).Reduce(found, larger);
    };
    const LargestSum<T> row = find(columns, 1);
    __syncthreads();
    const LargestSum<T> column = find(1, columns);
    if (threadIdx.x == 0) to[blockIdx.x] = {row, column};
}

/// Z_0 = A^T / (largest row sum x largest column sum); zeros of an item without landmarks.
template <class T>
__global__ void __launch_bounds__(inverse_threads) begin_inverse(const T* a, const LargestSums<T>* sums, T* z, index_t side, index_t columns, offset_t count) {
    const offset_t at = offset_t{blockIdx.x} * inverse_threads + threadIdx.x, of_item = offset_t{side} * columns;
    if (at >= count) return;
    const offset_t item = at / of_item;
    const auto i = static_cast<index_t>(at % of_item / columns), j = static_cast<index_t>(at % columns);
    const LargestSums<T> largest = sums[item];
    z[at] = j < side && largest.row.sum != 0 ? a[item * of_item + offset_t{j} * columns + i] * (1 / (largest.row.sum * largest.column.sum)) : T(0);
}

/// d_a += the gradient of Z_0, through A^T and through the two sums. A matrix a block.
template <class T>
__global__ void __launch_bounds__(inverse_threads) begin_inverse_gradient(const T* matrices, const LargestSums<T>* sums, const T* d_z0, T* d_matrices, index_t side, index_t columns) {
    using Reduce = cub::BlockReduce<T, inverse_threads>;
    __shared__ typename Reduce::TempStorage storage;
    __shared__ T total;
    const offset_t first = offset_t{blockIdx.x} * side * columns;
    const T *const a = matrices + first, *const d_z = d_z0 + first;
    T* const d_a = d_matrices + first;
    const LargestSums<T> largest = sums[blockIdx.x];
    if (largest.row.sum == 0) return;
    const T scale = 1 / (largest.row.sum * largest.column.sum);
    T along = 0;
    for (offset_t at = threadIdx.x; at < offset_t{side} * side; at += inverse_threads) {
        const offset_t j = at / side, i = at % side;
        const T d = d_z[i * columns + j] * scale;
        along += d * a[j * columns + i];
        d_a[j * columns + i] += d;
    }
    along = Reduce(storage).Sum(along);
    if (threadIdx.x == 0) total = along;
    __syncthreads();
    for (offset_t j = threadIdx.x; j < side; j += inverse_threads) d_a[offset_t{largest.row.at} * columns + j] -= total / largest.row.sum;
    __syncthreads();
    for (offset_t j = threadIdx.x; j < side; j += inverse_threads) d_a[j * columns + largest.column.at] -= total / largest.column.sum;
}

template <class T>
__global__ void fill_identity(T* to, index_t side, index_t columns) {
    const offset_t at = offset_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (at < offset_t{side} * columns) to[at] = at / columns == at % columns ? T(1) : T(0);
}

/// Z of Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4 and its gradient, of matrices A [items][side][side, padded] in memory that a pass keeps. Rows and
/// columns of A that are 0, behind an item's own landmarks, stay 0 in Z. O(iterations side^3) an item. Source: Razavi et al. (2014), as in Xiong et al.,
/// "Nystromformer" (2021), equation 11.
template <class T>
class PseudoInverse {
    using Factor = TransposedFactor;

public:
    PseudoInverse() = default;
    /// The carver may only count. Backward needs a Z of every step; else two serve by turns.
    PseudoInverse(Carver& carver, index_t items, index_t side, index_t iterations, bool keeps) : items_(items), side_(side), columns_(padded<T>(side)), iterations_(iterations), keeps_(keeps) {
        a_ = carver.template take<T>(size());
        z_ = carver.template take<T>(size() * (keeps ? offset_t{iterations} + 1 : 2));
        sums_ = carver.template take<LargestSums<T>>(items);
    }

    /// To be filled before run().
    T* matrices() const { return a_; }
    const T* result() const { return z(iterations_); }
    /// Numbers of one matrix of each item.
    offset_t size() const { return offset_t{items_} * side_ * columns_; }

    /// Scratch of run(), and of backward().
    T* take_scratch(Carver& carver, bool backward) const { return carver.template take<T>(size() * (backward ? 7 : 3)); }
    void run(T* scratch, cudaStream_t stream) const {
        launch("largest_sums", largest_sums<T>, dim3(static_cast<unsigned>(items_)), inverse_threads, 0, stream, static_cast<const T*>(a_), side_, columns_, sums_);
        launch("begin_inverse", begin_inverse<T>, dim3(blocks_for(size(), inverse_threads)), inverse_threads, 0, stream, static_cast<const T*>(a_), static_cast<const LargestSums<T>*>(sums_), z(0), side_, columns_,
               size());
        for (index_t t = 0; t < iterations_; ++t) {
            const Polynomial made = polynomial(z(t), scratch, stream);
            multiply<Factor::none>(z(t), made.w, scaled(z(t + 1), -.25), stream);
        }
    }
    /// d_a = dL/dA from d_z = dL/dZ, which is used up.
    void backward(T* d_z, T* d_a, T* scratch, cudaStream_t stream) const {
        fill_zeros(d_a, size(), stream);
        T *const d_x = scratch + 3 * size(), *const d_u = d_x + size(), *const d_w = d_u + size();
        T* next = d_w + size();
        for (index_t t = iterations_; t-- > 0;) {
            // Z' = -Z W / 4, W = X U - 13 I, U = X X - 7 X + 15 I, X = A Z.
            const auto [x, u, w] = polynomial(z(t), scratch, stream);
            multiply<Factor::first>(z(t), d_z, scaled(d_w, -.25), stream);
            multiply<Factor::second>(d_z, w, scaled(next, -.25), stream);
            multiply<Factor::first>(x, d_w, to(d_u), stream);
            multiply<Factor::second>(d_w, u, plus(d_x, -7, d_u), stream);
            multiply<Factor::second>(d_u, x, onto(d_x), stream);
            multiply<Factor::first>(x, d_u, onto(d_x), stream);
            multiply<Factor::second>(d_x, z(t), onto(d_a), stream);
            multiply<Factor::first>(a_, d_x, onto(next), stream);
            std::swap(d_z, next);
        }
        launch("begin_inverse_gradient", begin_inverse_gradient<T>, dim3(static_cast<unsigned>(items_)), inverse_threads, 0, stream, static_cast<const T*>(a_), static_cast<const LargestSums<T>*>(sums_),
               static_cast<const T*>(d_z), d_a, side_, columns_);
    }

private:
    struct Polynomial {
        T *x, *u, *w;
    };
    T* z(index_t t) const { return z_ + size() * (keeps_ ? t : t % 2); }
    Polynomial polynomial(const T* z, T* scratch, cudaStream_t stream) const {
        const Polynomial made{scratch, scratch + size(), scratch + 2 * size()};
        multiply<Factor::none>(a_, z, to(made.x), stream);
        multiply<Factor::none>(made.x, made.x, plus(made.u, -7, made.x), stream, 15);
        multiply<Factor::none>(made.x, made.u, to(made.w), stream, -13);
        return made;
    }
    Rows<T> rows(const T* matrices) const { return packed_rows(matrices, 1, offset_t{side_} * columns_, columns_); }
    // What becomes of a product.
    Finish<T> to(T* matrices) const { return packed_finish(matrices, side_, columns_, 1); }
    Finish<T> onto(T* matrices) const { return packed_finish(matrices, side_, columns_, 1, true); }
    Finish<T> scaled(T* matrices, double factor) const {
        Finish<T> finish = to(matrices);
        finish.factor = static_cast<T>(factor);
        return finish;
    }
    Finish<T> plus(T* matrices, double factor, const T* others) const {
        Finish<T> finish = to(matrices);
        finish.teleport = static_cast<T>(factor);
        finish.values = rows(others);
        return finish;
    }
    template <Factor transposed>
    void multiply(const T* first, const T* second, const Finish<T>& finish, cudaStream_t stream, double diagonal = 0) const {
        multiply_items<transposed>(MatrixProduct<T>{rows(first), rows(second), side_, side_, side_, static_cast<T>(diagonal), 0, finish}, items_, stream);
    }

    index_t items_ = 0, side_ = 0, columns_ = 0, iterations_ = 0;
    bool keeps_ = false;
    T *a_ = nullptr, *z_ = nullptr;
    LargestSums<T>* sums_ = nullptr;
};

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
