// How the loops of conv4x4s2_kernel.cpp see a shape, and cut it into blocks that a task takes through everything.
#pragma once

#include "conv4x4s2.h"
#include "conv4x4s2_tiles.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t kChunk = 64;         // reduction channels transformed and multiplied at a time
constexpr int64_t kOutputBlock = 128;  // output channels of a task
constexpr int kMostPairs = kMostPoints * kMostPoints;

constexpr int64_t kLeastPixels = 128, kLeastPixelsUp = 512;

struct Geometry : LoopShape {
  int points;  // of both axes

  Geometry(const Conv4x4s2Shape& s, Conv4x4s2Loop loop) : LoopShape(s, loop) {
    // The small side's. With few of them the transformed weights of more points would take longer than larger tiles save.
    const int64_t height = s.small_height, width = s.small_width;
    const bool fours = height >= 8 && width >= 8 && height % 4 == 0 && width % 4 == 0;
    points = !fours || batch * height * width < (up ? kLeastPixelsUp : kLeastPixels) ? 4 : up ? 6 : 5;
  }

  int64_t row_phases() const { return up ? 2 : 1; }

  // Outputs of one phase along an axis; down has a single phase.
  int64_t phase_rows(int64_t phase) const { return up ? (output_height - phase + 1) / 2 : output_height; }

  // The first output row of a phase that a strip has
  int64_t first_row(int64_t phase, int64_t strip, int64_t strips) const {
    if (up) return Axis::up_first(points, phase, strip, strips, input_height, output_height);
    const int64_t together = points == 5 ? 4 : 1;
    return together * part_start(output_height / together, strip, strips);
  }

  // down: those of an input parity. up: of both phases.
  Axis row_axis(int64_t parity, int64_t strip, int64_t strips) const {
    if (up) return Axis::up(points, strip, strips, input_height, output_height);
    const int64_t first = first_row(0, strip, strips);
    return Axis::down(points, first, first_row(0, strip + 1, strips) - first, parity, input_height);
  }
  Axis column_axis(int64_t parity) const {
    return up ? Axis::up(points, 0, 1, input_width, output_width) : Axis::down(points, 0, output_width, parity, input_width);
  }
};

int64_t output_blocks(const Geometry& g) { return ceil_div(g.output_channels, kOutputBlock); }

// How the batch is cut into blocks that fit the cache.
struct Blocks {
  int64_t strips;           // an image
  int64_t images, batches;  // most images a block, blocks a strip
  int64_t batch;
  int64_t product_rows;     // most rows of all product matrices of a block (up: with those of all phases), and those between them
  int64_t pixels;           // most outputs of a block between two epilogues
  int64_t stage_pixels;     // most inputs a row of tiles reads

  // tasks_each: how many tasks share a block. An odd number of tasks would leave one of two threads idle at the end.
  Blocks(const Geometry& g, int64_t target_rows, int64_t tasks_each = 1) {
    const int64_t whole = products(g, 1);
    strips = max64(1, min64(ceil_div(whole, target_rows), g.phase_rows(1) / 4));
    const int64_t rows = strips == 1 ? whole : products(g, strips);
    images = max64(1, min64(g.batch, target_rows / rows));
    batches = ceil_div(g.batch, images);
    if (batches > 2 && batches < g.batch && strips * batches * tasks_each % 2 != 0) ++batches;
    images = ceil_div(g.batch, batches);
    batch = g.batch;
    product_rows = images * transformed(g) + g.points * g.points;
    const int64_t height = ceil_div(g.phase_rows(0), strips) + (strips > 1 ? 4 : 0);
    pixels = images * height * g.output_width;
    stage_pixels = g.points * max64(g.column_axis(0).inputs, g.column_axis(1).inputs);
  }
  int64_t count() const { return strips * batches; }
  int64_t first_image(int64_t block) const { return part_start(batch, block % batches, batches); }
  int64_t image_count(int64_t block) const {
    return part_start(batch, block % batches + 1, batches) - first_image(block);
  }
  int64_t strip(int64_t block) const { return block / batches; }

 private:
  // Most products of an image's strip, of one parity (down) or phase (up)
  static int64_t products(const Geometry& g, int64_t strips) {
    return most(g, strips, [&](const Axis& axis, int64_t phase) { return axis.multiplications(g.up ? static_cast<int>(phase) : 0); });
  }
  // Most inputs of them: up's phases share many
  int64_t transformed(const Geometry& g) const {
    return most(g, strips, [](const Axis& axis, int64_t) { return axis.transformed(); });
  }
  template <typename Count>
  static int64_t most(const Geometry& g, int64_t strips, const Count& count) {
    int64_t rows = 0, columns = 0;
    for (int64_t a = 0; a < 2; ++a) {
      columns = max64(columns, count(g.column_axis(a), a));
      for (int64_t s = 0; s < strips; ++s) rows = max64(rows, count(g.row_axis(a, s, strips), a));
    }
    return rows * columns;
  }
};

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
