#pragma once
// A language model on the device behind plain calls, for tests that a host compiler builds.

#include <polyattn/core/tensor.hpp>

#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

struct DeviceModelSettings {
    polyattn::index_t heads, key_heads;
    bool pre_norm;
    polyattn::index_t reach;  // of relative positions; -1: ALiBi
};

std::vector<double> device_logits(const std::map<std::string, polyattn::Tensor<double>>& parameters, const DeviceModelSettings& settings, std::span<const polyattn::index_t> tokens, polyattn::index_t batch,
                                  const std::vector<polyattn::index_t>& lengths);
