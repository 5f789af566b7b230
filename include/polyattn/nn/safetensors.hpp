#pragma once
// Files of named tensors in the safetensors format (little-endian, https://github.com/huggingface/safetensors), which Python reads and writes
// with the package of that name or a few lines of numpy. Needs nlohmann/json (nlohmann-json3-dev); not part of the umbrella header.

#include <polyattn/nn/optimizer.hpp>

#include <nlohmann/json.hpp>

#include <bit>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <map>

POLYATTN_BEGIN_NAMESPACE

namespace nn {

/// Thrown where a file can't be read or written, or is no safetensors file.
struct file_error : std::runtime_error {
    file_error(const std::filesystem::path& path, const std::string& what) : std::runtime_error("polyattn: " + path.string() + ": " + what) {}
};

/// Named tensors and strings. F64, F32, F16, BF16, I64 and I32 are read to T, whatever they are.
template <class T>
struct TensorFile {
    std::map<std::string, Tensor<T>> tensors;
    std::map<std::string, std::string> metadata;

    /// The tensor of a name. Throws invalid_input if there is none, or it has another shape than a non-empty `shape`.
    const Tensor<T>& at(const std::string& name, const std::vector<offset_t>& shape = {}) const {
        const auto found = tensors.find(name);
        if (found == tensors.end()) throw invalid_input("file", "a tensor " + name, detail::text("none among ", tensors.size()));
        if (!shape.empty() && found->second.shape != shape)
            throw invalid_input(name, detail::shape_text(std::span<const offset_t>(shape)), detail::shape_text(std::span<const offset_t>(found->second.shape)));
        return found->second;
    }

    /// Adds tensor `name`: the rows of `parts` one below the other. Throws invalid_input if one is missing or its rows have another shape.
    void stack(const std::string& name, const std::vector<std::string>& parts) {
        detail::require(!parts.empty(), "parts", "at least one tensor", "none");
        Tensor<T> stacked = at(parts[0]);
        for (std::size_t p = 1; p < parts.size(); ++p) {
            const Tensor<T>& from = at(parts[p]);
            if (from.shape.size() != stacked.shape.size() || from.shape.empty() || !std::equal(from.shape.begin() + 1, from.shape.end(), stacked.shape.begin() + 1))
                throw invalid_input(parts[p], "rows like those of " + parts[0], detail::shape_text(std::span<const offset_t>(from.shape)));
            stacked.shape[0] += from.shape[0];
            stacked.values.insert(stacked.values.end(), from.values.begin(), from.values.end());
        }
        tensors[name] = std::move(stacked);
    }

    static TensorFile read(const std::filesystem::path& path) {
        std::ifstream in(path, std::ios::binary);
        if (!in || !std::filesystem::is_regular_file(path)) throw file_error(path, "can't be opened");
        const auto size = std::filesystem::file_size(path);
        std::uint64_t length = 0;
        in.read(reinterpret_cast<char*>(&length), 8);
        if (!in || length > size - 8) throw file_error(path, "no safetensors file: its header is longer than the file");
        std::string header(length, ' ');
        in.read(header.data(), static_cast<std::streamsize>(length));
        std::vector<char> data(size - 8 - length);
        in.read(data.data(), static_cast<std::streamsize>(data.size()));
        if (!in) throw file_error(path, "can't be read to its end");
        TensorFile file;
        try {
            const nlohmann::json entries = nlohmann::json::parse(header);
            if (!entries.is_object()) throw file_error(path, "no safetensors file: its header is no object");
            for (const auto& [name, entry] : entries.items())
                if (name == "__metadata__") file.metadata = entry.template get<std::map<std::string, std::string>>();
                else file.tensors[name] = tensor_of(path, name, entry, data);
        } catch (const nlohmann::json::exception& error) {
            throw file_error(path, std::string("no safetensors file: ") + error.what());
        }
        return file;
    }

    /// Writes beside the file first, so that a run that is stopped meanwhile leaves the old one whole.
    void write(const std::filesystem::path& path) const {
        nlohmann::json header = nlohmann::json::object();
        if (!metadata.empty()) header["__metadata__"] = metadata;
        std::uint64_t offset = 0;
        for (const auto& [name, tensor] : tensors) {
            const std::uint64_t bytes = tensor.values.size() * sizeof(T);
            header[name] = {{"dtype", sizeof(T) == 4 ? "F32" : "F64"}, {"shape", tensor.shape}, {"data_offsets", {offset, offset + bytes}}};
            offset += bytes;
        }
        std::string text = header.dump();
        text.resize((text.size() + 7) / 8 * 8, ' ');
        std::filesystem::path beside = path;
        beside += ".part";
        {
            std::ofstream out(beside, std::ios::binary);
            const std::uint64_t length = text.size();
            out.write(reinterpret_cast<const char*>(&length), 8);
            out.write(text.data(), static_cast<std::streamsize>(text.size()));
            for (const auto& [name, tensor] : tensors) out.write(reinterpret_cast<const char*>(tensor.values.data()), static_cast<std::streamsize>(tensor.values.size() * sizeof(T)));
            out.flush();
            if (!out) throw file_error(beside, "can't be written");
        }
        std::filesystem::rename(beside, path);
    }

private:
    static_assert(std::endian::native == std::endian::little, "polyattn: safetensors files are little-endian; reversing bytes is not supported");
    /// A tensor as its entry of the header describes it. `data` is what follows the header.
    static Tensor<T> tensor_of(const std::filesystem::path& path, const std::string& name, const nlohmann::json& entry, const std::vector<char>& data) {
        const auto range = entry.at("data_offsets").template get<std::array<std::uint64_t, 2>>();
        const auto type = entry.at("dtype").template get<std::string>();
        Tensor<T> tensor;
        tensor.shape = entry.at("shape").template get<std::vector<offset_t>>();
        std::uint64_t count = 1;
        for (const offset_t extent : tensor.shape) {
            if (extent < 0 || (extent > 0 && count > data.size() / static_cast<std::uint64_t>(extent))) throw file_error(path, name + " is larger than the file");
            count *= static_cast<std::uint64_t>(extent);
        }
        const std::uint64_t bytes = type == "F64" || type == "I64" ? 8 : type == "F32" || type == "I32" ? 4 : type == "F16" || type == "BF16" ? 2 : 0;
        if (bytes == 0) throw file_error(path, name + " has type " + type + "; F64, F32, F16, BF16, I64 and I32 can be read");
        if (range[1] > data.size() || range[0] > range[1] || range[1] - range[0] != count * bytes) throw file_error(path, name + " does not fill its place in the file");
        tensor.values.resize(count);
        const char* from = data.data() + range[0];
        for (T& value : tensor.values) {
            value = static_cast<T>(number(from, type));
            from += bytes;
        }
        return tensor;
    }
    static double number(const char* from, const std::string& type) {
        const auto as = [&]<class Number>(Number value) {
            std::memcpy(&value, from, sizeof value);
            return value;
        };
        if (type == "F64") return as(double{});
        if (type == "F32") return double(as(float{}));
        if (type == "I64") return double(as(std::int64_t{}));
        if (type == "I32") return double(as(std::int32_t{}));
        const std::uint32_t bits = as(std::uint16_t{});
        if (type == "BF16") return double(std::bit_cast<float>(bits << 16));
        const std::uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
        const double size = exponent == 31 ? (fraction ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity())
                            : exponent == 0 ? std::ldexp(double(fraction), -24)
                                            : std::ldexp(double(fraction + 1024), static_cast<int>(exponent) - 25);
        return bits >> 15 ? -size : size;
    }
};

/// A model's parameters, by name, and with an optimizer its state: what a run needs to go on bit by bit. Throws invalid_input for names
/// that repeat and for the optimizer of another model.
template <class T, class Model>
TensorFile<T> parameters_of(Model& model, const AdamW<T>* optimizer = nullptr) {
    if (optimizer) optimizer->check_model(model);
    TensorFile<T> file;
    std::size_t number = 0;
    model.for_each_parameter([&](const Parameter<T>& parameter) {
        detail::require(file.tensors.emplace(parameter.name, parameter.value).second, "parameters", "names that differ", parameter.name);
        if (!optimizer || optimizer->moments.empty()) return;
        for (const auto& [kind, values] : {std::pair{".adam_mean", &optimizer->moments[number].mean}, std::pair{".adam_square", &optimizer->moments[number].square}}) {
            Tensor<T>& tensor = file.tensors[parameter.name + kind];
            tensor.values = *values;
            tensor.shape = parameter.value.shape;
        }
        ++number;
    });
    if (optimizer) file.metadata["adam_steps"] = std::to_string(optimizer->steps);
    return file;
}

/// Sets a model's parameters, and the optimizer's state if given. rename(name of ours) is the name in the file. Tensors of the file that
/// the model does not ask for are left alone. Throws invalid_input, before anything is set, where one is missing or has another shape, or the
/// number of steps is none.
template <class T, class Model, class Rename = std::identity>
void load_parameters(Model& model, const TensorFile<T>& file, AdamW<T>* optimizer = nullptr, Rename&& rename = {}) {
    std::int64_t steps = 0;
    if (optimizer) {
        const auto found = file.metadata.find("adam_steps");
        if (found == file.metadata.end()) throw invalid_input("file", "the state of an optimizer", "parameters alone");
        const std::string& text = found->second;
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), steps);
        detail::require(error == std::errc() && end == text.data() + text.size() && steps >= 0, "adam_steps", "a number of steps >= 0", text);
    }
    std::vector<const Tensor<T>*> values;
    std::vector<typename AdamW<T>::Moments> moments;
    model.for_each_parameter([&](const Parameter<T>& parameter) {
        const std::string name = rename(parameter.name);
        values.push_back(&file.at(name, parameter.value.shape));
        if (steps > 0) moments.push_back({file.at(name + ".adam_mean", parameter.value.shape).values, file.at(name + ".adam_square", parameter.value.shape).values});
    });
    std::size_t number = 0;
    model.for_each_parameter([&](Parameter<T>& parameter) { parameter.value.values = values[number++]->values; });
    if (optimizer) {
        optimizer->steps = steps;
        optimizer->moments = std::move(moments);
    }
}

}  // namespace nn

POLYATTN_END_NAMESPACE
