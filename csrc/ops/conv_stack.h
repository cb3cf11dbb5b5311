// A run of convolution layers as one operator: conv_stack. See conv_stack.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "conv_bn_act.h"

namespace fastgan {

// How fastgan/nn/fuse.py writes one layer into the operator's `layers` and `numbers`, in this order.
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

std::vector<StackLayer> parse_stack(at::IntArrayRef layers, at::ArrayRef<double> numbers);

// Whether backward passes on this thread add weight gradients to those that the parameters hold while they compute them, in
// place of returning them to be added: for backward() only. Returns what was so before.
bool conv_stack_adds_in_place(bool wanted);

// One layer by conv_stack, for the single operators: nothing unless it runs on the minimal-filtering loops and the
// input is in channels_last on the CPU, as those loops are. bn is null for a layer without batch norm.
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
