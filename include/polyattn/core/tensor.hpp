#pragma once

#include <polyattn/core/memory.hpp>
#include <polyattn/core/view.hpp>

#include <algorithm>

POLYATTN_BEGIN_NAMESPACE

/// A plain owning row-major tensor: what calls on raw views return.
template <class T>
struct Tensor {
    AlignedVector<T> values;
    std::vector<offset_t> shape;

    Tensor() = default;
    /// Throws invalid_input for an extent below 0.
    explicit Tensor(std::vector<offset_t> extents) : shape(std::move(extents)) {
        offset_t size = 1;
        for (const offset_t extent : shape) {
            detail::require(extent >= 0, "extents", "numbers >= 0", extent);
            size *= extent;
        }
        values.resize(static_cast<std::size_t>(size));
    }
    T* data() { return values.data(); }
    const T* data() const { return values.data(); }
    /// Rank 2 to 4 only.
    TensorView<T> view() { return view_of(values.data()); }
    TensorView<const T> view() const { return view_of(values.data()); }

private:
    template <class U>
    TensorView<U> view_of(U* data) const {
        std::array<std::ptrdiff_t, 4> strides{};
        std::ptrdiff_t step = 1;
        for (std::size_t axis = std::min(shape.size(), strides.size()); axis-- > 0; step *= static_cast<std::ptrdiff_t>(shape[axis])) strides[axis] = step;
        return detail::make_view(data, shape, std::span<const std::ptrdiff_t>(strides).first(std::min(shape.size(), strides.size())), "tensor");
    }
};

POLYATTN_END_NAMESPACE
