#include "device_model.hpp"

#include <polyattn/backend/cuda/language_model.cuh>
#include <polyattn/polyattn_cuda.cuh>

using namespace polyattn;

namespace {

template <class Layer>
std::vector<double> run(const Layer& layer, const std::map<std::string, Tensor<double>>& parameters, const DeviceModelSettings& settings, std::span<const index_t> tokens, index_t batch, const std::vector<index_t>& lengths) {
    nn::CudaModelOptions options;
    options.heads = settings.heads;
    options.key_heads = settings.key_heads;
    options.pre_norm = settings.pre_norm;
    nn::CudaLanguageModel<double, Layer> model(layer, parameters, options);
    CudaOptions call;
    call.key_lengths = lengths;
    model.forward(tokens.subspan(0, static_cast<std::size_t>(batch)), batch);  // another shape before
    const CudaTensor<double>& logits = model.forward(tokens, batch, call);
    std::vector<double> out(static_cast<std::size_t>(logits.size()));
    logits.copy_to(out.data());
    return out;
}

}  // namespace

std::vector<double> device_logits(const std::map<std::string, Tensor<double>>& parameters, const DeviceModelSettings& settings, std::span<const index_t> tokens, index_t batch, const std::vector<index_t>& lengths) {
    if (settings.reach < 0) return run(Attention<Causal, Alibi, Cuda>{Alibi(settings.heads)}, parameters, settings, tokens, batch, lengths);
    const auto entries = static_cast<std::size_t>(settings.heads * (2 * settings.reach + 1));
    return run(Attention<LocalGlobalRandom, PPR<2>, RelativePosition, Cuda>{LocalGlobalRandom{.window = 4, .globals = 2, .randoms = 2}, RelativePosition{settings.heads, settings.reach, std::vector<double>(entries)}}, parameters,
               settings, tokens, batch, lengths);
}
