#pragma once

#include <polyattn/core/tensor.hpp>

#include <algorithm>
#include <cmath>

POLYATTN_BEGIN_NAMESPACE

/// How much a map of tokens changes when the text is shifted by one token: |f(roll x) - roll f(x)| / |f(x)|, Frobenius norms, over
/// the tokens that are not within `margin` of either end. f maps [tokens, dim] to [tokens, any]. Throws invalid_input for other shapes.
/// Source: Diffuser (AAAI 2023), figure 1: block patterns are sensitive, token-wise ones are not.
template <class F>
double shift_sensitivity(F&& f, const Tensor<double>& x, index_t margin = 1) {
    detail::require(x.shape.size() == 2, "x", "[tokens, dim]", [&] { return detail::text("rank ", x.shape.size()); }());
    const auto n = static_cast<index_t>(x.shape[0]);
    detail::require(margin >= 0 && offset_t{2} * margin < n, "margin", [&] { return detail::text("a number of tokens from 0 to less than half of ", n); }, margin);
    const auto roll = [&](const Tensor<double>& t) {
        Tensor<double> rolled = t;
        std::rotate(rolled.values.begin(), rolled.values.end() - t.shape[1], rolled.values.end());
        return rolled;
    };
    const auto mapped = [&](const Tensor<double>& t) {
        Tensor<double> y = f(t);
        detail::require(y.shape.size() == 2 && y.shape[0] == n, "f", [&] { return detail::text("a map to [", n, ", any]"); }, detail::shape_text(std::span<const offset_t>(y.shape)));
        return y;
    };
    const Tensor<double> shifted = mapped(roll(x)), plain = roll(mapped(x));
    detail::require(shifted.shape == plain.shape, "f", "a map to one shape", detail::shape_text(std::span<const offset_t>(shifted.shape)));
    double difference = 0, size = 0;
    for (index_t i = margin; i < n - margin; ++i)
        for (offset_t c = 0; c < plain.shape[1]; ++c) {
            const auto at = static_cast<std::size_t>(i * plain.shape[1] + c);
            difference += (shifted.values[at] - plain.values[at]) * (shifted.values[at] - plain.values[at]);
            size += plain.values[at] * plain.values[at];
        }
    return size > 0 ? std::sqrt(difference / size) : 0;
}

POLYATTN_END_NAMESPACE
