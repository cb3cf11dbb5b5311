// Weights into the order in which the main loops read them, all layers of a network in one launch.
//
// Down reads [k][tap][c]: what channels_last is already, so its weights are converted and no more. Every other case
// transposes a matrix: up reads runs of k, and the weight is a dense matrix [k][16 c] whichever its layout; contiguous
// weights for down are a matrix [k c][16]. A thread transposes 8 (float32: 4) x 4 elements in its registers. Its warp's
// lanes stand 8 x 4, so that they read 64 bytes side by side, and write 128: whole sectors in both directions, without
// shared memory.
//
// 512 x 256 channels, float32 to bfloat16, on an H200: 2.3 us down from channels_last, 3.3 us up (a thread a pair of channels: 4.2 and 16).
#pragma once

#include "conv4x4s2_tile.cuh"
#include "conv4x4s2_weight.cuh"

namespace fastgan::cuda {

constexpr int kPackThreads = 128;
constexpr int kPackColumns = 4;      // of a thread
constexpr int kPackLaneColumns = 4;  // lanes side by side: a warp has 16 columns
constexpr int kPackLaneRows = kWarpSize / kPackLaneColumns;
constexpr int kConvertedElements = kPackThreads * 32;  // of a block
constexpr int kMostPackLayers = 8;                     // of a launch

enum class PackOrder : int { convert = 0, taps_outward, phases, paired_phases, from_pixel };

struct PackLayer {
  const void* weight;
  void* packed;
  PackOrder order;
  bool aligned;  // the weight, to 16 bytes
  int blocks;
  int64_t elements;
  // The matrix that is transposed. Element (row, column) goes to pack_run(column).start + row + row / large_channels *
  // jump.
  int rows, columns;
  int64_t jump;
  bool whole;  // a vector of rows stays together, at a multiple of 16 bytes
  FastDivisor warp_columns;
  int small_channels, large_channels;
  FastDivisor channel_divisor;  // by large_channels
  // Of up:
  bool channels_last;
  int64_t depth_padded;
  int padding;  // zeros at the end of each packed row; paired_phases: for the tap that a phase does not have
};

struct PackParams {
  PackLayer layers[kMostPackLayers];
};

inline PackLayer make_pack_layer(const Conv4x4PackArgs& args, int64_t depth_padded, bool paired_phases) {
  const int64_t small = args.geometry.small_channels, large = args.geometry.large_channels;
  const int vector = 16 / size_of(args.type);
  PackLayer p{};
  p.weight = args.weight, p.packed = args.packed;
  p.aligned = is_aligned16(args.weight);
  p.elements = small * kTaps * large;
  p.small_channels = static_cast<int>(small), p.large_channels = static_cast<int>(large);
  p.channel_divisor = FastDivisor(large);
  p.channels_last = args.weight_layout == Conv4x4WeightLayout::channels_last;
  p.depth_padded = depth_padded;
  if (args.direction == Conv4x4Direction::down && p.channels_last) {
    p.order = PackOrder::convert;
    p.blocks = static_cast<int>(divide_up(p.elements, kConvertedElements));
    return p;
  }
  if (args.direction == Conv4x4Direction::down) {
    p.order = PackOrder::taps_outward;
    p.rows = static_cast<int>(small * large), p.columns = kTaps;
    p.jump = (kTaps - 1) * large;
    p.whole = large % vector == 0;
  } else {
    p.order = args.geometry.stride == 1 ? PackOrder::from_pixel : paired_phases ? PackOrder::paired_phases : PackOrder::phases;
    p.rows = static_cast<int>(small), p.columns = static_cast<int>(kTaps * large);
    p.padding = static_cast<int>(paired_phases ? small : depth_padded - (p.order == PackOrder::phases ? 4 : 1) * small);
    p.whole = p.order == PackOrder::from_pixel || small % vector == 0;
  }
  const int64_t warp_columns = p.columns / (kPackColumns * kPackLaneColumns);
  p.warp_columns = FastDivisor(warp_columns);
  const int64_t warps = divide_up(p.rows + p.padding, kPackLaneRows * vector) * warp_columns;
  p.blocks = static_cast<int>(divide_up(warps, kPackThreads / kWarpSize));
  return p;
}

template <typename T>
struct alignas(4 * sizeof(T)) Quad {
  T elements[4];
};

// kCount times four elements, `stride` apart, of which `count` are there; 0 beyond.
template <int kCount, typename W>
__device__ __forceinline__ void load_quads(const W* p, int64_t stride, int count, bool aligned,
                                           float (&values)[kCount][4]) {
  if (aligned) {
    Quad<W> quads[kCount] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) quads[i] = *reinterpret_cast<const Quad<W>*>(p + i * stride);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i][j] = to_float(quads[i].elements[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i][j] = i < count ? to_float(p[i * stride + j]) : 0.0f;
    }
  }
}

template <typename W, typename T>
__device__ __forceinline__ void pack_converted(const PackLayer& p, int block) {
  constexpr int kQuads = kConvertedElements / kPackThreads / 4, kStride = kPackThreads * 4;
  const int64_t first = int64_t{block} * kConvertedElements + threadIdx.x * 4;
  const int64_t count = (p.elements - first + kStride - 1) / kStride;
  float values[kQuads][4];
  load_quads(static_cast<const W*>(p.weight) + first, kStride, static_cast<int>(count), p.aligned, values);
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    Quad<T> quad;
#pragma unroll
    for (int j = 0; j < 4; ++j) from_float(values[i][j], quad.elements[j]);
    if (i < count) *reinterpret_cast<Quad<T>*>(static_cast<T*>(p.packed) + first + i * kStride) = quad;
  }
}

// Where a column's elements go, and how many rows there are with the zeros that belong after them.
struct PackRun {
  int64_t start;
  int rows;
  int zeros_jump = 0;  // from where they would come next
};

__device__ __forceinline__ PackRun pack_run(const PackLayer& p, int column) {
  if (p.order == PackOrder::taps_outward) return {int64_t{column} * p.large_channels, p.rows};
  const int outer = p.channels_last ? p.channel_divisor.divide(column) : column / kTaps;
  const int inner = column - outer * (p.channels_last ? p.large_channels : kTaps);
  const int tap = p.channels_last ? outer : inner, c = p.channels_last ? inner : outer;
  if (p.order == PackOrder::from_pixel) {
    return {(int64_t{tap} * p.large_channels + c) * p.depth_padded, p.rows + p.padding};
  }
  // Kernel row r meets output rows of parity (r + 1) % 2, of which it is tap (3 - r) / 2; columns alike.
  const int r = tap / 4, s = tap % 4;
  const int phase = (r + 1) % 2 * 2 + (s + 1) % 2, phase_tap = (3 - r) / 2 * 2 + (3 - s) / 2;
  if (p.order == PackOrder::paired_phases) {
    // Windows of 2 x 3 taps: the even columns' phase has none at the end, the odd columns' none at the beginning.
    const int odd = phase % 2, column_tap = phase_tap % 2;
    return {(int64_t{phase} * p.large_channels + c) * p.depth_padded +
                int64_t{phase_tap / 2 * 3 + column_tap + odd} * p.small_channels,
            column_tap != odd ? p.rows + p.padding : p.rows, odd ? -2 * p.small_channels : 0};
  }
  return {(int64_t{phase} * p.large_channels + c) * p.depth_padded + int64_t{phase_tap} * p.small_channels,
          phase_tap == 3 ? p.rows + p.padding : p.rows};
}

template <typename W, typename T>
__device__ __forceinline__ void pack_transposed(const PackLayer& p, int block) {
  constexpr int kRows = Vector<T>::kSize;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int warp = block * (kPackThreads / kWarpSize) + thread / kWarpSize;
  const int warp_row = p.warp_columns.divide(warp);
  const int warp_column = warp - warp_row * static_cast<int>(p.warp_columns.divisor);
  const int row = (warp_row * kPackLaneRows + lane / kPackLaneColumns) * kRows;
  const int column = (warp_column * kPackLaneColumns + lane % kPackLaneColumns) * kPackColumns;
  if (row >= p.rows + p.padding) return;

  float values[kRows][kPackColumns];
  load_quads(static_cast<const W*>(p.weight) + int64_t{row} * p.columns + column, p.columns, p.rows - row, p.aligned,
             values);
#pragma unroll
  for (int j = 0; j < kPackColumns; ++j) {
    const PackRun run = pack_run(p, column + j);
    T* to = static_cast<T*>(p.packed) + run.start + row;
    Vector<T> vector;
#pragma unroll
    for (int i = 0; i < kRows; ++i) vector.values[i] = values[i][j];
    if (p.whole) {
      const int64_t jumps = p.jump == 0 ? 0 : p.channel_divisor.divide(row) * p.jump;
      const int zeros_jump = row < p.rows ? 0 : run.zeros_jump;
      if (row < run.rows) store_vector(to + jumps + zeros_jump, kRows, true, vector);
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int64_t jumps = p.jump == 0 ? 0 : p.channel_divisor.divide(row + i) * p.jump;
        if (row + i < run.rows) from_float(vector.values[i], to[i + jumps]);
      }
    }
  }
}

template <typename W, typename T>
__global__ void __launch_bounds__(kPackThreads, 4) pack_kernel(const __grid_constant__ PackParams params) {
  wait_for_previous_kernel();
  int layer = 0, block = static_cast<int>(blockIdx.x);
  while (block >= params.layers[layer].blocks) block -= params.layers[layer++].blocks;
  const PackLayer p = params.layers[layer];
  if (p.order == PackOrder::convert) {
    pack_converted<W, T>(p, block);
  } else {
    pack_transposed<W, T>(p, block);
  }
}

}  // namespace fastgan::cuda
