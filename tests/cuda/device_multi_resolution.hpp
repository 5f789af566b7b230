#pragma once
// AdaMRA's layer on the device behind plain calls, for tests that a host compiler builds.

#include <polyattn/call_options.hpp>
#include <polyattn/core/tensor.hpp>
#include <polyattn/policy/router/multi_resolution.hpp>
#include <polyattn/policy/score/softmax.hpp>

#include <map>
#include <string>

template <class T>
using Parameters = std::map<std::string, polyattn::Tensor<T>>;

/// One forward and one backward pass. Parameters are those of a layer named "layer".
template <class T>
struct DevicePass {
    Parameters<T> parameters;
    polyattn::index_t heads, batch;
    polyattn::Tensor<T> x, residual, d_y;  // residual may be empty
    polyattn::CallOptions options;
    double output_dropout = 0;
};
template <class T>
struct DevicePassed {
    polyattn::Tensor<T> y, d_x;
    Parameters<T> gradients;
    std::vector<polyattn::index_t> routes;
    double balance_loss = 0;
};

/// Instantiated in device_multi_resolution.cu for the types that tests use.
template <class Recipe, class T>
DevicePassed<T> run_on_device(const Recipe& recipe, const DevicePass<T>& pass);


using StraightThroughRecipe = polyattn::MultiResolution<polyattn::SegmentMeans<2, 5, 16>>;
using SwitchRecipe = polyattn::MultiResolution<polyattn::SegmentMeans<2, 5, 16>, polyattn::TopOne<polyattn::Switch>>;
using LiteralRecipe = polyattn::MultiResolution<polyattn::SegmentMeans<3, 8>, polyattn::TopOne<polyattn::Literal>>;
using RandomRecipe = polyattn::MultiResolution<polyattn::SegmentMeans<1, 4>, polyattn::RandomRoute>;
using AllRecipe = polyattn::MultiResolution<polyattn::SegmentMeans<2, 5, 16>, polyattn::ConcatenateAll>;
using EluRecipe = polyattn::MultiResolution<polyattn::SegmentMeans<1, 3, 9, 27, 81>, polyattn::TopOne<polyattn::Switch>, polyattn::Kernel<polyattn::EluPlusOne, polyattn::ExactOrZero>>;
using SoftmaxRecipe = polyattn::MultiResolution<polyattn::SegmentMeans<1, 4>, polyattn::TopOne<polyattn::Switch>, polyattn::Softmax>;
using RandomFeaturesRecipe = polyattn::MultiResolution<polyattn::SegmentMeans<2, 5>, polyattn::TopOne<polyattn::StraightThrough>, polyattn::Kernel<polyattn::PositiveRandomFeatures>>;
