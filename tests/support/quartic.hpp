#pragma once

#include <polyattn/core/config.hpp>

/// A caller's own feature map.
struct Quartic {
    POLYATTN_HOST_DEVICE double operator()(double x) const { return x * x * x * x; }
    POLYATTN_HOST_DEVICE double derivative(double x) const { return 4 * x * x * x; }
};
