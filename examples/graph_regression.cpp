// SSA on graphs: how many nodes lie within two edges of a node, on average, from degrees and an attention bias learned for each distance.
//   graph_regression [--steps N] [--graphs N] [--seed N]
// Batches are ragged: 10 to 40 nodes. In training each graph loses a random 0 to 50 % of its attention sources, drawn anew in every layer and
// step; tested without sampling, and as the mean of 8 samples.
#include "program.hpp"

#include <polyattn/nn/classifier.hpp>
#include <polyattn/nn/optimizer.hpp>
#include <polyattn/nn/subsampling.hpp>
#include <polyattn/polyattn.hpp>

#include <cstdio>

using namespace polyattn;

namespace {

constexpr index_t most_nodes = 40, degrees = 10, distances = 10;

struct Settings {
    std::int64_t steps = 250;
    std::uint32_t graphs = 1200;
    index_t batch = 32;
    std::uint64_t seed = 1;
    nn::TransformerOptions model{.layers = 3, .dim = 48, .heads = 4};
};

/// A random tree with some more edges: degrees, distances of all pairs, and the mean number of nodes within two edges of a node.
struct Graph {
    index_t nodes = 0;
    std::vector<index_t> degree, distance;
    float within_two = 0;

    Graph(std::uint64_t seed, std::uint32_t number) {
        RandomRow random(seed, number, 1002);
        nodes = 10 + static_cast<index_t>(random.below(most_nodes - 9));
        const auto n = static_cast<std::size_t>(nodes);
        std::vector<std::vector<std::size_t>> next(n);
        const auto connect = [&](std::size_t a, std::size_t b) {
            next[a].push_back(b);
            next[b].push_back(a);
        };
        const std::uint32_t reach = 1 + random.below(8);  // small: long trees, large: bushy ones
        for (std::size_t i = 1; i < n; ++i) connect(i, i - 1 - random.below(std::min(reach, static_cast<std::uint32_t>(i))));
        for (std::uint32_t extra = random.below(static_cast<std::uint32_t>(n) / 3); extra > 0; --extra) {
            const std::size_t a = random.below(static_cast<std::uint32_t>(n)), b = random.below(static_cast<std::uint32_t>(n));
            if (a != b) connect(a, b);
        }
        distance.assign(n * n, -1);
        double sum = 0;
        for (std::size_t start = 0; start < n; ++start) {  // breadth first
            degree.push_back(std::min(static_cast<index_t>(next[start].size()), degrees - 1));
            std::vector<std::size_t> queue{start};
            distance[start * n + start] = 0;
            for (std::size_t at = 0; at < queue.size(); ++at)
                for (const std::size_t other : next[queue[at]])
                    if (distance[start * n + other] < 0) {
                        distance[start * n + other] = distance[start * n + queue[at]] + 1;
                        queue.push_back(other);
                    }
            for (std::size_t j = 0; j < n; ++j) sum += distance[start * n + j] <= 2;
        }
        within_two = static_cast<float>(sum / double(n));
    }
};

/// The graphs of the batch at work, which the bias looks into.
struct Batch {
    std::vector<const Graph*> graphs;
    std::vector<index_t> tokens, lengths;
    void set(std::vector<const Graph*> chosen) {
        graphs = std::move(chosen);
        tokens.assign(graphs.size() * most_nodes, 0);
        lengths.clear();
        for (std::size_t b = 0; b < graphs.size(); ++b) {
            std::copy(graphs[b]->degree.begin(), graphs[b]->degree.end(), tokens.begin() + static_cast<std::ptrdiff_t>(b) * most_nodes);
            lengths.push_back(graphs[b]->nodes);
        }
    }
};
/// Row of the bias table: the distance, longer ones share the last row.
struct DistanceOf {
    const Batch* batch;
    index_t operator()(index_t item, index_t query, index_t key) const {
        const Graph& graph = *batch->graphs[static_cast<std::size_t>(item)];
        if (query >= graph.nodes || key >= graph.nodes) return 0;  // padding, which nobody sees
        return std::min(graph.distance[static_cast<std::size_t>(query * graph.nodes + key)], distances - 1);
    }
};

int run(const Settings& s) {
    std::vector<Graph> training, held_out;
    for (std::uint32_t g = 0; g < s.graphs; ++g) (g % 5 == 4 ? held_out : training).emplace_back(s.seed, g);
    double mean = 0, apart = 0, nodes = 0;
    for (const Graph& graph : training) mean += graph.within_two / double(training.size());
    for (const Graph& graph : training) nodes += graph.nodes / double(training.size());
    for (const Graph& graph : training) apart += std::abs(graph.within_two - mean) / double(training.size());
    std::cout << describe() << "\n" << training.size() << " graphs to train on, " << held_out.size() << " held out; " << mean << " nodes within two edges, mean absolute deviation " << apart
              << " (the error of guessing the mean); " << s.steps << " steps of " << s.batch << ", seed " << s.seed << "\n";

    std::vector<std::string> table;
    for (const bool fine_tuned : {false, true})
        for (const int percent : {0, 10, 20, 30, 40, 50}) {
            if (fine_tuned && percent == 0) continue;
            const nn::PlanSource sampled = nn::subsampled(Dense{}, Unbiased{.drop = percent / 100., .per_item = true});
            const nn::SubsampledTraining recipe{percent ? sampled : nn::PlanSource{}, fine_tuned ? .1 : 0.};
            Batch batch;
            const Attention attention{TableBias{DistanceOf{&batch}, s.model.heads, std::vector<double>(static_cast<std::size_t>(distances * s.model.heads))}};
            using Model = nn::Classifier<float, std::remove_const_t<decltype(attention)>>;
            Model model(attention, degrees, 1, s.model);
            nn::AdamW<float> optimizer;
            const nn::LearningRate rate{.peak = 3e-3, .last = 1e-4, .warmup = s.steps / 10, .steps = s.steps};
            typename Model::Saved saved;
            Workspace workspace;
            const std::string name = percent ? "unbiased, drop " + std::to_string(percent) + " %" + (fine_tuned ? " + fine-tuning" : "") : "dense";
            const double start = now();
            double error = 0;
            for (std::int64_t step = 0; step < s.steps; ++step) {
                RandomRow random(s.seed, static_cast<std::uint32_t>(step), 1000);
                std::vector<const Graph*> chosen;
                std::vector<float> targets;
                for (index_t b = 0; b < s.batch; ++b) {
                    chosen.push_back(&training[random.below(static_cast<std::uint32_t>(training.size()))]);
                    targets.push_back(static_cast<float>((chosen.back()->within_two - mean) / apart));
                }
                batch.set(std::move(chosen));
                const nn::Pass pass{.workspace = &workspace, .draw = {.seed = s.seed, .step = static_cast<std::uint32_t>(step)}, .training = true, .lengths = batch.lengths, .plans = recipe.at(step, s.steps)};
                const MatrixView<float> out = model.forward(batch.tokens, s.batch, saved, pass);
                error = nn::mean_absolute_error<float>({out.data, static_cast<std::size_t>(out.rows)}, targets) * apart;
                model.backward(saved, pass);
                nn::clip_gradients(model, 1);
                optimizer.step(model, rate.at(step));
                std::printf("\r%-36s step %lld/%lld  error %.3f  %.0f graphs/s   ", name.c_str(), static_cast<long long>(step + 1), static_cast<long long>(s.steps), error,
                            double((step + 1) * s.batch) / (now() - start));
                std::fflush(stdout);
            }
            const double seconds = (now() - start) / double(s.steps);
            std::printf("\n");
            const auto held_out_error = [&](const nn::PlanSource& plans, int samples) {
                double sum = 0;
                for (std::size_t first = 0; first < held_out.size(); first += 60) {
                    std::vector<const Graph*> chosen;
                    for (std::size_t g = first; g < std::min(first + 60, held_out.size()); ++g) chosen.push_back(&held_out[g]);
                    batch.set(chosen);
                    nn::SelfEnsemble ensemble;
                    for (int sample = 0; sample < samples; ++sample) {
                        model.forward(batch.tokens, static_cast<index_t>(chosen.size()), saved,
                                      {.workspace = &workspace, .draw = {.seed = s.seed, .sample = static_cast<std::uint32_t>(sample)}, .lengths = batch.lengths, .plans = plans});
                        ensemble.add(std::span<const float>(saved.outputs.values));
                    }
                    for (std::size_t g = 0; g < chosen.size(); ++g) sum += std::abs(mean + apart * ensemble.mean()[g] - chosen[g]->within_two);
                }
                return sum / double(held_out.size());
            };
            // Attention's share of the multiplications is n / (n + 6 dim), of which `percent` are left out.
            const double kept = 1 - percent / 100. * nodes / (nodes + 6 * s.model.dim), compute = fine_tuned ? .9 * kept + .1 : kept;
            char line[200];
            if (percent) std::snprintf(line, sizeof line, "| %s | %.3f | %.3f | %.3f | %.3f | %.4f |", name.c_str(), held_out_error({}, 1), held_out_error(sampled, 1), held_out_error(sampled, 8), compute, seconds);
            else std::snprintf(line, sizeof line, "| %s | %.3f | | | %.3f | %.4f |", name.c_str(), held_out_error({}, 1), compute, seconds);
            table.push_back(line);
        }
    std::printf("\n| mean absolute error, held out | not sampled | sampled x 1 | x 8 | compute | s/step |\n|---|---|---|---|---|---|\n");
    for (const std::string& line : table) std::printf("%s\n", line.c_str());
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    Settings settings;
    return run_program(
        "graph_regression", argc, argv,
        [&](const std::string& option, const std::string& value) {
            if (option == "--steps") settings.steps = number_of<std::int32_t>(option, value, 1);
            else if (option == "--graphs") settings.graphs = number_of<std::uint32_t>(option, value, 10);
            else if (option == "--seed") settings.seed = settings.model.seed = number_of<std::uint64_t>(option, value, 0);
            else return false;
            return true;
        },
        [&] { return run(settings); });
}
