#pragma once

#include <polyattn/policy/pattern/concept.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

/// Keys at p + dilation * m, -left <= m <= right. A dilated window is a plain one within each residue class of positions.
inline Plan dilated_window(index_t queries, index_t keys, offset_t left, offset_t right, index_t dilation) {
    const Alignment at{queries, keys};
    PlanBuilder builder(queries, keys);
    if (dilation == 1)
        return builder.range([&](index_t i) { return std::pair{at.position(i) - left, at.position(i) + right + 1}; }).build();
    const offset_t first = at.position(0);
    for (index_t residue = 0; residue < dilation; ++residue) {
        std::vector<index_t> rows, class_keys;
        for (offset_t i = ((residue - first) % dilation + dilation) % dilation; i < queries; i += dilation) rows.push_back(static_cast<index_t>(i));
        for (offset_t j = residue; j < keys; j += dilation) class_keys.push_back(static_cast<index_t>(j));
        if (rows.empty() || class_keys.empty()) continue;
        const auto row_list = IndexSequence::list(rows);
        builder.tile(row_list, IndexSequence::list(std::move(class_keys)), [&](index_t r) {
            const offset_t centre = (at.position(row_list[r]) - residue) / dilation;  // exact, also below 0
            return std::pair{centre - left, centre + right + 1};
        });
    }
    return builder.build();
}

inline void validate_window(offset_t window, index_t dilation) {
    require(window >= 0, "window", "a number of keys >= 0", window);
    require(dilation >= 1, "dilation", "a step >= 1", dilation);
}
inline void validate_even_window(offset_t window, index_t dilation = 1) {
    validate_window(window, dilation);
    require(window % 2 == 0, "window", "an even number of keys, half on each side", window);
}

}  // namespace detail

/// Each query sees window / 2 keys on each side of its position, and its own: window + 1 keys, `dilation` apart.
/// (w + 1) n pairs. Source: Beltagy et al., Longformer (2020); Diffuser (AAAI 2023), section "local attention".
struct SlidingWindow {
    using policy_kind = sparsity_pattern_kind;
    index_t window = 128;
    index_t dilation = 1;

    void validate() const { detail::validate_even_window(window, dilation); }
    Plan plan(index_t queries, index_t keys) const {
        return detail::dilated_window(queries, keys, window / 2, window / 2, dilation);
    }
};

/// One-sided: each query sees its own key and the `window` keys before it, `dilation` apart. window + 1 keys.
struct CausalSlidingWindow {
    using policy_kind = sparsity_pattern_kind;
    static constexpr bool is_causal = true;
    index_t window = 128;
    index_t dilation = 1;

    void validate() const { detail::validate_window(window, dilation); }
    Plan plan(index_t queries, index_t keys) const { return detail::dilated_window(queries, keys, window, 0, dilation); }
};

/// Blocks of `window` tokens at stride window / 2, the form Diffuser's authors compute: |floor(i/h) - floor(j/h)| <= 1, h = window / 2.
/// For n = m h: (3 m - 2) h^2 pairs.
struct OverlappingBlocks {
    using policy_kind = sparsity_pattern_kind;
    index_t window = 128;

    void validate() const {
        detail::validate_even_window(window);
        detail::require(window >= 2, "window", "an even number of keys >= 2", window);
    }
    Plan plan(index_t queries, index_t keys) const {
        const detail::Alignment at{queries, keys};
        const offset_t half = window / 2;
        return PlanBuilder(queries, keys)
            .range([&](index_t i) {
                const offset_t position = at.position(i), block = (position - (position < 0 ? half - 1 : 0)) / half;
                return std::pair{(block - 1) * half, (block + 2) * half};
            })
            .build();
    }
};

/// Disjoint blocks of `block` positions; each query sees its own block. n b pairs.
struct BlockLocal {
    using policy_kind = sparsity_pattern_kind;
    index_t block = 64;

    void validate() const { detail::require(block >= 1, "block", "a number of tokens >= 1", block); }
    Plan plan(index_t queries, index_t keys) const {
        const detail::Alignment at{queries, keys};
        return PlanBuilder(queries, keys)
            .range([&](index_t i) {
                const offset_t position = at.position(i);
                if (position < 0) return std::pair{offset_t{0}, offset_t{0}};
                return std::pair{position / block * block, (position / block + 1) * block};
            })
            .build();
    }
};

static_assert(SparsityPattern<SlidingWindow> && SparsityPattern<CausalSlidingWindow> && SparsityPattern<OverlappingBlocks> &&
              SparsityPattern<BlockLocal>);

POLYATTN_END_NAMESPACE
