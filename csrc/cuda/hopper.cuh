// What Hopper (sm_90a) has and others have not: copies of boxes of a tensor into shared memory by the tensor memory accelerator, barriers
// that count their bytes, clusters of blocks that receive one copy together, and warpgroup products. FASTGAN_HOPPER: this build has
// code for it.
//
// Warpgroup products are D[64, N] += A[64, 16] B[16, N], A and B of 16-bit numbers in shared memory (of TF32 the depth is 8), D in the registers of four warps,
// which go on while the tensor cores work. Both operands lie in rows of 128 bytes, eight rows to 1024 aligned bytes, the 16-byte pieces of row r in the order
// piece ^ (r % 8): "128-byte swizzle". A row is either 64 consecutive numbers of the summed dimension (kDepthInner), or one number of it
// for 64 consecutive rows of A or columns of B. PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate".
#pragma once

#include "device.cuh"

#if defined(FASTGAN_HOPPER)
#include <cuda.h>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTGAN_HOPPER_TARGET 1
#endif
// Kernels are compiled for every target of a build; for others than Hopper they are empty.
#if defined(FASTGAN_HOPPER_TARGET) || !defined(__CUDA_ARCH__)
#define FASTGAN_CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
#else
#define FASTGAN_CLUSTER(blocks)
#endif

namespace fastgan::cuda {

constexpr int kSwizzledRowBytes = 128, kSwizzledGroupBytes = 1024;

// ---- copies and barriers -------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After barrier_init, before other blocks or copies use the barriers.
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival, and so many bytes of copies to wait for.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// At the barrier that lies at the same place in block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier), "r"(rank)
      : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier), "r"(parity)
      : "memory");
}

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Boxes of a tensor map, in whose order of dimensions `at` is; what lies outside of the tensor is 0.
__device__ __forceinline__ void copy_box(uint32_t shared, const CUtensorMap& map, const int (&at)[4], uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];"
      :
      : "r"(shared), "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(barrier)
      : "memory");
}
// To the same place in every block of `blocks`, a bit each, and counted at the barrier of each.
__device__ __forceinline__ void copy_box_to_cluster(uint32_t shared, const CUtensorMap& map, const int (&at)[4], uint32_t barrier,
                                                    uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;"
      :
      : "r"(shared), "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(barrier), "h"(blocks)
      : "memory");
}

// ---- warpgroup products --------------------------------------------------------------------------------------------

// Of a matrix whose first row is at `address`. Along the rows (of A) or columns (of B): 8 of them a group where the summed dimension is
// inner; else 64 of them in a row, and the next 64 `block_bytes` further on.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, int block_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{kSwizzledGroupBytes >> 4} << 32 | uint64_t(block_bytes >> 4) << 16 | (address & 0x3ffffu) >> 4;
}

__device__ __forceinline__ void products_begin() {
#if defined(FASTGAN_HOPPER_TARGET)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void products_commit() {
#if defined(FASTGAN_HOPPER_TARGET)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int kPendingGroups>
__device__ __forceinline__ void products_wait() {
#if defined(FASTGAN_HOPPER_TARGET)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPendingGroups) : "memory");
#endif
}

#define FASTGAN_FRAGMENT(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define FASTGAN_FRAGMENTS8(j)                                                                                   \
  FASTGAN_FRAGMENT(j), FASTGAN_FRAGMENT(j + 1), FASTGAN_FRAGMENT(j + 2), FASTGAN_FRAGMENT(j + 3),               \
      FASTGAN_FRAGMENT(j + 4), FASTGAN_FRAGMENT(j + 5), FASTGAN_FRAGMENT(j + 6), FASTGAN_FRAGMENT(j + 7)
#define FASTGAN_REGISTERS32                                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "   \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTGAN_REGISTERS64                                                                                     \
  FASTGAN_REGISTERS32                                                                                           \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTGAN_REGISTERS128 \
  FASTGAN_REGISTERS64       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// c[j] are columns 8 j to 8 j + 7 of D as in mma.m16n8: the layout of Accumulators for a tile of one warp a 16 rows. The first three
// registers after those of D are a, b and whether they are transposed.
#if defined(FASTGAN_HOPPER_TARGET)
#define FASTGAN_MULTIPLY(columns, type, registers, operands, ...)                                           \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" registers "}, " operands ";" \
               : __VA_ARGS__                                                                                \
               : "l"(a), "l"(b), "n"(kDepthInner ? 0 : 1))
#define FASTGAN_MULTIPLY_TF32(columns, registers, operands, ...)                                                \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k8.f32.tf32.tf32 {" registers "}, " operands ";"   \
               : __VA_ARGS__                                                                                    \
               : "l"(a), "l"(b))
#else
#define FASTGAN_MULTIPLY(...)
#define FASTGAN_MULTIPLY_TF32(...)
#endif
#define FASTGAN_DEFINE_MULTIPLY(T, type)                                                                       \
  template <bool kDepthInner>                                                                                  \
  __device__ __forceinline__ void multiply_warpgroup(float (&c)[8][4], uint64_t a, uint64_t b, T) {            \
    FASTGAN_MULTIPLY(64, type, FASTGAN_REGISTERS32, "%32, %33, 1, 1, 1, %34, %34", FASTGAN_FRAGMENTS8(0));     \
  }                                                                                                            \
  template <bool kDepthInner>                                                                                  \
  __device__ __forceinline__ void multiply_warpgroup(float (&c)[16][4], uint64_t a, uint64_t b, T) {           \
    FASTGAN_MULTIPLY(128, type, FASTGAN_REGISTERS64, "%64, %65, 1, 1, 1, %66, %66", FASTGAN_FRAGMENTS8(0),     \
                     FASTGAN_FRAGMENTS8(8));                                                                   \
  }                                                                                                            \
  template <bool kDepthInner>                                                                                  \
  __device__ __forceinline__ void multiply_warpgroup(float (&c)[32][4], uint64_t a, uint64_t b, T) {           \
    FASTGAN_MULTIPLY(256, type, FASTGAN_REGISTERS128, "%128, %129, 1, 1, 1, %130, %130", FASTGAN_FRAGMENTS8(0), \
                     FASTGAN_FRAGMENTS8(8), FASTGAN_FRAGMENTS8(16), FASTGAN_FRAGMENTS8(24));                   \
  }
FASTGAN_DEFINE_MULTIPLY(BFloat16, "bf16")
FASTGAN_DEFINE_MULTIPLY(Half, "f16")

// In TF32, which knows the summed dimension inner alone.
template <bool kDepthInner>
__device__ __forceinline__ void multiply_warpgroup(float (&c)[16][4], uint64_t a, uint64_t b, float) {
  static_assert(kDepthInner);
  FASTGAN_MULTIPLY_TF32(128, FASTGAN_REGISTERS64, "%64, %65, 1, 1, 1", FASTGAN_FRAGMENTS8(0), FASTGAN_FRAGMENTS8(8));
}

#undef FASTGAN_DEFINE_MULTIPLY
#undef FASTGAN_MULTIPLY
#undef FASTGAN_MULTIPLY_TF32
#undef FASTGAN_FRAGMENT
#undef FASTGAN_FRAGMENTS8
#undef FASTGAN_REGISTERS32
#undef FASTGAN_REGISTERS64
#undef FASTGAN_REGISTERS128

}  // namespace fastgan::cuda

#endif
