// batch_norm_act_noise: checks, allocation, autograd, dispatch. What a perceptron does after its matrix product.
//
// Saved for backward: the input and two numbers a channel; neither the normalised values nor the noise, whose derivative
// is nothing.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../cpu/batch_norm_act_noise.h"
#include "kernel_arguments.h"

namespace fastgan {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kBatchNormActNoise = "batch_norm_act_noise";

at::MemoryFormat kernel_format(const Tensor& tensor) {
  const bool channels_last = tensor.dim() == 4 && tensor.is_contiguous(at::MemoryFormat::ChannelsLast);
  return channels_last ? dense_format(tensor) : at::MemoryFormat::Contiguous;
}

void check(const Tensor& input, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
           const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& seed,
           bool training, double momentum, double eps, double noise_std) {
  check_floating(kBatchNormActNoise, input);
  TORCH_CHECK_VALUE(input.dim() >= 2 && input.dim() <= 4, kBatchNormActNoise,
                    ": input must have shape [N, C], [N, C, L] or [N, C, H, W], got ", input.sym_sizes());
  c10::SymInt values = input.sym_size(0);
  for (int64_t dim = 2; dim < input.dim(); ++dim) values *= input.sym_size(dim);
  check_batch_norm_arrays(kBatchNormActNoise, input, input.sym_size(1), "input.size(1)", values, bn_weight, bn_bias, running_mean,
                          running_var, training, momentum, eps);
  TORCH_CHECK_VALUE(noise_std >= 0, kBatchNormActNoise, ": noise_std must be at least 0, got ", noise_std);
  if (!defined(seed)) return;
  TORCH_CHECK_VALUE(seed->dim() == 0, kBatchNormActNoise, ": seed must be a scalar, got shape ", seed->sym_sizes());
  TORCH_CHECK_TYPE(seed->scalar_type() == at::kLong, kBatchNormActNoise, ": seed must have dtype int64, got ", seed->scalar_type());
  TORCH_CHECK(seed->device().is_cpu() || seed->device().is_meta(), kBatchNormActNoise, ": seed must be on the CPU, got ",
              seed->device());
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_noise_forward_cpu(
    const Tensor& input, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& seed, bool training,
    double momentum, double eps, c10::string_view activation, double negative_slope, double noise_std) {
  const cpu::ActivationSpec act{parse_activation(kBatchNormActNoise, activation), negative_slope};
  const Tensor x = input.contiguous(kernel_format(input));
  const Tensor output = at::empty_like(x);
  const auto dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto options = x.options().dtype(dtype);
  const int64_t C = x.size(1);
  const Tensor mean = at::empty({C}, options), invstd = at::empty({C}, options);
  if (x.numel() == 0) return {output, mean.zero_(), invstd.zero_()};
  const Tensor gamma = as_accumulate(bn_weight, dtype), beta = as_accumulate(bn_bias, dtype);
  const Tensor new_mean = as_accumulate(running_mean, dtype), new_var = as_accumulate(running_var, dtype);
  const Tensor var = training ? at::empty({C}, options) : new_var;
  if (!training) mean.copy_(new_mean);
  const cpu::GaussianNoise noise{noise_std, defined(seed) ? static_cast<uint64_t>(*data<int64_t>(*seed)) : 0};
  with_kernel_type(kBatchNormActNoise, x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = cpu::Accumulate<T>;
    const cpu::BnActShape shape = kernel_shape(x);
    // Without batch statistics the variance is read only.
    A* variance = training ? mutable_data<A>(var) : const_cast<A*>(data<A>(var));
    cpu::batch_norm_act_noise_kernels<T>().forward(shape, data<T>(x), data_or_null<A>(gamma), data_or_null<A>(beta), eps,
                                                   training, act, noise, mutable_data<A>(mean), variance,
                                                   mutable_data<A>(invstd), mutable_data<T>(output));
    if (training && new_mean.defined())
      cpu::update_running_statistics<A>(C, shape.outer * shape.inner, momentum, data<A>(mean), data<A>(var),
                                        mutable_data<A>(new_mean), mutable_data<A>(new_var));
  });
  if (training) write_back(running_mean, new_mean), write_back(running_var, new_var);
  return {output, mean, invstd};
}

// The gradients the mask does not ask for come back with shape [0].
std::tuple<Tensor, Tensor, Tensor> batch_norm_act_noise_backward_cpu(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& invstd,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, bool training, c10::string_view activation,
    double negative_slope, std::array<bool, 3> output_mask) {
  const cpu::ActivationSpec act{parse_activation(kBatchNormActNoise, activation), negative_slope};
  const Tensor x = input.contiguous(kernel_format(input));
  const Tensor grad = grad_output.contiguous(kernel_format(x));
  const Tensor grad_input = output_mask[0] ? at::empty_like(x) : at::empty({0}, x.options());
  const int64_t C = x.size(1);
  const bool empty = x.numel() == 0;
  const auto sums = [&] { return empty ? at::zeros({C}, mean.options()) : at::empty({C}, mean.options()); };
  const Tensor sum_dz = sums(), sum_dz_xhat = sums();
  if (!empty) {
    const Tensor gamma = as_accumulate(bn_weight, mean.scalar_type()), beta = as_accumulate(bn_bias, mean.scalar_type());
    with_kernel_type(kBatchNormActNoise, x.scalar_type(), [&](auto tag) {
      using T = decltype(tag);
      using A = cpu::Accumulate<T>;
      cpu::batch_norm_act_noise_kernels<T>().backward(
          kernel_shape(x), data<T>(grad), data<T>(x), data_or_null<A>(gamma), data_or_null<A>(beta), data<A>(mean),
          data<A>(invstd), training, act, mutable_data<A>(sum_dz), mutable_data<A>(sum_dz_xhat),
          output_mask[0] ? mutable_data<T>(grad_input) : nullptr);
    });
  }
  const auto parameter = [&](bool wanted, const Tensor& sum, const OptionalTensor& like) {
    return wanted && defined(like) ? sum.to(like->scalar_type()) : at::empty({0}, x.options());
  };
  return {grad_input, parameter(output_mask[1], sum_dz_xhat, bn_weight), parameter(output_mask[2], sum_dz, bn_bias)};
}

// The same from differentiable operators, without the noise, whose derivative is 0.
Tensor differentiable(const Tensor& input, const Tensor& bn_weight, const Tensor& bn_bias, const Tensor& mean,
                      const Tensor& invstd, bool training, double eps, const std::string& activation, double slope) {
  std::vector<int64_t> sizes = input.sizes().vec();
  Tensor x = input;
  while (x.dim() < 4) x = x.unsqueeze(-1);
  const Tensor z = differentiable_batch_norm(x, bn_weight, bn_bias, mean, invstd, training, eps);
  return activate(z, parse_activation(kBatchNormActNoise, activation), slope).reshape(sizes);
}

class BatchNormActNoise : public torch::autograd::Function<BatchNormActNoise> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& bn_weight,
                        const OptionalTensor& bn_bias, const OptionalTensor& running_mean,
                        const OptionalTensor& running_var, const OptionalTensor& seed, bool training, double momentum,
                        double eps, std::string_view activation, double negative_slope, double noise_std) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fastgan::batch_norm_act_noise_forward", "")
                               .typed<decltype(batch_norm_act_noise_forward_cpu)>();
    auto [output, mean, invstd] = op.call(input, bn_weight, bn_bias, running_mean, running_var, seed, training, momentum,
                                          eps, activation, negative_slope, noise_std);
    ctx->save_for_backward({input, bn_weight.value_or(Tensor()), bn_bias.value_or(Tensor()), mean, invstd});
    ctx->set_materialize_grads(false);
    ctx->saved_data["training"] = training;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["negative_slope"] = negative_slope;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const Tensor& input = saved[0];
    const Tensor mean = saved[3].contiguous(), invstd = saved[4].contiguous();  // a hook may have unpacked them otherwise
    const bool training = ctx->saved_data["training"].toBool();
    const double slope = ctx->saved_data["negative_slope"].toDouble();
    const std::string activation = ctx->saved_data["activation"].toStringRef();
    std::array<bool, 3> mask;  // the graph has an edge only for the tensors that were given
    for (size_t i = 0, edge = 0; i < 3; ++i) mask[i] = saved[i].defined() && ctx->needs_input_grad(edge++);
    variable_list gradients(12);  // one an argument of forward; undefined for all but the first three
    if (!grad_outputs[0].defined()) return gradients;
    if (must_be_differentiable(grad_outputs[0])) {
      const auto whole = [&](const variable_list& from) {
        return differentiable(from[0], from[1], from[2], mean, invstd, training, ctx->saved_data["eps"].toDouble(), activation, slope);
      };
      const auto found = differentiable_gradients(whole, {input, saved[1], saved[2]},
                                                  std::vector<bool>(mask.begin(), mask.end()), grad_outputs[0]);
      std::copy(found.begin(), found.end(), gradients.begin());
      return gradients;
    }
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fastgan::batch_norm_act_noise_backward", "")
                               .typed<decltype(batch_norm_act_noise_backward_cpu)>();
    const auto [grad_input, grad_weight, grad_bias] =
        op.call(grad_outputs[0], input, mean, invstd, optional(saved[1]), optional(saved[2]), training, activation,
                slope, mask);
    if (mask[0]) gradients[0] = grad_input;
    if (mask[1]) gradients[1] = grad_weight;
    if (mask[2]) gradients[2] = grad_bias;
    return gradients;
  }
};

Tensor batch_norm_act_noise(const Tensor& input, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                            const OptionalTensor& running_mean, const OptionalTensor& running_var,
                            const OptionalTensor& seed, bool training, double momentum, double eps,
                            c10::string_view activation, double negative_slope, double noise_std) {
  parse_activation(kBatchNormActNoise, activation);
  check(input, bn_weight, bn_bias, running_mean, running_var, seed, training, momentum, eps, noise_std);
  OptionalTensor noise_seed;
  if (noise_std != 0) noise_seed = defined(seed) ? *seed : at::randint(int64_t{1} << 62, {}, at::kLong);
  return BatchNormActNoise::apply(input, bn_weight, bn_bias, running_mean, running_var, noise_seed, training, momentum, eps,
                                  activation, negative_slope, noise_std);
}

TORCH_LIBRARY_IMPL(fastgan, CompositeImplicitAutograd, m) { m.impl(kBatchNormActNoise, &batch_norm_act_noise); }

TORCH_LIBRARY_IMPL(fastgan, CPU, m) {
  m.impl("batch_norm_act_noise_forward", &batch_norm_act_noise_forward_cpu);
  m.impl("batch_norm_act_noise_backward", &batch_norm_act_noise_backward_cpu);
}

TORCH_LIBRARY_IMPL(fastgan, Autograd, m) {
  for (const char* name : {"batch_norm_act_noise_forward", "batch_norm_act_noise_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace
}  // namespace fastgan
