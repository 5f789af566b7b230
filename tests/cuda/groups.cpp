// Patterns that depend on q and k on the device: forward and backward against the double-precision reference, which makes its own plans.
#include "cuda/device_layer.hpp"
#include "support/cases.hpp"
#include "support/layers.hpp"

#include <polyattn/policy/pattern/data_dependent.hpp>

namespace {

template <class T, class Pattern>
void check(Random& random, const Pattern& pattern, const char* name) {
    for (const auto& [queries, keys] : {std::pair{0, 0}, std::pair{1, 1}, std::pair{33, 33}, std::pair{61, 61}, std::pair{9, 40}, std::pair{20, 3}, std::pair{4, 0}}) {
        if (std::is_same_v<Pattern, SinkhornBlocks> && queries != keys) continue;
        Case c{name, PlanBuilder(queries, keys).build(), queries == keys ? PPR<2>{}.recursion() : NoDiffusion{}.recursion(), 1 + random.below(12), 1 + random.below(12), 3, 4, 1 + random.below(2)};
        c.plans_itself = true;
        if (random.below(2)) c.options.key_lengths = {keys, keys / 2, 0};
        if (random.below(2)) c.options.query_lengths = {queries, queries / 3, queries};
        if (random.below(2)) {
            c.options.draw = {.seed = random.seed(), .step = 3};
            c.options.dropout = {.weights = .2, .values = .1};
        }
        check_case<T>(c, random, true, DeviceLayer<NoBias, Softmax, Pattern>{AnyDiffusion{c.recursion}, {}, {}, pattern}, Attention<AnyDiffusion, Pattern, Reference>{AnyDiffusion{c.recursion}, pattern});
    }
}

}  // namespace

TEST_CASE("hashing") {
    POLYATTN_RANDOM(random);
    check<float>(random, LocalitySensitiveHashing{.buckets = 4, .rounds = 2, .seed = random.seed()}, "hashing");
    check<double>(random, LocalitySensitiveHashing{.buckets = 2, .rounds = 3, .causal = true, .seed = random.seed()}, "causal hashing");
}
TEST_CASE("clusters") {
    POLYATTN_RANDOM(random);
    check<float>(random, RoutedClusters{.clusters = 5}, "clusters");
    check<double>(random, RoutedClusters{.clusters = 3, .iterations = 2}, "clusters");
}
TEST_CASE("Sinkhorn blocks") {
    POLYATTN_RANDOM(random);
    check<float>(random, SinkhornBlocks{.block = 8}, "Sinkhorn");
    check<double>(random, SinkhornBlocks{.block = 5}, "Sinkhorn");
}
