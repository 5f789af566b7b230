#pragma once
// Losses with their gradients, in natural-log units, means over the counted rows or entries.

#include <polyattn/backend/simd/exp2.hpp>
#include <polyattn/nn/linear.hpp>

#include <numbers>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

template <class T, class F>
double mean_loss(std::span<T> values, std::span<const T> targets, F&& f) {
    require(targets.size() == values.size(), "targets", [&] { return text("as many as the ", values.size(), " values"); }, targets.size());
    double loss = 0;
    for (std::size_t i = 0; i < values.size(); ++i) {
        const auto [term, slope] = f(double(values[i]) - double(targets[i]));
        loss += term;
        values[i] = static_cast<T>(slope / double(values.size()));
    }
    return values.empty() ? 0 : loss / double(values.size());
}

}  // namespace detail

namespace nn {

/// A target that does not count.
inline constexpr index_t ignored = -1;

/// exp(x - logsumexp(x)), row by row, in place; returns the logsumexp of each row. Throws invalid_input for rows of no column.
template <class T>
std::vector<double> softmax_rows(MatrixView<T> x) {
    detail::require(x.cols >= 1 || x.rows == 0, "x", "at least one column", x.cols);
    std::vector<double> logsumexp(static_cast<std::size_t>(x.rows));
    detail::parallel_rows(x.rows, [&](index_t i) {
        using A = xsimd::default_arch;
        using V = detail::simd::Vec<T, A>;
        T* const row = x.row(i);
        const T highest = *std::max_element(row, row + x.cols);
        detail::simd::map_row<T, A>(row, row, x.cols, [&](V value, V) { return detail::simd::pow2<T, A>((value - V(highest)) * V(static_cast<T>(std::numbers::log2e))); });
        T sum = 0;
        for (index_t c = 0; c < x.cols; ++c) sum += row[c];
        detail::simd::scale_row<T, A>(row, 1 / sum, x.cols, row);
        logsumexp[static_cast<std::size_t>(i)] = double(highest) + std::log(double(sum));
    });
    return logsumexp;
}

/// Mean of -log softmax(logits)[target] over the rows whose target is not `ignored`; 0 if there are none. Replaces the logits by the
/// gradient. logits [rows, classes]. Throws invalid_input for a target that is no class.
template <class T>
double cross_entropy(MatrixView<T> logits, std::span<const index_t> targets) {
    detail::require(targets.size() == static_cast<std::size_t>(logits.rows), "targets", [&] { return detail::text("one for each of ", logits.rows, " rows"); }, targets.size());
    index_t counted = 0;
    std::vector<double> score(targets.size(), 0);
    for (index_t i = 0; i < logits.rows; ++i) {
        const index_t target = targets[static_cast<std::size_t>(i)];
        detail::require(target == ignored || (target >= 0 && target < logits.cols), "targets", [&] { return detail::text("classes of [0, ", logits.cols, "), or ignored"); }, target);
        if (target == ignored) continue;
        ++counted;
        score[static_cast<std::size_t>(i)] = double(logits(i, target));
    }
    const std::vector<double> logsumexp = softmax_rows(logits);
    double loss = 0;
    for (index_t i = 0; i < logits.rows; ++i)
        if (targets[static_cast<std::size_t>(i)] != ignored) loss += logsumexp[static_cast<std::size_t>(i)] - score[static_cast<std::size_t>(i)];
    const T share = counted > 0 ? T(1) / static_cast<T>(counted) : T(0);
    detail::parallel_rows(logits.rows, [&](index_t i) {
        const index_t target = targets[static_cast<std::size_t>(i)];
        if (target == ignored) {
            std::fill_n(logits.row(i), logits.cols, T(0));
            return;
        }
        logits(i, target) -= T(1);
        for (index_t c = 0; c < logits.cols; ++c) logits(i, c) *= share;
    });
    return counted > 0 ? loss / counted : 0;
}

/// Mean of (value - target)^2. Replaces the values by the gradient.
template <class T>
double mean_squared_error(std::span<T> values, std::span<const T> targets) {
    return detail::mean_loss<T>(values, targets, [](double error) { return std::pair{error * error, 2 * error}; });
}
/// Mean of |value - target|. Replaces the values by the gradient, 0 where they meet.
template <class T>
double mean_absolute_error(std::span<T> values, std::span<const T> targets) {
    return detail::mean_loss<T>(values, targets, [](double error) { return std::pair{std::abs(error), double((error > 0) - (error < 0))}; });
}

}  // namespace nn

POLYATTN_END_NAMESPACE
