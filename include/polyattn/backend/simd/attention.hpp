#pragma once
// One head, forward and backward: an operator, of sparse_softmax.hpp or kernel_attention.hpp, and the recursion of the diffusion policy.

#include <polyattn/backend/simd/kernel_attention_gradient.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// Dropout on row i of Z after hop `hop`.
template <class T>
void drop_values(const DropoutMask& mask, int hop, index_t i, T* z, index_t columns) {
    for (index_t c = 0; c < columns; c += 4) {
        const auto factors = mask.values_of_four(hop, i, c / 4);
        for (index_t l = 0; l < std::min(index_t{4}, columns - c); ++l) z[c + l] *= static_cast<T>(factors[static_cast<std::size_t>(l)]);
    }
}

/// factor * v, padded to whole vectors; v itself for a factor of 1.
template <class T>
Rows<T> scaled_rows(Rows<T> v, double factor, index_t rows, index_t columns, Arena& arena) {
    if (factor == 1) return v;
    T* const copy = arena.take<T>(offset_t{rows} * columns).data();
    parallel_rows(rows, [&](index_t i) {
        for (index_t c = 0; c < columns; ++c) copy[offset_t{i} * columns + c] = factor == 0 ? T(0) : static_cast<T>(factor) * v.row(i)[c];
    });
    return {copy, columns};
}

/// The operators of a kind of head.
template <class A, class Head>
struct operators_of;
template <class A, class T, class Bias>
struct operators_of<A, Head<T, Bias>> {
    using Forward = SparseSoftmax<T, A, Bias>;
    using Backward = SparseSoftmaxGradient<T, A, Bias>;
};
template <class A, class T, class Features>
struct operators_of<A, KernelHead<T, Features>> {
    using Forward = KernelAttention<T, A, Features>;
    using Backward = KernelAttentionGradient<T, A, Features>;
};

template <class A, class AnyHead, class T>
void forward(const AnyHead& head, const HeadResult<T>& result, Workers& workers) {
    constexpr int width = lanes<T, A>;
    const auto& hops = head.recursion->hops;
    const index_t rows = head.q.rows, dim = head.v.cols;
    Arena& arena = workers[0];
    typename operators_of<A, AnyHead>::Forward attention(head, workers);
    if constexpr (requires { attention.keep_states(result.states); }) attention.keep_states(result.states);
    const index_t columns = attention.columns();
    const Rows<T> v = readable_rows(head.v, true, width, arena, attention.reads_often());
    const bool once = hops.size() == 1 && !attention.has_shared_rows();
    if (!once && (!hops.empty() || result.logsumexp)) attention.prepare(result.logsumexp != nullptr);

    Rows<T> z = scaled_rows(v, head.recursion->start, head.v.rows, columns, arena);
    if (hops.empty()) {
        const T* const zeros = std::fill_n(arena.take<T>(columns).data(), columns, T(0)) - columns;
        parallel_rows(rows, [&](index_t i) { store_row<A>(result.out, i, i < head.query_length ? z.row(i) : zeros, result.accumulate); });
    }
    const bool direct = result.out.col_stride == 1 && columns == dim && !result.accumulate;
    T* spare[2] = {};
    for (std::size_t k = 0; k < hops.size(); ++k) {
        const bool last = k + 1 == hops.size();
        T* to;
        std::ptrdiff_t stride = columns;
        if (result.hops && columns == dim) to = result.hops + static_cast<offset_t>(k) * rows * dim;
        else if (last && direct && !result.hops) {
            to = result.out.data;
            stride = result.out.row_stride;
        } else {
            if (!spare[k % 2]) spare[k % 2] = arena.take<T>(offset_t{rows} * columns).data();
            to = spare[k % 2];
        }
        // Dropout on Z changes what the next hop starts from.
        const bool continues = !head.dropout.drops_values();
        if (once) attention.apply_once(z, v, hops[k], to, stride, result.logsumexp != nullptr);
        else attention.apply(z, v, hops[k], to, stride, k > 0 && continues, !last && continues);
        const bool drops = head.dropout.drops_values(), copies = result.hops && columns != dim, stores = last && to != result.out.data;
        parallel_rows(drops || copies || stores ? rows : 0, [&](index_t i) {
            if (drops) drop_values(head.dropout, static_cast<int>(k), i, to + i * stride, dim);
            if (copies) std::copy_n(to + i * stride, dim, result.hops + (static_cast<offset_t>(k) * rows + i) * dim);
            if (stores) store_row<A>(result.out, i, to + i * stride, result.accumulate);
        });
        z = {to, stride};
    }
    if (result.logsumexp)
        for (index_t i = 0; i < rows; ++i) result.logsumexp[i] = attention.logsumexp(i);
}

/// A head for its gradients. Of kernel scores without the keys that no query sees: what they hold must not meet states that are 0.
template <class T, class Bias>
const Head<T, Bias>& seen_by_queries(const Head<T, Bias>& head) {
    return head;
}
template <class T, class Features>
KernelHead<T, Features> seen_by_queries(KernelHead<T, Features> head) {
    const index_t last = head.query_length == 0 ? 0 : head.causal ? head.k.rows - head.q.rows + head.query_length : head.key_length;
    head.key_length = std::min(head.key_length, std::max(last, index_t{0}));
    return head;
}

/// G_K = dOut; G_k = walk A^T G_{k+1}; dV = start G_0 + sum teleport G_{k+1}; dL/dA_ij = sum_k walk G_{k+1}[i] . Z_k[j].
/// The softmax's row sums come without a pass over the pairs: sum_j A_ij dL/dA_ij = sum_k G_{k+1}[i] . (Z_{k+1}[i] - teleport V[i]).
template <class A, class AnyHead, class T>
void backward(const AnyHead& whole, const HeadGradient<T>& gradient, Workers& workers) {
    constexpr int width = lanes<T, A>;
    const auto& head = seen_by_queries(whole);
    const auto& hops = head.recursion->hops;
    const auto count = hops.size();
    const index_t rows = head.q.rows, keys = head.k.rows, dim = head.v.cols;
    const double start = head.recursion->start;
    Arena& arena = workers[0];
    if (count == 0) {
        start_gradients(gradient);
        for (index_t i = 0; i < head.query_length; ++i)
            for (index_t c = 0; c < dim; ++c) gradient.d_v(i, c) += static_cast<T>(start) * gradient.d_out(i, c);
        return;
    }
    typename operators_of<A, AnyHead>::Backward attention(head, gradient, count > 1, workers);
    const index_t columns = attention.columns();
    const Rows<T> v = readable_rows(head.v, true, width, arena, attention.reads_often());

    // terms[k]: Z_k and walk * G_{k+1}, both padded to whole vectors.
    const auto terms = arena.take<WeightGradientTerm<T>>(static_cast<offset_t>(count));
    terms[0].z = scaled_rows(v, start, keys, columns, arena);
    for (std::size_t k = 1; k < count; ++k)
        terms[k].z = readable_rows(MatrixView<const T>{gradient.hops + static_cast<offset_t>(k - 1) * rows * dim, rows, dim, dim, 1}, true, width, arena);
    std::span<T> row_means;

    // One hop needs every weight once: for dV and for the gradient of the weights in the same pass.
    const bool fused = count == 1 && attention.shares_passes();
    const bool only_weights = fused && start == 1 && hops[0].teleport == 0 && !gradient.adds_to_keys;  // d_v is A^T g and nothing else
    T* const in_place = only_weights ? packed_rows(gradient.d_v, columns) : nullptr;
    if (!gradient.adds_to_keys && !only_weights) fill_with_zeros(gradient.d_v);
    Rows<T> g = readable_rows(gradient.d_out, true, width, arena, attention.reads_often());
    T* summed = nullptr;  // g of the hop before, where it can be written
    for (std::size_t k = count; k-- > 0;) {
        const T teleport = static_cast<T>(hops[k].teleport), walk = static_cast<T>(hops[k].walk);
        if (head.dropout.drops_values() && !summed) {
            summed = arena.take<T>(offset_t{rows} * columns).data();
            parallel_rows(rows, [&](index_t i) { std::copy_n(g.row(i), columns, summed + offset_t{i} * columns); });
            g = {summed, columns};
        }
        bool as_they_are = walk == 1;  // rows of g, without those that are not alive
        for (index_t i = 0; as_they_are && i < rows; ++i) as_they_are = attention.is_alive(i);
        // A pass over g and the outputs that the operator has in hand anyway.
        const bool makes_means = as_they_are && fused && teleport == 0 && !head.dropout.drops_values() && attention.makes_row_means();
        if (!makes_means && row_means.empty()) {
            row_means = arena.take<T>(rows);
            std::fill(row_means.begin(), row_means.end(), T(0));
        }
        T* const scaled = as_they_are ? nullptr : arena.take<T>(offset_t{rows} * columns).data();
        parallel_rows(makes_means ? 0 : rows, [&](index_t i) {
            const T* const from = g.row(i);
            if (!attention.is_alive(i)) {
                std::fill_n(scaled + offset_t{i} * columns, columns, T(0));
                return;
            }
            T mean = dot<T, A>(from, gradient.hops + (static_cast<offset_t>(k) * rows + i) * dim, dim);
            if (head.dropout.drops_values()) drop_values(head.dropout, static_cast<int>(k), i, summed + offset_t{i} * columns, dim);
            if (teleport != 0) {
                mean -= teleport * dot<T, A>(from, v.row(i), dim);
                add_row<A>(gradient.d_v, i, teleport, from);
            }
            if (walk != 0) row_means[static_cast<std::size_t>(i)] += mean;
            if (scaled) scale_row<T, A>(from, walk, columns, scaled + offset_t{i} * columns);
        });
        terms[k].g = scaled ? Rows<T>{scaled, columns} : g;
        summed = in_place ? in_place : arena.take<T>(offset_t{keys} * columns).data();
        if (!fused) attention.apply_transposed(terms[k].g, summed);
        g = {summed, columns};
    }
    attention.weights_gradient(terms, row_means, gradient, fused ? summed : nullptr);
    if (only_weights && !in_place) parallel_rows(keys, [&](index_t j) { store_row<A>(gradient.d_v, j, summed + offset_t{j} * columns, false); });
    if (start != 0 && !only_weights) parallel_rows(keys, [&](index_t j) { add_row<A>(gradient.d_v, j, static_cast<T>(start), summed + offset_t{j} * columns); });
}

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
