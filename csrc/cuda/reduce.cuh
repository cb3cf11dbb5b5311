// A block's reduction over the threads that hold the same columns, in a fixed order.
#pragma once

#include "device.cuh"

namespace fastgan::cuda {

// Threads are kThreads / columns rows of `columns` (a power of two). Combines every value over the rows in a fixed
// tree; valid in the first row afterwards. Shared memory: kThreads * kCount values, each slot written once and read
// once, so that no barrier is needed between two levels' reads and writes.
template <int kThreads, typename Value, int kCount, typename Combine>
__device__ __forceinline__ void reduce_rows(Value* shared, Value (&values)[kCount], int columns,
                                            const Combine& combine) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int step = kThreads / 2; step >= columns; step /= 2) {
    if (thread >= step && thread < 2 * step) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) shared[i * kThreads + thread] = values[i];
    }
    block_barrier();
    if (thread < step) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = combine(values[i], shared[i * kThreads + thread + step]);
    }
  }
}

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
  __device__ float4 operator()(float4 a, float4 b) const { return float4{a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
};

}  // namespace fastgan::cuda
