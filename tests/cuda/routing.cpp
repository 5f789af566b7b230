// Routes on the device against the CPU's layer of several resolutions.
#include "cuda/device_routing.hpp"
#include "support/random.hpp"

#include <polyattn/nn/adaptive_multi_resolution.hpp>
#include <polyattn/policy/compression/compression.hpp>
#include <polyattn/polyattn.hpp>

#include <doctest/doctest.h>

using namespace polyattn;

namespace {

/// The same rows through the CPU's layer and the device; `ties` makes the first two resolutions' logits equal.
template <class T, class Router>
void check(Random& random, const Router& router, index_t batch, index_t tokens, const std::vector<index_t>& lengths, bool ties = false) {
    using Recipe = MultiResolution<SegmentMeans<2, 5, 16>, Router, Kernel<ReLU>>;
    constexpr bool learned = detail::is_learned_router<Router>, all = std::is_same_v<Router, ConcatenateAll>;
    constexpr index_t dim = 6, heads = 2, resolutions = 3;
    const index_t rows = batch * tokens;
    INFO(batch, " items of ", tokens, " tokens");
    nn::AdaptiveMultiResolution<T, Recipe> layer("layer", Recipe{.router = router}, dim, heads, heads, .3, 1, random.seed());
    if constexpr (learned)
        if (ties) std::copy_n(layer.router[0].value.values.begin(), dim, layer.router[0].value.values.begin() + dim);
    typename nn::AdaptiveMultiResolution<T, Recipe>::Saved saved;
    Workspace workspace;
    const auto x = random.tensor<T>({rows, dim});
    Tensor<T> y({rows, dim});
    CallOptions options;
    options.workspace = &workspace;
    options.key_lengths = lengths;
    options.draw = {.seed = random.seed(), .step = 3};
    layer.forward(detail::rows_of(x), {}, detail::rows_of(y), batch, saved, options, {});

    DeviceRouter<T> device{nullptr, {}, options.draw};
    Tensor<T> logits({rows, resolutions});
    if constexpr (learned) {
        detail::multiply(detail::rows_of(x), detail::transposed(detail::rows_of(std::as_const(saved.folded_router))), detail::rows_of(logits), false, workspace);
        device.logits = logits.data();
    } else if constexpr (!all) device.seed = router.seed;
    const auto got = route_on_device<T>(device, batch, tokens, resolutions, lengths);
    CHECK(got.routes == saved.routes);
    CHECK(got.starts == saved.starts);
    CHECK(got.order == saved.order);
    for (std::size_t bucket = 0; bucket < got.counts.size(); ++bucket) CHECK(got.counts[bucket] == got.starts[bucket + 1] - got.starts[bucket]);
    const double u = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;
    if constexpr (learned)
        for (index_t row = 0; row < rows; ++row)
            for (index_t h = 0; h < resolutions; ++h) {
                const auto at = static_cast<std::size_t>(row * resolutions + h);
                const double wanted = saved.routes[static_cast<std::size_t>(row)] < 0 ? 0 : double(saved.probabilities.values[at]);
                CHECK(std::abs(double(got.probabilities[at]) - wanted) <= 32 * u);  // exponentials within 4 u on both sides, a sum and a quotient
            }
}

template <class T, class Router>
void check_sizes(Random& random, const Router& router) {
    check<T>(random, router, 1, 1, {});
    check<T>(random, router, 3, 7, {});
    check<T>(random, router, 3, 33, {33, 0, 1 + random.below(33)});
    check<T>(random, router, 2, 64, {0, 0});
    check<T>(random, router, 2, 150, {150, random.below(151)});
}

}  // namespace

TEST_CASE("learned routes") {
    POLYATTN_RANDOM(random);
    check_sizes<float>(random, TopOne<StraightThrough>{});
    check_sizes<double>(random, TopOne<StraightThrough>{});
    check_sizes<float>(random, TopOne<Switch>{});
    check<float>(random, TopOne<StraightThrough>{}, 2, 40, {40, 31}, true);
    check<double>(random, TopOne<Literal>{}, 2, 40, {}, true);
}
TEST_CASE("random routes, and all of them") {
    POLYATTN_RANDOM(random);
    check_sizes<float>(random, RandomRoute{.seed = random.seed()});
    check_sizes<double>(random, ConcatenateAll{});
}
TEST_CASE("many rows") {
    POLYATTN_RANDOM(random);
    const index_t batch = 2, tokens = 5000, resolutions = 4;
    const std::vector<index_t> lengths = {tokens, 4321};
    const DeviceRouter<float> router{nullptr, random.seed(), {.seed = random.seed()}};
    const auto got = route_on_device<float>(router, batch, tokens, resolutions, lengths);
    std::vector<std::vector<index_t>> buckets(static_cast<std::size_t>(resolutions * batch));
    for (index_t b = 0; b < batch; ++b)
        for (index_t i = 0; i < lengths[static_cast<std::size_t>(b)]; ++i) {
            const index_t row = b * tokens + i, route = static_cast<index_t>(RandomRow(*router.seed, static_cast<std::uint32_t>(row), random_stream::random_routes, router.draw.hash()).below(resolutions));
            buckets[static_cast<std::size_t>(route * batch + b)].push_back(row);
        }
    std::vector<index_t> order, starts = {0};
    for (const auto& bucket : buckets) {
        order.insert(order.end(), bucket.begin(), bucket.end());
        starts.push_back(static_cast<index_t>(order.size()));
    }
    CHECK(got.order == order);
    CHECK(got.starts == starts);
    const auto none = route_on_device<float>({nullptr, 1, {}}, 0, 5, 3, {});
    CHECK(none.starts == std::vector<index_t>{0});
}
