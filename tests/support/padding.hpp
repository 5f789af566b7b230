#pragma once

#include "random.hpp"

#include <polyattn/call_options.hpp>

#include <doctest/doctest.h>

#include <limits>

/// Outputs and gradients of a layer on a padded text, with numbers and with NaN behind its end, are the same bits.
template <class Layer>
void check_padding(Random& random, const Layer& layer, polyattn::index_t tokens = 40, polyattn::index_t valid = 21) {
    const auto x = random.tensor<float>({1, 2, tokens, 8});
    auto bad = x;
    for (polyattn::index_t h = 0; h < 2; ++h)
        std::fill(bad.values.begin() + (h * tokens + valid) * 8, bad.values.begin() + (h + 1) * tokens * 8, std::numeric_limits<float>::quiet_NaN());
    const polyattn::CallOptions options{.key_lengths = {valid}};
    const auto a = layer.forward(x.view(), x.view(), x.view(), options), b = layer.forward(bad.view(), bad.view(), bad.view(), options);
    CHECK(a.out.values == b.out.values);
    const auto da = layer.backward(a.saved, x.view()), db = layer.backward(b.saved, x.view());
    CHECK(da.q.values == db.q.values);
    CHECK(da.k.values == db.k.values);
    CHECK(da.v.values == db.v.values);
    CHECK(da.compression == db.compression);
}
