// The main loops on Hopper, for 16-bit numbers whose channels come in 64s and that need nothing done to them as they are loaded; and
// down and up, with no more than bias and activation, for float32 in 32s, which the copies round to TF32.
// One thread asks for the stages ahead by box copies, which also make the zeros outside of the picture; two warpgroups multiply 64 rows
// each. What the second-level cache delivers is the bound, so the blocks of a cluster ask for a part each of what all of them read.
//
// H200, 256 <-> 512 channels, 8 <-> 4 px, bfloat16, batch 128 / 1024, us: down 25 / 89, up 17 / 108, weight gradient 24 / 102. Tried:
//   copies by all threads (cp.async) in place of boxes      35 / 134, 18 / 139, 28 / 134
//   clusters of 2 x 2 blocks                                33 / 140, 23 / 98, 36 / 182
//   one product a phase of 64 columns (128 channels up)     back with the activation 55 / 447 in place of 45 / 369
//   the activation's kind looked up at every element        45 / 369 in place of 35 / 276
//
// Pixels come in boxes of whole rows of the grid (see PixelBox), so not every grid is taken; others run the loops of
// conv4x4s2_gather.cuh and conv4x4s2_weight.cuh.
#pragma once

#include "conv4x4s2_gather.cuh"
#include "conv4x4s2_weight.cuh"
#include "hopper.cuh"

#if defined(FASTGAN_HOPPER)

namespace fastgan::cuda {

struct Tf32Math {
  using Type = float;
};

// Of the summed dimension in a stage (F, T): a row of 128 bytes.
template <typename T>
constexpr int kBoxChannels = kSwizzledRowBytes / static_cast<int>(sizeof(T));
constexpr int kMostStages = 8;

template <int kColumns>
using WarpgroupTile = Tile<128, kColumns, 8, 1>;

// So many pixels, one after the other in memory, as a box of a [batch, height, width] grid: whole rows of one or several pictures.
struct PixelBox {
  int images = 0, height = 0, width = 0;  // 0: this grid has no such boxes

  PixelBox(int64_t pixels, int64_t grid_height, int64_t grid_width) {
    if (grid_width > pixels || pixels % grid_width != 0) return;
    const int64_t rows = pixels / grid_width;
    if (grid_height % rows != 0 && rows % grid_height != 0) return;
    width = static_cast<int>(grid_width);
    height = static_cast<int>(rows < grid_height ? rows : grid_height);
    images = static_cast<int>(pixels / (int64_t{width} * height));
  }
  // Whether such a box exists and a copy takes it from a grid `step` times as fine: it spans at most 256 there.
  bool copies_from(int64_t step) const { return width != 0 && width * step <= 256 && height * step <= 256; }
};

// This block's place among the kCluster neighbouring blocks that read the same rows, or the same columns.
template <int kCluster>
__device__ __forceinline__ int rank_in_cluster() {
  return static_cast<int>(blockIdx.x) % kCluster;
}

// To all blocks of the cluster.
template <int kCluster>
__device__ __forceinline__ void copy_box_to_all(uint32_t shared, const CUtensorMap& map, const int (&at)[4], uint32_t barrier) {
  if constexpr (kCluster > 1) {
    copy_box_to_cluster(shared, map, at, barrier, (1 << kCluster) - 1);
  } else {
    copy_box(shared, map, at, barrier);
  }
}

// The stages of a main loop: memory of kStages stages, and two barriers each. full: its copies have arrived. empty: all warps of the
// cluster have done with it.
template <int kStages, int kStageBytes, int kCluster>
struct Pipeline {
  uint32_t stages, full, empty;

  static constexpr size_t shared_bytes() { return kStages * kStageBytes + kSwizzledGroupBytes + 2 * kMostStages * 8; }

  // For all threads of the cluster.
  __device__ explicit Pipeline(void* shared) {
    const uint32_t begin = shared_address(shared);
    full = begin, empty = begin + kMostStages * 8;
    stages = (begin + 2 * kMostStages * 8 + kSwizzledGroupBytes - 1) / kSwizzledGroupBytes * kSwizzledGroupBytes;
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        barrier_init(full + i * 8, 1);
        barrier_init(empty + i * 8, 8 * kCluster);
      }
      barriers_ready();
    }
    block_barrier();
    if constexpr (kCluster > 1) cluster_arrive(), cluster_wait();
  }

  // load(stage's address, its barrier, i) asks for the copies of stage i < count, multiply(stage's address) for its products.
  template <typename Load, typename Multiply>
  __device__ __forceinline__ void run(int count, const Load& load, const Multiply& multiply) {
    const bool loads = threadIdx.x == 0;
    if (loads) {
      for (int i = 0; i < kStages && i < count; ++i) {
        barrier_expect(full + i * 8, kStageBytes);
        load(stages + i * kStageBytes, full + i * 8, i);
      }
    }
    int current = 0, parity = 0;                      // of stage i
    int previous = kStages - 1, previous_parity = 1;  // of stage i - 1
    for (int i = 0; i < count; ++i) {
      barrier_wait(full + current * 8, parity);
      products_begin();
      multiply(stages + current * kStageBytes);
      products_commit();
      products_wait<0>();  // meanwhile the tensor cores have the other warpgroup's
      if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
        for (int rank = 0; rank < kCluster; ++rank) barrier_arrive(empty + current * 8, rank);
      }
      // The stage before, which the other warps have probably left by now.
      const int next = i - 1 + kStages;
      if (loads && i > 0 && next < count) {
        barrier_wait(empty + previous * 8, previous_parity);
        barrier_expect(full + previous * 8, kStageBytes);
        load(stages + previous * kStageBytes, full + previous * 8, next);
      }
      __syncwarp();
      previous = current, previous_parity = parity;
      if (++current == kStages) current = 0, parity ^= 1;
    }
    block_barrier();
    if constexpr (kCluster > 1) cluster_arrive();  // see finish
  }

  // A block stays until the others of its cluster have sent their arrivals.
  __device__ void finish() const {
    if constexpr (kCluster > 1) cluster_wait();
  }

  __device__ char* memory(void* shared) const { return static_cast<char*>(shared) + (stages - shared_address(shared)); }
};

// As gather_epilogue, by way of shared memory: there the tile is rounded to its storage type, and then read and written row by row in
// 16-byte pieces, eight columns to a thread. Columns and channels come in eights.
template <typename T, typename Tile>
struct TileEpilogue {
  static constexpr int kPieces = Tile::kColumns / 8, kLanes = Tile::kThreads / kPieces;  // a thread's rows are kLanes apart
  static constexpr int kRowBytes = Tile::kColumns * 2 + 16;                              // no bank conflict, either way

  const GatherParams& p;
  char* tile;          // [rows][kRowBytes]
  int64_t* offsets;    // [rows]: of the output pixel, -1: none
  float* column_sums;  // [2][kLanes][columns]
  int piece, lane, column;
  bool exists;

  __device__ TileEpilogue(const GatherParams& params, char* shared, int first_column)
      : p(params),
        tile(shared),
        offsets(reinterpret_cast<int64_t*>(shared + Tile::kRows * kRowBytes)),
        column_sums(reinterpret_cast<float*>(shared + Tile::kRows * (kRowBytes + 8))),
        piece(static_cast<int>(threadIdx.x) % kPieces),
        lane(static_cast<int>(threadIdx.x) / kPieces),
        column(first_column + piece * 8),
        exists(column < params.columns) {}

  __device__ Bytes16 load(int row) const {
    Bytes16 bytes;
    bytes.words = *reinterpret_cast<const uint4*>(tile + row * kRowBytes + piece * 16);
    return bytes;
  }

  // Calls f(row, offset of this thread's piece in the output) for its rows.
  template <typename F>
  __device__ __forceinline__ void for_each_row(const F& f) const {
    if (!exists) return;
#pragma unroll 4
    for (int row = lane; row < Tile::kRows; row += kLanes) {
      const int64_t offset = offsets[row];
      if (offset >= 0) f(row, offset + column);
    }
  }

  __device__ void load_channels(const float* array, float otherwise, float (&values)[8]) const {
    const int channel = column - p.channel_divisor.divide(column) * p.channels;
#pragma unroll
    for (int e = 0; e < 8; ++e) values[e] = array != nullptr && exists ? array[channel + e] : otherwise;
  }

  // Adds the lanes' sums in order; afterwards total(i, c) is the sum of column c. For all threads.
  __device__ void add_lanes(const float (&first)[8], const float (&second)[8]) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      column_sums[lane * Tile::kColumns + piece * 8 + e] = first[e];
      column_sums[(kLanes + lane) * Tile::kColumns + piece * 8 + e] = second[e];
    }
    block_barrier();
  }
  __device__ float total(int which, int c) const {
    float sum = 0.0f;
#pragma unroll 8
    for (int i = 0; i < kLanes; ++i) sum += column_sums[(which * kLanes + i) * Tile::kColumns + c];
    return sum;
  }
};

template <typename T, typename Tile>
__device__ __forceinline__ void tile_epilogue(const GatherParams& p, const Accumulators<Tile>& sums, int first_row, int first_column,
                                              int64_t tile, int phase, char* shared) {
  using Kind = Conv4x4Epilogue::Kind;
  const Conv4x4Epilogue& epilogue = p.epilogue;
  TileEpilogue<T, Tile> e(p, shared, first_column);
  const int thread = static_cast<int>(threadIdx.x);
  bool valid = false;
  if (thread < Tile::kRows) {
    e.offsets[thread] = output_offset(p, first_row + thread, phase);
    valid = e.offsets[thread] >= 0;
  }
#pragma unroll
  for (int j = 0; j < Tile::kColumnTiles; ++j) {
    float bias[2] = {};
    const int column = first_column + sums.column(j, 0);
    if (epilogue.bias != nullptr && column < p.columns) {
      const int channel = column - p.channel_divisor.divide(column) * p.channels;
      bias[0] = epilogue.bias[channel];
      bias[1] = epilogue.bias[channel + 1];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* v = sums.values[0][j] + r * 2;
      const float pair[2] = {v[0] + bias[0], v[1] + bias[1]};
      store_pair(reinterpret_cast<T*>(e.tile + sums.row(0, r * 2) * e.kRowBytes) + sums.column(j, 0), true, true, pair);
    }
  }
  const float count = static_cast<float>(block_barrier_count(valid));

  T* output = static_cast<T*>(p.output);
  float first[8] = {}, second[8] = {};
  const int64_t tile_offset = tile * p.columns + first_column;
  const bool writes_column = thread < Tile::kColumns && first_column + thread < p.columns;
  if (epilogue.kind == Kind::store) {
    e.for_each_row([&](int row, int64_t offset) { *reinterpret_cast<uint4*>(output + offset) = e.load(row).words; });
  } else if (epilogue.kind == Kind::bias_activation) {
    for_activation(epilogue.activation.kind, [&](auto kind) {
      e.for_each_row([&](int row, int64_t offset) {
        Vector<T> x;
        unpack(e.load(row), x);
#pragma unroll
        for (int i = 0; i < 8; ++i) x.values[i] = activate(decltype(kind)::value, epilogue.activation.negative_slope, x.values[i]);
        *reinterpret_cast<uint4*>(output + offset) = pack(x).words;
      });
    });
  } else if (epilogue.kind == Kind::statistics) {
    // Sums of differences from the tile's first row, which lies among the values: nothing cancels.
    Vector<T> base;
    unpack(e.load(0), base);
    e.for_each_row([&](int row, int64_t offset) {
      const Bytes16 bytes = e.load(row);
      *reinterpret_cast<uint4*>(output + offset) = bytes.words;
      Vector<T> x;
      unpack(bytes, x);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float difference = x.values[i] - base.values[i];
        first[i] += difference;
        second[i] = fmaf(difference, difference, second[i]);
      }
    });
    e.add_lanes(first, second);
    if (writes_column) {
      const float sum = e.total(0, thread), inverse = count > 0.0f ? 1.0f / count : 0.0f;
      const float start = to_float(reinterpret_cast<const T*>(e.tile)[thread]);
      epilogue.statistics.mean[tile_offset + thread] = start + sum * inverse;
      epilogue.statistics.m2[tile_offset + thread] = fmaxf(e.total(1, thread) - sum * sum * inverse, 0.0f);
      if (first_column + thread == 0) epilogue.statistics.count[tile] = count;
    }
  } else {
    const T* y = static_cast<const T*>(epilogue.y);
    float scale[8], shift[8], mean[8];
    e.load_channels(epilogue.scale, 1.0f, scale);
    e.load_channels(epilogue.shift, 0.0f, shift);
    e.load_channels(epilogue.mean, 0.0f, mean);
    for_activation(epilogue.activation.kind, [&](auto kind) {
      // Loads of several rows before their stores, which y might be for all the compiler knows.
      constexpr int kBatch = 4;
      if (!e.exists) return;
      for (int first_of_batch = e.lane; first_of_batch < Tile::kRows; first_of_batch += kBatch * e.kLanes) {
        int64_t offsets[kBatch];
        Bytes16 bytes[kBatch];
#pragma unroll
        for (int r = 0; r < kBatch; ++r) {
          offsets[r] = e.offsets[first_of_batch + r * e.kLanes];
          if (offsets[r] >= 0) bytes[r].words = *reinterpret_cast<const uint4*>(y + offsets[r] + e.column);
        }
#pragma unroll
        for (int r = 0; r < kBatch; ++r) {
          if (offsets[r] < 0) continue;
          Vector<T> previous, x;
          unpack(bytes[r], previous);
          unpack(e.load(first_of_batch + r * e.kLanes), x);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            x.values[i] *= activation_derivative(decltype(kind)::value, epilogue.activation.negative_slope,
                                                 fmaf(scale[i], previous.values[i], shift[i]));
            first[i] += x.values[i];
            second[i] = fmaf(x.values[i], previous.values[i] - mean[i], second[i]);
          }
          *reinterpret_cast<uint4*>(output + offsets[r] + e.column) = pack(x).words;
        }
      }
    });
    if (epilogue.gradients.sum_dz == nullptr && epilogue.gradients.sum_dz_xhat == nullptr) return;
    e.add_lanes(first, second);
    if (writes_column) {
      const int column = first_column + thread;
      const int channel = column - p.channel_divisor.divide(column) * p.channels;
      if (epilogue.gradients.sum_dz != nullptr) epilogue.gradients.sum_dz[tile_offset + thread] = e.total(0, thread);
      if (epilogue.gradients.sum_dz_xhat != nullptr) {
        epilogue.gradients.sum_dz_xhat[tile_offset + thread] =
            e.total(1, thread) * (epilogue.invstd != nullptr ? epilogue.invstd[channel] : 1.0f);
      }
    }
  }
}

// bias_activation, or store, of float32: from the registers; a row's four lanes write 32 bytes side by side.
template <typename Tile>
__device__ __forceinline__ void float_epilogue(const GatherParams& p, const Accumulators<Tile>& sums, int first_row, int first_column,
                                               int phase) {
  const Conv4x4Epilogue& epilogue = p.epilogue;
  float* output = static_cast<float*>(p.output);
  const int64_t offsets[2] = {output_offset(p, first_row + sums.row(0, 0), phase), output_offset(p, first_row + sums.row(0, 2), phase)};
  const bool activates = epilogue.kind == Conv4x4Epilogue::Kind::bias_activation;
  for_activation(activates ? epilogue.activation.kind : Activation::identity, [&](auto kind) {
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j) {
      const int column = first_column + sums.column(j, 0), channel = column - p.channel_divisor.divide(column) * p.channels;
      if (column >= p.columns) continue;
      float2 bias{0.0f, 0.0f};
      if (epilogue.bias != nullptr) bias = float2{epilogue.bias[channel], epilogue.bias[channel + 1]};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* v = sums.values[0][j] + r * 2;
        const float slope = epilogue.activation.negative_slope;
        if (offsets[r] < 0) continue;
        *reinterpret_cast<float2*>(output + offsets[r] + column) =
            float2{activate(decltype(kind)::value, slope, v[0] + bias.x), activate(decltype(kind)::value, slope, v[1] + bias.y)};
      }
    }
  });
}

// Two phases that differ in the parity of the output column make one product: their windows of 2 x 2 taps lie in one of 2 x 3, and a row
// of the product is two neighbouring output pixels. A third of the multiplications is by zeros, but a tile of few channels has
// 128 columns, and is filled by fewer copies.
struct GatherBoxParams {
  CUtensorMap windows;  // [batch, height, width, channels] of the input; a box is one tap of the windows of a part of a tile's pixels
  CUtensorMap weights;  // [1, 1, phases * columns, depth]; a box is a part of a tile's columns
  GatherParams gather;
  int tap_rows, tap_columns;  // of a window
  int phase_step;             // 2 for pairs of phases, else 1
};

template <int kColumns, int kStages, int kCluster>
using GatherPipeline = Pipeline<kStages, (128 + kColumns) * kSwizzledRowBytes, kCluster>;

// Main loops F and T, as gather_kernel. The blocks of a cluster have the same columns.
template <typename Math, int kColumns, int kStages, int kBlocks, int kCluster>
__global__ void FASTGAN_CLUSTER(kCluster) __launch_bounds__(256, kBlocks)
    gather_box_kernel(const __grid_constant__ GatherBoxParams params) {
#if defined(FASTGAN_HOPPER_TARGET)
  using T = typename Math::Type;
  using Tile = WarpgroupTile<kColumns>;
  constexpr int kABytes = Tile::kRows * kSwizzledRowBytes;
  constexpr int kPartColumns = kColumns / kCluster;
  const GatherParams& p = params.gather;
  const int rank = rank_in_cluster<kCluster>(), group = static_cast<int>(blockIdx.x) / kCluster;
  const int product = static_cast<int>(blockIdx.z), phase = product * params.phase_step;
  const int row_group = group / p.column_tiles, column_tile = group - row_group * p.column_tiles;
  const int row_tile = row_group * kCluster + rank;
  const int first_row = row_tile * Tile::kRows, first_column = column_tile * kColumns;

  int n, h, w;
  split_row(p, first_row, n, h, w);
  const int h0 = h * p.window_step + p.window_origin + (phase >> 1), w0 = p.window_origin + (phase & 1);
  int tap_h = 0, tap_w = 0, channel = 0;
  const auto load = [&](uint32_t stage, uint32_t barrier, int) {
    copy_box(stage, params.windows, {channel, w0 + tap_w, h0 + tap_h, n}, barrier);
    copy_box_to_all<kCluster>(stage + kABytes + rank * kPartColumns * kSwizzledRowBytes, params.weights,
                              {(tap_h * params.tap_columns + tap_w) * p.input.channels + channel,
                               product * p.columns + first_column + rank * kPartColumns, 0, 0},
                              barrier);
    if (++tap_w < params.tap_columns) return;
    tap_w = 0;
    if (++tap_h == params.tap_rows) tap_h = 0, channel += kBoxChannels<T>;
  };
  Accumulators<Tile> sums;
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  const auto multiply = [&](uint32_t stage) {
    const uint64_t a = matrix_descriptor(stage + warpgroup * 64 * kSwizzledRowBytes, 16);
    const uint64_t b = matrix_descriptor(stage + kABytes, 16);
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply_warpgroup<true>(sums.values[0], a + k * 2, b + k * 2, T{});  // 32 bytes of depth each
  };
  GatherPipeline<kColumns, kStages, kCluster> pipeline(shared_memory());
  wait_for_previous_kernel();
  pipeline.run(p.depth_padded / kBoxChannels<T>, load, multiply);
  if constexpr (sizeof(T) == 4) {
    float_epilogue(p, sums, first_row, first_column, phase);
  } else {
    tile_epilogue<T>(p, sums, first_row, first_column, int64_t{product} * p.row_tiles + row_tile, phase,
                     pipeline.memory(shared_memory()));
  }
  pipeline.finish();
#endif
}

// Main loop W, as weight_gradient_kernel: a stage holds 64 pixels, each operand in blocks of 64 channels. A tile has 64 channels of the
// large operand at four taps, r and r + 2 by s and s + 2. The blocks of a cluster have the same rows.
constexpr int kStagePixels = 64, kTileTaps = 4;
using WeightTile = WarpgroupTile<kTileTaps * 64>;

struct WeightBoxParams {
  CUtensorMap small;  // [1, 1, pixels, channels]
  CUtensorMap large;  // [batch, height, width, channels]; a box is one tap of the windows of the pixels of a stage
  WeightGradientParams gradient;
};

// Tap of a block of a tile with number 0 to 3.
__host__ __device__ constexpr int tap_of_block(int tile, int block) {
  return (tile / 2 + block / 2 * 2) * 4 + tile % 2 + block % 2 * 2;
}

template <int kStages, int kCluster>
using WeightPipeline = Pipeline<kStages, (2 + kTileTaps) * kStagePixels * kSwizzledRowBytes, kCluster>;

template <typename Math, int kStages, int kCluster>
__global__ void FASTGAN_CLUSTER(kCluster) __launch_bounds__(256, 1)
    weight_gradient_box_kernel(const __grid_constant__ WeightBoxParams params) {
#if defined(FASTGAN_HOPPER_TARGET)
  using T = typename Math::Type;
  constexpr int kBlockBytes = kStagePixels * kSwizzledRowBytes, kABlocks = 2;
  constexpr int kPartABlocks = kABlocks / kCluster;
  const WeightGradientParams& p = params.gradient;
  const int row_tile = static_cast<int>(blockIdx.x) / p.column_tiles;
  const int column_tile = static_cast<int>(blockIdx.x) - row_tile * p.column_tiles;
  const int first_row = row_tile * WeightTile::kRows, first_channel = column_tile / 4 * 64;
  const int first_pixel = static_cast<int>(blockIdx.z) * p.pixels_per_split;
  const int last_pixel = p.pixels - first_pixel < p.pixels_per_split ? p.pixels : first_pixel + p.pixels_per_split;
  const int first_tap = tap_of_block(column_tile % 4, 0);
  const auto load = [&](uint32_t stage, uint32_t barrier, int i) {
    const int pixel = first_pixel + i * kStagePixels;
#pragma unroll
    for (int part = 0; part < kPartABlocks; ++part) {
      const int b = rank_in_cluster<kCluster>() * kPartABlocks + part;
      copy_box_to_all<kCluster>(stage + b * kBlockBytes, params.small, {first_row + b * 64, pixel, 0, 0}, barrier);
    }
    const int n = p.grid_size.divide(pixel), rest = pixel - n * static_cast<int>(p.grid_size.divisor);
    const int h = p.grid_width_divisor.divide(rest) * p.window_step + p.window_origin + first_tap / 4;
    const int w = p.window_origin + first_tap % 4;
#pragma unroll
    for (int b = 0; b < kTileTaps; ++b) {
      copy_box(stage + (kABlocks + b) * kBlockBytes, params.large, {first_channel, w + b % 2 * 2, h + b / 2 * 2, n}, barrier);
    }
  };
  Accumulators<WeightTile> sums;
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  const auto multiply = [&](uint32_t stage) {
    const uint64_t a = matrix_descriptor(stage + warpgroup * kBlockBytes, kBlockBytes);
    const uint64_t b = matrix_descriptor(stage + kABlocks * kBlockBytes, kBlockBytes);
#pragma unroll
    for (int k = 0; k < kStagePixels / 16; ++k) {
      constexpr int kStep = 16 * kSwizzledRowBytes / 16;  // 16 pixels, in the descriptor's units
      multiply_warpgroup<false>(sums.values[0], a + k * kStep, b + k * kStep, T{});
    }
  };
  WeightPipeline<kStages, kCluster> pipeline(shared_memory());
  wait_for_previous_kernel();
  pipeline.run((last_pixel - first_pixel + kStagePixels - 1) / kStagePixels, load, multiply);

  float* partial = p.partial + int64_t{blockIdx.z} * p.small.columns * p.large.columns;
#pragma unroll
  for (int j = 0; j < WeightTile::kColumnTiles; ++j) {
    const int column = tap_of_block(column_tile % 4, j / 8) * p.large.channels + first_channel + sums.column(j % 8, 0);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + sums.row(0, r * 2);
      const float* v = sums.values[0][j] + r * 2;
      if (row < p.small.columns) *reinterpret_cast<float2*>(partial + int64_t{row} * p.large.columns + column) = float2{v[0], v[1]};
    }
  }
  pipeline.finish();
#endif
}

// ---- tensor maps ---------------------------------------------------------------------------------------------------

// Of a dense [sizes[3], sizes[2], sizes[1], sizes[0]] tensor, whose float32 numbers arrive rounded to TF32; its boxes have `box` elements,
// of which every step-th one is taken in dimensions 1 and 2.
inline cudaError_t make_box_map(CUtensorMap& map, DataType type, const void* data, const uint64_t (&sizes)[4], const uint32_t (&box)[4],
                                uint32_t step) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const uint64_t row = sizes[0] * static_cast<uint64_t>(size_of(type)), strides[3] = {row, row * sizes[1], row * sizes[1] * sizes[2]};
  const CUtensorMapDataType map_type = type == DataType::bfloat16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                       : type == DataType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                   : CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  const uint32_t spanned[4] = {box[0], box[1] * step, box[2] * step, box[3]}, steps[4] = {1, step, step, 1};
  const CUresult result =
      encode(&map, map_type, 4, const_cast<void*>(data), sizes, strides, spanned, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace fastgan::cuda

#endif
