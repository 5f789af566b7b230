// Diffuser's attention on random tensors in device memory.
#include <polyattn/polyattn_cuda.cuh>

#include <iostream>
#include <random>

int main() {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    const auto random = [&] {
        std::vector<float> x(2 * 512 * 64);
        for (float& value : x) value = normal(generator);
        return polyattn::CudaTensor<float>(x.data(), {1, 2, 512, 64});  // [batch, heads, tokens, dim], copied to the device
    };
    const auto q = random(), k = random(), v = random();

    const polyattn::Attention<polyattn::LocalGlobalRandom, polyattn::PPR<5>, polyattn::Cuda> attention{
        polyattn::LocalGlobalRandom{.window = 32, .globals = 16, .randoms = 16}, polyattn::PPR<5>{.alpha = .1}};
    const auto out = attention(q.view(), k.view(), v.view());

    std::vector<float> values(static_cast<std::size_t>(out.size()));
    out.copy_to(values.data());
    std::cout << 100 * attention.plan(512, 512).density() << " % of all pairs, out(0, 0, 0, 0) = " << values[0] << "\n";
}
