// Main loop W: grad_weight[row, column] = sum over pixels of small[pixel, row] window(pixel)[column], the window of
// 4x4 taps on the large grid. The pixels are shared out between the blocks of blockIdx.z (split-K): each writes its
// own float32 partial result, and a second kernel adds them in order and brings them into PyTorch's layout.
#pragma once

#include "conv4x4s2_operand.cuh"
#include "conv4x4s2_tile.cuh"

namespace fastgan::cuda {

constexpr int kTaps = 16;

struct WeightGradientParams {
  WindowOperand small, large;
  int64_t small_image, large_image;  // pixels of an image
  int pixels;                        // batch * small grid
  int pixels_per_split;              // a multiple of the pixels of a stage
  FastDivisor grid_size, grid_width_divisor;
  int grid_width;
  int window_step, window_origin;
  int row_tiles, column_tiles;
  float* partial;  // [splits, small.columns, large.columns]
};

// What this block has summed, into its own partial result.
template <typename Tile>
__device__ __forceinline__ void store_partial(const WeightGradientParams& p, const Accumulators<Tile>& sums, int first_row,
                                              int first_column) {
  float* partial = p.partial + int64_t{blockIdx.z} * p.small.columns * p.large.columns;
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first_row + sums.row(i, e), column = first_column + sums.column(j, e);
        if (row < p.small.columns && column < p.large.columns) {
          partial[int64_t{row} * p.large.columns + column] = sums.values[i][j][e];
        }
      }
    }
  }
}

// Two resident blocks of the small tile are enough to ask for: with more the compiler spills.
template <typename Math, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 256 / Tile::kThreads) weight_gradient_kernel(WeightGradientParams p) {
  using T = typename Math::Type;
  constexpr int kSize = Vector<T>::kSize;
  constexpr int kPixels = pixels_per_stage<Math>();
  constexpr int kARow = pixel_row_bytes<Math>(Tile::kRows), kBRow = pixel_row_bytes<Math>(Tile::kColumns);
  constexpr int kABytes = kPixels * kARow, kStageBytes = kABytes + kPixels * kBRow;
  constexpr int kAPieces = Tile::kRows / kSize, kBPieces = Tile::kColumns / kSize;  // of 16 bytes, in a pixel's row
  constexpr int kAChunks = kPixels * kAPieces / Tile::kThreads, kBChunks = kPixels * kBPieces / Tile::kThreads;
  static_assert(Tile::kThreads % kAPieces == 0 && Tile::kThreads % kBPieces == 0, "a thread's columns must be fixed");
  char* stages = static_cast<char*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  const int row_tile = static_cast<int>(blockIdx.x) / p.column_tiles;
  const int first_row = row_tile * Tile::kRows;
  const int first_column = (static_cast<int>(blockIdx.x) - row_tile * p.column_tiles) * Tile::kColumns;
  const int first_pixel = static_cast<int>(blockIdx.z) * p.pixels_per_split;
  const int last_pixel = p.pixels - first_pixel < p.pixels_per_split ? p.pixels : first_pixel + p.pixels_per_split;
  const int a_column = first_row + thread % kAPieces * kSize, b_column = first_column + thread % kBPieces * kSize;

  Fetched a_fetched[kAChunks], b_fetched[kBChunks];
  const auto window_of = [&](int pixel, int64_t image, int step, int origin) {
    const int m = pixel < last_pixel ? pixel : 0;
    const int n = p.grid_size.divide(m), rest = m - n * static_cast<int>(p.grid_size.divisor);
    const int h = p.grid_width_divisor.divide(rest), w = rest - h * p.grid_width;
    return Window{n * image, h * step + origin, w * step + origin, pixel < last_pixel};
  };
  const auto a_window = [&](int pixel, int i) {
    return window_of(pixel + (thread + i * Tile::kThreads) / kAPieces, p.small_image, 1, 0);
  };
  const auto b_window = [&](int pixel, int i) {
    return window_of(pixel + (thread + i * Tile::kThreads) / kBPieces, p.large_image, p.window_step, p.window_origin);
  };
  const auto fetch_stage = [&](int pixel) {
#pragma unroll
    for (int i = 0; i < kAChunks; ++i) fetch<T>(p.small, a_window(pixel, i), a_column, a_fetched[i]);
#pragma unroll
    for (int i = 0; i < kBChunks; ++i) fetch<T>(p.large, b_window(pixel, i), b_column, b_fetched[i]);
  };
  const auto store_stage = [&](char* stage, int pixel) {
#pragma unroll
    for (int i = 0; i < kAChunks; ++i) {
      store_piece<Math>(p.small, a_window(pixel, i), a_fetched[i], a_column,
                        stage + (thread + i * Tile::kThreads) / kAPieces * kARow + thread % kAPieces * 16);
    }
#pragma unroll
    for (int i = 0; i < kBChunks; ++i) {
      store_piece<Math>(p.large, b_window(pixel, i), b_fetched[i], b_column,
                        stage + kABytes + (thread + i * Tile::kThreads) / kBPieces * kBRow + thread % kBPieces * 16);
    }
  };

  // Two stages suffice: the next one waits in registers while this one is multiplied.
  Accumulators<Tile> sums;
  fetch_stage(first_pixel);
  store_stage(stages, first_pixel);
  int current = 0;
  for (int pixel = first_pixel; pixel < last_pixel; pixel += kPixels) {
    block_barrier();  // this stage is complete, and everyone has left the other one
    const bool more = pixel + kPixels < last_pixel;
    if (more) fetch_stage(pixel + kPixels);
    const char* stage = stages + current * kStageBytes;
    multiply_pixel_stage<Math, Tile>(stage, stage + kABytes, sums);
    current ^= 1;
    if (more) store_stage(stages + current * kStageBytes, pixel + kPixels);
  }

  store_partial<Tile>(p, sums, first_row, first_column);
}

template <typename Math, typename Tile>
constexpr size_t weight_gradient_shared_bytes() {
  return 2 * pixels_per_stage<Math>() * (pixel_row_bytes<Math>(Tile::kRows) + pixel_row_bytes<Math>(Tile::kColumns));
}

// Element (k, c, tap) of a weight is at k * 16 * large_channels + c * channel_stride + tap * tap_stride.
struct WeightStrides {
  int64_t channel, tap;

  WeightStrides(Conv4x4WeightLayout layout, int64_t large_channels)
      : channel(layout == Conv4x4WeightLayout::contiguous ? kTaps : 1),
        tap(layout == Conv4x4WeightLayout::contiguous ? 1 : large_channels) {}
};

struct WeightReduceParams {
  const float* partial;  // [splits, small_channels, 16, large_channels]
  int splits;
  int64_t small_channels, large_channels;
  void* grad_weight;
  WeightStrides strides;
};

constexpr int kReduceThreads = 128;

// A thread reads its pair of channels tap by tap, neighbours side by side.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads) weight_reduce_kernel(WeightReduceParams p) {
  const int64_t pair = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x;
  const int64_t pairs = p.small_channels * p.large_channels;
  if (pair >= pairs) return;
  const int64_t k = pair / p.large_channels, c = pair - k * p.large_channels;
  T* out = static_cast<T*>(p.grad_weight) + k * kTaps * p.large_channels + c * p.strides.channel;
  float sums[kTaps] = {};
  for (int split = 0; split < p.splits; ++split) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      sums[tap] += p.partial[(split * p.small_channels + k) * kTaps * p.large_channels + tap * p.large_channels + c];
    }
  }
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) from_float(sums[tap], out[tap * p.strides.tap]);
}

}  // namespace fastgan::cuda
