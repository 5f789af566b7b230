#pragma once
// Parameters of layers: names, values, gradients, and all of a model's in order.

#include <polyattn/core/normal.hpp>
#include <polyattn/core/parallel.hpp>
#include <polyattn/core/rng.hpp>
#include <polyattn/core/tensor.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

/// An extent that parameters can have. Throws invalid_input.
inline index_t positive(index_t extent, const char* argument) {
    require(extent >= 1, argument, "a number >= 1", extent);
    return extent;
}

}  // namespace detail

namespace nn {

/// What a model learns. Backward passes add to `gradient`.
template <class T>
struct Parameter {
    std::string name;
    Tensor<T> value, gradient;
    bool decays = false;  // weight decay applies

    Parameter(std::string parameter_name, std::vector<offset_t> shape, bool weight_decay)
        : name(std::move(parameter_name)), value(shape), gradient(std::move(shape)), decays(weight_decay) {}

    /// Normal deviates times `deviation`; they hang on seed and name only.
    void draw(double deviation, std::uint64_t seed) {
        std::uint32_t row = 2166136261u;  // FNV-1a of the name
        for (const char c : name) row = (row ^ static_cast<unsigned char>(c)) * 16777619u;
        RandomRow random(seed, row, random_stream::parameters);
        for (T& entry : value.values) entry = static_cast<T>(deviation * (normal_deviate(random.next()) * 0x1p-24));
    }
    void fill(T entry) { std::fill(value.values.begin(), value.values.end(), entry); }
};

/// Numbers that a model learns.
template <class Model>
std::size_t parameter_count(Model& model) {
    std::size_t count = 0;
    model.for_each_parameter([&](auto& parameter) { count += parameter.value.values.size(); });
    return count;
}
template <class Model>
void zero_gradients(Model& model) {
    model.for_each_parameter([](auto& parameter) { std::fill(parameter.gradient.values.begin(), parameter.gradient.values.end(), 0); });
}

}  // namespace nn

namespace detail {

/// All leading axes as rows.
template <class T>
MatrixView<T> rows_of(Tensor<T>& tensor) {
    const offset_t columns = tensor.shape.back(), size = static_cast<offset_t>(tensor.values.size());
    return {tensor.values.data(), static_cast<index_t>(columns ? size / columns : 0), static_cast<index_t>(columns), static_cast<std::ptrdiff_t>(columns), 1};
}
template <class T>
MatrixView<const T> rows_of(const Tensor<T>& tensor) {
    return rows_of(const_cast<Tensor<T>&>(tensor));
}
/// Another shape; memory that is there stays, and what it holds is of no meaning.
template <class T>
void reshape(Tensor<T>& tensor, std::vector<offset_t> shape) {
    offset_t size = 1;
    for (const offset_t extent : shape) size *= extent;
    tensor.values.resize(static_cast<std::size_t>(size));
    tensor.shape = std::move(shape);
}

}  // namespace detail

POLYATTN_END_NAMESPACE
