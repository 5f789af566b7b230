// Diffuser's attention on random tensors.
#include <polyattn/polyattn.hpp>

#include <iostream>
#include <random>

int main() {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    const auto random = [&] {
        xt::xtensor<float, 4> x = xt::zeros<float>({1, 8, 2048, 64});  // [batch, heads, tokens, dim]
        for (float& value : x) value = normal(generator);
        return x;
    };
    const auto q = random(), k = random(), v = random();

    // A token sees 32 neighbours, 16 tokens that see and are seen by all, and 16 random ones; five hops of diffusion.
    const polyattn::Attention attention{polyattn::LocalGlobalRandom{.window = 32, .globals = 16, .randoms = 16},
                                        polyattn::PPR<5>{.alpha = .1}};
    const xt::xtensor<float, 4> out = attention(q, k, v);

    std::cout << polyattn::describe() << "\n"
              << 100 * attention.plan(2048, 2048).density() << " % of all pairs, out(0, 0, 0, 0) = " << out(0, 0, 0, 0) << "\n";
}
