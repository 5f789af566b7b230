// The kernels by name, for what ptxas says of them: registers, spills, and whether every architecture takes them.
#include <polyattn/backend/cuda/compressed_layer.cuh>
#include <polyattn/backend/cuda/language_model.cuh>
#include <polyattn/backend/cuda/multi_resolution.cuh>
#include <polyattn/backend/cuda/nystrom_attention.cuh>
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
    template __global__ void apply_single_rows<T, NoBias, false>(const __grid_constant__ TileArguments<T, NoBias>);     \
    template __global__ void apply_single_rows<T, NoBias, true>(const __grid_constant__ TileArguments<T, NoBias>);      \
    template __global__ void gradient_single_rows<T, NoBias, false>(const __grid_constant__ TileGradientArguments<T, NoBias>); \
    template __global__ void gradient_single_rows<T, NoBias, true>(const __grid_constant__ TileGradientArguments<T, NoBias>);  \
    template __global__ void hop_gradient<T>(const __grid_constant__ HopGradientArguments<T>);                           \
    template __global__ void sum_chunks<T>(const __grid_constant__ LinearProduct<T>);                                   \
    template __global__ void apply_states<T>(const __grid_constant__ LinearProduct<T>);                                 \
    template __global__ void linear_rows<T>(const __grid_constant__ LinearArguments<T>);                                \
    template __global__ void random_features<T>(const __grid_constant__ RandomFeatureArguments<T>);                     \
    template __global__ void recurrent_denominators<T>(const __grid_constant__ RecurrentDenominators<T>);               \
    template __global__ void recurrent_hop<T>(const __grid_constant__ RecurrentHop<T>);                                 \
    template __global__ void compress_rows<false, T>(const __grid_constant__ CompressArguments<T>, const __grid_constant__ EvenMeansForm<T>); \
    template __global__ void compress_rows<true, T>(const __grid_constant__ CompressArguments<T>, const __grid_constant__ EvenMeansForm<T>);  \
    template __global__ void compress_rows<false, T>(const __grid_constant__ CompressArguments<T>, const __grid_constant__ ConvolutionForm<T>); \
    template __global__ void compress_rows<true, T>(const __grid_constant__ CompressArguments<T>, const __grid_constant__ ConvolutionForm<T>); \
    template __global__ void table_gradient<T>(const __grid_constant__ TableGradientArguments<T>, const __grid_constant__ ConvolutionPairs); \
    template __global__ void multiply_matrices<TransposedFactor::none, T>(const __grid_constant__ MatrixProduct<T>);    \
    template __global__ void multiply_matrices<TransposedFactor::first, T>(const __grid_constant__ MatrixProduct<T>);   \
    template __global__ void multiply_matrices<TransposedFactor::second, T>(const __grid_constant__ MatrixProduct<T>);  \
    template __global__ void largest_sums<T>(const T*, index_t, index_t, LargestSums<T>*);                              \
    template __global__ void begin_inverse<T>(const T*, const LargestSums<T>*, T*, index_t, index_t, offset_t);         \
    template __global__ void begin_inverse_gradient<T>(const T*, const LargestSums<T>*, const T*, T*, index_t, index_t); \
    template __global__ void choose_routes<T>(const __grid_constant__ RoutedRows, const T*, T*, index_t*);              \
    template __global__ void gather_rows<T>(const __grid_constant__ BucketRows<T>);                                     \
    template __global__ void scatter_rows<T>(const __grid_constant__ BucketRows<T>);                                    \
    template __global__ void sum_probabilities<T>(const T*, index_t, index_t, double*);                                 \
    template __global__ void router_gradient<T>(const __grid_constant__ RouterGradientArguments<T>);
POLYATTN_KERNELS(float)
POLYATTN_KERNELS(double)

#define POLYATTN_GROUP_KERNELS(T)                                                                                                                  \
    template __global__ void find_centroids<T>(const __grid_constant__ ClusterArguments<T>, bool);                                                 \
    template __global__ void find_nearest<T>(const __grid_constant__ ClusterArguments<T>, const __grid_constant__ ClusteredRows<T>);               \
    template __global__ void sort_by_cluster<T>(const __grid_constant__ ClusterArguments<T>);                                                      \
    template __global__ void hash_rows<T>(const __grid_constant__ HashArguments<T>);                                                               \
    template __global__ void block_means<T>(const __grid_constant__ BlockMeanArguments<T>);
POLYATTN_GROUP_KERNELS(float)
POLYATTN_GROUP_KERNELS(double)
POLYATTN_GROUP_KERNELS(__half)
POLYATTN_GROUP_KERNELS(__nv_bfloat16)
template __global__ void multiply_blocks<double>(const __grid_constant__ BlockProductArguments<double>);

#define POLYATTN_HALF_KERNELS(T)                                                                                \
    template __global__ void apply_tiles_half<T, NoBias>(const __grid_constant__ TileArguments<T, NoBias>);     \
    template __global__ void apply_single_rows<T, NoBias, false>(const __grid_constant__ TileArguments<T, NoBias>); \
    template __global__ void score_edges<T, NoBias>(const __grid_constant__ ScoreArguments<T, NoBias>);         \
    template __global__ void apply_edges<T>(const __grid_constant__ EdgeArguments<T>);
POLYATTN_HALF_KERNELS(__half)
POLYATTN_HALF_KERNELS(__nv_bfloat16)

}  // namespace detail::cuda
POLYATTN_END_NAMESPACE
