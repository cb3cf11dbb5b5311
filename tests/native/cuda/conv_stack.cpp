// csrc/ops/cuda_conv_stack.cpp as operators for tensors on the CPU, on the kernels' host shim: for
// tests/test_cuda_conv_stack_host.py.
#include <torch/library.h>

#include "../../../csrc/ops/conv_stack.h"

TORCH_LIBRARY(fastgan_cuda_host, m) {
  m.def(
      "conv_stack_forward(Tensor input, Tensor[] parameters, Tensor(a!)[] running, int[] layers, float[] numbers, "
      "bool save_for_backward, str process_group='', int processes=1) -> (Tensor, Tensor, Tensor)");
  m.def(
      "conv_stack_backward(Tensor grad_output, Tensor input, Tensor[] parameters, Tensor output, Tensor raw, "
      "Tensor statistics, int[] layers, float[] numbers, int[] output_mask, str process_group='', int processes=1) "
      "-> Tensor[]");
}

TORCH_LIBRARY_IMPL(fastgan_cuda_host, CPU, m) {
  m.impl("conv_stack_forward", &fastgan::conv_stack_forward_cuda);
  m.impl("conv_stack_backward", &fastgan::conv_stack_backward_cuda);
}
