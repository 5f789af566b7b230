#pragma once
// Which policies a list of types names, by kind, and what is wrong with the list in one sentence.

#include <polyattn/policy/backend.hpp>
#include <polyattn/policy/bias/concept.hpp>
#include <polyattn/policy/compression/concept.hpp>
#include <polyattn/policy/diffusion/diffusion.hpp>
#include <polyattn/policy/pattern/dense.hpp>
#include <polyattn/policy/sampler/concept.hpp>
#include <polyattn/policy/score/kernel.hpp>
#include <polyattn/policy/score/softmax.hpp>

#include <tuple>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

template <class Kind, class... Ps>
inline constexpr int count_of_kind = (0 + ... + int{PolicyOf<Ps, Kind>});

/// The first type of a kind, or the default.
template <class Kind, class Default, class... Ps>
struct select_kind {
    using type = Default;
};
template <class Kind, class Default, class P, class... Ps>
struct select_kind<Kind, Default, P, Ps...> {
    using type = typename std::conditional_t<PolicyOf<P, Kind>, std::type_identity<P>, select_kind<Kind, Default, Ps...>>::type;
};

template <class P>
concept KnownKind = PolicyOf<P, sparsity_pattern_kind> || PolicyOf<P, sampler_kind> || PolicyOf<P, diffusion_kind> || PolicyOf<P, score_kind> ||
                    PolicyOf<P, bias_kind> || PolicyOf<P, backend_kind> || PolicyOf<P, compression_kind>;

template <class P>
inline constexpr bool is_backend = false;
template <>
inline constexpr bool is_backend<Reference> = true;
template <>
inline constexpr bool is_backend<Cuda> = true;
template <class A>
inline constexpr bool is_backend<Simd<A>> = true;

template <class D>
inline constexpr bool adds_epsilon = false;
template <class F>
inline constexpr bool adds_epsilon<Kernel<F, AddEpsilon>> = true;

template <class C>
inline constexpr bool is_linear = [] {
    if constexpr (CompressionPolicy<C>) return C::is_linear;
    else return true;
}();

template <class... Ps>
struct PolicySet {
    using Pattern = typename select_kind<sparsity_pattern_kind, Dense, Ps...>::type;
    using Sampler = typename select_kind<sampler_kind, AllSources, Ps...>::type;
    using Diffusion = typename select_kind<diffusion_kind, NoDiffusion, Ps...>::type;
    using Score = typename select_kind<score_kind, Softmax, Ps...>::type;
    using Compression = typename select_kind<compression_kind, NoCompression, Ps...>::type;
    using Bias = typename select_kind<bias_kind, NoBias, Ps...>::type;
    using Backend = typename select_kind<backend_kind, Simd<>, Ps...>::type;

    static constexpr bool policies_only = (KnownKind<Ps> && ...);
    template <class Kind>
    static constexpr bool at_most_one = count_of_kind<Kind, Ps...> <= 1;
    static constexpr bool no_repeats = at_most_one<sparsity_pattern_kind> && at_most_one<sampler_kind> && at_most_one<diffusion_kind> &&
                                       at_most_one<score_kind> && at_most_one<bias_kind> && at_most_one<backend_kind> && at_most_one<compression_kind>;
    static constexpr bool kernel = is_kernel<Score>;
    static constexpr bool known_score = kernel || std::same_as<Score, Softmax>;
    static constexpr bool complete = SparsityPattern<Pattern> && SamplerPolicy<Sampler> && DiffusionPolicy<Diffusion> && known_score && BiasPolicy<Bias> && is_backend<Backend> &&
                                     CompressionPolicy<Compression>;
    static constexpr bool kernel_pattern = (std::same_as<Pattern, Dense> || std::same_as<Pattern, Causal>) && std::same_as<Sampler, AllSources>;
    static constexpr bool diffuses_epsilon = adds_epsilon<Score> && !std::same_as<Diffusion, NoDiffusion>;
    static constexpr bool compresses = !std::same_as<Compression, NoCompression>;
    static constexpr bool compression_alone = std::same_as<Pattern, Dense> && std::same_as<Sampler, AllSources> && std::same_as<Bias, NoBias>;
    static constexpr bool linear_diffusion = std::same_as<Diffusion, NoDiffusion> || is_linear<Compression>;
    static constexpr bool one_resolution = segment_lengths<Compression> <= 1;
    static constexpr bool fits = (!DataDependentPattern<Pattern> || std::same_as<Sampler, AllSources>) && (!compresses || (compression_alone && linear_diffusion && one_resolution)) && (!detail::is_causal<Pattern>() || detail::has_causal_form<Sampler>()) &&
                                 (!kernel || (kernel_pattern && std::same_as<Bias, NoBias> && !diffuses_epsilon));
    static constexpr bool valid = fits && policies_only && no_repeats && complete;
};

/// Stands in for a layer whose policies do not fit, so that the one sentence is the only error.
struct Anything {
    template <class... Args>
    Anything(Args&&...) {}
    template <class... Args>
    Anything operator()(Args&&...) const { return {}; }
};
struct InvalidAttention {
    template <class... Args>
    explicit InvalidAttention(Args&&...) {}
    template <class... Args>
    Anything operator()(Args&&...) const { return {}; }
};

template <class...>
inline constexpr bool never = false;

}  // namespace detail

/// The layer behind Attention<...>, with the policies sorted by kind: one for each family of backends.
template <class... Kinds>
class AttentionLayer : public detail::InvalidAttention {
public:
    using InvalidAttention::InvalidAttention;
    static_assert(detail::never<Kinds...>, "polyattn::Attention: the backend Cuda needs #include <polyattn/polyattn_cuda.cuh>, in a source that nvcc compiles");
};
template <class... Kinds>
class CompressedLayer : public detail::InvalidAttention {
public:
    using InvalidAttention::InvalidAttention;
    static_assert(detail::never<Kinds...>, "polyattn::Attention: a CompressionPolicy needs #include <polyattn/polyattn.hpp>");
};

POLYATTN_END_NAMESPACE
