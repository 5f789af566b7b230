// One query against n keys: a step of decoding, `heads` query heads on one key head. Against the read rate of keys and values.
#include "common.hpp"

using namespace bench;

void decode(benchmark::State& state) {
    use_threads(1);
    const Attention<> layer;
    const auto n = static_cast<index_t>(state.range(0));
    const offset_t heads = state.range(1);
    const auto q = random_tensor({heads, 1, 64}, 1), k = random_tensor({1, n, 64}, 2), v = random_tensor({1, n, 64}, 3);
    Tensor<float> out({heads, 1, 64});
    Workspace workspace;
    const CallOptions options{.plan = layer.plan(1, n), .workspace = &workspace};
    layer.into(out.view(), q.view(), k.view(), v.view(), options);
    const auto exact = Attention<Reference>{}(q.view(), k.view(), v.view(), options);
    for (std::size_t i = 0; i < out.values.size(); ++i)
        if (!(std::abs(out.values[i] - exact.values[i]) < 1e-5f)) return state.SkipWithError("wrong output");
    const double bytes = 2. * n * 64 * sizeof(float);
    ReadProbe probe(static_cast<std::size_t>(bytes));
    const Medians medians = time_calls(state, [&] { layer.into(out.view(), q.view(), k.view(), v.view(), options); }, [&] { return probe.burst(); });
    state.counters["GB/s"] = bytes / medians.time / 1e9;
    state.counters["read_GB/s"] = medians.limit / 1e9;
    report_share(state, bytes / medians.time / medians.limit, n >= 65536 ? .80 : 0);
}
BENCHMARK(decode)->ArgNames({"n", "heads"})->ArgsProduct({{1024, 4096, 16384, 65536, 262144}, {1, 8}})->UseManualTime()->Unit(benchmark::kMicrosecond);

BENCHMARK_MAIN();
