// polyattn's side of compare.py: ours CASE N WINDOW THREADS FOLDER. Reads q, k, v and d_out (n x 64 floats) from the folder, writes out
// (and the pattern's pairs for "pairs"), prints seconds of forward and of forward + backward: medians. "decoder" takes WINDOWS of SSA and
// writes its parameters, and prints the first loss and the seconds of a training step.
#include "../common.hpp"
#include "../decoder.hpp"

#include <polyattn/nn/safetensors.hpp>

#include <fstream>
#include <iostream>

using namespace bench;

namespace {

std::string folder;

Tensor<float> read(const char* name, index_t n) {
    Tensor<float> tensor({n, 64});
    std::ifstream file(folder + "/" + name, std::ios::binary);
    file.read(reinterpret_cast<char*>(tensor.data()), static_cast<std::streamsize>(tensor.values.size() * sizeof(float)));
    if (!file) throw std::runtime_error("cannot read " + folder + "/" + name);
    return tensor;
}
void write(const char* name, const auto& values) {
    std::ofstream(folder + "/" + name, std::ios::binary).write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(values[0])));
}

template <class F>
double median_seconds(F&& f) {
    f();
    std::vector<double> times;
    const char* const limit = std::getenv("POLYATTN_COMPARE_SECONDS");
    const double until = seconds() + (limit ? std::atof(limit) : 1);
    while (times.size() < 5 || (seconds() < until && times.size() < 200)) {
        const double start = seconds();
        f();
        times.push_back(seconds() - start);
    }
    return median(std::move(times));
}

template <class Layer>
void run(const Layer& layer, index_t n) {
    const auto q = read("q", n), k = read("k", n), v = read("v", n), d_out = read("d_out", n);
    Workspace workspace;
    const CallOptions options{.plan = layer.plan(n, n), .workspace = &workspace};
    Tensor<float> out({n, 64});
    const double forward = median_seconds([&] { layer.into(out.view(), q.view(), k.view(), v.view(), options); });
    write("out", out.values);
    auto saved = layer.forward(q.view(), k.view(), v.view(), options).saved;
    auto gradients = layer.backward(saved, d_out.view(), options);
    const double both = median_seconds([&] {  // as a training loop does it: with the memory of the pass before
        layer.forward_into(out.view(), saved, q.view(), k.view(), v.view(), options);
        layer.backward_into(gradients, saved, d_out.view(), options);
    });
    std::cout << forward << " " << both << " " << fma_peak<float>() / 1e9 << std::endl;
}

void decoder(index_t n, index_t windows) {
    Decoder<Attention<Causal>> run({}, n, 4096 / n > 1 ? 2 : 1);
    nn::parameters_of<float>(run.model).write(folder + "/decoder.safetensors");
    write("tokens", run.text);
    write("targets", run.targets);
    const nn::PlanSource plans = sampled_plans(windows, 4);
    std::cout.precision(9);
    std::cout << run.step(plans) << " ";
    std::cout << median_seconds([&] { run.step(plans); }) << std::endl;
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 6) return std::cerr << "ours CASE N WINDOW THREADS FOLDER\n", 1;
    const std::string name = arguments[1];
    const index_t n = std::atoi(arguments[2]), window = std::atoi(arguments[3]);
    use_threads(std::atoi(arguments[4]));
    folder = arguments[5];
    const LocalGlobalRandom pattern{};
    if (name == "dense") run(Attention<>{}, n);
    else if (name == "causal") run(Attention<Causal>{}, n);
    else if (name == "window") run(Attention{SlidingWindow{.window = window}}, n);
    else if (name == "pattern") run(Attention{pattern}, n);
    else if (name == "diffuser") run(Attention{pattern, PPR<5>{}}, n);
    else if (name == "linear") run(Attention<Kernel<ReLU>>{}, n);
    else if (name == "decoder") decoder(n, window);
    else if (name == "pairs") {
        std::vector<std::int64_t> starts = {0}, keys;
        const Plan plan = pattern.plan(n, n);
        for (index_t i = 0; i < n; ++i) {
            const auto first = static_cast<std::ptrdiff_t>(keys.size());
            plan.for_each_key(i, [&](index_t j) { keys.push_back(j); });
            std::sort(keys.begin() + first, keys.end());
            starts.push_back(static_cast<std::int64_t>(keys.size()));
        }
        write("starts", starts);
        write("keys", keys);
    } else return std::cerr << "no such case: " << name << "\n", 1;
}
