#pragma once
// Routes on the device, for tests that a host compiler builds.

#include <polyattn/core/rng.hpp>
#include <polyattn/core/tensor.hpp>

#include <optional>

/// How rows are routed: by logits, or by draws of a seed, or to all.
template <class T>
struct DeviceRouter {
    const T* logits;
    std::optional<std::uint64_t> seed;
    polyattn::Draw draw;
};

template <class T>
struct DeviceRouted {
    std::vector<polyattn::index_t> routes, order, starts;
    std::vector<T> probabilities;
    std::vector<T> out;  // of the attention proper, if it was asked for
};

/// Landmarks of each resolution, [batch x landmarks][2 dim], and how many of each item are valid.
template <class T>
struct DeviceLandmarks {
    const polyattn::Tensor<T>* rows;
    std::vector<polyattn::index_t> of_items;
};

/// With `queries` [batch x tokens][dim], the attention proper too. `gated` multiplies rows with their probabilities.
template <class T>
DeviceRouted<T> route_on_device(const DeviceRouter<T>& router, polyattn::index_t batch, polyattn::index_t tokens, polyattn::index_t resolutions, const std::vector<polyattn::index_t>& lengths,
                                const polyattn::Tensor<T>* queries = nullptr, const std::vector<DeviceLandmarks<T>>& landmarks = {}, polyattn::index_t heads = 1, bool gated = false);
