#pragma once

#include <polyattn/core/view.hpp>

POLYATTN_BEGIN_NAMESPACE

/// A plain owning row-major tensor: what calls on raw views return.
template <class T>
struct Tensor {
    std::vector<T> values;
    std::vector<offset_t> shape;

    Tensor() = default;
    explicit Tensor(std::vector<offset_t> extents) : shape(std::move(extents)) {
        offset_t size = 1;
        for (const offset_t extent : shape) size *= extent;
        values.resize(static_cast<std::size_t>(size));
    }
    T* data() { return values.data(); }
    const T* data() const { return values.data(); }
    /// Rank 2 to 4 only.
    TensorView<T> view() { return detail::make_view(values.data(), shape, detail::row_major_strides(shape), "tensor"); }
    TensorView<const T> view() const { return detail::make_view(values.data(), shape, detail::row_major_strides(shape), "tensor"); }
};

POLYATTN_END_NAMESPACE
