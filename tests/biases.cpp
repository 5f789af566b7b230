// More kinds of biases in the SIMD kernels, against the double-precision reference. Kinds of biases take turns with kinds of numbers: each pair is a kernel to compile.
#include "support/biases.hpp"

TEST_CASE("tables by distance in two dimensions and by a function; functors in double") {
    POLYATTN_RANDOM(random);
    check_bias<double>("RelativePosition2D", random, RelativePosition2D{.heads = 2, .width = 6, .reach = 2, .table = random_table(random, 50)});
    check_bias<float>("TableBias", random, TableBias{[](polyattn::index_t batch, polyattn::index_t query, polyattn::index_t key) { return (batch + 2 * query + key) % 4; }, 2, random_table(random, 8)});
    check_bias<double>("FunctionBias", random, AnyBias{[](polyattn::index_t, polyattn::index_t head, polyattn::index_t query, polyattn::index_t key) { return (query + 2 * key + head) % 5 - 2.; }});
}
