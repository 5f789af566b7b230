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

/// weights[head][l] = queries[head] . keys[l] for the keys l of one vector. Two heads share what is loaded of half of them. While the first heads work,
/// what lies `ahead` of the keys is fetched, if that is not 0.
template <class T, class A>
POLYATTN_ALWAYS_INLINE void key_dots(const T* queries, index_t heads, index_t dim, Rows<T> keys, std::ptrdiff_t ahead, T* weights, index_t weight_stride) {
    using V = Vec<T, A>;
    constexpr int width = lanes<T, A>, half = width / 2;
    const std::ptrdiff_t four = 4 * keys.stride;  // four base pointers and one offset address all keys
    index_t m = 0;
    for (; m + 2 <= heads; m += 2)
        for (int part = 0; part < width; part += half) {
            const T* const base[4] = {keys.row(part), keys.row(part + 1), keys.row(part + 2), keys.row(part + 3)};
            PerLane<T, A> product;
            expand<width>([&]<int... L>(Ints<L...>) POLYATTN_INLINE_LAMBDA { ((product[L] = V(T(0))), ...); });
            for (index_t c = 0; c < dim; c += width) {
                const V query[2] = {in_register<T, A>(V::load_aligned(queries + m * dim + c)), in_register<T, A>(V::load_aligned(queries + (m + 1) * dim + c))};
                expand<half>([&]<int... L>(Ints<L...>) POLYATTN_INLINE_LAMBDA {
                    const V key[half] = {in_register<T, A>(V::load_unaligned(base[L % 4] + L / 4 * four + c))...};
                    if (m == 0 && ahead && c % cache_line<T> == 0) (prefetch(base[L % 4] + L / 4 * four + c + ahead), ...);
                    ((product[L] = multiply_add(query[0], key[L], product[L])), ...);
                    ((product[L + half] = multiply_add(query[1], key[L], product[L + half])), ...);
                });
            }
            alignas(64) T dots[width];
            lane_sums<T, A>(product).store_aligned(dots);
            std::copy_n(dots, half, weights + m * weight_stride + part);
            std::copy_n(dots + half, half, weights + (m + 1) * weight_stride + part);
        }
    if (m == heads) return;
    const T* const base[4] = {keys.row(0), keys.row(1), keys.row(2), keys.row(3)};
    PerLane<T, A> product;
    expand<width>([&]<int... L>(Ints<L...>) POLYATTN_INLINE_LAMBDA {
        ((product[L] = V(T(0))), ...);
        for (index_t c = 0; c < dim; c += width) {
            const V query = V::load_aligned(queries + m * dim + c);
            if (m == 0 && ahead && c % cache_line<T> == 0) (prefetch(base[L % 4] + L / 4 * four + c + ahead), ...);
            ((product[L] = multiply_add(query, V::load_unaligned(base[L % 4] + L / 4 * four + c), product[L])), ...);
        }
    });
    lane_sums<T, A>(product).store_aligned(weights + m * weight_stride);
}

/// Rows that a tile fetches between its steps, four at a time.
template <class T>
struct RowRun {
    Rows<T> rows;
    index_t columns;  // 0: nothing is fetched

    POLYATTN_ALWAYS_INLINE void fetch() {
        for (index_t c = 0; c < columns; c += cache_line<T>)
            for (int i = 0; i < 4; ++i) prefetch(rows.row(i) + c);
        rows.data += 4 * rows.stride;
    }
};

/// sums[head][columns] += sum over p < count of weights[head][p] * values[p][columns]. While the first heads work, what lies `ahead` of the values is fetched,
/// if that is not 0.
template <class T, class A>
void add_values(const T* weights, index_t weight_stride, index_t heads, Rows<T> values, index_t count, std::ptrdiff_t ahead, index_t columns, T* sums) {
    using V = Vec<T, A>;
    constexpr int width = lanes<T, A>;
    for_each_key_tile<4>(heads, [&]<int M>(std::integral_constant<int, M>, index_t m) POLYATTN_INLINE_LAMBDA {
        for_column_panels<M == 1 || Tiling<T, A>::registers == 32 ? 4 : Tiling<T, A>::columns, width>(columns, [&](auto vectors, index_t column) POLYATTN_INLINE_LAMBDA {
            constexpr int N = vectors;
            T* const to = sums + m * columns + column;
            const T* const from = values.data + column;
            V acc[M * N];
            expand<M * N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((acc[I] = V::load_aligned(to + I / N * columns + I % N * width)), ...); });
            row_sum_tile<M, N, T, A>(acc, weights + m * weight_stride, weight_stride, from, values.stride, count, RowRun<T>{{from + ahead, values.stride}, m == 0 && ahead ? N * width : 0});
            expand<M * N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { (acc[I].store_aligned(to + I / N * columns + I % N * width), ...); });
        });
    });
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
    for (int w = 0; w < workers.count(); ++w) scratch[static_cast<std::size_t>(w)] = workers[w].template take<T>(offset_t{rows} * (block + columns) + block * (dim + columns)).data();
    const bool from_memory = offset_t{first.k.rows} * (dim + columns) * static_cast<offset_t>(sizeof(T)) > offset_t{8} << 20;
    parallel_for(runs, [&](offset_t r, int worker) {
        const KeyRun& run = chunks[static_cast<std::size_t>(r)];
        T *const weights = scratch[static_cast<std::size_t>(worker)], *const sums = weights + offset_t{rows} * block;
        T *const copied_keys = sums + offset_t{rows} * columns, *const copied_values = copied_keys + block * dim;
        T* const state = states + r * rows * state_size;
        std::fill_n(sums, offset_t{rows} * columns, T(0));
        for (index_t m = 0; m < rows; ++m) {
            state[m * state_size + columns] = no_reference<T>;
            state[m * state_size + columns + 1] = T(0);
        }
        for (index_t at = 0; at < run.count; at += block) {
            const index_t count = std::min(block, run.count - at);
            const auto key_at = [&](index_t p) { return run[at + std::min(p, count - 1)]; };  // the last one stands for those behind
            Rows<T> block_keys{k.row(key_at(0)), k.stride}, block_values{v.row(key_at(0)), v.stride};
            // The next block comes in meanwhile: the hardware does not see ahead where keys and values take turns.
            const bool fetches = from_memory && !run.keys && key_at(0) + count + block <= first.k.rows;
            if (run.keys) {
                for (index_t p = 0; p < padded(count, width); ++p) {
                    std::copy_n(k.row(key_at(p)), dim, copied_keys + p * dim);
                    std::copy_n(v.row(key_at(p)), columns, copied_values + p * columns);
                    if (!from_memory || at + block + p >= run.count) continue;
                    for (index_t c = 0; c < dim; c += cache_line<T>) prefetch(k.row(run[at + block + p]) + c);
                    for (index_t c = 0; c < columns; c += cache_line<T>) prefetch(v.row(run[at + block + p]) + c);
                }
                block_keys = {copied_keys, dim};
                block_values = {copied_values, columns};
            }
            for (index_t p = 0; p < count; p += width) {
                Rows<T> vector{block_keys.row(p), block_keys.stride};
                if (!run.keys && p + width > count) {
                    for (index_t l = 0; l < width; ++l) std::copy_n(k.row(key_at(p + l)), dim, copied_keys + l * dim);
                    vector = {copied_keys, dim};
                }
                key_dots<T, A>(queries, rows, dim, vector, fetches && p + width <= count ? block * k.stride : 0, weights + p, block);
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
            add_values<T, A>(weights, block, rows, block_values, count, fetches ? block * v.stride : 0, columns, sums);
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
