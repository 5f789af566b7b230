#pragma once

#include <polyattn/core/error.hpp>
#include <polyattn/core/rng.hpp>

POLYATTN_BEGIN_NAMESPACE

/// Probabilities of dropout in training. Kept entries are scaled by 1 / (1 - p). One mask on the weights serves all hops; one on
/// Z follows each hop. Masks depend on (draw, batch, head, query, key or column, hop) only. Sources: Srivastava et al.,
/// "Dropout" (2014); its places, Diffuser's published code.
struct Dropout {
    double weights = 0;
    double values = 0;

    void validate() const {
        detail::require(detail::is_finite(weights) && weights >= 0 && weights < 1, "dropout.weights", "a probability of [0, 1)", weights);
        detail::require(detail::is_finite(values) && values >= 0 && values < 1, "dropout.values", "a probability of [0, 1)", values);
    }
};

namespace detail {

/// Where a dropout on activations sits in a network: in place of a (batch, head), and beyond those of attention, so that all masks of a layer differ.
enum class DropSite : std::uint32_t { embedding = 1 << 20, attention = 2 << 20, feed_forward = 3 << 20, pooled = 4 << 20, head = 5 << 20 };

/// The masks of one (batch, head): 0 for a dropped entry, 1 / (1 - p) for a kept one.
class DropoutMask {
public:
    DropoutMask() = default;
    DropoutMask(const Dropout& dropout, const Draw& draw, offset_t item)
        : weights_(threshold(dropout.weights)), values_(threshold(dropout.values)), keep_weight_(1 / (1 - dropout.weights)),
          keep_value_(1 / (1 - dropout.values)), key0_(draw.key()[0]), key1_(draw.key()[1]), hash_(draw.hash()), item_(static_cast<std::uint32_t>(item)) {}

    POLYATTN_HOST_DEVICE bool drops_weights() const { return weights_ > 0; }
    POLYATTN_HOST_DEVICE bool drops_values() const { return values_ > 0; }

    POLYATTN_HOST_DEVICE double weight(index_t query, index_t key) const {
        std::uint32_t words[4] = {static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(query / 4), random_stream::weight_dropout | item_, hash_};
        detail::philox_rounds(words, key0_, key1_);
        return word(words, query) < weights_ ? 0 : keep_weight_;
    }
    /// Columns `column`, `column + 1`, .. of a row of Z after hop `hop`, within one block of four.
    template <class T, std::size_t count>
    POLYATTN_HOST_DEVICE void values(int hop, index_t row, index_t column, T (&mask)[count]) const {
        std::uint32_t words[4] = {static_cast<std::uint32_t>(column / 4) | static_cast<std::uint32_t>(hop) << 20, static_cast<std::uint32_t>(row), random_stream::value_dropout | item_, hash_};
        detail::philox_rounds(words, key0_, key1_);
        for (std::size_t i = 0; i < count; ++i) mask[i] = word(words, column + static_cast<index_t>(i)) < values_ ? T(0) : static_cast<T>(keep_value_);
    }
    /// The masks of the (batch, head) that is so many behind this one.
    POLYATTN_HOST_DEVICE DropoutMask of_item(offset_t item) const {
        DropoutMask mask = *this;
        mask.item_ += static_cast<std::uint32_t>(item);
        return mask;
    }
    /// The masks of another draw, by its hash().
    POLYATTN_HOST_DEVICE DropoutMask of_draw(std::uint32_t hash) const {
        DropoutMask mask = *this;
        mask.hash_ = hash;
        return mask;
    }
    /// Queries 4 * quad .. 4 * quad + 3 share one Philox block.
    std::array<double, 4> weights_of_four(index_t quad, index_t key) const {
        return mask(philox({static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(quad), random_stream::weight_dropout | item_, hash_}, {key0_, key1_}),
                    weights_, keep_weight_);
    }
    /// Columns 4 * quad .. 4 * quad + 3 of a row of Z after hop `hop`.
    std::array<double, 4> values_of_four(int hop, index_t row, index_t quad) const {
        const auto element = static_cast<std::uint32_t>(quad) | static_cast<std::uint32_t>(hop) << 20;
        return mask(philox({element, static_cast<std::uint32_t>(row), random_stream::value_dropout | item_, hash_}, {key0_, key1_}), values_, keep_value_);
    }

private:
    /// words[i % 4] by selection: indexed, the words would leave a GPU's registers.
    POLYATTN_HOST_DEVICE static constexpr std::uint32_t word(const std::uint32_t (&words)[4], index_t i) {
        const std::uint32_t low = i % 2 ? words[1] : words[0], high = i % 2 ? words[3] : words[2];
        return i % 4 < 2 ? low : high;
    }
    static std::uint64_t threshold(double p) { return static_cast<std::uint64_t>(p * 4294967296.); }
    static std::array<double, 4> mask(const std::array<std::uint32_t, 4>& words, std::uint64_t drop_below, double keep) {
        std::array<double, 4> factors{};
        for (std::size_t i = 0; i < 4; ++i) factors[i] = words[i] < drop_below ? 0 : keep;
        return factors;
    }

    std::uint64_t weights_ = 0, values_ = 0;
    double keep_weight_ = 1, keep_value_ = 1;
    std::uint32_t key0_ = 0, key1_ = 0, hash_ = 0, item_ = 0;
};

}  // namespace detail

POLYATTN_END_NAMESPACE
