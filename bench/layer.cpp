// Whole layers of Diffuser, forward: scores once, K hops. (2 + 2 K) d flops a pair.
#include "common.hpp"

using namespace bench;

template <int K>
void diffuser(benchmark::State& state) {
    const auto n = static_cast<index_t>(state.range(0)), w = static_cast<index_t>(state.range(1)), g = static_cast<index_t>(state.range(2)), r = static_cast<index_t>(state.range(3));
    const Attention layer{LocalGlobalRandom{.window = w, .globals = g, .randoms = r}, PPR<K>{}};
    run_forward(state, layer, n, 64);
    state.counters["ns/token"] = benchmark::Counter(double(n) / 1e9, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}
const std::vector<std::string> names = {"n", "w", "g", "r"};
BENCHMARK(diffuser<1>)->Name("diffuser_K1")->ArgNames(names)->ArgsProduct({{1024, 4096}, {128}, {96}, {96}})->Unit(benchmark::kMillisecond);
BENCHMARK(diffuser<5>)->Name("diffuser_K5")->ArgNames(names)->ArgsProduct({{1024, 4096, 65536}, {128}, {96}, {96}})->Args({4096, 128, 0, 0})->Args({4096, 128, 96, 0})->Unit(benchmark::kMillisecond);

BENCHMARK_MAIN();
