#pragma once
// Fresh random inputs in every run. POLYATTN_SEED=<number> repeats a run; the seed is printed with a failure.

#include <polyattn/core/rng.hpp>
#include <polyattn/core/tensor.hpp>

#include <cmath>
#include <cstdlib>
#include <random>
#include <string>

inline std::uint64_t fresh_seed() {
    static const std::uint64_t base = [] {
        if (const char* given = std::getenv("POLYATTN_SEED")) return std::strtoull(given, nullptr, 10);
        return static_cast<unsigned long long>(std::random_device{}());
    }();
    return base;
}

/// Declares `random`, and prints its seed if something fails.
#define POLYATTN_RANDOM(random)           \
    Random random(fresh_seed());          \
    INFO("POLYATTN_SEED=", fresh_seed())

class Random {
public:
    explicit Random(std::uint64_t seed) : generator_(seed) {}

    double normal() { return std::normal_distribution<double>()(generator_); }
    double uniform() { return std::uniform_real_distribution<double>()(generator_); }
    polyattn::index_t below(polyattn::index_t bound) { return std::uniform_int_distribution<polyattn::index_t>(0, bound - 1)(generator_); }
    std::uint64_t seed() { return generator_(); }

    template <class T>
    polyattn::Tensor<T> tensor(std::vector<polyattn::offset_t> shape, double scale = 1) {
        polyattn::Tensor<T> out(std::move(shape));
        for (T& value : out.values) value = static_cast<T>(scale * normal());
        return out;
    }

private:
    std::mt19937_64 generator_;
};

/// A copy in double: exactly the same numbers.
template <class T>
polyattn::Tensor<double> in_double(const polyattn::Tensor<T>& from) {
    polyattn::Tensor<double> to(from.shape);
    std::copy(from.values.begin(), from.values.end(), to.values.begin());
    return to;
}
