// adam_group_: a step of Adam on the CPU: kernel in csrc/cpu/adam.h.
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "../cpu/adam.h"
#include "adam.h"
#include "tensors.h"

namespace fastgan {
namespace {

// One number on the CPU, in float or double.
bool is_number(const Tensor& t) {
  const bool known = t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble;
  return known && t.is_cpu() && t.layout() == at::kStrided && t.numel() == 1;
}
double number(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? *t.const_data_ptr<double>() : static_cast<double>(*t.const_data_ptr<float>());
}

bool is_float(const Tensor& t) { return t.scalar_type() == at::kFloat && t.is_cpu() && t.layout() == at::kStrided; }

bool adam_group_cpu(at::TensorList parameters, at::TensorList gradients, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                    at::TensorList steps, double lr, double beta1, double beta2, double eps, double weight_decay,
                    bool decoupled_weight_decay, const OptionalTensor& lr_tensor, const OptionalTensor& found_inf) {
  const auto check_count = [&](const char* argument, at::TensorList list) {
    TORCH_CHECK_VALUE(list.size() == parameters.size(), "adam_group_: ", argument, " must be as many as parameters, ",
                      parameters.size(), ", got ", list.size());
  };
  check_count("gradients", gradients);
  check_count("exp_avgs", exp_avgs);
  check_count("exp_avg_sqs", exp_avg_sqs);
  check_count("steps", steps);
  for (const OptionalTensor& given : {lr_tensor, found_inf})
    if (given && !is_number(*given)) return false;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Tensor& parameter = parameters[i];
    if (!is_float(parameter) || !parameter.is_non_overlapping_and_dense()) return false;
    if (!is_float(steps[i]) || steps[i].numel() != 1) return false;
    for (const Tensor& tensor : {gradients[i], exp_avgs[i], exp_avg_sqs[i]})
      if (!is_float(tensor) || !same_order(tensor, parameter)) return false;
  }
  if (found_inf && number(*found_inf) != 0) return true;
  if (lr_tensor) lr = number(*lr_tensor);
  std::vector<cpu::AdamTensor> tensors;
  tensors.reserve(parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) {
    const double step = static_cast<double>(*steps[i].mutable_data_ptr<float>() += 1);
    tensors.push_back({parameters[i].mutable_data_ptr<float>(), gradients[i].const_data_ptr<float>(),
                       exp_avgs[i].mutable_data_ptr<float>(), exp_avg_sqs[i].mutable_data_ptr<float>(), parameters[i].numel(),
                       static_cast<float>(lr / (1 - std::pow(beta1, step))),
                       static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)))});
  }
  const cpu::AdamSettings settings{static_cast<float>(beta1), static_cast<float>(beta2), static_cast<float>(1 - beta1),
                                   static_cast<float>(1 - beta2), static_cast<float>(eps),
                                   decoupled_weight_decay ? 0.0f : static_cast<float>(weight_decay),
                                   decoupled_weight_decay ? static_cast<float>(1 - lr * weight_decay) : 1.0f};
  cpu::adam(tensors.data(), static_cast<int64_t>(tensors.size()), settings);
  count_as_written({parameters, exp_avgs, exp_avg_sqs, steps});
  return true;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgan, CPU, m) { m.impl("adam_group_", &adam_group_cpu); }

}  // namespace fastgan
