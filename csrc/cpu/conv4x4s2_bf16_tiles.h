// Products of bfloat16 tiles with float sums: AMX, or AVX512-BF16 over the same layouts.
//
// A left tile is [16 rows][32 depth]; a right tile is [16 depth pairs][16 columns][2]; both are kTile elements, 1 KiB,
// contiguous, but where the left one is part of a matrix. A ProductBlock is 2 x 2 such products, so that four loads feed four multiplications.
#pragma once

#include "conv4x4s2_common.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t kTile = 512;       // elements
constexpr int64_t kTileRows = 16;    // rows of a left tile, columns of a right one
constexpr int64_t kTileDepth = 32;
constexpr int64_t kTileColumns = 2 * kTileRows;  // of a block's sums
constexpr int64_t kChannels = 32;    // a line of channels: the depth of a tile, and the columns of a block

// Two tiles side by side and the way to the next two along the depth, in elements. Left tiles may lie in a matrix: `row`
// is the way between their rows.
struct TileRun {
  const bfloat16* tiles;
  int64_t second, step;
  int64_t row = kTileDepth;
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
      _tile_loadd(4, left.tiles, left.row * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, right.tiles + right.second, 64);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (two_left) {
        _tile_loadd(5, left.tiles + left.second, left.row * 2);
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

constexpr int kSumRows = 8;  // with two vectors of columns: 16 sums in registers

// Sums += a pair of elements of each row, `row` elements apart, times the same of the columns.
template <int kRows, int kVectors>
inline __attribute__((always_inline)) void add_pair(__m512 (&sum)[kRows][kVectors], const bfloat16* left, int64_t row,
                                                    const __m512bh (&right)[kVectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    int32_t both;
    __builtin_memcpy(&both, left + r * row, sizeof both);
    const __m512bh element = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], element, right[v]);
  }
}

// Sums += rows of a left tile, `row` elements apart, times two right tiles, `second` apart.
inline __attribute__((always_inline)) void add_tile(__m512 (&sum)[kSumRows][2], const bfloat16* left, int64_t row,
                                                    const bfloat16* right, int64_t second) {
  for (int64_t pair = 0; pair < kTileDepth / 2; ++pair) {
    __m512bh column[2];
    for (int v = 0; v < 2; ++v) __builtin_memcpy(&column[v], right + v * second + pair * kTileDepth, sizeof column[v]);
    add_pair(sum, left + 2 * pair, row, column);
  }
}

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
      for (int64_t r = 0; r < kTileRows; r += kSumRows)
        add_rows(left.tiles + tile * left.second + r * left.row, left, right, count, tile * kTileRows + r);
  }

  template <bool two_left>
  void end(float* sums, int64_t second, int64_t row) const {
    for (int64_t tile = 0; tile < (two_left ? 2 : 1); ++tile)
      for (int64_t r = 0; r < kTileRows; ++r)
        for (int64_t c = 0; c < kTileColumns; c += kLanes)
          store(sums + tile * second + r * row + c, load(sums_[tile * kTileRows + r] + c));
  }

 private:
  void add_rows(const bfloat16* rows, const TileRun& left, TileRun right, int64_t count, int64_t first) {
    __m512 sum[kSumRows][2];
#pragma GCC unroll 8
    for (int r = 0; r < kSumRows; ++r)
      for (int v = 0; v < 2; ++v) sum[r][v] = load(sums_[first + r] + v * kLanes);
    for (int64_t k = 0; k < count; ++k, rows += left.step, right.tiles += right.step)
      add_tile(sum, rows, left.row, right.tiles, right.second);
#pragma GCC unroll 8
    for (int r = 0; r < kSumRows; ++r)
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

// Right tiles [16 pairs][16][2] -> left tiles [16][32], in place
inline void transpose_tiles(bfloat16* tiles, int64_t count) {
  for (int64_t i = 0; i < count; ++i, tiles += kTile) {
    __m512i lanes[16];
    for (int r = 0; r < 16; ++r) lanes[r] = _mm512_load_si512(tiles + r * kTileDepth);
    transpose_lanes(lanes);
    for (int r = 0; r < 16; ++r) _mm512_store_si512(tiles + r * kTileDepth, lanes[r]);
  }
}

// One row [16][2] of two right tiles: elements of a and b taken in turn.
inline void store_pair(__m512i a, __m512i b, bfloat16* first, bfloat16* second) {
  const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                         36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  _mm512_store_si512(first, _mm512_permutex2var_epi16(a, lower, b));
  _mm512_store_si512(second, _mm512_permutex2var_epi16(a, _mm512_add_epi16(lower, _mm512_set1_epi16(16)), b));
}

// A line of channels, rounded
inline __m512i round_line(Vec low, Vec high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// One pixel's line of channels c0 to c0 + channels (16 or 32) with the operand's prologue; the rest is zero.
inline __m512i read_line(const ConvOperand& operand, int64_t offset, int64_t c0, int64_t channels) {
  if (operand.mode == ConvOperand::Mode::plain) {
    const bfloat16* data = static_cast<const bfloat16*>(operand.data) + offset;
    if (channels == kChannels) return _mm512_loadu_si512(data);
    return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
  }
  float values[kChannels] = {};
  if (channels == kChannels)
    read_operand<bfloat16>(operand, offset, c0, kChannels, values);
  else
    read_operand<bfloat16>(operand, offset, c0, kChannels / 2, values);
  return round_line(load(values), load(values + kLanes));
}

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
