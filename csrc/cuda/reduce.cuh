// A block's reduction over the threads that hold the same columns, in a fixed order.
#pragma once

#include "device.cuh"

namespace fastgan::cuda {

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
  __device__ float4 operator()(float4 a, float4 b) const { return float4{a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
};

__device__ __forceinline__ float4 shuffle_xor(float4 value, int mask) {
  return float4{shuffle_xor(value.x, mask), shuffle_xor(value.y, mask), shuffle_xor(value.z, mask),
                shuffle_xor(value.w, mask)};
}

// Values that reduce_rows keeps in shared memory for each one of a thread's.
__host__ __device__ constexpr int reduce_slots(int threads, int columns) {
  return columns < kWarpSize ? threads / kWarpSize * columns : threads;
}

// Threads are kThreads / columns rows of `columns` (a power of two). Adds every value up over the rows; valid in the
// first row afterwards. A warp's rows meet by shuffles, the warps' sums in shared memory (kCount * reduce_slots
// values), added in order behind a single barrier.
template <int kThreads, typename Value, int kCount>
__device__ __forceinline__ void reduce_rows(Value* shared, Value (&values)[kCount], int columns) {
  const int thread = static_cast<int>(threadIdx.x), slots = reduce_slots(kThreads, columns);
  for (int mask = kWarpSize / 2; mask >= columns; mask /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = Add{}(values[i], shuffle_xor(values[i], mask));
  }
  if (slots == columns) return;
  const int slot = columns < kWarpSize ? thread / kWarpSize * columns + thread % kWarpSize : thread;
  if (columns >= kWarpSize || thread % kWarpSize < columns) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) shared[i * slots + slot] = values[i];
  }
  block_barrier();
  if (thread >= columns) return;
  for (int other = thread + columns; other < slots; other += columns) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = Add{}(values[i], shared[i * slots + other]);
  }
}

}  // namespace fastgan::cuda
