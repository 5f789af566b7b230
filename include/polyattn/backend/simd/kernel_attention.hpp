#pragma once
// The kernel attention operator of one head, A = D^-1 phi(Q) phi(K)^T, and its adjoint: what sparse_softmax.hpp offers, without a pair formed.
// Sources: Katharopoulos et al., "Transformers are RNNs" (2020), equations 4 to 12 and the gradients of its appendix; AdaMRA (2021).

#include <polyattn/backend/simd/edges.hpp>
#include <polyattn/backend/simd/feature_rows.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// to[features][columns] += phi^T z over `count` rows: phi [count][stride], z [count][..].
template <class T, class A>
POLYATTN_NOINLINE void outer_sum(const T* phi, std::ptrdiff_t stride, index_t features, Rows<T> z, index_t first, index_t count, index_t columns, T* to, NextRows<T> next = {},
                                 NextRows<T> also = {}) {
    for (NextRows<T>* fetched : {&next, &also}) fetched->spread(tile_count<T, A>(features, columns), count / 4);
    for_each_tile<T, A>(features, columns, [&]<int M, int N>(std::integral_constant<int, M>, std::integral_constant<int, N>, index_t f, index_t column) POLYATTN_INLINE_LAMBDA {
        weighted_sum_tile<M, N, T, A>(phi + f, z.row(first) + column, z.stride, count, to + offset_t{f} * columns + column, columns, true, stride, next.next_run(to), also.next_run(to));
    });
}

/// A factor of a product as it is stored, and what it meets: rows of a, [..][inner], and x [inner][columns].
template <class T>
struct ProductTerm {
    const T* a;
    std::ptrdiff_t a_stride;
    index_t inner;
    const T* x;
    std::ptrdiff_t x_stride;
};

/// out[rows][columns] = factors[row] (weights[row] start + whole.a whole.x + triangle.a triangle.x); null: factors and weights are 1, start is 0. The triangle's
/// entries right of the diagonal if `lower`, else left of it, are zeros; they meet no x if `careful`.
template <bool lower, class T, class A>
POLYATTN_NOINLINE void causal_product(const ProductTerm<T>& triangle, const ProductTerm<T>& whole, index_t rows, index_t columns, const T* start, const T* weights, const T* factors, T* out,
                                      std::ptrdiff_t out_stride, bool careful, NextRows<T> next = {}, NextRows<T> also = {}) {
    using V = Vec<T, A>;
    using K = Tiling<T, A>;
    for (NextRows<T>* fetched : {&next, &also}) fetched->spread(tile_count<T, A>(rows, columns), whole.inner / 4);
    const auto tile = [&]<int M, int N>(std::integral_constant<int, M>, std::integral_constant<int, N>, index_t row, index_t column) POLYATTN_INLINE_LAMBDA {
        const index_t from = lower ? 0 : std::min(row, triangle.inner), to = lower ? std::min<index_t>(row + M, triangle.inner) : triangle.inner;
        V acc[M * N];
        if (start)
            expand<M * N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA {
                ((acc[I] = V(weights ? weights[row + I / N] : T(1)) * V::load_unaligned(start + column + I % N * K::lanes)), ...);
            });
        else expand<M * N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((acc[I] = V(T(0))), ...); });
        row_sum_tile<M, N, T, A>(acc, triangle.a + row * triangle.a_stride + from, triangle.a_stride, triangle.x + from * triangle.x_stride + column, triangle.x_stride, to - from);
        row_sum_tile<M, N, T, A>(acc, whole.a + row * whole.a_stride, whole.a_stride, whole.x + column, whole.x_stride, whole.inner, next.next_run(whole.x), also.next_run(whole.x));
        T* const at = out + row * out_stride + column;
        expand<M * N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA {
            ((factors ? acc[I] * V(factors[row + I / N]) : acc[I]).store_unaligned(at + I / N * out_stride + I % N * K::lanes), ...);
        });
    };
    for_each_tile<T, A>(rows, columns, tile, careful);
}

/// to[columns][stride] = from[rows][columns]^T.
template <class T, class A>
void transpose_rows(const T* from, std::ptrdiff_t from_stride, index_t rows, index_t columns, T* to, std::ptrdiff_t stride) {
    constexpr int width = lanes<T, A>;
    index_t i = 0;
    for (; i + width <= rows; i += width) {
        index_t c = 0;
        for (; c + width <= columns; c += width)
            transpose_block<T, A>([&](auto r) POLYATTN_INLINE_LAMBDA { return Vec<T, A>::load_unaligned(from + (i + r) * from_stride + c); }, to + c * stride + i, stride);
        for (; c < columns; ++c)
            for (index_t r = 0; r < width; ++r) to[c * stride + i + r] = from[(i + r) * from_stride + c];
    }
    for (; i < rows; ++i)
        for (index_t c = 0; c < columns; ++c) to[c * stride + i] = from[i * from_stride + c];
}

/// dots[i] = rows[i] . x over whole vectors.
template <class T, class A>
void row_dots(const T* rows, std::ptrdiff_t stride, index_t count, const T* x, index_t columns, T* dots) {
    using V = Vec<T, A>;
    constexpr int width = lanes<T, A>;
    index_t i = 0;
    for (; i + width <= count; i += width) {
        PerLane<T, A> sums;
        expand<width>([&]<int... L>(Ints<L...>) POLYATTN_INLINE_LAMBDA {
            ((sums[L] = V(T(0))), ...);
            for (index_t c = 0; c < columns; c += width) {
                const V y = V::load_aligned(x + c);
                ((sums[L] = multiply_add(V::load_aligned(rows + (i + L) * stride + c), y, sums[L])), ...);
            }
        });
        lane_sums<T, A>(sums).store_unaligned(dots + i);
    }
    for (; i < count; ++i) dots[i] = dot<T, A>(rows + i * stride, x, columns);
}

/// sums[i] += the sum of rows[i], whole vectors.
template <class T, class A>
void row_sums(const T* rows, std::ptrdiff_t stride, index_t count, index_t columns, T* sums) {
    using V = Vec<T, A>;
    constexpr int width = lanes<T, A>;
    for (index_t first = 0; first < count; first += width) {
        const index_t there = std::min<index_t>(width, count - first);
        PerLane<T, A> own;
        for (index_t i = 0; i < width; ++i) {
            own[i] = V(T(0));
            for (index_t c = 0; i < there && c < columns; c += width) own[i] = own[i] + V::load_aligned(rows + (first + i) * stride + c);
        }
        alignas(64) T added[width];
        lane_sums<T, A>(own).store_aligned(added);
        for (index_t i = 0; i < there; ++i) sums[first + i] += added[i];
    }
}

/// Rows of a triangle of causal kernel attention.
inline constexpr index_t causal_block = 32;

/// Rows of the operator, of any number of Z. Sums over keys are made of chunks of a fixed size, added in order: the same bits for any
/// number of threads. Causal heads are one scan, on one thread.
template <class T, class A, class Features>
class KernelAttention {
protected:
    using V = Vec<T, A>;
    static constexpr int width = lanes<T, A>;
    static constexpr index_t block = 64;         // rows of features at a time
    static constexpr index_t chunk = 2048;       // rows of one partial sum

public:
    KernelAttention(const KernelHead<T, Features>& head, const Workers& workers)
        : head_(head), workers_(workers), q_(readable_rows(head.q, false, width, workers[0])), k_(readable_rows(head.k, false, width, workers[0])), features_(head),
          columns_(padded(head.v.cols, width)), f_(features_.columns()) {
        scratch_ = workers[0].template take<Scratch>(workers.count());
        for (int w = 0; w < workers.count(); ++w) {
            Arena& arena = workers[w];
            Scratch& scratch = scratch_[static_cast<std::size_t>(w)];
            for (T** rows : {&scratch.phi, &scratch.other, &scratch.d_phi, &scratch.rows}) *rows = arena.take<T>(offset_t{block} * widest()).data();
            scratch.triangle = arena.take<T>(offset_t{causal_block} * causal_block).data();
            for (T** numbers : {&scratch.numbers, &scratch.factors}) *numbers = arena.take<T>(block).data();
        }
        inverse_ = workers[0].template take<T>(head.q.rows);
        sums_ = workers[0].template take<T>(f_).data();
        mean_ = workers[0].template take<T>(columns_).data();
        if (features_.shifts_keys && !head.causal) {
            const std::span<T> highest = workers_[0].template take<T>(workers.count());
            std::fill(highest.begin(), highest.end(), std::numeric_limits<T>::lowest());
            parallel_for((offset_t{head.key_length} + block - 1) / block, [&](offset_t unit, int worker) {
                const auto first = static_cast<index_t>(unit) * block;
                T& own = highest[static_cast<std::size_t>(worker)];
                own = std::max(own, features_.highest_exponent(k_, first, std::min(block, head.key_length - first), scratch_of(worker).phi));
            });
            features_.shift_keys_by(*std::max_element(highest.begin(), highest.end()));
        }
    }

    /// Value columns, padded to whole vectors.
    index_t columns() const { return columns_; }
    bool reads_often() const { return false; }
    bool has_shared_rows() const { return false; }
    /// Without hops nothing has come by the denominators: a hop of zeros does.
    void prepare(bool) {
        if (!head_.recursion->hops.empty()) return;
        const std::span<T> zeros = workers_[0].template take<T>(offset_t{std::max(head_.q.rows, head_.k.rows)} * columns_);
        std::fill(zeros.begin(), zeros.end(), T(0));
        states_ = nullptr;
        apply({zeros.data(), columns_}, {zeros.data(), columns_}, Hop{.walk = 1, .teleport = 0}, zeros.data(), columns_, false, false);
    }

    /// Numbers that backward wants to find again: the sums phi(K)^T Z_k of each hop, and phi(K)^T 1. None for causal heads.
    static offset_t state_size(index_t features, index_t value_columns, std::size_t hops, bool causal) {
        return causal ? 0 : offset_t{features} * padded(value_columns, width) * static_cast<offset_t>(hops) + padded(features, width);
    }
    void keep_states(T* states) { states_ = states; }

    void apply_once(Rows<T> z, Rows<T> v, const Hop& hop, T* out, std::ptrdiff_t out_stride, bool) { apply(z, v, hop, out, out_stride, false, false); }
    /// out = walk A z + teleport v; rows that are not alive become 0.
    void apply(Rows<T> z, Rows<T> v, const Hop& hop, T* out, std::ptrdiff_t out_stride, bool, bool) {
        if (head_.causal) return scan(z, v, hop, out, out_stride);
        if (!states_ && !state_) state_ = workers_[0].template take<T>(offset_t{features_.count()} * columns_).data();
        T* const state = states_ ? states_ + offset_t{features_.count()} * columns_ * hop_++ : state_;
        sum_keys(z, state);
        if (states_) std::copy_n(sums_, f_, states_ + offset_t{features_.count()} * columns_ * static_cast<offset_t>(head_.recursion->hops.size()));
        parallel_for((head_.q.rows + block - 1) / block, [&](offset_t unit, int worker) {
            const Scratch& scratch = scratch_of(worker);
            const auto first = static_cast<index_t>(unit) * block, count = std::min(block, head_.q.rows - first), valid = std::clamp(head_.query_length - first, index_t{0}, count);
            features_.template forward<true>(q_, first, valid, scratch.phi);
            row_dots<T, A>(scratch.phi, f_, valid, sums_, f_, scratch.numbers);
            const bool plain = set_inverses(first, count, static_cast<T>(hop.walk), scratch.numbers);
            row_product<T, A>(scratch.phi, f_, valid, features_.count(), state, columns_, columns_, out + first * out_stride, out_stride, scratch.numbers, false,
                              next_rows(q_, first + count, head_.query_length, head_.q.cols), next_rows({out, out_stride}, first + count, head_.query_length, columns_));
            if (!plain || hop.teleport != 0)
                for (index_t i = first; i < first + count; ++i) finish_row(i, mean_, v, hop, out + i * out_stride);
        });
    }

    /// 1 / denominator; the lowest number of a row that is a mean; -infinity of an empty one.
    T logsumexp(index_t i) const { return inverse_[static_cast<std::size_t>(i)]; }

protected:
    struct Scratch {
        T *phi, *other, *d_phi, *rows, *triangle, *numbers, *factors;
    };
    const Scratch& scratch_of(int worker) const { return scratch_[static_cast<std::size_t>(worker)]; }
    index_t widest() const { return std::max({f_, columns_, padded(head_.q.cols, width)}); }
    index_t offset() const { return head_.k.rows - head_.q.rows; }
    /// Keys in front of the first causal block, which starts at the first position that a query stands at.
    index_t first_position() const { return std::max(offset(), index_t{0}); }

    /// `quotient`: 1 / (sum + epsilon).
    void set_inverse(index_t i, T sum, index_t visible, T quotient) {
        T& inverse = inverse_[static_cast<std::size_t>(i)];
        const T denominator = sum + static_cast<T>(head_.epsilon);
        if (i >= head_.query_length || visible <= 0 || (denominator == 0 && head_.zero != ZeroRow::mean)) inverse = empty_row<T>();
        else inverse = denominator == 0 ? mean_row<T>() : quotient;
    }
    /// The inverses of some rows that see keys, if there are any, from their denominators' sums, which become walk times factor(). True if none of the rows is a mean or empty.
    /// Quotients come from vectors whatever the rows are: -ffast-math divides vectors and numbers differently, and a row must not hang on its neighbours.
    bool set_inverses(index_t first, index_t count, T walk, T* sums) {
        bool plain = head_.key_length > 0 && first + count <= head_.query_length;
        alignas(64) T quotients[block];
        std::fill(sums + count, sums + padded(count, width), T(1));
        for (index_t i = 0; i < count; i += width) {
            const V denominator = V::load_aligned(sums + i) + V(static_cast<T>(head_.epsilon));
            plain = plain && !xsimd::any(denominator == V(T(0)));
            (V(T(1)) / denominator).store_aligned(quotients + i);
        }
        for (index_t i = 0; i < count; ++i) {
            set_inverse(first + i, sums[i], head_.key_length, quotients[i]);
            sums[i] = walk * factor(first + i);
        }
        return plain;
    }
    /// What a row's sum is multiplied by: nothing of a row that is a mean or empty.
    T factor(index_t i) const {
        const T inverse = inverse_[static_cast<std::size_t>(i)];
        return is_empty_row(inverse) || is_mean_row(inverse) ? T(0) : inverse;
    }
    bool is_mean(index_t i) const { return is_mean_row(inverse_[static_cast<std::size_t>(i)]); }

    void finish_row(index_t i, const T* mean, Rows<T> v, const Hop& hop, T* to) const {
        if (i >= head_.query_length || is_empty_row(inverse_[static_cast<std::size_t>(i)])) {
            std::fill_n(to, columns_, T(0));
            return;
        }
        if (is_mean(i)) scale_row<T, A>(mean, static_cast<T>(hop.walk), columns_, to);
        if (hop.teleport != 0) add_scaled<T, A>(static_cast<T>(hop.teleport), v.row(i), columns_, to);
    }

    /// state = phi(K)^T z, sums_ = phi(K)^T 1, mean_ = the mean of z.
    void sum_keys(Rows<T> z, T* state) {
        const index_t keys = head_.key_length, features = features_.count();
        const offset_t size = offset_t{features} * columns_ + f_ + columns_, chunks = std::max<offset_t>(1, (offset_t{keys} + chunk - 1) / chunk);
        const Arena::Mark mark = workers_[0].mark();
        T* const parts = workers_[0].template take<T>(size * chunks).data();
        parallel_for(chunks, [&](offset_t c, int worker) {
            const Scratch& scratch = scratch_of(worker);
            T *const part = parts + c * size, *const sums = part + offset_t{features} * columns_, *const mean = sums + f_;
            std::fill_n(part, size, T(0));
            const auto last = static_cast<index_t>(std::min<offset_t>(keys, (c + 1) * chunk));
            for (auto j = static_cast<index_t>(c * chunk); j < last; j += block) add_keys(z, j, std::min(block, last - j), scratch, part, sums, mean);
        });
        std::copy_n(parts, offset_t{features} * columns_, state);
        std::copy_n(parts + offset_t{features} * columns_, f_, sums_);
        std::copy_n(parts + size - columns_, columns_, mean_);
        for (offset_t c = 1; c < chunks; ++c) {
            const T* const part = parts + c * size;
            add_scaled<T, A>(T(1), part, features * columns_, state);
            add_scaled<T, A>(T(1), part + offset_t{features} * columns_, f_, sums_);
            add_scaled<T, A>(T(1), part + size - columns_, columns_, mean_);
        }
        workers_[0].release(mark);
        if (head_.zero == ZeroRow::mean && keys > 0) scale_row<T, A>(mean_, 1 / static_cast<T>(keys), columns_, mean_);
    }
    /// Keys [first, first + count) into the sums; leaves their features in scratch.phi.
    void add_keys(Rows<T> z, index_t first, index_t count, const Scratch& scratch, T* state, T* sums, T* total) const {
        features_.template forward<false>(k_, first, count, scratch.phi);
        add_rows(scratch.phi, f_, count, sums);
        outer_sum<T, A>(scratch.phi, f_, features_.count(), z, first, count, columns_, state, next_rows(k_, first + count, head_.key_length, head_.k.cols),
                        next_rows(z, first + count, head_.key_length, columns_));
        if (head_.zero == ZeroRow::mean)
            for (index_t j = first; j < first + count; ++j) add_scaled<T, A>(T(1), z.row(j), columns_, total);
    }
    /// The next block of some rows, to fetch.
    static NextRows<T> next_rows(Rows<T> rows, index_t first, index_t length, index_t columns, index_t most = block) {
        return next_rows(rows, behind(first, length, most), columns);
    }
    static NextRows<T> next_rows(Rows<T> rows, Bounds next, index_t columns) { return {rows.row(next.begin), rows.stride, next.size(), columns}; }
    static Bounds behind(index_t first, index_t length, index_t most = block) { return {first, first + std::clamp(length - first, index_t{0}, most)}; }
    /// to += the sum of rows, times `weights`; null: 1.
    static void add_rows(const T* rows, index_t columns, index_t count, T* to, const T* weights = nullptr) {
        for_column_panels<4, width>(columns, [&](auto vectors, index_t column) POLYATTN_INLINE_LAMBDA {
            V sums[vectors];
            expand<vectors>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((sums[I] = V::load_unaligned(to + column + I * width)), ...); });
            for (index_t i = 0; i < count; ++i)
                expand<vectors>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((sums[I] = multiply_add(V(weights ? weights[i] : T(1)), V::load_aligned(rows + offset_t{i} * columns + column + I * width), sums[I])), ...); });
            expand<vectors>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { (sums[I].store_unaligned(to + column + I * width), ...); });
        });
    }

    /// Calls f(first position, keys of the block, queries of the block) for the causal blocks; key and query of a position stand in one row.
    template <class F>
    void for_each_causal_block(F&& f, bool backwards = false) const {
        const index_t start = first_position(), blocks = (head_.k.rows - start + causal_block - 1) / causal_block;
        for (index_t b = 0; b < blocks; ++b) {
            const index_t first = start + (backwards ? blocks - 1 - b : b) * causal_block, count = std::min(causal_block, head_.k.rows - first);
            f(first, std::clamp(head_.key_length - first, index_t{0}, count), std::clamp(head_.query_length + offset() - first, index_t{0}, count));
        }
    }
    bool hides_non_finite(const T* rows, std::ptrdiff_t stride, index_t count, index_t columns) const {
        bool found = false;
        for (index_t i = 0; i < count; ++i) found |= has_non_finite<T, A>(rows + i * stride, columns);
        return found;
    }
    /// triangle[a][b] = rows_a[a] . rows_b[b], zero where b > a if `lower`, else where b < a. `turned` takes rows_b transposed.
    template <bool lower>
    static void make_triangle(const T* a, index_t count_a, const T* b, std::ptrdiff_t b_stride, index_t count_b, index_t inner, std::ptrdiff_t a_stride, T* turned, T* triangle) {
        if (count_b < causal_block) std::fill_n(turned, offset_t{inner} * causal_block, T(0));
        transpose_rows<T, A>(b, b_stride, count_b, inner, turned, causal_block);
        for (index_t row = 0; row < count_a; row += width) {  // leaves out vectors that are all zeros
            const index_t from = lower ? 0 : row, to = lower ? std::min<index_t>(row + width, causal_block) : causal_block;
            row_product<T, A>(a + row * a_stride, a_stride, std::min<index_t>(width, count_a - row), inner, turned + from, causal_block, to - from, triangle + row * causal_block + from,
                              causal_block, nullptr, false);
        }
        for (index_t i = 0; i < count_a; ++i)
            if constexpr (lower) std::fill(triangle + i * causal_block + std::min({i + 1, count_b, causal_block}), triangle + (i + 1) * causal_block, T(0));
            else std::fill(triangle + i * causal_block, triangle + i * causal_block + i, T(0));
    }

    /// The causal form of apply(): a running sum over blocks, and triangles inside them.
    void scan(Rows<T> z, Rows<T> v, const Hop& hop, T* out, std::ptrdiff_t out_stride) {
        const Scratch& scratch = scratch_[0];
        const index_t features = features_.count();
        const Arena::Mark mark = workers_[0].mark();
        T* const state = workers_[0].template take<T>(offset_t{features} * columns_).data();
        T* const turned = workers_[0].template take<T>(offset_t{widest()} * causal_block).data();
        T *const total = workers_[0].template take<T>(columns_).data(), *const mean = workers_[0].template take<T>(columns_).data();
        start_scan(z, state, total);
        for (index_t i = 0; i < std::min(-offset(), head_.q.rows); ++i) {  // stand in front of the first key
            set_inverse(i, T(0), 0, T(0));
            std::fill_n(out + i * out_stride, columns_, T(0));
        }
        for_each_causal_block([&](index_t first, index_t keys, index_t queries) {
            const index_t count = std::min(causal_block, head_.k.rows - first), query = first - offset();
            features_.template forward<true>(q_, query, queries, scratch.phi);
            features_.template forward<false>(k_, first, keys, scratch.other);
            make_triangle<true>(scratch.phi, queries, scratch.other, f_, keys, features, f_, turned, scratch.triangle);
            if (first > 0) row_dots<T, A>(scratch.phi, f_, queries, sums_, f_, scratch.numbers);
            else std::fill_n(scratch.numbers, queries, T(0));  // sums of no keys, which infinite features must not meet
            row_sums<T, A>(scratch.triangle, causal_block, queries, causal_block, scratch.numbers);
            bool plain = set_inverses(query, queries, static_cast<T>(hop.walk), scratch.numbers);
            for (index_t i = queries; i < count; ++i) set_inverse(query + i, T(0), 0, T(0));
            T* const to = out + query * out_stride;
            const index_t next = first + count, next_query = query + count;
            causal_product<true, T, A>({scratch.triangle, causal_block, keys, z.row(first), z.stride}, {scratch.phi, f_, features, state, columns_}, queries, columns_, nullptr, nullptr,
                                       scratch.numbers, to, out_stride, hides_non_finite(z.row(first), z.stride, keys, columns_),
                                       next_rows(q_, next_query, head_.query_length, head_.q.cols, causal_block), next_rows({out, out_stride}, next_query, head_.query_length, columns_, causal_block));
            plain &= queries == count && hop.teleport == 0 && head_.zero != ZeroRow::mean;
            for (index_t i = 0; !plain && i < count; ++i) {
                if (head_.zero == ZeroRow::mean && i < keys) {
                    add_scaled<T, A>(T(1), z.row(first + i), columns_, total);
                    if (i < queries && is_mean(query + i)) scale_row<T, A>(total, 1 / static_cast<T>(first + i + 1), columns_, mean);
                } else if (i < queries && is_mean(query + i)) scale_row<T, A>(total, 1 / static_cast<T>(head_.key_length), columns_, mean);
                finish_row(query + i, mean, v, hop, to + i * out_stride);
            }
            add_rows(scratch.other, f_, keys, sums_);
            outer_sum<T, A>(scratch.other, f_, features, z, first, keys, columns_, state, next_rows(k_, next, head_.key_length, head_.k.cols, causal_block),
                            next_rows(z, next, head_.key_length, columns_, causal_block));
        });
        workers_[0].release(mark);
    }
    /// The sums over the keys in front of the first block.
    void start_scan(Rows<T> z, T* state, T* total) {
        std::fill_n(state, offset_t{features_.count()} * columns_, T(0));
        std::fill_n(sums_, f_, T(0));
        std::fill_n(total, columns_, T(0));
        const index_t last = std::min(first_position(), head_.key_length);
        for (index_t j = 0; j < last; j += block) add_keys(z, j, std::min(block, last - j), scratch_[0], state, sums_, total);
    }

    const KernelHead<T, Features>& head_;
    const Workers& workers_;
    Rows<T> q_, k_;
    FeatureRows<T, A, Features> features_;
    index_t columns_, f_;
    std::span<Scratch> scratch_;
    std::span<T> inverse_;
    T *sums_ = nullptr, *mean_ = nullptr, *state_ = nullptr, *states_ = nullptr;
    offset_t hop_ = 0;
};

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
