#pragma once

#include <polyattn/nn/linear.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace nn {

/// Rows of a learned table [entries, columns] by number: tokens, or positions. Entries start as normal deviates times `deviation`.
template <class T>
class Embedding {
public:
    Embedding(const std::string& name, index_t entries, index_t columns, double deviation, std::uint64_t seed) : weight(name + ".weight", {detail::positive(entries, "entries"), detail::positive(columns, "columns")}, false) {
        weight.draw(deviation, seed);
    }

    /// y[i] (+)= row numbers[i] of the table. Throws invalid_input for a number outside it.
    void forward(std::span<const index_t> numbers, MatrixView<T> y, bool add = false) const {
        const auto entries = static_cast<index_t>(weight.value.shape[0]);
        detail::require(std::cmp_equal(numbers.size(), y.rows), "numbers", [&] { return detail::text("one for each of ", y.rows, " rows"); }, numbers.size());
        detail::require_columns(y.cols, static_cast<index_t>(weight.value.shape[1]), "y");
        for (const index_t number : numbers)
            detail::require(number >= 0 && number < entries, "numbers", [&] { return detail::text("entries of [0, ", entries, ")"); }, number);
        detail::parallel_rows(y.rows, [&](index_t i) {
            const T* const from = weight.value.data() + offset_t{numbers[static_cast<std::size_t>(i)]} * y.cols;
            if (add) detail::simd::add_scaled<T, xsimd::default_arch>(T(1), from, y.cols, y.row(i));
            else std::copy_n(from, y.cols, y.row(i));
        });
    }
    /// Adds to the gradient of the table, in the order of the numbers.
    void backward(std::span<const index_t> numbers, MatrixView<const T> d_y) {
        for (index_t i = 0; i < d_y.rows; ++i)
            detail::simd::add_scaled<T, xsimd::default_arch>(T(1), d_y.row(i), d_y.cols, weight.gradient.data() + offset_t{numbers[static_cast<std::size_t>(i)]} * d_y.cols);
    }

    template <class F>
    void for_each_parameter(F&& f) {
        f(weight);
    }

    Parameter<T> weight;
};

}  // namespace nn

POLYATTN_END_NAMESPACE
