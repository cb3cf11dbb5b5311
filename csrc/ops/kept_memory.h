// Memory of the large tensors that an operator makes, kept for its next calls.
//
// A training step allocates the same tens or hundreds of MiB again and again. malloc gives blocks of that size back to the
// operating system, which zeroes their pages anew at every step: 3 to 8% of a DCGAN's step, or of sampling.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastgan {

// Uninitialised, dense, on the CPU; in channels_last where `channels_last` says so (sizes are then [N, C, H, W]). From 1 MiB on its
// memory is kept when the last reference to it goes, up to 256 MiB in a process, in large pages where there are any; below, it
// is PyTorch's.
at::Tensor empty_kept(at::IntArrayRef sizes, at::ScalarType dtype, bool channels_last = false);

}  // namespace fastgan
