// Transposed convolutions of one pixel, with no padding: the first layer of a DCGAN's generator, [batch, inputs] to
// [batch, height, width, channels], which is a matrix product with the weight [inputs, channels, height, width].
//
// The product needs the weight's channels side by side. They are put so piece by piece, next to the products that use them,
// and the weight's gradient is put back the same way: no reordered copy of either is ever stored.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastgan::cpu {

struct FromPixelShape {
  int64_t batch, inputs;
  int64_t channels, pixels;  // of the output; pixels = height * width = those of the kernel
};

// Whether the loops below can run on this shape: channels a multiple of 32.
bool from_pixel_supported(const FromPixelShape& shape);

// Bytes of scratch for a call that at most `threads` threads work on, aligned to 64 bytes or more by the caller.
int64_t from_pixel_workspace_bytes(const FromPixelShape& shape, int threads);

// output[n, pixel, channel] = sum over i of input[n, i] * weight[i, channel, pixel]. All dense, float.
void from_pixel_forward(const FromPixelShape& shape, const float* input, const float* weight, float* output, void* workspace,
                        int threads);

// weight_gradient[i, channel, pixel] = sum over n of input[n, i] * gradient[n, pixel, channel]
void from_pixel_weight_gradient(const FromPixelShape& shape, const float* input, const float* gradient, float* weight_gradient,
                                void* workspace, int threads);

FASTGAN_PER_ISA(int64_t, from_pixel_scratch_bytes, (const FromPixelShape& shape, int threads))
FASTGAN_PER_ISA(void, from_pixel_products,
                (const FromPixelShape& shape, const float* input, const float* weight, float* output, void* workspace,
                 int threads))
FASTGAN_PER_ISA(void, from_pixel_gradient_products,
                (const FromPixelShape& shape, const float* input, const float* gradient, float* weight_gradient,
                 void* workspace, int threads))

}  // namespace fastgan::cpu
