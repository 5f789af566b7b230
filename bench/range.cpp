// Dense, causal and sliding-window attention, biases, many short sequences, heads side by side in rows. 4 d useful flops a pair.
#include "common.hpp"

#include <polyattn/policy/bias/bias.hpp>

using namespace bench;

namespace {

// Shares of the FMA peak to reach: with 32 vector registers, else with 16.
constexpr bool wide = detail::simd::Tiling<float, Arch>::registers == 32;

double dense_target(index_t n, index_t d) {
    if (!wide) return d == 64 ? .78 : 0;
    if (d == 64) return n >= 16384 ? .80 : n >= 4096 ? .85 : 0;
    if (n < 4096) return 0;
    return d == 32 ? .78 : d == 128 ? .86 : d == 40 || d == 72 || d == 80 || d == 96 ? .70 : 0;
}
double window_target(index_t n, index_t w) {
    if (n < 4096 || (w != 128 && w != 512)) return 0;
    if (!wide) return n == 4096 ? .78 : 0;
    return w == 512 ? (n == 4096 ? .82 : 0) : n == 4096 ? .74 : .65;
}

void dense(benchmark::State& state) {
    const auto n = static_cast<index_t>(state.range(0)), d = static_cast<index_t>(state.range(1));
    run_forward(state, Attention<>{}, n, d, dense_target(n, d));
}
void dense_double(benchmark::State& state) {
    const auto n = static_cast<index_t>(state.range(0));
    run_forward<double>(state, Attention<>{}, n, static_cast<index_t>(state.range(1)), wide && n >= 4096 ? .70 : 0);
}
void causal(benchmark::State& state) {
    const auto n = static_cast<index_t>(state.range(0));
    run_forward(state, Attention<Causal>{}, n, static_cast<index_t>(state.range(1)), n < 4096 ? 0 : wide ? .84 : .78);
}
void window(benchmark::State& state) {
    const auto n = static_cast<index_t>(state.range(0)), w = static_cast<index_t>(state.range(2));
    run_forward(state, Attention{SlidingWindow{.window = w}}, n, static_cast<index_t>(state.range(1)), window_target(n, w));
}

/// A layer with a bias against the same one without, call by call.
template <class Biased>
void bias_cost(benchmark::State& state, const Biased& biased) {
    use_threads(1);
    const Attention<> plain;
    const auto n = static_cast<index_t>(state.range(0));
    const auto q = random_tensor({n, 64}, 1), k = random_tensor({n, 64}, 2), v = random_tensor({n, 64}, 3);
    Tensor<float> out({n, 64});
    Workspace workspace;
    const CallOptions options{.plan = plain.plan(n, n), .workspace = &workspace};
    // Row 0 against the definition.
    biased.into(out.view(), q.view(), k.view(), v.view(), options);
    const auto bias = biased.bias().bind(n, n);
    double sum = 0, exact = 0;
    for (index_t j = 0; j < n; ++j) {
        double score = bias(0, 0, 0, j);
        for (std::size_t c = 0; c < 64; ++c) score += double(q.values[c]) * double(k.values[static_cast<std::size_t>(j) * 64 + c]) / 8;
        sum += std::exp(score);
        exact += std::exp(score) * double(v.values[static_cast<std::size_t>(j) * 64]);
    }
    if (!(std::abs(exact / sum - double(out.values[0])) < 1e-4)) return state.SkipWithError("row 0 is wrong");
    std::vector<double> without;
    const Medians medians = time_calls(state, [&] { biased.into(out.view(), q.view(), k.view(), v.view(), options); }, [&] {
        const double start = seconds();
        plain.into(out.view(), q.view(), k.view(), v.view(), options);
        return seconds() - start;
    });
    report_ratio(state, medians.time / medians.limit, wide ? 1.1 : 0);
}
void alibi(benchmark::State& state) { bias_cost(state, Attention{Alibi(1)}); }
void relative(benchmark::State& state) {
    RelativePosition table{.heads = 1, .reach = 128, .table = std::vector<double>(257)};
    for (std::size_t i = 0; i < table.table.size(); ++i) table.table[i] = .01 * double(i % 17);
    bias_cost(state, Attention{table});
}

void short_sequences(benchmark::State& state) {
    use_threads(1);
    const Attention<> layer;
    const auto batch = state.range(0), heads = state.range(1), n = state.range(2);
    const auto q = random_tensor({batch, heads, n, 64}, 1), k = random_tensor({batch, heads, n, 64}, 2), v = random_tensor({batch, heads, n, 64}, 3);
    Tensor<float> out({batch, heads, n, 64});
    Workspace workspace;
    const CallOptions options{.plan = layer.plan(static_cast<index_t>(n), static_cast<index_t>(n)), .workspace = &workspace};
    layer.into(out.view(), q.view(), k.view(), v.view(), options);
    const auto head = [&](const Tensor<float>& all) {
        Tensor<float> one({n, 64});
        std::copy_n(all.values.end() - n * 64, n * 64, one.values.begin());
        return one;
    };
    if (const std::string wrong = check_forward(layer, *options.plan, head(q), head(k), head(v), head(out)); !wrong.empty()) return state.SkipWithError(wrong.c_str());
    const Medians medians = time_calls(state, [&] { layer.into(out.view(), q.view(), k.view(), v.view(), options); }, fma_burst<float>);
    const double flops = 4. * 64 * double(options.plan->count()) * double(batch * heads);
    state.counters["GF/s"] = flops / medians.time / 1e9;
    report_share(state, flops / medians.time / medians.limit, wide && batch == 32 ? .70 : 0);
}

/// Causal heads whose queries, keys and values are columns of one projection's output, as every trained layer has them.
void projected(benchmark::State& state) {
    use_threads(1);
    const Attention<Causal> layer;
    const auto heads = static_cast<index_t>(state.range(0)), n = static_cast<index_t>(state.range(1));
    const auto x = random_tensor({n, 3 * heads * 64}, 1);
    const auto part = [&](index_t i) { return TensorView<const float>{x.values.data() + i * heads * 64, {1, heads, n, 64}, {0, 64, offset_t{3} * heads * 64, 1}}; };
    Tensor<float> out({n, heads * 64});
    const TensorView<float> to{out.values.data(), {1, heads, n, 64}, {0, 64, offset_t{heads} * 64, 1}};
    Workspace workspace;
    const CallOptions options{.plan = layer.plan(n, n), .workspace = &workspace};
    layer.into(to, part(0), part(1), part(2), options);
    const auto last_head = [&](TensorView<const float> all) {
        Tensor<float> one({n, 64});
        for (index_t i = 0; i < n; ++i) std::copy_n(all.head(0, heads - 1).row(i), 64, one.values.data() + offset_t{i} * 64);
        return one;
    };
    if (const std::string wrong = check_forward(layer, *options.plan, last_head(part(0)), last_head(part(1)), last_head(part(2)), last_head(to)); !wrong.empty())
        return state.SkipWithError(wrong.c_str());
    const Medians medians = time_calls(state, [&] { layer.into(to, part(0), part(1), part(2), options); }, fma_burst<float>);
    const double flops = 4. * 64 * double(options.plan->count()) * double(heads);
    state.counters["GF/s"] = flops / medians.time / 1e9;
    report_share(state, flops / medians.time / medians.limit, 0);
}

}  // namespace

#define POLYATTN_BENCHMARK(...) BENCHMARK(__VA_ARGS__)->UseManualTime()->Unit(benchmark::kMillisecond)
POLYATTN_BENCHMARK(dense)->ArgNames({"n", "d"})->ArgsProduct({{1024, 4096}, {32, 40, 64, 72, 80, 96, 128}})->Args({16384, 64});
POLYATTN_BENCHMARK(dense_double)->ArgNames({"n", "d"})->ArgsProduct({{1024, 4096}, {64}});
POLYATTN_BENCHMARK(causal)->ArgNames({"n", "d"})->ArgsProduct({{1024, 4096}, {64}});
POLYATTN_BENCHMARK(window)->ArgNames({"n", "d", "w"})->ArgsProduct({{1024, 4096, 16384}, {64}, {128, 512}})->Args({4096, 64, 32})->Args({4096, 64, 2048});
POLYATTN_BENCHMARK(alibi)->ArgNames({"n"})->Arg(1024)->Arg(4096);
POLYATTN_BENCHMARK(relative)->ArgNames({"n"})->Arg(1024)->Arg(4096);
POLYATTN_BENCHMARK(short_sequences)->ArgNames({"batch", "heads", "n"})->Args({2, 12, 128})->Args({32, 12, 128});
POLYATTN_BENCHMARK(projected)->ArgNames({"heads", "n"})->ArgsProduct({{4}, {1024, 4096}});

BENCHMARK_MAIN();
