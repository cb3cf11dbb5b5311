// The multiplication at the heart of the convolutions: a block's tile of C += A B^T from shared memory, by the tensor
// cores or, for float32, by ordinary multiply-adds with the accumulators laid out the same way.
//
// A row of a stage holds 64 bytes of the summed dimension (32 16-bit or 16 32-bit numbers) and 16 bytes of padding:
// eight rows 80 bytes apart start in eight different groups of four banks, so ldmatrix meets no conflict.
#pragma once

#include "conv4x4s2.h"
#include "device.cuh"

namespace fastgan::cuda {

// Storage type and arithmetic of a main loop.
struct Bfloat16Math {
  using Type = BFloat16;
  static constexpr bool kTensorCore = true;
};
struct Float16Math {
  using Type = Half;
  static constexpr bool kTensorCore = true;
};
struct Float32Math {  // for tests on the host (conv4x4s2.h)
  using Type = float;
  static constexpr bool kTensorCore = false;
};

constexpr int kStages = 3;
constexpr int kDepthBytes = 64;  // of the summed dimension in a stage
constexpr int kRowBytes = kDepthBytes + 16;
constexpr int kChunksPerRow = kDepthBytes / 16;

template <int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;  // warps in the block
  static constexpr int kThreads = kWarpRows * kWarpColumns * kWarpSize;
  static constexpr int kRowsPerWarp = kRows / kWarpRows, kColumnsPerWarp = kColumns / kWarpColumns;
  static constexpr int kRowTiles = kRowsPerWarp / 16, kColumnTiles = kColumnsPerWarp / 8;  // of one mma, in a warp
};
using LargeTile = Tile<128, 128, 2, 4>;
using SmallTile = Tile<64, 64, 2, 2>;

// Sums of one thread: element e of mma tile (i, j) is in row row(i, e) and column column(j, e) of the block's tile.
template <typename Tile>
struct Accumulators {
  float values[Tile::kRowTiles][Tile::kColumnTiles][4];

  __device__ Accumulators() {
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) values[i][j][e] = 0.0f;
      }
    }
  }

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / kWarpSize; }
  __device__ static int warp_row() { return warp() % Tile::kWarpRows; }
  __device__ static int first_row() { return warp_row() * Tile::kRowsPerWarp; }
  __device__ static int first_column() { return warp() / Tile::kWarpRows * Tile::kColumnsPerWarp; }
  __device__ static int row(int i, int e) { return first_row() + i * 16 + lane() / 4 + e / 2 * 8; }
  __device__ static int column(int j, int e) { return first_column() + j * 8 + lane() % 4 * 2 + e % 2; }
};

// What batch norm of a channel is computed with in activation_backward; arrays that there are not leave what is given.
__device__ __forceinline__ void load_of_channel(const Conv4x4Epilogue& epilogue, int channel, float& scale, float& shift,
                                                float& mean, float& invstd) {
  if (epilogue.scale != nullptr) scale = epilogue.scale[channel];
  if (epilogue.shift != nullptr) shift = epilogue.shift[channel];
  if (epilogue.mean != nullptr) mean = epilogue.mean[channel];
  if (epilogue.invstd != nullptr) invstd = epilogue.invstd[channel];
}

// One mma's depth of A (rows) and B (columns), which lie `row_bytes` apart, on the tensor cores.
template <typename Math, typename Tile>
__device__ __forceinline__ void multiply_step(const char* a, const char* b, int row_bytes, Accumulators<Tile>& sums) {
  const int lane = sums.lane();
  uint32_t b_fragments[Tile::kColumnTiles][2];
#pragma unroll
  for (int j = 0; j < Tile::kColumnTiles; j += 2) {
    uint32_t loaded[4];
    load_matrix_x4(loaded,
                   b + (sums.first_column() + j * 8 + lane % 8 + lane / 16 * 8) * row_bytes + lane / 8 % 2 * 16);
    b_fragments[j][0] = loaded[0];
    b_fragments[j][1] = loaded[1];
    b_fragments[j + 1][0] = loaded[2];
    b_fragments[j + 1][1] = loaded[3];
  }
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
    uint32_t a_fragment[4];
    load_matrix_x4(a_fragment, a + (sums.first_row() + i * 16 + lane % 16) * row_bytes + lane / 16 * 16);
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j) {
      mma_m16n8k16(sums.values[i][j], a_fragment, b_fragments[j], typename Math::Type{});
    }
  }
}

// One stage of A (rows) and B (columns), the summed dimension along their rows.
template <typename Math, typename Tile>
__device__ __forceinline__ void multiply_stage(const char* a, const char* b, Accumulators<Tile>& sums) {
  if constexpr (Math::kTensorCore) {
#pragma unroll
    for (int step = 0; step < kDepthBytes; step += 32) multiply_step<Math, Tile>(a + step, b + step, kRowBytes, sums);
  } else {
#pragma unroll
    for (int step = 0; step < kDepthBytes; step += 16) {
      float4 b_rows[Tile::kColumnTiles][2];
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          b_rows[j][h] = *reinterpret_cast<const float4*>(b + sums.column(j, h) * kRowBytes + step);
        }
      }
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const float4 x = *reinterpret_cast<const float4*>(a + sums.row(i, e) * kRowBytes + step);
#pragma unroll
          for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float4 w = b_rows[j][h];
              float& sum = sums.values[i][j][e + h];
              sum = fmaf(x.w, w.w, fmaf(x.z, w.z, fmaf(x.y, w.y, fmaf(x.x, w.x, sum))));
            }
          }
        }
      }
    }
  }
}

// The weight gradient sums over pixels, and both operands lie in shared memory as [pixel][channel].
// 16 bytes (16-bit types) or 8 words (32-bit types) of padding a row: conflict-free for ldmatrix.trans, and for
// four rows of eight neighbouring words.
template <typename Math>
__host__ __device__ constexpr int pixel_row_bytes(int channels) {
  using T = typename Math::Type;
  return channels * static_cast<int>(sizeof(T)) + (sizeof(T) == 2 ? 16 : 32);
}

template <typename Math>
__host__ __device__ constexpr int pixels_per_stage() {
  return kDepthBytes / static_cast<int>(sizeof(typename Math::Type));
}

template <typename Math, typename Tile>
__device__ __forceinline__ void multiply_pixel_stage(const char* a, const char* b, Accumulators<Tile>& sums) {
  constexpr int kARow = pixel_row_bytes<Math>(Tile::kRows), kBRow = pixel_row_bytes<Math>(Tile::kColumns);
  if constexpr (Math::kTensorCore) {
    const int lane = sums.lane();
#pragma unroll
    for (int step = 0; step < pixels_per_stage<Math>(); step += 16) {
      uint32_t b_fragments[Tile::kColumnTiles][2];
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; j += 2) {
        uint32_t loaded[4];
        load_matrix_x4_transposed(loaded,
                                  b + (step + lane % 16) * kBRow + (sums.first_column() + j * 8 + lane / 16 * 8) * 2);
        b_fragments[j][0] = loaded[0];
        b_fragments[j][1] = loaded[1];
        b_fragments[j + 1][0] = loaded[2];
        b_fragments[j + 1][1] = loaded[3];
      }
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
        uint32_t a_fragment[4];
        load_matrix_x4_transposed(a_fragment, a + (step + lane % 8 + lane / 16 * 8) * kARow +
                                                  (sums.first_row() + i * 16 + lane / 8 % 2 * 8) * 2);
#pragma unroll
        for (int j = 0; j < Tile::kColumnTiles; ++j) {
          mma_m16n8k16(sums.values[i][j], a_fragment, b_fragments[j], typename Math::Type{});
        }
      }
    }
  } else {
#pragma unroll 2
    for (int pixel = 0; pixel < pixels_per_stage<Math>(); ++pixel) {
      const float* a_row = reinterpret_cast<const float*>(a + pixel * kARow);
      const float* b_row = reinterpret_cast<const float*>(b + pixel * kBRow);
      float w[Tile::kColumnTiles][2];
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) w[j][h] = b_row[sums.column(j, h)];
      }
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float x = a_row[sums.row(i, e)];
#pragma unroll
          for (int j = 0; j < Tile::kColumnTiles; ++j) {
            if (e % 2 == 0) {
              sums.values[i][j][e] = fmaf(x, w[j][0], sums.values[i][j][e]);
            } else {
              sums.values[i][j][e] = fmaf(x, w[j][1], sums.values[i][j][e]);
            }
          }
        }
      }
    }
  }
}

// Adds thread_sums[j][h], each thread's sum over its rows of column(j, h), over the rows of the tile, in a fixed order.
// Afterwards column c's sum is column_total(shared, c). `shared`: [Tile::kWarpRows, Tile::kColumns]
template <typename Tile>
__device__ __forceinline__ void sum_columns(float* shared, const float (&thread_sums)[Tile::kColumnTiles][2]) {
  using A = Accumulators<Tile>;
#pragma unroll
  for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = thread_sums[j][h];
#pragma unroll
      for (int mask = 4; mask < kWarpSize; mask *= 2) sum += shuffle_xor(sum, mask);
      if (A::lane() < 4) shared[A::warp_row() * Tile::kColumns + A::column(j, h)] = sum;
    }
  }
  block_barrier();
}

template <typename Tile>
__device__ __forceinline__ float column_total(const float* shared, int column) {
  float total = 0.0f;
#pragma unroll
  for (int warp_row = 0; warp_row < Tile::kWarpRows; ++warp_row) total += shared[warp_row * Tile::kColumns + column];
  return total;
}

}  // namespace fastgan::cuda
