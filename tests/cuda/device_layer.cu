#include "device_layer.hpp"

#include <polyattn/polyattn_cuda.cuh>

using namespace polyattn;

template <class T>
struct DeviceSaved {
    CudaTensor<T> q, k, v, out;
    CudaSaved<T> saved;
};

namespace {

template <class T>
CudaTensor<T> to_device(const TensorView<const T>& view) {
    return {view.data, std::vector<offset_t>(view.extents.begin() + (4 - view.rank), view.extents.end())};
}
template <class T>
Tensor<T> to_host(const CudaTensor<T>& tensor) {
    Tensor<T> out(tensor.shape());
    tensor.copy_to(out.data());
    return out;
}
CudaOptions on_device(const CallOptions& options) {
    CudaOptions device;
    static_cast<CallOptions&>(device) = options;
    return device;
}

template <class Bias>
using Layer = Attention<AnyDiffusion, Bias, Cuda>;

}  // namespace

template <class Bias>
template <class T>
DeviceOutputAndLogsumexp<T> DeviceLayer<Bias>::run(TensorView<const T> q, TensorView<const T> k, TensorView<const T> v, const CallOptions& options) const {
    const auto dq = to_device(q), dk = to_device(k), dv = to_device(v);
    const auto result = Layer<Bias>{diffusion_, bias_}.with_logsumexp(dq.view(), dk.view(), dv.view(), on_device(options));
    return {to_host(result.out), to_host(result.logsumexp)};
}
template <class Bias>
template <class T>
DeviceForward<T> DeviceLayer<Bias>::run_forward(TensorView<const T> q, TensorView<const T> k, TensorView<const T> v, const CallOptions& options) const {
    auto saved = std::make_shared<DeviceSaved<T>>();
    saved->q = to_device(q);
    saved->k = to_device(k);
    saved->v = to_device(v);
    auto result = Layer<Bias>{diffusion_, bias_}.forward(saved->q.view(), saved->k.view(), saved->v.view(), on_device(options));
    saved->saved = std::move(result.saved);
    return {to_host(result.out), saved};
}
template <class Bias>
template <class T>
DeviceGradients<T> DeviceLayer<Bias>::run_backward(const std::shared_ptr<DeviceSaved<T>>& saved, TensorView<const T> d_out) const {
    const auto d = to_device(d_out);
    const auto gradients = Layer<Bias>{diffusion_, bias_}.backward(saved->saved, d.view());
    return {to_host(gradients.q), to_host(gradients.k), to_host(gradients.v), gradients.bias};
}

#define POLYATTN_INSTANTIATE(Bias, T)                                                                                                                             \
    template DeviceOutputAndLogsumexp<T> DeviceLayer<Bias>::run<T>(TensorView<const T>, TensorView<const T>, TensorView<const T>, const CallOptions&) const;     \
    template DeviceForward<T> DeviceLayer<Bias>::run_forward<T>(TensorView<const T>, TensorView<const T>, TensorView<const T>, const CallOptions&) const;         \
    template DeviceGradients<T> DeviceLayer<Bias>::run_backward<T>(const std::shared_ptr<DeviceSaved<T>>&, TensorView<const T>) const;
POLYATTN_INSTANTIATE(NoBias, float)
POLYATTN_INSTANTIATE(NoBias, double)
POLYATTN_INSTANTIATE(Alibi, float)
POLYATTN_INSTANTIATE(RelativePosition, float)
POLYATTN_INSTANTIATE(RelativePosition2D, float)
