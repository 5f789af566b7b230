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

/// sums[columns] += sum over p < count of weights[p] * x[keys[p]], N vectors of columns.
template <int N, class T, class A>
POLYATTN_ALWAYS_INLINE void one_row_tile(const T* weights, const KeyRun& keys, index_t first, index_t count, Rows<T> x, T* sums, index_t column) {
    using V = Vec<T, A>;
    constexpr int width = lanes<T, A>, sets = 8 / N;
    V acc[sets][N];
    unroll<sets>([&](auto s) POLYATTN_INLINE_LAMBDA { unroll<N>([&](auto v) POLYATTN_INLINE_LAMBDA { acc[s][v] = s == 0 ? V::load_aligned(sums + column + v * width) : V(T(0)); }); });
    const auto add = [&](auto set, index_t p) POLYATTN_INLINE_LAMBDA {
        const T* const row = x.row(keys[first + p]) + column;
        unroll<N>([&](auto v) POLYATTN_INLINE_LAMBDA { acc[set][v] = multiply_add(V(weights[p]), V::load_unaligned(row + v * width), acc[set][v]); });
    };
    index_t p = 0;
    for (; p + sets <= count; p += sets) unroll<sets>([&](auto s) POLYATTN_INLINE_LAMBDA { add(s, p + s); });
    for (; p < count; ++p) add(std::integral_constant<int, 0>{}, p);
    unroll<N>([&](auto v) POLYATTN_INLINE_LAMBDA {
        unroll<sets - 1>([&](auto s) POLYATTN_INLINE_LAMBDA { acc[0][v] = acc[0][v] + acc[s + 1][v]; });
        acc[0][v].store_aligned(sums + column + v * width);
    });
}

/// A run of keys for several heads, which are the lanes of a group: states[head] = sums, reference, sum of weights.
template <class A, class T, class Bias>
void decode_lanes(const Head<T, Bias>& head, index_t rows, const KeyRun& run, const T* queries, Rows<T> k, Rows<T> v, index_t columns, T* scratch, T* states, index_t state_size) {
    constexpr index_t block_keys = 32, ahead = 64, line = 64 / sizeof(T);
    T *const weights = scratch, *const sums = scratch + block_keys * group_size;
    GroupState<T> state;
    state.start(sums, columns);
    Lanes working;
    for (index_t m = 0; m < rows; ++m) working.set(static_cast<std::size_t>(m), {0, block_keys});
    std::fill_n(sums, group_size * columns, T(0));
    const Tile tile{IndexSequence::range(0, 1), IndexSequence::range(run.first, run.first + run.count), {}, {}};
    const Group group{};
    for (index_t at = 0; at < run.count; at += block_keys) {
        const index_t count = std::min(block_keys, run.count - at);
        const Block block{&tile, at, count, {}, 0, count, false, {}};
        for (index_t p = at + ahead; p < std::min(at + ahead + block_keys, run.count); ++p) {
            for (index_t c = 0; c < head.q.cols; c += line) prefetch(k.row(run.first + p) + c);
            for (index_t c = 0; c < columns; c += line) prefetch(v.row(run.first + p) + c);
        }
        score_block<true, T, A>(block, head, {}, group, queries, {k.row(run.first + at), k.stride}, state, weights);
        if (count < block_keys)
            for (index_t m = 0; m < rows; ++m) working.end[static_cast<std::size_t>(m)] = count;
        weighted_sum<T, A>(weights, v.row(run.first + at), v.stride, count, &working, columns, sums, columns, true);
        state.has_out = true;
    }
    for (index_t m = 0; m < rows; ++m) {
        T* const own = states + m * state_size;
        std::copy_n(sums + m * columns, columns, own);
        own[columns] = state.reference[m];
        own[columns + 1] = state.sum[m];
    }
}

/// One hop of the heads `heads` of one query each, which share keys and values. O(keys) work, memory O(heads * chunks * d).
template <class A, class T, class Bias>
void decode(std::span<const Head<T, Bias>> heads, std::span<const HeadResult<T>> results, Workers& workers) {
    using V = Vec<T, A>;
    constexpr int width = lanes<T, A>;
    constexpr index_t block = 128, chunk_keys = 4096;  // a block of values stays in the first-level cache
    const Head<T, Bias>& first = heads[0];
    const auto rows = static_cast<index_t>(heads.size());
    const index_t dim = padded(first.q.cols, width), columns = padded(first.v.cols, width);
    Arena& arena = workers[0];
    const Rows<T> k = readable_rows(first.k, true, width, arena), v = readable_rows(first.v, true, width, arena);
    T* const queries = arena.take<T>(offset_t{rows} * dim).data();
    for (index_t m = 0; m < rows; ++m)
        for (index_t c = 0; c < dim; ++c)
            queries[m * dim + c] = c < first.q.cols ? heads[static_cast<std::size_t>(m)].q(0, c) * static_cast<T>(first.scale * log2_e) : T(0);

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
    for (int w = 0; w < workers.count(); ++w) scratch[static_cast<std::size_t>(w)] = workers[w].template take<T>(offset_t{std::max(rows, index_t{group_size})} * (block + columns)).data();
    // Some heads fill the lanes of a group well enough; a bias is the same for all lanes only.
    const bool heads_as_lanes = std::is_same_v<Bias, NoBias> && rows >= 3 && rows <= group_size;
    T* const lane_queries = arena.take<T>(offset_t{dim} * group_size).data();
    for (index_t c = 0; heads_as_lanes && c < dim; ++c)
        for (index_t m = 0; m < group_size; ++m) lane_queries[c * group_size + m] = queries[std::min(m, rows - 1) * dim + c];

    parallel_for(runs, [&](offset_t r, int worker) {
        const KeyRun& run = chunks[static_cast<std::size_t>(r)];
        if (heads_as_lanes && !run.keys) return decode_lanes<A>(first, rows, run, lane_queries, k, v, columns, scratch[static_cast<std::size_t>(worker)], states + r * rows * state_size, state_size);
        T *const weights = scratch[static_cast<std::size_t>(worker)], *const sums = weights + offset_t{rows} * block;
        T* const state = states + r * rows * state_size;
        std::fill_n(sums, offset_t{rows} * columns, T(0));
        for (index_t m = 0; m < rows; ++m) {
            state[m * state_size + columns] = no_reference<T>;
            state[m * state_size + columns + 1] = T(0);
        }
        for (index_t at = 0; at < run.count; at += block) {
            const index_t count = std::min(block, run.count - at);
            for (index_t p = 0; p < count; p += width) {
                const T* key[width];
                unroll<width>([&](auto l) POLYATTN_INLINE_LAMBDA { key[l] = k.row(run[at + std::min<index_t>(p + l, count - 1)]); });  // the last one stands for those behind
                for (index_t m = 0; m < rows; ++m) {
                    V product[width];
                    unroll<width>([&](auto l) POLYATTN_INLINE_LAMBDA { product[l] = V(T(0)); });
                    for (index_t c = 0; c < dim; c += width) {
                        const V query = V::load_aligned(queries + m * dim + c);
                        unroll<width>([&](auto l) POLYATTN_INLINE_LAMBDA { product[l] = multiply_add(query, V::load_unaligned(key[l] + c), product[l]); });
                    }
                    lane_sums<T, A>(product).store_aligned(weights + m * block + p);
                }
            }
            for (index_t m = 0; m < rows; ++m) {
                const std::span<T> own(weights + m * block, static_cast<std::size_t>(count));
                if constexpr (!std::is_same_v<Bias, NoBias>) {
                    const Head<T, Bias>& head = heads[static_cast<std::size_t>(m)];
                    for (index_t p = 0; p < count; ++p) own[static_cast<std::size_t>(p)] += static_cast<T>(double((*head.bias)(head.batch, head.head, 0, run[at + p])) * log2_e);
                }
                T &reference = state[m * state_size + columns], &sum = state[m * state_size + columns + 1];
                const T highest = highest_of<T, A>(own, reference);
                if (highest > reference) {
                    const T factor = std::exp2(reference - highest);  // 0 for the first block
                    scale_row<T, A>(sums + m * columns, factor, columns, sums + m * columns);
                    sum *= factor;
                    reference = highest;
                }
                sum += exp2_in_place<T, A>(own, reference);
            }
            for (index_t m = 0; m < rows; ++m)
                for_column_panels<4, width>(columns, [&](auto vectors, index_t column) POLYATTN_INLINE_LAMBDA {
                    one_row_tile<vectors, T, A>(weights + m * block, run, at, count, v, sums + m * columns, column);
                });
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
