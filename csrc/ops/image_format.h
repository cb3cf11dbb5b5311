// Images of few channels between the memory formats: what leaves and enters a run of layers.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastgan {

// t.contiguous(format), whose copies of images on the CPU (2 to 4 channels of 2 or 4 bytes) do not take ATen's loop.
at::Tensor contiguous_images(const at::Tensor& t, at::MemoryFormat format);

}  // namespace fastgan
