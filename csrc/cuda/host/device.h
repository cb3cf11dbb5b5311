// Host shim, part 3: host bodies of what device.cuh names, fragment layouts as in the PTX ISA manual
// (sections "Matrix fragments for mma.m16n8k16", "... for mma.m16n8k8" and "ldmatrix").
#pragma once

#include "convert.h"
#include "fibers.h"

namespace fastgan::cuda::host {

// Whether conv4x4s2.cu has its loops for any layer in float32 too, which no GPU runs: float32 shows errors that the
// rounding of 16 bits would hide. Without, it takes the float32 layers that it takes on a GPU before Hopper.
inline bool float32_in_every_loop = true;

template <typename Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, int threads, size_t shared_bytes, cudaStream_t, const Args& args) {
  struct Context {
    void (*kernel)(Args);
    const Args* args;
  } context{kernel, &args};
  run_grid(
      grid, threads, shared_bytes, [](void* c) { static_cast<Context*>(c)->kernel(*static_cast<Context*>(c)->args); },
      &context);
  return cudaSuccess;
}

inline unsigned atomic_increment(unsigned* counter) { return (*counter)++; }
inline void device_fence() {}

template <typename Value>
Value shuffle_xor(Value value, int mask) {
  struct Operand {
    Value value, result;
    int mask;
  } operand{value, Value{}, mask};
  warp_collective(&operand, [](void* const operands[32]) {
    for (int lane = 0; lane < 32; ++lane) {
      Operand& mine = *static_cast<Operand*>(operands[lane]);
      mine.result = static_cast<Operand*>(operands[lane ^ mine.mask])->value;
    }
  });
  return operand.result;
}

inline void warp_barrier() {
  warp_collective(nullptr, [](void* const[32]) {});
}

struct LoadMatrixOperand {
  const void* row;
  uint32_t (*registers)[4];
};

// Register j of lane l: elements (l / 4, 2 (l % 4) + {0, 1}) of matrix j; transposed, elements (2 (l % 4) + {0, 1}, l /
// 4).
template <bool kTransposed>
void load_matrix_combine(void* const operands[32]) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      const void* address = static_cast<LoadMatrixOperand*>(operands[matrix * 8 + row])->row;
      if (reinterpret_cast<uintptr_t>(address) % 16 != 0) fail("ldmatrix: row not aligned to 16 bytes");
      std::memcpy(elements[row], address, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = 2 * (lane % 4);
      const uint32_t low = kTransposed ? elements[j][i] : elements[i][j];
      const uint32_t high = kTransposed ? elements[j + 1][i] : elements[i][j + 1];
      (*static_cast<LoadMatrixOperand*>(operands[lane])->registers)[matrix] = low | high << 16;
    }
  }
}

inline void load_matrix_x4(uint32_t (&registers)[4], const void* row) {
  LoadMatrixOperand operand{row, &registers};
  warp_collective(&operand, load_matrix_combine<false>);
}

inline void load_matrix_x4_transposed(uint32_t (&registers)[4], const void* row) {
  LoadMatrixOperand operand{row, &registers};
  warp_collective(&operand, load_matrix_combine<true>);
}

struct MmaOperand {
  float (*c)[4];
  const uint32_t (*a)[4];
  const uint32_t (*b)[2];
};

// c (16x8) += a (16xkDepth) b (kDepthx8). Element i of lane l of c: row l / 4 + 8 (i / 2), column 2 (l % 4) + i % 2.
// Most of the time of the tests would go to the sanitizers' checks of these loops, which stay within their matrices.
template <int kDepth>
__attribute__((no_sanitize("address"))) __attribute__((no_sanitize("undefined"))) void multiply_add(
    void* const operands[32], const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
  for (int lane = 0; lane < 32; ++lane) {
    float (&c)[4] = *static_cast<MmaOperand*>(operands[lane])->c;
    const int row = lane / 4, column = 2 * (lane % 4);
    for (int k = 0; k < kDepth; ++k) {
      c[0] += a[row][k] * b[k][column], c[1] += a[row][k] * b[k][column + 1];
      c[2] += a[row + 8][k] * b[k][column], c[3] += a[row + 8][k] * b[k][column + 1];
    }
  }
}

template <float (*kToFloat)(uint16_t)>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaOperand operand{&c, &a, &b};
  warp_collective(&operand, [](void* const operands[32]) {
    float a_matrix[16][16], b_matrix[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const MmaOperand& o = *static_cast<MmaOperand*>(operands[lane]);
      const int group = lane / 4, member = lane % 4;
      for (int half = 0; half < 2; ++half) {  // low, then high half of each register
        for (int i = 0; i < 4; ++i) {
          a_matrix[group + 8 * (i % 2)][2 * member + half + 8 * (i / 2)] =
              kToFloat(static_cast<uint16_t>((*o.a)[i] >> (16 * half)));
        }
        for (int i = 0; i < 2; ++i) {
          b_matrix[2 * member + half + 8 * i][group] = kToFloat(static_cast<uint16_t>((*o.b)[i] >> (16 * half)));
        }
      }
    }
    multiply_add(operands, a_matrix, b_matrix);
  });
}

// To nearest, halves away from zero.
inline uint32_t to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return (bits + 0x1000u) & ~0x1fffu;
}

inline void mma_m16n8k8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaOperand operand{&c, &a, &b};
  warp_collective(&operand, [](void* const operands[32]) {
    float a_matrix[16][8], b_matrix[8][8];
    const auto to_float = [](uint32_t bits) {
      if ((bits & 0x1fffu) != 0) fail("mma: an operand is not rounded to TF32");
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      return value;
    };
    for (int lane = 0; lane < 32; ++lane) {
      const MmaOperand& o = *static_cast<MmaOperand*>(operands[lane]);
      const int group = lane / 4, member = lane % 4;
      for (int i = 0; i < 4; ++i) a_matrix[group + 8 * (i % 2)][member + 4 * (i / 2)] = to_float((*o.a)[i]);
      for (int i = 0; i < 2; ++i) b_matrix[member + 4 * i][group] = to_float((*o.b)[i]);
    }
    multiply_add(operands, a_matrix, b_matrix);
  });
}

}  // namespace fastgan::cuda::host
