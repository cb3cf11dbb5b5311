// Softmax entropy, marginal entropy and cross-entropy of a batch of logits: CPU kernels over raw pointers.
//
//   H[p_n]  = log s - u / s          with d_nk = l_nk - max_k l_nk, s = sum_k e^d, u = sum_k d e^d
//   H[q]    = -sum_k q_k log q_k     with q = mean_n p_n
//   CE      = mean of log s - d_ny   over the rows that carry a label y
//
// Forward reads the logits once, backward reads them once and writes the gradient. T is the storage type
// (float, double, BFloat16, Half); everything else is Accumulate<T>. Rows may lie apart (row_stride), the
// classes of a row may not.
#pragma once

#include <cstdint>

#include "bn_act.h"
#include "isa.h"

namespace fastgan::cpu {

struct SoftmaxEntropyShape {
  int64_t rows;        // at least 1
  int64_t classes;     // at least 1
  int64_t row_stride;  // of the logits, in elements
};

struct SoftmaxEntropyLabels {
  const int64_t* labels;  // [rows] in [0, classes) or ignore_index; nullptr: no row carries one
  int64_t ignore_index;
  int64_t count;          // rows whose label is not ignore_index
};

// Counts the labels that are not ignore_index and checks that they lie in [0, classes).
// Returns the first row that breaks this, or -1.
int64_t check_labels(const int64_t* labels, int64_t rows, int64_t classes, int64_t ignore_index, int64_t* count);

// Scratch for both directions, in elements of Accumulate<T>.
int64_t softmax_entropy_workspace_size(int64_t rows, int64_t classes);

template <typename T>
struct SoftmaxEntropyKernels {
  using A = Accumulate<T>;

  struct Values {
    A conditional, marginal, cross_entropy;  // nats; cross_entropy is 0 where no row carries a label
  };

  // mean_probabilities[k] = q_k; log_normalizer[n] = log s of row n.
  Values (*forward)(const SoftmaxEntropyShape& shape, const T* logits, const SoftmaxEntropyLabels& labels,
                    A* mean_probabilities, A* log_normalizer, A* workspace);

  // grad_logits [rows, classes], dense, from the gradients of the three values.
  void (*backward)(const SoftmaxEntropyShape& shape, const T* logits, const SoftmaxEntropyLabels& labels,
                   const A* mean_probabilities, const A* log_normalizer, const Values& grad, T* grad_logits,
                   A* workspace);
};

FASTGAN_PER_ISA(template <typename T> SoftmaxEntropyKernels<T>, softmax_entropy_kernels, ())

// The kernels for active_isa().
template <typename T>
const SoftmaxEntropyKernels<T>& softmax_entropy_kernels() {
  static const SoftmaxEntropyKernels<T> kernels = FASTGAN_ISA_CALL(softmax_entropy_kernels<T>);
  return kernels;
}

}  // namespace fastgan::cpu
