#include "device_nystrom.hpp"
#include "transfer.cuh"

#include "support/errors.hpp"
#include "support/random.hpp"

#include <polyattn/polyattn_cuda.cuh>

#include <doctest/doctest.h>

using namespace polyattn;

template <class T>
NystromResult<T> run_on_device(const NystromCall<T>& call) {
    const CudaNystromAttention layer(call.parameters);
    const CudaTensor<T> q = to_device(call.q), k = to_device(call.k), v = to_device(call.v), d_out = to_device(call.d_out);
    CudaWorkspace workspace;
    CudaOptions options;
    static_cast<CallOptions&>(options) = call.options;
    options.device_workspace = &workspace;
    const std::size_t bytes = layer.workspace_bytes(q.view(), k.view(), v.view(), options);
    workspace.reserve(bytes);
    const auto out = to_host(layer(q.view(), k.view(), v.view(), options));
    const auto [saved_out, saved] = layer.forward(q.view(), k.view(), v.view(), options);
    CHECK(workspace.capacity() == std::max<std::size_t>(bytes, 1));
    CHECK(to_host(saved_out).values == out.values);
    const std::size_t backward_bytes = std::max(bytes, layer.backward_workspace_bytes(saved));
    workspace.reserve(backward_bytes);
    auto gradients = layer.backward(saved, d_out.view(), options);
    CHECK(workspace.capacity() == std::max<std::size_t>(backward_bytes, 1));
    NystromResult<T> result{out, to_host(gradients.q), to_host(gradients.k), to_host(gradients.v), gradients.compression};
    // The same again, without a workspace.
    layer.backward_into(gradients, saved, d_out.view());
    CHECK(to_host(gradients.q).values == result.d_q.values);
    CHECK(to_host(gradients.k).values == result.d_k.values);
    CHECK(to_host(gradients.v).values == result.d_v.values);
    CHECK(gradients.compression == result.d_table);
    return result;
}
template NystromResult<float> run_on_device(const NystromCall<float>&);
template NystromResult<double> run_on_device(const NystromCall<double>&);

namespace {

template <class T>
TensorView<const T> constant(const CudaTensor<T>& tensor) {
    return tensor.view();
}
template <class T>
detail::cuda::Rows<T> matrices(const CudaTensor<T>& tensor) {
    const auto& shape = tensor.shape();
    return detail::cuda::packed_rows<T>(tensor.data(), 1, shape[1] * shape[2], static_cast<index_t>(shape[2]));
}
std::size_t free_memory() {
    std::size_t free = 0, total = 0;
    detail::cuda::check_cuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    return free;
}

/// A product of padded matrices with all that may become of it, against sums in double.
template <detail::cuda::TransposedFactor transposed, class T>
void check_product(Random& random, index_t rows, index_t columns, index_t inner) {
    using namespace detail::cuda;
    constexpr bool first_turned = transposed == TransposedFactor::first, second_turned = transposed == TransposedFactor::second;
    const index_t items = 3;
    const double u = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53, factor = -.25, teleport = 7, diagonal = 13;
    INFO("product ", static_cast<int>(transposed), ": ", rows, " x ", inner, " x ", columns);
    const auto draw = [&](index_t own_rows, index_t own_columns) {
        Tensor<T> made({items, own_rows, padded<T>(own_columns)});
        for (std::size_t i = 0; i < made.values.size(); ++i)
            if (static_cast<index_t>(i % static_cast<std::size_t>(padded<T>(own_columns))) < own_columns) made.values[i] = static_cast<T>(random.normal());
        return made;
    };
    const Tensor<T> first = first_turned ? draw(inner, rows) : draw(rows, inner), second = second_turned ? draw(columns, inner) : draw(inner, columns), others = draw(rows, columns), old = draw(rows, columns);
    const CudaTensor<T> a = to_device(first), b = to_device(second), v = to_device(others), set(old.shape), added = to_device(old);
    for (const bool adds : {false, true}) {
        Finish<T> finish = packed_finish((adds ? added : set).data(), rows, padded<T>(columns), 1, adds);
        finish.factor = static_cast<T>(factor);
        finish.teleport = static_cast<T>(teleport);
        finish.values = matrices(v);
        multiply_items<transposed>(MatrixProduct<T>{matrices(a), matrices(b), rows, columns, inner, static_cast<T>(diagonal), 0, finish}, items, nullptr);
    }
    const Tensor<T> got = to_host(set), sums = to_host(added);
    const auto entry = [](const Tensor<T>& x, index_t item, index_t i, index_t j) { return double(x.values[static_cast<std::size_t>((item * x.shape[1] + i) * x.shape[2] + j)]); };
    std::size_t wrong = 0;
    for (index_t item = 0; item < items; ++item)
        for (index_t i = 0; i < rows; ++i)
            for (index_t j = 0; j < padded<T>(columns); ++j) {
                double wanted = i == j && j < columns ? diagonal : 0, size = wanted;
                for (index_t k = 0; k < inner && j < columns; ++k) {
                    const double term = (first_turned ? entry(first, item, k, i) : entry(first, item, i, k)) * (second_turned ? entry(second, item, j, k) : entry(second, item, k, j));
                    wanted += term;
                    size += std::abs(term);
                }
                const double other = teleport * entry(others, item, i, j), before = entry(old, item, i, j);
                wanted = factor * wanted + other;
                size = std::abs(factor) * size + std::abs(other);
                wrong += !(std::abs(entry(got, item, i, j) - wanted) <= 1.01 * (inner + 4) * u * size);
                wrong += !(std::abs(entry(sums, item, i, j) - (wanted + before)) <= 1.01 * (inner + 5) * u * (size + std::abs(before)));
            }
    CHECK(wrong == 0);
}

}  // namespace

TEST_CASE_TEMPLATE("products of matrices", T, float, double) {
    POLYATTN_RANDOM(random);
    using detail::cuda::TransposedFactor;
    for (const auto& [rows, columns, inner] : {std::array{1, 1, 1}, {2, 3, 5}, {33, 31, 32}, {64, 65, 70}, {70, 5, 63}, {5, 7, 0}, {129, 1, 33}}) {
        check_product<TransposedFactor::none, T>(random, rows, columns, inner);
        check_product<TransposedFactor::first, T>(random, rows, columns, inner);
        check_product<TransposedFactor::second, T>(random, rows, columns, inner);
    }
}

TEST_CASE("the first of the largest rows and columns") {
    using namespace detail::cuda;
    POLYATTN_RANDOM(random);
    for (const index_t side : {1, 5, 300}) {
        const index_t columns = padded<float>(side), items = 3;
        Tensor<float> host({items, side, columns});
        std::vector<index_t> rows, at;
        for (index_t item = 0; item < items; ++item) {
            // Two rows and two columns of ones among smaller numbers; the last matrix is all zeros.
            const index_t row = random.below(side), column = random.below(side), later_row = row + random.below(side - row), later_column = column + random.below(side - column);
            for (index_t i = 0; i < side; ++i)
                for (index_t j = 0; j < side; ++j) host.values[static_cast<std::size_t>((item * side + i) * columns + j)] = item + 1 == items ? 0.f : i == row || i == later_row || j == column || j == later_column ? 1.f : .25f;
            rows.push_back(item + 1 == items ? 0 : row);
            at.push_back(item + 1 == items ? 0 : column);
        }
        const CudaTensor<float> a = to_device(host);
        const CudaTensor<char> found({items, static_cast<offset_t>(sizeof(LargestSums<float>))});
        auto* const to = reinterpret_cast<LargestSums<float>*>(found.data());
        launch("largest_sums", largest_sums<float>, dim3(static_cast<unsigned>(items)), inverse_threads, 0, nullptr, static_cast<const float*>(a.data()), side, columns, to);
        std::vector<LargestSums<float>> sums(static_cast<std::size_t>(items));
        found.copy_to(reinterpret_cast<char*>(sums.data()));
        for (std::size_t item = 0; item < sums.size(); ++item) {
            INFO("matrix ", item, " of side ", side);
            CHECK(sums[item].row.at == rows[item]);
            CHECK(sums[item].column.at == at[item]);
            CHECK(sums[item].row.sum == (item + 1 == sums.size() ? 0.f : static_cast<float>(side)));
            CHECK(sums[item].column.sum == sums[item].row.sum);
        }
    }
}

TEST_CASE("the iteration towards the pseudo-inverse") {
    // As on the CPU: [[a, 1 - a], [1 - a, a]] with a = 3/4, the residual on (1, -1). Beside it one number, whose inverse is right from the start, and zeros.
    const std::vector<double> residuals = {.75, .395508, .0525182, 1.10542e-4, 1.013e-12};
    const std::vector<double> matrices = {.75, .25, .25, .75, .5, 0, 0, 0, 0, 0, 0, 0};
    for (index_t steps = 0; steps <= 4; ++steps)
        for (const bool keeps : {false, true}) {
            using Inverse = detail::cuda::PseudoInverse<double>;
            detail::cuda::Carver counter;
            Inverse(counter, 3, 2, steps, keeps).take_scratch(counter, false);
            CudaWorkspace memory;
            memory.reserve(counter.used());
            detail::cuda::Carver carver(memory.data());
            const Inverse inverse(carver, 3, 2, steps, keeps);
            double* const scratch = inverse.take_scratch(carver, false);
            REQUIRE(cudaMemcpy(inverse.matrices(), matrices.data(), matrices.size() * sizeof(double), cudaMemcpyHostToDevice) == cudaSuccess);
            inverse.run(scratch, nullptr);
            std::vector<double> z(matrices.size());
            REQUIRE(cudaMemcpy(z.data(), inverse.result(), z.size() * sizeof(double), cudaMemcpyDeviceToHost) == cudaSuccess);
            const double along = .5 * (z[0] - z[1]);
            if (steps < 4) CHECK(1 - along == doctest::Approx(residuals[static_cast<std::size_t>(steps)]).epsilon(1e-5));
            else CHECK(std::abs(1 - along) < 2e-12);
            CHECK(z[4] == doctest::Approx(2).epsilon(1e-14));
            for (std::size_t i = 5; i < z.size(); ++i) CHECK(z[i] == 0);
        }
}

TEST_CASE("strides, ranks, accumulate, streams, workspaces, saved passes of other shapes") {
    POLYATTN_RANDOM(random);
    const index_t heads = 4, n = 21, d = 6, e = 5, wide = 2 * d + e;
    const CudaNystromAttention layer({.landmarks = 5, .width = 3, .table = std::vector<double>(12, .25)});
    const auto rows = random.tensor<float>({2, 2, n, wide}), queries = random.tensor<float>({2, heads, n, d});
    const auto d_out = to_device(random.tensor<float>({2, heads, n, e}));
    Tensor<float> host_k({2, 2, n, d}), host_v({2, 2, n, e});
    for (index_t i = 0; i < 4 * n; ++i) {
        std::copy_n(rows.data() + i * wide + d, d, host_k.data() + i * d);
        std::copy_n(rows.data() + i * wide + 2 * d, e, host_v.data() + i * e);
    }
    const auto q = to_device(queries), k = to_device(host_k), v = to_device(host_v), all = to_device(rows);
    CudaOptions options;
    options.key_lengths = {n, 13};
    const auto [out, saved] = layer.forward(q.view(), k.view(), v.view(), options);
    const auto wanted = to_host(out).values;
    const auto gradients = layer.backward(saved, d_out.view());
    const auto d_q = to_host(gradients.q).values, d_k = to_host(gradients.k).values, d_v = to_host(gradients.v).values;

    // Keys and values out of wider rows, sums onto an out with strides, on a stream and with workspaces of the told sizes.
    const auto part = [&](offset_t first, offset_t columns) { return tensor_view<const float>(all.data() + first, {2, 2, n, columns}, {2 * n * wide, n * wide, wide, 1}); };
    cudaStream_t stream;
    REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
    options.stream = stream;
    CudaWorkspace workspace;
    options.device_workspace = &workspace;
    workspace.reserve(layer.workspace_bytes(constant(q), part(d, d), part(2 * d, e), options));
    const CudaTensor<float> ones(std::vector<float>(static_cast<std::size_t>(2 * heads * n * 8), 1.f).data(), {2, heads, n, 8});
    options.accumulate = true;
    const std::size_t capacity = workspace.capacity();
    layer.into(tensor_view(ones.data() + 1, {2, heads, n, e}, {heads * n * 8, n * 8, 8, 1}), constant(q), part(d, d), part(2 * d, e), options);
    CHECK(workspace.capacity() == capacity);
    REQUIRE(cudaStreamSynchronize(stream) == cudaSuccess);
    const auto sums = to_host(ones).values;
    std::size_t wrong = 0;
    for (index_t i = 0; i < 2 * heads * n; ++i)
        for (index_t c = 0; c < 8; ++c) {
            const float got = sums[static_cast<std::size_t>(i * 8 + c)];
            // 1 + (x + y) and (1 + x) + y, for the convolution's y.
            wrong += c == 0 || c > e ? got != 1 : !(std::abs(got - (1 + wanted[static_cast<std::size_t>(i * e + c - 1)])) <= 4 * 0x1p-24f * (2 + 3 * std::abs(wanted[static_cast<std::size_t>(i * e + c - 1)]) + 3));
        }
    CHECK(wrong == 0);
    options.accumulate = false;

    // A saved pass of another shape, then the first again and again.
    auto [again, other] = layer.forward(constant(q), constant(q), constant(q));
    const CudaTensor<float> to({2, heads, n, e});
    CudaGradients<float> into = layer.backward(saved, d_out.view(), options);
    workspace.reserve(layer.backward_workspace_bytes(saved));
    std::size_t free = 0;
    for (int repeat = 0; repeat < 3; ++repeat) {
        layer.forward_into(to.view(), other, constant(q), part(d, d), part(2 * d, e), options);
        layer.backward_into(into, other, d_out.view(), options);
        layer.into(to.view(), q.view(), k.view(), v.view(), options);
        REQUIRE(cudaStreamSynchronize(stream) == cudaSuccess);
        if (repeat == 0) free = free_memory();
    }
    CHECK(free_memory() == free);
    const std::size_t bytes = layer.workspace_bytes(q.view(), k.view(), v.view(), options);
    options.key_lengths = {2, 0};
    CHECK(layer.workspace_bytes(q.view(), k.view(), v.view(), options) == bytes);
    CHECK(to_host(to).values == wanted);
    CHECK(to_host(into.q).values == d_q);
    CHECK(to_host(into.k).values == d_k);
    CHECK(to_host(into.v).values == d_v);
    CHECK(into.compression == gradients.compression);
    REQUIRE(cudaStreamDestroy(stream) == cudaSuccess);

    // Lower ranks are parts of higher ones; other weights.
    const CudaNystromAttention plain({.landmarks = 5});
    const auto one = [&](const CudaTensor<float>& x, std::initializer_list<offset_t> extents) { return tensor_view<const float>(x.data(), extents); };
    const auto whole = to_host(plain(q.view(), q.view(), q.view())).values;
    const auto same = [&](const CudaTensor<float>& got) { return std::equal(whole.begin(), whole.begin() + got.size(), to_host(got).values.begin()); };
    CHECK(same(plain(one(q, {heads, n, d}), one(q, {heads, n, d}), one(q, {heads, n, d}))));
    CHECK(same(plain(one(q, {n, d}), one(q, {n, d}), one(q, {n, d}))));
    CHECK(to_host(layer.with_compression({.landmarks = 5})(q.view(), q.view(), q.view())).values == whole);
    CHECK(layer.with_compression({.landmarks = 5}).compression().width == 0);
}

TEST_CASE("padding never counts, whatever it holds") {
    POLYATTN_RANDOM(random);
    const index_t n = 40, valid = 21, heads = 2, d = 8;
    const CudaNystromAttention layer({.landmarks = 6, .width = 5, .table = std::vector<double>(10, .2)});
    const auto x = random.tensor<float>({2, heads, n, d});
    auto bad = x;
    for (index_t item = 0; item < 2 * heads; ++item) {
        const index_t length = item < heads ? valid : 0;
        std::fill(bad.values.begin() + (item * n + length) * d, bad.values.begin() + (item + 1) * n * d, std::numeric_limits<float>::quiet_NaN());
    }
    CudaOptions options;
    options.key_lengths = options.query_lengths = {valid, 0};
    const auto run = [&](const Tensor<float>& host) {
        const auto on = to_device(host);
        const auto [out, saved] = layer.forward(on.view(), on.view(), on.view(), options);
        const auto gradients = layer.backward(saved, on.view());
        return std::tuple(to_host(out).values, to_host(gradients.q).values, to_host(gradients.k).values, to_host(gradients.v).values, gradients.compression);
    };
    const auto good = run(x);
    CHECK(good == run(bad));
    const auto is_zero_behind = [&](const auto& values) {
        bool zero = true;
        for (index_t row = 0; row < 2 * heads * n; ++row)
            if (row / n >= heads || row % n >= valid)
                for (index_t c = 0; c < d; ++c) zero = zero && values[static_cast<std::size_t>(row * d + c)] == 0;
        return zero;
    };
    CHECK(is_zero_behind(std::get<0>(good)));
    CHECK(is_zero_behind(std::get<1>(good)));
    CHECK(is_zero_behind(std::get<2>(good)));
    CHECK(is_zero_behind(std::get<3>(good)));
}

TEST_CASE("no query heads") {
    const CudaTensor<float> q({1, 0, 6, 4}), k = to_device(Tensor<float>({1, 2, 6, 4})), d_out({1, 0, 6, 4});
    const CudaNystromAttention layer;
    const auto [out, saved] = layer.forward(q.view(), k.view(), k.view());
    CHECK(out.size() == 0);
    const auto gradients = layer.backward(saved, d_out.view());
    for (const auto* gradient : {&gradients.k, &gradients.v}) CHECK(to_host(*gradient).values == AlignedVector<float>(48, 0.f));
}

TEST_CASE("errors name the argument") {
    const Tensor<float> host({1, 1, 6, 4});
    const CudaTensor<float> x = to_device(host), y({1, 1, 5, 4}), narrow({1, 1, 6, 3}), flat({6, 4}), two({1, 2, 6, 4});
    const CudaNystromAttention layer, convolving({.width = 1, .table = {1}});
    const auto call = [&](auto&& change) {
        CudaOptions options;
        change(options);
        return argument([&] { layer(x.view(), x.view(), x.view(), options); });
    };
    CHECK(argument([] { CudaNystromAttention({.landmarks = 0}); }) == "landmarks");
    CHECK(argument([] { CudaNystromAttention({.iterations = -1}); }) == "iterations");
    CHECK(argument([] { CudaNystromAttention({.width = 2, .table = {1, 1}}); }) == "width");
    CHECK(argument([] { CudaNystromAttention({.width = 3}); }) == "table");
    CHECK(argument([&] { layer.with_compression({.landmarks = 0}); }) == "landmarks");
    CHECK(argument([&] { layer(x.view(), y.view(), y.view()); }) == "k");
    CHECK(argument([&] { layer(x.view(), two.view(), two.view()); }) == "k");
    CHECK(argument([&] { layer(x.view(), x.view(), y.view()); }) == "v");
    CHECK(argument([&] { layer(x.view(), flat.view(), x.view()); }) == "k");
    CHECK(argument([&] { layer(host.view(), x.view(), x.view()); }) == "q");
    CHECK(argument([&] { layer.into(narrow.view(), x.view(), x.view(), x.view()); }) == "out");
    CHECK(argument([&] { convolving(two.view(), two.view(), two.view()); }) == "table");
    CHECK(call([](CudaOptions& options) { options.key_lengths = {7}; }) == "key_lengths");
    CHECK(call([](CudaOptions& options) { options.key_lengths = {1, 1}; }) == "key_lengths");
    CHECK(call([](CudaOptions& options) { options.query_lengths = {3}; }) == "query_lengths");
    CHECK(call([](CudaOptions& options) { options.dropout.weights = .1; }) == "dropout");
    CHECK(call([](CudaOptions& options) { options.dropout.values = .1; }) == "dropout");
    CHECK(call([](CudaOptions& options) { options.plan = Dense{}.plan(6, 6); }) == "plan");
    CHECK(call([](CudaOptions& options) { options.item_plans = {Dense{}.plan(6, 6)}; }) == "plan");
    CHECK(argument([&] { layer.backward(CudaNystromAttention::SavedOf<float>{}, x.view()); }) == "saved");
    CHECK(argument([&] { layer.backward_workspace_bytes(CudaNystromAttention::SavedOf<float>{}); }) == "saved");
    const auto [out, saved] = layer.forward(x.view(), x.view(), x.view());
    CHECK(argument([&] { layer.backward(saved, y.view()); }) == "d_out");
    CHECK(argument([&] { layer.backward(saved, host.view()); }) == "d_out");
    CudaGradients<float> gradients;
    gradients.q = CudaTensor<float>({1, 1, 6, 4});
    gradients.k = CudaTensor<float>({1, 1, 5, 4});
    gradients.v = CudaTensor<float>({1, 1, 6, 4});
    CHECK(argument([&] { layer.backward_into(gradients, saved, x.view()); }) == "gradients.k");
    CHECK(argument([&] { CudaNystromAttention({.width = 1, .table = {1, 1}}).backward(saved, x.view()); }) == "table");
}
