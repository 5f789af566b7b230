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

/// One hop of the heads `heads` of one query each, which share keys and values. O(keys) work, memory O(heads * chunks * d).
template <class A, class T, class Bias>
void decode(std::span<const Head<T, Bias>> heads, std::span<const HeadResult<T>> results, Workers& workers) {
    using V = Vec<T, A>;
    constexpr int width = lanes<T, A>;
    constexpr index_t block = 64, chunk_keys = 4096;  // a block of values stays in the first-level cache
    const Head<T, Bias>& first = heads[0];
    const auto rows = static_cast<index_t>(heads.size());
    const index_t dim = padded(first.q.cols, width), columns = padded(first.v.cols, width);
    Arena& arena = workers[0];
    const Rows<T> k = readable_rows(first.k, true, width, arena), v = readable_rows(first.v, true, width, arena);
    const HeadLanes<T, A> layout{rows};
    T* const queries = arena.take<T>(offset_t{layout.sets} * dim * width).data();
    layout.pack(dim, [&](index_t m, index_t c) { return c < first.q.cols ? heads[static_cast<std::size_t>(m)].q(0, c) * static_cast<T>(first.scale * log2_e) : T(0); }, queries);

    // The chunks hang on the plan only, so every number of threads adds in the same order.
    offset_t runs = 0;
    const index_t key_length = first.query_length > 0 ? first.key_length : 0;
    std::span<KeyRun> chunks;
    for (const bool counting : {true, false}) {
        if (!counting) chunks = arena.take<KeyRun>(std::exchange(runs, 0));
        for_each_key_run(*first.plan, key_length, [&](const KeyRun& run) {
            for (index_t at = 0; at < run.count; at += chunk_keys, ++runs)
                if (!counting) chunks[static_cast<std::size_t>(runs)] = {run.keys ? run.keys + at : nullptr, run.first + at, std::min(chunk_keys, run.count - at)};
        });
    }
    const index_t state_size = padded(columns + 2, width);  // sums, reference, sum of weights
    T* const states = arena.take<T>(runs * rows * state_size).data();
    const auto scratch = arena.take<T*>(workers.count());
    for (int w = 0; w < workers.count(); ++w) scratch[static_cast<std::size_t>(w)] = workers[w].template take<T>(offset_t{block} * layout.slots + offset_t{rows} * columns + block * (dim + columns) + 2 * layout.period).data();
    const bool from_memory = offset_t{first.k.rows} * (dim + columns) * static_cast<offset_t>(sizeof(T)) > offset_t{8} << 20;
    parallel_for(runs, [&](offset_t r, int worker) {
        const KeyRun& run = chunks[static_cast<std::size_t>(r)];
        T *const weights = scratch[static_cast<std::size_t>(worker)], *const sums = weights + offset_t{block} * layout.slots;
        T *const copied_keys = sums + offset_t{rows} * columns, *const copied_values = copied_keys + block * dim;
        T *const highest = copied_values + block * columns, *const total = highest + layout.period;
        T* const state = states + r * rows * state_size;
        std::fill_n(sums, offset_t{rows} * columns, T(0));
        for (index_t m = 0; m < rows; ++m) {
            state[m * state_size + columns] = no_reference<T>;
            state[m * state_size + columns + 1] = T(0);
        }
        // Scores of some keys to weights relative to each head's reference, which follows the highest score.
        const auto soften = [&](index_t count) {
            T* const end = weights + (count + layout.run - 1) / layout.run * layout.period;
            std::fill(weights + count * layout.slots, end, masked_score<T>);
            for (index_t c = 0; c < layout.period; c += width) {
                V own(no_reference<T>);
                for (const T* at = weights + c; at < end; at += layout.period) own = xsimd::max(V::load_aligned(at), own);
                own.store_aligned(highest + c);
            }
            for (index_t m = 0; m < rows; ++m) {
                T &reference = state[m * state_size + columns], &sum = state[m * state_size + columns + 1], own = reference;
                for (index_t l = m; l < layout.period; l += layout.slots) own = std::max(own, highest[l]);
                if (own > reference) {
                    const T factor = std::exp2(reference - own);  // 0 for the first block
                    scale_row<T, A>(sums + m * columns, factor, columns, sums + m * columns);
                    sum *= factor;
                    reference = own;
                }
                for (index_t l = m; l < layout.period; l += layout.slots) highest[l] = reference;
            }
            for (index_t c = 0; c < layout.period; c += width) {
                const V reference = V::load_aligned(highest + c);
                V sum(T(0));
                for (T* at = weights + c; at < end; at += layout.period) {
                    const V weight = pow2(V::load_aligned(at) - reference);
                    weight.store_aligned(at);
                    sum = sum + weight;
                }
                sum.store_aligned(total + c);
            }
            for (index_t m = 0; m < rows; ++m)
                for (index_t l = m; l < layout.period; l += layout.slots) state[m * state_size + columns + 1] += total[l];
        };
        for (index_t at = 0; at < run.count; at += block) {
            const index_t count = std::min(block, run.count - at);
            const auto key_at = [&](index_t p) { return run[at + std::min(p, count - 1)]; };  // the last one stands for those behind
            Rows<T> block_keys{k.row(key_at(0)), k.stride}, block_values{v.row(key_at(0)), v.stride};
            // The next block comes in meanwhile: the hardware does not see ahead where keys and values take turns.
            NextRows<T> next_keys, next_values;
            if (from_memory && !run.keys && key_at(0) + count + block <= first.k.rows) {
                next_keys = {k.row(key_at(0) + count), k.stride, block, dim};
                next_values = {v.row(key_at(0) + count), v.stride, block, columns};
            }
            layout.with_run([&]<int Run>(std::integral_constant<int, Run>) {
                constexpr int M = decode_keys<T, A, Run>;
                const index_t whole = run.keys ? 0 : count / M * M;
                for (index_t p = whole; p < padded(count, M); ++p) {
                    std::copy_n(k.row(key_at(p)), dim, copied_keys + (p - whole) * dim);
                    if (!run.keys) continue;
                    std::copy_n(v.row(key_at(p)), columns, copied_values + p * columns);
                    if (!from_memory || at + block + p >= run.count) continue;
                    for (index_t c = 0; c < dim; c += cache_line<T>) prefetch(k.row(run[at + block + p]) + c);
                    for (index_t c = 0; c < columns; c += cache_line<T>) prefetch(v.row(run[at + block + p]) + c);
                }
                if (run.keys) block_values = {copied_values, columns};
                const SomeLines<T> next{&next_keys, SomeLines<T>::of(block, dim, layout.sets * (block / M) * std::max(dim / Run / 4, 1))};
                for (index_t set = 0; set < layout.sets; ++set) {
                    score_heads<Run, T, A>(queries + set * dim * width, dim, block_keys, whole, weights + set * width, layout.slots, next);
                    score_heads<Run, T, A>(queries + set * dim * width, dim, {copied_keys, dim}, padded(count, M) - whole, weights + whole * layout.slots + set * width, layout.slots, next);
                }
            });
            if constexpr (!std::is_same_v<Bias, NoBias>)
                for (index_t p = 0; p < count; ++p)
                    for (index_t m = 0; m < rows; ++m) {
                        const Head<T, Bias>& head = heads[static_cast<std::size_t>(m)];
                        weights[p * layout.slots + m] += static_cast<T>(double((*head.bias)(head.batch, head.head, 0, run[at + p])) * log2_e);
                    }
            soften(count);
            const index_t tiles = (rows + 3) / 4 * std::max(columns / width / 4, 1);
            add_values<T, A>(weights, layout.slots, rows, block_values, count, columns, sums, SomeLines<T>{&next_values, SomeLines<T>::of(block, columns, tiles * (block / 4))});
        }
        for (index_t m = 0; m < rows; ++m) std::copy_n(sums + m * columns, columns, state + m * state_size);
    });

    T* const out = arena.take<T>(columns).data();
    for (index_t m = 0; m < rows; ++m) {
        const auto state = [&](offset_t r) { return states + (r * rows + m) * state_size; };
        T highest = no_reference<T>, total = 0;
        for (offset_t r = 0; r < runs; ++r) highest = std::max(highest, state(r)[columns]);
        std::fill_n(out, columns, T(0));
        for (offset_t r = 0; r < runs; ++r) {
            const T factor = is_zero(state(r)[columns + 1]) ? T(0) : std::exp2(state(r)[columns] - highest);
            if (is_zero(factor)) continue;
            total += factor * state(r)[columns + 1];
            map_row<T, A>(state(r), out, columns, [&](V x, V y) POLYATTN_INLINE_LAMBDA { return multiply_add(V(factor), x, y); });
        }
        const HeadResult<T>& result = results[static_cast<std::size_t>(m)];
        const bool alive = !is_zero(total);
        const T factor = alive ? static_cast<T>(first.recursion->hops[0].walk * first.recursion->start) / total : T(0);
        for (index_t c = 0; c < first.v.cols; ++c) out[c] = alive ? out[c] * factor : T(0);
        for (index_t c = 0; c < first.v.cols; ++c) result.out(0, c) = result.accumulate ? result.out(0, c) + out[c] : out[c];
        if (result.logsumexp) *result.logsumexp = alive ? static_cast<T>((double(highest) + std::log2(double(total))) * ln_2) : empty_row<T>();
        if (result.hops) std::copy_n(out, first.v.cols, result.hops);
    }
}

/// The work that decode() does: one query, A V, nothing dropped.
template <class T, class Bias>
bool is_decoding(const Head<T, Bias>& head) {
    return head.q.rows == 1 && head.recursion->hops.size() == 1 && head.recursion->hops[0].teleport == 0 && !head.dropout.drops_weights() && !head.dropout.drops_values();
}

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
