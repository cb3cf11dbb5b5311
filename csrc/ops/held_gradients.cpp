#include "held_gradients.h"

#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/graph_task.h>

#include <utility>

#include "kept_memory.h"

namespace fastgan {
namespace {

thread_local bool adds_in_place = false, puts_off = false;

struct PutOff {
  at::Tensor parameter;
  ComputeGradient compute;
};
thread_local std::vector<PutOff> pending;

bool is_plain(const at::Tensor& t) {
  return t.layout() == at::kStrided && t.scalar_type() == at::kFloat && t.device().is_cpu() &&
         (t.is_contiguous() || t.is_contiguous(at::MemoryFormat::ChannelsLast));
}

// Whether nobody sees what is added to the parameter's gradient, and this is where it would be put.
bool takes_gradients(const at::Tensor& parameter) {
  namespace impl = torch::autograd::impl;
  if (!parameter.is_leaf() || !parameter.requires_grad() || !is_plain(parameter) || !impl::hooks(parameter).empty() ||
      impl::post_acc_grad_hooks(parameter) != nullptr)
    return false;
  const at::Tensor& held = parameter.grad();
  if (held.defined() && (!is_plain(held) || held.strides() != parameter.strides() || held.requires_grad())) return false;
  const auto node = impl::try_get_grad_accumulator(parameter);
  const auto* accumulator = dynamic_cast<torch::autograd::AccumulateGrad*>(node.get());
  // What hooks on saved tensors have unpacked is another tensor than the leaf.
  return accumulator != nullptr && accumulator->variable.is_same(parameter) && node->pre_hooks().empty() && node->post_hooks().empty();
}

}  // namespace

bool add_gradients_in_place(bool wanted) { return std::exchange(adds_in_place, wanted); }

bool put_off_gradients(bool wanted) {
  pending.clear();
  return std::exchange(puts_off, wanted);
}

bool may_put_off(const at::Tensor& parameter) { return puts_off && takes_gradients(parameter); }

void put_off(const at::Tensor& parameter, ComputeGradient compute) { pending.push_back({parameter, std::move(compute)}); }

void finish_gradients() {
  const at::AutoDispatchBelowADInplaceOrView below;
  for (PutOff& each : std::exchange(pending, {})) {
    at::Tensor& gradient = each.parameter.mutable_grad();
    const bool add = gradient.defined();
    if (!add) gradient = empty_kept(each.parameter.sizes(), at::kFloat, !each.parameter.is_contiguous());
    std::exchange(each.compute, nullptr)(gradient, add);  // and with it goes what it read
    if (add) torch::autograd::impl::bump_version(gradient);
  }
}

std::vector<at::Tensor> held_gradients(at::TensorList parameters, at::IntArrayRef output_mask) {
  // Empty in backward(), which gives every leaf its gradient; torch.autograd.grad wants them returned.
  const auto* only = torch::autograd::get_current_graph_task_exec_info();
  if (!adds_in_place || only == nullptr || !only->empty()) return {};
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return {};  // which are to see every operator
  std::vector<at::Tensor> held(output_mask.size());
  for (size_t i = 1; i < output_mask.size(); ++i)
    if (output_mask[i] && takes_gradients(parameters[i - 1])) held[i] = parameters[i - 1].grad();
  return held;
}

void take_gradients(const std::vector<at::Tensor>& found, const std::vector<at::Tensor>& held, at::IntArrayRef output_mask,
                    std::vector<at::Tensor>& gradients) {
  for (size_t i = 0; i < output_mask.size(); ++i) {
    if (!output_mask[i]) continue;
    if (held.empty() || found[i].numel() > 0)
      gradients[i] = found[i];
    else if (held[i].defined())
      torch::autograd::impl::bump_version(held[i]);
  }
}

}  // namespace fastgan
