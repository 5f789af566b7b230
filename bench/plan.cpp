// Building Diffuser's plan, and the SIMD backend's schedule of it.
#include "common.hpp"

#include <sys/resource.h>

using namespace bench;

/// Bytes of memory that the process has held at most.
double resident() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return double(usage.ru_maxrss) * 1024;
}

void build_plan(benchmark::State& state) {
    const auto n = static_cast<index_t>(state.range(0));
    const LocalGlobalRandom pattern{.window = 128, .globals = static_cast<index_t>(state.range(1)), .randoms = static_cast<index_t>(state.range(2))};
    offset_t pairs = 0;
    std::vector<double> times;
    if (n <= 4096 && !pattern.plan(n, n).is_disjoint()) return state.SkipWithError("a pair is in two parts");
    for (auto _ : state) {
        const double start = seconds();
        const Plan plan = pattern.plan(n, n);
        benchmark::DoNotOptimize(plan.lowered<detail::simd::Schedule>());
        times.push_back(seconds() - start);
        pairs = plan.count();
    }
    state.counters["memory_GB"] = resident() / 1e9;
    report_ratio(state, median(times) / double(pairs) * 1e9, 30);  // ns a pair of the pattern
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
