#pragma once

#include <polyattn/backend/simd/exp2.hpp>
#include <polyattn/nn/linear.hpp>
#include <polyattn/nn/pass.hpp>

#include <numbers>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

template <class V>
V normal_probability(V x) {
    using T = typename V::value_type;
    return V(T(.5)) * (V(T(1)) + xsimd::erf(x * V(static_cast<T>(std::numbers::sqrt2 / 2))));
}
/// x P(z < x), z standard normal. Source: Hendrycks and Gimpel, "Gaussian error linear units" (2016), the exact form.
template <class T>
void gelu(const T* x, index_t count, T* y) {
    using V = simd::Vec<T, xsimd::default_arch>;
    simd::map_row<T, xsimd::default_arch>(x, y, count, [](V value, V) { return value * normal_probability(value); });
}
/// d_y *= gelu'(x).
template <class T>
void multiply_gelu_slope(const T* x, index_t count, T* d_y) {
    using A = xsimd::default_arch;
    using V = simd::Vec<T, A>;
    simd::map_row<T, A>(x, d_y, count, [](V value, V gradient) {
        const V density = simd::pow2<T, A>(value * value * V(static_cast<T>(-.5 * std::numbers::log2e))) * V(static_cast<T>(std::numbers::inv_sqrtpi / std::numbers::sqrt2));
        return gradient * simd::multiply_add(value, density, normal_probability(value));
    });
}

}  // namespace detail

namespace nn {

/// y = residual + drop(W2 gelu(W1 x + b1) + b2), row by row. Sources: Vaswani et al., "Attention is all you need" (2017), section 3.3, with
/// GELU. 4 dim hidden flops a row.
template <class T>
class FeedForward {
public:
    /// The second layer's weights start smaller by `scale`: the usual 1 / sqrt(2 layers) of deep residual networks.
    FeedForward(const std::string& name, index_t dim, index_t hidden, double deviation, double scale, std::uint64_t seed)
        : up(name + ".up", dim, hidden, deviation, seed), down(name + ".down", hidden, dim, deviation * scale, seed) {}

    struct Saved {
        Tensor<T> before, after;  // of the activation, [rows, hidden]
        Tensor<T> d_hidden, d_down;
        detail::ActivationDropout dropout;
    };

    void forward(MatrixView<const T> x, MatrixView<const T> residual, MatrixView<T> y, Saved& saved, const detail::ActivationDropout& dropout, Workspace& workspace) const {
        saved.dropout = dropout;
        detail::reshape(saved.before, {x.rows, up.out()});
        detail::reshape(saved.after, {x.rows, up.out()});
        const MatrixView<T> before = detail::rows_of(saved.before), after = detail::rows_of(saved.after);
        up.forward(x, before, workspace, [&](index_t row, index_t column, std::span<T> values) { detail::gelu(values.data(), static_cast<index_t>(values.size()), after.row(row) + column); });
        down.forward(after, y, workspace, detail::add_residual(residual, dropout));
    }
    /// d_x of the branch alone; the residual's gradient is d_y itself.
    void backward(MatrixView<const T> x, MatrixView<const T> d_y, MatrixView<T> d_x, Saved& saved, Workspace& workspace) {
        const MatrixView<const T> d_down = detail::dropped(d_y, saved.dropout, saved.d_down);
        detail::reshape(saved.d_hidden, saved.before.shape);
        const MatrixView<T> d_hidden = detail::rows_of(saved.d_hidden);
        const auto before = detail::rows_of(std::as_const(saved.before));
        down.backward(detail::rows_of(std::as_const(saved.after)), d_down, d_hidden, false, workspace,
                      [&](index_t row, index_t column, std::span<T> values) { detail::multiply_gelu_slope(before.row(row) + column, static_cast<index_t>(values.size()), values.data()); });
        up.backward(x, d_hidden, d_x, false, workspace);
    }

    template <class F>
    void for_each_parameter(F&& f) {
        up.for_each_parameter(f);
        down.for_each_parameter(f);
    }

    Linear<T> up, down;
};

}  // namespace nn

POLYATTN_END_NAMESPACE
