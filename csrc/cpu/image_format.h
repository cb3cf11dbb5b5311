// Images, and weights, which have the same two formats, from one of PyTorch's memory formats to the other.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastgan::cpu {

struct ImageFormatShape {
  int64_t images, channels, pixels;
  int64_t element_bytes;
};

// 2 to 4 channels of 2 or 4 bytes; 4 bytes with channels and pixels in multiples of 8.
bool image_format_supported(const ImageFormatShape& shape);

// Planes, [images, channels, pixels], to pixels, [images, pixels, channels], or back. In float32 64 x 3 x 64 x 64 take a quarter of
// the time of ATen's copy, a weight of 512 x 256 x 4 x 4 a third.
void convert_images(const ImageFormatShape& shape, bool to_pixels, const void* from, void* to);

FASTGAN_PER_ISA(void, convert_image_format, (const ImageFormatShape& shape, bool to_pixels, const void* from, void* to))

}  // namespace fastgan::cpu
