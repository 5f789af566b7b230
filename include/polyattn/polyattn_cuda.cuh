#pragma once
/// Attention<..., Cuda> and CudaNystromAttention on tensors in device memory, for sources that nvcc compiles as C++20. Without xtensor and xsimd; the CPU's umbrella is polyattn.hpp.
/// By name beside it: backend/cuda/sampling.cuh and backend/cuda/plan_building.cuh (graphs, draws and plans made on the device), backend/cuda/language_model.cuh and
/// backend/cuda/multi_resolution.cuh (AdaMRA's layer).

#include <polyattn/backend/cuda/attention_layer.cuh>
#include <polyattn/backend/cuda/compressed_layer.cuh>
#include <polyattn/backend/cuda/nystrom_attention.cuh>
#include <polyattn/backend/cuda/thrust.cuh>
#include <polyattn/policy/attention.hpp>
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
