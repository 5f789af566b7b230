// The three products of a linear layer: Y = X W^T, dX = dY W, dW = dY^T X. 2 flops a multiply-add.
#include "common.hpp"

#include <polyattn/backend/simd/matrix_product.hpp>

using namespace bench;

namespace {

constexpr int forward = 0, inputs = 1, weights = 2;

void linear(benchmark::State& state) {
    use_threads(1);
    const auto tokens = static_cast<index_t>(state.range(0)), in = static_cast<index_t>(state.range(1)), out = static_cast<index_t>(state.range(2));
    const auto kind = state.range(3);
    auto x = random_tensor({tokens, in}, 1), w = random_tensor({out, in}, 2), y = random_tensor({tokens, out}, 3);
    const auto view = [](Tensor<float>& t) { return t.view().head(0, 0); };
    const auto transposed = [&](Tensor<float>& t) {
        const MatrixView<float> v = view(t);
        return MatrixView<float>{v.data, v.cols, v.rows, v.col_stride, v.row_stride};
    };
    const MatrixView<const float> a = kind == forward ? view(x) : kind == inputs ? view(y) : transposed(y), b = kind == forward ? transposed(w) : kind == inputs ? view(w) : view(x);
    Tensor<float> result({a.rows, b.cols});
    Workspace workspace;
    const auto run = [&] { detail::simd::MatrixProduct<float, Arch>::run(a, b, view(result), false, workspace); };
    run();
    for (const auto& [i, j] : {std::pair{index_t{0}, index_t{0}}, std::pair{a.rows - 1, b.cols - 1}, std::pair{a.rows / 2, b.cols / 3}}) {
        double exact = 0, size = 0;
        for (index_t t = 0; t < a.cols; ++t) {
            exact += double(a(i, t)) * double(b(t, j));
            size += std::abs(double(a(i, t)) * double(b(t, j)));
        }
        if (!(std::abs(exact - double(view(result)(i, j))) <= a.cols * 0x1p-24 * size)) return state.SkipWithError("wrong product");
    }
    const auto medians = time_calls(state, run, [] { return fma_burst(); });
    const double flops = 2. * tokens * in * out;
    state.counters["GF/s"] = flops / medians.time / 1e9;
    report_share(state, flops / medians.time / medians.limit, tokens >= 1024 && std::min(in, out) >= 128 ? .80 : 0);
}

}  // namespace

BENCHMARK(linear)
    ->ArgNames({"n", "in", "out", "kind"})
    ->ArgsProduct({{1024, 4096}, {128, 512, 1024}, {128, 512, 1024}, {forward, inputs, weights}})
    ->ArgsProduct({{4096}, {256}, {256, 1024}, {forward, inputs, weights}})
    ->ArgsProduct({{1000}, {100}, {300}, {forward, inputs, weights}})
    ->UseManualTime();
BENCHMARK_MAIN();
