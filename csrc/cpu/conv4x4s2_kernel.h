// The functions each instruction set's copy of the conv4x4s2 kernels provides; conv4x4s2.cpp chooses among them.
#pragma once

#include "conv4x4s2.h"
#include "isa.h"

// Those of one family of kernels, declared by `declare(return type, name, arguments)`. `loop` of forward is down or up.
#define FASTGAN_CONV4X4S2_FAMILY(declare, name)                                                                    \
  declare(int64_t, name##_packed_bytes, (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop))                         \
  declare(void, name##_pack, (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, void* packed)) \
  declare(int64_t, name##_workspace_bytes, (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, int threads))         \
  declare(void, name##_forward,                                                                                    \
          (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const ConvOperand& input, const void* packed,          \
           const ConvEpilogue& output, void* workspace, int threads))                                              \
  declare(void, name##_weight_gradient,                                                                            \
          (const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,                        \
           const ConvWeightGradient& result, void* workspace, int threads))

namespace fastgan::cpu {

FASTGAN_CONV4X4S2_FAMILY(FASTGAN_PER_ISA_BF16, conv4x4s2)
FASTGAN_CONV4X4S2_FAMILY(FASTGAN_PER_ISA_BF16, conv4x4s2_image)  // 1 to 4 large channels

// bfloat16 tensors
#if defined(__x86_64__)
#define FASTGAN_DECLARE(ret, name, args) ret name args;
namespace avx512_bf16 {
FASTGAN_CONV4X4S2_FAMILY(FASTGAN_DECLARE, conv4x4s2_bf16)
FASTGAN_CONV4X4S2_FAMILY(FASTGAN_DECLARE, conv4x4s2_bf16_filtered)  // with minimal filtering along the rows
FASTGAN_CONV4X4S2_FAMILY(FASTGAN_DECLARE, conv4x4s2_bf16_image)
}  // namespace avx512_bf16
namespace amx {
FASTGAN_CONV4X4S2_FAMILY(FASTGAN_DECLARE, conv4x4s2_bf16)
FASTGAN_CONV4X4S2_FAMILY(FASTGAN_DECLARE, conv4x4s2_bf16_image)
}  // namespace amx
#undef FASTGAN_DECLARE
#endif

}  // namespace fastgan::cpu

#undef FASTGAN_CONV4X4S2_FAMILY
