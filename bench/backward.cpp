// Gradients of one head. (4 + 4 K) d flops a pair under diffusion, 10 d for one hop with the scores computed again.
#include "common.hpp"

using namespace bench;

namespace {

constexpr bool wide = detail::simd::Tiling<float, Arch>::registers == 32;

template <class Layer>
void run(benchmark::State& state, const Layer& layer, double least, double most = 0) {
    use_threads(1);
    const auto n = static_cast<index_t>(state.range(0));
    const auto q = random_tensor({n, 64}, 1), k = random_tensor({n, 64}, 2), v = random_tensor({n, 64}, 3), d_out = random_tensor({n, 64}, 4);
    Workspace workspace;
    const CallOptions options{.plan = layer.plan(n, n), .workspace = &workspace};
    const auto [out, saved] = layer.forward(q.view(), k.view(), v.view(), options);
    const auto gradient = layer.backward(saved, d_out.view(), options);
    // dL/ds of q -> (1 + s) q at s = 0 is q . dq: against a difference of the loss.
    const auto loss = [&](float s) {
        auto moved = q;
        for (float& value : moved.values) value *= 1 + s;
        const auto o = layer(moved.view(), k.view(), v.view(), options);
        double sum = 0;
        for (std::size_t i = 0; i < o.values.size(); ++i) sum += double(o.values[i]) * double(d_out.values[i]);
        return sum;
    };
    double slope = 0, size = 0;
    for (std::size_t i = 0; i < q.values.size(); ++i) {
        slope += double(q.values[i]) * double(gradient.q.values[i]);
        size += std::abs(double(q.values[i]) * double(gradient.q.values[i]));
    }
    if (!(std::abs((loss(1e-2f) - loss(-1e-2f)) / 2e-2 - slope) < 1e-2 * size)) return state.SkipWithError("wrong gradient");
    auto gradients = layer.backward(saved, d_out.view(), options);
    Tensor<float> again({n, 64});
    std::vector<double> forward;
    const Medians medians = time_calls(state, [&] { layer.backward_into(gradients, saved, d_out.view(), options); }, [&] {
        const double start = seconds();
        layer.into(again.view(), q.view(), k.view(), v.view(), options);
        forward.push_back(seconds() - start);
        return fma_burst<float>();
    });
    const double hops = double(layer.recursion().hops.size()), flops = 64 * double(options.plan->count()) * (hops > 1 ? 4 + 4 * hops : 10);
    state.counters["GF/s"] = flops / medians.time / 1e9;
    state.counters["scratch_MB"] = double(workspace.capacity()) / 1e6;
    if (most > 0) report_ratio(state, medians.time / median(forward), n >= 4096 ? most : 0);
    else {
        state.counters["x_forward"] = medians.time / median(forward);
        report_share(state, flops / medians.time / medians.limit, n >= 4096 ? least : 0);
    }
}

void dense(benchmark::State& state) { run(state, Attention<>{}, wide ? .80 : .65); }
void causal(benchmark::State& state) { run(state, Attention<Causal>{}, wide ? .76 : 0); }
void window(benchmark::State& state) {
    const auto w = static_cast<index_t>(state.range(1));
    run(state, Attention{SlidingWindow{.window = w}}, !wide ? 0 : w == 512 ? .76 : .64);
}
void diffuser(benchmark::State& state) { run(state, Attention<LocalGlobalRandom, PPR<5>>{}, 0, 2.7); }

}  // namespace

BENCHMARK(dense)->ArgNames({"n"})->Args({1024})->Args({4096})->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK(causal)->ArgNames({"n"})->Args({1024})->Args({4096})->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK(window)->ArgNames({"n", "w"})->ArgsProduct({{1024, 4096}, {128, 512}})->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK(diffuser)->ArgNames({"n"})->Args({1024})->Args({4096})->Args({65536})->UseManualTime()->Unit(benchmark::kMillisecond);

BENCHMARK_MAIN();
