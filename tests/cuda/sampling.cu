// On a stream that does not wait for the default one.
#include <cuda_runtime.h>
#include <thrust/execution_policy.h>

#include <stdexcept>

inline auto execution() {
    static const cudaStream_t stream = [] {
        cudaStream_t made = nullptr;
        if (cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking) != cudaSuccess) throw std::runtime_error("no stream");
        return made;
    }();
    return thrust::cuda::par.on(stream);
}

#include "cuda/sampling_table.hpp"
#include "cuda/plan_table.hpp"
