#include "device_layer.cuh"

#define POLYATTN_INSTANTIATE_SOFTMAX(T, Bias) \
    POLYATTN_INSTANTIATE(T, Bias)             \
    template DeviceOutputAndLogsumexp<T> DeviceLayer<Bias>::run_with_logsumexp<T>(TensorView<const T>, TensorView<const T>, TensorView<const T>, const CallOptions&) const;
POLYATTN_INSTANTIATE_SOFTMAX(float, NoBias)
POLYATTN_INSTANTIATE_SOFTMAX(double, NoBias)
POLYATTN_INSTANTIATE_SOFTMAX(float, Alibi)
POLYATTN_INSTANTIATE_SOFTMAX(float, RelativePosition)
POLYATTN_INSTANTIATE_SOFTMAX(float, RelativePosition2D)

index_t single_tokens(const Plan& plan, bool transposed) {
    const auto& lowered = plan.lowered<detail::cuda::DevicePlan<detail::cuda::TileShape<float>::side>>();
    index_t count = 0;
    for (const auto& wave : (transposed ? lowered.columns() : lowered.rows()).waves) count += wave.last - wave.first_single;
    return count;
}
