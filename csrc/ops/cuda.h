// What the CUDA operators share: torch's device, stream and dtypes in the terms of csrc/cuda. With the host shim
// (-DFASTGAN_CUDA_HOST) operators are compiled for tensors on the CPU, for tests without a GPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "../cuda/runtime.h"

#if !defined(FASTGAN_CUDA_HOST)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fastgan {

constexpr auto kChannelsLast = at::MemoryFormat::ChannelsLast;

inline cuda::DataType cuda_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return cuda::DataType::float32;
    case at::kBFloat16: return cuda::DataType::bfloat16;
    case at::kHalf: return cuda::DataType::float16;
    default: TORCH_INTERNAL_ASSERT(false, "no CUDA kernel for ", dtype);
  }
}

#if defined(FASTGAN_CUDA_HOST)

// TORCH_LIBRARY_IMPL of a file's operators on CUDA; compiled for the host they are in a library of the tests, since
// fastgan has others for the CPU.
#define FASTGAN_CUDA_OPERATORS(m) TORCH_LIBRARY_IMPL(fastgan_cuda_host, CPU, m)

#define C10_CUDA_CHECK(expression) TORCH_CHECK((expression) == cudaSuccess, #expression)

struct DeviceGuard {
  explicit DeviceGuard(at::Device) {}
};

inline int multiprocessors() { return 4; }  // few, so that small tests reach the large tiles

inline cudaStream_t current_stream() { return nullptr; }

#else

#define FASTGAN_CUDA_OPERATORS(m) TORCH_LIBRARY_IMPL(fastgan, CUDA, m)

using DeviceGuard = c10::cuda::CUDAGuard;

// ATen/cuda/CUDAContext.h would give the two below, and ask for the headers of cuSPARSE and cuSOLVER, which small
// CUDA installations lack.
inline int multiprocessors() {
  int count = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, c10::cuda::current_device()));
  return count;
}

inline cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream(); }

#endif

// Scratch memory from PyTorch's allocator: on the current stream, and capturable in a CUDA graph.
inline at::Tensor scratch(const at::Tensor& like, size_t bytes) {
  return at::empty({static_cast<int64_t>(bytes)},
                   like.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous));
}

inline at::Tensor empty_floats(const at::Tensor& like, at::IntArrayRef sizes) {
  return at::empty(sizes, like.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
}

}  // namespace fastgan
