#include "device_layer.cuh"

#include "kernel_scores.hpp"

POLYATTN_INSTANTIATE(float, NoBias, ReluMean, Dense)
POLYATTN_INSTANTIATE(double, NoBias, ReluMean, Dense)
POLYATTN_INSTANTIATE(float, NoBias, ReluMean, Causal)
POLYATTN_INSTANTIATE(double, NoBias, ReluMean, Causal)
POLYATTN_INSTANTIATE(float, NoBias, ReluEpsilon, Causal)
POLYATTN_INSTANTIATE(float, NoBias, EluZero, Dense)
POLYATTN_INSTANTIATE(float, NoBias, EluZero, Causal)
POLYATTN_INSTANTIATE(float, NoBias, RandomZero, Dense)
POLYATTN_INSTANTIATE(double, NoBias, RandomZero, Causal)
POLYATTN_INSTANTIATE(double, NoBias, QuarticScores, Dense)
