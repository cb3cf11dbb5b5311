#include "image_format.h"

namespace fastgan::cpu {

bool image_format_supported(const ImageFormatShape& s) {
  if (s.channels >= 2 && s.channels <= 4) return s.element_bytes == 2 || s.element_bytes == 4;
  return s.element_bytes == 4 && s.channels > 0 && s.channels % 8 == 0 && s.pixels % 8 == 0;
}

void convert_images(const ImageFormatShape& shape, bool to_pixels, const void* from, void* to) {
  FASTGAN_ISA_CALL(convert_image_format, shape, to_pixels, from, to);
}

}  // namespace fastgan::cpu
