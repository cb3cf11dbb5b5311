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
// 4 outputs = 1 + 3 take 5 multiplications, 7 = 1 + 3 + 3 take 9, 6 = 3 + 3 take 8, where the direct form takes two an output.
//
// Four outputs take five, F(4, 2): 8 take 10 where 3 + 3 + 2 takes 11, 16 take 20 in place of 21. In two dimensions the counts multiply:
// 39% of direct at 4x4, 8x8 and 16x16 pixels, 41% at 7x7. Its points are 0, +-kNear and +-kFar: with p one of them and N the product of
// its differences from the others,
//
//   m_p = (sum over k of c_k d_k) / N * (g0 + p g1), c_k the coefficients of the product of all (x - q), q not p;  y_j = sum of p^j m_p
//
// The usual 1 and 2 (or 1/2) would multiply rounding errors. An output's error is a sum of independent ones, of variance
// p^2j |c/N|^2 |(1, p)|^2 each, in units of a product's; over the outputs of a tile that is least near the tangents of 36 and 72
// degrees, where the points of the projective line lie at equal angles: 1.7 times a direct sum's (root mean square) with 13/16 and 19/8,
// where F(3, 2) has 1.3, F(2, 2) 1.4 and five outputs would have 2.3 at best. Measured on these layers in both directions: 1.0 to 2.0
// times the error of PyTorch's contiguous convolution, and 0.6 to 1.8 times that of its channels_last.
#pragma once

#include "conv4x4s2_common.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int kMostPoints = 6;     // an axis
constexpr int kMaxSegments = 128;  // an axis: up to 3 * 127 outputs

// Tiles of an axis
enum class Tile { single, two, three, three_near, four };

constexpr int outputs_of(Tile tile) { return tile == Tile::single ? 1 : tile == Tile::two ? 2 : tile == Tile::four ? 4 : 3; }
constexpr int points_of(Tile tile) { return tile == Tile::single ? 1 : outputs_of(tile) + 1; }

struct Segment {
  Tile tile;
  int points;          // multiplications
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
  // Of the transformed weights: 4, for 0, 1, -1, infinity; 5, where all tiles have four outputs, for 0, kNear, -kNear, kFar, -kFar; or
  // 6, for these and infinity.
  int points;
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
      for (int64_t at = 0; at < outputs; at += 4) axis.add(Tile::four, at, at);
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
    if (low) axis.add_single(1, at++, axis.last());
    at = axis.add_tiles(at, outputs - (low || high), pairs);
    if (high) axis.add_single(at, at, 0);
    return axis;
  }

  // The first output of a phase of up that strip number `strip` has; strip `strips` would begin behind the last one.
  static int64_t up_first(int points, int64_t phase, int64_t strip, int64_t strips, int64_t input_size, int64_t output_size) {
    if (strip == 0) return 0;
    return strip == strips ? (output_size - phase + 1) / 2 : up_between(points, strip, strips, input_size) + 1 - phase;
  }

  // Strip number `strip` of the outputs between neighbours, and what edges lie next to it.
  static Axis up(int points, int64_t strip, int64_t strips, int64_t input_size, int64_t output_size) {
    const bool low = strip == 0, high = strip == strips - 1;
    const int64_t between = up_between(points, strip, strips, input_size);
    const int64_t end = high ? input_size - 1 : up_between(points, strip + 1, strips, input_size);
    Axis axis(points, between, 1, end - between + 1);
    for (int phase = 0; phase < 2; ++phase) {
      axis.first[phase] = up_first(points, phase, strip, strips, input_size, output_size);
      axis.length[phase] = up_first(points, phase, strip + 1, strips, input_size, output_size) - axis.first[phase];
    }
    const int64_t tiles = end - between;
    if (low) axis.add_edge(0, axis.last(), 1, 0);
    axis.shift = low ? 1 : 0;
    if (points == 6) {
      int64_t at = 0;
      for (; at + 4 <= tiles; at += 4) axis.add(Tile::four, at, at);
      if (at < tiles) axis.add(Tile::three_near, at, at);
    } else if (tiles == 1) {
      axis.add_single(0, 0, 0);
      axis.add_single(1, 0, axis.last());
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
  int last() const { return points - 1; }  // infinity, which five points are without
  int shift = 0;  // up: outputs of phase 0 before the first between two neighbours

  Axis(int axis_points, int64_t first_input, int64_t input_step, int64_t input_count)
      : points(axis_points), origin(first_input), step(input_step), inputs(input_count) {}

  // Where strip number `strip` begins, in outputs between neighbours. With six points their number is one less than a multiple of 4,
  // and the last strip has the one tile of three.
  static int64_t up_between(int points, int64_t strip, int64_t strips, int64_t input_size) {
    return points == 6 ? 4 * part_start(input_size / 4 - 1, strip, strips) : part_start(input_size - 1, strip, strips);
  }

  Segment& append(Tile tile, int64_t input, int64_t output, int phases) {
    Segment& s = segments[count++];
    const int at = static_cast<int>(output);
    s = {tile, points_of(tile), static_cast<int>(input), {at + shift, at}, phases, false, false, {}, {}};
    return s;
  }

  void add(Tile tile, int64_t input, int64_t output) {
    Segment& s = append(tile, input, output, 3);
    const bool ends_at_infinity = tile != Tile::four;
    for (int i = 0; i < s.points; ++i) s.rank[i] = uses[s.point[i] = ends_at_infinity && i == s.points - 1 ? last() : i]++;
  }

  void add_single(int64_t input, int64_t output, int point) {
    Segment& s = append(Tile::single, input, output, 3);
    s.rank[0] = uses[s.point[0] = point]++;
  }

  // Tiles of three outputs, and then some of two, from `at` on
  int64_t add_tiles(int64_t at, int64_t outputs, int64_t pairs) {
    for (const int64_t end = at + outputs - 2 * pairs; at < end; at += 3) add(Tile::three, at, at);
    for (int64_t i = 0; i < pairs; ++i, at += 2) add(Tile::two, at, at);
    return at;
  }

  void add_edge(int64_t input, int point, int phases, int64_t output) {
    edges[point] = phases;
    Segment& s = append(Tile::single, input, output, phases);
    s.edge = true;
    s.point[0] = point;
  }
};

// The points of F(4, 2) next to 0: kNear, -kNear, kFar, -kFar, and their powers.
constexpr float kNear = 0.8125f, kNear2 = kNear * kNear, kNear3 = kNear2 * kNear;
constexpr float kFar = 2.375f, kFar2 = kFar * kFar, kFar3 = kFar2 * kFar;

// Transformed weights of 4, 5 and 6 points: what of the first tap and what of the second
constexpr float kNearScale = kFar2 / (2 * kNear2 * (kFar2 - kNear2)), kFarScale = 1 / (2 * kFar2 * (kFar2 - kNear2));
constexpr float kTapsOfFour[4][2] = {{1, 0}, {0.5f, 0.5f}, {0.5f, -0.5f}, {0, 1}};
constexpr float kTapsOfFive[5][2] = {{1, 0},
                                     {kNearScale, kNearScale * kNear},
                                     {kNearScale, -kNearScale * kNear},
                                     {kFarScale, kFarScale * kFar},
                                     {kFarScale, -kFarScale * kFar}};
constexpr float kTapsOfSix[6][2] = {{1, 0},
                                    {kNearScale, kNearScale * kNear},
                                    {kNearScale, -kNearScale * kNear},
                                    {kFarScale, kFarScale * kFar},
                                    {kFarScale, -kFarScale * kFar},
                                    {0, 1}};

template <int kPoints>
constexpr const float (&taps_of())[kPoints][2] {
  if constexpr (kPoints == 4)
    return kTapsOfFour;
  else if constexpr (kPoints == 5)
    return kTapsOfFive;
  else
    return kTapsOfSix;
}

// d[points] -> data side of the products
template <Tile kTile>
[[gnu::always_inline]] inline void input_transform(Vec* d, int stride) {
  if constexpr (kTile == Tile::four) {
    const Vec d0 = d[0], d1 = d[stride], d2 = d[2 * stride], d3 = d[3 * stride], d4 = d[4 * stride];
    const Vec near_even = d2 - d4 * (1 / kFar2), near_odd = (d1 - d3 * (1 / kFar2)) * kNear;
    const Vec far_even = d4 - d2 * kNear2, far_odd = (d3 - d1 * kNear2) * kFar;
    d[0] = (d0 - d2 * ((kNear2 + kFar2) / (kNear2 * kFar2))) + d4 * (1 / (kNear2 * kFar2));
    d[stride] = near_even + near_odd;
    d[2 * stride] = near_even - near_odd;
    d[3 * stride] = far_even + far_odd;
    d[4 * stride] = far_even - far_odd;
  } else if constexpr (kTile == Tile::three_near) {
    constexpr float kScale = 1 / (2 * kNear2 * kNearScale);
    const Vec d1 = d[stride], d2 = d[2 * stride], even = d2 * kScale, odd = d1 * (kScale * kNear);
    d[0] = d[0] - d2 * (1 / kNear2);
    d[stride] = even + odd;
    d[2 * stride] = even - odd;
    d[3 * stride] = d[3 * stride] - d1 * kNear2;
  } else if constexpr (kTile == Tile::three) {
    const Vec d1 = d[stride], d2 = d[2 * stride];
    d[0] = d[0] - d2;
    d[stride] = d1 + d2;
    d[2 * stride] = d2 - d1;
    d[3 * stride] = d[3 * stride] - d1;
  } else if constexpr (kTile == Tile::two) {
    const Vec d1 = d[stride];
    d[0] = d[0] - d1;
    d[stride] = d1 + d1;
    d[2 * stride] = d[2 * stride] - d1;
  }
}

// m[points] -> y in m[0 .. points - 2] (or m[0] for a single point)
template <Tile kTile>
[[gnu::always_inline]] inline void output_transform(Vec* m, int stride) {
  if constexpr (kTile == Tile::four) {
    const Vec near_sum = m[stride] + m[2 * stride], near_difference = m[stride] - m[2 * stride];
    const Vec far_sum = m[3 * stride] + m[4 * stride], far_difference = m[3 * stride] - m[4 * stride];
    m[0] = m[0] + near_sum + far_sum;
    m[stride] = near_difference * kNear + far_difference * kFar;
    m[2 * stride] = near_sum * kNear2 + far_sum * kFar2;
    m[3 * stride] = near_difference * kNear3 + far_difference * kFar3;
  } else if constexpr (kTile == Tile::three_near) {
    const Vec sum = m[stride] + m[2 * stride], difference = m[stride] - m[2 * stride];
    m[0] = m[0] + sum;
    m[stride] = difference * kNear;
    m[2 * stride] = sum * kNear2 + m[3 * stride];
  } else if constexpr (kTile == Tile::three) {
    const Vec sum = m[stride] + m[2 * stride], difference = m[stride] - m[2 * stride];
    m[0] = m[0] + sum;
    m[2 * stride] = sum + m[3 * stride];
    m[stride] = difference;
  } else if constexpr (kTile == Tile::two) {
    m[0] = m[0] + m[stride];
    m[stride] = m[stride] + m[2 * stride];
  }
}

// The transpose of output_transform, for the weight gradient: y in z[0 .. points - 2] -> z[points]
template <Tile kTile>
[[gnu::always_inline]] inline void output_transform_transposed(Vec* z, int stride) {
  if constexpr (kTile == Tile::four) {
    const Vec y0 = z[0], y1 = z[stride], y2 = z[2 * stride], y3 = z[3 * stride];
    const Vec near_even = y0 + y2 * kNear2, near_odd = y1 * kNear + y3 * kNear3;
    const Vec far_even = y0 + y2 * kFar2, far_odd = y1 * kFar + y3 * kFar3;
    z[stride] = near_even + near_odd;
    z[2 * stride] = near_even - near_odd;
    z[3 * stride] = far_even + far_odd;
    z[4 * stride] = far_even - far_odd;
  } else if constexpr (kTile == Tile::three_near) {
    const Vec even = z[0] + z[2 * stride] * kNear2, odd = z[stride] * kNear;
    z[3 * stride] = z[2 * stride];
    z[stride] = even + odd;
    z[2 * stride] = even - odd;
  } else if constexpr (kTile == Tile::three) {
    const Vec ends = z[0] + z[2 * stride], middle = z[stride];
    z[3 * stride] = z[2 * stride];
    z[stride] = ends + middle;
    z[2 * stride] = ends - middle;
  } else if constexpr (kTile == Tile::two) {
    const Vec y1 = z[stride];
    z[2 * stride] = y1;
    z[stride] = z[0] + y1;
  }
}

template <Tile kRow, Tile kColumn>
void input_tile(const float* src, int64_t row, int64_t column, float* const* dst, int64_t channels) {
  constexpr int kR = points_of(kRow), kC = points_of(kColumn);
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vec d[kR * kC];
#pragma GCC unroll 5
    for (int i = 0; i < kR; ++i)
#pragma GCC unroll 5
      for (int j = 0; j < kC; ++j) d[i * kC + j] = load(src + i * row + j * column + c);
#pragma GCC unroll 5
    for (int j = 0; j < kC; ++j) input_transform<kRow>(d + j, kC);
#pragma GCC unroll 5
    for (int i = 0; i < kR; ++i) input_transform<kColumn>(d + i * kC, 1);
#pragma GCC unroll 25
    for (int i = 0; i < kR * kC; ++i) store(dst[i] + c, d[i]);
  }
}

template <Tile kRow, Tile kColumn>
void gradient_tile(const float* src, int64_t row, int64_t column, float* const* dst, int64_t channels) {
  constexpr int kR = points_of(kRow), kC = points_of(kColumn);
  constexpr int kRowOutputs = outputs_of(kRow), kColumnOutputs = outputs_of(kColumn);
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vec z[kR * kC];
#pragma GCC unroll 5
    for (int i = 0; i < kRowOutputs; ++i)
#pragma GCC unroll 5
      for (int j = 0; j < kColumnOutputs; ++j) z[i * kC + j] = load(src + i * row + j * column + c);
#pragma GCC unroll 5
    for (int j = 0; j < kColumnOutputs; ++j) output_transform_transposed<kRow>(z + j, kC);
#pragma GCC unroll 5
    for (int i = 0; i < kR; ++i) output_transform_transposed<kColumn>(z + i * kC, 1);
#pragma GCC unroll 25
    for (int i = 0; i < kR * kC; ++i) store(dst[i] + c, z[i]);
  }
}

template <Tile kRow, Tile kColumn>
void output_tile(float* const* src, float* dst, int64_t row, int64_t column, int64_t channels, bool accumulate) {
  constexpr int kR = points_of(kRow), kC = points_of(kColumn);
  constexpr int kRowOutputs = outputs_of(kRow), kColumnOutputs = outputs_of(kColumn);
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vec m[kR * kC];
#pragma GCC unroll 25
    for (int i = 0; i < kR * kC; ++i) m[i] = load(src[i] + c);
#pragma GCC unroll 5
    for (int j = 0; j < kC; ++j) output_transform<kRow>(m + j, kC);
#pragma GCC unroll 5
    for (int i = 0; i < kRowOutputs; ++i) {
      output_transform<kColumn>(m + i * kC, 1);
#pragma GCC unroll 5
      for (int j = 0; j < kColumnOutputs; ++j) {
        float* p = dst + i * row + j * column + c;
        store(p, accumulate ? load(p) + m[i * kC + j] : m[i * kC + j]);
      }
    }
  }
}

// Calls f.template run<row, column>() with the tiles of two segments.
template <Tile kRow, typename F>
inline void for_column_tile(Tile column, const F& f) {
  switch (column) {
    case Tile::single: return f.template run<kRow, Tile::single>();
    case Tile::two: return f.template run<kRow, Tile::two>();
    case Tile::three: return f.template run<kRow, Tile::three>();
    case Tile::three_near: return f.template run<kRow, Tile::three_near>();
    case Tile::four: return f.template run<kRow, Tile::four>();
  }
}

template <typename F>
inline void for_tiles(const Segment& row, const Segment& column, const F& f) {
  switch (row.tile) {
    case Tile::single: return for_column_tile<Tile::single>(column.tile, f);
    case Tile::two: return for_column_tile<Tile::two>(column.tile, f);
    case Tile::three: return for_column_tile<Tile::three>(column.tile, f);
    case Tile::three_near: return for_column_tile<Tile::three_near>(column.tile, f);
    case Tile::four: return for_column_tile<Tile::four>(column.tile, f);
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
