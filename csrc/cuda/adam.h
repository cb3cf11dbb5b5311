// Adam (Kingma and Ba 2015) on float32 parameters: CUDA kernel over raw pointers.
//
// A tensor and its averages are arrays of `size` elements in the same order, whichever it is. All pointers are device pointers.
//
// Launches on `stream`, allocates nothing, does not synchronise, and returns the launch's error.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace fastgan::cuda {

struct AdamTensor {
  float* parameter;       // [size], in and out
  const float* gradient;  // [size]
  float* exp_avg;         // [size], in and out: mean of the gradient
  float* exp_avg_sq;      // [size], in and out: mean of its square
  float* step;            // [1], in and out: steps made so far
  int64_t size;
};

struct AdamArgs {
  const AdamTensor* tensors = nullptr;  // [count], read during the call alone
  int64_t count = 0;
  float lr = 1e-3f;
  const float* lr_on_device = nullptr;  // [1], null: lr holds
  float beta1 = 0.9f;
  float beta2 = 0.999f;
  float eps = 1e-8f;
  float weight_decay = 0.0f;
  bool decoupled_weight_decay = false;  // as AdamW; else it is added to the gradient
  const float* found_inf = nullptr;     // [1], null: 0. Not 0: nothing is changed
  unsigned* blocks_arrived = nullptr;   // [1], 0 before the call and after it; not shared with other streams
};

// Tensors that one kernel takes; beyond them one more is launched.
constexpr int kMostAdamTensors = 72;

cudaError_t adam_launch(const AdamArgs& args, cudaStream_t stream);

}  // namespace fastgan::cuda
