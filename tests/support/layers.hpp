#pragma once
// Policies as data: one layer type serves every pattern (as a plan in the call's options) and every diffusion, so that pairs of
// policies cost no template instantiations.

#include <polyattn/attention.hpp>

struct AnyDiffusion {
    using policy_kind = polyattn::diffusion_kind;
    polyattn::Recursion steps;
    polyattn::Recursion recursion() const { return steps; }
};

using Fast = polyattn::Attention<AnyDiffusion>;
using Exact = polyattn::Attention<AnyDiffusion, polyattn::Reference>;
