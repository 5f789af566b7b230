// Products of matrices against sums in double, for each architecture.
#include "support/random.hpp"

#include <polyattn/nn/linear.hpp>

#include <doctest/doctest.h>

using namespace polyattn;

namespace {

template <class T>
constexpr double unit = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;

template <class T>
void check_products() {
    POLYATTN_RANDOM(random);
    Workspace workspace;
    for (const std::array<index_t, 3>& shape : {std::array<index_t, 3>{1, 1, 1}, {0, 3, 2}, {3, 0, 2}, {3, 4, 0}, {16, 48, 16}, {15, 47, 17}, {17, 49, 15}, {64, 96, 170}, {65, 97, 175}, {5, 130, 600}, {131, 7, 64}, {33, 24, 513}, {70, 100, 600}, {3, 700, 600}})
        for (int form = 0; form < 4; ++form)
            for (const bool add : {false, true}) {
                const index_t m = shape[0], n = shape[1], k = shape[2];
                // a and b as stored, or as the transpose of what is stored.
                const auto a = form % 2 == 0 ? random.tensor<T>({m, k}) : random.tensor<T>({k, m}), b = form / 2 == 0 ? random.tensor<T>({k, n}) : random.tensor<T>({n, k});
                const MatrixView<const T> va = a.view().head(0, 0), vb = b.view().head(0, 0);
                const MatrixView<const T> a2 = form % 2 == 0 ? MatrixView<const T>{va.data, m, k, k, 1} : MatrixView<const T>{va.data, m, k, 1, m};
                const MatrixView<const T> b2 = form / 2 == 0 ? MatrixView<const T>{vb.data, k, n, n, 1} : MatrixView<const T>{vb.data, k, n, 1, k};
                auto c = random.tensor<T>({m, n + 3});
                const auto before = c;
                std::vector<int> finished(static_cast<std::size_t>(m) * static_cast<std::size_t>(n), 0);
                detail::multiply(a2, b2, MatrixView<T>{c.data(), m, n, n + 3, 1}, add, workspace, [&](index_t row, index_t column, std::span<T> values) {
                    for (std::size_t j = 0; j < values.size(); ++j) ++finished[static_cast<std::size_t>(row * n + column) + j];
                });
                INFO(m, " x ", n, " x ", k, ", form ", form, ", add ", add);
                bool right = true, kept = true;
                for (index_t i = 0; i < m; ++i) {
                    for (index_t j = 0; j < n; ++j) {
                        const auto at = static_cast<std::size_t>(i * (n + 3) + j);
                        double sum = add ? double(before.values[at]) : 0, size = std::abs(sum);
                        for (index_t t = 0; t < k; ++t) {
                            sum += double(a2(i, t)) * double(b2(t, j));
                            size += std::abs(double(a2(i, t)) * double(b2(t, j)));
                        }
                        right &= std::abs(sum - double(c.values[at])) <= (k + 2) * unit<T> * size;
                    }
                    for (index_t j = n; j < n + 3; ++j) kept &= c.values[static_cast<std::size_t>(i * (n + 3) + j)] == before.values[static_cast<std::size_t>(i * (n + 3) + j)];
                }
                CHECK(right);
                CHECK(kept);
                CHECK(std::all_of(finished.begin(), finished.end(), [](int times) { return times == 1; }));
            }
}

/// What is not finite, or too large to be split, in one row of a or one column of b: that row or column as sums in double say, all others the same bits.
template <class T>
void check_extremes() {
    POLYATTN_RANDOM(random);
    Workspace workspace;
    const index_t m = 70, n = 66, k = 300;
    const T infinity = std::numeric_limits<T>::infinity();
    for (const T value : {infinity, -infinity, std::numeric_limits<T>::quiet_NaN(), static_cast<T>(1e30), std::numeric_limits<T>::max()})
        for (const bool of_a : {true, false}) {
            auto a = random.tensor<T>({m, k}), b = random.tensor<T>({k, n});
            Tensor<T> c({m, n}), plain({m, n});
            const auto multiply = [&](Tensor<T>& to) {
                detail::multiply<T>(std::as_const(a).view().head(0, 0), std::as_const(b).view().head(0, 0), to.view().head(0, 0), false, workspace);
            };
            multiply(plain);
            const index_t line = random.below(of_a ? m : n), at = random.below(k);
            (of_a ? a.values[static_cast<std::size_t>(line * k + at)] : b.values[static_cast<std::size_t>(at * n + line)]) = value;
            multiply(c);
            bool right = true;
            for (index_t i = 0; i < m; ++i)
                for (index_t j = 0; j < n; ++j) {
                    const T x = c.values[static_cast<std::size_t>(i * n + j)];
                    if ((of_a ? i : j) != line) {
                        right &= x == plain.values[static_cast<std::size_t>(i * n + j)];
                        continue;
                    }
                    double sum = 0, size = 0;
                    for (index_t t = 0; t < k; ++t) {
                        const double term = double(a.values[static_cast<std::size_t>(i * k + t)]) * double(b.values[static_cast<std::size_t>(t * n + j)]);
                        sum += term;
                        size += std::abs(term);
                    }
                    constexpr double largest = double(std::numeric_limits<T>::max());
                    // By their bits: this is compiled with -ffast-math, too.
                    if (detail::is_nan(sum)) right &= detail::is_nan(x);
                    else if (!detail::is_finite(sum) || std::abs(sum) > largest) right &= !detail::is_nan(x) && !detail::is_finite(x) && std::signbit(x) == std::signbit(sum);
                    else if (size > largest) continue;  // what comes out depends on the order
                    else right &= std::abs(double(x) - sum) <= (k + 2) * unit<T> * size;
                }
            INFO("value ", value, of_a ? " in a" : " in b");
            CHECK(right);
        }
}

}  // namespace

TEST_CASE("products of matrices with numbers that are infinite or nearly so") {
    check_extremes<float>();
    check_extremes<double>();
}

TEST_CASE("products of matrices: every form, sizes around tiles and blocks, float") { check_products<float>(); }
TEST_CASE("products of matrices: every form, sizes around tiles and blocks, double") { check_products<double>(); }
