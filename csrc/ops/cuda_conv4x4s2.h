// Tensors in the terms of csrc/cuda/conv4x4s2.h, for the operators that run its main loops.
#pragma once

#include <ATen/Context.h>

#include "../cuda/conv4x4s2.h"
#include "cuda.h"

namespace fastgan {

inline cuda::Conv4x4Math math_of(const at::Tensor& images) {
  const bool tf32 = images.scalar_type() == at::kFloat && at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
  return tf32 ? cuda::Conv4x4Math::tf32 : cuda::Conv4x4Math::float32;
}

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
