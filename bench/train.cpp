// A training step of SSA's byte-level decoder: forward, backward, AdamW. Tokens a second, dense and with sampled attention.
#include "decoder.hpp"

using namespace bench;

namespace {

/// A dense run's step, and that of one with windows, on the same machine in turn: the second must be faster by what is left out.
void train(benchmark::State& state) {
    const auto n = static_cast<index_t>(state.range(0)), batch = static_cast<index_t>(state.range(1)), windows = static_cast<index_t>(state.range(2));
    const auto threads = static_cast<int>(state.range(3));
    use_threads(threads);
    using Run = Decoder<Attention<Causal, Alibi>>;
    Run run(Attention<Causal, Alibi>{Alibi(Run::heads)}, n, batch);
    const nn::PlanSource plans = sampled_plans(windows, Run::layers);
    // It learns: a few steps on the same text lower the loss.
    const double first = run.step(plans), before = run.step(plans);
    for (int warm = 0; warm < 2; ++warm) run.step(plans);
    if (!(first > 5 && first < 7 && run.step(plans) < before)) return state.SkipWithError("the loss does not fall");
    const auto medians = time_calls(state, [&] { run.step(plans); }, [] { return fma_burst(); });
    // Multiply-adds: three products a weight and token, and 4 + 10 head columns a pair and head.
    double pairs = double(Causal{}.plan(n, n).count());
    if (plans) {
        double sum = 0;
        for (std::uint32_t layer = 0; layer < Run::layers; ++layer) sum += double(plans({static_cast<index_t>(layer), batch, n, {}, {.seed = 1, .layer = layer}}).at(0).count());
        pairs = sum / Run::layers;
    }
    const double tokens = double(n) * batch, weights = double(Run::layers) * 12 * Run::dim * Run::dim + 256. * Run::dim;
    const double flops = 6 * tokens * weights + Run::layers * batch * 14. * Run::dim * pairs;
    state.counters["tokens/s"] = tokens / medians.time;
    state.counters["share_of_peak"] = flops / medians.time / medians.limit / threads;
    state.counters["scratch_MB"] = double(run.workspace.capacity()) / 1e6;
    if (windows == 1 || n < 2048 || threads > 1) return;
    // Dense training once more, for the ratio: no more than what the pairs left out explain, plus a tenth.
    Run dense(Attention<Causal, Alibi>{Alibi(Run::heads)}, n, batch);
    for (int warm = 0; warm < 2; ++warm) dense.step({});
    std::vector<double> times;
    for (int i = 0; i < 3; ++i) {
        const double start = seconds();
        dense.step({});
        times.push_back(seconds() - start);
    }
    const double dense_flops = 6 * tokens * weights + Run::layers * batch * 14. * Run::dim * double(Causal{}.plan(n, n).count());
    state.counters["of_dense"] = medians.time / median(times);
    report_ratio(state, medians.time / median(times) / (flops / dense_flops), 1.1);
}

}  // namespace

BENCHMARK(train)
    ->ArgNames({"n", "batch", "windows", "threads"})
    ->ArgsProduct({{1024}, {2}, {1, 2, 4, 8}, {1, 2}})
    ->ArgsProduct({{4096}, {1}, {1, 2, 4, 8}, {1, 2}})
    ->Args({128, 1, 4, 1})
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK_MAIN();
