// The limits that the other programs quote shares of.
#include "common.hpp"

using namespace bench;

template <class T>
void fma_peak(benchmark::State& state) {
    double best = 0;
    for (auto _ : state) best = std::max(best, measure_peak<T>());
    state.counters["GF/s"] = best / 1e9;
}
BENCHMARK(fma_peak<float>)->Name("fma_peak/float")->Unit(benchmark::kMillisecond);
BENCHMARK(fma_peak<double>)->Name("fma_peak/double")->Unit(benchmark::kMillisecond);

void read(benchmark::State& state) {
    double best = 0;
    for (auto _ : state) best = std::max(best, read_rate(static_cast<std::size_t>(state.range(0)) << 10));
    state.counters["GB/s"] = best / 1e9;
}
BENCHMARK(read)->ArgName("KiB")->RangeMultiplier(4)->Range(16, 65536)->Unit(benchmark::kMillisecond);

BENCHMARK_MAIN();
