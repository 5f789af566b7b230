#pragma once
// Tensors to the device and back.

#include <polyattn/backend/cuda/tensor.cuh>
#include <polyattn/core/tensor.hpp>

template <class T>
polyattn::CudaTensor<T> to_device(const polyattn::TensorView<const T>& view) {
    return {view.data, std::vector<polyattn::offset_t>(view.extents.begin() + (4 - view.rank), view.extents.end())};
}
template <class T>
polyattn::CudaTensor<T> to_device(const polyattn::Tensor<T>& tensor) {
    return {tensor.data(), tensor.shape};
}
template <class T>
polyattn::Tensor<T> to_host(const polyattn::CudaTensor<T>& tensor) {
    polyattn::Tensor<T> out(tensor.shape());
    tensor.copy_to(out.data());
    return out;
}
