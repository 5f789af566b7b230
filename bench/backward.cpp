// Gradients of one head. (4 + 4 K) d flops a pair under diffusion, 10 d for one hop with the scores computed again.
#include "common.hpp"

using namespace bench;

namespace {

template <class Layer>
void run(benchmark::State& state, const Layer& layer) {
#if defined(_OPENMP)
    omp_set_num_threads(1);
#endif
    const auto n = static_cast<index_t>(state.range(0));
    const auto q = random_tensor({n, 64}, 1), k = random_tensor({n, 64}, 2), v = random_tensor({n, 64}, 3), d_out = random_tensor({n, 64}, 4);
    Workspace workspace;
    const CallOptions options{.plan = layer.plan(n, n), .workspace = &workspace};
    const auto [out, saved] = layer.forward(q.view(), k.view(), v.view(), options);
    const auto gradient = layer.backward(saved, d_out.view(), options);
    // dL/ds of q -> (1 + s) q at s = 0 is q . dq: against a difference of the loss.
    const auto loss = [&](float s) {
        auto moved = q;
        for (float& value : moved.values) value *= 1 + s;
        const auto o = layer(moved.view(), k.view(), v.view(), options);
        double sum = 0;
        for (std::size_t i = 0; i < o.values.size(); ++i) sum += double(o.values[i]) * double(d_out.values[i]);
        return sum;
    };
    double slope = 0, size = 0;
    for (std::size_t i = 0; i < q.values.size(); ++i) {
        slope += double(q.values[i]) * double(gradient.q.values[i]);
        size += std::abs(double(q.values[i]) * double(gradient.q.values[i]));
    }
    if (!(std::abs((loss(1e-2f) - loss(-1e-2f)) / 2e-2 - slope) < 1e-2 * size)) return state.SkipWithError("wrong gradient");
    double forward = 1e30;
    for (int repeat = 0; repeat < 3; ++repeat) {
        const double start = seconds();
        benchmark::DoNotOptimize(layer(q.view(), k.view(), v.view(), options));
        forward = std::min(forward, seconds() - start);
    }
    const double limit = peak();
    double best = 1e30;
    for (auto _ : state) {
        const double start = seconds();
        benchmark::DoNotOptimize(layer.backward(saved, d_out.view(), options));
        best = std::min(best, seconds() - start);
    }
    const double hops = double(layer.recursion().hops.size()), flops = 64 * double(options.plan->count()) * (hops > 1 ? 4 + 4 * hops : 10);
    state.counters["GF/s"] = benchmark::Counter(flops / 1e9, benchmark::Counter::kIsIterationInvariantRate);
    state.counters["of_peak"] = benchmark::Counter(flops / limit, benchmark::Counter::kIsIterationInvariantRate);
    state.counters["x_forward"] = best / forward;
}

void dense(benchmark::State& state) { run(state, Attention<>{}); }
void causal(benchmark::State& state) { run(state, Attention<Causal>{}); }
void window(benchmark::State& state) { run(state, Attention{SlidingWindow{.window = static_cast<index_t>(state.range(1))}}); }
void diffuser(benchmark::State& state) { run(state, Attention<LocalGlobalRandom, PPR<5>>{}); }

}  // namespace

BENCHMARK(dense)->ArgNames({"n"})->Args({1024})->Args({4096})->Unit(benchmark::kMillisecond);
BENCHMARK(causal)->ArgNames({"n"})->Args({1024})->Args({4096})->Unit(benchmark::kMillisecond);
BENCHMARK(window)->ArgNames({"n", "w"})->ArgsProduct({{1024, 4096}, {128, 512}})->Unit(benchmark::kMillisecond);
BENCHMARK(diffuser)->ArgNames({"n"})->Args({1024})->Args({4096})->Args({65536})->Unit(benchmark::kMillisecond);

BENCHMARK_MAIN();
