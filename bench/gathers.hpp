#pragma once
// The gathers alone, as the layers run them: r random edges a row, 64 columns in parts.

#include "common.hpp"

namespace bench {

struct Gathers {
    static constexpr index_t columns = 64;
    Plan plan;
    Tensor<float> x, y, out;
    detail::Arena arena;  // huge pages, as in the layers
    detail::simd::Parts<float> parts;
    std::span<float> weights;

    Gathers(index_t n, index_t r)
        : plan(RandomTokens{.count = r}.plan(n, n)), x(random_tensor({n, columns}, 1)), y(random_tensor({n, columns}, 2)), out({n, columns}),
          parts(detail::simd::take_parts<float>(n, columns, arena)), weights(arena.take<float>(plan.edges().count())) {
        for (index_t i = 0; i < n; ++i) detail::simd::split_row(y.data() + offset_t{i} * columns, i, parts);
        std::fill(weights.begin(), weights.end(), .5f);
    }
    std::span<const index_t> keys(index_t i) const { return plan.edges().row(i); }
    offset_t first(index_t i) const { return plan.edges().offsets[static_cast<std::size_t>(i)]; }

    template <class F>
    void for_each_row(F&& f) {
        const bool ahead = detail::simd::fetches_gathers(parts);
        detail::simd::for_each_part<float, Arch>(parts, [&](auto vectors, index_t p) {
            for (index_t i = 0; i < plan.queries(); ++i) f(vectors, p, i, ahead ? plan.edges().count() - first(i) : 0);
        });
    }
    /// weights[e] = x[row] . y[key].
    void sddmm() {
        for_each_row([&](auto vectors, index_t p, index_t i, offset_t known) {
            detail::simd::gather_dots<vectors, float, Arch>(x.data() + offset_t{i} * columns + p * parts.part_columns, 1.f, keys(i).data(), static_cast<offset_t>(keys(i).size()), parts.part(p),
                                                            known, weights.data() + first(i), p > 0);
        });
    }
    /// out[row] = sum of weights[e] * y[key].
    void spmm() {
        using V = xsimd::batch<float, Arch>;
        for_each_row([&](auto vectors, index_t p, index_t i, offset_t known) {
            V sum[vectors];
            detail::simd::unroll<vectors>([&](auto v) POLYATTN_INLINE_LAMBDA { sum[v] = V(0.f); });
            detail::simd::gather_sum<vectors, float, Arch>(sum, keys(i).data(), weights.data() + first(i), static_cast<offset_t>(keys(i).size()), parts.part(p), known);
            float* const to = out.data() + offset_t{i} * columns + p * parts.part_columns;
            detail::simd::unroll<vectors>([&](auto v) POLYATTN_INLINE_LAMBDA { sum[v].store_unaligned(to + static_cast<std::size_t>(v) * V::size); });
        });
    }
    /// Empty, or what is wrong with sampled results.
    std::string check(bool sums) {
        sums ? spmm() : sddmm();
        for (index_t i = 0; i < plan.queries(); i += 101) {
            double exact = 0, size = 0;
            if (sums)
                for (const index_t j : keys(i)) {
                    exact += .5 * double(y.values[static_cast<std::size_t>(j) * columns + 37]);
                    size += .5 * std::abs(double(y.values[static_cast<std::size_t>(j) * columns + 37]));
                }
            else
                for (std::size_t c = 0; c < columns; ++c) {
                    const double product = double(x.values[static_cast<std::size_t>(i) * columns + c]) * double(y.values[static_cast<std::size_t>(keys(i)[0]) * columns + c]);
                    exact += product;
                    size += std::abs(product);
                }
            const double got = sums ? double(out.values[static_cast<std::size_t>(i) * columns + 37]) : double(weights[static_cast<std::size_t>(first(i))]);
            const double terms = sums ? double(keys(i).size()) : columns;
            if (!(std::abs(exact - got) <= (terms + 2) * 0x1p-24 * size)) return "row " + std::to_string(i) + " is wrong";
        }
        return {};
    }
    double bytes() const { return double(plan.edges().count()) * columns * sizeof(float); }
    std::size_t footprint() const { return static_cast<std::size_t>(plan.keys()) * columns * sizeof(float); }
};

}  // namespace bench
