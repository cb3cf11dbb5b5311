// Host shim, part 1: the CUDA runtime's types, as far as the launch interfaces and kernels name them.
//
// Kernel sources compiled with -DFASTGAN_CUDA_HOST run on the CPU: the threads of a block are fibers of one
// operating-system thread, and barriers, shuffles, cp.async, ldmatrix and mma have host bodies that follow
// the PTX manual. This checks the kernels' logic (indices, padding, phases, fragments, barriers, reductions)
// on every test run; it says nothing about speed.
#pragma once

#include <cstdint>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = struct CUstream_st*;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
