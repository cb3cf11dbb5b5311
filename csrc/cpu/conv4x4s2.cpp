#include "conv4x4s2.h"

#include "conv4x4s2_kernel.h"

namespace fastgan::cpu {

bool conv4x4s2_supported(const Conv4x4s2Shape& s, Conv4x4s2Loop) {
  constexpr int64_t kMaxSide = 256;  // of the small tensor
  return s.dtype == ConvDType::float32 && s.batch > 0 && s.small_height == s.large_height / 2 &&
         s.small_width == s.large_width / 2 && s.small_height >= 2 && s.small_width >= 2 && s.small_height <= kMaxSide &&
         s.small_width <= kMaxSide && s.small_channels > 0 && s.small_channels % 16 == 0 && s.large_channels > 0 &&
         s.large_channels % 16 == 0;
}

size_t conv4x4s2_packed_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop) {
  return static_cast<size_t>(FASTGAN_ISA_CALL(conv4x4s2_packed_bytes, shape, loop));
}

void conv4x4s2_pack(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, void* packed) {
  FASTGAN_ISA_CALL(conv4x4s2_pack, shape, loop, weight, packed);
}

size_t conv4x4s2_workspace_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, int threads) {
  return static_cast<size_t>(FASTGAN_ISA_CALL(conv4x4s2_workspace_bytes, shape, loop, threads));
}

void conv4x4s2_down(const Conv4x4s2Shape& shape, const ConvOperand& large, const void* packed, const ConvEpilogue& small,
                    void* workspace, int threads) {
  FASTGAN_ISA_CALL(conv4x4s2_forward, shape, Conv4x4s2Loop::down, large, packed, small, workspace, threads);
}

void conv4x4s2_up(const Conv4x4s2Shape& shape, const ConvOperand& small, const void* packed, const ConvEpilogue& large,
                  void* workspace, int threads) {
  FASTGAN_ISA_CALL(conv4x4s2_forward, shape, Conv4x4s2Loop::up, small, packed, large, workspace, threads);
}

void conv4x4s2_weight_gradient(const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,
                               float* weight_gradient, void* workspace, int threads) {
  FASTGAN_ISA_CALL(conv4x4s2_weight_gradient, shape, large, small, weight_gradient, workspace, threads);
}

}  // namespace fastgan::cpu
