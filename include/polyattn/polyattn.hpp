#pragma once
/// Everything for the CPU but layers with parameters (nn/), what looks at patterns and samplers (analysis/), models.hpp, nystrom_attention.hpp and
/// clustered_attention.hpp.

#include <polyattn/attention.hpp>
#include <polyattn/backend/simd/describe.hpp>
#include <polyattn/interface/lazy.hpp>
#include <polyattn/plan/picture.hpp>
#include <polyattn/policy/bias/bias.hpp>
#include <polyattn/policy/compression/compression.hpp>
#include <polyattn/policy/diffusion/diffusion.hpp>
#include <polyattn/policy/pattern/big_bird.hpp>
#include <polyattn/policy/pattern/combine.hpp>
#include <polyattn/policy/pattern/data_dependent.hpp>
#include <polyattn/policy/pattern/dense.hpp>
#include <polyattn/policy/pattern/edge_list.hpp>
#include <polyattn/policy/pattern/grid.hpp>
#include <polyattn/policy/pattern/local_global_random.hpp>
#include <polyattn/policy/pattern/random.hpp>
#include <polyattn/policy/pattern/sparse_transformer.hpp>
#include <polyattn/policy/pattern/window.hpp>
#include <polyattn/policy/sampler/sampler.hpp>
