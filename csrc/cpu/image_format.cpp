#include "image_format.h"

namespace fastgan::cpu {

bool image_format_supported(const ImageFormatShape& s) {
  return s.channels >= 2 && s.channels <= 4 && (s.element_bytes == 2 || s.element_bytes == 4);
}

void planes_to_pixels(const ImageFormatShape& shape, const void* planes, void* pixels) {
  FASTGAN_ISA_CALL(convert_image_format, shape, false, planes, pixels);
}

void pixels_to_planes(const ImageFormatShape& shape, const void* pixels, void* planes) {
  FASTGAN_ISA_CALL(convert_image_format, shape, true, pixels, planes);
}

}  // namespace fastgan::cpu
