// Bad input, table-driven: every case names the argument, what was wanted and what came.
#include "support/random.hpp"

#include <polyattn/analysis/expander.hpp>
#include <polyattn/analysis/receptive_field.hpp>
#include <polyattn/analysis/sensitivity.hpp>
#include <polyattn/polyattn.hpp>

#include <doctest/doctest.h>

#include <functional>
#include <limits>

using namespace polyattn;

namespace {

struct BadCase {
    const char* argument;
    const char* wanted;
    const char* got;
    std::function<void()> call;
};

/// A diffusion that breaks its word.
struct SaysTwoHops {
    using policy_kind = diffusion_kind;
    static constexpr int hops = 2;
    Recursion recursion() const { return {1, {Hop{}}}; }
};

void check(const std::vector<BadCase>& cases) {
    for (const BadCase& bad : cases) {
        INFO("wanted: ", bad.argument, " / ", bad.wanted, " / ", bad.got);
        try {
            bad.call();
            FAIL_CHECK("nothing was thrown");
        } catch (const invalid_input& error) {
            CHECK(error.argument() == bad.argument);
            CHECK(error.wanted() == bad.wanted);
            CHECK(error.got() == bad.got);
            CHECK(std::string(error.what()) == std::string("polyattn: ").append(bad.argument).append(": wanted ").append(bad.wanted).append(", got ").append(bad.got));
        }
    }
}

const double not_a_number = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();

template <class... P>
std::function<void()> build(P... policies) {
    return [=] { Attention attention{policies...}; };
}
template <class P>
std::function<void()> plan(P pattern, index_t queries, index_t keys) {
    return [=] { Attention<P>{pattern}.plan(queries, keys); };
}

xt::xtensor<float, 4> tensor(std::array<std::size_t, 4> shape) { return xt::zeros<float>(shape); }

}  // namespace

TEST_CASE("parameters of patterns") {
    check({
        {"window", "an even number of keys, half on each side", "7", build(SlidingWindow{.window = 7})},
        {"window", "a number of keys >= 0", "-2", build(SlidingWindow{.window = -2})},
        {"dilation", "a step >= 1", "0", build(SlidingWindow{.window = 4, .dilation = 0})},
        {"window", "a number of keys >= 0", "-1", build(CausalSlidingWindow{.window = -1})},
        {"window", "an even number of keys >= 2", "0", build(OverlappingBlocks{.window = 0})},
        {"block", "a number of tokens >= 1", "0", build(BlockLocal{.block = 0})},
        {"count", "a number of tokens >= 0", "-1", build(GlobalTokens{.count = -1})},
        {"tokens", "strictly ascending indices >= 0", "3", build(GlobalTokens{.tokens = {3, 3}})},
        {"tokens", "strictly ascending indices >= 0", "-4", build(Longformer{.tokens = {-4}})},
        {"count", "a number of tokens >= 0", "-3", build(RandomTokens{.count = -3})},
        {"count", "a number of tokens >= 0", "-3", build(UniformTokens{.count = -3})},
        {"per_token", "a number of cells >= 0", "-1", build(ErdosRenyi{.per_token = -1})},
        {"degree", "an even number of neighbours >= 0", "5", build(RandomRegular{.degree = 5})},
        {"globals", "a number of tokens >= 0", "-1", build(LocalGlobalRandom{.globals = -1})},
        {"randoms", "a number of tokens >= 0", "-1", build(LocalGlobalRandom{.randoms = -1})},
        {"window", "an even number of keys, half on each side", "3", build(LocalGlobalRandom{.window = 3})},
        {"window", "an odd number of blocks >= 1", "2", build(BigBird<8>{.window = 2})},
        {"globals", "a number of blocks >= 0", "-1", build(BigBird<8>{.globals = -1})},
        {"randoms", "a number of blocks >= 0", "-1", build(BigBird<8>{.randoms = -1})},
        {"height", "a number of pixels >= 0", "-1", build(ShiftedWindows2D{.height = -1})},
        {"width", "a number of pixels >= 0", "-1", build(ShiftedWindows2D{.width = -1})},
        {"stride", "a step >= 1", "0", build(Strided{.stride = 0})},
        {"summary", "a number of positions from 0 to stride", "5", build(Fixed{.stride = 4, .summary = 5})},
        {"shift", "a number of pixels from 0 to window - 1", "4", build(ShiftedWindows2D{.window = 4, .shift = 4})},
        {"length", "a number of tokens >= 0", "-1", build(Prefix<Dense>{.length = -1})},
        {"window", "an even number of keys, half on each side", "5", build(Union{Dense{}, SlidingWindow{.window = 5}})},
        {"window", "an even number of keys, half on each side", "5", build(Intersection{Prefix<SlidingWindow>{.pattern = {.window = 5}}, Dense{}})},
    });
}

TEST_CASE("patterns that do not exist for a number of tokens") {
    check({
        {"RandomRegular", "as many queries as keys", "3 queries, 4 keys", plan(RandomRegular{.degree = 2}, 3, 4)},
        {"degree", "less than half of 16 tokens", "8", plan(RandomRegular{.degree = 8}, 16, 16)},
        {"Prefix", "as many queries as keys", "3 queries, 4 keys", plan(Prefix<Dense>{}, 3, 4)},
        {"prefix", "at most 8 queries x 8 keys", "9 x 9", plan(Prefix<Dense>{.length = 8}, 9, 9)},
        {"BigBird", "as many queries as keys", "3 queries, 4 keys", plan(BigBird<2>{}, 3, 4)},
        {"height x width", "60 tokens", "8 x 8", plan(ShiftedWindows2D{}, 60, 60)},
        {"ShiftedWindows2D", "as many queries as keys", "64 queries, 63 keys", plan(ShiftedWindows2D{}, 64, 63)},
        {"keys of a tile", "indices of [0, 5)", "7", plan(GlobalTokens{.tokens = {7}}, 5, 5)},
    });
}

TEST_CASE("edge lists and tiles") {
    const auto edges = [](std::vector<offset_t> offsets, std::vector<index_t> keys) { return plan(EdgeList{std::move(offsets), std::move(keys)}, 3, 4); };
    check({
        {"edge offsets", "3 + 1 of them", "2", edges({0, 1}, {0})},
        {"edge offsets", "0 first", "1", edges({1, 1, 1, 1}, {0})},
        {"edge offsets", "the number of edges last", "2", edges({0, 1, 1, 2}, {0})},
        {"edge offsets", "ascending offsets", "1", edges({0, 2, 1, 2}, {0, 1})},
        {"edge keys of a row", "indices of [0, 4)", "4", edges({0, 1, 1, 1}, {4})},
        {"edge keys of a row", "indices of [0, 4)", "-1", edges({0, 1, 1, 1}, {-1})},
        {"edge keys of a row", "strictly ascending indices, no duplicates", "2 after 2", edges({0, 2, 2, 2}, {2, 2})},
        {"edge keys of a row", "strictly ascending indices, no duplicates", "1 after 2", edges({0, 2, 2, 2}, {2, 1})},
        {"rows of a tile", "indices of [0, 3)", "0 to 3", [] { PlanBuilder(3, 3).tile(IndexSequence::range(0, 4), IndexSequence::range(0, 3)); }},
        {"keys of a tile", "strictly ascending indices, no duplicates", "1 after 1", [] { PlanBuilder(3, 3).tile(IndexSequence::range(0, 3), IndexSequence::list({1, 1})); }},
        {"bounds of a tile", "none or one a row", "1", [] { PlanBuilder(3, 3).add({IndexSequence::range(0, 3), IndexSequence::range(0, 3), {{0, 1}}, {}}); }},
        {"bounds of a tile", "positions of its keys", "[0, 4)", [] { PlanBuilder(1, 3).add({IndexSequence::range(0, 1), IndexSequence::range(0, 3), {{0, 4}}, {}}); }},
        {"excluded keys of a tile", "none beside listed keys", "1", [] { PlanBuilder(1, 3).add({IndexSequence::range(0, 1), IndexSequence::list({0, 1}), {}, {1}}); }},
        {"queries", "a number >= 0", "-1", [] { PlanBuilder(-1, 3); }},
        {"plan", "3 queries x 3 keys", "4 x 4", [] { unite(Dense{}.plan(3, 3), Dense{}.plan(4, 4)); }},
        {"plan", "3 queries x 3 keys", "4 x 4", [] { intersect(Dense{}.plan(3, 3), Dense{}.plan(4, 4)); }},
        {"edges", "one edge list a plan", "a second one", [] { PlanBuilder(1, 1).edges({{0, 1}, {0}}).edges({{0, 1}, {0}}); }},
        {"side", "a number of pixels >= 1", "0", [] { picture(Dense{}.plan(3, 3), 0); }},
    });
}

TEST_CASE("diffusion, scores and biases") {
    check({
        {"alpha", "a teleport probability from 0 to 1", "1.500000", build(PPR<5>{.alpha = 1.5})},
        {"alpha", "a teleport probability from 0 to 1", "-0.100000", build(PPR<5>{.alpha = -.1})},
        {"alpha", "a teleport probability from 0 to 1", "a value that is not finite", build(PPR<5>{.alpha = not_a_number})},
        {"t", "a diffusion time from 0 to 1000", "-1.000000", build(HeatKernel<3>{.t = -1})},
        {"t", "a diffusion time from 0 to 1000", "a value that is not finite", build(HeatKernel<3>{.t = infinity})},
        {"theta", "finite coefficients", "one that is not", build(Polynomial<1>{{not_a_number, 1}})},
        {"theta", "at least one coefficient", "0", [] { Recursion::from_polynomial({}); }},
        {"recursion", "2 hops, as the policy says", "1", build(SaysTwoHops{})},
        {"scale", "a finite factor (0 for 1 / sqrt(d))", "a value that is not finite", build(Softmax{.scale = not_a_number})},
        {"heads", "a number of heads >= 1", "0", [] { Alibi(0); }},
        {"table", "6 entries", "5", build(RelativePosition{.heads = 2, .reach = 1, .table = {1, 2, 3, 4, 5}})},
        {"table", "finite entries", "one that is not", build(RelativePosition{.heads = 1, .reach = 0, .table = {not_a_number}})},
        {"reach", "a distance >= 0", "-1", build(RelativePosition{.reach = -1})},
        {"width", "a number of pixels >= 1", "0", build(RelativePosition2D{.width = 0})},
        {"table", "9 entries", "1", build(RelativePosition2D{.reach = 1})},
        {"table", "rows x heads entries", "3", build(TableBias{[](index_t, index_t, index_t) { return 0; }, 2, {1, 2, 3}})},
    });
}

TEST_CASE("shapes and options of calls") {
    const Attention<LocalGlobalRandom, PPR<2>> attention;
    const auto x = tensor({2, 4, 6, 8});
    const auto call = [&](const auto& q, const auto& k, const auto& v, CallOptions options = {}) {
        return std::function<void()>([=] { (void)attention(q, k, v, options); });
    };
    check({
        {"q", "rank 2 [tokens, dim], 3 [heads, tokens, dim] or 4 [batch, heads, tokens, dim]", "rank 1", call(xt::xarray<float>(xt::zeros<float>({5})), x, x)},
        {"v", "rank 2 [tokens, dim], 3 [heads, tokens, dim] or 4 [batch, heads, tokens, dim]", "rank 5", call(x, x, xt::xarray<float>(xt::zeros<float>({1, 1, 1, 1, 1})))},
        {"k", "[2, 4, 6, 8]", "[3, 4, 6, 8]", call(x, tensor({3, 4, 6, 8}), x)},
        {"k", "[2, 4, 6, 8]", "[2, 4, 6, 7]", call(x, tensor({2, 4, 6, 7}), x)},
        {"v", "[2, 4, 6, 8]", "[2, 4, 5, 8]", call(x, x, tensor({2, 4, 5, 8}))},
        {"v", "[2, 2, 6, 8]", "[2, 4, 6, 8]", call(x, tensor({2, 2, 6, 8}), x)},
        {"k", "a number of heads that divides q's 4", "3", call(x, tensor({2, 3, 6, 8}), tensor({2, 3, 6, 8}))},
        {"k", "a number of heads that divides q's 4", "0", call(x, tensor({2, 0, 6, 8}), tensor({2, 0, 6, 8}))},
        {"k", "as many keys as queries for diffusion, 6", "7", call(x, tensor({2, 4, 7, 8}), tensor({2, 4, 7, 8}))},
        {"q", "a head dimension >= 1", "0", call(tensor({2, 4, 6, 0}), tensor({2, 4, 6, 0}), x)},
        {"key_lengths", "one length for each of 2 batch items", "3", call(x, x, x, {.key_lengths = {1, 2, 3}})},
        {"key_lengths", "lengths from 0 to 6", "7", call(x, x, x, {.key_lengths = {1, 7}})},
        {"query_lengths", "lengths from 0 to 6", "-1", call(x, x, x, {.query_lengths = {-1, 6}})},
        {"query_lengths", "lengths from 0 to 6", "7", [&] { (void)attention.plans(1, 6, 6, {.query_lengths = {7}}); }},
        {"query_lengths", "one length for each of 2 batch items", "1", [&] { (void)attention.plans(2, 6, 6, {.query_lengths = {6}}); }},
        {"plan", "none with kernel scores, or the pattern's own", "one of other pairs",
         [&] { (void)Attention<Kernel<ReLU>, Causal, Reference>{}(x, x, x, {.plan = SlidingWindow{.window = 2}.plan(6, 6)}); }},
        {"plan", "none with kernel scores, or the pattern's own", "one of other pairs",
         [&] {
             // As many pairs as Causal has.
             (void)Attention<Kernel<ReLU>, Causal, Reference>{}(x, x, x, {.plan = PlanBuilder(6, 6).range([](index_t i) { return std::pair{i, index_t{6}}; }).build()});
         }},
        {"dropout.weights", "a probability of [0, 1)", "1.000000", call(x, x, x, {.dropout = {.weights = 1}})},
        {"dropout.values", "a probability of [0, 1)", "-0.500000", call(x, x, x, {.dropout = {.values = -.5}})},
        {"plan", "6 queries x 6 keys", "5 x 5", call(x, x, x, {.plan = Dense{}.plan(5, 5)})},
        {"out", "[2, 4, 6, 8]", "[2, 4, 6, 9]", [&] { auto out = tensor({2, 4, 6, 9}); attention.into(out, x, x, x); }},
        {"saved", "a forward pass of this layer, with 2 hops", "1", [&] { (void)attention.backward(Attention<>{}.forward(x, x, x).saved, x); }},
        {"heads of RelativePosition", "4", "1", [&] { (void)Attention{RelativePosition{}, Reference{}}(x, x, x); }},
        {"heads of RelativePosition2D", "4", "1", [&] { (void)Attention{RelativePosition2D{}, Reference{}}(x, x, x); }},
        {"heads of TableBias", "4", "1", [&] { (void)Attention{TableBias{[](index_t, index_t, index_t) { return 0; }, 1, {0.}}, Reference{}}(x, x, x); }},
        {"d_out", "[2, 4, 6, 8]", "[2, 4, 6, 9]", [&] { (void)attention.backward(attention.forward(x, x, x).saved, tensor({2, 4, 6, 9})); }},
        {"extents", "rank 2 [tokens, dim], 3 [heads, tokens, dim] or 4 [batch, heads, tokens, dim]", "rank 1", [] { float f = 0; tensor_view(&f, {1}); }},
        {"extents", "extents of 0 to 2^31 - 1", "-1", [] { float f = 0; tensor_view(&f, {-1, 2}); }},
        {"extents", "extents of 0 to 2^31 - 1", "2147483648", [] { float f = 0; tensor_view(&f, {2147483648, 1}); }},
        {"strides", "as many strides as extents", "1", [] { float f = 0; tensor_view(&f, {1, 1}, {1}); }},
        {"heads of Alibi", "4", "3", [&] { (void)Attention{Alibi(3), Reference{}}(x, x, x); }},
        {"row of the bias table", "rows of [0, 2)", "5", [&] { (void)Attention{TableBias{[](index_t, index_t, index_t) { return 5; }, 4, std::vector<double>(8)}, Reference{}}(x, x, x); }},
    });
}

TEST_CASE("analysis") {
    check({
        {"plan", "as many queries as keys", "3", [] { hop_distances(Dense{}.plan(3, 4), 0); }},
        {"query", "a token of the plan", "3", [] { hop_distances(Dense{}.plan(3, 3), 3); }},
        {"hops", "a number >= 1", "0", [] { receptive_field(Dense{}.plan(3, 3), 0); }},
        {"plan", "at least one key a query", "a query without keys", [] { second_eigenvalue(EdgeList{{0, 0}, {}}.plan(1, 1)); }},
        {"plan", "a symmetric one: j sees i whenever i sees j", "a directed one", [] { walk_extremes(Causal{}.plan(4, 4)); }},
        {"plan", "a regular one: the same number of keys a query", "3", [] { expander(SlidingWindow{.window = 2}.plan(4, 4)); }},
        {"plan", "a symmetric one: j sees i whenever i sees j", "a directed one", [] { mixing_distance(Causal{}.plan(4, 4), 0, 1); }},
        {"plan", "at least one query", "0", [] { receptive_field(Dense{}.plan(0, 0), 1); }},
        {"steps", "a number >= 1", "0", [] { walk_extremes(Dense{}.plan(4, 4), 0); }},
        {"steps", "a number >= 10", "9", [] { second_eigenvalue(Dense{}.plan(4, 4), 9); }},
        {"start", "a token of the plan", "9", [] { mixing_distance(Dense{}.plan(4, 4), 9, 1); }},
        {"plan", "at least 2 tokens", "0", [] { expander(Plan{}); }},
        {"x", "[tokens, dim]", "rank 1", [] { shift_sensitivity([](const Tensor<double>& x) { return x; }, Tensor<double>({5})); }},
        {"f", "a map to [5, any]", "[2, 3]", [] { shift_sensitivity([](const Tensor<double>&) { return Tensor<double>({2, 3}); }, Tensor<double>({5, 3})); }},
    });
}
