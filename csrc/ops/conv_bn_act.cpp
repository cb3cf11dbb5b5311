// The convolution family as torch sees it: autocast, autograd, and the CPU path from tensors to kernels.
//
// Training forward:   y = conv(x); mean, var of y in one pass; output = act(scale * y + shift) in one pass.
// Training backward:  one pass over (grad, y) for the activation mask and the two batch-norm sums, one pass that
//                     writes dy, then the convolution's gradient. Saved: x, y and 2 numbers a channel.
#include "conv_bn_act.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "../cpu/bn_act.h"
#include "conv_stack.h"
#include "kernel_arguments.h"
#include "saved_conv_layer.h"

namespace fastgan {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor or_undefined(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }

// ---- the CPU path ------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_act_forward_cpu(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& bn_weight,
    const OptionalTensor& bn_bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
    int64_t groups, bool training, double momentum, double eps, c10::string_view activation, double negative_slope,
    bool save_for_backward, c10::string_view process_group, int64_t processes) {
  const ConvLayer layer{stride, padding, dilation, transposed, output_padding, groups};
  const cpu::ActivationSpec act{parse_activation("conv_bn_act_forward", activation), negative_slope};
  const Tensor y = dense(convolution(input, weight, bias, layer));  // [N, C, H, W]
  const Tensor output = save_for_backward ? at::empty_like(y) : y;
  const auto options = y.options().dtype(accumulate_dtype(y.scalar_type()));
  const int64_t C = y.size(1);
  const Tensor statistics = at::zeros({4, C}, options);  // mean, invstd, scale, shift
  const Tensor mean = statistics[0], invstd = statistics[1], scale = statistics[2], shift = statistics[3];
  const ProcessGroup group{std::string(process_group), processes};
  const bool together = training && !group.alone();
  const char* op = transposed ? "conv_transpose2d_bn_act" : "conv2d_bn_act";
  if (y.numel() > 0 || together) {  // a process without values takes part in the collective
    const Tensor gamma = as_accumulate(bn_weight, options.dtype().toScalarType());
    const Tensor beta = as_accumulate(bn_bias, options.dtype().toScalarType());
    const Tensor new_mean = as_accumulate(running_mean, options.dtype().toScalarType());
    const Tensor new_var = as_accumulate(running_var, options.dtype().toScalarType());
    with_kernel_type("convolution", y.scalar_type(), [&](auto tag) {
      using T = decltype(tag);
      using A = cpu::Accumulate<T>;
      const auto& kernels = cpu::bn_act_kernels<T>();
      const cpu::BnActShape shape = kernel_shape(y);
      Tensor var;
      if (training) {
        var = at::zeros({C}, options);
        int64_t count = shape.outer * shape.inner;
        if (count > 0) {
          const Tensor workspace = at::empty({cpu::bn_act_workspace_size(shape)}, options);
          kernels.batch_statistics(shape, data<T>(y), mutable_data<A>(mean), mutable_data<A>(var),
                                   mutable_data<A>(workspace));
        }
        if (together) count = merge_statistics(op, group, mean, var, count);
        if (new_mean.defined() && count > 0)
          cpu::update_running_statistics<A>(C, count, momentum, data<A>(mean), data<A>(var),
                                            mutable_data<A>(new_mean), mutable_data<A>(new_var));
      } else {
        mean.copy_(new_mean);
        var = new_var;
      }
      cpu::fold_statistics<A>(C, data<A>(mean), data<A>(var), data_or_null<A>(gamma), data_or_null<A>(beta), eps,
                              mutable_data<A>(invstd), mutable_data<A>(scale), mutable_data<A>(shift));
      if (y.numel() > 0)
        kernels.scale_shift_act(shape, data<T>(y), data<A>(scale), data<A>(shift), act, mutable_data<T>(output));
    });
    if (training) write_back(running_mean, new_mean), write_back(running_var, new_var);
  }
  const Tensor saved = save_for_backward ? y : at::empty({0}, y.options());
  return {output, saved, mean.clone(), invstd.clone()};
}

// The gradients the mask does not ask for come back with shape [0].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_act_backward_cpu(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& conv_output,
    const Tensor& mean, const Tensor& invstd, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
    int64_t groups, bool training, c10::string_view activation, double negative_slope,
    std::array<bool, 5> output_mask, c10::string_view process_group, int64_t processes) {
  const ConvLayer layer{stride, padding, dilation, transposed, output_padding, groups};
  const cpu::ActivationSpec act{parse_activation("conv_bn_act_backward", activation), negative_slope};
  const Tensor& y = conv_output;
  const Tensor grad = grad_output.contiguous(dense_format(y));
  const Tensor dy = at::empty_like(y);
  const int64_t C = y.size(1);
  const Tensor sums = at::zeros({2, C}, mean.options());  // sum of dz, sum of dz * xhat
  const Tensor rows = at::zeros({4, C}, mean.options());  // scale, shift, and the coefficients of dy
  const ProcessGroup group{std::string(process_group), processes};
  const bool together = training && !group.alone();
  if (y.numel() > 0 || together) {
    const Tensor gamma = as_accumulate(bn_weight, mean.scalar_type());
    const Tensor beta = as_accumulate(bn_bias, mean.scalar_type());
    with_kernel_type("convolution", y.scalar_type(), [&](auto tag) {
      using T = decltype(tag);
      using A = cpu::Accumulate<T>;
      const auto& kernels = cpu::bn_act_kernels<T>();
      const cpu::BnActShape shape = kernel_shape(y);
      A* r = mutable_data<A>(rows);
      A *scale = r, *shift = r + C, *b = r + 2 * C, *c0 = r + 3 * C;
      A *sum_dz = mutable_data<A>(sums), *sum_dz_xhat = sum_dz + C;
      cpu::fold_scale_shift<A>(C, data<A>(mean), data<A>(invstd), data_or_null<A>(gamma), data_or_null<A>(beta), scale,
                               shift);
      int64_t count = shape.outer * shape.inner;
      if (count > 0) {
        const Tensor workspace = at::empty({cpu::bn_act_workspace_size(shape)}, mean.options());
        kernels.bn_act_backward_reduce(shape, data<T>(grad), data<T>(y), scale, shift, data<A>(mean), data<A>(invstd),
                                       act, sum_dz, sum_dz_xhat, mutable_data<A>(workspace));
      }
      // The batch norm's own gradients stay this process's, like those of every other parameter.
      const Tensor all = together ? sums.clone() : sums;
      if (together) count = add_over_processes(group, all, count);
      if (training)
        cpu::backward_coefficients<A>(C, count, scale, data<A>(mean), data<A>(invstd), data<A>(all), data<A>(all) + C, b, c0);
      if ((output_mask[0] || output_mask[1]) && y.numel() > 0)
        kernels.bn_act_backward_apply(shape, data<T>(grad), data<T>(y), scale, shift, scale, training ? b : nullptr,
                                      training ? c0 : nullptr, act, mutable_data<T>(dy));
    });
  }
  const Tensor none = at::empty({0}, y.options());
  Tensor grad_input, grad_weight;
  if (output_mask[0] || output_mask[1])
    std::tie(grad_input, grad_weight) = convolution_backward(dy, input, weight, layer, {output_mask[0], output_mask[1]});
  // Batch statistics cancel the bias, so its gradient in training mode is exactly 0.
  Tensor grad_bias = none;
  if (output_mask[2])
    grad_bias = training ? at::zeros({C}, y.options()) : (rows[0] * sums[0]).to(y.scalar_type());
  const auto parameter = [&](int64_t row, const OptionalTensor& like) {
    return defined(like) ? sums[row].to(like->scalar_type(), /*non_blocking=*/false, /*copy=*/true) : none;
  };
  return {output_mask[0] ? grad_input : none, output_mask[1] ? grad_weight : none.clone(),
          output_mask[2] ? grad_bias : none.clone(), output_mask[3] ? parameter(1, bn_weight) : none.clone(),
          output_mask[4] ? parameter(0, bn_bias) : none.clone()};
}

Tensor conv_act_forward_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                            IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                            int64_t groups, c10::string_view activation, double negative_slope) {
  const ConvLayer layer{stride, padding, dilation, transposed, output_padding, groups};
  const cpu::ActivationSpec act{parse_activation("conv_act_forward", activation), negative_slope};
  const Tensor y = dense(convolution(input, weight, bias, layer));
  if (act.kind == Activation::identity || y.numel() == 0) return y;
  const auto options = y.options().dtype(accumulate_dtype(y.scalar_type()));
  const Tensor scale = at::ones({1}, options), shift = at::zeros({1}, options);
  with_kernel_type("convolution", y.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = cpu::Accumulate<T>;
    cpu::bn_act_kernels<T>().scale_shift_act(cpu::image_planes(y.size(0), y.numel()), data<T>(y), data<A>(scale), data<A>(shift), act,
                                             mutable_data<T>(y));
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> conv_act_backward_cpu(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& output, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups,
    c10::string_view activation, double negative_slope, std::array<bool, 3> output_mask) {
  const ConvLayer layer{stride, padding, dilation, transposed, output_padding, groups};
  const cpu::ActivationSpec act{parse_activation("conv_act_backward", activation), negative_slope};
  const Tensor y = dense(output);
  const Tensor grad = grad_output.contiguous(dense_format(y));
  const Tensor sum = at::zeros({y.size(1)}, y.options().dtype(accumulate_dtype(y.scalar_type())));
  Tensor dy = grad;
  if (y.numel() > 0 && (act.kind != Activation::identity || output_mask[2])) {
    dy = at::empty_like(y);
    with_kernel_type("convolution", y.scalar_type(), [&](auto tag) {
      using T = decltype(tag);
      using A = cpu::Accumulate<T>;
      const cpu::BnActShape shape = output_mask[2] && y.size(1) > 1 ? kernel_shape(y) : cpu::image_planes(y.size(0), y.numel());
      const Tensor workspace = at::empty({cpu::bn_act_workspace_size(shape)}, sum.options());
      cpu::bn_act_kernels<T>().act_backward(shape, data<T>(grad), data<T>(y), act, mutable_data<T>(dy),
                                            mutable_data<A>(sum), mutable_data<A>(workspace));
    });
  }
  const Tensor none = at::empty({0}, y.options());
  Tensor grad_input, grad_weight;
  if (output_mask[0] || output_mask[1])
    std::tie(grad_input, grad_weight) = convolution_backward(dy, input, weight, layer, {output_mask[0], output_mask[1]});
  return {output_mask[0] ? grad_input : none, output_mask[1] ? grad_weight : none.clone(),
          output_mask[2] ? sum.to(y.scalar_type(), false, /*copy=*/true) : none.clone()};
}

// ---- autograd ----------------------------------------------------------------------------------------------------

}  // namespace

void refuse_second_derivative(const char* op, const ProcessGroup& group) {
  TORCH_CHECK_NOT_IMPLEMENTED(group.alone(), op, ": no second derivatives (create_graph=True) with a process_group; "
                              "use batch norm of each process, or none, where there is a gradient penalty");
}

Tensor differentiable_batch_norm(const Tensor& y, const Tensor& bn_weight, const Tensor& bn_bias, const Tensor& mean,
                                 const Tensor& invstd, bool training, double eps) {
  const auto channels = [](const Tensor& array) { return array.view({1, -1, 1, 1}); };
  // Not at::batch_norm, which has no third derivative in PyTorch 2.15.
  Tensor centred, scale;
  if (training) {
    const at::ScalarType type = at::isReducedFloatingType(y.scalar_type()) ? at::kFloat : y.scalar_type();
    const Tensor x = y.to(type);
    centred = x - x.mean({0, 2, 3}, /*keepdim=*/true);
    scale = (centred.square().mean({0, 2, 3}, /*keepdim=*/true) + eps).rsqrt();
  } else {
    centred = y - channels(mean), scale = channels(invstd);
  }
  if (bn_weight.defined()) scale = scale * channels(bn_weight);
  Tensor z = centred * scale;
  if (bn_bias.defined()) z = z + channels(bn_bias);
  return z.to(y.scalar_type());
}

variable_list differentiable_gradients(const std::function<Tensor(const variable_list&)>& function, const variable_list& inputs,
                                       const std::vector<bool>& needed, const Tensor& grad_output) {
  const bool create_graph = at::GradMode::is_enabled();
  const at::AutoGradMode enabled(true);
  variable_list aliases, wanted;
  for (size_t i = 0; i < inputs.size(); ++i) {
    aliases.push_back(inputs[i].defined() ? inputs[i].view_as(inputs[i]) : Tensor());
    if (needed[i]) wanted.push_back(aliases[i]);
  }
  const variable_list found = torch::autograd::grad({function(aliases)}, wanted, {grad_output}, /*retain_graph=*/create_graph,
                                                    create_graph, /*allow_unused=*/true);
  variable_list gradients(inputs.size());
  for (size_t i = 0, next = 0; i < inputs.size(); ++i)
    if (needed[i]) gradients[i] = found[next++];
  return gradients;
}

namespace {

void save_layer(AutogradContext* ctx, const ConvLayer& layer, std::string_view activation, double negative_slope) {
  fastgan::save_layer(ctx, layer);
  ctx->saved_data["activation"] = std::string(activation);
  ctx->saved_data["negative_slope"] = negative_slope;
}

struct SavedLayer : SavedConvLayer {
  explicit SavedLayer(AutogradContext* ctx)
      : SavedConvLayer(ctx),
        activation(ctx->saved_data["activation"].toStringRef()),
        negative_slope(ctx->saved_data["negative_slope"].toDouble()) {}
  std::string activation;
  double negative_slope;
};

// Which of the first `count` tensors want a gradient. The graph has an edge only for those that were given.
template <size_t count>
std::array<bool, count> needed_gradients(AutogradContext* ctx, const variable_list& saved) {
  std::array<bool, count> needed;
  for (size_t i = 0, edge = 0; i < count; ++i) needed[i] = saved[i].defined() && ctx->needs_input_grad(edge++);
  return needed;
}

class ConvBnAct : public torch::autograd::Function<ConvBnAct> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                        const OptionalTensor& running_mean,
                        const OptionalTensor& running_var, const ConvLayer& layer, bool training, double momentum,
                        double eps, std::string_view activation, double negative_slope, bool save_for_backward,
                        const ProcessGroup& group) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("fastgan::conv_bn_act_forward", "")
                         .typed<decltype(conv_bn_act_forward_cpu)>();
    auto [output, conv_output, mean, invstd] =
        op.call(input, weight, bias, bn_weight, bn_bias, running_mean, running_var,
                layer.stride, layer.padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups,
                training, momentum, eps, activation, negative_slope, save_for_backward, group.name, group.size);
    if (save_for_backward) {
      ctx->save_for_backward({input, weight, or_undefined(bias), or_undefined(bn_weight), or_undefined(bn_bias),
                              conv_output, mean, invstd});
      ctx->set_materialize_grads(false);
      save_layer(ctx, layer, activation, negative_slope);
      ctx->saved_data["training"] = training;
      ctx->saved_data["eps"] = eps;
      ctx->saved_data["process_group"] = group.name;
      ctx->saved_data["processes"] = group.size;
    }
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &bias = saved[2], &bn_weight = saved[3], &bn_bias = saved[4];
    // A hook may have unpacked them otherwise than they were saved.
    const Tensor conv_output = dense(saved[5]), mean = saved[6].contiguous(), invstd = saved[7].contiguous();
    const SavedLayer s(ctx);
    const bool training = ctx->saved_data["training"].toBool();
    const auto mask = needed_gradients<5>(ctx, saved);
    const ProcessGroup group{ctx->saved_data["process_group"].toStringRef(), ctx->saved_data["processes"].toInt()};
    variable_list gradients(15);  // one an argument of forward; undefined for all but the first five
    if (!grad_outputs[0].defined()) return gradients;
    if (must_be_differentiable(grad_outputs[0])) {
      if (training) refuse_second_derivative(s.layer.transposed ? "conv_transpose2d_bn_act" : "conv2d_bn_act", group);
      const auto whole = [&](const variable_list& from) {
        const Tensor y = differentiable_convolution(from[0], from[1], optional(from[2]), s.layer);
        const Tensor z = differentiable_batch_norm(y, from[3], from[4], mean, invstd, training, ctx->saved_data["eps"].toDouble());
        return activate(z, parse_activation("conv_bn_act", s.activation), s.negative_slope);
      };
      const auto found = differentiable_gradients(whole, {input, weight, bias, bn_weight, bn_bias},
                                                  std::vector<bool>(mask.begin(), mask.end()), grad_outputs[0]);
      std::copy(found.begin(), found.end(), gradients.begin());
      return gradients;
    }
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("fastgan::conv_bn_act_backward", "")
                         .typed<decltype(conv_bn_act_backward_cpu)>();
    auto [grad_input, grad_weight, grad_bias, grad_bn_weight, grad_bn_bias] =
        op.call(grad_outputs[0], input, weight, conv_output, mean, invstd, optional(bn_weight), optional(bn_bias),
                s.layer.stride, s.layer.padding, s.layer.dilation, s.layer.transposed, s.layer.output_padding,
                s.layer.groups, training, s.activation, s.negative_slope, mask, group.name, group.size);
    const Tensor all[5] = {grad_input, grad_weight, grad_bias, grad_bn_weight, grad_bn_bias};
    for (size_t i = 0; i < 5; ++i)
      if (mask[i]) gradients[i] = all[i];
    return gradients;
  }
};

class ConvAct : public torch::autograd::Function<ConvAct> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        const ConvLayer& layer, std::string_view activation, double negative_slope) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("fastgan::conv_act_forward", "")
                         .typed<decltype(conv_act_forward_cpu)>();
    const Tensor output =
        op.call(input, weight, bias, layer.stride, layer.padding, layer.dilation, layer.transposed,
                layer.output_padding, layer.groups, activation, negative_slope);
    // Without an activation backward reads no values of it, and the caller may change them.
    ctx->save_for_backward({input, weight, or_undefined(bias), activation == "identity" ? Tensor() : output});
    ctx->set_materialize_grads(false);
    ctx->saved_data["format"] = output.suggest_memory_format();
    save_layer(ctx, layer, activation, negative_slope);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &bias = saved[2], &output = saved[3];
    const SavedLayer s(ctx);
    const auto mask = needed_gradients<3>(ctx, saved);
    variable_list gradients(6);
    if (!grad_outputs[0].defined()) return gradients;
    if (must_be_differentiable(grad_outputs[0])) {
      const auto whole = [&](const variable_list& from) {
        const Tensor z = differentiable_convolution(from[0], from[1], optional(from[2]), s.layer);
        return activate(z, parse_activation("conv_act", s.activation), s.negative_slope);
      };
      const auto found = differentiable_gradients(whole, {input, weight, bias}, std::vector<bool>(mask.begin(), mask.end()), grad_outputs[0]);
      std::copy(found.begin(), found.end(), gradients.begin());
      return gradients;
    }
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("fastgan::conv_act_backward", "")
                         .typed<decltype(conv_act_backward_cpu)>();
    const Tensor like = output.defined() ? output : grad_outputs[0].contiguous(ctx->saved_data["format"].toMemoryFormat());
    auto [grad_input, grad_weight, grad_bias] =
        op.call(grad_outputs[0], input, weight, like, s.layer.stride, s.layer.padding, s.layer.dilation,
                s.layer.transposed, s.layer.output_padding, s.layer.groups, s.activation, s.negative_slope, mask);
    const Tensor all[3] = {grad_input, grad_weight, grad_bias};
    for (size_t i = 0; i < 3; ++i)
      if (mask[i]) gradients[i] = all[i];
    return gradients;
  }
};

// Under autocast the convolution's own tensors are cast as ATen casts a convolution's; batch norm stays as it is. Parameters only
// where they are used in that dtype: conv_stack rounds them where it multiplies in it.
std::optional<at::ScalarType> autocast_dtype(const Tensor& input) {
  const auto device = input.device().type();
  if (!at::autocast::is_autocast_available(device) || !at::autocast::is_autocast_enabled(device)) return std::nullopt;
  return at::autocast::get_autocast_dtype(device);
}

Tensor autocast(const Tensor& tensor, std::optional<at::ScalarType> dtype) {
  return dtype && tensor.defined() ? at::autocast::cached_cast(*dtype, tensor, tensor.device().type()) : tensor;
}

bool any_requires_grad(std::initializer_list<Tensor> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor& tensor : tensors)
    if (tensor.defined() && tensor.requires_grad()) return true;
  return false;
}

}  // namespace

Tensor conv_bn_act(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const OptionalTensor& running_mean,
                   const OptionalTensor& running_var, const ConvLayer& layer, bool training, double momentum,
                   double eps, std::string_view activation, double negative_slope, const ProcessGroup& group) {
  const Activation kind = parse_activation(op, activation);
  const auto dtype = autocast_dtype(input);
  const Tensor images = autocast(input, dtype);
  check_conv(op, images, weight, bias, layer, dtype);
  check_batch_norm(op, images, weight, bn_weight, bn_bias, running_mean, running_var, layer, training, momentum,
                   eps, group);
  const BatchNormArguments bn{bn_weight, bn_bias, running_mean, running_var, training, momentum, eps, group};
  if (auto output = conv_stack_single(images, weight, bias, &bn, layer, kind, negative_slope)) return *output;
  const bool batched = images.dim() == 4;
  const Tensor x = batched ? images : images.unsqueeze(0), w = autocast(weight, dtype), b = autocast(or_undefined(bias), dtype);
  const bool save = any_requires_grad({x, w, b, or_undefined(bn_weight), or_undefined(bn_bias)});
  const Tensor output = ConvBnAct::apply(x, w, optional(b), bn_weight, bn_bias, running_mean, running_var, layer, training, momentum, eps,
                                         activation, negative_slope, save, group);
  return batched ? output : output.squeeze(0);
}

Tensor conv_act(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                const ConvLayer& layer, std::string_view activation, double negative_slope) {
  const Activation kind = parse_activation(op, activation);
  const auto dtype = autocast_dtype(input);
  const Tensor images = autocast(input, dtype);
  check_conv(op, images, weight, bias, layer, dtype);
  if (auto output = conv_stack_single(images, weight, bias, nullptr, layer, kind, negative_slope)) return *output;
  const bool batched = images.dim() == 4;
  const Tensor x = batched ? images : images.unsqueeze(0), w = autocast(weight, dtype), b = autocast(or_undefined(bias), dtype);
  // With a negative slope below 0 the output does not tell the sign of its argument, which the fused backward needs.
  const bool composed = kind == Activation::leaky_relu && !(negative_slope >= 0);
  // Alone, ATen's convolution takes a shorter way with its own derivative; but that has the defects of convolution_backward().
  const bool alone = kind == Activation::identity && x.device().is_cpu() && at::elementSize(x.scalar_type()) >= 4 &&
                     layer.output_padding[0] == 0 && layer.output_padding[1] == 0;
  const Tensor output = alone      ? convolution(x, w, optional(b), layer)
                        : composed ? at::leaky_relu(differentiable_convolution(x, w, optional(b), layer), negative_slope)
                                   : ConvAct::apply(x, w, optional(b), layer, activation, negative_slope);
  return batched ? output : output.squeeze(0);
}

TORCH_LIBRARY_IMPL(fastgan, CPU, m) {
  m.impl("conv_bn_act_forward", &conv_bn_act_forward_cpu);
  m.impl("conv_bn_act_backward", &conv_bn_act_backward_cpu);
  m.impl("conv_act_forward", &conv_act_forward_cpu);
  m.impl("conv_act_backward", &conv_act_backward_cpu);
}

TORCH_LIBRARY_IMPL(fastgan, Autograd, m) {
  for (const char* name : {"conv_bn_act_forward", "conv_bn_act_backward", "conv_act_forward", "conv_act_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastgan
