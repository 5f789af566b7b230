// Two translation units with different -m flags in one program: both must compute right, from bodies of their own (the linker keeps
// one body a name, so the names must differ wherever the flags do).
#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

const char* name_baseline();
const char* name_native();

std::vector<float> attend_baseline(const std::vector<float>& x, int tokens, int dim);
std::vector<float> attend_native(const std::vector<float>& x, int tokens, int dim);

std::vector<double> group_baseline(const std::vector<double>& x, int tokens, int dim);
std::vector<double> group_native(const std::vector<double>& x, int tokens, int dim);

TEST_CASE("both bodies are there and agree to rounding") {
    MESSAGE(name_baseline(), " and ", name_native());
    CHECK(std::string(name_baseline()) != name_native());
    std::vector<float> x(120 * 24);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i * i % 1013));
    const auto a = attend_baseline(x, 120, 24), b = attend_native(x, 120, 24);
    REQUIRE(a.size() == b.size());
    // |values| <= 1, scores below 24 / sqrt(24): (K + 1) (2 (d + 3) u |score| + 8 (1 + keys) u) with K = 2 hops of 120 keys at most.
    const double bound = 2 * 3 * (2 * 27 * 4.9 + 8 * 121) * 0x1p-24;
    for (std::size_t i = 0; i < a.size(); ++i) CHECK(std::abs(a[i] - b[i]) <= bound);
}

TEST_CASE("groups of tokens have the same bits, with fused multiply-adds or without") {
    std::vector<double> x(97 * 23);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<double>(i * i % 1013));
    CHECK(group_baseline(x, 97, 23) == group_native(x, 97, 23));
}
