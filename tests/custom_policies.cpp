// Policies of one's own work exactly like the library's.
#include "support/random.hpp"

#include <polyattn/polyattn.hpp>

#include <doctest/doctest.h>

#include <memory>
#include <stdexcept>

using namespace polyattn;

namespace {

/// Every query sees the keys that differ from its position by a power of two, and itself.
struct PowersOfTwo {
    using policy_kind = sparsity_pattern_kind;
    index_t longest = 1 << 20;

    void validate() const { detail::require(longest >= 1, "longest", "a distance >= 1", longest); }
    Plan plan(index_t queries, index_t keys) const {
        EdgeList list{{0}, {}};
        for (index_t i = 0; i < queries; ++i) {
            const index_t position = i + keys - queries;
            for (index_t j = 0; j < keys; ++j) {
                const index_t distance = std::abs(j - position);
                if (distance <= longest && (distance & (distance - 1)) == 0) list.keys.push_back(j);
            }
            list.offsets.push_back(static_cast<offset_t>(list.keys.size()));
        }
        return list.plan(queries, keys);
    }
};

/// The mean of V, A V and A^2 V.
struct Averaged {
    using policy_kind = diffusion_kind;
    static constexpr int hops = 2;
    Recursion recursion() const { return Recursion::from_polynomial(std::array{1. / 3, 1. / 3, 1. / 3}); }
};

/// Any number of hops; its member is not the constant of that name.
struct Steps {
    using policy_kind = diffusion_kind;
    int hops = 1;
    Recursion recursion() const { return {1, std::vector<Hop>(static_cast<std::size_t>(hops), Hop{})}; }
};
static_assert(!detail::SaysHops<Steps> && detail::SaysHops<Averaged>);

/// Keeps each key with probability one half, the same keys for all queries; causal layers always keep a query's own key.
struct HalfOfTheKeys {
    using policy_kind = sampler_kind;
    Plan sample(index_t queries, index_t keys, const Draw& draw, bool causal) const {
        std::vector<index_t> kept;
        RandomRow random(draw.seed, 0, 77, draw.hash());
        for (index_t j = 0; j < keys; ++j)
            if (random.below(2) == 0) kept.push_back(j);
        const Plan columns = PlanBuilder(queries, keys).tile(IndexSequence::range(0, queries), IndexSequence::list(kept)).build();
        return causal ? intersect(unite(columns, BlockLocal{.block = 1}.plan(queries, keys)), Causal{}.plan(queries, keys)) : columns;
    }
};

/// A penalty for keys of another sentence.
struct SentenceBias {
    using policy_kind = bias_kind;
    index_t sentence = 10;
    double penalty = 2;
    double operator()(index_t, index_t, index_t query, index_t key) const { return query / sentence == key / sentence ? 0 : -penalty; }
};

/// Policies of one's own that fail on demand.
struct FailingBias {
    using policy_kind = bias_kind;
    std::shared_ptr<bool> fails = std::make_shared<bool>(false);
    double operator()(index_t, index_t, index_t query, index_t) const {
        if (*fails && query == 30) throw std::runtime_error("no bias");
        return 0;
    }
};
struct FailingPairs {
    using policy_kind = compression_kind;
    static constexpr bool is_linear = true;
    std::shared_ptr<bool> fails = std::make_shared<bool>(false);
    index_t landmarks(index_t tokens) const { return (tokens + 1) / 2; }
    template <class T>
    void compress(MatrixView<const T> x, Compressed what, MatrixView<T> y) const {
        if (*fails && what == Compressed::values) throw std::runtime_error("no landmarks");
        for (index_t i = 0; i < y.rows; ++i)
            for (index_t c = 0; c < y.cols; ++c) y(i, c) = x(2 * i, c);
    }
    template <class T>
    void compress_adjoint(MatrixView<const T>, Compressed, MatrixView<const T> d_y, MatrixView<T> d_x, std::span<double>) const {
        for (index_t i = 0; i < d_y.rows; ++i)
            for (index_t c = 0; c < d_y.cols; ++c) d_x(2 * i, c) += d_y(i, c);
    }
};

static_assert(SparsityPattern<PowersOfTwo> && DiffusionPolicy<Averaged> && SamplerPolicy<HalfOfTheKeys> && BiasPolicy<SentenceBias> && !LearnedBias<SentenceBias>);

template <class A, class B>
void check_same(const A& a, const B& b) {
    REQUIRE(a.size() == b.size());
    for (std::size_t i = 0; i < a.size(); ++i) CHECK(a.data()[i] == doctest::Approx(b.data()[i]).epsilon(1e-11));
}

xt::xtensor<double, 3> random_tensor(Random& random) {
    auto x = xt::xtensor<double, 3>::from_shape({2, 40, 8});
    for (double& value : x) value = random.normal();
    return x;
}

}  // namespace

TEST_CASE("a pattern, a diffusion, a sampler and a bias of one's own, together, forward and backward") {
    POLYATTN_RANDOM(random);
    const auto q = random_tensor(random), k = random_tensor(random), v = random_tensor(random), d_out = random_tensor(random);
    const Attention fast{HalfOfTheKeys{}, SentenceBias{.sentence = 7}, PowersOfTwo{}, Averaged{}};
    const Attention<PowersOfTwo, Averaged, HalfOfTheKeys, SentenceBias, Reference> exact{PowersOfTwo{}, SentenceBias{.sentence = 7}};
    const CallOptions options{.draw = {.seed = random.seed(), .step = 3}};
    const auto [out, saved] = fast.forward(q, k, v, options);
    const auto [exact_out, exact_saved] = exact.forward(q, k, v, options);
    check_same(out, exact_out);
    const auto gradient = fast.backward(saved, d_out), exact_gradient = exact.backward(exact_saved, d_out);
    check_same(gradient.q, exact_gradient.q);
    check_same(gradient.k, exact_gradient.k);
    check_same(gradient.v, exact_gradient.v);
}

TEST_CASE("a diffusion whose number of hops is data: one hop is plain attention, also for one query") {
    POLYATTN_RANDOM(random);
    const auto q = random_tensor(random), k = random_tensor(random), v = random_tensor(random);
    const auto plain = Attention<>{}(q, k, v);
    check_same(Attention{Steps{}}(q, k, v), plain);
    check_same(Attention{Steps{.hops = 2}}(q, k, v), Attention<>{}(q, k, plain));
    const auto last_row = [](const xt::xtensor<double, 3>& x) {
        auto row = xt::xtensor<double, 3>::from_shape({2, 1, 8});
        for (std::size_t h = 0; h < 2; ++h)
            for (std::size_t c = 0; c < 8; ++c) row(h, 0, c) = x(h, 39, c);
        return row;
    };
    check_same(Attention{Steps{}}(last_row(q), k, v), last_row(plain));
}

TEST_CASE("a policy that throws inside a forward pass: backward refuses what it left, and the next pass mends it") {
    POLYATTN_RANDOM(random);
    const auto x = random_tensor(random);
    const auto check = [&](const auto& layer, bool& fails) {
        auto [out, saved] = layer.forward(x, x, x);
        const auto gradient = layer.backward(saved, x);
        fails = true;
        CHECK_THROWS_AS(layer.forward_into(out, saved, x, x, x), std::runtime_error);
        try {
            layer.backward(saved, x);
            FAIL("nothing was thrown");
        } catch (const invalid_input& error) {
            CHECK(error.argument() == "saved");
        }
        fails = false;
        layer.forward_into(out, saved, x, x, x);
        check_same(layer.backward(saved, x).q, gradient.q);
    };
    const FailingBias bias;
    check(Attention{bias}, *bias.fails);
    const FailingPairs pairs;
    check(Attention{pairs}, *pairs.fails);
}

TEST_CASE("samplers: the plan is the pattern's intersection with the draw, new for every draw, causal where the pattern is") {
    const Attention<PowersOfTwo, HalfOfTheKeys> attention;
    const Draw first{.seed = 5}, second{.seed = 5, .sample = 1};
    const Plan a = attention.plan(40, 40, first), b = attention.plan(40, 40, second);
    CHECK(a.to_csr().keys != b.to_csr().keys);
    CHECK(attention.plan(40, 40, first).to_csr().keys == a.to_csr().keys);
    CHECK(a.to_csr().keys == intersect(PowersOfTwo{}.plan(40, 40), HalfOfTheKeys{}.sample(40, 40, first, false)).to_csr().keys);
    const Attention<Causal, HalfOfTheKeys> causal;
    for (index_t i = 0; i < 40; ++i) {
        CHECK(causal.plan(40, 40, first).contains(i, i));
        causal.plan(40, 40, first).for_each_key(i, [&](index_t j) { CHECK(j <= i); });
    }
}

TEST_CASE("the architecture is a template argument: an older one than the program is compiled for") {
    POLYATTN_RANDOM(random);
    const auto x = random_tensor(random);
    const Attention<LocalGlobalRandom, PPR<2>, Simd<xsimd::sse2>> older;
    const Attention<LocalGlobalRandom, PPR<2>, Simd<xsimd::default_arch>> best;
    check_same(older(x, x, x), best(x, x, x));
    const auto a = older.forward(x, x, x), b = best.forward(x, x, x);
    check_same(older.backward(a.saved, x).q, best.backward(b.saved, x).q);
}

TEST_CASE("policies in any order are the same layer; defaults fill in; parameters are validated") {
    POLYATTN_RANDOM(random);
    const auto x = random_tensor(random);
    const Attention a{SlidingWindow{.window = 6}, PPR<2>{.alpha = .3}, Alibi(2)};
    const Attention b{Alibi(2), SlidingWindow{.window = 6}, PPR<2>{.alpha = .3}};
    check_same(a(x, x, x), b(x, x, x));
    const Attention<SlidingWindow, PPR<2>, Alibi> c{Alibi(2)};  // default window and alpha
    const Attention d{SlidingWindow{}, PPR<2>{}, Alibi(2)};
    check_same(c(x, x, x), d(x, x, x));
    check_same(Attention<>{}(x, x, x), Attention<Dense, NoDiffusion>{}(x, x, x));
    CHECK_THROWS_AS((Attention{PowersOfTwo{.longest = 0}}), invalid_input);
    const Attention copy{a};
    static_assert(std::is_same_v<decltype(copy), const std::remove_const_t<decltype(a)>>);
    check_same(copy(x, x, x), a(x, x, x));
    const Attention scaled{Softmax{.scale = .5}};
    check_same(scaled(x, x, x), Attention<>{}(xt::xtensor<double, 3>(.5 * std::sqrt(8.) * x), x, x));
}
