#pragma once

#include <polyattn/core/config.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

/// a * b as a number of its own. Compilers make one operation, with one rounding, of a product and the sum that takes it, where the machine has such (-mfma);
/// choices that sums decide, a nearest cluster or a bucket, would then depend on compiler and machine.
inline double rounded_product(double a, double b) {
    double product = a * b;
#if defined(__GNUC__) && defined(__x86_64__)
    asm("" : "+x"(product));
#elif defined(__GNUC__) && defined(__aarch64__)
    asm("" : "+w"(product));
#else
    volatile double held = product;
    product = held;
#endif
    return product;
}

}  // namespace detail

POLYATTN_END_NAMESPACE
