#include "to_pixel.h"

namespace fastgan::cpu {

bool to_pixel_supported(const ToPixelShape& s) {
  return s.batch > 0 && s.height > 0 && s.width > 0 && s.channels > 0 && s.channels % 16 == 0 && s.outputs > 0 && s.outputs <= kMostToPixelOutputs;
}

int64_t to_pixel_workspace_bytes(const ToPixelShape& shape, int threads) {
  return FASTGAN_ISA_CALL(to_pixel_scratch_bytes, shape, threads);
}

void to_pixel_forward(const ToPixelShape& shape, const ConvOperand& input, const float* weight, const float* bias, float* output,
                      void* workspace) {
  FASTGAN_ISA_CALL(to_pixel_sums, shape, input, weight, bias, output, workspace);
}

void to_pixel_input_gradient(const ToPixelShape& shape, const float* gradient, const float* weight, const ConvEpilogue& epilogue,
                             void* workspace, int threads) {
  FASTGAN_ISA_CALL(to_pixel_spread, shape, gradient, weight, epilogue, workspace, threads);
}

void to_pixel_weight_gradient(const ToPixelShape& shape, const ConvOperand& input, const float* gradient, float* weight_gradient,
                              void* workspace) {
  FASTGAN_ISA_CALL(to_pixel_weight_sums, shape, input, gradient, weight_gradient, workspace);
}

}  // namespace fastgan::cpu
