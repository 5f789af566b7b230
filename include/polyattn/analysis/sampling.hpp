#pragma once
// What the samplers of SSA draw, computed and counted. Not part of the umbrella header.

#include <polyattn/plan/picture.hpp>
#include <polyattn/policy/sampler/sampler.hpp>

#include <numbers>

POLYATTN_BEGIN_NAMESPACE

/// A matrix of shares in [0, 1], row by row.
struct ShareMatrix {
    index_t rows = 0, columns = 0;
    std::vector<double> values;
    double& operator()(index_t row, index_t column) { return values[static_cast<std::size_t>(offset_t{row} * columns + column)]; }
    double operator()(index_t row, index_t column) const { return values[static_cast<std::size_t>(offset_t{row} * columns + column)]; }
};

/// P(key j is among the sources of window b) of LocallyBiased, [windows][keys]; `sigma` is a share of the keys, and a causal window's
/// sources behind a query's position count. By integration over the noise of key j of the distribution of its rank, a sum of independent
/// Bernoulli numbers; error below 1e-9. O(keys^3.5) steps, causal O(windows keys^3.5): for pictures and checks. Throws invalid_input.
/// Source: SSA (KDD 2023), figure of sampling probabilities.
inline ShareMatrix sampling_probability(index_t keys, index_t windows, double sigma, bool causal = false) {
    detail::require_windows("windows", windows, keys);
    detail::validate_sigma(sigma);
    ShareMatrix share{windows, keys, std::vector<double>(static_cast<std::size_t>(windows) * static_cast<std::size_t>(keys), 0.)};
    // Ranks of the first `count` keys; add(j, rank, probability).
    const auto ranks = [&](index_t count, auto&& add) {
        if (!detail::is_finite(sigma)) {
            for (index_t j = 0; j < count; ++j)
                for (index_t rank = 0; rank < count; ++rank) add(j, rank, 1. / count);
            return;
        }
        const double deviation = sigma * keys;
        std::vector<double> below(static_cast<std::size_t>(count) + 1);
        // A deviation. As functions of z the probabilities of ranks are some 1.25 / sqrt(count) wide or wider, and the error of the trapezoidal rule is
        // about exp(-2 (pi width steps)^2): 4e-14 for width steps = 1.25.
        const int steps = std::max(8, static_cast<int>(std::ceil(std::sqrt(double(count)))));
        for (index_t j = 0; j < count; ++j)
            for (int at = -9 * steps; at <= 9 * steps; ++at) {
                if (deviation == 0 && at != 0) continue;
                const double z = double(at) / steps, x = j + deviation * z;
                const double weight = deviation == 0 ? 1 : std::exp(-z * z / 2) / std::sqrt(2 * std::numbers::pi) / steps;
                std::fill(below.begin(), below.end(), 0.);
                below[0] = 1;
                index_t others = 0;
                for (index_t i = 0; i < count; ++i) {
                    if (i == j) continue;
                    const double p = deviation == 0 ? (i < j ? 1 : 0) : std::erfc((i - x) / deviation / std::numbers::sqrt2) / 2;
                    ++others;
                    for (index_t rank = others; rank > 0; --rank)
                        below[static_cast<std::size_t>(rank)] += p * (below[static_cast<std::size_t>(rank) - 1] - below[static_cast<std::size_t>(rank)]);
                    below[0] *= 1 - p;
                }
                for (index_t rank = 0; rank < count; ++rank) add(j, rank, weight * below[static_cast<std::size_t>(rank)]);
            }
    };
    if (causal)
        for (index_t b = 0; b < windows; ++b) {
            const Bounds window = detail::window_of(keys, windows, b);
            ranks(window.end, [&](index_t j, index_t rank, double p) { share(b, j) += rank >= window.begin ? p : 0; });
        }
    else {
        std::vector<index_t> owner;
        for (index_t b = 0; b < windows; ++b) owner.resize(static_cast<std::size_t>(detail::window_of(keys, windows, b).end), b);
        ranks(keys, [&](index_t j, index_t rank, double p) { share(owner[static_cast<std::size_t>(rank)], j) += p; });
    }
    return share;
}

/// How often a query saw a key in `draws` draws of a sampler, [queries][keys]; one query a window where all of a window see the same.
template <SamplerPolicy Sampler>
ShareMatrix sampling_frequency(const Sampler& sampler, index_t queries, index_t keys, bool causal, int draws, std::uint64_t seed) {
    detail::require(draws >= 1, "draws", "a number >= 1", draws);
    ShareMatrix share{queries, keys, std::vector<double>(static_cast<std::size_t>(queries) * static_cast<std::size_t>(keys), 0.)};
    for (int s = 0; s < draws; ++s) {
        const Plan plan = sampler.sample(queries, keys, {.seed = seed, .sample = static_cast<std::uint32_t>(s)}, causal);
        for (index_t i = 0; i < queries; ++i) plan.for_each_key(i, [&](index_t j) { share(i, j) += 1. / draws; });
    }
    return share;
}

/// Share of the keys whose values can have reached a query after 1 .. layers layers of sampled attention with residual connections, mean
/// over all queries and `draws` networks; in a causal network of those up to the query's position. O(draws layers pairs n / 64).
/// Source: SSA (KDD 2023), section 3.2.
template <SamplerPolicy Sampler>
std::vector<double> reachable_share(const Sampler& sampler, index_t n, int layers, bool causal, int draws, std::uint64_t seed) {
    detail::require(n >= 1, "n", "a number of tokens >= 1", n);
    detail::require(layers >= 1, "layers", "a number >= 1", layers);
    detail::require(draws >= 1, "draws", "a number >= 1", draws);
    const auto tokens = static_cast<std::size_t>(n), words = (tokens + 63) / 64;
    const double all = causal ? double(n) * (double(n) + 1) / 2 : double(n) * double(n);
    std::vector<double> share(static_cast<std::size_t>(layers), 0.);
    for (int s = 0; s < draws; ++s) {
        std::vector<std::uint64_t> reached(tokens * words, 0), next;
        for (std::size_t i = 0; i < tokens; ++i) reached[i * words + i / 64] = std::uint64_t{1} << i % 64;
        for (int layer = 0; layer < layers; ++layer) {
            const Plan plan = sampler.sample(n, n, {.seed = seed, .layer = static_cast<std::uint32_t>(layer), .sample = static_cast<std::uint32_t>(s)}, causal);
            next = reached;
            for (index_t i = 0; i < n; ++i)
                plan.for_each_key(i, [&](index_t j) {
                    for (std::size_t w = 0; w < words; ++w) next[static_cast<std::size_t>(i) * words + w] |= reached[static_cast<std::size_t>(j) * words + w];
                });
            std::swap(reached, next);
            offset_t count = 0;
            for (const std::uint64_t word : reached) count += std::popcount(word);
            share[static_cast<std::size_t>(layer)] += double(count) / all / draws;
        }
    }
    return share;
}

/// Multiplications of a transformer with SSA in `sampled` of its layers and `windows` windows, relative to the dense one:
/// 1 - (sampled / layers) (1 - 1 / windows) n / (n + 6 d). `fine_tuned` is the share of training that is dense.
/// Throws invalid_input. Source: SSA (KDD 2023), table 1, there n = 3072 or 4096, d = 1024.
inline double relative_compute(index_t layers, index_t sampled, index_t windows, index_t n, index_t d, double fine_tuned = 0) {
    detail::require(layers >= 1, "layers", "a number >= 1", layers);
    detail::require(sampled >= 0 && sampled <= layers, "sampled", [&] { return detail::text("a number of layers from 0 to ", layers); }, sampled);
    detail::require(windows >= 1, "windows", "a number >= 1", windows);
    detail::require(n >= 1, "n", "a number of tokens >= 1", n);
    detail::require(d >= 1, "d", "a number of columns >= 1", d);
    detail::require_in_range(fine_tuned, 0, 1, "fine_tuned", "a share from 0 to 1");
    const double c = 1 - double(sampled) / double(layers) * (1 - 1. / double(windows)) * double(n) / (double(n) + 6. * double(d));
    return (1 - fine_tuned) * c + fine_tuned;
}

/// Shares as grey pixels, each `pixel` x `pixel` large: white 0, black the largest.
inline Picture heat_map(const ShareMatrix& share, index_t pixel = 1) {
    detail::require(pixel >= 1, "pixel", "a number of pixels >= 1", pixel);
    Picture image{share.columns * pixel, share.rows * pixel, {}};
    double most = 0;
    for (const double value : share.values) most = std::max(most, value);
    for (index_t y = 0; y < image.height; ++y)
        for (index_t x = 0; x < image.width; ++x)
            image.pixels.push_back(static_cast<std::uint8_t>(std::lround(255 * (1 - (most > 0 ? share(y / pixel, x / pixel) / most : 0)))));
    return image;
}

POLYATTN_END_NAMESPACE
