// The vector exponential of the softmax.
#include "common.hpp"

using namespace bench;

template <class T>
void pow2_rate(benchmark::State& state) {
    using V = xsimd::batch<T, Arch>;
    std::vector<T> x(4096), y(4096);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<T>(-30 + 40. * double(i) / double(x.size()));
    const auto run = [&] {
        for (std::size_t i = 0; i < x.size(); i += V::size) detail::simd::pow2(V::load_unaligned(&x[i])).store_unaligned(&y[i]);
        benchmark::ClobberMemory();
    };
    run();
    for (std::size_t i = 0; i < x.size(); ++i)
        if (!(std::abs(double(y[i]) / std::exp2(double(x[i])) - 1) < (sizeof(T) == 4 ? 2e-7 : 1e-15))) return state.SkipWithError("wrong value");
    const double limit = fma_peak<T>();
    for (auto _ : state) run();
    state.counters["G/s"] = benchmark::Counter(double(x.size()) / 1e9, benchmark::Counter::kIsIterationInvariantRate);
    // As a share of the multiply-adds that the polynomial alone needs.
    constexpr double operations = 2 * (std::size(detail::simd::exp2_coefficients<T>) - 1);
    state.counters["of_peak"] = benchmark::Counter(operations * double(x.size()) / limit, benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(pow2_rate<float>)->Name("pow2/float");
BENCHMARK(pow2_rate<double>)->Name("pow2/double");

BENCHMARK_MAIN();
