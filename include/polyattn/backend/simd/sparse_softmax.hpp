#pragma once
// The attention operator A of one head: its weights once, then A x as often as wanted.

#include <polyattn/backend/simd/edges.hpp>
#include <polyattn/backend/simd/scores.hpp>
#include <polyattn/backend/simd/unit_softmax.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

template <class T, class A, class Bias, class MatrixUnit = MatrixUnitOf<T, A>>
class SparseSoftmax {
public:
    using Tiles = Tiling<T, A>;
    static constexpr bool has_unit = !std::is_void_v<MatrixUnit>;

    SparseSoftmax(const Head<T, Bias>& head, const Workers& workers)
        : head_(head), plan_(*head.plan), schedule_(plan_.template lowered<Schedule>()), workers_(workers), dim_(padded(head.q.cols, Tiles::lanes)),
          columns_(padded(head.v.cols, Tiles::lanes)), has_edges_(plan_.edges().count() > 0),
          masked_(schedule_.is_masked() || head.key_length < head.k.rows || head.query_length < head.q.rows) {
        Arena& arena = workers[0];
        q_ = readable_rows(head.q, has_edges_, Tiles::lanes, arena);
        k_ = readable_rows(head.k, has_edges_, Tiles::lanes, arena, reads_often());
        logsumexp_ = arena.take<T>(head.q.rows);
        alive_ = arena.take<std::uint8_t>(head.q.rows);
        const auto lane_count = static_cast<offset_t>(schedule_.groups().size()) * group_size;
        lane_reference_ = arena.take<T>(lane_count);
        lane_factor_ = arena.take<T>(lane_count);
        edge_weights_ = arena.take<T>(plan_.edges().count());
        plain_edge_weights_ = head.dropout.drops_weights() ? arena.take<T>(plan_.edges().count()) : edge_weights_;
        distances_.fill(head, schedule_.distances(), arena);
        scratch_ = arena.take<Scratch>(workers.count());
        for (int w = 0; w < workers.count(); ++w) {
            Arena& own = workers[w];
            Scratch& scratch = scratch_[static_cast<std::size_t>(w)] = Scratch{};
            scratch.states = own.take<GroupState<T>>(Schedule::most_groups).data();
            scratch.queries = own.take<T>(offset_t{Schedule::most_groups} * head.q.cols * group_size).data();
            scratch.weights = own.take<T>(offset_t{Tiles::key_block} * group_size).data();
            scratch.out = own.take<T>(offset_t{Schedule::most_groups} * columns_ * group_size).data();
            scratch.keys.prepare(schedule_.list_capacity(), head.k.cols, own);
            scratch.values.prepare(schedule_.list_capacity(), columns_, own);
        }
        if (workers.count() == 1) scratch_[0].ahead.start(head.next, schedule_.weight_rows() / (Tiles::score_groups * Tiles::score_keys));
    }

    /// Columns of V padded to whole vectors: the width of every x and out below.
    index_t columns() const { return columns_; }
    /// The row has at least one key with a weight.
    bool is_alive(index_t row) const { return alive_[static_cast<std::size_t>(row)] != 0; }
    T logsumexp(index_t row) const { return is_alive(row) ? static_cast<T>(double(logsumexp_[static_cast<std::size_t>(row)]) * ln_2) : empty_row<T>(); }
    bool has_shared_rows() const { return schedule_.has_shared_rows(); }
    /// So many queries see a key on average that a copy of the keys and values costs little.
    bool reads_often() const { return queries_of_a_key() >= 256; }
    offset_t queries_of_a_key() const { return schedule_.weight_rows() * group_size / std::max(head_.k.rows, index_t{1}); }

    /// All weights, or where they exceed the budget the logsumexp that they are computed from again.
    void prepare(bool wants_logsumexp) {
        choose_storage();
        relative_ = stored_;
        score_edges();
        if (stored_) {
            const offset_t references = most_blocks() * group_size;
            for (int w = 0; w < workers_.count(); ++w) scratch_[static_cast<std::size_t>(w)].block_references = workers_[w].template take<T>(references).data();
        }
        for_each_unit([&](const Unit& unit, Scratch& scratch) {
            online_weights(unit, k_, scratch, [](const UnitBlock&) {});
            if (stored_) join_blocks(unit, scratch);
            finish_unit(unit, scratch, wants_logsumexp || !stored_);
        });
        parallel_rows(head_.q.rows, [&](index_t i) {
            if (!rows_are_lanes() || schedule_.slots(i).empty()) finish_row(i, wants_logsumexp || !stored_);
        });
    }

    /// out = walk A x + teleport v in one pass that stores no weights. Not for plans with shared rows.
    void apply_once(Rows<T> x, Rows<T> v, const Hop& hop, T* out, std::ptrdiff_t out_stride, bool wants_logsumexp) {
        relative_ = true;
        score_edges();
        start(x, false);
        parallel_rows(head_.q.rows, [&](index_t i) {
            if (schedule_.slots(i).empty()) finish_row(i, wants_logsumexp);
        });
        start_rows(v, hop, out, out_stride);
        const bool on_unit = prepare_matrix_unit(x);
        for_each_unit([&](const Unit& unit, Scratch& scratch) {
            if (!on_unit || !sum_on_matrix_unit(unit, scratch))
                twice_if_masked(unit, scratch, [&](bool careful) {
                    online_weights(unit, x, scratch, [&](const UnitBlock& at) { accumulate(at, x, scratch, careful); });
                });
            finish_unit(unit, scratch, wants_logsumexp);
            if (!rows_are_lanes())
                for (std::size_t g = unit.first; g < unit.last; ++g) for_each_lane(schedule_.groups()[g], [&](std::size_t, index_t row) { finish_row(row, wants_logsumexp); });
            store_unit(unit, scratch, v, hop, out, out_stride);
        });
        add_edges(hop, out, out_stride, false);
    }

    /// out = walk A x + teleport v on rows that have keys, 0 on the others. After prepare(). `continued`: x is the last out.
    void apply(Rows<T> x, Rows<T> v, const Hop& hop, T* out, std::ptrdiff_t out_stride, bool continued, bool more) {
        start(x, continued);
        start_rows(v, hop, out, out_stride);
        for_each_unit([&](const Unit& unit, Scratch& scratch) {
            twice_if_masked(unit, scratch, [&](bool careful) {
                for (std::size_t slot = 0; slot < unit.groups(); ++slot) state(scratch, slot).has_out = false;
                final_weights(unit, scratch, true, [&](const UnitBlock& at) { accumulate(at, x, scratch, careful); });
            });
            store_unit(unit, scratch, v, hop, out, out_stride);
        });
        add_edges(hop, out, out_stride, more);
    }

protected:
    struct Scratch {
        GroupState<T>* states;  // of a unit's groups, as are queries and out
        T *queries, *weights, *out, *block_references;
        GatheredRows<T> keys, values;
        FetchAhead<T> ahead;
    };
    /// A block of one group of a unit, and where its weights (and their gradients) are.
    struct UnitBlock {
        std::size_t slot;
        Block block;
        const Piece* piece;
        T *weights, *d_scores;
    };
    GroupState<T>& state(Scratch& scratch, std::size_t slot) const { return scratch.states[slot]; }
    T* queries_of(Scratch& scratch, std::size_t slot) const { return scratch.queries + slot * static_cast<std::size_t>(head_.q.cols) * group_size; }
    T* out_of(Scratch& scratch, std::size_t slot) const { return scratch.out + slot * static_cast<std::size_t>(columns_) * group_size; }

    // --- iteration ---

    /// f(unit, scratch), in parallel; one after the other where groups share rows.
    template <class F>
    void for_each_unit(F&& f) {
        const auto units = schedule_.units();
        const auto run = [&](offset_t u, int worker) { f(units[static_cast<std::size_t>(u)], scratch_[static_cast<std::size_t>(worker)]); };
        const auto count = static_cast<offset_t>(units.size());
        if (has_shared_rows())
            for (offset_t u = 0; u < count; ++u) run(u, 0);
        else parallel_for(count, run);
    }

    /// f(lane, row) for the working lanes of a group.
    template <class F>
    static void for_each_lane(const Group& group, F&& f) {
        for (std::size_t lane = 0; lane < group_size; ++lane)
            if (group.active >> lane & 1) f(lane, group.rows[lane]);
    }

    const Group& group_of(const Unit& unit, std::size_t slot) const { return schedule_.groups()[unit.first + slot]; }
    std::size_t pieces_of(const Unit& unit) const { return schedule_.pieces(schedule_.groups()[unit.first]).size(); }
    Block block_of(const Unit& unit, std::size_t slot, std::size_t p, Bounds range) const {
        const Piece& piece = schedule_.pieces(group_of(unit, slot))[p];
        return make_block(group_of(unit, slot), piece, plan_.tiles()[static_cast<std::size_t>(piece.tile)], range, head_.query_length, head_.key_length);
    }

    /// Cuts a span into ranges of up to `most` keys (a multiple of span_unit) of nearly equal sizes.
    template <class F>
    static void for_each_range(Bounds span, index_t most, F&& f) {
        if (span.empty()) return;
        const index_t ranges = (span.size() + most - 1) / most;
        const index_t step = ((span.size() + ranges - 1) / ranges + span_unit - 1) / span_unit * span_unit;
        for (index_t first = span.begin; first < span.end; first += step) f(Bounds{first, std::min(first + step, span.end)});
    }
    Bounds span_of(const Unit& unit, std::size_t first, std::size_t last, std::size_t p) const {
        Bounds span = schedule_.pieces(group_of(unit, first))[p].span;
        for (std::size_t slot = first + 1; slot < last; ++slot) {
            const Bounds own = schedule_.pieces(group_of(unit, slot))[p].span;
            span = {std::min(span.begin, own.begin), std::max(span.end, own.end)};
        }
        return span;
    }

    UnitBlock unit_block(const Unit& unit, std::size_t slot, std::size_t p, Bounds range) const {
        return {slot, block_of(unit, slot, p, range), &schedule_.pieces(group_of(unit, slot))[p], nullptr, nullptr};
    }

    /// Groups of a unit whose keys are cut into the same ranges, and how long these are.
    static std::size_t groups_together(const Unit& unit) { return unit.wide ? unit.groups() : Tiles::score_groups; }
    static index_t range_size(const Unit& unit) { return unit.wide ? Tiles::shared_key_block : Tiles::key_block / Tiles::score_groups; }
    /// f(first slot, last slot, piece, span): wide units as a whole, others by so many groups as are scored at once.
    template <class F>
    void for_each_span(const Unit& unit, F&& f) const {
        for (std::size_t first = 0; first < unit.groups(); first += groups_together(unit)) {
            const std::size_t last = std::min(first + groups_together(unit), unit.groups());
            for (std::size_t p = 0; p < pieces_of(unit); ++p) f(first, last, p, span_of(unit, first, last, p));
        }
    }
    /// f(blocks), up to score_groups of them, which have keys.
    template <class F>
    void for_each_block(const Unit& unit, F&& f) const {
        UnitBlock blocks[Tiles::score_groups];
        for_each_span(unit, [&](std::size_t first, std::size_t last, std::size_t p, Bounds span) {
            for_each_range(span, range_size(unit), [&](Bounds range) {
                std::size_t count = 0;
                for (std::size_t slot = first; slot < last; ++slot) {
                    if ((blocks[count] = unit_block(unit, slot, p, range)).block.keys > 0) ++count;
                    if (count == 0 || (count < Tiles::score_groups && slot + 1 < last)) continue;
                    f(std::span<UnitBlock>(blocks, count));
                    count = 0;
                }
            });
        });
    }
    /// Blocks of any unit, counting those that turn out to be padding.
    offset_t most_blocks() const {
        offset_t most = 0;
        for (const Unit& unit : schedule_.units()) {
            offset_t count = 0;
            for_each_span(unit, [&](std::size_t first, std::size_t last, std::size_t, Bounds span) {
                count += static_cast<offset_t>(last - first) * ((span.size() + range_size(unit) - 1) / range_size(unit));
            });
            most = std::max(most, count);
        }
        return most;
    }

    /// f(span of G blocks, key positions that all of them have): side by side in whole tiles where neighbours overlap, one by one elsewhere.
    template <class F>
    static void for_each_overlap(std::span<const UnitBlock> blocks, F&& f) {
        constexpr std::size_t most = Tiles::score_groups;
        for (; !blocks.empty(); blocks = blocks.subspan(std::min(most, blocks.size()))) {
            const auto together = blocks.first(std::min(most, blocks.size()));
            Bounds shared = positions_of(together[0]);
            for (const UnitBlock& at : together) shared = {std::max(shared.begin, positions_of(at).begin), std::min(shared.end, positions_of(at).end)};
            if (most > 1) shared.end -= shared.size() % Tiles::score_keys;
            const auto alone = [&](auto part_of) {
                for (std::size_t i = 0; i < together.size(); ++i)
                    if (const Bounds part = part_of(positions_of(together[i])); !part.empty()) f(together.subspan(i).template first<1>(), part);
            };
            if (together.size() < most || shared.empty()) {
                alone([](Bounds own) { return own; });
                continue;
            }
            alone([&](Bounds own) { return Bounds{own.begin, shared.begin}; });
            f(together.template first<most>(), shared);
            alone([&](Bounds own) { return Bounds{shared.end, own.end}; });
        }
    }
    static Bounds positions_of(const UnitBlock& at) { return {at.block.first, at.block.first + at.block.keys}; }
    static bool overlap(const Block& a, const Block& b) { return a.first < b.first + b.keys && b.first < a.first + a.keys; }

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
    /// Keys that may be read from an edge on, to fetch ahead.
    offset_t known_edges(offset_t first, bool ahead) const { return ahead ? plan_.edges().count() - first : 0; }

    // --- weights ---

    void choose_storage() {
        const auto bytes = static_cast<std::size_t>(schedule_.weight_rows()) * group_size * sizeof(T);
        stored_ = bytes <= head_.weight_budget;
        if (stored_) store_ = workers_[0].template take<T>(schedule_.weight_rows() * group_size);
    }
    T* stored_weights(const UnitBlock& at) const { return &store_[static_cast<std::size_t>(at.piece->weights + at.block.first - at.piece->span.begin) * group_size]; }
    /// Where the weights of blocks that are worked on together go.
    void place_weights(std::span<UnitBlock> blocks, bool stored, Scratch& scratch) const {
        T* free = scratch.weights;
        for (UnitBlock& at : blocks) {
            at.weights = stored ? stored_weights(at) : free;
            free += offset_t{at.block.keys} * group_size;
        }
    }
    template <bool Online>
    void make_weights(std::span<const UnitBlock> blocks, const Unit& unit, Scratch& scratch) const {
        for (const UnitBlock& at : blocks) state(scratch, at.slot).weights = at.weights;
        for_each_overlap(blocks, [&]<std::size_t G>(std::span<const UnitBlock, G> overlap, Bounds positions) {
            std::array<ScoredGroup<T>, G> groups;
            for (std::size_t g = 0; g < G; ++g) groups[g] = {&group_of(unit, overlap[g].slot), &overlap[g].block, queries_of(scratch, overlap[g].slot), &state(scratch, overlap[g].slot)};
            const UnitBlock& at = overlap[0];
            score_block<Online, T, A>(positions, head_, distances_, groups, scratch.keys.get(at.block.tile->keys, at.piece->list_slot, k_), scratch.ahead);
        });
    }

    void pack_queries(const Unit& unit, Scratch& scratch) const {
        for (std::size_t slot = 0; slot < unit.groups(); ++slot)
            pack_rows<T, A>(group_of(unit, slot).rows, q_, head_.q.cols, static_cast<T>(head_.scale * log2_e), queries_of(scratch, slot));
    }
    /// The block after this one, once a range of a wide unit, where keys and values lie behind the second-level cache.
    void fetch_next_block(const Unit& unit, const UnitBlock& at, Rows<T> values, FetchAhead<T>& ahead) const {
        constexpr offset_t far = (offset_t{1} << 20) / static_cast<offset_t>(sizeof(T));
        if (!unit.wide || at.slot != 0 || at.piece->list_slot >= 0 || offset_t{at.piece->span.size()} * (dim_ + columns_) <= far) return;
        const index_t after = at.block.first + at.block.keys, first = after < at.piece->span.end ? after : at.piece->span.begin;
        const index_t key = at.block.tile->keys[first], rows = std::min(at.block.keys, at.piece->span.end - first);
        const MatrixView<const T> next[] = {{k_.row(key), rows, dim_, k_.stride, 1}, {values.row(key), rows, columns_, values.stride, 1}};
        ahead.start(next, offset_t{at.block.keys} * static_cast<offset_t>(unit.groups()) / (Tiles::score_groups * Tiles::score_keys));
    }

    /// Weights of a unit's groups relative to running references, f(block) after each. `values` are what they are for.
    template <class F>
    void online_weights(const Unit& unit, Rows<T> values, Scratch& scratch, F&& f) {
        for (std::size_t slot = 0; slot < unit.groups(); ++slot) state(scratch, slot).start(out_of(scratch, slot), columns_);
        pack_queries(unit, scratch);
        T* reference = scratch.block_references;
        for_each_block(unit, [&](std::span<UnitBlock> blocks) {
            place_weights(blocks, stored_, scratch);
            fetch_next_block(unit, blocks[0], values, scratch.ahead);
            make_weights<true>(blocks, unit, scratch);
            for (const UnitBlock& at : blocks) {
                if (head_.dropout.drops_weights()) drop_weights(at.block, head_.dropout, group_of(unit, at.slot), at.weights);
                if (stored_) reference = std::copy_n(state(scratch, at.slot).reference, group_size, reference);
                f(at);
            }
        });
    }

    /// Keys and values x for the matrix unit, where there is one and each is seen by so many queries that splitting them pays.
    bool prepare_matrix_unit([[maybe_unused]] Rows<T> x) {
        if constexpr (has_unit) {
            if (queries_of_a_key() < MatrixUnit::least_queries || head_.dropout.drops_weights() || !MatrixUnit::is_available()) return false;
            on_unit_.prepare(head_, k_, x, columns_, distances_, workers_);
            return true;
        }
        return false;
    }
    /// All keys that the unit's queries look at lie in ranges, none left out one by one.
    bool looks_at_ranges(const Unit& unit) const {
        for (std::size_t slot = 0; slot < unit.groups(); ++slot)
            for (const Piece& piece : schedule_.pieces(group_of(unit, slot)))
                if (piece.list_slot >= 0 || !plan_.tiles()[static_cast<std::size_t>(piece.tile)].excluded.empty()) return false;
        return true;
    }
    /// Weights of a unit relative to running references and their sums; false where the matrix unit can't make them.
    bool sum_on_matrix_unit([[maybe_unused]] const Unit& unit, [[maybe_unused]] Scratch& scratch) {
        if constexpr (has_unit) {
            using OnUnit = decltype(on_unit_);
            if (!looks_at_ranges(unit)) return false;
            const auto worker = static_cast<int>(&scratch - scratch_.data());
            pack_queries(unit, scratch);
            for (std::size_t slot = 0; slot < unit.groups(); ++slot) {
                state(scratch, slot).start(out_of(scratch, slot), columns_);
                on_unit_.start(worker, slot, queries_of(scratch, slot));
            }
            const std::size_t step = unit.wide ? unit.groups() : OnUnit::together;
            for (std::size_t from = 0; from < unit.groups(); from += step)
                for (std::size_t p = 0; p < pieces_of(unit); ++p) {
                    const std::size_t to = std::min(from + step, unit.groups());
                    const Bounds span = span_of(unit, from, to, p);
                    const index_t offset = plan_.tiles()[static_cast<std::size_t>(schedule_.pieces(group_of(unit, from))[p].tile)].keys.front();
                    for (index_t first = span.begin; first < span.end;) {
                        const index_t last = unit.wide ? std::min(((offset + first) / OnUnit::range + 1) * OnUnit::range - offset, span.end) : span.end;
                        for (std::size_t slot = from; slot < to; slot += OnUnit::together) {
                            typename OnUnit::Member members[OnUnit::together];
                            std::size_t count = 0;
                            for (std::size_t member = slot; member < std::min(slot + OnUnit::together, to); ++member)
                                if (const Block block = block_of(unit, member, p, {first, last}); block.keys > 0)
                                    members[count++] = {&group_of(unit, member), block, &state(scratch, member), queries_of(scratch, member), member};
                            const std::span<const typename OnUnit::Member> found(members, count);
                            if (count > 1 && !overlap(members[0].block, members[1].block))
                                for (std::size_t i = 0; i < count; ++i) on_unit_.add(worker, found.subspan(i, 1), scratch.ahead);
                            else if (count > 0) on_unit_.add(worker, found, scratch.ahead);
                        }
                        first = last;
                    }
                }
            for (std::size_t slot = 0; slot < unit.groups(); ++slot) {
                on_unit_.finish(worker, slot, out_of(scratch, slot));
                state(scratch, slot).has_out = true;
            }
            return true;
        }
        return false;
    }

    /// Stored blocks are relative to the references of their time: brings them to the last ones.
    void join_blocks(const Unit& unit, Scratch& scratch) {
        using V = Vec<T, A>;
        const T* reference = scratch.block_references;
        for_each_block(unit, [&](std::span<const UnitBlock> blocks) {
            for (const UnitBlock& at : blocks) {
                const T* const last = state(scratch, at.slot).reference;
                if (!std::equal(last, last + group_size, reference)) {
                    T* const weights = stored_weights(at);
                    for (int part = 0; part < group_size; part += Tiles::lanes) {
                        // Exactly 1 for the queries that keep their reference (another query's key must not move their bits) and for those
                        // that had none yet: their weights are 0, their first reference may lie far below, and 0 * 2^far is NaN.
                        const V rise = V::load_aligned(last + part) - V::load_unaligned(reference + part);
                        const V factor = xsimd::select(rise > V(T(0)), pow2(V(T(0)) - rise), V(T(1)));
                        for (index_t p = 0; p < at.block.keys; ++p) (V::load_aligned(weights + p * group_size + part) * factor).store_aligned(weights + p * group_size + part);
                    }
                }
                reference += group_size;
            }
        });
    }

    /// f(block) with the weights that belong to lane_factor_ (stored), or final ones computed again.
    template <class F>
    void final_weights(const Unit& unit, Scratch& scratch, bool dropped, F&& f) {
        const bool read = stored_ && (dropped || !head_.dropout.drops_weights());
        if (!read) start_final(unit, scratch);
        for_each_block(unit, [&](std::span<UnitBlock> blocks) {
            place_weights(blocks, read, scratch);
            if (!read) compute_final(blocks, unit, scratch, dropped);
            for (const UnitBlock& at : blocks) f(at);
        });
    }

    void start_final(const Unit& unit, Scratch& scratch) const {
        for (std::size_t slot = 0; slot < unit.groups(); ++slot) {
            GroupState<T>& own = state(scratch, slot);
            own.start(out_of(scratch, slot), columns_);
            const Group& group = group_of(unit, slot);
            for (std::size_t lane = 0; lane < group_size; ++lane)
                if (is_alive(group.rows[lane])) own.reference[lane] = logsumexp_[static_cast<std::size_t>(group.rows[lane])];
        }
        pack_queries(unit, scratch);
    }
    void compute_final(std::span<const UnitBlock> blocks, const Unit& unit, Scratch& scratch, bool dropped) const {
        make_weights<false>(blocks, unit, scratch);
        if (!dropped || !head_.dropout.drops_weights()) return;
        for (const UnitBlock& at : blocks) drop_weights(at.block, head_.dropout, group_of(unit, at.slot), at.weights);
    }

    /// Every row is one lane of one group: nothing else adds to its sum.
    bool rows_are_lanes() const { return !has_edges_ && !has_shared_rows(); }

    void finish_unit(const Unit& unit, Scratch& scratch, bool wants_logsumexp) {
        for (std::size_t slot = 0; slot < unit.groups(); ++slot) {
            const GroupState<T>& own = state(scratch, slot);
            const auto at = (unit.first + slot) * group_size;
            std::copy_n(own.reference, group_size, &lane_reference_[at]);
            std::copy_n(own.sum, group_size, &lane_factor_[at]);
            if (!rows_are_lanes()) continue;
            for_each_lane(group_of(unit, slot), [&](std::size_t lane, index_t row) {
                const T sum = own.sum[lane];
                const bool alive = !is_zero(sum) && row < head_.query_length;
                alive_[static_cast<std::size_t>(row)] = alive;
                lane_factor_[at + lane] = alive ? 1 / sum : T(0);
                if (wants_logsumexp) logsumexp_[static_cast<std::size_t>(row)] = alive ? own.reference[lane] + std::log2(sum) : T(0);
            });
        }
    }

    /// Base-2 scores of all edges.
    void score_edges() {
        if (!has_edges_) return;
        const Parts<T> keys = take_parts<T>(head_.k.rows, dim_, workers_[0]);
        split(k_, head_.k.rows, keys);
        edge_dots(q_, static_cast<T>(head_.scale * log2_e), keys, edge_weights_, false);
        if constexpr (!std::is_same_v<Bias, NoBias>)
            parallel_rows(head_.q.rows, [&](index_t i) {
                const auto [first, last] = edge_range(i);
                for (offset_t e = first; e < last; ++e) edge_weights_[static_cast<std::size_t>(e)] += edge_bias(i, plan_.edges().keys[static_cast<std::size_t>(e)]);
            });
    }
    T edge_bias(index_t i, index_t key) const {
        if constexpr (DistanceTable<T, Bias>::exists)
            if (distances_.covers(i, key)) return distances_.at(i, key);
        return static_cast<T>(double((*head_.bias)(head_.batch, head_.head, i, key)) * log2_e);
    }

    void split(Rows<T> x, index_t rows, const Parts<T>& parts) {
        parallel_rows(rows, [&](index_t i) { split_row(x.row(i), i, parts); });
    }

    /// dots[edge] (+)= factor * a[query] . b[key].
    void edge_dots(Rows<T> a, T factor, const Parts<T>& b, std::span<T> dots, bool add) {
        const bool ahead = fetches_gathers(b);
        for_each_part<T, A>(b, [&](auto vectors, index_t p) {
            parallel_rows(head_.q.rows, [&](index_t i) {
                const auto [first, last] = edge_range(i);
                gather_dots<vectors, T, A>(a.row(i) + p * Parts<T>::part_columns, factor, plan_.edges().keys.data() + first, last - first, b.part(p), known_edges(first, ahead),
                                           dots.data() + first, add || p > 0);
            });
        });
    }

    std::span<T> edges_of(std::span<T> all, index_t i) const {
        const auto [first, last] = edge_range(i);
        return all.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(last - first));
    }

    /// Joins a row's lanes and edges: its logsumexp, the factors of its lanes, the weights of its edges.
    void finish_row(index_t i, bool wants_logsumexp) {
        const auto at = static_cast<std::size_t>(i);
        const std::span<T> scores = edges_of(edge_weights_, i);
        const auto slots = schedule_.slots(i);
        T highest = no_reference<T>, total = 0;
        for (const offset_t slot : slots)
            if (!is_zero(lane_factor_[static_cast<std::size_t>(slot)])) highest = std::max(highest, lane_reference_[static_cast<std::size_t>(slot)]);
        highest = highest_of<T, A>(scores, highest);
        const auto rebase = [&](offset_t slot) { return std::exp2(lane_reference_[static_cast<std::size_t>(slot)] - highest); };
        for (const offset_t slot : slots)
            if (!is_zero(lane_factor_[static_cast<std::size_t>(slot)])) total += lane_factor_[static_cast<std::size_t>(slot)] * rebase(slot);
        if (!scores.empty()) total += exp2_in_place<T, A>(scores, highest);
        alive_[at] = i < head_.query_length && !is_zero(total);
        if (wants_logsumexp) logsumexp_[at] = is_alive(i) ? highest + std::log2(total) : T(0);
        const T factor = is_alive(i) ? 1 / total : T(0);
        for (const offset_t slot : slots) {
            T& lane = lane_factor_[static_cast<std::size_t>(slot)];
            lane = is_alive(i) && !is_zero(lane) ? factor * rebase(slot) : T(0);
        }
        finish_edges(i, factor);
    }

    void finish_edges(index_t i, T factor) {
        const std::span<T> weights = edges_of(edge_weights_, i), plain = edges_of(plain_edge_weights_, i);
        if (!is_alive(i)) std::fill(plain.begin(), plain.end(), T(0));
        else if (!is_zero(factor - 1)) scale_row<T, A>(weights.data(), factor, static_cast<index_t>(weights.size()), plain.data());
        else if (plain.data() != weights.data()) std::copy(weights.begin(), weights.end(), plain.begin());
        if (!head_.dropout.drops_weights()) return;
        for (std::size_t e = 0; e < weights.size(); ++e)
            weights[e] = plain[e] * static_cast<T>(head_.dropout.weight(i, plan_.edges().keys[static_cast<std::size_t>(edge_range(i).first) + e]));
    }

    // --- A x ---

    void start(Rows<T> x, bool continued) {
        for (Scratch& scratch : scratch_) scratch.values.forget();
        if (!has_edges_) return;
        if (continued) std::swap(source_, next_source_);
        else {
            if (!source_.data) source_ = take_parts<T>(head_.v.rows, columns_, workers_[0]);
            split(x, head_.v.rows, source_);
        }
    }

    void accumulate(const UnitBlock& at, Rows<T> x, Scratch& scratch, bool careful) {
        const Rows<T> values = scratch.values.get(at.block.tile->keys, at.piece->list_slot, x);
        GroupState<T>& own = state(scratch, at.slot);
        weighted_sum_block<T, A>(at.block, at.weights, {values.row(at.block.first), values.stride}, columns_, out_of(scratch, at.slot), own.has_out, careful);
        own.has_out = true;
    }

    /// f(careful) sums up a unit. Where zero weights may have met values that are not finite (0 * NaN is NaN) it does so once more,
    /// row by row.
    template <class F>
    void twice_if_masked(const Unit& unit, Scratch& scratch, F&& f) {
        f(false);
        bool finite = true;
        for (std::size_t slot = 0; slot < unit.groups(); ++slot) {
            if (!state(scratch, slot).has_out) std::fill_n(out_of(scratch, slot), offset_t{columns_} * group_size, T(0));
            else if (masked_) finite &= !has_non_finite<T, A>(out_of(scratch, slot), offset_t{columns_} * group_size);
        }
        if (!finite) f(true);
    }

    /// Rows that no group stores begin with their teleport: those without tiles, and all where groups add to shared rows.
    void start_rows(Rows<T> v, const Hop& hop, T* out, std::ptrdiff_t out_stride) {
        const T teleport = static_cast<T>(hop.teleport);
        parallel_rows(head_.q.rows, [&](index_t i) {
            if (!has_shared_rows() && !schedule_.slots(i).empty()) return;
            // A teleport of 0 must not meet a NaN in v.
            if (!is_alive(i) || is_zero(teleport)) std::fill_n(out + i * out_stride, columns_, T(0));
            else scale_row<T, A>(v.row(i), teleport, columns_, out + i * out_stride);
        });
    }

    void store_unit(const Unit& unit, Scratch& scratch, Rows<T> v, const Hop& hop, T* out, std::ptrdiff_t out_stride) {
        using V = Vec<T, A>;
        constexpr int width = Tiles::lanes;
        const T teleport = static_cast<T>(hop.teleport), walk = static_cast<T>(hop.walk);
        for (std::size_t slot = 0; slot < unit.groups(); ++slot)
            for_each_lane(group_of(unit, slot), [&](std::size_t lane, index_t row) {
                T* to = out + row * out_stride;
                const T* sum = out_of(scratch, slot) + lane * static_cast<std::size_t>(columns_);
                if (!is_alive(row)) {
                    if (!has_shared_rows()) std::fill_n(to, columns_, T(0));
                    return;
                }
                const V factor(relative_ ? walk * lane_factor_[(unit.first + slot) * group_size + lane] : walk);
                const T* base = has_shared_rows() ? to : is_zero(teleport) ? nullptr : v.row(row);
                const V base_factor(has_shared_rows() ? T(1) : teleport);
                for (index_t c = 0; c < columns_; c += width) {
                    const V value = factor * V::load_unaligned(sum + c);
                    (base ? multiply_add(base_factor, V::load_unaligned(base + c), value) : value).store_unaligned(to + c);
                }
            });
    }

    /// `more`: the next hop starts from this one's output, which is split on the way.
    void add_edges(const Hop& hop, T* out, std::ptrdiff_t out_stride, bool more) {
        if (!has_edges_) return;
        if (more && !next_source_.data) next_source_ = take_parts<T>(head_.v.rows, columns_, workers_[0]);
        sum_edges(source_, static_cast<T>(hop.walk), out, out_stride, more ? &next_source_ : nullptr);
    }
    void sum_edges(const Parts<T>& x, T factor, T* out, std::ptrdiff_t out_stride, const Parts<T>* copy) {
        using V = Vec<T, A>;
        constexpr int width = Tiles::lanes;
        const bool ahead = fetches_gathers(x);
        for_each_part<T, A>(x, [&](auto vectors, index_t p) {
            constexpr int N = vectors;
            parallel_rows(head_.q.rows, [&](index_t i) {
                T* const to = out + i * out_stride + p * Parts<T>::part_columns;
                V sum[N];
                unroll<N>([&](auto v) POLYATTN_INLINE_LAMBDA { sum[v] = V(T(0)); });
                const auto [first, last] = edge_range(i);
                const bool adds = last > first && is_alive(i);
                if (adds) gather_sum<N, T, A>(sum, plan_.edges().keys.data() + first, edge_weights_.data() + first, last - first, x.part(p), known_edges(first, ahead));
                unroll<N>([&](auto v) POLYATTN_INLINE_LAMBDA {
                    const V total = multiply_add(V(factor), sum[v], V::load_unaligned(to + v * width));
                    if (adds) total.store_unaligned(to + v * width);
                    if (copy) (adds ? total : V::load_unaligned(to + v * width)).store_aligned(copy->part(p) + offset_t{i} * (N * width) + v * width);
                });
            });
        });
    }

    const Head<T, Bias>& head_;
    const Plan& plan_;
    const Schedule& schedule_;
    const Workers& workers_;
    index_t dim_, columns_;  // of keys and values, padded to whole vectors
    bool has_edges_, masked_;
    bool stored_ = false;    // weights lie in store_
    bool relative_ = false;  // .. and want lane_factor_
    Rows<T> q_, k_;
    DistanceTable<T, Bias> distances_;
    std::span<T> logsumexp_;  // base 2
    std::span<std::uint8_t> alive_;
    std::span<T> lane_reference_, lane_factor_;  // lane_factor_ holds the sum until a row is finished
    std::span<T> edge_weights_, plain_edge_weights_;
    Parts<T> source_, next_source_;  // what edges gather values from, now and in the next hop
    std::span<T> store_;
    std::span<Scratch> scratch_;
    struct NoUnit {};
    std::conditional_t<has_unit, UnitSoftmax<A, Bias, MatrixUnit>, NoUnit> on_unit_;
};

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
