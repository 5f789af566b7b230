// A training step of the two-layer model (d = 64, two heads, hidden 128) with every kind of attention: time and memory against the tokens of an item,
// as tables 2 and 3 of AdaMRA and figure 4 of Diffuser have it. Batches of 2. With --accuracies=FILE, the runs.txt that listops has written (sweeps models and
// rates), a table with AdaMRA's score follows for each number of tokens.
#include "../examples/attention_zoo.hpp"
#include "../examples/experiment.hpp"
#include "common.hpp"

using namespace bench;

namespace {

std::map<index_t, std::vector<Row>> rows;  // by tokens, without accuracies

/// Mean accuracy of each kind of attention, in %, over those runs of a file that share task, setting, tokens, steps and items with its last one.
std::map<std::string, double> read_accuracies(const std::string& path) {
    std::map<std::string, std::map<std::string, std::pair<double, int>>> groups;
    std::string last;
    std::ifstream file(path);
    if (!file) throw std::runtime_error("can't read " + path);
    for (std::string line; std::getline(file, line);) {
        const auto tab = line.find('\t');
        std::size_t name = 0;
        last.clear();
        for (int part = 0; part < 7; ++part) {  // task, setting, sweep, tokens, steps, items, seed; then the name
            const std::size_t end = line.find('/', name) + 1;
            if (tab == std::string::npos || end == 0 || end > tab) throw std::runtime_error(path + " is not what listops writes: " + line);
            if (part != 2 && part != 6) last += line.substr(name, end - name);
            name = end;
        }
        auto& [sum, count] = groups[last][line.substr(name, tab - name)];
        sum += std::stod(line.substr(tab + 1));
        ++count;
    }
    std::map<std::string, double> means;
    for (const auto& [name, sum] : groups[last]) means[name] = sum.first / sum.second;
    return means;
}

std::map<index_t, std::pair<double, double>> dense_results;  // seconds and MB by tokens, from the first kind

template <class AnyAttention>
void step(benchmark::State& state, const std::string& name, const AnyAttention& attention, index_t n) {
    const double held = reset_peak();
    using Model = nn::Classifier<float, AnyAttention>;
    Model model(attention, 20, 10, {.layers = 2, .dim = 64, .heads = 2, .hidden = 128, .deviation = .1}, n);
    nn::AdamW<float> optimizer;
    typename Model::Saved saved;
    Workspace workspace;
    const index_t batch = 2;
    std::vector<index_t> tokens(static_cast<std::size_t>(batch * n)), labels{3, 7};
    RandomRow random(1, 0, 77);
    for (index_t& token : tokens) token = static_cast<index_t>(random.below(20));
    const auto run = [&] {
        const nn::Pass pass{.workspace = &workspace, .draw = {.seed = 1}, .training = true};
        const double loss = nn::cross_entropy(model.forward(tokens, batch, saved, pass), std::span<const index_t>(labels));
        model.backward(saved, pass);
        optimizer.step(model, 1e-3);
        return loss;
    };
    const double before = run();
    for (int i = 0; i < 8; ++i) run();
    if (!(run() < before)) return state.SkipWithError("the loss does not fall");
    const Medians medians = time_calls(state, run, fma_burst<float>);
    const double megabytes = peak_megabytes() - held;
    state.counters["MB"] = megabytes;
    if (rows[n].empty() || rows[n].back().name != name) rows[n].push_back({name, 0, 0, 0, 0});
    rows[n].back().seconds = medians.time;  // of the last call, which has the most iterations
    rows[n].back().megabytes = megabytes;
    if (name == "dense") dense_results[n] = {medians.time, megabytes};
    if (const auto dense = dense_results.find(n); dense != dense_results.end()) {
        state.counters["x_dense"] = dense->second.first / medians.time;
        state.counters["of_dense_MB"] = megabytes / dense->second.second;
    }
}

}  // namespace

int main(int argc, char** argv) {
    benchmark::Initialize(&argc, argv);
    std::map<std::string, double> accuracies;
    try {
        const std::string option = "--accuracies=";
        for (int i = 1; i < argc; ++i) {
            if (!std::string(argv[i]).starts_with(option)) throw std::runtime_error("unknown option " + std::string(argv[i]));
            accuracies = read_accuracies(argv[i] + option.size());
        }
    } catch (const std::exception& error) {
        std::cerr << "models: " << error.what() << "\n";
        return 1;
    }
    for (const index_t n : {256, 1024, 2048, 4096, 8192}) {
        const ZooSizes sizes = ZooSizes::of(n);
        const auto add = [&](const std::string& name, const auto& attention) {
            benchmark::RegisterBenchmark((name + "/n:" + std::to_string(n)).c_str(), [=](benchmark::State& state) { step(state, name, attention, n); })
                ->UseManualTime()
                ->Unit(benchmark::kMillisecond);
        };
        for_each_pattern(sizes, add);
        for_each_linear(sizes, add);
        add("AdaMRA 1/2, 1/4, 1/8, 1/16", MultiResolution<SegmentMeans<2, 4, 8, 16>>{});
    }
    benchmark::RunSpecifiedBenchmarks();
    if (accuracies.empty()) return 0;
    for (auto& [tokens, measured] : rows) {
        std::erase_if(measured, [&](const Row& row) { return !accuracies.contains(row.name); });
        for (Row& row : measured) row.accuracy = accuracies.at(row.name);
        std::cout << "\n" << tokens << " tokens\n";
        print(measured);
    }
}
