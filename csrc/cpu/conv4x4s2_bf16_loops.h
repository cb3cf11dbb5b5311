// The three loops of conv4x4s2.h for bfloat16 tensors with many channels on both sides, but for their products: a form, direct
// (conv4x4s2_bf16_kernel.cpp) or filtered (conv4x4s2_bf16_filtered_kernel.cpp), says how operands are staged and multiplied.
// Arithmetic outside the products is float, so are all sums.
//
// Operands are staged with images innermost: a tile's 16 rows (down, up) or 32 depths (weight_gradient) are the same
// pixel of as many images, or two pixels of half as many. Every width then fills the tiles, taps in the rows above and below an
// image are left out, and a tile is one contiguous KiB.
//
//   down, up: a task takes 16 images and a strip of rows, stages its inputs once, then computes 32 output channels at a
//             time, a row at a time, with their epilogue while the results are in cache
//   weight_gradient: a task owns a block of the weight and a part of the images and rows; the data side is stored with
//             pairs of images interleaved, the gradient side as the transpose of that
#pragma once

#include "conv4x4s2_bf16_tiles.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t kStageTiles = 768;    // of a strip of down and up: 768 KiB
constexpr int64_t kStripPixels = 256;   // most outputs of a strip
constexpr int64_t kForwardTasks = 8;
constexpr int64_t kGradientLarge = 64;  // block of the weight a task owns
constexpr int64_t kGradientSmall = 128;
constexpr int64_t kGradientTasks = 8;

// ---- down and up

// `columns` are staged of every row of inputs, with padding; `matrices` of weights are packed, an input and an output channel each.
struct ForwardPlan : LoopShape {
  int64_t columns, matrices;
  int64_t groups, input_lines, output_lines;
  int64_t rows;      // down: of the output; up: pairs of output rows
  int64_t strips, strip_rows, splits;
  int64_t row_taps;  // rows of the kernel that meet at one output: 4, or 2 in each phase of up
  int64_t stage_pixels, result_pixels;

  ForwardPlan(const LoopShape& shape, int64_t staged_columns, int64_t packed_matrices)
      : LoopShape(shape), columns(staged_columns), matrices(packed_matrices) {
    input_lines = ceil_div(input_channels, kChannels);
    output_lines = ceil_div(output_channels, kChannels);
    row_taps = up ? 2 : 4;
    groups = ceil_div(batch, kTileRows);
    rows = up ? ceil_div(output_height, 2) : output_height;
    strip_rows = 1;
    while (strip_rows < rows && staged_rows(strip_rows + 1) * columns * input_lines <= kStageTiles &&
           result_rows(strip_rows + 1) * output_width <= kStripPixels)
      ++strip_rows;
    strips = ceil_div(rows, strip_rows);
    strip_rows = ceil_div(rows, strips);
    splits = min64(output_lines, ceil_div(kForwardTasks, groups * strips));
    stage_pixels = staged_rows(strip_rows) * columns;
    result_pixels = result_rows(strip_rows) * output_width;
  }
  int64_t staged_rows(int64_t strip) const { return min64(input_height, up ? strip + 2 : 2 * strip + 2); }
  int64_t result_rows(int64_t strip) const { return up ? 2 * strip : strip; }
  int64_t phases() const { return up ? 4 : 1; }
  int64_t tasks() const { return groups * strips; }

  // Elements from a staged pixel to the next, and from a row
  int64_t staged_pixel() const { return input_lines * kTile; }
  int64_t staged_row() const { return columns * staged_pixel(); }

  // packed: [output line][phase][matrices of a phase][input line][2 tiles]
  int64_t packed_matrix() const { return input_lines * 2 * kTile; }
  int64_t packed_elements() const { return output_lines * matrices * packed_matrix(); }
  int64_t packed_offset(int64_t line, int64_t phase) const {
    return (line * matrices + phase * (matrices / phases())) * packed_matrix();
  }

  int64_t stage_bytes() const { return stage_pixels * staged_pixel() * 2; }
  int64_t result_floats() const { return result_pixels * kTileRows * kTileColumns; }
  int64_t partials_bytes() const {
    return round_up(2 * tasks() * output_channels * static_cast<int64_t>(sizeof(float)), ScratchSlots::kAlignment);
  }
  int64_t first_output_row(int64_t strip) const { return min64(output_height, (up ? 2 : 1) * part_start(rows, strip, strips)); }
};

// A form is a ForwardPlan with
//   Products                          what its products need, made once a task
//   scratch_floats()                  of memory for stage()
//   stage(input, first_image, images, from, end, scratch, to)
//                                     to[rows from..end][columns][input lines][16 images][32]
//   multiply_row(products, stage, staged_from, y, b, packed, columns, result, result_step)
//                                     one output row of one phase: result[columns][16 images][32], columns result_step floats
//                                     apart. y is the input row of the first kernel row, b the phase's column in up.
template <typename Form>
int64_t forward_workspace_bytes(const Form& form, int threads) {
  return form.partials_bytes() +
         ScratchSlots::bytes(threads, form.stage_bytes() + (form.result_floats() + form.scratch_floats()) * 4);
}

template <typename Form>
void run_forward(const Form& p, const ConvOperand& input, const bfloat16* packed, const ConvEpilogue& epilogue, void* workspace,
                 int threads) {
  float* partials = static_cast<float*>(workspace);
  const ScratchSlots slots(static_cast<char*>(workspace) + p.partials_bytes(), threads,
                           p.stage_bytes() + (p.result_floats() + p.scratch_floats()) * 4);
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
    typename Form::Products products;
    p.stage(input, first_image, images, from, end, result + p.result_floats(), stage);

    for (int64_t line = p.output_lines * split / p.splits; line < p.output_lines * (split + 1) / p.splits; ++line) {
      if (p.up)
        for (int64_t phase = 0; phase < 4; ++phase) {
          const int64_t a = phase / 2, b = phase % 2;
          for (int64_t t = t0; t < t1 && 2 * t + a < y1; ++t)
            p.multiply_row(products, stage, from, t - 1 + a, b, packed + p.packed_offset(line, phase), (p.output_width - b + 1) / 2,
                           result + ((2 * t + a - y0) * p.output_width + b) * kPixel, 2 * kPixel);
        }
      else
        for (int64_t t = t0; t < t1; ++t)
          p.multiply_row(products, stage, from, 2 * t - 1, 0, packed + p.packed_offset(line, 0), p.output_width,
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

// lanes[4 x 4 taps]: of 16 output channels the weights of two input channels next to each other, rounded. of(taps) are the 16
// values of a weight that are packed.
template <typename Of>
inline void gather_taps(const ForwardPlan& p, const float* weight, int64_t input, int64_t output, __m512i (&lanes)[16], const Of& of) {
  const int64_t input_stride = p.weight_input_stride(), output_stride = p.weight_output_stride();
  for (int64_t k = 0; k < kTileRows; ++k) {
    if (input >= p.input_channels || output + k >= p.output_channels) {
      lanes[k] = _mm512_setzero_si512();
      continue;
    }
    const float* taps = weight + input * input_stride + (output + k) * output_stride;
    const __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(of(load(taps))));
    const __m512i odd = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(of(load(taps + input_stride))));
    lanes[k] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
  }
  transpose_lanes(lanes);
}

// Calls pack(input, output, to) for every two input and 16 output channels: `to` is where their row of a right tile begins, in the
// first matrix of the first phase. A task packs 32 input and 32 output channels.
template <typename Pack>
void pack_forward(const ForwardPlan& p, bfloat16* packed, const Pack& pack) {
  parallel_for(p.output_lines * p.input_lines, [&](int64_t task) {
    const int64_t output = task / p.input_lines, input = task % p.input_lines;
    for (int64_t tile = 0; tile < 2; ++tile)
      for (int64_t pair = 0; pair < kTileDepth / 2; ++pair)
        pack(input * kChannels + 2 * pair, output * kChannels + tile * kTileRows,
             packed + p.packed_offset(output, 0) + (input * 2 + tile) * kTile + pair * kTileRows * 2);
  });
}

// ---- weight gradient

// Of every row of `images` images `large_columns` and `small_columns` tiles are staged, 16 channels each, and `matrices` of sums are
// kept, an entry a weight each.
struct GradientPlan {
  int64_t batch, images, groups;
  int64_t large_height, large_width, large_channels, small_height, small_width, small_channels;
  int64_t large_columns, small_columns, matrices;
  int64_t large_blocks, small_blocks;
  int64_t rows, strips, splits;     // small rows a strip, strips an image, parts the sum is split into
  int64_t large_tiles, small_tiles;  // a pixel, of one task

  // pixels: small ones that are summed between loads of the sums
  GradientPlan(const Conv4x4s2Shape& s, int64_t images_a_group, int64_t staged_large, int64_t staged_small, int64_t sums, int64_t pixels)
      : batch(s.batch), images(images_a_group), groups(ceil_div(s.batch, images)), large_height(s.large_height), large_width(s.large_width),
        large_channels(s.large_channels), small_height(s.small_height), small_width(s.small_width),
        small_channels(s.small_channels), large_columns(staged_large), small_columns(staged_small), matrices(sums) {
    large_blocks = ceil_div(large_channels, kGradientLarge);
    small_blocks = ceil_div(small_channels, kGradientSmall);
    rows = min64(small_height, ceil_div(pixels, small_width));
    strips = ceil_div(small_height, rows);
    splits = min64(groups * strips, max64(1, kGradientTasks / (large_blocks * small_blocks)));
    large_tiles = min64(kGradientLarge, round_up(large_channels, kChannels)) / kTileRows;
    small_tiles = min64(kGradientSmall, round_up(small_channels, kChannels)) / kTileRows;
  }
  int64_t ring_rows() const { return 2 * rows + 2; }

  // Elements from a staged row to the next
  int64_t large_row() const { return large_columns * large_tiles * kTile; }
  int64_t small_row() const { return small_columns * small_tiles * kTile; }
  // Floats from a row of a matrix of sums to the next, and from a matrix
  int64_t sums_row() const { return large_tiles * kTileRows; }
  int64_t sums_matrix() const { return small_tiles * kTileRows * sums_row(); }

  int64_t large_bytes() const { return ring_rows() * large_row() * 2; }
  int64_t small_bytes() const { return rows * small_row() * 2; }
  int64_t sums_bytes() const { return matrices * sums_matrix() * 4; }
  int64_t weights() const { return 16 * large_channels * small_channels; }
  int64_t partials_bytes() const { return splits == 1 ? 0 : round_up(splits * weights() * 4, ScratchSlots::kAlignment); }
};

// The images and channels of an operand that a task works on
struct OperandPart {
  const ConvOperand& operand;
  int64_t first_image, images;
  int64_t first_channel, channels;
};

// The large rows of a strip: row y lies in row y % rows of the ring.
struct LargeRing {
  const bfloat16* pixels;
  int64_t rows, row;

  const bfloat16* operator()(int64_t y) const { return pixels + y % rows * row; }
};

// A form is a GradientPlan with
//   Products                          what its products need, made once a task
//   scratch_floats()                  of memory for the stage functions, zero at a task's beginning
//   begin(pixels)                     fills what the stage functions leave out of the ring
//   stage_large(part, y, scratch, to), stage_small(part, i, scratch, to)
//                                     one row of a group: of right tiles, and of what transpose_tiles makes left tiles of
//   multiply(products, ring, gradients, i0, i1, small_channels, large_channels, accumulate, sums)
//                                     sums[matrices][small][large] of the small rows i0 to i1
//   taps(sums, lanes)                 the 16 taps of the vector of large channels at `sums` of the first matrix
template <typename Form>
int64_t gradient_slot_bytes(const Form& p) {
  return p.large_bytes() + p.small_bytes() + p.sums_bytes() + p.scratch_floats() * 4;
}

template <typename Form>
int64_t gradient_workspace_bytes(const Form& form, int threads) {
  return form.partials_bytes() + ScratchSlots::bytes(threads, gradient_slot_bytes(form));
}

// result[i] (+)= sum over splits of partials[split][i]; weights is a multiple of kLanes.
void add_partials(const float* partials, int64_t splits, int64_t weights, const ConvWeightGradient& result) {
  constexpr int64_t kPiece = 4096;
  parallel_for(ceil_div(weights, kPiece), [&](int64_t task) {
    for (int64_t i = task * kPiece; i < min64(weights, (task + 1) * kPiece); i += kLanes) {
      Vec sum = load(partials + i);
      for (int64_t split = 1; split < splits; ++split) sum += load(partials + split * weights + i);
      store(result.data + i, result.add ? load(result.data + i) + sum : sum);
    }
  });
}

template <typename Form>
void run_weight_gradient(const Form& p, const ConvOperand& large, const ConvOperand& small, const ConvWeightGradient& result,
                         void* workspace, int threads) {
  float* partials = p.splits == 1 ? result.data : static_cast<float*>(workspace);
  const bool add = p.splits == 1 && result.add;
  const ScratchSlots slots(static_cast<char*>(workspace) + p.partials_bytes(), threads, gradient_slot_bytes(p));

  parallel_for(p.splits * p.large_blocks * p.small_blocks, [&](int64_t task) {
    const int64_t k0 = task % p.small_blocks * kGradientSmall, c0 = task / p.small_blocks % p.large_blocks * kGradientLarge;
    const int64_t split = task / p.small_blocks / p.large_blocks, units = p.groups * p.strips;
    const int64_t large_channels = min64(kGradientLarge, p.large_channels - c0);
    const int64_t small_channels = min64(kGradientSmall, p.small_channels - k0);
    const ScratchSlots::Lease lease(slots);
    float* sums = lease.memory();
    bfloat16* pixels = reinterpret_cast<bfloat16*>(sums + p.sums_bytes() / 4);
    bfloat16* gradients = pixels + p.large_bytes() / 2;
    float* scratch = reinterpret_cast<float*>(gradients + p.small_bytes() / 2);
    typename Form::Products products;
    p.begin(pixels);
    for (int64_t i = 0; i < p.scratch_floats(); i += kLanes) store(scratch + i, Vec{});

    // The rows that a strip shares with the one before are in the ring already.
    const int64_t first_unit = units * split / p.splits;
    int64_t staged = 0;
    for (int64_t unit = first_unit; unit < units * (split + 1) / p.splits; ++unit) {
      const int64_t first_image = unit / p.strips * p.images, i0 = unit % p.strips * p.rows;
      const int64_t images = min64(p.images, p.batch - first_image), i1 = min64(p.small_height, i0 + p.rows);
      if (unit == first_unit || i0 == 0) staged = max64(0, 2 * i0 - 1);
      for (; staged < min64(p.large_height, 2 * i1 + 1); ++staged)
        p.stage_large({large, first_image, images, c0, large_channels}, staged, scratch, pixels + staged % p.ring_rows() * p.large_row());
      for (int64_t i = i0; i < i1; ++i)
        p.stage_small({small, first_image, images, k0, small_channels}, i, scratch, gradients + (i - i0) * p.small_row());
      transpose_tiles(gradients, (i1 - i0) * p.small_columns * p.small_tiles);
      p.multiply(products, LargeRing{pixels, p.ring_rows(), p.large_row()}, gradients, i0, i1, small_channels, large_channels,
                 unit > first_unit, sums);
    }

    float* out = partials + split * p.weights();
    for (int64_t k = 0; k < small_channels; ++k)
      for (int64_t c = 0; c < large_channels; c += kLanes) {
        __m512i taps[16];
        p.taps(sums + k * p.sums_row() + c, taps);
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
}  // namespace fastgan::cpu::FASTGAN_ISA
