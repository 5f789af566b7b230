// Kernel attention on the device against the double-precision reference, within the CPU's bounds.
#include "cuda/device_layer.hpp"
#include "cuda/kernel_scores.hpp"
#include "support/layers.hpp"

namespace {

template <class Score, class Pattern>
auto tested_layer(const Score& score, const Pattern& pattern, const polyattn::Recursion& recursion) {
    return DeviceLayer<polyattn::NoBias, Score, Pattern>{AnyDiffusion{recursion}, {}, score, pattern};
}

}  // namespace

#include "support/kernel_cases.hpp"

TEST_CASE("ReLU") {
    POLYATTN_RANDOM(random);
    check_sizes<float>(random, ReluMean{}, Dense{});
    check_sizes<double>(random, ReluMean{}, Dense{});
    check_sizes<float>(random, ReluMean{}, Causal{});
    check_sizes<double>(random, ReluMean{}, Causal{});
    check_sizes<float>(random, ReluEpsilon{}, Causal{});
}
TEST_CASE("ELU + 1") {
    POLYATTN_RANDOM(random);
    check_sizes<float>(random, EluZero{}, Dense{});
    check_sizes<float>(random, EluZero{}, Causal{});
}
TEST_CASE("random features, causal and not; a caller's map; long sums") {
    POLYATTN_RANDOM(random);
    check_sizes<float>(random, RandomZero{{.features = 19, .seed = random.seed()}}, Dense{});
    check_sizes<double>(random, RandomZero{{.seed = random.seed()}}, Causal{});
    check_sizes<double>(random, QuarticScores{}, Dense{});
    for (const auto& [queries, keys] : {std::pair{5, 4100}, {2500, 5}}) check_against_reference<float>(random, ReluMean{}, Dense{}, recursions[0], queries, keys, 3, 2, true);
}
