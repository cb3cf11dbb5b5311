// The activations on the device: value, derivative from the pre-activation, derivative from the output.
#pragma once

#include <type_traits>

#include "../activation.h"
#include "device.cuh"

namespace fastgan::cuda {

// Calls f with the activation as a compile-time value: one branch for a batch, not one for every element.
template <typename F>
__device__ __forceinline__ void for_activation(Activation kind, const F& f) {
  switch (kind) {
    case Activation::relu: return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::leaky_relu: return f(std::integral_constant<Activation, Activation::leaky_relu>{});
    case Activation::tanh: return f(std::integral_constant<Activation, Activation::tanh>{});
    case Activation::sigmoid: return f(std::integral_constant<Activation, Activation::sigmoid>{});
    default: return f(std::integral_constant<Activation, Activation::identity>{});
  }
}

__device__ __forceinline__ float activate(Activation kind, float negative_slope, float z) {
  switch (kind) {
    case Activation::relu: return z < 0.0f ? 0.0f : z;  // NaN stays NaN
    case Activation::leaky_relu: return z > 0.0f ? z : z * negative_slope;
    case Activation::tanh: return tanhf(z);
    case Activation::sigmoid: return reciprocal(1.0f + expf(-z));
    default: return z;
  }
}

__device__ __forceinline__ float activation_derivative(Activation kind, float negative_slope, float z) {
  switch (kind) {
    case Activation::relu: return z <= 0.0f ? 0.0f : 1.0f;  // as in PyTorch, also for NaN
    case Activation::leaky_relu: return z > 0.0f ? 1.0f : negative_slope;
    case Activation::tanh: {
      const float y = tanhf(z);
      return 1.0f - y * y;
    }
    case Activation::sigmoid: {
      const float y = reciprocal(1.0f + expf(-z));
      return y * (1.0f - y);
    }
    default: return 1.0f;
  }
}

// From the output y = act(z); for a leaky ReLU this needs negative_slope >= 0.
__device__ __forceinline__ float activation_derivative_from_output(Activation kind, float negative_slope, float y) {
  switch (kind) {
    case Activation::relu: return y <= 0.0f ? 0.0f : 1.0f;
    case Activation::leaky_relu: return y > 0.0f ? 1.0f : negative_slope;
    case Activation::tanh: return 1.0f - y * y;
    case Activation::sigmoid: return y * (1.0f - y);
    default: return 1.0f;
  }
}

}  // namespace fastgan::cuda
