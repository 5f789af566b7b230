// AdaMRA's layer against this library's own softmax attention with the same width: the whole layer with projections and routing, and attention
// proper; what the router costs, and how time and memory grow. d = 64, two sub-heads, lengths 2, 4, 8, 16.
#include "../examples/program.hpp"
#include "common.hpp"

#include <polyattn/nn/adaptive_multi_resolution.hpp>
#include <polyattn/nn/multi_head.hpp>

using namespace bench;

namespace {

constexpr index_t dim = 64, heads = 2;
using Recipe = MultiResolution<SegmentMeans<2, 4, 8, 16>>;

template <class Layer>
struct Run {
    Layer layer;
    typename Layer::Saved saved;
    Workspace workspace;
    Tensor<float> x, y;
    Run(Layer made, index_t n) : layer(std::move(made)), x(random_tensor({n, dim}, 1)), y({n, dim}) {}
    void operator()() { layer.forward(detail::rows_of(std::as_const(x)), {}, detail::rows_of(y), 1, saved, {.workspace = &workspace}, {}); }
};

void layer(benchmark::State& state) {
    use_threads(1);
    const auto n = static_cast<index_t>(state.range(0));
    using Multi = nn::AdaptiveMultiResolution<float, Recipe>;
    using Softmaxes = nn::MultiHeadAttention<float, Attention<>>;
    Run<Multi> multi(Multi("layer", {}, dim, heads, heads, .1, 1, 1), n);
    Run<Softmaxes> dense(Softmaxes("layer", Attention<>{}, dim, heads, heads, .1, 1, 1), n);
    multi();
    // Every row is somewhere, and a constant x stays one: each row of the context is the same weighted mean of equal landmarks.
    const auto routes = multi.layer.routes(multi.saved);
    if (std::count(routes.begin(), routes.end(), -1) != 0) return state.SkipWithError("a row without a resolution");
    for (index_t row = 1; row < n; ++row) std::copy_n(multi.x.values.begin(), dim, multi.x.values.begin() + row * dim);
    multi();
    for (std::size_t i = 0; i < multi.y.values.size(); ++i)
        if (!(std::abs(multi.y.values[i] - multi.y.values[i % dim]) < 1e-4f)) return state.SkipWithError("equal tokens differ");
    multi.x = random_tensor({n, dim}, 1);
    dense();
    std::vector<double> dense_times;
    const int repeats = n > 20000 ? 1 : 3;
    for (int i = 0; i < repeats; ++i) {
        const double start = seconds();
        dense();
        dense_times.push_back(seconds() - start);
    }
    const Medians medians = time_calls(state, multi, fma_burst<float>);
    state.counters["x_dense"] = median(dense_times) / medians.time;
    state.counters["ns/token"] = medians.time / n * 1e9;
    // Flops of both, projections included: what a perfect pair of programs would give.
    const double landmarks = n * (.5 + .25 + .125 + .0625), multi_flops = 4. * n * dim * dim + 4 * landmarks * dim * dim + 2. * dim * dim / heads * (n + landmarks);
    state.counters["x_flops"] = (8. * n * dim * dim + 4. * double(n) * n * dim) / multi_flops;
    state.counters["scratch_MB"] = double(multi.workspace.capacity()) / 1e6;
    const double least = n == 1024 ? 3.6 : n == 2048 ? 6.8 : n == 4096 ? 13 : n == 16384 ? 50 : n == 65536 ? 200 : 0;
    if (least > 0) report_ratio(state, least / state.counters["x_dense"].value, 1);
}

/// Queries at landmarks: kernel attention against dense softmax, both sub-heads, no projections.
void attention_proper(benchmark::State& state) {
    use_threads(1);
    const auto n = static_cast<index_t>(state.range(0));
    const auto q = random_tensor({heads, n, dim / heads}, 1), k = random_tensor({heads, n, dim / heads}, 2), v = random_tensor({heads, n, dim / heads}, 3);
    Tensor<float> out(q.shape);
    Workspace workspace, other;
    const Attention<Kernel<ReLU>> kernel;
    const Attention<> dense;
    // A quarter of the queries at each resolution.
    const auto part = [&](const Tensor<float>& x, index_t first, index_t rows) { return tensor_view(x.data() + offset_t{first} * dim / heads, {heads, rows, dim / heads}, {offset_t{n} * dim / heads, dim / heads, 1}); };
    const auto run = [&] {
        for (index_t h = 0; h < 4; ++h)
            kernel.into(tensor_view(out.data() + offset_t{h} * (n / 4) * dim / heads, {heads, n / 4, dim / heads}, {offset_t{n} * dim / heads, dim / heads, 1}), part(q, h * (n / 4), n / 4), part(k, 0, n >> (h + 1)),
                        part(v, 0, n >> (h + 1)), {.workspace = &workspace});
    };
    run();
    for (const float value : out.values)
        if (!(std::abs(value) < 6)) return state.SkipWithError("a row is no mean of values");
    std::vector<double> dense_times;
    Tensor<float> dense_out(q.shape);
    for (int i = 0; i < (n > 20000 ? 2 : 4); ++i) {
        const double start = seconds();
        dense.into(dense_out.view(), q.view(), k.view(), v.view(), {.workspace = &other});
        if (i > 0) dense_times.push_back(seconds() - start);
    }
    const Medians medians = time_calls(state, run, fma_burst<float>);
    state.counters["x_dense"] = median(dense_times) / medians.time;
    state.counters["x_flops"] = 4. * double(n) * n * dim / (2. * dim * dim / heads * n * (1 + .5 + .25 + .125 + .0625));
    const double least = n == 1024 ? 16 : n == 2048 ? 32 : n == 4096 ? 64 : n == 16384 ? 250 : n == 65536 ? 1000 : 0;
    if (least > 0) report_ratio(state, least / state.counters["x_dense"].value, 1);
}

template <class Router>
auto layer_with(Router, index_t n) {
    using Layer = nn::AdaptiveMultiResolution<float, MultiResolution<SegmentMeans<2, 4, 8, 16>, Router>>;
    return Run<Layer>(Layer("layer", {}, dim, heads, heads, .1, 1, 1), n);
}

/// The layer with its learned router, beside one that draws the resolutions: logits and their largest are the difference.
void router(benchmark::State& state) {
    use_threads(1);
    const auto n = static_cast<index_t>(state.range(0));
    auto learned = layer_with(TopOne<StraightThrough>{}, n);
    auto drawn = layer_with(RandomRoute{}, n);
    learned();
    drawn();
    for (const auto& routes : {learned.layer.routes(learned.saved), drawn.layer.routes(drawn.saved)})
        if (std::count(routes.begin(), routes.end(), -1) != 0) return state.SkipWithError("a row without a resolution");
    const Medians medians = time_calls(state, learned, [&] {
        const double start = seconds();
        drawn();
        return seconds() - start;
    });
    state.counters["ns/token"] = (medians.time - medians.limit) / n * 1e9;
    state.counters["x_drawn"] = medians.time / medians.limit;
}

/// Twice the tokens: how many times the time and the memory of a forward pass that keeps what backward needs.
void growth(benchmark::State& state) {
    use_threads(1);
    const auto n = static_cast<index_t>(state.range(0));
    const auto megabytes = [](index_t tokens) {
        const double held = reset_peak();
        auto run = layer_with(TopOne<StraightThrough>{}, tokens);
        run();
        return peak_megabytes() - held;
    };
    const double small_memory = megabytes(n), large_memory = megabytes(2 * n);
    auto small = layer_with(TopOne<StraightThrough>{}, n), large = layer_with(TopOne<StraightThrough>{}, 2 * n);
    small();
    large();
    if (large.layer.routes(large.saved).size() != 2 * small.layer.routes(small.saved).size()) return state.SkipWithError("rows were left out");
    const Medians medians = time_calls(state, large, [&] {
        const double start = seconds();
        small();
        return seconds() - start;
    });
    state.counters["x_memory"] = large_memory / small_memory;
    state.counters["MB"] = large_memory;
    report_ratio(state, medians.time / medians.limit, 2.1);
}

}  // namespace

BENCHMARK(router)->ArgName("n")->Arg(1024)->Arg(4096)->Arg(65536)->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK(growth)->ArgName("n")->RangeMultiplier(2)->Range(1024, 32768)->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK(layer)->ArgName("n")->Arg(1024)->Arg(2048)->Arg(4096)->Arg(16384)->Arg(65536)->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK(attention_proper)->ArgName("n")->Arg(1024)->Arg(2048)->Arg(4096)->Arg(16384)->Arg(65536)->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK_MAIN();
