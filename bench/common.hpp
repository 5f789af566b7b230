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

inline double median(std::vector<double> values) {
    if (values.empty()) return 0;
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}
inline void use_threads([[maybe_unused]] int count) {
#if defined(_OPENMP)
    omp_set_num_threads(count);
#endif
}

/// Fused multiply-adds in registers: flops a second of one thread in a burst of about half a millisecond.
template <class T = float>
double fma_burst() {
    using V = xsimd::batch<T, Arch>;
    constexpr int chains = 12;
    constexpr long rounds = 200000;
    V acc[chains];
    detail::simd::unroll<chains>([&](auto i) POLYATTN_INLINE_LAMBDA { acc[i] = V(T(i)); });
    const V a(T(.999)), b(T(.001));
    const double start = seconds();
    for (long r = 0; r < rounds; ++r) detail::simd::unroll<chains>([&](auto i) POLYATTN_INLINE_LAMBDA { acc[i] = detail::simd::multiply_add(acc[i], a, b); });
    const double time = seconds() - start;
    // Through one sum: an accumulator with an address would live in memory.
    V total(T(0));
    detail::simd::unroll<chains>([&](auto i) POLYATTN_INLINE_LAMBDA { total = total + acc[i]; });
    T sink[V::size];
    total.store_unaligned(sink);
    benchmark::DoNotOptimize(sink);
    return double(rounds) * chains * 2 * V::size / time;
}
template <class T = float>
double fma_peak(int bursts = 12) {
    std::vector<double> rates;
    for (int b = 0; b < bursts; ++b) rates.push_back(fma_burst<T>());
    return median(std::move(rates));
}

/// Bytes a second of reading a footprint again and again, one thread.
class ReadProbe {
public:
    explicit ReadProbe(std::size_t bytes) : memory_(std::max(bytes / sizeof(float) / step * step, step), 1.f) {}
    double burst() {
        const std::size_t bytes = memory_.size() * sizeof(float);
        read();  // what ran before may have taken the caches
        const int passes = static_cast<int>(std::max<std::size_t>(2, (std::size_t{16} << 20) / bytes));
        const double start = seconds();
        for (int pass = 0; pass < passes; ++pass) read();
        return double(passes) * double(bytes) / (seconds() - start);
    }
    double rate(int bursts = 9) {
        burst();
        std::vector<double> rates;
        for (int b = 0; b < bursts; ++b) rates.push_back(burst());
        return median(std::move(rates));
    }

private:
    using V = xsimd::batch<float, Arch>;
    static constexpr std::size_t step = 8 * V::size;
    void read() const {
        V acc[8];
        detail::simd::unroll<8>([&](auto u) POLYATTN_INLINE_LAMBDA { acc[u] = V(0.f); });
        for (std::size_t i = 0; i < memory_.size(); i += step)
            detail::simd::unroll<8>([&](auto u) POLYATTN_INLINE_LAMBDA { acc[u] = acc[u] + V::load_unaligned(&memory_[i + static_cast<std::size_t>(u) * V::size]); });
        V total(0.f);
        detail::simd::unroll<8>([&](auto u) POLYATTN_INLINE_LAMBDA { total = total + acc[u]; });
        float sink[V::size];
        total.store_unaligned(sink);
        benchmark::DoNotOptimize(sink);
    }
    std::vector<float> memory_;
};

/// Medians of the time of f() and of the limit that is sampled before each call.
struct Medians {
    double time, limit;
};
template <class F, class Limit>
Medians time_calls(benchmark::State& state, F&& f, Limit&& limit) {
    std::vector<double> times, limits;
    f();
    for (auto _ : state) {
        limits.push_back(limit());
        const double start = seconds();
        f();
        times.push_back(seconds() - start);
        state.SetIterationTime(times.back());
    }
    return {median(std::move(times)), median(std::move(limits))};
}

/// `share` of a limit that should reach `least`, or a `ratio` that should stay below `most`: what bench_summary prints.
inline void report_share(benchmark::State& state, double share, double least) {
    state.counters["share"] = share;
    if (least > 0) state.counters["target"] = least;
}
inline void report_ratio(benchmark::State& state, double ratio, double most) {
    state.counters["ratio"] = ratio;
    if (most > 0) state.counters["most"] = most;
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

/// Times layer.into() on one head, one thread, with plan and workspace reused: useful flops against the FMA peak.
template <class T = float, class Layer>
Medians run_forward(benchmark::State& state, const Layer& layer, index_t n, index_t d, double least = 0) {
    use_threads(1);
    const auto q = random_tensor<T>({n, d}, 1), k = random_tensor<T>({n, d}, 2), v = random_tensor<T>({n, d}, 3);
    Tensor<T> out({n, d});
    Workspace workspace;
    CallOptions options{.plan = layer.plan(n, n), .workspace = &workspace};
    layer.into(out.view(), q.view(), k.view(), v.view(), options);
    if constexpr (std::is_same_v<std::remove_cvref_t<decltype(layer.bias())>, NoBias>)
        if (const std::string wrong = check_forward(layer, *options.plan, q, k, v, out); !wrong.empty()) {
            state.SkipWithError(wrong.c_str());
            return {};
        }
    const Medians medians = time_calls(state, [&] { layer.into(out.view(), q.view(), k.view(), v.view(), options); }, fma_burst<T>);
    const double flops = 2. * d * double(options.plan->count()) * double(1 + layer.recursion().hops.size());
    state.counters["GF/s"] = flops / medians.time / 1e9;
    state.counters["peak_GF/s"] = medians.limit / 1e9;
    state.counters["scratch_MB"] = double(workspace.capacity()) / 1e6;
    report_share(state, flops / medians.time / medians.limit, least);
    return medians;
}

}  // namespace bench
