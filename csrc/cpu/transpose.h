// Squares of 8 x 8 numbers transposed in registers; for *_kernel.cpp files only (internal linkage, see isa.h).
#pragma once

#include <cstdint>

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

template <typename A, int kCount> struct VectorOf;
template <int kCount> struct VectorOf<float, kCount> {
  typedef float type __attribute__((vector_size(kCount * sizeof(float))));
  typedef int32_t integers __attribute__((vector_size(kCount * sizeof(int32_t))));
};
template <int kCount> struct VectorOf<double, kCount> {
  typedef double type __attribute__((vector_size(kCount * sizeof(double))));
  typedef int64_t integers __attribute__((vector_size(kCount * sizeof(int64_t))));
};
constexpr int kSide = 8;  // of the squares that are transposed
template <typename A> using Side = typename VectorOf<A, kSide>::type;

// Elements 0 to 7 are a's, 8 to 15 are b's.
#if defined(__clang__)
#define FASTGAN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTGAN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (typename VectorOf<A, kSide>::integers{__VA_ARGS__}))
#endif

template <typename A>
inline void transpose(Side<A>* rows) {
  Side<A> pairs[kSide], fours[kSide];
#pragma GCC unroll 4
  for (int i = 0; i < kSide; i += 2) {
    pairs[i] = FASTGAN_SHUFFLE(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = FASTGAN_SHUFFLE(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int i = 0; i < kSide; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = FASTGAN_SHUFFLE(pairs[i + j], pairs[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      fours[i + 2 * j + 1] = FASTGAN_SHUFFLE(pairs[i + j], pairs[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 4
  for (int i = 0; i < kSide / 2; ++i) {
    rows[i] = FASTGAN_SHUFFLE(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    rows[i + 4] = FASTGAN_SHUFFLE(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

#undef FASTGAN_SHUFFLE

// to[column * to_row + row] = from[row * from_row + column], of a square
inline void transpose_square(const float* from, int64_t from_row, float* to, int64_t to_row) {
  Side<float> square[kSide];
#pragma GCC unroll 8
  for (int i = 0; i < kSide; ++i) __builtin_memcpy(square + i, from + i * from_row, sizeof square[i]);
  transpose<float>(square);
#pragma GCC unroll 8
  for (int i = 0; i < kSide; ++i) __builtin_memcpy(to + i * to_row, square + i, sizeof square[i]);
}

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
