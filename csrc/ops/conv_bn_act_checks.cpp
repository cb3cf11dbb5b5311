// Checks of the convolution family. They run before dispatch, for real and for traced (fake) tensors alike, so a
// call with bad input changes nothing and torch.compile reports the same sentence as eager mode.
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "conv_bn_act.h"

namespace fastgan {
namespace {

using c10::SymInt;

void check_same(const char* op, const char* name, const Tensor& tensor, const Tensor& input,
                std::optional<at::ScalarType> autocast) {
  TORCH_CHECK_TYPE(tensor.defined(), op, ": ", name, " must be a tensor, got None");
  TORCH_CHECK(tensor.device() == input.device(), op, ": ", name, " must be on the device of input (", input.device(),
              "), got ", tensor.device());
  const bool casts = autocast && at::autocast::is_eligible(tensor, tensor.device().type());
  const auto dtype = casts ? *autocast : tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == input.scalar_type(), op, ": ", name, " must have the dtype of input (", input.scalar_type(),
                   "), got ", dtype);
}

void check_pair(const char* op, const char* name, IntArrayRef pair, int64_t least) {
  TORCH_CHECK_VALUE(pair.size() == 2 && pair[0] >= least && pair[1] >= least, op, ": ", name,
                    " must be one or two integers of at least ", least, ", got ", pair);
}

void check_shape_of_channels(const char* op, const char* name, const Tensor& array, const SymInt& channels,
                             const char* channels_are) {
  TORCH_CHECK_VALUE(array.dim() == 1 && array.sym_size(0) == channels, op, ": ", name, " must have shape [", channels, "] (",
                    channels_are, "), got ", array.sym_sizes());
}

// The per-channel arrays of batch norm may keep float32 beside a lower precision input, as in PyTorch.
void check_channel_array(const char* op, const char* name, const OptionalTensor& array, const SymInt& channels,
                         const char* channels_are, const Tensor& input) {
  if (!defined(array)) return;
  check_shape_of_channels(op, name, *array, channels, channels_are);
  TORCH_CHECK(array->device() == input.device(), op, ": ", name, " must be on the device of input (", input.device(),
              "), got ", array->device());
  const bool low_precision = input.scalar_type() == at::kBFloat16 || input.scalar_type() == at::kHalf;
  TORCH_CHECK_TYPE(array->scalar_type() == input.scalar_type() || (low_precision && array->scalar_type() == at::kFloat),
                   op, ": ", name, " must have the dtype of input (", input.scalar_type(), ")",
                   low_precision ? " or float32" : "", ", got ", array->scalar_type());
}

const char* out_channels_are(const ConvLayer& layer) {
  return layer.transposed ? "weight.size(1) * groups" : "weight.size(0)";
}

SymInt out_channels(const Tensor& weight, const ConvLayer& layer) {
  return layer.transposed ? weight.sym_size(1) * layer.groups : weight.sym_size(0);
}

// Height (dim 0) or width (dim 1) of the output.
SymInt output_size(const Tensor& input, const Tensor& weight, const ConvLayer& layer, int dim) {
  const SymInt in = input.sym_size(input.dim() - 2 + dim), kernel = weight.sym_size(2 + dim);
  const SymInt reach = (kernel - 1) * layer.dilation[dim] + 1;
  if (layer.transposed)
    return (in - 1) * layer.stride[dim] - 2 * layer.padding[dim] + reach + layer.output_padding[dim];
  const SymInt room = in + 2 * layer.padding[dim] - reach;
  return room < 0 ? SymInt(-1) : room / layer.stride[dim] + 1;
}

}  // namespace

void check_floating(const char* op, const Tensor& input) {
  const auto dtype = input.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf, op,
                   ": input must have dtype float32, float64, bfloat16 or float16, got ", dtype);
}

Activation parse_activation(const char* op, std::string_view name) {
  if (name == "relu") return Activation::relu;
  if (name == "leaky_relu") return Activation::leaky_relu;
  if (name == "tanh") return Activation::tanh;
  if (name == "sigmoid") return Activation::sigmoid;
  if (name == "identity") return Activation::identity;
  TORCH_CHECK_VALUE(false, op, ": activation must be one of 'relu', 'leaky_relu', 'tanh', 'sigmoid', 'identity', got '",
                    name, "'");
}

void check_conv(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                const ConvLayer& layer, std::optional<at::ScalarType> autocast) {
  check_floating(op, input);
  check_same(op, "weight", weight, input, autocast);
  TORCH_CHECK_VALUE(input.dim() == 3 || input.dim() == 4, op,
                    ": input must have shape [N, C, H, W] or [C, H, W], got ", input.sym_sizes());
  const char* weight_shape = layer.transposed ? "[C_in, C_out / groups, kH, kW]" : "[C_out, C_in / groups, kH, kW]";
  TORCH_CHECK_VALUE(weight.dim() == 4, op, ": weight must have shape ", weight_shape, ", got ", weight.sym_sizes());
  check_pair(op, "stride", layer.stride, 1);
  check_pair(op, "padding", layer.padding, 0);
  check_pair(op, "dilation", layer.dilation, 1);
  check_pair(op, "output_padding", layer.output_padding, 0);
  TORCH_CHECK_VALUE(layer.groups >= 1, op, ": groups must be at least 1, got ", layer.groups);
  for (int dim = 0; dim < 2; ++dim)
    TORCH_CHECK_VALUE(layer.output_padding[dim] == 0 || layer.output_padding[dim] < layer.stride[dim] ||
                          layer.output_padding[dim] < layer.dilation[dim],
                      op, ": output_padding must be smaller than stride or dilation, got ", layer.output_padding,
                      " with stride ", layer.stride, " and dilation ", layer.dilation);
  const SymInt in_channels = input.sym_size(input.dim() - 3);
  const SymInt expected = layer.transposed ? weight.sym_size(0) : weight.sym_size(1) * layer.groups;
  TORCH_CHECK_VALUE(in_channels == expected, op, ": input must have ", expected, " channels (",
                    layer.transposed ? "weight.size(0)" : "weight.size(1) * groups", "), got ", in_channels,
                    " in shape ", input.sym_sizes());
  TORCH_CHECK_VALUE(weight.sym_size(0) % layer.groups == 0, op, ": weight.size(0) must be divisible by groups (",
                    layer.groups, "), got ", weight.sym_size(0));
  TORCH_CHECK_VALUE(weight.sym_numel() != 0, op, ": weight must not be empty, got shape ", weight.sym_sizes());
  if (defined(bias)) {
    check_same(op, "bias", *bias, input, autocast);
    check_shape_of_channels(op, "bias", *bias, out_channels(weight, layer), out_channels_are(layer));
  }
  for (int dim = 0; dim < 2; ++dim)
    TORCH_CHECK_VALUE(output_size(input, weight, layer, dim) >= 0, op, ": input of height and width [",
                      input.sym_size(-2), ", ", input.sym_size(-1), "] is too small for weight of shape ",
                      weight.sym_sizes(), " with padding ", layer.padding, " and dilation ", layer.dilation);
}

void check_batch_norm(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bn_weight,
                      const OptionalTensor& bn_bias, const OptionalTensor& running_mean,
                      const OptionalTensor& running_var, const ConvLayer& layer, bool training, double momentum,
                      double eps, const ProcessGroup& group) {
  TORCH_CHECK_VALUE(group.size >= 1 && group.alone() == (group.size == 1), op, ": process_group and processes must be "
                    "given together, got '", group.name, "' and ", group.size);
  const SymInt batch = input.dim() == 4 ? input.sym_size(0) : SymInt(1);
  SymInt values = batch * output_size(input, weight, layer, 0) * output_size(input, weight, layer, 1);
  if (!group.alone()) values = 0;  // what the other processes hold is not known yet
  check_batch_norm_arrays(op, input, out_channels(weight, layer), out_channels_are(layer), values, bn_weight, bn_bias,
                          running_mean, running_var, training, momentum, eps);
}

void check_batch_norm_arrays(const char* op, const Tensor& input, const SymInt& channels, const char* channels_are,
                             const SymInt& values, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                             const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                             double momentum, double eps) {
  check_channel_array(op, "bn_weight", bn_weight, channels, channels_are, input);
  check_channel_array(op, "bn_bias", bn_bias, channels, channels_are, input);
  check_channel_array(op, "running_mean", running_mean, channels, channels_are, input);
  check_channel_array(op, "running_var", running_var, channels, channels_are, input);
  const bool has_mean = defined(running_mean), has_var = defined(running_var);
  TORCH_CHECK_VALUE(has_mean == has_var, op, ": running_mean and running_var must be given together, got only ",
                    has_mean ? "running_mean" : "running_var");
  for (const auto& [name, array] : {std::pair("running_mean", running_mean), std::pair("running_var", running_var)})
    TORCH_CHECK_VALUE(!has_mean || !at::GradMode::is_enabled() || !array->requires_grad(), op, ": ", name,
                      " must not require a gradient (none is computed for running statistics)");
  TORCH_CHECK_VALUE(training || has_mean, op,
                    ": running_mean must be given when training=False (there are no batch statistics to use), got None");
  TORCH_CHECK_VALUE(eps >= 0, op, ": eps must be at least 0, got ", eps);
  TORCH_CHECK_VALUE(momentum == momentum, op, ": momentum must be a number, got ", momentum);
  TORCH_CHECK_VALUE(!training || values != 1, op,
                    ": input must give more than one value per channel when training=True, got shape ",
                    input.sym_sizes(), " with one");
}

}  // namespace fastgan
