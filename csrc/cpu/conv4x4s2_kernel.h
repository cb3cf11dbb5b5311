// The functions each instruction set's copy of the conv4x4s2 kernels provides; conv4x4s2.cpp chooses among them.
#pragma once

#include "conv4x4s2.h"
#include "isa.h"

namespace fastgan::cpu {

FASTGAN_PER_ISA(int64_t, conv4x4s2_packed_bytes, (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop))
FASTGAN_PER_ISA(void, conv4x4s2_pack,
                (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, void* packed))
FASTGAN_PER_ISA(int64_t, conv4x4s2_workspace_bytes, (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, int threads))
// loop is down or up
FASTGAN_PER_ISA(void, conv4x4s2_forward,
                (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const ConvOperand& input, const void* packed,
                 const ConvEpilogue& output, void* workspace, int threads))
FASTGAN_PER_ISA(void, conv4x4s2_weight_gradient,
                (const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,
                 const ConvWeightGradient& result, void* workspace, int threads))

// The same for images: 1 to 4 large channels.
FASTGAN_PER_ISA(int64_t, conv4x4s2_image_packed_bytes, (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop))
FASTGAN_PER_ISA(void, conv4x4s2_image_pack,
                (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, void* packed))
FASTGAN_PER_ISA(int64_t, conv4x4s2_image_workspace_bytes, (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, int threads))
FASTGAN_PER_ISA(void, conv4x4s2_image_forward,
                (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const ConvOperand& input, const void* packed,
                 const ConvEpilogue& output, void* workspace, int threads))
FASTGAN_PER_ISA(void, conv4x4s2_image_weight_gradient,
                (const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,
                 const ConvWeightGradient& result, void* workspace, int threads))

// The same for bfloat16 tensors, on AVX512-BF16 and AMX; other copies are empty.
FASTGAN_PER_ISA(int64_t, conv4x4s2_bf16_packed_bytes, (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop))
FASTGAN_PER_ISA(void, conv4x4s2_bf16_pack,
                (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, void* packed))
FASTGAN_PER_ISA(int64_t, conv4x4s2_bf16_workspace_bytes, (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, int threads))
FASTGAN_PER_ISA(void, conv4x4s2_bf16_forward,
                (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const ConvOperand& input, const void* packed,
                 const ConvEpilogue& output, void* workspace, int threads))
FASTGAN_PER_ISA(void, conv4x4s2_bf16_weight_gradient,
                (const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,
                 const ConvWeightGradient& result, void* workspace, int threads))

// The same with minimal filtering along the rows, on AVX512-BF16 without AMX.
FASTGAN_PER_ISA(int64_t, conv4x4s2_bf16_filtered_packed_bytes, (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop))
FASTGAN_PER_ISA(void, conv4x4s2_bf16_filtered_pack,
                (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, void* packed))
FASTGAN_PER_ISA(int64_t, conv4x4s2_bf16_filtered_workspace_bytes, (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, int threads))
FASTGAN_PER_ISA(void, conv4x4s2_bf16_filtered_forward,
                (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const ConvOperand& input, const void* packed,
                 const ConvEpilogue& output, void* workspace, int threads))
FASTGAN_PER_ISA(void, conv4x4s2_bf16_filtered_weight_gradient,
                (const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,
                 const ConvWeightGradient& result, void* workspace, int threads))

FASTGAN_PER_ISA(int64_t, conv4x4s2_bf16_image_packed_bytes, (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop))
FASTGAN_PER_ISA(void, conv4x4s2_bf16_image_pack,
                (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, void* packed))
FASTGAN_PER_ISA(int64_t, conv4x4s2_bf16_image_workspace_bytes, (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, int threads))
FASTGAN_PER_ISA(void, conv4x4s2_bf16_image_forward,
                (const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const ConvOperand& input, const void* packed,
                 const ConvEpilogue& output, void* workspace, int threads))
FASTGAN_PER_ISA(void, conv4x4s2_bf16_image_weight_gradient,
                (const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,
                 const ConvWeightGradient& result, void* workspace, int threads))

}  // namespace fastgan::cpu
