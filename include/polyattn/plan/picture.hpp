#pragma once

#include <polyattn/plan/plan.hpp>

#include <cmath>

POLYATTN_BEGIN_NAMESPACE

/// A grey picture, row by row, 0 black to 255 white.
struct Picture {
    index_t width = 0, height = 0;
    std::vector<std::uint8_t> pixels;
};

/// A plan as a picture of at most `side` x `side` pixels: queries downward, keys to the right; white shows nothing, darker more.
/// A pixel that stands for several pairs is as dark as the square root of their share, so that single edges stay visible.
/// O(pairs of the plan).
inline Picture picture(const Plan& plan, index_t side = 512) {
    detail::require(side >= 1, "side", "a number of pixels >= 1", side);
    Picture image{std::min(side, plan.keys()), std::min(side, plan.queries()), {}};
    std::vector<offset_t> counts(static_cast<std::size_t>(image.width) * static_cast<std::size_t>(image.height), 0);
    const auto row_of = [&](index_t query) { return static_cast<std::size_t>(offset_t{query} * image.height / plan.queries()); };
    const auto column_of = [&](index_t key) { return static_cast<std::size_t>(offset_t{key} * image.width / plan.keys()); };
    for (index_t i = 0; i < plan.queries(); ++i)
        plan.for_each_key(i, [&](index_t j) { ++counts[row_of(i) * static_cast<std::size_t>(image.width) + column_of(j)]; });
    const double cell = std::max(1., double(plan.queries()) / std::max(image.height, index_t{1})) * std::max(1., double(plan.keys()) / std::max(image.width, index_t{1}));
    for (const offset_t count : counts)
        image.pixels.push_back(static_cast<std::uint8_t>(std::lround(255 * (1 - std::sqrt(std::min(1., double(count) / cell))))));
    return image;
}

POLYATTN_END_NAMESPACE
