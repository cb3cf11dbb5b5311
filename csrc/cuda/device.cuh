// What the kernels need of the device, each thing once with a PTX body and once with a host body (the host shim).
// The rest of the kernel sources is the same text for nvcc and for the host compiler.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "runtime.h"

#if defined(FASTGAN_CUDA_HOST)
#include "host/device.h"
#else
#include <cuda_runtime.h>
#endif

#if defined(FASTGAN_HOPPER) && CUDART_VERSION < 12050  // has no cudaGetDriverEntryPointByVersion
#undef FASTGAN_HOPPER
#endif

namespace fastgan::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

constexpr int kWarpSize = 32;

#if !defined(FASTGAN_CUDA_HOST)

__device__ __forceinline__ void* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ void block_barrier() { __syncthreads(); }
// The same, and for how many threads `predicate` holds.
__device__ __forceinline__ int block_barrier_count(bool predicate) { return __syncthreads_count(predicate); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// The first thing that every kernel does. On Hopper its blocks take their places while those of the kernel before are still at work (see
// launch); what that kernel and all before it wrote is there after this.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether the current device is a Hopper and this build has code for it (FASTGAN_HOPPER: for sm_90a), which is what then runs.
inline bool runs_hopper_code() {
#if defined(FASTGAN_HOPPER)
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
#else
  return false;
#endif
}

// Launches on the stream and reports the launch's own error; nothing here synchronises or allocates.
template <typename Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   const Args& args) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = runs_hopper_code() ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
  const cudaError_t last = cudaGetLastError();
  return error != cudaSuccess ? error : last;
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float value) { return __float_as_uint(value); }

__device__ __forceinline__ float to_float(Half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

__device__ __forceinline__ void from_float(float value, BFloat16& result) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
}

__device__ __forceinline__ void from_float(float value, Half& result) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
}

// Two numbers rounded and put into one word, the first in its low half.
__device__ __forceinline__ uint32_t pack_pair(float first, float second, BFloat16) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

__device__ __forceinline__ uint32_t pack_pair(float first, float second, Half) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

// To one unit in the last place, without the subroutine that a correctly rounded division calls.
__device__ __forceinline__ float reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// 2^value to two units in the last place; numbers below the normal ones come as 0.
__device__ __forceinline__ float exp2_approximate(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

template <typename Value>
__device__ __forceinline__ Value shuffle_xor(Value value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// 16 bytes to global memory that the caches need not keep.
__device__ __forceinline__ void store_streaming(void* p, uint4 words) { __stcs(static_cast<uint4*>(p), words); }

__device__ __forceinline__ unsigned atomic_increment(unsigned* counter) { return atomicAdd(counter, 1u); }
__device__ __forceinline__ void device_fence() { __threadfence(); }

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, zeros if !valid (nothing is read then).
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

// The same with 8 bytes.
__device__ __forceinline__ void copy_async_half(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 8 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

// The same with 4 bytes.
__device__ __forceinline__ void copy_async_word(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPendingGroups>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPendingGroups) : "memory");
}

// Four 8x8 matrices of 16-bit elements (or 8x4 of 32-bit ones); lane l names row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b on the tensor cores, fragments as the PTX manual lays them out.
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// float32 rounded to TF32: 10 bits of mantissa, to nearest.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// c += a b of numbers in TF32.
__device__ __forceinline__ void mma_m16n8k8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

using host::atomic_increment;
using host::bits_to_float;
using host::block_barrier;
using host::copy_async_commit;
using host::device_fence;
using host::float_to_bits;
using host::launch;
using host::load_matrix_x4;
using host::load_matrix_x4_transposed;
using host::mma_m16n8k8;
using host::shared_memory;
using host::shuffle_xor;
using host::to_tf32;
using host::warp_barrier;

inline void copy_async(void* shared, const void* global, bool valid) { host::copy_async(shared, global, 16, valid); }
inline void copy_async_half(void* shared, const void* global, bool valid) {
  host::copy_async(shared, global, 8, valid);
}
inline void copy_async_word(void* shared, const void* global, bool valid) {
  host::copy_async(shared, global, 4, valid);
}

template <int kPendingGroups>
inline void copy_async_wait() {
  host::copy_async_wait(kPendingGroups);
}

inline void wait_for_previous_kernel() {}
inline bool runs_hopper_code() { return false; }

inline float reciprocal(float value) { return 1.0f / value; }
inline float exp2_approximate(float value) { return std::exp2(value); }
inline void store_streaming(void* p, uint4 words) { *static_cast<uint4*>(p) = words; }
inline float to_float(Half value) { return host::half_to_float(value.bits); }
inline void from_float(float value, BFloat16& result) { result.bits = host::float_to_bfloat16(value); }
inline void from_float(float value, Half& result) { result.bits = host::float_to_half(value); }

template <typename T>
inline uint32_t pack_pair(float first, float second, T) {
  T low, high;
  from_float(first, low);
  from_float(second, high);
  return low.bits | uint32_t{high.bits} << 16;
}

inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  host::mma_m16n8k16<host::bfloat16_to_float>(c, a, b);
}
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  host::mma_m16n8k16<host::half_to_float>(c, a, b);
}

#endif

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(BFloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }
__device__ __forceinline__ void from_float(float value, float& result) { result = value; }

// What pack_pair has put into a word.
template <typename T>
__device__ __forceinline__ void unpack_pair(uint32_t word, float (&values)[2], T) {
  values[0] = to_float(T{static_cast<uint16_t>(word)});
  values[1] = to_float(T{static_cast<uint16_t>(word >> 16)});
}

// Calls f(T{}) for a storage type.
template <typename F>
cudaError_t dispatch_type(DataType type, const F& f) {
  switch (type) {
    case DataType::float32: return f(float{});
    case DataType::bfloat16: return f(BFloat16{});
    case DataType::float16: return f(Half{});
  }
  return cudaErrorInvalidValue;
}

// As many elements of T as 16 bytes hold, in float32.
template <typename T>
struct Vector {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  float values[kSize];
};

union Bytes16 {
  uint4 words;
  float floats[4];
  BFloat16 bfloat16s[8];
  Half halves[8];
  __device__ float* elements(float) { return floats; }
  __device__ BFloat16* elements(BFloat16) { return bfloat16s; }
  __device__ Half* elements(Half) { return halves; }
};

template <typename T>
__device__ __forceinline__ void unpack(Bytes16 bytes, Vector<T>& vector) {
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) vector.values[i] = to_float(bytes.elements(T{})[i]);
}

template <typename T>
__device__ __forceinline__ Bytes16 pack(const Vector<T>& vector) {
  Bytes16 bytes;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) from_float(vector.values[i], bytes.elements(T{})[i]);
  return bytes;
}

// The first `count` elements at p (one 16-byte access if `aligned`, and then count is the whole vector); 0 beyond.
template <typename T>
__device__ __forceinline__ Bytes16 load_bytes(const T* p, int count, bool aligned) {
  Bytes16 bytes;
  if (aligned) {
    bytes.words = *reinterpret_cast<const uint4*>(p);
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) bytes.elements(T{})[i] = i < count ? p[i] : T{};
  }
  return bytes;
}

template <typename T>
__device__ __forceinline__ void store_vector(T* p, int count, bool aligned, const Vector<T>& vector) {
  if (aligned) {
    *reinterpret_cast<uint4*>(p) = pack(vector).words;
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) {
      if (i < count) from_float(vector.values[i], p[i]);
    }
  }
}

// Quotients by a divisor that is fixed for a launch: one multiplication instead of some twenty instructions.
// Exact for numerators below 2^31 (Granlund and Montgomery, 1994).
struct FastDivisor {
  uint32_t divisor = 1;
  uint32_t multiplier = 0;
  uint32_t shift = 0;

  FastDivisor() = default;
  explicit FastDivisor(int64_t value) : divisor(static_cast<uint32_t>(value)) {
    if (divisor == 1) return;
    while ((uint64_t{1} << shift) < divisor) ++shift;
    const uint64_t power = uint64_t{1} << (31 + shift);
    multiplier = static_cast<uint32_t>((power + divisor - 1) / divisor);
    shift -= 1;
  }

  __device__ __forceinline__ int divide(int numerator) const {
    if (divisor == 1) return numerator;
    const uint64_t product = uint64_t{static_cast<uint32_t>(numerator)} * multiplier;
    return static_cast<int>(static_cast<uint32_t>(product >> 32) >> shift);
  }
};

inline int64_t divide_up(int64_t numerator, int64_t denominator) { return (numerator + denominator - 1) / denominator; }

inline bool is_aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace fastgan::cuda
