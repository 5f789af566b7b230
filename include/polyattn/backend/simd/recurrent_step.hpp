#pragma once
// One token of causal kernel attention from the sums over the tokens before.

#include <polyattn/backend/simd/attention.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// Numbers of one head's state: phi(K)^T 1, then phi(K)^T Z_k and the sum of Z_k for each hop.
template <class T, class A>
offset_t recurrent_size(index_t features, index_t value_columns, std::size_t hops) {
    const index_t columns = padded(value_columns, lanes<T, A>);
    return padded(features, lanes<T, A>) + static_cast<offset_t>(hops) * (offset_t{features} + 1) * columns;
}

/// Adds the head's only key to the state and answers its only query; `tokens` counts it.
template <class A, class T, class Features>
void recurrent_step(const KernelHead<T, Features>& head, index_t tokens, T* state, MatrixView<T> out, Arena& arena) {
    constexpr int width = lanes<T, A>;
    const FeatureRows<T, A, Features> features(head);
    const index_t f = features.columns(), columns = padded(head.v.cols, width);
    T *const q = arena.take<T>(f).data(), *const k = arena.take<T>(f).data(), *const next = arena.take<T>(columns).data();
    features.template forward<true>(readable_rows(head.q, false, width, arena), 0, 1, q);
    features.template forward<false>(readable_rows(head.k, false, width, arena), 0, 1, k);
    const T* const v = readable_rows(head.v, true, width, arena).data;
    add_scaled<T, A>(T(1), k, f, state);
    const T denominator = dot<T, A>(q, state, f) + static_cast<T>(head.epsilon);
    const bool zero = denominator == 0, empty = zero && head.zero != ZeroRow::mean;
    const T* z = scaled_rows<T>({v, columns}, head.recursion->start, 1, columns, arena).data;
    T* sums = state + f;
    for (const Hop& hop : head.recursion->hops) {
        T* const total = sums + offset_t{features.count()} * columns;
        outer_sum<T, A>(k, f, features.count(), Rows<T>{z, columns}, 0, 1, columns, sums);
        add_scaled<T, A>(T(1), z, columns, total);
        const T walk = static_cast<T>(hop.walk), factor = empty ? T(0) : zero ? walk / static_cast<T>(tokens) : walk / denominator;
        if (empty) std::fill_n(next, columns, T(0));
        else if (zero) scale_row<T, A>(total, factor, columns, next);
        else row_product<T, A>(q, f, 1, features.count(), sums, columns, columns, next, columns, &factor, false);
        if (!empty && hop.teleport != 0) add_scaled<T, A>(static_cast<T>(hop.teleport), v, columns, next);
        z = next;
        sums = total + columns;
    }
    store_row<A>(out, 0, z, false);
}

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
