// Kernel (linear) attention on one head: forward 4 n d^2 flops, backward 8 n d^2, causal 2 n (b + 1) d more for triangles of b tokens; and the
// smaller stages of AdaMRA.
#include "common.hpp"

using namespace bench;

namespace {

constexpr bool wide = detail::simd::Tiling<float, Arch>::registers == 32;

/// Rows of the output against sums in double; ReLU or ELU + 1.
template <class Map>
std::string check(bool causal, const Map& map, const Tensor<float>& q, const Tensor<float>& k, const Tensor<float>& v, const Tensor<float>& out) {
    const auto n = static_cast<index_t>(q.shape[0]), d = static_cast<index_t>(q.shape[1]);
    std::vector<double> state(static_cast<std::size_t>(d * d), 0), sums(static_cast<std::size_t>(d), 0);
    const auto add = [&](index_t j) {
        for (index_t f = 0; f < d; ++f) {
            const double phi = map(double(k.values[static_cast<std::size_t>(j * d + f)]));
            sums[static_cast<std::size_t>(f)] += phi;
            for (index_t c = 0; c < d; ++c) state[static_cast<std::size_t>(f * d + c)] += phi * double(v.values[static_cast<std::size_t>(j * d + c)]);
        }
    };
    if (!causal)
        for (index_t j = 0; j < n; ++j) add(j);
    for (index_t i = 0; i < n; ++i) {
        if (causal) add(i);
        if (i % std::max(index_t{1}, n / 61) != 0) continue;
        double denominator = 1e-6;
        for (index_t f = 0; f < d; ++f) denominator += map(double(q.values[static_cast<std::size_t>(i * d + f)])) * sums[static_cast<std::size_t>(f)];
        for (index_t c = 0; c < d; ++c) {
            double sum = 0;
            for (index_t f = 0; f < d; ++f) sum += map(double(q.values[static_cast<std::size_t>(i * d + f)])) * state[static_cast<std::size_t>(f * d + c)];
            // Sums of n and d non-negative weights times values below 6.
            if (!(std::abs(sum / denominator - double(out.values[static_cast<std::size_t>(i * d + c)])) <= 2 * (n + 2. * d + 40) * 0x1p-24 * 6)) return "row " + std::to_string(i) + " is wrong";
        }
    }
    return {};
}

template <class Map, class... Ps>
void forward(benchmark::State& state, double least) {
    use_threads(1);
    const auto n = static_cast<index_t>(state.range(0)), d = static_cast<index_t>(state.range(1));
    const auto q = random_tensor({n, d}, 1), k = random_tensor({n, d}, 2), v = random_tensor({n, d}, 3);
    Tensor<float> out({n, d});
    Workspace workspace;
    const CallOptions options{.workspace = &workspace};
    const Attention<Kernel<Map>, Ps...> layer;
    constexpr bool causal = sizeof...(Ps) == 1;
    const auto run = [&] { layer.into(out.view(), q.view(), k.view(), v.view(), options); };
    run();
    if (const std::string wrong = check(causal, Map{}, q, k, v, out); !wrong.empty()) return state.SkipWithError(wrong.c_str());
    const Medians medians = time_calls(state, run, fma_burst<float>);
    const double flops = 4. * n * d * d + (causal ? 2. * n * (detail::simd::causal_block + 1) * d : 0);
    state.counters["GF/s"] = flops / medians.time / 1e9;
    state.counters["scratch_MB"] = double(workspace.capacity()) / 1e6;
    report_share(state, flops / medians.time / medians.limit, wide ? least : 0);
}
void relu(benchmark::State& state) { forward<ReLU>(state, state.range(1) == 128 ? .82 : state.range(1) != 64 || state.range(0) < 4096 ? 0 : state.range(0) == 4096 ? .80 : .74); }
void elu(benchmark::State& state) { forward<EluPlusOne>(state, 0); }
void causal(benchmark::State& state) { forward<ReLU, Causal>(state, state.range(1) == 64 && state.range(0) >= 4096 ? .66 : 0); }

void backward(benchmark::State& state) {
    use_threads(1);
    const auto n = static_cast<index_t>(state.range(0)), d = static_cast<index_t>(state.range(1));
    const auto q = random_tensor({n, d}, 1), k = random_tensor({n, d}, 2), v = random_tensor({n, d}, 3), d_out = random_tensor({n, d}, 4);
    Workspace workspace;
    const CallOptions options{.workspace = &workspace};
    const Attention<Kernel<ReLU>> layer;
    const auto [out, saved] = layer.forward(q.view(), k.view(), v.view(), options);
    auto gradients = layer.backward(saved, d_out.view(), options);
    // sum of v . dv is sum of out . d_out: the output is linear in v.
    double left = 0, right = 0, size = 0;
    for (std::size_t i = 0; i < v.values.size(); ++i) {
        left += double(v.values[i]) * double(gradients.v.values[i]);
        right += double(out.values[i]) * double(d_out.values[i]);
        size += std::abs(double(v.values[i]) * double(gradients.v.values[i]));
    }
    // ReLU: a longer q changes nothing, so q . dq is 0.
    double along = 0, along_size = 0;
    for (std::size_t i = 0; i < q.values.size(); ++i) {
        along += double(q.values[i]) * double(gradients.q.values[i]);
        along_size += std::abs(double(q.values[i]) * double(gradients.q.values[i]));
    }
    if (!(std::abs(left - right) < 1e-4 * size && std::abs(along) < 1e-4 * along_size)) return state.SkipWithError("wrong gradient");
    const Medians medians = time_calls(state, [&] { layer.backward_into(gradients, saved, d_out.view(), options); }, fma_burst<float>);
    const double flops = 8. * n * d * d;
    state.counters["GF/s"] = flops / medians.time / 1e9;
    report_share(state, flops / medians.time / medians.limit, wide && d == 64 && n >= 4096 ? .74 : 0);
}

/// One token of a causal layer with 8 heads, whatever came before.
template <class Features>
void step(benchmark::State& state, Features features) {
    use_threads(1);
    const index_t d = 64;
    const Attention<Kernel<Features>, Causal> layer{Kernel<Features>{features}, Causal{}};
    auto sums = layer.template start<float>(1, 8, 8, d, d);
    const auto q = random_tensor({8, 1, d}, 1), k = random_tensor({8, 1, d}, 2), v = random_tensor({8, 1, d}, 3);
    const auto first = layer.step(sums, q.view(), k.view(), v.view());
    for (std::size_t i = 0; i < v.values.size(); ++i)
        if (!(std::abs(first.values[i] - v.values[i]) < 1e-4f)) return state.SkipWithError("the first token does not see itself alone");
    for (auto _ : state) benchmark::DoNotOptimize(layer.step(sums, q.view(), k.view(), v.view()).values.data());
}

/// Segment means of length L: bytes read and written against those of a copy of the tokens.
void segment_means(benchmark::State& state) {
    const auto n = static_cast<index_t>(state.range(0)), length = static_cast<index_t>(state.range(1)), d = index_t{64};
    const auto x = random_tensor({n, d}, 1);
    Tensor<float> means({(n + length - 1) / length, d}), copy(x.shape);
    const auto run = [&] { detail::simd::segment_means<Arch>(x.view().head(0, 0), length, means.view().head(0, 0)); };
    run();
    for (index_t c = 0; c < d; ++c) {
        double sum = 0;
        for (index_t i = 0; i < length; ++i) sum += double(x.values[static_cast<std::size_t>(i * d + c)]) / length;
        if (!(std::abs(sum - double(means.values[static_cast<std::size_t>(c)])) < 1e-5)) return state.SkipWithError("wrong mean");
    }
    const Medians medians = time_calls(state, run, [&] {
        const double start = seconds();
        std::copy(x.values.begin(), x.values.end(), copy.values.begin());
        benchmark::DoNotOptimize(copy.values.data());
        return double(2 * x.values.size() * sizeof(float)) / (seconds() - start);
    });
    const double bytes = double((x.values.size() + means.values.size()) * sizeof(float));
    state.counters["GB/s"] = bytes / medians.time / 1e9;
    state.counters["of_copy"] = bytes / medians.time / medians.limit;
}

}  // namespace

BENCHMARK(relu)->ArgNames({"n", "d"})->ArgsProduct({{1024, 4096, 65536}, {32, 64, 128}})->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK(elu)->ArgNames({"n", "d"})->ArgsProduct({{1024, 4096}, {64}})->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK(causal)->ArgNames({"n", "d"})->ArgsProduct({{1024, 4096, 65536}, {64}})->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK(backward)->ArgNames({"n", "d"})->ArgsProduct({{1024, 4096, 65536}, {64}})->Args({4096, 128})->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(step, elu_plus_one, EluPlusOne{})->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(step, random_256, PositiveRandomFeatures{.features = 256, .seed = 1})->Unit(benchmark::kMicrosecond);
BENCHMARK(segment_means)->ArgNames({"n", "L"})->ArgsProduct({{1024, 65536}, {2, 8, 32}})->UseManualTime()->Unit(benchmark::kMicrosecond);
BENCHMARK_MAIN();
