// Runs a pretrained encoder (BERT's layout, safetensors) on token numbers and prints each token's features:
//   pretrained_encoder FILE HEADS TOKEN...       e.g. pretrained_encoder model.safetensors 12 101 7592 2088 102
#include "bert.hpp"
#include "program.hpp"

using namespace polyattn;

int main(int argc, char** argv) {
    try {
        if (argc < 4) throw std::runtime_error("usage: pretrained_encoder FILE HEADS TOKEN...");
        const auto encoder = read_bert<float>(argv[1], number_of("HEADS", argv[2], 1));
        std::vector<index_t> tokens;
        for (int i = 3; i < argc; ++i) tokens.push_back(number_of("TOKEN", argv[i], 0));
        std::remove_const_t<decltype(encoder)>::Saved saved;
        Workspace workspace;
        const MatrixView<const float> features = encoder.forward(tokens, 1, saved, {.workspace = &workspace});
        std::cout << encoder.transformer.blocks.size() << " layers of " << encoder.dim() << " columns\n";
        for (index_t i = 0; i < features.rows; ++i) {
            std::cout << tokens[static_cast<std::size_t>(i)] << ":";
            for (index_t c = 0; c < std::min(index_t{8}, features.cols); ++c) std::cout << " " << features(i, c);
            std::cout << (features.cols > 8 ? " ..\n" : "\n");
        }
    } catch (const std::exception& error) {
        std::cerr << "pretrained_encoder: " << error.what() << "\n";
        return 1;
    }
}
