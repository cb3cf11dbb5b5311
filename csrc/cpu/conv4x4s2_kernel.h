// The functions each instruction set's copy of the conv4x4s2 kernels provides; conv4x4s2.cpp chooses among them.
#pragma once

#include "conv4x4s2.h"
#include "isa.h"

// Those of one family of kernels. `loop` of forward is down or up.
#define FASTGAN_CONV4X4S2_FAMILY(name)                                                                                     \
  FASTGAN_PER_ISA(int64_t, name##_packed_bytes, (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop))                         \
  FASTGAN_PER_ISA(void, name##_pack, (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, void* packed)) \
  FASTGAN_PER_ISA(int64_t, name##_workspace_bytes, (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, int threads))         \
  FASTGAN_PER_ISA(void, name##_forward,                                                                                    \
                  (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const ConvOperand& input, const void* packed,          \
                   const ConvEpilogue& output, void* workspace, int threads))                                              \
  FASTGAN_PER_ISA(void, name##_weight_gradient,                                                                            \
                  (const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,                        \
                   const ConvWeightGradient& result, void* workspace, int threads))

namespace fastgan::cpu {

FASTGAN_CONV4X4S2_FAMILY(conv4x4s2)
FASTGAN_CONV4X4S2_FAMILY(conv4x4s2_image)  // 1 to 4 large channels

// bfloat16 tensors, on AVX512-BF16 and AMX; other copies are empty.
FASTGAN_CONV4X4S2_FAMILY(conv4x4s2_bf16)
FASTGAN_CONV4X4S2_FAMILY(conv4x4s2_bf16_filtered)  // with minimal filtering along the rows, on AVX512-BF16 without AMX
FASTGAN_CONV4X4S2_FAMILY(conv4x4s2_bf16_image)

}  // namespace fastgan::cpu

#undef FASTGAN_CONV4X4S2_FAMILY
