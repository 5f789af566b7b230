#include "device_layer.cuh"

#include "kernel_scores.hpp"

#include "support/errors.hpp"
#include "support/random.hpp"

#include <doctest/doctest.h>

POLYATTN_INSTANTIATE(float, NoBias, ReluMean, Dense)
POLYATTN_INSTANTIATE(double, NoBias, ReluMean, Dense)
POLYATTN_INSTANTIATE(float, NoBias, ReluMean, Causal)
POLYATTN_INSTANTIATE(double, NoBias, ReluMean, Causal)
POLYATTN_INSTANTIATE(float, NoBias, ReluEpsilon, Causal)
POLYATTN_INSTANTIATE(float, NoBias, EluZero, Dense)
POLYATTN_INSTANTIATE(float, NoBias, EluZero, Causal)
POLYATTN_INSTANTIATE(float, NoBias, RandomZero, Dense)
POLYATTN_INSTANTIATE(double, NoBias, RandomZero, Causal)
POLYATTN_INSTANTIATE(double, NoBias, QuarticScores, Dense)

namespace {

template <class T>
CudaTensor<T> draw(Random& random, std::vector<offset_t> shape) {
    const Tensor<T> host = random.tensor<T>(std::move(shape));
    return to_device(host.view());
}

}  // namespace

TEST_CASE_TEMPLATE("token by token is the causal layer", T, float, double) {
    POLYATTN_RANDOM(random);
    const index_t n = 70, batch = 2, heads = 4, key_heads = 2;
    const double u = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;
    const auto check = [&](const auto& layer, index_t d, index_t e, bool negative) {
        auto host_q = random.tensor<T>({batch, heads, n, d});
        if (negative)
            for (T& entry : host_q.values) entry = -std::abs(entry);
        const auto q = to_device(std::as_const(host_q).view()), k = draw<T>(random, {batch, key_heads, n, d}), v = draw<T>(random, {batch, key_heads, n, e});
        const auto out = to_host(layer(q.view(), k.view(), v.view()));
        auto state = layer.template start<T>(batch, heads, key_heads, d, e), other = layer.template start<T>(batch, heads, key_heads, d, e);
        const auto token = [](const CudaTensor<T>& x, index_t t) {
            const TensorView<T> all = x.view();
            return tensor_view<T>(all.data + t * all.strides[2], {all.extents[0], all.extents[1], 1, all.extents[3]}, {all.strides[0], all.strides[1], all.strides[2], 1});
        };
        const CudaTensor<T> rows({batch, heads, n, e});
        double worst = 0;
        for (index_t t = 0; t < n; ++t) {
            layer.step_into(token(rows, t), state, token(q, t), token(k, t), token(v, t));
            if (t == 0) CHECK(to_host(layer.step(other, token(q, t), token(k, t), token(v, t))).shape == std::vector<offset_t>{batch, heads, 1, e});
        }
        const auto got = to_host(rows);
        for (std::size_t i = 0; i < out.values.size(); ++i) worst = std::max(worst, std::abs(double(got.values[i]) - double(out.values[i])));
        CHECK(state.tokens() == n);
        // As on the CPU: both are within (hops + 1) (2 n + 3 d + ..) u of values below 6.5; random features carry their exponents' errors.
        CHECK(worst < 2 * 4 * (2 * n + 400) * u * 6.5);
    };
    for (const bool negative : {false, true}) {  // rows of zeros
        check(Attention<Kernel<ReLU>, Causal, Cuda>{}, 6, 5, negative);
        check(Attention<ReluMean, Causal, Cuda>{}, 8, 40, negative);
        check(Attention<Kernel<ReLU, ExactOrZero>, Causal, Cuda>{}, 4, 1, negative);
        check(Attention<Kernel<ReLU>, PPR<2>, Causal, Cuda>{}, 3, 4, negative);
        check(Attention<Kernel<ReLU>, HeatKernel<3>, Causal, Cuda>{}, 33, 70, negative);
    }
    check(Attention<EluZero, Causal, Cuda>{}, 6, 5, false);
    check(Attention<Kernel<EluPlusOne>, PPR<0>, Causal, Cuda>{}, 2, 3, false);
    check(Attention<Kernel<PositiveRandomFeatures, ExactOrMean>, Causal, Cuda>{}, 6, 5, false);
}

TEST_CASE("a step is kernels alone: recorded in a graph, it takes token after token") {
    POLYATTN_RANDOM(random);
    const index_t heads = 2, d = 6, e = 5, features = 19;
    const Attention<Kernel<PositiveRandomFeatures>, Causal, Cuda> layer{Kernel<PositiveRandomFeatures>{.features = {.features = features, .seed = random.seed()}}};
    cudaStream_t stream = nullptr;
    REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
    CudaOptions options;
    options.stream = stream;
    auto state = layer.start<float>(1, heads, heads, d, e, stream), recorded = layer.start<float>(1, heads, heads, d, e, stream);
    const CudaTensor<float> q({1, heads, 1, d}), k({1, heads, 1, d}), v({1, heads, 1, e}), out({1, heads, 1, e});
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t step = nullptr;
    REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
    layer.step_into(out.view(), recorded, q.view(), k.view(), v.view(), options);
    // What a copy from the host would read by then.
    const std::vector<std::vector<float>> others(100, std::vector<float>(static_cast<std::size_t>(features * d), std::numeric_limits<float>::quiet_NaN()));
    REQUIRE(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
    REQUIRE(cudaGraphInstantiate(&step, graph, 0) == cudaSuccess);
    for (int t = 0; t < 5; ++t) {
        const CudaTensor<float> next_q = draw<float>(random, q.shape()), next_k = draw<float>(random, k.shape()), next_v = draw<float>(random, v.shape());
        const auto put = [&](const CudaTensor<float>& from, const CudaTensor<float>& to) {
            REQUIRE(cudaMemcpyAsync(to.data(), from.data(), static_cast<std::size_t>(to.size()) * sizeof(float), cudaMemcpyDeviceToDevice, stream) == cudaSuccess);
        };
        put(next_q, q);
        put(next_k, k);
        put(next_v, v);
        REQUIRE(cudaGraphLaunch(step, stream) == cudaSuccess);
        const auto wanted = layer.step(state, next_q.view(), next_k.view(), next_v.view(), options);
        REQUIRE(cudaStreamSynchronize(stream) == cudaSuccess);
        CHECK(to_host(out).values == to_host(wanted).values);
    }
    REQUIRE(cudaGraphExecDestroy(step) == cudaSuccess);
    REQUIRE(cudaGraphDestroy(graph) == cudaSuccess);
    REQUIRE(cudaStreamDestroy(stream) == cudaSuccess);
}

TEST_CASE("errors of start() and step() name the argument") {
    POLYATTN_RANDOM(random);
    const Attention<Kernel<ReLU>, Causal, Cuda> layer;
    CHECK(argument([&] { layer.start<float>(1, 3, 2, 4, 4); }) == "key_heads");
    CHECK(argument([&] { layer.start<float>(1, 0, 1, 4, 4); }) == "heads");
    CHECK(argument([&] { layer.start<float>(-1, 1, 1, 4, 4); }) == "batch");
    CHECK(argument([&] { layer.start<float>(1, 1, 1, 0, 4); }) == "dim");
    CHECK(argument([&] { layer.start<float>(1, 1, 1, 4, -1); }) == "value_dim");
    const CudaTensor<float> one({1, 2, 1, 4}), wrong({1, 2, 1, 5}), two({1, 2, 2, 4});
    auto state = layer.start<float>(1, 2, 2, 4, 4);
    CHECK(argument([&] { layer.step(state, wrong.view(), wrong.view(), one.view()); }) == "q");
    CHECK(argument([&] { layer.step(state, one.view(), two.view(), two.view()); }) == "k");
    CHECK(argument([&] { layer.step(state, one.view(), one.view(), wrong.view()); }) == "v");
    CHECK(argument([&] { layer.step_into(wrong.view(), state, one.view(), one.view(), one.view()); }) == "out");
    CHECK(argument([&] { Attention<Kernel<ReLU>, PPR<2>, Causal, Cuda>{}.step(state, one.view(), one.view(), one.view()); }) == "state");
    CHECK(state.tokens() == 0);
    auto none = layer.start<float>(0, 2, 2, 4, 4);
    const CudaTensor<float> nothing({0, 2, 1, 4});
    CHECK(layer.step(none, nothing.view(), nothing.view(), nothing.view()).size() == 0);
    auto no_values = layer.start<float>(1, 2, 2, 4, 0);
    const CudaTensor<float> no_columns({1, 2, 1, 0}), numbers = draw<float>(random, {1, 2, 1, 4});
    CHECK(layer.step(no_values, numbers.view(), numbers.view(), no_columns.view()).size() == 0);
}
