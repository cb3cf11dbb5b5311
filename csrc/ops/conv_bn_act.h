// What conv2d_bn_act, conv_transpose2d_bn_act and their forms without batch norm share: one description of the
// layer, one set of checks, one autograd function. The four public operators differ only in how they fill ConvLayer.
#pragma once

#include <ATen/core/grad_mode.h>

#include <array>
#include <functional>
#include <string_view>
#include <tuple>
#include <vector>

#include "../activation.h"
#include "image_format.h"
#include "process_group.h"
#include "tensors.h"

namespace fastgan {

using at::IntArrayRef;

// The memory format of a dense tensor; of one that is dense in both, the contiguous one.
inline at::MemoryFormat dense_format(const Tensor& tensor) {
  return tensor.is_contiguous() ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
}
// Images in the memory format they have, or contiguous where they are not dense.
inline Tensor dense(const Tensor& images) {
  return images.contiguous(images.is_contiguous(at::MemoryFormat::ChannelsLast) ? at::MemoryFormat::ChannelsLast
                                                                                : at::MemoryFormat::Contiguous);
}

// Its float32 values, null where it is undefined.
inline float* floats(const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr<float>() : nullptr; }

// The arguments of a convolution after its tensors, two numbers each for height and width.
struct ConvLayer {
  IntArrayRef stride, padding, dilation;
  bool transposed;
  IntArrayRef output_padding;
  int64_t groups;
};

// "relu" -> Activation::relu; an unknown name is an error that lists the known ones.
Activation parse_activation(const char* op, std::string_view name);

// Every check of shapes, dtypes, devices and numbers. Throws with the name of the argument at fault.
void check_floating(const char* op, const Tensor& input);
// autocast: the dtype that weight and bias will be cast to, as input was.
void check_conv(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                const ConvLayer& layer, std::optional<at::ScalarType> autocast);
void check_batch_norm(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bn_weight,
                      const OptionalTensor& bn_bias, const OptionalTensor& running_mean,
                      const OptionalTensor& running_var, const ConvLayer& layer, bool training, double momentum,
                      double eps, const ProcessGroup& group);
// The part of it that asks for no convolution: `channels` of what is normalised, with `values` in each.
void check_batch_norm_arrays(const char* op, const Tensor& input, const c10::SymInt& channels, const char* channels_are,
                             const c10::SymInt& values, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                             const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                             double momentum, double eps);

// The convolution itself and its gradient, by ATen (oneDNN on the CPU, cuDNN on CUDA) for what no loop of ours takes.
Tensor convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const ConvLayer& layer);
// grad_input, grad_weight, each in its tensor's memory format; undefined where the mask says false
std::tuple<Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                                const ConvLayer& layer, std::array<bool, 2> output_mask);

// The same layers from differentiable operators: what a backward differentiates when it must itself be differentiable
// (gradient penalties). The convolution's gradient is convolution_backward(). In evaluation mode mean and invstd are constants.
Tensor differentiable_convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const ConvLayer& layer);
Tensor activate(const Tensor& z, Activation activation, double negative_slope);
// Not over several processes: their second derivatives would need collectives that are differentiable themselves.
void refuse_second_derivative(const char* op, const ProcessGroup& group);
Tensor differentiable_batch_norm(const Tensor& y, const Tensor& bn_weight, const Tensor& bn_bias, const Tensor& mean,
                                 const Tensor& invstd, bool training, double eps);
// Whether a backward has to be made of differentiable operators, which it then gets from differentiable_gradients().
inline bool must_be_differentiable(const Tensor& grad_output) { return at::GradMode::is_enabled() || is_batched(grad_output); }
// Gradients of function(inputs) with respect to the needed ones of inputs, undefined for the others; where gradients are on, with a graph
// of their own. The function is given other tensors for the inputs, of the same values: one input may be another's, or be computed
// from it, and have hooks, none of which is part of this derivative.
std::vector<Tensor> differentiable_gradients(const std::function<Tensor(const std::vector<Tensor>&)>& function,
                                             const std::vector<Tensor>& inputs, const std::vector<bool>& needed,
                                             const Tensor& grad_output);

// Differentiable entry points. Unbatched [C, H, W] input is accepted.
Tensor conv_bn_act(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const OptionalTensor& running_mean,
                   const OptionalTensor& running_var, const ConvLayer& layer, bool training, double momentum,
                   double eps, std::string_view activation, double negative_slope, const ProcessGroup& group);
Tensor conv_act(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                const ConvLayer& layer, std::string_view activation, double negative_slope);

}  // namespace fastgan
