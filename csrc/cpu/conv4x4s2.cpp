#include "conv4x4s2.h"

#include "conv4x4s2_kernel.h"

namespace fastgan::cpu {
namespace {

constexpr int64_t kMaxSide = 256;          // of the small tensor
constexpr int64_t kMaxImageChannels = 4;

bool is_image(const Conv4x4s2Shape& shape) { return shape.large_channels <= kMaxImageChannels; }

// Tiles of down and up take 16 images: with fewer, much of them would be empty.
constexpr int64_t kMinBfloat16Batch = 16;

bool supports_dtype(const Conv4x4s2Shape& s) {
  return s.dtype != ConvDType::bfloat16 || (active_isa() >= Isa::avx512_bf16 && (is_image(s) || s.batch >= kMinBfloat16Batch));
}

bool is_bfloat16(const Conv4x4s2Shape& shape) { return shape.dtype == ConvDType::bfloat16; }

// Whether the products of bfloat16 are filtered: on AMX they take less time than the transforms would.
bool is_filtered() { return active_isa() == Isa::avx512_bf16; }

// Calls one of the families of kernels.
#define FASTGAN_FLOAT_CALL(shape, name, ...)                                  \
  (is_image(shape) ? FASTGAN_ISA_CALL(conv4x4s2_image_##name, __VA_ARGS__)    \
                   : FASTGAN_ISA_CALL(conv4x4s2_##name, __VA_ARGS__))
#if defined(__x86_64__)
#define FASTGAN_BFLOAT16_CALL(name, ...) \
  (active_isa() == Isa::amx ? amx::name(__VA_ARGS__) : avx512_bf16::name(__VA_ARGS__))
#define FASTGAN_CONV4X4S2_CALL(shape, name, ...)                                              \
  (!is_bfloat16(shape) ? FASTGAN_FLOAT_CALL(shape, name, __VA_ARGS__)                         \
   : is_image(shape)   ? FASTGAN_BFLOAT16_CALL(conv4x4s2_bf16_image_##name, __VA_ARGS__)      \
   : is_filtered()     ? avx512_bf16::conv4x4s2_bf16_filtered_##name(__VA_ARGS__)             \
                       : FASTGAN_BFLOAT16_CALL(conv4x4s2_bf16_##name, __VA_ARGS__))
#else
#define FASTGAN_CONV4X4S2_CALL FASTGAN_FLOAT_CALL
#endif

}  // namespace

bool conv4x4s2_supported(const Conv4x4s2Shape& s) {
  return supports_dtype(s) && s.batch > 0 && s.small_height == s.large_height / 2 && s.small_width == s.large_width / 2 &&
         s.small_height >= 2 && s.small_width >= 2 && s.small_height <= kMaxSide && s.small_width <= kMaxSide &&
         s.small_channels > 0 && s.small_channels % 16 == 0 && s.large_channels > 0 &&
         (is_image(s) || s.large_channels % 16 == 0);
}

bool conv4x4s2_takes_channels_last(const Conv4x4s2Shape& s) { return !is_image(s) && !is_bfloat16(s); }

bool conv4x4s2_rounds_sums(const Conv4x4s2Shape& shape) { return is_bfloat16(shape) && !is_image(shape) && is_filtered(); }

size_t conv4x4s2_packed_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop) {
  return static_cast<size_t>(FASTGAN_CONV4X4S2_CALL(shape, packed_bytes, shape, loop));
}

void conv4x4s2_pack(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, void* packed) {
  FASTGAN_CONV4X4S2_CALL(shape, pack, shape, loop, weight, packed);
}

size_t conv4x4s2_workspace_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, int threads) {
  return static_cast<size_t>(FASTGAN_CONV4X4S2_CALL(shape, workspace_bytes, shape, loop, threads));
}

void conv4x4s2_down(const Conv4x4s2Shape& shape, const ConvOperand& large, const void* packed, const ConvEpilogue& small,
                    void* workspace, int threads) {
  FASTGAN_CONV4X4S2_CALL(shape, forward, shape, Conv4x4s2Loop::down, large, packed, small, workspace, threads);
}

void conv4x4s2_up(const Conv4x4s2Shape& shape, const ConvOperand& small, const void* packed, const ConvEpilogue& large,
                  void* workspace, int threads) {
  FASTGAN_CONV4X4S2_CALL(shape, forward, shape, Conv4x4s2Loop::up, small, packed, large, workspace, threads);
}

void conv4x4s2_weight_gradient(const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,
                               const ConvWeightGradient& result, void* workspace, int threads) {
  FASTGAN_CONV4X4S2_CALL(shape, weight_gradient, shape, large, small, result, workspace, threads);
}

}  // namespace fastgan::cpu
