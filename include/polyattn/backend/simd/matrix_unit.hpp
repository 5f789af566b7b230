#pragma once
// Products of floats on a matrix unit that multiplies bfloat16 (AMX). A float is the sum of three such parts of 8 bits each; six of the nine products of parts
// have all that a chain of fused multiply-adds keeps, and take less than half of its time.

#include <polyattn/backend/simd/vector.hpp>
#include <polyattn/core/view.hpp>

#include <cstdint>

#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define POLYATTN_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define POLYATTN_AMX 0
#endif

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// Sides of what the unit multiplies: 16 x 32 by 32 x 16.
inline constexpr int unit_side = 16, unit_inner = 32;

/// One part of 16 x 32 numbers, two to a word: of a first factor's row r, columns t and t + 16 in word t of row r; of a second factor's column c, rows t and t + 16 in
/// word c of row t. Which numbers share a word is open as long as both factors agree; these need no shuffles.
struct alignas(64) PartImage {
    std::uint32_t words[unit_side * unit_side];
};
struct SplitImage {
    PartImage parts[3];  // the largest first
};

#if POLYATTN_AMX
/// The unit of the thread that makes it, until it goes.
class AmxUnit {
public:
    /// Splitting keys and values pays from so many queries of each on; splitting factors from so many rows, columns and terms.
    static constexpr index_t least_queries = 256, least_rows = 16, least_columns = 16, least_terms = 32;

    /// The operating system lets this process use the unit. Asked once.
    static bool is_available() {
        static const bool granted = ::syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
        return granted;
    }

    AmxUnit() {
        struct alignas(64) {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        asm volatile("ldtilecfg %0" : : "m"(config));
    }
    ~AmxUnit() { asm volatile("tilerelease" ::); }
    AmxUnit(const AmxUnit&) = delete;
    AmxUnit& operator=(const AmxUnit&) = delete;

    template <int To>
    POLYATTN_ALWAYS_INLINE void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(To)); }
    template <int To>
    POLYATTN_ALWAYS_INLINE void load(const PartImage& image) {
        asm volatile("{tileloadd (%0,%1,1), %%tmm%c2|tileloadd %%tmm%c2, [%0+%1*1]}" : : "r"(&image), "r"(64L), "i"(To), "m"(image));
    }
    /// 16 x 16 floats.
    template <int To>
    POLYATTN_ALWAYS_INLINE void load(const float* from, std::ptrdiff_t stride) {
        asm volatile("{tileloadd (%0,%1,1), %%tmm%c2|tileloadd %%tmm%c2, [%0+%1*1]}" : : "r"(from), "r"(stride * 4), "i"(To) : "memory");
    }
    template <int From>
    POLYATTN_ALWAYS_INLINE void store(float* to, std::ptrdiff_t stride) {
        asm volatile("{tilestored %%tmm%c2, (%0,%1,1)|tilestored [%0+%1*1], %%tmm%c2}" : : "r"(to), "r"(stride * 4), "i"(From) : "memory");
    }
    /// to += first second, sums of 32 products, in single precision.
    template <int To, int First, int Second>
    POLYATTN_ALWAYS_INLINE void multiply_add() {
        asm volatile("{tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0|tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2}" : : "i"(To), "i"(First), "i"(Second));
    }
};
#endif

/// What multiplies matrices of a type beside vectors; void: nothing. Tests put a unit of their own there.
#if defined(POLYATTN_TEST_UNIT)
template <class T, class A>
using MatrixUnitOf = std::conditional_t<std::is_same_v<T, float>, POLYATTN_TEST_UNIT, void>;
#elif POLYATTN_AMX
template <class T, class A>
using MatrixUnitOf = std::conditional_t<std::is_same_v<T, float> && is_avx512<A>, AmxUnit, void>;
#else
template <class T, class A>
using MatrixUnitOf = void;
#endif

/// Numbers of which splitting and products could overflow, NaN among them, are left to vectors: they count as 0 in an image.
inline constexpr float unsplittable = 0x1p63f;
inline bool is_splittable(float x) { return (std::bit_cast<std::uint32_t>(x) & 0x7fffffffu) < std::bit_cast<std::uint32_t>(unsplittable); }

/// x as three parts, each in the upper half of its numbers; x = p0 + p1 + p2 exactly unless that leaves the normal numbers.
template <class A>
struct SplitVector {
    using V = Vec<float, A>;
    using U = Vec<std::uint32_t, A>;
    U parts[3];

    POLYATTN_ALWAYS_INLINE explicit SplitVector(V x) {
        const U half(0x8000u), upper(0xffff0000u);  // rounds to nearest, so that what is left out has no sign in common
        parts[0] = (bit_cast<std::uint32_t>(x) + half) & upper;
        const V rest = x - bit_cast<float>(parts[0]);
        parts[1] = (bit_cast<std::uint32_t>(rest) + half) & upper;
        parts[2] = bit_cast<std::uint32_t>(rest - bit_cast<float>(parts[1]));
    }
};

/// Row r of the image: row r of `first` and of `second`, 16 numbers each. Returns whether it left some out.
template <class A>
POLYATTN_ALWAYS_INLINE bool split_rows_of_image(const float* first, const float* second, std::ptrdiff_t stride, SplitImage& image) {
    using V = Vec<float, A>;
    using U = Vec<std::uint32_t, A>;
    constexpr int width = lanes<float, A>;
    const U upper(0xffff0000u), magnitude(0x7fffffffu), limit(std::bit_cast<std::uint32_t>(unsplittable));
    U largest(0u);
    for (int row = 0; row < unit_side; ++row, first += stride, second += stride)
        for (int c = 0; c < unit_side; c += width) {
            const V x = V::load_unaligned(first + c), y = V::load_unaligned(second + c);
            largest = xsimd::max(largest, xsimd::max(bit_cast<std::uint32_t>(x) & magnitude, bit_cast<std::uint32_t>(y) & magnitude));
            const SplitVector<A> a(x), b(y);
            for (int part = 0; part < 3; ++part)
                ((a.parts[part] >> 16) | (b.parts[part] & upper)).store_aligned(image.parts[part].words + row * unit_side + c);
        }
    return xsimd::any(largest >= limit);
}
template <class A>
POLYATTN_NOINLINE void split_what_can_be(const float* first, const float* second, std::ptrdiff_t stride, SplitImage& image) {
    float halves[2][unit_side * unit_side];
    for (int i = 0; i < unit_side; ++i)
        for (int j = 0; j < unit_side; ++j) {
            const float x = first[i * stride + j], y = second[i * stride + j];
            halves[0][i * unit_side + j] = is_splittable(x) ? x : 0.f;
            halves[1][i * unit_side + j] = is_splittable(y) ? y : 0.f;
        }
    split_rows_of_image<A>(halves[0], halves[1], unit_side, image);
}
template <class A>
bool split_image(const float* first, const float* second, std::ptrdiff_t stride, SplitImage& image) {
    if (!split_rows_of_image<A>(first, second, stride, image)) return false;
    split_what_can_be<A>(first, second, stride, image);
    return true;
}

/// 16 x 16 numbers of m from (row, column) on to `to`; zeros behind its ends.
template <class A>
void copy_square(MatrixView<const float> m, index_t row, index_t column, float* to) {
    constexpr int width = lanes<float, A>;
    const index_t height = std::clamp(m.rows - row, index_t{0}, index_t{unit_side}), breadth = std::clamp(m.cols - column, index_t{0}, index_t{unit_side});
    if (height == unit_side && breadth == unit_side && m.row_stride == 1) {
        for (int j = 0; j < unit_side; j += width)
            for (int i = 0; i < unit_side; i += width)
                transpose_block<float, A>([&](auto at) POLYATTN_INLINE_LAMBDA { return Vec<float, A>::load_unaligned(&m(row + i, column + j + at)); }, to + i * unit_side + j, unit_side);
        return;
    }
    if (height < unit_side || breadth < unit_side) std::fill_n(to, unit_side * unit_side, 0.f);
    for (index_t i = 0; i < height; ++i)
        for (index_t j = 0; j < breadth; ++j) to[i * unit_side + j] = m(row + i, column + j);
}
/// Image of 16 rows and 32 columns of a first factor, zeros behind its ends. Returns whether it left numbers out.
template <class A>
bool split_first_factor(MatrixView<const float> m, index_t row, index_t column, SplitImage& image) {
    if (row + unit_side <= m.rows && column + unit_inner <= m.cols && m.col_stride == 1) return split_image<A>(&m(row, column), &m(row, column + unit_side), m.row_stride, image);
    alignas(64) float halves[2][unit_side * unit_side];
    for (index_t half = 0; half < 2; ++half) copy_square<A>(m, row, column + half * unit_side, halves[half]);
    return split_image<A>(halves[0], halves[1], unit_side, image);
}
/// Image of 32 rows and 16 columns of a second factor.
template <class A>
bool split_second_factor(MatrixView<const float> m, index_t row, index_t column, SplitImage& image) {
    if (row + unit_inner <= m.rows && column + unit_side <= m.cols && m.col_stride == 1) return split_image<A>(&m(row, column), &m(row + unit_side, column), m.row_stride, image);
    alignas(64) float halves[2][unit_side * unit_side];
    for (index_t half = 0; half < 2; ++half) copy_square<A>(m, row + half * unit_side, column, halves[half]);
    return split_image<A>(halves[0], halves[1], unit_side, image);
}

/// Some rows or columns of images: `steps` of them each, the next row or column `stride` images on.
struct Images {
    const SplitImage* first;
    std::ptrdiff_t stride;
};
/// Tiles of 16 x 16 floats, the rows of each `stride` apart.
struct ResultTiles {
    float* first;
    std::ptrdiff_t stride, row_of_tiles, column_of_tiles;
};

/// What multiplying R rows of tiles leaves room for between its products.
template <int R>
constexpr index_t unit_calls(index_t steps) { return 6 * R * steps; }

/// c (+)= a b for R x C tiles, R, C <= 2. Beside them, unit_calls<R>(steps) times, between() is called for what vectors have to do meanwhile.
template <int R, int C, class MatrixUnit, class Between>
POLYATTN_ALWAYS_INLINE void multiply_images(MatrixUnit& unit, Images a, Images b, index_t steps, ResultTiles c, bool add, Between&& between) {
    static_assert(R <= 2 && C <= 2);
    const auto tiles = [&](auto&& f) POLYATTN_INLINE_LAMBDA {
        expand<R * C>([&]<int... I>(Ints<I...>) POLYATTN_INLINE_LAMBDA { (f(std::integral_constant<int, I / C>{}, std::integral_constant<int, I % C>{}), ...); });
    };
    tiles([&](auto row, auto column) POLYATTN_INLINE_LAMBDA {
        if (add) unit.template load<row * 2 + column>(c.first + row * c.row_of_tiles + column * c.column_of_tiles, c.stride);
        else unit.template zero<row * 2 + column>();
    });
    for (index_t step = 0; step < steps; ++step, ++a.first, ++b.first) {
        const auto load_a = [&](int part) POLYATTN_INLINE_LAMBDA {
            unit.template load<4>(a.first->parts[part]);
            if constexpr (R > 1) unit.template load<5>(a.first[a.stride].parts[part]);
        };
        const auto load_b = [&](int part) POLYATTN_INLINE_LAMBDA {
            unit.template load<6>(b.first->parts[part]);
            if constexpr (C > 1) unit.template load<7>(b.first[b.stride].parts[part]);
        };
        const auto multiply = [&]() POLYATTN_INLINE_LAMBDA {
            tiles([&](auto row, auto column) POLYATTN_INLINE_LAMBDA {
                unit.template multiply_add<row * 2 + column, 4 + row, 6 + column>();
                if constexpr (column + 1 == C) between();  // often, so that vectors and unit seldom wait for each other
            });
        };
        // Products of small parts come first; from one to the next a single factor changes.
        load_a(0), load_b(2), multiply();
        load_b(1), multiply();
        load_a(1), multiply();
        load_b(0), multiply();
        load_a(2), multiply();
        load_a(0), multiply();
    }
    tiles([&](auto row, auto column) POLYATTN_INLINE_LAMBDA {
        unit.template store<row * 2 + column>(c.first + row * c.row_of_tiles + column * c.column_of_tiles, c.stride);
    });
}

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
