// Tensors in the terms of csrc/cpu: storage types, pointers and shapes.
#pragma once

#include <ATen/core/Tensor.h>

#include "../cpu/bn_act.h"
#include "conv_bn_act.h"

namespace fastgan {

// Calls f(T()) with the kernels' storage type of dtype.
template <typename F>
auto with_kernel_type(const char* op, at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kDouble: return f(double());
    case at::kBFloat16: return f(cpu::BFloat16());
    case at::kHalf: return f(cpu::Half());
    default: TORCH_CHECK_NOT_IMPLEMENTED(dtype == at::kFloat, op, ": not implemented for dtype ", dtype); return f(float());
  }
}

inline at::ScalarType accumulate_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

template <typename T> const T* data(const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); }
template <typename T> T* mutable_data(const Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); }
template <typename T> const T* data_or_null(const Tensor& tensor) { return tensor.defined() ? data<T>(tensor) : nullptr; }

// Contiguous and in `dtype`; undefined where array is.
inline Tensor as_accumulate(const OptionalTensor& array, at::ScalarType dtype) {
  return defined(array) ? array->to(dtype).contiguous() : Tensor();
}

inline cpu::BnActShape kernel_shape(const Tensor& tensor) {  // [N, C], [N, C, L] or [N, C, H, W], dense
  int64_t inner = 1;
  for (int64_t dim = 2; dim < tensor.dim(); ++dim) inner *= tensor.size(dim);
  if (dense_format(tensor) == at::MemoryFormat::Contiguous) return {tensor.size(0), tensor.size(1), inner};
  return {tensor.size(0) * inner, tensor.size(1), 1};
}

}  // namespace fastgan
