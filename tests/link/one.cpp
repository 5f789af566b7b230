#include <polyattn/polyattn.hpp>

int one() { return static_cast<int>(polyattn::Attention<polyattn::Causal>{}.plan(4, 4).count()); }
