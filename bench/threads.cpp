// Two threads against one, beside the scaling that fused multiply-adds show at the same moment.
#include "common.hpp"

using namespace bench;

namespace {

/// How much faster two threads do twice the multiply-adds.
double probe() {
    const double one = fma_burst<float>();
    double both = 0;
#if defined(_OPENMP)
    use_threads(2);
    double start = 0, stop = 0;
#pragma omp parallel
    {
#pragma omp barrier
#pragma omp master
        start = seconds();
        for (int b = 0; b < 3; ++b) fma_burst<float>();
#pragma omp barrier
#pragma omp master
        stop = seconds();
    }
    both = 2 * 3 * 12 * 2. * 200000 * xsimd::batch<float, Arch>::size / (stop - start);
    use_threads(1);
#endif
    return both / one;
}

template <class Layer>
void scaling(benchmark::State& state, const Layer& layer, offset_t heads, index_t n, double least, bool of_probe = true) {
    const auto q = random_tensor({heads, n, 64}, 1), k = random_tensor({heads, n, 64}, 2), v = random_tensor({heads, n, 64}, 3);
    Tensor<float> out({heads, n, 64}), two({heads, n, 64});
    Workspace workspace;
    const CallOptions options{.plan = layer.plan(n, n), .workspace = &workspace};
    const auto timed = [&](int threads, Tensor<float>& to) {
        use_threads(threads);
        const double start = seconds();
        layer.into(to.view(), q.view(), k.view(), v.view(), options);
        return seconds() - start;
    };
    timed(1, out);
    timed(2, two);
    if (std::memcmp(out.data(), two.data(), out.values.size() * sizeof(float)) != 0) return state.SkipWithError("two threads give other bits than one");
    std::vector<double> gains;
    for (auto _ : state) {
        const double one = timed(1, out), both = timed(2, two);
        gains.push_back(one / both / (of_probe ? probe() : 1));
        state.SetIterationTime(both);
    }
    report_share(state, median(gains), least);
}

void eight_heads(benchmark::State& state) { scaling(state, Attention<>{}, 8, static_cast<index_t>(state.range(0)), .9); }
void one_head(benchmark::State& state) { scaling(state, Attention<>{}, 1, static_cast<index_t>(state.range(0)), .8); }
void one_head_diffuser(benchmark::State& state) { scaling(state, Attention<LocalGlobalRandom, PPR<5>>{}, 1, static_cast<index_t>(state.range(0)), .8); }
/// One head too small to be shared must not lose by the second thread.
void small_head_diffuser(benchmark::State& state) {
    scaling(state, Attention<LocalGlobalRandom, PPR<5>>{LocalGlobalRandom{.window = 32, .globals = 8, .randoms = 8}}, 1, static_cast<index_t>(state.range(0)), .9, false);
}

}  // namespace

BENCHMARK(eight_heads)->ArgNames({"n"})->Arg(1024)->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK(one_head)->ArgNames({"n"})->Arg(1024)->Arg(4096)->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK(one_head_diffuser)->ArgNames({"n"})->Arg(1024)->Arg(4096)->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK(small_head_diffuser)->ArgNames({"n"})->Arg(128)->Arg(512)->UseManualTime()->Unit(benchmark::kMillisecond);

BENCHMARK_MAIN();
