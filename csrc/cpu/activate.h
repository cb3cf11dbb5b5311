// Activations and their derivatives as the compiler vectorises them; for *_kernel.cpp files only (internal linkage, see
// isa.h).
#pragma once

#include "bn_act.h"
#include "scalar_math.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

// z -> act(z), and the derivative from z or from act(z).
template <Activation kind, typename A>
struct Act {
  A slope;
  A forward(A z) const {
    if constexpr (kind == Activation::relu) return z < A(0) ? A(0) : z;  // NaN stays NaN
    if constexpr (kind == Activation::leaky_relu) {
      const A below = z * slope;  // computed either way: a product on one side only would keep the loop scalar
      return z > A(0) ? z : below;
    }
    if constexpr (kind == Activation::tanh) return tanh_value(z);
    if constexpr (kind == Activation::sigmoid) return sigmoid_value(z);
    return z;
  }
  A derivative(A grad, A z) const {
    if constexpr (kind == Activation::relu) return z <= A(0) ? A(0) : grad;
    if constexpr (kind == Activation::leaky_relu) {
      const A below = grad * slope;
      return z > A(0) ? grad : below;
    }
    if constexpr (kind == Activation::tanh || kind == Activation::sigmoid) return derivative_from_output(grad, forward(z));
    return grad;
  }
  A derivative_from_output(A grad, A y) const {
    if constexpr (kind == Activation::tanh) return grad * (A(1) - y * y);
    if constexpr (kind == Activation::sigmoid) return grad * (y * (A(1) - y));
    return derivative(grad, y);  // relu and leaky_relu keep the sign
  }
};

// Calls f with the Act that activation names.
template <typename A, typename F>
void with_activation(ActivationSpec activation, F&& f) {
  const A slope = static_cast<A>(activation.negative_slope);
  switch (activation.kind) {
    case Activation::relu: return f(Act<Activation::relu, A>{slope});
    case Activation::leaky_relu: return f(Act<Activation::leaky_relu, A>{slope});
    case Activation::tanh: return f(Act<Activation::tanh, A>{slope});
    case Activation::sigmoid: return f(Act<Activation::sigmoid, A>{slope});
    case Activation::identity: return f(Act<Activation::identity, A>{slope});
  }
}

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
