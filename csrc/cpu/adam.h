// Adam (Kingma and Ba 2015) on float parameters.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastgan::cpu {

// A tensor and its averages are arrays of `size` elements in the same order, whichever it is.
struct AdamTensor {
  float* parameter;       // in and out
  const float* gradient;
  float* exp_avg;         // in and out: mean of the gradient
  float* exp_avg_sq;      // in and out: mean of its square
  int64_t size;
  float step_size;        // lr / (1 - beta1^t)
  float root_correction;  // 1 / sqrt(1 - beta2^t)
};

struct AdamSettings {
  float beta1, beta2;
  float rest1, rest2;  // 1 - beta
  float eps;
  float weight_decay;     // added to the gradient, times the parameter
  float parameter_scale;  // what is left of the parameter before the step, 1 - lr * weight decay as AdamW has it
};

FASTGAN_PER_ISA(void, adam_step, (const AdamTensor* tensors, int64_t count, const AdamSettings& settings))

inline void adam(const AdamTensor* tensors, int64_t count, const AdamSettings& settings) {
  FASTGAN_ISA_CALL(adam_step, tensors, count, settings);
}

}  // namespace fastgan::cpu
