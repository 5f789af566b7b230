#pragma once
// From queries and keys to weights pow2(score - reference), 16 queries a key: online, or from a known logsumexp.

#include <polyattn/backend/head.hpp>
#include <polyattn/backend/simd/exp2.hpp>
#include <polyattn/backend/simd/fetch_ahead.hpp>
#include <polyattn/backend/simd/rows.hpp>
#include <polyattn/backend/simd/tiles.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// A score may exceed its row's reference by 2^raise_above before the reference is raised: rescaling at each new maximum is slow.
template <class T>
inline constexpr T raise_above = 24;
/// Score of a masked pair: finite, yet its weight is exactly 0 and it never becomes a reference.
template <class T>
inline constexpr T masked_score = std::numeric_limits<T>::lowest();
/// Threshold of a row that has no reference yet.
template <class T>
inline constexpr T no_reference = std::numeric_limits<T>::lowest() / 2;

/// x[e] = pow2(x[e] - shift) in place; returns the sum.
template <class T, class A>
T exp2_in_place(std::span<T> x, T shift) {
    using V = Vec<T, A>;
    constexpr std::size_t width = V::size;
    V sum(T(0));
    std::size_t e = 0;
    for (; e + width <= x.size(); e += width) {
        const V weight = pow2(V::load_unaligned(&x[e]) - V(shift));
        weight.store_unaligned(&x[e]);
        sum = sum + weight;
    }
    if (e < x.size()) {
        alignas(64) T rest[width];
        std::fill_n(rest, width, masked_score<T>);
        std::copy(x.begin() + static_cast<std::ptrdiff_t>(e), x.end(), rest);
        const V weight = pow2(V::load_aligned(rest) - V(shift));
        weight.store_aligned(rest);
        std::copy_n(rest, x.size() - e, x.begin() + static_cast<std::ptrdiff_t>(e));
        sum = sum + weight;
    }
    return lane_sum(sum);
}

/// The highest of x and `least`.
template <class T, class A>
T highest_of(std::span<const T> x, T least) {
    using V = Vec<T, A>;
    constexpr std::size_t width = V::size;
    std::size_t e = 0;
    if (x.size() >= width) {
        V highest(least);
        for (; e + width <= x.size(); e += width) highest = xsimd::max(V::load_unaligned(&x[e]), highest);
        alignas(64) T lane[width];
        highest.store_aligned(lane);
        for (const T value : lane) least = std::max(least, value);
    }
    for (; e < x.size(); ++e) least = std::max(least, x[e]);
    return least;
}

/// True for +0 by its bits: NaN == 0 may hold under -ffast-math.
inline bool is_zero(float x) { return std::bit_cast<std::uint32_t>(x) == 0; }
inline bool is_zero(double x) { return std::bit_cast<std::uint64_t>(x) == 0; }

/// Softmax state of 16 queries, base-2 logarithms. Weights so far are relative to `reference`.
template <class T>
struct alignas(64) GroupState {
    T reference[group_size];
    T threshold[group_size];
    T sum[group_size];
    T* weights;        // of the block at hand and ..
    T* out;            // .. the output accumulated so far follow a new reference
    index_t columns;
    bool has_out;

    void start(T* output, index_t output_columns) {
        std::fill_n(reference, group_size, T(0));
        std::fill_n(threshold, group_size, no_reference<T>);
        std::fill_n(sum, group_size, T(0));
        weights = nullptr;
        out = output;
        columns = output_columns;
        has_out = false;
    }
};

/// What the 16 queries of a group see of some consecutive key positions.
struct Block {
    const Tile* tile;
    index_t first;                           // position in the tile's keys
    index_t keys;
    Lanes lanes;                             // relative to `first`
    index_t all_begin, all_end;              // seen by every lane
    bool masked;
    std::span<const index_t> excluded;       // keys, ascending

    index_t key(index_t p) const { return tile->keys[first + p]; }
    bool is_excluded(index_t p) const { return !excluded.empty() && std::binary_search(excluded.begin(), excluded.end(), key(p)); }
    bool is_seen(int lane, index_t p) const {
        const Bounds bounds = lanes[static_cast<std::size_t>(lane)];
        return p >= bounds.begin && p < bounds.end && !is_excluded(p);
    }
    const Lanes* mask() const { return masked ? &lanes : nullptr; }
};

/// A group's part of the key positions `range` (of whole span_units), without keys and queries that are padding. No keys: nothing.
inline Block make_block(const Group& group, const Piece& piece, const Tile& tile, Bounds range, index_t query_length, index_t key_length) {
    const index_t limit = tile.keys.lower_bound(key_length);
    const index_t first = std::max(range.begin, piece.span.begin), end = std::min({range.end, piece.span.end, limit});
    Block block{&tile, first, 0, {}, 0, 0, false, {}};
    if (end <= first) return block;
    block.keys = std::min({range.end, piece.span.end, (end + span_unit - 1) / span_unit * span_unit}) - first;
    block.all_end = block.keys;
    index_t highest_row = 0;
    for (const index_t row : group.rows) highest_row = std::max(highest_row, row);
    if (!piece.masked && highest_row < query_length && end == first + block.keys) {
        block.lanes.begin.fill(0);
        block.lanes.end.fill(block.keys);
    } else {
        index_t all_begin = 0, all_end = block.keys, any = 0;
        for (std::size_t lane = 0; lane < group_size; ++lane) {
            index_t from = std::max(piece.lanes.begin[lane], first) - first, to = std::min(piece.lanes.end[lane], end) - first;
            const bool nothing = (to <= from) | (group.rows[lane] >= query_length);
            from = nothing ? 0 : from;
            to = nothing ? 0 : to;
            block.lanes.begin[lane] = from;
            block.lanes.end[lane] = to;
            all_begin = std::max(all_begin, from);
            all_end = std::min(all_end, to);
            any = std::max(any, to);
        }
        if (any == 0) {
            block.keys = 0;
            return block;
        }
        block.all_begin = all_begin <= all_end ? all_begin : 0;
        block.all_end = all_begin <= all_end ? all_end : 0;
    }
    if (!tile.excluded.empty()) {
        const auto from = std::lower_bound(tile.excluded.begin(), tile.excluded.end(), block.key(0));
        block.excluded = {from, std::upper_bound(from, tile.excluded.end(), block.key(block.keys - 1))};
    }
    block.masked = block.all_begin > 0 || block.all_end < block.keys || !block.excluded.empty();
    return block;
}

/// A bias that hangs on the distance alone, evaluated once a distance: rows of 16 queries load theirs side by side.
template <class T, class Bias>
class DistanceTable {
public:
    static constexpr bool exists = DistanceBias<Bias>;

    void fill([[maybe_unused]] const Head<T, Bias>& head, [[maybe_unused]] std::pair<index_t, index_t> distances, [[maybe_unused]] Arena& arena) {
        if constexpr (exists) {
            lowest_ = std::max(distances.first, 1 - head.k.rows);
            highest_ = std::min(distances.second, head.q.rows - 1);
            if (highest_ < lowest_) return;
            values_ = arena.take<T>(offset_t{highest_} - lowest_ + 1).data();
            for (index_t d = lowest_; d <= highest_; ++d)
                values_[d - lowest_] = static_cast<T>(double((*head.bias)(head.batch, head.head, std::max(d, 0), std::max(d, 0) - d)) * log2_e);
        }
    }
    T at(index_t query, index_t key) const { return values_[query - key - lowest_]; }
    bool covers(index_t query, index_t key) const { return query - key >= lowest_ && query - key <= highest_; }
    /// Of queries first_query .. + 15; null where that leaves the table.
    const T* row(index_t first_query, index_t key) const {
        return first_query - key >= lowest_ && first_query - key + group_size - 1 <= highest_ ? values_ + (first_query - key - lowest_) : nullptr;
    }

private:
    T* values_ = nullptr;
    index_t lowest_ = 0, highest_ = -1;
};

/// Raises the reference of the lanes whose `highest` relative score passed their threshold, by `rise`; `scale` is what was relative to the old one's factor.
template <class T, class A>
void raise_state(GroupState<T>& state, const T* highest, T* rise, T* scale) {
    using V = Vec<T, A>;
    for (int part = 0; part < group_size; part += lanes<T, A>) {
        const V threshold = V::load_aligned(state.threshold + part), own = V::load_aligned(highest + part);
        const auto raised = own > threshold;
        const V by = xsimd::select(raised, own, V(T(0)));
        by.store_aligned(rise + part);
        (V::load_aligned(state.reference + part) + by).store_aligned(state.reference + part);
        // A row that had no reference has nothing to rescale.
        const V factor = xsimd::select(raised & (threshold > V(no_reference<T>)), pow2(V(T(0)) - by), V(T(1)));
        factor.store_aligned(scale + part);
        xsimd::select(raised, V(raise_above<T>), threshold).store_aligned(state.threshold + part);
        (V::load_aligned(state.sum + part) * factor).store_aligned(state.sum + part);
    }
}

/// Raises the reference of the lanes whose tile maximum passed their threshold. Rare, out of line. `score` is [keys][16].
template <class T, class A>
POLYATTN_NOINLINE void raise_reference(T* score, int keys, const T* tile_highest, GroupState<T>& state, const T* weights_end) {
    using V = Vec<T, A>;
    constexpr int lanes = Tiling<T, A>::lanes;
    alignas(64) T rise[group_size], scale[group_size];
    raise_state<T, A>(state, tile_highest, rise, scale);
    for (int part = 0; part < group_size; part += lanes) {
        const V by = V::load_aligned(rise + part), factor = V::load_aligned(scale + part);
        for (int i = 0; i < keys; ++i) (V::load_aligned(score + i * group_size + part) - by).store_aligned(score + i * group_size + part);
        for (T* weights = state.weights; weights < weights_end; weights += group_size)
            (V::load_aligned(weights + part) * factor).store_aligned(weights + part);
    }
    if (state.has_out)
        for (int lane = 0; lane < group_size; ++lane) scale_row<T, A>(state.out + lane * state.columns, scale[lane], state.columns, state.out + lane * state.columns);
}

/// Adds base-2 biases to the scores [keys][16] from position p on, at least where pairs are seen.
template <class T, class A, class Bias>
POLYATTN_NOINLINE void add_biases(const Block& block, const Head<T, Bias>& head, const DistanceTable<T, Bias>& distances, const Group& group, index_t p, int keys, T* scores) {
    using V = Vec<T, A>;
    for (int i = 0; i < keys; ++i) {
        const index_t key = block.key(p + i);
        if constexpr (DistanceTable<T, Bias>::exists)
            if (const T* const near = group.consecutive ? distances.row(group.rows[0], key) : nullptr) {
                for (int part = i * group_size; part < (i + 1) * group_size; part += lanes<T, A>)
                    (V::load_aligned(scores + part) + V::load_unaligned(near + part - i * group_size)).store_aligned(scores + part);
                continue;
            }
        for (int lane = 0; lane < group_size; ++lane) {
            if (!block.is_seen(lane, p + i)) continue;
            const index_t row = group.rows[static_cast<std::size_t>(lane)];
            T& score = scores[i * group_size + lane];
            if constexpr (DistanceTable<T, Bias>::exists) score += distances.at(row, key);
            else score += static_cast<T>(double((*head.bias)(head.batch, head.head, row, key)) * log2_e);
        }
    }
}

/// Masks what is not seen of the scores [keys][16] from position p on.
template <class T, class A>
POLYATTN_NOINLINE void mask_scores(const Block& block, index_t p, int keys, T* scores) {
    using V = Vec<T, A>;
    constexpr int lanes = Tiling<T, A>::lanes;
    alignas(64) T begin[group_size], end[group_size];
    for (std::size_t lane = 0; lane < group_size; ++lane) {
        begin[lane] = static_cast<T>(block.lanes.begin[lane]);
        end[lane] = static_cast<T>(block.lanes.end[lane]);
    }
    for (int part = 0; part < group_size; part += lanes) {
        const V first = V::load_aligned(begin + part), last = V::load_aligned(end + part);
        for (int i = 0; i < keys; ++i) {
            T* const score = scores + i * group_size + part;
            const V position(static_cast<T>(p + i));
            xsimd::select((position >= first) & (position < last), V::load_aligned(score), V(masked_score<T>)).store_aligned(score);
        }
    }
    if (block.excluded.empty()) return;
    for (int i = 0; i < keys; ++i)
        if (block.is_excluded(p + i)) std::fill_n(scores + i * group_size, group_size, masked_score<T>);
}

/// A group whose weights of a block are made. The state's `weights` are those of the block's first key.
template <class T>
struct ScoredGroup {
    const Group* group;
    const Block* block;
    const T* queries;
    GroupState<T>* state;
    T* weights_at(index_t position) const { return state->weights + offset_t{position - block->first} * group_size; }
};

/// Weights, [key][16], of the keys at `positions` of a tile (of several groups a multiple of score_keys); `keys` are the tile's. Online: relative to the states'
/// references, which follow the scores, and summed. Otherwise relative to the references as they are (the rows' logsumexp), so they are final.
template <bool Online, class T, class A, class Bias, std::size_t Groups>
POLYATTN_NOINLINE void score_block(Bounds positions, const Head<T, Bias>& head, const DistanceTable<T, Bias>& distances, const std::array<ScoredGroup<T>, Groups>& groups, Rows<T> keys,
                                   FetchAhead<T>& ahead) {
    using V = Vec<T, A>;
    using K = Tiling<T, A>;
    constexpr int G = Groups, of_group = K::group_vectors, vectors = G * of_group, lanes = K::lanes;
    const auto group_of = [&](int vector) POLYATTN_INLINE_LAMBDA -> const ScoredGroup<T>& { return groups[static_cast<std::size_t>(vector % vectors / of_group)]; };
    const auto tile = [&]<int M>(std::integral_constant<int, M>, index_t at) POLYATTN_INLINE_LAMBDA {
        const index_t position = positions.begin + at;
        ahead();
        TileScores<T, A, M, G> score;
        V start[vectors];
        expand<vectors>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((start[I] = V(T(0)) - V::load_aligned(group_of(I).state->reference + I % of_group * lanes)), ...); });
        expand<M * vectors>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((score[I] = start[I % vectors]), ...); });
        score_tile<M, G, T, A>(score, keys.row(position), keys.stride, groups[0].queries, groups[G - 1].queries - groups[0].queries, head.q.cols);
        T* out[G];
        for (int g = 0; g < G; ++g) out[g] = groups[static_cast<std::size_t>(g)].weights_at(position);
        const auto place = [&](int vector) POLYATTN_INLINE_LAMBDA { return out[vector % vectors / of_group] + vector / vectors * group_size + vector % of_group * lanes; };
        // f(Ints<..>) with the indices of group g's vectors.
        const auto expand_own = [&](auto g, auto&& f) POLYATTN_INLINE_LAMBDA {
            expand<M * of_group>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { f(Ints<(I / of_group * vectors + g * of_group + I % of_group)...>{}); });
        };
        // Rare cases are out of line and go through memory, where the weights will be: the tile itself must never have an address, or
        // it lives there.
        const auto through_memory = [&](auto g, auto&& f) POLYATTN_INLINE_LAMBDA {
            expand_own(g, [&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA {
                (score[I].store_aligned(place(I)), ...);
                f();
                ((score[I] = V::load_aligned(place(I))), ...);
            });
        };
        unroll<G>([&](auto g) POLYATTN_INLINE_LAMBDA {
            const ScoredGroup<T>& own = groups[g];
            const Block& block = *own.block;
            const index_t p = position - block.first;
            if constexpr (!std::is_same_v<Bias, NoBias>) {
                const T* near = nullptr;  // of the last key
                if constexpr (DistanceTable<T, Bias>::exists)
                    if (own.group->consecutive && !block.tile->keys.is_list() && distances.row(own.group->rows[0], block.key(p))) near = distances.row(own.group->rows[0], block.key(p + M - 1));
                if (near)  // queries and keys run on: the rows of later keys lie before
                    expand_own(g, [&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA {
                        ((score[I] = score[I] + V::load_unaligned(near + (M - 1 - I / vectors) + I % of_group * lanes)), ...);
                    });
                else through_memory(g, [&] { add_biases<T, A>(block, head, distances, *own.group, p, M, out[g]); });
            }
            if (p < block.all_begin || p + M > block.all_end || !block.excluded.empty()) through_memory(g, [&] { mask_scores<T, A>(block, p, M, out[g]); });
        });
        if constexpr (Online) {
            V highest[vectors];
            expand<vectors>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((highest[I] = score[I]), ...); });
            expand<M * vectors>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((highest[I % vectors] = xsimd::max(highest[I % vectors], score[I])), ...); });
            bool raise = false;
            expand<vectors>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((raise |= xsimd::any(highest[I] > V::load_aligned(group_of(I).state->threshold + I % of_group * lanes))), ...); });
            if (raise) [[unlikely]] {
                alignas(64) T tile_highest[G * group_size];
                expand<vectors>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { (highest[I].store_aligned(tile_highest + I * lanes), ...); });
                unroll<G>([&](auto g) POLYATTN_INLINE_LAMBDA {
                    through_memory(g, [&] { raise_reference<T, A>(out[g], M, tile_highest + g * group_size, *groups[g].state, out[g]); });
                });
            }
        }
        expand<M * vectors>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA {
            ((score[I] = pow2(score[I])), ...);
            (score[I].store_aligned(place(I)), ...);
        });
        if constexpr (Online)
            expand<vectors>([&]<int... J>(Ints<J...>) POLYATTN_INLINE_LAMBDA {
                V sum[vectors] = {V::load_aligned(group_of(J).state->sum + J % of_group * lanes)...};
                expand<M * vectors>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((sum[I % vectors] = sum[I % vectors] + score[I]), ...); });
                (sum[J].store_aligned(group_of(J).state->sum + J % of_group * lanes), ...);
            });
    };
    for_each_key_tile<K::score_keys, (G > 1)>(positions.size(), tile);
}

/// Multiplies the weights of a block by dropout's mask.
template <class T>
void drop_weights(const Block& block, const DropoutMask& mask, const Group& group, T* weights) {
    for (index_t p = 0; p < block.keys; ++p, weights += group_size) {
        const index_t key = block.key(p);
        index_t quad = -1;
        std::array<double, 4> factors{};
        for (std::size_t lane = 0; lane < group_size; ++lane) {
            const index_t row = group.rows[lane];
            if (row / 4 != quad) factors = mask.weights_of_four(quad = row / 4, key);
            weights[lane] *= static_cast<T>(factors[static_cast<std::size_t>(row % 4)]);
        }
    }
}

/// weighted_sum; `careful`, row by row over what each query sees, for values that are not all finite.
template <class T, class A>
void weighted_sum_block(const Block& block, const T* weights, Rows<T> x, index_t columns, T* out, bool add, bool careful) {
    if (!careful || !block.masked) return weighted_sum<T, A>(weights, x.data, x.stride, block.keys, block.mask(), columns, out, columns, add);
    if (!add) std::fill_n(out, group_size * columns, T(0));
    for (int lane = 0; lane < group_size; ++lane)
        for (index_t p = 0; p < block.keys; ++p)
            if (block.is_seen(lane, p)) add_scaled<T, A>(weights[p * group_size + lane], x.row(p), columns, out + lane * columns);
}

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
