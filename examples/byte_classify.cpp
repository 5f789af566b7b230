// Text classification byte by byte, on what is there: which language a passage comes from, C, C++, CMake, Perl or English (licences), or folders
// of your own; and retrieval: do two passages come from one source? There both passages go through one encoder, which learns to classify for
// --pretrain steps first (as many as --steps, if not said).
//   byte_classify [--task classify|retrieve] [--tokens N] [--sources NAME=FOLDER,NAME=FOLDER..] [--steps N] [--pretrain N] [--seeds N] [--test N]
//                 [--batch N] [--folder FOLDER] [--seed N]
// Every fifth file is held out. Two-layer models with several kinds of attention; one table, as listops prints it.
#include "attention_zoo.hpp"
#include "experiment.hpp"

#include <fstream>

namespace {

namespace fs = std::filesystem;

constexpr std::uint32_t passage_stream = 2005;

/// The texts of one source, held-out files apart.
struct Source {
    std::string name;
    std::array<std::vector<std::string>, 2> texts;
};

Source read_source(const std::string& name, const std::vector<std::string>& folders, const std::vector<std::string>& endings, std::size_t least) {
    Source source{name, {}};
    std::vector<fs::path> paths;
    for (const std::string& folder : folders)
        if (fs::is_directory(folder))
            for (const auto& entry : fs::recursive_directory_iterator(folder, fs::directory_options::skip_permission_denied))
                if (entry.is_regular_file() && entry.file_size() >= least && entry.file_size() < 4000000) {
                    const std::string ending = entry.path().extension().string();
                    if (endings.empty() || std::find(endings.begin(), endings.end(), ending) != endings.end()) paths.push_back(entry.path());
                }
    std::sort(paths.begin(), paths.end());
    for (std::size_t i = 0; i < paths.size() && i < 2000; ++i) {
        std::ifstream file(paths[i], std::ios::binary);
        source.texts[i % 5 == 4].emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }
    return source;
}

/// What a Debian machine with a compiler and CMake has, or folders that were named.
std::vector<Source> read_sources(const std::string& named, index_t tokens) {
    const auto least = static_cast<std::size_t>(tokens);
    std::vector<Source> sources;
    if (!named.empty()) {
        std::istringstream list(named);
        for (std::string part; std::getline(list, part, ',');) {
            const auto equals = part.find('=');
            if (equals == std::string::npos) throw std::runtime_error("--sources must be NAME=FOLDER,NAME=FOLDER..");
            const std::string folder = part.substr(equals + 1);
            if (!fs::is_directory(folder)) throw std::runtime_error("--sources: there is no folder " + folder);
            sources.push_back(read_source(part.substr(0, equals), {folder}, {}, least));
            if (sources.back().texts[1].empty()) throw std::runtime_error("--sources: " + folder + " has fewer than five files of " + std::to_string(tokens) + " bytes");
        }
    } else {
        sources.push_back(read_source("C", {"/usr/include/linux", "/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/include/asm-generic"}, {".h"}, least));
        sources.push_back(read_source("C++", {"/usr/include/c++", "/usr/include/xtensor", "/usr/include/xsimd"}, {"", ".h", ".hpp", ".tcc"}, least));
        sources.push_back(read_source("CMake", {"/usr/share/cmake-3.25/Modules", "/usr/share/cmake/Modules", "/usr/share/cmake-3.31/Modules"}, {".cmake"}, least));
        sources.push_back(read_source("Perl", {"/usr/share/perl", "/usr/lib/x86_64-linux-gnu/perl-base", "/usr/lib/aarch64-linux-gnu/perl-base"}, {".pm", ".pl"}, least));
        sources.push_back(read_source("English", {"/usr/share/common-licenses", "/usr/share/doc"}, {"", ".txt"}, least));
    }
    std::erase_if(sources, [](const Source& source) { return source.texts[0].empty() || source.texts[1].empty(); });
    if (sources.size() < 2) throw std::runtime_error("at least two sources with five files of " + std::to_string(tokens) + " bytes are wanted; name some with --sources");
    return sources;
}

struct Settings : Training {
    std::string task = "classify", sources;
    index_t tokens = 1024;
    std::int64_t pretrain = -1;  // as steps

    Settings() {
        folder = "byte_classify_runs";
        steps = 200;
        batch = 16;
        test = 1000;
    }
};

/// A passage of a source as bytes + 1; 0 is padding.
void append_passage(RandomRow& random, const Source& source, bool held_out, index_t tokens, std::vector<index_t>& to) {
    const std::vector<std::string>& texts = source.texts[held_out];
    const std::string& text = texts[random.below(static_cast<std::uint32_t>(texts.size()))];
    const std::size_t first = random.below(static_cast<std::uint32_t>(text.size() - static_cast<std::size_t>(tokens) + 1));
    for (std::size_t i = first; i < first + static_cast<std::size_t>(tokens); ++i) to.push_back(1 + static_cast<unsigned char>(text[i]));
}

Task make_task(const Settings& s, const std::string& task, std::shared_ptr<const std::vector<Source>> sources) {
    const auto count = static_cast<std::uint32_t>(sources->size());
    if (task == "classify")
        return {257, static_cast<index_t>(count), s.tokens, 0, [=, tokens = s.tokens](std::uint64_t seed, std::uint32_t number) {
                    RandomRow random(seed, number, passage_stream);
                    Item item{{}, static_cast<index_t>(random.below(count))};
                    append_passage(random, (*sources)[static_cast<std::size_t>(item.label)], number >> 31, tokens, item.tokens);
                    return item;
                }};
    if (task == "retrieve")  // two passages, one behind the other
        return {257, 2, 2 * s.tokens, 0, [=, tokens = s.tokens](std::uint64_t seed, std::uint32_t number) {
                    RandomRow random(seed, number, passage_stream);
                    Item item{{}, static_cast<index_t>(random.below(2))};
                    const std::uint32_t first = random.below(count), second = item.label ? first : (first + 1 + random.below(count - 1)) % count;
                    for (const std::uint32_t source : {first, second}) append_passage(random, (*sources)[source], number >> 31, tokens, item.tokens);
                    return item;
                }};
    throw std::runtime_error("--task must be classify or retrieve");
}

/// Two passages through one encoder, then a linear map of (u, v, u v) to two classes. Source: Tay et al., "Long Range Arena" (2021), retrieval.
template <class T, class AnyAttention>
class TwoTower {
public:
    TwoTower(const AnyAttention& attention, index_t vocabulary, const nn::TransformerOptions& options, index_t tokens)
        : tower(attention, vocabulary, features, options, tokens), head("pair", 3 * features, 2, .1, options.seed) {
        tower.head.weight.draw(.5, options.seed);  // products of small features would hardly learn
    }

    struct Saved {
        typename nn::Classifier<T, AnyAttention>::Saved tower;
        Tensor<T> pairs, d_pairs, logits;
    };

    MatrixView<T> forward(std::span<const index_t> tokens, index_t batch, Saved& saved, const nn::Pass& pass) const {
        nn::Pass single = pass;
        single.lengths.clear();  // passages fill their places
        const MatrixView<T> out = tower.forward(tokens, 2 * batch, saved.tower, single);
        detail::reshape(saved.pairs, {batch, 3 * features});
        detail::reshape(saved.logits, {batch, 2});
        for (index_t b = 0; b < batch; ++b)
            for (index_t c = 0; c < features; ++c) {
                T* const pair = detail::rows_of(saved.pairs).row(b);
                pair[c] = out(2 * b, c);
                pair[features + c] = out(2 * b + 1, c);
                pair[2 * features + c] = pair[c] * pair[features + c];
            }
        head.forward(detail::rows_of(std::as_const(saved.pairs)), detail::rows_of(saved.logits), *pass.workspace);
        return detail::rows_of(saved.logits);
    }
    /// From d_logits in place of the logits.
    void backward(Saved& saved, const nn::Pass& pass) {
        nn::Pass single = pass;
        single.lengths.clear();
        detail::reshape(saved.d_pairs, saved.pairs.shape);
        head.backward(detail::rows_of(std::as_const(saved.pairs)), detail::rows_of(std::as_const(saved.logits)), detail::rows_of(saved.d_pairs), false, *pass.workspace);
        const MatrixView<T> d_out = detail::rows_of(saved.tower.outputs);
        for (index_t b = 0; b < d_out.rows / 2; ++b)
            for (index_t c = 0; c < features; ++c) {
                const T *const pair = detail::rows_of(saved.pairs).row(b), *const d = detail::rows_of(saved.d_pairs).row(b);
                d_out(2 * b, c) = d[c] + d[2 * features + c] * pair[features + c];
                d_out(2 * b + 1, c) = d[features + c] + d[2 * features + c] * pair[c];
            }
        tower.backward(saved.tower, single);
    }
    template <class F>
    void for_each_parameter(F&& f) {
        tower.for_each_parameter(f);
        head.for_each_parameter(f);
    }

    static constexpr index_t features = 32;
    nn::Classifier<T, AnyAttention> tower;
    nn::Linear<T> head;
};

int run(const Settings& s) {
    const auto sources = std::make_shared<const std::vector<Source>>(read_sources(s.sources, s.tokens));
    const Task task = make_task(s, s.task, sources), passages = make_task(s, "classify", sources);
    s.announce(s.task, task);
    for (const Source& source : *sources) std::cout << source.name << ": " << source.texts[0].size() << " files to train on, " << source.texts[1].size() << " held out\n";
    Training first = s;
    if (s.pretrain >= 0) first.steps = s.pretrain;
    std::string key = s.task + '/' + (s.sources.empty() ? std::string() : s.sources + '/');
    if (s.task == "retrieve") key += std::to_string(first.steps) + " first/";
    Runs runs(s.folder);
    std::vector<Row> rows;
    const auto add = [&](const std::string& name, const auto& attention) {
        using AnyAttention = std::remove_cvref_t<decltype(attention)>;
        const auto classifier = [&](const nn::TransformerOptions& options) { return nn::Classifier<float, AnyAttention>(attention, passages.vocabulary, passages.classes, options, s.tokens); };
        const auto two_tower = [&](const nn::TransformerOptions& options) {
            TwoTower<float, AnyAttention> model(attention, task.vocabulary, options, s.tokens);
            if (first.steps > 0) train(name + ", classifying", first, passages, options.seed, classifier, [&](const auto& trained) { model.tower.encoder = trained.encoder; });
            return model;
        };
        const auto run_with = [&](auto&& make) { rows.push_back(run_seeds(runs, s, key, name, task, make)); };
        if (s.task == "classify") run_with(classifier);
        else run_with(two_tower);
    };
    for_each_pattern(ZooSizes::of(s.tokens), [&](const std::string& name, const Patterned& attention) {
        if (name != "sliding window" && !name.starts_with("without")) add(name, attention);
    });
    add("AdaMRA 1/2, 1/8, 1/32", MultiResolution<SegmentMeans<2, 8, 32>>{});
    print(rows);
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    Settings settings;
    return run_program(
        "byte_classify", argc, argv,
        [&](const std::string& option, const std::string& value) {
            if (option == "--task") settings.task = value;
            else if (option == "--sources") settings.sources = value;
            else if (option == "--tokens") settings.tokens = number_of(option, value, 1);
            else if (option == "--pretrain") settings.pretrain = number_of<std::int32_t>(option, value, 0);
            else return settings.set(option, value);
            return true;
        },
        [&] { return run(settings); });
}
