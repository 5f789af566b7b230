// Two programs, one for each of Thrust's device systems that need no GPU; the definition of THRUST_DEVICE_SYSTEM says which.
#include <thrust/execution_policy.h>

inline auto execution() { return thrust::device; }

#include "cuda/sampling_table.hpp"
#include "cuda/plan_table.hpp"
