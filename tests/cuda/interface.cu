// What callers of the device's layers meet: views, options, memory, streams, errors.
#include "transfer.cuh"

#include "support/errors.hpp"
#include "support/random.hpp"

#include <polyattn/backend/head.hpp>
#include <polyattn/backend/cuda/plan_building.cuh>
#include <polyattn/backend/reference/attention.hpp>
#include <polyattn/policy/bias/bias.hpp>
#include <polyattn/polyattn_cuda.cuh>

#include <doctest/doctest.h>

#include <new>

using namespace polyattn;

namespace {

std::size_t free_memory() {
    std::size_t free = 0, total = 0;
    detail::cuda::check_cuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    return free;
}

using Layer = Attention<LocalGlobalRandom, PPR<3>, Cuda>;
Layer make_layer() { return Layer{LocalGlobalRandom{.window = 8, .globals = 3, .randoms = 4}, PPR<3>{.alpha = .2}}; }

}  // namespace

TEST_CASE("strided and misaligned views give the bits of contiguous ones") {
    POLYATTN_RANDOM(random);
    const index_t n = 37, d = 8, e = 6, heads = 2;
    const auto x = random.tensor<float>({heads, n, 2 * d + e + 1});
    // q, k and v side by side in rows of an odd number of columns.
    const auto all = to_device(x);
    const std::ptrdiff_t row = 2 * d + e + 1;
    const auto part = [&](offset_t first, offset_t columns) { return tensor_view(all.data() + first, {heads, n, columns}, {n * row, row, 1}); };
    Tensor<float> q({heads, n, d}), k({heads, n, d}), v({heads, n, e});
    for (index_t i = 0; i < heads * n; ++i) {
        const float* const from = x.data() + i * row;
        std::copy_n(from, d, q.data() + i * d);
        std::copy_n(from + d, d, k.data() + i * d);
        std::copy_n(from + 2 * d, e, v.data() + i * e);
    }
    const auto layer = make_layer();
    const auto dq = to_device(q), dk = to_device(k), dv = to_device(v);
    const auto wanted = to_host(layer(dq.view(), dk.view(), dv.view())).values;
    CHECK(to_host(layer(part(0, d), part(d, d), part(2 * d, e))).values == wanted);
    // Columns that are not neighbours, as a transposed tensor has them.
    Tensor<float> turned({heads, d, n});
    for (index_t h = 0; h < heads; ++h)
        for (index_t i = 0; i < n; ++i)
            for (index_t c = 0; c < d; ++c) turned.values[static_cast<std::size_t>((h * d + c) * n + i)] = q.values[static_cast<std::size_t>((h * n + i) * d + c)];
    const auto dt = to_device(turned);
    CHECK(to_host(layer(tensor_view(dt.data(), {heads, n, d}, {d * n, 1, n}), dk.view(), dv.view())).values == wanted);
    // Out with strides, and added to what is there.
    const CudaTensor<float> out(std::vector<float>(static_cast<std::size_t>(heads * n * 10), 1.f).data(), {heads, n, 10});
    const auto target = tensor_view(out.data() + 1, {heads, n, e}, {n * 10, 10, 1});
    CudaOptions options;
    options.accumulate = true;
    layer.into(target, dq.view(), dk.view(), dv.view(), options);
    const auto values = to_host(out).values;
    for (index_t i = 0; i < heads * n; ++i)
        for (index_t c = 0; c < 10; ++c) {
            const float got = values[static_cast<std::size_t>(i * 10 + c)];
            if (c == 0 || c > e) CHECK(got == 1);
            else CHECK(got == 1 + wanted[static_cast<std::size_t>(i * e + c - 1)]);
        }
}

TEST_CASE("a workspace of the size that the layer tells: repeated calls allocate nothing, streams are used") {
    POLYATTN_RANDOM(random);
    const index_t n = 70;
    const auto x = to_device(random.tensor<float>({2, n, 12})), d_out = to_device(random.tensor<float>({2, n, 12}));
    const auto layer = make_layer();
    cudaStream_t stream = nullptr;
    REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
    CudaWorkspace workspace;
    CudaOptions options;
    options.stream = stream;
    options.device_workspace = &workspace;
    options.plan = layer.plan(n, n);
    options.key_lengths = {n - 5};
    const std::size_t bytes = layer.workspace_bytes(x.view(), x.view(), x.view(), options);
    workspace.reserve(bytes);
    CHECK(workspace.capacity() == bytes);
    const CudaTensor<float> out({2, n, 12});
    CudaSaved<float> saved;
    layer.into(out.view(), x.view(), x.view(), x.view(), options);
    layer.forward_into(out.view(), saved, x.view(), x.view(), x.view(), options);
    CHECK(workspace.capacity() == bytes);
    workspace.reserve(layer.backward_workspace_bytes(saved));
    CudaGradients<float> gradients = layer.backward(saved, d_out.view(), options);
    const std::size_t grown = workspace.capacity(), free = free_memory();
    const auto first = to_host(gradients.k).values;
    for (int repeat = 0; repeat < 3; ++repeat) {
        layer.into(out.view(), x.view(), x.view(), x.view(), options);
        layer.forward_into(out.view(), saved, x.view(), x.view(), x.view(), options);
        layer.backward_into(gradients, saved, d_out.view(), options);
    }
    REQUIRE(cudaStreamSynchronize(stream) == cudaSuccess);
    CHECK(workspace.capacity() == grown);
    CHECK(free_memory() == free);
    CHECK(to_host(gradients.k).values == first);
    REQUIRE(cudaStreamDestroy(stream) == cudaSuccess);
}

TEST_CASE("plans for each item and each head, and thrust's vectors") {
    POLYATTN_RANDOM(random);
    const index_t n = 25, d = 4;
    const auto layer = make_layer();
    std::vector<Plan> plans;
    for (std::uint64_t seed = 1; seed <= 4; ++seed) plans.push_back(LocalGlobalRandom{.window = 4, .globals = 2, .randoms = 3, .seed = seed}.plan(n, n));
    const auto host = random.tensor<float>({2, 2, n, d});
    const auto x = to_device(host);
    CudaOptions options;
    options.item_plans = plans;
    const auto all = layer.forward(x.view(), x.view(), x.view(), options);
    const auto out = to_host(all.out).values, gradient = to_host(layer.backward(all.saved, x.view()).v).values;
    for (std::size_t item = 0; item < 4; ++item) {
        const offset_t size = offset_t{n} * d;
        thrust::device_vector<float> values(host.values.begin() + static_cast<std::ptrdiff_t>(item) * size, host.values.begin() + static_cast<std::ptrdiff_t>(item + 1) * size);
        const auto view = tensor_view(std::as_const(values), {n, d});
        CudaOptions own;
        own.plan = plans[item];
        const auto one = layer.forward(view, view, view, own);
        CHECK(to_host(one.out).values == AlignedVector<float>(out.begin() + static_cast<std::ptrdiff_t>(item) * size, out.begin() + static_cast<std::ptrdiff_t>(item + 1) * size));
        CHECK(to_host(layer.backward(one.saved, view).v).values == AlignedVector<float>(gradient.begin() + static_cast<std::ptrdiff_t>(item) * size, gradient.begin() + static_cast<std::ptrdiff_t>(item + 1) * size));
        CHECK(argument([&] { tensor_view(values, {n, d + 1}); }) == "extents");
    }
}

TEST_CASE("samplers draw what they draw on the CPU") {
    POLYATTN_RANDOM(random);
    const index_t n = 40, d = 4;
    const auto host = random.tensor<float>({n, d});
    const auto x = to_device(host);
    const Attention<Causal, LocallyBiased<4>, Cuda> layer{Causal{}, LocallyBiased<4>{}};
    CudaOptions options;
    options.draw = {.seed = random.seed(), .step = 3};
    CudaOptions planned;
    planned.plan = intersect(Causal{}.plan(n, n), LocallyBiased<4>{}.sample(n, n, options.draw, true));
    CHECK(to_host(layer(x.view(), x.view(), x.view(), options)).values == to_host(Attention<Cuda>{}(x.view(), x.view(), x.view(), planned)).values);
}

TEST_CASE("plans made on the device give the same bits, and the host never asks for their edges") {
    POLYATTN_RANDOM(random);
    const index_t n = 60, d = 4;
    const auto x = to_device(random.tensor<float>({2, n, d})), d_out = to_device(random.tensor<float>({2, n, d}));
    const auto check = [&](const auto& layer, const Draw& draw) {
        const Plan plan = plan_on_device(layer, n, n, draw);
        REQUIRE(plan.find_lowered<detail::cuda::DeviceEdges>());
        CudaOptions options;
        options.draw = draw;
        options.plan = Plan::with_edges_elsewhere(n, n, {plan.tiles().begin(), plan.tiles().end()}, []() -> Edges { throw std::logic_error("edges were fetched"); });
        options.plan->adopt(std::make_shared<const detail::cuda::DeviceEdges>(plan.lowered<detail::cuda::DeviceEdges>()));
        const auto made = layer.forward(x.view(), x.view(), x.view(), options);
        options.plan.reset();
        const auto wanted = layer.forward(x.view(), x.view(), x.view(), options);
        CHECK(to_host(made.out).values == to_host(wanted.out).values);
        const auto gradients = layer.backward(made.saved, d_out.view()), wanted_gradients = layer.backward(wanted.saved, d_out.view());
        CHECK(to_host(gradients.q).values == to_host(wanted_gradients.q).values);
        CHECK(to_host(gradients.k).values == to_host(wanted_gradients.k).values);
        CHECK(to_host(gradients.v).values == to_host(wanted_gradients.v).values);
    };
    check(make_layer(), {});
    // Draws of all keys have no edges, and no bounds.
    const Attention<Unbiased, Cuda> thinned{Unbiased{}};
    const Plan sampled = plan_on_device(thinned, n, n, {.seed = 3}), expected = thinned.plan(n, n, {.seed = 3});
    REQUIRE(sampled.tiles().size() == expected.tiles().size());
    CHECK(sampled.tiles()[0].bounds == expected.tiles()[0].bounds);
    check(Attention<LocalGlobalRandom, LocallyBiased<3>, Cuda>{LocalGlobalRandom{.window = 6, .globals = 2, .randoms = 12}, LocallyBiased<3>{}}, {.seed = random.seed(), .step = 2});
}

TEST_CASE("forward() never adds, forward_into() does if told") {
    POLYATTN_RANDOM(random);
    const auto x = to_device(random.tensor<double>({20, 4}));
    const auto check = [&](const auto& layer) {
        const auto wanted = to_host(layer(x.view(), x.view(), x.view())).values;
        CudaOptions options;
        options.accumulate = true;
        auto [out, saved] = layer.forward(x.view(), x.view(), x.view(), options);
        CHECK(to_host(out).values == wanted);
        layer.forward_into(out.view(), saved, x.view(), x.view(), x.view(), options);
        const auto twice = to_host(out).values;
        for (std::size_t i = 0; i < wanted.size(); ++i) CHECK(twice[i] == 2 * wanted[i]);
    };
    check(Attention<Cuda>{});
    check(Attention<SegmentMeans<2>, Cuda>{});
}

namespace {

/// Rows of a table for queries and keys below `tokens` alone, which only a device may know.
struct Below {
    index_t tokens;
    POLYATTN_HOST_DEVICE index_t operator()(index_t, index_t query, index_t key) const { return query < tokens && key < tokens ? 0 : -1; }
};

}  // namespace

TEST_CASE("biases are not asked for padding") {
    POLYATTN_RANDOM(random);
    const index_t n = 150, valid = 100;
    const auto host = random.tensor<float>({n, 4});
    const auto x = to_device(host), d_out = to_device(random.tensor<float>({n, 4}));
    using Biased = TableBias<Below>;
    const Biased bias{Below{valid}, 1, {.5}};
    CudaOptions options;
    options.key_lengths = {valid};
    const auto check = [&](const auto& layer, const auto& plain) {
        const auto [out, saved] = layer.forward(x.view(), x.view(), x.view(), options);
        const auto gradients = layer.backward(saved, d_out.view());
        // One number added to all scores changes nothing but roundings.
        const auto [without, saved_without] = plain.forward(x.view(), x.view(), x.view(), options);
        const auto a = to_host(out).values, b = to_host(without).values, c = to_host(gradients.v).values, d = to_host(plain.backward(saved_without, d_out.view()).v).values;
        for (std::size_t i = 0; i < a.size(); ++i) {
            CHECK(a[i] == doctest::Approx(b[i]).epsilon(1e-4));
            CHECK(c[i] == doctest::Approx(d[i]).epsilon(1e-4));
        }
    };
    const LocalGlobalRandom pattern{.window = 8, .globals = 3, .randoms = 4};
    check(Attention<Biased, Cuda>{bias}, Attention<Cuda>{});
    check(Attention<LocalGlobalRandom, Biased, Cuda>{pattern, bias}, Attention<LocalGlobalRandom, Cuda>{pattern});
    std::vector<__half> narrow;
    for (const float value : host.values) narrow.push_back(__float2half(value));
    const CudaTensor<__half> half(narrow.data(), {n, 4});
    const auto values = [&](const auto& layer) {
        std::vector<__half> out(narrow.size());
        layer(half.view(), half.view(), half.view(), options).copy_to(out.data());
        return out;
    };
    const auto biased = values(Attention<Biased, Cuda>{bias}), without = values(Attention<Cuda>{});
    for (std::size_t i = 0; i < without.size(); ++i) CHECK(std::abs(__half2float(biased[i]) - __half2float(without[i])) <= 1e-2);
}

TEST_CASE("a pass that threw is none, and each kind of layer takes its own") {
    POLYATTN_RANDOM(random);
    const auto x = to_device(random.tensor<float>({20, 4})), longer = to_device(random.tensor<float>({30, 4}));
    const auto check = [&](const auto& layer) {
        auto [out, saved] = layer.forward(x.view(), x.view(), x.view());
        const auto wanted = to_host(layer.backward(saved, x.view()).q).values;
        CHECK(argument([&] { layer.forward_into(out.view(), saved, longer.view(), longer.view(), longer.view()); }) == "out");
        CHECK(to_host(layer.backward(saved, x.view()).q).values == wanted);  // nothing was changed
        return std::move(saved);
    };
    const auto softmax = check(Attention<Cuda>{});
    const auto kernel = check(Attention<Kernel<EluPlusOne>, Cuda>{});
    const auto compressed = check(Attention<SegmentMeans<2>, Cuda>{});
    const auto compressed_kernel = check(Attention<SegmentMeans<2>, Kernel<EluPlusOne>, Cuda>{});
    const auto refused = [&](const auto& layer, const auto& saved) {
        CHECK(argument([&] { layer.backward(saved, x.view()); }) == "saved");
        CHECK(argument([&] { layer.backward_workspace_bytes(saved); }) == "saved");
    };
    refused(Attention<Cuda>{}, CudaSaved<float>{});
    refused(Attention<Cuda>{}, kernel);
    refused(Attention<Cuda>{}, compressed);
    refused(Attention<Kernel<EluPlusOne>, Cuda>{}, softmax);
    refused(Attention<SegmentMeans<2>, Cuda>{}, softmax);
    refused(Attention<SegmentMeans<2>, Cuda>{}, compressed_kernel);
    refused(Attention<SegmentMeans<2>, Kernel<EluPlusOne>, Cuda>{}, compressed);
    CHECK(argument([&] { Attention<Alibi, Cuda>{Alibi(2)}.backward(softmax, x.view()); }) == "heads of Alibi");

    // Memory that runs out in the middle of a pass.
    const auto huge = tensor_view(x.data(), {1024, 1 << 30, 1}, {0, 0, 1});
    const Attention<Kernel<EluPlusOne>, Cuda> linear;
    auto of_linear = linear.forward(x.view(), x.view(), x.view());
    CHECK_THROWS_AS(linear.forward_into(huge, of_linear.saved, huge, huge, huge), const cuda_error&);
    refused(linear, of_linear.saved);
    CHECK(argument([&] { CudaTensor<float>({offset_t{1} << 40, offset_t{1} << 40}); }) == "extents");
    CHECK(argument([&] { CudaTensor<float>({4, -1}); }) == "extents");
    const auto items = tensor_view(x.data(), {1 << 16, 1 << 16, 1, 1}, {0, 0, 0, 1});
    CHECK(argument([&] { Attention<Cuda>{}.into(items, items, items, items); }) == "q");
}

TEST_CASE("errors name the argument, or the call") {
    const auto layer = make_layer();
    const std::vector<float> zeros(64, 0);
    const CudaTensor<float> x(zeros.data(), {8, 8}), y(zeros.data(), {7, 8}), narrow(zeros.data(), {8, 4});
    const auto on = [&](auto&& call) { return argument(call); };
    CHECK(on([&] { layer(x.view(), y.view(), y.view()); }) == "k");
    CHECK(on([&] { layer(x.view(), narrow.view(), x.view()); }) == "k");
    CHECK(on([&] { layer(x.view(), x.view(), y.view()); }) == "v");
    CHECK(on([&] { layer.into(narrow.view(), x.view(), x.view(), x.view()); }) == "out");
    CHECK(on([&] { layer(tensor_view(zeros.data(), {8, 8}), x.view(), x.view()); }) == "q");
    CHECK(on([&] { layer.into(tensor_view(const_cast<float*>(zeros.data()), {8, 8}), x.view(), x.view(), x.view()); }) == "out");
    CudaOptions options;
    options.key_lengths = {9};
    CHECK(on([&] { layer(x.view(), x.view(), x.view(), options); }) == "key_lengths");
    options.key_lengths = {};
    options.plan = Dense{}.plan(8, 7);
    CHECK(on([&] { layer(x.view(), x.view(), x.view(), options); }) == "plan");
    const auto saved = layer.forward(x.view(), x.view(), x.view()).saved;
    CHECK(on([&] { layer.backward(saved, y.view()); }) == "d_out");
    CHECK(on([&] { Attention<LocalGlobalRandom, PPR<2>, Cuda>{}.backward(saved, x.view()); }) == "saved");
    const Attention<Alibi, Cuda> two_heads{Alibi(2)};
    CHECK(on([&] { two_heads(x.view(), x.view(), x.view()); }) == "heads of Alibi");
    // The last valid query stands at the last valid key, so an item's length would move its bias.
    CudaOptions shorter;
    shorter.key_lengths = {6};
    CHECK(on([&] { Attention<Alibi, Cuda>{Alibi(1)}(y.view(), x.view(), x.view(), shorter); }) == "key_lengths");
    try {
        detail::cuda::DeviceMemory too_much(std::size_t{1} << 60);
        FAIL("nothing thrown");
    } catch (const cuda_error& error) {
        CHECK(error.call() == "cudaMalloc");
        CHECK(error.code() == cudaErrorMemoryAllocation);
        CHECK(std::string(error.what()).find("cudaMalloc") != std::string::npos);
    }
}
