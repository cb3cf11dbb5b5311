// Instruction sets: avx512_bf16
//
// The bfloat16 loops of conv4x4s2_bf16_loops.h with three products where direct convolution has four: minimal filtering F(2, 2)
// along the rows (conv4x4s2_tiles.h), on AVX512-BF16 without AMX, where a step is all products.
//
// Two neighbouring outputs of one phase, y0 = d0 g0 + d1 g1 and y1 = d1 g0 + d2 g1, are taken as
//
//   m = d1 (g0 + g1)    y0 = m + (d0 - d1) g0    y1 = m + (d1 - d2) (-g1)
//
// with sums over channels and kernel rows inside, so that y0 and y1 begin where m ended and nothing is transformed back. Of every
// row of inputs two sets of columns are staged: `differences` of neighbours (of one parity in down), and `values`, the d1 of some
// pair.
//
// Differences and sums are taken in float and rounded once. Of tensors and weights that are bfloat16 already, a direct product rounds
// the result alone; here one operand of each of the two products is rounded, too: an error sqrt(3) = 1.7 times as large, where F(3, 2)
// would have 2 and filtering along columns as well sqrt(7). Weights are float, though, and activations are computed: where these are
// rounded either way, it is sqrt(5 / 3) = 1.3 times.
#include "conv4x4s2_bf16_loops.h"
#include "conv4x4s2_common.h"
#include "conv4x4s2_kernel.h"

namespace fastgan::cpu::FASTGAN_ISA {

namespace {

constexpr int64_t kGradientPixels = 32;

// The products of a pair of outputs, by their weights
enum Kind { kSum, kFirst, kSecond, kKinds };  // g0 + g1, g0, -g1

// 32 channels of a pixel, rounded
inline __m512i round_value(const float* d) { return round_line(load(d), load(d + kLanes)); }
inline __m512i round_sum(const float* d, const float* e) { return round_line(load(d) + load(e), load(d + kLanes) + load(e + kLanes)); }
inline __m512i round_difference(const float* d, const float* e) {
  return round_line(load(d) - load(e), load(d + kLanes) - load(e + kLanes));
}

// A line of 32 channels of `columns` pixels, with the operand's prologue, in float; the second half of a half line is zero. `ahead`
// is the way to what will be read next.
inline void read_row(const ConvOperand& operand, int64_t offset, int64_t columns, int64_t all_channels, int64_t c0, int64_t channels,
                     int64_t ahead, float* dst) {
  for (int64_t x = 0; x < columns; ++x, offset += all_channels, dst += kChannels) {
    prefetch_operand<bfloat16>(operand, offset + ahead, channels);
    if (operand.mode == ConvOperand::Mode::plain && channels == kChannels) {
      const bfloat16* data = static_cast<const bfloat16*>(operand.data) + offset;
      store(dst, load(data));
      store(dst + kLanes, load(data + kLanes));
      continue;
    }
    read_operand<bfloat16>(operand, offset, c0, channels, dst);
    if (channels < kChannels) store(dst + kLanes, Vec{});
  }
}

// Where one row of tiles begins on either side. Right tiles are pairs of neighbours.
struct TileRow {
  const bfloat16 *left, *right;
};

// Sums [16][32], rows `ld` floats apart, are `start` (zero where null) + the products of `run` tiles of each of `rows` rows, left ones
// `left_step` elements apart, and are written to `first` and, where it is not null, `second`.
template <typename Row>
inline void multiply_rows(int64_t rows, int64_t run, int64_t left_step, int64_t ld, const float* start, float* first, float* second,
                          const Row& row_of) {
  for (int64_t n = 0; n < kTileRows; n += kSumRows) {
    __m512 sum[kSumRows][2];
#pragma GCC unroll 8
    for (int r = 0; r < kSumRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) sum[r][v] = start != nullptr ? load(start + (n + r) * ld + v * kLanes) : Vec{};
    for (int64_t row = 0; row < rows; ++row) {
      const TileRow tiles = row_of(row);
      const bfloat16 *left = tiles.left + n * kTileDepth, *right = tiles.right;
      for (int64_t tile = 0; tile < run; ++tile, left += left_step, right += 2 * kTile)
        add_tile(sum, left, kTileDepth, right, kTile);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kSumRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        store(first + (n + r) * ld + v * kLanes, sum[r][v]);
        if (second != nullptr) store(second + (n + r) * ld + v * kLanes, sum[r][v]);
      }
  }
}

struct NoProducts {};

// ---- down and up

// Pair p of a row of outputs reads, in up, column b of a phase: differences 2 p + b and 2 p + b + 1, value 2 p + b; in down:
// differences 4 p to 4 p + 3, values 2 p and 2 p + 1. Difference i is that of column i - 1 and the next of its parity.
struct FilteredForward : ForwardPlan {
  using Products = NoProducts;
  int64_t parities;             // kernel columns that go with each of g0 and g1: 2, or 1 in each phase of up
  int64_t differences, values;  // staged columns of a row

  FilteredForward(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop) : FilteredForward(LoopShape(shape, loop)) {}
  explicit FilteredForward(const LoopShape& s)
      : ForwardPlan(s, s.up ? 2 * (s.input_width + 1) : 6 * ceil_div(s.output_width, 2), 8 * kKinds), parities(up ? 1 : 2),
        differences(up ? input_width + 1 : 4 * ceil_div(output_width, 2)), values(columns - differences) {}

  int64_t scratch_floats() const { return (input_width + 4) * kChannels; }
  int64_t run() const { return parities * input_lines; }  // tiles of a kernel row

  void stage(const ConvOperand& operand, int64_t first_image, int64_t images, int64_t from, int64_t end, float* line,
             bfloat16* to) const {
    const int64_t pixel = staged_pixel(), image = input_height * input_width * input_channels;
    for (int64_t v = 0; v < scratch_floats(); v += kLanes) store(line + v, Vec{});  // column x at x + 1: padding stays zero
    for (int64_t y = from; y < end; ++y)
      for (int64_t c = 0; c < input_channels; c += kChannels) {
        bfloat16* row = to + (y - from) * staged_row() + c / kChannels * kTile;
        for (int64_t n = 0; n < images; ++n) {
          read_row(operand, (first_image + n) * image + y * input_width * input_channels + c, input_width, input_channels, c,
                   min64(kChannels, input_channels - c), image, line + kChannels);
          bfloat16* dst = row + n * kChannels;
          const float* d = line;
          for (int64_t i = 0; i < differences; ++i, d += kChannels, dst += pixel)
            _mm512_store_si512(dst, round_difference(d, d + (up ? 1 : 2) * kChannels));
          for (int64_t i = 0; i < values; ++i, dst += pixel)
            _mm512_store_si512(dst, round_value(line + (up ? i + 1 : 4 * (i / 2) + i % 2 + 2) * kChannels));
        }
        for (int64_t n = images; n < kTileRows; ++n)
          for (int64_t i = 0; i < columns; ++i) _mm512_store_si512(row + i * pixel + n * kChannels, _mm512_setzero_si512());
      }
  }

  void multiply_row(NoProducts, const bfloat16* stage, int64_t staged_from, int64_t y, int64_t b, const bfloat16* packed,
                    int64_t outputs, float* result, int64_t result_step) const {
    const int64_t first = max64(0, -y), rows_inside = min64(row_taps, input_height - y) - first;
    const int64_t left_row = staged_row(), right_row = parities * packed_matrix();
    const auto multiply = [&](Kind kind, int64_t column, const float* start, float* to, float* also) {
      const bfloat16* left = stage + (y + first - staged_from) * left_row + column * staged_pixel();
      const bfloat16* right = packed + (kind * row_taps + first) * right_row;
      multiply_rows(rows_inside, run(), kTile, kTileColumns, start, to, also,
                    [&](int64_t r) { return TileRow{left + r * left_row, right + r * right_row}; });
    };
    for (int64_t j = 0; j < outputs; j += 2, result += 2 * result_step) {
      const int64_t difference = up ? j + b : 2 * j;
      float* second = j + 1 < outputs ? result + result_step : nullptr;
      multiply(kSum, differences + (up ? j + b : j), nullptr, result, second);
      multiply(kFirst, difference, result, result, nullptr);
      if (second != nullptr) multiply(kSecond, difference + parities, second, second, nullptr);
    }
  }
};

// Taps s and s + 2 of every row of 4 x 4 added up: in lanes 4 r + s, s < 2
inline Vec add_taps(Vec taps) {
  return taps + (Vec)_mm512_shuffle_epi32((__m512i)taps, static_cast<_MM_PERM_ENUM>(0x4e));  // lanes 2, 3, 0, 1 of each row
}

// packed: [output line][phase][kind][kernel row][parity][input line][2 tiles]
void pack(const FilteredForward& p, const float* weight, bfloat16* packed) {
  pack_forward(p, packed, [&](int64_t input, int64_t output, bfloat16* to) {
    __m512i taps[16], sums[16];
    gather_taps(p, weight, input, output, taps, [](Vec all) { return all; });
    gather_taps(p, weight, input, output, sums, add_taps);
    const __m512i sign = _mm512_set1_epi32(static_cast<int32_t>(0x80008000));
    for (int64_t phase = 0; phase < p.phases(); ++phase)
      for (int kind = 0; kind < kKinds; ++kind)
        for (int64_t q = 0; q < p.row_taps; ++q)
          for (int64_t u = 0; u < p.parities; ++u, to += p.packed_matrix()) {
            // the order in which an output meets its inputs: that of the taps in down, the reverse in up
            const int64_t r = p.up ? 3 - phase / 2 - 2 * q : q, s = p.up ? 1 - phase % 2 : u;
            const __m512i g0 = taps[r * 4 + s + (p.up ? 2 : 0)], g1 = taps[r * 4 + s + (p.up ? 0 : 2)];
            _mm512_storeu_si512(to, kind == kSum ? sums[r * 4 + s] : kind == kFirst ? g0 : _mm512_xor_si512(g1, sign));
          }
  });
}

// ---- weight gradient

// A pair of outputs with gradients z0 and z1 adds d1 (z0 + z1) + (d0 - d1) z0 to the gradient of g0, and
// d1 (z0 + z1) - (d1 - d2) z1 to that of g1; the three sums are kept apart until the end. Staged rows are [lines of channels]
// [kind, parity][pairs][2 tiles] of the large tensor and [lines of channels][kind][pairs][2 tiles] of the small one. The depth of a
// tile is a pair of 32 images or, where that leaves less of it empty, two pairs of 16.
struct FilteredGradient : GradientPlan {
  using Products = NoProducts;
  int64_t pairs, together;  // of outputs: a row, and a tile

  explicit FilteredGradient(const Conv4x4s2Shape& s) : FilteredGradient(s, ceil_div(s.small_width, 2), pairs_a_tile(s)) {}

  // Two rows for each operand, with padding: a column on the left, and up to whole last tiles
  int64_t scratch_row() const { return (4 * run() * together + 3) * kChannels; }
  int64_t scratch_floats() const { return 4 * scratch_row(); }

  void begin(bfloat16*) const {}

  void stage_large(const OperandPart& part, int64_t y, float* scratch, bfloat16* to) const {
    stage_pairs(part, large_height * large_width * large_channels, y * large_width * large_channels, large_width, large_channels,
                scratch, 1, 2 * kKinds, to, [&](int64_t matrix, int64_t pair, const float* row) {
                  const int64_t kind = matrix / 2, parity = matrix % 2;
                  const float* d = row + (pair * 4 + parity + (kind == kFirst ? 0 : 2)) * kChannels;
                  return kind == kSum ? round_value(d) : round_difference(d, d + 2 * kChannels);
                });
  }

  void stage_small(const OperandPart& part, int64_t i, float* scratch, bfloat16* to) const {
    stage_pairs(part, small_height * small_width * small_channels, i * small_width * small_channels, small_width, small_channels,
                scratch + 2 * scratch_row(), 0, kKinds, to, [&](int64_t kind, int64_t pair, const float* row) {
                  const float *z0 = row + pair * 2 * kChannels, *z1 = z0 + kChannels;
                  return kind == kSum ? round_sum(z0, z1) : round_value(kind == kFirst ? z0 : z1);
                });
  }

  void multiply(NoProducts, const LargeRing& ring, const bfloat16* gradients, int64_t i0, int64_t i1, int64_t small, int64_t large,
                bool accumulate, float* sums) const {
    const int64_t step = run() * 2 * kTile;  // of matrices
    for (int64_t r = 0; r < 4; ++r) {
      const int64_t first = r == 0 && i0 == 0 ? 1 : i0;  // the rows that kernel row r meets within the image
      const int64_t end = min64(i1, (large_height - r) / 2 + 1);
      for (int64_t parity = 0; parity < 2; ++parity)
        for (int kind = 0; kind < kKinds; ++kind, sums += sums_matrix())
          for (int64_t k = 0; k * kTileRows < small; ++k)
            for (int64_t c = 0; c * kChannels < large; ++c) {
              float* to = sums + k * kTileRows * sums_row() + c * kChannels;
              const bfloat16* left = gradients + (k / 2 * kKinds + kind) * step + k % 2 * kTile;
              const int64_t right = ((c * kKinds + kind) * 2 + parity) * step;
              const int64_t tiles = kind == kSecond ? ceil_div(small_width / 2, together) : run();
              multiply_rows(end - first, tiles, 2 * kTile, sums_row(), accumulate ? to : nullptr, to, nullptr, [&](int64_t i) {
                return TileRow{left + (first + i - i0) * small_row(), ring(2 * (first + i) - 1 + r) + right};
              });
            }
    }
  }

  void taps(const float* sums, __m512i (&lanes)[16]) const {
    for (int64_t r = 0; r < 4; ++r)
      for (int64_t parity = 0; parity < 2; ++parity, sums += kKinds * sums_matrix()) {
        const Vec sum = load(sums);
        lanes[r * 4 + parity] = (__m512i)(sum + load(sums + kFirst * sums_matrix()));
        lanes[r * 4 + parity + 2] = (__m512i)(sum - load(sums + kSecond * sums_matrix()));
      }
  }

 private:
  FilteredGradient(const Conv4x4s2Shape& s, int64_t all, int64_t a_tile)
      : GradientPlan(s, kTileDepth / a_tile, 2 * kKinds * ceil_div(all, a_tile), kKinds * ceil_div(all, a_tile), 8 * kKinds,
                     kGradientPixels),
        pairs(all), together(a_tile) {}

  static int64_t pairs_a_tile(const Conv4x4s2Shape& s) {
    const int64_t pairs = ceil_div(s.small_width, 2);
    return ceil_div(s.batch, 16) * ceil_div(pairs, 2) < ceil_div(s.batch, 32) * pairs ? 2 : 1;
  }

  int64_t run() const { return ceil_div(pairs, together); }  // tiles of a row

  // to[lines of channels][matrices][pairs][2 tiles][16 pairs of images, or twice 8][16][2]. Every two images are read into scratch,
  // at column `before` of the rows that column() gets: column(matrix, pair, row) are 32 channels.
  template <typename Column>
  void stage_pairs(const OperandPart& part, int64_t image, int64_t first, int64_t width, int64_t all_channels, float* scratch,
                   int64_t before, int64_t matrices, bfloat16* to, const Column& column) const {
    for (int64_t c = 0; c < part.channels; c += kChannels)
      for (int64_t n = 0; n < images; n += 2) {
        for (int64_t i = 0; i < 2; ++i) {
          float* row = scratch + i * scratch_row() + before * kChannels;
          if (n + i < part.images)
            read_row(part.operand, (part.first_image + n + i) * image + first + part.first_channel + c, width, all_channels,
                     part.first_channel + c, min64(kChannels, part.channels - c), 2 * image, row);
          else
            for (int64_t v = 0; v < width * kChannels; v += kLanes) store(row + v, Vec{});
        }
        bfloat16* tile = to + c / kChannels * matrices * run() * 2 * kTile + n * kTileRows;
        for (int64_t matrix = 0; matrix < matrices; ++matrix)
          for (int64_t pair = 0; pair < run() * together; pair += together, tile += 2 * kTile)
            for (int64_t i = 0; i < together; ++i) {
              bfloat16* pixels = tile + i * images * kTileRows;
              store_pair(column(matrix, pair + i, scratch), column(matrix, pair + i, scratch + scratch_row()), pixels, pixels + kTile);
            }
      }
  }
};

}  // namespace

int64_t conv4x4s2_bf16_filtered_packed_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop) {
  return loop == Conv4x4s2Loop::weight_gradient ? 0 : FilteredForward(shape, loop).packed_elements() * 2;
}

void conv4x4s2_bf16_filtered_pack(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, void* packed) {
  pack(FilteredForward(shape, loop), weight, static_cast<bfloat16*>(packed));
}

int64_t conv4x4s2_bf16_filtered_workspace_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, int threads) {
  if (loop == Conv4x4s2Loop::weight_gradient) return gradient_workspace_bytes(FilteredGradient(shape), threads);
  return forward_workspace_bytes(FilteredForward(shape, loop), threads);
}

void conv4x4s2_bf16_filtered_forward(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const ConvOperand& input, const void* packed,
                                     const ConvEpilogue& output, void* workspace, int threads) {
  run_forward(FilteredForward(shape, loop), input, static_cast<const bfloat16*>(packed), output, workspace, threads);
}

void conv4x4s2_bf16_filtered_weight_gradient(const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,
                                             const ConvWeightGradient& result, void* workspace, int threads) {
  run_weight_gradient(FilteredGradient(shape), large, small, result, workspace, threads);
}

}  // namespace fastgan::cpu::FASTGAN_ISA
