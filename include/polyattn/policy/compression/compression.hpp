#pragma once

#include <polyattn/core/error.hpp>
#include <polyattn/core/normal.hpp>
#include <polyattn/core/rng.hpp>
#include <polyattn/core/rounding.hpp>
#include <polyattn/policy/compression/concept.hpp>

#include <algorithm>
#include <array>
#include <cmath>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

template <class T>
void add_row_to(MatrixView<const T> x, index_t i, T factor, MatrixView<T> y, index_t j) {
    const T* const from = x.row(i);
    T* const to = y.row(j);
    if (x.col_stride == 1 && y.col_stride == 1)
        for (index_t c = 0; c < y.cols; ++c) to[c] += factor * from[c];
    else
        for (index_t c = 0; c < y.cols; ++c) to[c * y.col_stride] += factor * from[c * x.col_stride];
}
template <class T>
void zero_row_of(MatrixView<T> y, index_t j) {
    for (index_t c = 0; c < y.cols; ++c) y(j, c) = 0;
}
inline index_t segments(index_t tokens, index_t length) { return tokens / length + (tokens % length != 0); }

}  // namespace detail

/// Means of L consecutive tokens; a ragged last segment is divided by what it has. Several lengths are resolutions, for
/// nn::AdaptiveMultiResolution. O(n d). Source: AdaMRA (2021), equation 7.
template <index_t... L>
struct SegmentMeans {
    static_assert(sizeof...(L) >= 1 && ((L >= 1) && ...), "polyattn: SegmentMeans<L...> needs lengths L >= 1");
    using policy_kind = compression_kind;
    static constexpr bool is_linear = true;
    static constexpr std::array<index_t, sizeof...(L)> lengths = {L...};

    index_t landmarks(index_t tokens) const { return detail::segments(tokens, lengths[0]); }

    template <class T>
    void compress(MatrixView<const T> x, Compressed, MatrixView<T> y) const {
        mean(x, lengths[0], y);
    }
    template <class T>
    void compress_adjoint(MatrixView<const T> x, Compressed, MatrixView<const T> d_y, MatrixView<T> d_x, std::span<double>) const {
        spread(x.rows, lengths[0], d_y, d_x);
    }
    template <class T>
    static void mean(MatrixView<const T> x, index_t length, MatrixView<T> y) {
        for (index_t j = 0; j < y.rows; ++j) {
            const index_t first = j * length, last = std::min(first + length, x.rows);
            detail::zero_row_of(y, j);
            for (index_t i = first; i < last; ++i) detail::add_row_to(x, i, 1 / static_cast<T>(last - first), y, j);
        }
    }
    template <class T>
    static void spread(index_t tokens, index_t length, MatrixView<const T> d_y, MatrixView<T> d_x) {
        for (index_t i = 0; i < tokens; ++i) {
            const index_t j = i / length, first = j * length, last = std::min(first + length, tokens);
            detail::add_row_to(d_y, j, 1 / static_cast<T>(last - first), d_x, i);
        }
    }
};

/// Largest entries of L consecutive tokens, column by column; the gradient goes to the first of them. Not linear: not for diffusion.
template <index_t L>
struct SegmentMax {
    static_assert(L >= 1, "polyattn: SegmentMax<L> needs a length L >= 1");
    using policy_kind = compression_kind;
    static constexpr bool is_linear = false;

    index_t landmarks(index_t tokens) const { return detail::segments(tokens, L); }

    template <class T>
    void compress(MatrixView<const T> x, Compressed, MatrixView<T> y) const {
        for_each(x, [&](index_t j, index_t c, index_t largest) { y(j, c) = x(largest, c); });
    }
    template <class T>
    void compress_adjoint(MatrixView<const T> x, Compressed, MatrixView<const T> d_y, MatrixView<T> d_x, std::span<double>) const {
        for_each(x, [&](index_t j, index_t c, index_t largest) { d_x(largest, c) += d_y(j, c); });
    }

private:
    template <class T, class F>
    static void for_each(MatrixView<const T> x, F&& f) {
        for (index_t first = 0; first < x.rows; first += L)
            for (index_t c = 0; c < x.cols; ++c) {
                index_t largest = first;
                for (index_t i = first + 1; i < std::min(first + L, x.rows); ++i)
                    if (x(i, c) > x(largest, c) || detail::is_nan(x(i, c))) largest = i;
                f(first / L, c, largest);
            }
    }
};

/// y_j = sum over t < width of w_t x_(j stride + t), with learned weights [keys, values][width], shared by columns and heads; behind the last token
/// there is nothing. O(n d width / stride). Source: Liu et al., "Generating Wikipedia by summarizing long sequences" (2018), memory-compressed
/// attention, with one weight a position.
struct StridedConvolution {
    using policy_kind = compression_kind;
    static constexpr bool is_linear = true;
    index_t stride = 1, width = 1;
    std::vector<double> table = {1, 1};

    /// Starts as segment means.
    static StridedConvolution means(index_t stride) {
        detail::require(stride >= 1, "stride", "a number of tokens >= 1", stride);
        return {stride, stride, std::vector<double>(static_cast<std::size_t>(2 * stride), 1. / stride)};
    }
    void validate() const {
        detail::require(stride >= 1, "stride", "a number of tokens >= 1", stride);
        detail::require(width >= 1, "width", "a number of tokens >= 1", width);
        detail::require(table.size() == static_cast<std::size_t>(2 * width), "table", [&] { return detail::text(2 * width, " weights"); }, table.size());
        for (const double weight : table) detail::require(detail::is_finite(weight), "table", "finite weights", "one that is not");
    }
    index_t landmarks(index_t tokens) const { return detail::segments(tokens, stride); }

    template <class T>
    void compress(MatrixView<const T> x, Compressed what, MatrixView<T> y) const {
        for (index_t j = 0; j < y.rows; ++j) {
            detail::zero_row_of(y, j);
            for (index_t t = 0; t < width && j * stride + t < x.rows; ++t) detail::add_row_to(x, j * stride + t, static_cast<T>(table[at(what, t)]), y, j);
        }
    }
    template <class T>
    void compress_adjoint(MatrixView<const T> x, Compressed what, MatrixView<const T> d_y, MatrixView<T> d_x, std::span<double> d_table) const {
        for (index_t j = 0; j < d_y.rows; ++j)
            for (index_t t = 0; t < width && j * stride + t < x.rows; ++t) {
                detail::add_row_to(d_y, j, static_cast<T>(table[at(what, t)]), d_x, j * stride + t);
                double& d_weight = d_table[at(what, t)];
                for (index_t c = 0; c < x.cols; ++c) d_weight += double(d_y(j, c)) * double(x(j * stride + t, c));
            }
    }

private:
    std::size_t at(Compressed what, index_t t) const { return static_cast<std::size_t>((what == Compressed::keys ? 0 : width) + t); }
};

/// y = E x with learned weights [keys, values][landmarks][tokens], shared by heads, for up to `tokens` tokens; those behind a shorter text have no
/// part. O(n m d). Source: Wang et al., "Linformer" (2020), equation 7, layerwise head sharing.
struct LinearProjection {
    using policy_kind = compression_kind;
    static constexpr bool is_linear = true;
    index_t tokens = 1, rows = 1;
    std::vector<double> table = {1, 1};

    /// Normal weights of variance 1 / rows, the paper's start.
    static LinearProjection drawn(index_t tokens, index_t rows, std::uint64_t seed = 0) {
        LinearProjection made{tokens, rows, {}};
        detail::require(tokens >= 1, "tokens", "a number of tokens >= 1", tokens);
        detail::require(rows >= 1, "rows", "a number of landmarks >= 1", rows);
        RandomRow random(seed, 0, random_stream::parameters);
        made.table.resize(2 * static_cast<std::size_t>(tokens) * static_cast<std::size_t>(rows));
        for (double& weight : made.table) weight = normal_deviate(random.next()) * 0x1p-24 / std::sqrt(double(rows));
        return made;
    }
    void validate() const {
        detail::require(tokens >= 1, "tokens", "a number of tokens >= 1", tokens);
        detail::require(rows >= 1, "rows", "a number of landmarks >= 1", rows);
        const std::size_t wanted = 2 * static_cast<std::size_t>(tokens) * static_cast<std::size_t>(rows);
        detail::require(table.size() == wanted, "table", [&] { return detail::text(wanted, " weights"); }, table.size());
        for (const double weight : table) detail::require(detail::is_finite(weight), "table", "finite weights", "one that is not");
    }
    void check_tokens(index_t given) const {
        detail::require(given <= tokens, "tokens of LinearProjection", [&] { return detail::text("at most ", tokens); }, given);
    }
    index_t landmarks(index_t given) const { return given > 0 ? rows : 0; }

    template <class T>
    void compress(MatrixView<const T> x, Compressed what, MatrixView<T> y) const {
        for (index_t j = 0; j < y.rows; ++j) {
            detail::zero_row_of(y, j);
            for (index_t i = 0; i < x.rows; ++i) detail::add_row_to(x, i, static_cast<T>(table[at(what, j, i)]), y, j);
        }
    }
    template <class T>
    void compress_adjoint(MatrixView<const T> x, Compressed what, MatrixView<const T> d_y, MatrixView<T> d_x, std::span<double> d_table) const {
        for (index_t j = 0; j < d_y.rows; ++j)
            for (index_t i = 0; i < x.rows; ++i) {
                detail::add_row_to(d_y, j, static_cast<T>(table[at(what, j, i)]), d_x, i);
                double& d_weight = d_table[at(what, j, i)];
                for (index_t c = 0; c < x.cols; ++c) d_weight += double(d_y(j, c)) * double(x(i, c));
            }
    }

    /// Where the weight of token i in landmark j stands in the table.
    std::size_t at(Compressed what, index_t j, index_t i) const {
        return (static_cast<std::size_t>(what == Compressed::keys ? 0 : rows) + static_cast<std::size_t>(j)) * static_cast<std::size_t>(tokens) + static_cast<std::size_t>(i);
    }
};

/// Centroids of clusters of each head's keys, and the means of their values: Lloyd's iterations from evenly spaced keys, ties to the lowest
/// cluster; a cluster that runs empty takes the key farthest from its centroid. Deterministic; gradients take the clusters as fixed.
/// O(iterations n clusters d).
struct KMeans {
    using policy_kind = compression_kind;
    static constexpr bool is_linear = true;
    index_t clusters = 16;
    index_t iterations = 5;

    void validate() const {
        detail::require(clusters >= 1, "clusters", "a number of clusters >= 1", clusters);
        detail::require(iterations >= 0, "iterations", "a number >= 0", iterations);
    }
    index_t landmarks(index_t tokens) const { return std::min(clusters, tokens); }

    /// The clusters of one head.
    struct Bound {
        std::vector<index_t> cluster;  // of each key
        std::vector<index_t> sizes;
        std::vector<double> centroids;  // [clusters][dim]

        /// The cluster whose centroid is nearest to row i, the first of equal ones, and its squared distance.
        template <class T>
        std::pair<index_t, double> nearest(MatrixView<const T> x, index_t i) const {
            std::pair<index_t, double> best{0, 0};
            const double* centroid = centroids.data();
            for (index_t j = 0; j < static_cast<index_t>(sizes.size()); ++j, centroid += x.cols) {
                double distance = 0;
                for (index_t c = 0; c < x.cols; ++c) {
                    const double apart = double(x(i, c)) - centroid[c];
                    distance += detail::rounded_product(apart, apart);
                }
                if (j == 0 || distance < best.second) best = {j, distance};
            }
            return best;
        }

        template <class T>
        void compress(MatrixView<const T> x, Compressed, MatrixView<T> y) const {
            for (index_t j = 0; j < y.rows; ++j) detail::zero_row_of(y, j);
            for (index_t i = 0; i < x.rows; ++i) detail::add_row_to(x, i, share<T>(i), y, cluster[static_cast<std::size_t>(i)]);
        }
        template <class T>
        void compress_adjoint(MatrixView<const T> x, Compressed, MatrixView<const T> d_y, MatrixView<T> d_x, std::span<double>) const {
            for (index_t i = 0; i < x.rows; ++i) detail::add_row_to(d_y, cluster[static_cast<std::size_t>(i)], share<T>(i), d_x, i);
        }

    private:
        template <class T>
        T share(index_t i) const {
            return 1 / static_cast<T>(sizes[static_cast<std::size_t>(cluster[static_cast<std::size_t>(i)])]);
        }
    };
    template <class T>
    Bound bind(MatrixView<const T> keys) const {
        const index_t count = landmarks(keys.rows);
        const auto dim = static_cast<std::size_t>(keys.cols);
        Bound bound{std::vector<index_t>(static_cast<std::size_t>(keys.rows)), std::vector<index_t>(static_cast<std::size_t>(count)), std::vector<double>(static_cast<std::size_t>(count) * dim)};
        for (index_t j = 0; j < count; ++j)
            for (index_t c = 0; c < keys.cols; ++c)
                bound.centroids[static_cast<std::size_t>(j) * dim + static_cast<std::size_t>(c)] = double(keys(static_cast<index_t>(offset_t{keys.rows} * j / count), c));
        std::vector<double> distances(static_cast<std::size_t>(keys.rows));
        for (index_t iteration = 0; iteration <= iterations; ++iteration) {
            std::fill(bound.sizes.begin(), bound.sizes.end(), 0);
            for (index_t i = 0; i < keys.rows; ++i) {
                const auto [nearest, shortest] = bound.nearest(keys, i);
                bound.cluster[static_cast<std::size_t>(i)] = nearest;
                distances[static_cast<std::size_t>(i)] = shortest;
                ++bound.sizes[static_cast<std::size_t>(nearest)];
            }
            for (index_t j = 0; j < count; ++j) {
                if (bound.sizes[static_cast<std::size_t>(j)] > 0) continue;
                index_t farthest = -1;
                for (index_t i = 0; i < keys.rows; ++i)
                    if (bound.sizes[static_cast<std::size_t>(bound.cluster[static_cast<std::size_t>(i)])] > 1 &&
                        (farthest < 0 || distances[static_cast<std::size_t>(i)] > distances[static_cast<std::size_t>(farthest)]))
                        farthest = i;
                --bound.sizes[static_cast<std::size_t>(bound.cluster[static_cast<std::size_t>(farthest)])];
                bound.cluster[static_cast<std::size_t>(farthest)] = j;
                distances[static_cast<std::size_t>(farthest)] = 0;
                bound.sizes[static_cast<std::size_t>(j)] = 1;
            }
            std::fill(bound.centroids.begin(), bound.centroids.end(), 0);
            for (index_t i = 0; i < keys.rows; ++i) {
                const auto j = static_cast<std::size_t>(bound.cluster[static_cast<std::size_t>(i)]);
                for (index_t c = 0; c < keys.cols; ++c) bound.centroids[j * dim + static_cast<std::size_t>(c)] += double(keys(i, c));
            }
            for (std::size_t at = 0; at < bound.centroids.size(); ++at) bound.centroids[at] /= bound.sizes[at / dim];
        }
        return bound;
    }
};

static_assert(CompressionPolicy<SegmentMeans<2, 8>> && CompressionPolicy<SegmentMax<4>> && CompressionPolicy<StridedConvolution> && CompressionPolicy<LinearProjection> && CompressionPolicy<KMeans>);

POLYATTN_END_NAMESPACE
