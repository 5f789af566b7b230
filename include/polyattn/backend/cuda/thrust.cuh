#pragma once
// Tensors that lie in a thrust::device_vector.

#include <polyattn/backend/cuda/runtime.cuh>

#include <thrust/device_vector.h>

POLYATTN_BEGIN_NAMESPACE

/// A row-major view of a device_vector's elements, rank 2 to 4. Throws invalid_input for another rank, or extents whose product is not the vector's size.
template <class T, class Allocator>
TensorView<T> tensor_view(thrust::device_vector<T, Allocator>& values, std::initializer_list<offset_t> extents) {
    const TensorView<T> view = tensor_view(thrust::raw_pointer_cast(values.data()), extents);
    detail::require(view.size() == static_cast<offset_t>(values.size()), "extents", [&] { return detail::text("a product of ", values.size(), ", the vector's size"); }, view.size());
    return view;
}
template <class T, class Allocator>
TensorView<const T> tensor_view(const thrust::device_vector<T, Allocator>& values, std::initializer_list<offset_t> extents) {
    return tensor_view(const_cast<thrust::device_vector<T, Allocator>&>(values), extents);
}

POLYATTN_END_NAMESPACE
