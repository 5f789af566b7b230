#pragma once
// Tensors in device memory.

#include <polyattn/backend/cuda/runtime.cuh>
#include <polyattn/core/tensor.hpp>

#include <limits>

POLYATTN_BEGIN_NAMESPACE

/// A row-major tensor of rank 2 to 4 that owns device memory. Moved, never copied.
template <class T>
class CudaTensor {
public:
    CudaTensor() = default;
    /// Uninitialised. Throws invalid_input for a negative extent, or more bytes than there can be, cuda_error.
    explicit CudaTensor(std::vector<offset_t> extents) : shape_(std::move(extents)), memory_(bytes(shape_)) {}
    /// A copy of host memory with so many elements, done on return.
    CudaTensor(const T* from, std::vector<offset_t> extents) : CudaTensor(std::move(extents)) {
        detail::cuda::copy_to_device(memory_, from, "cudaMemcpy to a tensor");
    }

    T* data() const { return static_cast<T*>(memory_.data()); }
    const std::vector<offset_t>& shape() const { return shape_; }
    offset_t size() const { return static_cast<offset_t>(memory_.bytes() / sizeof(T)); }
    TensorView<T> view() const { return detail::make_view(data(), shape_, detail::row_major_strides(shape_), "shape"); }
    /// To host memory with room for size() elements, after all work of the stream before.
    void copy_to(T* to, cudaStream_t stream = nullptr) const {
        if (memory_.bytes() == 0) return;
        detail::cuda::check_cuda(cudaMemcpyAsync(to, memory_.data(), memory_.bytes(), cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync of a tensor");
        detail::cuda::check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    }

private:
    static std::size_t bytes(const std::vector<offset_t>& extents) {
        constexpr offset_t most = std::numeric_limits<offset_t>::max() / static_cast<offset_t>(sizeof(T));
        offset_t count = extents.empty() ? 0 : 1;
        for (const offset_t extent : extents) {
            detail::require(extent >= 0, "extents", "numbers >= 0", extent);
            detail::require(extent == 0 || count <= most / extent, "extents", [&] { return detail::text("at most ", most, " elements"); }, detail::shape_text(extents));
            count *= extent;
        }
        return static_cast<std::size_t>(count) * sizeof(T);
    }
    std::vector<offset_t> shape_;
    detail::cuda::DeviceMemory memory_;
};

POLYATTN_END_NAMESPACE
