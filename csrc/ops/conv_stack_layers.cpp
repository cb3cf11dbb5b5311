// What the operator conv_stack is on every device: how its layers are written.
#include "conv_stack.h"

namespace fastgan {

Activation activation_of(const char* op, int64_t number) {
  constexpr auto last = Activation::sigmoid;
  TORCH_CHECK_VALUE(0 <= number && number <= static_cast<int64_t>(last), op, ": the activation in layers must be a number from 0 to ",
                    static_cast<int64_t>(last), ", got ", number);
  return static_cast<Activation>(number);
}

std::vector<StackLayer> parse_stack(at::IntArrayRef layers, at::ArrayRef<double> numbers) {
  const size_t count = layers.size() / StackLayer::kIntegers;
  TORCH_CHECK_VALUE(count > 0 && layers.size() == count * StackLayer::kIntegers && numbers.size() == count * StackLayer::kNumbers,
                    "conv_stack: layers must have ", StackLayer::kIntegers, " integers and numbers ",
                    StackLayer::kNumbers, " values a layer, got ", layers.size(), " and ", numbers.size());
  std::vector<StackLayer> stack;
  for (size_t i = 0; i < count; ++i) {
    const int64_t* n = layers.data() + i * StackLayer::kIntegers;
    const double* f = numbers.data() + i * StackLayer::kNumbers;
    TORCH_CHECK_VALUE(n[1] >= 1 && n[2] >= 1, "conv_stack: stride of layer ", i, " must be at least 1, got [", n[1], ", ", n[2], "]");
    TORCH_CHECK_VALUE(n[3] >= 0 && n[4] >= 0, "conv_stack: padding of layer ", i, " must be at least 0, got [", n[3], ", ", n[4], "]");
    stack.push_back({n[0] != 0, {n[1], n[2]}, {n[3], n[4]}, n[5] != 0, n[6] != 0, n[7] != 0, n[8] != 0, n[9] != 0,
                     n[10] != 0, n[10] == 2, activation_of("conv_stack", n[11]), f[0], f[1], f[2]});
  }
  return stack;
}

std::vector<LayerParameters> split_parameters(const std::vector<StackLayer>& stack, at::TensorList parameters) {
  std::vector<LayerParameters> split;
  size_t next = 0;
  for (const StackLayer& layer : stack) {
    TORCH_CHECK_VALUE(next + layer.parameter_count() <= parameters.size(), "conv_stack: parameters has ",
                      parameters.size(), " tensors, too few for ", stack.size(), " layers");
    LayerParameters p;
    p.weight = parameters[next++];
    if (layer.has_bias) p.bias = parameters[next++];
    if (layer.has_bn_weight) p.bn_weight = parameters[next++];
    if (layer.has_bn_bias) p.bn_bias = parameters[next++];
    split.push_back(p);
  }
  return split;
}

void check_parameters(const std::vector<StackLayer>& stack, const std::vector<LayerParameters>& split,
                      at::TensorList running, const Tensor& input) {
  TORCH_CHECK_VALUE(input.dim() == 4, "conv_stack: input must have shape [N, C, H, W], got ", input.sizes());
  const auto check_kind = [&](const char* name, size_t layer, const Tensor& t) {
    TORCH_CHECK_VALUE(!t.defined() || t.device() == input.device(), "conv_stack: ", name, " of layer ", layer, " must be on ",
                      input.device(), " like input, got ", t.device());
    TORCH_CHECK_VALUE(!t.defined() || !input.is_cuda() || t.scalar_type() == at::kFloat, "conv_stack: ", name, " of layer ", layer,
                      " must be float32, got ", t.scalar_type());
  };
  int64_t channels = input.size(1);
  size_t next_running = 0;
  for (size_t i = 0; i < stack.size(); ++i) {
    const StackLayer& layer = stack[i];
    const LayerParameters& p = split[i];
    TORCH_CHECK_VALUE(p.weight.dim() == 4 && p.weight.size(layer.transposed ? 0 : 1) == channels, "conv_stack: weight of layer ",
                      i, " must be for ", channels, " input channels, got shape ", p.weight.sizes());
    check_kind("weight", i, p.weight);
    channels = p.weight.size(layer.transposed ? 1 : 0);
    const auto check = [&](const char* name, const Tensor& array, bool dense) {
      check_kind(name, i, array);
      TORCH_CHECK_VALUE(!array.defined() || (array.numel() == channels && (!dense || array.is_contiguous())), "conv_stack: ", name,
                        " of layer ", i, " must have shape [", channels, "]", dense ? " and be contiguous" : "", ", got shape ",
                        array.sizes());
    };
    check("bias", p.bias, false), check("bn_weight", p.bn_weight, false), check("bn_bias", p.bn_bias, false);
    TORCH_CHECK_VALUE(!layer.has_batch_norm || layer.training || layer.has_running, "conv_stack: batch norm of layer ", i,
                      " must have running statistics, as it does not train");
    if (!layer.has_running) continue;
    TORCH_CHECK_VALUE(next_running + 2 <= running.size(), "conv_stack: running has ", running.size(), " tensors, too few");
    for (const char* name : {"running_mean", "running_var"}) {
      const Tensor& array = running[next_running++];
      check(name, array, true);
      TORCH_CHECK_VALUE(array.scalar_type() == at::kFloat, "conv_stack: ", name, " of layer ", i, " must be float32, got ",
                        array.scalar_type());
    }
  }
}

LayerSizes output_sizes(const StackLayer& layer, const Tensor& weight, int64_t height, int64_t width) {
  const auto side = [&](int64_t length, size_t axis) {
    const int64_t kernel = weight.size(2 + static_cast<int64_t>(axis)), padding = 2 * layer.padding[axis];
    return layer.transposed ? (length - 1) * layer.stride[axis] - padding + kernel
                            : (length + padding - kernel) / layer.stride[axis] + 1;
  };
  return {weight.size(layer.transposed ? 1 : 0), side(height, 0), side(width, 1)};
}

bool invertible(const StackLayer& layer) {
  return layer.activation != Activation::leaky_relu || layer.negative_slope >= 0;
}

}  // namespace fastgan
