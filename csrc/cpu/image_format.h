// Images of few channels, from one of PyTorch's memory formats to the other.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastgan::cpu {

struct ImageFormatShape {
  int64_t images, channels, pixels;
  int64_t element_bytes;
};

// 2 to 4 channels of 2 or 4 bytes.
bool image_format_supported(const ImageFormatShape& shape);

// Planes, [images, channels, pixels], to pixels, [images, pixels, channels], or back: 64 x 3 x 64 x 64 in float32 take a quarter of
// the time of ATen's copy.
void convert_images(const ImageFormatShape& shape, bool to_pixels, const void* from, void* to);

FASTGAN_PER_ISA(void, convert_image_format, (const ImageFormatShape& shape, bool to_pixels, const void* from, void* to))

}  // namespace fastgan::cpu
