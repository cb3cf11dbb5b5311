#include "held_gradients.h"

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <utility>

namespace fastgan {
namespace {

thread_local bool adds_in_place = false;

at::Tensor held_gradient(const at::Tensor& parameter) {
  namespace impl = torch::autograd::impl;
  if (!parameter.is_leaf() || !parameter.requires_grad() || !impl::hooks(parameter).empty() ||
      impl::post_acc_grad_hooks(parameter) != nullptr)
    return {};
  const at::Tensor& held = parameter.grad();
  if (!held.defined() || held.layout() != at::kStrided || held.scalar_type() != at::kFloat || !held.device().is_cpu() ||
      !held.is_contiguous() || held.requires_grad())
    return {};
  const auto accumulator = impl::try_get_grad_accumulator(parameter);
  if (accumulator == nullptr || !accumulator->pre_hooks().empty() || !accumulator->post_hooks().empty()) return {};
  return held;
}

}  // namespace

bool add_gradients_in_place(bool wanted) { return std::exchange(adds_in_place, wanted); }

std::vector<at::Tensor> held_gradients(at::TensorList parameters, at::IntArrayRef output_mask) {
  // Empty in backward(), which gives every leaf its gradient; torch.autograd.grad wants them returned.
  const auto* only = torch::autograd::get_current_graph_task_exec_info();
  if (!adds_in_place || only == nullptr || !only->empty()) return {};
  std::vector<at::Tensor> held(output_mask.size());
  for (size_t i = 1; i < output_mask.size(); ++i)
    if (output_mask[i]) held[i] = held_gradient(parameters[i - 1]);
  return held;
}

void take_gradients(const std::vector<at::Tensor>& found, const std::vector<at::Tensor>& held, at::IntArrayRef output_mask,
                    std::vector<at::Tensor>& gradients) {
  for (size_t i = 0; i < output_mask.size(); ++i) {
    if (!output_mask[i]) continue;
    if (i < held.size() && held[i].defined() && found[i].numel() == 0)
      torch::autograd::impl::bump_version(held[i]);
    else
      gradients[i] = found[i];
  }
}

}  // namespace fastgan
