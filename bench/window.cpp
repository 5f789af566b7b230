// Dense, causal and sliding-window attention: key ranges. 4 d flops a pair.
#include "common.hpp"

using namespace bench;

void dense(benchmark::State& state) { run_forward(state, Attention<>{}, static_cast<index_t>(state.range(0)), static_cast<index_t>(state.range(1))); }
void dense_double(benchmark::State& state) { run_forward<double>(state, Attention<>{}, static_cast<index_t>(state.range(0)), static_cast<index_t>(state.range(1))); }
void causal(benchmark::State& state) { run_forward(state, Attention<Causal>{}, static_cast<index_t>(state.range(0)), static_cast<index_t>(state.range(1))); }
void window(benchmark::State& state) {
    run_forward(state, Attention{SlidingWindow{.window = static_cast<index_t>(state.range(2))}}, static_cast<index_t>(state.range(0)), static_cast<index_t>(state.range(1)));
}
BENCHMARK(dense)->ArgNames({"n", "d"})->ArgsProduct({{1024, 4096}, {32, 40, 64, 128}})->Args({16384, 64})->Unit(benchmark::kMillisecond);
BENCHMARK(dense_double)->ArgNames({"n", "d"})->ArgsProduct({{1024, 4096}, {64}})->Unit(benchmark::kMillisecond);
BENCHMARK(causal)->ArgNames({"n", "d"})->ArgsProduct({{1024, 4096}, {64}})->Unit(benchmark::kMillisecond);
BENCHMARK(window)->ArgNames({"n", "d", "w"})->ArgsProduct({{1024, 4096, 16384}, {64}, {128, 512}})->Unit(benchmark::kMillisecond);

BENCHMARK_MAIN();
