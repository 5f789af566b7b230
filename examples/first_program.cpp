// Diffuser's attention on random tensors: the shortest program that does something real.
#include <polyattn/polyattn.hpp>

#include <iostream>
#include <xtensor/xrandom.hpp>  // <xtensor/generators/xrandom.hpp> since xtensor 0.26

int main() {
    // [batch, heads, tokens, dim]
    xt::random::seed(1);
    xt::xtensor<float, 4> q = xt::random::randn<float>({1, 8, 2048, 64});
    xt::xtensor<float, 4> k = xt::random::randn<float>({1, 8, 2048, 64});
    xt::xtensor<float, 4> v = xt::random::randn<float>({1, 8, 2048, 64});

    // Each token sees 32 neighbours, 16 tokens see and are seen by all, 16 random ones; five hops of attention diffusion.
    polyattn::Attention attention{polyattn::LocalGlobalRandom{.window = 32, .globals = 16, .randoms = 16}, polyattn::PPR<5>{.alpha = .1}};

    xt::xtensor<float, 4> out = attention(q, k, v);

    std::cout << polyattn::describe() << "\n"
              << "density of the pattern: " << 100 * attention.plan(2048, 2048).density() << " %\n"
              << "out(0, 0, 0, 0) = " << out(0, 0, 0, 0) << "\n";

    // Training: the same pass, then gradients of q, k and v.
    auto [result, saved] = attention.forward(q, k, v);
    auto gradient = attention.backward(saved, result);
    std::cout << "dL/dq(0, 0, 0, 0) = " << gradient.q(0, 0, 0, 0) << " for L = |out|^2 / 2\n";
}
