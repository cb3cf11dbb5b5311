// softmax_entropy on CUDA: allocation and launch. float64 runs on ATen's operators.
//
// Labels are not checked against the number of classes, which would wait for the device: a label out of range makes the
// cross-entropy NaN.
#include <ATen/TensorOperators.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/where.h>
#include <ATen/ops/xlogy.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>

#include "../cuda/softmax_entropy.h"
#include "cuda.h"
#include "softmax_entropy.h"

namespace fastgan {
namespace {

const float* floats_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() ? tensor->const_data_ptr<float>() : nullptr;
}

// What both directions need; the tensors that the arguments point to are kept by the caller.
struct Prepared {
  Tensor logits, labels, label_count;
  cuda::SoftmaxEntropyArgs args;

  Prepared(const Tensor& logits_in, const OptionalTensor& labels_in, int64_t ignore_index) {
    logits = logits_in.size(1) == 1 || logits_in.stride(1) == 1 ? logits_in : logits_in.contiguous();
    args.rows = logits.size(0);
    args.classes = logits.size(1);
    args.row_stride = logits.stride(0);
    args.type = cuda_type(logits.scalar_type());
    args.logits = logits.const_data_ptr();
    args.multiprocessors = multiprocessors();
    if (labels_in.has_value()) {
      labels = labels_in->contiguous();
      label_count = (labels != ignore_index).sum();
      args.labels = labels.const_data_ptr<int64_t>();
      args.ignore_index = ignore_index;
      args.label_count = label_count.const_data_ptr<int64_t>();
    }
  }
};

SoftmaxEntropyForward softmax_entropy_forward_cuda(const Tensor& logits_in, const OptionalTensor& labels_in,
                                                   int64_t ignore_index) {
  check_softmax_entropy(logits_in, labels_in);
  const DeviceGuard device_guard(logits_in.device());
  if (logits_in.scalar_type() == at::kDouble) {
    const Tensor log_p = at::log_softmax(logits_in, 1), p = log_p.exp(), q = p.mean(0);
    Tensor cross_entropy = at::zeros({}, logits_in.options());
    if (labels_in.has_value()) {
      const Tensor &labels = *labels_in, labeled = labels != ignore_index;
      const Tensor in_range = (labels >= 0).logical_and(labels < logits_in.size(1));
      const Tensor picked = log_p.gather(1, labels.clamp(0, logits_in.size(1) - 1).unsqueeze(1)).squeeze(1);
      const Tensor log_likelihood = at::where(in_range, picked, std::numeric_limits<double>::quiet_NaN());
      cross_entropy = -at::where(labeled, log_likelihood, 0.0).sum() / labeled.sum().clamp_min(1);
    }
    // The largest logit's log-probability is -log s.
    return {-at::xlogy(p, p).sum(1).mean(), -at::xlogy(q, q).sum(), cross_entropy, q, -std::get<0>(log_p.max(1))};
  }
  Prepared prepared(logits_in, labels_in, ignore_index);
  cuda::SoftmaxEntropyArgs& args = prepared.args;
  const auto options = logits_in.options().dtype(at::kFloat);
  const Tensor conditional = at::empty({}, options), marginal = at::empty({}, options),
               cross_entropy = at::empty({}, options), mean_probabilities = at::empty({args.classes}, options),
               log_normalizer = at::empty({args.rows}, options),
               workspace = scratch(logits_in, softmax_entropy_workspace_bytes(args));
  args.workspace = workspace.mutable_data_ptr();
  args.conditional = conditional.mutable_data_ptr<float>();
  args.marginal = marginal.mutable_data_ptr<float>();
  args.cross_entropy = cross_entropy.mutable_data_ptr<float>();
  args.mean_probabilities = mean_probabilities.mutable_data_ptr<float>();
  args.log_normalizer = log_normalizer.mutable_data_ptr<float>();
  C10_CUDA_CHECK(softmax_entropy_forward_launch(args, current_stream()));
  return {conditional, marginal, cross_entropy, mean_probabilities, log_normalizer};
}

// Gradients that are absent count as 0.
Tensor softmax_entropy_backward_cuda(const OptionalTensor& grad_conditional, const OptionalTensor& grad_marginal,
                                     const OptionalTensor& grad_cross_entropy, const Tensor& logits_in,
                                     const OptionalTensor& labels_in, int64_t ignore_index,
                                     const Tensor& mean_probabilities, const Tensor&) {
  check_softmax_entropy(logits_in, labels_in);
  const DeviceGuard device_guard(logits_in.device());
  if (logits_in.scalar_type() == at::kDouble) {
    return composed_softmax_entropy_backward(grad_conditional.value_or(Tensor()), grad_marginal.value_or(Tensor()),
                                             grad_cross_entropy.value_or(Tensor()), logits_in,
                                             labels_in.value_or(Tensor()), ignore_index);
  }
  Prepared prepared(logits_in, labels_in, ignore_index);
  cuda::SoftmaxEntropyArgs& args = prepared.args;
  const Tensor grad_logits = at::empty(logits_in.sizes(), prepared.logits.options());
  args.mean_probabilities = mean_probabilities.mutable_data_ptr<float>();
  args.grad_conditional = floats_or_null(grad_conditional);
  args.grad_marginal = floats_or_null(grad_marginal);
  args.grad_cross_entropy = floats_or_null(grad_cross_entropy);
  args.grad_logits = grad_logits.mutable_data_ptr();
  C10_CUDA_CHECK(softmax_entropy_backward_launch(args, current_stream()));
  return grad_logits;
}

}  // namespace

FASTGAN_CUDA_OPERATORS(m) {
  m.impl("softmax_entropy_forward", &softmax_entropy_forward_cuda);
  m.impl("softmax_entropy_backward", &softmax_entropy_backward_cuda);
}

}  // namespace fastgan
