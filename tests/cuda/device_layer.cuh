#pragma once
// The bodies of DeviceLayer, and POLYATTN_INSTANTIATE(T, Bias, Score, Pattern, Compression).

#include "device_layer.hpp"
#include "transfer.cuh"

#include <polyattn/polyattn_cuda.cuh>

using namespace polyattn;

template <class T>
struct DeviceSaved {
    CudaTensor<T> q, k, v, out;
    CudaSaved<T> saved;
};

namespace {

CudaOptions on_device(const CallOptions& options) {
    CudaOptions device;
    static_cast<CallOptions&>(device) = options;
    return device;
}

template <class Bias, class Score, class Pattern, class Compression>
auto make_layer(const AnyDiffusion& diffusion, const Bias& bias, const Score& score, const Pattern& pattern, const Compression& compression) {
    constexpr bool adds_epsilon = requires { score.denominator.epsilon; };
    if constexpr (!std::is_same_v<Compression, NoCompression>) {
        if constexpr (adds_epsilon || !Compression::is_linear) return Attention<Compression, Score, Cuda>{compression, score};
        else return Attention<Compression, AnyDiffusion, Score, Cuda>{compression, diffusion, score};
    } else if constexpr (adds_epsilon) return Attention<Score, Pattern, Cuda>{score, pattern};
    else return Attention<AnyDiffusion, Bias, Score, Pattern, Cuda>{diffusion, bias, score, pattern};
}

}  // namespace

template <class Bias, class Score, class Pattern, class Compression>
template <class T>
Tensor<T> DeviceLayer<Bias, Score, Pattern, Compression>::run(TensorView<const T> q, TensorView<const T> k, TensorView<const T> v, const CallOptions& options) const {
    const auto dq = to_device(q), dk = to_device(k), dv = to_device(v);
    return to_host(make_layer(diffusion_, bias_, score_, pattern_, compression_)(dq.view(), dk.view(), dv.view(), on_device(options)));
}
template <class Bias, class Score, class Pattern, class Compression>
template <class T>
DeviceOutputAndLogsumexp<T> DeviceLayer<Bias, Score, Pattern, Compression>::run_with_logsumexp(TensorView<const T> q, TensorView<const T> k, TensorView<const T> v, const CallOptions& options) const {
    const auto dq = to_device(q), dk = to_device(k), dv = to_device(v);
    const auto result = make_layer(diffusion_, bias_, score_, pattern_, compression_).with_logsumexp(dq.view(), dk.view(), dv.view(), on_device(options));
    return {to_host(result.out), to_host(result.logsumexp)};
}
template <class Bias, class Score, class Pattern, class Compression>
template <class T>
DeviceForward<T> DeviceLayer<Bias, Score, Pattern, Compression>::run_forward(TensorView<const T> q, TensorView<const T> k, TensorView<const T> v, const CallOptions& options) const {
    auto saved = std::make_shared<DeviceSaved<T>>();
    saved->q = to_device(q);
    saved->k = to_device(k);
    saved->v = to_device(v);
    auto result = make_layer(diffusion_, bias_, score_, pattern_, compression_).forward(saved->q.view(), saved->k.view(), saved->v.view(), on_device(options));
    saved->saved = std::move(result.saved);
    return {to_host(result.out), saved};
}
template <class Bias, class Score, class Pattern, class Compression>
template <class T>
DeviceGradients<T> DeviceLayer<Bias, Score, Pattern, Compression>::run_backward(const std::shared_ptr<DeviceSaved<T>>& saved, TensorView<const T> d_out) const {
    const auto d = to_device(d_out);
    const auto gradients = make_layer(diffusion_, bias_, score_, pattern_, compression_).backward(saved->saved, d.view());
    return {to_host(gradients.q), to_host(gradients.k), to_host(gradients.v), gradients.bias, gradients.compression};
}

#define POLYATTN_INSTANTIATE(T, ...)                                                                                                                           \
    template Tensor<T> DeviceLayer<__VA_ARGS__>::run<T>(TensorView<const T>, TensorView<const T>, TensorView<const T>, const CallOptions&) const;               \
    template DeviceForward<T> DeviceLayer<__VA_ARGS__>::run_forward<T>(TensorView<const T>, TensorView<const T>, TensorView<const T>, const CallOptions&) const; \
    template DeviceGradients<T> DeviceLayer<__VA_ARGS__>::run_backward<T>(const std::shared_ptr<DeviceSaved<T>>&, TensorView<const T>) const;
