#pragma once

#include <polyattn/core/config.hpp>

#include <algorithm>
#include <array>
#include <numeric>
#include <unordered_set>
#include <vector>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

/// Ten rounds on plain words: what device code calls, where std::array has no operators.
POLYATTN_HOST_DEVICE constexpr void philox_rounds(std::uint32_t (&counter)[4], std::uint32_t key0, std::uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t a = std::uint64_t{0xD2511F53u} * counter[0];
        const std::uint64_t b = std::uint64_t{0xCD9E8D57u} * counter[2];
        counter[0] = static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key0;
        counter[1] = static_cast<std::uint32_t>(b);
        counter[2] = static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key1;
        counter[3] = static_cast<std::uint32_t>(a);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

}  // namespace detail

/// Philox 4x32-10, a counter-based generator: a pure function of (counter, key), so every backend and every number of
/// threads draws the same numbers. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), table 2.
constexpr std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
    std::uint32_t words[4] = {counter[0], counter[1], counter[2], counter[3]};
    detail::philox_rounds(words, key[0], key[1]);
    return {words[0], words[1], words[2], words[3]};
}

/// What a random choice may depend on besides its own seed: one training step, layer, ensemble sample and worker.
struct Draw {
    std::uint64_t seed = 0;
    std::uint32_t step = 0;
    std::uint32_t layer = 0;
    std::uint32_t sample = 0;
    std::uint32_t worker = 0;

    friend bool operator==(const Draw&, const Draw&) = default;
    friend auto operator<=>(const Draw&, const Draw&) = default;

    constexpr std::array<std::uint32_t, 2> key() const {
        return {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
    }
    /// The fourth counter word: Philox of (step, layer, sample, worker) under the seed.
    constexpr std::uint32_t hash() const { return philox({step, layer, sample, worker}, key())[0]; }
};

/// Third counter word: keeps choices apart that share a seed.
namespace random_stream {
inline constexpr std::uint32_t global_tokens = 1, random_tokens = 2, random_blocks = 3, erdos_renyi = 4, random_regular = 5, sampled_keys = 6,
                               shuffled_keys = 7, shuffled_columns = 8, shuffled_rows = 9, parameters = 10, feature_directions = 11, random_routes = 12, hash_directions = 13,
                               weight_dropout = 0x40000000u, value_dropout = 0x80000000u;
}

/// The numbers of one (seed, row, stream, draw): counter = (element / 4, row, stream, hash of the draw), words in order. Device code may draw
/// them too, but for the vector of distinct ones.
class RandomRow {
public:
    POLYATTN_HOST_DEVICE RandomRow(std::uint64_t seed, std::uint32_t row, std::uint32_t stream, std::uint32_t draw_hash = 0)
        : counter_{0, row, stream, draw_hash}, key_{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)} {}

    POLYATTN_HOST_DEVICE std::uint32_t next() {
        if (used_ == 4) {
            for (int word = 0; word < 4; ++word) words_[word] = counter_[word];
            detail::philox_rounds(words_, key_[0], key_[1]);
            ++counter_[0];
            used_ = 0;
        }
        return words_[used_++];
    }

    /// What the index-th next() of a new row gives.
    POLYATTN_HOST_DEVICE std::uint32_t word(std::uint64_t index) const {
        std::uint32_t words[4] = {static_cast<std::uint32_t>(index / 4), counter_[1], counter_[2], counter_[3]};
        detail::philox_rounds(words, key_[0], key_[1]);
        return words[index % 4];
    }

    /// Uniform in [0, bound), exactly. bound >= 1.
    POLYATTN_HOST_DEVICE std::uint32_t below(std::uint32_t bound) {
        for (std::uint32_t number = 0;;)
            if (bounded(next(), bound, number)) return number;
    }
    /// Multiply and reject: whether a word stands for a number of [0, bound), and for which.
    POLYATTN_HOST_DEVICE static bool bounded(std::uint32_t word, std::uint32_t bound, std::uint32_t& number) {
        const std::uint64_t product = std::uint64_t{word} * bound;
        number = static_cast<std::uint32_t>(product >> 32);
        return static_cast<std::uint32_t>(product) >= (0u - bound) % bound;  // 2^32 mod bound
    }

    /// Inserts `count` <= bound distinct numbers of [0, bound) into a set: insert(number) says whether the number is new. Floyd's method.
#if defined(__NVCC__)
#pragma nv_exec_check_disable  // the set may be one of the host's
#endif
    template <class Insert>
    POLYATTN_HOST_DEVICE void insert_distinct(index_t bound, index_t count, Insert&& insert) {
        for (index_t last = bound - count; last < bound; ++last)
            if (!insert(static_cast<index_t>(below(static_cast<std::uint32_t>(last) + 1)))) insert(last);
    }

    /// The longest draw for which a sorted vector beats other sets.
    static constexpr index_t longest_sorted = 512;

    /// `count` distinct numbers of [0, bound), ascending; all of them when count >= bound. O(count log count).
    void distinct(index_t bound, index_t count, std::vector<index_t>& out) {
        out.clear();
        if (count >= bound) {
            out.resize(static_cast<std::size_t>(bound));
            std::iota(out.begin(), out.end(), 0);
        } else if (count <= longest_sorted) {
            insert_distinct(bound, count, [&](index_t number) {
                const auto at = std::lower_bound(out.begin(), out.end(), number);
                if (at != out.end() && *at == number) return false;
                out.insert(at, number);
                return true;
            });
        } else {
            std::unordered_set<index_t> seen;
            seen.reserve(static_cast<std::size_t>(count) * 2);
            insert_distinct(bound, count, [&](index_t number) { return seen.insert(number).second; });
            out.assign(seen.begin(), seen.end());
            std::sort(out.begin(), out.end());
        }
    }

private:
    std::uint32_t counter_[4], key_[2], words_[4]{};
    int used_ = 4;
};

POLYATTN_END_NAMESPACE
