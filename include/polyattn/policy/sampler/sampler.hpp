#pragma once
// The samplers of SSA, stochastically subsampled self-attention: "The information pathways hypothesis" (KDD 2023), section 3. All queries
// stay, keys are drawn without replacement, and the softmax over those kept renormalises. A draw is a pure function of the sampler, the
// numbers of queries and keys, and Draw; it is shared by all heads and, unless said otherwise, by the whole batch.

#include <polyattn/core/normal.hpp>
#include <polyattn/policy/pattern/concept.hpp>
#include <polyattn/policy/sampler/concept.hpp>

#include <cmath>
#include <limits>

POLYATTN_BEGIN_NAMESPACE

/// A number for each layer of a network: one for all, or growing evenly from the first to the last layer (Draw::layer).
class OverDepth {
public:
    OverDepth(double value) : OverDepth(value, value, 0) {}
    OverDepth(double first, double last, index_t layers) : first_(first), last_(last), layers_(layers) {}

    /// Throws invalid_input if there is no such layer.
    double at(std::uint32_t layer) const {
        if (layers_ == 0) return first_;
        detail::require(layer < static_cast<std::uint32_t>(layers_), "draw.layer", [&] { return detail::text("a layer of ", layers_); }, layer);
        return layers_ == 1 ? first_ : first_ + (last_ - first_) * layer / (layers_ - 1);
    }
    double first() const { return first_; }
    double last() const { return last_; }
    index_t layers() const { return layers_; }

private:
    double first_, last_;
    index_t layers_;
};
/// From `first` in layer 0 to `last` in layer layers - 1. SSA lets sigma grow with depth; the paper's ends are not known, examples here use
/// linear(.05, .25, layers).
inline OverDepth linear(double first, double last, index_t layers) { return {first, last, layers}; }

/// A sigma without bounds: every permutation is as likely as any other.
inline constexpr double infinite_sigma = std::numeric_limits<double>::infinity();

namespace detail {

inline void validate_sigma(const OverDepth& sigma) {
    require(sigma.layers() >= 0, "layers of sigma", "a number >= 0", sigma.layers());
    for (const double end : {sigma.first(), sigma.last()}) {
        const bool infinite = std::bit_cast<std::uint64_t>(end) == std::bit_cast<std::uint64_t>(infinite_sigma);
        require(infinite ? sigma.layers() == 0 : is_finite(end) && end >= 0 && end <= 16, "sigma", "a share of the tokens from 0 to 16, or infinite_sigma for all layers",
                is_finite(end) ? std::to_string(end) : infinite ? std::string("infinite_sigma at one end") : std::string("a value that is not finite"));
    }
}

/// i + noise_i in units of 2^-24 tokens, for the random word of i. The noise is normal with deviation `sigma` tokens; infinite: the place is the
/// noise alone.
class NoisyPlace {
public:
    explicit NoisyPlace(double sigma) : shuffles_(!is_finite(sigma)) {
        if (shuffles_) return;
        whole_ = static_cast<std::int64_t>(sigma);
        fraction_ = static_cast<std::int64_t>(std::ldexp(sigma - static_cast<double>(whole_), 32));
    }
    bool moves() const { return shuffles_ || whole_ != 0 || fraction_ != 0; }

    /// With the tables of normal deviates handed in: each backend keeps its own copy.
    POLYATTN_HOST_DEVICE std::int64_t operator()(index_t i, std::uint32_t word, const std::int32_t* quantiles, const std::int32_t* slopes) const {
        if (shuffles_) return word;
        const std::int64_t deviate = normal_deviate_from(word, quantiles, slopes);
        return (std::int64_t{i} << 24) + whole_ * deviate + ((fraction_ * deviate) >> 32);
    }

private:
    bool shuffles_;
    std::int64_t whole_ = 0, fraction_ = 0;
};

/// The stable order of i + noise_i, i < count: slot -> source. noise_i is normal with deviation `sigma` tokens; infinite: all orders are
/// equally likely. Numbers come from (draw, stream, line). O(count log count).
class NoisyOrder {
public:
    NoisyOrder(const Draw& draw, std::uint32_t stream, double sigma) : seed_(draw.seed), stream_(stream), hash_(draw.hash()), place_(sigma) {}
    std::span<const index_t> operator()(index_t count, std::uint32_t line) {
        order_.resize(static_cast<std::size_t>(count));
        std::iota(order_.begin(), order_.end(), 0);
        if (!place_.moves()) return order_;
        places_.resize(order_.size());
        RandomRow random(seed_, line, stream_, hash_);
        for (index_t i = 0; i < count; ++i) places_[static_cast<std::size_t>(i)] = {place_(i, random.next(), normal_quantiles.data(), normal_slopes.data()), i};
        std::sort(places_.begin(), places_.end());  // pairs: equal places keep their order
        for (std::size_t slot = 0; slot < order_.size(); ++slot) order_[slot] = places_[slot].second;
        return order_;
    }

private:
    std::uint64_t seed_;
    std::uint32_t stream_, hash_;
    NoisyPlace place_;
    std::vector<std::pair<std::int64_t, index_t>> places_;
    std::vector<index_t> order_;
};

/// Indices in ascending order, as a range where they are one.
inline IndexSequence ascending(std::vector<index_t> indices) {
    std::sort(indices.begin(), indices.end());
    if (!indices.empty() && indices.back() - indices.front() == static_cast<index_t>(indices.size()) - 1) return IndexSequence::range(indices.front(), indices.back() + 1);
    return IndexSequence::list(std::move(indices));
}

/// Window b of `windows` equal parts of [0, n), the first ones shorter where they do not divide it.
inline Bounds window_of(index_t n, index_t windows, index_t b) {
    return {static_cast<index_t>(offset_t{n} * b / windows), static_cast<index_t>(offset_t{n} * (b + 1) / windows)};
}

/// Rows see `sources`, in a causal plan those up to their own position.
inline void add_targets(PlanBuilder& builder, const Alignment& at, IndexSequence rows, IndexSequence sources, bool causal) {
    if (rows.empty() || sources.empty()) return;
    if (!causal) {
        builder.tile(std::move(rows), std::move(sources));
        return;
    }
    const IndexSequence r = rows, s = sources;
    builder.tile(std::move(rows), std::move(sources), [&](index_t row) { return std::pair{index_t{0}, s.lower_bound(static_cast<index_t>(at.position(r[row]) + 1))}; });
}
/// Queries whose positions lie in the window.
inline IndexSequence targets(const Alignment& at, Bounds window) {
    const auto query = [&](index_t position) { return static_cast<index_t>(std::clamp<offset_t>(offset_t{position} - at.keys + at.queries, 0, at.queries)); };
    return IndexSequence::range(query(window.begin), query(window.end));
}

inline void require_windows(const char* argument, index_t windows, index_t tokens) {
    require(windows >= 1 && (windows <= tokens || tokens == 0), argument, [&] { return text("a number from 1 to ", tokens, ", the tokens"); }, windows);
}
inline void require_not_more_queries(const char* sampler, index_t queries, index_t keys) {
    if (queries > keys) throw invalid_input(sampler, text("at most as many queries as the ", keys, " keys"), std::to_string(queries));
}

}  // namespace detail

/// All queries see the same k = max(1, round((1 - drop) n)) random keys of n. k n pairs, O(k log k) to draw. With `per_item` every batch
/// item has its own draw from its valid keys, k of its own number of them: no item of a ragged batch is left without keys.
/// No causal form, as early queries would be left without keys: there use LocallyBiased<L>{.sigma = infinite_sigma}.
/// Source: SSA (KDD 2023), section 3.1.
struct Unbiased {
    using policy_kind = sampler_kind;
    static constexpr bool has_causal_form = false;
    double drop = .5;
    bool per_item = false;

    void validate() const { detail::require_in_range(drop, 0, 1, "drop", "a share of the keys from 0 to 1"); }
    index_t kept(index_t keys) const { return keys == 0 ? 0 : std::max(index_t{1}, static_cast<index_t>(std::llround((1 - drop) * keys))); }

    Plan sample(index_t queries, index_t keys, const Draw& draw, bool) const { return draw_from(queries, keys, keys, 0, draw); }
    bool draws_per_item() const { return per_item; }
    Plan sample_item(index_t queries, index_t keys, index_t item, index_t key_length, const Draw& draw, bool) const {
        return draw_from(queries, keys, key_length, static_cast<std::uint32_t>(item), draw);
    }

private:
    Plan draw_from(index_t queries, index_t keys, index_t valid, std::uint32_t row, const Draw& draw) const {
        std::vector<index_t> sources;
        RandomRow(draw.seed, row, random_stream::sampled_keys, draw.hash()).distinct(valid, kept(valid), sources);
        return PlanBuilder(queries, keys).tile(IndexSequence::range(0, queries), detail::ascending(std::move(sources))).build();
    }
};

/// Keys are shuffled by noise, then cut into L windows: pi = the order of j + n_j, n_j normal with deviation sigma x keys, and the queries of
/// window b see the keys pi[bw .. (b + 1)w). sigma = 0 is block-diagonal attention, infinite_sigma a random partition. Causal: window b
/// shuffles the keys before its own end and keeps the last w slots, of which a query sees those up to its own position: at least one.
/// Query i stands at position i + keys - queries. n^2 / L pairs; drawing costs O(n log n), causal O(L n log n).
/// Throws invalid_input if there are fewer keys than windows, or more queries than keys; of a short item of a ragged batch windows may be empty.
/// Source: SSA (KDD 2023), sections 3.1 and 3.2.
template <int L>
struct LocallyBiased {
    static_assert(L >= 1, "polyattn: LocallyBiased<L> needs L >= 1 windows");
    using policy_kind = sampler_kind;
    OverDepth sigma = .1;

    void validate() const { detail::validate_sigma(sigma); }
    Plan sample(index_t queries, index_t keys, const Draw& draw, bool causal) const { return sample_padded(queries, keys, queries, keys, draw, causal); }
    Plan sample_padded(index_t valid_queries, index_t valid_keys, index_t queries, index_t keys, const Draw& draw, bool causal) const {
        detail::require_windows("L of LocallyBiased", L, keys);
        detail::require_not_more_queries("LocallyBiased", valid_queries, valid_keys);
        const detail::Alignment at{valid_queries, valid_keys};
        PlanBuilder builder(queries, keys);
        detail::NoisyOrder noisy(draw, random_stream::shuffled_keys, sigma.at(draw.layer) * valid_keys);
        std::span<const index_t> order;
        if (!causal) order = noisy(valid_keys, 0);
        for (index_t b = 0; b < L; ++b) {
            const Bounds window = detail::window_of(valid_keys, L, b);
            const IndexSequence rows = detail::targets(at, window);
            if (rows.empty()) continue;
            if (causal) order = noisy(window.end, static_cast<std::uint32_t>(b));
            const auto sources = order.subspan(static_cast<std::size_t>(window.begin), static_cast<std::size_t>(window.size()));
            detail::add_targets(builder, at, rows, detail::ascending({sources.begin(), sources.end()}), causal);
        }
        return builder.build();
    }
};

/// The same for a picture of height x width tokens, rows after one another: noise shuffles the columns within each row, then the rows
/// within each column, with a permutation for each line; sigma is a share of the line. One of two partitions:
/// - `row_windows`: that many windows of whole rows (generation). Causal: as LocallyBiased, by rows, and the token's own position.
/// - `window`: inside each window x window part of the picture (partition shifted by `shift`, parts at the rim cut off, as Swin's) four
///   sub-windows; sources stay inside their part, sigma is a share of `window` (classification). No causal form.
/// Throws invalid_input unless queries == keys == height * width. Source: SSA (KDD 2023), section 3.4.
struct Grid2D {
    using policy_kind = sampler_kind;
    index_t height = 8;
    index_t width = 8;
    index_t row_windows = 0;
    index_t window = 0;
    index_t shift = 0;
    OverDepth sigma = .25;

    void validate() const {
        detail::require(height >= 1, "height", "a number of pixels >= 1", height);
        detail::require(width >= 1, "width", "a number of pixels >= 1", width);
        detail::require((row_windows > 0) != (window > 0), "row_windows and window", "one of them", detail::text(row_windows, " and ", window));
        if (row_windows > 0) detail::require_windows("row_windows", row_windows, height);
        if (window > 0) detail::require(window % 2 == 0, "window", "an even number of pixels", window);
        detail::require(shift >= 0 && shift < std::max(window, index_t{1}), "shift", "a number of pixels below window", shift);
        detail::validate_sigma(sigma);
    }
    Plan sample(index_t queries, index_t keys, const Draw& draw, bool causal) const {
        check_picture(queries, keys, causal);
        PlanBuilder builder(queries, keys);
        if (row_windows > 0) sample_rows(builder, draw, causal);
        else sample_parts(builder, draw);
        return builder.build();
    }
    void check_picture(index_t queries, index_t keys, bool causal) const {
        detail::require_square("Grid2D", queries, keys);
        if (offset_t{height} * width != keys) throw invalid_input("height x width", detail::text(keys, " tokens"), detail::text(height, " x ", width));
        if (window > 0 && causal) throw invalid_input("window", "row_windows in a causal pattern", std::to_string(window));
    }

private:
    /// Tokens of the picture's part [top, top + rows) x [left, left + columns) after both shuffles, slot by slot. `part` tells lines apart.
    std::vector<index_t> shuffled(index_t top, index_t left, index_t rows, index_t columns, detail::NoisyOrder& across, detail::NoisyOrder& down, std::uint32_t part) const {
        std::vector<index_t> tokens(static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns)), moved(tokens.size());
        const auto slot = [&](index_t y, index_t x) { return static_cast<std::size_t>(y) * static_cast<std::size_t>(columns) + static_cast<std::size_t>(x); };
        const auto line = [&](index_t i) { return part * static_cast<std::uint32_t>(std::max(height, width)) + static_cast<std::uint32_t>(i); };
        for (index_t y = 0; y < rows; ++y) {
            const auto order = across(columns, line(y));
            for (index_t x = 0; x < columns; ++x) tokens[slot(y, x)] = (top + y) * width + left + order[static_cast<std::size_t>(x)];
        }
        for (index_t x = 0; x < columns; ++x) {
            const auto order = down(rows, line(x));
            for (index_t y = 0; y < rows; ++y) moved[slot(y, x)] = tokens[slot(order[static_cast<std::size_t>(y)], x)];
        }
        return moved;
    }

    void sample_rows(PlanBuilder& builder, const Draw& draw, bool causal) const {
        const detail::Alignment at{height * width, height * width};
        const double share = sigma.at(draw.layer);
        detail::NoisyOrder across(draw, random_stream::shuffled_columns, share * width), down(draw, random_stream::shuffled_rows, share * height);
        std::vector<index_t> tokens;
        if (!causal) tokens = shuffled(0, 0, height, width, across, down, 0);
        for (index_t b = 0; b < row_windows; ++b) {
            const Bounds rows = detail::window_of(height, row_windows, b);
            if (causal) tokens = shuffled(0, 0, rows.end, width, across, down, static_cast<std::uint32_t>(b));
            std::vector<index_t> sources(tokens.begin() + offset_t{rows.begin} * width, tokens.begin() + offset_t{rows.end} * width);
            detail::add_targets(builder, at, IndexSequence::range(rows.begin * width, rows.end * width), detail::ascending(std::move(sources)), causal);
        }
    }

    void sample_parts(PlanBuilder& builder, const Draw& draw) const {
        const double deviation = sigma.at(draw.layer) * window;
        detail::NoisyOrder across(draw, random_stream::shuffled_columns, deviation), down(draw, random_stream::shuffled_rows, deviation);
        const index_t first = shift > 0 ? shift - window : 0, half = window / 2;
        std::uint32_t part = 0;
        for (index_t y = first; y < height; y += window)
            for (index_t x = first; x < width; x += window, ++part) {
                const index_t top = std::max(y, index_t{0}), bottom = std::min(y + window, height), left = std::max(x, index_t{0}), right = std::min(x + window, width);
                if (top >= bottom || left >= right) continue;
                const std::vector<index_t> tokens = shuffled(top, left, bottom - top, right - left, across, down, part);
                for (const index_t sub_y : {y, y + half})
                    for (const index_t sub_x : {x, x + half}) {
                        std::vector<index_t> rows, sources;
                        for (index_t row = std::max(sub_y, top); row < std::min(sub_y + half, bottom); ++row)
                            for (index_t column = std::max(sub_x, left); column < std::min(sub_x + half, right); ++column) {
                                rows.push_back(row * width + column);
                                sources.push_back(tokens[static_cast<std::size_t>((row - top) * (right - left) + column - left)]);
                            }
                        if (!rows.empty()) builder.tile(detail::ascending(std::move(rows)), detail::ascending(std::move(sources)));
                    }
            }
    }
};

/// Indices handed in: the keys' positions are cut into as many equal windows as there are lists, and the queries that stand in window b
/// (query i at i + keys - queries) see the keys sources[b], in any order; in a causal pattern those up to their own position. A single
/// list is for all queries. An empty list leaves its queries without keys: their output is 0. Throws invalid_input for indices that are
/// no keys or repeat, and for more queries than keys with several lists.
struct Given {
    using policy_kind = sampler_kind;
    std::vector<std::vector<index_t>> sources;

    /// The first k of a permutation, for all queries.
    static Given first_of(std::span<const index_t> permutation, index_t k) {
        detail::require(k >= 0 && k <= static_cast<index_t>(permutation.size()), "k", [&] { return detail::text("a number from 0 to ", permutation.size()); }, k);
        return {{{permutation.begin(), permutation.begin() + k}}};
    }
    /// A permutation (slot -> source) cut into windows.
    static Given windows_of(std::span<const index_t> permutation, index_t windows) {
        const auto n = static_cast<index_t>(permutation.size());
        detail::require_windows("windows", windows, n);
        Given given;
        for (index_t b = 0; b < windows; ++b) {
            const Bounds window = detail::window_of(n, windows, b);
            given.sources.emplace_back(permutation.begin() + window.begin, permutation.begin() + window.end);
        }
        return given;
    }

    void validate() const { detail::require(!sources.empty(), "sources", "a list for each window", "none"); }
    Plan sample(index_t queries, index_t keys, const Draw& draw, bool causal) const { return sample_padded(queries, keys, queries, keys, draw, causal); }
    /// Windows are those of the valid keys and may be empty; indices behind the valid keys are left out.
    Plan sample_padded(index_t valid_queries, index_t valid_keys, index_t queries, index_t keys, const Draw&, bool causal) const {
        const auto windows = static_cast<index_t>(sources.size());
        detail::require_windows("windows of sources", windows, keys);
        if (windows > 1) detail::require_not_more_queries("Given", valid_queries, valid_keys);
        const detail::Alignment at{valid_queries, valid_keys};
        PlanBuilder builder(queries, keys);
        for (index_t b = 0; b < windows; ++b) {
            std::vector<index_t> sorted = sources[static_cast<std::size_t>(b)];
            std::sort(sorted.begin(), sorted.end());
            for (std::size_t i = 0; i < sorted.size(); ++i) {
                detail::require(sorted[i] >= 0 && sorted[i] < keys, "sources", [&] { return detail::text("indices of [0, ", keys, ")"); }, sorted[i]);
                detail::require(i == 0 || sorted[i] != sorted[i - 1], "sources", "no key twice in a window", sorted[i]);
            }
            sorted.erase(std::lower_bound(sorted.begin(), sorted.end(), valid_keys), sorted.end());
            const IndexSequence rows = windows == 1 ? IndexSequence::range(0, valid_queries) : detail::targets(at, detail::window_of(valid_keys, windows, b));
            detail::add_targets(builder, at, rows, detail::ascending(std::move(sorted)), causal);
        }
        return builder.build();
    }
};

static_assert(SamplerPolicy<Unbiased> && SamplerPolicy<LocallyBiased<4>> && SamplerPolicy<Grid2D> && SamplerPolicy<Given>);

POLYATTN_END_NAMESPACE
