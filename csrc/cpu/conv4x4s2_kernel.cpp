// Instruction sets: baseline avx2 avx512 avx512_bf16
//
// The three loops of conv4x4s2.h for layers with many channels on both sides, by minimal filtering (conv4x4s2_tiles.h).
//
// A task takes a block of images (or a strip of rows of one image, where images are large) through everything: read the
// operand with its prologue, transform, multiply, transform back, epilogue; what lies between stays in the core's cache.
//
//   down: for each of the four input parities: products += ..., result += transformed back; then the epilogue
//   up:   the inputs transformed once for all output phases; for each of the four: result = transformed back; the epilogue once
//         the two phases that share image rows are there, so that it runs along whole rows (pixel by pixel alternating it took
//         twice as long)
//   weight_gradient: a task owns a block of the weight; for each input parity, sum over all tiles of (data side)^T
//         (gradient side) in the transformed domain, then back to four taps. Where a weight has few blocks, a task takes one
//         parity, and as many images as make enough tasks; their taps meet in a buffer.
#include "conv4x4s2_blocks.h"
#include "conv4x4s2_gemm.h"
#include "conv4x4s2_kernel.h"
#include "conv4x4s2_tiles.h"
#include "conv4x4s2_weights.h"
#include "transpose.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t kProductRows = 2496;  // rows of all product matrices of a block, of 16 about 150 each
constexpr int64_t kFewerProductRows = 1000;  // where up would have fewer than kFewTasks tasks
constexpr int64_t kFewTasks = 8;
constexpr int64_t kLeastSplitRows = 64;  // of product matrices of a block that is halved to make two tasks
constexpr int64_t kGradientRows = 1024;  // the same for the weight gradient, which also holds its accumulators
constexpr int64_t kGradientLarge = 64;   // block of the weight a weight_gradient task owns
constexpr int64_t kGradientSmall = 128;
constexpr int64_t kGradientMatrix = kGradientLarge * kGradientSmall + 16;  // floats from one matrix of such a block to the next
constexpr int64_t kGradientTasks = 16;   // parities, then images, are split over tasks to reach about this many
constexpr int64_t kRowsAhead = 3;        // prefetched: as many as a row of tiles is high

// Rows [from, end) of one image's inputs, zero padded: stage[end - from][columns.inputs][kChunk]. T is the storage type.
template <typename T>
void stage_inputs(const ConvOperand& operand, const Geometry& g, const Axis& rows, const Axis& columns, int64_t image, int64_t from,
                  int64_t end, int64_t c0, int64_t channels, float* stage) {
  const int64_t ahead = kRowsAhead * rows.step * g.input_width * g.input_channels;
  for (int64_t i = from; i < end; ++i) {
    const int64_t y = rows.origin + i * rows.step;
    for (int64_t j = 0; j < columns.inputs; ++j, stage += kChunk) {
      const int64_t x = columns.origin + j * columns.step;
      if (y < 0 || y >= g.input_height || x < 0 || x >= g.input_width)
        for (int64_t c = 0; c < channels; c += kLanes) store(stage + c, Vec{});
      else {
        const int64_t offset = ((image * g.input_height + y) * g.input_width + x) * g.input_channels + c0;
        prefetch_operand<T>(operand, offset + ahead, channels);
        read_operand<T>(operand, offset, c0, channels, stage);
      }
    }
  }
}

struct InputTile {
  const float* src;
  int64_t row;
  float* const* dst;
  int64_t channels;
  template <Tile kRow, Tile kColumn>
  void run() const { input_tile<kRow, kColumn>(src, row, kChunk, dst, channels); }
};

// products[row][kChunk] = transformed inputs of all tiles of a block. The inputs of one row of tiles are staged at a time,
// so that they stay in the first-level cache.
void transform_inputs(const ConvOperand& operand, const Geometry& g, const ProductRows& at, int64_t first_image, int64_t c0,
                      int64_t channels, float* stage, float* products) {
  const int64_t row = at.columns.inputs * kChunk;
  const auto stage_rows = g.half ? stage_inputs<bfloat16> : stage_inputs<float>;
  for (int64_t n = 0; n < at.images; ++n)
    for (int r = 0; r < at.rows.count; ++r) {
      const Segment& rs = at.rows.segments[r];
      int64_t from = rs.input;
      if (r > 0 && at.rows.segments[r - 1].end() == from + 1) {  // its first row is the last of the segment before
        const int last = at.rows.segments[r - 1].points - 1;
        if (last > 0) __builtin_memcpy(stage, stage + last * row, static_cast<size_t>(row) * sizeof(float));
        ++from;
      }
      stage_rows(operand, g, at.rows, at.columns, first_image + n, from, rs.end(), c0, channels, stage + (from - rs.input) * row);
      for (int c = 0; c < at.columns.count; ++c) {
        const Segment& cs = at.columns.segments[c];
        float* dst[kMostPairs];
        at.addresses(products, kChunk, n, rs, cs, dst);
        for_tiles(rs, cs, InputTile{stage + cs.input * kChunk, row, dst, channels});
      }
    }
}

struct OutputTile {
  float* const* src;
  float* dst;
  int64_t row, column, channels;
  bool accumulate;
  template <Tile kRow, Tile kColumn>
  void run() const { output_tile<kRow, kColumn>(src, dst, row, column, channels, accumulate); }
};

// The products of a phase of either axis transformed back into, or added to, result[images][rows][...]; row and column are its strides in
// floats.
void transform_outputs(const ProductRows& at, int row_phase, int column_phase, float* products, int64_t ld, float* result, int64_t row,
                       int64_t column, bool accumulate) {
  for (int64_t n = 0; n < at.images; ++n, result += at.rows.length[row_phase] * row)
    for (int r = 0; r < at.rows.count; ++r) {
      const Segment& rs = at.rows.segments[r];
      if ((rs.phases >> row_phase & 1) == 0) continue;
      for (int c = 0; c < at.columns.count; ++c) {
        const Segment& cs = at.columns.segments[c];
        if ((cs.phases >> column_phase & 1) == 0) continue;
        float* src[kMostPairs];
        at.addresses(products, ld, n, rs, cs, src);
        for_tiles(rs, cs, OutputTile{src, result + rs.output[row_phase] * row + cs.output[column_phase] * column, row, column, ld,
                                     accumulate || rs.add || cs.add});
      }
    }
}

// ---- down and up

// How down and up are cut into tasks.
struct ForwardTasks {
  Blocks blocks;
  int64_t channels;           // outputs of a task
  bool inputs_first = false;  // of all blocks, transformed before the tasks that multiply them

  explicit ForwardTasks(const Geometry& g)
      : blocks(g, kProductRows, output_blocks(g)), channels(min64(kOutputBlock, round_up(g.output_channels, kPanel))) {
    g.up ? cut_up(g) : cut_down(g);
  }

 private:
  int64_t count(const Geometry& g) const { return ceil_div(g.output_channels, channels) * blocks.count(); }

  // The phases read the same inputs, so a task does all of them, unless that would leave too few tasks even with smaller blocks: then
  // they find the inputs transformed before, and with nothing transformed twice for it a task takes half of the outputs.
  void cut_up(const Geometry& g) {
    if (count(g) >= kFewTasks) return;
    const Blocks smaller(g, kFewerProductRows, output_blocks(g));
    inputs_first = output_blocks(g) * smaller.count() < kFewTasks;
    if (g.points == 6 || !inputs_first) blocks = smaller;
    if (inputs_first) channels = min64(channels, kOutputBlock / 2);
  }

  // An odd number of few tasks would leave one of two threads idle: blocks or outputs are halved, whichever has the other
  // transformed once more for less. Twice as many tasks again took two threads 15% longer.
  void cut_down(const Geometry& g) {
    while (count(g) % 2 != 0 && count(g) < kFewTasks) {
      const Blocks smaller(g, blocks.product_rows / 2);
      const bool splits = blocks.product_rows >= kLeastSplitRows && smaller.count() > blocks.count();
      if (channels > kPanel && (!splits || blocks.product_rows < g.points * g.points * channels))
        channels = round_up(channels / 2, kPanel);
      else if (splits)
        blocks = smaller;
      else
        return;
    }
  }
};

struct ForwardScratch {
  int64_t common;  // floats of the inputs of all blocks, where they are transformed first
  int64_t inputs, taps, weights, products, result, stage;  // floats of a thread
  ForwardScratch(const WeightTaps& source, const ForwardTasks& tasks) {
    const Geometry& g = source.g;
    const Blocks& blocks = tasks.blocks;
    const int64_t chunk = blocks.product_rows * kChunk, block = ceil_div(g.input_channels, kChunk) * chunk;
    common = tasks.inputs_first ? blocks.count() * block : 0;
    inputs = !g.up ? chunk : tasks.inputs_first ? 0 : block;
    taps = source.memory();
    weights = g.points * (min64(kChunk, source.packed.input_channels) * kPanel + kLineFloats);
    products = blocks.product_rows * tasks.channels;
    result = blocks.pixels * tasks.channels;
    stage = blocks.stage_pixels * kChunk;
  }
  int64_t common_bytes() const { return round_up(common * static_cast<int64_t>(sizeof(float)), ScratchSlots::kAlignment); }
  int64_t bytes() const { return (inputs + taps + weights + products + result + stage) * static_cast<int64_t>(sizeof(float)); }
};

int64_t partials_bytes(const Geometry& g, const Blocks& blocks) {
  return round_up(2 * g.row_phases() * blocks.count() * g.output_channels * static_cast<int64_t>(sizeof(float)),
                  ScratchSlots::kAlignment);
}

void run_wide(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const ConvOperand& input, const float* weight,
              const ConvEpilogue& epilogue, void* workspace, int threads) {
  const Geometry g(shape, loop);
  const ForwardTasks tasks(g);
  const Blocks& blocks = tasks.blocks;
  const WeightTaps weights(g, blocks, weight);
  const ForwardScratch sizes(weights, tasks);
  float* partials = static_cast<float*>(workspace);
  char* const after_partials = static_cast<char*>(workspace) + partials_bytes(g, blocks);
  float* common = reinterpret_cast<float*>(after_partials);
  const ScratchSlots slots(after_partials + sizes.common_bytes(), threads, sizes.bytes());
  const int64_t chunks = ceil_div(g.input_channels, kChunk), chunk_floats = blocks.product_rows * kChunk;

  const auto transform = [&](int64_t block, int64_t chunk, const ProductRows& at, float* stage, float* inputs) {
    transform_inputs(input, g, at, blocks.first_image(block), chunk * kChunk, weights.packed.chunk_channels(chunk * kChunk), stage, inputs);
  };
  if (tasks.inputs_first)
    parallel_for(blocks.count() * chunks, [&](int64_t task) {
      const int64_t block = task / chunks;
      const ScratchSlots::Lease lease(slots);
      const Axis rows = g.row_axis(0, blocks.strip(block), blocks.strips), columns = g.column_axis(0);
      transform(block, task % chunks, ProductRows(rows, columns, blocks.image_count(block)), lease.memory(), common + task * chunk_floats);
    });
  const int64_t phase_tasks = tasks.inputs_first ? g.row_phases() : 1;
  const int64_t output_tasks = ceil_div(g.output_channels, tasks.channels);

  // Blocks of images run innermost, so that consecutive tasks of a thread read the same weights.
  parallel_for(phase_tasks * output_tasks * blocks.count(), [&](int64_t task) {
    const int64_t block = task % blocks.count(), first_output = task / blocks.count() % output_tasks * tasks.channels;
    const int64_t k0 = first_output / kOutputBlock * kOutputBlock;  // block of the packed weights
    const int64_t ld = min64(tasks.channels, min64(k0 + weights.packed.block_channels(k0), g.output_channels) - first_output);
    const int64_t first_image = blocks.first_image(block), images = blocks.image_count(block);
    const int64_t first_parity = phase_tasks == 1 ? 0 : task / blocks.count() / output_tasks;
    const int64_t end_parity = phase_tasks == 1 ? 2 : first_parity + 1;
    const ScratchSlots::Lease lease(slots);
    float* inputs = lease.memory();
    float* gathered = inputs + sizes.inputs;
    float* transformed = gathered + sizes.taps;
    float* products = transformed + sizes.weights;
    float* result = products + sizes.products;
    float* stage = result + sizes.result;
    if (tasks.inputs_first) inputs = common + block * chunks * chunk_floats;

    for (int64_t a = first_parity; a < end_parity; ++a) {
      const Axis rows = g.row_axis(a, blocks.strip(block), blocks.strips);
      const int row_phase = g.up ? static_cast<int>(a) : 0;
      for (int64_t b = 0; b < 2; ++b) {
        const Axis columns = g.column_axis(b);
        const int column_phase = g.up ? static_cast<int>(b) : 0;
        const ProductRows at(rows, columns, images);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const int64_t c0 = chunk * kChunk, channels = weights.packed.chunk_channels(c0);
          float* operand = g.up ? inputs + chunk * chunk_floats : inputs;
          if (!g.up || (!tasks.inputs_first && a + b == 0)) transform(block, chunk, at, stage, operand);
          for (int64_t k = 0; k < ld; k += kPanel) {
            const float* taps = weights.panel(a, b, k0, first_output - k0 + k, c0, gathered);
            Ahead ahead = weights.after(a, b, k0, first_output - k0 + k, c0);
            for (int row = 0; row < g.points; ++row) {
              transform_weights(taps, channels, min64(kPanel, ld - k), g.points, row, transformed);
              const float* u = transformed;
              for (int p = row * g.points; p < (row + 1) * g.points; ++p, u += channels * kPanel + kLineFloats) {
                const int64_t first = at.first(p, row_phase), count = at.count(p, row_phase, column_phase);
                multiply_panel<kChunk, 1, kPanel>(operand + first * kChunk, u, channels, products + first * ld + k, ld, ld - k, count,
                                                  c0 > 0, ahead);
              }
            }
          }
        }
        if (g.up)
          transform_outputs(at, row_phase, column_phase, products, ld, result + b * ld, g.output_width * ld, 2 * ld, false);
        else
          transform_outputs(at, 0, 0, products, ld, result, g.output_width * ld, ld, a + b > 0);
      }
      if (!g.up && a == 0) continue;  // down: the four parities add up to one result
      float* partial = partials + 2 * ((g.up ? a * blocks.count() : 0) + block) * g.output_channels;
      const OutputBox box{g.output_height, g.output_width, g.output_channels, first_image, images,
                          g.up ? 2 * rows.first[a] + a : rows.first[0], rows.length[row_phase], g.row_phases(), first_output,
                          min64(ld, g.output_channels - first_output)};
      (g.half ? finish_box<bfloat16> : finish_box<float>)(epilogue, box, result, {box.rows * g.output_width * ld, ld}, {partial, partial + g.output_channels});
    }
  });

  merge_partials(epilogue, partials, g.row_phases() * blocks.count(), g.output_channels, [&](int64_t part) {
    const int64_t block = part % blocks.count(), phase = part / blocks.count(), strip = blocks.strip(block);
    return blocks.image_count(block) * g.output_width *
           (g.first_row(phase, strip + 1, blocks.strips) - g.first_row(phase, strip, blocks.strips));
  });
}

// ---- weight gradient

struct GradientTile {
  const float* src;
  int64_t row, column;
  float* const* dst;
  int64_t channels;
  template <Tile kRow, Tile kColumn>
  void run() const { gradient_tile<kRow, kColumn>(src, row, column, dst, channels); }
};

// The output gradients that a row of tiles of one image transforms: stage[rows of a tile][columns][kGradientSmall]
template <typename T>
void stage_gradients(const ConvOperand& operand, const Geometry& g, const ProductRows& at, const Segment& rows, int64_t image, int64_t c0,
                     int64_t channels, float* stage) {
  const int64_t first = (image * g.output_height + at.rows.first[0] + rows.output[0]) * g.output_width;
  for (int64_t pixel = first; pixel < first + outputs_of(rows.tile) * g.output_width; ++pixel, stage += kGradientSmall) {
    prefetch_operand<T>(operand, (pixel + kRowsAhead * g.output_width) * g.output_channels + c0, channels);
    read_operand<T>(operand, pixel * g.output_channels + c0, c0, channels, stage);
  }
}

// products[row][kGradientSmall] = transformed output gradients of all tiles of a block
void transform_gradients(const ConvOperand& operand, const Geometry& g, const ProductRows& at, int64_t first_image,
                         int64_t c0, int64_t channels, float* stage, float* products) {
  const int64_t row = at.columns.length[0] * kGradientSmall;
  for (int64_t n = 0; n < at.images; ++n)
    for (int r = 0; r < at.rows.count; ++r) {
      const Segment& rs = at.rows.segments[r];
      (g.half ? stage_gradients<bfloat16> : stage_gradients<float>)(operand, g, at, rs, first_image + n, c0, channels, stage);
      for (int c = 0; c < at.columns.count; ++c) {
        const Segment& cs = at.columns.segments[c];
        float* dst[kMostPairs];
        at.addresses(products, kGradientSmall, n, rs, cs, dst);
        for_tiles(rs, cs, GradientTile{stage + cs.output[0] * kGradientSmall, row, kGradientSmall, dst, channels});
      }
    }
}

struct GradientPlan {
  Geometry g;
  Blocks blocks;
  int64_t large_blocks, small_blocks;
  int64_t parities, splits;  // parts that the four parities and the images of a block of the weight are cut into, a task each
  int64_t inputs, gradients, accumulators, taps, stage;  // floats

  explicit GradientPlan(const Conv4x4s2Shape& shape)
      : g(shape, Conv4x4s2Loop::weight_gradient), blocks(g, kGradientRows) {
    large_blocks = ceil_div(g.input_channels, kGradientLarge);
    small_blocks = ceil_div(g.output_channels, kGradientSmall);
    parities = weight_blocks() >= kGradientTasks ? 1 : 4;
    splits = min64(blocks.count(), max64(1, kGradientTasks / (weight_blocks() * parities)));
    inputs = blocks.product_rows * kChunk;
    gradients = blocks.product_rows * kGradientSmall;
    accumulators = g.points * g.points * kGradientMatrix;
    taps = 16 * kGradientMatrix;
    stage = blocks.stage_pixels * max64(kChunk, kGradientSmall);
  }
  int64_t weight_blocks() const { return large_blocks * small_blocks; }
  bool tasks_finish() const { return parities == 1; }  // a task's taps are all there is of its block of the weight
  int64_t slot_bytes() const {
    return (inputs + gradients + accumulators + (tasks_finish() ? taps : 0) + stage) * static_cast<int64_t>(sizeof(float));
  }
  // Where the taps of several tasks meet: [splits][weight blocks][taps]
  int64_t shared_bytes() const {
    return tasks_finish() ? 0
                          : round_up(splits * weight_blocks() * taps * static_cast<int64_t>(sizeof(float)), ScratchSlots::kAlignment);
  }
};

// The sum of m[points] times what their transformed weights have of a tap
template <int kPoints>
inline Vec combine(const Vec* m, const float (&taps)[kPoints][2], int tap) {
  Vec sum = tap == 0 ? m[0] : kPoints == 4 ? m[3] : Vec{};
#pragma GCC unroll 5
  for (int p = 1; p + 1 < kPoints; p += 2) sum += (tap == 0 ? m[p] + m[p + 1] : m[p] - m[p + 1]) * taps[p][tap];
  return sum;
}

// Four taps of each weight from the sums of its transformed products: rows [large][kGradientSmall] of sums and taps
template <int kPoints>
void transform_weight_gradients(const float* sums, int64_t large, int64_t row_parity, int64_t column_parity, float* taps) {
  constexpr const float(&factors)[kPoints][2] = taps_of<kPoints>();
  for (int64_t at = 0; at < large * kGradientSmall; at += kLanes) {
    Vec rows[2][kPoints];
#pragma GCC unroll 5
    for (int q = 0; q < kPoints; ++q) {
      Vec m[kPoints];
      for (int p = 0; p < kPoints; ++p) m[p] = load(sums + (p * kPoints + q) * kGradientMatrix + at);
      for (int r = 0; r < 2; ++r) rows[r][q] = combine<kPoints>(m, factors, r);
    }
    for (int r = 0; r < 2; ++r) {
      float* out = taps + ((row_parity + 2 * r) * 4 + column_parity) * kGradientMatrix + at;
      for (int c = 0; c < 2; ++c) store(out + 2 * c * kGradientMatrix, combine<kPoints>(rows[r], factors, c));
    }
  }
}

// A block of the weight: its first channels, and how many
struct WeightBlock {
  int64_t large, large_channels, small, small_channels;

  WeightBlock(const GradientPlan& plan, int64_t index)
      : large(index / plan.small_blocks * kGradientLarge), large_channels(min64(kGradientLarge, plan.g.input_channels - large)),
        small(index % plan.small_blocks * kGradientSmall), small_channels(min64(kGradientSmall, plan.g.output_channels - small)) {}
};

// sum = that of `parts` vectors, `stride` floats apart
inline void add_parts(const float* from, int64_t parts, int64_t stride, Side<float>& sum) {
  __builtin_memcpy(&sum, from, sizeof sum);
  for (int64_t part = 1; part < parts; ++part) {
    Side<float> more;
    __builtin_memcpy(&more, from + part * stride, sizeof more);
    sum += more;
  }
}

// to (+)= value, which changes
inline void store_side(float* to, Side<float>& value, bool add) {
  if (add) {
    Side<float> before;
    __builtin_memcpy(&before, to, sizeof before);
    value += before;
  }
  __builtin_memcpy(to, &value, sizeof value);
}

// The same in channels_last
void store_taps_last(const float* taps, int64_t parts, int64_t stride, const WeightBlock& block, int64_t first, int64_t end,
                     int64_t all_large, const ConvWeightGradient& result) {
  for (int t = 0; t < 16; ++t)
    for (int64_t k = first; k < end; k += kSide)
      for (int64_t c = 0; c < block.large_channels; c += kSide) {
        Side<float> square[kSide];
#pragma GCC unroll 8
        for (int j = 0; j < kSide; ++j) add_parts(taps + t * kGradientMatrix + (c + j) * kGradientSmall + k, parts, stride, square[j]);
        transpose<float>(square);
        float* dst = result.data + ((block.small + k) * 16 + t) * all_large + block.large + c;
#pragma GCC unroll 8
        for (int j = 0; j < kSide; ++j) store_side(dst + j * 16 * all_large, square[j], result.add);
      }
}

// result (+)= the sum of `parts` buffers of taps, `stride` floats apart, of the small channels from `first` to `end` of a block
void store_taps(const float* taps, int64_t parts, int64_t stride, const WeightBlock& block, int64_t first, int64_t end,
                int64_t all_large, bool channels_last, const ConvWeightGradient& result) {
  if (channels_last) return store_taps_last(taps, parts, stride, block, first, end, all_large, result);
  constexpr int kColumns = kLanes < kSide ? kLanes : kSide;
  for (int64_t k = first; k < end; k += kColumns)
    for (int64_t c = 0; c < block.large_channels; ++c) {
      const float* src = taps + c * kGradientSmall + k;
      float* dst = result.data + ((block.small + k) * all_large + block.large + c) * 16;
      if constexpr (kColumns == kSide) {
        for (int t = 0; t < 16; t += kSide) {
          Side<float> square[kSide];
#pragma GCC unroll 8
          for (int j = 0; j < kSide; ++j) add_parts(src + (t + j) * kGradientMatrix, parts, stride, square[j]);
          transpose<float>(square);
#pragma GCC unroll 8
          for (int j = 0; j < kSide; ++j) store_side(dst + j * all_large * 16 + t, square[j], result.add);
        }
      } else {
        for (int64_t lane = 0; lane < kColumns; ++lane)
          for (int t = 0; t < 16; ++t) {
            const float* from = src + t * kGradientMatrix + lane;
            float sum = from[0];
            for (int64_t part = 1; part < parts; ++part) sum += from[part * stride];
            float& to = dst[lane * all_large * 16 + t];
            to = result.add ? to + sum : sum;
          }
      }
    }
}

void weight_gradient_wide(const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,
                          const ConvWeightGradient& result, void* workspace, int threads) {
  const GradientPlan plan(shape);
  const Geometry& g = plan.g;
  const Blocks& blocks = plan.blocks;
  float* shared = static_cast<float*>(workspace);
  const ScratchSlots slots(static_cast<char*>(workspace) + plan.shared_bytes(), threads, plan.slot_bytes());

  parallel_for(plan.splits * plan.parities * plan.weight_blocks(), [&](int64_t task) {
    const int64_t index = task % plan.weight_blocks(), split = task / plan.weight_blocks() / plan.parities;
    const int64_t part = task / plan.weight_blocks() % plan.parities;
    const WeightBlock w(plan, index);
    const ScratchSlots::Lease lease(slots);
    float* inputs = lease.memory();
    float* gradients = inputs + plan.inputs;
    float* sums = gradients + plan.gradients;
    float* stage = sums + plan.accumulators;
    float* taps = plan.tasks_finish() ? stage + plan.stage : shared + (split * plan.weight_blocks() + index) * plan.taps;

    for (int64_t parity = 4 * part / plan.parities; parity < 4 * (part + 1) / plan.parities; ++parity) {
      const int64_t a = parity / 2, b = parity % 2;
      const int64_t first_block = blocks.count() * split / plan.splits, end_block = blocks.count() * (split + 1) / plan.splits;
      for (int64_t block = first_block; block < end_block; ++block) {
        const Axis rows = g.row_axis(a, blocks.strip(block), blocks.strips), columns = g.column_axis(b);
        const ProductRows at(rows, columns, blocks.image_count(block));
        const int64_t first_image = blocks.first_image(block);
        NothingAhead nothing;
        transform_gradients(small, g, at, first_image, w.small, w.small_channels, stage, gradients);
        for (int64_t c = 0; c < w.large_channels; c += kChunk) {
          const int64_t chunk = min64(kChunk, w.large_channels - c);
          transform_inputs(large, g, at, first_image, w.large + c, chunk, stage, inputs);
          for (int p = 0; p < at.pairs(); ++p)
            for (int64_t k = 0; k < w.small_channels; k += kPanel)
              multiply_panel<1, kChunk, kGradientSmall>(inputs + at.first(p, 0) * kChunk, gradients + at.first(p, 0) * kGradientSmall + k,
                                                        at.count(p, 0, 0), sums + p * kGradientMatrix + c * kGradientSmall + k,
                                                        kGradientSmall, w.small_channels - k, chunk, block > first_block, nothing);
        }
      }
      (g.points == 5 ? transform_weight_gradients<5> : transform_weight_gradients<4>)(sums, w.large_channels, a, b, taps);
    }
    if (plan.tasks_finish()) store_taps(taps, 1, 0, w, 0, w.small_channels, g.input_channels, g.weight_last, result);
  });

  if (plan.tasks_finish()) return;
  constexpr int64_t kPieces = kGradientSmall / kLineFloats;  // of a block: a cache line of each of its rows
  parallel_for(plan.weight_blocks() * kPieces, [&](int64_t task) {
    const int64_t index = task / kPieces, first = task % kPieces * kLineFloats;
    const WeightBlock w(plan, index);
    store_taps(shared + index * plan.taps, plan.splits, plan.weight_blocks() * plan.taps, w, first,
               min64(first + kLineFloats, w.small_channels), g.input_channels, g.weight_last, result);
  });
}

}  // namespace

int64_t conv4x4s2_packed_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop) {
  if (loop == Conv4x4s2Loop::weight_gradient) return 0;
  const Geometry g(shape, loop);
  if (gathers_weights(ForwardTasks(g).blocks)) return 0;
  return PackedWeights(g).size() * static_cast<int64_t>(sizeof(float));
}

void conv4x4s2_pack(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, void* packed) {
  pack_wide(shape, loop, weight, static_cast<float*>(packed));
}

int64_t conv4x4s2_workspace_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, int threads) {
  if (loop == Conv4x4s2Loop::weight_gradient) {
    const GradientPlan plan(shape);
    return plan.shared_bytes() + ScratchSlots::bytes(threads, plan.slot_bytes());
  }
  const Geometry g(shape, loop);
  const ForwardTasks tasks(g);
  const ForwardScratch sizes(WeightTaps(g, tasks.blocks, nullptr), tasks);
  return partials_bytes(g, tasks.blocks) + sizes.common_bytes() + ScratchSlots::bytes(threads, sizes.bytes());
}

void conv4x4s2_forward(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const ConvOperand& input, const void* packed,
                       const ConvEpilogue& output, void* workspace, int threads) {
  run_wide(shape, loop, input, static_cast<const float*>(packed), output, workspace, threads);
}

void conv4x4s2_weight_gradient(const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,
                               const ConvWeightGradient& result, void* workspace, int threads) {
  weight_gradient_wide(shape, large, small, result, workspace, threads);
}

}  // namespace fastgan::cpu::FASTGAN_ISA
