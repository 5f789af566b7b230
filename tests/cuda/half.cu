// Half and bfloat16 on the device against plain double arithmetic on the same rounded inputs.
//
// Bound. With u' = 2^-23 for float (tensor cores may cut off where others round), a score is off by at most delta = (d + 3) u' (sum_c |q_c k_jc| scale +
// |bias|), so a weight is off by a factor within 1 +- eps, eps = 2 delta + 8 (1 + keys) u' (exponential, sum and quotient included). With v = 2^-11 (half)
// or 2^-8 (bfloat16), weights of tiles are rounded by another factor within 1 +- v, or by an absolute 2^-25 where the largest is at least 1 (half's
// subnormals; the sum that they are divided by is no smaller); dropout's product rounds once more. Each hop stores Z: v |Z| + 2^-25. So with M_k = Z_k by
// magnitude and M_0 = |V| the error E of Z is, E_0 = 0,
//     E_{k+1}[i] = walk sum_j ((A_ij (1 + eps + 2 v) + 2^-25) E_k[j] + (A_ij (eps + 2 v) + 2^-25) M_k[j]) + v M_{k+1}[i] + 4 u' M_{k+1}[i] + 2^-25,
// and a little more for products of roundings. logsumexp is a float: delta + (keys + 8) u' + 8 u' (|logsumexp| + 14), the reference being up to 14 below
// the largest score.
#include "support/cases.hpp"
#include "transfer.cuh"

#include <polyattn/backend/reference/attention.hpp>
#include <polyattn/policy/bias/bias.hpp>
#include <polyattn/polyattn_cuda.cuh>

#include <doctest/doctest.h>

#include <bit>

using namespace polyattn;

namespace {

template <class T>
constexpr double stored_unit = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
template <class T>
constexpr double subnormal = std::is_same_v<T, __half> ? 0x1p-25 : 0;
constexpr double float_unit = 0x1p-23;

template <class T>
Tensor<T> rounded(Random& random, std::vector<offset_t> shape, double scale = 1) {
    Tensor<T> out(std::move(shape));
    for (T& value : out.values) value = static_cast<T>(static_cast<float>(scale * random.normal()));
    return out;
}
template <class T>
Tensor<double> widened(const Tensor<T>& from) {
    Tensor<double> to(from.shape);
    for (std::size_t i = 0; i < to.values.size(); ++i) to.values[i] = static_cast<float>(from.values[i]);
    return to;
}
template <class T>
std::uint16_t bits_of(const T& value) {
    return reinterpret_cast<const std::uint16_t&>(value);
}
template <class T>
bool finite(const T& value) {
    return detail::is_finite(static_cast<double>(static_cast<float>(value)));
}

/// Code for compute capabilities below 8.0 has no products of bfloat16, and layers say so.
template <class T>
bool is_supported() {
    cudaFuncAttributes attributes{};
    REQUIRE(cudaFuncGetAttributes(&attributes, detail::cuda::apply_tiles_half<T, NoBias>) == cudaSuccess);
    return std::is_same_v<T, __half> || attributes.ptxVersion >= 80;
}

struct Bounded {
    std::vector<double> z, magnitude, error;
};

/// Z of one head, and how far off the tested type may be.
template <class T, class Bound>
Bounded exact_head(const detail::Head<double, Bound>& head, const detail::reference::Operator& op, std::vector<double>& logsumexp_error) {
    const double v = stored_unit<T>, tiny = subnormal<T>;
    const auto columns = static_cast<std::size_t>(head.v.cols);
    Bounded now;
    for (index_t j = 0; j < head.v.rows; ++j)
        for (index_t c = 0; c < head.v.cols; ++c) now.z.push_back(head.recursion->start * head.v(j, c));
    for (const double value : now.z) now.magnitude.push_back(std::abs(value));
    now.error.assign(now.z.size(), 0.);
    std::vector<double> eps(op.rows.size(), 0.);
    logsumexp_error.assign(op.rows.size(), 0.);
    for (std::size_t i = 0; i < op.rows.size(); ++i) {
        double delta = 0;
        for (const auto& edge : op.rows[i]) {
            double sum = std::abs((*head.bias)(head.batch, head.head, static_cast<index_t>(i), edge.key));
            for (index_t c = 0; c < head.q.cols; ++c) sum += std::abs(head.q(static_cast<index_t>(i), c) * head.k(edge.key, c) * head.scale);
            delta = std::max(delta, (head.q.cols + 3) * float_unit * sum);
        }
        eps[i] = 2 * delta + 8 * float_unit * double(1 + op.rows[i].size());
        logsumexp_error[i] = delta + double(op.rows[i].size() + 8) * float_unit + 8 * float_unit * (std::abs(op.logsumexp[i]) + 14);
    }
    if (head.recursion->hops.empty())
        for (std::size_t at = 0; at < now.z.size(); ++at) {
            if (static_cast<index_t>(at / columns) >= head.query_length) now.z[at] = now.magnitude[at] = 0;
            now.error[at] = v * now.magnitude[at] + tiny;
        }
    for (std::size_t k = 0; k < head.recursion->hops.size(); ++k) {
        const Hop& hop = head.recursion->hops[k];
        const std::size_t size = op.rows.size() * columns;
        Bounded next{std::vector<double>(size, 0.), std::vector<double>(size, 0.), std::vector<double>(size, 0.)};
        for (std::size_t i = 0; i < op.rows.size(); ++i) {
            if (!op.alive[i]) continue;
            for (std::size_t c = 0; c < columns; ++c) {
                const std::size_t at = i * columns + c;
                double sum = 0, magnitude = 0, error = 0;
                for (const auto& edge : op.rows[i]) {
                    const std::size_t from = static_cast<std::size_t>(edge.key) * columns + c;
                    const double weight = edge.weight * edge.mask, off = weight * (eps[i] + 2 * v) + tiny * edge.mask;
                    sum += weight * now.z[from];
                    magnitude += weight * now.magnitude[from];
                    error += (weight + off) * now.error[from] + off * now.magnitude[from];
                }
                const double teleported = hop.teleport != 0 ? hop.teleport * head.v(static_cast<index_t>(i), static_cast<index_t>(c)) : 0;
                const double mask = head.dropout.drops_values() ? head.dropout.values_of_four(static_cast<int>(k), static_cast<index_t>(i), static_cast<index_t>(c / 4))[c % 4] : 1;
                next.z[at] = mask * (hop.walk * sum + teleported);
                next.magnitude[at] = mask * (std::abs(hop.walk) * magnitude + std::abs(teleported));
                next.error[at] = 1.01 * (mask * std::abs(hop.walk) * error + (v + 4 * float_unit) * next.magnitude[at]) + tiny;
            }
        }
        now = std::move(next);
    }
    return now;
}

template <class T, class Bias = NoBias>
void check_case(const Case& c, Random& random, const Bias& bias = {}) {
    const index_t queries = c.plan.queries(), keys = c.plan.keys();
    INFO(c.name, ", ", queries, " x ", keys, ", d ", c.d, ", e ", c.e, ", hops ", c.recursion.hops.size(), ", batch ", c.batch,
         ", heads ", c.heads, "/", c.key_heads, ", half ", std::is_same_v<T, __half>);
    const auto q = rounded<T>(random, {c.batch, c.heads, queries, c.d}, c.scale), k = rounded<T>(random, {c.batch, c.key_heads, keys, c.d}), v = rounded<T>(random, {c.batch, c.key_heads, keys, c.e});
    const auto q2 = widened(q), k2 = widened(k), v2 = widened(v);
    const Attention<AnyDiffusion, Bias, Cuda> attention{AnyDiffusion{c.recursion}, bias};
    CudaOptions options;
    static_cast<CallOptions&>(options) = c.options;
    options.plan = c.plan;
    const auto dq = to_device(q), dk = to_device(k), dv = to_device(v);
    if (!is_supported<T>()) {
        CHECK_THROWS_AS(attention(dq.view(), dk.view(), dv.view(), options), invalid_input);
        return;
    }
    const auto result = attention.with_logsumexp(dq.view(), dk.view(), dv.view(), options);
    const auto out = to_host(result.out);
    static_assert(std::is_same_v<decltype(to_host(result.logsumexp)), Tensor<float>>);
    const auto logsumexp = to_host(result.logsumexp);
    options.accumulate = true;  // Z once more, onto itself
    attention.into(result.out.view(), dq.view(), dk.view(), dv.view(), options);
    const auto twice = to_host(result.out);
    const auto bound_bias = detail::bind_bias(bias, queries, keys);
    std::size_t at = 0, row = 0;
    for (index_t b = 0; b < c.batch; ++b)
        for (index_t h = 0; h < c.heads; ++h) {
            const index_t valid = options.key_lengths.empty() ? keys : options.key_lengths[static_cast<std::size_t>(b)];
            const index_t of_keys = h / (c.heads / c.key_heads);
            const detail::Head<double, std::remove_cvref_t<decltype(bound_bias)>> head{
                q2.view().head(b, h), k2.view().head(b, of_keys), v2.view().head(b, of_keys), &c.plan, &c.recursion, &bound_bias, 1 / std::sqrt(double(c.d)), b, h,
                queries == keys ? valid : queries, valid, detail::DropoutMask(options.dropout, options.draw, offset_t{b} * c.heads + h), 0};
            const auto op = detail::reference::make_operator(head);
            std::vector<double> logsumexp_error;
            const Bounded exact = exact_head<T>(head, op, logsumexp_error);
            std::size_t wrong = 0;
            for (std::size_t i = 0; i < exact.z.size(); ++i, ++at) {
                const double got = static_cast<float>(out.values[at]), sum = static_cast<float>(twice.values[at]);
                wrong += !(std::abs(got - exact.z[i]) <= exact.error[i]);
                wrong += !(std::abs(sum - 2 * got) <= exact.error[i] * 2 + 3 * stored_unit<T> * std::abs(got));
            }
            for (std::size_t i = 0; i < op.rows.size(); ++i, ++row)
                if (op.alive[i]) wrong += !(std::abs(double(logsumexp.values[row]) - op.logsumexp[i]) <= logsumexp_error[i]);
                else wrong += !detail::is_empty_row(logsumexp.values[row]);
            CHECK(wrong == 0);
        }
}
template <class Bias = NoBias>
void check_both(const Case& c, Random& random, const Bias& bias = {}) {
    check_case<__half>(c, random, bias);
    check_case<__nv_bfloat16>(c, random, bias);
}

constexpr index_t dims[] = {3, 8, 40, 64, 72, 130};

}  // namespace

TEST_CASE("half and bfloat16: every pattern") {
    POLYATTN_RANDOM(random);
    for (const index_t n : {1, 17, 64, 65, 130})
        for (const NamedPlan& named : every_square_plan(n, random.seed()))
            for (const Recursion& recursion : {PPR<1>{}.recursion(), PPR<3>{}.recursion()}) {
                const Case c{named.name, named.plan, recursion, dims[random.below(std::size(dims))], dims[random.below(std::size(dims))]};
                if (random.below(2)) check_case<__half>(c, random);
                else check_case<__nv_bfloat16>(c, random);
            }
}

TEST_CASE("half and bfloat16: batches, grouped-query heads, padding and dropout") {
    POLYATTN_RANDOM(random);
    for (const index_t n : {1, 20, 290}) {
        Case c{"LocalGlobalRandom", LocalGlobalRandom{.window = 8, .globals = 4, .randoms = 3, .seed = random.seed()}.plan(n, n), PPR<3>{}.recursion(), 72, 40, 3, 4, 2};
        c.options.key_lengths = {n, n / 2, 0};
        check_both(c, random);
        c.options.draw = {.seed = random.seed(), .step = 3};
        c.options.dropout = {.weights = .3, .values = .2};
        check_both(c, random);
        c.plan = Union{Strided{.stride = 4}, SlidingWindow{.window = 6, .dilation = 2}, RandomTokens{.count = 3, .seed = random.seed()}}.plan(n, n);
        check_both(c, random);
        c.plan = Dense{}.plan(n, n);
        c.recursion = PPR<0>{}.recursion();
        check_both(c, random);
    }
}

TEST_CASE("half and bfloat16: other numbers of queries than keys, many keys, scores of some hundreds") {
    POLYATTN_RANDOM(random);
    for (const auto& [queries, keys] : {std::pair{1, 200}, std::pair{5, 64}, std::pair{70, 17}, std::pair{3, 0}, std::pair{0, 3}, std::pair{66, 450}})
        for (const Plan& plan : {Dense{}.plan(queries, keys), Causal{}.plan(queries, keys), LocalGlobalRandom{.window = 8, .globals = 4, .randoms = 3}.plan(queries, keys)}) {
            Case c{"cross", plan, NoDiffusion{}.recursion(), 64, 64, 2, 2, 1};
            if (keys > 0) c.options.key_lengths = {keys, keys / 2};
            check_both(c, random);
            c.scale = 100;
            check_both(c, random);
        }
}

TEST_CASE("half and bfloat16: a bias") {
    POLYATTN_RANDOM(random);
    for (const index_t n : {17, 130})
        for (const Plan& plan : {Dense{}.plan(n, n), LocalGlobalRandom{.window = 8, .globals = 3, .randoms = 3, .seed = random.seed()}.plan(n, n)}) {
            Case c{"Alibi", plan, PPR<2>{}.recursion(), 40, 64, 2, 2, 2};
            c.options.key_lengths = {n - 3, n};
            check_both(c, random, Alibi(2));
        }
}

TEST_CASE("half and bfloat16: long rows of small weights keep their digits") {
    // 6000 equal weights: 1 / 6000 is a small number of half, and so are their roundings.
    const index_t keys = 6000, d = 8;
    const Attention<Cuda> attention;
    Tensor<__half> q({1, d}), k({keys, d}), v({keys, d});
    std::fill(v.values.begin(), v.values.end(), static_cast<__half>(1.f));
    for (index_t j = 0; j < keys; ++j)  // the first key leads by 12 nats, the others have as much in sum
        for (index_t c = 0; c < d; ++c) k.values[static_cast<std::size_t>(j * d + c)] = static_cast<__half>(j == 0 ? 1.f : 0.f);
    std::fill(q.values.begin(), q.values.end(), static_cast<__half>(12 / std::sqrt(8.f)));
    const double lead = std::exp(double(static_cast<float>(q.values[0])) * std::sqrt(8.));
    for (index_t c = 0; c < d; ++c) v.values[static_cast<std::size_t>(c)] = static_cast<__half>(0.f);
    const auto out = to_host(attention(to_device(q).view(), to_device(k).view(), to_device(v).view()));
    const double exact = (keys - 1) / (keys - 1 + lead);
    for (const __half value : out.values) CHECK(std::abs(double(static_cast<float>(value)) - exact) <= 3 * stored_unit<__half> * exact);
}

namespace {

template <class T>
void check_poison(Random& random) {
    if (!is_supported<T>()) return;
    const index_t n = 70, d = random.below(2) ? 12 : 64;
    for (const NamedPlan& named : every_square_plan(n, random.seed())) {
        INFO(named.name, ", d ", d, ", half ", std::is_same_v<T, __half>);
        const Attention<AnyDiffusion, Cuda> attention{AnyDiffusion{Recursion{1, {Hop{.9, 0.}}}}};
        CudaOptions options;
        options.plan = named.plan;
        const auto q = rounded<T>(random, {n, d}), k = rounded<T>(random, {n, d}), v = rounded<T>(random, {n, d});
        const auto run = [&](const Tensor<T>& x, const Tensor<T>& y, const Tensor<T>& z) { return to_host(attention(to_device(x).view(), to_device(y).view(), to_device(z).view(), options)); };
        const auto clean = run(q, k, v);
        const index_t bad = random.below(n);
        const T nan = static_cast<T>(std::numeric_limits<float>::quiet_NaN()), poison = random.below(2) ? nan : static_cast<T>(std::numeric_limits<float>::infinity());
        auto bad_v = v, bad_k = k, bad_q = q;
        for (index_t c = 0; c < d; ++c) bad_v.values[static_cast<std::size_t>(bad * d + c)] = poison;
        bad_k.values[static_cast<std::size_t>(bad * d + 3)] = bad_q.values[static_cast<std::size_t>(bad * d + 3)] = nan;
        const auto from_v = run(q, k, bad_v), from_k = run(q, bad_k, v), from_q = run(bad_q, k, v);
        std::size_t wrong = 0;
        for (index_t i = 0; i < n; ++i)
            for (index_t c = 0; c < d; ++c) {
                const auto at = static_cast<std::size_t>(i * d + c);
                for (const auto* from : {&from_v, &from_k}) {
                    if (named.plan.contains(i, bad)) wrong += finite(from->values[at]);
                    else wrong += bits_of(from->values[at]) != bits_of(clean.values[at]);
                }
                if (i != bad) wrong += bits_of(from_q.values[at]) != bits_of(clean.values[at]);
            }
        CHECK(wrong == 0);
    }
}

}  // namespace

TEST_CASE("half and bfloat16: NaN and infinities reach the rows that see them and no other, bit for bit") {
    POLYATTN_RANDOM(random);
    check_poison<__half>(random);
    check_poison<__nv_bfloat16>(random);
}
