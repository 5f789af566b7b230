// Draws every pattern, 64 tokens each, as the pictures that the README shows:  draw_patterns FOLDER
#include "png.hpp"

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

}  // namespace

int main(int argc, char** argv) {
    const std::filesystem::path folder = argc > 1 ? argv[1] : ".";
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
    std::cout << "22 pictures in " << folder.string() << "\n";
}
