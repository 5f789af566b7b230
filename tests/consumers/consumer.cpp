#include <polyattn/polyattn.hpp>

int main() {
    const xt::xtensor<float, 2> x = xt::ones<float>({10, 4});
    const polyattn::Attention<polyattn::SlidingWindow, polyattn::PPR<2>> attention;
    return attention(x, x, x)(9, 3) > .999f ? 0 : 1;
}
