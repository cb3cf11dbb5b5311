// What softmax_entropy's CPU and CUDA sides share.
#pragma once

#include <tuple>

#include "tensors.h"

namespace fastgan {

// conditional [], marginal [], cross_entropy [], mean_probabilities [K], log_normalizer [N]
using SoftmaxEntropyForward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

inline const char* softmax_entropy_name(const OptionalTensor& labels) {
  return labels.has_value() ? "softmax_entropy_cross_entropy" : "softmax_entropy";
}

// Every check of shapes, dtypes and devices. Throws with the name of the argument at fault.
void check_softmax_entropy(const Tensor& logits, const OptionalTensor& labels);

// The derivative as differentiable ATen operators; an undefined gradient counts as 0.
Tensor composed_softmax_entropy_backward(const Tensor& grad_conditional, const Tensor& grad_marginal,
                                         const Tensor& grad_cross_entropy, const Tensor& logits,
                                         const Tensor& labels, int64_t ignore_index);

}  // namespace fastgan
