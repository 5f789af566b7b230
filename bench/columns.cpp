// Global tokens: a list of rows that see everything, a list of keys that everything sees.
#include "common.hpp"

using namespace bench;

void columns(benchmark::State& state) { run_forward(state, Attention{GlobalTokens{.count = static_cast<index_t>(state.range(1))}}, static_cast<index_t>(state.range(0)), 64); }
BENCHMARK(columns)->ArgNames({"n", "g"})->ArgsProduct({{1024, 4096, 16384}, {16, 96}})->UseManualTime()->Unit(benchmark::kMillisecond);

BENCHMARK_MAIN();
