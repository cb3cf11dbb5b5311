// Main loops for layers whose large grid is a thin image (up to four channels) and whose small grid has channels in
// 64s, 16-bit storage, stride 2, nothing to do while loading. The generic loops read such images element by element and
// pad their few columns to a tile's; these are limited by the small grid's memory traffic alone.
//
//   down             image rows lie in shared memory with their zero border. The window of output pixel q in a kernel
//                    row is 4 * channels neighbouring elements there, at an even offset: fragments of A are read
//                    straight from the rows, 16 * channels deep, with no im2col. The weights stay in registers.
//   up               products [small pixel, 16 taps * channels] whose A is copied ahead from global memory, 16 bytes a
//                    lane, which reads its own again: the order of the summed channels is free as long as both operands
//                    agree, so that a lane's 16 bytes are fragments of two steps. Every warp walks down 16 columns of an
//                    image: the sums of the two rows that an output row needs meet in its registers. Those of
//                    neighbouring columns meet in shared memory, float32, two output rows at a time.
//   weight gradient  every warp takes 16 pixels as one step of depth and sums the whole 64 x 16 * channels result.
//
// Down and the weight gradient cut the small grid into tiles of whole rows, at most 128 pixels, and walk over them with
// as many blocks as the device holds at a time; each block writes one row of statistics or one partial result.
//
// 3 channels at 64 px, 64 at 32 px, batch 128, bfloat16, on an H200, in us (the loops of conv4x4s2_gather.cuh and conv4x4s2_weight.cuh before
// them): down with activation 9 (50), with the activation's derivative 16 (77), up 11 (129), weight gradient 13 (281).
#pragma once

#include <algorithm>
#include <type_traits>

#include "activation.cuh"
#include "conv4x4s2_product.cuh"
#include "device.cuh"

namespace fastgan::cuda {

constexpr int kThinThreads = 256, kThinWarps = kThinThreads / kWarpSize;
constexpr int kThinPixels = 128;   // most in a tile
constexpr int kThinColumns = 64;   // channels of the small grid that a block takes
constexpr int kThinFetches = 5;    // words of image rows that a thread holds for the next tile
constexpr int kThinMargin = 4;     // elements staged before a row's first one: a pixel of padding, rounded up to even

struct alignas(8) ThinPair {
  float first, second;
};

// Tiles of the small grid: whole rows.
struct ThinGrid {
  const void* image;  // [batch, large_height, large_width, channels]
  int small_height, small_width, large_height;
  int row_elements;  // of an image row: large_width * channels
  int rows;          // of the small grid, in a tile
  int tiles;         // of the batch
  FastDivisor tiles_per_image;
  FastDivisor width;  // small_width
};

// And the image rows under them, in 16 bits.
struct ThinTiles : ThinGrid {
  FastDivisor pairs;  // of elements, in a staged row
  int words;          // staged a tile, two elements each
  int row_stride;     // of a staged row, in elements; even
  bool paired;        // the image can be read in words
};

__device__ __forceinline__ int thin_row_of_tile(const ThinGrid& t, int tile, int& n) {
  n = t.tiles_per_image.divide(tile);
  return (tile - n * static_cast<int>(t.tiles_per_image.divisor)) * t.rows;
}

// First pixel of a tile, counted through the batch, and how many it has: whole rows, one after the other.
__device__ __forceinline__ int64_t thin_pixels(const ThinGrid& t, int tile, int& count) {
  int n;
  const int row = thin_row_of_tile(t, tile, n);
  const int rows = t.small_height - row;
  count = (rows < t.rows ? rows : t.rows) * t.small_width;
  return (int64_t{n} * t.small_height + row) * t.small_width;
}

// This thread's share of the image rows under a tile: in flight until it is stored.
__device__ __forceinline__ void fetch_image_rows(const ThinTiles& t, int tile, uint32_t (&fetched)[kThinFetches]) {
  int n;
  const int first_row = 2 * thin_row_of_tile(t, tile, n) - 1;
  const uint16_t* image = static_cast<const uint16_t*>(t.image) + int64_t{n} * t.large_height * t.row_elements;
#pragma unroll
  for (int i = 0; i < kThinFetches; ++i) {
    fetched[i] = 0;
    if (i * kThinThreads >= t.words) continue;
    const int index = static_cast<int>(threadIdx.x) + i * kThinThreads;
    const int row = t.pairs.divide(index);
    const int element = 2 * (index - row * static_cast<int>(t.pairs.divisor)) - kThinMargin;
    const int h = first_row + row;
    if (index >= t.words || static_cast<unsigned>(h) >= static_cast<unsigned>(t.large_height)) continue;
    const int64_t offset = int64_t{h} * t.row_elements + element;
    const bool first = static_cast<unsigned>(element) < static_cast<unsigned>(t.row_elements);
    if (t.paired) {
      if (first) fetched[i] = *reinterpret_cast<const uint32_t*>(image + offset);
    } else {
      const bool second = static_cast<unsigned>(element + 1) < static_cast<unsigned>(t.row_elements);
      if (first) fetched[i] = image[offset];
      if (second) fetched[i] |= uint32_t{image[offset + 1]} << 16;
    }
  }
}

// The image rows under a tile, copied ahead. The rows' words lie as in memory here, for an odd number of channels too.
__device__ __forceinline__ void copy_image_rows(const ThinTiles& t, int tile, uint16_t* stage) {
  int n;
  const int first_row = 2 * thin_row_of_tile(t, tile, n) - 1;
  const uint16_t* image = static_cast<const uint16_t*>(t.image) + int64_t{n} * t.large_height * t.row_elements;
#pragma unroll
  for (int i = 0; i < kThinFetches; ++i) {
    const int index = static_cast<int>(threadIdx.x) + i * kThinThreads;
    if (index >= t.words) continue;
    const int row = t.pairs.divide(index), place = 2 * (index - row * static_cast<int>(t.pairs.divisor));
    const int element = place - kThinMargin, h = first_row + row;
    const bool row_exists = static_cast<unsigned>(h) < static_cast<unsigned>(t.large_height);
    const bool first = row_exists && static_cast<unsigned>(element) < static_cast<unsigned>(t.row_elements);
    const int64_t offset = int64_t{h} * t.row_elements + element;
    uint16_t* pair = stage + row * t.row_stride + place;
    if (t.paired) {
      copy_async_word(pair, first ? image + offset : image, first);
    } else {
      const bool second = row_exists && static_cast<unsigned>(element + 1) < static_cast<unsigned>(t.row_elements);
      pair[0] = first ? image[offset] : uint16_t{0};
      pair[1] = second ? image[offset + 1] : uint16_t{0};
    }
  }
}

// With an odd number of channels rows are staged one element further on, so that windows start at even offsets.
template <int kChannels>
__device__ __forceinline__ void store_image_rows(const ThinTiles& t, const uint32_t (&fetched)[kThinFetches],
                                                 uint16_t* stage) {
#pragma unroll
  for (int i = 0; i < kThinFetches; ++i) {
    const int index = static_cast<int>(threadIdx.x) + i * kThinThreads;
    if (index >= t.words) continue;
    const int row = t.pairs.divide(index);
    uint16_t* pair = stage + row * t.row_stride + 2 * (index - row * static_cast<int>(t.pairs.divisor));
    if constexpr (kChannels % 2 == 0) {
      *reinterpret_cast<uint32_t*>(pair) = fetched[i];
    } else {
      pair[1] = static_cast<uint16_t>(fetched[i]);
      pair[2] = static_cast<uint16_t>(fetched[i] >> 16);
    }
  }
}

// Where the window of a tile's pixel begins in the staged rows. Pixels beyond the tile look at its first one.
template <int kChannels>
__device__ __forceinline__ int staged_window(const ThinTiles& t, int pixel) {
  if (pixel >= t.rows * t.small_width) pixel = 0;
  const int row = t.width.divide(pixel), column = pixel - row * t.small_width;
  return 2 * (row * t.row_stride + column * kChannels) + kThinMargin - kChannels + kChannels % 2;
}

// Where element j of a window lies in the staged rows, from the window's beginning.
template <int kChannels>
__device__ __forceinline__ int staged_element(const ThinTiles& t, int j) {
  return j / (4 * kChannels) * t.row_stride + j % (4 * kChannels);
}

template <Activation kKind>
struct ActivationConstant {
  __device__ operator Activation() const { return kKind; }
};

// Calls f with the activation as a constant where it takes few instructions, so that what f unrolls does not branch.
template <typename F>
__device__ __forceinline__ void with_activation(Activation kind, const F& f) {
  switch (kind) {
    case Activation::relu: return f(ActivationConstant<Activation::relu>{});
    case Activation::leaky_relu: return f(ActivationConstant<Activation::leaky_relu>{});
    case Activation::identity: return f(ActivationConstant<Activation::identity>{});
    default: return f(kind);
  }
}

// --- down ------------------------------------------------------------------------------------------------------------

struct ThinDownParams {
  ThinTiles tiles;
  const void* weight;  // [small_channels, 16 * channels]
  void* output;        // [batch, small_height, small_width, small_channels]
  int small_channels;
  Conv4x4Epilogue epilogue;
  bool aligned;  // output and epilogue.y can be accessed 16 bytes at a time
};

// A warp has 32 pixels and 32 channels of a block's 128 x 64.
constexpr int kThinResultBytes = 32 * 32 * 2;  // of a warp
constexpr int kThinWarpRows = 4;               // of warps, in a block

// The epilogue is one of bias_activation (which does for store), statistics and activation_backward: known to the
// compiler, it leaves registers enough for two blocks on a multiprocessor (of two or four channels, for one).
template <typename T, int kChannels, Conv4x4Epilogue::Kind kEpilogue>
__global__ void __launch_bounds__(kThinThreads, kChannels % 2 == 0 ? 1 : 2) thin_down_kernel(ThinDownParams p) {
  wait_for_previous_kernel();
  using Kind = Conv4x4Epilogue::Kind;
  constexpr bool kBackward = kEpilogue == Kind::activation_backward, kStatistics = kEpilogue == Kind::statistics;
  const Conv4x4Epilogue& epilogue = p.epilogue;
  const ThinTiles& tiles = p.tiles;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int group = lane / 4, member = lane % 4;
  const int warp_row = warp % kThinWarpRows, warp_column = warp / kThinWarpRows * 32;
  const int block_channel = static_cast<int>(blockIdx.y) * kThinColumns, first_channel = block_channel + warp_column;

  // Shared memory: two result buffers a warp (the second for the next tile's y), per-channel arrays, two stages of
  // image rows.
  char* memory = static_cast<char*>(shared_memory());
  char* results = memory + warp * 2 * kThinResultBytes;
  float* coefficients = reinterpret_cast<float*>(memory + kThinWarps * 2 * kThinResultBytes);
  uint16_t* stages = reinterpret_cast<uint16_t*>(coefficients + 4 * kThinColumns);
  const int stage_elements = (2 * tiles.rows + 2) * tiles.row_stride;
  if (thread < kThinColumns) {
    const float* const arrays[4] = {epilogue.bias, epilogue.scale, epilogue.shift, epilogue.mean};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      coefficients[i * kThinColumns + thread] =
          arrays[i] != nullptr ? arrays[i][block_channel + thread] : (i == 1 ? 1.0f : 0.0f);
    }
  }

  uint32_t weights[kChannels][4][2];
#pragma unroll
  for (int step = 0; step < kChannels; ++step) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const T* row = static_cast<const T*>(p.weight) + int64_t{first_channel + j * 8 + group} * (16 * kChannels);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        weights[step][j][h] = *reinterpret_cast<const uint32_t*>(row + step * 16 + h * 8 + member * 2);
      }
    }
  }
  int windows[4], elements[kChannels][2];  // of this lane's pixels and pairs of depth
#pragma unroll
  for (int r = 0; r < 4; ++r) windows[r] = staged_window<kChannels>(tiles, warp_row * 32 + group + r * 8);
#pragma unroll
  for (int step = 0; step < kChannels; ++step) {
#pragma unroll
    for (int h = 0; h < 2; ++h) elements[step][h] = staged_element<kChannels>(tiles, step * 16 + h * 8 + member * 2);
  }

  const auto coefficient = [&](int array, int j) {
    return *reinterpret_cast<const ThinPair*>(coefficients + array * kThinColumns + warp_column + j * 8 + member * 2);
  };

  // A pixel's 32 channels are 64 bytes of the warp's buffer, four 16-byte chunks in an order that no access conflicts
  // in: neither the fragments' words (chunk: the tile of columns) nor a lane's 16 bytes (chunk: its place in a group).
  const auto chunk_offset = [&](int r, int chunk) { return (group + r * 8) * 64 + (chunk ^ (group / 2)) * 16; };
  const int lane_offset = (warp_row * 32 + group) * p.small_channels + first_channel + member * 8;
  const auto pixel_offset = [&](int64_t first_pixel, int r) {
    return first_pixel * p.small_channels + (lane_offset + r * 8 * p.small_channels);
  };
  const auto load_previous = [&](int tile, char* buffer) {
    int count;
    const int64_t first_pixel = thin_pixels(tiles, tile, count);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const bool valid = warp_row * 32 + group + r * 8 < count;
      const T* y = static_cast<const T*>(epilogue.y) + (valid ? pixel_offset(first_pixel, r) : 0);
      T* chunk = reinterpret_cast<T*>(buffer + chunk_offset(r, member));
      if (p.aligned) {
        copy_async(chunk, y, valid);
      } else {
        for (int e = 0; e < 8; ++e) chunk[e] = valid ? y[e] : T{0};
      }
    }
  };

  float first_sums[4][2] = {}, second_sums[4][2] = {};  // of this lane's channels, over its pixels
  int block_count = 0;
  uint32_t fetched[kThinFetches];
  int current = 0;
  const int first_tile = static_cast<int>(blockIdx.x), tile_step = static_cast<int>(gridDim.x);
  fetch_image_rows(tiles, first_tile, fetched);
  if constexpr (kBackward) {
    load_previous(first_tile, results);
    copy_async_commit();
  }
  for (int tile = first_tile; tile < tiles.tiles; tile += tile_step, current ^= 1) {
    const uint16_t* stage = stages + current * stage_elements;
    char* buffer = results + current * kThinResultBytes;
    store_image_rows<kChannels>(tiles, fetched, stages + current * stage_elements);
    const int next = tile + tile_step;
    if (next < tiles.tiles) fetch_image_rows(tiles, next, fetched);
    block_barrier();  // the rows are complete, and everyone has left what is overwritten from here on
    if constexpr (kBackward) {
      if (next < tiles.tiles) load_previous(next, results + (current ^ 1) * kThinResultBytes);
      copy_async_commit();
    }

    float sums[2][4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const ThinPair bias = coefficient(0, j);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sums[i][j][0] = sums[i][j][2] = bias.first;
        sums[i][j][1] = sums[i][j][3] = bias.second;
      }
    }
#pragma unroll
    for (int step = 0; step < kChannels; ++step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t a[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          a[e] = *reinterpret_cast<const uint32_t*>(stage + windows[i * 2 + e % 2] + elements[step][e / 2]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_m16n8k16(sums[i][j], a, weights[step][j], T{});
      }
    }

    int count;
    const int64_t first_pixel = thin_pixels(tiles, tile, count);
    bool valid[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) valid[r] = warp_row * 32 + group + r * 8 < count;
    if constexpr (kBackward) {
      copy_async_wait<1>();
      warp_barrier();
      with_activation(epilogue.activation.kind, [&](auto activation) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const ThinPair scales = coefficient(1, j), shifts = coefficient(2, j), means = coefficient(3, j);
          const float scale[2] = {scales.first, scales.second}, shift[2] = {shifts.first, shifts.second};
          const float mean[2] = {means.first, means.second};
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            float* v = sums[r / 2][j] + r % 2 * 2;
            uint32_t* word = reinterpret_cast<uint32_t*>(buffer + chunk_offset(r, j)) + member;
            float y[2];
            unpack_pair(*word, y, T{});
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              v[h] *= activation_derivative(activation, epilogue.activation.negative_slope,
                                            fmaf(scale[h], y[h], shift[h]));
              const float counted = valid[r] ? v[h] : 0.0f;
              first_sums[j][h] += counted;
              second_sums[j][h] = fmaf(counted, y[h] - mean[h], second_sums[j][h]);
            }
            *word = pack_pair(v[0], v[1], T{});
          }
        }
      });
    } else {
      if constexpr (!kStatistics) {
        with_activation(epilogue.activation.kind, [&](auto activation) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                sums[i][j][e] = activate(activation, epilogue.activation.negative_slope, sums[i][j][e]);
              }
            }
          }
        });
      } else {
        // Deviations from the block's first values: sums of their squares lose nothing to a large mean.
        if (tile == first_tile) {
          if (warp_row == 0 && group == 0) {
            float* origins = coefficients + kThinColumns + warp_column + member * 2;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              *reinterpret_cast<ThinPair*>(origins + j * 8) = {sums[0][j][0], sums[0][j][1]};
            }
          }
          block_barrier();
        }
        block_count += count;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const ThinPair origin = coefficient(1, j);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              const float deviation =
                  valid[r] ? sums[r / 2][j][r % 2 * 2 + h] - (h == 0 ? origin.first : origin.second) : 0.0f;
              first_sums[j][h] += deviation;
              second_sums[j][h] = fmaf(deviation, deviation, second_sums[j][h]);
            }
          }
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float* v = sums[r / 2][j] + r % 2 * 2;
          reinterpret_cast<uint32_t*>(buffer + chunk_offset(r, j))[member] = pack_pair(v[0], v[1], T{});
        }
      }
    }
    warp_barrier();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (!valid[r]) continue;
      T* output = static_cast<T*>(p.output) + pixel_offset(first_pixel, r);
      const T* chunk = reinterpret_cast<const T*>(buffer + chunk_offset(r, member));
      if (p.aligned) {
        *reinterpret_cast<uint4*>(output) = *reinterpret_cast<const uint4*>(chunk);
      } else {
        for (int e = 0; e < 8; ++e) output[e] = chunk[e];
      }
    }
  }
  if constexpr (kBackward) copy_async_wait<0>();
  if constexpr (!kBackward && !kStatistics) return;

  // Over the lanes of a warp that share channels, then over the rows of warps. The result buffers are free by now.
  block_barrier();
  float* firsts = reinterpret_cast<float*>(memory);
  float* seconds = firsts + kThinWarpRows * kThinColumns;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float first = first_sums[j][h], second = second_sums[j][h];
#pragma unroll
      for (int mask = 4; mask < kWarpSize; mask *= 2) {
        first += shuffle_xor(first, mask);
        second += shuffle_xor(second, mask);
      }
      if (group == 0) {
        const int column = warp_row * kThinColumns + warp_column + j * 8 + member * 2 + h;
        firsts[column] = first;
        seconds[column] = second;
      }
    }
  }
  block_barrier();
  if (thread >= kThinColumns) return;
  float first = 0.0f, second = 0.0f;
  for (int row = 0; row < kThinWarpRows; ++row) {
    first += firsts[row * kThinColumns + thread];
    second += seconds[row * kThinColumns + thread];
  }
  const int channel = block_channel + thread;
  const int64_t offset = int64_t{blockIdx.x} * p.small_channels + channel;
  if constexpr (kBackward) {
    if (epilogue.gradients.sum_dz != nullptr) epilogue.gradients.sum_dz[offset] = first;
    if (epilogue.gradients.sum_dz_xhat != nullptr) {
      epilogue.gradients.sum_dz_xhat[offset] = second * (epilogue.invstd != nullptr ? epilogue.invstd[channel] : 1.0f);
    }
  } else {
    const float count = static_cast<float>(block_count), deviation = first / count;  // of the mean from the origin
    epilogue.statistics.mean[offset] = coefficients[kThinColumns + thread] + deviation;
    epilogue.statistics.m2[offset] = fmaxf(fmaf(-deviation, first, second), 0.0f);
    if (channel == 0) epilogue.statistics.count[blockIdx.x] = count;
  }
}

// --- up --------------------------------------------------------------------------------------------------------------

struct ThinUpParams {
  const void* input;   // [batch, small_height, small_width, small_channels]
  const void* weight;  // [4 phases, channels, 4 taps, small_channels]
  void* output;        // [batch, large_height, large_width, channels]
  const float* bias;   // [channels]; null: 0
  ActivationSpec activation;
  int small_height, small_width, small_channels, large_height, row_elements;
  int column_tiles;  // of 16 pixels, in a row of the small grid: one warp each
  int streams;       // of a block: strips that it walks down at a time
  // Output rows 2 g + 1 and 2 g + 2 need small rows g and g + 1: that is gap g, from -1 to small_height - 1. A strip is
  // some gaps of one image.
  int strip_gaps, strips;
  int rounds;  // of strips, for every stream
  FastDivisor strips_per_image;
  bool paired;  // output can be written in words
};

constexpr int kThinUpStageBytes = kThinThreads * 64;  // 16 pixels of 64 channels for every warp
template <int kChannels>
constexpr int kThinUpStages = kChannels < 4 ? 4 : 3;

// Floats of a pixel in the sums of a gap: with 8 or 24 modulo 32 of them the fragments' stores do not conflict.
template <int kChannels>
constexpr int kThinSumStride = 8 * kChannels + (kChannels % 2 == 0 ? 8 : 0);

struct alignas(16) ThinWords {
  uint32_t words[4];
};

struct alignas(8) ThinWord {
  int output;
  uint32_t places;  // of two sums, 16 bits each
};

// Gaps [first_gap, end_gap) of image n. None: a strip beyond the last.
struct ThinStrip {
  int n = 0, first_gap = 0, end_gap = -1;

  __device__ ThinStrip(const ThinUpParams& p, int strip) {
    if (strip >= p.strips) return;
    n = p.strips_per_image.divide(strip);
    first_gap = (strip - n * static_cast<int>(p.strips_per_image.divisor)) * p.strip_gaps - 1;
    end_gap = first_gap + p.strip_gaps < p.small_height ? first_gap + p.strip_gaps : p.small_height;
  }
};

template <typename T, int kChannels>
__global__ void __launch_bounds__(kThinThreads, kChannels < 4 ? 2 : 1) thin_up_kernel(ThinUpParams p) {
  wait_for_previous_kernel();
  constexpr int kStages = kThinUpStages<kChannels>, kStride = kThinSumStride<kChannels>;
  constexpr int kWords = kChannels + 1;  // of a gap's two output rows, most that a thread writes
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int group = lane / 4, member = lane % 4;
  const int stream = warp / p.column_tiles, column_tile = warp - stream * p.column_tiles;
  const bool has_stream = stream < p.streams;
  const int pixel = column_tile * 16 + group;  // and the one 8 further on

  // Shared memory: stages of the input, of which every lane reads only what it has copied, and two buffers of sums,
  // each a stream's pixels with one more on either side.
  char* stages = static_cast<char*>(shared_memory()) + warp * 2048 + lane * 16;
  float* sums_memory = reinterpret_cast<float*>(static_cast<char*>(shared_memory()) + kStages * kThinUpStageBytes);
  const int stream_floats = (p.column_tiles * 16 + 2) * kStride, buffer_floats = p.streams * stream_floats;

  const auto strip_of_round = [&](int round) {
    const int streams = static_cast<int>(gridDim.x) * p.streams;
    const int strip = round * streams + stream * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
    return ThinStrip(p, has_stream ? strip : p.strips);
  };

  // What comes kStages - 1 pieces (64 channels of a row) before the one that is worked on.
  int ahead_round = 0, ahead_step = 0, ahead_channel = 0;
  const auto load_ahead = [&](int stage) {
    if (ahead_round < p.rounds) {
      const ThinStrip ahead = strip_of_round(ahead_round);
      const int row = ahead.first_gap + ahead_step;
      const bool exists = row >= 0 && row <= ahead.end_gap && row < p.small_height;
      const int64_t first = (int64_t{ahead.n} * p.small_height + row) * p.small_width + pixel;
      const T* input = static_cast<const T*>(p.input) + first * p.small_channels + ahead_channel + member * 8;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const bool valid = exists && pixel + r * 8 < p.small_width;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          copy_async(stages + stage * kThinUpStageBytes + (r * 2 + half) * 512,
                     valid ? input + r * 8 * p.small_channels + half * 32 : static_cast<const T*>(p.input), valid);
        }
      }
      ahead_channel += kThinColumns;
      if (ahead_channel == p.small_channels) {
        ahead_channel = 0;
        if (++ahead_step > p.strip_gaps) {
          ahead_step = 0;
          ++ahead_round;
        }
      }
    }
    copy_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load_ahead(i);

  // Columns of the products: first what a row adds to the gap above it, then what it starts the gap below with, each
  // ordered [row phase][column tap][column phase][channel]: neighbouring output elements then read neighbouring sums.
  // 32 channels of a pixel or a column are 16 bytes of four lanes each; words 0 and 1, then 2 and 3 go into one step.
  ThinWords weights[2 * kChannels][2];
  const auto load_weights = [&](int channel) {
#pragma unroll
    for (int j = 0; j < 2 * kChannels; ++j) {
      const int column = j % kChannels * 8 + group, row_phase = column / (4 * kChannels);
      const int tap = (j < kChannels ? 2 : 0) + column / (2 * kChannels) % 2;
      const int phase_channel = row_phase * 2 * kChannels + column % (2 * kChannels);
      const T* row = static_cast<const T*>(p.weight) + int64_t{phase_channel * 4 + tap} * p.small_channels;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        weights[j][half] = *reinterpret_cast<const ThinWords*>(row + channel + half * 32 + member * 8);
      }
    }
  };
  load_weights(0);

  // The bias is in the sums of the first column tap, also of the pixel before the first.
  const auto bias_of_column = [&](int column) {
    const bool starts = column < 8 * kChannels && column / (2 * kChannels) % 2 == 0;
    return starts && p.bias != nullptr ? p.bias[column % kChannels] : 0.0f;
  };
  float* starts = sums_memory + 2 * buffer_floats;  // [8 * kChannels]
  for (int index = thread; index < (2 * p.streams + 1) * kStride; index += kThinThreads) {
    const int area = index / kStride, column = index - area * kStride;
    float* pixels = sums_memory + area * stream_floats + column;
    pixels[0] = bias_of_column(column);
    if (area < 2 * p.streams) pixels[(p.column_tiles * 16 + 1) * kStride] = 0.0f;
  }

  // The words of a gap's output rows: where they go, from the first row's beginning, and where their elements' first
  // sums are in a stream's.
  ThinWord* all_words = reinterpret_cast<ThinWord*>(starts + kStride);
  const ThinWord* words = all_words + column_tile * kWarpSize + lane;
  const int row_words = (p.row_elements + 1) / 2;
  for (int index = thread; index < kWords * kWarpSize * p.column_tiles; index += kThinThreads) {
    const int row = index >= row_words ? 1 : 0, word = index - row * row_words;
    uint32_t places = 0;
    for (int h = 0; h < 2; ++h) {
      const int element = word * 2 + h, column = element / kChannels, slot = column / 2 + column % 2;
      const int place = slot * kStride + (1 - row) * 4 * kChannels + element % (2 * kChannels);
      if (element < p.row_elements) places |= static_cast<uint32_t>(place) << (16 * h);
    }
    all_words[index] = {word < row_words ? row * p.row_elements + word * 2 : -1, places};
  }
  block_barrier();

  float sums[2 * kChannels][4] = {};
  int stage = 0, buffer = 0;
  for (int round = 0; round < p.rounds; ++round) {
#pragma unroll 1
    for (int step = 0; step <= p.strip_gaps; ++step) {
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        for (int e = 0; e < 4; ++e) sums[j][e] = sums[kChannels + j][e];
        const ThinPair start = *reinterpret_cast<const ThinPair*>(starts + j * 8 + member * 2);
        sums[kChannels + j][0] = sums[kChannels + j][2] = start.first;
        sums[kChannels + j][1] = sums[kChannels + j][3] = start.second;
      }
#pragma unroll 1  // for registers
      for (int channel = 0; channel < p.small_channels; channel += kThinColumns) {
        if (p.small_channels > kThinColumns) load_weights(channel);
        copy_async_wait<kStages - 2>();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          ThinWords input[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            input[r] = *reinterpret_cast<const ThinWords*>(stages + stage * kThinUpStageBytes + (r * 2 + half) * 512);
          }
#pragma unroll
          for (int word = 0; word < 4; word += 2) {
            const uint32_t a[4] = {input[0].words[word], input[1].words[word], input[0].words[word + 1],
                                   input[1].words[word + 1]};
#pragma unroll
            for (int j = 0; j < 2 * kChannels; ++j) {
              const uint32_t b[2] = {weights[j][half].words[word], weights[j][half].words[word + 1]};
              mma_m16n8k16(sums[j], a, b, T{});
            }
          }
        }
        load_ahead(stage == 0 ? kStages - 1 : stage - 1);
        stage = stage == kStages - 1 ? 0 : stage + 1;
      }
      if (step == 0) continue;  // no gap of the strip is above its first row

      float* gap_sums = sums_memory + buffer * buffer_floats;
      if (has_stream) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float* place = gap_sums + stream * stream_floats + (pixel + r * 8 + 1) * kStride + member * 2;
#pragma unroll
          for (int j = 0; j < kChannels; ++j) {
            *reinterpret_cast<ThinPair*>(place + j * 8) = {sums[j][r * 2], sums[j][r * 2 + 1]};
          }
        }
      }
      block_barrier();  // the sums are complete, and everyone has left the other buffer
      buffer ^= 1;

      const ThinStrip strip = strip_of_round(round);
      const int gap = strip.first_gap + step - 1;
      if (gap >= strip.end_gap) continue;  // nor in a stream that there is not
      gap_sums += stream * stream_floats;
      T* image = static_cast<T*>(p.output) + (int64_t{strip.n} * p.large_height + 2 * gap + 1) * p.row_elements;
      // Of the two rows' elements, those of rows that exist.
      const int first_element = gap < 0 ? p.row_elements : 0;
      const int end_element = (p.large_height - (2 * gap + 1)) * p.row_elements;
      for_activation(p.activation.kind, [&](auto activation) {
        constexpr Activation kActivation = decltype(activation)::value;
#pragma unroll
        for (int k = 0; k < kWords; ++k) {
          const ThinWord word = words[k * kWarpSize * p.column_tiles];
          if (word.output < first_element || word.output >= end_element) continue;
          float v[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float* sum = gap_sums + (h == 0 ? word.places & 0xffff : word.places >> 16);
            v[h] = activate(kActivation, p.activation.negative_slope, sum[0] + sum[kStride + 2 * kChannels]);
          }
          T* output = image + word.output;
          if (p.paired) {
            *reinterpret_cast<uint32_t*>(output) = pack_pair(v[0], v[1], T{});
          } else {
            from_float(v[0], output[0]);
            if ((word.output + 1) % p.row_elements != 0) from_float(v[1], output[1]);
          }
        }
      });
    }
  }
}

// --- weight gradient -------------------------------------------------------------------------------------------------

struct ThinWeightGradientParams {
  ThinTiles tiles;
  const void* small;  // [batch, small_height, small_width, small_channels]
  int small_channels;
  float* partial;  // [splits, small_channels, 16, channels]
};

// Adds what the warps have summed, a whole 64 x 16 * channels result each in fragments of mma.m16n8, in a fixed order: the
// second half's to the first half's lanes, then the first half's in turn. row_of(tile, half, row) is the channel of row
// `row` of eight in half `half` of fragment `tile`. Shared memory: thin_partial_shared_bytes(channels)
template <int kChannels, typename RowOf>
__device__ __forceinline__ void store_thin_partial(const float (&sums)[4][2 * kChannels][4], float* partial, const RowOf& row_of) {
  constexpr int kTiles = 2 * kChannels, kValues = 4 * kTiles * 4, kAdders = kThinWarps / 2;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  float* shared = static_cast<float*>(shared_memory());  // [kAdders, kValues, kWarpSize]
  float* mine = shared + warp % kAdders * kValues * kWarpSize + lane;
  const auto exchange = [&](const auto& access) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) access(sums[i][j][e], mine[((i * kTiles + j) * 4 + e) * kWarpSize]);
      }
    }
  };
  if (warp >= kAdders) exchange([](float sum, float& place) { place = sum; });
  block_barrier();
  if (warp < kAdders) exchange([](float sum, float& place) { place += sum; });
  block_barrier();
  for (int pair = warp; pair < kValues / 2; pair += kThinWarps) {
    ThinPair total{0.0f, 0.0f};
#pragma unroll
    for (int adder = 0; adder < kAdders; ++adder) {
      const float* values = shared + (adder * kValues + pair * 2) * kWarpSize + lane;
      total.first += values[0];
      total.second += values[kWarpSize];
    }
    const int row = row_of(pair / (2 * kTiles), pair % 2, lane / 4), column = pair / 2 % kTiles * 8 + lane % 4 * 2;
    *reinterpret_cast<ThinPair*>(partial + row * 16 * kChannels + column) = total;
  }
}

inline size_t thin_partial_shared_bytes(int channels) {
  return static_cast<size_t>(kThinWarps / 2 * kThinColumns * 16 * channels) * sizeof(float);
}

constexpr int kThinStages = 4;                        // of tiles
constexpr int kThinRowBytes = kThinColumns * 2 + 16;  // of a pixel: without conflicts for ldmatrix.trans
constexpr int kThinStageBytes = kThinPixels * kThinRowBytes;

template <typename T, int kChannels>
__global__ void __launch_bounds__(kThinThreads, 1) thin_weight_gradient_kernel(ThinWeightGradientParams p) {
  wait_for_previous_kernel();
  constexpr int kTiles = 2 * kChannels;  // of eight columns
  constexpr int kCopies = kThinPixels * 8 / kThinThreads;
  const ThinTiles& tiles = p.tiles;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int group = lane / 4, member = lane % 4;
  const int block_channel = static_cast<int>(blockIdx.y) * kThinColumns;
  char* small_stages = static_cast<char*>(shared_memory());
  uint16_t* image_stages = reinterpret_cast<uint16_t*>(small_stages + kThinStages * kThinStageBytes);
  const int image_stage_elements = (2 * tiles.rows + 2) * tiles.row_stride;

  int windows[4], elements[kTiles];  // of the lane's pixels and columns in a fragment of windows
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    windows[r] = staged_window<kChannels>(tiles, warp * 16 + member * 2 + r % 2 + r / 2 * 8) - kChannels % 2;
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) elements[j] = staged_element<kChannels>(tiles, j * 8 + group);

  const auto load_ahead = [&](int tile, int stage) {
    if (tile < tiles.tiles) {
      int count;
      const int64_t first_pixel = thin_pixels(tiles, tile, count);
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int m = (thread + i * kThinThreads) / 8, chunk = thread % 8;
        const T* row = static_cast<const T*>(p.small) +
                       (m < count ? (first_pixel + m) * p.small_channels + block_channel + chunk * 8 : 0);
        copy_async(small_stages + stage * kThinStageBytes + m * kThinRowBytes + chunk * 16, row, m < count);
      }
      copy_image_rows(tiles, tile, image_stages + stage * image_stage_elements);
    }
    copy_async_commit();
  };

  float sums[4][kTiles][4] = {};
  const int first_tile = static_cast<int>(blockIdx.x), tile_step = static_cast<int>(gridDim.x);
  for (int i = 0; i < kThinStages - 1; ++i) load_ahead(first_tile + i * tile_step, i);
  int current = 0;
  for (int tile = first_tile; tile < tiles.tiles; tile += tile_step) {
    const uint16_t* image_stage = image_stages + current * image_stage_elements;
    copy_async_wait<kThinStages - 2>();
    block_barrier();  // this tile is complete, and everyone has left the stages that are overwritten from here on
    load_ahead(tile + (kThinStages - 1) * tile_step, current == 0 ? kThinStages - 1 : current - 1);

    uint32_t b[kTiles][2];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        b[j][h] = image_stage[windows[2 * h] + elements[j]] |
                  uint32_t{image_stage[windows[2 * h + 1] + elements[j]]} << 16;
      }
    }
    const char* small = small_stages + current * kThinStageBytes +
                        (warp * 16 + lane % 8 + lane / 16 * 8) * kThinRowBytes + lane / 8 % 2 * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[4];
      load_matrix_x4_transposed(a, small + i * 32);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) mma_m16n8k16(sums[i][j], a, b[j], T{});
    }
    current = current == kThinStages - 1 ? 0 : current + 1;
  }
  copy_async_wait<0>();
  block_barrier();

  store_thin_partial<kChannels>(sums, p.partial + (int64_t{blockIdx.x} * p.small_channels + block_channel) * 16 * kChannels,
                                [](int tile, int half, int row) { return tile * 16 + half * 8 + row; });
}

// --- launches --------------------------------------------------------------------------------------------------------

inline size_t thin_image_bytes(const ThinTiles& t, int stages) {
  return static_cast<size_t>(stages * (2 * t.rows + 2) * t.row_stride) * sizeof(uint16_t);
}

inline size_t thin_down_shared_bytes(const ThinTiles& t) {
  return kThinWarps * 2 * kThinResultBytes + 4 * kThinColumns * sizeof(float) + thin_image_bytes(t, 2);
}

// The same memory serves the stages and then the sums of the warps.
inline size_t thin_weight_gradient_shared_bytes(const ThinTiles& t, int channels) {
  return std::max(kThinStages * kThinStageBytes + thin_image_bytes(t, kThinStages), thin_partial_shared_bytes(channels));
}

inline int64_t thin_up_column_tiles(int64_t small_width) { return divide_up(small_width, 16); }

template <int kChannels>
size_t thin_up_shared_bytes(int64_t small_width) {
  const int64_t column_tiles = thin_up_column_tiles(small_width);
  const int64_t pixels = kThinWarps / column_tiles * (column_tiles * 16 + 2);
  return kThinUpStages<kChannels> * kThinUpStageBytes +
         static_cast<size_t>((2 * pixels + 1) * kThinSumStride<kChannels>) * sizeof(float) +
         static_cast<size_t>((kChannels + 1) * kWarpSize * column_tiles) * sizeof(ThinWord);
}

// Rows of the small grid in a tile or band: as many as fit, evenly shared out over the image. 0: not even one.
inline int thin_rows(const Conv4x4Geometry& g) {
  const int64_t most = std::min(kThinPixels / g.small_width, g.small_height);
  return most == 0 ? 0 : static_cast<int>(divide_up(g.small_height, divide_up(g.small_height, most)));
}

// Without tiles if not even one row fits.
inline ThinGrid thin_grid(const Conv4x4Geometry& g, const void* image) {
  ThinGrid t{};
  t.image = image;
  t.small_height = static_cast<int>(g.small_height), t.small_width = static_cast<int>(g.small_width);
  t.large_height = static_cast<int>(g.large_height);
  t.row_elements = static_cast<int>(g.large_width * g.large_channels);
  t.rows = thin_rows(g);
  if (t.rows == 0) return t;
  const int64_t tiles_per_image = divide_up(g.small_height, t.rows);
  t.tiles = static_cast<int>(g.batch * tiles_per_image);
  t.tiles_per_image = FastDivisor(tiles_per_image);
  t.width = FastDivisor(g.small_width);
  return t;
}

inline ThinTiles thin_tiles(const Conv4x4Geometry& g, const void* image) {
  ThinTiles t{};
  static_cast<ThinGrid&>(t) = thin_grid(g, image);
  if (t.tiles == 0) return t;
  // From the margin to the last window's last pixel.
  const int64_t pairs = divide_up(kThinMargin + (2 * g.small_width + 1) * g.large_channels, 2);
  t.pairs = FastDivisor(pairs);
  t.words = static_cast<int>((2 * t.rows + 2) * pairs);
  t.row_stride = static_cast<int>(2 * pairs + 2);
  t.paired = t.row_elements % 2 == 0 && reinterpret_cast<uintptr_t>(image) % 4 == 0;
  return t;
}

inline bool is_thin(const Conv4x4Geometry& g) {
  return g.stride == 2 && g.large_channels <= 4 && g.small_channels % kThinColumns == 0 && thin_rows(g) > 0;
}

inline bool thin_geometry(const Conv4x4Geometry& g, DataType type) { return type != DataType::float32 && is_thin(g); }

inline bool is_thin_tiled(const Conv4x4Geometry& g, DataType type) {
  return thin_geometry(g, type) && thin_tiles(g, nullptr).words <= kThinFetches * kThinThreads;
}

// Whatever the pointers: callers ask for the number of tiles of statistics before they have set all of them.
inline bool is_thin_down(const Conv4x4Args& args) {
  return args.direction == Conv4x4Direction::down && is_thin_tiled(args.geometry, args.type);
}

inline bool is_thin_up(const Conv4x4Args& args) {
  return args.direction == Conv4x4Direction::up && has_plain_epilogue(args) && thin_geometry(args.geometry, args.type) &&
         is_aligned16(args.input);
}

inline bool is_thin_weight_gradient(const Conv4x4WeightGradientArgs& args) {
  return is_aligned16(args.small) && is_thin_tiled(args.geometry, args.type);
}

// Blocks that share out the tiles: as many as are resident at a time.
inline int64_t thin_down_blocks(const Conv4x4Args& args) {
  return std::min<int64_t>(thin_tiles(args.geometry, nullptr).tiles, int64_t{args.multiprocessors} * 2);
}

inline int64_t thin_weight_gradient_blocks(const Conv4x4WeightGradientArgs& args) {
  return std::min<int64_t>(thin_tiles(args.geometry, nullptr).tiles, args.multiprocessors);
}

// Calls f with the number of an image's channels as a constant.
template <typename F>
cudaError_t dispatch_thin_channels(int64_t channels, const F& f) {
  switch (channels) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    default: return f(std::integral_constant<int, 4>{});
  }
}

// Calls f(T{}, number of channels) with both as constants.
template <typename F>
cudaError_t dispatch_thin(DataType type, int64_t channels, const F& f) {
  return dispatch_thin_channels(channels, [&](auto count) {
    return type == DataType::bfloat16 ? f(BFloat16{}, count) : f(Half{}, count);
  });
}

inline cudaError_t thin_down_launch(const Conv4x4Args& args, cudaStream_t stream) {
  using Kind = Conv4x4Epilogue::Kind;
  const Conv4x4Geometry& g = args.geometry;
  ThinDownParams p{thin_tiles(g, args.input),
                   args.packed_weight,
                   args.output,
                   static_cast<int>(g.small_channels),
                   args.epilogue,
                   is_aligned16(args.output) && is_aligned16(args.epilogue.y)};
  if (args.epilogue.kind == Kind::store) p.epilogue.activation = {};
  const dim3 grid(static_cast<unsigned>(thin_down_blocks(args)),
                  static_cast<unsigned>(g.small_channels / kThinColumns));
  return dispatch_thin(args.type, g.large_channels, [&](auto zero, auto channels) {
    using T = decltype(zero);
    constexpr int kChannels = channels.value;
    const auto run = [&](void (*kernel)(ThinDownParams)) {
      return launch(kernel, grid, kThinThreads, thin_down_shared_bytes(p.tiles), stream, p);
    };
    switch (args.epilogue.kind) {
      case Kind::statistics: return run(thin_down_kernel<T, kChannels, Kind::statistics>);
      case Kind::activation_backward: return run(thin_down_kernel<T, kChannels, Kind::activation_backward>);
      default: return run(thin_down_kernel<T, kChannels, Kind::bias_activation>);
    }
  });
}

inline cudaError_t thin_up_launch(const Conv4x4Args& args, cudaStream_t stream) {
  const Conv4x4Geometry& g = args.geometry;
  ThinUpParams p{};
  p.input = args.input, p.weight = args.packed_weight, p.output = args.output;
  p.bias = args.epilogue.bias, p.activation = activation_of(args.epilogue);
  p.small_height = static_cast<int>(g.small_height), p.small_width = static_cast<int>(g.small_width);
  p.small_channels = static_cast<int>(g.small_channels);
  p.large_height = static_cast<int>(g.large_height);
  p.row_elements = static_cast<int>(g.large_width * g.large_channels);
  p.column_tiles = static_cast<int>(thin_up_column_tiles(g.small_width));
  p.streams = kThinWarps / p.column_tiles;
  p.paired = p.row_elements % 2 == 0 && reinterpret_cast<uintptr_t>(args.output) % 4 == 0;
  // Strips as short as pays: each costs a row that its neighbour computes too, and the last round of strips is as long
  // as the others.
  const int64_t blocks = int64_t{args.multiprocessors} * 2, gaps = g.small_height + 1;
  int64_t best = 0;
  for (int64_t strips = 1; strips <= gaps; ++strips) {
    const int64_t strip_gaps = divide_up(gaps, strips);
    const int64_t rounds = divide_up(g.batch * divide_up(gaps, strip_gaps), blocks * p.streams);
    const int64_t rows = rounds * (strip_gaps + 1);
    if (best != 0 && rows >= best) continue;
    best = rows;
    p.strip_gaps = static_cast<int>(strip_gaps);
    p.rounds = static_cast<int>(rounds);
  }
  const int64_t strips_per_image = divide_up(gaps, p.strip_gaps);
  p.strips_per_image = FastDivisor(strips_per_image);
  p.strips = static_cast<int>(g.batch * strips_per_image);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(p.strips, blocks)));
  return dispatch_thin(args.type, g.large_channels, [&](auto zero, auto channels) {
    return launch(thin_up_kernel<decltype(zero), channels.value>, grid, kThinThreads,
                  thin_up_shared_bytes<channels.value>(g.small_width), stream, p);
  });
}

inline cudaError_t thin_weight_gradient_launch(const Conv4x4WeightGradientArgs& args, cudaStream_t stream) {
  const Conv4x4Geometry& g = args.geometry;
  const ThinWeightGradientParams p{thin_tiles(g, args.large), args.small, static_cast<int>(g.small_channels),
                                   static_cast<float*>(args.workspace)};
  const dim3 grid(static_cast<unsigned>(thin_weight_gradient_blocks(args)),
                  static_cast<unsigned>(g.small_channels / kThinColumns));
  return dispatch_thin(args.type, g.large_channels, [&](auto zero, auto channels) {
    return launch(thin_weight_gradient_kernel<decltype(zero), channels.value>, grid, kThinThreads,
                  thin_weight_gradient_shared_bytes(p.tiles, channels.value), stream, p);
  });
}

}  // namespace fastgan::cuda
