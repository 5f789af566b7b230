#pragma once
// What the examples run on the GPU: built by nvcc in device.cu, behind plain types, since the rest of a program may be compiled with other flags.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace device {

/// The name of the GPU. Throws where there is none.
std::string name();

/// Attention with Diffuser's pattern, in device memory.
class Diffusion {
public:
    /// x [heads][tokens][dim] is queries, keys and values.
    Diffusion(const float* x, int heads, int tokens, int dim);
    ~Diffusion();
    /// The output after one hop, or after the five of PPR.
    std::vector<float> run(bool one_hop);
    /// Seconds of the best of `repeats` calls, and bytes of scratch memory.
    double seconds(bool one_hop, int repeats);
    std::size_t workspace_bytes(bool one_hop) const;

private:
    struct State;
    std::unique_ptr<State> state_;
};

struct Parameter {
    std::string name;
    std::vector<std::int64_t> shape;
    std::vector<float> values;
};

/// A causal language model with ALiBi.
class Decoder {
public:
    Decoder(const std::vector<Parameter>& parameters, int heads);
    ~Decoder();
    /// [tokens][vocabulary]
    std::vector<float> logits(const std::vector<int>& tokens);

private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace device
