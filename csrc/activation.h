// The activations every fused kernel knows.
#pragma once

#include <cstdint>

namespace fastgan {
enum class Activation : int32_t { identity = 0, relu, leaky_relu, tanh, sigmoid };
}  // namespace fastgan
