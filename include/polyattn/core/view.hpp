#pragma once

#include <polyattn/core/error.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

POLYATTN_BEGIN_NAMESPACE

/// One head of a tensor: tokens x dim, by pointer and strides (in elements). All that kernels see.
template <class T>
struct MatrixView {
    T* data = nullptr;
    index_t rows = 0;
    index_t cols = 0;
    std::ptrdiff_t row_stride = 0;
    std::ptrdiff_t col_stride = 1;

    T* row(index_t i) const { return data + i * row_stride; }
    T& operator()(index_t i, index_t j) const { return data[i * row_stride + j * col_stride]; }
    template <class Const>
        requires(std::is_same_v<Const, const T> && !std::is_const_v<T>)
    operator MatrixView<Const>() const { return {data, rows, cols, row_stride, col_stride}; }
};

/// [batch, heads, tokens, dim] by pointer and strides (in elements). Tensors of rank 2 [tokens, dim] and 3
/// [heads, tokens, dim] have leading extents of 1. Does not own its memory.
template <class T>
struct TensorView {
    T* data = nullptr;
    std::array<index_t, 4> extents{};
    std::array<std::ptrdiff_t, 4> strides{};
    int rank = 4;

    index_t batch() const { return extents[0]; }
    index_t heads() const { return extents[1]; }
    index_t tokens() const { return extents[2]; }
    index_t dim() const { return extents[3]; }
    offset_t size() const { return offset_t{extents[0]} * extents[1] * extents[2] * extents[3]; }

    MatrixView<T> head(index_t b, index_t h) const {
        return {data + b * strides[0] + h * strides[1], extents[2], extents[3], strides[2], strides[3]};
    }
    template <class Const>
        requires(std::is_same_v<Const, const T> && !std::is_const_v<T>)
    operator TensorView<Const>() const { return {data, extents, strides, rank}; }
};

namespace detail {

/// Rows [first, last) of a view.
template <class T>
MatrixView<T> row_range(MatrixView<T> view, index_t first, index_t last) {
    return {view.data + first * view.row_stride, last - first, view.cols, view.row_stride, view.col_stride};
}
template <class T>
void fill_with_zeros(MatrixView<T> rows) {
    for (index_t i = 0; i < rows.rows; ++i)
        if (rows.col_stride == 1) std::fill_n(rows.row(i), rows.cols, T(0));
        else
            for (index_t c = 0; c < rows.cols; ++c) rows(i, c) = T(0);
}
template <class T>
MatrixView<T> transposed(MatrixView<T> view) {
    return {view.data, view.cols, view.rows, view.col_stride, view.row_stride};
}

inline std::string shape_text(std::span<const offset_t> shape) {
    std::string text = "[";
    for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}
template <class T>
std::string shape_text(const TensorView<T>& view) {
    std::vector<offset_t> shape(view.extents.begin() + (4 - view.rank), view.extents.end());
    return shape_text(std::span<const offset_t>(shape));
}

template <class T>
void require_shape(const TensorView<T>& view, const std::array<index_t, 4>& extents, int rank, const char* argument) {
    const TensorView<T> wanted{nullptr, extents, {}, rank};
    if (view.extents != extents || view.rank != rank) throw invalid_input(argument, shape_text(wanted), shape_text(view));
}
/// The shape of a call's tensors: the last axes, behind as many leading ones as the input has.
template <class T>
std::vector<offset_t> shape_like(const TensorView<T>& view, std::initializer_list<offset_t> trailing) {
    std::vector<offset_t> shape(view.extents.begin() + (4 - view.rank), view.extents.begin() + 2);
    shape.insert(shape.end(), trailing);
    return shape;
}

/// Extents and strides of rank 2 to 4 to a view; an axis of extent 1 (or an empty tensor) gets stride 0, whatever it claimed.
template <class T, class Extents, class Strides>
TensorView<T> make_view(T* data, const Extents& extents, const Strides& strides, const char* argument) {
    const auto rank = static_cast<int>(extents.size());
    if (rank < 2 || rank > 4)
        throw invalid_input(argument, "rank 2 [tokens, dim], 3 [heads, tokens, dim] or 4 [batch, heads, tokens, dim]",
                            detail::text("rank ", rank));
    require(extents.size() == strides.size(), argument, "as many strides as extents", std::to_string(strides.size()));
    TensorView<T> view{data, {1, 1, 1, 1}, {0, 0, 0, 0}, rank};
    for (int axis = 0; axis < rank; ++axis) {
        const auto extent = static_cast<offset_t>(extents[static_cast<std::size_t>(axis)]);
        require(extent >= 0 && extent <= std::numeric_limits<index_t>::max(), argument, "extents of 0 to 2^31 - 1", extent);
        const auto to = static_cast<std::size_t>(axis + 4 - rank);
        view.extents[to] = static_cast<index_t>(extent);
        if (extent > 1) view.strides[to] = static_cast<std::ptrdiff_t>(strides[static_cast<std::size_t>(axis)]);
    }
    return view;
}

template <class Extents>
std::vector<std::ptrdiff_t> row_major_strides(const Extents& extents) {
    std::vector<std::ptrdiff_t> strides(extents.size());
    std::ptrdiff_t step = 1;
    for (std::size_t axis = extents.size(); axis-- > 0;) {
        strides[axis] = step;
        step *= static_cast<std::ptrdiff_t>(extents[axis]);
    }
    return strides;
}

}  // namespace detail

/// A view of row-major memory.  tensor_view(pointer, {batch, heads, tokens, dim}); rank 2 and 3 as well.
/// Throws invalid_input for another rank or an extent that does not fit 31 bits.
template <class T>
TensorView<T> tensor_view(T* data, std::initializer_list<offset_t> extents) {
    return detail::make_view(data, extents.size() ? std::vector<offset_t>(extents) : std::vector<offset_t>(),
                             detail::row_major_strides(std::vector<offset_t>(extents)), "extents");
}

/// A view with strides, counted in elements.
template <class T>
TensorView<T> tensor_view(T* data, std::initializer_list<offset_t> extents, std::initializer_list<std::ptrdiff_t> strides) {
    return detail::make_view(data, std::vector<offset_t>(extents), std::vector<std::ptrdiff_t>(strides), "strides");
}

POLYATTN_END_NAMESPACE
