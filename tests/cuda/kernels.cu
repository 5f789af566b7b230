// The kernels by name, for what ptxas says of them: registers, spills, and whether every architecture takes them.
#include <polyattn/polyattn_cuda.cuh>

POLYATTN_BEGIN_NAMESPACE
namespace detail::cuda {

#define POLYATTN_KERNELS(T)                                                                                            \
    template __global__ void apply_tiles<T, NoBias, false>(const __grid_constant__ TileArguments<T, NoBias>);           \
    template __global__ void apply_tiles<T, NoBias, true>(const __grid_constant__ TileArguments<T, NoBias>);            \
    template __global__ void score_edges<T, NoBias>(const __grid_constant__ ScoreArguments<T, NoBias>);                 \
    template __global__ void apply_edges<T>(const __grid_constant__ EdgeArguments<T>);                                  \
    template __global__ void gradient_tiles<T, NoBias, false>(const __grid_constant__ TileGradientArguments<T, NoBias>); \
    template __global__ void gradient_tiles<T, NoBias, true>(const __grid_constant__ TileGradientArguments<T, NoBias>);  \
    template __global__ void gradient_edges<T, NoBias>(const __grid_constant__ EdgeGradientArguments<T, NoBias>);       \
    template __global__ void hop_gradient<T>(const __grid_constant__ HopGradientArguments<T>);
POLYATTN_KERNELS(float)
POLYATTN_KERNELS(double)

}  // namespace detail::cuda
POLYATTN_END_NAMESPACE
