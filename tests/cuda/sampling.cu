#include "cuda/sampling_table.hpp"
