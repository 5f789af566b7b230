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
        : weight(name + ".weight", {columns}, false), bias(name + ".bias", {columns}, false), epsilon(epsilon_in) {
        detail::require(columns >= 1, "columns", "a number of columns >= 1", columns);
        weight.fill(T(1));
    }

    /// Mean and 1 / deviation of each row: what backward() needs beside x.
    struct Saved {
        std::vector<T> mean, scale;
    };

    void forward(MatrixView<const T> x, MatrixView<T> y, Saved& saved) const {
        detail::require_columns(x.cols, static_cast<index_t>(weight.value.values.size()), "x");
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

    /// Adds to the gradients of weight and bias; d_x = dL/dx, or is added to.
    void backward(MatrixView<const T> x, MatrixView<const T> d_y, const Saved& saved, MatrixView<T> d_x, bool add) {
        const T* const w = weight.value.data();
        detail::parallel_rows(x.rows, [&](index_t i) {
            const T *const from = x.row(i), *const gradient = d_y.row(i);
            const T mean = saved.mean[static_cast<std::size_t>(i)], scale = saved.scale[static_cast<std::size_t>(i)];
            // With g = d_y weight and z = (x - mean) scale: d_x = scale (g - mean(g) - z mean(g z)).
            V g_sum(T(0)), gz_sum(T(0));
            T g_rest = 0, gz_rest = 0;
            const index_t whole = x.cols / width * width;
            for (index_t c = 0; c < whole; c += width) {
                const V g = V::load_unaligned(gradient + c) * V::load_unaligned(w + c);
                g_sum = g_sum + g;
                gz_sum = detail::simd::multiply_add(g, (V::load_unaligned(from + c) - V(mean)) * V(scale), gz_sum);
            }
            for (index_t c = whole; c < x.cols; ++c) {
                g_rest += gradient[c] * w[c];
                gz_rest += gradient[c] * w[c] * (from[c] - mean) * scale;
            }
            const T g_mean = (detail::simd::lane_sum(g_sum) + g_rest) / static_cast<T>(x.cols), gz_mean = (detail::simd::lane_sum(gz_sum) + gz_rest) / static_cast<T>(x.cols);
            T* const to = d_x.row(i);
            for (index_t c = 0; c < whole; c += width) {
                const V z = (V::load_unaligned(from + c) - V(mean)) * V(scale);
                const V value = (V::load_unaligned(gradient + c) * V::load_unaligned(w + c) - V(g_mean) - z * V(gz_mean)) * V(scale);
                (add ? value + V::load_unaligned(to + c) : value).store_unaligned(to + c);
            }
            for (index_t c = whole; c < x.cols; ++c) {
                const T value = (gradient[c] * w[c] - g_mean - (from[c] - mean) * scale * gz_mean) * scale;
                to[c] = add ? to[c] + value : value;
            }
        });
        // Each column's sums in the order of the rows.
        constexpr index_t columns = 64;
        parallel_for((x.cols + columns - 1) / columns, [&](offset_t part, int) {
            const auto first = static_cast<index_t>(part) * columns, last = std::min(first + columns, x.cols);
            for (index_t i = 0; i < x.rows; ++i) {
                const T mean = saved.mean[static_cast<std::size_t>(i)], scale = saved.scale[static_cast<std::size_t>(i)];
                const T *const from = x.row(i), *const gradient = d_y.row(i);
                index_t c = first;
                T *const dw = weight.gradient.data(), *const db = bias.gradient.data();
                for (; c + width <= last; c += width) {
                    const V g = V::load_unaligned(gradient + c);
                    detail::simd::multiply_add(g, (V::load_unaligned(from + c) - V(mean)) * V(scale), V::load_unaligned(dw + c)).store_unaligned(dw + c);
                    (V::load_unaligned(db + c) + g).store_unaligned(db + c);
                }
                for (; c < last; ++c) {
                    dw[c] += gradient[c] * (from[c] - mean) * scale;
                    db[c] += gradient[c];
                }
            }
        });
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
};

}  // namespace nn

POLYATTN_END_NAMESPACE
