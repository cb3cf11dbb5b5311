// What Adam's operators on the CPU and on CUDA share.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/variable.h>

#include <initializer_list>

namespace fastgan {

// Whether the elements stand in memory in the same order; the stride of a single element is not used.
inline bool same_order(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
  }
  return true;
}

// So that a backward pass that has saved one of them finds out.
inline void count_as_written(std::initializer_list<at::TensorList> lists) {
  for (const at::TensorList& list : lists) {
    for (const at::Tensor& tensor : list) {
      if (!tensor.is_inference()) torch::autograd::impl::bump_version(tensor);
    }
  }
}

}  // namespace fastgan
