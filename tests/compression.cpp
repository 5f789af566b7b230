// Compressed keys and values: the papers' numbers, the definition by matrices, gradients of inputs and learned weights, properties, errors.
#include "support/errors.hpp"
#include "support/finite_differences.hpp"
#include "support/layers.hpp"
#include "support/padding.hpp"
#include "support/random.hpp"

#include <polyattn/policy/compression/compression.hpp>

#include <doctest/doctest.h>

#include <functional>
#include <numeric>

using namespace polyattn;

namespace {

Tensor<double> column(AlignedVector<double> values) {
    Tensor<double> x({static_cast<offset_t>(values.size()), 1});
    x.values = std::move(values);
    return x;
}
template <class Layer>
void check_self(const Layer& layer, const Tensor<double>& x, const std::vector<double>& wanted, index_t length = -1) {
    CallOptions options;
    if (length >= 0) options.key_lengths = {length};
    const auto out = layer(x.view(), x.view(), x.view(), options);
    REQUIRE(out.values.size() == wanted.size());
    for (std::size_t i = 0; i < wanted.size(); ++i) CHECK(out.values[i] == doctest::Approx(wanted[i]).epsilon(1e-14));
}

/// The matrix S of a compression: landmarks x tokens.
template <class Policy>
Tensor<double> matrix_of(const Policy& policy, const Tensor<double>& keys, Compressed what) {
    const index_t n = static_cast<index_t>(keys.shape[0]);
    Tensor<double> identity({n, n}), matrix({policy.landmarks(n), n});
    for (index_t i = 0; i < n; ++i) identity.values[static_cast<std::size_t>(i * n + i)] = 1;
    const auto& bound = detail::bind_compression(policy, std::as_const(keys).view().head(0, 0));
    bound.compress(std::as_const(identity).view().head(0, 0), what, matrix.view().head(0, 0));
    return matrix;
}
Tensor<double> product(const Tensor<double>& a, const Tensor<double>& b) {
    Tensor<double> c({a.shape[0], b.shape[1]});
    for (offset_t i = 0; i < a.shape[0]; ++i)
        for (offset_t t = 0; t < a.shape[1]; ++t)
            for (offset_t j = 0; j < b.shape[1]; ++j) c.values[static_cast<std::size_t>(i * b.shape[1] + j)] += a.values[static_cast<std::size_t>(i * a.shape[1] + t)] * b.values[static_cast<std::size_t>(t * b.shape[1] + j)];
    return c;
}
double largest(const Tensor<double>& x) {
    double most = 0;
    for (const double entry : x.values) most = std::max(most, std::abs(entry));
    return most;
}
void check_near(const Tensor<double>& got, const Tensor<double>& wanted, double tolerance) {
    REQUIRE(got.values.size() == wanted.values.size());
    double worst = 0;
    for (std::size_t i = 0; i < wanted.values.size(); ++i) worst = std::max(worst, std::abs(got.values[i] - wanted.values[i]));
    CHECK(worst <= tolerance);
}

/// Attention to S K, S V, diffused, is the polynomial of the matrix A S.
template <class Score, class Policy>
void check_matrix(Random& random, const Policy& policy, index_t n, const Recursion& recursion) {
    const index_t d = 4, e = 3;
    const auto q = random.tensor<double>({n, d}), k = random.tensor<double>({n, d}), v = random.tensor<double>({n, e});
    const auto keys = product(matrix_of(policy, k, Compressed::keys), k);
    const auto s = matrix_of(policy, k, Compressed::values);
    const index_t m = static_cast<index_t>(s.shape[0]);
    Tensor<double> identity({m, m});
    for (index_t i = 0; i < m; ++i) identity.values[static_cast<std::size_t>(i * m + i)] = 1;
    const auto a = product(Attention<Score>{}(q.view(), keys.view(), identity.view()), s);
    Tensor<double> z = v;
    for (double& entry : z.values) entry *= recursion.start;
    double most = largest(v);  // rows of A sum to 1 in magnitude, of S to the sum of its weights
    double growth = 0;
    for (offset_t j = 0; j < s.shape[0]; ++j) {
        double sum = 0;
        for (offset_t i = 0; i < n; ++i) sum += std::abs(s.values[static_cast<std::size_t>(j * n + i)]);
        growth = std::max(growth, sum);
    }
    for (const Hop& hop : recursion.hops) {
        auto next = product(a, z);
        for (std::size_t i = 0; i < next.values.size(); ++i) next.values[i] = hop.walk * next.values[i] + hop.teleport * v.values[i];
        z = next;
        most = std::max(most, std::max(growth, 1.) * most);
    }
    INFO(n, " tokens to ", m, ", hops ", recursion.hops.size());
    // The scores are the same up to the landmarks' rounding, (n + d) u of magnitudes below 6.5^2 d growth; they move weights by twice that.
    const double u = 0x1p-53, scores = (n + d + 3) * u * 6.5 * 6.5 * d * std::max(growth, 1.);
    const double tolerance = (double(recursion.hops.size()) + 1) * (2 * scores + (4. * n + 8 * m + d + 16) * u) * most * 2 + 1e-300;
    check_near(Attention<Policy, Score, AnyDiffusion>{policy, AnyDiffusion{recursion}}(q.view(), k.view(), v.view()), z, tolerance);
    check_near(Attention<Policy, Score, AnyDiffusion, Reference>{policy, AnyDiffusion{recursion}}(q.view(), k.view(), v.view()), z, tolerance);
}

template <class Layer>
void check_gradients(Random& random, Layer layer, index_t n, const CallOptions& options, index_t heads, index_t key_heads, bool apart = false) {
    auto q = random.tensor<double>({2, heads, n, 4}), k = random.tensor<double>({2, key_heads, n, 4}), v = random.tensor<double>({2, key_heads, n, 3});
    // Maxima bend where two entries are equal: here all are a hundredth apart at least.
    if (apart)
        for (auto* x : {&k, &v}) {
            std::vector<std::size_t> order(x->values.size());
            std::iota(order.begin(), order.end(), std::size_t{0});
            std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return x->values[a] < x->values[b]; });
            for (std::size_t rank = 0; rank < order.size(); ++rank) x->values[order[rank]] = .01 * (double(rank) - double(order.size()) / 2);
        }
    const auto d_out = random.tensor<double>({2, heads, n, 3});
    const auto loss = [&] {
        const auto out = layer(q.view(), k.view(), v.view(), options);
        double sum = 0;
        for (std::size_t i = 0; i < out.values.size(); ++i) sum += out.values[i] * d_out.values[i];
        return sum;
    };
    const auto saved = layer.forward(q.view(), k.view(), v.view(), options).saved;
    const auto gradient = layer.backward(saved, d_out.view());
    CHECK(gradient.k.values == layer.backward(saved, d_out.view()).k.values);
    const double tolerance = 1e-7 * (1 + std::abs(loss()));
    const auto compare = [&](double& value, const std::function<double()>& moved, double got, const char* what, std::size_t at) {
        INFO(what, " entry ", at, " of ", n, " tokens");
        CHECK(std::abs(derivative(value, moved, 1e-4) - got) < tolerance + 1e-7 * std::abs(got));
    };
    const auto sample = [&](auto& values, const auto& got, const char* what) {
        for (int s = 0; s < 6; ++s) {
            const auto at = static_cast<std::size_t>(random.below(static_cast<index_t>(values.size())));
            compare(values[at], loss, got[at], what, at);
        }
    };
    sample(q.values, gradient.q.values, "q");
    sample(k.values, gradient.k.values, "k");
    sample(v.values, gradient.v.values, "v");
    if constexpr (requires { layer.compression().table; }) {
        auto compression = layer.compression();
        REQUIRE(gradient.compression.size() == compression.table.size());
        for (int s = 0; s < 6; ++s) {
            const auto at = static_cast<std::size_t>(random.below(static_cast<index_t>(compression.table.size())));
            compare(compression.table[at],
                    [&] {
                        layer = layer.with_compression(compression);
                        return loss();
                    },
                    gradient.compression[at], "table", at);
            layer = layer.with_compression(compression);
        }
    }
}

struct EverySecond {
    using policy_kind = compression_kind;
    static constexpr bool is_linear = true;
    index_t landmarks(index_t tokens) const { return (tokens + 1) / 2; }
    void compress(MatrixView<const double> x, Compressed, MatrixView<double> y) const {
        for (index_t j = 0; j < y.rows; ++j)
            for (index_t c = 0; c < y.cols; ++c) y(j, c) = x(2 * j, c);
    }
    void compress_adjoint(MatrixView<const double>, Compressed, MatrixView<const double> d_y, MatrixView<double> d_x, std::span<double>) const {
        for (index_t j = 0; j < d_y.rows; ++j)
            for (index_t c = 0; c < d_y.cols; ++c) d_x(2 * j, c) += d_y(j, c);
    }
};

/// A smooth map: differences of maps that bend are off where a step crosses the bend.
struct Exponential {
    double operator()(double x) const { return std::exp(x); }
    double derivative(double x) const { return std::exp(x); }
};

/// A layer that can be assigned with_compression().
template <class... Ps>
class Changeable {
public:
    explicit Changeable(Ps... policies) : layer_(Attention<Ps...>{policies...}) {}
    template <class... Args>
    auto operator()(const Args&... args) const { return layer_(args...); }
    template <class... Args>
    auto forward(const Args&... args) const { return layer_.forward(args...); }
    template <class... Args>
    auto backward(const Args&... args) const { return layer_.backward(args...); }
    const auto& compression() const { return layer_.compression(); }
    template <class C>
    Changeable with_compression(const C& compression) const {
        Changeable other = *this;
        other.layer_ = layer_.with_compression(compression);
        return other;
    }

private:
    using Base = std::remove_cvref_t<decltype(std::declval<const Attention<Ps...>&>().with_compression(std::declval<const Attention<Ps...>&>().compression()))>;
    Base layer_;
};

}  // namespace

TEST_CASE_TEMPLATE("one dimension by hand", Backend, Simd<>, Reference) {
    const Tensor<double> x = column({1, 2, 3, 4}), mixed = column({1, -2, 3, -4}), five = column({1, 2, 3, 4, 5});
    using ReLUs = Kernel<ReLU, ExactOrZero>;
    using Elus = Kernel<EluPlusOne, ExactOrZero>;
    check_self(Attention<SegmentMeans<1>, ReLUs, Backend>{}, x, {3, 3, 3, 3});
    check_self(Attention<SegmentMeans<2>, ReLUs, Backend>{}, x, {2.9, 2.9, 2.9, 2.9});
    check_self(Attention<SegmentMeans<4>, ReLUs, Backend>{}, x, {2.5, 2.5, 2.5, 2.5});
    check_self(Attention<SegmentMeans<1>, Elus, Backend>{}, x, std::vector<double>(4, 20. / 7));
    check_self(Attention<SegmentMeans<2>, Elus, Backend>{}, x, std::vector<double>(4, 39. / 14));
    check_self(Attention<SegmentMeans<4>, Elus, Backend>{}, x, std::vector<double>(4, 5. / 2));
    check_self(Attention<SegmentMeans<2>, ReLUs, Backend>{}, mixed, {0, 0, 0, 0});
    check_self(Attention<SegmentMeans<2>, Elus, Backend>{}, mixed, std::vector<double>(4, -.5));
    check_self(Attention<SegmentMeans<2>, ReLUs, Backend>{}, five, std::vector<double>(5, 79. / 20));
    check_self(Attention<SegmentMeans<2>, ReLUs, Backend>{}, five, {2.5, 2.5, 2.5, 0, 0}, 3);
    check_self(Attention<SegmentMeans<2>, Elus, Backend>{}, five, {0, 0, 0, 0, 0}, 0);  // elu(0) + 1 = 1 must not leak
    check_self(Attention<SegmentMax<2>, ReLUs, Backend>{}, x, std::vector<double>(4, (2. * 2 + 4. * 4) / 6));
}

TEST_CASE("the definition by matrices") {
    POLYATTN_RANDOM(random);
    const std::vector<Recursion> recursions = {NoDiffusion{}.recursion(), PPR<3>{.alpha = .2}.recursion(), HeatKernel<2>{}.recursion(), PPR<0>{}.recursion()};
    for (const index_t n : {1, 7, 24, 65}) {
        const Recursion& recursion = recursions[static_cast<std::size_t>(random.below(4))];
        check_matrix<Softmax>(random, SegmentMeans<4>{}, n, recursion);
        check_matrix<Kernel<ReLU, ExactOrMean>>(random, SegmentMeans<8>{}, n, recursion);
        StridedConvolution convolution{.stride = 3, .width = 5, .table = std::vector<double>(10)};
        for (double& weight : convolution.table) weight = random.normal() / 4;
        check_matrix<Softmax>(random, convolution, n, recursion);
        check_matrix<Softmax>(random, LinearProjection::drawn(n, 1 + random.below(9), random.seed()), n, recursion);
        check_matrix<Softmax>(random, KMeans{.clusters = 1 + random.below(9)}, n, recursion);
    }
}

TEST_CASE("Linformer with identity projections is softmax attention") {
    POLYATTN_RANDOM(random);
    const index_t n = 20;
    LinearProjection identity{.tokens = n, .rows = n, .table = std::vector<double>(2 * n * n, 0.)};
    for (index_t i = 0; i < n; ++i) identity.table[static_cast<std::size_t>(i * n + i)] = identity.table[static_cast<std::size_t>(n * n + i * n + i)] = 1;
    const auto q = random.tensor<double>({3, n, 8}), k = random.tensor<double>({3, n, 8}), v = random.tensor<double>({3, n, 8});
    const auto out = Attention<LinearProjection>{identity}(q.view(), k.view(), v.view());
    CHECK(out.values == Attention<>{}(q.view(), k.view(), v.view()).values);
}

TEST_CASE("properties") {
    POLYATTN_RANDOM(random);
    const index_t n = 24, d = 6, e = 5;
    const auto q = random.tensor<double>({n, d});
    auto k = random.tensor<double>({n, d}), v = random.tensor<double>({n, e});
    const Attention<SegmentMeans<4>, Kernel<ReLU, ExactOrMean>> by_four;
    // One segment: the mean of V, whatever the query.
    const auto mean = Attention<SegmentMeans<24>, Kernel<EluPlusOne>>{}(q.view(), k.view(), v.view());
    for (index_t c = 0; c < e; ++c) {
        double sum = 0;
        for (index_t i = 0; i < n; ++i) sum += v.values[static_cast<std::size_t>(i * e + c)];
        for (index_t i = 0; i < n; ++i) CHECK(std::abs(mean.values[static_cast<std::size_t>(i * e + c)] - sum / n) < 1e-5 * 6.5);  // the epsilon's share: 1e-6 / a denominator >= .1
    }
    // Without an epsilon, to rounding. Means of four are means of two means of two.
    const auto exactly = Attention<SegmentMeans<24>, Kernel<EluPlusOne, ExactOrZero>>{}(q.view(), k.view(), v.view());
    for (index_t c = 0; c < e; ++c) {
        double sum = 0, sizes = 0;
        for (index_t i = 0; i < n; ++i) {
            sum += v.values[static_cast<std::size_t>(i * e + c)];
            sizes += std::abs(v.values[static_cast<std::size_t>(i * e + c)]);
        }
        for (index_t i = 0; i < n; ++i) CHECK(std::abs(exactly.values[static_cast<std::size_t>(i * e + c)] - sum / n) < (2 * n + 4 * d + 8) * 0x1p-53 * sizes / n);
    }
    const auto twos = matrix_of(SegmentMeans<2>{}, k, Compressed::values), fours = matrix_of(SegmentMeans<4>{}, k, Compressed::values);
    for (index_t j = 0; j < n / 4; ++j)
        for (index_t i = 0; i < n; ++i)
            CHECK(fours.values[static_cast<std::size_t>(j * n + i)] == .5 * (twos.values[static_cast<std::size_t>(2 * j * n + i)] + twos.values[static_cast<std::size_t>((2 * j + 1) * n + i)]));
    // Permuting tokens within a segment, and whole segments, changes nothing but roundings.
    const auto out = by_four(q.view(), k.view(), v.view());
    auto k2 = k, v2 = v;
    for (index_t i = 0; i < n; ++i) {
        const index_t from = n - 1 - i;
        std::copy_n(&k.values[static_cast<std::size_t>(from * d)], d, &k2.values[static_cast<std::size_t>(i * d)]);
        std::copy_n(&v.values[static_cast<std::size_t>(from * e)], e, &v2.values[static_cast<std::size_t>(i * e)]);
    }
    // Rounding of a mean may decide about a ReLU's bend only where the mean is within 4 u of 0; what it moves there is as small.
    check_near(by_four(q.view(), k2.view(), v2.view()), out, 1e-12 * 6.5);
    // Tokens equal within segments: the same as no compression.
    for (index_t i = 0; i < n; ++i) {
        std::copy_n(&k.values[static_cast<std::size_t>(i / 4 * 4 * d)], d, &k.values[static_cast<std::size_t>(i * d)]);
        std::copy_n(&v.values[static_cast<std::size_t>(i / 4 * 4 * e)], e, &v.values[static_cast<std::size_t>(i * e)]);
    }
    check_near(by_four(q.view(), k.view(), v.view()), Attention<Kernel<ReLU, ExactOrMean>>{}(q.view(), k.view(), v.view()), 1e-12 * 6.5);
}

TEST_CASE("a maximum of what is not a number is not a number, wherever it stands in its segment") {
    POLYATTN_RANDOM(random);
    for (const index_t at : {4, 5, 7}) {
        auto k = random.tensor<float>({12, 2});
        k.values[static_cast<std::size_t>(at * 2)] = std::numeric_limits<float>::quiet_NaN();
        Tensor<float> y({3, 2});
        SegmentMax<4>{}.compress(std::as_const(k).view().head(0, 0), Compressed::keys, y.view().head(0, 0));
        for (std::size_t i = 0; i < 6; ++i) CHECK(detail::is_nan(y.values[i]) == (i == 2));
    }
}

TEST_CASE("clusters of keys: deterministic, none empty, and they find what is there") {
    POLYATTN_RANDOM(random);
    const auto keys = random.tensor<double>({50, 3});
    for (const index_t clusters : {1, 7, 50, 80}) {
        const auto bound = KMeans{.clusters = clusters}.bind(keys.view().head(0, 0));
        CHECK(bound.cluster == KMeans{.clusters = clusters}.bind(keys.view().head(0, 0)).cluster);
        CHECK(bound.sizes.size() == static_cast<std::size_t>(std::min(clusters, 50)));
        CHECK(*std::min_element(bound.sizes.begin(), bound.sizes.end()) >= 1);
    }
    Tensor<double> same({9, 2});  // all keys equal: every cluster still has one
    const auto bound = KMeans{.clusters = 4}.bind(std::as_const(same).view().head(0, 0));
    CHECK(*std::min_element(bound.sizes.begin(), bound.sizes.end()) >= 1);
    Tensor<double> far({30, 1});
    for (std::size_t i = 0; i < 30; ++i) far.values[i] = 100. * double(i % 3) + .1 * random.uniform();
    const auto found = KMeans{.clusters = 3}.bind(std::as_const(far).view().head(0, 0));
    for (std::size_t i = 3; i < 30; ++i) CHECK(found.cluster[i] == found.cluster[i % 3]);
}

TEST_CASE_TEMPLATE("gradients by finite differences", Backend, Simd<>, Reference) {
    POLYATTN_RANDOM(random);
    for (const index_t n : {1, 13}) {
        CallOptions options;
        if (random.below(2)) options.key_lengths = {n, n / 2 + 1};
        options.draw.seed = random.seed();
        const AnyDiffusion none{NoDiffusion{}.recursion()}, walk{PPR<2>{}.recursion()}, nothing{PPR<0>{}.recursion()};
        check_gradients(random, Changeable(SegmentMeans<4>{}, Kernel<Exponential, ExactOrMean>{}, none, Backend{}), n, options, 4, 2);
        check_gradients(random, Changeable(SegmentMeans<4>{}, Kernel<Exponential, ExactOrMean>{}, nothing, Backend{}), n, options, 4, 2);
        check_gradients(random, Changeable(SegmentMax<3>{}, Backend{}), n, options, 2, 2, true);
        auto convolution = StridedConvolution::means(3);
        check_gradients(random, Changeable(convolution, none, Backend{}), n, options, 4, 2);
        auto projection = LinearProjection::drawn(n + 1, 4, random.seed());
        options.dropout = {.weights = .2, .values = .1};
        check_gradients(random, Changeable(projection, walk, Backend{}), n, options, 4, 2);
        check_gradients(random, Changeable(convolution, walk, Backend{}), n, options, 4, 1);
    }
}

TEST_CASE("gradients of a projection into memory of any strides") {
    POLYATTN_RANDOM(random);
    const index_t n = 70, d = 5;
    const Attention<LinearProjection> layer{LinearProjection::drawn(n, 6, random.seed())};
    const auto x = random.tensor<float>({2, n, d}), d_out = random.tensor<float>({2, n, d});
    const auto saved = layer.forward(x.view(), x.view(), x.view()).saved;
    const auto plain = layer.backward(saved, d_out.view());
    Tensor<float> memory[3];
    const auto transposed = [&](Tensor<float>& tensor) {
        tensor = Tensor<float>({2, d, n});
        return TensorView<float>{tensor.data(), {1, 2, n, d}, {2 * n * d, n * d, 1, n}, 3};
    };
    Gradients<TensorView<float>> strided{transposed(memory[0]), transposed(memory[1]), transposed(memory[2]), {}, {}};
    layer.backward_into(strided, saved, d_out.view());
    CHECK(strided.compression == plain.compression);
    for (index_t h = 0; h < 2; ++h)
        for (index_t i = 0; i < n; ++i)
            for (index_t c = 0; c < d; ++c) {
                CHECK(strided.k.head(0, h)(i, c) == plain.k.view().head(0, h)(i, c));
                CHECK(strided.v.head(0, h)(i, c) == plain.v.view().head(0, h)(i, c));
            }
}

TEST_CASE("gradients through clusters, which stay as they are") {
    // Far apart, so that no difference moves a key to another cluster.
    POLYATTN_RANDOM(random);
    const index_t n = 12;
    const Attention<KMeans> layer{KMeans{.clusters = 3}};
    auto q = random.tensor<double>({n, 2}, .1), k = random.tensor<double>({n, 2}, .1);
    for (index_t i = 0; i < n; ++i) k.values[static_cast<std::size_t>(2 * i)] += 3 * (i % 3);
    const auto v = random.tensor<double>({n, 2}), d_out = random.tensor<double>({n, 2});
    const auto loss = [&] {
        const auto out = layer(q.view(), k.view(), v.view());
        double sum = 0;
        for (std::size_t i = 0; i < out.values.size(); ++i) sum += out.values[i] * d_out.values[i];
        return sum;
    };
    const auto gradient = layer.backward(layer.forward(q.view(), k.view(), v.view()).saved, d_out.view());
    for (std::size_t at = 0; at < k.values.size(); ++at) {
        const double start = k.values[at], h = 1e-4;
        k.values[at] = start + h;
        const double up = loss();
        k.values[at] = start - h;
        const double down = loss();
        k.values[at] = start;
        CHECK(std::abs((up - down) / (2 * h) - gradient.k.values[at]) < 1e-6 * (1 + std::abs(loss())));
    }
}

TEST_CASE("padding never counts, whatever it holds") {
    POLYATTN_RANDOM(random);
    check_padding(random, Attention<SegmentMeans<4>, Kernel<ReLU>>{});
    check_padding(random, Attention<SegmentMeans<4>, PPR<2>>{});
    check_padding(random, Attention<SegmentMax<4>>{});
    check_padding(random, Attention<KMeans>{KMeans{.clusters = 5}});
    check_padding(random, Attention<LinearProjection>{LinearProjection::drawn(40, 5)});
}

static_assert(!std::is_copy_constructible_v<CompressedSaved<float>> && std::is_move_constructible_v<CompressedSaved<float>>);

TEST_CASE("into, accumulate, a saved pass that is used again, moved") {
    POLYATTN_RANDOM(random);
    const index_t n = 20, d = 6;
    const auto check = [&](const auto& layer) {
        const auto q = random.tensor<double>({1, 2, n, d}), k = random.tensor<double>({1, 2, n, d}), v = random.tensor<double>({1, 2, n, d});
        const auto out = layer(q.view(), k.view(), v.view());
        Tensor<double> sum(out.shape);
        std::fill(sum.values.begin(), sum.values.end(), 1.);
        layer.into(sum.view(), q.view(), k.view(), v.view(), {.accumulate = true});
        for (std::size_t i = 0; i < out.values.size(); ++i) CHECK(sum.values[i] == doctest::Approx(1 + out.values[i]).epsilon(1e-14));
        // Tensors are copied, views borrowed; the same saved pass may see one after the other.
        xt::xtensor<double, 4> ones = xt::ones<double>({1, 2, 20, 6});
        auto [first, saved] = layer.forward(ones, ones, ones);
        Tensor<double> again(out.shape);
        layer.forward_into(again.view(), saved, q.view(), k.view(), v.view());
        CHECK(again.values == out.values);
        const auto moved = std::move(saved);
        CHECK(layer.backward(moved, q.view()).k.values == layer.backward(layer.forward(q.view(), k.view(), v.view()).saved, q.view()).k.values);
        // Expressions without memory, and rows that lie apart.
        const xt::xtensor<double, 4> x = xt::adapt(q.values, std::vector<std::size_t>{1, 2, 20, 6});
        const auto expression = layer(x * 1., x * 1., x * 1.), plain = layer(x, x, x);
        CHECK(std::equal(expression.begin(), expression.end(), plain.begin()));
        Tensor<double> wide({1, 2, n, d + 3});
        for (index_t i = 0; i < 2 * n; ++i) std::copy_n(&q.values[static_cast<std::size_t>(i * d)], d, &wide.values[static_cast<std::size_t>(i * (d + 3))]);
        const auto strided = tensor_view<const double>(wide.data(), {1, 2, n, d}, {2 * n * (d + 3), n * (d + 3), d + 3, 1});
        CHECK(layer(strided, strided, strided).values == layer(q.view(), q.view(), q.view()).values);
    };
    check(Attention<SegmentMeans<3>>{});
    check(Attention<SegmentMeans<3>, Kernel<EluPlusOne>, PPR<2>>{});
    check(Attention<Kernel<ReLU>>{});
    check(Attention<Kernel<EluPlusOne>, Causal, PPR<2>>{});
}

TEST_CASE("a compression of one's own") {
    POLYATTN_RANDOM(random);
    check_gradients(random, Changeable(EverySecond{}, PPR<2>{}), 9, {}, 2, 1);
}

TEST_CASE("errors name the argument") {
    const Tensor<float> x({1, 1, 6, 4}), y({1, 1, 5, 4});
    CHECK(argument([] { Attention{StridedConvolution{.stride = 0}}; }) == "stride");
    CHECK(argument([] { Attention{StridedConvolution{.stride = 2, .width = 3}}; }) == "table");
    CHECK(argument([] { Attention{LinearProjection{.tokens = 4, .rows = 2, .table = std::vector<double>(16, std::nan(""))}}; }) == "table");
    CHECK(argument([] { Attention{KMeans{.clusters = 0}}; }) == "clusters");
    CHECK(argument([&] { Attention{LinearProjection::drawn(5, 2)}(x.view(), x.view(), x.view()); }) == "tokens of LinearProjection");
    const Attention<SegmentMeans<2>> layer;
    CHECK(argument([&] { layer(x.view(), x.view(), x.view(), {.key_lengths = {7}}); }) == "key_lengths");
    CHECK(argument([&] { layer(x.view(), x.view(), x.view(), {.plan = Dense{}.plan(6, 6)}); }) == "plan");
    CHECK(argument([&] { Attention<SegmentMeans<2>, PPR<2>>{}(x.view(), y.view(), y.view()); }) == "k");
    CHECK(argument([&] { layer.backward(layer.forward(x.view(), x.view(), x.view()).saved, y.view()); }) == "d_out");
}

TEST_CASE("no heads, no batch, no tokens, no columns of values") {
    const auto check = [](const auto& layer) {
        for (const auto& shape : {std::vector<offset_t>{0, 2, 5, 4}, {2, 0, 5, 4}, {2, 2, 0, 4}}) {
            const Tensor<float> x(shape);
            const auto [out, saved] = layer.forward(x.view(), x.view(), x.view());
            CHECK(out.values.empty());
            CHECK(layer.backward(saved, out.view()).k.values.empty());
        }
        const Tensor<float> x({1, 1, 5, 4}), nothing({1, 1, 5, 0});
        const auto [out, saved] = layer.forward(x.view(), x.view(), nothing.view());
        for (const float entry : layer.backward(saved, out.view()).k.values) CHECK(entry == 0);
    };
    check(Attention<SegmentMeans<2>, PPR<2>>{});
    check(Attention{KMeans{.clusters = 2}});
    check(Attention{LinearProjection::drawn(5, 2)});
}
