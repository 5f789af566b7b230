#pragma once

#include <polyattn/attention_layer.hpp>
#include <polyattn/compressed_attention.hpp>
#include <polyattn/policy/attention.hpp>
