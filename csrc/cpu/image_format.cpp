#include "image_format.h"

namespace fastgan::cpu {

bool image_format_supported(const ImageFormatShape& s) {
  return s.channels >= 2 && s.channels <= 4 && (s.element_bytes == 2 || s.element_bytes == 4);
}

void convert_images(const ImageFormatShape& shape, bool to_pixels, const void* from, void* to) {
  FASTGAN_ISA_CALL(convert_image_format, shape, to_pixels, from, to);
}

}  // namespace fastgan::cpu
