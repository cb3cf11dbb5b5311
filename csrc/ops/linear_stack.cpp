// linear_stack: a run of Linear [+ batch norm] [+ activation] [+ Gaussian noise] layers, and noise on its input, from end to end,
// on the CPU in float32: kernels in csrc/cpu/linear.h.
//
// Saved for backward, in one tensor: of each layer the products (where batch norm or an activation comes after them), its
// means and invstds, and, where weights want gradients, its input with the noise on it.
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../cpu/linear.h"
#include "conv_stack.h"
#include "held_gradients.h"
#include "kept_memory.h"

namespace fastgan {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// How fastgan/ops/linear_stack.py writes a layer into `layers` and, behind the standard deviation of the input's noise, into `numbers`.
struct LinearLayer {
  bool has_bias, has_batch_norm, has_bn_weight, has_bn_bias, has_running, training, has_counter;
  cpu::ActivationSpec activation;
  double momentum, eps, noise_std;
  Tensor weight, bias, bn_weight, bn_bias;
  Tensor running_mean, running_var, counter;  // undefined in backward
  // Places in what is saved, in floats; -1: not saved. products: by feature, rows: its input by row.
  int64_t statistics, products, rows;

  static constexpr size_t kIntegers = 8, kNumbers = 4;

  // weight [, bias] [, bn_weight] [, bn_bias]
  size_t parameter_count() const { return 1 + has_bias + has_bn_weight + has_bn_bias; }
  int64_t inputs() const { return weight.size(1); }
  int64_t outputs() const { return weight.size(0); }
  bool passes_products_on() const { return !has_batch_norm && activation.kind == Activation::identity; }
  // What its batch norm is to the kernels.
  cpu::LinearNorm norm(float* mean, float* var, float* invstd) const {
    return {has_batch_norm, training, eps, floats(bn_weight), floats(bn_bias), mean, var, invstd};
  }
};

struct Perceptron {
  double input_noise;
  std::vector<LinearLayer> layers;
  int64_t saved;  // floats
};

// running and seeds: null in backward.
Perceptron parse(const Tensor& input, at::TensorList parameters, const at::TensorList* running, const Tensor* seeds,
                 at::IntArrayRef integers, at::ArrayRef<double> numbers, int64_t save) {
  const size_t count = integers.size() / LinearLayer::kIntegers;
  TORCH_CHECK_VALUE(count > 0 && integers.size() == count * LinearLayer::kIntegers &&
                        numbers.size() == 1 + count * LinearLayer::kNumbers,
                    "linear_stack: layers must have ", LinearLayer::kIntegers, " integers and numbers 1 + ",
                    LinearLayer::kNumbers, " values a layer, got ", integers.size(), " and ", numbers.size());
  TORCH_CHECK_VALUE(input.dim() == 2, "linear_stack: input must have shape [N, C], got ", input.sizes());
  Perceptron stack{numbers[0], {}, 0};
  size_t next = 0, next_running = 0;
  bool noisy = stack.input_noise != 0;
  int64_t features = input.size(1);
  const auto take = [&](bool present) {
    TORCH_CHECK_VALUE(!present || next < parameters.size(), "linear_stack: parameters has ", parameters.size(), " tensors, too few");
    return present ? parameters[next++].contiguous() : Tensor();
  };
  const auto take_array = [&](bool present) {
    const Tensor array = take(present);
    TORCH_CHECK_VALUE(!present || array.numel() == features, "linear_stack: parameter ", next - 1, " must have shape [", features,
                      "], got ", array.sizes());
    return array;
  };
  const auto take_running = [&](bool present, int64_t values, at::ScalarType dtype) {
    if (!present || running == nullptr) return Tensor();
    TORCH_CHECK_VALUE(next_running < running->size() && (*running)[next_running].numel() == values &&
                          (*running)[next_running].is_contiguous() && (*running)[next_running].scalar_type() == dtype,
                      "linear_stack: running must have at ", next_running, " a contiguous tensor of ", values, " values of ", dtype);
    return (*running)[next_running++];
  };
  // In whole cache lines: a vector that crosses two takes two turns.
  const auto place = [&](int64_t floats) { return std::exchange(stack.saved, stack.saved + (floats + 15) / 16 * 16); };
  for (size_t i = 0; i < count; ++i) {
    const int64_t* n = integers.data() + i * LinearLayer::kIntegers;
    const double* f = numbers.data() + 1 + i * LinearLayer::kNumbers;
    LinearLayer layer{n[0] != 0, n[1] != 0, n[2] != 0, n[3] != 0, n[4] != 0, n[5] != 0, n[6] != 0,
                      {activation_of("linear_stack", n[7]), f[2]},
                      f[0], f[1], f[3], {}, {}, {}, {}, {}, {}, {}, -1, -1, -1};
    layer.weight = take(true);
    TORCH_CHECK_VALUE(layer.weight.dim() == 2 && layer.inputs() == features, "linear_stack: weight of layer ", i,
                      " must have shape [*, ", features, "], got ", layer.weight.sizes());
    features = layer.outputs();
    layer.bias = take_array(layer.has_bias);
    layer.bn_weight = take_array(layer.has_bn_weight), layer.bn_bias = take_array(layer.has_bn_bias);
    layer.running_mean = take_running(layer.has_running, features, at::kFloat);
    layer.running_var = take_running(layer.has_running, features, at::kFloat);
    layer.counter = take_running(layer.has_counter, 1, at::kLong);
    TORCH_CHECK_VALUE(!layer.has_batch_norm || layer.training || layer.has_running, "linear_stack: batch norm of layer ", i,
                      " must have running statistics, as it does not train");
    TORCH_CHECK_VALUE(!layer.has_batch_norm || !layer.training || input.size(0) != 1, "linear_stack: input must have more than one row, "
                      "as batch norm of layer ", i, " trains, got shape ", input.sizes());
    if (save > 0 && layer.has_batch_norm) layer.statistics = place(2 * features);
    if (save > 0 && !layer.passes_products_on()) layer.products = place(features * cpu::linear_stride(input.size(0)));
    if (save > 1) layer.rows = place(input.size(0) * cpu::linear_stride(layer.inputs()));
    noisy = noisy || layer.noise_std != 0;
    stack.layers.push_back(std::move(layer));
  }
  TORCH_CHECK_VALUE(!noisy || seeds == nullptr || seeds->numel() == static_cast<int64_t>(count) + 1,
                    "linear_stack: seeds must have shape [", count + 1, "], got ", seeds->sizes());
  return stack;
}

Tensor by_feature(int64_t features, int64_t rows) { return empty_kept({features, cpu::linear_stride(rows)}, at::kFloat); }

float* at_place(const Tensor& saved, int64_t place) { return place >= 0 ? floats(saved) + place : nullptr; }

cpu::GaussianNoise noise_of(double std, const Tensor& seeds, int64_t index) {
  return {std, std != 0 ? static_cast<uint64_t>(seeds.const_data_ptr<int64_t>()[index]) : 0};
}

// (output, what is saved); the latter with shape [0] where `save` is 0.
std::tuple<Tensor, Tensor> linear_stack_forward_cpu(const Tensor& input, at::TensorList parameters, at::TensorList running,
                                                    const Tensor& seeds, at::IntArrayRef integers, at::ArrayRef<double> numbers,
                                                    int64_t save) {
  const Perceptron stack = parse(input, parameters, &running, &seeds, integers, numbers, save);
  const cpu::LinearKernels& kernels = cpu::linear_kernels();
  const int64_t N = input.size(0);
  const Tensor x = input.contiguous(), saved = empty_kept({stack.saved}, at::kFloat);
  Tensor current = by_feature(x.size(1), N);
  {
    RECORD_FUNCTION("fastgan::linear_stack_read", {});
    kernels.read(N, x.size(1), floats(x), noise_of(stack.input_noise, seeds, 0), floats(current),
                 at_place(saved, stack.layers[0].rows));
  }
  const Tensor output = at::empty({N, stack.layers.back().outputs()}, input.options());
  for (size_t i = 0; i < stack.layers.size(); ++i) {
    const LinearLayer& layer = stack.layers[i];
    const bool last = i + 1 == stack.layers.size();
    const int64_t C = layer.outputs();
    std::vector<float> own(layer.has_batch_norm ? 3 * static_cast<size_t>(C) : 0);  // mean, invstd where not saved; variance
    float* statistics = layer.statistics >= 0 ? at_place(saved, layer.statistics) : own.data();
    cpu::LinearForward to{};
    to.bias = floats(layer.bias);
    to.activation = layer.activation;
    to.noise = noise_of(layer.noise_std, seeds, static_cast<int64_t>(i) + 1);
    if (layer.has_batch_norm) {
      to.norm = layer.norm(statistics, own.data() + 2 * C, statistics + C);
      if (!layer.training) {
        std::copy_n(floats(layer.running_mean), C, to.norm.mean);
        std::copy_n(floats(layer.running_var), C, to.norm.var);
      }
    }
    const Tensor next = by_feature(C, N);
    to.output = floats(next);
    to.raw = layer.products >= 0 ? at_place(saved, layer.products) : to.output;
    to.by_row = last ? floats(output) : at_place(saved, stack.layers[i + 1].rows);
    to.stride = last ? C : cpu::linear_stride(C);
    RECORD_FUNCTION("fastgan::linear_forward", {});
    kernels.forward({N, layer.inputs(), C}, floats(layer.weight), floats(current), to);
    if (layer.has_batch_norm && layer.training && layer.has_running && N > 0)
      cpu::update_running_statistics<float>(C, N, layer.momentum, to.norm.mean, to.norm.var, floats(layer.running_mean),
                                            floats(layer.running_var));
    if (layer.has_counter) *layer.counter.mutable_data_ptr<int64_t>() += 1;
    current = next;
  }
  return {output, saved};
}

// Gradients of input and of every parameter, with shape [0] where output_mask says false. Those of parameters are added to `held`,
// one a result, where that is defined; they then have shape [0], too.
std::vector<Tensor> stack_gradients(const Tensor& grad_output, const Tensor& input, at::TensorList parameters, const Tensor& saved,
                                    at::IntArrayRef integers, at::ArrayRef<double> numbers, int64_t save,
                                    at::IntArrayRef output_mask, const std::vector<Tensor>& held) {
  const Perceptron stack = parse(input, parameters, nullptr, nullptr, integers, numbers, save);
  const cpu::LinearKernels& kernels = cpu::linear_kernels();
  const int64_t N = input.size(0), count = static_cast<int64_t>(stack.layers.size());
  const auto options = input.options();
  std::vector<Tensor> results(output_mask.size());
  for (Tensor& result : results) result = at::empty({0}, options);

  const auto is_held = [&](size_t k) { return k < held.size() && held[k].defined(); };
  if (N == 0) {  // sums of nothing
    for (size_t k = 0; k < results.size(); ++k)
      if (output_mask[k] && !is_held(k)) results[k] = at::zeros(k > 0 ? parameters[k - 1].sizes() : input.sizes(), options);
    return results;
  }

  const WantedGradients wanted = wanted_gradients(stack.layers, output_mask);
  const int64_t lowest = wanted.lowest;

  // What finishes the gradient of layer i's output, in `gradient`; sums are two rows.
  std::vector<float> sums;
  const auto backward_of = [&](int64_t i, const Tensor& gradient) {
    const LinearLayer& layer = stack.layers[i];
    const int64_t C = layer.outputs();
    sums.resize(2 * static_cast<size_t>(C));
    float* mean = at_place(saved, layer.statistics);
    cpu::LinearBackward to{};
    to.norm = layer.norm(mean, nullptr, mean != nullptr ? mean + C : nullptr);
    to.activation = layer.activation;
    to.raw = at_place(saved, layer.products);
    to.sum_dz = sums.data(), to.sum_dz_xhat = sums.data() + C;
    to.gradient = floats(gradient);
    return to;
  };
  // The gradients of layer i's bias and batch norm, from those sums.
  const auto keep_sums = [&](int64_t i, const cpu::LinearBackward& done) {
    const LinearLayer& layer = stack.layers[i];
    const int64_t C = layer.outputs();
    size_t k = wanted.first_parameter[i] + 1;
    const auto keep = [&](const auto& value) {
      if (!output_mask[k]) return void(++k);
      const bool add = is_held(k);
      const Tensor gradient = add ? held[k] : at::empty({C}, options);
      float* to = floats(gradient);
      for (int64_t c = 0; c < C; ++c) to[c] = add ? to[c] + value(c) : value(c);
      if (!add) results[k] = gradient;
      ++k;
    };
    if (layer.has_bias)
      keep([&](int64_t c) {
        if (!layer.has_batch_norm) return done.sum_dz[c];
        if (layer.training) return 0.0f;  // batch statistics cancel the bias
        return done.sum_dz[c] * done.norm.invstd[c] * (done.norm.gamma != nullptr ? done.norm.gamma[c] : 1.0f);
      });
    if (layer.has_bn_weight) keep([&](int64_t c) { return done.sum_dz_xhat[c]; });
    if (layer.has_bn_bias) keep([&](int64_t c) { return done.sum_dz[c]; });
  };

  Tensor gradient = by_feature(stack.layers.back().outputs(), N);
  const cpu::LinearBackward top = backward_of(count - 1, gradient);
  kernels.read_gradient(N, stack.layers.back().outputs(), floats(grad_output.contiguous()), top);
  keep_sums(count - 1, top);
  for (int64_t i = count - 1; i >= lowest; --i) {
    const LinearLayer& layer = stack.layers[i];
    const cpu::LinearShape shape{N, layer.inputs(), layer.outputs()};
    const size_t k = wanted.first_parameter[i];
    if (output_mask[k]) {
      const bool add = is_held(k);
      const Tensor weight = add ? held[k] : empty_kept(layer.weight.sizes(), at::kFloat);
      RECORD_FUNCTION("fastgan::linear_weight_gradient", {});
      kernels.weight_gradient(shape, floats(gradient), at_place(saved, layer.rows), floats(weight), add);
      if (!add) results[k] = weight;
    }
    if (i == lowest && (i > 0 || !output_mask[0])) break;
    const Tensor below = by_feature(layer.inputs(), N);
    RECORD_FUNCTION("fastgan::linear_input_gradient", {});
    if (i > 0) {
      const cpu::LinearBackward to = backward_of(i - 1, below);
      kernels.input_gradient(shape, floats(layer.weight), floats(gradient), to, nullptr);
      keep_sums(i - 1, to);
    } else {
      results[0] = at::empty(input.sizes(), options);
      cpu::LinearBackward to{};
      to.gradient = floats(below);
      kernels.input_gradient(shape, floats(layer.weight), floats(gradient), to, floats(results[0]));
    }
    gradient = below;
  }
  return results;
}

std::vector<Tensor> linear_stack_backward_cpu(const Tensor& grad_output, const Tensor& input, at::TensorList parameters,
                                              const Tensor& saved, at::IntArrayRef integers, at::ArrayRef<double> numbers,
                                              int64_t save, at::IntArrayRef output_mask) {
  return stack_gradients(grad_output, input, parameters, saved, integers, numbers, save, output_mask, {});
}

// ---- autograd ----------------------------------------------------------------------------------------------------

class LinearStack : public torch::autograd::Function<LinearStack> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, at::TensorList parameters, const variable_list& running,
                        const Tensor& seeds, std::vector<int64_t> layers, std::vector<double> numbers, int64_t save) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("fastgan::linear_stack_forward", "")
                         .typed<decltype(linear_stack_forward_cpu)>();
    const auto [output, kept] = op.call(input, parameters, running, seeds, layers, numbers, save);
    if (save > 0) {
      variable_list saved{input, seeds, kept};
      saved.insert(saved.end(), parameters.begin(), parameters.end());
      ctx->save_for_backward(saved);
      ctx->set_materialize_grads(false);
      ctx->saved_data["layers"] = layers;
      ctx->saved_data["numbers"] = numbers;
      ctx->saved_data["save"] = save;
    }
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& input = saved[0];
    const Tensor seeds = saved[1].contiguous(), kept = saved[2].contiguous();  // a hook may have unpacked them otherwise
    const at::TensorList parameters = at::TensorList(saved).slice(3);
    const auto layers = ctx->saved_data["layers"].toIntVector();
    const auto numbers = ctx->saved_data["numbers"].toDoubleVector();
    const int64_t save = ctx->saved_data["save"].toInt();
    std::vector<int64_t> mask;
    for (size_t i = 0; i <= parameters.size(); ++i) mask.push_back(ctx->needs_input_grad(i));
    variable_list gradients(parameters.size() + 6);  // input and parameters, then five arguments without one
    if (!grad_outputs[0].defined()) return gradients;
    if (must_be_differentiable(grad_outputs[0])) {
      variable_list inputs{input};
      inputs.insert(inputs.end(), parameters.begin(), parameters.end());
      const auto whole = [&](const variable_list& from) {
        return differentiable(from[0], at::TensorList(from).slice(1), seeds, kept, layers, numbers, save);
      };
      const auto found = differentiable_gradients(whole, inputs, std::vector<bool>(mask.begin(), mask.end()), grad_outputs[0]);
      std::copy(found.begin(), found.end(), gradients.begin());
      return gradients;
    }
    if (const auto held = held_gradients(parameters, mask); !held.empty()) {
      RECORD_FUNCTION("fastgan::linear_stack_backward", {});
      at::AutoDispatchBelowADInplaceOrView below;
      const auto found = stack_gradients(grad_outputs[0], input, parameters, kept, layers, numbers, save, mask, held);
      take_gradients(found, held, mask, gradients);
      return gradients;
    }
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("fastgan::linear_stack_backward", "")
                         .typed<decltype(linear_stack_backward_cpu)>();
    take_gradients(op.call(grad_outputs[0], input, parameters, kept, layers, numbers, save, mask), {}, mask, gradients);
    return gradients;
  }

 private:
  // The whole run from differentiable ATen operators, for backward passes that are differentiated themselves. Noise is a constant.
  static Tensor differentiable(const Tensor& input, at::TensorList parameters, const Tensor& seeds, const Tensor& kept,
                               at::IntArrayRef integers, at::ArrayRef<double> numbers, int64_t save) {
    Tensor x = input;
    const auto add_noise = [&](double std, int64_t index) {
      if (std == 0) return;
      const int64_t N = x.size(0), C = x.size(1);
      const Tensor scratch = by_feature(C, N), noise = by_feature(N, C), zeros = at::zeros({N, C}, x.options());
      cpu::linear_kernels().read(N, C, floats(zeros), noise_of(std, seeds, index), floats(scratch), floats(noise));
      x = at::add(x, noise.narrow(1, 0, C));
    };
    const Perceptron stack = parse(input, parameters, nullptr, nullptr, integers, numbers, save);
    add_noise(stack.input_noise, 0);
    for (size_t i = 0; i < stack.layers.size(); ++i) {
      const LinearLayer& layer = stack.layers[i];
      x = at::linear(x, layer.weight, layer.has_bias ? OptionalTensor(layer.bias) : std::nullopt);
      if (layer.has_batch_norm) {
        const int64_t C = layer.outputs();
        const Tensor mean = kept.narrow(0, layer.statistics, C), invstd = kept.narrow(0, layer.statistics + C, C);
        x = differentiable_batch_norm(x.unsqueeze(2).unsqueeze(3), layer.bn_weight, layer.bn_bias, mean, invstd, layer.training,
                                      layer.eps).flatten(1);
      }
      x = activate(x, layer.activation.kind, layer.activation.negative_slope);
      add_noise(layer.noise_std, static_cast<int64_t>(i) + 1);
    }
    return x;
  }
};

Tensor linear_stack(const Tensor& input, at::TensorList parameters, at::TensorList running, const Tensor& seeds,
                    at::IntArrayRef layers, at::ArrayRef<double> numbers) {
  const bool weights = std::any_of(parameters.begin(), parameters.end(), [](const Tensor& p) { return p.requires_grad(); });
  const int64_t save = !at::GradMode::is_enabled() ? 0 : weights ? 2 : input.requires_grad() ? 1 : 0;
  return LinearStack::apply(input, parameters, running.vec(), seeds, layers.vec(), numbers.vec(), save);
}

TORCH_LIBRARY_IMPL(fastgan, CompositeImplicitAutograd, m) { m.impl("linear_stack", &linear_stack); }

TORCH_LIBRARY_IMPL(fastgan, CPU, m) {
  m.impl("linear_stack_forward", &linear_stack_forward_cpu);
  m.impl("linear_stack_backward", &linear_stack_backward_cpu);
}

TORCH_LIBRARY_IMPL(fastgan, Autograd, m) {
  for (const char* name : {"linear_stack_forward", "linear_stack_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace
}  // namespace fastgan
