// The softmax operator on the device: the CPU's table of cases, executed natively or by an emulator, whose checks are on.
#include "cuda/device_layer.hpp"
#include "support/layers.hpp"

using Tested = DeviceLayer<>;

namespace {

using polyattn::index_t;

/// Sizes around the tiles of 32 and 64 pairs and the edges' 32, primes, 0 and 1; dims around the vectors and the panels of 32 and 64.
constexpr index_t sizes[] = {0, 1, 2, 7, 31, 33, 63, 64, 65, 97};
constexpr index_t dims[] = {1, 3, 4, 8, 16, 17, 40, 64, 65, 70};

}  // namespace

#include "support/softmax_table.hpp"

TEST_CASE("biases and their gradients") {
    POLYATTN_RANDOM(random);
    const auto check = [&]<class Bias>(const Bias& bias, const char* name) {
        for (const index_t n : {1, 40, 71}) {
            const Recursion recursion = PPR<2>{}.recursion();
            Case c{name, LocalGlobalRandom{.window = 8, .globals = 3, .randoms = 3, .seed = random.seed()}.plan(n, n), recursion, 8, 8, 2, 2, 2};
            if (n == 40) c.options.key_lengths = {33, 40};
            const Attention<AnyDiffusion, Bias, Reference> exact{AnyDiffusion{recursion}, bias};
            check_case<float>(c, random, true, DeviceLayer<Bias>{AnyDiffusion{recursion}, bias}, exact);
            // Sums of float terms, exact but for the terms' own rounding; compared with the reference on the same numbers.
            const auto q = random.tensor<float>({2, 2, n, 8}), d_out = random.tensor<float>({2, 2, n, 8});
            CallOptions options = c.options;
            options.plan = c.plan;
            const DeviceLayer<Bias> tested{AnyDiffusion{recursion}, bias};
            const auto gradient = tested.backward(tested.forward(q.view(), q.view(), q.view(), options).saved, d_out.view());
            const auto q2 = in_double(q), d_out2 = in_double(d_out);
            const auto exact_gradient = exact.backward(exact.forward(q2.view(), q2.view(), q2.view(), options).saved, d_out2.view());
            REQUIRE(gradient.bias.size() == exact_gradient.bias.size());
            for (std::size_t i = 0; i < gradient.bias.size(); ++i) CHECK(gradient.bias[i] == doctest::Approx(exact_gradient.bias[i]).epsilon(1e-3));
        }
    };
    check(Alibi(2), "Alibi");
    RelativePosition table{.heads = 2, .reach = 4, .table = std::vector<double>(18)};
    for (double& entry : table.table) entry = random.normal();
    check(table, "RelativePosition");
    RelativePosition2D picture{.heads = 2, .width = 6, .reach = 2, .table = std::vector<double>(50)};
    for (double& entry : picture.table) entry = random.normal();
    check(picture, "RelativePosition2D");
}
