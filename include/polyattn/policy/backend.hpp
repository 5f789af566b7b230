#pragma once

#include <polyattn/policy/concept.hpp>

POLYATTN_BEGIN_NAMESPACE

/// Plain loops in double precision: the definition that everything else is tested against. Slow.
struct Reference {
    using policy_kind = backend_kind;
};

/// xsimd kernels. `Arch` is an xsimd architecture; void stands for the best one that the translation unit is compiled for.
template <class Arch = void>
struct Simd {
    using policy_kind = backend_kind;
};

/// Kernels for NVIDIA GPUs, on tensors in device memory: with polyattn_cuda.cuh, in sources that nvcc compiles.
struct Cuda {
    using policy_kind = backend_kind;
};

POLYATTN_END_NAMESPACE
