#pragma once
// The kernel scores that the device's tests use, named once for the test and for what it links with.

#include "support/quartic.hpp"

#include <polyattn/policy/score/kernel.hpp>

using ReluMean = polyattn::Kernel<polyattn::ReLU, polyattn::ExactOrMean>;
using ReluEpsilon = polyattn::Kernel<polyattn::ReLU, polyattn::AddEpsilon>;
using EluZero = polyattn::Kernel<polyattn::EluPlusOne, polyattn::ExactOrZero>;
using RandomZero = polyattn::Kernel<polyattn::PositiveRandomFeatures, polyattn::ExactOrZero>;
using QuarticScores = polyattn::Kernel<Quartic>;
