// Float vectors of the instruction set this file is compiled for, in the compilers' common vector extension.
// For *_kernel.cpp files only, inside no namespace; everything lands in fastgan::cpu::FASTGAN_ISA.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#pragma GCC diagnostic push
#if !defined(__clang__)
// GCC 12 takes the undefined lanes of its own intrinsics for a mistake of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "../activation.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kMaxRows = 14;  // 28 accumulators, 2 vectors of the right operand, 1 broadcast: 31 of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kMaxRows = 6;  // 12 accumulators of 16 registers
#else
constexpr int kLanes = 4;
constexpr int kMaxRows = 6;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UnsignedVec __attribute__((vector_size(4 * kLanes)));

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

// Stores whole cache lines to an aligned address without reading them into the cache first. stream_fence() comes before
// another thread reads them.
inline void stream(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#elif defined(__x86_64__)
  _mm_stream_ps(p, v);
#else
  store(p, v);
#endif
}
inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

struct bfloat16 {
  uint16_t bits;
};
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

inline Vec load(const bfloat16* p) {
  HalfVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return (Vec)(__builtin_convertvector(v, IntVec) << 16);
}
inline void store(bfloat16* p, Vec v) {  // rounds to nearest even
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh(v);
#else
  const UnsignedVec bits = (UnsignedVec)v, up = bits + 0x7fff + (bits >> 16 & 1);
  const HalfVec rounded = __builtin_convertvector((v == v ? up : bits | 0x400000) >> 16, HalfVec);  // NaN stays NaN
#endif
  __builtin_memcpy(p, &rounded, sizeof rounded);
}
inline float to_float(bfloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(float x) { return x; }
inline Vec splat(float x) { return x - Vec{}; }  // x + 0 would be an addition: it turns -0 into 0
inline Vec vmin(Vec a, Vec b) { return a < b ? a : b; }
inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }

// e^x to about 1 ulp for x in [-87, 88.3], clamped beyond, NaN of NaN; Cody-Waite reduction, polynomial of degree 6.
inline Vec vexp(Vec x) {
  x = vmin(splat(88.3f), vmax(splat(-87.0f), x));  // of a comparison with NaN the second operand
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const Vec shifted = x * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IntVec exponent = __builtin_convertvector(n, IntVec) + 127;
  return p * (Vec)(exponent << 23);
}

// 0 where e^-x is infinite in float32, as a loss that takes the logarithm may look for.
inline Vec vsigmoid(Vec x) { return x < -88.72f ? Vec{} : 1.0f / (1.0f + vexp(-x)); }

// Near 0 a polynomial, fitted to the relative error (5e-9); elsewhere what is left to 1, whose rounding counts by its size alone.
inline Vec vtanh(Vec x) {
  const Vec square = x * x, magnitude = vmax(x, -x);
  Vec p = square * -0.00564831356f + 0.0205898238f;
  p = p * square - 0.0537251258f;
  p = p * square + 0.133312744f;
  p = p * square - 0.333332761f;
  const Vec near = x + x * square * p;
  const Vec far = 1.0f - 2.0f / (vexp(vmin(magnitude, splat(20.0f)) * 2.0f) + 1.0f);
  return square >= 0.4f ? (x < 0.0f ? -far : far) : near;  // NaN stays NaN
}

inline Vec activate(Vec z, Activation activation, float slope) {
  switch (activation) {
    case Activation::relu: return z < 0.0f ? Vec{} : z;
    case Activation::leaky_relu: return z > 0.0f ? z : z * slope;
    case Activation::tanh: return vtanh(z);
    case Activation::sigmoid: return vsigmoid(z);
    default: return z;
  }
}

template <Activation kActivation>
struct ActivationTag {
  static constexpr Activation value = kActivation;
};

// Calls f with the ActivationTag of `activation`: loops inside f then hold no switch, which took longer than their sums.
template <typename F>
inline void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::relu: return f(ActivationTag<Activation::relu>());
    case Activation::leaky_relu: return f(ActivationTag<Activation::leaky_relu>());
    case Activation::tanh: return f(ActivationTag<Activation::tanh>());
    case Activation::sigmoid: return f(ActivationTag<Activation::sigmoid>());
    default: return f(ActivationTag<Activation::identity>());
  }
}

// gradient * activation'(z)
inline Vec activate_backward(Vec gradient, Vec z, Activation activation, float slope) {
  switch (activation) {
    case Activation::relu: return z <= 0.0f ? Vec{} : gradient;  // as in PyTorch, also for NaN
    case Activation::leaky_relu: return z > 0.0f ? gradient : gradient * slope;
    case Activation::tanh: {
      const Vec a = vtanh(z);
      return gradient * (1.0f - a * a);
    }
    case Activation::sigmoid: {
      const Vec a = vsigmoid(z);
      return gradient * (a * (1.0f - a));
    }
    default: return gradient;
  }
}

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
