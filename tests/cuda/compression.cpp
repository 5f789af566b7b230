// Compressed keys and values on the device against the double-precision reference, within derived bounds.
#include "cuda/device_layer.hpp"
#include "cuda/kernel_scores.hpp"
#include "support/layers.hpp"
#include "support/padding.hpp"
#include "support/random.hpp"

#include <polyattn/policy/compression/compression.hpp>

#include <doctest/doctest.h>

#include <cmath>

using namespace polyattn;

namespace {

template <class T>
double largest(const Tensor<T>& x) {
    double most = 0;
    for (const T entry : x.values) most = std::max(most, std::abs(double(entry)));
    return most;
}

template <class Policy, class Score>
auto exact_layer(const Policy& policy, const Score& score, const Recursion& recursion) {
    if constexpr (!Policy::is_linear || requires { score.denominator.epsilon; }) return Attention<Policy, Score, Reference>{policy, score};
    else return Attention<Policy, Score, AnyDiffusion, Reference>{policy, score, AnyDiffusion{recursion}};
}

/// What bounds are made of: the largest sum of magnitudes of a row of S, its largest entry, and of kernel scores the lowest denominator that is not 0.
struct Sizes {
    double growth = 1, entry = 1, denominator = 1;
};
template <class T, class Policy, class Score>
Sizes sizes_of(const Policy& policy, const Score& score, const Tensor<T>& q, const Tensor<T>& k, const CallOptions& options) {
    Sizes sizes;
    const auto q_view = q.view(), k_view = k.view();
    if constexpr (requires { policy.table; })
        for (const index_t half : {0, 1}) {
            const std::size_t rows = static_cast<std::size_t>([&] { if constexpr (requires { policy.rows; }) return policy.rows; else return 1; }()), columns = policy.table.size() / 2 / rows;
            for (std::size_t r = 0; r < rows; ++r) {
                double sum = 0;
                for (std::size_t c = 0; c < columns; ++c) {
                    const double weight = std::abs(policy.table[(static_cast<std::size_t>(half) * rows + r) * columns + c]);
                    sum += weight;
                    sizes.entry = std::max(sizes.entry, weight);
                }
                sizes.growth = std::max(sizes.growth, sum);
            }
        }
    if constexpr (detail::is_kernel<Score>) {
        double lowest = 1e300;
        for (index_t b = 0; b < k_view.batch(); ++b)
            for (index_t h = 0; h < q_view.heads(); ++h) {
                const index_t valid = options.key_lengths.empty() ? k_view.tokens() : options.key_lengths[static_cast<std::size_t>(b)];
                Tensor<T> marks({std::max(policy.landmarks(valid), 1), k_view.dim()});
                policy.compress(detail::row_range(k_view.head(b, h / (q_view.heads() / k_view.heads())), 0, valid), Compressed::keys, detail::row_range(marks.view().head(0, 0), 0, policy.landmarks(valid)));
                for (index_t i = 0; i < q_view.tokens(); ++i) {
                    double sum = 0;
                    for (index_t c = 0; c < k_view.dim(); ++c)
                        for (index_t j = 0; j < policy.landmarks(valid); ++j) sum += score.features(double(q_view.head(b, h)(i, c))) * score.features(double(std::as_const(marks).view().head(0, 0)(j, c)));
                    if (sum > 0) lowest = std::min(lowest, sum);
                }
            }
        sizes.denominator = std::min(lowest, 1.);
    }
    return sizes;
}

/// With u the unit roundoff, weights of a row are off by factors within 1 +- eps, and every result is a sum of products of such factors, so it is off by at
/// most their number times eps and the length of sums times u, times the sum taken by magnitude. That sum is bounded by the largest entries, of Z_k as
/// z_k = walk growth z_{k-1} + teleport v, and of G_k by its sum over the tokens, g_{k-1} = walk growth g_k, since rows of A sum to at most 1.
/// Keys and tables of kernel scores are positive, so that compressed keys are off by factors too.
template <class T, class Policy, class Score>
void check(Random& random, const Policy& policy, const Score& score, Recursion recursion, index_t queries, index_t keys, index_t heads, index_t key_heads, CallOptions options) {
    const index_t batch = 3, d = 1 + random.below(12), e = 1 + random.below(12);
    INFO(queries, " queries, ", keys, " keys, d = ", d, ", e = ", e, ", heads ", heads, " / ", key_heads, ", hops ", recursion.hops.size());
    auto q = random.tensor<T>({batch, heads, queries, d}), k = random.tensor<T>({batch, key_heads, keys, d}), v = random.tensor<T>({batch, key_heads, keys, e});
    const auto d_out = random.tensor<T>({batch, heads, queries, e});
    if constexpr (detail::is_kernel<Score>)
        for (T& entry : k.values) entry = std::abs(entry) + T(.125);
    if constexpr (!Policy::is_linear)  // with ties
        for (auto* x : {&k, &v})
            for (T& entry : x->values) entry = std::round(2 * entry) / 2;
    if constexpr (std::is_same_v<Policy, KMeans>)  // equal keys, so that clusters run empty
        if (random.below(2))
            for (T& entry : k.values) entry = std::round(entry);
    const auto q2 = in_double(q), k2 = in_double(k), v2 = in_double(v), d_out2 = in_double(d_out);
    const DeviceLayer<NoBias, Score, Dense, Policy> tested{AnyDiffusion{recursion}, {}, score, {}, policy};
    const auto exact = exact_layer(policy, score, recursion);
    const auto [out, saved] = tested.forward(q.view(), k.view(), v.view(), options);
    CHECK(tested(q.view(), k.view(), v.view(), options).values == out.values);
    const auto gradient = tested.backward(saved, d_out.view()), again = tested.backward(saved, d_out.view());
    CHECK(gradient.k.values == again.k.values);
    CHECK(gradient.compression == again.compression);
    const auto [exact_out, exact_saved] = exact.forward(q2.view(), k2.view(), v2.view(), options);
    const auto exact_gradient = exact.backward(exact_saved, d_out2.view());

    const Sizes sizes = sizes_of(policy, score, q, k, options);
    const double u = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53, m = policy.landmarks(keys), n = std::max(queries, keys), most_q = largest(q), most_k = sizes.growth * largest(k), most_v = largest(v);
    const double keep_values = 1 / (1 - options.dropout.values), keep_weights = 1 / (1 - options.dropout.weights), group = double(heads) / key_heads;
    double eps, to_q, to_k;  // the last two: bounds of what a unit of dL/dweight becomes in dL/dq and dL/dlandmark
    if constexpr (detail::is_kernel<Score>) {
        eps = 4 * (n + d + m + 12) * u;
        to_q = 2 * m * most_k / sizes.denominator;
        to_k = 2 * most_q / sizes.denominator;
    } else {
        const double scores = d * most_q * most_k / std::sqrt(double(d));
        eps = (2 * (n + d + 3) * scores + 8 * (1 + m) + 4 * (1 + scores + std::log(1 + m))) * u;
        to_q = 2 * most_k / std::sqrt(double(d));
        to_k = 2 * most_q / std::sqrt(double(d));
    }
    const auto count = double(recursion.hops.size());
    std::vector<double> z = {std::abs(recursion.start) * most_v};
    const auto walk = [&](std::size_t hop) { return std::abs(recursion.hops[hop].walk) * keep_values * keep_weights * sizes.growth; };
    const auto teleport = [&](std::size_t hop) { return std::abs(recursion.hops[hop].teleport) * keep_values; };
    for (std::size_t hop = 0; hop < recursion.hops.size(); ++hop) z.push_back(walk(hop) * z.back() + teleport(hop) * most_v);
    double g = queries * largest(d_out), by_v = 0, pairs = 0, table_values = 0;
    for (std::size_t hop = recursion.hops.size(); hop-- > 0;) {
        by_v += teleport(hop) * g;
        pairs += e * walk(hop) * g * (z[hop] + z[hop + 1]);
        table_values += e * walk(hop) * g * z[hop];
        g *= walk(hop);
    }
    by_v += std::abs(recursion.start) * g;
    const double forward = (count + 1) * (eps + (n + m + 8) * u), backward = (2 * count + 4) * (eps + (2 * n + 2 * m + (count + 1) * (d + e) + 16) * u);
    const auto compare = [&](const auto& got, const auto& wanted, double tolerance, const char* what) {
        REQUIRE(got.size() == wanted.size());
        std::size_t wrong = 0;
        double worst = 0;
        for (std::size_t i = 0; i < wanted.size(); ++i) {
            const double apart = std::abs(double(got[i]) - wanted[i]);
            worst = std::max(worst, apart);
            wrong += !(apart <= tolerance + 1e-300);
        }
        INFO(what, " apart by ", worst, ", allowed ", tolerance);
        CHECK(wrong == 0);
    };
    compare(out.values, exact_out.values, forward * z.back(), "out");
    compare(gradient.q.values, exact_gradient.q.values, backward * pairs * to_q, "d_q");
    compare(gradient.k.values, exact_gradient.k.values, backward * group * pairs * to_k * sizes.entry, "d_k");
    compare(gradient.v.values, exact_gradient.v.values, backward * group * by_v, "d_v");
    const double items = double(batch) * heads;
    compare(gradient.compression, exact_gradient.compression, backward * items * (table_values + d * pairs * to_k * largest(k)), "table");
}

const std::vector<Recursion> recursions = {NoDiffusion{}.recursion(), PPR<3>{.alpha = .2}.recursion(), HeatKernel<2>{}.recursion(), PPR<0>{}.recursion(), PPR<1>{.alpha = .1}.recursion()};

/// make(tokens): the policy.
template <class T, class Score, class Make>
void check_sizes(Random& random, const Score& score, bool diffuses, Make&& make) {
    for (const index_t n : {0, 1, 5, 33, 64, 70}) {
        CallOptions options;
        options.draw.seed = random.seed();
        if (random.below(2)) options.key_lengths = {n, 0, random.below(n + 1)};
        if (random.below(3) == 0 && n > 0) options.query_lengths = {n, n / 2, random.below(n + 1)};
        options.dropout.values = random.below(2) ? .25 : 0.;
        if (!detail::is_kernel<Score>) options.dropout.weights = random.below(2) ? .125 : 0.;
        const index_t key_heads = 1 + random.below(2);
        check<T>(random, make(n), score, recursions[diffuses ? static_cast<std::size_t>(random.below(5)) : 0], n, n, key_heads * (1 + random.below(2)), key_heads, options);
    }
    check<T>(random, make(70), score, recursions[0], 37, 70, 2, 1, {.key_lengths = {70, 0, 41}});
    check<T>(random, make(5), score, recursions[0], 0, 5, 2, 1, {});
    check<T>(random, make(0), score, recursions[0], 6, 0, 2, 1, {});
}

}  // namespace

TEST_CASE("segment means") {
    POLYATTN_RANDOM(random);
    const auto means = []<index_t L>(SegmentMeans<L> policy) { return [=](index_t) { return policy; }; };
    check_sizes<float>(random, Softmax{}, true, means(SegmentMeans<4>{}));
    check_sizes<double>(random, Softmax{}, true, means(SegmentMeans<4>{}));
    check_sizes<float>(random, ReluMean{}, true, means(SegmentMeans<2>{}));
    check_sizes<double>(random, ReluMean{}, true, means(SegmentMeans<33>{}));
    check_sizes<double>(random, ReluEpsilon{}, false, means(SegmentMeans<2>{}));
}
TEST_CASE("segment maxima") {
    POLYATTN_RANDOM(random);
    check_sizes<float>(random, Softmax{}, false, [](index_t) { return SegmentMax<3>{}; });
    check_sizes<double>(random, Softmax{}, false, [](index_t) { return SegmentMax<3>{}; });
}
TEST_CASE("strided convolution") {
    POLYATTN_RANDOM(random);
    const auto make = [&](index_t) {
        StridedConvolution policy{.stride = 1 + random.below(5), .width = 1 + random.below(7)};
        policy.table.resize(static_cast<std::size_t>(2 * policy.width));
        for (double& weight : policy.table) weight = random.normal() / policy.width;
        return policy;
    };
    check_sizes<float>(random, Softmax{}, true, make);
    check_sizes<double>(random, Softmax{}, true, make);
}
TEST_CASE("projection along the tokens") {
    POLYATTN_RANDOM(random);
    const auto make = [&](index_t n) { return LinearProjection::drawn(std::max(n, 1) + random.below(3), 1 + random.below(70), random.seed()); };
    const auto positive = [&](index_t n) {
        LinearProjection policy = make(n);
        for (double& weight : policy.table) weight = std::abs(weight) + .01;
        return policy;
    };
    check_sizes<float>(random, Softmax{}, true, make);
    check_sizes<double>(random, ReluMean{}, true, positive);
}
TEST_CASE("clusters of keys") {
    POLYATTN_RANDOM(random);
    const auto make = [&](index_t) { return KMeans{.clusters = 1 + random.below(40), .iterations = random.below(4)}; };
    check_sizes<float>(random, Softmax{}, true, make);
    check_sizes<double>(random, Softmax{}, true, make);
}
TEST_CASE("padding never counts, whatever it holds") {
    POLYATTN_RANDOM(random);
    check_padding(random, DeviceLayer<NoBias, Softmax, Dense, SegmentMeans<4>>{AnyDiffusion{recursions[1]}});
    check_padding(random, DeviceLayer<NoBias, ReluMean, Dense, SegmentMeans<2>>{AnyDiffusion{recursions[0]}});
    check_padding(random, DeviceLayer<NoBias, Softmax, Dense, SegmentMax<3>>{AnyDiffusion{recursions[0]}});
    check_padding(random, DeviceLayer<NoBias, Softmax, Dense, StridedConvolution>{AnyDiffusion{recursions[1]}, {}, {}, {}, StridedConvolution::means(3)});
    check_padding(random, DeviceLayer<NoBias, Softmax, Dense, KMeans>{AnyDiffusion{recursions[1]}, {}, {}, {}, KMeans{.clusters = 5}});
    check_padding(random, DeviceLayer<NoBias, Softmax, Dense, LinearProjection>{AnyDiffusion{recursions[1]}, {}, {}, {}, LinearProjection::drawn(40, 5)});
}
