// Two translation units with different -m flags in one program: both must compute right, and the native one must really use its
// own instructions (a linker that merged inline bodies would give both the same bits).
#include <doctest/doctest.h>

#include <cmath>
#include <vector>

std::vector<float> attend_baseline(const std::vector<float>& x, int tokens, int dim);
std::vector<float> attend_native(const std::vector<float>& x, int tokens, int dim);

TEST_CASE("both bodies are there and agree to rounding") {
    std::vector<float> x(120 * 24);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i * i % 1013));
    const auto a = attend_baseline(x, 120, 24), b = attend_native(x, 120, 24);
    REQUIRE(a.size() == b.size());
    // |values| <= 1, scores below 24 / sqrt(24): (K + 1) (2 (d + 3) u |score| + 8 (1 + keys) u) with K = 2 hops of 120 keys at most.
    const double bound = 2 * 3 * (2 * 27 * 4.9 + 8 * 121) * 0x1p-24;
    for (std::size_t i = 0; i < a.size(); ++i) CHECK(std::abs(a[i] - b[i]) <= bound);
}
