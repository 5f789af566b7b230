#pragma once
// Policies as data: one layer type serves every pattern (as a plan in the call's options) and every diffusion, so that pairs of
// policies cost no template instantiations.

#include "any_diffusion.hpp"

#include <polyattn/attention.hpp>

using Fast = polyattn::Attention<AnyDiffusion>;
using Exact = polyattn::Attention<AnyDiffusion, polyattn::Reference>;
