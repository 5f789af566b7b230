// The three products of a linear layer: Y = X W^T, dX = dY W, dW = dY^T X. 2 flops a multiply-add.
#include "common.hpp"

#include <polyattn/backend/simd/matrix_product.hpp>
#include <polyattn/nn/feed_forward.hpp>

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

/// What nn does to a product while it is stored: a bias alone, a bias and GELU (which keeps both), a bias and a residual.
void finished(benchmark::State& state) {
    use_threads(1);
    enum { bias, gelu, residual };
    const auto tokens = static_cast<index_t>(state.range(0)), in = static_cast<index_t>(state.range(1)), out = static_cast<index_t>(state.range(2));
    const auto kind = state.range(3);
    nn::Linear<float> layer("layer", in, out, .1, 1);
    layer.bias.value = random_tensor({out}, 4);
    auto x = random_tensor({tokens, in}, 1), beside = random_tensor({tokens, out}, 3);
    Tensor<float> y({tokens, out}), after({tokens, out});
    const auto view = [](Tensor<float>& t) { return t.view().head(0, 0); };
    Workspace workspace;
    const auto activate = [&](index_t row, index_t column, std::span<float> values) {
        detail::gelu(values.data(), static_cast<index_t>(values.size()), view(after).row(row) + column);
    };
    const detail::ActivationDropout none;
    const auto run = [&] {
        if (kind == bias) layer.forward(view(x), view(y), workspace);
        else if (kind == gelu) layer.forward(view(x), view(y), workspace, detail::simd::Beside{view(after), activate});
        else layer.forward(view(x), view(y), workspace, detail::add_residual(MatrixView<const float>(view(beside)), none));
    };
    run();
    for (const auto& [i, j] : {std::pair{index_t{0}, index_t{0}}, std::pair{tokens - 1, out - 1}, std::pair{tokens / 2, out / 3}}) {
        double exact = double(layer.bias.value.values[static_cast<std::size_t>(j)]), size = std::abs(exact);
        for (index_t t = 0; t < in; ++t) {
            const double term = double(view(x)(i, t)) * double(layer.weight.value.values[static_cast<std::size_t>(j * in + t)]);
            exact += term;
            size += std::abs(term);
        }
        double got = double(view(y)(i, j));
        if (kind == residual) exact += double(view(beside)(i, j)), size += std::abs(double(view(beside)(i, j)));
        if (kind == gelu) got = double(view(after)(i, j)), exact *= .5 * std::erfc(-exact / std::sqrt(2.));
        if (!(std::abs(exact - got) <= 2 * (in + 8) * 0x1p-24 * size)) return state.SkipWithError("wrong product");  // the slope of GELU is below 2
    }
    const auto medians = time_calls(state, run, [] { return fma_burst(); });
    const double flops = 2. * tokens * in * out;
    state.counters["GF/s"] = flops / medians.time / 1e9;
    report_share(state, flops / medians.time / medians.limit, std::min(in, out) >= 128 ? .80 : 0);
}

}  // namespace

BENCHMARK(finished)->ArgNames({"n", "in", "out", "finish"})->ArgsProduct({{4096}, {256}, {256, 1024}, {0, 1, 2}})->Args({4096, 1024, 256, 2})->UseManualTime();
BENCHMARK(linear)
    ->ArgNames({"n", "in", "out", "kind"})
    ->ArgsProduct({{1024, 4096}, {128, 512, 1024}, {128, 512, 1024}, {forward, inputs, weights}})
    ->ArgsProduct({{4096}, {256}, {256, 1024}, {forward, inputs, weights}})
    ->ArgsProduct({{1000}, {100}, {300}, {forward, inputs, weights}})
    ->UseManualTime();
BENCHMARK_MAIN();
