// Gathers along random edges, 64 columns: dot products (SDDMM) and weighted sums (SpMM), against the sequential read rate.
#include "common.hpp"

using namespace bench;

namespace {

constexpr index_t columns = 64;

struct Graph {
    Plan plan;
    Tensor<float> x, y;
    std::vector<float> weights;

    Graph(index_t n, index_t r) : plan(RandomTokens{.count = r}.plan(n, n)), x(random_tensor({n, columns}, 1)), y(random_tensor({n, columns}, 2)), weights(plan.edges().keys.size()) {}
    std::span<const index_t> keys(index_t i) const { return plan.edges().row(i); }
    std::size_t first(index_t i) const { return static_cast<std::size_t>(plan.edges().offsets[static_cast<std::size_t>(i)]); }

    void dots() {
        for (index_t i = 0; i < plan.queries(); ++i)
            for (std::size_t e = 0; e < keys(i).size(); ++e)
                weights[first(i) + e] = detail::simd::dot<float, Arch>(x.data() + offset_t{i} * columns, y.data() + offset_t{keys(i)[e]} * columns, columns);
    }
    void sums(Tensor<float>& out) const {
        for (index_t i = 0; i < plan.queries(); ++i) {
            float* row = out.data() + offset_t{i} * columns;
            std::fill_n(row, columns, 0.f);
            detail::simd::gather_sum<float, Arch>(static_cast<offset_t>(keys(i).size()), [k = keys(i).data()](offset_t e) { return k[e]; },
                                                  [w = weights.data() + first(i)](offset_t e) { return w[e]; }, {y.data(), columns}, 1, columns, row);
        }
    }
};

void report(benchmark::State& state, const Graph& graph) {
    const double bytes = double(graph.plan.edges().count()) * columns * sizeof(float), footprint = double(graph.plan.keys()) * columns * sizeof(float);
    state.counters["ns/edge"] = benchmark::Counter(double(graph.plan.edges().count()) / 1e9, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
    state.counters["of_read"] = benchmark::Counter(bytes / read_rate(static_cast<std::size_t>(footprint)), benchmark::Counter::kIsIterationInvariantRate);
}

void sddmm(benchmark::State& state) {
    Graph graph(static_cast<index_t>(state.range(0)), static_cast<index_t>(state.range(1)));
    graph.dots();
    for (index_t i = 0; i < graph.plan.queries(); i += 101) {
        double exact = 0, size = 0;
        for (index_t c = 0; c < columns; ++c) {
            const double product = double(graph.x.values[static_cast<std::size_t>(i * columns + c)]) * double(graph.y.values[static_cast<std::size_t>(graph.keys(i)[0] * columns + c)]);
            exact += product;
            size += std::abs(product);
        }
        if (!(std::abs(exact - double(graph.weights[graph.first(i)])) <= columns * 0x1p-24 * size)) return state.SkipWithError("wrong product");
    }
    for (auto _ : state) {
        graph.dots();
        benchmark::ClobberMemory();
    }
    report(state, graph);
}
void spmm(benchmark::State& state) {
    Graph graph(static_cast<index_t>(state.range(0)), static_cast<index_t>(state.range(1)));
    std::fill(graph.weights.begin(), graph.weights.end(), .5f);
    Tensor<float> out({graph.plan.queries(), columns});
    graph.sums(out);
    for (index_t i = 0; i < graph.plan.queries(); i += 101) {
        double exact = 0, size = 0;
        for (const index_t j : graph.keys(i)) {
            exact += .5 * double(graph.y.values[static_cast<std::size_t>(j * columns + 5)]);
            size += std::abs(double(graph.y.values[static_cast<std::size_t>(j * columns + 5)]));
        }
        if (!(std::abs(exact - double(out.values[static_cast<std::size_t>(i * columns + 5)])) <= double(graph.keys(i).size()) * 0x1p-24 * size)) return state.SkipWithError("wrong sum");
    }
    for (auto _ : state) {
        graph.sums(out);
        benchmark::ClobberMemory();
    }
    report(state, graph);
}

}  // namespace

BENCHMARK(sddmm)->ArgNames({"n", "r"})->ArgsProduct({{1024, 4096, 16384, 65536}, {96}})->Unit(benchmark::kMillisecond);
BENCHMARK(spmm)->ArgNames({"n", "r"})->ArgsProduct({{1024, 4096, 16384, 65536}, {96}})->Unit(benchmark::kMillisecond);

BENCHMARK_MAIN();
