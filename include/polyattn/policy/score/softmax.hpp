#pragma once

#include <polyattn/core/error.hpp>
#include <polyattn/policy/concept.hpp>

#include <cmath>

POLYATTN_BEGIN_NAMESPACE

/// Scaled dot products and a softmax over each query's own keys: A_ij = exp(q_i . k_j / sqrt(d) + bias) / sum over the keys of i.
/// `scale` replaces 1 / sqrt(d) when it is not 0. Sources: Vaswani et al., "Attention is all you need" (2017), equation 1;
/// on a pattern, Diffuser (AAAI 2023), equations 2 and 3.
struct Softmax {
    using policy_kind = score_kind;
    double scale = 0;

    void validate() const { detail::require_in_range(scale, -1e6, 1e6, "scale", "a finite factor (0 for 1 / sqrt(d))"); }
    double factor(index_t dim) const { return scale != 0 ? scale : 1 / std::sqrt(double(dim)); }
};

POLYATTN_END_NAMESPACE
