#pragma once

#include <polyattn/nn/gelu.hpp>
#include <polyattn/nn/linear.hpp>
#include <polyattn/nn/pass.hpp>

POLYATTN_BEGIN_NAMESPACE

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
        const auto activate = [&](index_t row, index_t column, std::span<T> values) { detail::gelu(values.data(), static_cast<index_t>(values.size()), after.row(row) + column); };
        up.forward(x, before, workspace, detail::simd::Beside{after, activate});
        down.forward(after, y, workspace, detail::add_residual(residual, dropout));
    }
    /// d_x of the branch alone; the residual's gradient is d_y itself.
    void backward(MatrixView<const T> x, MatrixView<const T> d_y, MatrixView<T> d_x, Saved& saved, Workspace& workspace) {
        const MatrixView<const T> d_down = detail::dropped(d_y, saved.dropout, saved.d_down);
        detail::reshape(saved.d_hidden, saved.before.shape);
        const MatrixView<T> d_hidden = detail::rows_of(saved.d_hidden);
        const auto before = detail::rows_of(std::as_const(saved.before));
        const auto slope = [&](index_t row, index_t column, std::span<T> values) { detail::multiply_gelu_slope(before.row(row) + column, static_cast<index_t>(values.size()), values.data()); };
        down.backward(detail::rows_of(std::as_const(saved.after)), d_down, d_hidden, false, workspace, detail::simd::Beside{before, slope});
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
