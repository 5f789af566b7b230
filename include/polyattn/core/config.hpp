#pragma once
// Version, the inline namespace that keeps differently compiled bodies apart, and compiler helpers.

#include <cstdint>

#define POLYATTN_VERSION_MAJOR 0
#define POLYATTN_VERSION_MINOR 1
#define POLYATTN_VERSION_PATCH 0

// The linker keeps one body of an inline function. Translation units built with other -m flags, with or without OpenMP or
// -ffast-math, may be linked together, so each combination lives in an inline namespace of its own. Flags that are not part of its name, -mlzcnt alone, say,
// must not differ between files.
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AMX_BF16__)
#define POLYATTN_ARCH_TAG avx512_amx
#elif defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VBMI__)
#define POLYATTN_ARCH_TAG avx512_vbmi
#elif defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
#define POLYATTN_ARCH_TAG avx512
#elif defined(__AVX512F__)
#define POLYATTN_ARCH_TAG avx512f
#elif defined(__AVX2__) && defined(__FMA__)
#define POLYATTN_ARCH_TAG avx2_fma
#elif defined(__AVX2__)
#define POLYATTN_ARCH_TAG avx2
#elif defined(__AVX__) && defined(__FMA__)
#define POLYATTN_ARCH_TAG avx_fma
#elif defined(__AVX__)
#define POLYATTN_ARCH_TAG avx
#elif defined(__SSE4_2__)
#define POLYATTN_ARCH_TAG sse4_2
#elif defined(__SSE4_1__)
#define POLYATTN_ARCH_TAG sse4_1
#elif defined(__SSSE3__)
#define POLYATTN_ARCH_TAG ssse3
#else
#define POLYATTN_ARCH_TAG baseline
#endif

#if defined(__BMI2__)
#define POLYATTN_BITS_TAG _bmi2
#else
#define POLYATTN_BITS_TAG
#endif

#if defined(_OPENMP)
#define POLYATTN_THREAD_TAG _openmp
#else
#define POLYATTN_THREAD_TAG _serial
#endif

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#define POLYATTN_MATH_TAG _fast
#else
#define POLYATTN_MATH_TAG _ieee
#endif

#define POLYATTN_JOIN_(a, b, c, d) a##b##c##d
#define POLYATTN_JOIN(a, b, c, d) POLYATTN_JOIN_(a, b, c, d)
#define POLYATTN_ABI POLYATTN_JOIN(POLYATTN_ARCH_TAG, POLYATTN_BITS_TAG, POLYATTN_THREAD_TAG, POLYATTN_MATH_TAG)

#define POLYATTN_TEXT_(a) #a
#define POLYATTN_TEXT(a) POLYATTN_TEXT_(a)

// What g++ 12 warns of without reason where users ask for it: constant array extents that are int (-Wsign-conversion), and values in its own AVX-512 header. clang,
// which compiles the tests with -Wall, tells of real ones.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define POLYATTN_QUIET                                           \
    _Pragma("GCC diagnostic push")                               \
    _Pragma("GCC diagnostic ignored \"-Wsign-conversion\"")      \
    _Pragma("GCC diagnostic ignored \"-Wuninitialized\"")        \
    _Pragma("GCC diagnostic ignored \"-Wmaybe-uninitialized\"")
#define POLYATTN_LOUD _Pragma("GCC diagnostic pop")
#else
#define POLYATTN_QUIET
#define POLYATTN_LOUD
#endif

#define POLYATTN_BEGIN_NAMESPACE POLYATTN_QUIET namespace polyattn { inline namespace POLYATTN_ABI {
#define POLYATTN_END_NAMESPACE } } POLYATTN_LOUD

#if defined(__GNUC__)
#define POLYATTN_ALWAYS_INLINE inline __attribute__((always_inline))
#define POLYATTN_NOINLINE __attribute__((noinline))
#define POLYATTN_INLINE_LAMBDA __attribute__((always_inline))  // behind the parameters; keeps register tiles in registers at -O2
#else
#define POLYATTN_ALWAYS_INLINE inline
#define POLYATTN_NOINLINE
#define POLYATTN_INLINE_LAMBDA
#endif

// In front of the inner loops of register tiles, where counters and pointers compete with the multiply-adds for ports.
#if defined(__clang__)
#define POLYATTN_UNROLL_4 _Pragma("clang loop unroll_count(4)")
#elif defined(__GNUC__)
#define POLYATTN_UNROLL_4 _Pragma("GCC unroll 4")
#else
#define POLYATTN_UNROLL_4
#endif

// Call operators of policies run inside kernels of every backend.
#if defined(__CUDACC__)
#define POLYATTN_HOST_DEVICE __host__ __device__
#else
#define POLYATTN_HOST_DEVICE
#endif

POLYATTN_BEGIN_NAMESPACE

/// Token, head and batch indices. Offsets into edges and tensors are 64-bit.
using index_t = std::int32_t;
using offset_t = std::int64_t;

POLYATTN_END_NAMESPACE
