#include "device_layer.cuh"

#include "kernel_scores.hpp"

#include "support/errors.hpp"
#include "support/random.hpp"

#include <polyattn/policy/compression/compression.hpp>

#include <doctest/doctest.h>

POLYATTN_INSTANTIATE(float, NoBias, Softmax, Dense, SegmentMeans<4>)
POLYATTN_INSTANTIATE(double, NoBias, Softmax, Dense, SegmentMeans<4>)
POLYATTN_INSTANTIATE(float, NoBias, ReluMean, Dense, SegmentMeans<2>)
POLYATTN_INSTANTIATE(double, NoBias, ReluMean, Dense, SegmentMeans<33>)
POLYATTN_INSTANTIATE(double, NoBias, ReluEpsilon, Dense, SegmentMeans<2>)
POLYATTN_INSTANTIATE(float, NoBias, Softmax, Dense, SegmentMax<3>)
POLYATTN_INSTANTIATE(double, NoBias, Softmax, Dense, SegmentMax<3>)
POLYATTN_INSTANTIATE(float, NoBias, Softmax, Dense, StridedConvolution)
POLYATTN_INSTANTIATE(double, NoBias, Softmax, Dense, StridedConvolution)
POLYATTN_INSTANTIATE(float, NoBias, Softmax, Dense, LinearProjection)
POLYATTN_INSTANTIATE(float, NoBias, Softmax, Dense, KMeans)
POLYATTN_INSTANTIATE(double, NoBias, Softmax, Dense, KMeans)
POLYATTN_INSTANTIATE(double, NoBias, ReluMean, Dense, LinearProjection)

TEST_CASE("into, accumulate, strides, workspaces, a saved pass that is used again, another table") {
    POLYATTN_RANDOM(random);
    const index_t n = 20, d = 6;
    const auto check = [&](const auto& layer) {
        const auto hq = random.tensor<double>({1, 2, n, d}), hk = random.tensor<double>({1, 2, n, d}), hv = random.tensor<double>({1, 2, n, d});
        const auto q = to_device(hq.view()), k = to_device(hk.view()), v = to_device(hv.view());
        const auto out = to_host(layer(q.view(), k.view(), v.view()));
        Tensor<double> ones(out.shape);
        std::fill(ones.values.begin(), ones.values.end(), 1.);
        const auto sum = to_device(std::as_const(ones).view());
        CudaOptions options;
        options.accumulate = true;
        layer.into(sum.view(), q.view(), k.view(), v.view(), options);
        const auto got = to_host(sum);
        for (std::size_t i = 0; i < out.values.size(); ++i) CHECK(got.values[i] == doctest::Approx(1 + out.values[i]).epsilon(1e-14));
        auto [first, saved] = layer.forward(k.view(), k.view(), k.view());
        options.accumulate = false;
        CudaWorkspace workspace;
        options.device_workspace = &workspace;
        CHECK(layer.workspace_bytes(q.view(), k.view(), v.view()) > 0);
        layer.forward_into(first.view(), saved, q.view(), k.view(), v.view(), options);
        CHECK(to_host(first).values == out.values);
        workspace.reserve(layer.backward_workspace_bytes(saved));
        auto gradients = layer.backward(saved, q.view(), options);
        const auto d_k = to_host(gradients.k).values, d_v = to_host(gradients.v).values;
        layer.backward_into(gradients, saved, q.view(), options);
        CHECK(to_host(gradients.k).values == d_k);
        CHECK(to_host(layer.backward(layer.forward(q.view(), k.view(), v.view()).saved, q.view()).v).values == d_v);
        Tensor<double> wide({1, 2, n, d + 3});
        for (index_t i = 0; i < 2 * n; ++i) std::copy_n(&hq.values[static_cast<std::size_t>(i * d)], d, &wide.values[static_cast<std::size_t>(i * (d + 3))]);
        const auto device_wide = to_device(std::as_const(wide).view());
        const auto strided = tensor_view<const double>(device_wide.data(), {1, 2, n, d}, {2 * n * (d + 3), n * (d + 3), d + 3, 1});
        CHECK(to_host(layer(strided, strided, strided)).values == to_host(layer(q.view(), q.view(), q.view())).values);
    };
    check(Attention<SegmentMeans<3>, Cuda>{});
    check(Attention<SegmentMeans<4>, PPR<3>, Cuda>{});
    check(Attention<SegmentMeans<2>, Kernel<ReLU>, Cuda>{});
    check(Attention<KMeans, PPR<2>, Cuda>{KMeans{.clusters = 4}, PPR<2>{}});
    check(Attention<SegmentMeans<3>, Kernel<EluPlusOne>, PPR<2>, Cuda>{});
    auto table = StridedConvolution::means(3);
    const auto x = random.tensor<double>({n, d});
    const auto on = to_device(x.view());
    const Attention<StridedConvolution, Cuda> layer{table};
    table.table[0] = .5;
    CHECK(to_host(layer.with_compression(table)(on.view(), on.view(), on.view())).values == to_host(Attention<StridedConvolution, Cuda>{table}(on.view(), on.view(), on.view())).values);
}

TEST_CASE("maxima of segments keep NaN, in its column alone") {
    POLYATTN_RANDOM(random);
    const index_t n = 20, d = 6, column = 2;
    const auto q = random.tensor<double>({1, 2, n, d}), k = random.tensor<double>({1, 2, n, d});
    auto v = random.tensor<double>({1, 2, n, d});
    const auto run = [&] {
        const auto dq = to_device(q.view()), dk = to_device(k.view()), dv = to_device(std::as_const(v).view());
        return to_host(Attention<SegmentMax<3>, Cuda>{}(dq.view(), dk.view(), dv.view())).values;
    };
    const auto before = run();
    v.values[static_cast<std::size_t>(random.below(n) * d + column)] = std::numeric_limits<double>::quiet_NaN();  // of the first head
    const auto after = run();
    for (std::size_t i = 0; i < after.size(); ++i)
        if (i < static_cast<std::size_t>(n * d) && i % d == column) CHECK(detail::is_nan(after[i]));
        else CHECK(after[i] == before[i]);
}

TEST_CASE("errors name the argument") {
    const CudaTensor<float> x({1, 1, 6, 4}), y({1, 1, 5, 4});
    const Attention<SegmentMeans<2>, Cuda> layer;
    CudaOptions lengths, plan;
    lengths.key_lengths = {7};
    plan.plan = Dense{}.plan(6, 6);
    CHECK(argument([&] { Attention<LinearProjection, Cuda>{LinearProjection::drawn(5, 2)}(x.view(), x.view(), x.view()); }) == "tokens of LinearProjection");
    CHECK(argument([&] { layer(x.view(), x.view(), x.view(), lengths); }) == "key_lengths");
    CHECK(argument([&] { layer(x.view(), x.view(), x.view(), plan); }) == "plan");
    CHECK(argument([&] { Attention<SegmentMeans<2>, PPR<2>, Cuda>{}(x.view(), y.view(), y.view()); }) == "k");
    CHECK(argument([&] { layer.into(x.view(), x.view(), y.view(), y.view(), lengths); }) == "key_lengths");
}
