// Whole layers of Diffuser, forward: scores once, K hops, against the dense flops at the FMA peak plus the edges at the rates of the
// gathers alone.
#include "gathers.hpp"

using namespace bench;

template <int K>
void diffuser(benchmark::State& state) {
    use_threads(1);
    const auto n = static_cast<index_t>(state.range(0)), w = static_cast<index_t>(state.range(1)), g = static_cast<index_t>(state.range(2)), r = static_cast<index_t>(state.range(3));
    const Attention layer{LocalGlobalRandom{.window = w, .globals = g, .randoms = r}, PPR<K>{}};
    const auto q = random_tensor({n, 64}, 1), k = random_tensor({n, 64}, 2), v = random_tensor({n, 64}, 3);
    Tensor<float> out({n, 64});
    Workspace workspace;
    const CallOptions options{.plan = layer.plan(n, n), .workspace = &workspace};
    const Plan& plan = *options.plan;
    layer.into(out.view(), q.view(), k.view(), v.view(), options);
    if (const std::string wrong = check_forward(layer, plan, q, k, v, out); !wrong.empty()) return state.SkipWithError(wrong.c_str());
    Gathers gathers(n, std::max(r, 1));
    const double edges = double(plan.edges().count()), dense = 128. * double(plan.count() - plan.edges().count());
    const auto per_edge = [&](auto&& f) {
        const double start = seconds();
        f();
        return (seconds() - start) / double(gathers.plan.edges().count());
    };
    const Medians medians = time_calls(state, [&] { layer.into(out.view(), q.view(), k.view(), v.view(), options); }, [&] {
        const double peak = fma_burst<float>();
        return (1 + K) * dense / peak + edges * (per_edge([&] { gathers.sddmm(); }) + K * per_edge([&] { gathers.spmm(); }));
    });
    state.counters["GF/s"] = 128. * (1 + K) * double(plan.count()) / medians.time / 1e9;
    state.counters["ns/token"] = medians.time / n * 1e9;
    state.counters["scratch_MB"] = double(workspace.capacity()) / 1e6;
    report_ratio(state, medians.time / medians.limit, K == 5 && n >= 4096 && r == 96 ? 1.3 : 0);
}
const std::vector<std::string> names = {"n", "w", "g", "r"};
BENCHMARK(diffuser<1>)->Name("diffuser_K1")->ArgNames(names)->ArgsProduct({{1024, 4096}, {128}, {96}, {96}})->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK(diffuser<5>)->Name("diffuser_K5")->ArgNames(names)->ArgsProduct({{1024, 4096, 65536}, {128}, {96}, {96}})->Args({4096, 128, 0, 0})->Args({4096, 128, 96, 0})->Args({4096, 512, 16, 16})->UseManualTime()->Unit(benchmark::kMillisecond);

/// Time per token at fixed w, g and r must not grow with n: 65536 tokens against 4096, call by call.
void flatness(benchmark::State& state) {
    use_threads(1);
    const Attention<LocalGlobalRandom, PPR<5>> layer;
    struct Case {
        Tensor<float> q, k, v, out;
        Workspace workspace;
        CallOptions options;
    };
    const auto make = [&](index_t n) {
        Case c{random_tensor({n, 64}, 1), random_tensor({n, 64}, 2), random_tensor({n, 64}, 3), Tensor<float>({n, 64}), {}, {}};
        c.options.plan = layer.plan(n, n);
        return c;
    };
    Case small = make(4096), large = make(65536);
    const auto per_token = [&](Case& c) {
        c.options.workspace = &c.workspace;
        const double start = seconds();
        layer.into(c.out.view(), c.q.view(), c.k.view(), c.v.view(), c.options);
        return (seconds() - start) / double(c.q.shape[0]);
    };
    per_token(large);
    std::vector<double> ratios;
    for (auto _ : state) {
        const double few = std::min({per_token(small), per_token(small), per_token(small)}), many = per_token(large);
        ratios.push_back(many / few);
        state.SetIterationTime(many * 65536);
    }
    report_ratio(state, median(ratios), 1.4);
}
BENCHMARK(flatness)->UseManualTime()->Unit(benchmark::kMillisecond);

BENCHMARK_MAIN();
