// Reading and writing the storage types; for *_kernel.cpp files only (internal linkage, see isa.h).
#pragma once

#include "bn_act.h"
#include "scalar_math.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

template <typename T> struct Load;
template <> struct Load<float> { static float from(float v) { return v; } static float to(float v) { return v; } };
template <> struct Load<double> { static double from(double v) { return v; } static double to(double v) { return v; } };
template <> struct Load<BFloat16> {
  static float from(BFloat16 v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }
  static BFloat16 to(float v) { return {float_to_bfloat16_bits(v)}; }
};
template <> struct Load<Half> {
  static float from(Half v) { return half_bits_to_float(v.bits); }
  static Half to(float v) { return {float_to_half_bits(v)}; }
};

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
