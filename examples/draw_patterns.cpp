// Draws every pattern and one draw of every sampler, 64 tokens each, and how likely samplers keep a key:  draw_patterns FOLDER
#include "png.hpp"

#include <polyattn/analysis/sampling.hpp>
#include <polyattn/polyattn.hpp>

#include <filesystem>
#include <iostream>

using namespace polyattn;

namespace {

/// Every pixel as a square of `times` x `times`.
Picture enlarge(const Picture& small, index_t times) {
    Picture large{small.width * times, small.height * times, {}};
    for (index_t y = 0; y < large.height; ++y)
        for (index_t x = 0; x < large.width; ++x) large.pixels.push_back(small.pixels[static_cast<std::size_t>(y / times * small.width + x / times)]);
    return large;
}

void draw_all(const std::filesystem::path& folder) {
    std::filesystem::create_directories(folder);
    const auto draw = [&](const char* name, const auto& pattern) { write_png((folder / name).replace_extension(".png"), enlarge(picture(pattern.plan(64, 64)), 2)); };
    EdgeList ring{{0}, {}};
    for (index_t i = 0; i < 64; ++i) {
        std::vector<index_t> row{i, (i + 8) % 64, (i + 24) % 64};
        std::sort(row.begin(), row.end());
        ring.keys.insert(ring.keys.end(), row.begin(), row.end());
        ring.offsets.push_back(static_cast<offset_t>(ring.keys.size()));
    }
    draw("Dense", Dense{});
    draw("Causal", Causal{});
    draw("SlidingWindow", SlidingWindow{.window = 12});
    draw("SlidingWindow-dilated", SlidingWindow{.window = 12, .dilation = 3});
    draw("CausalSlidingWindow", CausalSlidingWindow{.window = 12});
    draw("OverlappingBlocks", OverlappingBlocks{.window = 16});
    draw("BlockLocal", BlockLocal{.block = 16});
    draw("GlobalTokens", GlobalTokens{.count = 4});
    draw("RandomTokens", RandomTokens{.count = 6});
    draw("UniformTokens", UniformTokens{.count = 6});
    draw("RandomRegular", RandomRegular{.degree = 6});
    draw("ErdosRenyi", ErdosRenyi{.per_token = 6});
    draw("LocalGlobalRandom", LocalGlobalRandom{.window = 8, .globals = 4, .randoms = 4});
    draw("Longformer", Longformer{.window = 12, .tokens = {0, 1}});
    draw("BigBird", BigBird<8>{.globals = 1, .randoms = 1});
    draw("Strided", Strided{.stride = 8});
    draw("Fixed", Fixed{.stride = 8, .summary = 1});
    draw("ShiftedWindows2D", ShiftedWindows2D{.height = 8, .width = 8, .window = 4, .shift = 2});
    draw("EdgeList", ring);
    draw("Union", Union{Strided{.stride = 8}, GlobalTokens{.count = 3}});
    draw("Intersection", Intersection{LocalGlobalRandom{.window = 8, .globals = 4, .randoms = 4}, Causal{}});
    draw("Prefix", Prefix<ErdosRenyi>{.length = 128, .pattern = {.per_token = 12}});
    const auto draw_sample = [&](const char* name, const auto& sampler, bool causal) {
        write_png((folder / name).replace_extension(".png"), enlarge(picture(sampler.sample(64, 64, {.seed = 1}, causal)), 2));
    };
    draw_sample("Unbiased", Unbiased{.drop = .75}, false);
    draw_sample("LocallyBiased", LocallyBiased<4>{.sigma = .1}, false);
    draw_sample("LocallyBiased-causal", LocallyBiased<4>{.sigma = .1}, true);
    draw_sample("LocallyBiased-unbounded", LocallyBiased<4>{.sigma = infinite_sigma}, false);
    draw_sample("Grid2D-rows", Grid2D{.height = 8, .width = 8, .row_windows = 4}, false);
    draw_sample("Grid2D-windows", Grid2D{.height = 8, .width = 8, .window = 4, .shift = 2, .sigma = .75}, false);
    // Windows downward, keys to the right, the darker the more likely; a strip a sigma: computed above, counted over 400 draws below.
    for (const bool causal : {false, true}) {
        Picture strips{4 * 64, 0, {}};
        for (const double sigma : {.02, .05, .1, .25, .5}) {
            ShareMatrix counted{4, 64, {}};
            const ShareMatrix every = sampling_frequency(LocallyBiased<4>{.sigma = sigma}, 64, 64, causal, 400, 1);
            for (index_t b = 0; b < 4; ++b)  // the last query of a window sees all of its sources
                for (index_t j = 0; j < 64; ++j) counted.values.push_back(every(16 * b + 15, j));
            for (const ShareMatrix& share : {sampling_probability(64, 4, sigma, causal), counted}) {
                const Picture strip = heat_map(share, 4);
                strips.pixels.insert(strips.pixels.end(), strip.pixels.begin(), strip.pixels.end());
                strips.pixels.insert(strips.pixels.end(), 4 * 256, 255);
                strips.height += strip.height + 4;
            }
        }
        write_png(folder / (causal ? "sampling-causal.png" : "sampling.png"), strips);
    }
    std::cout << "30 pictures in " << folder.string() << "\n";
}

}  // namespace

int main(int argc, char** argv) {
    try {
        if (argc > 2 || (argc == 2 && argv[1][0] == '-')) throw std::runtime_error("draw_patterns [FOLDER]");
        draw_all(argc == 2 ? argv[1] : ".");
    } catch (const std::exception& error) {
        std::cerr << "draw_patterns: " << error.what() << "\n";
        return 1;
    }
}
