#include "from_pixel.h"

namespace fastgan::cpu {

bool from_pixel_supported(const FromPixelShape& s) {
  return s.batch > 0 && s.inputs > 0 && s.pixels > 0 && s.channels > 0 && s.channels % 32 == 0;
}

int64_t from_pixel_workspace_bytes(const FromPixelShape& shape, int threads) {
  return FASTGAN_ISA_CALL(from_pixel_scratch_bytes, shape, threads);
}

void from_pixel_forward(const FromPixelShape& shape, const float* input, const float* weight, float* output, void* workspace,
                        int threads) {
  FASTGAN_ISA_CALL(from_pixel_products, shape, input, weight, output, workspace, threads);
}

void from_pixel_weight_gradient(const FromPixelShape& shape, const float* input, const float* gradient, float* weight_gradient,
                                void* workspace, int threads) {
  FASTGAN_ISA_CALL(from_pixel_gradient_products, shape, input, gradient, weight_gradient, workspace, threads);
}

}  // namespace fastgan::cpu
