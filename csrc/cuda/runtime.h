// The few CUDA runtime names that the launch interfaces use: from CUDA itself, or from the host shim
// (-DFASTGAN_CUDA_HOST), which runs the same kernels on the CPU where there is no GPU and no nvcc.
#pragma once

#if defined(FASTGAN_CUDA_HOST)
#include "host/runtime.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace fastgan::cuda {

// Storage type of activations, weights and logits.
enum class DataType : int { float32 = 0, bfloat16, float16 };

inline int size_of(DataType type) { return type == DataType::float32 ? 4 : 2; }

}  // namespace fastgan::cuda
