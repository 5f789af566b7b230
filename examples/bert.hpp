#pragma once
// BERT's encoder in polyattn's layers: which tensors of its files are which parameters.

#include <polyattn/nn/safetensors.hpp>
#include <polyattn/nn/token_encoder.hpp>
#include <polyattn/polyattn.hpp>

/// The name in the file for one of ours.
inline std::string bert_name(const std::string& ours) {
    const auto dot = ours.rfind('.');
    std::string stem = ours.substr(0, dot);
    if (stem == "embedding") return "embeddings.word_embeddings" + ours.substr(dot);
    if (stem == "position") return "embeddings.position_embeddings" + ours.substr(dot);
    if (stem == "embedding_norm") return "embeddings.LayerNorm" + ours.substr(dot);
    const std::pair<std::string, std::string> parts[] = {{"attention.project", "attention.self.query_key_value"}, {"attention.merge", "attention.output.dense"},
                                                         {"attention_norm", "attention.output.LayerNorm"},        {"feed_forward.up", "intermediate.dense"},
                                                         {"feed_forward.down", "output.dense"},                   {"feed_forward_norm", "output.LayerNorm"}};
    const auto number = stem.find('.') + 1, part = stem.find('.', number) + 1;  // block.3.attention_norm
    for (const auto& [mine, theirs] : parts)
        if (stem.substr(part) == mine) return "encoder.layer." + stem.substr(number, part - number) + theirs + ours.substr(dot);
    throw polyattn::invalid_input("parameter", "a name of the encoder's", ours);
}

/// An encoder with the weights of a file as `BertModel.save_pretrained` writes them; names may begin with "bert.", and layer norms have gamma and
/// beta, as in older files. All sizes but the number of heads are the tensors' own. One kind of segment. With any attention: a sparse pattern instead of Dense, say.
template <class T, class Layer = polyattn::Attention<>>
polyattn::nn::TokenEncoder<T, Layer> read_bert(const std::filesystem::path& path, polyattn::index_t heads, const Layer& attention = {}) {
    using namespace polyattn;
    nn::TensorFile<T> file;
    for (auto& [theirs, tensor] : nn::TensorFile<T>::read(path).tensors) {
        std::string name = theirs.starts_with("bert.") ? theirs.substr(5) : theirs;
        if (name.ends_with(".gamma")) name.replace(name.size() - 5, 5, "weight");
        if (name.ends_with(".beta")) name.replace(name.size() - 4, 4, "bias");
        file.tensors[name] = std::move(tensor);
    }
    const auto extent = [&](const char* name, std::size_t axis) { return static_cast<index_t>(file.at(name).shape.at(axis)); };
    index_t layers = 0;
    for (std::string layer; file.tensors.contains((layer = "encoder.layer." + std::to_string(layers) + ".") + "output.dense.weight"); ++layers)
        for (const char* kind : {".weight", ".bias"}) {
            const std::string self = layer + "attention.self.";
            file.stack(self + "query_key_value" + kind, {self + "query" + kind, self + "key" + kind, self + "value" + kind});
        }
    // Every token is of segment 0: its embedding is a part of every position's.
    const Tensor<T>& segment = file.at("embeddings.token_type_embeddings.weight");
    Tensor<T>& positions = file.tensors["embeddings.position_embeddings.weight"];
    for (std::size_t i = 0; i < positions.values.size(); ++i) positions.values[i] += segment.values[i % static_cast<std::size_t>(positions.shape.at(1))];

    nn::TransformerOptions options{.layers = layers, .dim = extent("embeddings.word_embeddings.weight", 1), .heads = heads, .pre_norm = false, .embedding_norm = true, .norm_epsilon = 1e-12};
    options.hidden = extent("encoder.layer.0.intermediate.dense.weight", 0);
    nn::TokenEncoder<T, Layer> encoder(attention, extent("embeddings.word_embeddings.weight", 0), options, extent("embeddings.position_embeddings.weight", 0));
    nn::load_parameters(encoder, file, static_cast<nn::AdamW<T>*>(nullptr), bert_name);
    return encoder;
}
