// Tensors in the terms of csrc/cuda/conv4x4s2.h, for the operators that run its main loops.
#pragma once

#include <ATen/core/Tensor.h>

#include "../cuda/conv4x4s2.h"
#include "cuda.h"

namespace fastgan {

// Weights and their gradients keep their memory format: the kernels read and write both.
inline at::MemoryFormat weight_format(const at::Tensor& weight) {
  const bool channels_last = !weight.is_contiguous() && weight.is_contiguous(at::MemoryFormat::ChannelsLast);
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

inline cuda::Conv4x4WeightLayout weight_layout(at::MemoryFormat format) {
  return format == at::MemoryFormat::ChannelsLast ? cuda::Conv4x4WeightLayout::channels_last
                                                  : cuda::Conv4x4WeightLayout::contiguous;
}

}  // namespace fastgan
