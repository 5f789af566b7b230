#pragma once

#include <polyattn/policy/pattern/combine.hpp>
#include <polyattn/policy/pattern/random.hpp>

POLYATTN_BEGIN_NAMESPACE

/// The same three ingredients by blocks of `Block` tokens: `window` blocks around a query's block (odd), the first `globals`
/// blocks, whose rows and columns are full, and `randoms` further blocks a row of blocks.
/// Source: Zaheer et al., Big Bird (2020), internal transformer construction.
template <index_t Block>
struct BigBird {
    static_assert(Block >= 1, "polyattn: BigBird<Block> needs blocks of at least one token");
    using policy_kind = sparsity_pattern_kind;
    index_t window = 3;
    index_t globals = 2;
    index_t randoms = 3;
    std::uint64_t seed = 1;

    void validate() const {
        detail::require(window >= 1 && window % 2 == 1, "window", "an odd number of blocks >= 1", window);
        detail::require(globals >= 0, "globals", "a number of blocks >= 0", globals);
        detail::require(randoms >= 0, "randoms", "a number of blocks >= 0", randoms);
    }
    /// Throws invalid_input unless queries == keys.
    Plan plan(index_t queries, index_t keys) const {
        detail::require_square("BigBird", queries, keys);
        const index_t blocks = (keys + Block - 1) / Block, side = window / 2;
        const auto global_keys = static_cast<index_t>(std::min<offset_t>(offset_t{globals} * Block, keys));
        std::vector<index_t> global_tokens(static_cast<std::size_t>(global_keys));
        std::iota(global_tokens.begin(), global_tokens.end(), 0);
        PlanBuilder band(queries, keys);
        band.range([&](index_t i) {
            const offset_t block = i / Block;
            return std::pair{(block - side) * Block, (block + side + 1) * Block};
        });
        PlanBuilder random_blocks(queries, keys);
        std::vector<index_t> picks;
        for (index_t block = global_keys / Block; block < blocks; ++block) {
            // Blocks outside the band and behind the global ones, numbered without the gap.
            const index_t low = std::max(block - side, globals), high = std::min(block + side + 1, blocks);
            const index_t candidates = blocks - std::min(globals, blocks) - std::max(high - low, index_t{0});
            RandomRow(seed, static_cast<std::uint32_t>(block), random_stream::random_blocks).distinct(std::max(candidates, index_t{0}), randoms, picks);
            std::vector<index_t> tokens;
            for (index_t pick : picks) {
                pick += globals;
                if (pick >= low) pick += high - low;
                for (index_t key = pick * Block; key < std::min((pick + 1) * Block, keys); ++key) tokens.push_back(key);
            }
            if (!tokens.empty())
                random_blocks.tile(IndexSequence::range(block * Block, std::min((block + 1) * Block, queries)), IndexSequence::list(std::move(tokens)));
        }
        const Plan local = unite(GlobalTokens{.count = 0, .tokens = std::move(global_tokens)}.plan(queries, keys), band.build());
        return unite(local, random_blocks.build());
    }
};

static_assert(SparsityPattern<BigBird<64>>);

POLYATTN_END_NAMESPACE
