// Softmax entropy, marginal entropy and cross-entropy of a batch of logits: CUDA kernels over raw pointers.
//
//   H[p_n] = log s - u / s         with d_nk = l_nk - max_k l_nk, s = sum_k e^d, u = sum_k d e^d
//   H[q]   = -sum_k q_k log q_k    with q = mean_n p_n
//   CE     = mean of log s - d_ny  over the rows that carry a label y
//
// One launch backward and one forward, two where several blocks take part, of which the second adds up their shares;
// each direction reads the logits once up to 1024 classes. All pointers are device pointers; nothing is allocated,
// nothing synchronises.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime.h"

namespace fastgan::cuda {

struct SoftmaxEntropyArgs {
  int64_t rows = 0;        // at least 1
  int64_t classes = 0;     // at least 1
  int64_t row_stride = 0;  // of the logits, in elements; the classes of a row lie side by side
  DataType type = DataType::float32;
  const void* logits = nullptr;          // [rows, classes]
  const int64_t* labels = nullptr;       // [rows]; null: no row carries one
  int64_t ignore_index = -100;           // the label of a row that carries none
  const int64_t* label_count = nullptr;  // [1], rows whose label is not ignore_index; needed with labels
  int multiprocessors = 132;             // of the device
  void* workspace = nullptr;             // softmax_entropy_workspace_bytes(args), which depends on all of the above
  float* mean_probabilities = nullptr;   // [classes], q: out of forward, into backward
  float* log_normalizer = nullptr;       // [rows], log s: out of forward; aligned to 16 bytes
  // Out of forward, in nats. cross_entropy is 0 without labels, NaN where a label is out of range.
  float* conditional = nullptr;
  float* marginal = nullptr;
  float* cross_entropy = nullptr;
  // Into backward, on the device; null counts as 0.
  const float* grad_conditional = nullptr;
  const float* grad_marginal = nullptr;
  const float* grad_cross_entropy = nullptr;
  void* grad_logits = nullptr;  // [rows, classes], dense, out of backward
};

// Forward's scratch; backward needs none.
size_t softmax_entropy_workspace_bytes(const SoftmaxEntropyArgs& args);

cudaError_t softmax_entropy_forward_launch(const SoftmaxEntropyArgs& args, cudaStream_t stream);
cudaError_t softmax_entropy_backward_launch(const SoftmaxEntropyArgs& args, cudaStream_t stream);

}  // namespace fastgan::cuda
