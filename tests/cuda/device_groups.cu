#include "device_layer.cuh"

#include "support/errors.hpp"
#include "support/random.hpp"

#include <doctest/doctest.h>

POLYATTN_INSTANTIATE(float, NoBias, Softmax, LocalitySensitiveHashing)
POLYATTN_INSTANTIATE(double, NoBias, Softmax, LocalitySensitiveHashing)
POLYATTN_INSTANTIATE(float, NoBias, Softmax, RoutedClusters)
POLYATTN_INSTANTIATE(double, NoBias, Softmax, RoutedClusters)
POLYATTN_INSTANTIATE(float, NoBias, Softmax, SinkhornBlocks)
POLYATTN_INSTANTIATE(double, NoBias, Softmax, SinkhornBlocks)

/// Sees all keys; its own plan_for() reads q and k on the host, where Cuda has none.
struct OwnPattern {
    using policy_kind = sparsity_pattern_kind;
    template <class T>
    Plan plan_for(MatrixView<const T> q, MatrixView<const T> k, index_t, index_t, const Draw&) const {
        return Dense{}.plan(q.rows, k.rows);
    }
};
static_assert(DataDependentPattern<OwnPattern> && !detail::cuda::GroupedOnDevice<OwnPattern>);

namespace {

std::vector<index_t> indices(const IndexSequence& sequence) {
    std::vector<index_t> all;
    for (index_t i = 0; i < sequence.size(); ++i) all.push_back(sequence[i]);
    return all;
}
void check_same(const Plan& plan, const Plan& expected) {
    CHECK(plan.queries() == expected.queries());
    CHECK(plan.keys() == expected.keys());
    REQUIRE(plan.tiles().size() == expected.tiles().size());
    for (std::size_t t = 0; t < plan.tiles().size(); ++t) {
        CHECK(indices(plan.tiles()[t].rows) == indices(expected.tiles()[t].rows));
        CHECK(indices(plan.tiles()[t].keys) == indices(expected.tiles()[t].keys));
        CHECK(plan.tiles()[t].bounds == expected.tiles()[t].bounds);
    }
    CHECK(plan.edges().offsets == expected.edges().offsets);
    CHECK(plan.edges().keys == expected.edges().keys);
}

/// Numbers of T, exact in the type that the CPU plans with.
template <class T>
CudaTensor<T> narrowed(Tensor<detail::cuda::arithmetic_t<T>>& tensor) {
    std::vector<T> values;
    for (auto& entry : tensor.values) {
        if constexpr (std::is_same_v<T, __half>) entry = __half2float(values.emplace_back(__float2half(entry)));
        else if constexpr (std::is_same_v<T, __nv_bfloat16>) entry = __bfloat162float(values.emplace_back(__float2bfloat16(entry)));
        else values.push_back(entry);
    }
    return {values.data(), tensor.shape};
}

/// The plans of a call are those that the CPU makes, and its output is that of a layer that is handed them.
template <class T, class Pattern>
void check_plans(Random& random, const Pattern& pattern, index_t queries, index_t keys) {
    using Number = detail::cuda::arithmetic_t<T>;
    const index_t batch = 3, key_heads = 1 + random.below(2), heads = key_heads * (1 + random.below(2)), d = 1 + random.below(20);
    INFO(queries, " queries, ", keys, " keys, d = ", d, ", heads ", heads, " / ", key_heads, ", bytes ", sizeof(T));
    auto q = random.tensor<Number>({batch, heads, queries, d}), k = random.tensor<Number>({batch, key_heads, keys, d}), v = random.tensor<Number>({batch, key_heads, keys, 8});
    if (random.below(2))  // with ties
        for (auto* x : {&q, &k})
            for (Number& entry : x->values) entry = std::round(entry);
    const auto dq = narrowed<T>(q), dk = narrowed<T>(k), dv = narrowed<T>(v);
    CudaOptions options;
    if (random.below(3) > 0) options.key_lengths = {keys, random.below(keys + 1), random.below(keys + 1)};
    if (random.below(3) == 0) options.query_lengths = {queries, random.below(queries + 1), random.below(queries + 1)};
    CudaOptions planned = options;
    for (index_t b = 0; b < batch; ++b)
        for (index_t h = 0; h < heads; ++h) {
            const auto item = static_cast<std::size_t>(b);
            const index_t valid_keys = options.key_lengths.empty() ? keys : options.key_lengths[item];
            const index_t valid_queries = !options.query_lengths.empty() ? options.query_lengths[item] : queries == keys ? valid_keys : queries;
            planned.item_plans.push_back(pattern.plan_for(std::as_const(q).view().head(b, h), std::as_const(k).view().head(b, h / (heads / key_heads)), valid_queries, valid_keys, {}));
        }
    const Attention<Pattern, Cuda> layer{pattern};
    const Attention<Cuda> handed;
    const auto same_bits = [](const auto& a, const auto& b) { return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0); };
    const auto result = layer.with_logsumexp(dq.view(), dk.view(), dv.view(), options), wanted = handed.with_logsumexp(dq.view(), dk.view(), dv.view(), planned);
    CHECK(same_bits(to_host(result.out).values, to_host(wanted.out).values));
    CHECK(same_bits(to_host(result.logsumexp).values, to_host(wanted.logsumexp).values));
    if constexpr (!detail::cuda::is_narrow<T>) {
        const auto saved = layer.forward(dq.view(), dk.view(), dv.view(), options).saved;
        for (index_t b = 0; b < batch; ++b)
            for (index_t h = 0; h < heads; ++h) check_same(saved.plan(b, h), detail::plan_of(std::span<const Plan>(planned.item_plans), dq.view(), b, h));
    }
}

template <class Make>
void check_pattern(Random& random, Make&& make) {
    for (const index_t n : {0, 1, 2, 31, 97, 300}) {
        check_plans<float>(random, make(), n, n);
        check_plans<double>(random, make(), n, n);
    }
    check_plans<__half>(random, make(), 67, 67);
    check_plans<__nv_bfloat16>(random, make(), 67, 67);
    if constexpr (!std::is_same_v<decltype(make()), SinkhornBlocks>) {
        check_plans<double>(random, make(), 13, 70);
        check_plans<float>(random, make(), 70, 13);
        check_plans<float>(random, make(), 5, 0);
        check_plans<float>(random, make(), 0, 5);
    }
}

}  // namespace

TEST_CASE("hashing makes the CPU's plans") {
    POLYATTN_RANDOM(random);
    check_pattern(random, [&] { return LocalitySensitiveHashing{.buckets = 2 * (1 + random.below(6)), .rounds = 1 + random.below(4), .causal = random.below(2) == 0, .seed = random.seed()}; });
}
TEST_CASE("clusters make the CPU's plans") {
    POLYATTN_RANDOM(random);
    check_pattern(random, [&] { return RoutedClusters{.clusters = 1 + random.below(12), .iterations = random.below(6)}; });
}
TEST_CASE("Sinkhorn matchings make the CPU's plans") {
    POLYATTN_RANDOM(random);
    check_pattern(random, [&] { return SinkhornBlocks{.block = 1 + random.below(20), .iterations = random.below(9), .temperature = .25 + random.uniform()}; });
}

TEST_CASE("choices that hang on the last bit: rows as near to one as to another, up to rounding") {
    POLYATTN_RANDOM(random);
    const index_t n = 200;
    const auto check = [&](const auto& pattern, const Tensor<double>& q, const Tensor<double>& k) {
        const auto dq = to_device(q), dk = to_device(k);
        const auto saved = Attention<std::remove_cvref_t<decltype(pattern)>, Cuda>{pattern}.forward(dq.view(), dk.view(), dk.view()).saved;
        check_same(saved.plan(), pattern.plan_for(q.view().head(0, 0), k.view().head(0, 0), q.view().tokens(), k.view().tokens(), {}));
    };
    // start + t (a - b) turned by a right angle: as far from a as from b, or of equal products with them.
    const auto between = [&](Tensor<double>& rows, index_t row, const double* a, const double* b, double start_x, double start_y) {
        const double t = random.normal();
        rows.values[static_cast<std::size_t>(2 * row)] = start_x + t * (a[1] - b[1]);
        rows.values[static_cast<std::size_t>(2 * row + 1)] = start_y - t * (a[0] - b[0]);
    };
    for (int repeat = 0; repeat < 4; ++repeat) {
        const LocalitySensitiveHashing hashing{.buckets = 4, .rounds = 1, .seed = random.seed()};
        const std::vector<double> directions = hashing.directions(0, 2);
        Tensor<double> x({n, 2});
        for (index_t i = 0; i < n; ++i) between(x, i, directions.data(), directions.data() + 2, 0, 0);
        check(hashing, x, x);

        const auto centroids = random.tensor<double>({2, 2});  // of two keys
        const double* const c = centroids.data();
        for (index_t i = 0; i < n; ++i) between(x, i, c, c + 2, (c[0] + c[2]) / 2, (c[1] + c[3]) / 2);
        check(RoutedClusters{.clusters = 2}, x, centroids);

        const auto keys = random.tensor<double>({2, 2}, 4);
        for (int pair = 0; pair < 20; ++pair) {
            Tensor<double> queries({2, 2});
            for (index_t i = 0; i < 2; ++i) between(queries, i, keys.data(), keys.data() + 2, 0, 0);
            check(SinkhornBlocks{.block = 1, .iterations = 0}, queries, keys);
        }
    }
}

TEST_CASE("into, workspaces, a stream, strides, a plan of one's own, a second backward") {
    POLYATTN_RANDOM(random);
    const index_t n = 50, d = 6;
    cudaStream_t stream = nullptr;
    REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
    const auto check = [&](const auto& layer) {
        const auto wide = random.tensor<float>({2, n, 3 * d + 1});
        const auto device = to_device(wide);
        const std::ptrdiff_t row = 3 * d + 1;
        const auto part = [&](offset_t which) { return tensor_view<const float>(device.data() + which * d, {2, n, d}, {n * row, row, 1}); };
        const auto q = part(0), k = part(1), v = part(2);
        const auto out = to_host(layer(q, k, v)).values;
        CudaWorkspace workspace;
        CudaOptions options;
        options.stream = stream;
        options.device_workspace = &workspace;
        const std::size_t bytes = layer.workspace_bytes(q, k, v);
        workspace.reserve(bytes);
        const CudaTensor<float> made({2, n, d});
        layer.into(made.view(), q, k, v, options);
        CHECK(workspace.capacity() == bytes);
        CHECK(to_host(made).values == out);
        CudaSaved<float> saved;
        layer.forward_into(made.view(), saved, q, k, v, options);
        CHECK(workspace.capacity() == bytes);
        const auto gradient = layer.backward(saved, q, options);
        CudaOptions handed;
        for (index_t h = 0; h < 2; ++h) handed.item_plans.push_back(saved.plan(0, h));
        const auto other = layer.forward(q, k, v, handed).saved;  // without grouping
        CHECK(other.plan(0, 1).tiles().data() == saved.plan(0, 1).tiles().data());
        REQUIRE(cudaStreamSynchronize(stream) == cudaSuccess);
        const auto again = layer.backward(other, q);
        CHECK(to_host(gradient.k).values == to_host(again.k).values);
        CHECK(to_host(layer.backward(saved, q).q).values == to_host(again.q).values);
        handed = {};
        handed.plan = Dense{}.plan(n, n);
        CHECK(to_host(layer(q, k, v, handed)).values == to_host(Attention<Cuda>{}(q, k, v)).values);
    };
    check(Attention<LocalitySensitiveHashing, Cuda>{LocalitySensitiveHashing{.buckets = 4, .seed = random.seed()}});
    check(Attention<RoutedClusters, Cuda>{RoutedClusters{.clusters = 4}});
    check(Attention<SinkhornBlocks, Cuda>{SinkhornBlocks{.block = 7}});
    REQUIRE(cudaStreamDestroy(stream) == cudaSuccess);
}

TEST_CASE("errors name the argument") {
    const CudaTensor<float> x({1, 1, 6, 4}), y({1, 1, 5, 4});
    const std::vector<float> host(24);
    CHECK(argument([&] { Attention<SinkhornBlocks, Cuda>{}(x.view(), y.view(), y.view()); }) == "SinkhornBlocks");
    CHECK(argument([] { Attention<RoutedClusters, Cuda>{RoutedClusters{.clusters = 0}}; }) == "clusters");
    CHECK(argument([&] { Attention<LocalitySensitiveHashing, Cuda>{}(tensor_view(host.data(), {1, 1, 6, 4}), x.view(), x.view()); }) == "q");
    CHECK(argument([&] { Attention<RoutedClusters, Cuda>{}(x.view(), tensor_view(host.data(), {1, 1, 6, 4}), x.view()); }) == "k");
    CudaOptions options;
    options.key_lengths = {7};
    CHECK(argument([&] { Attention<RoutedClusters, Cuda>{}(x.view(), x.view(), x.view(), options); }) == "key_lengths");
}
