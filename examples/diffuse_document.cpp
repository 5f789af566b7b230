// What attention diffusion does to a real text: Diffuser's pattern and its five hops, on words embedded by their letters.
//   diffuse_document [FILE] [--word WORD] [--pictures FOLDER] [--device cpu|cuda]
#include "device.hpp"
#include "png.hpp"

#include <polyattn/analysis/receptive_field.hpp>
#include <polyattn/polyattn.hpp>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <unordered_map>

#include <unistd.h>

using namespace polyattn;

namespace {

constexpr index_t heads = 4, dim = 64;
using Heads = xt::xtensor<float, 3>;  // [heads, tokens, dim]

struct Settings {
    std::string file, word, pictures = ".", device = "cpu";
};

Settings parse(int argc, char** argv) {
    Settings settings;
    for (int i = 1; i < argc; ++i) {
        const std::string argument = argv[i];
        const auto value = [&] {
            if (i + 1 == argc) throw std::runtime_error(argument + " needs a value");
            return std::string(argv[++i]);
        };
        if (argument == "--word") settings.word = value();
        else if (argument == "--pictures") settings.pictures = value();
        else if (argument == "--device") settings.device = value();
        else if (argument.starts_with("--")) throw std::runtime_error("unknown option " + argument + "; diffuse_document [FILE] [--word WORD] [--pictures FOLDER] [--device cpu|cuda]");
        else if (!settings.file.empty()) throw std::runtime_error("one file is wanted, not " + settings.file + " and " + argument);
        else settings.file = argument;
    }
    if (settings.device != "cpu" && settings.device != "cuda") throw std::runtime_error("--device is cpu or cuda");
    return settings;
}

std::string read(const std::filesystem::path& path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) throw std::runtime_error("can't read " + path.string());
    return {std::istreambuf_iterator<char>(in), {}};
}

/// The file named, else a licence that every Debian system has, else this project's own documents.
std::string default_text(std::string& name) {
    name = "/usr/share/common-licenses/GPL-3";
    if (std::filesystem::exists(name)) return read(name);
    name = "polyattn's documents and headers";
    std::vector<std::filesystem::path> files;
    for (const char* folder : {"docs", "include"})
        for (const auto& entry : std::filesystem::recursive_directory_iterator(std::filesystem::path(POLYATTN_DOCUMENTS) / folder))
            if (entry.path().extension() == ".md" || entry.path().extension() == ".hpp") files.push_back(entry.path());
    std::sort(files.begin(), files.end());
    std::string text;
    for (const auto& file : files) text += read(file);
    return text;
}

/// Runs of letters and digits, in lower case where that is ASCII. Beyond ASCII everything is a letter but the punctuation of Latin-1
/// (U+0080 to U+00BF: C2 ..) and of U+2000 to U+206F (E2 80 .., E2 81 ..): dashes, quotes, wide spaces.
std::vector<std::string> words_of(const std::string& text) {
    std::vector<std::string> words;
    std::string word;
    const auto byte = [&](std::size_t at) { return at < text.size() ? static_cast<unsigned char>(text[at]) : 0; };
    for (std::size_t i = 0; i <= text.size(); ++i) {
        const std::size_t skipped = byte(i) == 0xc2 ? 1 : byte(i) == 0xe2 && (byte(i + 1) == 0x80 || byte(i + 1) == 0x81) ? 2 : 0;
        i += skipped;
        if (!skipped && byte(i) >= 128) word += text[i];
        else if (!skipped && std::isalnum(byte(i))) word += static_cast<char>(std::tolower(byte(i)));
        else if (!word.empty()) words.push_back(std::exchange(word, {}));
    }
    return words;
}

/// One line on the error stream, where that is a terminal, which the next one replaces: what is being done while it takes long.
void progress(const std::string& what) {
    static const bool terminal = isatty(STDERR_FILENO);
    if (terminal) std::cerr << "\r" << what << std::string(what.size() < 78 ? 78 - what.size() : 0, ' ') << "\r" << std::flush;
}

/// Each head adds up a fixed random vector for every run of 3 to 5 letters of " word ", so words that share letters are similar.
/// Rows have the length that makes a word's score with itself 5.
Heads embed(const std::vector<std::string>& words) {
    Heads x = Heads::from_shape({std::size_t{heads}, words.size(), std::size_t{dim}});
    std::unordered_map<std::string, std::vector<float>> known;
    for (std::size_t i = 0; i < words.size(); ++i) {
        auto& vector = known[words[i]];
        if (vector.empty()) {
            vector.assign(heads * dim, 0);
            const std::string padded = "^" + words[i] + "$";
            for (std::size_t length = 3; length <= 5; ++length)
                for (std::size_t at = 0; at + length <= std::max(padded.size(), length); ++at) {
                    std::uint32_t hash = 2166136261u;  // FNV-1a
                    for (const char c : padded.substr(at, length)) hash = (hash ^ static_cast<unsigned char>(c)) * 16777619u;
                    for (std::uint32_t c = 0; c < heads * dim; c += 4) {
                        const auto bits = philox({c / 4, hash, 0, 0}, {1, 2});
                        for (std::uint32_t l = 0; l < 4; ++l) vector[c + l] += static_cast<float>(bits[l]) / 2147483648.f - 1;
                    }
                }
            for (index_t h = 0; h < heads; ++h) {
                float square = 0;
                for (index_t c = 0; c < dim; ++c) square += vector[static_cast<std::size_t>(h * dim + c)] * vector[static_cast<std::size_t>(h * dim + c)];
                for (index_t c = 0; c < dim; ++c) vector[static_cast<std::size_t>(h * dim + c)] *= std::sqrt(5 * std::sqrt(float(dim)) / square);
            }
        }
        for (std::size_t h = 0; h < heads; ++h)
            for (std::size_t c = 0; c < dim; ++c) x(h, i, c) = vector[h * dim + c];
    }
    return x;
}

/// A word's weights on all words, mean over heads: with one column of values per word they would be a row of the output;
/// the gradient of a single output with respect to those values is the same row.
template <class Layer>
std::vector<float> row_of(const Layer& attention, const Heads& x, std::size_t word) {
    const Heads ones = xt::ones<float>({std::size_t{heads}, x.shape(1), std::size_t{1}});
    Heads d_out = xt::zeros<float>(ones.shape());
    for (std::size_t h = 0; h < heads; ++h) d_out(h, word, 0) = 1.f / heads;
    const auto saved = attention.forward(x, x, ones).saved;
    const Heads d_v = attention.backward(saved, d_out).v;
    std::vector<float> row(x.shape(1), 0);
    for (std::size_t h = 0; h < heads; ++h)
        for (std::size_t j = 0; j < row.size(); ++j) row[j] += d_v(h, j, 0);
    return row;
}

void print_row(const char* title, const std::vector<float>& row, const std::vector<std::string>& words, std::size_t word, const std::vector<index_t>& hops) {
    std::vector<std::size_t> order(row.size());
    std::iota(order.begin(), order.end(), 0);
    const std::size_t shown = std::min<std::size_t>(12, row.size());
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(shown), order.end(), [&](std::size_t a, std::size_t b) { return row[a] > row[b]; });
    const auto reached = std::count_if(row.begin(), row.end(), [](float w) { return w > 0; });
    double distance = 0;
    for (std::size_t j = 0; j < row.size(); ++j) distance += double(row[j]) * std::abs(double(j) - double(word));
    std::printf("\n%s: weight on %td of %zu words, mean distance %.0f words\n  %-18s %8s %9s %5s   context\n", title, reached, row.size(), distance, "word", "weight", "distance", "hops");
    for (std::size_t s = 0; s < shown; ++s) {
        const std::size_t j = order[s];
        if (!(row[j] > 0)) break;
        std::string context;
        for (std::size_t c = j > 2 ? j - 2 : 0; c < std::min(j + 3, words.size()); ++c) context += (c == j ? "[" + words[c] + "] " : words[c] + " ");
        std::printf("  %-18s %7.3f%% %+9td %5d   %s\n", words[j].c_str(), 100 * double(row[j]), static_cast<std::ptrdiff_t>(j) - static_cast<std::ptrdiff_t>(word), j == word ? 0 : hops[j],
                    context.c_str());
    }
}

/// The weights of a layer, summed over `side` x `side` cells: values that mark a word's cell make the output a row of them.
template <class Layer>
Picture picture_of(const Layer& attention, const Heads& x, std::size_t side) {
    const std::size_t n = x.shape(1);
    side = std::min(side, n);
    Heads cells = xt::zeros<float>({std::size_t{heads}, n, side});
    for (std::size_t h = 0; h < heads; ++h)
        for (std::size_t j = 0; j < n; ++j) cells(h, j, j * side / n) = 1;
    const Heads rows = attention(x, x, cells);
    std::vector<double> sum(side * side, 0);
    for (std::size_t h = 0; h < heads; ++h)
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t c = 0; c < side; ++c) sum[i * side / n * side + c] += double(rows(h, i, c)) * double(side) / double(heads * n);
    Picture picture{static_cast<index_t>(side), static_cast<index_t>(side), {}};
    for (const double weight : sum)  // four decades, from white to black
        picture.pixels.push_back(static_cast<std::uint8_t>(255 * std::clamp(-std::log10(std::max(weight, 1e-9)) / 4, 0., 1.)));
    return picture;
}

struct Measured {
    double seconds;
    double megabytes;
};

/// The best of three calls, and the scratch memory they need.
template <class Layer>
Measured measure(const Layer& attention, const Heads& x) {
    Workspace workspace;
    CallOptions options{.workspace = &workspace};
    Heads out = Heads::from_shape(x.shape());
    double best = 1e30;
    for (int repeat = 0; repeat < 3; ++repeat) {
        const auto start = std::chrono::steady_clock::now();
        attention.into(out, x, x, x, options);
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return {best, double(workspace.capacity()) / 1e6};
}

void run(const Settings& settings) {
    std::string name = settings.file;
    const std::string text = name.empty() ? default_text(name) : read(name);
    const auto words = words_of(text);
#if !defined(POLYATTN_EXAMPLES_CUDA)
    if (settings.device == "cuda") throw std::runtime_error("this build has no CUDA: nvcc was not found");
#endif
    if (words.size() < 2) throw std::runtime_error(name + " has fewer than two words");
    const auto n = static_cast<index_t>(words.size());
    std::cout << describe() << "\n" << name << ": " << n << " words\n" << std::flush;
    progress("embedding the words");
    const Heads x = embed(words);
    progress("building the pattern and following its paths");

    const Attention<LocalGlobalRandom, PPR<5>> diffusion;
    const Attention<LocalGlobalRandom> one_hop;
    const Plan plan = diffusion.plan(n, n);

    // The query: the word asked for, else the most frequent long one; its occurrence nearest to the middle.
    std::string wanted;
    if (!settings.word.empty()) {
        const auto asked = words_of(settings.word);
        if (asked.size() != 1) throw std::runtime_error("--word must be one word, not '" + settings.word + "'");
        wanted = asked[0];
    } else {
        std::unordered_map<std::string, int> counts;
        for (const auto& w : words)
            if (w.size() >= 7) ++counts[w];
        std::pair<int, std::string> most{0, words[words.size() / 2]};
        for (const auto& [w, count] : counts) most = std::max(most, {count, w});
        wanted = most.second;
    }
    std::size_t query = words.size();
    for (std::size_t i = 0; i < words.size(); ++i)
        if (words[i] == wanted && (query == words.size() || std::abs(double(i) - n / 2.) < std::abs(double(query) - n / 2.))) query = i;
    if (query == words.size()) throw std::runtime_error("the text has no word '" + wanted + "'");

    progress("");
    std::printf("\nPattern: sliding window of 128, 96 global and 96 random tokens: %.2f %% of all pairs, %zu dense tiles and %lld edges\n", 100 * plan.density(), plan.tiles().size(),
                static_cast<long long>(plan.edges().count()));
    std::vector<index_t> sample;
    for (index_t s = 0; s < std::min<index_t>(n, 64); ++s) sample.push_back(static_cast<index_t>(offset_t{s} * n / std::min<index_t>(n, 64)));
    const auto reach = receptive_field(plan, 5, sample);
    const auto local = receptive_field(SlidingWindow{}.plan(n, n), 5, sample);
    std::printf("Receptive field, share of the text after 1 .. 5 hops:  whole pattern ");
    for (const double share : reach) std::printf(" %.1f", 100 * share);
    std::printf(" %%   window alone ");
    for (const double share : local) std::printf(" %.1f", 100 * share);
    std::printf(" %%\n\nThe query is word %zu, '%s'.", query, wanted.c_str());
    const auto hops = hop_distances(plan, static_cast<index_t>(query));
    print_row("After 1 hop", row_of(one_hop, x, query), words, query, hops);
    print_row("After 5 hops (alpha = 0.1)", row_of(diffusion, x, query), words, query, hops);

    std::printf("\nTime and scratch memory, %d heads of %d columns:\n", heads, dim);
    const auto report = [&](const char* what, const auto& attention) {
        progress(std::string("timing: ") + what);
        const Measured m = measure(attention, x);
        progress("");
        std::printf("  %-42s %9.2f ms %9.1f MB\n", what, 1e3 * m.seconds, m.megabytes);
        std::fflush(stdout);
    };
    report("diffusion, 5 hops on the sparse pattern", diffusion);
    report("one hop on the sparse pattern", one_hop);
    report("dense softmax attention", Attention<>{});
    report("five hops of dense softmax attention", Attention<PPR<5>>{});
    std::printf("  (a stored n x n matrix for each head would take %.1f MB)\n", 4e-6 * heads * n * n);

    Heads out = diffusion(x, x, x);
#if defined(POLYATTN_EXAMPLES_CUDA)
    if (settings.device == "cuda") {
        device::Diffusion on_device(x.data(), heads, static_cast<int>(n), dim);
        std::printf("On %s:\n", device::name().c_str());
        for (const bool one : {false, true})
            std::printf("  %-42s %9.2f ms %9.1f MB\n", one ? "one hop on the sparse pattern" : "diffusion, 5 hops on the sparse pattern", 1e3 * on_device.seconds(one, 2), double(on_device.workspace_bytes(one)) / 1e6);
        const std::vector<float> values = on_device.run(false);
        double apart = 0;
        for (std::size_t i = 0; i < values.size(); ++i) apart = std::max(apart, double(std::abs(values[i] - out.data()[i])));
        std::printf("  largest difference to the CPU's output: %.2g\n", apart);
        std::copy(values.begin(), values.end(), out.data());
    }
#endif
    const Attention<LocalGlobalRandom, PPR<5>, Reference> reference;
    double difference = 0, largest = 0;
    for (std::size_t h = 0; h < heads; ++h) {
        progress("comparing with the double-precision reference: head " + std::to_string(h + 1) + " of " + std::to_string(heads));
        xt::xtensor<double, 2> head = xt::zeros<double>({words.size(), std::size_t{dim}});
        std::copy_n(x.data() + h * head.size(), head.size(), head.data());
        const xt::xtensor<double, 2> exact = reference(head, head, head);
        for (std::size_t i = 0; i < words.size(); ++i)
            for (std::size_t c = 0; c < dim; ++c) {
                difference = std::max(difference, std::abs(double(out(h, i, c)) - exact(i, c)));
                largest = std::max(largest, std::abs(exact(i, c)));
            }
    }
    progress("");
    std::printf("\nLargest difference to the double-precision reference: %.2g (outputs up to %.2g)\n", difference, largest);

    progress("drawing");
    const std::filesystem::path folder = settings.pictures;
    std::filesystem::create_directories(folder);
    write_png(folder / "pattern.png", picture(plan, 512));
    write_png(folder / "attention_1_hop.png", picture_of(one_hop, x, 256));
    write_png(folder / "attention_5_hops.png", picture_of(diffusion, x, 256));
    progress("");
    std::cout << "Pictures: " << (folder / "pattern.png").string() << ", attention_1_hop.png, attention_5_hops.png\n";
}

}  // namespace

int main(int argc, char** argv) {
    try {
        run(parse(argc, argv));
    } catch (const std::exception& error) {
        std::cerr << "diffuse_document: " << error.what() << "\n";
        return 1;
    }
}
