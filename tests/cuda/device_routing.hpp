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
    std::vector<polyattn::index_t> routes, order, starts, counts;
    std::vector<T> probabilities;
};

template <class T>
DeviceRouted<T> route_on_device(const DeviceRouter<T>& router, polyattn::index_t batch, polyattn::index_t tokens, polyattn::index_t resolutions, const std::vector<polyattn::index_t>& lengths);
