#pragma once
// The adjoint of the attention operator: A^T x, and from the gradient of its weights those of queries, keys and bias.

#include <polyattn/backend/simd/sparse_softmax.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// One term of dL/dA_ij = sum_k G_k[i] . Z_k[j]; the factors of a hop are inside G.
template <class T>
struct WeightGradientTerm {
    Rows<T> g, z;
};

template <class T, class A, class Bias>
class SparseSoftmaxGradient : public SparseSoftmax<T, A, Bias> {
    using Base = SparseSoftmax<T, A, Bias>;
    using typename Base::Scratch;
    using Base::alive_;
    using Base::columns_;
    using Base::edge_weights_;
    using Base::has_edges_;
    using Base::head_;
    using Base::masked_;
    using Base::plain_edge_weights_;
    using Base::plan_;
    using Base::schedule_;
    using Base::scratch_;
    using Base::stored_;
    using Base::workers_;

public:
    using Tiles = typename Base::Tiles;

    /// Weights from the logsumexp that the forward pass saved.
    SparseSoftmaxGradient(const Head<T, Bias>& head, const T* logsumexp, const Workers& workers) : Base(head, workers) {
        this->choose_storage();
        this->relative_ = false;
        for (index_t i = 0; i < head.q.rows; ++i) {
            alive_[static_cast<std::size_t>(i)] = i < head.query_length && !is_empty_row(logsumexp[i]);
            this->logsumexp_[static_cast<std::size_t>(i)] = this->is_alive(i) ? static_cast<T>(double(logsumexp[i]) * log2_e) : T(0);
        }
        this->score_edges();
        this->for_each_row([&](index_t i) {
            exp2_in_place<T, A>(this->edges_of(edge_weights_, i), this->logsumexp_[static_cast<std::size_t>(i)]);
            this->finish_edges(i, T(1));
        });
        if (stored_)
            this->for_each_group([&](std::size_t g, Scratch& scratch) {
                const Group& group = schedule_.groups()[g];
                GroupState<T> state;
                this->start_final(group, scratch, state);
                this->for_each_piece_block(group, [&](const Block& block, const Piece& piece) {
                    this->compute_final(group, block, piece, scratch, state, true, this->stored_weights(block, piece));
                });
            });
    }

    /// out = A^T x over all keys; rows of x without keys must be 0.
    void apply_transposed(Rows<T> x, T* out, std::ptrdiff_t out_stride) {
        if (masked_) this->non_finite_.mark(x, head_.q.rows, columns_, workers_[0]);
        sum_chunks(columns_, out, out_stride, [&](std::span<const Group> groups, Scratch& scratch, T* part, std::ptrdiff_t stride, ScatteredRows<T>& scattered, int) {
            for (const Group& group : groups) {
                pack_lanes(group, x, T(1), columns_, scratch.out, this->non_finite_);
                this->final_weights(group, scratch, true, [&](const Block& block, const Piece& piece, const T* weights) {
                    std::ptrdiff_t to_stride;
                    T* to = scattered.get(block.tile->keys, piece.list_slot, part, stride, to_stride) + block.first * to_stride;
                    transposed_sum<T, A>(weights, block.keys, scratch.out, columns_, columns_, to, to_stride);
                    add_non_finite_lanes(group, block, weights, x, T(1), columns_, this->non_finite_, to, to_stride);
                });
            }
        });
        add_transposed_edges(edge_weights_, x, T(1), columns_, out, out_stride);
    }

    /// From dL/dA (as terms) and row_means[i] = sum_j A_ij dL/dA_ij to the gradients of q, k and the bias, which are added.
    void weights_gradient(std::span<const WeightGradientTerm<T>> terms, std::span<const T> row_means, const HeadGradient<T>& gradient) {
        Arena& arena = workers_[0];
        const Rows<T> q = readable_rows(head_.q, true, Tiles::lanes, arena), k = readable_rows(head_.k, true, Tiles::lanes, arena);
        const index_t dim = padded(head_.q.cols, Tiles::lanes), value_dim = head_.v.cols;
        const T scale = static_cast<T>(head_.scale);
        NonFiniteRows bad_keys, bad_queries, bad_terms;
        bool clear_masked = false;  // 0 x NaN would leave a NaN where a row sees nothing
        if (masked_) {
            bad_keys.mark(k, head_.k.rows, head_.k.cols, arena);
            bad_queries.mark(q, head_.q.rows, head_.q.cols, arena);
            clear_masked = bad_keys.any() || bad_queries.any();
            for (const T mean : row_means) clear_masked |= !is_finite(mean);
            for (const auto& term : terms) {
                bad_terms.mark(term.z, head_.v.rows, value_dim, arena);
                clear_masked |= bad_terms.any();
                bad_terms.mark(term.g, head_.q.rows, value_dim, arena);
                clear_masked |= bad_terms.any();
            }
        }

        struct Buffers {
            T *g, *d_scores, *queries, *d_query;
            std::span<GatheredRows<T>> z;
            GatheredRows<T> k;
        };
        const auto buffers = arena.take<Buffers>(workers_.count());
        for (int w = 0; w < workers_.count(); ++w) {
            Buffers& own = buffers[static_cast<std::size_t>(w)] = Buffers{};
            Arena& from = workers_[w];
            own.g = from.take<T>(static_cast<offset_t>(terms.size()) * value_dim * group_size).data();
            own.d_scores = from.take<T>(offset_t{Tiles::key_block} * group_size).data();
            own.queries = from.take<T>(offset_t{dim} * group_size).data();
            own.d_query = from.take<T>(offset_t{dim} * group_size).data();
            own.z = from.take<GatheredRows<T>>(static_cast<offset_t>(terms.size()));
            for (auto& rows : own.z) (rows = {}).prepare(schedule_.list_capacity(), value_dim, from);
            own.k.prepare(schedule_.list_capacity(), dim, from);
        }
        const std::size_t bias_size = gradient.bias_gradient.size();
        const auto bias_parts = arena.take<double>(static_cast<offset_t>(bias_size) * schedule_.chunks());
        std::fill(bias_parts.begin(), bias_parts.end(), 0.);

        const offset_t d_k_size = offset_t{head_.k.rows} * dim;
        T* const d_k = arena.take<T>(d_k_size).data();
        sum_chunks(dim, d_k, dim, [&](std::span<const Group> groups, Scratch& scratch, T* part, std::ptrdiff_t stride, ScatteredRows<T>& scattered, int chunk) {
            Buffers& own = buffers[static_cast<std::size_t>(&scratch - scratch_.data())];
            const std::span<double> bias_part = bias_parts.subspan(static_cast<std::size_t>(chunk) * bias_size, bias_size);
            for (const Group& group : groups) {
                alignas(64) T means[group_size];
                for (std::size_t lane = 0; lane < group_size; ++lane) means[lane] = row_means[static_cast<std::size_t>(group.rows[lane])];
                for (std::size_t t = 0; t < terms.size(); ++t)
                    pack_rows(group.rows, terms[t].g, value_dim, T(1), own.g + static_cast<offset_t>(t) * value_dim * group_size);
                pack_lanes(group, q, scale, dim, own.queries, bad_queries);
                bool started = false;
                this->final_weights(group, scratch, false, [&](const Block& block, const Piece& piece, T* weights) {
                    score_gradients(block, piece, group, weights, own.g, means, terms, own.z, own.d_scores);
                    if (clear_masked && block.masked) clear_unseen(block, own.d_scores);
                    if constexpr (LearnedBias<Bias>) accumulate_bias(block, group, own.d_scores, bias_part);
                    const Rows<T> keys = own.k.get(block.tile->keys, piece.list_slot, k);
                    weighted_sum_block<T, A>(block, own.d_scores, {keys.row(block.first), keys.stride}, bad_keys, dim, own.d_query, started);
                    started = true;
                    std::ptrdiff_t to_stride;
                    T* to = scattered.get(block.tile->keys, piece.list_slot, part, stride, to_stride) + block.first * to_stride;
                    transposed_sum<T, A>(own.d_scores, block.keys, own.queries, dim, dim, to, to_stride);
                    add_non_finite_lanes(group, block, own.d_scores, q, scale, dim, bad_queries, to, to_stride);
                });
                if (started)
                    Base::for_each_lane(group, [&](std::size_t lane, index_t row) {
                        if (!this->is_alive(row)) return;
                        const T* from = own.d_query + lane * static_cast<std::size_t>(dim);
                        for (index_t c = 0; c < head_.q.cols; ++c) gradient.d_q(row, c) += scale * from[c];
                    });
            }
        });
        edge_gradients(terms, row_means, q, k, dim, scale, gradient, d_k);
        for (std::size_t part = 0; part < static_cast<std::size_t>(schedule_.chunks()); ++part)
            for (std::size_t b = 0; b < bias_size; ++b) gradient.bias_gradient[b] += bias_parts[part * bias_size + b];
        for (index_t j = 0; j < head_.k.rows; ++j)
            for (index_t c = 0; c < head_.k.cols; ++c) gradient.d_k(j, c) += d_k[offset_t{j} * dim + c];
    }

private:
    /// Fills out with the sum of what f(groups, scratch, part, stride, scattered, chunk) adds for each chunk of groups. The
    /// chunks are the plan's, whatever the number of threads, and are summed in order.
    template <class F>
    void sum_chunks(index_t columns, T* out, std::ptrdiff_t out_stride, F&& f) {
        const int chunks = schedule_.chunks();
        const offset_t size = offset_t{plan_.keys()} * columns;
        const Workers scratch_memory = workers_.nested();
        const auto parts = chunks > 1 ? scratch_memory[0].template take<T>(size * chunks) : std::span<T>();
        const auto scattered = scratch_memory[0].template take<ScatteredRows<T>>(workers_.count());
        for (int w = 0; w < workers_.count(); ++w)
            (scattered[static_cast<std::size_t>(w)] = {}).prepare(schedule_.list_capacity(), columns, scratch_memory[w]);
        for (Scratch& scratch : scratch_) scratch.values.forget();
        parallel_for(chunks, [&](offset_t chunk, int worker) {
            T* const part = chunks > 1 ? parts.data() + chunk * size : out;
            const std::ptrdiff_t stride = chunks > 1 ? columns : out_stride;
            for (index_t j = 0; j < plan_.keys(); ++j) std::fill_n(part + j * stride, columns, T(0));
            ScatteredRows<T>& own = scattered[static_cast<std::size_t>(worker)];
            f(schedule_.chunk(static_cast<int>(chunk)), scratch_[static_cast<std::size_t>(worker)], part, stride, own, static_cast<int>(chunk));
            own.flush(part, stride);
        });
        if (chunks == 1) return;
        for_each_key([&](index_t j) {
            T* to = out + j * out_stride;
            const T* from = parts.data() + offset_t{j} * columns;
            for (index_t c = 0; c < columns; ++c) {
                T sum = from[c];
                for (int part = 1; part < chunks; ++part) sum += from[part * size + c];
                to[c] = sum;
            }
        });
    }

    template <class F>
    void for_each_key(F&& f) {
        constexpr index_t unit = 64;
        parallel_for((plan_.keys() + unit - 1) / unit, [&](offset_t u, int) {
            const auto first = static_cast<index_t>(u) * unit;
            for (index_t j = first; j < std::min(first + unit, plan_.keys()); ++j) f(j);
        });
    }

    /// 16 rows of x times `factor`, [16][columns]; idle lanes, dead rows and rows that are not finite are 0.
    void pack_lanes(const Group& group, Rows<T> x, T factor, index_t columns, T* packed, const NonFiniteRows& non_finite) const {
        for (std::size_t lane = 0; lane < group_size; ++lane) {
            T* to = packed + lane * static_cast<std::size_t>(columns);
            const index_t row = group.rows[lane];
            if ((group.active >> lane & 1) && this->is_alive(row) && !non_finite[row])
                for (index_t c = 0; c < columns; ++c) to[c] = factor * x.row(row)[c];
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

    void add_transposed_edges(std::span<const T> weights, Rows<T> x, T factor, index_t columns, T* out, std::ptrdiff_t out_stride) {
        if (!has_edges_) return;
        const TransposedEdges& edges = plan_.template lowered<TransposedEdges>();
        for_each_key([&](index_t j) {
            if (j >= head_.key_length) return;
            // Rows of padding and rows without keys have no weight and must not be read.
            offset_t first = edges.offsets[static_cast<std::size_t>(j)], last = edges.offsets[static_cast<std::size_t>(j) + 1];
            const index_t* rows = edges.queries.data();
            last = std::lower_bound(rows + first, rows + last, head_.query_length) - rows;
            const offset_t* forward = edges.forward.data() + first;
            gather_sum<T, A>(last - first, [=](offset_t e) { return rows[first + e]; }, [=](offset_t e) { return weights[static_cast<std::size_t>(forward[e])]; }, x,
                             factor, columns, out + j * out_stride);
        });
    }

    /// dL/dscore of a block: weight * (mask * dL/dA - row mean).
    void score_gradients(const Block& block, const Piece& piece, const Group& group, T* weights, const T* g, const T* means,
                         std::span<const WeightGradientTerm<T>> terms, std::span<GatheredRows<T>> gathered, T* d_scores) {
        using V = Vec<T, A>;
        constexpr int vectors = Tiles::group_vectors, lanes = Tiles::lanes;
        const bool drops = head_.dropout.drops_weights();
        const auto tile = [&]<int M>(std::integral_constant<int, M>, index_t p) POLYATTN_INLINE_LAMBDA {
            TileScores<T, A, M> sum;
            unroll<vectors>([&](auto v) POLYATTN_INLINE_LAMBDA {
                const V start = drops ? V(T(0)) : V(T(0)) - V::load_aligned(means + v * lanes);
                unroll<M>([&](auto i) POLYATTN_INLINE_LAMBDA { sum[i][v] = start; });
            });
            for (std::size_t t = 0; t < terms.size(); ++t) {
                const Rows<T> z = gathered[t].get(block.tile->keys, piece.list_slot, terms[t].z);
                score_tile<M, T, A>(sum, z.row(block.first + p), z.stride, g + static_cast<offset_t>(t) * head_.v.cols * group_size, head_.v.cols);
            }
            unroll<M>([&](auto i) POLYATTN_INLINE_LAMBDA {
                unroll<vectors>([&](auto v) POLYATTN_INLINE_LAMBDA {
                    const offset_t at = offset_t{p + i} * group_size + v * lanes;
                    if (drops) sum[i][v].store_aligned(d_scores + at);
                    else (sum[i][v] * V::load_aligned(weights + at)).store_aligned(d_scores + at);
                });
            });
        };
        index_t p = 0;
        for (; p + Tiles::score_keys <= block.keys; p += Tiles::score_keys) tile(std::integral_constant<int, Tiles::score_keys>{}, p);
        for (; p < block.keys; ++p) tile(std::integral_constant<int, 1>{}, p);
        if (!drops) return;
        drop_weights(block, head_.dropout, group, d_scores);
        for (index_t at = 0; at < block.keys * group_size; ++at) d_scores[at] = weights[at] * (d_scores[at] - means[at % group_size]);
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

    void edge_gradients(std::span<const WeightGradientTerm<T>> terms, std::span<const T> row_means, Rows<T> q, Rows<T> k, index_t dim, T scale,
                        const HeadGradient<T>& gradient, T* d_k) {
        if (!has_edges_) return;
        const Edges& edges = plan_.edges();
        const auto d_scores = workers_[0].template take<T>(edges.count());
        std::fill(d_scores.begin(), d_scores.end(), T(0));
        const auto d_query = workers_[0].template take<T>(offset_t{head_.q.rows} * dim);
        std::fill(d_query.begin(), d_query.end(), T(0));
        this->for_each_row([&](index_t i) {
            if (!this->is_alive(i)) return;
            const auto [first, last] = this->edge_range(i);
            for (offset_t e = first; e < last; ++e) {
                const index_t key = edges.keys[static_cast<std::size_t>(e)];
                T d_weight = 0;
                for (const auto& term : terms) d_weight += dot<T, A>(term.g.row(i), term.z.row(key), columns_);
                if (head_.dropout.drops_weights()) d_weight *= static_cast<T>(head_.dropout.weight(i, key));
                d_scores[static_cast<std::size_t>(e)] = plain_edge_weights_[static_cast<std::size_t>(e)] * (d_weight - row_means[static_cast<std::size_t>(i)]);
            }
            const index_t* keys = edges.keys.data() + first;
            const T* weights = d_scores.data() + first;
            T* const to = d_query.data() + offset_t{i} * dim;
            gather_sum<T, A>(last - first, [=](offset_t e) { return keys[e]; }, [=](offset_t e) { return weights[e]; }, k, scale, dim, to);
            for (index_t c = 0; c < head_.q.cols; ++c) gradient.d_q(i, c) += to[c];
        });
        add_transposed_edges(d_scores, q, scale, dim, d_k, dim);
        if constexpr (LearnedBias<Bias>)
            for (index_t i = 0; i < head_.q.rows; ++i) {
                if (!this->is_alive(i)) continue;
                const auto [first, last] = this->edge_range(i);
                for (offset_t e = first; e < last; ++e)
                    head_.bias->accumulate_gradient(gradient.bias_gradient, head_.batch, head_.head, i, edges.keys[static_cast<std::size_t>(e)], double(d_scores[static_cast<std::size_t>(e)]));
            }
    }
};

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
