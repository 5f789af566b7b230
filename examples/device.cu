#include "device.hpp"

#include <polyattn/backend/cuda/language_model.cuh>
#include <polyattn/polyattn_cuda.cuh>

#include <algorithm>
#include <chrono>

using namespace polyattn;

namespace device {

std::string name() {
    cudaDeviceProp properties{};
    detail::cuda::check_cuda(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    return properties.name;
}

struct Diffusion::State {
    CudaTensor<float> x, out;
    Attention<LocalGlobalRandom, PPR<5>, Cuda> diffusion;
    Attention<LocalGlobalRandom, Cuda> one_hop;
    CudaWorkspace workspace;

    void run(bool one) {
        const CudaOptions options{.device_workspace = &workspace};
        if (one) one_hop.into(out.view(), x.view(), x.view(), x.view(), options);
        else diffusion.into(out.view(), x.view(), x.view(), x.view(), options);
    }
};

Diffusion::Diffusion(const float* x, int heads, int tokens, int dim) : state_(new State{CudaTensor<float>(x, {heads, tokens, dim}), CudaTensor<float>({heads, tokens, dim}), {}, {}, {}}) {}
Diffusion::~Diffusion() = default;

std::vector<float> Diffusion::run(bool one_hop) {
    state_->run(one_hop);
    std::vector<float> out(static_cast<std::size_t>(state_->out.size()));
    state_->out.copy_to(out.data());
    return out;
}
double Diffusion::seconds(bool one_hop, int repeats) {
    double best = 1e30;
    for (int repeat = 0; repeat < repeats; ++repeat) {
        const auto start = std::chrono::steady_clock::now();
        state_->run(one_hop);
        detail::cuda::check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
}
std::size_t Diffusion::workspace_bytes(bool one_hop) const {
    const auto x = state_->x.view();
    return one_hop ? state_->one_hop.workspace_bytes(x, x, x) : state_->diffusion.workspace_bytes(x, x, x);
}

struct Decoder::State {
    nn::CudaLanguageModel<float, Attention<Causal, Alibi, Cuda>> model;
};

Decoder::Decoder(const std::vector<Parameter>& parameters, int heads) {
    std::map<std::string, Tensor<float>> tensors;
    for (const Parameter& parameter : parameters) {
        Tensor<float> tensor(std::vector<offset_t>(parameter.shape.begin(), parameter.shape.end()));
        tensor.values.assign(parameter.values.begin(), parameter.values.end());
        tensors.emplace(parameter.name, std::move(tensor));
    }
    state_.reset(new State{{Attention<Causal, Alibi, Cuda>{Alibi(heads)}, tensors, {.heads = heads}}});
}
Decoder::~Decoder() = default;

std::vector<float> Decoder::logits(const std::vector<int>& tokens) {
    const CudaTensor<float>& logits = state_->model.forward(tokens, 1);
    std::vector<float> out(static_cast<std::size_t>(logits.size()));
    logits.copy_to(out.data());
    return out;
}

}  // namespace device
