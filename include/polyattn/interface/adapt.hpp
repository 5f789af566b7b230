#pragma once
// From xtensor expressions and raw views to what kernels read, and from shapes to the tensors that calls return.

#include <polyattn/core/tensor.hpp>
#include <polyattn/interface/xtensor.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

template <class E>
inline constexpr bool is_raw_view = false;
template <class T>
inline constexpr bool is_raw_view<TensorView<T>> = true;

template <class E>
struct element {
    using type = typename E::value_type;
};
template <class T>
struct element<TensorView<T>> {
    using type = std::remove_const_t<T>;
};
template <class E>
using element_t = typename element<std::remove_cvref_t<E>>::type;

template <class E>
inline constexpr bool has_memory = is_raw_view<std::remove_cvref_t<E>> ||
                                   (xt::has_data_interface<std::remove_cvref_t<E>>::value && xt::has_strides<std::remove_cvref_t<E>>::value);

/// The memory of an expression as it lies. Constraints: has_memory<E>.
template <class E>
auto memory_view(E& e, const char* argument) {
    if constexpr (is_raw_view<std::remove_cvref_t<E>>) {
        (void)argument;
        return e;
    } else return make_view(e.data() + e.data_offset(), e.shape(), e.strides(), argument);
}

/// An input as a view: of its own memory if it has any, else of a copy, evaluated element by element.
template <class T>
class Adapted {
public:
    template <class E>
    Adapted(const E& e, const char* argument) {
        if constexpr (has_memory<E>) view_ = memory_view(e, argument);
        else {
            copy_ = Tensor<T>(std::vector<offset_t>(e.shape().begin(), e.shape().end()));
            (void)copy_.view();  // refuses other ranks before anything is evaluated
            evaluate(e, copy_.data());
            view_ = make_view<const T>(copy_.data(), copy_.shape, row_major_strides(copy_.shape), argument);
        }
    }
    Adapted(const Adapted&) = delete;
    Adapted& operator=(const Adapted&) = delete;

    const TensorView<const T>& view() const { return view_; }

private:
    // By operator() where the rank is known: faster than xtensor's own assignment for transposes and broadcasts.
    template <class E>
    static void evaluate(const E& e, T* out) {
        constexpr std::size_t rank = xt::get_rank<E>::value;
        const auto& shape = e.shape();
        if constexpr (rank == 2) {
            for (std::size_t i = 0; i < shape[0]; ++i)
                for (std::size_t c = 0; c < shape[1]; ++c) *out++ = e(i, c);
        } else if constexpr (rank == 3) {
            for (std::size_t h = 0; h < shape[0]; ++h)
                for (std::size_t i = 0; i < shape[1]; ++i)
                    for (std::size_t c = 0; c < shape[2]; ++c) *out++ = e(h, i, c);
        } else if constexpr (rank == 4) {
            for (std::size_t b = 0; b < shape[0]; ++b)
                for (std::size_t h = 0; h < shape[1]; ++h)
                    for (std::size_t i = 0; i < shape[2]; ++i)
                        for (std::size_t c = 0; c < shape[3]; ++c) *out++ = e(b, h, i, c);
        } else std::copy(e.template begin<xt::layout_type::row_major>(), e.template end<xt::layout_type::row_major>(), out);
    }

    Tensor<T> copy_;
    TensorView<const T> view_;
};

/// The owning tensor that a call on inputs like E returns: xtensor of the same rank (`fewer` axes less), xarray for a dynamic
/// rank, Tensor for raw views.
template <class E, class T, std::size_t fewer = 0>
auto make_result(const std::vector<offset_t>& shape) {
    if constexpr (is_raw_view<E>) return Tensor<T>(shape);
    else {
        constexpr std::size_t rank = xt::get_rank<E>::value;
        constexpr auto layout = xt::layout_type::row_major;  // whatever XTENSOR_DEFAULT_LAYOUT says
        if constexpr (rank == SIZE_MAX) return xt::xarray<T, layout>::from_shape(std::vector<std::size_t>(shape.begin(), shape.end()));
        else {
            std::array<std::size_t, rank - fewer> extents{};
            std::copy(shape.begin(), shape.end(), extents.begin());
            return xt::xtensor<T, rank - fewer, layout>::from_shape(extents);
        }
    }
}

/// A tensor that a call made, or was given for gradients, as a view.
template <class Result>
auto memory_of(Result& result) {
    if constexpr (requires { result.view(); }) return result.view();
    else return memory_view(result, "out");
}
template <class T>
void fill_with_zeros(const TensorView<T>& view) {
    for (index_t b = 0; b < view.batch(); ++b)
        for (index_t h = 0; h < view.heads(); ++h) fill_with_zeros(view.head(b, h));
}
template <class T>
Tensor<T> copy_of(const TensorView<const T>& view) {
    Tensor<T> copy(shape_like(view, {view.tokens(), view.dim()}));
    T* to = copy.data();
    for (index_t b = 0; b < view.batch(); ++b)
        for (index_t h = 0; h < view.heads(); ++h) {
            const auto head = view.head(b, h);
            for (index_t i = 0; i < head.rows; ++i)
                for (index_t c = 0; c < head.cols; ++c) *to++ = head(i, c);
        }
    return copy;
}

}  // namespace detail

POLYATTN_END_NAMESPACE
