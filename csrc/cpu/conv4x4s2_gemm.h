// The register-blocked matrix product all conv4x4s2 loops stand on.
#pragma once

#include "conv4x4s2_common.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int kPanel = 2 * kLanes;  // columns of one call, but for narrow results

// What comes after a product, asked for while it runs: groups of cache lines, a group each time multiply_rows is called, a line
// at each step of its depth. All at once they would wait for one another.
struct Ahead {
  const float* at;
  int64_t line, group;  // floats from a line to the next, and from a group
  int64_t groups;
};
struct NothingAhead {};

inline void prefetch(const Ahead& ahead, int64_t step) { __builtin_prefetch(ahead.at + step * ahead.line, 0, 2); }
inline void prefetch(NothingAhead, int64_t) {}
inline void advance(Ahead& ahead) {
  if (ahead.groups > 1) ahead.at += ahead.group, --ahead.groups;
}
inline void advance(NothingAhead&) {}

// c[r][0, columns) (+)= sum over k of a[r * kARow + k * kADepth] * b[k * kBDepth + [0, columns)], r in [0, kRows),
// columns = kVectors * kLanes. Strides are compile-time constants so that all row addresses share one base register. Where a row's
// elements follow one another, the rows behind these, which the next call reads, are asked for, a line at each step of the depth.
template <int kVectors, int kRows, int kARow, int kADepth, int kBDepth, typename After>
void multiply_rows(const float* a, const float* b, int64_t depth, float* c, int64_t ldc, bool accumulate, const After& after) {
  Vec sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = Vec{};
      __builtin_prefetch(c + r * ldc + v * kLanes, 1);
    }
  [[maybe_unused]] const float* next_rows = a + kRows * kARow;
  for (int64_t k = 0; k < depth; ++k) {
    prefetch(after, k);
    if constexpr (kADepth == 1) __builtin_prefetch(next_rows + k * kLineFloats);
    Vec right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec left = splat(a[r * kARow]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
    a += kADepth;
    b += kBDepth;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* p = c + r * ldc + v * kLanes;
      store(p, accumulate ? load(p) + sum[r][v] : sum[r][v]);
    }
}

// Any number of rows, in groups of nearly equal size: a short last group would wait on the latency of its few sums.
template <int kVectors, int kARow, int kADepth, int kBDepth, typename After>
void multiply(const float* a, const float* b, int64_t depth, float* c, int64_t ldc, int64_t rows, bool accumulate, After& after) {
  const int64_t groups = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t g = 0, r = 0; g < groups; ++g) {
    const int64_t next = rows * (g + 1) / groups;
    const float* x = a + r * kARow;
    float* y = c + r * ldc;
    switch (next - r) {
#define FASTGAN_ROWS(n)                                                                            \
  case n:                                                                                          \
    if constexpr (n <= kMaxRows)                                                                   \
      multiply_rows<kVectors, n, kARow, kADepth, kBDepth>(x, b, depth, y, ldc, accumulate, after); \
    break;
      FASTGAN_ROWS(1) FASTGAN_ROWS(2) FASTGAN_ROWS(3) FASTGAN_ROWS(4) FASTGAN_ROWS(5) FASTGAN_ROWS(6) FASTGAN_ROWS(7)
      FASTGAN_ROWS(8) FASTGAN_ROWS(9) FASTGAN_ROWS(10) FASTGAN_ROWS(11) FASTGAN_ROWS(12) FASTGAN_ROWS(13)
      FASTGAN_ROWS(14)
#undef FASTGAN_ROWS
    }
    advance(after);
    r = next;
  }
}

// A panel of `columns` columns, or what is left of them: a multiple of 16, which is half a panel where vectors are that long.
template <int kARow, int kADepth, int kBDepth, typename After>
void multiply_panel(const float* a, const float* b, int64_t depth, float* c, int64_t ldc, int64_t columns, int64_t rows,
                    bool accumulate, After& after) {
  if constexpr (kPanel > 16)
    if (columns < kPanel) return multiply<1, kARow, kADepth, kBDepth>(a, b, depth, c, ldc, rows, accumulate, after);
  multiply<2, kARow, kADepth, kBDepth>(a, b, depth, c, ldc, rows, accumulate, after);
}

template <int kVectors, int kARow, int kADepth, int kBDepth>
void multiply(const float* a, const float* b, int64_t depth, float* c, int64_t ldc, int64_t rows, bool accumulate) {
  NothingAhead nothing;
  multiply<kVectors, kARow, kADepth, kBDepth>(a, b, depth, c, ldc, rows, accumulate, nothing);
}

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
