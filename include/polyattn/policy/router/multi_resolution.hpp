#pragma once

#include <polyattn/policy/compression/compression.hpp>
#include <polyattn/policy/pattern/concept.hpp>
#include <polyattn/policy/router/router.hpp>
#include <polyattn/policy/score/kernel.hpp>

POLYATTN_BEGIN_NAMESPACE

/// Names the attention of nn::AdaptiveMultiResolution (on the device: nn::CudaAdaptiveMultiResolution), in models where another one has an Attention<...>:
///     nn::Classifier<float, MultiResolution<SegmentMeans<2, 8, 32>>>
/// The paper's defaults: SegmentMeans<2, 8, 32> where accuracy is measured, SegmentMeans<2, 4, 8, 16> where speed is.
template <class Compression = SegmentMeans<2, 8, 32>, class Router = TopOne<StraightThrough>, class Score = Kernel<ReLU>>
struct MultiResolution {
    static_assert(requires { Compression::lengths; }, "polyattn: MultiResolution needs SegmentMeans<L...>; other compressions are for Attention<...>, one resolution each");
    static_assert(!SparsityPattern<Score>, "polyattn: landmarks mix later tokens into earlier ones, so MultiResolution has no causal form; leave the pattern out");
    static_assert(detail::RouterPolicy<Router>, "polyattn: MultiResolution needs the router TopOne<Gate>, RandomRoute or ConcatenateAll");
    Router router = {};
    Score score = {};
};

POLYATTN_END_NAMESPACE
