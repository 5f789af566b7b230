#pragma once
// A layer on the device with the interface of those on the CPU: copies tensors there and back. For tests that a host compiler builds.

#include "support/any_diffusion.hpp"

#include <polyattn/call_options.hpp>
#include <polyattn/core/tensor.hpp>
#include <polyattn/policy/bias/bias.hpp>
#include <polyattn/policy/compression/concept.hpp>
#include <polyattn/policy/pattern/dense.hpp>
#include <polyattn/policy/score/kernel.hpp>
#include <polyattn/policy/score/softmax.hpp>

#include <memory>

template <class T>
struct DeviceSaved;

template <class T>
struct DeviceForward {
    polyattn::Tensor<T> out;
    std::shared_ptr<DeviceSaved<T>> saved;
};
template <class T>
struct DeviceOutputAndLogsumexp {
    polyattn::Tensor<T> out, logsumexp;
};
template <class T>
struct DeviceGradients {
    polyattn::Tensor<T> q, k, v;
    std::vector<double> bias, compression;
};

/// Instantiated in device_layer.cu, device_kernel_layer.cu and device_compressed_layer.cu for the types that tests use.
template <class Bias = polyattn::NoBias, class Score = polyattn::Softmax, class Pattern = polyattn::Dense, class Compression = polyattn::NoCompression>
class DeviceLayer {
public:
    explicit DeviceLayer(AnyDiffusion diffusion, Bias bias = {}, Score score = {}, Pattern pattern = {}, Compression compression = {})
        : diffusion_(std::move(diffusion)), bias_(std::move(bias)), score_(std::move(score)), pattern_(std::move(pattern)), compression_(std::move(compression)) {}

    const Bias& bias() const { return bias_; }

    template <class Q, class K, class V>
    auto operator()(const polyattn::TensorView<Q>& q, const polyattn::TensorView<K>& k, const polyattn::TensorView<V>& v, const polyattn::CallOptions& options = {}) const {
        return run<std::remove_const_t<Q>>(q, k, v, options);
    }
    template <class Q, class K, class V>
    auto with_logsumexp(const polyattn::TensorView<Q>& q, const polyattn::TensorView<K>& k, const polyattn::TensorView<V>& v, const polyattn::CallOptions& options = {}) const {
        return run_with_logsumexp<std::remove_const_t<Q>>(q, k, v, options);
    }
    template <class Q, class K, class V>
    auto forward(const polyattn::TensorView<Q>& q, const polyattn::TensorView<K>& k, const polyattn::TensorView<V>& v, const polyattn::CallOptions& options = {}) const {
        return run_forward<std::remove_const_t<Q>>(q, k, v, options);
    }
    template <class T, class D>
    DeviceGradients<T> backward(const std::shared_ptr<DeviceSaved<T>>& saved, const polyattn::TensorView<D>& d_out) const {
        return run_backward<T>(saved, d_out);
    }

private:
    template <class T>
    polyattn::Tensor<T> run(polyattn::TensorView<const T> q, polyattn::TensorView<const T> k, polyattn::TensorView<const T> v, const polyattn::CallOptions& options) const;
    template <class T>
    DeviceOutputAndLogsumexp<T> run_with_logsumexp(polyattn::TensorView<const T> q, polyattn::TensorView<const T> k, polyattn::TensorView<const T> v, const polyattn::CallOptions& options) const;
    template <class T>
    DeviceForward<T> run_forward(polyattn::TensorView<const T> q, polyattn::TensorView<const T> k, polyattn::TensorView<const T> v, const polyattn::CallOptions& options) const;
    template <class T>
    DeviceGradients<T> run_backward(const std::shared_ptr<DeviceSaved<T>>& saved, polyattn::TensorView<const T> d_out) const;

    AnyDiffusion diffusion_;
    Bias bias_;
    Score score_;
    Pattern pattern_;
    Compression compression_;
};
