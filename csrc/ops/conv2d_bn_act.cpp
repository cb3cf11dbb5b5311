// conv2d_bn_act and conv2d_act: convolution [+ batch norm] + activation.
#include <torch/library.h>

#include "conv_bn_act.h"

namespace fastgan {
namespace {

constexpr int64_t kNoOutputPadding[2] = {0, 0};

Tensor conv2d_bn_act(const Tensor& input,              // [N, C_in, H, W] or [C_in, H, W]
                     const Tensor& weight,             // [C_out, C_in / groups, kH, kW]
                     const OptionalTensor& bias,       // [C_out]
                     const OptionalTensor& bn_weight,  // [C_out]
                     const OptionalTensor& bn_bias,    // [C_out]
                     const OptionalTensor& running_mean,  // [C_out], updated when training
                     const OptionalTensor& running_var,   // [C_out], updated when training
                     IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, bool training,
                     double momentum, double eps, c10::string_view activation, double negative_slope,
                     c10::string_view process_group, int64_t processes) {
  const ConvLayer layer{stride, padding, dilation, /*transposed=*/false, kNoOutputPadding, groups};
  return conv_bn_act("conv2d_bn_act", input, weight, bias, bn_weight, bn_bias, running_mean, running_var, layer,
                     training, momentum, eps, activation, negative_slope, {std::string(process_group), processes});
}

Tensor conv2d_act(const Tensor& input,         // [N, C_in, H, W] or [C_in, H, W]
                  const Tensor& weight,        // [C_out, C_in / groups, kH, kW]
                  const OptionalTensor& bias,  // [C_out]
                  IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                  c10::string_view activation, double negative_slope) {
  const ConvLayer layer{stride, padding, dilation, /*transposed=*/false, kNoOutputPadding, groups};
  return conv_act("conv2d_act", input, weight, bias, layer, activation, negative_slope);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgan, CompositeImplicitAutograd, m) {
  m.impl("conv2d_bn_act", &conv2d_bn_act);
  m.impl("conv2d_act", &conv2d_act);
}

}  // namespace fastgan
