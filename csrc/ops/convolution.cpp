// What the convolution family takes from ATen on any device. See conv_bn_act.h.
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tanh.h>

#include "conv_bn_act.h"
#include "saved_conv_layer.h"

namespace fastgan {
namespace {

// Whether some row or column of the kernel meets nothing but padding.
bool has_dead_taps(const Tensor& grad, const Tensor& input, const Tensor& weight, const ConvLayer& layer) {
  const Tensor &steps = layer.transposed ? input : grad, &read = layer.transposed ? grad : input;
  for (int dim = 0; dim < 2; ++dim) {
    const auto length = [dim](const Tensor& of) { return of.sym_size(2 + dim).guard_int(__FILE__, __LINE__); };
    for (int64_t tap = 0; tap < length(weight); ++tap) {
      bool meets = false;
      for (int64_t i = 0; i < length(steps) && !meets; ++i) {
        const int64_t at = i * layer.stride[dim] - layer.padding[dim] + tap * layer.dilation[dim];
        meets = at >= 0 && at < length(read);
      }
      if (!meets) return true;
    }
  }
  return false;
}

// Its elements in the default layout, with that layout's strides: contiguous() leaves those of sides of 1, by which ATen tells channels_last.
Tensor in_default_strides(const Tensor& tensor) { return tensor.reshape({-1}).view_symint(tensor.sym_sizes()); }

class Convolution : public torch::autograd::Function<Convolution> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        const ConvLayer& layer) {
    ctx->save_for_backward({input, weight});
    ctx->set_materialize_grads(false);
    ctx->saved_data["has_bias"] = bias.has_value() && bias->defined();
    save_layer(ctx, layer);
    return convolution(input, weight, bias, layer);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const SavedConvLayer s(ctx);
    const bool input = ctx->needs_input_grad(0), weight = ctx->needs_input_grad(1);
    torch::autograd::variable_list gradients(4);
    if (!grads[0].defined()) return gradients;
    if (input || weight)
      std::tie(gradients[0], gradients[1]) = convolution_backward(grads[0], saved[0], saved[1], s.layer, {input, weight});
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2)) gradients[2] = grads[0].sum({0, 2, 3});
    return gradients;
  }
};

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

Tensor differentiable_convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const ConvLayer& layer) {
  return Convolution::apply(input, weight, bias, layer);
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
    return avoid_channels_last ? in_default_strides(widened) : widened;
  };
  auto [grad_input, grad_weight, grad_bias] = at::convolution_backward(
      arrange(grad), arrange(input), arrange(weight), std::nullopt, layer.stride, layer.padding, layer.dilation,
      layer.transposed, layer.output_padding, layer.groups, {output_mask[0], output_mask[1], false});
  if (in_float && output_mask[0]) grad_input = grad_input.to(dtype);
  if (in_float) grad_weight = grad_weight.to(dtype);
  if (is_batched(grad)) return {grad_input, grad_weight};  // which has no memory format
  // ATen's choice of a format depends on the kernel that it has taken; the fake kernels promise these.
  if (output_mask[0]) grad_input = grad_input.contiguous(input.suggest_memory_format());
  if (output_mask[1]) grad_weight = grad_weight.contiguous(weight.suggest_memory_format());
  return {grad_input, grad_weight};
}

}  // namespace fastgan
