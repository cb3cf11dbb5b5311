// Convolutions whose kernel covers the whole image, with no padding: the last layer of a DCGAN's discriminator, [batch, height,
// width, channels] to a few numbers an image.
//
// There is next to nothing to multiply, so the image is read as it lies, with batch norm and activation on the way in, and its
// gradient leaves with the activation's derivative and the sums that batch norm's backward needs.
#pragma once

#include <cstdint>

#include "conv4x4s2.h"
#include "isa.h"

namespace fastgan::cpu {

struct ToPixelShape {
  int64_t batch;
  int64_t height, width, channels;  // of the image; height and width also of the kernel
  int64_t outputs;
};

constexpr int kMostToPixelOutputs = 4;

// Whether the loops below can run on this shape: channels a multiple of 16, at most that many outputs.
bool to_pixel_supported(const ToPixelShape& shape);

// Bytes of scratch for a call that at most `threads` threads work on, aligned to 64 bytes or more by the caller.
int64_t to_pixel_workspace_bytes(const ToPixelShape& shape, int threads);

// output[n, k] = bias[k] + sum over pixels and channels of input[n, pixel, channel] * weight[k, channel, pixel]. All dense, float;
// bias may be null.
void to_pixel_forward(const ToPixelShape& shape, const ConvOperand& input, const float* weight, const float* bias, float* output,
                      void* workspace);

// epilogue(r), r[n, pixel, channel] = sum over k of gradient[n, k] * weight[k, channel, pixel]; not the epilogue `statistics`.
void to_pixel_input_gradient(const ToPixelShape& shape, const float* gradient, const float* weight, const ConvEpilogue& epilogue,
                             void* workspace, int threads);

// weight_gradient[k, channel, pixel] = sum over n of gradient[n, k] * input[n, pixel, channel]
void to_pixel_weight_gradient(const ToPixelShape& shape, const ConvOperand& input, const float* gradient, float* weight_gradient,
                              void* workspace);

FASTGAN_PER_ISA(int64_t, to_pixel_scratch_bytes, (const ToPixelShape& shape, int threads))
FASTGAN_PER_ISA(void, to_pixel_sums,
                (const ToPixelShape& shape, const ConvOperand& input, const float* weight, const float* bias, float* output,
                 void* workspace))
FASTGAN_PER_ISA(void, to_pixel_spread,
                (const ToPixelShape& shape, const float* gradient, const float* weight, const ConvEpilogue& epilogue,
                 void* workspace, int threads))
FASTGAN_PER_ISA(void, to_pixel_weight_sums,
                (const ToPixelShape& shape, const ConvOperand& input, const float* gradient, float* weight_gradient,
                 void* workspace))

}  // namespace fastgan::cpu
