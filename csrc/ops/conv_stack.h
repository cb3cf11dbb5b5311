// A run of convolution layers as one operator: conv_stack. See conv_stack.cpp, and cuda_conv_stack.cpp for CUDA.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "conv_bn_act.h"

namespace fastgan {

// How fastgan/ops/conv_stack.py writes one layer into the operator's `layers` and `numbers`, in this order.
struct StackLayer {
  bool transposed;
  int64_t stride[2], padding[2];
  // together: batch norm's statistics are those of all processes of the call's group; then the integer of `training`
  // is 2.
  bool has_bias, has_batch_norm, has_bn_weight, has_bn_bias, has_running, training, together;
  Activation activation;
  double momentum, eps, negative_slope;

  static constexpr size_t kIntegers = 12, kNumbers = 3;
  // weight [, bias] [, bn_weight] [, bn_bias]
  size_t parameter_count() const { return 1 + has_bias + has_bn_weight + has_bn_bias; }
};

// Of an activation's number in `layers`.
Activation activation_of(const char* op, int64_t number);

std::vector<StackLayer> parse_stack(at::IntArrayRef layers, at::ArrayRef<double> numbers);

// The parameters of one layer, in the order of StackLayer::parameter_count; undefined where the layer has none.
struct LayerParameters {
  Tensor weight, bias, bn_weight, bn_bias;
};
std::vector<LayerParameters> split_parameters(const std::vector<StackLayer>& stack, at::TensorList parameters);

// Throws where a kernel would read beyond the end of one of them, or take it for something else: before any of them has changed.
void check_parameters(const std::vector<StackLayer>& stack, const std::vector<LayerParameters>& split,
                      at::TensorList running, const Tensor& input);

struct LayerSizes {
  int64_t channels, height, width;
};
// Of a layer's output, for an input of height and width.
LayerSizes output_sizes(const StackLayer& layer, const Tensor& weight, int64_t height, int64_t width);

// Whether the activation's derivative can be taken from its output.
bool invertible(const StackLayer& layer);

// What a backward pass has to compute by its output_mask, which is of the input and then of all parameters.
struct WantedGradients {
  std::vector<size_t> first_parameter;  // where each layer's parameters begin in the mask; one more is the end
  int64_t lowest;                       // the lowest layer whose parameters, or input, want a gradient
};
// Layer: StackLayer, or linear_stack's.
template <typename Layer>
WantedGradients wanted_gradients(const std::vector<Layer>& stack, at::IntArrayRef output_mask) {
  WantedGradients wanted{{1}, 0};
  for (const Layer& layer : stack) wanted.first_parameter.push_back(wanted.first_parameter.back() + layer.parameter_count());
  const auto wants_any = [&](int64_t i) {
    for (size_t k = wanted.first_parameter[i]; k < wanted.first_parameter[i + 1]; ++k)
      if (output_mask[k]) return true;
    return false;
  };
  const auto last = static_cast<int64_t>(stack.size()) - 1;
  if (!output_mask[0])
    while (wanted.lowest < last && !wants_any(wanted.lowest)) ++wanted.lowest;
  return wanted;
}

// One layer by conv_stack, for the single operators: nothing unless it runs on a loop of fastgan's own, float32 or bfloat16 on the
// CPU, and the input is in channels_last, as those loops are, or pixels. Parameters may be float32 beside a bfloat16 input; its
// products are then of floats where a loop would round more than PyTorch does. bn is null for a layer without batch norm.
struct BatchNormArguments {
  OptionalTensor weight, bias, running_mean, running_var;
  bool training;
  double momentum, eps;
  ProcessGroup group;
};
OptionalTensor conv_stack_single(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                 const BatchNormArguments* bn, const ConvLayer& layer, Activation activation,
                                 double negative_slope);

}  // namespace fastgan
