#pragma once
// Attention of other papers, in one line each.

#include <polyattn/attention.hpp>
#include <polyattn/policy/compression/compression.hpp>

POLYATTN_BEGIN_NAMESPACE

/// Katharopoulos et al., "Transformers are RNNs" (2020): phi = elu + 1.  LinearTransformer<Causal> decodes token by token.
template <class... Ps>
using LinearTransformer = Attention<Kernel<EluPlusOne>, Ps...>;
/// Choromanski et al., "Rethinking attention with Performers" (2021): FAVOR+.
template <class... Ps>
using Performer = Attention<Kernel<PositiveRandomFeatures>, Ps...>;
/// Wang et al., "Linformer" (2020).  Linformer<> attention{LinearProjection::drawn(tokens, landmarks)};
template <class... Ps>
using Linformer = Attention<LinearProjection, Ps...>;
/// Liu et al., "Generating Wikipedia by summarizing long sequences" (2018), without its causal mask.
template <class... Ps>
using MemoryCompressed = Attention<StridedConvolution, Ps...>;

POLYATTN_END_NAMESPACE
