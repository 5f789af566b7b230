#pragma once
// One query a head: decoding with a cache of keys and values. Reading them is the limit, so the query heads that share a key head
// go through its keys together, and long rows are cut into chunks for several threads.

#include <polyattn/backend/simd/sparse_softmax.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// Keys of a row: `keys`, or first, first + 1, .. where that is null.
struct KeyRun {
    const index_t* keys;
    index_t first, count;
    index_t operator[](index_t p) const { return keys ? keys[p] : first + p; }
};

/// Calls f(KeyRun) for the keys below key_length that query 0 of a plan sees.
template <class F>
void for_each_key_run(const Plan& plan, index_t key_length, F&& f) {
    const auto emit = [&](KeyRun run) {
        if (run.count > 0) f(run);
    };
    for (const Tile& tile : plan.tiles()) {
        const index_t position = tile.rows.find(0);
        if (position < 0) continue;
        Bounds seen = tile.row_bounds(position);
        seen.end = std::min(seen.end, tile.keys.lower_bound(key_length));
        if (seen.empty()) continue;
        if (tile.keys.is_list()) emit({tile.keys.elements().data() + seen.begin, 0, seen.size()});
        else {
            index_t first = tile.keys[seen.begin];
            const index_t end = tile.keys[seen.end - 1] + 1;
            for (auto skip = std::lower_bound(tile.excluded.begin(), tile.excluded.end(), first); skip != tile.excluded.end() && *skip < end; ++skip) {
                emit({nullptr, first, *skip - first});
                first = *skip + 1;
            }
            emit({nullptr, first, end - first});
        }
    }
    const auto edges = plan.edges().row(0);
    emit({edges.data(), 0, static_cast<index_t>(std::lower_bound(edges.begin(), edges.end(), key_length) - edges.begin())});
}

/// So many of the next rows that a tile fetches between its steps.
template <class T>
struct SomeLines {
    NextRows<T>* rows;
    index_t lines;

    /// Lines to fetch each time for all `rows` to be there after so many times.
    static index_t of(index_t rows, index_t columns, index_t times) { return (rows * ((columns + cache_line<T> - 1) / cache_line<T>) + times - 1) / times; }
    POLYATTN_ALWAYS_INLINE void fetch() {
        for (index_t i = 0; i < lines && !rows->empty(); ++i) rows->line();
    }
};

/// How the query heads of a key head lie in vectors: each has one or two lanes, which multiply one or two values of a key at once, and a single head has all of them.
template <class T, class A>
struct HeadLanes {
    static constexpr int width = lanes<T, A>;
    index_t heads, run = heads == 1 ? width : sizeof(T) == 4 && 2 * heads <= width ? 2 : 1;
    index_t slots = run > 1 ? width / run : padded(heads, width);  // heads and those that nobody asked for
    index_t sets = run > 1 ? 1 : slots / width;
    index_t period = slots * run;                                  // weights after which the heads come again at the start of a vector

    /// f(integral_constant run).
    template <class F>
    void with_run(F&& f) const {
        if (run == width) f(std::integral_constant<int, width>{});
        else if (run == 1) f(std::integral_constant<int, 1>{});
        else if constexpr (sizeof(T) == 4 && width > 2) f(std::integral_constant<int, 2>{});
    }
    /// Queries as [set][dim / run][head][run].
    template <class Query>
    void pack(index_t dim, Query&& query, T* to) const {
        for (index_t first = 0; first < slots; first += width / run)
            for (index_t t = 0; t < dim; t += run)
                for (index_t lane = 0; lane < width; ++lane) *to++ = first + lane / run < heads ? query(first + lane / run, t + lane % run) : T(0);
    }
};

/// Keys of a tile of scores.
template <class T, class A, int Run>
inline constexpr int decode_keys = Run == lanes<T, A> ? Run : std::max(lanes<T, A>, 8);

/// weights[key][slots] = dots of `count` keys, in whole tiles, and one set of heads.
template <int Run, class T, class A>
void score_heads(const T* queries, index_t dim, Rows<T> keys, index_t count, T* weights, index_t slots, SomeLines<T> next) {
    using V = Vec<T, A>;
    constexpr int width = lanes<T, A>, M = decode_keys<T, A, Run>;
    const std::ptrdiff_t four = 4 * keys.stride;  // four base pointers and one offset address all keys
    for (index_t p = 0; p < count; p += M) {
        const T* const base[4] = {keys.row(p), keys.row(p + 1), keys.row(p + 2), keys.row(p + 3)};
        V dot[M];
        expand<M>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((dot[I] = V(T(0))), ...); });
        in_steps(dim / Run, [&](index_t t) POLYATTN_INLINE_LAMBDA {
            const V query = in_register<T, A>(V::load_aligned(queries + t * width));
            expand<M>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((dot[I] = multiply_add(query, repeat<Run, T, A>(base[I % 4] + I / 4 * four + t * Run), dot[I])), ...); });
        }, next);
        if constexpr (Run == width) lane_sums<T, A>(dot).store_aligned(weights + p);
        else if constexpr (Run == 2)
            expand<M / 2>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { (pair_sums<A>(dot[2 * I], dot[2 * I + 1]).store_aligned(weights + p * slots + I * width), ...); });
        else
            expand<M>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { (dot[I].store_aligned(weights + (p + I) * slots), ...); });
    }
}

/// sums[head][columns] += sum over p < count of weights[p][head] * values[p][columns].
template <class T, class A>
void add_values(const T* weights, index_t slots, index_t heads, Rows<T> values, index_t count, index_t columns, T* sums, SomeLines<T> next) {
    const auto panels = [&]<int M>(std::integral_constant<int, M>, index_t head) POLYATTN_INLINE_LAMBDA {
        for_column_panels<M == 4 && Tiling<T, A>::registers < 32 ? 3 : 4, lanes<T, A>>(columns, [&](auto vectors, index_t column) POLYATTN_INLINE_LAMBDA {
            weighted_sum_tile<M, vectors, T, A>(weights + head, values.data + column, values.stride, count, sums + head * columns + column, columns, true, slots, next);
        });
    };
    index_t head = 0;
    for (; head + 4 <= heads; head += 4) panels(std::integral_constant<int, 4>{}, head);
    for (; head + 2 <= heads; head += 2) panels(std::integral_constant<int, 2>{}, head);
    if (head < heads) panels(std::integral_constant<int, 1>{}, head);
}

/// One hop of the heads `heads` of one query each, which share keys and values: chunks of keys one by one, on any number of threads, and what they give put together.
template <class A, class T, class Bias>
class Decoding {
public:
    Decoding(std::span<const Head<T, Bias>> heads, Workers& workers)
        : heads_(heads), first_(heads[0]), rows_(static_cast<index_t>(heads.size())), dim_(padded(first_.q.cols, width)), columns_(padded(first_.v.cols, width)),
          k_(rows_in_place(first_.k)), v_(rows_in_place(first_.v)),
          from_memory_(offset_t{first_.k.rows} * (dim_ + columns_) * static_cast<offset_t>(sizeof(T)) > offset_t{8} << 20) {
        Arena& arena = workers[0];
        queries_ = arena.take<T>(offset_t{layout_.sets} * dim_ * width).data();
        layout_.pack(dim_, [&](index_t m, index_t c) { return c < first_.q.cols ? heads[static_cast<std::size_t>(m)].q(0, c) * static_cast<T>(first_.scale * log2_e) : T(0); }, queries_);
        cut(arena);
        states_ = arena.take<T>(runs() * rows_ * state_size_).data();
        scratch_ = arena.take<T*>(workers.count());
        for (int w = 0; w < workers.count(); ++w)
            scratch_[static_cast<std::size_t>(w)] = workers[w].template take<T>(offset_t{block} * layout_.slots + offset_t{rows_} * columns_ + block * (dim_ + columns_) + 2 * layout_.period).data();
    }
    offset_t runs() const { return static_cast<offset_t>(chunks_.size()); }

    /// Chunk r: for each head the sum of weights times values, the weights' reference and their sum.
    void attend(offset_t r, int worker) {
        const KeyRun& run = chunks_[static_cast<std::size_t>(r)];
        const Chunk chunk(*this, states_ + r * rows_ * state_size_, scratch_[static_cast<std::size_t>(worker)]);
        for (index_t at = 0; at < run.count; at += block) {
            const index_t count = std::min(block, run.count - at);
            // The next block comes in meanwhile: the hardware does not see ahead where keys and values take turns.
            NextRows<T> next_keys, next_values;
            if (const index_t next = run[at] + count; from_memory_ && !run.keys && next + block <= first_.k.rows) {
                if (k_.data) next_keys = {k_.row(next), k_.stride, block, dim_};
                if (v_.data) next_values = {v_.row(next), v_.stride, block, columns_};
            }
            const Rows<T> values = copies_values(run) ? Rows<T>{chunk.values, columns_} : Rows<T>{v_.row(run[at]), v_.stride};
            score(run, at, count, chunk, next_keys);
            add_bias(run, at, count, chunk.weights);
            soften(count, chunk);
            const index_t tiles = (rows_ + 3) / 4 * std::max(columns_ / width / 4, 1);
            add_values<T, A>(chunk.weights, layout_.slots, rows_, values, count, columns_, chunk.sums, SomeLines<T>{&next_values, SomeLines<T>::of(block, columns_, tiles * (block / 4))});
        }
        for (index_t m = 0; m < rows_; ++m) std::copy_n(chunk.sums + m * columns_, columns_, chunk.state + m * state_size_);
    }
    /// All chunks of head m, in their order.
    void finish(index_t m, const HeadResult<T>& result) {
        const auto state = [&](offset_t r) { return states_ + (r * rows_ + m) * state_size_; };
        T* const out = scratch_[0];
        T highest = no_reference<T>, total = 0;
        for (offset_t r = 0; r < runs(); ++r) highest = std::max(highest, state(r)[columns_]);
        std::fill_n(out, columns_, T(0));
        for (offset_t r = 0; r < runs(); ++r) {
            const T factor = std::exp2(state(r)[columns_] - highest);  // a chunk of factor 0 counts: what is not finite in it reaches the output
            total += factor * state(r)[columns_ + 1];
            map_row<T, A>(state(r), out, columns_, [&](V x, V y) POLYATTN_INLINE_LAMBDA { return multiply_add(V(factor), x, y); });
        }
        const bool alive = !is_zero(total);
        const T factor = alive ? static_cast<T>(first_.recursion->hops[0].walk * first_.recursion->start) / total : T(0);
        for (index_t c = 0; c < first_.v.cols; ++c) out[c] = alive ? out[c] * factor : T(0);
        for (index_t c = 0; c < first_.v.cols; ++c) result.out(0, c) = result.accumulate ? result.out(0, c) + out[c] : out[c];
        if (result.logsumexp) *result.logsumexp = alive ? static_cast<T>((double(highest) + std::log2(double(total))) * ln_2) : empty_row<T>();
        if (result.hops) std::copy_n(out, first_.v.cols, result.hops);
    }

private:
    using V = Vec<T, A>;
    static constexpr int width = lanes<T, A>;
    static constexpr index_t block = 64, chunk_keys = 4096;  // a block of values stays in the first-level cache

    /// What a chunk is worked out in: weights of a block, [key][head], sums [head][columns], copies of keys and values that are not where a tile wants them, a number for each lane of a period.
    struct Chunk {
        Chunk(const Decoding& of, T* states, T* scratch)
            : state(states), weights(scratch), sums(weights + offset_t{block} * of.layout_.slots), keys(sums + offset_t{of.rows_} * of.columns_), values(keys + block * of.dim_),
              highest(values + block * of.columns_), total(highest + of.layout_.period) {
            std::fill_n(sums, offset_t{of.rows_} * of.columns_, T(0));
            for (index_t m = 0; m < of.rows_; ++m) {
                state[m * of.state_size_ + of.columns_] = no_reference<T>;
                state[m * of.state_size_ + of.columns_ + 1] = T(0);
            }
        }
        T *const state, *const weights, *const sums, *const keys, *const values, *const highest, *const total;
    };

    /// Rows that tiles read where they are. Others are copied block by block, as those of lists are.
    static Rows<T> rows_in_place(MatrixView<const T> view) {
        return (view.col_stride == 1 || view.cols == 1) && view.cols % width == 0 ? Rows<T>{view.data, view.row_stride} : Rows<T>{};
    }
    bool copies_values(const KeyRun& run) const { return run.keys || !v_.data; }
    /// Padded with zeros to `columns`.
    static void copy_row(MatrixView<const T> from, index_t i, index_t columns, T* to) {
        if (from.col_stride == 1) std::copy_n(from.row(i), from.cols, to);
        else
            for (index_t c = 0; c < from.cols; ++c) to[c] = from(i, c);
        std::fill(to + from.cols, to + columns, T(0));
    }

    /// The chunks hang on the plan only, so every number of threads adds in the same order.
    void cut(Arena& arena) {
        const index_t key_length = first_.query_length > 0 ? first_.key_length : 0;
        const auto for_each_chunk = [&](auto&& f) {
            for_each_key_run(*first_.plan, key_length, [&](const KeyRun& run) {
                for (index_t at = 0; at < run.count; at += chunk_keys) f(KeyRun{run.keys ? run.keys + at : nullptr, run.first + at, std::min(chunk_keys, run.count - at)});
            });
        };
        std::size_t count = 0;
        for_each_chunk([&](const KeyRun&) { ++count; });
        chunks_ = arena.take<KeyRun>(static_cast<offset_t>(count));
        count = 0;
        for_each_chunk([&](const KeyRun& run) { chunks_[count++] = run; });
    }
    void score(const KeyRun& run, index_t at, index_t count, const Chunk& chunk, NextRows<T>& next_keys) {
        const auto key_at = [&](index_t p) { return run[at + std::min(p, count - 1)]; };  // the last one stands for those behind
        layout_.with_run([&]<int Run>(std::integral_constant<int, Run>) {
            constexpr int M = decode_keys<T, A, Run>;
            const index_t whole = run.keys || !k_.data ? 0 : count / M * M;
            for (index_t p = whole; p < padded(count, M); ++p) {
                copy_row(first_.k, key_at(p), dim_, chunk.keys + (p - whole) * dim_);
                if (copies_values(run)) copy_row(first_.v, key_at(p), columns_, chunk.values + p * columns_);
                if (!run.keys || !from_memory_ || at + block + p >= run.count) continue;
                for (index_t c = 0; c < dim_; c += cache_line<T>) prefetch(first_.k.row(run[at + block + p]) + c);
                for (index_t c = 0; c < columns_; c += cache_line<T>) prefetch(first_.v.row(run[at + block + p]) + c);
            }
            if (copies_values(run))
                for (index_t p = 0; p < whole; ++p) copy_row(first_.v, key_at(p), columns_, chunk.values + p * columns_);
            const SomeLines<T> next{&next_keys, SomeLines<T>::of(block, dim_, layout_.sets * (block / M) * std::max(dim_ / Run / 4, 1))};
            for (index_t set = 0; set < layout_.sets; ++set) {
                const T* const queries = queries_ + set * dim_ * width;
                if (whole > 0) score_heads<Run, T, A>(queries, dim_, {k_.row(key_at(0)), k_.stride}, whole, chunk.weights + set * width, layout_.slots, next);
                score_heads<Run, T, A>(queries, dim_, {chunk.keys, dim_}, padded(count, M) - whole, chunk.weights + whole * layout_.slots + set * width, layout_.slots, next);
            }
        });
    }
    void add_bias(const KeyRun& run, index_t at, index_t count, T* weights) const {
        if constexpr (!std::is_same_v<Bias, NoBias>)
            for (index_t p = 0; p < count; ++p)
                for (index_t m = 0; m < rows_; ++m) {
                    const Head<T, Bias>& head = heads_[static_cast<std::size_t>(m)];
                    weights[p * layout_.slots + m] += static_cast<T>(double((*head.bias)(head.batch, head.head, 0, run[at + p])) * log2_e);
                }
    }
    /// Scores of some keys to weights relative to each head's reference, which follows the highest score.
    void soften(index_t count, const Chunk& chunk) const {
        T* const end = chunk.weights + (count + layout_.run - 1) / layout_.run * layout_.period;
        std::fill(chunk.weights + count * layout_.slots, end, masked_score<T>);
        for (index_t c = 0; c < layout_.period; c += width) {
            V own(no_reference<T>);
            for (const T* at = chunk.weights + c; at < end; at += layout_.period) own = xsimd::max(V::load_aligned(at), own);
            own.store_aligned(chunk.highest + c);
        }
        for (index_t m = 0; m < rows_; ++m) {
            T &reference = chunk.state[m * state_size_ + columns_], &sum = chunk.state[m * state_size_ + columns_ + 1], own = reference;
            for (index_t l = m; l < layout_.period; l += layout_.slots) own = std::max(own, chunk.highest[l]);
            if (own > reference) {
                const T factor = std::exp2(reference - own);  // 0 for the first block
                scale_row<T, A>(chunk.sums + m * columns_, factor, columns_, chunk.sums + m * columns_);
                sum *= factor;
                reference = own;
            }
            for (index_t l = m; l < layout_.period; l += layout_.slots) chunk.highest[l] = reference;
        }
        for (index_t c = 0; c < layout_.period; c += width) {
            const V reference = V::load_aligned(chunk.highest + c);
            V sum(T(0));
            for (T* at = chunk.weights + c; at < end; at += layout_.period) {
                const V weight = pow2(V::load_aligned(at) - reference);
                weight.store_aligned(at);
                sum = sum + weight;
            }
            sum.store_aligned(chunk.total + c);
        }
        for (index_t m = 0; m < rows_; ++m)
            for (index_t l = m; l < layout_.period; l += layout_.slots) chunk.state[m * state_size_ + columns_ + 1] += chunk.total[l];
    }

    std::span<const Head<T, Bias>> heads_;
    const Head<T, Bias>& first_;
    index_t rows_, dim_, columns_;
    index_t state_size_ = padded(columns_ + 2, width);  // sums, reference, sum of weights
    HeadLanes<T, A> layout_{rows_};
    Rows<T> k_, v_;  // null: not in place
    bool from_memory_;
    T *queries_, *states_;
    std::span<KeyRun> chunks_;
    std::span<T*> scratch_;
};

/// O(keys) work, memory O(heads * chunks * d).
template <class A, class T, class Bias>
void decode(std::span<const Head<T, Bias>> heads, std::span<const HeadResult<T>> results, Workers& workers) {
    Decoding<A, T, Bias> decoding(heads, workers);
    parallel_for(decoding.runs(), [&](offset_t r, int worker) { decoding.attend(r, worker); });
    for (std::size_t m = 0; m < heads.size(); ++m) decoding.finish(static_cast<index_t>(m), results[m]);
}

/// The work that decode() does: one query, A V, nothing dropped.
template <class T, class Bias>
bool is_decoding(const Head<T, Bias>& head) {
    return head.q.rows == 1 && head.recursion->hops.size() == 1 && head.recursion->hops[0].teleport == 0 && !head.dropout.drops_weights() && !head.dropout.drops_values();
}

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
