#pragma once
// The parameters of AdaMRA's layer in device memory: by the CPU's names, padded, with their gradients and what is made of them.

#include <polyattn/backend/cuda/linear_layer.cuh>
#include <polyattn/backend/cuda/linear_products.cuh>
#include <polyattn/backend/cuda/tensor.cuh>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// Parameters and gradients of nn::AdaptiveMultiResolution. Rows of matrices are padded with zeros to whole vectors, and there are zeros behind the last.
/// Maps that follow each other are multiplied once, when they come: O(H d^3) of upload(), and of their gradients.
template <class T>
class MultiResolutionWeights {
public:
    using Parameters = std::map<std::string, Tensor<T>>;

    /// Products of two maps that follow each other: rows of x to queries, means of x to keys and beside them values; and the same transposed.
    struct Folded {
        T *query, *transposed_query, *keys, *transposed_keys;  // [width][width] twice, [2 width][width], [width][2 width]
    };

    /// `name` is that of the CPU's layer; `blocks` are the columns of its last map, in units of dim. Without the numbers yet, which upload() brings. Throws
    /// invalid_input if the first parameter is missing or not square, cuda_error.
    MultiResolutionWeights(const Parameters& parameters, const std::string& name, index_t resolutions, bool routed, index_t blocks) : resolutions_(resolutions), routed_(routed) {
        const Tensor<T>& query = find_parameter(parameters, name + ".query", std::array<offset_t, 2>{any_extent, any_extent});
        require(query.shape[0] == query.shape[1] && query.shape[0] >= 1, (name + ".query").c_str(), "[dim, dim]", shape_text(query.shape));
        dim_ = static_cast<index_t>(query.shape[0]);
        width_ = padded<T>(dim_);
        for (const char* what : {".query", ".key", ".value"}) add_matrix(name + what, dim_, 1);
        for (index_t h = 0; h < resolutions; ++h)
            for (const char* what : {".query", ".key", ".value"}) add_matrix(text(name, ".resolution", h, what), dim_, 1);
        if (routed) add_matrix(name + ".router", resolutions, 1);
        add_matrix(name + ".merge.weight", dim_, blocks);
        bias_name_ = name + ".merge.bias";
        // Behind what has gradients: the bias, then what is made of the weights.
        bias_ = take(width_);
        learned_size_ = size_;
        transposed_ = take(3 * square());
        transposed_merge_ = take(square() * blocks);
        folded_ = take(6 * square() * resolutions);
        if (routed) {
            folded_router_ = take(offset_t{logit_columns()} * width_);
            transposed_router_ = take(offset_t{logit_columns()} * width_);
        }
        values_ = CudaTensor<T>(std::vector<offset_t>{size_});
        gradients_ = CudaTensor<T>(std::vector<offset_t>{learned_size_});
    }

    index_t dim() const { return dim_; }
    /// dim, padded.
    index_t width() const { return width_; }
    /// Resolutions, padded.
    index_t logit_columns() const { return padded<T>(resolutions_); }

    /// Throws invalid_input if a parameter is missing or has another shape.
    void upload(const Parameters& parameters, cudaStream_t stream) {
        std::vector<T> host(static_cast<std::size_t>(size_), T(0));
        for (const Matrix& matrix : matrices_) {
            const Tensor<T>& from = find(parameters, matrix.name, {matrix.rows, offset_t{matrix.blocks} * dim_});
            for_each_entry(matrix, [&](std::size_t at, std::size_t entry) { host[at] = from.values[entry]; });
        }
        const Tensor<T>& bias = find(parameters, bias_name_, {dim_});
        std::copy(bias.values.begin(), bias.values.end(), host.begin() + bias_);
        const auto transpose = [&](const Matrix& matrix, offset_t to) {
            const auto columns = static_cast<std::size_t>(matrix.blocks * width_), rows = static_cast<std::size_t>(width_);
            for (std::size_t r = 0; r < rows; ++r)
                for (std::size_t c = 0; c < columns; ++c) host[static_cast<std::size_t>(to) + c * rows + r] = host[static_cast<std::size_t>(matrix.at) + r * columns + c];
        };
        for (std::size_t which = 0; which < 3; ++which) transpose(matrices_[which], transposed_ + static_cast<offset_t>(which) * square());
        transpose(matrices_.back(), transposed_merge_);
        check_cuda(cudaMemcpyAsync(values_.data(), host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync of parameters");
        for (index_t h = 0; h < resolutions_; ++h) {
            const Folded to = folded(h);
            fold(own_matrix(h), 0, to.query, to.transposed_query, width_, stream);
            fold(own_matrix(h) + 1, 1, to.keys, to.transposed_keys, 2 * width_, stream);
            fold(own_matrix(h) + 2, 2, to.keys + square(), to.transposed_keys + width_, 2 * width_, stream);
        }
        if (routed_) {
            apply_linear(value(router_matrix()), width_, transposed(0), width_, logit_columns(), width_, folded_router(), width_, stream);
            apply_linear(transposed(0), width_, value(router_matrix()), width_, width_, logit_columns(), transposed_router(), logit_columns(), stream);
        }
    }

    /// By name and in the parameters' shapes, brought to the host: waits for the stream.
    Parameters gradients(cudaStream_t stream) const {
        std::vector<T> host(static_cast<std::size_t>(learned_size_));
        gradients_.copy_to(host.data(), stream);
        Parameters made;
        for (const Matrix& matrix : matrices_) {
            Tensor<T> to({matrix.rows, offset_t{matrix.blocks} * dim_});
            for_each_entry(matrix, [&](std::size_t at, std::size_t entry) { to.values[entry] = host[at]; });
            made.emplace(matrix.name, std::move(to));
        }
        Tensor<T> bias({dim_});
        std::copy_n(host.begin() + bias_, dim_, bias.values.begin());
        made.emplace(bias_name_, std::move(bias));
        return made;
    }
    void zero_gradients(cudaStream_t stream) { fill_zeros(gradients_.data(), learned_size_, stream); }

    /// The last map, [width][blocks x width], and its bias; the map transposed.
    const T* merge() const { return value(matrices_.size() - 1); }
    const T* merge_bias() const { return values_.data() + bias_; }
    const T* transposed_merge() const { return values_.data() + transposed_merge_; }
    T* merge_gradient() const { return gradient(matrices_.size() - 1); }
    T* merge_bias_gradient() const { return gradients_.data() + bias_; }
    Folded folded(index_t h) const {
        T* const at = values_.data() + folded_ + 6 * square() * h;
        return {at, at + square(), at + 2 * square(), at + 4 * square()};
    }
    /// Rows of x to logits, [logit columns][width], and transposed.
    T* folded_router() const { return values_.data() + folded_router_; }
    T* transposed_router() const { return values_.data() + transposed_router_; }

    /// Adds to the gradients of both factors of a folded map, from dL/d(map) [width][width], [2 width][width] and [logit columns][width]. `states` are unfold_size()
    /// numbers of scratch memory.
    void unfold_query(index_t h, const T* d_folded, T* states, cudaStream_t stream) const { unfold(d_folded, own_matrix(h), 0, states, stream); }
    void unfold_keys(index_t h, const T* d_folded, T* states, cudaStream_t stream) const {
        unfold(d_folded, own_matrix(h) + 1, 1, states, stream);
        unfold(d_folded + square(), own_matrix(h) + 2, 2, states, stream);
    }
    void unfold_router(const T* d_folded, T* states, cudaStream_t stream) const { unfold(d_folded, router_matrix(), 0, states, stream); }
    offset_t unfold_size() const { return TokenSum<T>::of_rows(nullptr, width_, nullptr, width_, std::max(width_, logit_columns())).states_size(); }

private:
    /// A weight [rows][blocks x dim] with rows of `width` columns a block, zeros behind; behind its rows there are zeros too.
    struct Matrix {
        std::string name;
        index_t rows, blocks;
        offset_t at;
    };

    offset_t square() const { return offset_t{width_} * width_; }
    std::size_t router_matrix() const { return 3 + 3 * static_cast<std::size_t>(resolutions_); }
    static std::size_t own_matrix(index_t h) { return 3 + 3 * static_cast<std::size_t>(h); }
    offset_t take(offset_t count) { return std::exchange(size_, size_ + count); }
    void add_matrix(std::string name, index_t rows, index_t blocks) { matrices_.push_back({std::move(name), rows, blocks, take(offset_t{padded<T>(rows)} * blocks * width_)}); }
    /// f(place in device memory, entry of the host's tensor).
    template <class F>
    void for_each_entry(const Matrix& matrix, F&& f) const {
        std::size_t entry = 0;
        for (offset_t r = 0; r < matrix.rows; ++r)
            for (offset_t b = 0; b < matrix.blocks; ++b)
                for (offset_t c = 0; c < dim_; ++c) f(static_cast<std::size_t>(matrix.at + (r * matrix.blocks + b) * width_ + c), entry++);
    }
    static const Tensor<T>& find(const Parameters& parameters, const std::string& name, const std::vector<offset_t>& shape) {
        return find_parameter(parameters, name, shape);
    }
    const T* value(std::size_t matrix) const { return values_.data() + matrices_[matrix].at; }
    const T* transposed(std::size_t matrix) const { return values_.data() + transposed_ + static_cast<offset_t>(matrix) * square(); }
    T* gradient(std::size_t matrix) const { return gradients_.data() + matrices_[matrix].at; }

    /// second * first, and its transpose.
    void fold(std::size_t second, std::size_t first, T* plain, T* turned, std::ptrdiff_t turned_stride, cudaStream_t stream) const {
        apply_linear(value(second), width_, transposed(first), width_, width_, width_, plain, width_, stream);
        apply_linear(transposed(first), width_, value(second), width_, width_, width_, turned, turned_stride, stream);
    }
    /// dL/d(second * first), [rows of second, padded][width], to both.
    void unfold(const T* d_folded, std::size_t second, std::size_t first, T* states, cudaStream_t stream) const {
        const index_t rows = padded<T>(matrices_[second].rows);
        apply_linear(d_folded, width_, value(first), width_, rows, width_, gradient(second), width_, stream, true);
        sum_over_tokens(TokenSum<T>::of_rows(value(second), width_, d_folded, width_, rows), states, tensor_view(gradient(first), {width_, width_}), true, stream);
    }

    index_t resolutions_, dim_ = 0, width_ = 0;
    bool routed_;
    std::vector<Matrix> matrices_;  // query, key, value; those of each resolution; the router; merge
    std::string bias_name_;
    offset_t size_ = 0, learned_size_ = 0, bias_ = 0, transposed_ = 0, transposed_merge_ = 0, folded_ = 0, folded_router_ = 0, transposed_router_ = 0;
    CudaTensor<T> values_, gradients_;
};

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
