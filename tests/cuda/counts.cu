// Runs one kind of work, whose kernels an emulator counts: counts <edges | dense | linear> <tokens> <forward | backward>. One head of 64 columns, float.
#include <polyattn/backend/cuda/attention_layer.cuh>
#include <polyattn/policy/attention.hpp>
#include <polyattn/policy/pattern/random.hpp>

#include <cstdlib>
#include <cstring>
#include <random>

using namespace polyattn;

namespace {

CudaTensor<float> tensor(index_t tokens, std::uint64_t seed) {
    std::mt19937_64 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(static_cast<std::size_t>(tokens) * 64);
    for (float& value : values) value = normal(generator);
    return {values.data(), {tokens, 64}};
}

template <class Layer>
void run(const Layer& layer, index_t tokens, bool backward) {
    const auto q = tensor(tokens, 1), k = tensor(tokens, 2), v = tensor(tokens, 3);
    if (!backward) {
        layer(q.view(), k.view(), v.view());
        return;
    }
    const auto [out, saved] = layer.forward(q.view(), k.view(), v.view());
    layer.backward(saved, out.view());
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 4) return 1;
    const char* const kind = arguments[1];
    const index_t tokens = std::atoi(arguments[2]);
    const bool backward = !std::strcmp(arguments[3], "backward");
    if (!std::strcmp(kind, "edges")) run(Attention<RandomTokens, Cuda>{RandomTokens{.count = 96}}, tokens, backward);
    else if (!std::strcmp(kind, "dense")) run(Attention<Dense, Cuda>{}, tokens, backward);
    else if (!std::strcmp(kind, "linear")) run(Attention<Kernel<ReLU>, Causal, Cuda>{}, tokens, backward);
    else return 1;
}
