// SSA on pictures: 1,797 handwritten digits of 8 x 8 pixels, a token a pixel.
//   image_ssa [--steps N] [--held-out N] [--folder FOLDER] [--seed N]
// Classifies with shifted windows of 4 x 4 pixels, whole or cut into four sub-windows that share out their pixels at random; and draws digits
// pixel by pixel, with causal windows of rows. Held-out accuracy and bits a pixel, single passes and ensembles; FOLDER/digits.png shows what
// was drawn.
#include "digits.hpp"
#include "png.hpp"
#include "program.hpp"

#include <polyattn/nn/classifier.hpp>
#include <polyattn/nn/language_model.hpp>
#include <polyattn/nn/optimizer.hpp>
#include <polyattn/nn/subsampling.hpp>
#include <polyattn/polyattn.hpp>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>

using namespace polyattn;
namespace fs = std::filesystem;

namespace {

constexpr index_t side = 8, pixels = side * side, greys = 17, classes = 10;

struct Settings {
    std::size_t held_out = 400;  // digits, at most
    std::int64_t steps = 300;
    index_t batch = 48;
    std::uint64_t seed = 1;
    fs::path folder = ".";
    nn::TransformerOptions model{.layers = 4, .dim = 64, .heads = 4, .dropout = .1, .deviation = .12};
};

/// Trains any model: loss(numbers of the batch's digits, pass) does forward and backward. Returns seconds a step.
template <class Model, class Loss>
double train(const Settings& s, const std::string& name, Model& model, const Digits& digits, const nn::SubsampledTraining& recipe, Loss&& loss) {
    nn::AdamW<float> optimizer;
    optimizer.weight_decay = .01;
    const nn::LearningRate rate{.peak = 2e-3, .last = 1e-4, .warmup = s.steps / 10, .steps = s.steps};
    Workspace workspace;
    const double start = now();
    for (std::int64_t step = 0; step < s.steps; ++step) {
        RandomRow random(s.seed, static_cast<std::uint32_t>(step), 1000);
        std::vector<std::size_t> numbers;
        for (index_t b = 0; b < s.batch; ++b) numbers.push_back(random.below(static_cast<std::uint32_t>(digits.count())));
        const double nats = loss(numbers, nn::Pass{.workspace = &workspace, .draw = {.seed = s.seed, .step = static_cast<std::uint32_t>(step)}, .training = true, .plans = recipe.at(step, s.steps)});
        nn::clip_gradients(model, 1);
        optimizer.step(model, rate.at(step));
        const double spent = now() - start;
        std::printf("\r%-44s step %lld/%lld  loss %.3f  %.0f pictures/s   ", name.c_str(), static_cast<long long>(step + 1), static_cast<long long>(s.steps), nats, double((step + 1) * s.batch) / spent);
        std::fflush(stdout);
    }
    std::printf("\n");
    return (now() - start) / double(s.steps);
}

/// All held-out digits in batches: f(first, count) .
template <class F>
void in_batches(const Digits& digits, F&& f) {
    for (std::size_t first = 0; first < digits.count(); first += 60) f(first, std::min<std::size_t>(60, digits.count() - first));
}

// --- classification ---

/// Swin's windows, shifted by half in every second layer; the sampler cuts each into four sub-windows.
nn::PlanSource swin_windows(bool sampled) {
    return [=](const nn::LayerCall& call) -> std::vector<Plan> {
        const index_t shift = call.layer % 2 == 0 ? 0 : 2;
        if (sampled) return {Grid2D{.height = side, .width = side, .window = 4, .shift = shift, .sigma = .75}.sample(call.tokens, call.tokens, call.draw, false)};
        return {ShiftedWindows2D{.height = side, .width = side, .window = 4, .shift = shift}.plan(call.tokens, call.tokens)};
    };
}

void classify(const Settings& s, const Digits& training, const Digits& held_out) {
    using Model = nn::Classifier<float, Attention<>>;
    std::vector<std::string> table;
    const auto run = [&](const std::string& name, const nn::SubsampledTraining& recipe, const nn::PlanSource& dense, const nn::PlanSource& sampled) {
        Model model(Attention<>{}, greys, classes, s.model, pixels);
        typename Model::Saved saved;
        std::vector<index_t> tokens, labels;
        const double seconds = train(s, name, model, training, recipe, [&](const auto& numbers, nn::Pass pass) {
            if (!pass.plans) pass.plans = dense;
            tokens.clear();
            labels.clear();
            for (const std::size_t i : numbers) {
                tokens.insert(tokens.end(), training.picture(i).begin(), training.picture(i).end());
                labels.push_back(training.labels[i]);
            }
            const double loss = nn::cross_entropy(model.forward(tokens, s.batch, saved, pass), labels);
            model.backward(saved, pass);
            return loss;
        });
        Workspace workspace;
        const auto accuracy = [&](const nn::PlanSource& plans, int samples) {
            std::size_t right = 0;
            in_batches(held_out, [&](std::size_t first, std::size_t count) {
                nn::SelfEnsemble ensemble;
                for (int sample = 0; sample < samples; ++sample) {
                    nn::softmax_rows(model.forward(std::span<const index_t>(held_out.pixels).subspan(first * pixels, count * pixels), static_cast<index_t>(count), saved,
                                                   {.workspace = &workspace, .draw = {.seed = s.seed, .sample = static_cast<std::uint32_t>(sample)}, .plans = plans}));
                    ensemble.add(std::span<const float>(saved.outputs.values));
                }
                for (std::size_t i = 0; i < count; ++i) {
                    const auto row = ensemble.mean().subspan(i * classes, classes);
                    right += std::max_element(row.begin(), row.end()) - row.begin() == held_out.labels[first + i];
                }
            });
            return 100 * double(right) / double(held_out.count());
        };
        char line[200];
        std::snprintf(line, sizeof line, "| %s | %.1f | %.1f | %.1f | %.3f |", name.c_str(), accuracy(dense, 1), accuracy(sampled, 1), accuracy(sampled, 16), seconds);
        table.push_back(line);
    };
    const nn::PlanSource windows = swin_windows(false), sub_windows = swin_windows(true), half = nn::subsampled(Dense{}, Unbiased{.drop = .5});
    run("all pixels", {}, {}, half);
    run("all pixels, unbiased 50 %, last tenth without", {half, .1}, {}, half);
    run("shifted windows", {}, windows, sub_windows);
    run("shifted windows, SSA sub-windows", {sub_windows, 0}, windows, sub_windows);
    run("the same, last tenth without sampling", {sub_windows, .1}, windows, sub_windows);
    std::printf("\n| classification, held out, %% right | not sampled | sampled x 1 | x 16 | s/step |\n|---|---|---|---|---|\n");
    for (const std::string& line : table) std::printf("%s\n", line.c_str());
    std::printf("\n");
}

// --- generation ---

/// Inputs: the class, then all pixels but the last; targets: the pixels.
struct Sequence {
    std::vector<index_t> inputs, targets;
    void add(index_t label, std::span<const index_t> picture) {
        inputs.push_back(greys + label);
        inputs.insert(inputs.end(), picture.begin(), picture.end() - 1);
        targets.insert(targets.end(), picture.begin(), picture.end());
    }
};

struct Generated {
    std::string line;
    std::vector<std::vector<index_t>> pictures;  // one a class and turn
};

template <class Layer>
Generated generate(const Settings& s, const std::string& name, const Layer& layer, const nn::SubsampledTraining& recipe, const nn::PlanSource& sampled, const Digits& training, const Digits& held_out) {
    using Model = nn::LanguageModel<float, Layer>;
    Model model(layer, greys + classes, s.model, pixels);
    typename Model::Saved saved;
    const double seconds = train(s, name, model, training, recipe, [&](const auto& numbers, const nn::Pass& pass) {
        Sequence batch;
        for (const std::size_t i : numbers) batch.add(training.labels[i], training.picture(i));
        return model.train(batch.inputs, batch.targets, s.batch, saved, pass);
    });
    Workspace workspace;
    const auto bits = [&](const nn::PlanSource& plans, int samples) {
        double sum = 0;
        in_batches(held_out, [&](std::size_t first, std::size_t count) {
            Sequence batch;
            for (std::size_t i = first; i < first + count; ++i) batch.add(held_out.labels[i], held_out.picture(i));
            nn::SelfEnsemble ensemble;
            for (int sample = 0; sample < samples; ++sample) {
                nn::softmax_rows(model.forward(batch.inputs, static_cast<index_t>(count), saved, {.workspace = &workspace, .draw = {.seed = s.seed, .sample = static_cast<std::uint32_t>(sample)}, .plans = plans}));
                ensemble.add(std::span<const float>(saved.logits.values));
            }
            for (std::size_t i = 0; i < batch.targets.size(); ++i) sum -= std::log2(ensemble.mean()[i * (greys + classes) + static_cast<std::size_t>(batch.targets[i])]);
        });
        return sum / double(held_out.pixels.size());
    };
    Generated result;
    char line[200];
    if (sampled) std::snprintf(line, sizeof line, "| %s | %.3f | %.3f | %.3f | %.3f |", name.c_str(), bits({}, 1), bits(sampled, 1), bits(sampled, 8), seconds);
    else std::snprintf(line, sizeof line, "| %s | %.3f | | | %.3f |", name.c_str(), bits({}, 1), seconds);
    result.line = line;
    // Two digits of each class, all at once, pixel by pixel.
    Sequence batch;
    const std::vector<index_t> blank(pixels, 0);
    for (index_t digit = 0; digit < 2 * classes; ++digit) batch.add(digit / 2, blank);
    RandomRow random(s.seed, 0, 1001);
    for (index_t at = 0; at < pixels; ++at) {
        const MatrixView<float> p = model.forward(batch.inputs, 2 * classes, saved, {.workspace = &workspace});
        nn::softmax_rows(p);
        for (index_t digit = 0; digit < 2 * classes; ++digit) {
            double left = random.next() * 0x1p-32;
            index_t grey = 0;
            while (grey < greys - 1 && (left -= double(p(digit * pixels + at, grey))) > 0) ++grey;
            batch.targets[static_cast<std::size_t>(digit * pixels + at)] = grey;
            if (at + 1 < pixels) batch.inputs[static_cast<std::size_t>(digit * pixels + at + 1)] = grey;
        }
    }
    for (index_t digit = 0; digit < 2 * classes; ++digit) result.pictures.emplace_back(batch.targets.begin() + digit * pixels, batch.targets.begin() + (digit + 1) * pixels);
    return result;
}

/// A line of digits for each method, enlarged.
void write_digits(const std::string& path, const std::vector<Generated>& all) {
    const index_t times = 4, cell = side + 1;
    Picture picture{2 * classes * cell * times, static_cast<index_t>(all.size()) * cell * times, {}};
    for (index_t y = 0; y < picture.height; ++y)
        for (index_t x = 0; x < picture.width; ++x) {
            const index_t row = y / times, column = x / times;
            const auto& digit = all[static_cast<std::size_t>(row / cell)].pictures[static_cast<std::size_t>(column / cell)];
            const bool inside = row % cell < side && column % cell < side;
            picture.pixels.push_back(static_cast<std::uint8_t>(255 - (inside ? digit[static_cast<std::size_t>(row % cell * side + column % cell)] * 255 / 16 : 0)));
        }
    write_png(path, picture);
}

int run(const Settings& s) {
    auto [training, held_out] = read_digits();
    held_out.keep(s.held_out);
    fs::create_directories(s.folder);
    std::cout << describe() << "\n" << training.count() << " digits to train on, " << held_out.count() << " held out; " << s.steps << " steps of " << s.batch << ", seed " << s.seed << "\n";
    classify(s, training, held_out);

    const auto rows = [](index_t windows) { return nn::subsampled(Causal{}, Grid2D{.height = side, .width = side, .row_windows = windows, .sigma = .25}); };
    std::vector<Generated> all;
    const Attention<Causal> causal;
    all.push_back(generate(s, "causal", causal, {}, rows(4), training, held_out));
    all.push_back(generate(s, "SSA, 2 windows of rows", causal, {rows(2), 0}, rows(2), training, held_out));
    all.push_back(generate(s, "SSA, 4 windows of rows", causal, {rows(4), 0}, rows(4), training, held_out));
    all.push_back(generate(s, "the same, last tenth dense", causal, {rows(4), .1}, rows(4), training, held_out));
    const Attention diffuser{Intersection{Causal{}, LocalGlobalRandom{.window = 16, .globals = 4, .randoms = 8}}, PPR<3>{}};
    all.push_back(generate(s, "causal local + global + random, PPR<3>", diffuser, {}, {}, training, held_out));
    std::printf("\n| generation, held out, bits a pixel | dense | sampled x 1 | x 8 | s/step |\n|---|---|---|---|---|\n");
    for (const Generated& row : all) std::printf("%s\n", row.line.c_str());
    const std::string path = (s.folder / "digits.png").string();
    write_digits(path, all);
    std::cout << "\nDrawn digits, a line a method: " << path << "\n";
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    Settings settings;
    return run_program(
        "image_ssa", argc, argv,
        [&](const std::string& option, const std::string& value) {
            if (option == "--steps") settings.steps = number_of<std::int32_t>(option, value, 1);
            else if (option == "--folder") settings.folder = value;
            else if (option == "--held-out") settings.held_out = number_of<std::uint32_t>(option, value, 1);
            else if (option == "--seed") settings.seed = settings.model.seed = number_of<std::uint64_t>(option, value, 0);
            else return false;
            return true;
        },
        [&] { return run(settings); });
}
