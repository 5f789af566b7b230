#pragma once
// A layer with a bias against the reference: tiles, edges, other numbers of valid keys, with and without stored weights.

#include "cases.hpp"
#include "layers.hpp"

#include <polyattn/policy/bias/bias.hpp>

#include <functional>
#include <vector>

/// Every functor as one type.
using AnyBias = polyattn::FunctionBias<std::function<double(polyattn::index_t, polyattn::index_t, polyattn::index_t, polyattn::index_t)>>;

inline std::vector<double> random_table(Random& random, std::size_t size) {
    std::vector<double> table(size);
    for (double& entry : table) entry = random.normal();
    return table;
}

template <class T, class Bias>
void check_bias(const Case& c, Random& random, const Bias& bias) {
    check_case<T>(c, random, true, Attention<AnyDiffusion, Bias>{AnyDiffusion{c.recursion}, bias}, Attention<AnyDiffusion, Bias, Reference>{AnyDiffusion{c.recursion}, bias});
}

template <class T, class Bias>
void check_bias(const char* name, Random& random, const Bias& bias) {
    for (const polyattn::index_t n : {1, 19, 40})
        for (const std::size_t budget : {std::size_t{0}, std::size_t{1} << 28}) {
            Case c{name, LocalGlobalRandom{.window = 8, .globals = 3, .randoms = 3, .seed = random.seed()}.plan(n, n), PPR<2>{}.recursion(), 8, 8, 2, 2, 2};
            if (n == 40) c.options.key_lengths = {33, 40};
            c.options.weight_budget = budget;
            check_bias<T>(c, random, bias);
        }
}
