#pragma once
// Numbers that carry how far off they may be: formulas on them give bounds for layers that compute the same with rounding, in any order of their sums.

#include <polyattn/core/tensor.hpp>
#include <polyattn/plan/plan.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <span>
#include <string>

namespace bounded {

using polyattn::Bounds, polyattn::index_t, polyattn::Tensor;

inline double unit;  // roundoff of the tested numbers

/// A number, and how far off it may be where it is computed with this roundoff, by any order of the sums in it.
struct Bounded {
    double value = 0, error = 0;
    double size() const { return std::abs(value) + error; }
};
inline Bounded operator*(Bounded a, Bounded b) {
    const double product = a.size() * b.size();
    return {a.value * b.value, product - std::abs(a.value * b.value) + unit * product};
}
inline Bounded operator+(Bounded a, Bounded b) { return {a.value + b.value, a.error + b.error + unit * (std::abs(a.value + b.value) + a.error + b.error)}; }
inline Bounded operator-(Bounded a) { return {-a.value, a.error}; }
/// Of a number that is at least `least`, however far off it is.
inline Bounded inverse(Bounded a, double least = 0) {
    const double size = std::abs(a.value), low = std::max(size - a.error, least);
    return {1 / a.value, low > 0 ? std::max((size - low) / (size * low), a.error / (size * (size + a.error))) + unit / low : 1e300};
}
/// e^x, within four units on the device.
inline Bounded exponential(Bounded a) { return {std::exp(a.value), std::exp(a.value) * (std::expm1(a.error) + 4 * unit * std::exp(a.error))}; }

class Sum {
public:
    void add(Bounded term) {
        total_.value += term.value;
        total_.error += term.error;
        sizes_ += term.size();
        ++terms_;
    }
    Bounded total() const { return {total_.value, total_.error + 1.01 * terms_ * unit * sizes_}; }

private:
    Bounded total_;
    double sizes_ = 0, terms_ = 0;
};

struct Matrix {
    Matrix() = default;
    Matrix(index_t r, index_t c) : rows(r), columns(c), entries(static_cast<std::size_t>(r) * static_cast<std::size_t>(c)) {}
    explicit Matrix(const Tensor<double>& from) : Matrix(static_cast<index_t>(from.shape[0]), static_cast<index_t>(from.shape.size() < 2 ? 1 : from.shape[1])) {
        for (std::size_t i = 0; i < entries.size(); ++i) entries[i].value = from.values[i];
    }
    Bounded& operator()(index_t r, index_t c) { return entries[static_cast<std::size_t>(r) * static_cast<std::size_t>(columns) + static_cast<std::size_t>(c)]; }
    const Bounded& operator()(index_t r, index_t c) const { return const_cast<Matrix&>(*this)(r, c); }
    index_t rows = 0, columns = 0;
    std::vector<Bounded> entries;
};
inline Matrix transposed(const Matrix& a) {
    Matrix made(a.columns, a.rows);
    for (index_t r = 0; r < a.rows; ++r)
        for (index_t c = 0; c < a.columns; ++c) made(c, r) = a(r, c);
    return made;
}
inline Matrix operator*(const Matrix& a, const Matrix& b) {
    Matrix made(a.rows, b.columns);
    for (index_t r = 0; r < a.rows; ++r)
        for (index_t c = 0; c < b.columns; ++c) {
            Sum sum;
            for (index_t k = 0; k < a.columns; ++k) sum.add(a(r, k) * b(k, c));
            made(r, c) = sum.total();
        }
    return made;
}
inline void add(Matrix& to, const Matrix& from) {
    if (to.entries.empty()) to = from;
    else
        for (std::size_t i = 0; i < to.entries.size(); ++i) to.entries[i] = to.entries[i] + from.entries[i];
}

/// exp(score - log sum of exp), where the logarithm is off as the sum is; of some columns of queries and keys.
inline Matrix softmax_weights(double scale, const Matrix& queries, const Matrix& keys, Bounds columns) {
    Matrix made(queries.rows, keys.rows);
    for (index_t r = 0; r < made.rows; ++r) {
        double most = -1e300;
        for (index_t j = 0; j < made.columns; ++j) {
            Sum sum;
            for (index_t c = columns.begin; c < columns.end; ++c) sum.add(queries(r, c) * keys(j, c));
            made(r, j) = sum.total() * Bounded{scale, 2 * unit * scale};
            most = std::max(most, made(r, j).value);
        }
        Sum sum;
        for (index_t j = 0; j < made.columns; ++j) sum.add(exponential(made(r, j) + Bounded{-most, 0}));
        const Bounded total = sum.total();
        const double logarithm = most + std::log(total.value);
        const Bounded logsumexp{logarithm, total.error / (total.value - total.error) + 8 * unit * (1 + std::abs(most) + std::abs(logarithm))};
        for (index_t j = 0; j < made.columns; ++j) made(r, j) = exponential(made(r, j) + -logsumexp) * Bounded{1, 16 * unit};
    }
    return made;
}
/// What dropout multiplies a weight with: nothing is dropped.
struct KeepAll {
    Bounded operator()(index_t, index_t) const { return {1, 0}; }
};
/// Of `made` = weights times what dropout keeps(row, key) times values, in some columns: d_q and d_k, and d_v.
template <class Keeps = KeepAll>
void softmax_gradient(double factor, const Matrix& queries, const Matrix& keys, Bounds columns, const Matrix& values, const Matrix& made, const Matrix& d_made, Bounds value_columns, Matrix& d_q, Matrix& d_k, Matrix& d_v,
                      Keeps&& keeps = {}) {
    const Matrix weights = softmax_weights(factor, queries, keys, columns);
    const Bounded scale{factor, unit * factor};
    Matrix d_scores(weights.rows, weights.columns);
    for (index_t r = 0; r < weights.rows; ++r) {
        Sum row_sum;
        for (index_t c = value_columns.begin; c < value_columns.end; ++c) row_sum.add(d_made(r, c) * made(r, c));
        for (index_t j = 0; j < weights.columns; ++j) {
            Sum sum;
            for (index_t c = value_columns.begin; c < value_columns.end; ++c) sum.add(d_made(r, c) * values(j, c));
            d_scores(r, j) = weights(r, j) * (keeps(r, j) * sum.total() + -row_sum.total());
        }
    }
    for (index_t c = columns.begin; c < columns.end; ++c) {
        for (index_t r = 0; r < weights.rows; ++r) {
            Sum sum;
            for (index_t j = 0; j < weights.columns; ++j) sum.add(d_scores(r, j) * keys(j, c));
            d_q(r, c) = sum.total() * scale;
        }
        for (index_t j = 0; j < weights.columns; ++j) {
            Sum sum;
            for (index_t r = 0; r < weights.rows; ++r) sum.add(d_scores(r, j) * queries(r, c));
            d_k(j, c) = sum.total() * scale;
        }
    }
    for (index_t j = 0; j < weights.columns; ++j)
        for (index_t c = value_columns.begin; c < value_columns.end; ++c) {
            Sum sum;
            for (index_t r = 0; r < weights.rows; ++r) sum.add(weights(r, j) * keeps(r, j) * d_made(r, c));
            d_v(j, c) = sum.total();
        }
}

/// How many bounds say something.
struct Tightness {
    std::size_t entries = 0, tight = 0;
};
/// Each number within error_of(its place) of what was computed in double.
template <class Values, class ErrorOf>
void check_within(const Values& got, std::span<const double> wanted, ErrorOf&& error_of, const std::string& what, Tightness& of_all) {
    REQUIRE(got.size() == wanted.size());
    std::size_t wrong = 0;
    double most = 0, worst = 0;
    for (const double entry : wanted) most = std::max(most, std::abs(entry));
    for (std::size_t i = 0; i < wanted.size(); ++i) {
        // What was computed in double is rounded as well.
        const double allowed = 1.01 * error_of(i) * (1 + 2 * 0x1p-53 / unit) + 1e-300, apart = std::abs(double(got[i]) - wanted[i]);
        wrong += !(apart <= allowed);
        worst = std::max(worst, apart / allowed);
        ++of_all.entries;
        of_all.tight += allowed <= 1e5 * unit * most || most == 0;
    }
    INFO(what, " is off by ", worst, " times what it may be");
    CHECK(wrong == 0);
}

}  // namespace bounded
