#pragma once
// The adjoint of the attention operator: A^T x, and from the gradient of its weights those of queries, keys and bias.

#include <polyattn/backend/simd/sparse_softmax.hpp>

#include <optional>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// One term of dL/dA_ij = sum_k G_k[i] . Z_k[j]; the factors of a hop are inside G.
template <class T>
struct WeightGradientTerm {
    Rows<T> g, z;
};

/// Sums over all queries for each key, [keys][columns]: one partial result for each chunk of the schedule, added up in order at the end.
/// The chunks are the plan's, so every number of threads adds in the same order, without atomics.
template <class T, class A>
class KeySums {
public:
    KeySums(const Schedule& schedule, index_t keys, index_t columns, T* out, const Workers& workers)
        : schedule_(schedule), columns_(columns), chunks_(schedule.chunks()), out_(out), keys_(keys) {
        if (chunks_ > 1) {
            parts_ = workers[0].template take<T*>(chunks_);
            for (int c = 0; c < chunks_; ++c) {
                const Bounds range = schedule.chunk_keys(c);
                parts_[static_cast<std::size_t>(c)] = workers[0].template take<T>(offset_t{range.size()} * columns).data() - offset_t{range.begin} * columns;
            }
        }
        scattered_ = workers[0].template take<ScatteredRows<T>>(workers.count());
        for (int w = 0; w < workers.count(); ++w) (scattered_[static_cast<std::size_t>(w)] = {}).prepare(schedule.list_capacity(), columns, workers[w]);
    }

    void start(offset_t chunk) {
        const Bounds range = chunks_ > 1 ? schedule_.chunk_keys(static_cast<int>(chunk)) : Bounds{0, keys_};
        std::fill_n(data(chunk) + offset_t{range.begin} * columns_, offset_t{range.size()} * columns_, T(0));
    }
    /// Where sums for the positions of a key sequence are added to.
    T* rows(offset_t chunk, int worker, const IndexSequence& keys, int slot) {
        std::ptrdiff_t stride;
        return scattered_[static_cast<std::size_t>(worker)].get(keys, slot, data(chunk), columns_, stride);
    }
    void finish(offset_t chunk, int worker) { scattered_[static_cast<std::size_t>(worker)].flush(data(chunk), columns_); }
    /// Adds up the chunks of key j.
    void join(index_t j) {
        using V = Vec<T, A>;
        if (chunks_ == 1) return;
        T* const to = out_ + offset_t{j} * columns_;
        bool started = false;
        for (int c = 0; c < chunks_; ++c) {
            const Bounds range = schedule_.chunk_keys(c);
            if (j < range.begin || j >= range.end) continue;
            const T* const from = parts_[static_cast<std::size_t>(c)] + offset_t{j} * columns_;
            if (started) map_row<T, A>(from, to, columns_, [](V x, V y) POLYATTN_INLINE_LAMBDA { return y + x; });
            else std::copy_n(from, columns_, to);
            started = true;
        }
        if (!started) std::fill_n(to, columns_, T(0));
    }

private:
    T* data(offset_t chunk) { return chunks_ > 1 ? parts_[static_cast<std::size_t>(chunk)] : out_; }

    const Schedule& schedule_;
    index_t columns_;
    int chunks_;
    T* out_;
    index_t keys_;
    std::span<T*> parts_;
    std::span<ScatteredRows<T>> scattered_;
};

template <class T, class A, class Bias>
class SparseSoftmaxGradient : public SparseSoftmax<T, A, Bias> {
    using Base = SparseSoftmax<T, A, Bias>;
    using typename Base::Scratch;
    using typename Base::UnitBlock;
    using Base::alive_;
    using Base::columns_;
    using Base::dim_;
    using Base::edge_weights_;
    using Base::group_of;
    using Base::has_edges_;
    using Base::head_;
    using Base::masked_;
    using Base::plain_edge_weights_;
    using Base::plan_;
    using Base::schedule_;
    using Base::scratch_;
    using Base::state;
    using Base::stored_;
    using Base::workers_;

public:
    using Tiles = typename Base::Tiles;

    /// Weights from the logsumexp that the forward pass saved. `keep`: A^T is applied several times, so weights are stored.
    SparseSoftmaxGradient(const Head<T, Bias>& head, const HeadGradient<T>& gradient, bool keep, const Workers& workers) : Base(head, workers) {
        const T* const logsumexp = gradient.logsumexp;
        if (keep) this->choose_storage();
        for (index_t i = 0; i < head.q.rows; ++i) {
            alive_[static_cast<std::size_t>(i)] = i < head.query_length && !is_empty_row(logsumexp[i]);
            this->logsumexp_[static_cast<std::size_t>(i)] = this->is_alive(i) ? static_cast<T>(double(logsumexp[i]) * log2_e) : T(0);
        }
        this->score_edges();
        parallel_rows(head_.q.rows, [&](index_t i) {
            exp2_in_place<T, A>(this->edges_of(edge_weights_, i), this->logsumexp_[static_cast<std::size_t>(i)]);
            this->finish_edges(i, T(1));
        });
        if (has_edges_) {
            // In the order of the keys once, for all hops.
            const TransposedEdges& edges = plan_.template lowered<TransposedEdges>();
            transposed_weights_ = workers[0].template take<T>(plan_.edges().count());
            sums_source_ = take_parts<T>(head.q.rows, std::max(columns_, dim_), workers[0]);
            transpose_edges(edges, edge_weights_);
        }
        if (stored_)
            this->for_each_unit([&](const Unit& unit, Scratch& scratch) {
                this->start_final(unit, scratch);
                // In the blocks that the passes read: others may leave out keys between those that a group sees.
                for_each_shared_block(unit, {}, [&](std::span<const UnitBlock> blocks, Bounds) { this->compute_final(blocks, unit, scratch, true); });
            });
        block_keys_ = std::max<offset_t>(offset_t{Schedule::most_narrow_groups} * Tiles::key_block, offset_t{Schedule::most_groups} * Tiles::shared_key_block);
    }

    /// The dense part of A^T needs the weights only, so it can share its pass with the gradient of the weights.
    bool shares_passes() const { return !stored_ && !head_.dropout.drops_weights(); }
    /// weights_gradient() wants them.
    bool makes_row_means() const { return false; }

    /// out [keys][columns] = A^T x; rows of x without keys must be 0.
    void apply_transposed(Rows<T> x, T* out) {
        const Workers memory = workers_.nested();
        if (masked_) bad_x_.template mark<A>(x, head_.q.rows, columns_, memory[0]);
        KeySums<T, A> sums(schedule_, plan_.keys(), columns_, out, memory);
        const auto buffers = take_buffers(memory, !stored_, false);
        for_each_chunk([&](offset_t chunk, int worker) {
            Scratch& scratch = scratch_[static_cast<std::size_t>(worker)];
            const Buffers& own = buffers[static_cast<std::size_t>(worker)];
            sums.start(chunk);
            for (const Unit& unit : schedule_.chunk(static_cast<int>(chunk))) {
                for (std::size_t slot = 0; slot < unit.groups(); ++slot) pack_lanes(group_of(unit, slot), x, T(1), columns_, this->out_of(scratch, slot), bad_x_);
                if (!stored_) this->start_final(unit, scratch);
                for_each_shared_block(unit, own, [&](std::span<const UnitBlock> blocks, Bounds range) {
                    if (!stored_) this->compute_final(blocks, unit, scratch, true);
                    add_transposed(unit, blocks, range, &UnitBlock::weights, x, T(1), columns_, scratch.out, bad_x_, sums, chunk, worker);
                });
            }
            sums.finish(chunk, worker);
        });
        parallel_rows(plan_.keys(), [&](index_t j) { sums.join(j); });
        bad_x_ = {};
        add_transposed_edges(x, T(1), columns_, out);
    }

    /// From dL/dA (as terms) and row_means[i] = sum_j A_ij dL/dA_ij to the gradients of q, k and the bias. With
    /// `d_v` also A^T terms[0].g, in the same pass.
    void weights_gradient(std::span<const WeightGradientTerm<T>> terms, std::span<const T> row_means, const HeadGradient<T>& gradient, T* d_v) {
        Arena& arena = workers_[0];
        const Rows<T> q = readable_rows(head_.q, true, Tiles::lanes, arena), k = head_.k.cols == dim_ ? this->k_ : readable_rows(head_.k, true, Tiles::lanes, arena, this->reads_often());
        const T scale = static_cast<T>(head_.scale);
        const std::size_t query_size = static_cast<std::size_t>(dim_) * group_size;
        const NonFinite bad = masked_ ? find_non_finite(terms, row_means, q, k, d_v != nullptr) : NonFinite{};
        const auto buffers = take_gradient_buffers(terms.size());
        const std::size_t bias_size = gradient.bias_gradient.size();
        const auto bias_parts = arena.take<double>(static_cast<offset_t>(bias_size) * schedule_.chunks());
        std::fill(bias_parts.begin(), bias_parts.end(), 0.);

        fill_with_zeros(gradient.d_q);
        T* const in_place = gradient.adds_to_keys ? nullptr : packed_rows(gradient.d_k, dim_);
        T* const d_k = in_place ? in_place : arena.take<T>(offset_t{head_.k.rows} * dim_).data();
        KeySums<T, A> k_sums(schedule_, plan_.keys(), dim_, d_k, workers_);
        std::optional<KeySums<T, A>> v_sums;
        if (d_v) v_sums.emplace(schedule_, plan_.keys(), columns_, d_v, workers_);
        for_each_chunk([&](offset_t chunk, int worker) {
            Scratch& scratch = scratch_[static_cast<std::size_t>(worker)];
            Buffers& own = buffers[static_cast<std::size_t>(worker)];
            const std::span<double> bias_part = bias_parts.subspan(static_cast<std::size_t>(chunk) * bias_size, bias_size);
            k_sums.start(chunk);
            if (v_sums) v_sums->start(chunk);
            for (const Unit& unit : schedule_.chunk(static_cast<int>(chunk))) {
                const bool read = stored_ && !head_.dropout.drops_weights();
                if (!read) this->start_final(unit, scratch);
                bool started[Schedule::most_groups] = {};
                for (std::size_t slot = 0; slot < unit.groups(); ++slot) {
                    const Group& group = group_of(unit, slot);
                    pack_group(group, terms, row_means, own, slot);
                    pack_lanes(group, q, scale, dim_, own.queries + slot * query_size, bad.queries);
                    if (d_v) pack_lanes(group, terms[0].g, T(1), columns_, this->out_of(scratch, slot), bad_x_);
                }
                for_each_shared_block(unit, own, [&](std::span<const UnitBlock> blocks, Bounds range) {
                    this->fetch_next_block(unit, blocks[0], terms[0].z, scratch.ahead);
                    if (!read) this->compute_final(blocks, unit, scratch, false);
                    Base::for_each_overlap(blocks, [&](auto overlap, Bounds positions) { score_gradients(overlap, positions, own, terms); });
                    for (const UnitBlock& at : blocks) {
                        const Group& group = group_of(unit, at.slot);
                        if (head_.dropout.drops_weights()) drop_gradients(at, group, own.means + at.slot * group_size);
                        if (bad.clears && at.block.masked) clear_unseen(at.block, at.d_scores);
                        if constexpr (LearnedBias<Bias>) accumulate_bias(at.block, group, at.d_scores, bias_part);
                    }
                    if (v_sums) add_transposed(unit, blocks, range, &UnitBlock::weights, terms[0].g, T(1), columns_, scratch.out, bad_x_, *v_sums, chunk, worker);
                    add_transposed(unit, blocks, range, &UnitBlock::d_scores, q, scale, dim_, own.queries, bad.queries, k_sums, chunk, worker);
                    for (const UnitBlock& at : blocks) {
                        const Rows<T> keys = own.k.get(at.block.tile->keys, at.piece->list_slot, k);
                        weighted_sum_block<T, A>(at.block, at.d_scores, {keys.row(at.block.first), keys.stride}, dim_, own.d_query + at.slot * query_size, started[at.slot], bad.keys);
                        started[at.slot] = true;
                    }
                });
                for (std::size_t slot = 0; slot < unit.groups(); ++slot)
                    if (started[slot])
                        Base::for_each_lane(group_of(unit, slot), [&](std::size_t lane, index_t row) {
                            if (!this->is_alive(row)) return;
                            add_row<A>(gradient.d_q, row, scale, own.d_query + slot * query_size + lane * static_cast<std::size_t>(dim_));
                        });
            }
            k_sums.finish(chunk, worker);
            if (v_sums) v_sums->finish(chunk, worker);
        });
        parallel_rows(plan_.keys(), [&](index_t j) {
            k_sums.join(j);
            if (v_sums) v_sums->join(j);
        });
        bad_x_ = {};
        if (d_v) add_transposed_edges(terms[0].g, T(1), columns_, d_v);
        edge_gradients(terms, row_means, q, k, scale, gradient, d_k);
        for (std::size_t part = 0; part < static_cast<std::size_t>(schedule_.chunks()); ++part)
            for (std::size_t b = 0; b < bias_size; ++b) gradient.bias_gradient[b] += bias_parts[part * bias_size + b];
        if (!in_place) parallel_rows(plan_.keys(), [&](index_t j) { store_row<A>(gradient.d_k, j, d_k + offset_t{j} * dim_, gradient.adds_to_keys); });
    }

private:
    struct Buffers {
        T *weights, *d_scores;                // of a block of all groups
        T *g, *queries, *d_query, *means;     // of all groups
        std::span<GatheredRows<T>> z;
        GatheredRows<T> k;
    };
    std::span<Buffers> take_buffers(const Workers& workers, bool weights, bool d_scores) {
        const auto buffers = workers[0].template take<Buffers>(workers.count());
        for (int w = 0; w < workers.count(); ++w) {
            Buffers& own = buffers[static_cast<std::size_t>(w)] = Buffers{};
            if (weights) own.weights = workers[w].template take<T>(block_keys_ * group_size).data();
            if (d_scores) own.d_scores = workers[w].template take<T>(block_keys_ * group_size).data();
        }
        return buffers;
    }

    /// And what the gradient of the weights works on.
    std::span<Buffers> take_gradient_buffers(std::size_t terms) {
        const auto buffers = take_buffers(workers_, !stored_ || head_.dropout.drops_weights(), true);
        const index_t value_dim = head_.v.cols;
        for (int w = 0; w < workers_.count(); ++w) {
            Buffers& own = buffers[static_cast<std::size_t>(w)];
            Arena& from = workers_[w];
            own.g = from.take<T>(static_cast<offset_t>(terms * Schedule::most_groups) * value_dim * group_size).data();
            own.queries = from.take<T>(static_cast<offset_t>(Schedule::most_groups) * dim_ * group_size).data();
            own.d_query = from.take<T>(static_cast<offset_t>(Schedule::most_groups) * dim_ * group_size).data();
            own.means = from.take<T>(static_cast<offset_t>(Schedule::most_groups) * group_size).data();
            own.z = from.take<GatheredRows<T>>(static_cast<offset_t>(terms));
            for (auto& rows : own.z) (rows = {}).prepare(schedule_.list_capacity(), value_dim, from);
            own.k.prepare(schedule_.list_capacity(), dim_, from);
        }
        return buffers;
    }
    /// Row means and dL/dA's factors of a group, side by side.
    void pack_group(const Group& group, std::span<const WeightGradientTerm<T>> terms, std::span<const T> row_means, const Buffers& own, std::size_t slot) const {
        const index_t value_dim = head_.v.cols;
        for (std::size_t lane = 0; lane < group_size; ++lane) own.means[slot * group_size + lane] = row_means[static_cast<std::size_t>(group.rows[lane])];
        T* to = own.g + slot * terms.size() * static_cast<std::size_t>(value_dim) * group_size;
        for (const auto& term : terms) {
            pack_rows<T, A>(group.rows, term.g, value_dim, T(1), to);
            to += offset_t{value_dim} * group_size;
        }
    }

    /// Rows that are not finite: 0 x NaN would leave a NaN where a row sees nothing.
    struct NonFinite {
        NonFiniteRows queries;
        bool keys = false;    // there are some of k
        bool clears = false;  // some of anything, or factors so large that dL/dA may not be finite: gradients of scores that nothing sees are set to 0
    };
    /// Marks those of A^T's x as well, which is a term's g `with_values`.
    NonFinite find_non_finite(std::span<const WeightGradientTerm<T>> terms, std::span<const T> row_means, Rows<T> q, Rows<T> k, bool with_values) {
        Arena& arena = workers_[0];
        NonFinite found;
        NonFiniteRows bad_terms;
        found.queries.template mark<A>(k, head_.k.rows, dim_, arena);
        found.keys = found.queries.any();
        found.queries.template mark<A>(q, head_.q.rows, dim_, arena);
        found.clears = found.keys || found.queries.any();
        for (const T mean : row_means) found.clears |= !is_finite(mean);
        for (const auto& term : terms) {
            bad_terms.mark<A>(term.z, head_.v.rows, columns_, arena);
            found.clears |= bad_terms.any_large();
            NonFiniteRows& bad_g = with_values ? bad_x_ : bad_terms;
            bad_g.mark<A>(term.g, head_.q.rows, columns_, arena);
            found.clears |= bad_g.any_large();
        }
        return found;
    }

    template <class F>
    void for_each_chunk(F&& f) {
        for (Scratch& scratch : scratch_) {
            scratch.keys.forget();
            scratch.values.forget();
        }
        parallel_for(schedule_.chunks(), [&](offset_t chunk, int worker) { f(chunk, worker); });
    }

    /// f(blocks of the unit's groups, their range of key positions): a row of keys is visited once for all of a unit's queries.
    template <class F>
    void for_each_shared_block(const Unit& unit, const Buffers& buffers, F&& f) const {
        UnitBlock blocks[Schedule::most_groups];
        for (std::size_t p = 0; p < this->pieces_of(unit); ++p)
            Base::for_each_range(this->span_of(unit, 0, unit.groups(), p), unit.wide ? Tiles::shared_key_block : Tiles::key_block, [&](Bounds range) {
                std::size_t count = 0;
                for (std::size_t slot = 0; slot < unit.groups(); ++slot) {
                    UnitBlock& at = blocks[count];
                    at = this->unit_block(unit, slot, p, range);
                    if (at.block.keys == 0) continue;
                    const auto size = count * static_cast<std::size_t>(range.size()) * group_size;
                    at.weights = buffers.weights ? buffers.weights + size : this->stored_weights(at);
                    at.d_scores = buffers.d_scores ? buffers.d_scores + size : nullptr;
                    ++count;
                }
                if (count > 0) f(std::span<const UnitBlock>(blocks, count), range);
            });
    }

    /// sums += weights^T x for the blocks of a unit; `packed` are the groups' rows of factor * x.
    void add_transposed(const Unit& unit, std::span<const UnitBlock> blocks, Bounds range, T* UnitBlock::*weights, Rows<T> x, T factor, index_t columns, const T* packed,
                        const NonFiniteRows& non_finite, KeySums<T, A>& sums, offset_t chunk, int worker) const {
        T* const to = sums.rows(chunk, worker, blocks[0].block.tile->keys, blocks[0].piece->list_slot) + offset_t{range.begin} * columns;
        WeightPlane<T> planes[Schedule::most_groups];
        Bounds keys{range.size(), 0};
        for (std::size_t b = 0; b < blocks.size(); ++b) {
            const UnitBlock& at = blocks[b];
            const index_t first = at.block.first - range.begin;
            planes[b] = {at.*weights, packed + at.slot * static_cast<std::size_t>(columns) * group_size, {first, first + at.block.keys}, at.block.mask()};
            keys = {std::min(keys.begin, first), std::max(keys.end, first + at.block.keys)};
        }
        transposed_sum<T, A>(std::span<const WeightPlane<T>>(planes, blocks.size()), keys, columns, columns, to, columns);
        for (const UnitBlock& at : blocks)
            add_non_finite_lanes(group_of(unit, at.slot), at.block, at.*weights, x, factor, columns, non_finite,
                                 to + offset_t{at.block.first - range.begin} * columns, columns);
    }

    /// 16 rows of x times `factor`, [16][columns]; idle lanes, dead rows and rows that are not finite are 0.
    void pack_lanes(const Group& group, Rows<T> x, T factor, index_t columns, T* packed, const NonFiniteRows& non_finite) const {
        for (std::size_t lane = 0; lane < group_size; ++lane) {
            T* to = packed + lane * static_cast<std::size_t>(columns);
            const index_t row = group.rows[lane];
            if ((group.active >> lane & 1) && this->is_alive(row) && !non_finite[row])
                scale_row<T, A>(x.row(row), factor, columns, to);
            else std::fill_n(to, columns, T(0));
        }
    }

    /// Rows that are not finite reach only the keys that they see.
    void add_non_finite_lanes(const Group& group, const Block& block, const T* weights, Rows<T> x, T factor, index_t columns, const NonFiniteRows& non_finite,
                              T* out, std::ptrdiff_t out_stride) const {
        if (!non_finite.any()) return;
        Base::for_each_lane(group, [&](std::size_t lane, index_t row) {
            if (!non_finite[row] || !this->is_alive(row)) return;
            for (index_t p = 0; p < block.keys; ++p)
                if (block.is_seen(static_cast<int>(lane), p))
                    for (index_t c = 0; c < columns; ++c) out[p * out_stride + c] += weights[p * group_size + static_cast<index_t>(lane)] * (factor * x.row(row)[c]);
        });
    }

    void transpose_edges(const TransposedEdges& edges, std::span<const T> weights) {
        parallel_rows(plan_.keys(), [&](index_t j) {
            for (offset_t e = edges.offsets[static_cast<std::size_t>(j)]; e < edges.offsets[static_cast<std::size_t>(j) + 1]; ++e)
                transposed_weights_[static_cast<std::size_t>(e)] = weights[static_cast<std::size_t>(edges.forward[static_cast<std::size_t>(e)])];
        });
    }

    /// out += factor * (weights of the edges)^T x, with transposed_weights_.
    void add_transposed_edges(Rows<T> x, T factor, index_t columns, T* out) {
        using V = Vec<T, A>;
        constexpr int width = Tiles::lanes;
        if (!has_edges_) return;
        const TransposedEdges& edges = plan_.template lowered<TransposedEdges>();
        const Parts<T> parts{sums_source_.data, head_.q.rows, columns};
        this->split(x, head_.q.rows, parts);
        const bool ahead = fetches_gathers(parts);
        for_each_part<T, A>(parts, [&](auto vectors, index_t p) {
            constexpr int N = vectors;
            parallel_rows(plan_.keys(), [&](index_t j) {
                if (j >= head_.key_length) return;
                // Rows of padding and rows without keys have no weight and must not be read.
                offset_t first = edges.offsets[static_cast<std::size_t>(j)], last = edges.offsets[static_cast<std::size_t>(j) + 1];
                const index_t* rows = edges.queries.data();
                if (head_.query_length < head_.q.rows) last = std::lower_bound(rows + first, rows + last, head_.query_length) - rows;
                V sum[N];
                unroll<N>([&](auto v) POLYATTN_INLINE_LAMBDA { sum[v] = V(T(0)); });
                gather_sum<N, T, A>(sum, rows + first, transposed_weights_.data() + first, last - first, parts.part(p), this->known_edges(first, ahead));
                T* const to = out + offset_t{j} * columns + p * Parts<T>::part_columns;
                unroll<N>([&](auto v) POLYATTN_INLINE_LAMBDA { multiply_add(V(factor), sum[v], V::load_unaligned(to + v * width)).store_unaligned(to + v * width); });
            });
        });
    }

    /// dL/dscore = weight * (dL/dA - row mean) of blocks at the key positions that all have; with dropout on weights dL/dA alone.
    template <std::size_t Groups>
    void score_gradients(std::span<const UnitBlock, Groups> blocks, Bounds positions, Buffers& own, std::span<const WeightGradientTerm<T>> terms) {
        using V = Vec<T, A>;
        constexpr int G = Groups, of_group = Tiles::group_vectors, vectors = G * of_group, lanes = Tiles::lanes;
        const bool drops = head_.dropout.drops_weights();
        const std::ptrdiff_t term_size = std::ptrdiff_t{head_.v.cols} * group_size;
        const auto g_of = [&](const UnitBlock& at) { return own.g + static_cast<std::ptrdiff_t>(at.slot * terms.size()) * term_size; };
        const T *weights[G], *means[G];
        T* d_scores[G];
        for (int g = 0; g < G; ++g) {
            const UnitBlock& at = blocks[static_cast<std::size_t>(g)];
            const offset_t skipped = offset_t{positions.begin - at.block.first} * group_size;
            weights[g] = at.weights + skipped;
            d_scores[g] = at.d_scores + skipped;
            means[g] = own.means + at.slot * group_size;
        }
        const T* const g = g_of(blocks[0]);
        const std::ptrdiff_t group_stride = g_of(blocks[G - 1]) - g;
        const auto tile = [&]<int M>(std::integral_constant<int, M>, index_t key) POLYATTN_INLINE_LAMBDA {
            TileScores<T, A, M, G> sum;
            expand<M * vectors>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA {
                ((sum[I] = drops ? V(T(0)) : V(T(0)) - V::load_aligned(means[I % vectors / of_group] + I % of_group * lanes)), ...);
            });
            for (std::size_t t = 0; t < terms.size(); ++t) {
                const Rows<T> z = own.z[t].get(blocks[0].block.tile->keys, blocks[0].piece->list_slot, terms[t].z);
                score_tile<M, G, T, A>(sum, z.row(positions.begin + key), z.stride, g + static_cast<std::ptrdiff_t>(t) * term_size, group_stride, head_.v.cols);
            }
            const offset_t at = offset_t{key} * group_size;
            expand<M * vectors>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA {
                if (!drops) ((sum[I] = sum[I] * V::load_aligned(weights[I % vectors / of_group] + at + I / vectors * group_size + I % of_group * lanes)), ...);
                (sum[I].store_aligned(d_scores[I % vectors / of_group] + at + I / vectors * group_size + I % of_group * lanes), ...);
            });
        };
        for_each_key_tile<Tiles::score_keys, (G > 1)>(positions.size(), tile);
    }

    /// From dL/dA to dL/dscore = weight * (mask * dL/dA - row mean).
    void drop_gradients(const UnitBlock& at, const Group& group, const T* means) const {
        drop_weights(at.block, head_.dropout, group, at.d_scores);
        for (index_t i = 0; i < at.block.keys * group_size; ++i) at.d_scores[i] = at.weights[i] * (at.d_scores[i] - means[i % group_size]);
    }

    static void clear_unseen(const Block& block, T* d_scores) {
        for (index_t p = 0; p < block.keys; ++p)
            for (int lane = 0; lane < group_size; ++lane)
                if (!block.is_seen(lane, p)) d_scores[p * group_size + lane] = 0;
    }

    void accumulate_bias(const Block& block, const Group& group, const T* d_scores, std::span<double> bias_gradient) const {
        for (index_t p = 0; p < block.keys; ++p)
            Base::for_each_lane(group, [&](std::size_t lane, index_t row) {
                if (this->is_alive(row) && block.is_seen(static_cast<int>(lane), p))
                    head_.bias->accumulate_gradient(bias_gradient, head_.batch, head_.head, row, block.key(p), double(d_scores[p * group_size + static_cast<index_t>(lane)]));
            });
    }

    void edge_gradients(std::span<const WeightGradientTerm<T>> terms, std::span<const T> row_means, Rows<T> q, Rows<T> k, T scale, const HeadGradient<T>& gradient, T* d_k) {
        if (!has_edges_) return;
        const Edges& edges = plan_.edges();
        Arena& arena = workers_[0];
        const auto d_scores = arena.template take<T>(edges.count());
        const Parts<T> parts = take_parts<T>(std::max(head_.v.rows, head_.k.rows), std::max(columns_, dim_), arena);
        const Parts<T> z{parts.data, head_.v.rows, columns_}, keys{parts.data, head_.k.rows, dim_};
        if (columns_ == 0) std::fill(d_scores.begin(), d_scores.end(), T(0));  // dots of nothing
        for (std::size_t t = 0; t < terms.size(); ++t) {
            this->split(terms[t].z, z.rows, z);
            this->edge_dots(terms[t].g, T(1), z, d_scores, t > 0);
        }
        parallel_rows(head_.q.rows, [&](index_t i) {
            const auto [first, last] = this->edge_range(i);
            const T mean = row_means[static_cast<std::size_t>(i)];
            for (offset_t e = edges.offsets[static_cast<std::size_t>(i)]; e < edges.offsets[static_cast<std::size_t>(i) + 1]; ++e) {
                T& d_score = d_scores[static_cast<std::size_t>(e)];
                if (e >= last || !this->is_alive(i)) d_score = 0;
                else {
                    if (head_.dropout.drops_weights()) d_score *= static_cast<T>(head_.dropout.weight(i, edges.keys[static_cast<std::size_t>(e)]));
                    d_score = plain_edge_weights_[static_cast<std::size_t>(e)] * (d_score - mean);
                }
            }
        });
        // Queries like a hop over the keys, keys like a transposed one over the queries.
        const auto d_query = arena.template take<T>(offset_t{head_.q.rows} * dim_);
        std::fill(d_query.begin(), d_query.end(), T(0));
        this->split(k, keys.rows, keys);
        edge_weights_ = d_scores;
        this->sum_edges(keys, scale, d_query.data(), dim_, nullptr);
        parallel_rows(head_.q.rows, [&](index_t i) {
            add_row<A>(gradient.d_q, i, T(1), d_query.data() + offset_t{i} * dim_);
        });
        transpose_edges(plan_.template lowered<TransposedEdges>(), d_scores);
        add_transposed_edges(q, scale, dim_, d_k);
        if constexpr (LearnedBias<Bias>)
            for (index_t i = 0; i < head_.q.rows; ++i) {
                if (!this->is_alive(i)) continue;
                const auto [first, last] = this->edge_range(i);
                for (offset_t e = first; e < last; ++e)
                    head_.bias->accumulate_gradient(gradient.bias_gradient, head_.batch, head_.head, i, edges.keys[static_cast<std::size_t>(e)], double(d_scores[static_cast<std::size_t>(e)]));
            }
    }

    std::span<T> transposed_weights_;  // of edges, ordered by key
    Parts<T> sums_source_;
    NonFiniteRows bad_x_;
    offset_t block_keys_ = 0;
};

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
