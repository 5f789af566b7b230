// Sampled attention (SSA): what a draw costs, and attention with L windows against dense attention, forward and backward.
#include "common.hpp"

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
BENCHMARK(windows<4, true, true>)->Name("causal_backward/windows:4")->Apply(sizes);
BENCHMARK_MAIN();
