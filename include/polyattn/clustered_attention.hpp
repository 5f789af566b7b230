#pragma once

#include <polyattn/backend/simd/matrix_product.hpp>
#include <polyattn/headwise_attention.hpp>
#include <polyattn/policy/pattern/data_dependent.hpp>

POLYATTN_BEGIN_NAMESPACE

/// Parameters of ClusteredAttention.
struct Clusters {
    index_t clusters = 100;
    /// Of Lloyd's algorithm.
    index_t iterations = 10;
    /// Signs of random projections that stand for a query.
    index_t bits = 63;
    /// Keys of a cluster that its queries weigh themselves (the improved form); 0: none (the plain one).
    index_t top = 32;
    std::uint64_t seed = 1;

    void validate() const {
        detail::require(clusters >= 1, "clusters", "a number of clusters >= 1", clusters);
        detail::require(iterations >= 0, "iterations", "a number >= 0", iterations);
        detail::require(bits >= 1 && bits <= 64, "bits", "a number from 1 to 64", bits);
        detail::require(top >= 0, "top", "a number of keys >= 0", top);
    }

    /// The cluster of each row of q, numbered from 0 without gaps: K-means of the signs of random projections, in Hamming distance, from evenly spaced rows. Ties go to
    /// the lowest cluster, clusters that end up empty are dropped. The same for any number of threads. O(n bits (d + iterations) + iterations n clusters).
    template <class T>
    std::vector<index_t> assign(MatrixView<const T> q, Workspace& workspace) const {
        const std::vector<std::uint64_t> codes = signs(q, workspace);
        const index_t count = std::min(clusters, q.rows);
        std::vector<std::uint64_t> centers(static_cast<std::size_t>(count));
        for (index_t j = 0; j < count; ++j) centers[static_cast<std::size_t>(j)] = codes[static_cast<std::size_t>(offset_t{q.rows} * j / count)];
        std::vector<index_t> cluster(codes.size());
        std::vector<std::uint64_t> ones(centers.size() * static_cast<std::size_t>(bits)), sizes(centers.size());
        for (index_t iteration = 0; iteration <= iterations; ++iteration) {
            if (iteration > 0) {  // the bits that most members have
                std::fill(ones.begin(), ones.end(), 0);
                std::fill(sizes.begin(), sizes.end(), 0);
                for (std::size_t i = 0; i < codes.size(); ++i) {
                    const auto j = static_cast<std::size_t>(cluster[i]);
                    ++sizes[j];
                    for (std::size_t bit = 0; bit < static_cast<std::size_t>(bits); ++bit) ones[j * static_cast<std::size_t>(bits) + bit] += codes[i] >> bit & 1;
                }
                for (std::size_t j = 0; j < centers.size(); ++j) {
                    if (sizes[j] == 0) continue;
                    centers[j] = 0;
                    for (std::size_t bit = 0; bit < static_cast<std::size_t>(bits); ++bit) centers[j] |= std::uint64_t{2 * ones[j * static_cast<std::size_t>(bits) + bit] > sizes[j]} << bit;
                }
            }
            for (std::size_t i = 0; i < codes.size(); ++i) {
                std::uint64_t nearest = ~std::uint64_t{0};  // distance, and below it the cluster: a minimum without branches
                for (std::uint64_t j = 0; j < centers.size(); ++j)
                    nearest = std::min(nearest, static_cast<std::uint64_t>(std::popcount(codes[i] ^ centers[j])) << 32 | j);
                cluster[i] = static_cast<index_t>(nearest & 0xffffffffu);
            }
        }
        std::vector<index_t> number(centers.size(), 0);
        for (const index_t j : cluster) number[static_cast<std::size_t>(j)] = 1;
        index_t used = 0;
        for (index_t& own : number) own = own > 0 ? used++ : 0;
        for (index_t& j : cluster) j = number[static_cast<std::size_t>(j)];
        return cluster;
    }

private:
    template <class T>
    std::vector<std::uint64_t> signs(MatrixView<const T> q, Workspace& workspace) const {
        Tensor<T> directions({q.cols, bits}), projected({q.rows, bits});
        RandomRow random(seed, 0, random_stream::hash_directions);
        for (T& entry : directions.values) entry = static_cast<T>(normal_deviate(random.next()) * 0x1p-24);
        detail::multiply<T>(q, detail::matrix_of(std::as_const(directions)), detail::matrix_of(projected), false, workspace);
        std::vector<std::uint64_t> codes(static_cast<std::size_t>(q.rows));
        const T* entry = projected.data();
        for (std::uint64_t& code : codes)
            for (index_t bit = 0; bit < bits; ++bit) code |= std::uint64_t{*entry++ >= 0} << bit;
        return codes;
    }
};

/// Queries fall into clusters, and a cluster's mean query attends for all of its members; in the improved form they weigh its `top` keys themselves, within the mass that
/// the mean gives to these. Rows sum to 1. With top >= tokens it is softmax attention. As many keys as queries, no causal form: means know all queries.
/// operator(), forward() and backward() take what those of Attention take, without plans and dropout, and with workspaces of their own; they throw invalid_input.
/// Gradients take clusters and top keys as fixed. O(n (clusters (d + e + iterations) + top (d + e) + bits (d + iterations))) a head, and n clusters numbers, kept until backward or, without it,
/// until the call ends. Source: Vyas et al., "Fast Transformers with Clustered Attention" (2020), section 3.2, improved: section 3.3.
class ClusteredAttention : public detail::HeadwiseAttention<ClusteredAttention> {
public:
    explicit ClusteredAttention(Clusters parameters = {}) : parameters_(parameters) { parameters_.validate(); }

    const NoBias& bias() const { return attention_.bias(); }
    const Clusters& parameters() const { return parameters_; }

    template <class T>
    struct HeadSaved {
        std::vector<index_t> cluster, sizes;
        Tensor<T> queries, weights;           // the means, and softmax of what they see, [clusters][tokens]
        std::vector<std::vector<index_t>> top;  // keys of each cluster, ascending
        Tensor<T> mass, own;                  // of these keys, and what the queries see among them
        Saved<T> among;
    };

private:
    friend detail::HeadwiseAttention<ClusteredAttention>;

    std::size_t learned() const { return 0; }
    template <class T>
    void check(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CallOptions& options) const {
        detail::check_self_attention(q, k, v, options);
        detail::require(options.dropout.weights == 0 && options.dropout.values == 0, "dropout", "none: queries share their weights", "one");
    }

    template <class T>
    void forward_head(index_t, MatrixView<const T> q, MatrixView<const T> k, MatrixView<const T> v, MatrixView<T> out, HeadSaved<T>& head, Workspace& workspace) const {
        head.cluster = parameters_.assign(q, workspace);
        const index_t count = *std::max_element(head.cluster.begin(), head.cluster.end()) + 1, top = std::min(parameters_.top, k.rows);
        head.sizes.assign(static_cast<std::size_t>(count), 0);
        head.queries = Tensor<T>({count, q.cols});
        for (const index_t j : head.cluster) ++head.sizes[static_cast<std::size_t>(j)];
        const MatrixView<T> queries = detail::matrix_of(head.queries);
        for (index_t i = 0; i < q.rows; ++i) detail::add_row_to(q, i, share(head, i), queries, cluster(head, i));
        head.weights = Tensor<T>({count, k.rows});
        const MatrixView<T> weights = detail::matrix_of(head.weights);
        detail::multiply<T>(queries, detail::transposed(k), weights, false, workspace);
        for (index_t j = 0; j < count; ++j) softmax(weights.row(j), k.rows, static_cast<T>(detail::simd::log2_e / std::sqrt(double(q.cols))));

        Tensor<T> others = top > 0 ? head.weights : Tensor<T>(), summed({count, v.cols});  // those without the top keys'
        const MatrixView<T> rest = top > 0 ? detail::matrix_of(others) : weights, values = detail::matrix_of(summed);
        head.top.assign(static_cast<std::size_t>(top > 0 ? count : 0), {});
        head.mass = Tensor<T>({count});
        std::vector<T> spare;
        for (std::size_t j = 0; j < head.top.size(); ++j) {
            head.top[j] = largest(std::span<const T>(weights.row(static_cast<index_t>(j)), static_cast<std::size_t>(k.rows)), top, spare);
            for (const index_t l : head.top[j]) head.mass.values[j] += std::exchange(rest(static_cast<index_t>(j), l), T(0));
        }
        detail::multiply<T>(rest, v, values, false, workspace);
        for (index_t i = 0; i < out.rows; ++i) detail::add_row_to<T>(values, cluster(head, i), T(1), out, i);
        if (top == 0) return;
        head.own = Tensor<T>({q.rows, v.cols});
        attention_.forward_into(head.own.view(), head.among, detail::tensor_of(q), detail::tensor_of(k), detail::tensor_of(v), {.plan = plan(head, q.rows), .workspace = &workspace});
        const MatrixView<const T> own = detail::matrix_of(std::as_const(head.own));
        for (index_t i = 0; i < out.rows; ++i) detail::add_row_to(own, i, mass(head, i), out, i);
    }

    template <class T>
    void backward_head(index_t, MatrixView<const T> q, MatrixView<const T> k, MatrixView<const T> v, MatrixView<const T> d_out, const HeadSaved<T>& head, MatrixView<T> d_q, MatrixView<T> d_k,
                       MatrixView<T> d_v, std::span<double>, Workspace& workspace) const {
        const index_t count = static_cast<index_t>(head.sizes.size()), n = q.rows;
        // What the means see: D, and dL/dA = D V^T, but for top keys what their mass wants.
        Tensor<T> by_cluster({count, v.cols}), by_key({count, n}), others = head.top.empty() ? Tensor<T>() : head.weights;
        const MatrixView<T> d_values = detail::matrix_of(by_cluster), d_weights = detail::matrix_of(by_key);
        std::vector<T> d_mass(static_cast<std::size_t>(count));
        for (index_t i = 0; i < n; ++i) detail::add_row_to(d_out, i, T(1), d_values, cluster(head, i));
        detail::multiply<T>(d_values, detail::transposed(v), d_weights, false, workspace);
        if (!head.top.empty()) {
            Tensor<T> d_own(head.own.shape);
            const MatrixView<T> scaled = detail::matrix_of(d_own);
            const MatrixView<const T> own = detail::matrix_of(head.own);
            for (index_t i = 0; i < n; ++i) {
                T& sum = d_mass[static_cast<std::size_t>(cluster(head, i))];
                for (index_t c = 0; c < v.cols; ++c) sum += d_out(i, c) * own(i, c);
                detail::add_row_to(d_out, i, mass(head, i), scaled, i);
            }
            const auto among = attention_.backward(head.among, std::as_const(d_own).view(), {.workspace = &workspace});
            detail::add_matrix(among.q, d_q);
            detail::add_matrix(among.k, d_k);
            detail::add_matrix(among.v, d_v);
        }
        for (std::size_t j = 0; j < head.top.size(); ++j)
            for (const index_t l : head.top[j]) {
                others.values[j * static_cast<std::size_t>(n) + static_cast<std::size_t>(l)] = 0;
                d_weights(static_cast<index_t>(j), l) = d_mass[j];
            }
        Tensor<T> more({n, std::max(k.cols, v.cols)}), means({count, q.cols});
        const auto columns = [&](index_t width) { return MatrixView<T>{more.data(), n, width, width, 1}; };
        const auto add = [&](MatrixView<T> to) {
            for (index_t i = 0; i < n; ++i) detail::add_row_to<T>(columns(to.cols), i, T(1), to, i);
        };
        detail::multiply<T>(detail::transposed(detail::matrix_of(head.top.empty() ? head.weights : std::as_const(others))), d_values, columns(v.cols), false, workspace);
        add(d_v);
        const T scale = static_cast<T>(1 / std::sqrt(double(q.cols)));
        for (index_t j = 0; j < count; ++j) {  // through the softmax
            const T* const weights = head.weights.data() + offset_t{j} * n;
            T* const row = d_weights.row(j);
            const T mean = detail::simd::dot<T, xsimd::default_arch>(weights, row, n);
            for (index_t l = 0; l < n; ++l) row[l] = scale * weights[l] * (row[l] - mean);
        }
        const MatrixView<T> d_queries = detail::matrix_of(means);
        detail::multiply<T>(d_weights, k, d_queries, false, workspace);
        detail::multiply<T>(detail::transposed(MatrixView<const T>(d_weights)), detail::matrix_of(head.queries), columns(k.cols), false, workspace);
        add(d_k);
        for (index_t i = 0; i < n; ++i) detail::add_row_to<T>(d_queries, cluster(head, i), share(head, i), d_q, i);
    }

    template <class T>
    static index_t cluster(const HeadSaved<T>& head, index_t i) {
        return head.cluster[static_cast<std::size_t>(i)];
    }
    template <class T>
    static T share(const HeadSaved<T>& head, index_t i) {
        return 1 / static_cast<T>(head.sizes[static_cast<std::size_t>(cluster(head, i))]);
    }
    template <class T>
    static T mass(const HeadSaved<T>& head, index_t i) {
        return head.mass.values[static_cast<std::size_t>(cluster(head, i))];
    }
    /// softmax of factor x in base 2.
    template <class T>
    static void softmax(T* row, index_t count, T factor) {
        using A = xsimd::default_arch;
        using V = detail::simd::Vec<T, A>;
        const V highest(*std::max_element(row, row + count));
        detail::simd::map_row<T, A>(row, row, count, [&](V x, V) POLYATTN_INLINE_LAMBDA { return detail::simd::pow2<T, A>((x - highest) * V(factor)); });
        const T factor_of_sum = static_cast<T>(1 / std::accumulate(row, row + count, 0.));
        for (index_t l = 0; l < count; ++l) row[l] *= factor_of_sum;
    }
    /// The keys with the largest weights, the first of equal ones, ascending; none if they are NaN. `spare` is memory to work in.
    template <class T>
    static std::vector<index_t> largest(std::span<const T> weights, index_t count, std::vector<T>& spare) {
        spare.assign(weights.begin(), weights.end());
        std::nth_element(spare.begin(), spare.begin() + (count - 1), spare.end(), std::greater<T>());
        const T least = spare[static_cast<std::size_t>(count - 1)];
        auto equal = std::count(spare.begin(), spare.begin() + count, least);
        std::vector<index_t> keys;
        for (std::size_t l = 0; l < weights.size(); ++l)
            if (weights[l] > least || (weights[l] == least && equal-- > 0)) keys.push_back(static_cast<index_t>(l));
        return keys;
    }
    /// Every query sees the top keys of its cluster.
    template <class T>
    static Plan plan(const HeadSaved<T>& head, index_t tokens) {
        auto members = detail::members_of(head.cluster, static_cast<index_t>(head.top.size()));
        PlanBuilder builder(tokens, tokens);
        for (std::size_t j = 0; j < head.top.size(); ++j) builder.tile(IndexSequence::list(std::move(members[j])), IndexSequence::list(std::vector(head.top[j])));
        return builder.build();
    }

    Clusters parameters_;
    Attention<> attention_;
};

POLYATTN_END_NAMESPACE
