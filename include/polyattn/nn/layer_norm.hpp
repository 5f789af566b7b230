#pragma once

#include <polyattn/nn/linear.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace nn {

/// y = (x - mean) / sqrt(variance + epsilon) * weight + bias, row by row. Source: Ba et al., "Layer normalization" (2016).
template <class T>
class LayerNorm {
    using A = xsimd::default_arch;
    using V = detail::simd::Vec<T, A>;

public:
    LayerNorm(const std::string& name, index_t columns, double epsilon_in = 1e-5)
        : weight(name + ".weight", {detail::positive(columns, "columns")}, false), bias(name + ".bias", {columns}, false), epsilon(epsilon_in) {
        detail::require(detail::is_finite(epsilon) && epsilon >= 0, "epsilon", "a number >= 0", epsilon);
        weight.fill(T(1));
    }

    /// Mean and 1 / deviation of each row: what backward() needs beside x, and its scratch.
    struct Saved {
        std::vector<T> mean, scale;
        std::vector<T> sums;  // of blocks of rows, each for the weight and the bias
    };

    void forward(MatrixView<const T> x, MatrixView<T> y, Saved& saved) const {
        detail::require_columns(x.cols, static_cast<index_t>(weight.value.values.size()), "x");
        detail::require_columns(y.cols, x.cols, "y");
        detail::require_rows(y.rows, x.rows, "y");
        saved.mean.resize(static_cast<std::size_t>(x.rows));
        saved.scale.resize(static_cast<std::size_t>(x.rows));
        detail::parallel_rows(x.rows, [&](index_t i) {
            const T* const from = x.row(i);
            V sum(T(0)), squares(T(0));
            T rest = 0;
            const index_t whole = x.cols / width * width;
            for (index_t c = 0; c < whole; c += width) sum = sum + V::load_unaligned(from + c);
            for (index_t c = whole; c < x.cols; ++c) rest += from[c];
            const T mean = (detail::simd::lane_sum(sum) + rest) / static_cast<T>(x.cols);
            rest = 0;
            for (index_t c = 0; c < whole; c += width) {
                const V apart = V::load_unaligned(from + c) - V(mean);
                squares = detail::simd::multiply_add(apart, apart, squares);
            }
            for (index_t c = whole; c < x.cols; ++c) rest += (from[c] - mean) * (from[c] - mean);
            const T variance = (detail::simd::lane_sum(squares) + rest) / static_cast<T>(x.cols);
            const T scale = 1 / std::sqrt(variance + static_cast<T>(epsilon));
            const T *const w = weight.value.data(), *const b = bias.value.data();
            T* const to = y.row(i);
            for (index_t c = 0; c < whole; c += width)
                detail::simd::multiply_add((V::load_unaligned(from + c) - V(mean)) * V(scale), V::load_unaligned(w + c), V::load_unaligned(b + c)).store_unaligned(to + c);
            for (index_t c = whole; c < x.cols; ++c) to[c] = (from[c] - mean) * scale * w[c] + b[c];
            saved.mean[static_cast<std::size_t>(i)] = mean;
            saved.scale[static_cast<std::size_t>(i)] = scale;
        });
    }

    /// Adds to the gradients of weight and bias; d_x = dL/dx, plus `other` if it has memory: the gradient that goes past the norm.
    void backward(MatrixView<const T> x, MatrixView<const T> d_y, Saved& saved, MatrixView<T> d_x, MatrixView<const T> other = {}) {
        detail::require_rows(static_cast<index_t>(saved.mean.size()), x.rows, "saved");
        detail::require_rows(d_y.rows, x.rows, "d_y");
        detail::require_rows(d_x.rows, x.rows, "d_x");
        // Sums over rows: blocks of them, whose sums are added in order.
        constexpr index_t block = 128;
        const index_t columns = x.cols, blocks = (x.rows + block - 1) / block;
        saved.sums.resize(static_cast<std::size_t>(blocks) * 2 * static_cast<std::size_t>(columns));
        parallel_for(blocks, [&](offset_t part, int) {
            const auto first = static_cast<index_t>(part) * block;
            T* const d_weight = saved.sums.data() + part * 2 * columns;
            std::fill_n(d_weight, 2 * columns, T(0));
            for (index_t i = first; i < std::min(first + block, x.rows); ++i) {
                const auto row = static_cast<std::size_t>(i);
                row_gradient(x.row(i), d_y.row(i), columns, saved.mean[row], saved.scale[row], d_x.row(i), other.data ? other.row(i) : nullptr, d_weight);
            }
        });
        for (index_t part = 0; part < blocks; ++part) {
            const T* const from = saved.sums.data() + offset_t{part} * 2 * columns;
            detail::simd::add_scaled<T, A>(T(1), from, columns, weight.gradient.data());
            detail::simd::add_scaled<T, A>(T(1), from + columns, columns, bias.gradient.data());
        }
    }

    template <class F>
    void for_each_parameter(F&& f) {
        f(weight);
        f(bias);
    }

    Parameter<T> weight, bias;
    double epsilon;

private:
    static constexpr index_t width = detail::simd::lanes<T, A>;

    /// With g = d_y weight and z = (x - mean) scale: d_x = scale (g - mean(g) - z mean(g z)), d_weight += d_y z, and behind it d_bias += d_y.
    void row_gradient(const T* x, const T* d_y, index_t columns, T mean, T scale, T* d_x, const T* other, T* d_weight) const {
        const T* const w = weight.value.data();
        T* const d_bias = d_weight + columns;
        V g_sum(T(0)), gz_sum(T(0));
        T g_rest = 0, gz_rest = 0;
        const index_t whole = columns / width * width;
        for (index_t c = 0; c < whole; c += width) {
            const V d = V::load_unaligned(d_y + c), g = d * V::load_unaligned(w + c), z = (V::load_unaligned(x + c) - V(mean)) * V(scale);
            g_sum = g_sum + g;
            gz_sum = detail::simd::multiply_add(g, z, gz_sum);
            detail::simd::multiply_add(d, z, V::load_unaligned(d_weight + c)).store_unaligned(d_weight + c);
            (V::load_unaligned(d_bias + c) + d).store_unaligned(d_bias + c);
        }
        for (index_t c = whole; c < columns; ++c) {
            const T z = (x[c] - mean) * scale;
            g_rest += d_y[c] * w[c];
            gz_rest += d_y[c] * w[c] * z;
            d_weight[c] += d_y[c] * z;
            d_bias[c] += d_y[c];
        }
        const T g_mean = (detail::simd::lane_sum(g_sum) + g_rest) / static_cast<T>(columns), gz_mean = (detail::simd::lane_sum(gz_sum) + gz_rest) / static_cast<T>(columns);
        for (index_t c = 0; c < whole; c += width) {
            const V z = (V::load_unaligned(x + c) - V(mean)) * V(scale);
            const V value = (V::load_unaligned(d_y + c) * V::load_unaligned(w + c) - V(g_mean) - z * V(gz_mean)) * V(scale);
            (other ? value + V::load_unaligned(other + c) : value).store_unaligned(d_x + c);
        }
        for (index_t c = whole; c < columns; ++c) {
            const T value = (d_y[c] * w[c] - g_mean - (x[c] - mean) * scale * gz_mean) * scale;
            d_x[c] = other ? other[c] + value : value;
        }
    }
};

}  // namespace nn

POLYATTN_END_NAMESPACE
