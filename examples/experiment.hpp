#pragma once
// Training small classifiers on generated or sampled items, and the table that compares them.

#include "program.hpp"

#include <polyattn/nn/classifier.hpp>
#include <polyattn/nn/optimizer.hpp>
#include <polyattn/polyattn.hpp>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <sstream>

using namespace polyattn;

/// Item number i of a seed is the same for every model.
struct Item {
    std::vector<index_t> tokens;
    index_t label = 0;
};
struct Task {
    index_t vocabulary = 0, classes = 0, tokens = 0;  // tokens: of the longest item
    int held_out = 0;                                 // items to test with; 0: as many as you like
    std::function<Item(std::uint64_t seed, std::uint32_t number)> item;
};

constexpr std::uint32_t held_out = 1u << 31;  // numbers of items from there on are for testing

/// What all such programs may set.
struct Training {
    std::string folder;
    std::int64_t steps = 400;
    int seeds = 1, test = 2000;
    index_t batch = 64;
    std::uint64_t seed = 1;
    double rate = 2e-3;
    nn::TransformerOptions model{.layers = 2, .dim = 64, .heads = 2, .hidden = 128, .deviation = .05};

    bool set(const std::string& option, const std::string& value) {
        if (option == "--folder") folder = value;
        else if (option == "--steps") steps = number_of<std::int32_t>(option, value, 1);
        else if (option == "--seeds") seeds = number_of(option, value, 1);
        else if (option == "--test") test = number_of(option, value, 1);
        else if (option == "--batch") batch = number_of(option, value, 1);
        else if (option == "--seed") seed = number_of<std::uint64_t>(option, value, 0);
        else return false;
        return true;
    }
    void announce(const std::string& name, const Task& task) const {
        std::cout << describe() << "\n" << name << ": up to " << task.tokens << " tokens, " << task.classes << " classes; " << steps << " steps of " << batch << " items, " << test << " held-out items, seeds "
                  << seed << " to " << seed + static_cast<std::uint64_t>(seeds) - 1 << "\n";
        std::vector<int> answers(static_cast<std::size_t>(task.classes));
        for (int i = 0; i < test; ++i) ++answers[static_cast<std::size_t>(task.item(seed, held_out + static_cast<std::uint32_t>(i)).label)];
        std::cout << "always the most frequent answer: " << 100. * *std::max_element(answers.begin(), answers.end()) / test << " % right\n";
    }
};

struct Outcome {
    double accuracy = 0, seconds = 0, megabytes = 0;
};

/// Items first .. first + count, padded to the task's length.
struct Batch {
    std::vector<index_t> tokens, lengths, labels;
    Batch(const Task& task, std::uint64_t seed, std::uint32_t first, index_t count) : tokens(static_cast<std::size_t>(count * task.tokens), 0) {
        for (index_t b = 0; b < count; ++b) {
            const Item item = task.item(seed, first + static_cast<std::uint32_t>(b));
            std::copy(item.tokens.begin(), item.tokens.end(), tokens.begin() + static_cast<std::ptrdiff_t>(b) * task.tokens);
            lengths.push_back(static_cast<index_t>(item.tokens.size()));
            labels.push_back(item.label);
        }
    }
};

/// What may be done with a trained model: nothing.
struct LeaveIt {
    template <class Model>
    void operator()(Model&) const {}
};

/// Trains the model that make(options) returns, and hands it to finish(model); items with the first bit of their number set are never trained on.
template <class Make, class Finish = LeaveIt>
Outcome train(const std::string& name, const Training& s, const Task& task, std::uint64_t seed, const Make& make, const Finish& finish = {}) {
    if (s.steps * s.batch > std::int64_t{held_out}) throw std::runtime_error("--steps times --batch must be at most " + std::to_string(held_out) + ", the items to train on");
    const double held = reset_peak();
    nn::TransformerOptions options = s.model;
    options.seed = seed;
    auto model = make(options);
    using Model = decltype(model);
    nn::AdamW<float> optimizer;
    const nn::LearningRate rate{.peak = s.rate, .warmup = s.steps / 10, .steps = s.steps};
    typename Model::Saved saved;
    Workspace workspace;
    Outcome outcome;
    double loss = 0;
    const double start = now();
    for (std::int64_t step = 0; step < s.steps; ++step) {
        const auto number = static_cast<std::uint32_t>(step);
        const Batch batch(task, seed, number * static_cast<std::uint32_t>(s.batch), s.batch);
        const nn::Pass pass{.workspace = &workspace, .draw = {.seed = seed, .step = number}, .training = true, .lengths = batch.lengths};
        const double before = now();
        const MatrixView<float> logits = model.forward(batch.tokens, s.batch, saved, pass);
        const double now_lost = nn::cross_entropy(logits, std::span<const index_t>(batch.labels));
        model.backward(saved, pass);
        nn::clip_gradients(model, 1);
        optimizer.step(model, rate.at(step));
        outcome.seconds += (now() - before) / double(s.steps);
        loss = step == 0 ? now_lost : .95 * loss + .05 * now_lost;
        const double left = (now() - start) / double(step + 1) * double(s.steps - step - 1);
        std::printf("\r%-40s seed %llu  step %lld/%lld  loss %.3f  left %s   ", name.c_str(), static_cast<unsigned long long>(seed), static_cast<long long>(step + 1), static_cast<long long>(s.steps), loss,
                    clock_text(left).c_str());
        std::fflush(stdout);
    }
    outcome.megabytes = peak_megabytes() - held;
    int right = 0;
    for (int done = 0; done < s.test; done += static_cast<int>(s.batch)) {
        const index_t count = std::min<index_t>(s.batch, static_cast<index_t>(s.test - done));
        const Batch batch(task, seed, held_out + static_cast<std::uint32_t>(done), count);
        const MatrixView<float> logits = model.forward(batch.tokens, count, saved, {.workspace = &workspace, .draw = {.seed = seed}, .lengths = batch.lengths});
        for (index_t b = 0; b < count; ++b) right += std::max_element(logits.row(b), logits.row(b) + logits.cols) - logits.row(b) == batch.labels[static_cast<std::size_t>(b)];
    }
    outcome.accuracy = 100. * right / s.test;
    std::printf("%.1f %% right\n", outcome.accuracy);
    finish(model);
    return outcome;
}

// --- tables ---

/// Finished runs, a line each: key, accuracy, seconds a step, megabytes.
class Runs {
public:
    explicit Runs(const std::string& folder) {
        std::filesystem::create_directories(folder);
        path_ = folder + "/runs.txt";
        std::ifstream file(path_);
        for (std::string line; std::getline(file, line);) {
            const auto tab = line.find('\t');
            std::istringstream numbers(line.substr(tab + 1));
            Outcome outcome;
            if (tab != std::string::npos && numbers >> outcome.accuracy >> outcome.seconds >> outcome.megabytes) known_[line.substr(0, tab)] = outcome;
        }
    }
    template <class Make>
    Outcome get(const std::string& key, Make&& make) {
        if (const auto found = known_.find(key); found != known_.end()) return found->second;
        const Outcome outcome = make();
        std::ofstream(path_, std::ios::app) << key << '\t' << outcome.accuracy << ' ' << outcome.seconds << ' ' << outcome.megabytes << '\n';
        return known_[key] = outcome;
    }

private:
    std::string path_;
    std::map<std::string, Outcome> known_;
};

struct Row {
    std::string name;
    double accuracy, error, seconds, megabytes;
};

/// One row of the table: a run for each seed.
template <class Make>
Row run_seeds(Runs& runs, const Training& s, const std::string& prefix, const std::string& name, const Task& task, const Make& make) {
    std::vector<double> accuracies;
    Row row{name, 0, 0, 0, 0};
    for (int i = 0; i < s.seeds; ++i) {
        const std::uint64_t seed = s.seed + static_cast<std::uint64_t>(i);
        std::ostringstream key;
        key << prefix << task.tokens << '/' << s.steps << " x " << s.batch << '/' << s.test << '/' << seed << '/' << name;
        const Outcome outcome = runs.get(key.str(), [&] { return train(name, s, task, seed, make); });
        accuracies.push_back(outcome.accuracy);
        row.accuracy += outcome.accuracy / s.seeds;
        row.seconds += outcome.seconds / s.seeds;
        row.megabytes += outcome.megabytes / s.seeds;
    }
    // Of the mean over seeds; with one seed, of the items.
    double squares = 0;
    for (const double accuracy : accuracies) squares += (accuracy - row.accuracy) * (accuracy - row.accuracy);
    row.error = s.seeds > 1 ? std::sqrt(squares / (s.seeds - 1) / s.seeds) : std::sqrt(row.accuracy * (100 - row.accuracy) / s.test);
    return row;
}

/// The SMAT score of AdaMRA (2021), section 5: speed + (1 - memory) + accuracy, each from 0 to 1 between the extremes of the table.
inline void print(const std::vector<Row>& rows) {
    if (rows.empty()) return;
    const auto normal = [&](auto&& of, double value) {
        double low = of(rows[0]), high = low;
        for (const Row& row : rows) low = std::min(low, of(row)), high = std::max(high, of(row));
        return high > low ? (value - low) / (high - low) : 0;
    };
    std::printf("\n| attention | %% right | +- | ms/step | MB | SMAT |\n|---|---|---|---|---|---|\n");
    for (const Row& row : rows) {
        const double smat = normal([](const Row& r) { return 1 / r.seconds; }, 1 / row.seconds) + 1 - normal([](const Row& r) { return r.megabytes; }, row.megabytes) +
                            normal([](const Row& r) { return r.accuracy; }, row.accuracy);
        std::printf("| %s | %.1f | %.1f | %.1f | %.0f | %.2f |\n", row.name.c_str(), row.accuracy, row.error, row.seconds * 1e3, row.megabytes, smat);
    }
}
