// What softmax_entropy's CPU and CUDA sides share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fastgan {

// conditional [], marginal [], cross_entropy [], mean_probabilities [K], log_normalizer [N]
using SoftmaxEntropyForward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Every check of shapes, dtypes and devices. Throws with the name of the argument at fault.
void check_softmax_entropy(const at::Tensor& logits, const std::optional<at::Tensor>& labels);

// The derivative as differentiable ATen operators; an undefined gradient counts as 0.
at::Tensor composed_softmax_entropy_backward(const at::Tensor& grad_conditional, const at::Tensor& grad_marginal,
                                             const at::Tensor& grad_cross_entropy, const at::Tensor& logits,
                                             const at::Tensor& labels, int64_t ignore_index);

}  // namespace fastgan
