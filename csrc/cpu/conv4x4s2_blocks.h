// How the loops of conv4x4s2_kernel.cpp see a shape, and cut it into blocks that a task takes through everything.
#pragma once

#include "conv4x4s2.h"
#include "conv4x4s2_tiles.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t kChunk = 64;         // reduction channels transformed and multiplied at a time
constexpr int64_t kOutputBlock = 128;  // output channels of a task
constexpr int kPairs = kPoints * kPoints;

struct Geometry : LoopShape {
  int64_t step;  // from an output to the next, in inputs

  Geometry(const Conv4x4s2Shape& s, Conv4x4s2Loop loop) : LoopShape(s, loop), step(up ? 1 : 2) {}

  int64_t row_phases() const { return up ? 2 : 1; }

  // Outputs of one phase along an axis; down has a single phase.
  int64_t phase_rows(int64_t phase) const { return up ? (output_height - phase + 1) / 2 : output_height; }
  int64_t phase_columns(int64_t phase) const { return up ? (output_width - phase + 1) / 2 : output_width; }

  Axis row_axis(int64_t parity, int64_t strip, int64_t strips) const {
    const int64_t all = phase_rows(parity), first = part_start(all, strip, strips);
    return Axis(first, part_start(all, strip + 1, strips) - first, step, parity, input_height);
  }
  Axis column_axis(int64_t parity) const { return Axis(0, phase_columns(parity), step, parity, input_width); }
};

int64_t output_blocks(const Geometry& g) { return ceil_div(g.output_channels, kOutputBlock); }

// How the batch is cut into blocks that fit the cache.
struct Blocks {
  int64_t strips;           // an image
  int64_t images, batches;  // most images a block, blocks a strip
  int64_t batch;
  int64_t product_rows;     // most rows of all product matrices of a block, and those between them
  int64_t pixels;           // most outputs of a block between two epilogues
  int64_t stage_pixels;     // most inputs a row of tiles reads

  // tasks_each: how many tasks share a block. An odd number of tasks would leave one of two threads idle at the end.
  Blocks(const Geometry& g, int64_t target_rows, int64_t tasks_each = 1) {
    const int64_t whole = image_rows(g, 1);
    strips = max64(1, min64(ceil_div(whole, target_rows), g.phase_rows(1) / 4));
    const int64_t rows = strips == 1 ? whole : image_rows(g, strips);
    images = max64(1, min64(g.batch, target_rows / rows));
    batches = ceil_div(g.batch, images);
    if (batches > 2 && batches < g.batch && strips * batches * tasks_each % 2 != 0) ++batches;
    images = ceil_div(g.batch, batches);
    batch = g.batch;
    product_rows = images * rows + kPairs;
    const int64_t height = ceil_div(g.phase_rows(0), strips), width = g.phase_columns(0);
    pixels = images * height * g.output_width;
    stage_pixels = kPoints * (width + 1);
  }
  int64_t count() const { return strips * batches; }
  int64_t first_image(int64_t block) const { return part_start(batch, block % batches, batches); }
  int64_t image_count(int64_t block) const {
    return part_start(batch, block % batches + 1, batches) - first_image(block);
  }
  int64_t strip(int64_t block) const { return block / batches; }

 private:
  static int64_t image_rows(const Geometry& g, int64_t strips) {
    int64_t most = 0;
    for (int64_t b = 0; b < 2; ++b) {
      const int64_t columns = g.column_axis(b).multiplications();
      for (int64_t a = 0; a < 2; ++a)
        for (int64_t s = 0; s < strips; ++s) most = max64(most, g.row_axis(a, s, strips).multiplications() * columns);
    }
    return most;
  }
};

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
