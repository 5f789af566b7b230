// A training step of the two-layer model (d = 64, two heads, hidden 128) with every kind of attention: time and memory against the tokens of an item,
// as tables 2 and 3 of AdaMRA and figure 4 of Diffuser have it. Batches of 2.
#include "../examples/attention_zoo.hpp"
#include "../examples/program.hpp"
#include "common.hpp"

#include <polyattn/nn/optimizer.hpp>

using namespace bench;

namespace {

std::map<index_t, std::pair<double, double>> dense_results;  // seconds and MB by tokens, from the first kind

template <class AnyAttention>
void step(benchmark::State& state, const AnyAttention& attention, index_t n, bool first) {
    const double held = reset_peak();
    using Model = nn::Classifier<float, AnyAttention>;
    Model model(attention, 20, 10, {.layers = 2, .dim = 64, .heads = 2, .hidden = 128, .deviation = .1}, n);
    nn::AdamW<float> optimizer;
    typename Model::Saved saved;
    Workspace workspace;
    const index_t batch = 2;
    std::vector<index_t> tokens(static_cast<std::size_t>(batch * n)), labels{3, 7};
    RandomRow random(1, 0, 77);
    for (index_t& token : tokens) token = static_cast<index_t>(random.below(20));
    const auto run = [&] {
        const nn::Pass pass{.workspace = &workspace, .draw = {.seed = 1}, .training = true};
        const double loss = nn::cross_entropy(model.forward(tokens, batch, saved, pass), std::span<const index_t>(labels));
        model.backward(saved, pass);
        optimizer.step(model, 1e-3);
        return loss;
    };
    const double before = run();
    for (int i = 0; i < 8; ++i) run();
    if (!(run() < before)) return state.SkipWithError("the loss does not fall");
    const Medians medians = time_calls(state, run, fma_burst<float>);
    const double megabytes = peak_megabytes() - held;
    state.counters["MB"] = megabytes;
    if (first) dense_results[n] = {medians.time, megabytes};
    if (const auto dense = dense_results.find(n); dense != dense_results.end()) {
        state.counters["x_dense"] = dense->second.first / medians.time;
        state.counters["of_dense_MB"] = megabytes / dense->second.second;
    }
}

}  // namespace

int main(int argc, char** argv) {
    benchmark::Initialize(&argc, argv);
    for (const index_t n : {256, 1024, 2048, 4096, 8192}) {
        const ZooSizes sizes = ZooSizes::of(n);
        const auto add = [&](const std::string& name, const auto& attention) {
            const bool first = name == "dense";
            benchmark::RegisterBenchmark((name + "/n:" + std::to_string(n)).c_str(), [attention, n, first](benchmark::State& state) { step(state, attention, n, first); })
                ->UseManualTime()
                ->Unit(benchmark::kMillisecond);
        };
        for_each_pattern(sizes, add);
        for_each_linear(sizes, add);
        add("AdaMRA", MultiResolution<SegmentMeans<2, 4, 8, 16>>{});
    }
    benchmark::RunSpecifiedBenchmarks();
}
