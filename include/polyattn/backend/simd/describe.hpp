#pragma once

#include <polyattn/backend/simd/vector.hpp>
#include <polyattn/core/parallel.hpp>

#include <string>

POLYATTN_BEGIN_NAMESPACE

/// What this translation unit was compiled for, for example "polyattn 0.1.0, avx512bw, 16 floats a vector, OpenMP, 2 threads".
inline std::string describe() {
    using Arch = xsimd::default_arch;
    return "polyattn " + std::to_string(POLYATTN_VERSION_MAJOR) + "." + std::to_string(POLYATTN_VERSION_MINOR) + "." + std::to_string(POLYATTN_VERSION_PATCH) + ", " +
           std::string(Arch::name()) + ", " + std::to_string(detail::simd::lanes<float, Arch>) + " floats a vector, " +
#if defined(_OPENMP)
           "OpenMP, " +
#else
           "no OpenMP, " +
#endif
           std::to_string(worker_count()) + (worker_count() == 1 ? " thread" : " threads");
}

POLYATTN_END_NAMESPACE
