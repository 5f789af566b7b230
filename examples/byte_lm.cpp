// A byte-level language model trained with SSA, beside the same model trained densely:
//   byte_lm [TEXT] [--setting quick|full|tiny] [--folder FOLDER] [--seed N] [--only NAME] [--prompt TEXT] [--device cpu|cuda]
// Trains one decoder (ALiBi, GELU, pre-LN, Adam) in many ways on the first nine tenths of every tenth of the text, compares them on the rest,
// draws loss curves, and writes a little. A run that was stopped goes on from its last checkpoint in FOLDER. With --device cuda the trained models'
// dense passes, evaluation and writing, run on the GPU.
#include "chart.hpp"
#include "device.hpp"
#include "program.hpp"

#include <polyattn/analysis/sampling.hpp>
#include <polyattn/nn/language_model.hpp>
#include <polyattn/nn/optimizer.hpp>
#include <polyattn/nn/safetensors.hpp>
#include <polyattn/nn/subsampling.hpp>
#include <polyattn/polyattn.hpp>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>

#if !defined(POLYATTN_DOCUMENTS)
#define POLYATTN_DOCUMENTS "."
#endif

using namespace polyattn;
namespace fs = std::filesystem;

namespace {

using Decoder = nn::LanguageModel<float, Attention<Causal, Alibi>>;

struct Settings {
    std::string name = "quick", text, only, prompt = "The ", device = "cpu";
    fs::path folder = "byte_lm_runs";
    std::uint64_t seed = 1;
    index_t dim = 96, layers = 4, heads = 4, length = 256, batch = 6;
    std::int64_t steps = 260;
    double rate = 2e-3, dropout = .1;
    index_t windows_tested = 12;
    int samples = 16;

    void use(const std::string& setting) {
        name = setting;
        if (setting == "full") {
            dim = 256;
            layers = 4;
            length = 1024;
            batch = 2;
            steps = 300;
            rate = 1e-3;
            windows_tested = 16;
        } else if (setting == "tiny") {  // for the tests: everything, once
            dim = 32;
            layers = 2;
            length = 64;
            batch = 2;
            steps = 10;
            windows_tested = 2;
            samples = 4;
        } else if (setting != "quick") throw std::runtime_error("--setting is quick, full or tiny");
    }
};

Settings parse(int argc, char** argv) {
    Settings settings;
    for (int i = 1; i < argc; ++i) {
        const std::string argument = argv[i];
        const auto value = [&] {
            if (i + 1 == argc) throw std::runtime_error(argument + " needs a value");
            return std::string(argv[++i]);
        };
        if (argument == "--setting") settings.use(value());
        else if (argument == "--folder") settings.folder = value();
        else if (argument == "--seed") settings.seed = number_of<std::uint64_t>(argument, value(), 0);
        else if (argument == "--only") settings.only = value();
        else if (argument == "--prompt") settings.prompt = value();
        else if (argument == "--device") settings.device = value();
        else if (argument.starts_with("--")) throw std::runtime_error("unknown option " + argument);
        else if (!settings.text.empty()) throw std::runtime_error("one text is wanted, not " + settings.text + " and " + argument);
        else settings.text = argument;
    }
    if (settings.prompt.empty()) throw std::runtime_error("--prompt must have at least one byte");
    if (settings.device != "cpu" && settings.device != "cuda") throw std::runtime_error("--device is cpu or cuda");
#if !defined(POLYATTN_EXAMPLES_CUDA)
    if (settings.device == "cuda") throw std::runtime_error("this build has no CUDA: nvcc was not found");
#endif
    return settings;
}

// --- text ---

std::string read(const fs::path& path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) throw std::runtime_error("can't read " + path.string());
    return {std::istreambuf_iterator<char>(in), {}};
}

/// This project's own documents and sources: some hundred kilobytes of English and C++.
std::string own_sources() {
    std::vector<fs::path> files;
    for (const char* folder : {"docs", "include", "examples", "tests", "bench"})
        for (const auto& entry : fs::recursive_directory_iterator(fs::path(POLYATTN_DOCUMENTS) / folder))
            if (const auto kind = entry.path().extension(); kind == ".md" || kind == ".hpp" || kind == ".cpp") files.push_back(entry.path());
    std::sort(files.begin(), files.end());
    std::string text;
    for (const auto& file : files) text += read(file);
    return text;
}

/// The last tenth of every tenth is held out.
struct Corpus {
    std::vector<index_t> training, held_out;
    std::string mark;  // of this text: its size and a hash
    explicit Corpus(const std::string& text) {
        if (text.size() < 20000) throw std::runtime_error("a text of at least 20,000 bytes is wanted");
        std::uint64_t hash = 14695981039346656037u;  // FNV-1a
        for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
        mark = std::to_string(text.size()) + " bytes, " + std::to_string(hash);
        for (std::size_t i = 0; i < text.size(); ++i) (i * 100 / text.size() % 10 == 9 ? held_out : training).push_back(static_cast<unsigned char>(text[i]));
    }
};

// --- methods ---

struct Method {
    std::string name;
    nn::PlanSource plans;  // empty: dense
    double compute = 1;    // multiplications relative to dense training
};

std::vector<Method> methods(const Settings& s) {
    const OverDepth sigma = linear(.05, .25, s.layers);
    std::vector<Method> all{{"dense", {}, 1}};
    const auto add = [&]<int L>(std::integral_constant<int, L>, const std::string& name, const OverDepth& spread, index_t sampled) {
        all.push_back({name, nn::subsampled(Causal{}, LocallyBiased<L>{spread}, nn::LayerRange::last_of(sampled, s.layers)), relative_compute(s.layers, sampled, L, s.length, s.dim)});
    };
    const auto windows = [&](auto l) {
        add(l, "SSA-L" + std::to_string(int(l)), sigma, s.layers);
        add(l, "SSA-L" + std::to_string(int(l)) + ", last half", sigma, s.layers / 2);
    };
    windows(std::integral_constant<int, 2>{});
    windows(std::integral_constant<int, 4>{});
    windows(std::integral_constant<int, 6>{});
    windows(std::integral_constant<int, 8>{});
    add(std::integral_constant<int, 2>{}, "unbiased 50 %", infinite_sigma, s.layers);
    add(std::integral_constant<int, 4>{}, "unbiased 25 %", infinite_sigma, s.layers);
    return all;
}

// --- training ---

struct Model {
    Decoder decoder;
    nn::AdamW<float> optimizer;
    std::vector<double> losses;  // nats, by step
    double seconds = 0, megabytes = 0;

    explicit Model(const Settings& s)
        : decoder(Attention<Causal, Alibi>{Alibi(s.heads)}, 256, {.layers = s.layers, .dim = s.dim, .heads = s.heads, .dropout = s.dropout, .seed = s.seed}) {
        optimizer.weight_decay = .01;
    }
    fs::path file(const Settings& s, const std::string& name) const { return s.folder / (s.name + "-" + std::to_string(s.seed) + "-" + name + ".safetensors"); }

    void save(const Settings& s, const Corpus& corpus, const std::string& name) {
        auto state = nn::parameters_of(decoder, &optimizer);
        std::ostringstream text;
        text.precision(17);
        for (const double loss : losses) text << loss << " ";
        state.metadata["text"] = corpus.mark;
        state.metadata["losses"] = text.str();
        state.metadata["seconds"] = std::to_string(seconds);
        state.metadata["megabytes"] = std::to_string(megabytes);
        state.write(file(s, name));
    }
    bool load(const Settings& s, const Corpus& corpus, const std::string& name) {
        if (!fs::exists(file(s, name))) return false;
        const auto state = nn::TensorFile<float>::read(file(s, name));
        if (const auto text = state.metadata.find("text"); text == state.metadata.end() || text->second != corpus.mark)
            throw std::runtime_error(file(s, name).string() + " was trained on another text: remove it, or give another --folder");
        nn::load_parameters(decoder, state, &optimizer);
        std::istringstream text(state.metadata.at("losses"));
        losses.assign(std::istream_iterator<double>(text), {});
        seconds = std::stod(state.metadata.at("seconds"));
        megabytes = std::stod(state.metadata.at("megabytes"));
        return true;
    }

    /// Up to step `last`, with a checkpoint on the way and at the end.
    void train(const Settings& s, const Corpus& corpus, const std::string& name, const nn::PlanSource& plans, std::int64_t last) {
        if (optimizer.steps >= last) return;
        const nn::LearningRate rate{.peak = s.rate, .last = s.rate / 10, .warmup = s.steps / 10, .steps = s.steps};
        typename Decoder::Saved saved;
        Workspace workspace;
        const double held = reset_peak();
        const double start = now(), before = seconds;
        const std::int64_t first = optimizer.steps;
        std::vector<index_t> text, targets;
        while (optimizer.steps < last) {
            const auto step = static_cast<std::uint32_t>(optimizer.steps);
            RandomRow random(s.seed, step, 1000);  // where the pieces of a step's batch begin: the same for all methods
            text.clear();
            targets.clear();
            for (index_t b = 0; b < s.batch; ++b) {
                const auto from = corpus.training.begin() + random.below(static_cast<std::uint32_t>(corpus.training.size() - static_cast<std::size_t>(s.length) - 1));
                text.insert(text.end(), from, from + s.length);
                targets.insert(targets.end(), from + 1, from + 1 + s.length);
            }
            losses.push_back(decoder.train(text, targets, s.batch, saved, {.workspace = &workspace, .draw = {.seed = s.seed, .step = step}, .training = true, .plans = plans}));
            nn::clip_gradients(decoder, 1);
            optimizer.step(decoder, rate.at(step));
            const double spent = now() - start;
            seconds = before + spent;
            megabytes = std::max(megabytes, peak_megabytes() - held);
            const double per_step = spent / double(optimizer.steps - first);
            std::printf("\r%-22s step %lld/%lld  loss %.3f  %.3f bits per byte  %.0f tokens/s  left %s   ", name.c_str(), static_cast<long long>(optimizer.steps), static_cast<long long>(s.steps),
                        losses.back(), losses.back() / std::numbers::ln2, double(s.batch) * s.length / per_step, clock_text(per_step * double(s.steps - optimizer.steps)).c_str());
            std::fflush(stdout);
            if (optimizer.steps % 200 == 0) save(s, corpus, name);
        }
        save(s, corpus, name);
        std::printf("\n");
    }
};

// --- evaluation ---

/// Logits of a text, dense, on the device of the settings.
class DensePass {
public:
    DensePass(const Settings& s, Decoder& decoder) : decoder_(decoder) {
#if defined(POLYATTN_EXAMPLES_CUDA)
        if (s.device != "cuda") return;
        std::vector<device::Parameter> parameters;
        decoder.for_each_parameter([&](const nn::Parameter<float>& p) { parameters.push_back({p.name, {p.value.shape.begin(), p.value.shape.end()}, {p.value.values.begin(), p.value.values.end()}}); });
        on_device_ = std::make_unique<device::Decoder>(parameters, s.heads);
#else
        (void)s;
#endif
    }
    /// [text, 256], to be changed at will until the next call.
    MatrixView<float> operator()(std::span<const index_t> text) {
#if defined(POLYATTN_EXAMPLES_CUDA)
        if (on_device_) {
            logits_ = on_device_->logits({text.begin(), text.end()});
            return {logits_.data(), static_cast<index_t>(text.size()), 256, 256, 1};
        }
#endif
        return decoder_.forward(text, 1, saved_, {.workspace = &workspace_});
    }

private:
    Decoder& decoder_;
    typename Decoder::Saved saved_;
    Workspace workspace_;
#if defined(POLYATTN_EXAMPLES_CUDA)
    std::unique_ptr<device::Decoder> on_device_;
    std::vector<float> logits_;
#endif
};

/// Bits per byte of the held-out text, by windows that overlap by half: of the mean probability over 1, 2, 4, .. `samples` draws.
std::vector<double> bits_per_byte(const Settings& s, Decoder& decoder, const Corpus& corpus, const nn::PlanSource& plans, int samples) {
    typename Decoder::Saved saved;
    Workspace workspace;
    DensePass dense(s, decoder);
    std::vector<double> bits;
    double counted = 0;
    index_t windows = 0;
    nn::sliding_windows(static_cast<offset_t>(corpus.held_out.size()) - 1, s.length, s.length / 2, [&](offset_t first, offset_t last, offset_t from) {
        if (windows++ >= s.windows_tested) return;
        const std::span<const index_t> text(corpus.held_out.data() + first, static_cast<std::size_t>(last - first));
        nn::SelfEnsemble ensemble;
        std::size_t at = 0;
        for (int sample = 0; sample < samples; ++sample) {
            const MatrixView<float> p = plans ? decoder.forward(text, 1, saved, {.workspace = &workspace, .draw = {.seed = s.seed, .step = static_cast<std::uint32_t>(windows), .sample = static_cast<std::uint32_t>(sample)}, .plans = plans})
                                              : dense(text);
            nn::softmax_rows(p);
            ensemble.add(std::span<const float>(p.data, text.size() * 256));
            if (std::has_single_bit(static_cast<unsigned>(sample + 1))) {
                if (at == bits.size()) bits.push_back(0);
                for (offset_t i = from; i < last; ++i)
                    bits[at] -= std::log2(ensemble.mean()[static_cast<std::size_t>((i - first) * 256 + corpus.held_out[static_cast<std::size_t>(i + 1)])]);
                ++at;
            }
        }
        counted += double(last - from);
    });
    for (double& sum : bits) sum /= counted;
    return bits;
}

std::string write_text(const Settings& s, Decoder& decoder, index_t bytes) {
    DensePass dense(s, decoder);
    std::vector<index_t> text;
    for (const char c : s.prompt) text.push_back(static_cast<unsigned char>(c));
    RandomRow random(s.seed, 0, 1001);
    for (index_t i = 0; i < bytes; ++i) {
        const std::size_t length = std::min<std::size_t>(text.size(), static_cast<std::size_t>(s.length));
        const MatrixView<float> p = dense(std::span<const index_t>(text).last(length));
        MatrixView<float> last{p.row(p.rows - 1), 1, 256, 256, 1};
        for (index_t c = 0; c < 256; ++c) last(0, c) /= .8f;  // temperature
        nn::softmax_rows(last);
        double left = random.next() * 0x1p-32;
        index_t next = 0;
        while (next < 255 && (left -= double(last(0, next))) > 0) ++next;
        text.push_back(next);
    }
    std::string written;
    for (const index_t byte : text) written += byte < 32 && byte != '\n' && byte != '\t' ? '?' : static_cast<char>(byte);
    return written;
}

// --- the comparison ---

struct Row {
    std::string name;
    double training, dense, compute, seconds, megabytes;
    std::vector<double> sampled;
};

int run(const Settings& s) {
    const Corpus corpus(s.text.empty() ? own_sources() : read(s.text));
    fs::create_directories(s.folder);
    {
        Model model(s);
        std::cout << describe() << "\n" << (s.text.empty() ? "polyattn's own documents and sources" : s.text) << ": " << corpus.training.size() << " bytes to train on, " << corpus.held_out.size()
                  << " held out; " << nn::parameter_count(model.decoder) << " parameters, " << s.layers << " layers of " << s.dim << ", " << s.steps << " steps of " << s.batch << " x " << s.length
                  << " bytes, seed " << s.seed << "\n";
#if defined(POLYATTN_EXAMPLES_CUDA)
        if (s.device == "cuda") std::cout << "Dense evaluation and writing on " << device::name() << "\n";
#endif
    }
    const auto all = methods(s);
    if (!s.only.empty() && std::none_of(all.begin(), all.end(), [&](const Method& m) { return m.name == s.only; })) {
        std::string names;
        for (const Method& m : all) names += (names.empty() ? "" : "; ") + m.name;
        throw std::runtime_error("--only must be one of: " + names);
    }
    const auto ensemble = std::find_if(all.begin(), all.end(), [](const Method& m) { return m.name == "SSA-L4"; })->plans;
    const nn::SubsampledTraining recipe{};
    const auto dense_from = static_cast<std::int64_t>((1 - recipe.fine_tuned) * double(s.steps));
    std::vector<Row> rows;
    std::vector<Curve> by_step, by_time, by_compute;
    std::string written;
    const auto finish = [&](const Method& method, const std::string& name, Model& model, double compute) {
        Row row{name, 0, 0, compute, model.seconds / double(s.steps), model.megabytes, {}};
        const std::size_t tail = std::max<std::size_t>(1, model.losses.size() / 10);
        for (std::size_t i = model.losses.size() - tail; i < model.losses.size(); ++i) row.training += model.losses[i] / double(tail) / std::numbers::ln2;
        row.dense = bits_per_byte(s, model.decoder, corpus, {}, 1).at(0);
        row.sampled = bits_per_byte(s, model.decoder, corpus, method.plans ? method.plans : ensemble, s.samples);
        rows.push_back(row);
        Curve curve{name, {}};
        const std::size_t smooth = std::max<std::size_t>(1, model.losses.size() / 60);
        for (std::size_t i = 0; i + smooth <= model.losses.size(); i += smooth) {
            double mean = 0;
            for (std::size_t k = i; k < i + smooth; ++k) mean += model.losses[k] / double(smooth) / std::numbers::ln2;
            curve.points.emplace_back(double(i + smooth), mean);
        }
        by_step.push_back(curve);
        for (auto& [x, y] : curve.points) x *= row.seconds;
        by_time.push_back(curve);
        for (auto& [x, y] : curve.points) x *= compute / row.seconds;
        by_compute.push_back(curve);
    };
    for (const Method& method : all) {
        if (!s.only.empty() && s.only != method.name) continue;
        Model model(s);
        const std::string branch = method.name + " (last tenth dense)";
        // Before the last tenth the two ways of going on part.
        if (!model.load(s, corpus, method.name)) model.save(s, corpus, method.name);
        if (method.plans && model.optimizer.steps < dense_from) model.train(s, corpus, method.name, method.plans, dense_from);
        if (method.plans && model.optimizer.steps == dense_from && !fs::exists(model.file(s, branch))) model.save(s, corpus, branch);
        model.train(s, corpus, method.name, method.plans, s.steps);
        finish(method, method.name, model, method.compute);
        if (!method.plans) written = write_text(s, model.decoder, s.name == "tiny" ? 20 : 300);
        if (method.plans && model.load(s, corpus, branch)) {
            model.train(s, corpus, branch, {}, s.steps);
            finish(method, method.name + " + fine-tuning", model, (1 - recipe.fine_tuned) * method.compute + recipe.fine_tuned);
        }
    }

    std::printf("\n| bits per byte | training | held out, dense | sampled x 1 |");
    for (int k = 2; k <= s.samples; k *= 2) std::printf(" x %d |", k);
    std::printf(" s/step | peak MB | compute |\n|---|---|---|---|");
    for (int k = 2; k <= s.samples; k *= 2) std::printf("---|");
    std::printf("---|---|---|\n");
    for (const Row& row : rows) {
        std::printf("| %s | %.3f | %.3f |", row.name.c_str(), row.training, row.dense);
        for (const double bits : row.sampled) std::printf(" %.3f |", bits);
        std::printf(" %.3f | %.0f | %.3f |\n", row.seconds, row.megabytes, row.compute);
    }
    std::printf("\n\"sampled x S\" is the mean probability of S passes with fresh draws (for the dense model: those of SSA-L4). Memory: of a step, beside the parameters.\n");
    write_chart((s.folder / "loss_by_step.svg").string(), "step", "training bits per byte", by_step);
    write_chart((s.folder / "loss_by_time.svg").string(), "seconds", "training bits per byte", by_time);
    write_chart((s.folder / "loss_by_compute.svg").string(), "multiplications, dense steps", "training bits per byte", by_compute);
    std::cout << "Curves: " << (s.folder / "loss_by_{step,time,compute}.svg").string() << "\n";
    if (!written.empty()) std::cout << "\nThe dense model goes on:\n" << written << "\n";
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        return run(parse(argc, argv));
    } catch (const std::exception& error) {
        std::cerr << "byte_lm: " << error.what() << "\n";
        return 1;
    }
}
