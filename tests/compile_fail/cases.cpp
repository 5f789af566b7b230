// One mistake a macro. Without any this is the control.
#include <polyattn/polyattn.hpp>
#if defined(CASE_bias_without_table) || defined(CASE_causal_resolutions)
#include <polyattn/nn/transformer.hpp>
#elif defined(CASE_subsampled_hashing)
#include <polyattn/nn/subsampling.hpp>
#endif

using namespace polyattn;

struct NotAPolicy {};
struct PatternWithoutPlan {
    using policy_kind = sparsity_pattern_kind;
};
struct SamplerWithoutSample {
    using policy_kind = sampler_kind;
};
struct OtherSampler : AllSources {};
struct DiffusionWithoutRecursion {
    using policy_kind = diffusion_kind;
};
struct CompressionWithoutLandmarks {
    using policy_kind = compression_kind;
};
struct BiasWithoutCall {
    using policy_kind = bias_kind;
};
struct LearnedWithoutTable {
    using policy_kind = bias_kind;
    double operator()(index_t, index_t, index_t, index_t) const { return 0; }
    std::size_t gradient_size() const { return 1; }
    void accumulate_gradient(std::span<double>, index_t, index_t, index_t, index_t, double) const {}
};
struct ForeignScore {
    using policy_kind = score_kind;
};
struct ForeignBackend {
    using policy_kind = backend_kind;
};

int main() {
    const xt::xtensor<float, 4> x = xt::zeros<float>({1, 1, 4, 4});
    const xt::xtensor<double, 4> other = x;
    const xt::xtensor<int, 4> integers = xt::zeros<int>({1, 1, 4, 4});
#if defined(CASE_two_patterns)
    Attention<Dense, PPR<5>, SlidingWindow> attention;
#elif defined(CASE_two_diffusions)
    Attention attention{PPR<5>{}, HeatKernel<3>{}};
#elif defined(CASE_two_samplers)
    Attention<AllSources, OtherSampler> attention;
#elif defined(CASE_two_biases)
    Attention attention{Alibi(4), RelativePosition{}};
#elif defined(CASE_two_scores)
    Attention<Softmax, Softmax> attention;
#elif defined(CASE_two_backends)
    Attention<Simd<>, Reference> attention;
#elif defined(CASE_no_policy)
    Attention<Dense, NotAPolicy> attention;
#elif defined(CASE_pattern_without_plan)
    Attention<PatternWithoutPlan> attention;
#elif defined(CASE_sampler_without_sample)
    Attention<SamplerWithoutSample> attention;
#elif defined(CASE_diffusion_without_recursion)
    Attention<DiffusionWithoutRecursion, Dense> attention;
#elif defined(CASE_bias_without_call)
    Attention<BiasWithoutCall> attention;
#elif defined(CASE_foreign_score)
    Attention<ForeignScore> attention;
#elif defined(CASE_kernel_on_windows)
    Attention<Kernel<ReLU>, SlidingWindow> attention;
#elif defined(CASE_kernel_with_bias)
    Attention attention{Kernel<ReLU>{}, Alibi(1)};
#elif defined(CASE_epsilon_with_diffusion)
    Attention<Kernel<EluPlusOne, AddEpsilon>, PPR<2>> attention;
#elif defined(CASE_epsilon_with_random_features)
    Attention<Kernel<PositiveRandomFeatures, AddEpsilon>> attention;
#elif defined(CASE_two_compressions)
    Attention<SegmentMeans<2>, KMeans> attention;
#elif defined(CASE_compression_without_landmarks)
    Attention<CompressionWithoutLandmarks> attention;
#elif defined(CASE_causal_compression)
    Attention<SegmentMeans<2>, Causal> attention;
#elif defined(CASE_compression_with_bias)
    Attention attention{SegmentMeans<2>{}, Alibi(1)};
#elif defined(CASE_diffusion_of_maxima)
    Attention<SegmentMax<2>, PPR<2>> attention;
#elif defined(CASE_causal_resolutions)
    MultiResolution<SegmentMeans<2, 8>, TopOne<StraightThrough>, Causal> attention;
#elif defined(CASE_combined_hashing)
    Attention<Intersection<LocalitySensitiveHashing, Causal>> attention;
#elif defined(CASE_bias_without_table)
    nn::MultiHeadAttention<float, Attention<LearnedWithoutTable>> attention("layer", {}, 8, 2, 2, .1, 1, 1);
#elif defined(CASE_several_resolutions)
    Attention<SegmentMeans<2, 8>, Kernel<ReLU>> attention;
#elif defined(CASE_sampled_hashing)
    Attention<LocalitySensitiveHashing, Unbiased> attention;
#elif defined(CASE_plan_of_hashing)
    Attention<LocalitySensitiveHashing> attention;
    attention.plan(4, 4);
#elif defined(CASE_plans_of_hashing)
    Attention<LocalitySensitiveHashing> attention;
    attention.plans(1, 4, 4, {});
#elif defined(CASE_subsampled_hashing)
    Attention<> attention;
    nn::subsampled(LocalitySensitiveHashing{}, AllSources{});
#elif defined(CASE_logsumexp_of_kernel)
    Attention<Kernel<ReLU>> attention;
    attention.with_logsumexp(x, x, x);
#elif defined(CASE_recurrent_without_causal)
    Attention<Kernel<ReLU>> attention;
    attention.start<float>(1, 1, 1, 4, 4);
#elif defined(CASE_foreign_backend)
    Attention<ForeignBackend> attention;
#elif defined(CASE_cuda_without_its_header)
    Attention<LocalGlobalRandom, PPR<5>, Cuda> attention;
    attention(x, x, x);
#elif defined(CASE_sampler_without_causal_form)
    Attention<Causal, Unbiased> attention;
#elif defined(CASE_no_windows)
    LocallyBiased<0> sampler;
    (void)sampler;
    Attention<> attention;
#elif defined(CASE_negative_hops)
    PPR<-1> diffusion;
    (void)diffusion;
    Attention<> attention;
#else
    Attention<LocalGlobalRandom, PPR<5>> attention;
#endif
#if defined(CASE_integer_tensors)
    attention(integers, integers, integers);
#elif defined(CASE_mixed_tensors)
    attention(x, other, x);
#elif defined(CASE_other_gradient_type)
    attention.backward(attention.forward(x, x, x).saved, other);
#elif defined(CASE_into_expression)
    attention.into(x + x, x, x, x);
#else
    const auto out = attention(x, x, x);
    (void)out;
#endif
}
