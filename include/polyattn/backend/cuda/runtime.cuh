#pragma once
// Errors, device memory and scratch space.

#include <polyattn/core/error.hpp>
#include <polyattn/core/view.hpp>

#include <cuda_runtime.h>

#include <cstddef>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

POLYATTN_BEGIN_NAMESPACE

/// Thrown when a call of the CUDA runtime or a kernel launch fails. Names the call.
class cuda_error : public std::runtime_error {
public:
    cuda_error(std::string call, cudaError_t code)
        : std::runtime_error(detail::text("polyattn: ", call, ": ", cudaGetErrorString(code), " (", cudaGetErrorName(code), ")")), call_(std::move(call)), code_(code) {}

    const std::string& call() const noexcept { return call_; }
    cudaError_t code() const noexcept { return code_; }

private:
    std::string call_;
    cudaError_t code_;
};

namespace detail::cuda {

inline void check_cuda(cudaError_t code, const char* call) {
    if (code == cudaSuccess) return;
    (void)cudaGetLastError();  // not reported twice
    throw cuda_error(call, code);
}
/// Runs a kernel with dynamic shared memory on a grid. Bad configurations show at once, failures while running at a later call.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared, cudaStream_t stream, const Arguments&... arguments) {
    if (shared > 48 * 1024) check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
    kernel<<<grid, static_cast<unsigned>(threads), shared, stream>>>(arguments...);
    check_cuda(cudaGetLastError(), name);
}

/// Shared memory that a block may have, in bytes.
inline int shared_memory_limit() {
    int device = 0, bytes = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
    return bytes;
}

/// Owns device memory. Moved, never copied.
class DeviceMemory {
public:
    DeviceMemory() = default;
    explicit DeviceMemory(std::size_t bytes) : bytes_(bytes) {
        if (bytes > 0) check_cuda(cudaMalloc(&data_, bytes), "cudaMalloc");
    }
    DeviceMemory(DeviceMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
    DeviceMemory& operator=(DeviceMemory&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~DeviceMemory() { cudaFree(data_); }

    void* data() const { return data_; }
    std::size_t bytes() const { return bytes_; }

private:
    void* data_ = nullptr;
    std::size_t bytes_ = 0;
};

/// Fills the memory from the host's, done on return: cudaMemcpy alone may come back before the last bytes have moved, and streams that do not wait for the default
/// one would read too early.
inline void copy_to_device(const DeviceMemory& memory, const void* from, const char* what) {
    if (memory.bytes() == 0) return;
    check_cuda(cudaMemcpy(memory.data(), from, memory.bytes(), cudaMemcpyHostToDevice), what);
    check_cuda(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
}

/// A constant array in device memory.
template <class T>
class DeviceArray {
public:
    DeviceArray() = default;
    explicit DeviceArray(std::span<const T> from) : memory_(from.size_bytes()), size_(static_cast<offset_t>(from.size())) {
        copy_to_device(memory_, from.data(), "cudaMemcpy of a plan");
    }
    explicit DeviceArray(const std::vector<T>& from) : DeviceArray(std::span<const T>(from)) {}

    const T* data() const { return static_cast<const T*>(memory_.data()); }
    T* data() { return static_cast<T*>(memory_.data()); }
    offset_t size() const { return size_; }

private:
    DeviceMemory memory_;
    offset_t size_ = 0;
};

/// Hands out parts of one block of device memory; without a block it only counts, so the same code says how much there must be.
class Carver {
public:
    Carver() = default;
    explicit Carver(void* block) : block_(static_cast<std::byte*>(block)) {}

    bool counts() const { return block_ == nullptr; }
    template <class T>
    T* take(offset_t count) {
        const std::size_t at = used_;
        used_ += (static_cast<std::size_t>(count) * sizeof(T) + alignment - 1) / alignment * alignment;
        return block_ ? reinterpret_cast<T*>(block_ + at) : nullptr;
    }
    std::size_t used() const { return used_; }

private:
    static constexpr std::size_t alignment = 256;
    std::byte* block_ = nullptr;
    std::size_t used_ = 0;
};

inline bool is_device_memory(const void* pointer) {
    cudaPointerAttributes attributes{};
    if (cudaPointerGetAttributes(&attributes, pointer) != cudaSuccess) {
        (void)cudaGetLastError();
        return false;
    }
    return attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
}
template <class T>
void require_device_memory(const TensorView<T>& view, const char* argument) {
    if (view.size() > 0) require(is_device_memory(view.data), argument, "memory of the device", "other memory");
}

inline unsigned blocks_for(offset_t threads, offset_t block) { return static_cast<unsigned>((threads + block - 1) / block); }

}  // namespace detail::cuda

/// Scratch memory on the device. Hand the same one to repeated calls: it grows to what the largest needs, and then nothing is allocated.
/// Belongs to the calls of one stream. Growing synchronises the device, since earlier work may still use the old block.
class CudaWorkspace {
public:
    std::size_t capacity() const { return memory_.bytes(); }
    /// At least so many bytes, as workspace_bytes() of a layer tells. Throws cuda_error.
    void reserve(std::size_t bytes) {
        if (bytes <= memory_.bytes()) return;
        detail::cuda::check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
        memory_ = detail::cuda::DeviceMemory();
        memory_ = detail::cuda::DeviceMemory(bytes);
    }
    void* data() const { return memory_.data(); }

private:
    detail::cuda::DeviceMemory memory_;
};

POLYATTN_END_NAMESPACE
