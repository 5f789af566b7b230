#pragma once
// The kernels that nearly every program calls, compiled once for all of them: in compiled_once.cpp.

#include <polyattn/polyattn.hpp>

#define POLYATTN_TEST_KERNELS(declare, T)                                                                                                                  \
    declare template void forward<xsimd::default_arch>(const Head<T, NoBias>&, const HeadResult<T>&, Workers&);                                            \
    declare template void backward<xsimd::default_arch>(const Head<T, NoBias>&, const HeadGradient<T>&, Workers&);                                         \
    declare template void decode<xsimd::default_arch>(std::span<const Head<T, NoBias>>, std::span<const HeadResult<T>>, Workers&);

POLYATTN_BEGIN_NAMESPACE
namespace detail::simd {
POLYATTN_TEST_KERNELS(extern, float)
POLYATTN_TEST_KERNELS(extern, double)
}  // namespace detail::simd
POLYATTN_END_NAMESPACE
