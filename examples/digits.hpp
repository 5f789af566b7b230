#pragma once
// Handwritten digits of 8 x 8 pixels, from digits.txt.

#include <polyattn/core/config.hpp>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <span>
#include <string>
#include <utility>
#include <vector>

#if !defined(POLYATTN_DOCUMENTS)
#define POLYATTN_DOCUMENTS "."
#endif

/// 64 pixels of 0 to 16 a picture, row by row, and what it shows.
struct Digits {
    std::vector<polyattn::index_t> pixels, labels;
    std::size_t count() const { return labels.size(); }
    std::span<const polyattn::index_t> picture(std::size_t i) const { return std::span<const polyattn::index_t>(pixels).subspan(i * 64, 64); }
    /// The first ones alone.
    void keep(std::size_t count) {
        labels.resize(std::min(count, labels.size()));
        pixels.resize(labels.size() * 64);
    }
    void add(polyattn::index_t label, const std::string& text) {
        labels.push_back(label);
        for (const char c : text) pixels.push_back(c <= '9' ? c - '0' : c - 'a' + 10);
    }
};

/// Every fifth digit is held out.
inline std::pair<Digits, Digits> read_digits() {
    const std::filesystem::path path = std::filesystem::path(POLYATTN_DOCUMENTS) / "examples" / "digits.txt";
    std::ifstream in(path);
    if (!in) throw std::runtime_error("can't read " + path.string());
    Digits training, held_out;
    std::size_t number = 0;
    for (std::string line; std::getline(in, line);)
        if (!line.starts_with("#")) (number++ % 5 == 4 ? held_out : training).add(line.at(0) - '0', line.substr(2));
    return {training, held_out};
}
