// Main loop W: grad_weight[row, column] = sum over pixels of small[pixel, row] window(pixel)[column], the window of
// 4x4 taps on the large grid. The pixels are shared out between the blocks of blockIdx.z (split-K): each writes its
// own float32 partial result, and a second kernel adds them in order and brings them into PyTorch's layout.
#pragma once

#include "conv4x4s2_operand.cuh"
#include "conv4x4s2_tile.cuh"
#include "reduce.cuh"

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
  wait_for_previous_kernel();
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

  uint4 a_fetched[kAChunks], b_fetched[kBChunks];
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
    for (int i = 0; i < kAChunks; ++i) a_fetched[i] = fetch<T>(p.small, a_window(pixel, i), a_column);
#pragma unroll
    for (int i = 0; i < kBChunks; ++i) b_fetched[i] = fetch<T>(p.large, b_window(pixel, i), b_column);
  };
  const auto store_stage = [&](char* stage, int pixel) {
#pragma unroll
    for (int i = 0; i < kAChunks; ++i) {
      store_piece<T>(p.small, a_window(pixel, i), a_fetched[i], a_column,
                        stage + (thread + i * Tile::kThreads) / kAPieces * kARow + thread % kAPieces * 16);
    }
#pragma unroll
    for (int i = 0; i < kBChunks; ++i) {
      store_piece<T>(p.large, b_window(pixel, i), b_fetched[i], b_column,
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

// Four float32 elements of a weight's gradient, in one access if the address allows it.
template <typename T>
__device__ __forceinline__ void store_four(T* p, bool aligned, float4 values) {
  struct alignas(4 * sizeof(T)) Four {
    T elements[4];
  } four;
  from_float(values.x, four.elements[0]);
  from_float(values.y, four.elements[1]);
  from_float(values.z, four.elements[2]);
  from_float(values.w, four.elements[3]);
  if (aligned) {
    *reinterpret_cast<Four*>(p) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = four.elements[i];
  }
}

// How the reduction writes what it reads in the partial results' order [small_channels, 16, large_channels].
enum class ReduceOrder : int {
  as_read = 0,  // channels_last
  transposed,   // contiguous, channels in fours: 16 taps of some channels pass through shared memory
  scattered,    // contiguous, any number of channels: few, as a rule, and then so are the elements
};

struct WeightReduceParams {
  const float* partial;  // [splits, small_channels, 16, large_channels]
  int splits;
  int lanes;         // threads of a block that share an element's splits: a power of two, up to 16
  int64_t elements;  // of one partial result
  int64_t large_channels;
  FastDivisor channels, vectors_per_row;  // transposed: fours of channels; scattered: channels, fours of 16 * channels
  ReduceOrder order;
  void* grad_weight;
  bool aligned;  // four elements of the gradient are one access
};

constexpr int kReduceThreads = 256;
constexpr int kReduceBatch = 8;      // loads that a thread has in flight
constexpr int kTransposedPair = 17;  // floats from one channel to the next in shared memory: 16 taps, and no bank twice
constexpr size_t kReduceSharedBytes =
    kReduceThreads * sizeof(float4) + kReduceThreads / 4 * kTransposedPair * sizeof(float);

// A thread reads four neighbouring elements of every lanes-th split; the lanes' sums are added in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads) weight_reduce_kernel(WeightReduceParams p) {
  wait_for_previous_kernel();
  float4* shared = static_cast<float4*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  const int vectors = kReduceThreads / p.lanes;
  const int vector = thread & (vectors - 1), lane = thread / vectors;
  const int quads = vectors / kTaps, quad = vector & (quads - 1);  // transposed: fours of channels a block has
  int64_t offset = (int64_t{blockIdx.x} * vectors + vector) * 4;
  bool valid = offset < p.elements;
  if (p.order == ReduceOrder::transposed) {
    const int64_t first = (int64_t{blockIdx.x} * quads + quad) * 4;  // k * large_channels + c
    valid = first * kTaps < p.elements;
    const int64_t k = p.channels.divide(static_cast<int>(first / 4));
    offset = first + (k * (kTaps - 1) + vector / quads) * p.large_channels;
  }

  float4 sums[1] = {{0.0f, 0.0f, 0.0f, 0.0f}};
  if (valid) {
    for (int split = lane; split < p.splits; split += kReduceBatch * p.lanes) {
      float4 values[kReduceBatch];
#pragma unroll
      for (int u = 0; u < kReduceBatch; ++u) {
        const int s = split + u * p.lanes;
        values[u] = s < p.splits ? *reinterpret_cast<const float4*>(p.partial + s * p.elements + offset)
                                 : float4{0.0f, 0.0f, 0.0f, 0.0f};
      }
#pragma unroll
      for (int u = 0; u < kReduceBatch; ++u) sums[0] = Add{}(sums[0], values[u]);
    }
  }
  reduce_rows<kReduceThreads>(shared, sums, vectors);
  const float4 sum = sums[0];

  T* out = static_cast<T*>(p.grad_weight);
  if (p.order == ReduceOrder::transposed) {
    float* taps = reinterpret_cast<float*>(shared + kReduceThreads);
    if (lane == 0) {
      float* first = taps + quad * 4 * kTransposedPair + vector / quads;
      first[0] = sum.x;
      first[kTransposedPair] = sum.y;
      first[2 * kTransposedPair] = sum.z;
      first[3 * kTransposedPair] = sum.w;
    }
    block_barrier();
    const int64_t index = (int64_t{blockIdx.x} * vectors + thread) * 4;
    if (thread >= vectors || index >= p.elements) return;
    const float* four = taps + thread / 4 * kTransposedPair + thread % 4 * 4;
    store_four(out + index, p.aligned, float4{four[0], four[1], four[2], four[3]});
  } else if (lane == 0 && valid) {
    if (p.order == ReduceOrder::as_read) return store_four(out + offset, p.aligned, sum);
    const int64_t k = p.vectors_per_row.divide(static_cast<int>(offset / 4));
    const int first = static_cast<int>(offset - k * kTaps * p.large_channels);
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int tap = p.channels.divide(first + i);
      const int64_t c = first + i - tap * p.large_channels;
      from_float(values[i], out[(k * p.large_channels + c) * kTaps + tap]);
    }
  }
}

// The reduction of `splits` partial results, with enough threads to keep the memory busy.
inline WeightReduceParams weight_reduce_params(const Conv4x4Geometry& g, const float* partial, int64_t splits,
                                               Conv4x4WeightLayout layout, DataType type, void* grad_weight) {
  constexpr int64_t kThreadsWanted = 128 * 1024, kSplitsPerLane = 4;
  WeightReduceParams p{};
  p.partial = partial;
  p.splits = static_cast<int>(splits);
  p.elements = g.small_channels * kTaps * g.large_channels;
  p.lanes = 1;
  while (p.lanes < 16 && p.elements / 4 * p.lanes < kThreadsWanted && p.lanes * kSplitsPerLane < splits) p.lanes *= 2;
  p.large_channels = g.large_channels;
  p.order = layout == Conv4x4WeightLayout::channels_last ? ReduceOrder::as_read
            : g.large_channels % 4 == 0                  ? ReduceOrder::transposed
                                                         : ReduceOrder::scattered;
  p.channels = FastDivisor(p.order == ReduceOrder::transposed ? g.large_channels / 4 : g.large_channels);
  p.vectors_per_row = FastDivisor(4 * g.large_channels);
  p.grad_weight = grad_weight;
  p.aligned = reinterpret_cast<uintptr_t>(grad_weight) % (4 * size_of(type)) == 0;
  return p;
}

}  // namespace fastgan::cuda
