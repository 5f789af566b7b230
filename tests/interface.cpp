// What users hand in and get back: xtensor expressions of every rank and form, raw views, lazy nodes, in-place calls.
#include "support/allocations.hpp"
#include "support/random.hpp"

#include <polyattn/polyattn.hpp>

#if __has_include(<xtensor/views/xview.hpp>)
#include <xtensor/misc/xmanipulation.hpp>
#include <xtensor/views/xbroadcast.hpp>
#include <xtensor/views/xstrided_view.hpp>
#include <xtensor/views/xview.hpp>
#else
#include <xtensor/xbroadcast.hpp>
#include <xtensor/xmanipulation.hpp>
#include <xtensor/xstrided_view.hpp>
#include <xtensor/xview.hpp>
#endif

#include <doctest/doctest.h>

using namespace polyattn;

namespace {

template <std::size_t Rank>
xt::xtensor<float, Rank> random_tensor(Random& random, std::array<std::size_t, Rank> shape) {
    auto tensor = xt::xtensor<float, Rank>::from_shape(shape);
    for (float& value : tensor) value = static_cast<float>(random.normal());
    return tensor;
}

/// The same values and shape, to the bit.
template <class A, class B>
bool same(const A& a, const B& b) {
    return std::equal(a.shape().begin(), a.shape().end(), b.shape().begin(), b.shape().end()) && std::equal(a.begin(), a.end(), b.begin());
}

const Attention<LocalGlobalRandom, PPR<5>>& layer() {
    static const Attention attention{LocalGlobalRandom{.window = 8, .globals = 3, .randoms = 3}, PPR<5>{}};
    return attention;
}

}  // namespace

TEST_CASE("ranks 2, 3 and 4, static and dynamic, agree") {
    POLYATTN_RANDOM(random);
    const auto q = random_tensor<4>(random, {2, 3, 21, 10}), k = random_tensor<4>(random, {2, 3, 21, 10}), v = random_tensor<4>(random, {2, 3, 21, 6});
    const xt::xtensor<float, 4> out = layer()(q, k, v);
    CHECK((out.shape(0) == 2 && out.shape(1) == 3 && out.shape(2) == 21 && out.shape(3) == 6));
    for (std::size_t b = 0; b < 2; ++b) {
        const xt::xtensor<float, 3> q3 = xt::view(q, b), k3 = xt::view(k, b), v3 = xt::view(v, b);
        CHECK(same(layer()(q3, k3, v3), xt::xtensor<float, 3>(xt::view(out, b))));
        for (std::size_t h = 0; h < 3; ++h) {
            const xt::xtensor<float, 2> q2 = xt::view(q, b, h), k2 = xt::view(k, b, h), v2 = xt::view(v, b, h);
            CHECK(same(layer()(q2, k2, v2), xt::xtensor<float, 2>(xt::view(out, b, h))));
        }
    }
    const xt::xarray<float> qd = q, kd = k, vd = v;
    const xt::xarray<float> dynamic = layer()(qd, kd, vd);
    CHECK(same(dynamic, out));
    static_assert(std::is_same_v<decltype(layer()(qd, kd, vd)), xt::xarray<float>>);
    static_assert(std::is_same_v<decltype(layer()(q, k, v)), xt::xtensor<float, 4>>);
}

TEST_CASE("views, transposes, broadcasts, arithmetic, adapted buffers and column-major tensors are read as they are") {
    POLYATTN_RANDOM(random);
    const auto q = random_tensor<4>(random, {2, 3, 21, 10}), k = random_tensor<4>(random, {2, 3, 21, 10}), v = random_tensor<4>(random, {2, 3, 21, 6});
    const xt::xtensor<float, 4> out = layer()(q, k, v);
    // [batch, tokens, heads, dim], as a projection leaves it
    const xt::xtensor<float, 4> stored = xt::transpose(q, {0, 2, 1, 3});
    CHECK(same(layer()(xt::transpose(stored, {0, 2, 1, 3}), k, v), out));
    const xt::xtensor<float, 4> turned = xt::transpose(k, {0, 1, 3, 2});
    CHECK(same(layer()(q, xt::transpose(turned, {0, 1, 3, 2}), v), out));  // inner stride of 21
    const auto larger = random_tensor<4>(random, {2, 3, 40, 13});
    const xt::xtensor<float, 4> part = xt::view(larger, xt::all(), xt::all(), xt::range(5, 26), xt::range(3, 13));
    CHECK(same(layer()(xt::view(larger, xt::all(), xt::all(), xt::range(5, 26), xt::range(3, 13)), k, v), layer()(part, k, v)));
    const xt::xtensor<float, 4> every_second = xt::view(larger, xt::all(), xt::all(), xt::range(0, 40, 2), xt::all());
    CHECK(same(layer()(xt::view(larger, xt::all(), xt::all(), xt::range(0, 40, 2), xt::all()), every_second, every_second), layer()(every_second, every_second, every_second)));
    const xt::xtensor<float, 4> sum = q + 2.f * k;
    CHECK(same(layer()(q + 2.f * k, k, v), layer()(sum, k, v)));
    const xt::xtensor<float, 4> halves = .5f * v;
    CHECK(same(layer()(q, k, .5f * v), layer()(q, k, halves)));
    const auto one_head = random_tensor<4>(random, {2, 1, 21, 10});
    const xt::xtensor<float, 4> copies = xt::broadcast(one_head, {2, 3, 21, 10});
    CHECK(same(layer()(q, xt::broadcast(one_head, {2, 3, 21, 10}), v), layer()(q, copies, v)));
    const xt::xtensor<float, 4, xt::layout_type::column_major> columns = q;
    const auto from_columns = layer()(columns, k, v);
    CHECK(from_columns(1, 2, 3, 4) == out(1, 2, 3, 4));
    std::vector<float> buffer(v.begin(), v.end());
    CHECK(same(layer()(q, k, xt::adapt(buffer, {2, 3, 21, 6})), out));
    CHECK(same(layer()(q, k, xt::adapt(buffer.data(), 2 * 3 * 21 * 6, xt::no_ownership(), std::vector<std::size_t>{2, 3, 21, 6})), out));
    // rows 4 KiB apart
    const auto wide = random_tensor<3>(random, {1, 30, 1024});
    const xt::xtensor<float, 3> narrow = xt::view(wide, xt::all(), xt::all(), xt::range(0, 16));
    CHECK(same(layer()(xt::view(wide, xt::all(), xt::all(), xt::range(0, 16)), narrow, narrow), layer()(narrow, narrow, narrow)));
}

TEST_CASE("raw views give the same as expressions") {
    POLYATTN_RANDOM(random);
    const auto q = random_tensor<3>(random, {4, 30, 8}), k = random_tensor<3>(random, {2, 30, 8}), v = random_tensor<3>(random, {2, 30, 8}), d_out = random_tensor<3>(random, {4, 30, 8});
    const auto out = layer()(q, k, v);
    const auto vq = tensor_view(q.data(), {4, 30, 8}), vk = tensor_view(k.data(), {2, 30, 8}), vv = tensor_view(v.data(), {2, 30, 8});
    const Tensor<float> raw = layer()(vq, vk, vv);
    CHECK(std::equal(out.begin(), out.end(), raw.values.begin(), raw.values.end()));
    std::vector<float> target(4 * 30 * 8);
    layer().into(tensor_view(target.data(), {4, 30, 8}), vq, vk, vv);
    CHECK(std::equal(out.begin(), out.end(), target.begin(), target.end()));
    const auto a = layer().forward(q, k, v);
    const auto b = layer().forward(xt::xarray<float>(q), k, v);
    const auto raw_forward = layer().forward(vq, vk, vv);
    const auto ga = layer().backward(a.saved, d_out);
    const auto gb = layer().backward(b.saved, xt::xarray<float>(d_out));
    const auto gr = layer().backward(raw_forward.saved, tensor_view(d_out.data(), {4, 30, 8}));
    CHECK(same(ga.q, gb.q));
    CHECK(same(ga.k, gb.k));
    CHECK(std::equal(ga.v.begin(), ga.v.end(), gr.v.values.begin(), gr.v.values.end()));
    CHECK(ga.k.shape(0) == 2);
    const Saved<float> copied = a.saved;  // a value: copies own what they point to
    CHECK(same(layer().backward(copied, d_out).q, ga.q));
}

TEST_CASE("into: views as targets, residuals, outputs of any stride") {
    POLYATTN_RANDOM(random);
    const auto x = random_tensor<4>(random, {2, 3, 17, 8});
    const auto out = layer()(x, x, x);
    xt::xtensor<float, 4> target = xt::zeros<float>({2, 3, 17, 8});
    layer().into(target, x, x, x);
    CHECK(same(target, out));
    xt::xtensor<float, 4> residual = x;
    layer().into(residual, x, x, x, {.accumulate = true});
    CHECK(same(residual, xt::xtensor<float, 4>(x + out)));
    xt::xtensor<float, 4> stored = xt::zeros<float>({2, 17, 3, 8});
    layer().into(xt::transpose(stored, {0, 2, 1, 3}), x, x, x);
    CHECK(same(xt::xtensor<float, 4>(xt::transpose(stored, {0, 2, 1, 3})), out));
    xt::xtensor<float, 4> wide = xt::zeros<float>({2, 3, 17, 11});
    layer().into(xt::view(wide, xt::all(), xt::all(), xt::all(), xt::range(2, 10)), x, x, x);
    CHECK(same(xt::xtensor<float, 4>(xt::view(wide, xt::all(), xt::all(), xt::all(), xt::range(2, 10))), out));
    CHECK(wide(1, 2, 3, 1) == 0);
    CHECK(wide(1, 2, 3, 10) == 0);
}

TEST_CASE("lazy: alone, in larger expressions, copied, outliving its inputs; checks at construction") {
    POLYATTN_RANDOM(random);
    const auto x = random_tensor<3>(random, {2, 19, 8});
    const auto out = layer()(x, x, x);
    const xt::xtensor<float, 3> alone = lazy(layer(), x, x, x);
    CHECK(same(alone, out));
    const xt::xtensor<float, 3> sum = x + 2.f * lazy(layer(), x, x, x);
    CHECK(same(sum, xt::xtensor<float, 3>(x + 2.f * out)));
    const auto node = [&] {
        const xt::xtensor<float, 3> temporary = x;
        return lazy(layer(), temporary, temporary, temporary);
    }();
    CHECK(node(1, 3, 4) == out(1, 3, 4));
    xt::xtensor<float, 3> target;
    xt::noalias(target) = node;
    CHECK(same(target, out));
    const xt::xarray<float> dynamic = lazy(layer(), x, x, x);
    CHECK(same(dynamic, out));
    xt::xtensor<float, 3> wide = xt::zeros<float>({2, 19, 10});
    xt::view(wide, xt::all(), xt::all(), xt::range(1, 9)) = node;
    CHECK(wide(1, 3, 5) == out(1, 3, 4));
    CHECK_THROWS_AS(lazy(layer(), x, x, random_tensor<3>(random, {2, 18, 8})), invalid_input);
    CHECK_THROWS_AS(lazy(layer(), x, x, x, {.key_lengths = {3, 4}}), invalid_input);
}

TEST_CASE("grouped-query heads read one key head for several query heads") {
    POLYATTN_RANDOM(random);
    const auto q = random_tensor<3>(random, {6, 20, 8}), k = random_tensor<3>(random, {2, 20, 8});
    auto repeated = xt::xtensor<float, 3>::from_shape({6, 20, 8});
    for (std::size_t h = 0; h < 6; ++h) xt::view(repeated, h) = xt::view(k, h / 3);
    CHECK(same(layer()(q, k, k), layer()(q, repeated, repeated)));
}

TEST_CASE("decoding: the last query of a causal layer, alone, gives its row") {
    POLYATTN_RANDOM(random);
    const auto q = random_tensor<2>(random, {33, 8}), k = random_tensor<2>(random, {33, 8});
    const Attention<Causal, Alibi> attention;
    const auto all = attention(q, k, k);
    for (const std::size_t length : {1, 2, 16, 33}) {
        const auto last = attention(xt::view(q, xt::range(length - 1, length)), xt::view(k, xt::range(0, length)), xt::view(k, xt::range(0, length)));
        for (std::size_t c = 0; c < 8; ++c) CHECK(last(0, c) == doctest::Approx(all(length - 1, c)).epsilon(1e-5));
    }
}

TEST_CASE("plans are reused: by the layer, its copies, and calls that are handed one") {
    const Attention attention{LocalGlobalRandom{.window = 8, .globals = 2, .randoms = 2}};
    const Plan plan = attention.plan(50, 50);
    const auto copy = attention;
    CHECK(plan.tiles().data() == attention.plan(50, 50).tiles().data());
    CHECK(plan.tiles().data() == copy.plan(50, 50).tiles().data());
    for (index_t n = 1; n < 30; ++n) CHECK(attention.plan(n, n).queries() == n);  // more than the cache holds
    CHECK(attention.plan(50, 50).count() == plan.count());
}

TEST_CASE("a call with a plan, a workspace and tensors in place allocates nothing the second time") {
    POLYATTN_RANDOM(random);
    const auto x = random_tensor<4>(random, {1, 2, 300, 24});
    xt::xtensor<float, 4> out = x;
    Workspace workspace;
    const auto one = random_tensor<4>(random, {1, 2, 1, 24});
    xt::xtensor<float, 4> row = one;
    const auto check = [&](const auto& attention, const auto& queries, auto& result) {
        CallOptions options;
        options.plan = attention.plan(static_cast<index_t>(queries.shape(2)), 300);
        options.workspace = &workspace;
        attention.into(result, queries, x, x, options);
        const std::size_t before = allocation_count();
        attention.into(result, queries, x, x, options);
        CHECK(allocation_count() == before);
    };
    [[maybe_unused]] const int before = worker_count();
    for ([[maybe_unused]] const int threads : {1, 2, 3, 8}) {  // two heads: side by side, one after the other, threads inside
#if defined(_OPENMP)
        omp_set_num_threads(threads);
#endif
        check(layer(), x, out);
        check(Attention<Causal>{}, x, out);
        check(Attention<Strided, PPR<2>>{}, x, out);
        check(Attention<LocalGlobalRandom, Alibi>{LocalGlobalRandom{}, Alibi(2)}, x, out);
        check(Attention{RelativePosition{.heads = 2, .reach = 1, .table = std::vector<double>(6)}}, x, out);
        check(Attention{TableBias{[](index_t, index_t, index_t) { return 0; }, 2, std::vector<double>(2)}}, x, out);
        check(Attention<>{}, one, row);
    }
#if defined(_OPENMP)
    omp_set_num_threads(before);
#endif
    CHECK(workspace.capacity() > 0);
}

TEST_CASE("scratch of a forward pass: one head's weights a thread and O(n d)") {
    const int before = worker_count();
    const auto scratch = [&](const auto& attention, index_t n, index_t d, index_t heads) {
        const Tensor<float> x({heads, n, d});
        Tensor<float> out({heads, n, d});
        Workspace workspace;
        CallOptions options;
        options.plan = attention.plan(n, n);
        options.workspace = &workspace;
        attention.into(out.view(), x.view(), x.view(), x.view(), options);
        attention.into(out.view(), x.view(), x.view(), x.view(), options);
        return workspace.capacity();
    };
    const double mib = 1 << 20;
#if defined(_OPENMP)
    omp_set_num_threads(1);
#endif
    // Dense attention keeps no weights: n = 2048 would have 16 MiB of them. A few numbers a row, and fixed buffers.
    CHECK(double(scratch(Attention<>{}, 2048, 4, 1)) < 2048 * 48 * 4. + mib);
    // Diffusion: the tiles' weights, rounded to whole groups of 16 queries and 8 keys, the edges', and some rows.
    const Attention<LocalGlobalRandom, PPR<2>> diffuser;
    const Plan plan = diffuser.plan(4096, 4096);
    const double weights = double(plan.lowered<detail::simd::Schedule>().weight_rows()) * 16 * 4, edges = double(plan.edges().count()) * 4;
    const double one = double(scratch(diffuser, 4096, 8, 1));
    CHECK(one < weights + edges + 4096 * (8 * 8 + 16) * 4. + 4 * mib);
    CHECK(double(scratch(diffuser, 4096, 8, 3)) < 1.01 * one + mib);  // heads one after the other share it
    // Sampling keeps 1 / L of a head's weights; a few keys of rounding for each group of 16 queries. Blocks above 4 MiB are whole huge pages.
    const double all = 2048. * 2048 * 4;
    CHECK(double(scratch(Attention<PPR<2>>{}, 2048, 4, 1)) > all);
    const auto sampled = [&]<index_t L>(std::integral_constant<index_t, L>) {
        const double got = double(scratch(Attention<PPR<2>, LocallyBiased<L>>{}, 2048, 4, 1));
        CHECK(got >= all / L);
        CHECK(got < all / L + 2048 * (8 + 12 * 4 + 16) * 4. + (all / L < 4 * mib ? .25 : 2.25) * mib);
    };
    sampled(std::integral_constant<index_t, 2>{});
    sampled(std::integral_constant<index_t, 4>{});
    sampled(std::integral_constant<index_t, 8>{});
#if defined(_OPENMP)
    omp_set_num_threads(before);
#endif
}

TEST_CASE("a batch of caches of different lengths gives what each item gives alone") {
    POLYATTN_RANDOM(random);
    const index_t queries = 5;
    const std::vector<index_t> key_lengths{40, 17, 9, 23}, query_lengths{5, 3, 1, 4};
    const std::array<std::size_t, 4> q_shape{4, 2, 5, 6}, k_shape{4, 1, 40, 6};
    const auto draw = [&](auto shape) {
        xt::xtensor<double, 4> tensor = xt::zeros<double>(shape);
        for (double& value : tensor) value = random.normal();
        return tensor;
    };
    const auto q = draw(q_shape), k = draw(k_shape), v = draw(k_shape), d_out = draw(q_shape);
    // layer_of(b): the layer that item b alone has.
    const auto check_items = [&](const auto& attention, const auto& layer_of, index_t asked, const std::vector<index_t>& lengths) {
        auto first = xt::range(0, asked);
        const CallOptions options{.key_lengths = key_lengths, .query_lengths = lengths};
        const xt::xtensor<double, 4> some_q = xt::view(q, xt::all(), xt::all(), first, xt::all()), some_d = xt::view(d_out, xt::all(), xt::all(), first, xt::all());
        const auto [out, saved] = attention.forward(some_q, k, v, options);
        CHECK(same(attention(some_q, k, v, options), out));
        const auto gradient = attention.backward(saved, some_d);
        std::vector<double> d_bias(gradient.bias.size());
        for (std::size_t b = 0; b < 4; ++b) {
            auto rows = xt::range(0, lengths[b]), columns = xt::range(0, key_lengths[b]);
            const xt::xtensor<double, 3> own_q = xt::view(q, b, xt::all(), rows, xt::all()), own_k = xt::view(k, b, xt::all(), columns, xt::all()), own_v = xt::view(v, b, xt::all(), columns, xt::all()),
                                         own_d = xt::view(d_out, b, xt::all(), rows, xt::all());
            const auto own_layer = layer_of(b);
            const auto [alone, alone_saved] = own_layer.forward(own_q, own_k, own_v);
            const auto alone_gradient = own_layer.backward(alone_saved, own_d);
            const auto close = [](const auto& batch, const auto& item) { return xt::amax(xt::abs(batch - item))() < 1e-12; };
            CHECK(close(xt::view(out, b, xt::all(), rows, xt::all()), alone));
            CHECK(close(xt::view(gradient.q, b, xt::all(), rows, xt::all()), alone_gradient.q));
            CHECK(close(xt::view(gradient.k, b, xt::all(), columns, xt::all()), alone_gradient.k));
            CHECK(close(xt::view(gradient.v, b, xt::all(), columns, xt::all()), alone_gradient.v));
            for (std::size_t i = 0; i < d_bias.size(); ++i) d_bias[i] += alone_gradient.bias[i];
        }
        for (std::size_t i = 0; i < d_bias.size(); ++i) CHECK(gradient.bias[i] == doctest::Approx(d_bias[i]).epsilon(1e-10));
    };
    const auto check = [&](const auto& attention, index_t asked, const std::vector<index_t>& lengths) { check_items(attention, [&](std::size_t) { return attention; }, asked, lengths); };
    const auto below = [](std::vector<index_t> indices, index_t end) {
        std::erase_if(indices, [&](index_t index) { return index >= end; });
        return indices;
    };
    RelativePosition table{.heads = 2, .reach = 7, .table = std::vector<double>(30)};
    for (double& entry : table.table) entry = random.normal();
    const std::vector<index_t> ones(4, 1);
    const std::pair<index_t, std::vector<index_t>> calls[] = {{queries, query_lengths}, {index_t{1}, ones}};
    for (const auto& call : calls) {
        const index_t asked = call.first;
        const std::vector<index_t>& lengths = call.second;
        check(Attention<Causal>{}, asked, lengths);
        check(Attention{CausalSlidingWindow{.window = 6}}, asked, lengths);
        check(Attention{SlidingWindow{.window = 8}, Alibi(2)}, asked, lengths);
        check(Attention{table}, asked, lengths);
        check(Attention{LocalGlobalRandom{.window = 6, .globals = 2, .randoms = 3}, table, Reference{}}, asked, lengths);
        check(Attention{LocalitySensitiveHashing{.buckets = 2, .rounds = 8, .causal = true, .seed = random.seed()}}, asked, lengths);
        check_items(Attention{SlidingWindow{.window = 8}, Unbiased{.drop = 0, .per_item = true}}, [](std::size_t) { return Attention{SlidingWindow{.window = 8}}; }, asked, lengths);
        // Given tokens and sources that are no keys of the shorter items.
        const std::vector<index_t> tokens{3, 12, 20, 39};
        const auto longformer = [&](index_t keys) { return Attention{Longformer{.window = 6, .tokens = below(tokens, keys)}}; };
        check_items(longformer(40), [&](std::size_t b) { return longformer(key_lengths[b]); }, asked, lengths);
        check_items(Attention{Intersection{Longformer{.window = 6, .tokens = tokens}, Causal{}}},
                    [&](std::size_t b) { return Attention{Intersection{Longformer{.window = 6, .tokens = below(tokens, key_lengths[b])}, Causal{}}}; }, asked, lengths);
        const auto given = [&](index_t keys) { return Attention{Given{{below({30, 0, 5}, keys), below({2, 39, 8, 20}, keys), below({1, 16, 7}, keys)}}}; };
        check_items(given(40), [&](std::size_t b) { return given(key_lengths[b]); }, asked, lengths);
        // A caller's graph stays where it is.
        const Plan graph = RandomTokens{.count = 9, .seed = random.seed()}.plan(asked, 40);
        const auto edges = [&](index_t rows, index_t keys) {
            const Csr csr = prefix(graph, rows, keys).to_csr();
            return Attention{EdgeList{csr.offsets, csr.keys}};
        };
        check_items(edges(asked, 40), [&](std::size_t b) { return edges(lengths[b], key_lengths[b]); }, asked, lengths);
    }
    CHECK_THROWS_AS((Attention{Longformer{.window = 6, .tokens = {40}}}(q, k, v, {.key_lengths = key_lengths})), invalid_input);
    CHECK_THROWS_AS((Attention{Given{{{0, 40}}}}(q, k, v, {.key_lengths = key_lengths})), invalid_input);
    // Whether a sampler fits does not hang on the lengths.
    for (const std::vector<index_t>& lengths : {std::vector<index_t>{}, std::vector<index_t>{40, 17, 9, 23}}) {
        CHECK_THROWS_AS((Attention{LocallyBiased<41>{}}(q, k, v, {.key_lengths = lengths})), invalid_input);
        CHECK_THROWS_AS((Attention{Given{std::vector<std::vector<index_t>>(41)}}(q, k, v, {.key_lengths = lengths})), invalid_input);
    }
    CHECK_THROWS_AS((Attention{LocallyBiased<2>{}}(q, k, v, {.key_lengths = {40, 4, 9, 23}})), invalid_input);  // five queries, four keys
    CHECK_THROWS_AS((Attention{Given{{{0}, {1}}}}(q, k, v, {.key_lengths = {40, 4, 9, 23}})), invalid_input);
    const xt::xtensor<double, 4> eight = xt::ones<double>({2, 1, 8, 2}), ten = xt::ones<double>({2, 1, 10, 2});
    for (const bool per_item : {false, true}) {  // BigBird is of as many queries as keys, which the items have
        const xt::xtensor<double, 4> out = Attention{BigBird<2>{}, Unbiased{.drop = .2, .per_item = per_item}}(eight, ten, ten, {.key_lengths = {8, 5}, .query_lengths = {8, 0}});
        CHECK(xt::amax(xt::abs(xt::view(out, 1, xt::all(), xt::all(), xt::all())))() == 0);
    }
    // Nothing to see, and nobody who looks.
    for (const CallOptions& options : {CallOptions{.key_lengths = {40, 0, 9, 23}}, CallOptions{.key_lengths = {40, 0, 9, 23}, .query_lengths = {5, 0, 5, 5}}}) {
        const auto nothing = [&](const auto& attention) {
            const xt::xtensor<double, 4> out = attention(q, k, v, options);
            CHECK(xt::amax(xt::abs(xt::view(out, 1, xt::all(), xt::all(), xt::all())))() == 0);
            CHECK(xt::amin(xt::abs(xt::view(out, 2, xt::all(), xt::all(), xt::all())))() > 0);
        };
        nothing(Attention{Longformer{.window = 60}});
        nothing(Attention{LocallyBiased<12>{}});  // more windows than item 2 has keys
        nothing(Attention{Unbiased{.per_item = true}});
        nothing(Attention{LocalGlobalRandom{}});
    }
    CHECK_THROWS_AS((Attention<Kernel<ReLU>, Causal>{}(q, k, v, {.key_lengths = key_lengths})), invalid_input);
}

TEST_CASE("accumulate is of into() and forward_into() alone; a call that throws leaves a saved pass as it was") {
    POLYATTN_RANDOM(random);
    const auto x = random_tensor<3>(random, {2, 30, 8}), larger = random_tensor<3>(random, {2, 60, 8});
    const Attention attention{SlidingWindow{.window = 8}};
    const auto plain = attention(x, x, x);
    CHECK(same(attention(x, x, x, {.accumulate = true}), plain));
    auto [out, saved] = attention.forward(x, x, x, {.accumulate = true});
    CHECK(same(out, plain));
    const auto gradient = attention.backward(saved, x);
    auto larger_out = larger;
    CHECK_THROWS_AS(attention.forward_into(larger_out, saved, larger, larger, larger, {.key_lengths = {1, 2, 3}}), invalid_input);
    CHECK_THROWS_AS(attention.forward_into(out, saved, larger, larger, larger), invalid_input);
    CHECK(same(attention.backward(saved, x).q, gradient.q));
}

TEST_CASE("gradients into tensors that are there") {
    POLYATTN_RANDOM(random);
    const auto x = random_tensor<4>(random, {1, 2, 90, 24});
    const auto attention = Attention{LocalGlobalRandom{.window = 8, .globals = 3, .randoms = 2}, PPR<2>{}};
    const auto saved = attention.forward(x, x, x).saved;
    const auto fresh = attention.backward(saved, x);
    auto reused = attention.backward(saved, x);
    reused.q.fill(7);
    Workspace workspace;
    CallOptions options;
    options.workspace = &workspace;
    attention.backward_into(reused, saved, x, options);
    CHECK(same(reused.q, fresh.q));
    CHECK(same(reused.k, fresh.k));
    CHECK(same(reused.v, fresh.v));
    const std::size_t held = workspace.capacity(), before = allocation_count();
    attention.backward_into(reused, saved, x, options);
    CHECK(workspace.capacity() == held);
    CHECK(allocation_count() - before < 8);  // parts of a bias gradient, even of none
    reused.k = random_tensor<4>(random, {1, 2, 91, 24});
    CHECK_THROWS_AS(attention.backward_into(reused, saved, x), invalid_input);
}

TEST_CASE("no heads, no batch, no tokens, no columns of values") {
    for (const auto& shape : {std::array<std::size_t, 4>{0, 2, 5, 4}, {2, 0, 5, 4}, {2, 2, 0, 4}}) {
        const xt::xtensor<float, 4> x = xt::zeros<float>(shape);
        const auto [out, saved] = layer().forward(x, x, x);
        CHECK(out.size() == 0);
        CHECK(layer().backward(saved, out).q.size() == 0);
    }
    const xt::xtensor<float, 2> x = xt::ones<float>({9, 4}), nothing = xt::zeros<float>({9, 0});
    CHECK(layer()(x, x, nothing).size() == 0);
    const auto saved = layer().forward(x, x, nothing).saved;
    const auto gradient = layer().backward(saved, nothing);
    CHECK(xt::amax(xt::abs(gradient.q))() == 0);
    CHECK(xt::amax(xt::abs(gradient.k))() == 0);
}

TEST_CASE("describe names the architecture and the threads") {
    CHECK(describe().find(xsimd::default_arch::name()) != std::string::npos);
    CHECK(describe().find(worker_count() == 1 ? "1 thread" : "threads") != std::string::npos);
}

TEST_CASE("heads side by side, as a projection leaves them, give what heads one behind the other give, where hundreds of queries read a key too") {
    POLYATTN_RANDOM(random);
    const index_t heads = 3, d = 16;
    for (const index_t n : {40, 300}) {
        const offset_t wide = 3 * heads * d;
        Tensor<double> rows({n, wide}), d_rows({n, wide}), q({heads, n, d}), k({heads, n, d}), v({heads, n, d});
        const auto d_out = random.tensor<double>({heads, n, d});
        const std::array<Tensor<double>*, 3> apart{&q, &k, &v};
        const auto at = [&](index_t part, index_t h, index_t i, index_t c) { return static_cast<std::size_t>(i * wide + (part * heads + h) * d + c); };
        for (double& value : d_rows.values) value = 7;  // what was there before must not stay
        for (index_t part = 0; part < 3; ++part) {
            *apart[static_cast<std::size_t>(part)] = random.tensor<double>({heads, n, d});
            for (index_t h = 0; h < heads; ++h)
                for (index_t i = 0; i < n; ++i)
                    for (index_t c = 0; c < d; ++c) rows.values[at(part, h, i, c)] = apart[static_cast<std::size_t>(part)]->values[static_cast<std::size_t>((h * n + i) * d + c)];
        }
        const auto view = [&](Tensor<double>& of, index_t part) { return tensor_view(of.data() + part * heads * d, {heads, n, d}, {d, wide, 1}); };
        const Attention<> layer;
        const auto [out, saved] = layer.forward(q.view(), k.view(), v.view());
        const auto wanted = layer.backward(saved, d_out.view());
        const auto [strided_out, strided_saved] = layer.forward(view(rows, 0), view(rows, 1), view(rows, 2));
        Gradients<TensorView<double>> got;
        got.q = view(d_rows, 0);
        got.k = view(d_rows, 1);
        got.v = view(d_rows, 2);
        layer.backward_into(got, strided_saved, d_out.view());
        for (std::size_t i = 0; i < out.values.size(); ++i) CHECK(std::abs(out.values[i] - strided_out.values[i]) < 1e-12);
        const std::array<const Tensor<double>*, 3> gradients{&wanted.q, &wanted.k, &wanted.v};
        for (index_t part = 0; part < 3; ++part)
            for (index_t h = 0; h < heads; ++h)
                for (index_t i = 0; i < n; ++i)
                    for (index_t c = 0; c < d; ++c)
                        CHECK(std::abs(d_rows.values[at(part, h, i, c)] - gradients[static_cast<std::size_t>(part)]->values[static_cast<std::size_t>((h * n + i) * d + c)]) < 1e-12);
    }
}
