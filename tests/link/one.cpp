#include <polyattn/clustered_attention.hpp>
#include <polyattn/models.hpp>
#include <polyattn/nn/classifier.hpp>
#include <polyattn/nystrom_attention.hpp>
#include <polyattn/polyattn.hpp>

int one() { return static_cast<int>(polyattn::Attention<polyattn::Causal>{}.plan(4, 4).count()); }
