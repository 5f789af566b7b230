#pragma once

#include <polyattn/policy/diffusion/concept.hpp>

/// A diffusion as data, so that pairs of policies cost no template instantiations.
struct AnyDiffusion {
    using policy_kind = polyattn::diffusion_kind;
    polyattn::Recursion steps;
    polyattn::Recursion recursion() const { return steps; }
};
