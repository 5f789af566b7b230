// One diffusion hop over stored weights (window 128, 96 global and 96 random tokens), against its dense flops at the FMA peak plus its
// edges at the rate of the gather alone.
#include "gathers.hpp"

using namespace bench;

void hop(benchmark::State& state) {
    use_threads(1);
    const auto n = static_cast<index_t>(state.range(0)), w = static_cast<index_t>(state.range(1)), g = static_cast<index_t>(state.range(2)), r = static_cast<index_t>(state.range(3));
    const Attention layer{LocalGlobalRandom{.window = w, .globals = g, .randoms = r}, PPR<5>{}};
    const Plan plan = layer.plan(n, n);
    const auto q = random_tensor({n, 64}, 1), k = random_tensor({n, 64}, 2), v = random_tensor({n, 64}, 3), x = random_tensor({n, 64}, 4);
    Tensor<float> out({n, 64});
    const NoBias bias;
    const detail::Head<float, NoBias> head{q.view().head(0, 0), k.view().head(0, 0), v.view().head(0, 0), &plan, &layer.recursion(), &bias, .125, 0, 0, n, n, {}, std::size_t{1} << 32};
    Workspace workspace;
    workspace.prepare(1);
    const detail::Workers workers(workspace, 0, 1);
    detail::simd::SparseSoftmax<float, Arch, NoBias> attention(head, workers);
    attention.prepare(false);
    const Hop step{.9, .1};
    const detail::simd::Rows<float> rows{x.data(), 64}, values{v.data(), 64};
    attention.apply(rows, values, step, out.data(), 64, false, true);  // splits x once
    // Rows of A sum to 1: A 1 = 1.
    Tensor<float> ones({n, 64}), sums({n, 64});
    std::fill(ones.values.begin(), ones.values.end(), 1.f);
    attention.apply({ones.data(), 64}, values, {1, 0}, sums.data(), 64, false, false);
    for (const float sum : sums.values)
        if (!(std::abs(sum - 1) < 1e-5f)) return state.SkipWithError("a row does not sum to 1");
    Gathers gathers(n, std::max(r, 1));
    const double edges = double(plan.edges().count()), dense = 128. * double(plan.count() - plan.edges().count());
    attention.apply(rows, values, step, out.data(), 64, false, true);
    const Medians medians = time_calls(state, [&] { attention.apply(rows, values, step, out.data(), 64, true, true); }, [&] {
        const double peak = fma_burst<float>(), start = seconds();
        gathers.spmm();
        const double gather = (seconds() - start) / double(gathers.plan.edges().count());
        return dense / peak + edges * gather;
    });
    state.counters["ns/token"] = medians.time / n * 1e9;
    report_ratio(state, medians.time / medians.limit, g == 96 && r == 96 ? 1.15 : 0);
}
BENCHMARK(hop)->ArgNames({"n", "w", "g", "r"})->Args({1024, 128, 96, 96})->Args({4096, 128, 96, 96})->Args({65536, 128, 96, 96})->Args({4096, 128, 16, 16})->UseManualTime()->Unit(benchmark::kMillisecond);

BENCHMARK_MAIN();
