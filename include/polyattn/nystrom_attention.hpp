#pragma once

#include <polyattn/backend/simd/matrix_product.hpp>
#include <polyattn/headwise_attention.hpp>
#include <polyattn/policy/nystrom.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

/// Z of Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4, from A^T / (largest column sum x largest row sum), and its gradient. O(iterations m^3).
/// Source: Razavi et al. (2014), as in Xiong et al., "Nystromformer" (2021), equation 11.
template <class T>
class PseudoInverse {
public:
    void run(MatrixView<const T> a, index_t iterations, Workspace& workspace) {
        m_ = a.rows;
        a_ = Tensor<T>({m_, m_});
        for (index_t i = 0; i < m_; ++i)
            for (index_t j = 0; j < m_; ++j) entry(a_, i, j) = a(i, j);
        std::tie(row_, row_sum_) = largest_row(a);
        std::tie(column_, column_sum_) = largest_row(transposed(a));
        z_.assign(static_cast<std::size_t>(iterations) + 1, Tensor<T>({m_, m_}));
        const T scale = 1 / (row_sum_ * column_sum_);
        for (index_t i = 0; i < m_; ++i)
            for (index_t j = 0; j < m_; ++j) entry(z_[0], i, j) = a(j, i) * scale;
        Tensor<T> x({m_, m_}), u({m_, m_}), w({m_, m_});
        for (index_t t = 0; t < iterations; ++t) {
            const MatrixView<const T> z = matrix_of(z_[static_cast<std::size_t>(t)]);
            polynomial(z, x, u, w, workspace);
            multiply<T>(z, matrix_of(w), matrix_of(z_[static_cast<std::size_t>(t) + 1]), false, workspace);
            for (T& value : z_[static_cast<std::size_t>(t) + 1].values) value /= 4;
        }
    }
    MatrixView<const T> result() const { return matrix_of(z_.back()); }

    /// d_a = dL/dA from dL/dZ, which is used up.
    void backward(Tensor<T>& d_z, MatrixView<T> d_a, Workspace& workspace) const {
        for (index_t i = 0; i < m_; ++i) std::fill_n(d_a.row(i), m_, T(0));
        Tensor<T> x({m_, m_}), u({m_, m_}), w({m_, m_}), d_x({m_, m_}), d_u({m_, m_}), d_w({m_, m_}), next({m_, m_});
        const MatrixView<const T> a = matrix_of(a_);
        for (std::size_t t = z_.size() - 1; t-- > 0;) {
            // Z' = Z W / 4, W = 13 I - X U, U = 15 I - X (7 I - X) = 15 I - 7 X + X X, X = A Z.
            const MatrixView<const T> z = matrix_of(z_[t]);
            polynomial(z, x, u, w, workspace);
            for (T& value : d_z.values) value /= 4;
            multiply<T>(transposed(z), matrix_of(d_z), matrix_of(d_w), false, workspace);
            multiply<T>(matrix_of(d_z), transposed(MatrixView<const T>(matrix_of(w))), matrix_of(next), false, workspace);
            for (T& value : d_w.values) value = -value;
            multiply<T>(matrix_of(d_w), transposed(MatrixView<const T>(matrix_of(u))), matrix_of(d_x), false, workspace);
            multiply<T>(transposed(MatrixView<const T>(matrix_of(x))), matrix_of(d_w), matrix_of(d_u), false, workspace);
            for (std::size_t i = 0; i < d_x.values.size(); ++i) d_x.values[i] -= 7 * d_u.values[i];
            multiply<T>(matrix_of(d_u), transposed(MatrixView<const T>(matrix_of(x))), matrix_of(d_x), true, workspace);
            multiply<T>(transposed(MatrixView<const T>(matrix_of(x))), matrix_of(d_u), matrix_of(d_x), true, workspace);
            multiply<T>(matrix_of(d_x), transposed(z), d_a, true, workspace);
            multiply<T>(transposed(a), matrix_of(d_x), matrix_of(next), true, workspace);
            std::swap(d_z, next);
        }
        // Z_0 = A^T / (row sum x column sum), of non-negative entries.
        const T scale = 1 / (row_sum_ * column_sum_);
        T along = 0;
        for (index_t i = 0; i < m_; ++i)
            for (index_t j = 0; j < m_; ++j) {
                along += entry(d_z, i, j) * a(j, i) * scale;
                d_a(j, i) += entry(d_z, i, j) * scale;
            }
        for (index_t j = 0; j < m_; ++j) {
            d_a(row_, j) -= along / row_sum_;
            d_a(j, column_) -= along / column_sum_;
        }
    }

private:
    T& entry(Tensor<T>& matrix, index_t i, index_t j) const { return matrix.values[static_cast<std::size_t>(offset_t{i} * m_ + j)]; }
    static std::pair<index_t, T> largest_row(MatrixView<const T> a) {
        std::pair<index_t, T> found{0, T(0)};
        for (index_t i = 0; i < a.rows; ++i) {
            T sum = 0;
            for (index_t j = 0; j < a.cols; ++j) sum += a(i, j);
            if (i == 0 || sum > found.second) found = {i, sum};
        }
        return found;
    }
    /// X = A Z, U = 15 I - 7 X + X X, W = 13 I - X U.
    void polynomial(MatrixView<const T> z, Tensor<T>& x, Tensor<T>& u, Tensor<T>& w, Workspace& workspace) const {
        multiply<T>(matrix_of(a_), z, matrix_of(x), false, workspace);
        multiply<T>(matrix_of(x), matrix_of(x), matrix_of(u), false, workspace);
        for (std::size_t i = 0; i < u.values.size(); ++i) u.values[i] -= 7 * x.values[i];
        for (index_t i = 0; i < m_; ++i) entry(u, i, i) += 15;
        multiply<T>(matrix_of(x), matrix_of(u), matrix_of(w), false, workspace);
        for (T& value : w.values) value = -value;
        for (index_t i = 0; i < m_; ++i) entry(w, i, i) += 13;
    }

    index_t m_ = 0, row_ = 0, column_ = 0;
    T row_sum_ = 1, column_sum_ = 1;
    Tensor<T> a_;
    std::vector<Tensor<T>> z_;
};

}  // namespace detail

/// softmax(Q K~^T) softmax(Q~ K~^T)^+ (softmax(Q~ K^T) V), all scaled by 1 / sqrt(d), with segment means Q~, K~ as landmarks: linear in the tokens.
/// Rows do not sum to 1 in general. An item's segments have ceil(its tokens / landmarks) tokens, the last fewer. Made of three calls of
/// Attention<> a head; as many keys as queries. operator(), forward() and backward() take what those of Attention take, without plans, dropout
/// and workspace; throws invalid_input. O(n m (d + e) + iterations m^3) a head.
/// Source: Xiong et al., "Nystromformer" (2021), equations 8 to 14.
class NystromAttention : public detail::HeadwiseAttention<NystromAttention> {
public:
    explicit NystromAttention(Nystrom parameters = {}) : parameters_(std::move(parameters)) { parameters_.validate(); }

    const NoBias& bias() const { return attention_.bias(); }
    /// The learned convolution, if there is one, is what trains.
    const Nystrom& compression() const { return parameters_; }
    NystromAttention with_compression(Nystrom parameters) const { return NystromAttention(std::move(parameters)); }

    template <class T>
    struct HeadSaved {
        Tensor<T> queries, keys, identity, summary, values;  // Q~, K~, I, softmax(Q~ K^T) V, Z times that
        Saved<T> landmarks, reading, writing;                // of the three calls
        Tensor<T> a;
        detail::PseudoInverse<T> inverse;
    };

private:
    friend detail::HeadwiseAttention<NystromAttention>;

    std::size_t learned() const { return parameters_.table.size(); }
    template <class T>
    void check(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CallOptions& options) const {
        detail::check_nystrom(parameters_, q, k, v, options);
    }
    template <class T>
    void forward_head(index_t h, MatrixView<const T> q, MatrixView<const T> k, MatrixView<const T> v, MatrixView<T> out, HeadSaved<T>& head, Workspace& workspace) const {
        const index_t length = parameters_.segment_length(q.rows), m = detail::segments(q.rows, length);
        head.queries = head.keys = Tensor<T>({m, q.cols});
        detail::simd::segment_means<xsimd::default_arch>(q, length, detail::matrix_of(head.queries));
        detail::simd::segment_means<xsimd::default_arch>(k, length, detail::matrix_of(head.keys));
        head.identity = head.a = Tensor<T>({m, m});
        for (index_t i = 0; i < m; ++i) detail::matrix_of(head.identity)(i, i) = 1;
        head.summary = head.values = Tensor<T>({m, v.cols});
        const CallOptions own{.workspace = &workspace}, adding{.workspace = &workspace, .accumulate = true};
        const auto constant = [](const Tensor<T>& tensor) { return tensor.view(); };
        attention_.forward_into(head.a.view(), head.landmarks, constant(head.queries), constant(head.keys), constant(head.identity), own);
        head.inverse.run(detail::matrix_of(head.a), parameters_.iterations, workspace);
        attention_.forward_into(head.summary.view(), head.reading, constant(head.queries), detail::tensor_of(k), detail::tensor_of(v), own);
        detail::multiply<T>(head.inverse.result(), detail::matrix_of(head.summary), detail::matrix_of(head.values), false, workspace);
        attention_.forward_into(detail::tensor_of(out), head.writing, detail::tensor_of(q), constant(head.keys), constant(head.values), adding);
        convolve(h, v, out);
    }
    template <class T>
    void backward_head(index_t h, MatrixView<const T> q, MatrixView<const T>, MatrixView<const T> v, MatrixView<const T> d_out, const HeadSaved<T>& head, MatrixView<T> d_q,
                       MatrixView<T> d_k, MatrixView<T> d_v, std::span<double> d_table, Workspace& workspace) const {
        const index_t length = parameters_.segment_length(q.rows);
        const CallOptions call{.workspace = &workspace};
        auto writing = attention_.backward(head.writing, detail::tensor_of(d_out), call);
        const auto m = head.values.shape[0];
        Tensor<T> d_inverse({m, m}), d_summary(head.summary.shape), d_a({m, m});
        detail::multiply<T>(detail::matrix_of(writing.v), detail::transposed(detail::matrix_of(head.summary)), detail::matrix_of(d_inverse), false, workspace);
        detail::multiply<T>(detail::transposed(head.inverse.result()), detail::matrix_of(writing.v), detail::matrix_of(d_summary), false, workspace);
        auto reading = attention_.backward(head.reading, std::as_const(d_summary).view(), call);
        head.inverse.backward(d_inverse, detail::matrix_of(d_a), workspace);
        auto landmarks = attention_.backward(head.landmarks, std::as_const(d_a).view(), call);
        detail::add_matrix(reading.q, detail::matrix_of(landmarks.q));
        detail::add_matrix(writing.k, detail::matrix_of(landmarks.k));
        detail::add_matrix(writing.q, d_q);
        detail::add_matrix(reading.k, d_k);
        detail::add_matrix(reading.v, d_v);
        detail::simd::spread_segments<xsimd::default_arch>(q.rows, length, MatrixView<const T>(detail::matrix_of(landmarks.q)), d_q);
        detail::simd::spread_segments<xsimd::default_arch>(q.rows, length, MatrixView<const T>(detail::matrix_of(landmarks.k)), d_k);
        convolve_back(h, v, d_out, d_v, d_table);
    }

    template <class F>
    void for_each_tap(index_t h, index_t tokens, F&& f) const {
        for (index_t t = 0; t < parameters_.width; ++t)
            for (index_t i = std::max(index_t{0}, parameters_.width / 2 - t); i < std::min(tokens, tokens + parameters_.width / 2 - t); ++i)
                f(static_cast<std::size_t>(h * parameters_.width + t), i, i + t - parameters_.width / 2);
    }
    template <class T>
    void convolve(index_t h, MatrixView<const T> v, MatrixView<T> out) const {
        for_each_tap(h, v.rows, [&](std::size_t weight, index_t i, index_t from) { detail::add_row_to<T>(v, from, static_cast<T>(parameters_.table[weight]), out, i); });
    }
    template <class T>
    void convolve_back(index_t h, MatrixView<const T> v, MatrixView<const T> d_out, MatrixView<T> d_v, std::span<double> d_table) const {
        for_each_tap(h, v.rows, [&](std::size_t weight, index_t i, index_t from) {
            detail::add_row_to<T>(d_out, i, static_cast<T>(parameters_.table[weight]), d_v, from);
            for (index_t c = 0; c < v.cols; ++c) d_table[weight] += double(d_out(i, c)) * double(v(from, c));
        });
    }

    Nystrom parameters_;
    Attention<> attention_;
};

POLYATTN_END_NAMESPACE
