#pragma once
// What AdaMRA's router learns from: the gates of its rows, and the load-balance loss.

#include <polyattn/backend/cuda/routing.cuh>

#include <cub/block/block_reduce.cuh>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// dL/dlogits of each row, of the gates and of the load-balance loss.
template <class T>
struct RouterGradientArguments {
    RoutedRows rows;
    const index_t *routes, *starts;
    const T* probabilities;         // [rows][resolutions]
    const T *context, *d_context;   // [rows][columns], context as its gate left it
    index_t columns;
    bool learns, gated;             // the gate has a gradient; context is multiplied with its probability
    double balance;
    T* d_logits;                    // [rows][logit_columns], zeros from `resolutions` on
    index_t logit_columns;
};

/// One row a warp. With g the product of a row and its gradient, P_h* the probability of its resolution and f_h the share of rows at h:
/// g P_h* (delta_hh* - P_h) + balance H / rows P_h (f_h - sum_j P_j f_j).
template <class T>
__global__ void __launch_bounds__(128) router_gradient(const __grid_constant__ RouterGradientArguments<T> a) {
    const offset_t row = offset_t{blockIdx.x} * 4 + threadIdx.x / 32;
    const auto lane = static_cast<index_t>(threadIdx.x % 32);
    if (row >= a.rows.rows()) return;
    const index_t route = a.routes[row], resolutions = a.rows.resolutions, batch = a.rows.batch;
    const T* const p = a.probabilities + row * resolutions;
    T through = 0;
    if (a.learns && route >= 0) {
        for (index_t c = lane; c < a.columns; c += 32) through += a.context[row * a.columns + c] * a.d_context[row * a.columns + c];
#pragma unroll
        for (int step = 16; step > 0; step /= 2) through += __shfl_xor_sync(~0u, through, step);
        if (!a.gated) through *= p[route];
    }
    const double total = a.starts[resolutions * batch];
    const auto share = [&](index_t h) { return (a.starts[(h + 1) * batch] - a.starts[h * batch]) / total; };
    double mean = 0;
    if (a.balance > 0 && route >= 0)
        for (index_t h = 0; h < resolutions; ++h) mean += double(p[h]) * share(h);
    for (index_t h = lane; h < a.logit_columns; h += 32) {
        T d = 0;
        if (route >= 0 && h < resolutions) {
            d = through * ((h == route ? T(1) : T(0)) - p[h]);
            if (a.balance > 0) d += static_cast<T>(a.balance * resolutions / total * double(p[h]) * (share(h) - mean));
        }
        a.d_logits[row * a.logit_columns + h] = d;
    }
}

inline constexpr int probability_threads = 256;

/// The sum of each resolution's probabilities, a block each; those of padding are 0.
template <class T>
__global__ void __launch_bounds__(probability_threads) sum_probabilities(const T* probabilities, index_t rows, index_t resolutions, double* sums) {
    using Reduce = cub::BlockReduce<double, probability_threads>;
    __shared__ typename Reduce::TempStorage storage;
    double sum = 0;
    for (auto row = static_cast<offset_t>(threadIdx.x); row < rows; row += probability_threads) sum += double(probabilities[row * resolutions + blockIdx.x]);
    sum = Reduce(storage).Sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
