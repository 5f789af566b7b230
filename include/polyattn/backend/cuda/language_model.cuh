#pragma once
// What nn::LanguageModel computes, on the device, from its parameters: for inference.

#include <polyattn/backend/cuda/attention_layer.cuh>
#include <polyattn/backend/cuda/linear_layer.cuh>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// (x - mean) / sqrt(variance + epsilon) * weight + bias, one row a warp.
template <class T>
__global__ void __launch_bounds__(128) layer_norm_rows(const T* x, const T* weight, const T* bias, T* y, index_t rows, index_t columns, index_t stride, T epsilon) {
    const index_t row = static_cast<index_t>(blockIdx.x) * 4 + static_cast<index_t>(threadIdx.x) / 32, lane = static_cast<index_t>(threadIdx.x) % 32;
    if (row >= rows) return;
    const T* const from = x + offset_t{row} * stride;
    const auto sum_of_warp = [](T value) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
        return value;
    };
    T sum = 0, squares = 0;
    for (index_t c = lane; c < columns; c += 32) sum += from[c];
    const T mean = sum_of_warp(sum) / static_cast<T>(columns);
    for (index_t c = lane; c < columns; c += 32) squares += (from[c] - mean) * (from[c] - mean);
    const T scale = 1 / sqrt(sum_of_warp(squares) / static_cast<T>(columns) + epsilon);
    for (index_t c = lane; c < stride; c += 32) y[offset_t{row} * stride + c] = c < columns ? (from[c] - mean) * scale * weight[c] + bias[c] : T(0);
}

/// Rows of a table by token, plus, where there are positions, the row of the place in the sequence.
template <class T>
__global__ void embed_rows(const index_t* tokens, const T* table, const T* positions, T* y, index_t length, index_t columns, index_t stride, offset_t count) {
    const offset_t at = offset_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (at >= count) return;
    const auto c = static_cast<index_t>(at % stride);
    const offset_t row = at / stride;
    T value = 0;
    if (c < columns) {
        value = table[offset_t{tokens[row]} * columns + c];
        if (positions) value += positions[row % length * columns + c];
    }
    y[at] = value;
}

}  // namespace detail::cuda

namespace detail::cuda {

/// What a layer with a changed bias is: the layer without its name.
template <class Layer>
struct core_of {
    using type = Layer;
};
template <class Layer>
    requires requires(const Layer& layer) { layer.with_bias(layer.bias()); }
struct core_of<Layer> {
    using type = decltype(std::declval<const Layer&>().with_bias(std::declval<const Layer&>().bias()));
};

}  // namespace detail::cuda

namespace nn {

/// What the parameters of a model don't tell.
struct CudaModelOptions {
    index_t heads = 4;
    /// 0: as many as heads.
    index_t key_heads = 0;
    bool pre_norm = true;
    double norm_epsilon = 1e-5;
};

/// nn::LanguageModel's forward pass on the device, from its parameters by name (TensorFile::tensors, as nn::parameters_of() makes them).
/// `Layer` is an Attention<..., Cuda>; float or double. Belongs to one stream at a time.
template <class T, class Layer>
class CudaLanguageModel {
public:
    /// Throws invalid_input if a parameter is missing or has another shape, cuda_error.
    CudaLanguageModel(const Layer& layer, const std::map<std::string, Tensor<T>>& parameters, const CudaModelOptions& options)
        : options_(options), embedding_(parameters, "embedding.weight", {any, any}), head_(parameters, "head", embedding_.shape[0], embedding_.shape[1]),
          dim_(static_cast<index_t>(embedding_.shape[1])), vocabulary_(static_cast<index_t>(embedding_.shape[0])) {
        if (options_.key_heads == 0) options_.key_heads = options_.heads;
        detail::require(dim_ >= 1, "embedding.weight", "rows of at least one column", dim_);
        detail::require(options.heads >= 1 && dim_ % options.heads == 0, "heads", [&] { return detail::text("a number that divides dim, ", dim_); }, options.heads);
        detail::require(options_.key_heads >= 1 && options_.heads % options_.key_heads == 0, "key_heads", [&] { return detail::text("a number that divides the ", options_.heads, " heads"); }, options_.key_heads);
        if (parameters.count("position.weight")) position_ = Table(parameters, "position.weight", {any, dim_});
        if (parameters.count("embedding_norm.weight")) embedding_norm_.emplace_back(parameters, "embedding_norm", dim_);
        if (options_.pre_norm) last_norm_.emplace_back(parameters, "block.norm", dim_);
        const index_t projected = dim_ / options_.heads * (options_.heads + 2 * options_.key_heads);
        for (int l = 0; parameters.count(detail::text("block.", l, ".attention.project.weight")); ++l) blocks_.emplace_back(layer, parameters, detail::text("block.", l), dim_, projected);
        detail::require(!blocks_.empty(), "parameters", "block.0.attention.project.weight and more", "none");
    }

    index_t vocabulary() const { return vocabulary_; }
    index_t layers() const { return static_cast<index_t>(blocks_.size()); }

    /// Logits [batch x tokens, vocabulary] of tokens [batch, tokens], in device memory that the next call uses again. `options` go to the attention;
    /// the call returns before the logits are there. Throws invalid_input.
    const CudaTensor<T>& forward(std::span<const index_t> tokens, index_t batch, CudaOptions options = {}) {
        using namespace detail::cuda;
        detail::require(batch >= 1 && tokens.size() % static_cast<std::size_t>(batch) == 0, "tokens", [&] { return detail::text("batch ", batch, " times a number of tokens"); }, tokens.size());
        for (const index_t token : tokens) detail::require(token >= 0 && token < vocabulary_, "tokens", [&] { return detail::text("entries of [0, ", vocabulary_, ")"); }, token);
        const auto rows = static_cast<index_t>(tokens.size()), length = rows / batch;
        detail::require(!position_.memory.data() || length <= static_cast<index_t>(position_.shape[0]), "tokens", [&] { return detail::text("at most ", position_.shape[0], " positions"); }, length);
        stream_ = options.stream;
        if (!options.device_workspace) options.device_workspace = &workspace_;
        const index_t width = padded<T>(dim_);
        const auto shape = [&](CudaTensor<T>& tensor, index_t columns) {
            if (tensor.shape() == std::vector<offset_t>{rows, columns}) return;
            tensor = CudaTensor<T>(std::vector<offset_t>{rows, columns});
            // Columns that pad rows are never written, but read.
            detail::cuda::fill_zeros(tensor.data(), tensor.size(), stream_);
        };
        for (CudaTensor<T>* tensor : {&x_, &normed_, &context_}) shape(*tensor, width);
        shape(logits_, vocabulary_);
        if (tokens_.size() != rows) tokens_ = CudaTensor<index_t>(std::vector<offset_t>{rows});
        if (rows == 0) return logits_;
        check_cuda(cudaMemcpyAsync(tokens_.data(), tokens.data(), tokens.size() * sizeof(index_t), cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync of tokens");
        const offset_t count = offset_t{rows} * width;
        launch("embed_rows", embed_rows<T>, dim3(blocks_for(count, 256)), 256, 0, stream_, static_cast<const index_t*>(tokens_.data()), static_cast<const T*>(embedding_.memory.data()),
               static_cast<const T*>(position_.memory.data()), x_.data(), length, dim_, width, count);
        if (!embedding_norm_.empty()) norm(embedding_norm_[0], x_, x_);
        for (const Block& block : blocks_) {
            shape(projected_, block.project.out);
            shape(hidden_, padded<T>(block.up.out));
            if (options_.pre_norm) norm(block.attention_norm, x_, normed_);
            linear(block.project, options_.pre_norm ? normed_ : x_, projected_);
            const index_t head = dim_ / options_.heads;
            const auto part = [&](T* data, index_t first, index_t heads, std::ptrdiff_t stride) {
                return detail::make_view(data + offset_t{first} * head, std::array<index_t, 4>{batch, heads, length, head}, std::array<std::ptrdiff_t, 4>{stride * length, head, stride, 1}, "projected");
            };
            const std::ptrdiff_t stride = block.project.out;
            block.layer.into(part(context_.data(), 0, options_.heads, width), part(projected_.data(), 0, options_.heads, stride), part(projected_.data(), options_.heads, options_.key_heads, stride),
                             part(projected_.data(), options_.heads + options_.key_heads, options_.key_heads, stride), options);
            linear(block.merge, context_, x_, &x_);
            if (!options_.pre_norm) norm(block.attention_norm, x_, x_);
            if (options_.pre_norm) norm(block.feed_forward_norm, x_, normed_);
            linear(block.up, options_.pre_norm ? normed_ : x_, hidden_, nullptr, true);
            linear(block.down, hidden_, x_, &x_);
            if (!options_.pre_norm) norm(block.feed_forward_norm, x_, x_);
        }
        if (!last_norm_.empty()) norm(last_norm_[0], x_, x_);
        linear(head_, x_, logits_);
        return logits_;
    }

private:
    using Parameters = std::map<std::string, Tensor<T>>;

    static constexpr offset_t any = detail::cuda::any_extent;

    struct Table {
        Table() = default;
        Table(const Parameters& parameters, const std::string& name, const std::vector<offset_t>& wanted) {
            const Tensor<T>& from = detail::cuda::find_parameter(parameters, name, wanted);
            shape = from.shape;
            memory = CudaTensor<T>(from.data(), from.shape);
        }
        std::vector<offset_t> shape;
        CudaTensor<T> memory;
    };
    /// Weights with rows of whole vectors.
    struct Linear {
        Linear(const Parameters& parameters, const std::string& name, offset_t wanted_out, offset_t wanted_in) {
            const Tensor<T>& from = detail::cuda::find_parameter(parameters, name + ".weight", std::array<offset_t, 2>{wanted_out, wanted_in});
            bias = Table(parameters, name + ".bias", {from.shape[0]});
            out = static_cast<index_t>(from.shape[0]);
            const auto columns = static_cast<std::size_t>(from.shape[1]);
            in = detail::cuda::padded<T>(static_cast<index_t>(columns));
            std::vector<T> rows(static_cast<std::size_t>(out) * static_cast<std::size_t>(in), T(0));
            for (std::size_t r = 0; r < static_cast<std::size_t>(out); ++r) std::copy_n(from.data() + r * columns, columns, rows.data() + r * static_cast<std::size_t>(in));
            weight = CudaTensor<T>(rows.data(), {out, in});
        }
        index_t in = 0, out = 0;
        CudaTensor<T> weight;
        Table bias;
    };
    struct Norm {
        Norm(const Parameters& parameters, const std::string& name, offset_t dim) : weight(parameters, name + ".weight", {dim}), bias(parameters, name + ".bias", {dim}) {}
        Table weight, bias;
    };
    struct Block {
        Block(const Layer& attention, const Parameters& parameters, const std::string& name, offset_t dim, offset_t projected)
            : project(parameters, name + ".attention.project", projected, dim), merge(parameters, name + ".attention.merge", dim, dim), up(parameters, name + ".feed_forward.up", any, dim),
              down(parameters, name + ".feed_forward.down", dim, up.out), attention_norm(parameters, name + ".attention_norm", dim), feed_forward_norm(parameters, name + ".feed_forward_norm", dim), layer(attention) {
            if constexpr (requires(std::remove_cvref_t<decltype(layer.bias())> bias) { bias.table.assign(std::size_t{}, double{}); }) {
                auto bias = layer.bias();
                const Tensor<T>& table = detail::cuda::find_parameter(parameters, name + ".attention.bias_table", std::array<offset_t, 1>{static_cast<offset_t>(bias.table.size())});
                bias.table.assign(table.values.begin(), table.values.end());
                layer = layer.with_bias(std::move(bias));
            }
        }
        Linear project, merge, up, down;
        Norm attention_norm, feed_forward_norm;
        typename detail::cuda::core_of<Layer>::type layer;
    };

    void linear(const Linear& layer, const CudaTensor<T>& x, CudaTensor<T>& y, const CudaTensor<T>* residual = nullptr, bool gelu = false) const {
        detail::cuda::LinearArguments<T> arguments{};
        arguments.x = x.data();
        arguments.weight = layer.weight.data();
        arguments.bias = layer.bias.memory.data();
        arguments.y = y.data();
        arguments.rows = static_cast<index_t>(x.shape()[0]);
        arguments.in = layer.in;
        arguments.out = layer.out;
        arguments.x_stride = layer.in;
        arguments.y_stride = static_cast<std::ptrdiff_t>(y.shape()[1]);
        if (residual) {
            arguments.residual = residual->data();
            arguments.residual_stride = arguments.y_stride;
        }
        arguments.gelu = gelu;
        detail::cuda::apply_linear(arguments, stream_);
    }
    void norm(const Norm& layer, const CudaTensor<T>& x, CudaTensor<T>& y) const {
        using namespace detail::cuda;
        const auto rows = static_cast<index_t>(x.shape()[0]);
        launch("layer_norm_rows", layer_norm_rows<T>, dim3(blocks_for(rows, 4)), 128, 0, stream_, static_cast<const T*>(x.data()), static_cast<const T*>(layer.weight.memory.data()),
               static_cast<const T*>(layer.bias.memory.data()), y.data(), rows, dim_, static_cast<index_t>(x.shape()[1]), static_cast<T>(options_.norm_epsilon));
    }

    CudaModelOptions options_;
    Table embedding_, position_;
    Linear head_;
    index_t dim_, vocabulary_;
    std::vector<Norm> embedding_norm_, last_norm_;
    std::vector<Block> blocks_;
    cudaStream_t stream_ = nullptr;
    CudaWorkspace workspace_;
    CudaTensor<index_t> tokens_;
    CudaTensor<T> x_, normed_, context_, projected_, hidden_, logits_;
};

}  // namespace nn

POLYATTN_END_NAMESPACE
