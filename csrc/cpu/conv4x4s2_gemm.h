// The register-blocked matrix product all conv4x4s2 loops stand on.
#pragma once

#include "conv4x4s2_vec.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int kPanel = 2 * kLanes;  // columns of one call

// c[r][0, kPanel) (+)= sum over k of a[r * kARow + k * kADepth] * b[k * kBDepth + [0, kPanel)], r in [0, kRows).
// Strides are compile-time constants so that all row addresses share one base register.
template <int kRows, int kARow, int kADepth, int kBDepth>
void multiply_rows(const float* a, const float* b, int64_t depth, float* c, int64_t ldc, bool accumulate) {
  Vec sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = sum[r][1] = Vec{};
    __builtin_prefetch(c + r * ldc, 1);
    __builtin_prefetch(c + r * ldc + kLanes, 1);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x = splat(a[r * kARow]);
      sum[r][0] += x * b0;
      sum[r][1] += x * b1;
    }
    a += kADepth;
    b += kBDepth;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    float* p = c + r * ldc;
    if (accumulate) {
      sum[r][0] += load(p);
      sum[r][1] += load(p + kLanes);
    }
    store(p, sum[r][0]);
    store(p + kLanes, sum[r][1]);
  }
}

// Any number of rows, in groups of nearly equal size: a short last group would wait on the latency of its few sums.
template <int kARow, int kADepth, int kBDepth>
void multiply(const float* a, const float* b, int64_t depth, float* c, int64_t ldc, int64_t rows, bool accumulate) {
  const int64_t groups = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t g = 0, r = 0; g < groups; ++g) {
    const int64_t next = rows * (g + 1) / groups;
    const float* x = a + r * kARow;
    float* y = c + r * ldc;
    switch (next - r) {
#define FASTGAN_ROWS(n)                                                                        \
  case n:                                                                                      \
    if constexpr (n <= kMaxRows)                                                               \
      multiply_rows<n, kARow, kADepth, kBDepth>(x, b, depth, y, ldc, accumulate);              \
    break;
      FASTGAN_ROWS(1) FASTGAN_ROWS(2) FASTGAN_ROWS(3) FASTGAN_ROWS(4) FASTGAN_ROWS(5) FASTGAN_ROWS(6) FASTGAN_ROWS(7)
      FASTGAN_ROWS(8) FASTGAN_ROWS(9) FASTGAN_ROWS(10) FASTGAN_ROWS(11) FASTGAN_ROWS(12) FASTGAN_ROWS(13)
      FASTGAN_ROWS(14)
#undef FASTGAN_ROWS
    }
    r = next;
  }
}

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
