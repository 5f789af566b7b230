// Bitwise the same for 1, 2 and 3 threads, forward and backward; concurrent calls on one layer.
#include "support/layers.hpp"
#include "support/patterns.hpp"
#include "support/random.hpp"

#include <polyattn/policy/bias/bias.hpp>

#include <doctest/doctest.h>

#include <thread>

using namespace polyattn;

namespace {

void set_threads([[maybe_unused]] int count) {
#if defined(_OPENMP)
    omp_set_num_threads(count);
#endif
}

template <class Layer>
std::vector<AlignedVector<float>> run(const Layer& layer, const CallOptions& options, const Tensor<float>& q, const Tensor<float>& k, const Tensor<float>& v) {
    const auto [out, saved] = layer.forward(q.view(), k.view(), v.view(), options);
    const auto gradient = layer.backward(saved, q.view());
    return {layer(q.view(), k.view(), v.view(), options).values, out.values, gradient.q.values, gradient.k.values, gradient.v.values,
            AlignedVector<float>(gradient.bias.begin(), gradient.bias.end())};
}

}  // namespace

TEST_CASE("one head split over threads, many heads side by side: the same bits") {
    POLYATTN_RANDOM(random);
    const int before = worker_count();
    struct Size {
        index_t n, heads, key_heads, dim;
    };
    for (const Size size : {Size{5000, 1, 1, 24}, Size{300, 1, 1, 64}, Size{300, 2, 1, 8}, Size{300, 6, 3, 8}, Size{70, 5, 5, 8}}) {
        const Plan plans[] = {LocalGlobalRandom{.window = 16, .globals = 5, .randoms = 4, .seed = random.seed()}.plan(size.n, size.n), CausalSlidingWindow{.window = 33}.plan(size.n, size.n),
                              Union{Strided{.stride = 70}, SlidingWindow{.window = 6, .dilation = 3}}.plan(size.n, size.n),
                              size.n == 300 ? Dense{}.plan(size.n, size.n) : BlockLocal{.block = 50}.plan(size.n, size.n)};
        // Two hops of one head, with and without edges: worth sharing.
        if (size.n == 5000) CHECK(detail::Work{.flops = 2. * static_cast<double>(plans[0].count()) * (3 * size.dim), .meetings = 4}.gains_from_threads(1, 2));
        for (const Plan& plan : plans)
            for (const std::size_t budget : {std::size_t{0}, std::size_t{1} << 28}) {
                const auto q = random.tensor<float>({1, size.heads, size.n, size.dim}), k = random.tensor<float>({1, size.key_heads, size.n, size.dim}), v = random.tensor<float>({1, size.key_heads, size.n, size.dim});
                CallOptions options;
                options.plan = plan;
                options.weight_budget = budget;
                options.dropout = {.weights = .1, .values = .1};
                RelativePosition bias{.heads = size.heads, .reach = 3, .table = std::vector<double>(static_cast<std::size_t>(size.heads) * 7, .25)};
                const Attention<AnyDiffusion, RelativePosition> layer{AnyDiffusion{PPR<2>{}.recursion()}, bias};
                set_threads(1);
                const auto one = run(layer, options, q, k, v);
                for (const int threads : {2, size.n < 5000 ? 8 : 3}) {
                    set_threads(threads);
                    CHECK(run(layer, options, q, k, v) == one);
                }
                options.dropout = {};
                const Fast single{AnyDiffusion{NoDiffusion{}.recursion()}};
                set_threads(1);
                const auto plain = run(single, options, q, k, v);
                set_threads(3);
                CHECK(run(single, options, q, k, v) == plain);
            }
    }
    set_threads(before);
}

TEST_CASE("two heads, one after the other on eight threads: the same bits") {
    POLYATTN_RANDOM(random);
    const int before = worker_count();
    const index_t n = 1500, dim = 96;
    CallOptions options;
    options.plan = LocalGlobalRandom{.window = 16, .globals = 5, .randoms = 4, .seed = random.seed()}.plan(n, n);
    REQUIRE(detail::Work{.flops = 2. * static_cast<double>(options.plan->count()) * (3 * dim), .meetings = 4}.gains_from_threads(2, 8));
    const auto q = random.tensor<float>({1, 2, n, dim}), k = random.tensor<float>({1, 2, n, dim}), v = random.tensor<float>({1, 2, n, dim});
    const Fast layer{AnyDiffusion{PPR<2>{}.recursion()}};
    set_threads(1);
    const auto one = run(layer, options, q, k, v);
    set_threads(8);
    CHECK(run(layer, options, q, k, v) == one);
    set_threads(before);
}

TEST_CASE("heads that are fewer than threads share these only where that pays") {
    using detail::Work;
    CHECK(Work{.flops = 1e9, .meetings = 1}.gains_from_threads(1, 2));
    CHECK_FALSE(Work{.flops = 1e6, .meetings = 1}.gains_from_threads(1, 2));
    CHECK_FALSE(Work{.flops = 1e7, .meetings = 10}.gains_from_threads(1, 8));
    CHECK_FALSE(Work{.flops = 1e7, .meetings = 1}.gains_from_threads(7, 8));  // side by side all but one work
    CHECK_FALSE(Work{.flops = 1e12, .meetings = Work::serial}.gains_from_threads(1, 8));
    CHECK_FALSE(Work{.flops = 1e12, .meetings = Work::serial}.times(3).gains_from_threads(1, 8));
    // Alone on one thread, whatever a parallel loop inside would take otherwise.
    const detail::OneThread alone;
    CHECK(worker_count() == 1);
}

TEST_CASE("one layer called from several threads at the same time") {
    POLYATTN_RANDOM(random);
    const Attention<LocalGlobalRandom, PPR<2>> layer{LocalGlobalRandom{.window = 16, .globals = 5, .randoms = 4}};
    std::vector<Tensor<float>> inputs, outputs(8);
    for (index_t t = 0; t < 8; ++t) inputs.push_back(random.tensor<float>({2, 100 + t % 3, 8}));
    std::vector<std::thread> threads;
    for (std::size_t t = 0; t < 8; ++t) threads.emplace_back([&, t] { outputs[t] = layer(std::as_const(inputs[t]).view(), std::as_const(inputs[t]).view(), std::as_const(inputs[t]).view()); });
    for (auto& thread : threads) thread.join();
    for (std::size_t t = 0; t < 8; ++t) CHECK(layer(inputs[t].view(), inputs[t].view(), inputs[t].view()).values == outputs[t].values);
}

TEST_CASE("equal plans give equal bits, wherever their lists lie in memory") {
    POLYATTN_RANDOM(random);
    const index_t n = 256;
    const auto q = random.tensor<float>({1, 1, n, 8});
    const Fast layer{AnyDiffusion{PPR<2>{}.recursion()}};
    std::vector<std::vector<AlignedVector<float>>> results;
    std::vector<std::vector<char>> noise;
    for (int repeat = 0; repeat < 6; ++repeat) {
        noise.emplace_back(static_cast<std::size_t>(1 + random.below(5000)));  // moves the heap
        CallOptions options;
        options.plan = Longformer{.window = 16, .dilation = 2, .tokens = {0}}.plan(n, n);
        results.push_back(run(layer, options, q, q, q));
        CHECK(results.back() == results.front());
    }
    // Rows of equal lists meet in one group: an intersection of patterns without shared rows has none.
    const Plan both = intersect(LocalGlobalRandom{.window = 16, .globals = 5, .randoms = 4}.plan(n, n), Fixed{.stride = 16, .summary = 4}.plan(n, n));
    CHECK_FALSE(both.lowered<detail::simd::Schedule>().has_shared_rows());
}
