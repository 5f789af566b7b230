#pragma once
// Attention<...>: which layer a list of policies names. The layers themselves are in headers of the backends.

#include <polyattn/policy/pattern/concept.hpp>
#include <polyattn/policy/set.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

template <class... Ps>
using Layer = AttentionLayer<typename PolicySet<Ps...>::Pattern, typename PolicySet<Ps...>::Sampler, typename PolicySet<Ps...>::Diffusion,
                             typename PolicySet<Ps...>::Score, typename PolicySet<Ps...>::Bias, typename PolicySet<Ps...>::Backend>;

/// Attention to landmarks: a layer of one hop, whose kernel scores don't add an epsilon under diffusion.
template <class Score, class Diffusion>
struct landmark_score {
    using type = Score;
};
template <class F, class Diffusion>
    requires(!std::same_as<Diffusion, NoDiffusion>)
struct landmark_score<Kernel<F, DefaultDenominator>, Diffusion> {
    using type = Kernel<F, ExactOrMean>;
};
template <class Compression, class Diffusion, class Score, class Backend>
class LandmarkLayer : public CompressedLayer<Compression, Diffusion, AttentionLayer<Dense, AllSources, NoDiffusion, typename landmark_score<Score, Diffusion>::type, NoBias, Backend>> {
    using Inner = AttentionLayer<Dense, AllSources, NoDiffusion, typename landmark_score<Score, Diffusion>::type, NoBias, Backend>;

public:
    template <class... Policies>
    explicit LandmarkLayer(std::tuple<Policies...> policies)
        : CompressedLayer<Compression, Diffusion, Inner>(given<Compression>(policies), given<Diffusion>(policies), Inner(std::tuple(inner_score(given<Score>(policies))))) {}

private:
    template <class P, class... Policies>
    static P given(const std::tuple<Policies...>& policies) {
        if constexpr ((std::is_same_v<P, Policies> || ...)) return std::get<P>(policies);
        else return P{};
    }
    static auto inner_score(const Score& score) {
        using Wanted = typename landmark_score<Score, Diffusion>::type;
        if constexpr (std::same_as<Wanted, Score>) return score;
        else return Wanted{score.features, {}};
    }
};

template <class P, class... Ps>
inline constexpr bool is_one_of = (std::same_as<P, Ps> || ...);

template <class... Ps>
struct layer_or_stub {
    using type = InvalidAttention;
};
template <class... Ps>
    requires(PolicySet<Ps...>::valid && !PolicySet<Ps...>::compresses)
struct layer_or_stub<Ps...> {
    using type = Layer<Ps...>;
};
template <class... Ps>
    requires(PolicySet<Ps...>::valid && PolicySet<Ps...>::compresses)
struct layer_or_stub<Ps...> {
    using type = LandmarkLayer<typename PolicySet<Ps...>::Compression, typename PolicySet<Ps...>::Diffusion, typename PolicySet<Ps...>::Score, typename PolicySet<Ps...>::Backend>;
};

}  // namespace detail

/// An attention layer made of policies, in any order, at most one of a kind; kinds not named have neutral defaults (Dense,
/// AllSources, NoCompression, NoDiffusion, Softmax, NoBias, Simd<>).
///     Attention<LocalGlobalRandom, PPR<5>> attention;                              // Diffuser, paper defaults
///     Attention attention{LocalGlobalRandom{.window = 64}, PPR<5>{.alpha = .2}};   // with parameters
/// Every parameter is checked here (throws invalid_input). Immutable; copies share plans; all calls are const and may run at
/// the same time.
template <class... Ps>
class Attention : public detail::layer_or_stub<Ps...>::type {
    using Set = detail::PolicySet<Ps...>;
    using Base = typename detail::layer_or_stub<Ps...>::type;
    static_assert(Set::policies_only, "polyattn::Attention: every argument must be a policy; give your type a `using policy_kind = ...;` (policy/concept.hpp)");
    static_assert(Set::template at_most_one<sparsity_pattern_kind>, "polyattn::Attention: two SparsityPatterns; join them with Union or Intersection");
    static_assert(Set::template at_most_one<sampler_kind>, "polyattn::Attention: two SamplerPolicies; keep one");
    static_assert(Set::template at_most_one<diffusion_kind>, "polyattn::Attention: two DiffusionPolicies; keep one, or merge their coefficients in a Polynomial");
    static_assert(Set::template at_most_one<compression_kind>, "polyattn::Attention: two CompressionPolicies; keep one");
    static_assert(Set::template at_most_one<score_kind>, "polyattn::Attention: two ScorePolicies; keep one");
    static_assert(Set::template at_most_one<bias_kind>, "polyattn::Attention: two BiasPolicies; add them in one FunctionBias");
    static_assert(Set::template at_most_one<backend_kind>, "polyattn::Attention: two backends; keep one of Reference, Simd<> and Cuda");
    static_assert(SparsityPattern<typename Set::Pattern>, "polyattn::Attention: a SparsityPattern needs `Plan plan(index_t queries, index_t keys) const`");
    static_assert(SamplerPolicy<typename Set::Sampler>, "polyattn::Attention: a SamplerPolicy needs `Plan sample(index_t queries, index_t keys, const Draw&, bool causal) const`");
    static_assert(!detail::is_causal<typename Set::Pattern>() || detail::has_causal_form<typename Set::Sampler>(),
                  "polyattn::Attention: this SamplerPolicy has no causal form (early queries would be left without keys); use LocallyBiased<L>{.sigma = infinite_sigma}");
    static_assert(!DataDependentPattern<typename Set::Pattern> || std::same_as<typename Set::Sampler, AllSources>,
                  "polyattn::Attention: patterns that depend on q and k take no SamplerPolicy");
    static_assert(DiffusionPolicy<typename Set::Diffusion>, "polyattn::Attention: a DiffusionPolicy needs `Recursion recursion() const`");
    static_assert(Set::known_score, "polyattn::Attention: the ScorePolicy must be Softmax or Kernel<Features, Denominator>");
    static_assert(!Set::kernel || Set::kernel_pattern, "polyattn::Attention: Kernel scores see all keys, or with Causal all earlier ones; other patterns and samplers need Softmax");
    static_assert(!Set::kernel || std::same_as<typename Set::Bias, NoBias>, "polyattn::Attention: Kernel scores take no BiasPolicy; use Softmax");
    static_assert(!Set::diffuses_epsilon, "polyattn::Attention: with AddEpsilon rows do not sum to 1, so a DiffusionPolicy needs Kernel<Features, ExactOrMean>");
    static_assert(CompressionPolicy<typename Set::Compression>, "polyattn::Attention: a CompressionPolicy needs `index_t landmarks(index_t tokens) const` and is_linear");
    static_assert(!Set::compresses || !detail::is_causal<typename Set::Pattern>(), "polyattn::Attention: compressed keys mix later tokens into earlier landmarks, so Causal would leak; keep one of the two");
    static_assert(!Set::compresses || detail::is_causal<typename Set::Pattern>() || Set::compression_alone, "polyattn::Attention: every query sees all landmarks; with a CompressionPolicy leave out patterns, samplers and biases");
    static_assert(Set::linear_diffusion, "polyattn::Attention: diffusion needs a compression that is linear in V; SegmentMax is not, SegmentMeans is");
    static_assert(Set::one_resolution, "polyattn::Attention: SegmentMeans of several lengths are resolutions; use nn::AdaptiveMultiResolution, or one length");
    static_assert(BiasPolicy<typename Set::Bias>, "polyattn::Attention: a BiasPolicy needs `double operator()(index_t batch, index_t head, index_t query, index_t key) const`");
    static_assert(detail::is_backend<typename Set::Backend>, "polyattn::Attention: the backend must be Reference, Simd<> or Cuda");

public:
    Attention() requires(Set::valid) : Base(std::tuple<>{}) {}
    /// Policies of the layer's types, in any order; those left out are default ones.
    template <class... Given>
        requires(sizeof...(Given) > 0 && (!Set::valid || (detail::is_one_of<Given, Ps...> && ...)))
    explicit Attention(Given... policies) : Base(std::tuple<Given...>(std::move(policies)...)) {}
    Attention() requires(!Set::valid) : Base() {}
};

template <class... Ps>
Attention(Ps...) -> Attention<Ps...>;

POLYATTN_END_NAMESPACE
