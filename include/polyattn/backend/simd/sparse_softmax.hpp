#pragma once
// The attention operator A of one head: its weights once, then A x as often as wanted.

#include <polyattn/backend/simd/edges.hpp>
#include <polyattn/backend/simd/scores.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

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

template <class T, class A, class Bias>
class SparseSoftmax {
public:
    using Tiles = Tiling<T, A>;

    SparseSoftmax(const Head<T, Bias>& head, const Workers& workers)
        : head_(head), plan_(*head.plan), schedule_(plan_.template lowered<Schedule>()), workers_(workers),
          columns_(padded(head.v.cols, Tiles::lanes)), has_edges_(plan_.edges().count() > 0),
          masked_(schedule_.is_masked() || head.key_length < head.k.rows || head.query_length < head.q.rows) {
        Arena& arena = workers[0];
        q_ = readable_rows(head.q, has_edges_, Tiles::lanes, arena);
        k_ = readable_rows(head.k, has_edges_, Tiles::lanes, arena);
        logsumexp_ = arena.take<T>(head.q.rows);
        alive_ = arena.take<std::uint8_t>(head.q.rows);
        const auto lane_count = static_cast<offset_t>(schedule_.groups().size()) * group_size;
        lane_reference_ = arena.take<T>(lane_count);
        lane_factor_ = arena.take<T>(lane_count);
        edge_weights_ = arena.take<T>(plan_.edges().count());
        plain_edge_weights_ = head.dropout.drops_weights() ? arena.take<T>(plan_.edges().count()) : edge_weights_;
        scratch_ = arena.take<Scratch>(workers.count());
        for (int w = 0; w < workers.count(); ++w) {
            Scratch& scratch = scratch_[static_cast<std::size_t>(w)] = Scratch{};
            scratch.queries = workers[w].template take<T>(offset_t{head.q.cols} * group_size).data();
            scratch.weights = workers[w].template take<T>(offset_t{Tiles::key_block} * group_size).data();
            scratch.out = workers[w].template take<T>(offset_t{columns_} * group_size).data();
            scratch.keys.prepare(schedule_.list_capacity(), head.k.cols, workers[w]);
            scratch.values.prepare(schedule_.list_capacity(), columns_, workers[w]);
        }
    }

    /// Columns of V padded to whole vectors: the width of every x and out below.
    index_t columns() const { return columns_; }
    /// The row has at least one key with a weight.
    bool is_alive(index_t row) const { return alive_[static_cast<std::size_t>(row)] != 0; }
    T logsumexp(index_t row) const { return is_alive(row) ? static_cast<T>(double(logsumexp_[static_cast<std::size_t>(row)]) * ln_2) : empty_row<T>(); }
    bool has_shared_rows() const { return schedule_.has_shared_rows(); }

    /// All weights, or where they exceed the budget the logsumexp that they are computed from again.
    void prepare() {
        choose_storage();
        relative_ = stored_;
        score_edges();
        for_each_group([&](std::size_t g, Scratch& scratch) {
            GroupState<T> state;
            online_weights(schedule_.groups()[g], scratch, state, [](const Block&, const Piece&, const T*) {});
            keep_state(g, state);
        });
        for_each_row([&](index_t i) { finish_row(i); });
    }

    /// out = walk A x + teleport v in one pass that stores no weights. Not for plans with shared rows.
    void apply_once(Rows<T> x, Rows<T> v, const Hop& hop, T* out, std::ptrdiff_t out_stride) {
        relative_ = true;
        score_edges();
        start(x);
        for_each_row([&](index_t i) {
            if (schedule_.slots(i).empty()) finish_row(i);
        });
        start_rows(v, hop, out, out_stride);
        for_each_group([&](std::size_t g, Scratch& scratch) {
            const Group& group = schedule_.groups()[g];
            GroupState<T> state;
            online_weights(group, scratch, state, [&](const Block& block, const Piece& piece, const T* weights) {
                accumulate(block, piece, weights, x, scratch, state.out != nullptr);
                state.out = scratch.out;
            });
            if (!state.out) std::fill_n(scratch.out, offset_t{columns_} * group_size, T(0));
            keep_state(g, state);
            for_each_lane(group, [&](std::size_t, index_t row) { finish_row(row); });
            store_group(g, scratch.out, v, hop, out, out_stride);
        });
        add_edges(x, hop, out, out_stride);
    }

    /// out = walk A x + teleport v on rows that have keys, 0 on the others. After prepare().
    void apply(Rows<T> x, Rows<T> v, const Hop& hop, T* out, std::ptrdiff_t out_stride) {
        start(x);
        start_rows(v, hop, out, out_stride);
        for_each_group([&](std::size_t g, Scratch& scratch) {
            bool started = false;
            final_weights(schedule_.groups()[g], scratch, true, [&](const Block& block, const Piece& piece, const T* weights) {
                accumulate(block, piece, weights, x, scratch, started);
                started = true;
            });
            if (!started) std::fill_n(scratch.out, offset_t{columns_} * group_size, T(0));
            store_group(g, scratch.out, v, hop, out, out_stride);
        });
        add_edges(x, hop, out, out_stride);
    }

protected:
    struct Scratch {
        T *queries, *weights, *out;
        GatheredRows<T> keys, values;
    };

    // --- iteration ---

    /// f(group index, scratch), in parallel; one after the other where groups share rows.
    template <class F>
    void for_each_group(F&& f) {
        constexpr offset_t unit = 4;
        const auto count = static_cast<offset_t>(schedule_.groups().size());
        const auto run = [&](offset_t u, int worker) {
            for (offset_t g = u * unit; g < std::min(count, (u + 1) * unit); ++g) f(static_cast<std::size_t>(g), scratch_[static_cast<std::size_t>(worker)]);
        };
        const offset_t units = (count + unit - 1) / unit;
        if (has_shared_rows())
            for (offset_t u = 0; u < units; ++u) run(u, 0);
        else parallel_for(units, run);
    }

    template <class F>
    void for_each_row(F&& f) {
        constexpr index_t unit = 64;
        parallel_for((head_.q.rows + unit - 1) / unit, [&](offset_t u, int) {
            const auto first = static_cast<index_t>(u) * unit;
            for (index_t i = first; i < std::min(first + unit, head_.q.rows); ++i) f(i);
        });
    }

    /// f(lane, row) for the working lanes of a group.
    template <class F>
    static void for_each_lane(const Group& group, F&& f) {
        for (std::size_t lane = 0; lane < group_size; ++lane)
            if (group.active >> lane & 1) f(lane, group.rows[lane]);
    }

    template <class F>
    void for_each_piece_block(const Group& group, F&& f) {
        for (const Piece& piece : schedule_.pieces(group))
            for_each_block(group, piece, plan_.tiles()[static_cast<std::size_t>(piece.tile)], head_.query_length, head_.key_length, Tiles::key_block,
                           [&](const Block& block) { f(block, piece); });
    }

    /// Edges of a row whose key is not padding.
    std::pair<offset_t, offset_t> edge_range(index_t i) const {
        if (!has_edges_) return {0, 0};
        const Edges& edges = plan_.edges();
        const offset_t first = edges.offsets[static_cast<std::size_t>(i)], last = edges.offsets[static_cast<std::size_t>(i) + 1];
        if (i >= head_.query_length) return {first, first};
        if (head_.key_length == plan_.keys()) return {first, last};
        const auto begin = edges.keys.begin();
        return {first, std::lower_bound(begin + first, begin + last, head_.key_length) - begin};
    }

    // --- weights ---

    void choose_storage() {
        const auto bytes = static_cast<std::size_t>(schedule_.weight_rows()) * group_size * sizeof(T);
        stored_ = bytes <= head_.weight_budget;
        if (stored_) store_ = workers_[0].template take<T>(schedule_.weight_rows() * group_size);
    }
    T* stored_weights(const Block& block, const Piece& piece) { return &store_[static_cast<std::size_t>(piece.weights + block.first - piece.span.begin) * group_size]; }

    void pack_queries(const Group& group, Scratch& scratch) const {
        pack_rows(group.rows, q_, head_.q.cols, static_cast<T>(head_.scale * log2_e), scratch.queries);
    }
    Rows<T> block_keys(const Block& block, const Piece& piece, Scratch& scratch) const {
        const Rows<T> keys = scratch.keys.get(block.tile->keys, piece.list_slot, k_);
        return {keys.row(block.first), keys.stride};
    }

    /// Weights of a group relative to a running reference, f(block, piece, weights) after each block.
    template <class F>
    void online_weights(const Group& group, Scratch& scratch, GroupState<T>& state, F&& f) {
        state.start();
        state.columns = columns_;
        pack_queries(group, scratch);
        for_each_piece_block(group, [&](const Block& block, const Piece& piece) {
            T* const weights = stored_ ? stored_weights(block, piece) : scratch.weights;
            if (!state.weights || !stored_) state.weights = weights;
            score_block<true, T, A>(block, head_, group, scratch.queries, block_keys(block, piece, scratch), state, weights);
            if (head_.dropout.drops_weights()) drop_weights(block, head_.dropout, group, weights);
            f(block, piece, weights);
        });
    }

    /// f(block, piece, weights) with the weights that belong to lane_factor_ (stored), or final ones computed again.
    template <class F>
    void final_weights(const Group& group, Scratch& scratch, bool dropped, F&& f) {
        const bool read = stored_ && (dropped || !head_.dropout.drops_weights());
        GroupState<T> state;
        if (!read) start_final(group, scratch, state);
        for_each_piece_block(group, [&](const Block& block, const Piece& piece) {
            T* const weights = read ? stored_weights(block, piece) : scratch.weights;
            if (!read) compute_final(group, block, piece, scratch, state, dropped, weights);
            f(block, piece, weights);
        });
    }

    void start_final(const Group& group, Scratch& scratch, GroupState<T>& state) {
        state.start();
        for (std::size_t lane = 0; lane < group_size; ++lane)
            if (is_alive(group.rows[lane])) state.reference[lane] = logsumexp_[static_cast<std::size_t>(group.rows[lane])];
        pack_queries(group, scratch);
    }
    void compute_final(const Group& group, const Block& block, const Piece& piece, Scratch& scratch, GroupState<T>& state, bool dropped, T* weights) {
        score_block<false, T, A>(block, head_, group, scratch.queries, block_keys(block, piece, scratch), state, weights);
        if (dropped && head_.dropout.drops_weights()) drop_weights(block, head_.dropout, group, weights);
    }

    void keep_state(std::size_t g, const GroupState<T>& state) {
        std::copy_n(state.reference, group_size, &lane_reference_[g * group_size]);
        std::copy_n(state.sum, group_size, &lane_factor_[g * group_size]);
    }

    /// Base-2 scores of all edges.
    void score_edges() {
        if (!has_edges_) return;
        const index_t dim = padded(head_.q.cols, Tiles::lanes);
        for_each_row([&](index_t i) {
            const auto [first, last] = edge_range(i);
            for (offset_t e = first; e < last; ++e) {
                const index_t key = plan_.edges().keys[static_cast<std::size_t>(e)];
                T score = dot<T, A>(q_.row(i), k_.row(key), dim) * static_cast<T>(head_.scale * log2_e);
                if constexpr (!std::is_same_v<Bias, NoBias>) score += static_cast<T>(double((*head_.bias)(head_.batch, head_.head, i, key)) * log2_e);
                edge_weights_[static_cast<std::size_t>(e)] = score;
            }
        });
    }
    std::span<T> edges_of(std::span<T> all, index_t i) const {
        const auto [first, last] = edge_range(i);
        return all.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(last - first));
    }

    /// Joins a row's lanes and edges: its logsumexp, the factors of its lanes, the weights of its edges.
    void finish_row(index_t i) {
        const auto at = static_cast<std::size_t>(i);
        const std::span<T> scores = edges_of(edge_weights_, i);
        const auto slots = schedule_.slots(i);
        T highest = no_reference<T>, total = 0;
        for (const offset_t slot : slots)
            if (!is_zero(lane_factor_[static_cast<std::size_t>(slot)])) highest = std::max(highest, lane_reference_[static_cast<std::size_t>(slot)]);
        for (const T score : scores) highest = std::max(highest, score);
        const auto rebase = [&](offset_t slot) { return std::exp2(lane_reference_[static_cast<std::size_t>(slot)] - highest); };
        for (const offset_t slot : slots)
            if (!is_zero(lane_factor_[static_cast<std::size_t>(slot)])) total += lane_factor_[static_cast<std::size_t>(slot)] * rebase(slot);
        if (!scores.empty()) total += exp2_in_place<T, A>(scores, highest);
        alive_[at] = i < head_.query_length && !is_zero(total);
        logsumexp_[at] = is_alive(i) ? highest + std::log2(total) : T(0);
        const T factor = is_alive(i) ? 1 / total : T(0);
        for (const offset_t slot : slots) {
            T& lane = lane_factor_[static_cast<std::size_t>(slot)];
            lane = is_alive(i) && !is_zero(lane) ? factor * rebase(slot) : T(0);
        }
        finish_edges(i, factor);
    }

    void finish_edges(index_t i, T factor) {
        const auto [first, last] = edge_range(i);
        for (offset_t e = first; e < last; ++e) {
            const auto at = static_cast<std::size_t>(e);
            const T weight = is_alive(i) ? edge_weights_[at] * factor : T(0);
            plain_edge_weights_[at] = weight;
            if (head_.dropout.drops_weights()) edge_weights_[at] = weight * static_cast<T>(head_.dropout.weight(i, plan_.edges().keys[at]));
            else edge_weights_[at] = weight;
        }
    }

    // --- A x ---

    void start(Rows<T> x) {
        if (masked_) non_finite_.mark(x, head_.v.rows, head_.v.cols, workers_[0]);
        for (Scratch& scratch : scratch_) scratch.values.forget();
    }

    void accumulate(const Block& block, const Piece& piece, const T* weights, Rows<T> x, Scratch& scratch, bool add) {
        const Rows<T> values = scratch.values.get(block.tile->keys, piece.list_slot, x);
        weighted_sum_block<T, A>(block, weights, {values.row(block.first), values.stride}, non_finite_, columns_, scratch.out, add);
    }

    static void scaled_row(const T* v, T factor, index_t columns, T* out) {
        // A teleport of 0 must not meet a NaN in v.
        if (is_zero(factor)) std::fill_n(out, columns, T(0));
        else
            for (index_t c = 0; c < columns; ++c) out[c] = factor * v[c];
    }

    /// Rows that no group stores begin with their teleport: those without tiles, and all where groups add to shared rows.
    void start_rows(Rows<T> v, const Hop& hop, T* out, std::ptrdiff_t out_stride) {
        for_each_row([&](index_t i) {
            if (has_shared_rows() || schedule_.slots(i).empty())
                scaled_row(v.row(i), is_alive(i) ? static_cast<T>(hop.teleport) : T(0), columns_, out + i * out_stride);
        });
    }

    void store_group(std::size_t g, const T* sums, Rows<T> v, const Hop& hop, T* out, std::ptrdiff_t out_stride) {
        using V = Vec<T, A>;
        constexpr int width = Tiles::lanes;
        const T teleport = static_cast<T>(hop.teleport), walk = static_cast<T>(hop.walk);
        for_each_lane(schedule_.groups()[g], [&](std::size_t lane, index_t row) {
            T* to = out + row * out_stride;
            const T* sum = sums + lane * static_cast<std::size_t>(columns_);
            if (!is_alive(row)) {
                if (!has_shared_rows()) std::fill_n(to, columns_, T(0));
                return;
            }
            const V factor(relative_ ? walk * lane_factor_[g * group_size + lane] : walk);
            const T* base = has_shared_rows() ? to : is_zero(teleport) ? nullptr : v.row(row);
            const V base_factor(has_shared_rows() ? T(1) : teleport);
            for (index_t c = 0; c < columns_; c += width) {
                const V value = factor * V::load_unaligned(sum + c);
                (base ? multiply_add(base_factor, V::load_unaligned(base + c), value) : value).store_unaligned(to + c);
            }
        });
    }

    void add_edges(Rows<T> x, const Hop& hop, T* out, std::ptrdiff_t out_stride) {
        if (!has_edges_) return;
        const Edges& edges = plan_.edges();
        for_each_row([&](index_t i) {
            if (!is_alive(i)) return;
            const auto [first, last] = edge_range(i);
            const index_t* keys = edges.keys.data() + first;
            const T* weights = edge_weights_.data() + first;
            gather_sum<T, A>(last - first, [=](offset_t e) { return keys[e]; }, [=](offset_t e) { return weights[e]; }, x, static_cast<T>(hop.walk), columns_,
                             out + i * out_stride);
        });
    }

    const Head<T, Bias>& head_;
    const Plan& plan_;
    const Schedule& schedule_;
    const Workers& workers_;
    index_t columns_;
    bool has_edges_, masked_;
    bool stored_ = false;    // weights lie in store_
    bool relative_ = false;  // .. and want lane_factor_
    Rows<T> q_, k_;
    std::span<T> logsumexp_;  // base 2
    std::span<std::uint8_t> alive_;
    std::span<T> lane_reference_, lane_factor_;  // lane_factor_ holds the sum until finish_row
    std::span<T> edge_weights_, plain_edge_weights_;
    std::span<T> store_;
    std::span<Scratch> scratch_;
    NonFiniteRows non_finite_;
};

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
