// The CUDA backend against a roofline that is measured beside each case: fused multiply-adds in registers, tensor cores in registers, and copying as many
// bytes as the case's tensors have, past the first-level cache.
//
// With n tokens, d columns, s bytes a number, P pairs in all, E of them edges, and K hops, a head counts
//     forward            2 d P (1 + K) flops,  s d n (4 + 3 (K - 1)) + E (1 + K) (s d + 8) bytes
//     backward           2 d P (3 + 2 K),      s d n (7 + 3 (K - 1)) + E (3 + 2 K) (s d + 8)
//     scores, hop        2 d E,                s d n + E (s d + 8)
//     kernel attention   4 n d^2 forward, 8 n d^2 backward, s d n times 4 and 7
// that is: each tensor once, each further hop three times n rows, and for an edge and stage one gathered row, its token and its weight. What kernels do
// beyond that (scores again for each hop, rows of tiles again for each group, masked pairs) is not counted. Flops on tiles of half are held against tensor
// cores, all others against multiply-adds; the share is that of the slowest of the three limits, which the label and `limit` name: 0 fma, 1 tensor, 2 memory.
#include <polyattn/backend/reference/attention.hpp>
#include <polyattn/polyattn_cuda.cuh>

#include <benchmark/benchmark.h>

#include <cmath>
#include <random>
#include <set>

using namespace polyattn;

namespace {

constexpr index_t d = 64;
constexpr unsigned probe_threads = 256;

struct Timer {
    Timer() {
        detail::cuda::check_cuda(cudaEventCreate(&begin), "cudaEventCreate");
        detail::cuda::check_cuda(cudaEventCreate(&end), "cudaEventCreate");
    }
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;
    ~Timer() {
        cudaEventDestroy(begin);
        cudaEventDestroy(end);
    }
    /// Seconds of what f puts on the default stream.
    template <class F>
    double operator()(F&& f) const {
        detail::cuda::check_cuda(cudaEventRecord(begin), "cudaEventRecord");
        f();
        detail::cuda::check_cuda(cudaEventRecord(end), "cudaEventRecord");
        detail::cuda::check_cuda(cudaEventSynchronize(end), "cudaEventSynchronize");
        float milliseconds = 0;
        detail::cuda::check_cuda(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
        return std::max(double(milliseconds), 1e-6) / 1e3;
    }
    cudaEvent_t begin = nullptr, end = nullptr;
};

double median(std::vector<double> values) {
    if (values.empty()) return 0;
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

constexpr int fma_chains = 8, tensor_chains = 8;

__global__ void __launch_bounds__(probe_threads) multiply_adds(float* sink, int rounds) {
    float x[fma_chains];
#pragma unroll
    for (int i = 0; i < fma_chains; ++i) x[i] = static_cast<float>(threadIdx.x + static_cast<unsigned>(i));
#pragma unroll 8
    for (int r = 0; r < rounds; ++r)
#pragma unroll
        for (int i = 0; i < fma_chains; ++i) x[i] = fmaf(x[i], .999f, .001f);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < fma_chains; ++i) sum += x[i];
    sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

__global__ void __launch_bounds__(probe_threads) tensor_products(float* sink, int rounds) {
    float x[tensor_chains][4] = {};
    const unsigned half_pair = 0x2c002c00u + threadIdx.x, a[4] = {half_pair, half_pair + 1, half_pair + 2, half_pair + 3};
#pragma unroll 4
    for (int r = 0; r < rounds; ++r)
#pragma unroll
        for (int i = 0; i < tensor_chains; ++i) detail::cuda::multiply_fragments<__half>(x[i], a, half_pair, half_pair + 1);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < tensor_chains; ++i) sum += x[i][0] + x[i][1] + x[i][2] + x[i][3];
    sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

/// From one half to the other and back by turns; an element is always the same thread's.
__global__ void __launch_bounds__(probe_threads) copies(uint4* first, uint4* second, offset_t count, int rounds) {
    constexpr int unroll = 4;
    const offset_t threads = offset_t{gridDim.x} * blockDim.x, own = offset_t{blockIdx.x} * blockDim.x + threadIdx.x;
    for (int r = 0; r < rounds; ++r) {
        const uint4* const from = r % 2 == 0 ? first : second;
        uint4* const to = r % 2 == 0 ? second : first;
        for (offset_t begin = own; begin < count; begin += unroll * threads) {
            uint4 value[unroll];
#pragma unroll
            for (int u = 0; u < unroll; ++u)
                if (begin + u * threads < count) value[u] = __ldcg(from + begin + u * threads);
#pragma unroll
            for (int u = 0; u < unroll; ++u)
                if (begin + u * threads < count) __stcg(to + begin + u * threads, value[u]);
        }
    }
}

struct Limits {
    double fma, tensor, copy;  // a second
};

/// Work a second of run(rounds), `work` a round: as many rounds as take a millisecond, median of five.
template <class F>
double rate(const Timer& timer, double work, F&& run) {
    int rounds = 2;
    run(rounds);
    const auto time = [&] { return timer([&] { run(rounds); }); };
    while (std::min(time(), time()) < 1e-3 && rounds < 1 << 28) rounds *= 2;
    std::vector<double> rates;
    for (int burst = 0; burst < 5; ++burst) rates.push_back(work * rounds / time());
    return median(std::move(rates));
}

Limits measure_limits(const Timer& timer, double footprint) {
    int device = 0, multiprocessors = 1;
    detail::cuda::check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    detail::cuda::check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    const unsigned blocks = 4 * static_cast<unsigned>(multiprocessors);
    const double threads = double(blocks) * probe_threads;
    const CudaTensor<float> sink({1, static_cast<offset_t>(threads)});
    const auto count = std::max<offset_t>(1, static_cast<offset_t>(footprint / 2 / sizeof(uint4)));
    detail::cuda::DeviceMemory memory(2 * static_cast<std::size_t>(count) * sizeof(uint4));
    detail::cuda::check_cuda(cudaMemset(memory.data(), 0, memory.bytes()), "cudaMemset");
    uint4* const first = static_cast<uint4*>(memory.data());
    Limits limits{};
    limits.fma = rate(timer, 2 * fma_chains * threads, [&](int rounds) { detail::cuda::launch("multiply_adds", multiply_adds, dim3(blocks), probe_threads, 0, nullptr, sink.data(), rounds); });
    const double of_products = 2. * 16 * 8 * 16 * tensor_chains * threads / 32;  // a round
    limits.tensor = rate(timer, of_products, [&](int rounds) { detail::cuda::launch("tensor_products", tensor_products, dim3(blocks), probe_threads, 0, nullptr, sink.data(), rounds); });
    limits.copy = rate(timer, double(memory.bytes()), [&](int rounds) { detail::cuda::launch("copies", copies, dim3(blocks), probe_threads, 0, nullptr, first, first + count, count, rounds); });
    return limits;
}

/// What all heads of a call have to do.
struct Work {
    double fma_flops = 0, tensor_flops = 0, bytes = 0;
    double footprint = 0;  // bytes of memory that these are
};

template <class T>
Work attention_work(const Plan& plan, std::size_t hops, index_t heads, bool backward) {
    const double n = plan.queries(), edges = double(plan.edges().count()), tiles = double(plan.count()) - edges, stages = backward ? 3 + 2 * double(hops) : 1 + double(hops);
    const double of_tiles = 2 * d * tiles * stages, of_edges = 2 * d * edges * stages, rows = double(sizeof(T)) * d * n * ((backward ? 7 : 4) + 3 * (double(hops) - 1));
    const bool tensor = detail::cuda::is_narrow<T>;
    return {heads * (of_edges + (tensor ? 0 : of_tiles)), heads * (tensor ? of_tiles : 0), heads * (rows + edges * stages * (sizeof(T) * d + 8.)), heads * (rows + 4 * edges) + 4 * edges};
}
Work kernel_work(index_t n, index_t heads, bool backward) {
    const double bytes = (backward ? 7. : 4.) * sizeof(float) * d * n * heads;
    return {(backward ? 8. : 4.) * n * d * d * heads, 0, bytes, bytes};
}

template <class F>
void time_case(benchmark::State& state, const Work& work, F&& run) {
    const Timer timer;
    const Limits limits = measure_limits(timer, work.footprint);
    run();
    std::vector<double> times;
    for (auto _ : state) {
        times.push_back(timer(run));
        state.SetIterationTime(times.back());
    }
    const double time = median(std::move(times)), flops = work.fma_flops + work.tensor_flops;
    const std::array<double, 3> least{work.fma_flops / limits.fma, work.tensor_flops / limits.tensor, work.bytes / limits.copy};
    const auto binding = std::max_element(least.begin(), least.end());
    state.counters["Gflop"] = flops / 1e9;
    state.counters["MB"] = work.bytes / 1e6;
    state.counters["GF/s"] = flops / time / 1e9;
    state.counters["GB/s"] = work.bytes / time / 1e9;
    state.counters["fma_GF/s"] = limits.fma / 1e9;
    state.counters["tensor_GF/s"] = limits.tensor / 1e9;
    state.counters["copy_GB/s"] = limits.copy / 1e9;
    state.counters["share"] = *binding / time;
    state.counters["limit"] = double(binding - least.begin());
    state.SetLabel(std::array{"fma", "tensor", "memory"}[static_cast<std::size_t>(binding - least.begin())]);
}

/// [1, heads, n, d] on the host and on the device.
template <class T>
struct Random {
    Random(index_t heads, index_t n, unsigned seed) : host({1, heads, n, d}) {
        std::mt19937 generator(seed);
        std::normal_distribution<float> normal;
        for (T& value : host.values) value = static_cast<T>(normal(generator));
        device = CudaTensor<T>(host.data(), host.shape);
    }
    Tensor<T> host;
    CudaTensor<T> device;
};
template <class T>
Tensor<T> to_host(const CudaTensor<T>& from) {
    Tensor<T> to(from.shape());
    from.copy_to(to.data());
    return to;
}
/// Not numbers, so that what a kernel forgets to write is found.
template <class T>
void spoil(const CudaTensor<T>& tensor) {
    detail::cuda::check_cuda(cudaMemset(tensor.data(), 0xff, static_cast<std::size_t>(tensor.size()) * sizeof(T)), "cudaMemset");
}

/// How far results are from those expected, as a share of the largest number that is expected.
class Difference {
public:
    void add(double got, double expected) {
        const double distance = std::abs(got - expected);
        if (!(distance < 1e300)) finite_ = false;
        else worst_ = std::max(worst_, distance);
        largest_ = std::max(largest_, std::abs(expected));
    }
    bool below(double bound) const { return finite_ && largest_ > 0 && worst_ <= bound * largest_; }

private:
    double worst_ = 0, largest_ = 0;
    bool finite_ = true;
};
template <class T>
constexpr double tolerance = detail::cuda::is_narrow<T> ? 5e-3 : 1e-4;

/// Queries that are checked, those of one head: some from the first to the last for one hop, which the plan of these alone defines; all for several.
struct Sample {
    std::vector<index_t> rows;
    Plan plan;

    Sample(const Plan& whole, bool all) {
        const index_t n = whole.queries(), count = all ? n : std::min<index_t>(n, 61);
        for (index_t r = 0; r < count; ++r) rows.push_back(count == 1 ? 0 : static_cast<index_t>(offset_t{r} * (n - 1) / (count - 1)));
        if (all) {
            plan = whole;
            return;
        }
        Edges edges;
        edges.offsets.push_back(0);
        for (const index_t row : rows) {
            const auto first = static_cast<std::ptrdiff_t>(edges.keys.size());
            whole.for_each_key(row, [&](index_t key) { edges.keys.push_back(key); });
            std::sort(edges.keys.begin() + first, edges.keys.end());
            edges.offsets.push_back(edges.count());
        }
        plan = PlanBuilder(static_cast<index_t>(rows.size()), whole.keys()).edges(std::move(edges)).build();
    }
    template <class T>
    Tensor<double> of(const Tensor<T>& tensor, index_t head) const {
        Tensor<double> to({static_cast<offset_t>(rows.size()), d});
        for (std::size_t r = 0; r < rows.size(); ++r)
            for (index_t c = 0; c < d; ++c) to.values[r * d + static_cast<std::size_t>(c)] = static_cast<float>(tensor.view().head(0, head)(rows[r], c));
        return to;
    }
};
template <class T>
Tensor<double> whole_head(const Tensor<T>& tensor, index_t head) {
    const auto from = tensor.view().head(0, head);
    Tensor<double> to({from.rows, d});
    for (index_t i = 0; i < from.rows; ++i)
        for (index_t c = 0; c < d; ++c) to.values[static_cast<std::size_t>(i * d + c)] = static_cast<float>(from(i, c));
    return to;
}

enum class Scores { softmax, kernel, causal_kernel };

/// f(what the backend Reference takes of one head): sampled queries, all keys.
template <Scores scores, class T, class F>
void with_reference(const Sample& sample, const Recursion& recursion, index_t head, const Tensor<T>& q, const Tensor<T>& k, const Tensor<T>& v, F&& f) {
    const Tensor<double> q_head = sample.of(q, head), k_head = whole_head(k, head), v_head = whole_head(v, head);
    const auto rows = [](const Tensor<double>& tensor) { return tensor.view().head(0, 0); };
    const index_t queries = sample.plan.queries(), keys = sample.plan.keys();
    if constexpr (scores == Scores::softmax) {
        const NoBias none;
        f(detail::Head<double, NoBias>{rows(q_head), rows(k_head), rows(v_head), &sample.plan, &recursion, &none, 1 / std::sqrt(double(d)), 0, head, queries, keys, {}, 0});
    } else {
        const ReLU map;
        f(detail::KernelHead<double, ReLU>{rows(q_head), rows(k_head), rows(v_head), &sample.plan, &recursion, &map,
                                               detail::ZeroRow::epsilon, AddEpsilon{}.epsilon, scores == Scores::causal_kernel, 0, head, queries, keys, {}});
    }
}

std::vector<index_t> checked_heads(index_t heads, bool all_rows) {
    if (heads == 1 || all_rows) return {heads - 1};
    return {0, heads - 1};
}

template <Scores scores, class T>
std::string check_forward(const Plan& plan, const Recursion& recursion, const Tensor<T>& q, const Tensor<T>& k, const Tensor<T>& v, const Tensor<T>& out) {
    const bool all = recursion.hops.size() > 1;
    const Sample sample(plan, all);
    for (const index_t head : checked_heads(static_cast<index_t>(q.shape[1]), all)) {
        const Tensor<double> got = sample.of(out, head);
        Tensor<double> expected(got.shape);
        with_reference<scores>(sample, recursion, head, q, k, v, [&](const auto& reference) {
            Workspace workspace;
            workspace.prepare(1);
            detail::Workers workers(workspace, 0, 1);
            detail::reference::forward(reference, detail::HeadResult<double>{expected.view().head(0, 0)}, workers);
        });
        Difference difference;
        for (std::size_t i = 0; i < got.values.size(); ++i) difference.add(got.values[i], expected.values[i]);
        if (!difference.below(tolerance<T>)) return "wrong output of head " + std::to_string(head);
    }
    return {};
}

/// `d_out` is 0 except in the sample's rows, so the gradients are those of the sample alone.
template <Scores scores>
std::string check_backward(const Sample& sample, const Recursion& recursion, const Tensor<float>& q, const Tensor<float>& k, const Tensor<float>& v, const Tensor<float>& d_out,
                           const CudaGradients<float>& gradients) {
    const Tensor<float> got_q = to_host(gradients.q), got_k = to_host(gradients.k), got_v = to_host(gradients.v);
    const index_t n = static_cast<index_t>(q.shape[2]);
    for (const index_t head : checked_heads(static_cast<index_t>(q.shape[1]), recursion.hops.size() > 1)) {
        const Tensor<double> d_rows = sample.of(d_out, head);
        Tensor<double> d_q(d_rows.shape), d_k({n, d}), d_v({n, d}), all_d_q({n, d});
        with_reference<scores>(sample, recursion, head, q, k, v, [&](const auto& reference) {
            Workspace workspace;
            workspace.prepare(1);
            detail::Workers workers(workspace, 0, 1);
            const detail::HeadGradient<double> gradient{d_rows.view().head(0, 0), nullptr, nullptr, nullptr, d_q.view().head(0, 0), d_k.view().head(0, 0), d_v.view().head(0, 0), false, {}};
            detail::reference::backward(reference, gradient, workers);
        });
        for (std::size_t r = 0; r < sample.rows.size(); ++r) std::copy_n(d_q.data() + r * d, d, all_d_q.data() + offset_t{sample.rows[r]} * d);
        const auto differs = [&](const Tensor<float>& got, const Tensor<double>& expected) {
            const Tensor<double> own = whole_head(got, head);
            Difference difference;
            for (std::size_t i = 0; i < own.values.size(); ++i) difference.add(own.values[i], expected.values[i]);
            return !difference.below(tolerance<float>);
        };
        if (differs(got_q, all_d_q)) return "wrong gradient of q of head " + std::to_string(head);
        if (differs(got_k, d_k)) return "wrong gradient of k of head " + std::to_string(head);
        if (differs(got_v, d_v)) return "wrong gradient of v of head " + std::to_string(head);
    }
    return {};
}

/// What holds for gradients of all rows: scores are homogeneous in q and in k alike, so q . dq = k . dk; the output is linear in v, so v . dv = out . d_out.
std::string check_sums(const Tensor<float>& q, const Tensor<float>& k, const Tensor<float>& v, const Tensor<float>& out, const Tensor<float>& d_out, const CudaGradients<float>& gradients) {
    struct Sums {
        double sum = 0, size = 0;
    };
    const auto product = [](const Tensor<float>& a, const Tensor<float>& b) {
        Sums sums;
        for (std::size_t i = 0; i < a.values.size(); ++i) {
            const double term = double(a.values[i]) * double(b.values[i]);
            sums.sum += term;
            sums.size += std::abs(term);
        }
        return sums;
    };
    const auto differ = [](const Sums& a, const Sums& b) { return !(a.size > 0 && b.size > 0 && std::abs(a.sum - b.sum) <= tolerance<float> * std::max(a.size, b.size)); };
    if (differ(product(q, to_host(gradients.q)), product(k, to_host(gradients.k)))) return "gradients of q and k disagree";
    if (differ(product(v, to_host(gradients.v)), product(out, d_out))) return "the gradient of v disagrees with the output";
    return {};
}

/// Google Benchmark calls a case several times, with more iterations each: is this the first time?
template <class Layer>
bool first_call(const benchmark::State& state, int kind) {
    static std::set<std::array<std::int64_t, 3>> seen;
    return seen.insert({kind, state.range(0), state.range(1)}).second;
}

int failures = 0;
/// The case's function, with exceptions and wrong results reported.
template <class F>
void guarded(benchmark::State& state, F&& f) {
    const auto fail = [&](const std::string& what) {
        ++failures;
        state.SkipWithError(what.c_str());
    };
    try {
        if (const std::string wrong = f(); !wrong.empty()) fail(wrong);
    } catch (const std::exception& error) {
        fail(error.what());
    }
}

template <Scores scores, class T, class Layer>
void forward(benchmark::State& state, const Layer& layer) {
    guarded(state, [&]() -> std::string {
        const auto n = static_cast<index_t>(state.range(0)), heads = static_cast<index_t>(state.range(1));
        const Random<T> q(heads, n, 1), k(heads, n, 2), v(heads, n, 3);
        const CudaTensor<T> out(q.host.shape);
        CudaWorkspace workspace;
        CudaOptions options;
        options.plan = layer.plan(n, n);
        options.device_workspace = &workspace;
        const auto run = [&] { layer.into(out.view(), q.device.view(), k.device.view(), v.device.view(), options); };
        if (first_call<std::pair<T, Layer>>(state, 0)) {
            spoil(out);
            run();
            if (const std::string wrong = check_forward<scores>(*options.plan, layer.recursion(), q.host, k.host, v.host, to_host(out)); !wrong.empty()) return wrong;
        }
        time_case(state, scores == Scores::softmax ? attention_work<T>(*options.plan, layer.recursion().hops.size(), heads, false) : kernel_work(n, heads, false), run);
        return {};
    });
}

template <Scores scores, class Layer>
void backward(benchmark::State& state, const Layer& layer) {
    guarded(state, [&]() -> std::string {
        const auto n = static_cast<index_t>(state.range(0)), heads = static_cast<index_t>(state.range(1));
        const Random<float> q(heads, n, 1), k(heads, n, 2), v(heads, n, 3), d_out(heads, n, 4);
        CudaWorkspace workspace;
        CudaOptions options;
        options.plan = layer.plan(n, n);
        options.device_workspace = &workspace;
        const auto [out, saved] = layer.forward(q.device.view(), k.device.view(), v.device.view(), options);

        CudaGradients<float> gradients = layer.backward(saved, d_out.device.view(), options);
        const auto run = [&] { layer.backward_into(gradients, saved, d_out.device.view(), options); };
        if (first_call<Layer>(state, 1)) {
            const auto spoil_gradients = [&] {
                for (const auto* gradient : {&gradients.q, &gradients.k, &gradients.v}) spoil(*gradient);
            };
            const Sample sample(*options.plan, layer.recursion().hops.size() > 1);
            Tensor<float> sampled(d_out.host.shape);
            for (index_t head = 0; head < heads; ++head)
                for (const index_t row : sample.rows) std::copy_n(d_out.host.view().head(0, head).row(row), d, sampled.view().head(0, head).row(row));
            const CudaTensor<float> sampled_device(sampled.data(), sampled.shape);
            spoil_gradients();
            layer.backward_into(gradients, saved, sampled_device.view(), options);
            if (const std::string wrong = check_backward<scores>(sample, layer.recursion(), q.host, k.host, v.host, sampled, gradients); !wrong.empty()) return wrong;
            spoil_gradients();
            run();
            if (const std::string wrong = check_sums(q.host, k.host, v.host, to_host(out), d_out.host, gradients); !wrong.empty()) return wrong;
        }
        time_case(state, scores == Scores::softmax ? attention_work<float>(*options.plan, layer.recursion().hops.size(), heads, true) : kernel_work(n, heads, true), run);
        return {};
    });
}

/// The two kernels on random edges alone: scores with the state of each row's softmax, and one more hop over stored weights.
template <class T>
void edges(benchmark::State& state, bool hop) {
    guarded(state, [&]() -> std::string {
        using namespace detail::cuda;
        using Number = arithmetic_t<T>;
        const auto n = static_cast<index_t>(state.range(0)), heads = static_cast<index_t>(state.range(1));
        const Random<T> q(heads, n, 1), k(heads, n, 2), v(heads, n, 3);
        const Plan plan = RandomTokens{}.plan(n, n);
        const auto& lowered = plan.lowered<DevicePlan<TileShape<T>::side>>();
        const offset_t count = plan.edges().count();
        const CudaTensor<Number> weights({heads, count}), highest({heads, n}), sum({heads, n}), logsumexp({heads, n});
        const CudaTensor<T> out(q.host.shape);
        const auto rows = [&](const CudaTensor<T>& tensor) { return packed_rows<T>(tensor.data(), heads, offset_t{n} * d, d); };
        const Lengths lengths{nullptr, n};

        const auto scale = static_cast<Number>(1.4426950408889634074 / std::sqrt(double(d)));
        const ScoreArguments<T, NoBias> scores{{rows(q.device), rows(k.device), d, scale, {}, {}, lengths, lengths, n, n, 0, logsumexp.data()},
                                               lowered.edges(false), count, true, weights.data(), highest.data(), sum.data()};
        EdgeArguments<T> sums{};
        sums.edges = lowered.edges(false);
        sums.edge_count = count;
        sums.weights = weights.data();
        sums.masks = true;
        sums.own_lengths = sums.other_lengths = lengths;
        sums.own = n;
        sums.heads = heads;
        sums.values = rows(v.device);
        sums.value_columns = d;
        sums.online = true;
        sums.highest = highest.data();
        sums.sum = sum.data();
        sums.logsumexp = logsumexp.data();
        set_target(sums.finish, out.view());
        const dim3 grid(blocks_for(n, edge_warps), static_cast<unsigned>(heads));
        const auto make_scores = [&] { launch("score_edges", score_edges<T, NoBias>, grid, edge_threads, 0, nullptr, scores); };
        const auto make_sums = [&] { launch("apply_edges", apply_edges<T>, grid, edge_threads, 0, nullptr, sums); };

        spoil(weights);
        make_scores();
        const Recursion recursion = NoDiffusion{}.recursion();
        if (hop) {
            make_sums();  // scores to weights
            sums.online = false;
            spoil(out);
            make_sums();
            if (first_call<T>(state, 3))
                if (const std::string wrong = check_forward<Scores::softmax>(plan, recursion, q.host, k.host, v.host, to_host(out)); !wrong.empty()) return wrong;
        } else if (first_call<T>(state, 2)) {
            const Tensor<Number> got = to_host(weights), most = to_host(highest), total = to_host(sum);
            const Sample sample(plan, false);
            for (const index_t head : checked_heads(heads, false)) {
                Difference of_scores, of_rows;
                with_reference<Scores::softmax>(sample, recursion, head, q.host, k.host, v.host, [&](const auto& reference) {
                    const auto op = detail::reference::make_operator(reference);
                    for (std::size_t r = 0; r < sample.rows.size(); ++r) {
                        const auto row = static_cast<std::size_t>(offset_t{head} * n + sample.rows[r]);
                        auto at = static_cast<std::size_t>(offset_t{head} * count + plan.edges().offsets[static_cast<std::size_t>(sample.rows[r])]);
                        for (const auto& edge : op.rows[r]) of_scores.add(double(got.values[at++]) * std::log(2.), edge.score);
                        of_rows.add((double(most.values[row]) + std::log2(double(total.values[row]))) * std::log(2.), op.logsumexp[r]);
                    }
                });
                if (!of_scores.below(tolerance<float>) || !of_rows.below(tolerance<float>)) return "wrong scores of head " + std::to_string(head);
            }
        }
        Work work = attention_work<T>(plan, 0, heads, false);
        work.bytes = heads * (double(sizeof(T)) * d * n + double(count) * (sizeof(T) * d + 8.));
        work.footprint = heads * (2. * sizeof(T) * d * n + 4. * double(count)) + 4. * double(count);
        if (hop) time_case(state, work, make_sums);
        else time_case(state, work, make_scores);
        return {};
    });
}

template <class T>
void dense(benchmark::State& state) { forward<Scores::softmax, T>(state, Attention<Cuda>{}); }
template <class T>
void causal(benchmark::State& state) { forward<Scores::softmax, T>(state, Attention<Causal, Cuda>{}); }
template <class T>
void window(benchmark::State& state) { forward<Scores::softmax, T>(state, Attention<SlidingWindow, Cuda>{}); }
template <class T>
void diffuser_one_hop(benchmark::State& state) { forward<Scores::softmax, T>(state, Attention<LocalGlobalRandom, Cuda>{}); }
template <class T>
void diffuser(benchmark::State& state) { forward<Scores::softmax, T>(state, Attention<LocalGlobalRandom, PPR<5>, Cuda>{}); }
template <class T>
void edge_scores(benchmark::State& state) { edges<T>(state, false); }
template <class T>
void edge_hop(benchmark::State& state) { edges<T>(state, true); }
void relu(benchmark::State& state) { forward<Scores::kernel, float>(state, Attention<Kernel<ReLU>, Cuda>{}); }
void relu_causal(benchmark::State& state) { forward<Scores::causal_kernel, float>(state, Attention<Kernel<ReLU>, Causal, Cuda>{}); }

void dense_backward(benchmark::State& state) { backward<Scores::softmax>(state, Attention<Cuda>{}); }
void causal_backward(benchmark::State& state) { backward<Scores::softmax>(state, Attention<Causal, Cuda>{}); }
void window_backward(benchmark::State& state) { backward<Scores::softmax>(state, Attention<SlidingWindow, Cuda>{}); }
void diffuser_one_hop_backward(benchmark::State& state) { backward<Scores::softmax>(state, Attention<LocalGlobalRandom, Cuda>{}); }
void diffuser_backward(benchmark::State& state) { backward<Scores::softmax>(state, Attention<LocalGlobalRandom, PPR<5>, Cuda>{}); }
void relu_backward(benchmark::State& state) { backward<Scores::kernel>(state, Attention<Kernel<ReLU>, Cuda>{}); }
void relu_causal_backward(benchmark::State& state) { backward<Scores::causal_kernel>(state, Attention<Kernel<ReLU>, Causal, Cuda>{}); }

/// The first size is for the check alone.
void sizes(benchmark::internal::Benchmark* cases) {
    cases->ArgNames({"n", "heads"})->Args({192, 1})->Args({1024, 8})->Args({4096, 8})->Args({16384, 8})->UseManualTime()->Unit(benchmark::kMillisecond);
}

}  // namespace

BENCHMARK_TEMPLATE(dense, float)->Apply(sizes);
BENCHMARK_TEMPLATE(dense, __half)->Apply(sizes);
BENCHMARK_TEMPLATE(causal, float)->Apply(sizes);
BENCHMARK_TEMPLATE(causal, __half)->Apply(sizes);
BENCHMARK_TEMPLATE(window, float)->Apply(sizes);
BENCHMARK_TEMPLATE(window, __half)->Apply(sizes);
BENCHMARK_TEMPLATE(diffuser_one_hop, float)->Apply(sizes);
BENCHMARK_TEMPLATE(diffuser_one_hop, __half)->Apply(sizes);
BENCHMARK_TEMPLATE(diffuser, float)->Apply(sizes);
BENCHMARK_TEMPLATE(diffuser, __half)->Apply(sizes);
BENCHMARK_TEMPLATE(edge_scores, float)->Apply(sizes);
BENCHMARK_TEMPLATE(edge_scores, __half)->Apply(sizes);
BENCHMARK_TEMPLATE(edge_hop, float)->Apply(sizes);
BENCHMARK_TEMPLATE(edge_hop, __half)->Apply(sizes);
BENCHMARK(relu)->Apply(sizes);
BENCHMARK(relu_causal)->Apply(sizes);
BENCHMARK(dense_backward)->Apply(sizes);
BENCHMARK(causal_backward)->Apply(sizes);
BENCHMARK(window_backward)->Apply(sizes);
BENCHMARK(diffuser_one_hop_backward)->Apply(sizes);
BENCHMARK(diffuser_backward)->Apply(sizes);
BENCHMARK(relu_backward)->Apply(sizes);
BENCHMARK(relu_causal_backward)->Apply(sizes);

int main(int argc, char** argv) {
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
    if (cudaDeviceProp device{}; cudaGetDeviceProperties(&device, 0) == cudaSuccess) benchmark::AddCustomContext("device", device.name);
    const std::size_t cases = benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
    return cases == 0 || failures > 0 ? 1 : 0;
}
