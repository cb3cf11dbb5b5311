// The main loops on Hopper's warpgroup products, for 16-bit numbers whose channels come in 64s and that need nothing done to them as they
// are loaded. Two warpgroups multiply 64 rows each; all threads fetch stages by cp.async, kStages - 2 of them ahead, with one
// barrier a stage: a stage is overwritten only after the barrier behind the wait for the products that read it.
#pragma once

#include "conv4x4s2_gather.cuh"
#include "conv4x4s2_weight.cuh"
#include "wgmma.cuh"

#if !defined(FASTGAN_CUDA_HOST)

namespace fastgan::cuda {

constexpr int kWarpgroupDepth = 64;  // of the summed dimension in a stage: a row of 128 bytes
constexpr int kPieces = 8;           // of 16 bytes in it

template <int kColumns>
using WarpgroupTile = Tile<128, kColumns, 8, 1>;

template <int kColumns, int kStages>
constexpr size_t warpgroup_shared_bytes() {
  return kStages * (128 + kColumns) * kSwizzledRowBytes + kSwizzledGroupBytes;  // and what the alignment takes
}

__device__ __forceinline__ char* swizzled_stages() {
  char* memory = static_cast<char*>(shared_memory());
  const uint32_t address = shared_address(memory);
  return memory + ((address + kSwizzledGroupBytes - 1) / kSwizzledGroupBytes * kSwizzledGroupBytes - address);
}

// Runs the pipeline: load(stage memory, i) starts the copies of stage i < count, multiply(stage memory) its products.
template <int kStages, typename Load, typename Multiply>
__device__ __forceinline__ void run_stages(char* stages, int stage_bytes, int count, const Load& load, const Multiply& multiply) {
  constexpr int kAhead = kStages - 2;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (i < count) load(stages + i * stage_bytes, i);
    copy_async_commit();
  }
  int current = 0, next = kAhead;
  for (int i = 0; i < count; ++i) {
    copy_async_wait<kAhead - 1>();
    fence_shared_for_products();
    block_barrier();
    products_begin();
    multiply(stages + current * stage_bytes);
    products_commit();
    if (i + kAhead < count) load(stages + next * stage_bytes, i + kAhead);
    copy_async_commit();
    products_wait<1>();
    current = current == kStages - 1 ? 0 : current + 1;
    next = next == kStages - 1 ? 0 : next + 1;
  }
  products_wait<0>();
  copy_async_wait<0>();
  block_barrier();
}

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
  __device__ void for_each_row(const F& f) const {
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
                                              int row_tile, int phase, char* shared) {
  using Kind = Conv4x4Epilogue::Kind;
  const Conv4x4Epilogue& epilogue = p.epilogue;
  TileEpilogue<T, Tile> e(p, shared, first_column);
  const int thread = static_cast<int>(threadIdx.x);
  bool valid = false;
  if (thread < Tile::kRows) {
    const int m = first_row + thread;
    int n, h, w;
    split_row(p, m < p.rows ? m : 0, n, h, w);
    h = h * p.output_step + (phase >> 1);
    w = w * p.output_step + (phase & 1);
    valid = m < p.rows && h < p.output_height && w < p.output_width;
    e.offsets[thread] = valid ? ((int64_t{n} * p.output_height + h) * p.output_width + w) * p.columns : -1;
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
  const int64_t tile = int64_t{phase} * p.row_tiles + row_tile;
  const int64_t tile_offset = tile * p.columns + first_column;
  const bool writes_column = thread < Tile::kColumns && first_column + thread < p.columns;
  if (epilogue.kind == Kind::store) {
    e.for_each_row([&](int row, int64_t offset) { *reinterpret_cast<uint4*>(output + offset) = e.load(row).words; });
  } else if (epilogue.kind == Kind::bias_activation) {
    e.for_each_row([&](int row, int64_t offset) {
      Vector<T> x;
      unpack(e.load(row), x);
#pragma unroll
      for (int i = 0; i < 8; ++i) x.values[i] = activate(epilogue.activation.kind, epilogue.activation.negative_slope, x.values[i]);
      *reinterpret_cast<uint4*>(output + offset) = pack(x).words;
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
    e.for_each_row([&](int row, int64_t offset) {
      Bytes16 bytes;
      bytes.words = *reinterpret_cast<const uint4*>(y + offset);
      Vector<T> previous, x;
      unpack(bytes, previous);
      unpack(e.load(row), x);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        x.values[i] *= activation_derivative(epilogue.activation.kind, epilogue.activation.negative_slope,
                                             fmaf(scale[i], previous.values[i], shift[i]));
        first[i] += x.values[i];
        second[i] = fmaf(x.values[i], previous.values[i] - mean[i], second[i]);
      }
      *reinterpret_cast<uint4*>(output + offset) = pack(x).words;
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

// Main loops F and T, as gather_kernel. The taps of 64 channels come one after another: they read the same pixels, which are still in the
// first-level cache then.
template <typename Math, int kColumns, int kStages, int kBlocks>
__global__ void __launch_bounds__(256, kBlocks) gather_warpgroup_kernel(GatherParams p) {
  using T = typename Math::Type;
  using Tile = WarpgroupTile<kColumns>;
  constexpr int kABytes = Tile::kRows * kSwizzledRowBytes, kStageBytes = kABytes + kColumns * kSwizzledRowBytes;
  constexpr int kRowStep = 256 / kPieces;  // a thread's rows are this far apart
  constexpr int kAChunks = Tile::kRows / kRowStep, kBChunks = kColumns / kRowStep;
  char* stages = swizzled_stages();
  const int thread = static_cast<int>(threadIdx.x), piece = thread % kPieces, first_thread_row = thread / kPieces;
  const int phase = static_cast<int>(blockIdx.z);
  const int row_tile = static_cast<int>(blockIdx.x) / p.column_tiles;
  const int first_row = row_tile * Tile::kRows;
  const int first_column = (static_cast<int>(blockIdx.x) - row_tile * p.column_tiles) * kColumns;
  const int log2_taps = p.input.log2_taps, taps = 1 << log2_taps;

  const T* window[kAChunks];
  unsigned inside[kAChunks];  // bit t: tap t lies in the picture
#pragma unroll
  for (int i = 0; i < kAChunks; ++i) {
    const int m = first_row + first_thread_row + i * kRowStep;
    int n, h, w;
    split_row(p, m < p.rows ? m : 0, n, h, w);
    const int h0 = h * p.window_step + p.window_origin + (phase >> 1);
    const int w0 = w * p.window_step + p.window_origin + (phase & 1);
    window[i] = static_cast<const T*>(p.input.x) + (n * p.input_image + int64_t{h0} * p.input.width + w0) * p.input.channels +
                piece * Vector<T>::kSize;
    inside[i] = 0;
    for (int tap = 0; tap < taps * taps; ++tap) {
      const int y = h0 + (tap >> log2_taps), x = w0 + (tap & (taps - 1));
      const bool in = m < p.rows && static_cast<unsigned>(y) < static_cast<unsigned>(p.input.height) &&
                      static_cast<unsigned>(x) < static_cast<unsigned>(p.input.width);
      inside[i] |= static_cast<unsigned>(in) << tap;
    }
  }
  const T* weight[kBChunks];
  bool weight_valid[kBChunks];
#pragma unroll
  for (int i = 0; i < kBChunks; ++i) {
    const int column = first_column + first_thread_row + i * kRowStep;
    weight_valid[i] = column < p.columns;
    weight[i] = static_cast<const T*>(p.weight) +
                (int64_t{phase} * p.columns + (weight_valid[i] ? column : 0)) * p.depth_padded + piece * Vector<T>::kSize;
  }

  int tap = 0, channel = 0;
  const int swizzled = swizzled_offset(first_thread_row, piece);
  const auto load = [&](char* stage, int) {
    const int depth = tap * p.input.channels + channel;
    const int offset = ((tap >> log2_taps) * p.input.width + (tap & (taps - 1))) * p.input.channels + channel;
#pragma unroll
    for (int j = 0; j < kAChunks; ++j) {
      copy_async_cached(stage + swizzled + j * kRowStep * kSwizzledRowBytes, window[j] + offset, inside[j] >> tap & 1u);
    }
#pragma unroll
    for (int j = 0; j < kBChunks; ++j) {
      copy_async(stage + kABytes + swizzled + j * kRowStep * kSwizzledRowBytes, weight[j] + depth, weight_valid[j]);
    }
    if (++tap == taps * taps) tap = 0, channel += kWarpgroupDepth;
  };

  Accumulators<Tile> sums;
  const int warpgroup = thread / 128;
  const auto multiply = [&](const char* stage) {
    const uint64_t a = matrix_descriptor(shared_address(stage + warpgroup * 64 * kSwizzledRowBytes), 16);
    const uint64_t b = matrix_descriptor(shared_address(stage + kABytes), 16);
#pragma unroll
    for (int k = 0; k < kWarpgroupDepth / 16; ++k) multiply_warpgroup<true>(sums.values[0], a + k * 2, b + k * 2, T{});
  };
  run_stages<kStages>(stages, kStageBytes, p.input.columns / kWarpgroupDepth, load, multiply);
  tile_epilogue<T>(p, sums, first_row, first_column, row_tile, phase, stages);
}

// Main loop W, as weight_gradient_kernel: a stage holds 64 pixels, each operand in blocks of 64 channels. A tile has 64 channels of the
// large operand at four taps, r and r + 2 by s and s + 2, which read the same pixels one step of the window apart.
constexpr int kTileTaps = 4;
using WeightTile = WarpgroupTile<kTileTaps * 64>;

template <int kStages>
constexpr size_t weight_shared_bytes() {
  return warpgroup_shared_bytes<WeightTile::kColumns, kStages>();
}

// Tap of a block of a tile with number 0 to 3.
__host__ __device__ constexpr int tap_of_block(int tile, int block) { return (tile / 2 + block / 2 * 2) * 4 + tile % 2 + block % 2 * 2; }

template <typename Math, int kStages>
__global__ void __launch_bounds__(256, 1) weight_gradient_warpgroup_kernel(WeightGradientParams p) {
  using T = typename Math::Type;
  constexpr int kBlockBytes = kWarpgroupDepth * kSwizzledRowBytes;
  constexpr int kABlocks = WeightTile::kRows / 64;
  constexpr int kStageBytes = (kABlocks + kTileTaps) * kBlockBytes;
  constexpr int kPixelStep = 256 / kPieces, kPixels = kWarpgroupDepth / kPixelStep;
  char* stages = swizzled_stages();
  const int thread = static_cast<int>(threadIdx.x), piece = thread % kPieces, first_thread_pixel = thread / kPieces;
  const int row_tile = static_cast<int>(blockIdx.x) / p.column_tiles;
  const int column_tile = static_cast<int>(blockIdx.x) - row_tile * p.column_tiles;
  const int first_row = row_tile * WeightTile::kRows, first_channel = column_tile / 4 * 64;
  const int first_pixel = static_cast<int>(blockIdx.z) * p.pixels_per_split;
  const int last_pixel = p.pixels - first_pixel < p.pixels_per_split ? p.pixels : first_pixel + p.pixels_per_split;

  const T* small = static_cast<const T*>(p.small.x) + first_row + piece * Vector<T>::kSize;
  const T* large = static_cast<const T*>(p.large.x) + first_channel + piece * Vector<T>::kSize;
  const int swizzled = swizzled_offset(first_thread_pixel, piece);
  const int first_tap = tap_of_block(column_tile % 4, 0);
  const auto load = [&](char* stage, int i) {
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
      const int pixel = first_pixel + i * kWarpgroupDepth + first_thread_pixel + j * kPixelStep;
      const bool valid = pixel < last_pixel;
      const int m = valid ? pixel : 0;
      char* to = stage + swizzled + j * kPixelStep * kSwizzledRowBytes;
#pragma unroll
      for (int b = 0; b < kABlocks; ++b) {
        const bool exists = valid && first_row + b * 64 < p.small.columns;
        copy_async(to + b * kBlockBytes, exists ? small + int64_t{m} * p.small.columns + b * 64 : small, exists);
      }
      const int n = p.grid_size.divide(m), rest = m - n * static_cast<int>(p.grid_size.divisor);
      const int row = p.grid_width_divisor.divide(rest);
      const int h = row * p.window_step + p.window_origin + first_tap / 4;
      const int w = (rest - row * p.grid_width) * p.window_step + p.window_origin + first_tap % 4;
      const T* corner = large + (n * p.large_image + int64_t{h} * p.large.width + w) * p.large.channels;
#pragma unroll
      for (int b = 0; b < kTileTaps; ++b) {
        const int y = h + b / 2 * 2, x = w + b % 2 * 2;
        const bool exists = valid && static_cast<unsigned>(y) < static_cast<unsigned>(p.large.height) &&
                            static_cast<unsigned>(x) < static_cast<unsigned>(p.large.width);
        copy_async_cached(to + (kABlocks + b) * kBlockBytes,
                          exists ? corner + (b / 2 * 2 * p.large.width + b % 2 * 2) * p.large.channels : large, exists);
      }
    }
  };

  Accumulators<WeightTile> sums;
  const int warpgroup = thread / 128;
  const auto multiply = [&](const char* stage) {
    const uint64_t a = matrix_descriptor(shared_address(stage + warpgroup * kBlockBytes), kBlockBytes);
    const uint64_t b = matrix_descriptor(shared_address(stage + kABlocks * kBlockBytes), kBlockBytes);
#pragma unroll
    for (int k = 0; k < kWarpgroupDepth / 16; ++k) {
      constexpr int kStep = 16 * kSwizzledRowBytes / 16;  // 16 pixels, in the descriptor's units
      multiply_warpgroup<false>(sums.values[0], a + k * kStep, b + k * kStep, T{});
    }
  };
  const int count = (last_pixel - first_pixel + kWarpgroupDepth - 1) / kWarpgroupDepth;
  run_stages<kStages>(stages, kStageBytes, count, load, multiply);

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
}

}  // namespace fastgan::cuda

#endif
