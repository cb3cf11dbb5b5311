// Instruction sets: avx512_bf16 amx
//
// The bfloat16 loops of conv4x4s2_bf16_loops.h with direct products, on AMX or AVX512-BF16. On AMX the products of a layer take
// about as long as reading its tensors, and transforms would cost digits.
#include "conv4x4s2_bf16_loops.h"
#include "conv4x4s2_common.h"
#include "conv4x4s2_kernel.h"

namespace fastgan::cpu::FASTGAN_ISA {

namespace {

constexpr int64_t kGradientPixels = 16;

// One column of padding is staged left and right.
struct DirectForward : ForwardPlan {
  using Products = ProductBlock;

  explicit DirectForward(const LoopShape& shape) : ForwardPlan(shape, shape.input_width + 2, 16) {}
  DirectForward(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop) : DirectForward(LoopShape(shape, loop)) {}

  int64_t scratch_floats() const { return 0; }

  void stage(const ConvOperand& operand, int64_t first_image, int64_t images, int64_t from, int64_t end, float*, bfloat16* to) const {
    const int64_t pixel = staged_pixel(), row = staged_row();
    for (int64_t y = from; y < end; ++y) {
      bfloat16* left = to + (y - from) * row;
      __builtin_memset(static_cast<void*>(left), 0, static_cast<size_t>(pixel) * 2);
      __builtin_memset(static_cast<void*>(left + row - pixel), 0, static_cast<size_t>(pixel) * 2);
      for (int64_t n = 0; n < images; ++n) {
        const int64_t offset = ((first_image + n) * input_height + y) * input_width * input_channels;
        bfloat16* dst = left + pixel + n * kChannels;
        for (int64_t x = 0; x < input_width; ++x)
          for (int64_t c = 0; c < input_channels; c += kChannels, dst += kTile)
            _mm512_store_si512(dst, read_line(operand, offset + x * input_channels + c, c, min64(kChannels, input_channels - c)));
      }
      for (int64_t n = images; n < kTileRows; ++n)
        for (int64_t x = 0; x < input_width * input_lines; ++x)
          _mm512_store_si512(left + pixel + x * kTile + n * kChannels, _mm512_setzero_si512());
    }
  }

  // Two pixels at once
  void multiply_row(ProductBlock& block, const bfloat16* stage, int64_t staged_from, int64_t y, int64_t b, const bfloat16* packed,
                    int64_t columns, float* result, int64_t result_step) const {
    const int64_t pixel = staged_pixel(), row = staged_row(), run = row_taps * input_lines, step = up ? 1 : 2;
    const int64_t first = max64(0, -y), end = min64(row_taps, input_height - y);
    for (int64_t j = 0; j < columns; j += 2, result += 2 * result_step) {
      block.begin(result, result_step, kTileColumns, false);
      for (int64_t r = first; r < end; ++r) {
        const TileRun left{stage + (y + r - staged_from) * row + (b + j * step) * pixel, step * pixel, kTile};
        const TileRun right{packed + r * run * 2 * kTile, kTile, 2 * kTile};
        if (j + 1 < columns)
          block.add<true>(left, right, run);
        else
          block.add<false>(left, right, run);
      }
      if (j + 1 < columns)
        block.end<true>(result, result_step, kTileColumns);
      else
        block.end<false>(result, result_step, kTileColumns);
    }
  }
};

// packed: [output line][phase][kernel row][kernel column][input line][2 tiles]
void pack(const DirectForward& p, const float* weight, bfloat16* packed) {
  pack_forward(p, packed, [&](int64_t input, int64_t output, bfloat16* to) {
    __m512i taps[16];
    gather_taps(p, weight, input, output, taps, [](Vec all) { return all; });
    for (int64_t phase = 0; phase < p.phases(); ++phase)
      for (int64_t q = 0; q < p.row_taps; ++q)
        for (int64_t u = 0; u < p.row_taps; ++u, to += p.packed_matrix()) {
          // the order in which an output meets its inputs: that of the taps in down, the reverse in up
          const int64_t r = p.up ? 3 - phase / 2 - 2 * q : q, s = p.up ? 3 - phase % 2 - 2 * u : u;
          _mm512_storeu_si512(to, taps[r * 4 + s]);
        }
  });
}

// Staged rows are [columns][tiles], one column of padding left and right of the large ones.
struct DirectGradient : GradientPlan {
  using Products = ProductBlock;

  explicit DirectGradient(const Conv4x4s2Shape& s) : GradientPlan(s, kTileDepth, s.large_width + 2, s.small_width, 16, kGradientPixels) {}

  int64_t scratch_floats() const { return 0; }
  int64_t large_pixel() const { return large_tiles * kTile; }
  int64_t small_pixel() const { return small_tiles * kTile; }

  void begin(bfloat16* pixels) const {
    for (int64_t row = 0; row < ring_rows(); ++row) {
      bfloat16* left = pixels + row * large_row();
      __builtin_memset(static_cast<void*>(left), 0, static_cast<size_t>(large_pixel()) * 2);
      __builtin_memset(static_cast<void*>(left + large_row() - large_pixel()), 0, static_cast<size_t>(large_pixel()) * 2);
    }
  }

  void stage_large(const OperandPart& part, int64_t y, float*, bfloat16* to) const {
    stage_pairs(part, large_height * large_width, y * large_width, large_width, large_channels, large_tiles, to + large_pixel());
  }

  void stage_small(const OperandPart& part, int64_t i, float*, bfloat16* to) const {
    stage_pairs(part, small_height * small_width, i * small_width, small_width, small_channels, small_tiles, to);
  }

  void multiply(ProductBlock& block, const LargeRing& ring, const bfloat16* gradients, int64_t i0, int64_t i1, int64_t small,
                int64_t large, bool accumulate, float* sums) const {
    for (int64_t tap = 0; tap < 16; ++tap)
      for (int64_t k = 0; k * kTileRows < small; k += 2)
        for (int64_t c = 0; c * kTileRows < large; c += 2) {
          float* to = sums + tap * sums_matrix() + k * kTileRows * sums_row() + c * kTileRows;
          block.begin(to, kTileRows * sums_row(), sums_row(), accumulate);
          for (int64_t i = i0; i < i1; ++i) {
            const int64_t y = 2 * i - 1 + tap / 4;
            if (y < 0 || y >= large_height) continue;
            block.add<true>({gradients + (i - i0) * small_row() + k * kTile, kTile, small_pixel()},
                            {ring(y) + tap % 4 * large_pixel() + c * kTile, kTile, 2 * large_pixel()}, small_width);
          }
          block.end<true>(to, kTileRows * sums_row(), sums_row());
        }
  }

  void taps(const float* sums, __m512i (&lanes)[16]) const {
    for (int t = 0; t < 16; ++t) lanes[t] = _mm512_loadu_si512(sums + t * sums_matrix());
  }

 private:
  // dst[width][tiles][16 pairs of images][16][2]
  static void stage_pairs(const OperandPart& part, int64_t image_pixels, int64_t first_pixel, int64_t width, int64_t all_channels,
                          int64_t tiles, bfloat16* dst) {
    for (int64_t n = 0; n < kTileDepth; n += 2)
      for (int64_t x = 0; x < width; ++x)
        for (int64_t t = 0; t * kTileRows < part.channels; t += 2) {
          const int64_t c = part.first_channel + t * kTileRows, some = min64(kChannels, part.channels - t * kTileRows);
          const int64_t offset = ((part.first_image + n) * image_pixels + first_pixel + x) * all_channels + c;
          const __m512i a = n < part.images ? read_line(part.operand, offset, c, some) : _mm512_setzero_si512();
          const __m512i b = n + 1 < part.images ? read_line(part.operand, offset + image_pixels * all_channels, c, some)
                                                : _mm512_setzero_si512();
          bfloat16* to = dst + (x * tiles + t) * kTile + n * kTileRows;
          store_pair(a, b, to, to + kTile);
        }
  }
};

}  // namespace

int64_t conv4x4s2_bf16_packed_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop) {
  return loop == Conv4x4s2Loop::weight_gradient ? 0 : DirectForward(shape, loop).packed_elements() * 2;
}

void conv4x4s2_bf16_pack(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, void* packed) {
  pack(DirectForward(shape, loop), weight, static_cast<bfloat16*>(packed));
}

int64_t conv4x4s2_bf16_workspace_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, int threads) {
  if (loop == Conv4x4s2Loop::weight_gradient) return gradient_workspace_bytes(DirectGradient(shape), threads);
  return forward_workspace_bytes(DirectForward(shape, loop), threads);
}

void conv4x4s2_bf16_forward(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const ConvOperand& input, const void* packed,
                            const ConvEpilogue& output, void* workspace, int threads) {
  run_forward(DirectForward(shape, loop), input, static_cast<const bfloat16*>(packed), output, workspace, threads);
}

void conv4x4s2_bf16_weight_gradient(const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,
                                    const ConvWeightGradient& result, void* workspace, int threads) {
  run_weight_gradient(DirectGradient(shape), large, small, result, workspace, threads);
}

}  // namespace fastgan::cpu::FASTGAN_ISA
