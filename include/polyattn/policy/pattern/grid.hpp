#pragma once

#include <polyattn/policy/pattern/concept.hpp>

POLYATTN_BEGIN_NAMESPACE

/// Tokens are a height x width picture, rows after one another. Each sees its own window x window part of it, the partition
/// shifted by `shift` both ways; parts at the rim are cut off, as Swin's masks do. Source: Liu et al., Swin Transformer (2021).
struct ShiftedWindows2D {
    using policy_kind = sparsity_pattern_kind;
    index_t height = 8;
    index_t width = 8;
    index_t window = 4;
    index_t shift = 0;

    void validate() const {
        detail::require(height >= 0, "height", "a number of pixels >= 0", height);
        detail::require(width >= 0, "width", "a number of pixels >= 0", width);
        detail::require(window >= 1, "window", "a number of pixels >= 1", window);
        detail::require(shift >= 0 && shift < window, "shift", "a number of pixels from 0 to window - 1", shift);
    }
    /// Throws invalid_input unless queries == keys == height * width.
    Plan plan(index_t queries, index_t keys) const {
        detail::require_square("ShiftedWindows2D", queries, keys);
        const offset_t pixels = offset_t{height} * width;
        if (pixels != keys)
            throw invalid_input("height x width", detail::text(keys, " tokens"), detail::text(height, " x ", width));
        PlanBuilder builder(queries, keys);
        const auto first = [&] { return shift > 0 ? shift - window : 0; };
        for (index_t y = first(); y < height; y += window)
            for (index_t x = first(); x < width; x += window) {
                std::vector<index_t> tokens;
                for (index_t row = std::max(y, index_t{0}); row < std::min(y + window, height); ++row)
                    for (index_t col = std::max(x, index_t{0}); col < std::min(x + window, width); ++col) tokens.push_back(row * width + col);
                if (tokens.empty()) continue;
                const auto part = IndexSequence::list(std::move(tokens));
                builder.tile(part, part);
            }
        return builder.build();
    }
};

static_assert(SparsityPattern<ShiftedWindows2D>);

POLYATTN_END_NAMESPACE
