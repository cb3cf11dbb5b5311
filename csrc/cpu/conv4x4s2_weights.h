// The weights of down and up, as conv4x4s2_kernel.cpp has them: from PyTorch's layout to what the products read.
//
// A task transforms the 4 taps of an input parity (down) or output phase (up) to 16 just before their products: that costs a few
// percent of these, and a quarter of the memory traffic of transformed weights. Where it takes the taps from:
//
//   packed    all weights, put in the order of the products once a call: many blocks of images read them
//   gathered  the weight itself, a panel at a time: with one block of images a packed weight would be written to memory to be
//             read once, with two it takes the same time and more memory. 512 x 256 channels at 4 pixels, batch 16: a training
//             step of the 64 px networks takes 3% less, and 8 MiB
#pragma once

#include "conv4x4s2_blocks.h"
#include "conv4x4s2_gemm.h"
#include "parallel.h"
#include "transpose.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t kStreamed = 1 << 18;  // floats of packed weights that are written past the cache

// Packed weights: [parity pair][output block][input chunk][panel][chunk channels][4 taps][kPanel]
struct PackedWeights {
  int64_t input_channels, output_channels;  // the latter rounded up to whole panels
  explicit PackedWeights(const Geometry& g)
      : input_channels(g.input_channels), output_channels(round_up(g.output_channels, kPanel)) {}
  int64_t size() const { return 16 * input_channels * output_channels; }
  int64_t block_channels(int64_t k0) const { return min64(kOutputBlock, output_channels - k0); }
  int64_t chunk_channels(int64_t c0) const { return min64(kChunk, input_channels - c0); }
  // Start of a parity pair, output block and input chunk
  int64_t offset(int64_t parities, int64_t k0, int64_t c0) const {
    return 4 * (parities * input_channels * output_channels + k0 * input_channels + c0 * block_channels(k0));
  }
};

// taps[i * input + column] = tap t of weights in channels_last, of inputs [0, inputs) and outputs [0, columns)
inline void read_tap(const LoopShape& g, const float* weight, int64_t t, int64_t inputs, int64_t columns, float* taps, int64_t input) {
  const float* from = weight + t * g.weight_tap_stride();
  if (g.up) {
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t column = 0; column < columns; column += kLanes)
        store(taps + i * input + column, load(from + i * g.weight_input_stride() + column));
    return;
  }
  for (int64_t column = 0; column < columns; column += kSide)
    for (int64_t i = 0; i < inputs; i += kSide)
      transpose_square(from + column * g.weight_output_stride() + i, g.weight_output_stride(), taps + i * input + column, input);
}

void pack_wide(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, float* packed) {
  const Geometry g(shape, loop);
  const PackedWeights to(g);
  const int64_t input_stride = g.weight_input_stride(), output_stride = g.weight_output_stride();
  const int64_t panels = to.output_channels / kPanel, chunks = ceil_div(g.input_channels, kChunk);
  const bool past_cache = to.size() >= kStreamed;
  parallel_for(panels * chunks, [&](int64_t task) {
    const int64_t k = task / chunks * kPanel, c0 = task % chunks * kChunk;
    const int64_t k0 = k / kOutputBlock * kOutputBlock, chunk = to.chunk_channels(c0);
    const int64_t columns = min64(kPanel, g.output_channels - k);
    // A few channels are gathered before their vectors are read: a vector load right behind the single stores it spans waits
    // for them.
    constexpr int64_t kGathered = 8, kAhead = 4;
    float taps[kGathered][16][kPanel] = {};
    for (int64_t first = 0; first < chunk; first += kGathered) {
      const int64_t count = min64(kGathered, chunk - first);
      if (g.weight_last)
        for (int t = 0; t < 16; ++t)
          read_tap(g, weight + (c0 + first) * input_stride + k * output_stride, t, count, columns, taps[0][t], 16 * kPanel);
      else for (int64_t i = 0; i < count; ++i) {
        const float* w = weight + (c0 + first + i) * input_stride + k * output_stride;
        for (int64_t column = 0; column < columns; ++column)
          __builtin_prefetch(w + kAhead * input_stride + column * output_stride);
        if (kPanel % kSide == 0 && kLanes >= kSide) {
          for (int t = 0; t < 16; t += kSide)
            for (int64_t column = 0; column < columns; column += kSide)
              transpose_square(w + column * output_stride + t, output_stride, &taps[i][t][column], kPanel);
        } else {
          for (int64_t column = 0; column < columns; ++column)
            for (int t = 0; t < 16; ++t) taps[i][t][column] = w[column * output_stride + t];
        }
      }
      for (int a = 0; a < 2; ++a)
        for (int b = 0; b < 2; ++b) {
          // the two taps of each axis, in the order of the inputs they meet
          const int r[2] = {g.up ? 3 - a : a, g.up ? 1 - a : a + 2}, s[2] = {g.up ? 3 - b : b, g.up ? 1 - b : b + 2};
          float* dst = packed + to.offset(a * 2 + b, k0, c0) + ((k - k0) / kPanel * chunk + first) * 4 * kPanel;
          for (int64_t i = 0; i < count; ++i)
            for (int t = 0; t < 4; ++t)
              for (int64_t lane = 0; lane < kPanel; lane += kLanes, dst += kLanes) {
                const Vec tap = load(taps[i][r[t / 2] * 4 + s[t % 2]] + lane);
                past_cache ? stream(dst, tap) : store(dst, tap);
              }
        }
    }
    stream_fence();
  });
}

// Whether the loops gather: squares have to be worth transposing.
inline bool gathers_weights(const Blocks& blocks) {
  return kLanes >= kSide && blocks.count() <= 2;
}

#if defined(__clang__)
#define FASTGAN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTGAN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (IntVec{__VA_ARGS__}))
#endif

// Taps (kRow, kColumn), (kRow, kColumn + 2), (kRow + 2, kColumn), (kRow + 2, kColumn + 2) of some weights, each 4 x 4 taps that
// lie `stride` floats after those of the one before: taps[t][weight]. As many weights as a vector has lanes, or as a square sides.
template <int kRow, int kColumn>
inline void transpose_taps(const float* weight, int64_t stride, float* const* taps) {
#if defined(__AVX512F__)
  constexpr int c = kColumn, d = kColumn + 2, r = kRow * 4, s = r + 8;
  Vec fours[4];  // of four weights each: row kRow of the first two, row kRow + 2; then of the other two
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, weight += 4 * stride) {
    Vec pairs[2];  // of two weights each: the two columns of every row
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
      pairs[j] = FASTGAN_SHUFFLE(load(weight + 2 * j * stride), load(weight + (2 * j + 1) * stride), c, d, c + 16, d + 16, c + 4,
                                 d + 4, c + 20, d + 20, c + 8, d + 8, c + 24, d + 24, c + 12, d + 12, c + 28, d + 28);
    fours[i] = FASTGAN_SHUFFLE(pairs[0], pairs[1], r, r + 1, r + 2, r + 3, s, s + 1, s + 2, s + 3, r + 16, r + 17, r + 18, r + 19,
                               s + 16, s + 17, s + 18, s + 19);
  }
#pragma GCC unroll 2
  for (int row = 0; row < 2; ++row) {
    Vec eights[2];  // of eight weights each: the first column, the second
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Vec a = fours[2 * i], b = fours[2 * i + 1];
      eights[i] = row == 0 ? FASTGAN_SHUFFLE(a, b, 0, 2, 8, 10, 16, 18, 24, 26, 1, 3, 9, 11, 17, 19, 25, 27)
                           : FASTGAN_SHUFFLE(a, b, 4, 6, 12, 14, 20, 22, 28, 30, 5, 7, 13, 15, 21, 23, 29, 31);
    }
    store(taps[2 * row], FASTGAN_SHUFFLE(eights[0], eights[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23));
    store(taps[2 * row + 1], FASTGAN_SHUFFLE(eights[0], eights[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
  }
#else
  for (int half = 0; half < 2; ++half) {
    Side<float> square[kSide];
#pragma GCC unroll 8
    for (int j = 0; j < kSide; ++j) __builtin_memcpy(square + j, weight + j * stride + half * kSide, sizeof square[j]);
    transpose<float>(square);
    __builtin_memcpy(taps[2 * half], square + kRow * 4 + kColumn, sizeof *square);
    __builtin_memcpy(taps[2 * half + 1], square + kRow * 4 + kColumn + 2, sizeof *square);
  }
#endif
}

#undef FASTGAN_SHUFFLE

// The taps of one panel: [channels][4][kPanel]. kRow and kColumn are those of the first tap; up meets the four in the opposite
// order.
template <int kRow, int kColumn>
void gather_panel(const Geometry& g, const float* weight, int64_t channels, int64_t columns, float* taps) {
  if (g.weight_last) {
    for (int t = 0; t < 4; ++t) {
      const int tap = (kRow + t / 2 * 2) * 4 + kColumn + t % 2 * 2;
      read_tap(g, weight, tap, channels, columns, taps + (g.up ? 3 - t : t) * kPanel, 4 * kPanel);
    }
    return;
  }
  const int64_t input_stride = g.weight_input_stride(), output_stride = g.weight_output_stride();
  constexpr int64_t kTogether = kLanes > kSide ? kLanes : kSide;
  constexpr int64_t kCopied = 8;  // divides the channels of a chunk
  constexpr int64_t copy_stride = kCopied * 16 + kLineFloats;
  const auto transpose_to = [&](int64_t input, int64_t column, const float* from, int64_t stride) {
    float* to[4];
    for (int t = 0; t < 4; ++t) to[t] = taps + (input * 4 + (g.up ? 3 - t : t)) * kPanel + column;
    transpose_taps<kRow, kColumn>(from, stride, to);
  };
  if (g.up) {
    for (int64_t i = 0; i < channels; ++i)
      for (int64_t column = 0; column < columns; column += kTogether)
        transpose_to(i, column, weight + i * input_stride + column * output_stride, output_stride);
    return;
  }
  // The channels of an output follow one another, those of an input lie a power of two apart: read in that order, they fight for a
  // few sets of the cache, which made the whole loop a third slower at 512 x 256 channels, 4 pixels, batch 16.
  alignas(kLineBytes) float copy[kTogether * copy_stride];
  for (int64_t first = 0; first < channels; first += kCopied)
    for (int64_t column = 0; column < columns; column += kTogether) {
      const float* from = weight + first * input_stride + column * output_stride;
      for (int64_t j = 0; j < kTogether; ++j)
        for (int64_t i = 0; i < kCopied * 16; i += kLanes) store(copy + j * copy_stride + i, load(from + j * output_stride + i));
      for (int64_t i = 0; i < kCopied; ++i) transpose_to(first + i, column, copy + i * 16, copy_stride);
    }
}

// Where a loop's products take their taps from: what pack_wide wrote, or the weight itself.
struct WeightTaps {
  const Geometry& g;
  bool gathered;
  const float* data;
  PackedWeights packed;

  WeightTaps(const Geometry& geometry, const Blocks& blocks, const float* weight)
      : g(geometry), gathered(gathers_weights(blocks)), data(weight), packed(geometry) {}

  // Floats of memory that panel() needs
  int64_t memory() const { return gathered ? 4 * min64(kChunk, g.input_channels) * kPanel : 0; }

  // [chunk channels][4][kPanel] from output channel k of the block at k0 and input channel c0 on, of parity (or phase) a, b
  const float* panel(int64_t a, int64_t b, int64_t k0, int64_t k, int64_t c0, float* memory) const {
    const int64_t chunk = packed.chunk_channels(c0);
    if (!gathered) return data + packed.offset(a * 2 + b, k0, c0) + k * 4 * chunk;
    const float* weight = at(k0 + k, c0);
    const int64_t columns = min64(kPanel, g.output_channels - k0 - k);
    switch (g.up ? 3 - (a * 2 + b) : a * 2 + b) {
      case 0: gather_panel<0, 0>(g, weight, chunk, columns, memory); break;
      case 1: gather_panel<0, 1>(g, weight, chunk, columns, memory); break;
      case 2: gather_panel<1, 0>(g, weight, chunk, columns, memory); break;
      default: gather_panel<1, 1>(g, weight, chunk, columns, memory); break;
    }
    return memory;
  }

  // What the panel after that one is made of
  Ahead after(int64_t a, int64_t b, int64_t k0, int64_t k, int64_t c0) const {
    const int64_t chunk = packed.chunk_channels(c0);
    if (!gathered) return {panel(a, b, k0, k, c0, nullptr) + 4 * kPanel * chunk, kLineFloats, kLineFloats * chunk, kPanel / 4};
    if (g.weight_last) return {data, 0, 0, 0};  // in long runs, which the processor asks for by itself
    k += kPanel;
    if (k == packed.block_channels(k0)) k = 0, c0 = c0 + kChunk < g.input_channels ? c0 + kChunk : 0;
    return {at(k0 + k, c0), g.weight_input_stride(), g.weight_output_stride(), kPanel};
  }

 private:
  // A tap of the weight itself, of an output and an input channel
  const float* at(int64_t output, int64_t input) const {
    return data + input * g.weight_input_stride() + output * g.weight_output_stride();
  }
};

// One row of transformed weights: the columns that there are of taps[channels][4][kPanel] -> transformed[kPoints][channels][kPanel]
// with a line between them. A row of one panel at a time stays in the first-level cache until its products are done.
template <int kPoints>
void transform_weights(const float* taps, int64_t channels, int64_t columns, const float (&row)[2], float* transformed) {
  constexpr const float(&factors)[kPoints][2] = taps_of<kPoints>();
  const int64_t next = channels * kPanel + kLineFloats;
  for (int64_t i = 0; i < channels; ++i, taps += 4 * kPanel, transformed += kPanel)
    for (int64_t lane = 0; lane < columns; lane += kLanes) {
      Vec g[2];
#pragma GCC unroll 2
      for (int s = 0; s < 2; ++s) {
        const Vec g0 = load(taps + s * kPanel + lane), g1 = load(taps + (2 + s) * kPanel + lane);
        g[s] = row[1] == 0 ? g0 : row[0] == 0 ? g1 : g0 * row[0] + g1 * row[1];
      }
#pragma GCC unroll 6
      for (int q = 0; q < kPoints; ++q)
        store(transformed + q * next + lane,
              factors[q][1] == 0 ? g[0] : factors[q][0] == 0 ? g[1] : g[0] * factors[q][0] + g[1] * factors[q][1]);
    }
}

inline void transform_weights(const float* taps, int64_t channels, int64_t columns, int points, int row, float* transformed) {
  if (points == 4) return transform_weights<4>(taps, channels, columns, kTapsOfFour[row], transformed);
  if (points == 5) return transform_weights<5>(taps, channels, columns, kTapsOfFive[row], transformed);
  return transform_weights<6>(taps, channels, columns, kTapsOfSix[row], transformed);
}

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
