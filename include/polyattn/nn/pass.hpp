#pragma once

#include <polyattn/attention.hpp>
#include <polyattn/nn/parameter.hpp>

#include <functional>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

/// That of the options of a layer of tokens. Throws invalid_input without one, or if the rows of x are not `batch` items of equal length.
template <class T>
Workspace& workspace_of(const CallOptions& options, const MatrixView<const T>& x, index_t batch) {
    require(options.workspace, "options.workspace", "a workspace", "none");
    require(batch >= 1 && x.rows % batch == 0, "batch", [&] { return text("a number of items that divides ", x.rows, " rows"); }, batch);
    return *options.workspace;
}

}  // namespace detail

namespace nn {

/// One layer's attention in one pass: what its plans may hang on. `draw` is the layer's; `lengths` is empty if all tokens are valid.
struct LayerCall {
    index_t layer = 0, batch = 1, tokens = 0;
    std::span<const index_t> lengths = {};
    Draw draw = {};
};
/// The plans that a layer's attention uses instead of its own: one for all batch items, one for each, or none.
using PlanSource = std::function<std::vector<Plan>(const LayerCall& call)>;

/// What all layers share in one pass through a network. Backward passes need the workspace alone: what forward went by is in what it saved.
struct Pass {
    /// Scratch memory; always needed.
    Workspace* workspace = nullptr;
    /// Seed, step and sample of this pass; layers add their number.
    Draw draw = {};
    /// Dropout is on.
    bool training = false;
    /// Valid tokens of each batch item. Empty: all.
    std::vector<index_t> lengths = {};
    PlanSource plans = {};

    void require_workspace() const { detail::require(workspace, "pass.workspace", "a workspace", "none"); }
};

}  // namespace nn

namespace detail {

/// Dropout on activations: entry (row, column) is kept with probability 1 - p and scaled by 1 / (1 - p), a pure function of the draw.
class ActivationDropout {
public:
    ActivationDropout() = default;
    ActivationDropout(double p, const nn::Pass& pass, DropSite site)
        : mask_({.values = pass.training ? p : 0}, pass.draw, static_cast<offset_t>(site)) {}
    bool active() const { return mask_.drops_values(); }
    /// To the columns from `column` on.
    template <class T>
    void apply(index_t row, index_t column, std::span<T> values) const {
        const auto end = column + static_cast<index_t>(values.size());
        for (index_t quad = column / 4; quad * 4 < end; ++quad) {
            const auto factors = mask_.values_of_four(0, row, quad);
            for (index_t c = std::max(column, quad * 4); c < std::min(end, quad * 4 + 4); ++c) values[static_cast<std::size_t>(c - column)] *= static_cast<T>(factors[static_cast<std::size_t>(c % 4)]);
        }
    }

private:
    DropoutMask mask_;
};

/// What finishes the last product of a branch: dropout, then the residual (none if it has no memory).
template <class T>
auto add_residual(MatrixView<const T> residual, const ActivationDropout& dropout) {
    return simd::Beside{residual, [residual, &dropout](index_t row, index_t column, std::span<T> values) {
        if (dropout.active()) dropout.apply(row, column, values);
        if (residual.data) simd::add_scaled<T, xsimd::default_arch>(T(1), residual.row(row) + column, static_cast<index_t>(values.size()), values.data());
    }};
}
/// d_y through the dropout: itself, or a copy in `memory`.
template <class T>
MatrixView<const T> dropped(MatrixView<const T> d_y, const ActivationDropout& dropout, Tensor<T>& memory) {
    if (!dropout.active()) return d_y;
    reshape(memory, {d_y.rows, d_y.cols});
    const MatrixView<T> copy = rows_of(memory);
    parallel_rows(d_y.rows, [&](index_t i) {
        std::copy_n(d_y.row(i), d_y.cols, copy.row(i));
        dropout.apply(i, 0, std::span<T>(copy.row(i), static_cast<std::size_t>(d_y.cols)));
    });
    return copy;
}

}  // namespace detail

POLYATTN_END_NAMESPACE
