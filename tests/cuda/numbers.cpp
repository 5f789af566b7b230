// The numbers and properties that every backend must show, on the device.
#include "cuda/device_layer.hpp"

using Tested = DeviceLayer<>;
#define POLYATTN_TEST_OF_OTHER_LAYER
#include "../numbers.cpp"
