// Images and weights between the memory formats: what leaves and enters a run of layers.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastgan {

// Whether vmap holds many tensors in this one, as many gradients of an output (is_grads_batched). It then has no memory format, and
// only ATen's operators take it.
inline bool is_batched(const at::Tensor& t) {
  return t.key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched}));
}

// t.contiguous(format), whose copies on the CPU do not take ATen's loop where cpu::image_format_supported. Copied to
// channels_last, t has a contiguous gradient there. t itself where it is batched.
at::Tensor contiguous_images(const at::Tensor& t, at::MemoryFormat format);

}  // namespace fastgan
