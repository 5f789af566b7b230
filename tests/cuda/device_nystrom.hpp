#pragma once
// Nystrom attention on the device behind a plain call, for tests that a host compiler builds.

#include <polyattn/core/tensor.hpp>
#include <polyattn/policy/nystrom.hpp>

/// One forward and one backward pass.
template <class T>
struct NystromCall {
    polyattn::Nystrom parameters;
    polyattn::Tensor<T> q, k, v, d_out;
    polyattn::CallOptions options;
};
template <class T>
struct NystromResult {
    polyattn::Tensor<T> out, d_q, d_k, d_v;
    std::vector<double> d_table;
};

/// Instantiated for float and double.
template <class T>
NystromResult<T> run_on_device(const NystromCall<T>& call);
