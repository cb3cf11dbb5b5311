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

// Main loops F and T, as gather_kernel.
template <typename Math, int kColumns, int kStages>
__global__ void __launch_bounds__(256, 1) gather_warpgroup_kernel(GatherParams p) {
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
  const auto load = [&](char* stage, int i) {
    const int offset = ((tap >> log2_taps) * p.input.width + (tap & (taps - 1))) * p.input.channels + channel;
#pragma unroll
    for (int j = 0; j < kAChunks; ++j) {
      copy_async(stage + swizzled + j * kRowStep * kSwizzledRowBytes, window[j] + offset, inside[j] >> tap & 1u);
    }
#pragma unroll
    for (int j = 0; j < kBChunks; ++j) {
      copy_async(stage + kABytes + swizzled + j * kRowStep * kSwizzledRowBytes, weight[j] + i * kWarpgroupDepth, weight_valid[j]);
    }
    channel += kWarpgroupDepth;
    if (channel == p.input.channels) channel = 0, ++tap;
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
  gather_epilogue<T>(p, sums, first_row, first_column, row_tile, phase, reinterpret_cast<float*>(stages));
}

// Main loop W, as weight_gradient_kernel: a stage holds 64 pixels, each operand in blocks of 64 channels.
template <typename Math, int kColumns, int kStages>
__global__ void __launch_bounds__(256, 1) weight_gradient_warpgroup_kernel(WeightGradientParams p) {
  using T = typename Math::Type;
  using Tile = WarpgroupTile<kColumns>;
  constexpr int kBlockBytes = kWarpgroupDepth * kSwizzledRowBytes;
  constexpr int kABlocks = Tile::kRows / 64, kBBlocks = kColumns / 64;
  constexpr int kStageBytes = (kABlocks + kBBlocks) * kBlockBytes;
  constexpr int kPixelStep = 256 / kPieces, kPixels = kWarpgroupDepth / kPixelStep;
  char* stages = swizzled_stages();
  const int thread = static_cast<int>(threadIdx.x), piece = thread % kPieces, first_thread_pixel = thread / kPieces;
  const int row_tile = static_cast<int>(blockIdx.x) / p.column_tiles;
  const int first_row = row_tile * Tile::kRows;
  const int first_column = (static_cast<int>(blockIdx.x) - row_tile * p.column_tiles) * kColumns;
  const int first_pixel = static_cast<int>(blockIdx.z) * p.pixels_per_split;
  const int last_pixel = p.pixels - first_pixel < p.pixels_per_split ? p.pixels : first_pixel + p.pixels_per_split;

  // A block of the large operand is 64 channels of one tap.
  int tap_h[kBBlocks], tap_w[kBBlocks], channel[kBBlocks];
  bool block_valid[kBBlocks];
#pragma unroll
  for (int b = 0; b < kBBlocks; ++b) {
    const int column = first_column + b * 64;
    block_valid[b] = column < p.large.columns;
    const int tap = p.large.channel_divisor.divide(block_valid[b] ? column : 0);
    channel[b] = (block_valid[b] ? column : 0) - tap * p.large.channels + piece * Vector<T>::kSize;
    tap_h[b] = p.window_origin + tap / 4;
    tap_w[b] = p.window_origin + tap % 4;
  }
  const T* small = static_cast<const T*>(p.small.x) + first_row + piece * Vector<T>::kSize;
  const T* large = static_cast<const T*>(p.large.x);
  const int swizzled = swizzled_offset(first_thread_pixel, piece);
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
      const int h = row * p.window_step, w = (rest - row * p.grid_width) * p.window_step;
#pragma unroll
      for (int b = 0; b < kBBlocks; ++b) {
        const int y = h + tap_h[b], x = w + tap_w[b];
        const bool exists = valid && block_valid[b] && static_cast<unsigned>(y) < static_cast<unsigned>(p.large.height) &&
                            static_cast<unsigned>(x) < static_cast<unsigned>(p.large.width);
        const int64_t offset = (n * p.large_image + int64_t{y} * p.large.width + x) * p.large.channels + channel[b];
        copy_async(to + (kABlocks + b) * kBlockBytes, exists ? large + offset : large, exists);
      }
    }
  };

  Accumulators<Tile> sums;
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
  store_partial<Tile>(p, sums, first_row, first_column);
}

}  // namespace fastgan::cuda

#endif
