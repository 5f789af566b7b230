#pragma once
// Kernel attention on the device: A = rows a_i = phi(q_i) / denominator times rows b_j = phi(k_j), never formed. Hops, adjoints and the
// normalisation are linear products of such rows.

#include <polyattn/backend/cuda/feature_rows.cuh>
#include <polyattn/backend/cuda/linear_products.cuh>
#include <polyattn/backend/cuda/sparse_softmax_gradient.cuh>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// [dim][count] of random directions [count][dim].
template <class T>
std::vector<T> directions_by_columns(const RandomDirections& directions) {
    std::vector<T> columns;
    columns.reserve(directions.w.size());
    for (std::size_t c = 0; c < static_cast<std::size_t>(directions.dim); ++c)
        for (std::size_t f = 0; f < static_cast<std::size_t>(directions.count); ++f) columns.push_back(static_cast<T>(directions.w[f * static_cast<std::size_t>(directions.dim) + c]));
    return columns;
}

/// phi of a call's queries and keys.
template <class T, class Features>
class KernelFeatures {
    static constexpr bool random = has_directions<Features>;

public:
    /// The carver may only count. Random directions are copied to the device by each make(), unless `known` holds them there by columns, for calls without gradients.
    KernelFeatures(Carver& carver, const OperatorCall<T>& call, const Features& features, ZeroRow zero, bool causal, const T* known = nullptr)
        : call_(call), k_(call.k), features_(features), causal_(causal), mean_(zero == ZeroRow::mean), count_(call.dim), known_(known) {
        k_.heads = call.key_heads;
        k_.group = 1;
        if constexpr (random) {
            count_ = features->count;
            const offset_t numbers = known ? 0 : offset_t{count_} * call_.dim;
            directions_ = carver.template take<T>(numbers);
            transposed_ = carver.template take<T>(numbers);
            largest_ = carver.template take<T>(offset_t{call_.batch} * call_.key_heads * feature_blocks(call_.keys));
        }
        width_ = padded<T>(count_ + (mean_ ? 1 : 0));
        a_ = carver.template take<T>(offset_t{call_.items()} * call_.queries * width_);
        b_ = carver.template take<T>(offset_t{call_.batch} * call_.key_heads * call_.keys * width_);
    }

    index_t count() const { return count_; }
    /// Padded, with a column of ones where rows may be means.
    index_t width() const { return width_; }
    T* of_queries() const { return a_; }
    T* of_keys() const { return b_; }
    Rows<T> query_rows() const { return packed_rows<T>(a_, call_.heads, offset_t{call_.queries} * width_, width_); }
    Rows<T> key_rows() const {
        const std::ptrdiff_t head = std::ptrdiff_t{call_.keys} * width_;
        return {b_, call_.key_heads * head, head, width_, call_.heads, call_.group()};
    }

    void make() const {
        if constexpr (random) {
            if (!known_) copy_directions();
        }
        make_features(key_arguments(), false);
        make_features(query_arguments(), true);
    }
    /// dL/dq from dL/da_i, and, with the heads of a group added, dL/dk.
    void query_gradient(const T* d_a, const T* g, const T* sums, const T* inverse, const Finish<T>& finish) const { through_features({query_arguments(), padded<T>(call_.dim), a_, d_a, 1, g, sums, inverse, directions_, finish}); }
    void key_gradient(const T* d_b, const Finish<T>& finish) const { through_features({key_arguments(), padded<T>(call_.dim), b_, d_b, call_.group(), nullptr, nullptr, nullptr, directions_, finish}); }

private:
    void copy_directions() const {
        const std::vector<T> rows(features_->w.begin(), features_->w.end()), columns = directions_by_columns<T>(*features_);
        check_cuda(cudaMemcpyAsync(directions_, rows.data(), rows.size() * sizeof(T), cudaMemcpyHostToDevice, call_.stream), "cudaMemcpyAsync of directions");
        check_cuda(cudaMemcpyAsync(transposed_, columns.data(), columns.size() * sizeof(T), cudaMemcpyHostToDevice, call_.stream), "cudaMemcpyAsync of directions");
    }
    static index_t feature_blocks(index_t tokens) { return (tokens + feature_block_rows - 1) / feature_block_rows; }
    FeatureArguments<T> query_arguments() const { return {call_.q, a_, call_.dim, count_, width_, call_.queries, call_.heads, 0, call_.query_lengths, false}; }
    FeatureArguments<T> key_arguments() const { return {k_, b_, call_.dim, count_, width_, call_.keys, call_.key_heads, 0, call_.key_lengths, mean_}; }
    void make_features(FeatureArguments<T> arguments, [[maybe_unused]] bool of_queries) const {
        if (arguments.tokens == 0) return;
        for_each_grid(0, call_.batch * arguments.heads, [&](index_t item, unsigned count) {
            arguments.first_item = item;
            if constexpr (random) {
                const index_t blocks = feature_blocks(arguments.tokens);
                RandomFeatureArguments<T> given{arguments, known_ ? known_ : transposed_, of_queries ? Shift::row : causal_ ? Shift::constant : Shift::head, static_cast<T>(features_->fixed_shift), largest_};
                const std::size_t shared = static_cast<std::size_t>(call_.dim) * feature_block_rows * sizeof(T);
                launch("random_features", random_features<T>, dim3(static_cast<unsigned>(blocks), count), feature_threads, shared, call_.stream, given);
                if (given.shift == Shift::head)
                    launch("exponents_to_features", exponents_to_features<T>, dim3(static_cast<unsigned>(blocks), count), feature_threads, 0, call_.stream, arguments, static_cast<const T*>(largest_), blocks);
            } else
                launch("feature_rows", feature_rows<T, Features>, dim3(blocks_for(offset_t{arguments.tokens} * arguments.columns, 256), count), 256, 0, call_.stream, arguments, features_);
        });
    }
    void through_features(FeatureGradientArguments<T> arguments) const {
        if (arguments.rows.tokens == 0) return;
        for_each_grid(0, call_.batch * arguments.rows.heads, [&](index_t item, unsigned count) {
            arguments.rows.first_item = item;
            if constexpr (random)
                launch("random_feature_gradient", random_feature_gradient<T>, dim3(static_cast<unsigned>(arguments.rows.tokens), count), feature_threads,
                       static_cast<std::size_t>(padded<T>(count_) + arguments.dim_columns) * sizeof(T), call_.stream, arguments);
            else launch("feature_gradient", feature_gradient<T, Features>, dim3(blocks_for(arguments.rows.tokens, 4), count), 128, 0, call_.stream, arguments, features_);
        });
    }

    OperatorCall<T> call_;
    Rows<T> k_;  // one head a key head
    Features features_;
    bool causal_, mean_;
    index_t count_, width_ = 0;
    const T* known_;
    T *directions_ = nullptr, *transposed_ = nullptr, *largest_ = nullptr, *a_, *b_;
};

/// All heads of one call.
template <class T, class Features>
class KernelAttention {
    static constexpr index_t vector = 16 / sizeof(T);

public:
    /// The carver may only count.
    KernelAttention(Carver& carver, const OperatorCall<T>& call, const Features& features, ZeroRow zero, double epsilon, bool causal)
        : call_(call), features_(carver, call, features, zero, causal), zero_(zero), epsilon_(epsilon), causal_(causal), width_(features_.width()) {
        const index_t tokens = std::max(call.queries, call.keys);
        ones_ = carver.template take<T>(offset_t{tokens} * vector);
        denominators_ = carver.template take<T>(offset_t{items()} * call_.queries * vector);
        inverse_ = carver.template take<T>(offset_t{items()} * call_.queries);
        marks_ = carver.template take<T>(offset_t{items()} * call_.queries);
        const index_t widest = std::max(std::max(call.columns, width_), vector);
        states_ = carver.template take<T>(offset_t{items()} * std::max(states_size<T>(sees(), call_.keys, width_, widest), states_size<T>(sees(), call_.queries, width_, widest)));
    }

    /// Rows without keys carry -infinity, [item][queries].
    const T* marks() const { return marks_; }

    /// Features and denominators: before anything else.
    void prepare() const {
        const offset_t ones = offset_t{std::max(call_.queries, call_.keys)} * vector;
        launch("fill_ones", fill_ones<T>, dim3(blocks_for(ones, 256)), 256, 0, call_.stream, ones_, ones);
        features_.make();
        LinearProduct<T> product = forward_product();
        product.values = ones_rows();
        product.columns = vector;
        product.finish = packed_finish(denominators_, call_.queries, vector, call_.heads);
        linear_product(product, items(), call_.stream);
        NormaliseArguments<T> arguments{features_.of_queries(), denominators_, inverse_, marks_, features_.count(), width_, call_.queries, call_.keys, call_.heads, 0, call_.query_lengths, call_.key_lengths, causal_, zero_, static_cast<T>(epsilon_)};
        for_each_grid(0, items(), [&](index_t item, unsigned count) {
            arguments.first_item = item;
            launch("normalise_features", normalise_features<T>, dim3(blocks_for(call_.queries, 4), count), 128, 0, call_.stream, arguments);
        });
    }

    void prepare_backward() const { prepare(); }
    /// finish(A values).
    void apply(bool, const Rows<T>& values, const Finish<T>& finish) const {
        LinearProduct<T> product = forward_product();
        product.values = values;
        product.columns = call_.columns;
        product.marks = marks_;
        product.finish = finish;
        linear_product(product, items(), call_.stream);
    }
    /// finish(A^T values).
    void apply_transposed(const Rows<T>& values, const Finish<T>& finish) const {
        LinearProduct<T> product = transposed_product();
        product.values = values;
        product.columns = call_.columns;
        product.finish = finish;
        linear_product(product, items(), call_.stream);
    }

    /// Scratch of gradient().
    struct Gradient {
        T *d_a, *d_b, *g, *sums;
    };
    Gradient take_gradient(Carver& carver) const {
        return {carver.template take<T>(offset_t{items()} * call_.queries * width_), carver.template take<T>(offset_t{items()} * call_.keys * width_), carver.template take<T>(offset_t{items()} * call_.queries * vector),
                carver.template take<T>(offset_t{items()} * call_.queries * width_)};
    }
    /// dL/dq, and dL/dk in the caller's tensor.
    void gradient(const Gradient& to, const Hops<T>& hops, const Finish<T>& d_q, const TensorView<T>& d_k) const {
        for (int k = 0; k < hops.count; ++k) {
            const offset_t of_hop = offset_t{call_.queries} * hops.columns;
            const Rows<T> h = packed_rows<T>(hops.h + k * of_hop, call_.heads, hops.count * of_hop, hops.columns);
            const Rows<T> z = k == 0 ? hops.v : packed_rows<T>(hops.z + (k - 1) * of_hop, call_.heads, hops.count * of_hop, hops.columns);
            // dL/da_i = sum_j (h_i . z_j) b_j and dL/db_j = sum_i (z_j . h_i) a_i over the pairs of A.
            add_product(forward_product(), h, z, hops.columns, features_.key_rows(), to.d_a, k > 0);
            add_product(transposed_product(), z, h, hops.columns, features_.query_rows(), to.d_b, k > 0);
        }
        const offset_t lines = offset_t{items()} * call_.queries;
        launch("normaliser_gradient", normaliser_gradient<T>, dim3(blocks_for(lines, 4)), 128, 0, call_.stream, static_cast<const T*>(features_.of_queries()), static_cast<const T*>(to.d_a), static_cast<const T*>(inverse_), to.g, features_.count(), width_, lines);
        add_product(forward_product(), ones_rows(), ones_rows(), vector, features_.key_rows(), to.sums, false);
        add_product(transposed_product(), ones_rows(), packed_rows<T>(to.g, call_.heads, offset_t{call_.queries} * vector, vector), vector, features_.query_rows(), to.d_b, true);
        features_.query_gradient(to.d_a, to.g, to.sums, inverse_, d_q);
        Finish<T> finish_k;
        set_target(finish_k, d_k);
        features_.key_gradient(to.d_b, finish_k);
    }

private:
    index_t items() const { return call_.items(); }
    Sees sees() const { return causal_ ? Sees::earlier : Sees::all; }
    Rows<T> ones_rows() const { return {ones_, 0, 0, vector, call_.heads, 1}; }
    /// Over queries, and over keys: A and A^T.
    LinearProduct<T> forward_product() const {
        LinearProduct<T> product{};
        product.own = features_.query_rows();
        product.other = features_.key_rows();
        product.inner = width_;
        product.own_tokens = call_.queries;
        product.other_tokens = call_.keys;
        product.own_lengths = call_.query_lengths;
        product.other_lengths = call_.key_lengths;
        product.sees = sees();
        product.offset = offset_t{call_.keys} - call_.queries;
        product.heads = call_.heads;
        product.states = states_;
        return product;
    }
    LinearProduct<T> transposed_product() const {
        LinearProduct<T> product = forward_product();
        std::swap(product.own, product.other);
        std::swap(product.own_tokens, product.other_tokens);
        std::swap(product.own_lengths, product.other_lengths);
        if (causal_) product.sees = Sees::later;
        return product;
    }
    /// mask(own other^T) of features, to or onto [item][own tokens][width].
    void add_product(LinearProduct<T> product, const Rows<T>& own, const Rows<T>& other, index_t inner, const Rows<T>& features, T* to, bool adds) const {
        product.own = own;
        product.other = other;
        product.inner = inner;
        product.values = features;
        product.columns = width_;
        product.finish = packed_finish(to, product.own_tokens, width_, call_.heads, adds);
        linear_product(product, items(), call_.stream);
    }

    OperatorCall<T> call_;
    KernelFeatures<T, Features> features_;
    ZeroRow zero_;
    double epsilon_;
    bool causal_;
    index_t width_;
    T *ones_, *denominators_, *inverse_, *marks_, *states_;
};

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
