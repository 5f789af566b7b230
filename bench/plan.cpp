// Building Diffuser's plan, and the SIMD backend's schedule of it.
#include "common.hpp"

using namespace bench;

void build_plan(benchmark::State& state) {
    const auto n = static_cast<index_t>(state.range(0));
    const LocalGlobalRandom pattern{.window = 128, .globals = static_cast<index_t>(state.range(1)), .randoms = static_cast<index_t>(state.range(2))};
    offset_t pairs = 0, edges = 0;
    if (n <= 4096 && !pattern.plan(n, n).is_disjoint()) return state.SkipWithError("a pair is in two parts");
    for (auto _ : state) {
        const Plan plan = pattern.plan(n, n);
        benchmark::DoNotOptimize(plan.lowered<detail::simd::Schedule>());
        pairs = plan.count();
        edges = plan.edges().count();
    }
    state.counters["ns/pair"] = benchmark::Counter(double(pairs) / 1e9, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
    state.counters["ns/edge"] = benchmark::Counter(double(edges) / 1e9, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}
BENCHMARK(build_plan)->ArgNames({"n", "g", "r"})->Args({4096, 96, 96})->Args({65536, 96, 96})->Args({1000000, 16, 16})->Unit(benchmark::kMillisecond);

// Many tiles: one a row of blocks.
void build_big_bird(benchmark::State& state) {
    const auto n = static_cast<index_t>(state.range(0));
    offset_t pairs = 0;
    if (n <= 4096 && !BigBird<64>{}.plan(n, n).is_disjoint()) return state.SkipWithError("a pair is in two parts");
    for (auto _ : state) {
        const Plan plan = BigBird<64>{}.plan(n, n);
        benchmark::DoNotOptimize(plan.lowered<detail::simd::Schedule>());
        pairs = plan.count();
    }
    state.counters["ns/pair"] = benchmark::Counter(double(pairs) / 1e9, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}
BENCHMARK(build_big_bird)->ArgNames({"n"})->Args({4096})->Args({65536})->Args({1000000})->Unit(benchmark::kMillisecond);

BENCHMARK_MAIN();
