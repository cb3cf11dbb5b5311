// softmax_entropy and softmax_entropy_cross_entropy: checks, allocation, autograd, dispatch.
//
// Both public operators call softmax_entropy_forward, which carries the derivative. Its first derivative is
// softmax_entropy_backward; where a graph of the derivative is asked for (create_graph), the derivative is composed
// of differentiable ATen operators instead, so that every higher order is right.
//
// At 100 x 10, a training step's own size, the kernels take a tenth of the time and the way to them the rest. What
// shortened it: the public operators' own autograd kernels, which save a turn through the dispatcher, a plain Node in
// place of torch::autograd::Function, scratch on the stack, and scalar gradients read without an operator.
#include <ATen/EmptyTensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include "softmax_entropy.h"

#include "../cpu/softmax_entropy.h"
#include "kernel_arguments.h"

namespace fastgan {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// at::empty without its way through the dispatcher: at 100 x 10 the allocations cost as much as the kernels.
Tensor empty(at::IntArrayRef size, at::ScalarType dtype) { return at::detail::empty_cpu(size, dtype); }

// Scratch of the kernels: on the stack where it is small.
template <typename A>
class Workspace {
 public:
  Workspace(int64_t rows, int64_t classes) {
    const int64_t size = cpu::softmax_entropy_workspace_size(rows, classes);
    if (size > kOnStack) heap_ = empty({size}, c10::CppTypeToScalarType<A>::value);
  }
  A* data() { return heap_.defined() ? heap_.template mutable_data_ptr<A>() : stack_; }

 private:
  static constexpr int64_t kOnStack = 1024;
  alignas(64) A stack_[kOnStack];
  Tensor heap_;
};

Tensor with_dense_rows(const Tensor& logits) {
  return logits.size(1) == 1 || logits.stride(1) == 1 ? logits : logits.contiguous();
}

cpu::SoftmaxEntropyLabels label_arguments(const Tensor& logits, const Tensor& labels, int64_t ignore_index) {
  if (!labels.defined()) return {nullptr, ignore_index, 0};
  cpu::SoftmaxEntropyLabels arguments{labels.const_data_ptr<int64_t>(), ignore_index, 0};
  const int64_t bad =
      cpu::check_labels(arguments.labels, logits.size(0), logits.size(1), ignore_index, &arguments.count);
  TORCH_CHECK_INDEX(bad < 0, "softmax_entropy_cross_entropy: labels must lie in [0, ", logits.size(1),
                    ") (logits.size(1)) or equal ignore_index (", ignore_index, "), got ", arguments.labels[bad],
                    " at row ", bad);
  return arguments;
}

Tensor contiguous_labels(const OptionalTensor& labels) { return labels.has_value() ? labels->contiguous() : Tensor(); }

SoftmaxEntropyForward softmax_entropy_forward_cpu(const Tensor& logits_in, const OptionalTensor& labels_in,
                                                  int64_t ignore_index) {
  check_softmax_entropy(logits_in, labels_in);
  const Tensor logits = with_dense_rows(logits_in), labels = contiguous_labels(labels_in);
  const auto arguments = label_arguments(logits, labels, ignore_index);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const auto dtype = accumulate_dtype(logits.scalar_type());
  Tensor conditional = empty({}, dtype), marginal = empty({}, dtype), cross_entropy = empty({}, dtype),
         mean_probabilities = empty({classes}, dtype), log_normalizer = empty({rows}, dtype);
  with_kernel_type("softmax_entropy", logits.scalar_type(), [&](auto storage) {
    using T = decltype(storage);
    using A = cpu::Accumulate<T>;
    Workspace<A> workspace(rows, classes);
    const auto values = cpu::softmax_entropy_kernels<T>().forward(
        {rows, classes, logits.stride(0)}, data<T>(logits), arguments,
        mean_probabilities.mutable_data_ptr<A>(), log_normalizer.mutable_data_ptr<A>(),
        workspace.data());
    *conditional.mutable_data_ptr<A>() = values.conditional;
    *marginal.mutable_data_ptr<A>() = values.marginal;
    *cross_entropy.mutable_data_ptr<A>() = values.cross_entropy;
  });
  return {conditional, marginal, cross_entropy, mean_probabilities, log_normalizer};
}

template <typename A>
A scalar(const OptionalTensor& value) {
  if (!value.has_value() || !value->defined()) return A(0);
  const bool readable =
      value->numel() == 1 && value->is_cpu() && value->scalar_type() == c10::CppTypeToScalarType<A>::value;
  return readable ? *value->const_data_ptr<A>() : value->item<A>();
}

// Gradients that are absent count as 0.
Tensor softmax_entropy_backward_cpu(const OptionalTensor& grad_conditional, const OptionalTensor& grad_marginal,
                                    const OptionalTensor& grad_cross_entropy, const Tensor& logits_in,
                                    const OptionalTensor& labels_in, int64_t ignore_index,
                                    const Tensor& mean_probabilities, const Tensor& log_normalizer) {
  check_softmax_entropy(logits_in, labels_in);
  const Tensor logits = with_dense_rows(logits_in), labels = contiguous_labels(labels_in);
  const auto arguments = label_arguments(logits, labels, ignore_index);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const Tensor grad_logits = empty({rows, classes}, logits.scalar_type());
  with_kernel_type("softmax_entropy", logits.scalar_type(), [&](auto storage) {
    using T = decltype(storage);
    using A = cpu::Accumulate<T>;
    Workspace<A> workspace(rows, classes);
    cpu::softmax_entropy_kernels<T>().backward(
        {rows, classes, logits.stride(0)}, data<T>(logits), arguments,
        mean_probabilities.const_data_ptr<A>(), log_normalizer.const_data_ptr<A>(),
        {scalar<A>(grad_conditional), scalar<A>(grad_marginal), scalar<A>(grad_cross_entropy)},
        mutable_data<T>(grad_logits), workspace.data());
  });
  return grad_logits;
}

SoftmaxEntropyForward call_forward(const Tensor& logits, const OptionalTensor& labels, int64_t ignore_index) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastgan::softmax_entropy_forward", "")
                             .typed<SoftmaxEntropyForward(const Tensor&, const OptionalTensor&, int64_t)>();
  return op.call(logits, labels, ignore_index);
}

Tensor call_backward(const OptionalTensor& grad_conditional, const OptionalTensor& grad_marginal,
                     const OptionalTensor& grad_cross_entropy, const Tensor& logits, const OptionalTensor& labels,
                     int64_t ignore_index, const Tensor& mean_probabilities, const Tensor& log_normalizer) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastgan::softmax_entropy_backward", "")
          .typed<Tensor(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                        const OptionalTensor&, int64_t, const Tensor&, const Tensor&)>();
  return op.call(grad_conditional, grad_marginal, grad_cross_entropy, logits, labels, ignore_index, mean_probabilities,
                 log_normalizer);
}

struct SoftmaxEntropyBackward : torch::autograd::Node {
  SavedVariable logits, labels, mean_probabilities, log_normalizer;
  int64_t ignore_index = 0;

  std::string name() const override { return "SoftmaxEntropyBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&logits, &labels, &mean_probabilities, &log_normalizer}) saved->reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    grads.resize(3);  // without labels cross_entropy is a constant and has no gradient
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return {Tensor()};
    const Tensor l = logits.unpack(), y = labels.unpack();
    if (at::GradMode::is_enabled())
      return {composed_softmax_entropy_backward(grads[0], grads[1], grads[2], l, y, ignore_index)};
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    // A hook may have unpacked them otherwise than they were saved.
    const Tensor mean = mean_probabilities.unpack().contiguous(), normalizer = log_normalizer.unpack().contiguous();
    return {call_backward(optional(grads[0]), optional(grads[1]), optional(grads[2]), l, optional(y), ignore_index, mean, normalizer)};
  }
};

// PyTorch 2.11 holds the nodes of a graph by std::shared_ptr, 2.13 by a pointer of its own.
template <typename N>
auto make_node() {
  if constexpr (std::is_same_v<decltype(torch::autograd::Edge::function), std::shared_ptr<torch::autograd::Node>>)
    return std::make_shared<N>();
  else
    return c10::make_intrusive<N>();
}

SoftmaxEntropyForward softmax_entropy_forward_autograd(const Tensor& logits, const OptionalTensor& labels, int64_t ignore_index) {
  TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(logits), softmax_entropy_name(labels),
                              ": logits must carry no forward-mode derivative (there is none for this operator)");
  const auto result = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_forward(logits, labels, ignore_index);
  }();
  if (!torch::autograd::compute_requires_grad(logits)) return result;
  const auto node = make_node<SoftmaxEntropyBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(logits));
  node->logits = SavedVariable(logits, /*is_output=*/false);
  if (labels.has_value()) node->labels = SavedVariable(*labels, false);
  node->mean_probabilities = SavedVariable(std::get<3>(result), false);
  node->log_normalizer = SavedVariable(std::get<4>(result), false);
  node->ignore_index = ignore_index;
  torch::autograd::set_history(std::get<0>(result), node);
  torch::autograd::set_history(std::get<1>(result), node);
  if (labels.has_value()) torch::autograd::set_history(std::get<2>(result), node);
  return result;
}

using Forward = SoftmaxEntropyForward(const Tensor&, const OptionalTensor&, int64_t);

template <Forward* forward>
std::tuple<Tensor, Tensor> softmax_entropy(const Tensor& logits) {
  const auto result = forward(logits, std::nullopt, -100);
  return {std::get<0>(result), std::get<1>(result)};
}

template <Forward* forward>
std::tuple<Tensor, Tensor, Tensor> softmax_entropy_cross_entropy(const Tensor& logits, const Tensor& labels,
                                                                 int64_t ignore_index) {
  const auto result = forward(logits, labels, ignore_index);
  return {std::get<0>(result), std::get<1>(result), std::get<2>(result)};
}

TORCH_LIBRARY_IMPL(fastgan, CompositeImplicitAutograd, m) {
  m.impl("softmax_entropy", softmax_entropy<call_forward>);
  m.impl("softmax_entropy_cross_entropy", softmax_entropy_cross_entropy<call_forward>);
}
TORCH_LIBRARY_IMPL(fastgan, AutogradCPU, m) {
  m.impl("softmax_entropy", softmax_entropy<softmax_entropy_forward_autograd>);
  m.impl("softmax_entropy_cross_entropy", softmax_entropy_cross_entropy<softmax_entropy_forward_autograd>);
}
TORCH_LIBRARY_IMPL(fastgan, CPU, m) {
  m.impl("softmax_entropy_forward", softmax_entropy_forward_cpu);
  m.impl("softmax_entropy_backward", softmax_entropy_backward_cpu);
}
TORCH_LIBRARY_IMPL(fastgan, Autograd, m) { m.impl("softmax_entropy_forward", softmax_entropy_forward_autograd); }

}  // namespace
}  // namespace fastgan
