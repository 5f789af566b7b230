// A training step of SSA's byte-level decoder: forward, backward, AdamW. Tokens a second, dense and with sampled attention.
#include "common.hpp"

#include <polyattn/nn/language_model.hpp>
#include <polyattn/nn/optimizer.hpp>
#include <polyattn/nn/subsampling.hpp>

using namespace bench;

namespace {

using Decoder = nn::LanguageModel<float, Attention<Causal, Alibi>>;

struct Run {
    Decoder model;
    nn::AdamW<float> optimizer;
    typename Decoder::Saved saved;
    Workspace workspace;
    std::vector<index_t> text, targets;
    index_t batch;
    std::uint32_t steps = 0;

    Run(index_t n, index_t batch_in, index_t dim, index_t layers, index_t heads) : model(Attention<Causal, Alibi>{Alibi(heads)}, 256, {.layers = layers, .dim = dim, .heads = heads}), batch(batch_in) {
        for (index_t i = 0; i < n * batch; ++i) {
            text.push_back(static_cast<index_t>(i * 2654435761u >> 8 & 255));
            targets.push_back(static_cast<index_t>((i + 1) * 2654435761u >> 8 & 255));
        }
    }
    double step(const nn::PlanSource& plans) {
        const double loss = model.train(text, targets, batch, saved, {.workspace = &workspace, .draw = {.seed = 1, .step = ++steps}, .training = true, .plans = plans});
        nn::clip_gradients(model, 1);
        optimizer.step(model, 1e-3);
        return loss;
    }
};

void train(benchmark::State& state) {
    const auto n = static_cast<index_t>(state.range(0)), batch = static_cast<index_t>(state.range(1)), windows = static_cast<index_t>(state.range(2));
    use_threads(static_cast<int>(state.range(3)));
    const index_t dim = 256, layers = 4;
    Run run(n, batch, dim, layers, 4);
    nn::PlanSource plans;
    const OverDepth sigma = linear(.05, .25, layers);
    if (windows == 2) plans = nn::subsampled(Causal{}, LocallyBiased<2>{sigma});
    if (windows == 4) plans = nn::subsampled(Causal{}, LocallyBiased<4>{sigma});
    if (windows == 8) plans = nn::subsampled(Causal{}, LocallyBiased<8>{sigma});
    // It learns: a few steps on the same text lower the loss.
    const double first = run.step(plans), before = run.step(plans);
    for (int warm = 0; warm < 2; ++warm) run.step(plans);
    if (!(first > 5 && first < 7 && run.step(plans) < before)) return state.SkipWithError("the loss does not fall");
    const auto medians = time_calls(state, [&] { run.step(plans); }, [] { return fma_burst(); });
    // Multiplications: 6 a parameter and token, and attention's 4 + 10 d a pair and head.
    const double tokens = double(n) * batch, share = windows > 1 ? double(LocallyBiased<4>{}.sample(n, n, {}, true).count()) / double(Causal{}.plan(n, n).count()) : 1;
    const double flops = 6 * tokens * (double(layers) * 12 * dim * dim + 256. * dim) + (windows > 1 && windows != 4 ? 0 : share * layers * batch * 14. * dim * double(n) * (n + 1) / 2);
    state.counters["tokens/s"] = tokens / medians.time;
    if (windows == 1 || windows == 4) state.counters["share_of_peak"] = flops / medians.time / medians.limit / double(state.range(3));
    state.counters["scratch_MB"] = double(run.workspace.capacity()) / 1e6;
}

}  // namespace

BENCHMARK(train)->ArgNames({"n", "batch", "windows", "threads"})->ArgsProduct({{1024}, {2}, {1, 2, 4, 8}, {1, 2}})->ArgsProduct({{4096}, {1}, {1, 2, 4, 8}, {1, 2}})->Args({128, 1, 4, 1})->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK_MAIN();
