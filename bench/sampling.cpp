// Sampled attention (SSA): what a draw costs, and attention with L windows against dense attention, forward and backward.
#include "common.hpp"

#include <polyattn/analysis/sampling.hpp>

using namespace bench;

namespace {

/// A draw and its plan.
template <class Sampler>
void draw(benchmark::State& state, const Sampler& sampler, bool causal) {
    const auto n = static_cast<index_t>(state.range(0));
    std::uint32_t step = 0;
    const auto once = [&] {
        const Plan plan = sampler.sample(n, n, {.seed = 1, .step = ++step}, causal);
        benchmark::DoNotOptimize(plan.count());
    };
    const auto medians = time_calls(state, once, [] { return 1.; });
    state.counters["ns_per_token"] = medians.time / n * 1e9;
}

/// Times of f and dense, call by call in turn; the ratio of f to `share` of dense.
template <class F, class Dense>
void against(benchmark::State& state, F&& f, Dense&& dense, double share, double most) {
    const auto medians = time_calls(state, f, [&] {
        const double start = seconds();
        dense();
        return seconds() - start;
    });
    state.counters["of_dense"] = medians.time / medians.limit;
    state.counters["pairs_of_dense"] = share;
    report_ratio(state, medians.time / medians.limit / share, most);
}

template <int L, bool IsCausal, bool Backward>
void windows(benchmark::State& state) {
    use_threads(1);
    using Pattern = std::conditional_t<IsCausal, Causal, Dense>;
    const auto n = static_cast<index_t>(state.range(0));
    const Attention<Pattern, LocallyBiased<L>> sampled{LocallyBiased<L>{.sigma = infinite_sigma}};
    const Attention<Pattern> dense;
    const auto q = random_tensor({n, 64}, 1), k = random_tensor({n, 64}, 2), v = random_tensor({n, 64}, 3), d_out = random_tensor({n, 64}, 4);
    Tensor<float> out({n, 64});
    Workspace workspace;
    const CallOptions own{.plan = sampled.plan(n, n, {.seed = 7}), .workspace = &workspace}, all{.plan = dense.plan(n, n), .workspace = &workspace};
    sampled.into(out.view(), q.view(), k.view(), v.view(), own);
    if (const std::string wrong = check_forward(sampled, *own.plan, q, k, v, out); !wrong.empty()) return state.SkipWithError(wrong.c_str());
    const double share = double(own.plan->count()) / double(all.plan->count()), most = n >= 4096 ? 1.15 : 0;
    if constexpr (Backward) {
        const auto saved = sampled.forward(q.view(), k.view(), v.view(), own).saved, dense_saved = dense.forward(q.view(), k.view(), v.view(), all).saved;
        auto gradients = sampled.backward(saved, d_out.view(), own);
        against(state, [&] { sampled.backward_into(gradients, saved, d_out.view(), own); }, [&] { dense.backward_into(gradients, dense_saved, d_out.view(), all); }, share, most);
    } else
        against(state, [&] { sampled.into(out.view(), q.view(), k.view(), v.view(), own); }, [&] { dense.into(out.view(), q.view(), k.view(), v.view(), all); }, share, most);
    state.counters["scratch_MB"] = double(workspace.capacity()) / 1e6;
}

/// The compute column of the paper's table 1 (d = 1024): the closed form, beside the multiplications that drawn plans leave. The paper counts
/// all n x n pairs; `causal` counts those in front of each query only, dense ones as well.
void table_1(benchmark::State& state) {
    const auto n = static_cast<index_t>(state.range(0)), layers = static_cast<index_t>(state.range(1)), sampled = static_cast<index_t>(state.range(2)), windows = static_cast<index_t>(state.range(3));
    constexpr double dim = 1024;
    const auto pairs = [&](bool causal, std::uint32_t layer) {
        const Draw draw{.seed = 1, .layer = layer};
        const auto count = [&]<int L>(std::integral_constant<int, L>) { return double(LocallyBiased<L>{.sigma = .1}.sample(n, n, draw, causal).count()); };
        return windows == 2 ? count(std::integral_constant<int, 2>{}) : windows == 4 ? count(std::integral_constant<int, 4>{}) : windows == 6 ? count(std::integral_constant<int, 6>{}) : count(std::integral_constant<int, 8>{});
    };
    const auto counted = [&](bool causal) {
        const double all = causal ? double(n) * (n + 1) / 2 : double(n) * n;
        double flops = 0, dense = 0;
        for (index_t layer = 0; layer < layers; ++layer) {
            const double weights = 12 * dim * dim * n;
            dense += weights + 2 * dim * all;
            flops += weights + 2 * dim * (layer >= layers - sampled ? pairs(causal, static_cast<std::uint32_t>(layer)) : all);
        }
        return flops / dense;
    };
    double share = 0;
    for (auto _ : state) share = counted(false);
    const double closed = relative_compute(layers, sampled, windows, n, dim);
    if (!(std::abs(share - closed) < 1e-12)) return state.SkipWithError("the closed form is not what the plans count");
    state.counters["closed_form"] = closed;
    state.counters["counted"] = share;
    state.counters["with_fine_tuning"] = relative_compute(layers, sampled, windows, n, dim, .1);
    state.counters["causal"] = counted(true);
}

void sizes(benchmark::internal::Benchmark* benchmark) { benchmark->ArgName("n")->Arg(1024)->Arg(4096)->Arg(16384)->UseManualTime()->Unit(benchmark::kMillisecond); }

}  // namespace

BENCHMARK_CAPTURE(draw, unbiased, Unbiased{.drop = .75}, false)->Apply(sizes);
BENCHMARK_CAPTURE(draw, local, LocallyBiased<4>{.sigma = .1}, false)->Apply(sizes);
BENCHMARK_CAPTURE(draw, local_causal, LocallyBiased<4>{.sigma = .1}, true)->Apply(sizes);
BENCHMARK(windows<2, false, false>)->Name("forward/windows:2")->Apply(sizes);
BENCHMARK(windows<4, false, false>)->Name("forward/windows:4")->Apply(sizes);
BENCHMARK(windows<8, false, false>)->Name("forward/windows:8")->Apply(sizes);
BENCHMARK(windows<2, false, true>)->Name("backward/windows:2")->Apply(sizes);
BENCHMARK(windows<4, false, true>)->Name("backward/windows:4")->Apply(sizes);
BENCHMARK(windows<8, false, true>)->Name("backward/windows:8")->Apply(sizes);
BENCHMARK(windows<2, true, false>)->Name("causal_forward/windows:2")->Apply(sizes);
BENCHMARK(windows<4, true, false>)->Name("causal_forward/windows:4")->Apply(sizes);
BENCHMARK(windows<8, true, false>)->Name("causal_forward/windows:8")->Apply(sizes);
BENCHMARK(windows<2, true, true>)->Name("causal_backward/windows:2")->Apply(sizes);
BENCHMARK(windows<4, true, true>)->Name("causal_backward/windows:4")->Apply(sizes);
BENCHMARK(windows<8, true, true>)->Name("causal_backward/windows:8")->Apply(sizes);
// WikiText-103, then enwik8.
BENCHMARK(table_1)
    ->ArgNames({"n", "layers", "sampled", "windows"})
    ->Args({3072, 16, 16, 2})
    ->Args({3072, 16, 16, 4})
    ->Args({3072, 16, 12, 4})
    ->Args({3072, 16, 16, 6})
    ->Args({3072, 16, 16, 8})
    ->Args({4096, 12, 12, 2})
    ->Args({4096, 12, 12, 4})
    ->Args({4096, 12, 9, 4})
    ->Unit(benchmark::kMillisecond);
BENCHMARK_MAIN();
