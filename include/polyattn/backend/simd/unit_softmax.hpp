#pragma once
// Softmax attention on the matrix unit, for groups of queries that see ranges of keys, without stored weights: scores of the next keys and sums of the last ones are made
// while vectors make weights of those between.

#include <polyattn/backend/simd/matrix_unit.hpp>
#include <polyattn/backend/simd/scores.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

template <class A, class Bias, class MatrixUnit>
class UnitSoftmax {
public:
    static constexpr index_t chunk = unit_inner;         // keys at once
    static constexpr index_t range = 512;                // keys of wide units before the next groups take them
    static constexpr std::size_t together = 2;           // groups at once

    /// One of the groups that are worked on together.
    struct Member {
        const Group* group;
        Block block;
        GroupState<float>* state;
        const float* queries;  // [dim][16]
        std::size_t slot;
    };

    /// Splits keys and values, which later calls only read. O(keys (dim + columns)).
    void prepare(const Head<float, Bias>& head, Rows<float> keys, Rows<float> values, index_t columns, const DistanceTable<float, Bias>& distances, const Workers& workers) {
        head_ = &head;
        distances_ = &distances;
        k_ = keys;
        v_ = values;
        columns_ = columns;
        steps_ = (head.k.cols + unit_inner - 1) / unit_inner;
        value_tiles_ = (columns + unit_side - 1) / unit_side;
        const index_t rows = head.k.rows, chunks = (rows + chunk - 1) / chunk;
        Arena& arena = workers[0];
        keys_ = arena.take<SplitImage>(offset_t{chunks} * 2 * steps_);
        values_ = arena.take<SplitImage>(offset_t{chunks} * value_tiles_);
        odd_keys_ = arena.take<std::uint8_t>(chunks);
        odd_values_ = arena.take<std::uint8_t>(chunks);
        const MatrixView<const float> k{keys.data, rows, head.k.cols, keys.stride, 1}, v{values.data, columns, rows, 1, values.stride};
        parallel_for(chunks, [&](offset_t c, int) {
            const auto first = static_cast<index_t>(c) * chunk;
            bool odd_key = false, odd_value = false;
            for (index_t half = 0; half < 2; ++half)
                for (index_t step = 0; step < steps_; ++step)
                    odd_key |= split_first_factor<A>(k, first + half * unit_side, step * unit_inner, keys_[static_cast<std::size_t>((2 * c + half) * steps_ + step)]);
            for (index_t tile = 0; tile < value_tiles_; ++tile)
                odd_value |= split_first_factor<A>(v, tile * unit_side, first, values_[static_cast<std::size_t>(c * value_tiles_ + tile)]);
            odd_keys_[static_cast<std::size_t>(c)] = odd_key;
            odd_values_[static_cast<std::size_t>(c)] = odd_value;
        });
        own_ = arena.take<Own>(workers.count());
        for (int w = 0; w < workers.count(); ++w) {
            Arena& own = workers[w];
            own_[static_cast<std::size_t>(w)] = {own.take<Buffers>(1).data(), own.take<SplitImage>(static_cast<offset_t>(Schedule::most_groups) * steps_).data(),
                                                 own.take<float>(static_cast<offset_t>(Schedule::most_groups) * sums_size()).data(), {}};
        }
    }

    /// A group's queries, [dim][16], and sums that begin with zeros.
    void start(int worker, std::size_t slot, const float* queries) {
        Own& own = own_[static_cast<std::size_t>(worker)];
        const index_t dim = head_->k.cols;
        bool odd = false;
        for (index_t step = 0; step < steps_; ++step)
            odd |= split_second_factor<A>({queries, dim, group_size, group_size, 1}, step * unit_inner, 0, own.queries[static_cast<offset_t>(slot) * steps_ + step]);
        own.odd_queries[slot] = 0;
        for (int lane = 0; odd && lane < group_size; ++lane)
            for (index_t t = 0; t < dim; ++t)
                if (!is_splittable(queries[t * group_size + lane])) own.odd_queries[slot] |= 1u << lane;
        std::fill_n(sums_of(own, slot), sums_size(), 0.f);
    }

    /// Weights and weighted sums of what one or two groups see of the same tile.
    void add(int worker, std::span<const Member> members, FetchAhead<float>& ahead) {
        with_count<together>(static_cast<int>(members.size()), [&](auto count) { add_chunks<count>(own_[static_cast<std::size_t>(worker)], members.template first<count>(), ahead); });
    }

    /// out[16][columns], the sums.
    void finish(int worker, std::size_t slot, float* out) const {
        const float* const sums = sums_of(own_[static_cast<std::size_t>(worker)], slot);
        for (index_t c = 0; c < columns_; c += width)
            for (int lane = 0; lane < group_size; lane += width)
                transpose_block<float, A>([&](auto i) POLYATTN_INLINE_LAMBDA { return Vec<float, A>::load_aligned(sums + (c + i) * group_size + lane); }, out + lane * columns_ + c, columns_);
    }

private:
    using V = Vec<float, A>;
    static constexpr int width = lanes<float, A>;

    struct alignas(64) Buffers {
        float scores[2][together][chunk * group_size];
        SplitImage weights[2][together];
    };
    struct Own {
        Buffers* buffers;
        SplitImage* queries;
        float* sums;
        std::array<std::uint32_t, Schedule::most_groups> odd_queries;
    };
    /// Sums of a group, [column][16], whole tiles.
    float* sums_of(const Own& own, std::size_t slot) const { return own.sums + static_cast<offset_t>(slot) * sums_size(); }
    offset_t sums_size() const { return offset_t{value_tiles_} * unit_side * group_size; }

    /// Makes weights of the scores of a chunk, row by row, as often as it is called between two products.
    template <int G>
    struct Weights {
        const float (*scores)[chunk * group_size];
        SplitImage* images;
        std::array<GroupState<float>*, G> states;
        int calls, owed = 0, row = 0;

        static constexpr int rows = unit_side * G;
        POLYATTN_ALWAYS_INLINE void operator()() {
            for (owed += rows; owed >= calls; owed -= calls)
                if (row < rows) next();
        }
        void finish() {
            while (row < rows) next();
        }
        POLYATTN_NOINLINE void next() {  // inlined everywhere it is faster by a twentieth, and costs every user seconds of compilation
            const int g = row / unit_side, r = row % unit_side;
            ++row;
            GroupState<float>& state = *states[static_cast<std::size_t>(g)];
            using U = Vec<std::uint32_t, A>;
            for (int part = 0; part < group_size; part += width) {
                const V reference = V::load_aligned(state.reference + part);
                const V x = pow2(V::load_aligned(scores[g] + r * group_size + part) - reference), y = pow2(V::load_aligned(scores[g] + (r + unit_side) * group_size + part) - reference);
                (V::load_aligned(state.sum + part) + (x + y)).store_aligned(state.sum + part);
                // Parts cut off, not rounded: the values they meet are, so what is left out has no sign in common.
                const U upper(0xffff0000u);
                V left_x = x, left_y = y;
                for (int p = 0; p < 3; ++p) {
                    const U a = bit_cast<std::uint32_t>(left_x), b = bit_cast<std::uint32_t>(left_y) & upper;
                    ((a >> 16) | b).store_aligned(images[g].parts[p].words + r * unit_side + part);
                    if (p == 2) break;
                    left_x = left_x - bit_cast<float>(a & upper);
                    left_y = left_y - bit_cast<float>(b);
                }
            }
        }
    };

    template <int G>
    void add_chunks(Own& own, std::span<const Member, G> members, FetchAhead<float>& ahead) {
        const index_t offset = members[0].block.tile->keys.front();
        index_t first = std::numeric_limits<index_t>::max(), last = 0;
        for (const Member& member : members) {
            first = std::min(first, (offset + member.block.first) / chunk);
            last = std::max(last, (offset + member.block.first + member.block.keys + chunk - 1) / chunk);
        }
        MatrixUnit unit;
        Buffers& buffers = *own.buffers;
        const Images queries{own.queries + static_cast<offset_t>(members[0].slot) * steps_, static_cast<std::ptrdiff_t>(members[G - 1].slot - members[0].slot) * steps_};
        float* const sums = sums_of(own, members[0].slot);
        const std::ptrdiff_t next_sums = sums_of(own, members[G - 1].slot) - sums;
        const auto score = [&](index_t c, auto&& between) POLYATTN_INLINE_LAMBDA {
            multiply_images<2, G>(unit, {&keys_[static_cast<std::size_t>(offset_t{c} * 2 * steps_)], steps_}, queries, steps_,
                                  {buffers.scores[c % 2][0], group_size, unit_side * group_size, chunk * group_size}, false, between);
        };
        const auto sum = [&](index_t c, auto&& between) POLYATTN_INLINE_LAMBDA {
            const SplitImage* const values = &values_[static_cast<std::size_t>(offset_t{c} * value_tiles_)];
            index_t tile = 0;
            for (; tile + 2 <= value_tiles_; tile += 2)
                multiply_images<2, G>(unit, {values + tile, 1}, {buffers.weights[c % 2], 1}, 1, {sums + tile * unit_side * group_size, group_size, unit_side * group_size, next_sums}, true, between);
            if (tile < value_tiles_)
                multiply_images<1, G>(unit, {values + tile, 1}, {buffers.weights[c % 2], 1}, 1, {sums + tile * unit_side * group_size, group_size, unit_side * group_size, next_sums}, true, between);
        };
        const auto sum_rest = [&](index_t c) {
            if (odd_values_[static_cast<std::size_t>(c)]) [[unlikely]]
                for (std::size_t g = 0; g < G; ++g) add_left_out(c, members[g], buffers.weights[c % 2][g], sums_of(own, members[g].slot));
        };
        score(first, [] {});
        for (index_t c = first; c < last; ++c) {
            bool pending = c > first;
            const auto follow = [&] {
                if (!pending) return;
                sum(c - 1, [] {});
                sum_rest(c - 1);
                pending = false;
            };
            for (std::size_t g = 0; g < G; ++g) prepare_scores(c, own, members[g], buffers.scores[c % 2][g], follow);
            for (index_t keys = 0; keys < chunk; keys += Tiling<float, A>::score_keys) ahead();
            const index_t calls = (pending ? unit_calls<1>(value_tiles_) : 0) + (c + 1 < last ? unit_calls<2>(steps_) : 0);
            Weights<G> weights{buffers.scores[c % 2], buffers.weights[c % 2], {}, std::max(calls, index_t{1})};
            for (std::size_t g = 0; g < G; ++g) weights.states[g] = members[g].state;
            const auto between = [&]() POLYATTN_INLINE_LAMBDA { weights(); };
            if (c + 1 < last) score(c + 1, between);
            if (pending) {
                sum(c - 1, between);
                sum_rest(c - 1);
            }
            weights.finish();
        }
        sum(last - 1, [] {});
        sum_rest(last - 1);
    }

    /// What scores of a chunk, [key][16], need beside the product, and references that follow them. `follow` brings the sums up to date before they are rescaled.
    template <class Follow>
    void prepare_scores(index_t c, const Own& own, const Member& member, float* scores, Follow&& follow) const {
        const Block& block = member.block;
        const index_t p = c * chunk - block.tile->keys.front() - block.first;
        if (odd_keys_[static_cast<std::size_t>(c)] || own.odd_queries[member.slot]) [[unlikely]] score_left_out(c, own.odd_queries[member.slot], member.queries, scores);
        if constexpr (!std::is_same_v<Bias, NoBias>) add_biases_of_chunk(member, p, scores);
        if (p < block.all_begin || p + chunk > block.all_end) mask_scores<float, A>(block, p, chunk, scores);
        GroupState<float>& state = *member.state;
        bool raise = false;
        alignas(64) float highest[group_size];
        for (int part = 0; part < group_size; part += width) {
            V high[2] = {V::load_aligned(scores + part), V::load_aligned(scores + group_size + part)};
            for (int i = 2; i < chunk; i += 2)
                for (int n = 0; n < 2; ++n) high[n] = xsimd::max(high[n], V::load_aligned(scores + (i + n) * group_size + part));
            const V above = xsimd::max(high[0], high[1]) - V::load_aligned(state.reference + part);
            raise |= xsimd::any(above > V::load_aligned(state.threshold + part));
            above.store_aligned(highest + part);
        }
        if (!raise) [[likely]] return;
        follow();
        raise_sums(state, highest, sums_of(own, member.slot));
    }

    void add_biases_of_chunk(const Member& member, index_t p, float* scores) const {
        if constexpr (DistanceTable<float, Bias>::exists) {
            const index_t query = member.group->rows[0], key = member.block.key(p);
            const float* const last = member.group->consecutive ? distances_->row(query, key + chunk - 1) : nullptr;
            if (last && distances_->row(query, key)) {  // queries and keys run on: the rows of later keys lie before
                for (int i = 0; i < chunk; ++i)
                    for (int part = 0; part < group_size; part += width) {
                        float* const score = scores + i * group_size + part;
                        (V::load_aligned(score) + V::load_unaligned(last + (chunk - 1 - i) + part)).store_aligned(score);
                    }
                return;
            }
        }
        add_biases<float, A>(member.block, *head_, *distances_, *member.group, p, chunk, scores);
    }

    POLYATTN_NOINLINE void raise_sums(GroupState<float>& state, const float* highest, float* sums) const {
        alignas(64) float rise[group_size], scale[group_size];
        raise_state<float, A>(state, highest, rise, scale);
        for (index_t column = 0; column < columns_; ++column)
            for (int part = 0; part < group_size; part += width) {
                float* const sum = sums + column * group_size + part;
                (V::load_aligned(sum) * V::load_aligned(scale + part)).store_aligned(sum);
            }
    }

    /// Scores of keys and queries with numbers that images do not hold.
    POLYATTN_NOINLINE void score_left_out(index_t c, std::uint32_t odd_lanes, const float* queries, float* scores) const {
        const index_t dim = head_->k.cols;
        for (index_t i = 0; i < chunk && c * chunk + i < head_->k.rows; ++i) {
            const float* const key = k_.row(c * chunk + i);
            const bool odd = !std::all_of(key, key + dim, is_splittable);
            for (int lane = 0; lane < group_size; ++lane) {
                if (!odd && !(odd_lanes >> lane & 1)) continue;
                float sum = 0;
                for (index_t t = 0; t < dim; ++t) sum = std::fma(key[t], queries[t * group_size + lane], sum);
                scores[i * group_size + lane] = sum;
            }
        }
    }
    /// Values that images do not hold, for the queries that see them.
    POLYATTN_NOINLINE void add_left_out(index_t c, const Member& member, const SplitImage& weights, float* sums) const {
        const Block& block = member.block;
        for (index_t i = 0; i < chunk && c * chunk + i < head_->k.rows; ++i) {
            const float* const value = v_.row(c * chunk + i);
            for (int lane = 0; lane < group_size; ++lane) {
                if (!block.is_seen(lane, c * chunk + i - block.tile->keys.front() - block.first)) continue;
                float weight = 0;
                for (int part = 3; part-- > 0;) {
                    const std::uint32_t word = weights.parts[part].words[i % unit_side * unit_side + lane];
                    weight += std::bit_cast<float>(i < unit_side ? word << 16 : word & 0xffff0000u);
                }
                for (index_t column = 0; column < columns_; ++column)
                    if (!is_splittable(value[column])) sums[column * group_size + lane] += weight * value[column];
            }
        }
    }

    const Head<float, Bias>* head_ = nullptr;
    const DistanceTable<float, Bias>* distances_ = nullptr;
    Rows<float> k_, v_;
    index_t columns_ = 0, steps_ = 0, value_tiles_ = 0;
    std::span<SplitImage> keys_, values_;  // [key / 16][step], [chunk][column / 16]
    std::span<std::uint8_t> odd_keys_, odd_values_;
    std::span<Own> own_;
};

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
