// The limits that the other programs quote shares of.
#include "common.hpp"

using namespace bench;

template <class T>
void fma(benchmark::State& state) {
    for (auto _ : state) benchmark::DoNotOptimize(fma_burst<T>());
    state.counters["GF/s"] = fma_peak<T>() / 1e9;
}
BENCHMARK(fma<float>)->Name("fma_peak/float")->Unit(benchmark::kMillisecond);
BENCHMARK(fma<double>)->Name("fma_peak/double")->Unit(benchmark::kMillisecond);

void read(benchmark::State& state) {
    ReadProbe probe(static_cast<std::size_t>(state.range(0)) << 10);
    for (auto _ : state) benchmark::DoNotOptimize(probe.burst());
    state.counters["GB/s"] = probe.rate() / 1e9;
}
BENCHMARK(read)->ArgName("KiB")->RangeMultiplier(4)->Range(16, 65536)->Unit(benchmark::kMillisecond);

BENCHMARK_MAIN();
