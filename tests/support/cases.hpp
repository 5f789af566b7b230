#pragma once
// A call of a layer, checked against the double-precision reference within derived bounds and an estimated allowance for flushed weights.

#include "any_diffusion.hpp"
#include "bounds.hpp"
#include "patterns.hpp"
#include "random.hpp"

#include <polyattn/call_options.hpp>
#include <polyattn/policy/diffusion/diffusion.hpp>

#include <doctest/doctest.h>

#include <span>

using namespace polyattn;

template <class T>
constexpr double unit = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;

struct Case {
    std::string name;
    Plan plan;
    Recursion recursion;
    index_t d, e;
    index_t batch = 1, heads = 1, key_heads = 1;
    CallOptions options = {};
    double scale = 1;
    bool plans_itself = false;  // the layers' pattern does, from q and k: `plan` has the numbers of queries and keys alone
};

/// |got - exact| <= bound for all entries; in double the reference rounds as well.
template <class T>
void check_close(const Tensor<T>& got, const Tensor<double>& exact, std::span<const double> bound, const char* what, double flushed) {
    REQUIRE(got.values.size() == exact.values.size());
    const double slack = sizeof(T) == 8 ? 2 : 1;
    double worst = 0;
    std::size_t where = 0;
    for (std::size_t i = 0; i < exact.values.size(); ++i) {
        const double share = std::abs(double(got.values[i]) - exact.values[i]) / (slack * bound[i] + unit<T> * std::abs(exact.values[i]) + flushed);
        if (!(share <= worst) && !std::isnan(worst)) {
            worst = share;
            where = i;
        }
    }
    INFO(what, " entry ", where, ": got ", got.values.empty() ? 0 : double(got.values[where]), ", exact ", exact.values.empty() ? 0 : exact.values[where]);
    CHECK(worst <= 1);
}

template <class T, class Layer, class ExactLayer>
void check_case(const Case& c, Random& random, bool backward, const Layer& fast, const ExactLayer& exact) {
    const index_t n = c.plan.queries(), keys = c.plan.keys();
    INFO(c.name, ", ", n, " queries, ", keys, " keys, d = ", c.d, ", e = ", c.e, ", hops ", c.recursion.hops.size());
    const auto q = random.tensor<T>({c.batch, c.heads, n, c.d}, c.scale), k = random.tensor<T>({c.batch, c.key_heads, keys, c.d}),
               v = random.tensor<T>({c.batch, c.key_heads, keys, c.e}), d_out = random.tensor<T>({c.batch, c.heads, n, c.e});
    const auto q2 = in_double(q), k2 = in_double(k), v2 = in_double(v), d_out2 = in_double(d_out);
    CallOptions options = c.options;
    if (!c.plans_itself) options.plan = c.plan;
    const auto out = fast(q.view(), k.view(), v.view(), options);
    const auto [exact_out, exact_saved] = exact.forward(q2.view(), k2.view(), v2.view(), options);

    // Bounds head by head; key heads collect those of their queries.
    Tensor<double> b_out(out.shape), b_q(q.shape), b_k(k.shape), b_v(v.shape);
    const auto bound_bias = detail::bind_bias(fast.bias(), n, keys);
    for (index_t b = 0; b < c.batch; ++b)
        for (index_t h = 0; h < c.heads; ++h) {
            const index_t kh = h / (c.heads / c.key_heads);
            const index_t key_length = options.key_lengths.empty() ? keys : options.key_lengths[static_cast<std::size_t>(b)];
            const index_t query_length = !options.query_lengths.empty() ? options.query_lengths[static_cast<std::size_t>(b)] : n == keys ? key_length : n;
            const detail::Head<double, decltype(bound_bias)> head{std::as_const(q2).view().head(b, h), std::as_const(k2).view().head(b, kh), std::as_const(v2).view().head(b, kh),
                                                                 &exact_saved.plan(b, h), &c.recursion, &bound_bias, 1 / std::sqrt(double(c.d)), b, h, query_length, key_length,
                                                                 detail::DropoutMask(options.dropout, options.draw, offset_t{b} * c.heads + h), 0};
            const auto d_view = std::as_const(d_out2).view().head(b, h);
            const Bounds2D bounds = error_bounds(head, &d_view, unit<T>);
            const auto add = [&](Tensor<double>& to, const std::vector<double>& from, index_t head_index, index_t heads) {
                const auto start = (static_cast<std::size_t>(b) * static_cast<std::size_t>(heads) + static_cast<std::size_t>(head_index)) * from.size();
                for (std::size_t i = 0; i < from.size(); ++i) to.values[start + i] += from[i];
            };
            add(b_out, bounds.out, h, c.heads);
            add(b_q, bounds.d_q, h, c.heads);
            add(b_k, bounds.d_k, kh, c.key_heads);
            add(b_v, bounds.d_v, kh, c.key_heads);
        }
    // Weights below the smallest normal number are flushed to 0: each takes that times a value, or times dL/dA and a query or key,
    // from an entry. Inputs are standard normal times the scale, so the other factors stay below 1e4.
    const double flushed = double(std::numeric_limits<T>::min()) * 1e4 * c.scale * (n + keys + 1);
    check_close(out, exact_out, b_out.values, "out", flushed);
    if (!backward) return;
    const auto [trained_out, saved] = fast.forward(q.view(), k.view(), v.view(), options);
    check_close(trained_out, exact_out, b_out.values, "out of forward()", flushed);
    const auto gradient = fast.backward(saved, d_out.view());
    const auto exact_gradient = exact.backward(exact_saved, d_out2.view());
    check_close(gradient.q, exact_gradient.q, b_q.values, "d_q", flushed);
    check_close(gradient.k, exact_gradient.k, b_k.values, "d_k", flushed);
    check_close(gradient.v, exact_gradient.v, b_v.values, "d_v", flushed);
}

inline const std::vector<std::pair<std::string, Recursion>>& diffusions() {
    static const std::vector<std::pair<std::string, Recursion>> all = {{"none", NoDiffusion{}.recursion()},
                                                                       {"PPR<5>", PPR<5>{}.recursion()},
                                                                       {"PPR<1>, alpha 0", PPR<1>{.alpha = 0}.recursion()},
                                                                       {"PPR<2>, alpha 1", PPR<2>{.alpha = 1}.recursion()},
                                                                       {"PPR<0>", PPR<0>{}.recursion()},
                                                                       {"HeatKernel<3>", HeatKernel<3>{}.recursion()},
                                                                       {"Polynomial<2>", Polynomial<2>{{.5, -1, 1.5}}.recursion()}};
    return all;
}
