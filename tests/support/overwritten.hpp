#pragma once
// Gradients that are written to memory of any strides, whatever it holds.
#include "support/random.hpp"

#include <polyattn/polyattn.hpp>

#include <doctest/doctest.h>

#include <limits>

/// backward_into() onto NaN, packed and transposed, gives the bits of backward(). Two batch items, heads in groups of two.
template <class T, class Layer>
void check_overwrites(const Layer& layer, Random& random, polyattn::index_t queries, polyattn::index_t keys, polyattn::index_t d, polyattn::index_t e, const polyattn::CallOptions& options = {}) {
    using namespace polyattn;
    CAPTURE(queries);
    CAPTURE(keys);
    CAPTURE(d);
    const index_t batch = 2, heads = 4, key_heads = 2;
    const auto q = random.tensor<T>({batch, heads, queries, d}), k = random.tensor<T>({batch, key_heads, keys, d}), v = random.tensor<T>({batch, key_heads, keys, e}), d_out = random.tensor<T>({batch, heads, queries, e});
    const auto saved = layer.forward(q.view(), k.view(), v.view(), options).saved;
    const auto fresh = layer.backward(saved, d_out.view());
    auto packed = layer.backward(saved, d_out.view());
    const auto soil = [](Tensor<T>& tensor) { std::fill(tensor.values.begin(), tensor.values.end(), std::numeric_limits<T>::quiet_NaN()); };
    for (Tensor<T>* tensor : {&packed.q, &packed.k, &packed.v}) soil(*tensor);
    layer.backward_into(packed, saved, d_out.view());
    CHECK(packed.q.values == fresh.q.values);
    CHECK(packed.k.values == fresh.k.values);
    CHECK(packed.v.values == fresh.v.values);
    Tensor<T> memory[3];
    const auto transposed = [&](Tensor<T>& tensor, index_t own_heads, index_t tokens, index_t columns) {
        tensor = Tensor<T>({batch, own_heads, columns, tokens});
        soil(tensor);
        return TensorView<T>{tensor.data(), {batch, own_heads, tokens, columns}, {std::ptrdiff_t{own_heads} * tokens * columns, std::ptrdiff_t{tokens} * columns, 1, tokens}, 4};
    };
    Gradients<TensorView<T>> strided{transposed(memory[0], heads, queries, d), transposed(memory[1], key_heads, keys, d), transposed(memory[2], key_heads, keys, e), {}, {}};
    layer.backward_into(strided, saved, d_out.view());
    const auto same = [&](const TensorView<T>& a, const TensorView<const T>& b) {
        for (index_t h = 0; h < a.batch() * a.heads(); ++h)
            for (index_t i = 0; i < a.tokens(); ++i)
                for (index_t c = 0; c < a.dim(); ++c)
                    if (!(a.head(h / a.heads(), h % a.heads())(i, c) == b.head(h / a.heads(), h % a.heads())(i, c))) return false;
        return true;
    };
    CHECK(same(strided.q, fresh.q.view()));
    CHECK(same(strided.k, fresh.k.view()));
    CHECK(same(strided.v, fresh.v.view()));
}
