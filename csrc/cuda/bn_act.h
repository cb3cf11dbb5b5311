// Batch normalisation + activation after a convolution, and activation alone: CUDA kernels over raw pointers.
//
// Every tensor is described as [outer, channels, inner], dense, in elements:
//   contiguous  [N, C, H, W]: outer = N,         inner = H * W
//   channels_last           : outer = N * H * W, inner = 1
// Per-channel arrays (statistics, scale, shift, sums, parameters) are float32. All pointers are device pointers.
//
// Statistics and sums come in two kernels: one writes a partial result per tile, the other merges the tiles in
// order, in float64. The convolutions' epilogues write the same partial results, so that the second kernel serves
// both. No atomics: the result is the same in every run.
//
// Every function launches on `stream`, allocates nothing, does not synchronise, and returns the launch's error.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "runtime.h"

namespace fastgan::cuda {

struct BnActShape {
  int64_t outer;
  int64_t channels;
  int64_t inner;
};

struct ActivationSpec {
  Activation kind = Activation::identity;
  float negative_slope = 0.0f;  // of leaky_relu
};

// A tile's number of values, their mean, and the sum of their squared deviations from it.
// Rows of `mean` and `m2` outnumber entries of `count` by `rows_per_count` (k4 s1 p0 on 1x1: 16 output positions a
// row).
struct StatisticsTiles {
  int64_t tiles = 0;  // rows of mean and m2
  int64_t rows_per_count = 1;
  float* mean = nullptr;   // [tiles, channels]
  float* m2 = nullptr;     // [tiles, channels]
  float* count = nullptr;  // [tiles / rows_per_count]
};

// A tile's sums of dz and of dz * xhat.
struct GradientTiles {
  int64_t tiles = 0;
  float* sum_dz = nullptr;       // [tiles, channels]
  float* sum_dz_xhat = nullptr;  // [tiles, channels]; null: not wanted
};

// Tiles that the two reductions below make of a shape.
int64_t bn_act_tiles(const BnActShape& shape);

struct BatchStatisticsArgs {
  BnActShape shape;
  DataType type;
  const void* input;  // [outer, channels, inner]
  StatisticsTiles tiles;
};
cudaError_t batch_statistics_launch(const BatchStatisticsArgs& args, cudaStream_t stream);

// Merges tiles; scale = weight * invstd, shift = bias - mean * scale; running statistics updated with the unbiased
// variance. `batches_tracked`, if given, holds the number of batches seen, this one included, and replaces
// momentum by its reciprocal (cumulative average): read on the device, so that a CUDA graph stays right.
struct BatchNormForwardArgs {
  int64_t channels;
  StatisticsTiles tiles;
  double count = 1.0;             // values a channel
  const float* weight = nullptr;  // [channels], null: 1
  const float* bias = nullptr;    // [channels], null: 0
  float eps = 1e-5f;
  float momentum = 0.1f;
  const int64_t* batches_tracked = nullptr;  // [1]
  float* running_mean = nullptr;             // [channels], null: not kept
  float* running_var = nullptr;              // [channels]
  float* mean = nullptr;                     // [channels], out
  float* invstd = nullptr;                   // [channels], out
  float* scale = nullptr;                    // [channels], out
  float* shift = nullptr;                    // [channels], out
};
cudaError_t batch_norm_forward_launch(const BatchNormForwardArgs& args, cudaStream_t stream);

// The same four outputs from running_mean and running_var (evaluation mode); tiles are not read, nothing is updated.
cudaError_t batch_norm_inference_launch(const BatchNormForwardArgs& args, cudaStream_t stream);

// output = act(scale[c] * input + shift[c]); output may be input; null scale is 1, null shift is 0.
struct ScaleShiftActArgs {
  BnActShape shape;
  DataType type;
  const void* input;
  const float* scale = nullptr;  // [channels]
  const float* shift = nullptr;  // [channels]
  ActivationSpec activation;
  void* output;
};
cudaError_t scale_shift_act_launch(const ScaleShiftActArgs& args, cudaStream_t stream);

// xhat = (input - mean[c]) * invstd[c], z = weight[c] * xhat + bias[c], dz = grad_output * act'(z), and the application is
// grad_input = weight[c] * invstd[c] * dz + b[c] * input + c[c]. z is rounded as in forward.
struct BnActBackwardArgs {
  BnActShape shape;
  DataType type;
  const void* grad_output;
  const void* input;              // the convolution's raw output
  const float* weight = nullptr;  // [channels], null: 1
  const float* bias = nullptr;    // [channels], null: 0
  const float* mean = nullptr;    // [channels], null: 0
  const float* invstd = nullptr;  // [channels], null: 1
  ActivationSpec activation;
  GradientTiles tiles;         // out of the reduction
  const float* b = nullptr;    // [channels], null: 0, as in evaluation mode
  const float* c = nullptr;    // [channels], null: 0
  void* grad_input = nullptr;  // out of the application; may be grad_output
};
cudaError_t bn_act_backward_reduce_launch(const BnActBackwardArgs& args, cudaStream_t stream);
cudaError_t bn_act_backward_apply_launch(const BnActBackwardArgs& args, cudaStream_t stream);

// Merges tiles; with scale = weight * invstd and `count` values per channel, the gradient by batch statistics,
// scale (dz - mean(dz) - xhat mean(dz xhat)), is scale dz + b input + c:
//   b = -scale invstd mean(dz xhat),  c = -scale mean(dz) - b mean
struct BatchNormBackwardArgs {
  int64_t channels;
  GradientTiles tiles;
  double count = 1.0;
  float* sum_dz = nullptr;       // [channels], out: the gradient of the bias
  float* sum_dz_xhat = nullptr;  // [channels], out: the gradient of the weight; null if the tiles have none
  float* b = nullptr;            // [channels], out; null: b and c are not wanted, and nothing below is read
  float* c = nullptr;            // [channels], out
  const float* weight = nullptr;  // [channels], null: 1
  const float* mean = nullptr;    // [channels]
  const float* invstd = nullptr;  // [channels]
};
cudaError_t batch_norm_backward_launch(const BatchNormBackwardArgs& args, cudaStream_t stream);

// Activation without batch norm, derivative from its own output (a leaky ReLU needs negative_slope >= 0):
// grad_input = grad_output * act'(output); tiles.sum_dz, if not null, gets the tiles' sums for the bias.
struct ActBackwardArgs {
  BnActShape shape;
  DataType type;
  const void* grad_output;
  const void* output;
  ActivationSpec activation;
  void* grad_input;
  GradientTiles tiles;
};
cudaError_t act_backward_launch(const ActBackwardArgs& args, cudaStream_t stream);

}  // namespace fastgan::cuda
