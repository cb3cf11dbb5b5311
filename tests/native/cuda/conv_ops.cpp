// What tests/test_cuda_conv_ops_host.py sets beside the operators' arguments.
#include <torch/library.h>

#include "../../../csrc/cuda/device.cuh"

TORCH_LIBRARY_FRAGMENT(fastgan_cuda_host, m) {
  m.def("set_float32_in_every_loop", [](bool value) { fastgan::cuda::host::float32_in_every_loop = value; });
}
