#pragma once
// Linear layers on the device: products of rows and weights, and parameters by name.

#include <polyattn/backend/cuda/tile.cuh>
#include <polyattn/core/tensor.hpp>

#include <algorithm>
#include <array>
#include <map>
#include <span>
#include <string>
#include <vector>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// y = act(x W^T + b) + residual. Rows of x and W are whole vectors at multiples of 16 bytes.
template <class T>
struct LinearArguments {
    const T *x, *weight;         // [rows][in], [out][in]; in is padded with zeros
    const T *bias, *residual;    // [out], [rows][out], or null; residual may be y
    T* y;                        // [rows][out]
    index_t rows, in, out;
    std::ptrdiff_t x_stride, residual_stride, y_stride;
    bool gelu;
};

template <class T>
__global__ void __launch_bounds__(tile_threads, 2) linear_rows(const __grid_constant__ LinearArguments<T> a) {
    using S = TileShape<T>;
    extern __shared__ __align__(16) unsigned char memory[];
    T* const x_rows = reinterpret_cast<T*>(memory);
    T* const weight_rows = x_rows + S::buffer;
    const index_t row = static_cast<index_t>(blockIdx.x) * S::side, column = static_cast<index_t>(blockIdx.y) * S::side;
    const Sequence rows{0, nullptr};
    T s[S::rows_each][S::columns_each] = {};
    for (index_t k = 0; k < a.in; k += S::width) {
        load_tile(x_rows, a.x, a.x_stride, rows, row, a.rows, k, a.in);
        load_tile(weight_rows, a.weight, a.in, rows, column, a.out, k, a.in);
        __syncthreads();
        multiply_transposed(s, x_rows, weight_rows, min(S::width, a.in - k));
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < S::rows_each; ++i)
#pragma unroll
        for (int j = 0; j < S::columns_each; ++j) {
            const index_t r = row + static_cast<int>(threadIdx.x) / 16 * S::rows_each + i, c = column + static_cast<int>(threadIdx.x) % 16 + 16 * j;
            if (r >= a.rows || c >= a.out) continue;
            T value = a.bias ? s[i][j] + a.bias[c] : s[i][j];
            if (a.gelu) value *= T(.5) * (1 + erf(value * T(.70710678118654752440)));
            if (a.residual) value += a.residual[r * a.residual_stride + c];
            a.y[r * a.y_stride + c] = value;
        }
}

template <class T>
void apply_linear(const LinearArguments<T>& a, cudaStream_t stream) {
    using S = TileShape<T>;
    if (a.rows == 0 || a.out == 0) return;
    launch("linear_rows", linear_rows<T>, dim3(blocks_for(a.rows, S::side), blocks_for(a.out, S::side)), tile_threads, 2 * S::buffer * sizeof(T), stream, a);
}

/// y [rows][out] = x [rows][in] weight^T, or that onto y.
template <class T>
void apply_linear(const T* x, std::ptrdiff_t x_stride, const T* weight, index_t in, index_t rows, index_t out, T* y, std::ptrdiff_t y_stride, cudaStream_t stream, bool adds = false) {
    LinearArguments<T> arguments{};
    arguments.x = x;
    arguments.weight = weight;
    arguments.y = y;
    arguments.rows = rows;
    arguments.in = in;
    arguments.out = out;
    arguments.x_stride = x_stride;
    arguments.y_stride = y_stride;
    if (adds) {
        arguments.residual = y;
        arguments.residual_stride = y_stride;
    }
    apply_linear(arguments, stream);
}

/// Of find_parameter(): an extent that may be any.
inline constexpr offset_t any_extent = -1;

/// The one of this name; throws invalid_input if there is none, or if it has another shape.
template <class T>
const Tensor<T>& find_parameter(const std::map<std::string, Tensor<T>>& parameters, const std::string& name, std::span<const offset_t> shape) {
    const auto found = parameters.find(name);
    if (found == parameters.end()) throw invalid_input("parameters", "one named " + name, text("none among ", parameters.size()));
    const std::vector<offset_t>& own = found->second.shape;
    if (!std::equal(own.begin(), own.end(), shape.begin(), shape.end(), [](offset_t extent, offset_t wanted) { return wanted == any_extent || extent == wanted; }))
        throw invalid_input(name, shape_text(shape) + (std::ranges::count(shape, any_extent) > 0 ? ", -1 for any number" : ""), shape_text(own));
    return found->second;
}

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
