// The three loops of conv4x4s2.h for bfloat16 tensors with many channels on both sides, on AMX or AVX512-BF16.
//
// Direct products, not minimal filtering: on AMX the products of a layer take about as long as reading its tensors, and
// transforms in bfloat16 would cost digits. Arithmetic outside the products is float, so are all sums.
//
// Operands are staged with images innermost: a tile's 16 rows (down, up) or 32 depths (weight_gradient) are the same
// pixel of as many images. Every width then fills the tiles, taps in the rows above and below an image are left out,
// and a tile is one contiguous KiB.
//
//   down, up: a task takes 16 images and a strip of rows, stages its inputs once, then computes 32 output channels at a
//             time, two pixels at once, each with its epilogue while the results are in cache
//   weight_gradient: a task owns a block of the weight and a part of the images and rows; the data side is stored with
//             pairs of images interleaved, the gradient side as the transpose of that
#include "conv4x4s2_common.h"
#include "conv4x4s2_kernel.h"

#if defined(__AVX512BF16__)
#include "conv4x4s2_bf16_tiles.h"
#endif

namespace fastgan::cpu::FASTGAN_ISA {

#if defined(__AVX512BF16__)
namespace {

constexpr int64_t kStageTiles = 768;        // of a strip of down and up: 768 KiB
constexpr int64_t kStripPixels = 256;       // most outputs of a strip
constexpr int64_t kForwardTasks = 8;
constexpr int64_t kGradientImages = 32;
constexpr int64_t kGradientLarge = 64;      // block of the weight a task owns
constexpr int64_t kGradientSmall = 128;
constexpr int64_t kGradientPixels = 16;     // small pixels summed between loads of the sums
constexpr int64_t kGradientTasks = 8;

// ---- down and up

struct ForwardPlan : LoopShape {
  int64_t groups, input_lines, output_lines;
  int64_t rows;       // down: of the output; up: pairs of output rows
  int64_t strips, strip_rows, splits;
  int64_t taps;       // rows and columns of the kernel that meet at one output: 4, or 2 in each phase of up
  int64_t stage_pixels, result_pixels;

  ForwardPlan(const Conv4x4s2Shape& s, Conv4x4s2Loop loop) : LoopShape(s, loop) {
    input_lines = ceil_div(input_channels, kChannels);
    output_lines = ceil_div(output_channels, kChannels);
    taps = up ? 2 : 4;
    groups = ceil_div(batch, kTileRows);
    rows = up ? ceil_div(output_height, 2) : output_height;
    strip_rows = 1;
    while (strip_rows < rows && staged_rows(strip_rows + 1) * staged_width() * input_lines <= kStageTiles &&
           result_rows(strip_rows + 1) * output_width <= kStripPixels)
      ++strip_rows;
    strips = ceil_div(rows, strip_rows);
    strip_rows = ceil_div(rows, strips);
    splits = min64(output_lines, ceil_div(kForwardTasks, groups * strips));
    stage_pixels = staged_rows(strip_rows) * staged_width();
    result_pixels = result_rows(strip_rows) * output_width;
  }
  // One column of padding left and right.
  int64_t staged_width() const { return input_width + 2; }
  int64_t staged_rows(int64_t strip) const { return min64(input_height, up ? strip + 2 : 2 * strip + 2); }
  int64_t result_rows(int64_t strip) const { return up ? 2 * strip : strip; }
  int64_t phases() const { return up ? 4 : 1; }
  int64_t tasks() const { return groups * strips; }

  // packed: [output line][phase][tap row][tap column][input line][2 tiles]
  int64_t packed_tiles() const { return output_lines * 16 * input_lines * 2; }
  int64_t packed_offset(int64_t line, int64_t phase) const {
    return (line * 16 + phase * taps * taps) * input_lines * 2 * kTile;
  }

  int64_t stage_bytes() const { return stage_pixels * input_lines * kTile * 2; }
  int64_t slot_bytes() const { return stage_bytes() + result_pixels * kTileRows * kTileColumns * 4; }
  int64_t partials_bytes() const {
    return round_up(2 * tasks() * output_channels * static_cast<int64_t>(sizeof(float)), ScratchSlots::kAlignment);
  }
  int64_t first_output_row(int64_t strip) const { return min64(output_height, (up ? 2 : 1) * part_start(rows, strip, strips)); }
};

// stage[end - from][staged_width][input_lines][16 images][32]
void stage_images(const ConvOperand& operand, const ForwardPlan& p, int64_t first_image, int64_t images, int64_t from,
                  int64_t end, bfloat16* stage) {
  const int64_t pixel = p.input_lines * kTile, row = p.staged_width() * pixel;
  for (int64_t y = from; y < end; ++y) {
    bfloat16* left = stage + (y - from) * row;
    __builtin_memset(static_cast<void*>(left), 0, static_cast<size_t>(pixel) * 2);
    __builtin_memset(static_cast<void*>(left + row - pixel), 0, static_cast<size_t>(pixel) * 2);
    for (int64_t n = 0; n < images; ++n) {
      const int64_t offset = ((first_image + n) * p.input_height + y) * p.input_width * p.input_channels;
      bfloat16* dst = left + pixel + n * kChannels;
      for (int64_t x = 0; x < p.input_width; ++x)
        for (int64_t c = 0; c < p.input_channels; c += kChannels, dst += kTile)
          _mm512_store_si512(dst, read_line(operand, offset + x * p.input_channels + c, c,
                                            min64(kChannels, p.input_channels - c)));
    }
    for (int64_t n = images; n < kTileRows; ++n)
      for (int64_t x = 0; x < p.input_width * p.input_lines; ++x)
        _mm512_store_si512(left + pixel + x * kTile + n * kChannels, _mm512_setzero_si512());
  }
}

// One output row of one phase: result[columns][16 images][32]. `y` is the input row of the first tap row, `x` the staged
// column the first output reads first; outputs are `step` staged columns and `result_step` floats apart.
void multiply_row(ProductBlock& block, const ForwardPlan& p, const bfloat16* stage, int64_t staged_from, int64_t y, int64_t x,
                  int64_t step, const bfloat16* packed, int64_t columns, float* result, int64_t result_step) {
  const int64_t pixel = p.input_lines * kTile, row = p.staged_width() * pixel, run = p.taps * p.input_lines;
  const int64_t first = max64(0, -y), end = min64(p.taps, p.input_height - y);
  for (int64_t j = 0; j < columns; j += 2, result += 2 * result_step) {
    block.begin(result, result_step, kTileColumns, false);
    for (int64_t r = first; r < end; ++r) {
      const TileRun left{stage + (y + r - staged_from) * row + (x + j * step) * pixel, step * pixel, kTile};
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

void run_forward(const ForwardPlan& p, const ConvOperand& input, const bfloat16* packed, const ConvEpilogue& epilogue,
                 void* workspace, int threads) {
  float* partials = static_cast<float*>(workspace);
  const ScratchSlots slots(static_cast<char*>(workspace) + p.partials_bytes(), threads, p.slot_bytes());
  constexpr int64_t kPixel = kTileRows * kTileColumns;

  parallel_for(p.splits * p.tasks(), [&](int64_t task) {
    const int64_t part = task % p.tasks(), split = task / p.tasks(), strip = part % p.strips;
    const int64_t first_image = part / p.strips * kTileRows, images = min64(kTileRows, p.batch - first_image);
    const int64_t t0 = part_start(p.rows, strip, p.strips), t1 = part_start(p.rows, strip + 1, p.strips);
    const int64_t y0 = p.first_output_row(strip), y1 = p.first_output_row(strip + 1);
    const int64_t from = max64(0, p.up ? t0 - 1 : 2 * t0 - 1), end = min64(p.input_height, p.up ? t1 + 1 : 2 * t1 + 1);
    const ScratchSlots::Lease lease(slots);
    bfloat16* stage = reinterpret_cast<bfloat16*>(lease.memory());
    float* result = lease.memory() + p.stage_bytes() / 4;
    ProductBlock block;
    stage_images(input, p, first_image, images, from, end, stage);

    for (int64_t line = p.output_lines * split / p.splits; line < p.output_lines * (split + 1) / p.splits; ++line) {
      if (p.up)
        for (int64_t phase = 0; phase < 4; ++phase) {
          const int64_t a = phase / 2, b = phase % 2;
          for (int64_t t = t0; t < t1 && 2 * t + a < y1; ++t)
            multiply_row(block, p, stage, from, t - 1 + a, b, 1, packed + p.packed_offset(line, phase),
                         (p.output_width - b + 1) / 2, result + ((2 * t + a - y0) * p.output_width + b) * kPixel, 2 * kPixel);
        }
      else
        for (int64_t t = t0; t < t1; ++t)
          multiply_row(block, p, stage, from, 2 * t - 1, 0, 2, packed + p.packed_offset(line, 0), p.output_width,
                       result + (t - t0) * p.output_width * kPixel, kPixel);
      float* partial = partials + 2 * part * p.output_channels;
      const OutputBox box{p.output_height, p.output_width, p.output_channels, first_image, images, y0, y1 - y0, 1,
                          line * kChannels, min64(kChannels, p.output_channels - line * kChannels)};
      finish_box<bfloat16>(epilogue, box, result, {kTileColumns, kPixel}, {partial, partial + p.output_channels});
    }
  });

  merge_partials(epilogue, partials, p.tasks(), p.output_channels, [&](int64_t part) {
    const int64_t strip = part % p.strips, images = min64(kTileRows, p.batch - part / p.strips * kTileRows);
    return images * (p.first_output_row(strip + 1) - p.first_output_row(strip)) * p.output_width;
  });
}

// A task packs the 16 taps of 32 input and 32 output channels.
void pack_forward(const ForwardPlan& p, const float* weight, bfloat16* packed) {
  const int64_t input_stride = p.weight_input_stride(), output_stride = p.weight_output_stride();
  parallel_for(p.output_lines * p.input_lines, [&](int64_t task) {
    const int64_t output = task / p.input_lines, input = task % p.input_lines;
    for (int64_t tile = 0; tile < 2; ++tile)
      for (int64_t pair = 0; pair < kTileDepth / 2; ++pair) {
        const int64_t c = input * kChannels + 2 * pair;
        __m512i lanes[16];
        for (int64_t k = 0; k < kTileRows; ++k) {
          const int64_t to = output * kChannels + tile * kTileRows + k;
          if (c >= p.input_channels || to >= p.output_channels) {
            lanes[k] = _mm512_setzero_si512();
            continue;
          }
          const float* taps = weight + c * input_stride + to * output_stride;
          const __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load(taps)));
          const __m512i odd = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load(taps + input_stride)));
          lanes[k] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
        }
        transpose_lanes(lanes);
        for (int64_t phase = 0; phase < p.phases(); ++phase)
          for (int64_t q = 0; q < p.taps; ++q)
            for (int64_t u = 0; u < p.taps; ++u) {
              // the order in which an output meets its inputs: that of the taps in down, the reverse in up
              const int64_t r = p.up ? 3 - phase / 2 - 2 * q : q, s = p.up ? 3 - phase % 2 - 2 * u : u;
              bfloat16* dst = packed + p.packed_offset(output, phase) +
                              (((q * p.taps + u) * p.input_lines + input) * 2 + tile) * kTile + pair * kTileRows * 2;
              _mm512_storeu_si512(dst, lanes[r * 4 + s]);
            }
      }
  });
}

// ---- weight gradient

struct GradientPlan {
  int64_t batch, groups;
  int64_t large_height, large_width, large_channels, small_height, small_width, small_channels;
  int64_t large_blocks, small_blocks;
  int64_t rows, strips, splits;     // small rows a strip, strips an image, parts the sum is split into
  int64_t large_tiles, small_tiles;  // a pixel, of one task

  explicit GradientPlan(const Conv4x4s2Shape& s)
      : batch(s.batch), groups(ceil_div(s.batch, kGradientImages)), large_height(s.large_height), large_width(s.large_width),
        large_channels(s.large_channels), small_height(s.small_height), small_width(s.small_width),
        small_channels(s.small_channels) {
    large_blocks = ceil_div(large_channels, kGradientLarge);
    small_blocks = ceil_div(small_channels, kGradientSmall);
    rows = min64(small_height, ceil_div(kGradientPixels, small_width));
    strips = ceil_div(small_height, rows);
    splits = min64(groups * strips, max64(1, kGradientTasks / (large_blocks * small_blocks)));
    large_tiles = min64(kGradientLarge, round_up(large_channels, kChannels)) / kTileRows;
    small_tiles = min64(kGradientSmall, round_up(small_channels, kChannels)) / kTileRows;
  }
  int64_t ring_rows() const { return 2 * rows + 2; }
  int64_t staged_width() const { return large_width + 2; }
  int64_t large_bytes() const { return ring_rows() * staged_width() * large_tiles * kTile * 2; }
  int64_t small_bytes() const { return rows * small_width * small_tiles * kTile * 2; }
  int64_t sums() const { return 16 * small_tiles * kTileRows * large_tiles * kTileRows; }
  int64_t slot_bytes() const { return large_bytes() + small_bytes() + sums() * 4; }
  int64_t weights() const { return 16 * large_channels * small_channels; }
  int64_t partials_bytes() const { return splits == 1 ? 0 : round_up(splits * weights() * 4, ScratchSlots::kAlignment); }
};

// Pixels of one row of 32 images, tiles of right operands: dst[width][tiles][16 pairs of images][16][2]
void stage_pairs(const ConvOperand& operand, int64_t first_image, int64_t images, int64_t image_pixels, int64_t first_pixel,
                 int64_t width, int64_t all_channels, int64_t c0, int64_t channels, int64_t tiles, bfloat16* dst) {
  for (int64_t n = 0; n < kGradientImages; n += 2)
    for (int64_t x = 0; x < width; ++x)
      for (int64_t t = 0; t * kTileRows < channels; t += 2) {
        const int64_t c = t * kTileRows, some = min64(kChannels, channels - c);
        const int64_t offset = ((first_image + n) * image_pixels + first_pixel + x) * all_channels + c0 + c;
        const __m512i a = n < images ? read_line(operand, offset, c0 + c, some) : _mm512_setzero_si512();
        const __m512i b = n + 1 < images ? read_line(operand, offset + image_pixels * all_channels, c0 + c, some)
                                         : _mm512_setzero_si512();
        bfloat16* to = dst + (x * tiles + t) * kTile + n * kTileRows;
        store_pair(a, b, to, to + kTile);
      }
}

void run_weight_gradient(const GradientPlan& p, const ConvOperand& large, const ConvOperand& small, const ConvWeightGradient& result,
                         void* workspace, int threads) {
  float* partials = p.splits == 1 ? result.data : static_cast<float*>(workspace);
  const bool add = p.splits == 1 && result.add;
  const ScratchSlots slots(static_cast<char*>(workspace) + p.partials_bytes(), threads, p.slot_bytes());
  const int64_t large_pixel = p.large_tiles * kTile, large_row = p.staged_width() * large_pixel;
  const int64_t small_pixel = p.small_tiles * kTile, small_row = p.small_width * small_pixel;
  const int64_t ld = p.large_tiles * kTileRows, tap_sums = p.small_tiles * kTileRows * ld;

  parallel_for(p.splits * p.large_blocks * p.small_blocks, [&](int64_t task) {
    const int64_t k0 = task % p.small_blocks * kGradientSmall, c0 = task / p.small_blocks % p.large_blocks * kGradientLarge;
    const int64_t split = task / p.small_blocks / p.large_blocks, units = p.groups * p.strips;
    const int64_t large_channels = min64(kGradientLarge, p.large_channels - c0);
    const int64_t small_channels = min64(kGradientSmall, p.small_channels - k0);
    const ScratchSlots::Lease lease(slots);
    float* sums = lease.memory();  // [16 taps][small][large]
    bfloat16* pixels = reinterpret_cast<bfloat16*>(sums + p.sums());
    bfloat16* gradients = pixels + p.large_bytes() / 2;
    ProductBlock block;
    for (int64_t row = 0; row < p.ring_rows(); ++row) {  // padding left and right
      __builtin_memset(static_cast<void*>(pixels + row * large_row), 0, static_cast<size_t>(large_pixel) * 2);
      __builtin_memset(static_cast<void*>(pixels + (row + 1) * large_row - large_pixel), 0, static_cast<size_t>(large_pixel) * 2);
    }

    // Large row y lies in row y % ring_rows of the ring; the rows a strip shares with the one before are there already.
    const int64_t first_unit = units * split / p.splits;
    int64_t staged = 0;
    for (int64_t unit = first_unit; unit < units * (split + 1) / p.splits; ++unit) {
      const int64_t first_image = unit / p.strips * kGradientImages, i0 = unit % p.strips * p.rows;
      const int64_t images = min64(kGradientImages, p.batch - first_image), i1 = min64(p.small_height, i0 + p.rows);
      if (unit == first_unit || i0 == 0) staged = max64(0, 2 * i0 - 1);
      for (; staged < min64(p.large_height, 2 * i1 + 1); ++staged)
        stage_pairs(large, first_image, images, p.large_height * p.large_width, staged * p.large_width, p.large_width,
                    p.large_channels, c0, large_channels, p.large_tiles,
                    pixels + staged % p.ring_rows() * large_row + large_pixel);
      stage_pairs(small, first_image, images, p.small_height * p.small_width, i0 * p.small_width, (i1 - i0) * p.small_width,
                  p.small_channels, k0, small_channels, p.small_tiles, gradients);
      transpose_tiles(gradients, (i1 - i0) * p.small_width * p.small_tiles);

      for (int64_t r = 0; r < 4; ++r)
        for (int64_t s = 0; s < 4; ++s)
          for (int64_t k = 0; k * kTileRows < small_channels; k += 2)
            for (int64_t c = 0; c * kTileRows < large_channels; c += 2) {
              float* to = sums + (r * 4 + s) * tap_sums + k * kTileRows * ld + c * kTileRows;
              block.begin(to, kTileRows * ld, ld, unit > first_unit);
              for (int64_t i = i0; i < i1; ++i) {
                const int64_t y = 2 * i - 1 + r;
                if (y < 0 || y >= p.large_height) continue;
                block.add<true>({gradients + (i - i0) * small_row + k * kTile, kTile, small_pixel},
                                {pixels + y % p.ring_rows() * large_row + s * large_pixel + c * kTile, kTile, 2 * large_pixel},
                                p.small_width);
              }
              block.end<true>(to, kTileRows * ld, ld);
            }
    }

    float* out = partials + split * p.weights();
    for (int64_t k = 0; k < small_channels; ++k)
      for (int64_t c = 0; c < large_channels; c += kLanes) {
        __m512i taps[16];
        for (int t = 0; t < 16; ++t) taps[t] = _mm512_loadu_si512(sums + t * tap_sums + k * ld + c);
        transpose_lanes(taps);
        for (int lane = 0; lane < 16; ++lane) {
          float* to = out + ((k0 + k) * p.large_channels + c0 + c + lane) * 16;
          const Vec sum = (Vec)taps[lane];
          store(to, add ? load(to) + sum : sum);
        }
      }
  });

  if (p.splits > 1) add_partials(partials, p.splits, p.weights(), result);
}

}  // namespace

int64_t conv4x4s2_bf16_packed_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop) {
  return loop == Conv4x4s2Loop::weight_gradient ? 0 : ForwardPlan(shape, loop).packed_tiles() * kTile * 2;
}

void conv4x4s2_bf16_pack(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, void* packed) {
  pack_forward(ForwardPlan(shape, loop), weight, static_cast<bfloat16*>(packed));
}

int64_t conv4x4s2_bf16_workspace_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, int threads) {
  const auto bytes = [&](const auto& plan) { return plan.partials_bytes() + ScratchSlots::bytes(threads, plan.slot_bytes()); };
  return loop == Conv4x4s2Loop::weight_gradient ? bytes(GradientPlan(shape)) : bytes(ForwardPlan(shape, loop));
}

void conv4x4s2_bf16_forward(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const ConvOperand& input, const void* packed,
                            const ConvEpilogue& output, void* workspace, int threads) {
  run_forward(ForwardPlan(shape, loop), input, static_cast<const bfloat16*>(packed), output, workspace, threads);
}

void conv4x4s2_bf16_weight_gradient(const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,
                                    const ConvWeightGradient& result, void* workspace, int threads) {
  run_weight_gradient(GradientPlan(shape), large, small, result, workspace, threads);
}

#else

// conv4x4s2_supported refuses bfloat16 on these instruction sets, so nothing calls these.
int64_t conv4x4s2_bf16_packed_bytes(const Conv4x4s2Shape&, Conv4x4s2Loop) { return 0; }
void conv4x4s2_bf16_pack(const Conv4x4s2Shape&, Conv4x4s2Loop, const float*, void*) {}
int64_t conv4x4s2_bf16_workspace_bytes(const Conv4x4s2Shape&, Conv4x4s2Loop, int) { return 0; }
void conv4x4s2_bf16_forward(const Conv4x4s2Shape&, Conv4x4s2Loop, const ConvOperand&, const void*, const ConvEpilogue&, void*,
                            int) {}
void conv4x4s2_bf16_weight_gradient(const Conv4x4s2Shape&, const ConvOperand&, const ConvOperand&, const ConvWeightGradient&, void*, int) {}

#endif

}  // namespace fastgan::cpu::FASTGAN_ISA
