// Products of bfloat16 tiles with float sums: AMX, or AVX512-BF16 over the same layouts.
//
// A left tile is [16 rows][32 depth]; a right tile is [16 depth pairs][16 columns][2]; both are kTile elements, 1 KiB,
// contiguous. A ProductBlock is 2 x 2 such products, so that four loads feed four multiplications.
#pragma once

#include "conv4x4s2_vec.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t kTile = 512;       // elements
constexpr int64_t kTileRows = 16;    // rows of a left tile, columns of a right one
constexpr int64_t kTileDepth = 32;
constexpr int64_t kTileColumns = 2 * kTileRows;  // of a block's sums

// Two tiles side by side and the way to the next two along the depth, in elements.
struct TileRun {
  const bfloat16* tiles;
  int64_t second, step;
};

#if defined(__AMX_BF16__)

class ProductBlock {
 public:
  // Tiles 0 to 3 are the sums, 4 and 5 the left operand, 6 and 7 the right one.
  ProductBlock() {
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;  // palette
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = 64;  // bytes a row
      config[48 + t] = kTileRows;
    }
    _tile_loadconfig(config);
  }
  ~ProductBlock() { _tile_release(); }
  ProductBlock(const ProductBlock&) = delete;
  ProductBlock& operator=(const ProductBlock&) = delete;

  // sums: two left tiles' rows, `second` floats apart, of kTileColumns each, rows `row` floats apart.
  void begin(const float* sums, int64_t second, int64_t row, bool accumulate) {
    __asm__ volatile("" ::: "memory");  // GCC 12 does not know that the tile loads read memory
    if (accumulate) {
      _tile_loadd(0, sums, row * 4);
      _tile_loadd(1, sums + kTileRows, row * 4);
      _tile_loadd(2, sums + second, row * 4);
      _tile_loadd(3, sums + second + kTileRows, row * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
  }

  // Sums += products of `count` steps. Without two_left the second left tile is taken for zero.
  template <bool two_left>
  void add(TileRun left, TileRun right, int64_t count) {
    for (int64_t k = 0; k < count; ++k, left.tiles += left.step, right.tiles += right.step) {
      _tile_loadd(6, right.tiles, 64);
      _tile_loadd(4, left.tiles, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, right.tiles + right.second, 64);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (two_left) {
        _tile_loadd(5, left.tiles + left.second, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }

  template <bool two_left>
  void end(float* sums, int64_t second, int64_t row) {
    _tile_stored(0, sums, row * 4);
    _tile_stored(1, sums + kTileRows, row * 4);
    if constexpr (two_left) {
      _tile_stored(2, sums + second, row * 4);
      _tile_stored(3, sums + second + kTileRows, row * 4);
    }
    __asm__ volatile("" ::: "memory");
  }
};

#else

class ProductBlock {
 public:
  void begin(const float* sums, int64_t second, int64_t row, bool accumulate) {
    for (int64_t tile = 0; tile < 2; ++tile)
      for (int64_t r = 0; r < kTileRows; ++r)
        for (int64_t c = 0; c < kTileColumns; c += kLanes)
          store(sums_[tile * kTileRows + r] + c, accumulate ? load(sums + tile * second + r * row + c) : Vec{});
  }

  template <bool two_left>
  void add(TileRun left, TileRun right, int64_t count) {
    for (int64_t tile = 0; tile < (two_left ? 2 : 1); ++tile)
      for (int64_t r = 0; r < kTileRows; r += kRows)
        add_rows(left.tiles + tile * left.second + r * kTileDepth, left.step, right, count, tile * kTileRows + r);
  }

  template <bool two_left>
  void end(float* sums, int64_t second, int64_t row) const {
    for (int64_t tile = 0; tile < (two_left ? 2 : 1); ++tile)
      for (int64_t r = 0; r < kTileRows; ++r)
        for (int64_t c = 0; c < kTileColumns; c += kLanes)
          store(sums + tile * second + r * row + c, load(sums_[tile * kTileRows + r] + c));
  }

 private:
  static constexpr int kRows = 8;  // with two vectors of columns: 16 sums in registers

  void add_rows(const bfloat16* left, int64_t step, TileRun right, int64_t count, int64_t first) {
    __m512 sum[kRows][2];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 2; ++v) sum[r][v] = load(sums_[first + r] + v * kLanes);
    for (int64_t k = 0; k < count; ++k, left += step, right.tiles += right.step)
      for (int64_t pair = 0; pair < kTileDepth / 2; ++pair) {
        __m512bh column[2];
        for (int v = 0; v < 2; ++v)
          __builtin_memcpy(&column[v], right.tiles + v * right.second + pair * kTileRows * 2, sizeof column[v]);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          int32_t both;
          __builtin_memcpy(&both, left + r * kTileDepth + 2 * pair, sizeof both);
          const __m512bh row = (__m512bh)_mm512_set1_epi32(both);
          for (int v = 0; v < 2; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], row, column[v]);
        }
      }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 2; ++v) store(sums_[first + r] + v * kLanes, sum[r][v]);
  }

  alignas(64) float sums_[2 * kTileRows][kTileColumns];
};

#endif

// 16 x 16 lanes of 32 bits
inline void transpose_lanes(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  // u[4 q + j]: in each 128-bit part p, lane 4 p + j of rows 4 q to 4 q + 3
  __m512i u[16];
#pragma GCC unroll 4
  for (int q = 0; q < 16; q += 4) {
    u[q] = _mm512_unpacklo_epi64(t[q], t[q + 2]);
    u[q + 1] = _mm512_unpackhi_epi64(t[q], t[q + 2]);
    u[q + 2] = _mm512_unpacklo_epi64(t[q + 1], t[q + 3]);
    u[q + 3] = _mm512_unpackhi_epi64(t[q + 1], t[q + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x44), b = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x44), d = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xee);
    v[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    v[4 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    v[8 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    v[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
