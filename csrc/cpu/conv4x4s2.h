// Kernel-4, stride-2, padding-1 convolutions: every middle layer of a DCGAN, in all three directions.
//
// Both networks are described by one geometry. The *large* tensor is the image side (input of a convolution, output of
// a transposed convolution), the *small* tensor the other one, and the weight is [small_channels, large_channels, 4, 4]
// either way: that is PyTorch's layout for Conv2d ([out, in, 4, 4]) and for ConvTranspose2d ([in, out, 4, 4]) alike.
//
//   loop              reads           writes   used as
//   down              large           small    Conv2d forward, ConvTranspose2d input gradient
//   up                small           large    ConvTranspose2d forward, Conv2d input gradient
//   weight_gradient   large, small    weight   weight gradient of both
//
// All tensors but the weight are NHWC (channels_last), dense. Typical use, a convolution followed by batch norm:
//
//   if (conv4x4s2_packed_bytes(shape, Conv4x4s2Loop::down) == 0) packed = weight;
//   else conv4x4s2_pack(shape, Conv4x4s2Loop::down, weight, packed);          // after every weight update
//   ConvOperand x;  x.data = y_before;  x.scale = ...;  x.shift = ...;        // batch norm + activation of the layer before
//   ConvEpilogue e; e.mode = ConvEpilogue::Mode::statistics;  e.out = y;  e.mean = mean;  e.m2 = m2;
//   conv4x4s2_down(shape, x, packed, e, workspace, threads);
//
// The kernels allocate nothing. Results are the same from run to run and for every number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../activation.h"

namespace fastgan::cpu {

// Element type of the large and small tensors, and of the products. Weights, per-channel parameters and statistics are always
// float; statistics are those of the results before they are rounded to be stored.
enum class ConvDType : int32_t {
  float32 = 0,
  bfloat16,  // the products take operands and weights rounded to bfloat16 (without AMX differences and sums of them,
             // conv4x4s2_bf16_filtered_kernel.cpp)
  mixed,     // bfloat16 tensors, products of floats
};

struct Conv4x4s2Shape {
  int64_t batch;
  int64_t large_height, large_width, large_channels;
  int64_t small_height, small_width, small_channels;  // small_height = large_height / 2, rounded down; width alike
  ConvDType dtype = ConvDType::float32;
  bool weight_channels_last = false;  // the weight and its gradient are [small_channels, 4, 4, large_channels]; where supported
};

enum class Conv4x4s2Loop { down, up, weight_gradient };

// A tensor a loop reads, and what happens to each element on the way in. Padding is 0 after that.
//
// activated costs nothing measurable. batch_norm_backward costs about 2.5 ms in up and 3 ms in weight_gradient for 8.4 MB
// on one core (64 -> 128 channels, 32 px, batch 64: 15% of each), as a loop reads its operands several times: where both
// loops read the same gradient, one pass that replaces it in place and plain operands after that are faster. On AMX in
// bfloat16 the products are quicker: there activated costs 3 to 10% and batch_norm_backward 8 to 35% of a loop.
struct ConvOperand {
  enum class Mode {
    plain,                // data
    activated,            // activation(scale[c] * data + shift[c])
    batch_norm_backward,  // scale[c] * data + other_scale[c] * other + shift[c]: data is the gradient after the
                          // normalisation, other the raw convolution output that was normalised
  };
  const void* data = nullptr;   // [batch, height, width, channels]
  Mode mode = Mode::plain;
  const float* scale = nullptr;  // [channels]; activated: scale and shift may both be null, meaning 1 and 0
  const float* shift = nullptr;  // [channels]
  Activation activation = Activation::identity;
  float negative_slope = 0.2f;
  const void* other = nullptr;         // like data
  const float* other_scale = nullptr;  // [channels]
};

// What happens to the result r of down and up. One mode a call.
struct ConvEpilogue {
  enum class Mode {
    store,       // out = r + bias
    activate,    // out = activation(scale[c] * r + bias)
    statistics,  // out = r + bias; mean[c] of out and m2[c] = sum of (out - mean)^2, over batch and pixels
    gradient,    // r is the gradient of a = activation(z), z = scale[c] * y + shift[c]:
                 // out = dz = r * activation'(z); sum_dz[c] = sum of dz;
                 // sum_dz_xhat[c] = sum of dz * (y - y_mean[c]) * y_invstd[c]
  };
  Mode mode = Mode::store;
  void* out = nullptr;          // [batch, height, width, channels]
  const float* bias = nullptr;  // [channels] or null; not used by gradient
  Activation activation = Activation::identity;
  float negative_slope = 0.2f;

  float* mean = nullptr;  // [channels], written by statistics
  float* m2 = nullptr;    // [channels], written by statistics

  const void* y = nullptr;         // like out; read by gradient
  const float* scale = nullptr;    // [channels] or null, meaning 1; read by activate and gradient
  const float* shift = nullptr;    // [channels], or null where scale is; read by gradient
  const float* y_mean = nullptr;   // [channels]; null: there is no batch norm, sum_dz_xhat is not computed
  const float* y_invstd = nullptr;
  float* sum_dz = nullptr;       // [channels], written by gradient; may be null
  float* sum_dz_xhat = nullptr;  // [channels], written by gradient if y_mean is given
};

// Where weight_gradient leaves its result: float, like the weight.
struct ConvWeightGradient {
  float* data;
  bool add = false;  // to what data holds
};

// Whether the loop can run on this shape; if not, the caller takes another road. Supported: small_channels a multiple of
// 16; large_channels a multiple of 16, or 1 to 4 (images); small sides of 2 to 256, large ones twice that or one more
// (the output_padding of a transposed convolution). bfloat16 (not mixed): on AVX512-BF16 and AMX only, and from a batch of 16
// on where the large tensor is not an image.
bool conv4x4s2_supported(const Conv4x4s2Shape& shape);

// Whether they can with weights in channels_last: float32 and mixed, where the large tensor is not an image.
bool conv4x4s2_takes_channels_last(const Conv4x4s2Shape& shape);

// Whether the loops multiply differences and sums rounded to bfloat16: their error is twice that of bfloat16 operands and weights
// which are multiplied as they are, and not more than the usual one where weights are float.
bool conv4x4s2_rounds_sums(const Conv4x4s2Shape& shape);

// Bytes for the packed weights of down or up, aligned to 64 bytes or more by the caller. 0 where nothing is packed: the loop then
// takes the weight itself in place of `packed` (weight_gradient takes neither).
size_t conv4x4s2_packed_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop);

// Transforms the weight, float, into what `loop` reads for this shape.
void conv4x4s2_pack(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, void* packed);

// Bytes of scratch for a call that at most `threads` threads work on. Aligned to 64 bytes or more by the caller; its
// content need not be set before a call and means nothing after it.
size_t conv4x4s2_workspace_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, int threads);

void conv4x4s2_down(const Conv4x4s2Shape& shape, const ConvOperand& large, const void* packed,
                    const ConvEpilogue& small, void* workspace, int threads);

void conv4x4s2_up(const Conv4x4s2Shape& shape, const ConvOperand& small, const void* packed,
                  const ConvEpilogue& large, void* workspace, int threads);

// For a convolution, large is its input and small the gradient of its output; for a transposed convolution, large is
// the gradient of its output and small its input.
void conv4x4s2_weight_gradient(const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,
                               const ConvWeightGradient& result, void* workspace, int threads);

}  // namespace fastgan::cpu
