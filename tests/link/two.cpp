// Two translation units that include everything link.
#include <polyattn/analysis/expander.hpp>
#include <polyattn/analysis/receptive_field.hpp>
#include <polyattn/analysis/sensitivity.hpp>
#include <polyattn/clustered_attention.hpp>
#include <polyattn/models.hpp>
#include <polyattn/nn/classifier.hpp>
#include <polyattn/nystrom_attention.hpp>
#include <polyattn/polyattn.hpp>

int one();
int main() { return one() == 10 && polyattn::Attention<polyattn::Causal>{}.plan(4, 4).count() == 10 ? 0 : 1; }
