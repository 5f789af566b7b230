#include "compiled_once.hpp"

POLYATTN_BEGIN_NAMESPACE
namespace detail::simd {
POLYATTN_TEST_KERNELS(, float)
POLYATTN_TEST_KERNELS(, double)
}  // namespace detail::simd
POLYATTN_END_NAMESPACE
