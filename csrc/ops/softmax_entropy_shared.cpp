// What softmax_entropy's CPU and CUDA sides share. See softmax_entropy.h.
#include "softmax_entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/one_hot.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "kernel_arguments.h"

namespace fastgan {

void check_softmax_entropy(const Tensor& logits, const OptionalTensor& labels) {
  const char* op = softmax_entropy_name(labels);
  TORCH_CHECK(logits.dim() == 2, op, ": logits must have shape [N, K], got ", logits.sizes());
  TORCH_CHECK_TYPE(logits.is_floating_point(), op, ": logits must be of a floating-point dtype, got ", logits.scalar_type());
  TORCH_CHECK(logits.size(0) > 0, op, ": logits must have at least one row (the mean of none is undefined), got shape ",
              logits.sizes());
  TORCH_CHECK(logits.size(1) > 0, op, ": logits must have at least one class (K >= 1), got shape ", logits.sizes());
  if (!labels.has_value()) return;
  TORCH_CHECK(labels->dim() == 1 && labels->size(0) == logits.size(0), op, ": labels must have shape [", logits.size(0),
              "] (logits.size(0)), got ", labels->sizes());
  TORCH_CHECK_TYPE(labels->scalar_type() == at::kLong, op, ": labels must be of dtype int64, got ", labels->scalar_type());
  TORCH_CHECK(labels->device() == logits.device(), op, ": labels must be on ", logits.device(), " like logits, got ",
              labels->device());
}

// The formulas of cpu/softmax_entropy_kernel.cpp.
Tensor composed_softmax_entropy_backward(const Tensor& grad_conditional, const Tensor& grad_marginal,
                                         const Tensor& grad_cross_entropy, const Tensor& logits, const Tensor& labels,
                                         int64_t ignore_index) {
  const Tensor l = logits.to(accumulate_dtype(logits.scalar_type()));
  const Tensor log_p = at::log_softmax(l, 1).clamp_min(-1000), p = log_p.exp();
  const double rows = static_cast<double>(l.size(0));
  Tensor t = at::zeros_like(p);
  if (grad_conditional.defined()) t = t + grad_conditional * log_p;
  if (grad_marginal.defined()) {
    const Tensor q = p.mean(0);
    t = t + grad_marginal * at::where(q == 0, at::ones_like(q), q).log();
  }
  Tensor grad = p * ((p * t).sum(1, true) - t) / rows;
  if (grad_cross_entropy.defined() && labels.defined()) {
    const Tensor labeled = labels != ignore_index;
    // CUDA leaves labels unchecked: one out of range has made the loss NaN, and must not stop the device here.
    const Tensor classes = at::where(labeled, labels, 0).clamp(0, l.size(1) - 1);
    const Tensor target = at::one_hot(classes, l.size(1)).to(p.scalar_type());
    const Tensor count = labeled.sum().clamp_min(1);
    grad = grad + (grad_cross_entropy / count) * (p - target) * labeled.unsqueeze(1);
  }
  return grad.to(logits.scalar_type());
}

}  // namespace fastgan
