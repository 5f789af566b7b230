#pragma once
// In front of every file of a kernel test: the matrix unit, or one that is emulated, serves every call that it can serve at all, however small.
#include <polyattn/core/config.hpp>

#include <cstring>

namespace tested {
struct Unit;
}
#define POLYATTN_TEST_UNIT tested::Unit
#include <polyattn/backend/simd/matrix_unit.hpp>

namespace tested {

#if POLYATTN_AMX && !defined(POLYATTN_EMULATE_UNIT)
using Hardware = polyattn::detail::simd::AmxUnit;
#else
/// Tiles as Intel defines them: fused multiply-adds of even and odd neighbours in single precision, added last, denormal numbers are zeros.
class Hardware {
public:
    static bool is_available() { return true; }

    template <int To>
    void zero() { std::memset(tiles_[To], 0, sizeof tiles_[To]); }
    template <int To>
    void load(const polyattn::detail::simd::PartImage& image) { std::memcpy(tiles_[To], image.words, sizeof tiles_[To]); }
    template <int To>
    void load(const float* from, std::ptrdiff_t stride) {
        for (int row = 0; row < 16; ++row) std::memcpy(tiles_[To][row], from + row * stride, 64);
    }
    template <int From>
    void store(float* to, std::ptrdiff_t stride) {
        for (int row = 0; row < 16; ++row) std::memcpy(to + row * stride, tiles_[From][row], 64);
    }
    template <int To, int First, int Second>
    void multiply_add() { multiply_add(tiles_[To], tiles_[First], tiles_[Second]); }

private:
    using Words = std::uint32_t[16][16];
    // Nearly all of the time of a sanitized test would go here, where nothing can go wrong.
#if defined(__GNUC__) && !defined(__clang__)
    __attribute__((optimize("O3"), no_sanitize("address", "undefined")))
#endif
    static void multiply_add(Words& to, const Words& first, const Words& second) {
        const auto number = [](std::uint32_t bits) __attribute__((always_inline)) { return __builtin_bit_cast(float, bits & 0x7f800000u ? bits : bits & 0x80000000u); };
        const auto flushed = [&](float x) __attribute__((always_inline)) { return number(__builtin_bit_cast(std::uint32_t, x)); };
        for (int row = 0; row < 16; ++row) {
            float even[16] = {}, odd[16] = {};
            for (int t = 0; t < 16; ++t) {
                const float a = number(first[row][t] << 16), b = number(first[row][t] & 0xffff0000u);
                for (int column = 0; column < 16; ++column) {
                    even[column] = flushed(__builtin_fmaf(a, number(second[t][column] << 16), even[column]));
                    odd[column] = flushed(__builtin_fmaf(b, number(second[t][column] & 0xffff0000u), odd[column]));
                }
            }
            for (int column = 0; column < 16; ++column)
                to[row][column] = __builtin_bit_cast(std::uint32_t, flushed(number(to[row][column]) + flushed(even[column] + odd[column])));
        }
    }

    Words tiles_[8];
};
#endif

struct Unit : Hardware {
    static constexpr polyattn::index_t least_queries = 1, least_rows = 1, least_columns = 1, least_terms = 1;
};

}  // namespace tested
