#include "device_multi_resolution.hpp"
#include "transfer.cuh"

#include "support/errors.hpp"
#include "support/random.hpp"

#include <polyattn/backend/cuda/multi_resolution.cuh>
#include <polyattn/polyattn_cuda.cuh>

#include <doctest/doctest.h>

using namespace polyattn;

namespace {

template <class T>
void check_same(const Parameters<T>& a, const Parameters<T>& b) {
    REQUIRE(a.size() == b.size());
    for (const auto& [name, tensor] : a) {
        INFO(name);
        CHECK(tensor.values == b.at(name).values);
    }
}
template <class T>
TensorView<const T> constant(const CudaTensor<T>& tensor) {
    return tensor.view();
}

}  // namespace

template <class Recipe, class T>
DevicePassed<T> run_on_device(const Recipe& recipe, const DevicePass<T>& pass) {
    using Layer = nn::CudaAdaptiveMultiResolution<T, Recipe>;
    Layer layer(recipe, pass.parameters, "layer", pass.heads);
    const CudaTensor<T> x = to_device(pass.x), d_y = to_device(pass.d_y), y(pass.x.shape), d_x(pass.x.shape), residual = to_device(pass.residual);
    typename Layer::Saved saved;
    const auto add = pass.residual.shape.empty() ? TensorView<const T>{} : constant(residual);
    CudaWorkspace workspace;
    CudaOptions options;
    static_cast<CallOptions&>(options) = pass.options;
    options.device_workspace = &workspace;
    const std::size_t bytes = layer.workspace_bytes(constant(x), pass.batch, options);
    workspace.reserve(bytes);
    layer.forward(constant(x), add, y.view(), pass.batch, saved, options, pass.output_dropout);
    CHECK(workspace.capacity() == std::max<std::size_t>(bytes, 1));
    DevicePassed<T> passed;
    passed.y = to_host(y);
    passed.routes = saved.routes();
    passed.balance_loss = saved.balance_loss();
    const std::size_t backward_bytes = std::max(bytes, layer.backward_workspace_bytes(saved));
    workspace.reserve(backward_bytes);
    layer.backward(saved, constant(d_y), d_x.view(), options);
    CHECK(workspace.capacity() == std::max<std::size_t>(backward_bytes, 1));
    passed.d_x = to_host(d_x);
    passed.gradients = layer.gradients();

    // The same again, without a workspace, the saved pass used anew.
    options.device_workspace = nullptr;
    layer.forward(constant(x), add, y.view(), pass.batch, saved, options, pass.output_dropout);
    CHECK(to_host(y).values == passed.y.values);
    layer.zero_gradients();
    layer.backward(saved, constant(d_y), d_x.view(), options);
    CHECK(to_host(d_x).values == passed.d_x.values);
    check_same(layer.gradients(), passed.gradients);
    return passed;
}

#define POLYATTN_INSTANTIATE(Recipe, T) template DevicePassed<T> run_on_device(const Recipe&, const DevicePass<T>&);
POLYATTN_INSTANTIATE(StraightThroughRecipe, float)
POLYATTN_INSTANTIATE(StraightThroughRecipe, double)
POLYATTN_INSTANTIATE(SwitchRecipe, float)
POLYATTN_INSTANTIATE(SwitchRecipe, double)
POLYATTN_INSTANTIATE(LiteralRecipe, double)
POLYATTN_INSTANTIATE(RandomRecipe, float)
POLYATTN_INSTANTIATE(AllRecipe, float)
POLYATTN_INSTANTIATE(AllRecipe, double)
POLYATTN_INSTANTIATE(EluRecipe, double)
POLYATTN_INSTANTIATE(SoftmaxRecipe, float)
POLYATTN_INSTANTIATE(SoftmaxRecipe, double)
POLYATTN_INSTANTIATE(RandomFeaturesRecipe, double)

namespace {

/// Of a layer named "layer".
template <class T>
Parameters<T> draw_parameters(Random& random, index_t dim, index_t resolutions, bool learned, index_t blocks = 1) {
    Parameters<T> made;
    const auto add = [&](const std::string& name, std::vector<offset_t> shape) { made.emplace("layer." + name, random.tensor<T>(std::move(shape), .5)); };
    for (const char* what : {"query", "key", "value"}) {
        add(what, {dim, dim});
        for (index_t h = 0; h < resolutions; ++h) add(detail::text("resolution", h, ".", what), {dim, dim});
    }
    if (learned) add("router", {resolutions, dim});
    add("merge.weight", {dim, offset_t{blocks} * dim});
    add("merge.bias", {dim});
    return made;
}

}  // namespace

TEST_CASE("strides, a residual in place, saved passes of other shapes, other parameters, a stream of the caller's") {
    POLYATTN_RANDOM(random);
    const index_t dim = 6, batch = 3, tokens = 21, rows = batch * tokens, wide = dim + 3;
    using Layer = nn::CudaAdaptiveMultiResolution<float, StraightThroughRecipe>;
    const auto parameters = draw_parameters<float>(random, dim, 3, true), others = draw_parameters<float>(random, dim, 3, true);
    Layer layer({}, parameters, "layer", 2);
    CHECK(layer.dim() == dim);
    CHECK(layer.heads() == 2);
    const auto host_x = random.tensor<float>({rows, dim}), host_residual = random.tensor<float>({rows, dim});
    const CudaTensor<float> x = to_device(host_x), residual = to_device(host_residual), d_y = to_device(random.tensor<float>({rows, dim})), y({rows, dim}), d_x({rows, dim});
    CudaOptions options;
    options.key_lengths = {tokens, 4, 17};
    typename Layer::Saved saved;
    const double dropout = .2;  // of the output
    layer.forward(constant(x), constant(residual), y.view(), batch, saved, options, dropout);
    layer.backward(saved, constant(d_y), d_x.view());
    const auto wanted_y = to_host(y).values, wanted_d_x = to_host(d_x).values;
    const auto wanted = layer.gradients();

    const auto strided = [&](const CudaTensor<float>& tensor) { return tensor_view(tensor.data(), {rows, dim}, {wide, 1}); };
    const auto narrow = [&](const CudaTensor<float>& tensor) {
        const auto all = to_host(tensor).values;
        AlignedVector<float> made;
        for (index_t r = 0; r < rows; ++r) made.insert(made.end(), all.begin() + r * wide, all.begin() + r * wide + dim);
        return made;
    };
    Tensor<float> wide_x({rows, wide}), wide_residual({rows, wide}), by_columns({dim, rows});
    for (index_t r = 0; r < rows; ++r)
        for (index_t c = 0; c < dim; ++c) {
            const auto at = static_cast<std::size_t>(r * dim + c), to = static_cast<std::size_t>(r * wide + c);
            wide_x.values[to] = by_columns.values[static_cast<std::size_t>(c * rows + r)] = host_x.values[at];
            wide_residual.values[to] = host_residual.values[at];
        }
    const CudaTensor<float> far_x = to_device(wide_x), turned_x = to_device(by_columns), in_place = to_device(wide_residual), far_d_x = to_device(wide_residual);
    cudaStream_t stream;
    REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
    options.stream = stream;
    CudaWorkspace workspace;
    options.device_workspace = &workspace;
    workspace.reserve(layer.workspace_bytes(tensor_view<const float>(turned_x.data(), {rows, dim}, {1, rows}), batch, options));
    const std::size_t capacity = workspace.capacity();
    layer.zero_gradients(stream);
    layer.forward(strided(far_x), strided(in_place), strided(in_place), batch, saved, options, dropout);
    CHECK(workspace.capacity() == capacity);
    layer.backward(saved, constant(d_y), strided(far_d_x), options);
    REQUIRE(cudaStreamSynchronize(stream) == cudaSuccess);
    CHECK(narrow(in_place) == wanted_y);
    CHECK(narrow(far_d_x) == wanted_d_x);
    check_same(layer.gradients(stream), wanted);
    // Gradients add up.
    layer.backward(saved, constant(d_y), strided(far_d_x), options);
    for (const auto& [name, tensor] : layer.gradients(stream))
        for (std::size_t i = 0; i < tensor.values.size(); ++i) CHECK(tensor.values[i] == doctest::Approx(2 * wanted.at(name).values[i]).epsilon(1e-4).scale(10));
    // A pass of another shape, then the first again, on columns.
    options.key_lengths = {};
    layer.forward(constant(x), {}, y.view(), 1, saved, options);
    CHECK(saved.routes(stream).size() == static_cast<std::size_t>(rows));
    options.key_lengths = {tokens, 4, 17};
    const auto moved = std::move(saved);
    saved = {};
    layer.forward(tensor_view<const float>(turned_x.data(), {rows, dim}, {1, rows}), constant(residual), y.view(), batch, saved, options, dropout);
    REQUIRE(cudaStreamSynchronize(stream) == cudaSuccess);
    CHECK(to_host(y).values == wanted_y);
    // Other parameters, and back.
    layer.upload(others, stream);
    layer.forward(constant(x), constant(residual), y.view(), batch, saved, options);
    REQUIRE(cudaStreamSynchronize(stream) == cudaSuccess);
    const auto other_y = to_host(y).values;
    CHECK(other_y != wanted_y);
    Layer other({}, others, "layer", 2);
    other.forward(constant(x), constant(residual), y.view(), batch, saved, options);
    REQUIRE(cudaStreamSynchronize(stream) == cudaSuccess);
    CHECK(to_host(y).values == other_y);
    REQUIRE(cudaStreamDestroy(stream) == cudaSuccess);
    // No rows.
    const CudaTensor<float> none({0, dim});
    layer.forward(constant(none), {}, none.view(), 2, saved);
    layer.zero_gradients();
    layer.backward(saved, constant(none), none.view());
    for (const auto& [name, tensor] : layer.gradients()) CHECK(std::count(tensor.values.begin(), tensor.values.end(), 0.f) == static_cast<std::ptrdiff_t>(tensor.values.size()));
}

TEST_CASE("padding never counts, whatever it holds") {
    POLYATTN_RANDOM(random);
    const auto check = [&]<class Recipe>(const Recipe& recipe, const Parameters<double>& parameters) {
        using Layer = nn::CudaAdaptiveMultiResolution<double, Recipe>;
        const index_t dim = 6, batch = 2, tokens = 19, rows = batch * tokens;
        Layer layer(recipe, parameters, "layer", 3);
        auto x = random.tensor<double>({rows, dim});
        const CudaTensor<double> d_y = to_device(random.tensor<double>({rows, dim})), y({rows, dim}), d_x({rows, dim});
        CudaOptions options;
        options.key_lengths = {11, 0};
        options.draw.seed = random.seed();
        const auto run = [&] {
            const CudaTensor<double> on_device = to_device(x);
            typename Layer::Saved saved;
            layer.zero_gradients();
            layer.forward(constant(on_device), {}, y.view(), batch, saved, options);
            layer.backward(saved, constant(d_y), d_x.view());
            return std::tuple(to_host(y).values, to_host(d_x).values, layer.gradients());
        };
        const auto [first_y, first_d_x, first] = run();
        std::fill(x.values.begin() + 11 * dim, x.values.end(), std::numeric_limits<double>::quiet_NaN());
        const auto [second_y, second_d_x, second] = run();
        CHECK(first_y == second_y);
        CHECK(first_d_x == second_d_x);
        check_same(first, second);
        for (std::size_t i = 11 * static_cast<std::size_t>(dim); i < first_y.size(); ++i) {
            CHECK(first_y[i] == parameters.at("layer.merge.bias").values[i % static_cast<std::size_t>(dim)]);
            CHECK(first_d_x[i] == 0);
        }
    };
    check(SwitchRecipe{.router = {.balance = .5}}, draw_parameters<double>(random, 6, 3, true));
    check(AllRecipe{}, draw_parameters<double>(random, 6, 3, false, 3));
}

TEST_CASE_TEMPLATE("sums over tokens: few chunks where there are many tiles, and never less memory for more tokens", T, float, double) {
    POLYATTN_RANDOM(random);
    const double u = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;
    const index_t columns = 8, inner = 4;
    const auto sum_of = [&](const T* z, const T* b, index_t items, index_t tokens) {
        auto sum = detail::cuda::TokenSum<T>::of_rows(nullptr, columns, nullptr, inner, tokens);
        sum.items = items;
        sum.values = detail::cuda::packed_rows<T>(z, 1, offset_t{tokens} * columns, columns);
        sum.other = detail::cuda::packed_rows<T>(b, 1, offset_t{tokens} * inner, inner);
        return sum;
    };
    for (const auto& [items, tokens] : {std::pair{1, 1}, {2, 0}, {3, 67}, {1, 2100}, {600, 130}}) {
        INFO(items, " items of ", tokens, " tokens");
        const auto z = random.tensor<T>({offset_t{items} * tokens, columns}), b = random.tensor<T>({offset_t{items} * tokens, inner});
        const CudaTensor<T> device_z = to_device(z), device_b = to_device(b), to(std::vector<T>(static_cast<std::size_t>(columns * inner), T(1)).data(), {columns, inner});
        const auto sum = sum_of(device_z.data(), device_b.data(), items, tokens);
        const CudaTensor<T> states({1, sum.states_size()});
        detail::cuda::sum_over_tokens(sum, states.data(), to.view(), true, nullptr);
        const auto got = to_host(to).values;
        for (index_t r = 0; r < columns; ++r)
            for (index_t c = 0; c < inner; ++c) {
                double wanted = 1, sizes = 1;
                for (index_t t = 0; t < items * tokens; ++t) {
                    const double term = double(z.values[static_cast<std::size_t>(t * columns + r)]) * double(b.values[static_cast<std::size_t>(t * inner + c)]);
                    wanted += term;
                    sizes += std::abs(term);
                }
                CHECK(std::abs(double(got[static_cast<std::size_t>(r * inner + c)]) - wanted) <= 1.01 * (items * tokens + 2) * (u + 0x1p-53) * sizes);  // any order of the sum
            }
    }
    for (const index_t items : {1, 7, 50, 2000})
        for (index_t tokens = 0; tokens < 5000; ++tokens) {
            const auto size = [&](index_t count) { return sum_of(nullptr, nullptr, items, count).states_size(); };
            if (size(tokens) > size(tokens + 1)) FAIL_CHECK(items, " items of ", tokens, " tokens take more than one token more");
        }
}

TEST_CASE("errors name the argument") {
    POLYATTN_RANDOM(random);
    using Layer = nn::CudaAdaptiveMultiResolution<float, StraightThroughRecipe>;
    auto parameters = draw_parameters<float>(random, 6, 3, true);
    Layer layer({}, parameters, "layer", 2);
    CHECK(argument([&] { Layer({}, parameters, "layer", 4); }) == "heads");
    CHECK(argument([&] { Layer({}, parameters, "other", 2); }) == "parameters");
    CHECK(argument([&] { Layer({.router = {.balance = -1}}, parameters, "layer", 2); }) == "balance");
    const CudaTensor<float> x = to_device(random.tensor<float>({12, 6})), y({12, 6}), long_y({13, 6}), narrow({12, 5}), cube({1, 12, 6});
    Tensor<float> host({12, 6});
    typename Layer::Saved saved;
    const auto forward = [&](const TensorView<const float>& from, const TensorView<const float>& residual, const TensorView<float>& to, index_t batch, auto&& change) {
        CudaOptions options;
        change(options);
        return argument([&] { layer.forward(from, residual, to, batch, saved, options); });
    };
    const auto as_is = [](CudaOptions&) {};
    CHECK(argument([&] { layer.backward(saved, constant(y), y.view()); }) == "saved");
    CHECK(forward(constant(narrow), {}, y.view(), 2, as_is) == "x");
    CHECK(forward(constant(cube), {}, y.view(), 2, as_is) == "x");
    CHECK(forward(std::as_const(host).view(), {}, y.view(), 2, as_is) == "x");
    CHECK(forward(constant(x), {}, long_y.view(), 2, as_is) == "y");
    CHECK(forward(constant(x), {}, tensor_view(y.data(), {12, 6}, {1, 12}), 2, as_is) == "y");
    CHECK(forward(constant(x), constant(long_y), y.view(), 2, as_is) == "residual");
    CHECK(forward(constant(x), {}, y.view(), 5, as_is) == "batch");
    CHECK(forward(constant(x), {}, y.view(), 0, as_is) == "batch");
    CHECK(argument([&] { layer.workspace_bytes(tensor_view<const float>(x.data(), {65536, 6}, {0, 1}), 65536); }) == "batch");
    CHECK(forward(constant(x), {}, y.view(), 2, [](CudaOptions& options) { options.key_lengths = {7, 2}; }) == "key_lengths");
    CHECK(forward(constant(x), {}, y.view(), 2, [](CudaOptions& options) { options.key_lengths = {3}; }) == "key_lengths");
    CHECK(forward(constant(x), {}, y.view(), 2, [](CudaOptions& options) { options.query_lengths = {3, 3}; }) == "query_lengths");
    CHECK(forward(constant(x), {}, y.view(), 2, [](CudaOptions& options) { options.plan = Dense{}.plan(6, 6); }) == "plan");
    CHECK(forward(constant(x), {}, y.view(), 2, [](CudaOptions& options) { options.dropout.weights = .5; }) == "dropout.weights");
    CHECK(forward(constant(x), {}, y.view(), 2, [](CudaOptions& options) { options.dropout.values = 1; }) == "dropout.values");
    CHECK(forward(constant(x), {}, y.view(), 2, [](CudaOptions& options) { options.accumulate = true; }) == "accumulate");
    for (const double probability : {-.1, 1., std::numeric_limits<double>::quiet_NaN()}) CHECK(argument([&] { layer.forward(constant(x), {}, y.view(), 2, saved, {}, probability); }) == "output_dropout");
    layer.forward(constant(x), {}, y.view(), 2, saved);
    CHECK(argument([&] { layer.backward(saved, constant(long_y), y.view()); }) == "d_y");
    CHECK(argument([&] { layer.backward(saved, constant(x), long_y.view()); }) == "d_x");
    parameters["layer.resolution1.key"] = Tensor<float>({6, 5});
    CHECK(argument([&] { layer.upload(parameters); }) == "layer.resolution1.key");
    parameters.erase("layer.resolution1.key");
    CHECK(argument([&] { layer.upload(parameters); }) == "parameters");
    parameters["layer.query"] = Tensor<float>({6, 5});
    CHECK(argument([&] { Layer({}, parameters, "layer", 2); }) == "layer.query");
}
