// Normal numbers from a counter; for *_kernel.cpp files only (internal linkage, see isa.h).
//
// Threefry 2x32 with 13 rounds (Salmon et al. 2011), the least that their tests of randomness do not tell from chance:
// additions, rotations and exclusive or of 32 bits, which the compiler vectorises: 1.6 ns a number with AVX2, where Philox
// 4x32 with 7 rounds took 2.0 (its products stayed scalar).
#pragma once

#include <cstdint>

#include "scalar_math.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int kNormals = 64;  // drawn at a time

// One point of the normal distribution in the plane from uniform bits, by the transform of Box and Muller (1958).
inline void box_muller(uint32_t radius_bits, uint32_t angle_bits, float* x, float* y) {
  // u in (0, 1] by 24 bits. log u as in softmax_entropy_kernel.cpp, for u = 2^n (1 + f).
  const float u = static_cast<float>(static_cast<int32_t>(radius_bits >> 8) + 1) * 0x1p-24f;
  const int32_t bits = static_cast<int32_t>(float_to_bits(u)), n = (bits - 0x3f3504f3) >> 23;
  const float f = bits_to_float(static_cast<uint32_t>(bits) - (static_cast<uint32_t>(n) << 23)) - 1.0f;
  float p = f * 0.089178633f - 0.143502005f;
  p = p * f + 0.148769626f;
  p = p * f - 0.165656346f;
  p = p * f + 0.19965398f;
  p = p * f - 0.250017469f;
  p = p * f + 0.333338581f;
  const float squared = -2.0f * (static_cast<float>(n) * 0.693147181f + (f + f * f * (p * f - 0.5f)));
  const float radius = __builtin_sqrtf(squared > 0.0f ? squared : 0.0f);
  // Half the angle, in [-pi/2, pi/2]: sine and cosine by their series (errors below 4e-6 and 5e-7), then doubled.
  const float half = static_cast<float>(static_cast<int32_t>(angle_bits)) * 7.31459e-10f, square = half * half;
  float sine = square * 2.75573192e-6f - 1.98412698e-4f;
  sine = sine * square + 8.33333333e-3f;
  sine = sine * square - 1.66666667e-1f;
  sine = sine * square * half + half;
  float cosine = square * -2.75573192e-7f + 2.48015873e-5f;
  cosine = cosine * square - 1.38888889e-3f;
  cosine = cosine * square + 4.16666667e-2f;
  cosine = cosine * square - 0.5f;
  cosine = cosine * square + 1.0f;
  *x = radius * (1.0f - 2.0f * sine * sine);
  *y = radius * (2.0f * sine * cosine);
}

template <int rotation>
inline void threefry_round(uint32_t& x0, uint32_t& x1) {
  x0 += x1;
  x1 = (x1 << rotation | x1 >> (32 - rotation)) ^ x0;
}

// normals[64] of chunk number `chunk`: numbers i and i + 32 from the counter (low half of chunk, i + 32 * high half) under
// the key `seed`.
inline void counter_normals(uint64_t seed, uint64_t chunk, float* normals) {
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32), k2 = k0 ^ k1 ^ 0x1BD11BDAu;
  const uint32_t low = static_cast<uint32_t>(chunk), high = static_cast<uint32_t>(chunk >> 32) * 32u;
  // Two loops, as either's operations wait for each other: more turns of a short one are under way at a time.
  uint32_t radius[kNormals / 2], angle[kNormals / 2];
#pragma GCC ivdep
  for (int i = 0; i < kNormals / 2; ++i) {
    uint32_t x0 = low + k0, x1 = high + static_cast<uint32_t>(i) + k1;
    threefry_round<13>(x0, x1), threefry_round<15>(x0, x1), threefry_round<26>(x0, x1), threefry_round<6>(x0, x1);
    x0 += k1, x1 += k2 + 1;
    threefry_round<17>(x0, x1), threefry_round<29>(x0, x1), threefry_round<16>(x0, x1), threefry_round<24>(x0, x1);
    x0 += k2, x1 += k0 + 2;
    threefry_round<13>(x0, x1), threefry_round<15>(x0, x1), threefry_round<26>(x0, x1), threefry_round<6>(x0, x1);
    x0 += k0, x1 += k1 + 3;
    threefry_round<17>(x0, x1);
    radius[i] = x0, angle[i] = x1;
  }
#pragma GCC ivdep
  for (int i = 0; i < kNormals / 2; ++i) box_muller(radius[i], angle[i], normals + i, normals + i + kNormals / 2);
}

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
