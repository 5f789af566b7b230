#pragma once
// Rows of q or k to rows of features, and gradients back.

#include <polyattn/backend/head.hpp>
#include <polyattn/backend/simd/exp2.hpp>
#include <polyattn/backend/simd/fetch_ahead.hpp>
#include <polyattn/backend/simd/tiles.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

template <class T, class A>
POLYATTN_ALWAYS_INLINE Vec<T, A> apply_features(const ReLU&, Vec<T, A> x) {
    return xsimd::max(Vec<T, A>(T(0)), x);  // in this order NaN stays
}
template <class T, class A>
POLYATTN_ALWAYS_INLINE Vec<T, A> apply_features(const EluPlusOne&, Vec<T, A> x) {
    using V = Vec<T, A>;
    return xsimd::max(V(T(0)), x) + pow2<T, A>(xsimd::min(V(T(0)), x) * V(static_cast<T>(log2_e)));
}
/// Entry by entry, unless the map knows vectors.
template <class T, class A, class F>
POLYATTN_ALWAYS_INLINE Vec<T, A> apply_features(const F& map, Vec<T, A> x) {
    if constexpr (requires { map.vector(x); }) return map.vector(x);
    else {
        alignas(64) T values[lanes<T, A>];
        x.store_aligned(values);
        for (T& value : values) value = static_cast<T>(map(double(value)));
        return Vec<T, A>::load_aligned(values);
    }
}

/// d_phi times the derivative at x, where the features are `phi`.
template <class T, class A>
POLYATTN_ALWAYS_INLINE Vec<T, A> through_features(const ReLU&, Vec<T, A>, Vec<T, A> phi, Vec<T, A> d_phi) {
    return xsimd::select(phi > Vec<T, A>(T(0)), d_phi, Vec<T, A>(T(0)));
}
template <class T, class A>
POLYATTN_ALWAYS_INLINE Vec<T, A> through_features(const EluPlusOne&, Vec<T, A>, Vec<T, A> phi, Vec<T, A> d_phi) {
    return d_phi * xsimd::min(phi, Vec<T, A>(T(1)));
}
template <class T, class A, class F>
POLYATTN_ALWAYS_INLINE Vec<T, A> through_features(const F& map, Vec<T, A> x, Vec<T, A>, Vec<T, A> d_phi) {
    if constexpr (requires { map.vector_derivative(x); }) return d_phi * map.vector_derivative(x);
    else {
        alignas(64) T values[lanes<T, A>];
        x.store_aligned(values);
        for (T& value : values) value = static_cast<T>(map.derivative(double(value)));
        return d_phi * Vec<T, A>::load_aligned(values);
    }
}

/// Tiles of a product with so many rows and columns.
template <class T, class A>
index_t tile_count(index_t rows, index_t columns) {
    using K = Tiling<T, A>;
    const index_t vectors = (columns + K::lanes - 1) / K::lanes;
    return (rows + K::rows - 1) / K::rows * ((vectors + K::columns - 1) / K::columns);
}

/// The sums a x of tiles of rows and columns: a [rows][inner] and x [inner][columns] as stored, columns whole vectors. begin(row, column) is
/// what a vector of sums starts from, end(row, column, sums) gets it.
template <class T, class A, class Begin, class End>
POLYATTN_ALWAYS_INLINE void product_tiles(const T* a, std::ptrdiff_t a_stride, index_t rows, index_t inner, const T* x, std::ptrdiff_t x_stride, index_t columns, Begin&& begin, End&& end,
                                          NextRows<T> next, NextRows<T> also) {
    using V = Vec<T, A>;
    using K = Tiling<T, A>;
    for (NextRows<T>* fetched : {&next, &also}) fetched->spread(tile_count<T, A>(rows, columns), inner / 4);
    for_each_tile<T, A>(rows, columns, [&]<int M, int N>(std::integral_constant<int, M>, std::integral_constant<int, N>, index_t row, index_t column) POLYATTN_INLINE_LAMBDA {
        V acc[M * N];
        expand<M * N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { ((acc[I] = begin(row + I / N, column + I % N * K::lanes)), ...); });
        row_sum_tile<M, N, T, A>(acc, a + row * a_stride, a_stride, x + column, x_stride, inner, next.next_run(x), also.next_run(x));
        expand<M * N>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { (end(row + I / N, column + I % N * K::lanes, acc[I]), ...); });
    });
}

/// out[rows][columns] (+)= factors[row] * a x. Null factors: 1.
template <class T, class A>
POLYATTN_NOINLINE void row_product(const T* a, std::ptrdiff_t a_stride, index_t rows, index_t inner, const T* x, std::ptrdiff_t x_stride, index_t columns, T* out,
                                   std::ptrdiff_t out_stride, const T* factors, bool add, NextRows<T> next = {}, NextRows<T> also = {}) {
    using V = Vec<T, A>;
    product_tiles<T, A>(a, a_stride, rows, inner, x, x_stride, columns,
                        [&](index_t row, index_t column) POLYATTN_INLINE_LAMBDA { return add ? V::load_unaligned(out + row * out_stride + column) : V(T(0)); },
                        [&](index_t row, index_t column, V sums) POLYATTN_INLINE_LAMBDA { (factors ? sums * V(factors[row]) : sums).store_unaligned(out + row * out_stride + column); }, next, also);
}

/// The feature map of one head, for rows of q and of k.
template <class T, class A, class Features>
class FeatureRows {
    using V = Vec<T, A>;
    static constexpr int width = lanes<T, A>;

public:
    static constexpr bool random = has_directions<Features>;

    explicit FeatureRows(const KernelHead<T, Features>& head) : map_(*head.features), dim_(head.q.cols) {
        if constexpr (random) {
            const RandomDirections& directions = *map_;
            tables_ = &directions.template tables<T>();
            count_ = directions.count;
            columns_ = padded(count_, width);
            constant_ = static_cast<T>(std::log2(double(count_)) / 2);
            shift_ = static_cast<T>(directions.fixed_shift * log2_e);
        } else columns_ = padded(count_ = dim_, width);
    }

    index_t count() const { return count_; }
    /// Padded to whole vectors.
    index_t columns() const { return columns_; }
    static constexpr bool shifts_keys = random;
    /// The largest exponent of some rows of k, and what becomes of the largest of all: keys are shifted by it.
    T highest_exponent(Rows<T> rows, index_t first, index_t count, T* scratch) const {
        T highest = std::numeric_limits<T>::lowest();
        if constexpr (random) {
            exponents(rows, first, count, scratch);
            for (index_t i = 0; i < count; ++i)
                for (index_t r = 0; r < count_; ++r) highest = std::max(highest, scratch[offset_t{i} * columns_ + r]);
        }
        return highest;
    }
    void shift_keys_by(T highest) { shift_ = highest; }

    /// Features of rows [first, first + count) to [count][columns]; zeros behind the features.
    template <bool queries>
    void forward(Rows<T> rows, index_t first, index_t count, T* phi) const {
        if constexpr (random) {
            exponents(rows, first, count, phi);
            for (index_t i = 0; i < count; ++i) {
                T* const row = phi + offset_t{i} * columns_;
                T shift = shift_;
                if constexpr (queries) shift = *std::max_element(row, row + count_);
                for (index_t c = 0; c < columns_; c += width) pow2<T, A>(V::load_aligned(row + c) - V(shift)).store_aligned(row + c);
                std::fill(row + count_, row + columns_, T(0));
            }
        } else
            for (index_t i = 0; i < count; ++i) {
                const T* const from = rows.row(first + i);
                T* const row = phi + offset_t{i} * columns_;
                index_t c = 0;
                for (; c + width <= dim_; c += width) apply_features<T, A>(map_, V::load_unaligned(from + c)).store_aligned(row + c);
                if (c == dim_) continue;
                apply_features<T, A>(map_, rest(from + c, dim_ - c)).store_aligned(row + c);
                std::fill(row + dim_, row + columns_, T(0));
            }
    }

    /// d_x = (`adds`: +=) the gradient through the map, of `count` rows; d_phi is used up, `scratch` takes [count][padded dim].
    void backward(Rows<T> rows, index_t first, index_t count, const T* phi, T* d_phi, T* scratch, MatrixView<T> d_x, bool adds) const {
        if constexpr (random) {
            const index_t inputs = padded(dim_, width);
            const T root = static_cast<T>(1 / std::sqrt(double(dim_)));
            for (index_t i = 0; i < count; ++i) {
                T* const row = d_phi + offset_t{i} * columns_;
                V sum(T(0));
                for (index_t c = 0; c < columns_; c += width) {
                    const V product = V::load_aligned(row + c) * V::load_aligned(phi + offset_t{i} * columns_ + c);
                    product.store_aligned(row + c);
                    sum = sum + product;
                }
                const T total = lane_sum<T, A>(sum);
                T* const to = scratch + offset_t{i} * inputs;
                for (index_t c = 0; c < dim_; ++c) to[c] = -total * root * rows.row(first + i)[c];
                std::fill(to + dim_, to + inputs, T(0));
            }
            row_product<T, A>(d_phi, columns_, count, count_, tables_->to_inputs.data(), tables_->inputs, inputs, scratch, inputs, nullptr, true);
            for (index_t i = 0; i < count; ++i) store_row<A>(d_x, first + i, scratch + offset_t{i} * inputs, adds);
        } else
            for (index_t i = 0; i < count; ++i) {
                const T* const from = rows.row(first + i);
                T* const row = d_phi + offset_t{i} * columns_;
                T* const own = rows_in_place(d_x, first + i, adds);
                T* const to = own ? own : row;
                for (index_t c = 0; c < columns_; c += width) through(from, c, phi + offset_t{i} * columns_, V::load_aligned(row + c)).store_unaligned(to + c);
                if (to == row) store_row<A>(d_x, first + i, row, adds);
            }
    }

    /// Row i of d_x if gradients can be written straight there, in whole vectors; else null.
    T* rows_in_place(MatrixView<T> d_x, index_t i, bool adds) const { return !random && !adds && d_x.col_stride == 1 && columns_ == dim_ ? &d_x(i, 0) : nullptr; }
    /// A vector of backward(), of a map that works entry by entry: columns from c of a row.
    POLYATTN_ALWAYS_INLINE V through(const T* from, index_t c, const T* phi, V d_phi) const {
        return through_features<T, A>(map_, c + width <= dim_ ? V::load_unaligned(from + c) : rest(from + c, dim_ - c), V::load_aligned(phi + c), d_phi);
    }

private:
    static V rest(const T* from, index_t count) {
        alignas(64) T values[width] = {};
        std::copy_n(from, count, values);
        return V::load_aligned(values);
    }
    /// log2 of the features before the shift, constant_ included.
    void exponents(Rows<T> rows, index_t first, index_t count, T* to) const {
        row_product<T, A>(rows.row(first), rows.stride, count, dim_, tables_->to_exponents.data(), tables_->features, columns_, to, columns_, nullptr, false);
        const T half = static_cast<T>(log2_e / 2 / std::sqrt(double(dim_)));
        for (index_t i = 0; i < count; ++i) {
            const T* const from = rows.row(first + i);
            const V less(half * dot<T, A>(from, from, dim_) + constant_);
            for (index_t c = 0; c < columns_; c += width) (V::load_aligned(to + offset_t{i} * columns_ + c) - less).store_aligned(to + offset_t{i} * columns_ + c);
        }
    }

    const Features& map_;
    index_t dim_, count_ = 0, columns_ = 0;
    const RandomDirections::Tables<T>* tables_ = nullptr;
    T constant_ = 0, shift_ = 0;
};

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
