#pragma once
// Limits measured in the same process, random tensors, and the check that comes before any timing.

#include <polyattn/polyattn.hpp>

#include <benchmark/benchmark.h>

#include <chrono>
#include <random>

namespace bench {

using namespace polyattn;
using Arch = xsimd::default_arch;

inline double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// Fused multiply-adds in registers, flops a second of one thread: the best of a few bursts.
template <class T = float>
double measure_peak() {
    using V = xsimd::batch<T, Arch>;
    constexpr int chains = 12;
    double best = 0;
    for (int burst = 0; burst < 12; ++burst) {
        V acc[chains];
        for (int i = 0; i < chains; ++i) acc[i] = V(T(i));
        const V a(T(.999)), b(T(.001));
        constexpr long rounds = 200000;
        const double start = seconds();
        for (long r = 0; r < rounds; ++r) detail::simd::unroll<chains>([&](auto i) POLYATTN_INLINE_LAMBDA { acc[i] = detail::simd::multiply_add(acc[i], a, b); });
        const double time = seconds() - start;
        T sink[V::size];
        for (V& v : acc) {
            v.store_unaligned(sink);
            benchmark::DoNotOptimize(sink);
        }
        best = std::max(best, double(rounds) * chains * 2 * V::size / time);
    }
    return best;
}
/// Measured anew for each benchmark, since clocks move.
template <class T = float>
double peak() { return measure_peak<T>(); }

/// Bytes a second of reading `bytes` of memory again and again, one thread.
inline double read_rate(std::size_t bytes) {
    using V = xsimd::batch<float, Arch>;
    constexpr std::size_t step = 8 * V::size;
    std::vector<float> memory(std::max(bytes / sizeof(float), step), 1.f);
    const std::size_t count = memory.size() / step * step;
    double best = 0;
    for (int burst = 0; burst < 5; ++burst) {
        const int passes = static_cast<int>(std::max<std::size_t>(1, (std::size_t{64} << 20) / bytes));
        V acc[8];
        for (V& v : acc) v = V(0.f);
        const double start = seconds();
        for (int pass = 0; pass < passes; ++pass) {
            for (std::size_t i = 0; i < count; i += step)
                detail::simd::unroll<8>([&](auto u) POLYATTN_INLINE_LAMBDA { acc[u] = acc[u] + V::load_unaligned(&memory[i + static_cast<std::size_t>(u) * V::size]); });
            benchmark::ClobberMemory();
        }
        const double time = seconds() - start;
        for (V& v : acc) benchmark::DoNotOptimize(v);
        best = std::max(best, double(passes) * double(count) * sizeof(float) / time);
    }
    return best;
}

template <class T = float>
Tensor<T> random_tensor(std::vector<offset_t> shape, unsigned seed) {
    Tensor<T> tensor(std::move(shape));
    std::mt19937 generator(seed);
    std::normal_distribution<T> normal;
    for (T& value : tensor.values) value = normal(generator);
    return tensor;
}

/// Empty if `rows` sampled rows of the layer's output equal attention computed in double along the plan, hop by hop where the
/// plan is small enough to do all rows; else what is wrong. Tolerance: the bound of docs/guarantees.md for normal inputs.
template <class T, class Layer>
std::string check_forward(const Layer& layer, const Plan& plan, const Tensor<T>& q, const Tensor<T>& k, const Tensor<T>& v, const Tensor<T>& out) {
    const index_t n = plan.queries(), d = static_cast<index_t>(q.shape[1]), e = static_cast<index_t>(v.shape[1]);
    const auto& recursion = layer.recursion();
    if (recursion.hops.size() > 1 && plan.count() > 3'000'000) return {};  // the small case of the same program checks all hops
    const index_t stride = recursion.hops.size() > 1 ? 1 : std::max(index_t{1}, n / 97);
    const double u = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;
    std::vector<double> z(v.values.begin(), v.values.end());
    double largest = 0, delta = 0, keys = 0;
    for (const double value : z) largest = std::max(largest, std::abs(value));
    for (const Hop& hop : recursion.hops) {
        std::vector<double> next(z.size(), 0);
        for (index_t i = 0; i < n; i += stride) {
            std::vector<std::pair<index_t, double>> row;
            double sum = 0;
            plan.for_each_key(i, [&](index_t j) {
                double dot = 0, size = 0;
                for (index_t c = 0; c < d; ++c) {
                    const double product = double(q.values[static_cast<std::size_t>(i * offset_t{d} + c)]) * double(k.values[static_cast<std::size_t>(j * offset_t{d} + c)]);
                    dot += product;
                    size += std::abs(product);
                }
                delta = std::max(delta, (d + 3) * u * size / std::sqrt(double(d)));
                row.emplace_back(j, std::exp(dot / std::sqrt(double(d))));
                sum += row.back().second;
            });
            keys = std::max(keys, double(row.size()));
            for (const auto& [j, weight] : row)
                for (index_t c = 0; c < e; ++c) next[static_cast<std::size_t>(i * offset_t{e} + c)] += hop.walk * weight / sum * z[static_cast<std::size_t>(j * offset_t{e} + c)];
            for (index_t c = 0; c < e; ++c) next[static_cast<std::size_t>(i * offset_t{e} + c)] += hop.teleport * double(v.values[static_cast<std::size_t>(i * offset_t{e} + c)]);
        }
        z = std::move(next);
    }
    const double bound = largest * (2 * delta + 8 * (1 + keys) * u) * double(recursion.hops.size() + 1);
    for (index_t i = 0; i < n; i += stride)
        for (index_t c = 0; c < e; ++c) {
            const auto at = static_cast<std::size_t>(i * offset_t{e} + c);
            if (!(std::abs(z[at] - double(out.values[at])) <= bound)) return "row " + std::to_string(i) + " is wrong";
        }
    return {};
}

/// Times layer.into() on one head, one call an iteration, with plan and workspace reused. `flops` useful ones a call.
template <class T = float, class Layer>
void run_forward(benchmark::State& state, const Layer& layer, index_t n, index_t d) {
#if defined(_OPENMP)
    omp_set_num_threads(1);
#endif
    const auto q = random_tensor<T>({n, d}, 1), k = random_tensor<T>({n, d}, 2), v = random_tensor<T>({n, d}, 3);
    Tensor<T> out({n, d});
    Workspace workspace;
    CallOptions options{.plan = layer.plan(n, n), .workspace = &workspace};
    layer.into(out.view(), q.view(), k.view(), v.view(), options);
    if (const std::string wrong = check_forward(layer, *options.plan, q, k, v, out); !wrong.empty()) return state.SkipWithError(wrong.c_str());
    const double limit = peak<T>();
    for (auto _ : state) layer.into(out.view(), q.view(), k.view(), v.view(), options);
    const double flops = 2. * d * double(options.plan->count()) * double(1 + layer.recursion().hops.size());
    state.counters["GF/s"] = benchmark::Counter(flops / 1e9, benchmark::Counter::kIsIterationInvariantRate);
    state.counters["of_peak"] = benchmark::Counter(flops / limit, benchmark::Counter::kIsIterationInvariantRate);
    state.counters["peak_GF/s"] = limit / 1e9;
    state.counters["scratch_MB"] = double(workspace.capacity()) / 1e6;
}

}  // namespace bench
