// What the convolution family takes from ATen on any device. See conv_bn_act.h.
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tanh.h>

#include "conv_bn_act.h"

namespace fastgan {
namespace {

// Whether some row or column of the kernel meets nothing but padding.
bool has_dead_taps(const Tensor& grad, const Tensor& input, const Tensor& weight, const ConvLayer& layer) {
  const Tensor &steps = layer.transposed ? input : grad, &read = layer.transposed ? grad : input;
  for (int dim = 0; dim < 2; ++dim) {
    for (int64_t tap = 0; tap < weight.size(2 + dim); ++tap) {
      bool meets = false;
      for (int64_t i = 0; i < steps.size(2 + dim) && !meets; ++i) {
        const int64_t at = i * layer.stride[dim] - layer.padding[dim] + tap * layer.dilation[dim];
        meets = at >= 0 && at < read.size(2 + dim);
      }
      if (!meets) return true;
    }
  }
  return false;
}

}  // namespace

Tensor activate(const Tensor& z, Activation activation, double negative_slope) {
  switch (activation) {
    case Activation::relu: return at::relu(z);
    case Activation::leaky_relu: return at::leaky_relu(z, negative_slope);
    case Activation::tanh: return at::tanh(z);
    case Activation::sigmoid: return at::sigmoid(z);
    case Activation::identity: return z;
  }
  TORCH_INTERNAL_ASSERT(false);
}

Tensor convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const ConvLayer& layer) {
  return at::convolution(input, weight, bias, layer.stride, layer.padding, layer.dilation, layer.transposed,
                         layer.output_padding, layer.groups);
}

std::tuple<Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                                const ConvLayer& layer, std::array<bool, 2> output_mask) {
  // Two defects of PyTorch 2.13's CPU backward. With output_padding, a transposed convolution in channels_last writes
  // out of bounds; in the contiguous layout it does not. In bfloat16 and float16 the weight gradient of taps that meet
  // only padding is left unset; in float32 it is 0.
  const bool avoid_channels_last = layer.transposed && (layer.output_padding[0] > 0 || layer.output_padding[1] > 0);
  const auto dtype = input.scalar_type();
  const bool in_float = input.device().is_cpu() && (dtype == at::kBFloat16 || dtype == at::kHalf) && output_mask[1] &&
                        has_dead_taps(grad, input, weight, layer);
  const auto arrange = [&](const Tensor& tensor) {
    const Tensor widened = in_float ? tensor.to(at::kFloat) : tensor;
    return avoid_channels_last ? widened.contiguous() : widened;
  };
  auto [grad_input, grad_weight, grad_bias] = at::convolution_backward(
      arrange(grad), arrange(input), arrange(weight), std::nullopt, layer.stride, layer.padding, layer.dilation,
      layer.transposed, layer.output_padding, layer.groups, {output_mask[0], output_mask[1], false});
  if (in_float && output_mask[0]) grad_input = grad_input.to(dtype);
  if (in_float) grad_weight = grad_weight.to(dtype);
  return {grad_input, grad_weight};
}

}  // namespace fastgan
