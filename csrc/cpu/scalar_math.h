// Branch-free scalar functions that the compiler vectorises; for *_kernel.cpp files only (internal linkage, see isa.h).
#pragma once

#include <cstdint>
#include <cstring>

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Round to nearest even; a NaN stays one.
inline uint16_t float_to_bfloat16_bits(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float half_bits_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, exponent = half >> 10 & 31u, fraction = half & 0x3ffu;
  const uint32_t normal = (exponent + 112u) << 23 | fraction << 13;
  const uint32_t special = 0x7f800000u | fraction << 13;
  const uint32_t subnormal = float_to_bits(static_cast<float>(fraction) * 0x1p-24f);
  return bits_to_float(sign | (exponent == 31u ? special : exponent == 0u ? subnormal : normal));
}

// Round to nearest even. Below 2^-14 adding 0.5 puts the half's last bit at the float's last bit.
inline uint16_t float_to_half_bits(float value) {
  const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t result = magnitude > 0x7f800000u ? 0x7e00u : magnitude >= 0x477ff000u ? 0x7c00u : finite;
  return static_cast<uint16_t>(sign | result);
}

// x = n ln 2 + r with |r| <= ln 2 / 2. power = 2^n, minus_one = e^r - 1 (Taylor to r^7: error below 6e-9 of r).
struct ExpParts {
  float power, minus_one;
};

inline ExpParts exp_parts(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer kept in the low bits
  const float shifted = x * 1.44269504f + kMagic;
  const float n = shifted - kMagic;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r;
  return {bits_to_float((float_to_bits(shifted) + 127u) << 23), p};
}

// tanh x = e / (e + 2) with e = exp(2 |x|) - 1: no cancellation near 0, 1 in float32 beyond |x| = 10.
inline float tanh_value(float x) {
  const float magnitude = bits_to_float(float_to_bits(x) & 0x7fffffffu);
  const ExpParts exp = exp_parts(magnitude > 10.0f ? 20.0f : 2.0f * magnitude);
  const float e = exp.power * exp.minus_one + (exp.power - 1.0f);
  return bits_to_float(float_to_bits(e / (e + 2.0f)) | (float_to_bits(x) & 0x80000000u));
}

// 1 / (1 + e^-x), written with e^-|x| so that small values keep their digits; 0 where e^-x is infinite in float32.
inline float sigmoid_value(float x) {
  if (x < -88.72f) return 0.0f;
  const float magnitude = bits_to_float(float_to_bits(x) & 0x7fffffffu);
  const ExpParts exp = exp_parts(magnitude > 87.0f ? -87.0f : -magnitude);
  const float e = exp.power * exp.minus_one + exp.power;
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

inline double tanh_value(double x) { return __builtin_tanh(x); }

inline double sigmoid_value(double x) {
  const double e = __builtin_exp(-__builtin_fabs(x));
  return (x < 0 ? e : 1.0) / (1.0 + e);
}

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
