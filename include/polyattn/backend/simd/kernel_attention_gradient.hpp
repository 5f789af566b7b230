#pragma once
// The adjoint of the kernel attention operator. With B = D^-1 phi(Q), G_k = dL/d(A Z_k), S_k = phi(K)^T Z_k, m_i = sum_k G_k[i] . (A Z_k)[i]:
// dS_k = B^T G_k, d phi(q_i) = (sum_k S_k G_k[i] - m_i phi(K)^T 1) / D_i, d phi(k_j) = sum_k dS_k Z_k[j] - sum_i m_i B[i].

#include <polyattn/backend/simd/kernel_attention.hpp>
#include <polyattn/backend/simd/sparse_softmax_gradient.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

template <class T, class A, class Features>
class KernelAttentionGradient : public KernelAttention<T, A, Features> {
    using Base = KernelAttention<T, A, Features>;
    using typename Base::Scratch;
    using Base::block, Base::chunk, Base::columns_, Base::f_, Base::features_, Base::head_, Base::inverse_, Base::k_, Base::mean_, Base::q_, Base::scratch_, Base::sums_, Base::workers_;
    using Base::width;
    using typename Base::V;

public:
    KernelAttentionGradient(const KernelHead<T, Features>& head, const HeadGradient<T>& gradient, bool, const Workers& workers) : Base(head, workers), states_(gradient.states) {
        std::copy_n(gradient.logsumexp, head.q.rows, inverse_.data());
        hop_ = static_cast<offset_t>(head.recursion->hops.size());
        if (!head.causal) d_states_ = workers[0].template take<T>(hop_ * state_size()).data();
    }

    /// One hop: what apply_transposed() does is part of weights_gradient().
    bool shares_passes() const { return !head_.causal; }
    /// Of one hop without teleport: weights_gradient() is called without row_means.
    bool makes_row_means() const { return !head_.causal; }
    bool is_alive(index_t i) const { return !is_empty_row(inverse_[static_cast<std::size_t>(i)]); }

    /// out = A^T g, [keys][columns]. Called for the last hop first.
    void apply_transposed(Rows<T> g, T* out) {
        if (head_.causal) return scan_back(g, out);
        T* const d_state = d_states_ + --hop_ * state_size();
        sum_in_chunks(head_.query_length, state_size() + columns_, d_state, mean_, columns_, [&](index_t first, index_t count, const Scratch& scratch, T* part) {
            scaled_queries(first, count, scratch.phi);
            outer_sum<T, A>(scratch.phi, f_, features_.count(), g, first, count, columns_, part);
            add_means(g, first, count, part + state_size());
        });
        parallel_for((head_.k.rows + block - 1) / block, [&](offset_t unit, int worker) {
            const Scratch& scratch = Base::scratch_of(worker);
            const auto first = static_cast<index_t>(unit) * block, count = std::min(block, head_.k.rows - first), valid = std::clamp(head_.key_length - first, index_t{0}, count);
            features_.template forward<false>(k_, first, valid, scratch.phi);
            store_keys(first, valid, count, scratch.phi, d_state, mean_, out);
        });
    }

    /// d_q and d_k, after all hops' apply_transposed(); or for the only hop before it, and `out` gets A^T g.
    void weights_gradient(std::span<const WeightGradientTerm<T>> terms, std::span<const T> row_means, const HeadGradient<T>& gradient, T* out) {
        const index_t queries = head_.query_length, keys = head_.key_length;
        fill_with_zeros(row_range(gradient.d_q, queries, head_.q.rows));
        if (!gradient.adds_to_keys) fill_with_zeros(row_range(gradient.d_k, keys, head_.k.rows));
        if (head_.causal) return causal_gradient(terms, row_means, gradient);
        const auto count_terms = static_cast<offset_t>(terms.size());
        const index_t inner = head_.v.cols, features = features_.count();
        T* const turned = workers_[0].template take<T>(count_terms * columns_ * f_).data();
        std::fill_n(turned, count_terms * columns_ * f_, T(0));
        const auto turn = [&](const T* states) {
            for (offset_t k = 0; k < count_terms; ++k) transpose_rows<T, A>(states + k * state_size(), columns_, features, columns_, turned + k * columns_ * f_, f_);
        };
        turn(states_);
        const T* const sums = states_ + count_terms * state_size();
        T* const d_sums = workers_[0].template take<T>(f_ + (out ? columns_ + state_size() : 0)).data();  // and of the only hop the mean rows' share, and dS
        sum_in_chunks(queries, f_ + (out ? columns_ + state_size() : 0), d_sums, nullptr, 0, [&](index_t first, index_t count, const Scratch& scratch, T* part) {
            features_.template forward<true>(q_, first, count, scratch.phi);
            for (index_t i = 0; i < count; ++i) {
                const T factor = scratch.factors[i] = Base::factor(first + i);
                if (!row_means.empty()) scratch.numbers[i] = factor == 0 ? T(0) : -row_means[static_cast<std::size_t>(first + i)] * factor;
                if (factor == 0) std::fill_n(scratch.phi + offset_t{i} * f_, f_, T(0));  // may be infinite, and has no part in any sum
            }
            for (offset_t k = 0; k < count_terms; ++k) {
                const Rows<T> g = terms[static_cast<std::size_t>(k)].g;
                scale_gradients(g, first, count, scratch.factors, scratch.other);
                if (row_means.empty())
                    for (index_t i = 0; i < count; ++i)
                        scratch.numbers[i] = scratch.factors[i] == 0 ? T(0) : -dot<T, A>(scratch.other + offset_t{i} * columns_, gradient.hops + offset_t{first + i} * inner, inner);
                const NextRows<T> ahead = Base::next_rows(g, first + count, queries, columns_);
                if (k + 1 < count_terms) row_product<T, A>(scratch.other, columns_, count, inner, turned + k * columns_ * f_, f_, f_, scratch.d_phi, f_, nullptr, k > 0, ahead);
                else product_through_features(scratch.other, columns_, count, turned + k * columns_ * f_, scratch.numbers, sums, k > 0, q_, first, scratch, gradient.d_q, false, ahead,
                                              next_rows(gradient.d_q, Base::behind(first + count, queries)));
            }
            Base::add_rows(scratch.phi, f_, count, part, scratch.numbers);
            for (index_t i = 0; i < count; ++i)
                if (scratch.factors[i] == 0) fill_with_zeros(row_range(gradient.d_q, first + i, first + i + 1));
            if (!out) return;
            outer_sum<T, A>(scratch.phi, f_, features, Rows<T>{scratch.other, columns_}, 0, count, columns_, part + f_ + columns_, Base::next_rows(q_, first + count, queries, head_.q.cols),
                            row_means.empty() ? Base::next_rows({gradient.hops, inner}, first + count, queries, inner) : NextRows<T>());
            add_means(terms[0].g, first, count, part + f_);
        });
        const T* const d_states = out ? d_sums + f_ + columns_ : d_states_;
        turn(d_states);
        parallel_for((head_.k.rows + block - 1) / block, [&](offset_t unit, int worker) {
            const Scratch& scratch = Base::scratch_of(worker);
            const auto first = static_cast<index_t>(unit) * block, count = std::min(block, head_.k.rows - first), valid = std::clamp(head_.key_length - first, index_t{0}, count);
            features_.template forward<false>(k_, first, valid, scratch.phi);
            if (out) store_keys(first, valid, count, scratch.phi, d_states, d_sums + f_, out);
            const Bounds next = Base::behind(first + valid, keys);
            for (offset_t k = 0; k < count_terms; ++k) {
                const Rows<T> z = terms[static_cast<std::size_t>(k)].z;
                const NextRows<T> ahead = Base::next_rows(z, next, columns_);
                if (k + 1 < count_terms) row_product<T, A>(z.row(first), z.stride, valid, inner, turned + k * columns_ * f_, f_, f_, scratch.d_phi, f_, nullptr, k > 0, ahead);
                else product_through_features(z.row(first), z.stride, valid, turned + k * columns_ * f_, nullptr, d_sums, k > 0, k_, first, scratch, gradient.d_k, gradient.adds_to_keys, ahead,
                                              next_rows(gradient.d_k, next));
            }
        });
    }

private:
    offset_t state_size() const { return offset_t{features_.count()} * columns_; }

    /// f(first row, rows, scratch, partial sum) for blocks of rows; the partial sums of chunks of rows, `size` numbers each, are added in order to
    /// `sum`, their last `tail` numbers to `sum_tail`.
    template <class F>
    void sum_in_chunks(index_t rows, offset_t size, T* sum, T* sum_tail, index_t tail, F&& f) {
        const offset_t chunks = std::max<offset_t>(1, (offset_t{rows} + chunk - 1) / chunk);
        const Arena::Mark mark = workers_[0].mark();
        T* const parts = workers_[0].template take<T>(size * chunks).data();
        parallel_for(chunks, [&](offset_t c, int worker) {
            std::fill_n(parts + c * size, size, T(0));
            const auto last = static_cast<index_t>(std::min<offset_t>(rows, (c + 1) * chunk));
            for (auto i = static_cast<index_t>(c * chunk); i < last; i += block) f(i, std::min(block, last - i), Base::scratch_of(worker), parts + c * size);
        });
        std::copy_n(parts, size - tail, sum);
        if (tail > 0) std::copy_n(parts + size - tail, tail, sum_tail);
        for (offset_t c = 1; c < chunks; ++c) {
            add_scaled<T, A>(T(1), parts + c * size, static_cast<index_t>(size - tail), sum);
            add_scaled<T, A>(T(1), parts + (c + 1) * size - tail, tail, sum_tail);
        }
        workers_[0].release(mark);
    }

    static NextRows<T> next_rows(MatrixView<T> rows, Bounds next) { return rows.col_stride == 1 ? Base::next_rows({rows.data, rows.row_stride}, next, rows.cols) : NextRows<T>(); }
    /// Keys of the causal block in front of one.
    Bounds block_before(index_t first) const { return {std::min(std::max(first - causal_block, Base::first_position()), head_.key_length), std::min(first, head_.key_length)}; }
    /// Gradients of rows that are means, to what every key gets.
    void add_means(Rows<T> g, index_t first, index_t count, T* to) const {
        if (head_.zero != ZeroRow::mean) return;
        for (index_t i = first; i < first + count; ++i)
            if (Base::is_mean(i)) add_scaled<T, A>(1 / static_cast<T>(head_.key_length), g.row(i), columns_, to);
    }
    /// out = A^T g for a block of keys; zeros behind the valid ones.
    void store_keys(index_t first, index_t valid, index_t count, const T* phi, const T* d_state, const T* means, T* out) const {
        keys_times(phi, first, valid, d_state, out, Base::behind(first + valid, head_.key_length));
        if (head_.zero == ZeroRow::mean)
            for (index_t j = first; j < first + valid; ++j) add_scaled<T, A>(T(1), means, columns_, out + offset_t{j} * columns_);
        std::fill(out + offset_t{first + valid} * columns_, out + offset_t{first + count} * columns_, T(0));
    }
    /// Rows of B; zeros for means and empty rows.
    void scaled_queries(index_t first, index_t count, T* phi) const {
        features_.template forward<true>(q_, first, count, phi);
        for (index_t i = 0; i < count; ++i) {
            const T factor = Base::factor(first + i);
            T* const row = phi + offset_t{i} * f_;
            if (factor == 0) std::fill_n(row, f_, T(0));
            else scale_row<T, A>(row, factor, f_, row);
        }
    }
    /// to[count][columns_] = factors[i] g[first + i], zeros for a factor of 0.
    void scale_gradients(Rows<T> g, index_t first, index_t count, const T* factors, T* to) const {
        for (index_t i = 0; i < count; ++i) {
            T* const row = to + offset_t{i} * columns_;
            if (factors[i] == 0) std::fill_n(row, columns_, T(0));
            else scale_row<T, A>(g.row(first + i), factors[i], columns_, row);
        }
    }
    /// d_x of some rows: weights[i] start + a x, and scratch.d_phi if `add`, through the features, which scratch.phi has. Null weights: 1.
    POLYATTN_NOINLINE void product_through_features(const T* a, std::ptrdiff_t a_stride, index_t count, const T* x, const T* weights, const T* start, bool add, Rows<T> rows, index_t first,
                                                    const Scratch& scratch, MatrixView<T> d_x, bool adds, NextRows<T> next, NextRows<T> also) const {
        if (count == 0) return;
        constexpr bool entries = !decltype(features_)::random;
        T* const own = features_.rows_in_place(d_x, first, adds);
        T* const to = own ? own : scratch.d_phi;
        const std::ptrdiff_t stride = own ? d_x.row_stride : f_;
        product_tiles<T, A>(a, a_stride, count, head_.v.cols, x, f_, f_,
                            [&](index_t i, index_t c) POLYATTN_INLINE_LAMBDA {
                                return multiply_add(V(weights ? weights[i] : T(1)), V::load_unaligned(start + c), add ? V::load_aligned(scratch.d_phi + offset_t{i} * f_ + c) : V(T(0)));
                            },
                            [&](index_t i, index_t c, V sums) POLYATTN_INLINE_LAMBDA {
                                if constexpr (entries) sums = features_.through(rows.row(first + i), c, scratch.phi + offset_t{i} * f_, sums);
                                sums.store_unaligned(to + i * stride + c);
                            }, next, also);
        if constexpr (entries) {
            if (!own)
                for (index_t i = 0; i < count; ++i) store_row<A>(d_x, first + i, to + i * stride, adds);
        } else features_.backward(rows, first, count, scratch.phi, scratch.d_phi, scratch.rows, d_x, adds);
    }
    /// out rows = phi(k) d_state. `next`: the keys that come next.
    void keys_times(const T* phi, index_t first, index_t count, const T* d_state, T* out, Bounds next) const {
        row_product<T, A>(phi, f_, count, features_.count(), d_state, columns_, columns_, out + offset_t{first} * columns_, columns_, nullptr, false,
                          Base::next_rows(k_, next, head_.k.cols), Base::next_rows({out, columns_}, next, columns_));
    }
    void scan_back(Rows<T> g, T* out) {
        const Scratch& scratch = scratch_[0];
        const Arena::Mark mark = workers_[0].mark();
        T *const d_state = zeros(state_size()), *const total = zeros(columns_), *const turned = zeros(offset_t{Base::widest()} * causal_block);
        Base::for_each_causal_block([&](index_t first, index_t keys, index_t queries) {
            const index_t query = first - Base::offset(), count = std::min(causal_block, head_.k.rows - first);
            scaled_queries(query, queries, scratch.phi);
            features_.template forward<false>(k_, first, keys, scratch.other);
            Base::template make_triangle<false>(scratch.other, keys, scratch.phi, f_, queries, features_.count(), f_, turned, scratch.triangle);
            causal_product<false, T, A>({scratch.triangle, causal_block, queries, g.row(query), g.stride}, {scratch.other, f_, features_.count(), d_state, columns_}, keys, columns_, nullptr,
                                        nullptr, nullptr, out + offset_t{first} * columns_, columns_, Base::hides_non_finite(g.row(query), g.stride, queries, columns_),
                                        Base::next_rows(k_, block_before(first), head_.k.cols), Base::next_rows({out, columns_}, block_before(first), columns_));
            if (head_.zero == ZeroRow::mean)
                for (index_t i = count; i-- > 0;) {
                    if (i < queries && Base::is_mean(query + i)) add_scaled<T, A>(1 / static_cast<T>(std::min(first + i + 1, head_.key_length)), g.row(query + i), columns_, total);
                    if (i < keys) add_scaled<T, A>(T(1), total, columns_, out + offset_t{first + i} * columns_);
                }
            outer_sum<T, A>(scratch.phi, f_, features_.count(), g, query, queries, columns_, d_state);
        }, true);
        const index_t last = std::min(Base::first_position(), head_.key_length);
        for (index_t j = 0; j < last; j += block) {
            const index_t count = std::min(block, last - j);
            features_.template forward<false>(k_, j, count, scratch.phi);
            keys_times(scratch.phi, j, count, d_state, out, Base::behind(j + count, last));
            for (index_t i = 0; i < count; ++i) add_scaled<T, A>(T(1), total, columns_, out + offset_t{j + i} * columns_);
        }
        std::fill(out + offset_t{head_.key_length} * columns_, out + offset_t{head_.k.rows} * columns_, T(0));
        workers_[0].release(mark);
    }

    /// Queries by a scan forwards, keys by one backwards; sums are kept transposed, [value column][feature].
    void causal_gradient(std::span<const WeightGradientTerm<T>> terms, std::span<const T> row_means, const HeadGradient<T>& gradient) {
        fill_with_zeros(row_range(gradient.d_q, 0, std::clamp(-Base::offset(), index_t{0}, head_.q.rows)));  // in front of the first key
        const Scratch& scratch = scratch_[0];
        const auto count_terms = static_cast<offset_t>(terms.size());
        const index_t inner = head_.v.cols, prefix = std::min(Base::first_position(), head_.key_length);
        const offset_t size = offset_t{columns_} * f_;
        T* const states = workers_[0].template take<T>(count_terms * size).data();
        T *const sums = zeros(f_), *const turned = zeros(offset_t{Base::widest()} * causal_block), *const more = zeros(offset_t{causal_block} * causal_block);
        std::fill_n(states, count_terms * size, T(0));
        const auto add_block = [&](const T* phi, index_t count, auto rows_of_term) {
            for (std::size_t k = 0; k < terms.size(); ++k) {
                const Rows<T> rows = rows_of_term(terms[k]);
                outer_sum<T, A>(rows.data, rows.stride, inner, Rows<T>{phi, f_}, 0, count, f_, states + static_cast<offset_t>(k) * size);
            }
        };
        // triangle[a][b] = sum_k rows_a . rows_b - m of the query among them
        const auto d_pairs = [&]<bool lower>(std::bool_constant<lower>, index_t query, index_t queries, index_t key, index_t keys) {
            for (std::size_t k = 0; k < terms.size(); ++k) {
                const Rows<T> a = lower ? terms[k].g : terms[k].z, b = lower ? terms[k].z : terms[k].g;
                T* const to = k == 0 ? scratch.triangle : more;
                Base::template make_triangle<lower>(a.row(lower ? query : key), lower ? queries : keys, b.row(lower ? key : query), b.stride, lower ? keys : queries, inner, a.stride, turned, to);
                if (k > 0) add_scaled<T, A>(T(1), more, causal_block * causal_block, scratch.triangle);
            }
            const index_t rows = lower ? queries : keys;
            for (index_t r = 0; r < rows; ++r)
                for (index_t c = lower ? 0 : r; c < (lower ? std::min(r + 1, keys) : queries); ++c) {
                    T& entry = scratch.triangle[r * causal_block + c];
                    const index_t i = lower ? r : c;
                    entry = scratch.factors[i] == 0 ? T(0) : entry + scratch.numbers[i];
                }
        };
        const auto load_numbers = [&](index_t query, index_t queries) {
            for (index_t i = 0; i < queries; ++i) {
                scratch.factors[i] = Base::factor(query + i);
                scratch.numbers[i] = scratch.factors[i] == 0 ? T(0) : -row_means[static_cast<std::size_t>(query + i)];
            }
        };
        for (index_t j = 0; j < prefix; j += block) {
            const index_t count = std::min(block, prefix - j);
            features_.template forward<false>(k_, j, count, scratch.phi);
            add_block(scratch.phi, count, [&](const WeightGradientTerm<T>& term) { return Rows<T>{term.z.row(j), term.z.stride}; });
            Base::add_rows(scratch.phi, f_, count, sums);
        }
        Base::for_each_causal_block([&](index_t first, index_t keys, index_t queries) {
            const index_t query = first - Base::offset();
            const Bounds next = Base::behind(query + queries, head_.query_length, causal_block);
            features_.template forward<true>(q_, query, queries, scratch.phi);
            features_.template forward<false>(k_, first, keys, scratch.other);
            load_numbers(query, queries);
            d_pairs(std::true_type{}, query, queries, first, keys);
            const auto whole = [&](std::size_t k) { return ProductTerm<T>{terms[k].g.row(query), terms[k].g.stride, inner, states + static_cast<offset_t>(k) * size, f_}; };
            causal_product<true, T, A>({scratch.triangle, causal_block, keys, scratch.other, f_}, whole(0), queries, f_, sums, scratch.numbers, terms.size() == 1 ? scratch.factors : nullptr,
                                       scratch.d_phi, f_, Base::hides_non_finite(scratch.other, f_, keys, f_), Base::next_rows(terms[0].g, next, columns_), next_rows(gradient.d_q, next));
            add_terms(terms, whole, queries, scratch.d_phi);
            for (index_t i = 0; i < queries; ++i)
                if (T* const row = scratch.d_phi + offset_t{i} * f_; scratch.factors[i] == 0) std::fill_n(row, f_, T(0));
                else if (terms.size() > 1) scale_row<T, A>(row, scratch.factors[i], f_, row);
            features_.backward(q_, query, queries, scratch.phi, scratch.d_phi, scratch.rows, gradient.d_q, false);
            add_block(scratch.other, keys, [&](const WeightGradientTerm<T>& term) { return Rows<T>{term.z.row(first), term.z.stride}; });
            Base::add_rows(scratch.other, f_, keys, sums);
        });
        std::fill_n(states, count_terms * size, T(0));
        std::fill_n(sums, f_, T(0));
        Base::for_each_causal_block([&](index_t first, index_t keys, index_t queries) {
            const index_t query = first - Base::offset();
            scaled_queries(query, queries, scratch.phi);
            features_.template forward<false>(k_, first, keys, scratch.other);
            load_numbers(query, queries);
            d_pairs(std::false_type{}, query, queries, first, keys);
            const auto whole = [&](std::size_t k) { return ProductTerm<T>{terms[k].z.row(first), terms[k].z.stride, inner, states + static_cast<offset_t>(k) * size, f_}; };
            causal_product<false, T, A>({scratch.triangle, causal_block, queries, scratch.phi, f_}, whole(0), keys, f_, sums, nullptr, nullptr, scratch.d_phi, f_,
                                        Base::hides_non_finite(scratch.phi, f_, queries, f_), Base::next_rows(terms[0].z, block_before(first), columns_), next_rows(gradient.d_k, block_before(first)));
            add_terms(terms, whole, keys, scratch.d_phi);
            features_.backward(k_, first, keys, scratch.other, scratch.d_phi, scratch.rows, gradient.d_k, gradient.adds_to_keys);
            const bool all = std::find(scratch.factors, scratch.factors + queries, T(0)) == scratch.factors + queries;
            add_block(scratch.phi, queries, [&](const WeightGradientTerm<T>& term) {
                if (all) return Rows<T>{term.g.row(query), term.g.stride};
                for (index_t i = 0; i < queries; ++i)  // what rows without a part get may be NaN
                    if (scratch.factors[i] == 0) std::fill_n(scratch.rows + offset_t{i} * columns_, columns_, T(0));
                    else std::copy_n(term.g.row(query + i), columns_, scratch.rows + offset_t{i} * columns_);
                return Rows<T>{scratch.rows, columns_};
            });
            Base::add_rows(scratch.phi, f_, queries, sums, scratch.numbers);
        }, true);
        for (index_t j = 0; j < prefix; j += block) {
            const index_t count = std::min(block, prefix - j);
            features_.template forward<false>(k_, j, count, scratch.phi);
            for (index_t i = 0; i < count; ++i) std::copy_n(sums, f_, scratch.d_phi + offset_t{i} * f_);
            for (std::size_t k = 0; k < terms.size(); ++k)
                row_product<T, A>(terms[k].z.row(j), terms[k].z.stride, count, inner, states + static_cast<offset_t>(k) * size, f_, f_, scratch.d_phi, f_, nullptr, true,
                                  Base::next_rows(terms[k].z, Base::behind(j + count, prefix), columns_));
            features_.backward(k_, j, count, scratch.phi, scratch.d_phi, scratch.rows, gradient.d_k, gradient.adds_to_keys);
        }
    }

    /// d_phi += the products of all hops but the first.
    template <class Term>
    void add_terms(std::span<const WeightGradientTerm<T>> terms, Term&& term, index_t rows, T* d_phi) const {
        for (std::size_t k = 1; k < terms.size(); ++k) {
            const ProductTerm<T> more = term(k);
            row_product<T, A>(more.a, more.a_stride, rows, more.inner, more.x, more.x_stride, f_, d_phi, f_, nullptr, true);
        }
    }

    T* zeros(offset_t count) const { return std::fill_n(workers_[0].template take<T>(count).data(), count, T(0)) - count; }

    const T* states_;
    T* d_states_ = nullptr;
    offset_t hop_ = 0;
};

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
