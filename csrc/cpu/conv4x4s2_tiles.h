// Minimal filtering for the 2-tap convolutions a kernel-4 stride-2 convolution falls into.
//
// One axis. With d the elements of one input parity (down) or the input itself (up), and g0, g1 two of the four taps,
// every part of the convolution is y[j] = d[j] g0 + d[j+1] g1. Three outputs take four multiplications, F(3, 2), with
// the points 0, 1, -1, infinity:
//
//   m0 = (d0 - d2) g0    m1 = (d1 + d2) (g0 + g1)/2    m2 = (d2 - d1) (g0 - g1)/2    m3 = (d3 - d1) g1
//   y0 = m0 + m1 + m2    y1 = m1 - m2                  y2 = m1 + m2 + m3
//
// Two outputs take three, F(2, 2), with the same transformed weights: m0 = (d0 - d1) g0, m1 = 2 d1 (g0 + g1)/2,
// m3 = (d2 - d1) g1, y0 = m0 + m1, y1 = m1 + m3. And where one of an output's two inputs is padding, the output is one
// product, by g0 or g1. So one set of four transformed weights serves an axis cut into any mixture of such segments:
// 4 outputs = 1 + 3 take 5 multiplications, 7 = 1 + 3 + 3 take 9, 8 = 3 + 3 + 2 take 11, 16 = 1 + 5 * 3 take 21, where
// the direct form takes two an output. In two dimensions the counts multiply: 39%, 41%, 47% and 43% of direct.
//
// Larger tiles, F(4, 2) with 5 products, need the point 2 or 1/2: measured on these layers their float32 error is 5 to 20
// times that of PyTorch's contiguous convolution, while F(3, 2) stays below 2 (and below PyTorch's channels_last).
#pragma once

#include "conv4x4s2_common.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int kMostPoints = 5;     // an axis
constexpr int kMaxSegments = 128;  // an axis: up to 3 * 127 outputs

struct Segment {
  int points;          // 5, 4, 3 or 1 multiplications for 4, 3, 2 or 1 outputs
  int input;           // where its inputs start
  int output[2];       // where its outputs start, for each phase
  int phases;          // bit i: phase i has these outputs
  bool edge;           // one of an axis' two single products for an output that meets padding, which not all phases have
  bool add;            // its output is another segment's as well
  int point[kMostPoints];  // which transformed weights
  int rank[kMostPoints];   // how many earlier segments of the axis, edges apart, use that point

  int end() const { return input + points; }  // of its inputs: as many as points
};

// An axis, or a strip of it, cut into segments.
//
// down: one phase, the outputs; `inputs` of them lie at origin, origin + 2, ..., those outside of the tensor are padding.
// up: two phases, of which output j of phase p has inputs j - 1 + p and j + p: both have the outputs between two neighbouring inputs, so
// these inputs are transformed once for both; an output with one neighbour only, the edge, is a single product.
struct Axis {
  int points;  // of the transformed weights: 4, or 5 where all tiles have four outputs
  int64_t origin, step, inputs;
  int64_t first[2] = {}, length[2] = {};  // a phase's outputs, counted from the tensor's first of that phase
  int count = 0;
  Segment segments[kMaxSegments];
  int uses[kMostPoints] = {};   // segments, edges apart, that use a point
  int edges[kMostPoints] = {};  // phases that have an edge of that point

  static Axis down(int points, int64_t first_output, int64_t outputs, int64_t parity, int64_t input_size) {
    Axis axis(points, 2 * first_output - 1 + parity, 2, outputs + 1);
    axis.first[0] = first_output;
    axis.length[0] = outputs;
    if (points == 5) {
      for (int64_t at = 0; at < outputs; at += 4) axis.add(5, at, at, 0);
      return axis;
    }
    const bool low_is_padding = axis.origin < 0, high_is_padding = axis.origin + 2 * outputs >= input_size;
    int64_t pairs = outputs % 3 == 2 ? 1 : 0, at = 0;
    bool low = false, high = false;
    if (outputs % 3 == 1) {
      low = low_is_padding;
      high = !low && high_is_padding;
      if (!low && !high) pairs = 2;
    }
    if (low) axis.add(1, 1, at++, kLast);
    at = axis.add_tiles(at, outputs - (low || high), pairs);
    if (high) axis.add(1, at, at, 0);
    return axis;
  }

  // The first output of a phase of up that strip number `strip` has; strip `strips` would begin behind the last one.
  static int64_t up_first(int64_t phase, int64_t strip, int64_t strips, int64_t input_size, int64_t output_size) {
    if (strip == 0) return 0;
    return strip == strips ? (output_size - phase + 1) / 2 : part_start(input_size - 1, strip, strips) + 1 - phase;
  }

  // Strip number `strip` of the outputs between neighbours, and what edges lie next to it.
  static Axis up(int64_t strip, int64_t strips, int64_t input_size, int64_t output_size) {
    const int64_t between = part_start(input_size - 1, strip, strips), end = part_start(input_size - 1, strip + 1, strips);
    const bool low = strip == 0, high = strip == strips - 1;
    Axis axis(4, between, 1, end - between + 1);
    for (int phase = 0; phase < 2; ++phase) {
      axis.first[phase] = up_first(phase, strip, strips, input_size, output_size);
      axis.length[phase] = up_first(phase, strip + 1, strips, input_size, output_size) - axis.first[phase];
    }
    const int64_t tiles = end - between;
    if (low) axis.add_edge(0, kLast, 1, 0);
    axis.shift = low ? 1 : 0;
    if (tiles == 1) {
      axis.add(1, 0, 0, 0);
      axis.add(1, 1, 0, kLast);
      axis.segments[axis.count - 1].add = true;
    } else {
      axis.add_tiles(0, tiles, tiles % 3 == 2 ? 1 : tiles % 3 == 1 ? 2 : 0);
    }
    if (high) axis.add_edge(tiles, 0, output_size % 2 == 0 ? 2 : 3, tiles);
    return axis;
  }

  // Of a phase
  int64_t multiplications(int phase) const {
    int64_t sum = 0;
    for (int i = 0; i < points; ++i) sum += uses[i] + has_edge(i, phase);
    return sum;
  }
  // Of all phases together
  int64_t transformed() const {
    int64_t sum = 0;
    for (int i = 0; i < points; ++i) sum += uses[i] + (edges[i] != 0);
    return sum;
  }
  int has_edge(int point, int phase) const { return edges[point] >> phase & 1; }

 private:
  static constexpr int kLast = 3;  // infinity, of the four points
  int shift = 0;  // up: outputs of phase 0 before the first between two neighbours

  Axis(int axis_points, int64_t first_input, int64_t input_step, int64_t input_count)
      : points(axis_points), origin(first_input), step(input_step), inputs(input_count) {}

  void add(int multiplications, int64_t input, int64_t output, int single_point) {
    Segment& s = segments[count++];
    s = {multiplications, static_cast<int>(input), {static_cast<int>(output) + shift, static_cast<int>(output)}, 3, false, false, {}, {}};
    for (int i = 0; i < multiplications; ++i) {
      s.point[i] = multiplications >= 4 ? i : multiplications == 3 ? (i == 2 ? kLast : i) : single_point;
      s.rank[i] = uses[s.point[i]]++;
    }
  }

  // Tiles of three outputs, and then some of two, from `at` on
  int64_t add_tiles(int64_t at, int64_t outputs, int64_t pairs) {
    for (const int64_t end = at + outputs - 2 * pairs; at < end; at += 3) add(4, at, at, 0);
    for (int64_t i = 0; i < pairs; ++i, at += 2) add(3, at, at, 0);
    return at;
  }

  void add_edge(int64_t input, int point, int phases, int64_t output) {
    edges[point] = phases;
    Segment& s = segments[count++];
    s = {1, static_cast<int>(input), {static_cast<int>(output) + shift, static_cast<int>(output)}, phases, true, false, {point}, {}};
  }
};

// The points of F(4, 2) next to 0: kNear, -kNear, kFar, -kFar, and their powers.
constexpr float kNear = 0.8125f, kNear2 = kNear * kNear, kNear3 = kNear2 * kNear;
constexpr float kFar = 2.375f, kFar2 = kFar * kFar, kFar3 = kFar2 * kFar;

// Transformed weights: what of the first tap and what of the second
constexpr float kNearScale = kFar2 / (2 * kNear2 * (kFar2 - kNear2)), kFarScale = 1 / (2 * kFar2 * (kFar2 - kNear2));
constexpr float kTapsOfFour[4][2] = {{1, 0}, {0.5f, 0.5f}, {0.5f, -0.5f}, {0, 1}};
constexpr float kTapsOfFive[5][2] = {{1, 0},
                                     {kNearScale, kNearScale * kNear},
                                     {kNearScale, -kNearScale * kNear},
                                     {kFarScale, kFarScale * kFar},
                                     {kFarScale, -kFarScale * kFar}};

template <int kPoints>
constexpr const float (&taps_of())[kPoints][2] {
  if constexpr (kPoints == 5)
    return kTapsOfFive;
  else
    return kTapsOfFour;
}

// d[points] -> data side of the products
template <int kN>
inline void input_transform(Vec* d, int stride) {
  if constexpr (kN == 5) {
    const Vec d0 = d[0], d1 = d[stride], d2 = d[2 * stride], d3 = d[3 * stride], d4 = d[4 * stride];
    const Vec near_even = d2 - d4 * (1 / kFar2), near_odd = (d1 - d3 * (1 / kFar2)) * kNear;
    const Vec far_even = d4 - d2 * kNear2, far_odd = (d3 - d1 * kNear2) * kFar;
    d[0] = (d0 - d2 * ((kNear2 + kFar2) / (kNear2 * kFar2))) + d4 * (1 / (kNear2 * kFar2));
    d[stride] = near_even + near_odd;
    d[2 * stride] = near_even - near_odd;
    d[3 * stride] = far_even + far_odd;
    d[4 * stride] = far_even - far_odd;
  } else if constexpr (kN == 4) {
    const Vec d1 = d[stride], d2 = d[2 * stride];
    d[0] = d[0] - d2;
    d[stride] = d1 + d2;
    d[2 * stride] = d2 - d1;
    d[3 * stride] = d[3 * stride] - d1;
  } else if constexpr (kN == 3) {
    const Vec d1 = d[stride];
    d[0] = d[0] - d1;
    d[stride] = d1 + d1;
    d[2 * stride] = d[2 * stride] - d1;
  }
}

// m[points] -> y in m[0 .. points - 2] (or m[0] for a single point)
template <int kN>
inline void output_transform(Vec* m, int stride) {
  if constexpr (kN == 5) {
    const Vec near_sum = m[stride] + m[2 * stride], near_difference = m[stride] - m[2 * stride];
    const Vec far_sum = m[3 * stride] + m[4 * stride], far_difference = m[3 * stride] - m[4 * stride];
    m[0] = m[0] + near_sum + far_sum;
    m[stride] = near_difference * kNear + far_difference * kFar;
    m[2 * stride] = near_sum * kNear2 + far_sum * kFar2;
    m[3 * stride] = near_difference * kNear3 + far_difference * kFar3;
  } else if constexpr (kN == 4) {
    const Vec sum = m[stride] + m[2 * stride], difference = m[stride] - m[2 * stride];
    m[0] = m[0] + sum;
    m[2 * stride] = sum + m[3 * stride];
    m[stride] = difference;
  } else if constexpr (kN == 3) {
    m[0] = m[0] + m[stride];
    m[stride] = m[stride] + m[2 * stride];
  }
}

// The transpose of output_transform, for the weight gradient: y in z[0 .. points - 2] -> z[points]
template <int kN>
inline void output_transform_transposed(Vec* z, int stride) {
  if constexpr (kN == 5) {
    const Vec y0 = z[0], y1 = z[stride], y2 = z[2 * stride], y3 = z[3 * stride];
    const Vec near_even = y0 + y2 * kNear2, near_odd = y1 * kNear + y3 * kNear3;
    const Vec far_even = y0 + y2 * kFar2, far_odd = y1 * kFar + y3 * kFar3;
    z[stride] = near_even + near_odd;
    z[2 * stride] = near_even - near_odd;
    z[3 * stride] = far_even + far_odd;
    z[4 * stride] = far_even - far_odd;
  } else if constexpr (kN == 4) {
    const Vec ends = z[0] + z[2 * stride], middle = z[stride];
    z[3 * stride] = z[2 * stride];
    z[stride] = ends + middle;
    z[2 * stride] = ends - middle;
  } else if constexpr (kN == 3) {
    const Vec y1 = z[stride];
    z[2 * stride] = y1;
    z[stride] = z[0] + y1;
  }
}

constexpr int outputs_of(int points) { return points == 1 ? 1 : points - 1; }

template <int kR, int kC>
void input_tile(const float* src, int64_t row, int64_t column, float* const* dst, int64_t channels) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vec d[kR * kC];
#pragma GCC unroll 5
    for (int i = 0; i < kR; ++i)
#pragma GCC unroll 5
      for (int j = 0; j < kC; ++j) d[i * kC + j] = load(src + i * row + j * column + c);
#pragma GCC unroll 5
    for (int j = 0; j < kC; ++j) input_transform<kR>(d + j, kC);
#pragma GCC unroll 5
    for (int i = 0; i < kR; ++i) input_transform<kC>(d + i * kC, 1);
#pragma GCC unroll 25
    for (int i = 0; i < kR * kC; ++i) store(dst[i] + c, d[i]);
  }
}

template <int kR, int kC>
void gradient_tile(const float* src, int64_t row, int64_t column, float* const* dst, int64_t channels) {
  constexpr int kRowOutputs = outputs_of(kR), kColumnOutputs = outputs_of(kC);
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vec z[kR * kC];
#pragma GCC unroll 5
    for (int i = 0; i < kRowOutputs; ++i)
#pragma GCC unroll 5
      for (int j = 0; j < kColumnOutputs; ++j) z[i * kC + j] = load(src + i * row + j * column + c);
#pragma GCC unroll 5
    for (int j = 0; j < kColumnOutputs; ++j) output_transform_transposed<kR>(z + j, kC);
#pragma GCC unroll 5
    for (int i = 0; i < kR; ++i) output_transform_transposed<kC>(z + i * kC, 1);
#pragma GCC unroll 25
    for (int i = 0; i < kR * kC; ++i) store(dst[i] + c, z[i]);
  }
}

template <int kR, int kC>
void output_tile(float* const* src, float* dst, int64_t row, int64_t column, int64_t channels, bool accumulate) {
  constexpr int kRowOutputs = outputs_of(kR), kColumnOutputs = outputs_of(kC);
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vec m[kR * kC];
#pragma GCC unroll 25
    for (int i = 0; i < kR * kC; ++i) m[i] = load(src[i] + c);
#pragma GCC unroll 5
    for (int j = 0; j < kC; ++j) output_transform<kR>(m + j, kC);
#pragma GCC unroll 5
    for (int i = 0; i < kRowOutputs; ++i) {
      output_transform<kC>(m + i * kC, 1);
#pragma GCC unroll 5
      for (int j = 0; j < kColumnOutputs; ++j) {
        float* p = dst + i * row + j * column + c;
        store(p, accumulate ? load(p) + m[i * kC + j] : m[i * kC + j]);
      }
    }
  }
}

// Calls f.template run<rows, columns>() with the numbers of points of two segments.
template <typename F>
inline void for_tile_shape(int row_points, int column_points, const F& f) {
  switch (row_points * 8 + column_points) {
    case 5 * 8 + 5: return f.template run<5, 5>();
    case 5 * 8 + 4: return f.template run<5, 4>();
    case 5 * 8 + 3: return f.template run<5, 3>();
    case 5 * 8 + 1: return f.template run<5, 1>();
    case 4 * 8 + 5: return f.template run<4, 5>();
    case 4 * 8 + 4: return f.template run<4, 4>();
    case 4 * 8 + 3: return f.template run<4, 3>();
    case 4 * 8 + 1: return f.template run<4, 1>();
    case 3 * 8 + 5: return f.template run<3, 5>();
    case 3 * 8 + 4: return f.template run<3, 4>();
    case 3 * 8 + 3: return f.template run<3, 3>();
    case 3 * 8 + 1: return f.template run<3, 1>();
    case 1 * 8 + 5: return f.template run<1, 5>();
    case 1 * 8 + 4: return f.template run<1, 4>();
    case 1 * 8 + 3: return f.template run<1, 3>();
    case 1 * 8 + 1: return f.template run<1, 1>();
  }
}

// Where the products of a block of images lie: one matrix a point pair, the matrices one after the other with an unused row between
// them: without it the 16 rows of a tile would often lie a multiple of 4 KiB apart and fight for the same few lines of the
// first-level cache. A matrix' rows are ordered (image, row segment, column segment), and where the axes have edges, so that those of
// any phase follow one another: (edge row, column segments), (row segments, column segments), (row segments, edge column), (edge row,
// edge column).
struct ProductRows {
  const Axis& rows;
  const Axis& columns;
  int64_t images;

  ProductRows(const Axis& row_axis, const Axis& column_axis, int64_t image_count)
      : rows(row_axis), columns(column_axis), images(image_count) {
    int64_t at = 0;
    for (int pair = 0; pair < pairs(); ++pair) {
      const int p = pair / columns.points, q = pair % columns.points;
      const bool edge_row = rows.edges[p] != 0, edge_column = columns.edges[q] != 0;
      base_[1][0][pair] = at;
      at += edge_row ? images * columns.uses[q] : 0;
      base_[0][0][pair] = at;
      at += images * rows.uses[p] * columns.uses[q];
      base_[0][1][pair] = at;
      at += edge_column ? images * rows.uses[p] : 0;
      base_[1][1][pair] = at;
      at += edge_row && edge_column ? images : 0;
      ++at;
    }
  }

  int pairs() const { return rows.points * columns.points; }

  // The rows of a point pair's matrix that two phases have: the first of them, and how many
  int64_t first(int pair, int row_phase) const {
    return base_[rows.has_edge(pair / columns.points, row_phase)][0][pair];
  }
  int64_t count(int pair, int row_phase, int column_phase) const {
    const int p = pair / columns.points, q = pair % columns.points;
    return images * (rows.uses[p] + rows.has_edge(p, row_phase)) * (columns.uses[q] + columns.has_edge(q, column_phase));
  }

  // The addresses, in a buffer of rows of `ld` floats, of the products of one tile.
  void addresses(float* buffer, int64_t ld, int64_t image, const Segment& r, const Segment& c, float** out) const {
    for (int i = 0; i < r.points; ++i) {
      const int p = r.point[i];
      const int64_t row = r.edge ? image : image * rows.uses[p] + r.rank[i];
      for (int j = 0; j < c.points; ++j) {
        const int q = c.point[j];
        *out++ = buffer + (base_[r.edge][c.edge][p * columns.points + q] + (c.edge ? row : row * columns.uses[q] + c.rank[j])) * ld;
      }
    }
  }

 private:
  int64_t base_[2][2][kMostPoints * kMostPoints];  // where the rows of a matrix start, by whether the row and the column segments are edges
};

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
