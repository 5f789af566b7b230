// Gathers along random edges, 64 columns: dot products (SDDMM) and weighted sums (SpMM), against the sequential read rate of the same
// footprint.
#include "gathers.hpp"

using namespace bench;

void gather(benchmark::State& state, bool sums) {
    use_threads(1);
    Gathers gathers(static_cast<index_t>(state.range(0)), static_cast<index_t>(state.range(1)));
    if (const std::string wrong = gathers.check(sums); !wrong.empty()) return state.SkipWithError(wrong.c_str());
    ReadProbe probe(gathers.footprint());
    const Medians medians = time_calls(state, [&] {
        sums ? gathers.spmm() : gathers.sddmm();
        benchmark::ClobberMemory();
    }, [&] { return probe.burst(); });
    state.counters["ns/edge"] = medians.time / double(gathers.plan.edges().count()) * 1e9;
    state.counters["read_GB/s"] = medians.limit / 1e9;
    // Inside a second-level cache of 1 MiB, inside a third-level cache of 16 MiB or more, beyond.
    const int level = gathers.footprint() <= std::size_t{512} << 10 ? 0 : gathers.footprint() <= std::size_t{16} << 20 ? 1 : 2;
    constexpr double least[2][3] = {{.72, .62, .65}, {.85, .65, .65}};
    report_share(state, gathers.bytes() / medians.time / medians.limit, least[sums][level]);
}
void sddmm(benchmark::State& state) { gather(state, false); }
void spmm(benchmark::State& state) { gather(state, true); }
BENCHMARK(sddmm)->ArgNames({"n", "r"})->ArgsProduct({{1024, 4096, 16384, 65536, 262144}, {96}})->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK(spmm)->ArgNames({"n", "r"})->ArgsProduct({{1024, 4096, 16384, 65536, 262144}, {96}})->UseManualTime()->Unit(benchmark::kMillisecond);

BENCHMARK_MAIN();
