#pragma once

#include <cstddef>

/// Calls of operator new so far, all threads. Linking allocations.cpp replaces the global operators.
std::size_t allocation_count();
