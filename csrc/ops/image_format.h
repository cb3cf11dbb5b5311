// Images and weights between the memory formats: what leaves and enters a run of layers.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastgan {

// t.contiguous(format), whose copies on the CPU do not take ATen's loop where cpu::image_format_supported. Copied to
// channels_last, t has a contiguous gradient there.
at::Tensor contiguous_images(const at::Tensor& t, at::MemoryFormat format);

}  // namespace fastgan
