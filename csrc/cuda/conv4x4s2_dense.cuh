// Stride 1 between one pixel of many channels and a 4x4 picture (a generator's first layer): matrix products whose
// operands are read where they lie, without windows of taps. An image is a row of 16 * large_channels columns:
//
//   up               output[n, j] = sum over k of x[n, k] weight[j, k]: tiles of 64x64, or 128x128 where those fill the
//                    multiprocessors. The whole depth of a tile is copied at once, with one wait before all products.
//   weight gradient  grad[k, j] = sum over n of x[n, k] dy[n, j]: tiles of 64 channels by 128 columns, stages of 64
//                    images, 128 images in flight. Written in the weight's own order and type; only long sums are split.
//
// Pixels are copied in pieces of 8 bytes (100 channels are no multiple of 16), all else in pieces of 16. Results pass
// through shared memory, so that rows are stored in pieces of 16 bytes, too. 16-bit types only; what is not taken here
// (misaligned pointers, channels that are no multiple of 4, a depth beyond kDenseDepth) the generic loops do.
#pragma once

#include <algorithm>

#include "activation.cuh"
#include "conv4x4s2_product.cuh"
#include "conv4x4s2_tile.cuh"
#include "conv4x4s2_weight.cuh"

namespace fastgan::cuda {

constexpr int kDenseDepth = 176;  // the most channels of a pixel: more do not fit shared memory with the large tile
constexpr int kPixelPiece = 4;    // 16-bit numbers in 8 bytes

// Sums each of eight values over the lanes with the same lane % 4; lane l gets the sum of value l / 4.
__device__ __forceinline__ float sum_over_rows(const float (&values)[8]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float four[4], two[2];
  const auto add = [&](float low, float high, int mask) {
    const bool upper = (lane & mask) != 0;
    return (upper ? high : low) + shuffle_xor(upper ? low : high, mask);
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] = add(values[i], values[4 + i], 16);
#pragma unroll
  for (int i = 0; i < 2; ++i) two[i] = add(four[i], four[2 + i], 8);
  return add(two[0], two[1], 4);
}

// The way back: every lane gets the numbers that lanes with the same lane % 4 hold, that of lane l in entry l / 4.
__device__ __forceinline__ void spread_over_rows(float value, float (&values)[8]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float two[2], four[4];
  const auto exchange = [&](float mine, int mask, float& low, float& high) {
    const bool upper = (lane & mask) != 0;
    const float other = shuffle_xor(mine, mask);
    low = upper ? other : mine;
    high = upper ? mine : other;
  };
  exchange(value, 4, two[0], two[1]);
#pragma unroll
  for (int i = 0; i < 2; ++i) exchange(two[i], 8, four[i], four[2 + i]);
#pragma unroll
  for (int i = 0; i < 4; ++i) exchange(four[i], 16, values[i], values[4 + i]);
}

struct DenseUpParams {
  const void* input;   // [batch, small_channels]
  const void* weight;  // [columns, depth_padded], zeros beyond small_channels
  void* output;        // [batch, columns]
  Conv4x4Epilogue epilogue;
  int batch, columns, small_channels, depth_padded;
  int depth;             // that is multiplied: small_channels rounded up to an mma's 16
  FastDivisor channels;  // of the large side: column j is channel j % channels
  int column_tiles;
};

// A row of an operand or of the output in shared memory, with 16 bytes of padding against bank conflicts.
__host__ __device__ constexpr int dense_row_bytes(int elements) { return elements * 2 + 16; }

// Operands, and in the same place, after them, the tile of the output with the columns' sums of each row of warps.
template <typename Tile>
constexpr size_t dense_up_shared_bytes(int depth) {
  const int operands = (Tile::kRows + Tile::kColumns) * dense_row_bytes(depth);
  const int results = Tile::kRows * dense_row_bytes(Tile::kColumns) +
                      2 * Tile::kWarpRows * Tile::kColumns * static_cast<int>(sizeof(float));
  return static_cast<size_t>(operands > results ? operands : results);
}

template <typename Math, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 512 / Tile::kThreads) dense_up_kernel(DenseUpParams p) {
  wait_for_previous_kernel();
  using T = typename Math::Type;
  using Kind = Conv4x4Epilogue::Kind;
  constexpr int kSize = Vector<T>::kSize, kWarps = Tile::kThreads / kWarpSize;
  constexpr int kRowsPerThread = Tile::kRowTiles * 2;
  constexpr int kLanes = kWarpSize / 2;  // side by side in a row of weights
  static_assert(Tile::kColumnTiles == 4, "a thread has eight columns");
  char* shared = static_cast<char*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int row_tile = static_cast<int>(blockIdx.x) / p.column_tiles;
  const int first_row = row_tile * Tile::kRows;
  const int first_column = (static_cast<int>(blockIdx.x) - row_tile * p.column_tiles) * Tile::kColumns;
  const Conv4x4Epilogue& epilogue = p.epilogue;

  // A warp copies one row of pixels, or two of weights, at a time.
  const int row_bytes = dense_row_bytes(p.depth);
  char* weights = shared + Tile::kRows * row_bytes;
  for (int k = lane * kPixelPiece; k < p.depth; k += kWarpSize * kPixelPiece) {
    const T* input = static_cast<const T*>(p.input) + k;
#pragma unroll
    for (int row = 0; row < Tile::kRows; row += kWarps) {
      const int image = first_row + row + warp;
      const bool valid = image < p.batch && k < p.small_channels;
      copy_async_half(shared + (row + warp) * row_bytes + k * 2,
                      valid ? input + int64_t{image} * p.small_channels : p.input, valid);
    }
  }
  for (int k = lane % kLanes * kSize; k < p.depth; k += kLanes * kSize) {
    const T* weight = static_cast<const T*>(p.weight) + k;
#pragma unroll
    for (int row = 0; row < Tile::kColumns; row += 2 * kWarps) {
      const int of_tile = row + warp * 2 + lane / kLanes, column = first_column + of_tile;
      const bool valid = column < p.columns && k < p.depth_padded;
      copy_async(weights + of_tile * row_bytes + k * 2,
                 valid ? weight + int64_t{column} * p.depth_padded : p.weight, valid);
    }
  }
  copy_async_commit();

  Accumulators<Tile> sums;
  const auto channel_of = [&](int column) {
    return column - p.channels.divide(column) * static_cast<int>(p.channels.divisor);
  };
  float bias[Tile::kColumnTiles][2] = {};
  if (epilogue.bias != nullptr) {
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int column = first_column + sums.column(j, h);
        if (column < p.columns) bias[j][h] = epilogue.bias[channel_of(column)];
      }
    }
  }
  copy_async_wait<0>();
  block_barrier();
#pragma unroll 2
  for (int k = 0; k < p.depth; k += 16) multiply_step<Math, Tile>(shared + k * 2, weights + k * 2, row_bytes, sums);
  block_barrier();  // the operands' place is free

  // 16 bytes of the tile at (row, column): f(row of the output, column of the output, place in shared memory).
  constexpr int kOutputBytes = dense_row_bytes(Tile::kColumns), kPieces = Tile::kColumns / kSize;
  const auto for_each_piece = [&](const auto& f) {
    const int column = thread % kPieces * kSize;
#pragma unroll
    for (int step = 0; step < Tile::kRows; step += Tile::kThreads / kPieces) {
      const int row = step + thread / kPieces;
      f(first_row + row, first_column + column, shared + row * kOutputBytes + column * 2);
    }
  };
  if (epilogue.kind == Kind::activation_backward) {
    for_each_piece([&](int row, int column, char* piece) {
      const bool valid = row < p.batch && column < p.columns;
      copy_async(piece, valid ? static_cast<const T*>(epilogue.y) + int64_t{row} * p.columns + column : epilogue.y,
                 valid);
    });
    copy_async_commit();
    copy_async_wait<0>();
    block_barrier();
  }

  float first_sums[8] = {}, second_sums[8] = {};  // over this thread's rows
  const auto row_valid = [&](int r) { return first_row + sums.row(r / 2, r % 2 * 2) < p.batch; };
  const auto finish = [&](auto kind) {  // in three copies: without a branch for every number
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j) {
      float scale[2] = {1.0f, 1.0f}, shift[2] = {}, mean[2] = {}, invstd[2] = {1.0f, 1.0f};
      if constexpr (kind.value == Kind::activation_backward) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int column = first_column + sums.column(j, h);
          if (column >= p.columns) continue;
          load_of_channel(epilogue, channel_of(column), scale[h], shift[h], mean[h], invstd[h]);
        }
      }
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        float* v = sums.values[r / 2][j] + r % 2 * 2;
        auto* pair =
            reinterpret_cast<uint32_t*>(shared + sums.row(r / 2, r % 2 * 2) * kOutputBytes + sums.column(j, 0) * 2);
        float previous[2] = {};
        if constexpr (kind.value == Kind::activation_backward) unpack_pair(*pair, previous, T{});
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          v[h] += bias[j][h];
          if constexpr (kind.value == Kind::bias_activation) {
            v[h] = activate(epilogue.activation.kind, epilogue.activation.negative_slope, v[h]);
          } else if constexpr (kind.value == Kind::activation_backward) {
            v[h] *= activation_derivative(epilogue.activation.kind, epilogue.activation.negative_slope,
                                          fmaf(scale[h], previous[h], shift[h]));
            if (row_valid(r)) second_sums[2 * j + h] += v[h] * ((previous[h] - mean[h]) * invstd[h]);
          }
          if (row_valid(r)) first_sums[2 * j + h] += v[h];
        }
        *pair = pack_pair(v[0], v[1], T{});
      }
    }
  };
  switch (epilogue.kind) {
    case Kind::bias_activation: finish(std::integral_constant<Kind, Kind::bias_activation>{}); break;
    case Kind::activation_backward: finish(std::integral_constant<Kind, Kind::activation_backward>{}); break;
    default: finish(std::integral_constant<Kind, Kind::statistics>{});
  }
  block_barrier();
  for_each_piece([&](int row, int column, const char* piece) {
    if (row >= p.batch || column >= p.columns) return;
    *reinterpret_cast<uint4*>(static_cast<T*>(p.output) + int64_t{row} * p.columns + column) =
        *reinterpret_cast<const uint4*>(piece);
  });

  if (epilogue.kind != Kind::statistics && epilogue.kind != Kind::activation_backward) return;
  // Each row of warps its mean and squared deviations, or its two sums; then a thread a column merges them.
  float* of_warps = reinterpret_cast<float*>(shared + Tile::kRows * kOutputBytes);  // [2, kWarpRows, kColumns]
  const auto rows_of_warps = [&](int warp_row) {
    const int rows = p.batch - first_row - warp_row * Tile::kRowsPerWarp;
    return static_cast<float>(rows < 0 ? 0 : rows < Tile::kRowsPerWarp ? rows : Tile::kRowsPerWarp);
  };
  float first = sum_over_rows(first_sums);
  if (epilogue.kind == Kind::statistics) {
    const float rows = rows_of_warps(sums.warp_row());
    first *= rows > 0.0f ? 1.0f / rows : 0.0f;
    float mean[8];
    spread_over_rows(first, mean);
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      if (!row_valid(r)) continue;
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float deviation = sums.values[r / 2][j][r % 2 * 2 + h] - mean[2 * j + h];
          second_sums[2 * j + h] = fmaf(deviation, deviation, second_sums[2 * j + h]);
        }
      }
    }
  }
  const float second = sum_over_rows(second_sums);
  const int own_column = sums.first_column() + lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2;
  of_warps[sums.warp_row() * Tile::kColumns + own_column] = first;
  of_warps[(Tile::kWarpRows + sums.warp_row()) * Tile::kColumns + own_column] = second;
  block_barrier();
  if (thread >= Tile::kColumns || first_column + thread >= p.columns) return;
  const int64_t to = int64_t{row_tile} * p.columns + first_column + thread;
  const float* firsts = of_warps + thread;
  const float* seconds = firsts + Tile::kWarpRows * Tile::kColumns;
  if (epilogue.kind == Kind::statistics) {
    float count = 0.0f, sum = 0.0f, m2 = 0.0f;
#pragma unroll
    for (int w = 0; w < Tile::kWarpRows; ++w) {
      count += rows_of_warps(w);
      sum = fmaf(rows_of_warps(w), firsts[w * Tile::kColumns], sum);
    }
    const float mean = sum / count;
#pragma unroll
    for (int w = 0; w < Tile::kWarpRows; ++w) {
      const float difference = firsts[w * Tile::kColumns] - mean;
      m2 += fmaf(rows_of_warps(w) * difference, difference, seconds[w * Tile::kColumns]);
    }
    epilogue.statistics.mean[to] = mean;
    epilogue.statistics.m2[to] = m2;
    if (first_column + thread == 0) epilogue.statistics.count[row_tile] = count;
  } else {
    if (epilogue.gradients.sum_dz != nullptr) epilogue.gradients.sum_dz[to] = column_total<Tile>(firsts, 0);
    if (epilogue.gradients.sum_dz_xhat != nullptr) epilogue.gradients.sum_dz_xhat[to] = column_total<Tile>(seconds, 0);
  }
}

inline bool is_dense(const Conv4x4Geometry& g, DataType type) {
  return g.stride == 1 && g.small_height == 1 && g.small_width == 1 && type != DataType::float32 &&
         g.small_channels % kPixelPiece == 0;
}

inline bool is_aligned8(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 8 == 0; }

inline bool takes_dense(const Conv4x4Args& args) {
  return args.direction == Conv4x4Direction::up && is_dense(args.geometry, args.type) &&
         args.geometry.small_channels <= kDenseDepth && is_aligned8(args.input) && is_aligned16(args.output) &&
         is_aligned16(args.epilogue.y);
}

template <typename Math, typename Tile>
cudaError_t dense_up_launch(const Conv4x4Args& args, const Product& product, cudaStream_t stream) {
  const Conv4x4Geometry& g = args.geometry;
  const int64_t column_tiles = divide_up(product.columns, Tile::kColumns);
  const DenseUpParams params{args.input,
                             args.packed_weight,
                             args.output,
                             args.epilogue,
                             static_cast<int>(g.batch),
                             static_cast<int>(product.columns),
                             static_cast<int>(g.small_channels),
                             static_cast<int>(padded_depth(product, args.type)),
                             static_cast<int>(divide_up(g.small_channels, 16) * 16),
                             FastDivisor(g.large_channels),
                             static_cast<int>(column_tiles)};
  const dim3 grid(static_cast<unsigned>(divide_up(g.batch, Tile::kRows) * column_tiles));
  return launch(dense_up_kernel<Math, Tile>, grid, Tile::kThreads, dense_up_shared_bytes<Tile>(params.depth), stream,
                params);
}

struct DenseWeightGradientParams {
  const void* small;  // [batch, small_channels]
  const void* large;  // [batch, columns]
  int batch, images_per_split, small_channels, columns;
  int channels;  // of the large side
  int row_tiles;
  bool by_channel;  // a channel's 16 taps side by side in the gradient: a tile is 8 channels of every tap
  bool float32;     // the gradient, which else has the type of the activations
  bool aligned;     // four elements of the gradient are one access
  void* gradient;   // [splits, small_channels, columns]
};

using DenseGradientTile = Tile<64, 128, 2, 4>;
constexpr int kDenseImages = 64;  // of a stage
constexpr int kDenseStages = 3;
constexpr int64_t kDenseSplitImages = 1024;  // the fewest of a split: a second kernel must then add the splits
// The tile of the gradient in shared memory, in float32. Eight words of padding after every 32, and as many more at the
// end of a row: neither order of reading meets a bank twice.
constexpr int kDenseSumsRow = DenseGradientTile::kColumns / 32 * 40 + 8;

template <typename Math>
__host__ __device__ constexpr int dense_stage_bytes() {
  return kDenseImages *
         (pixel_row_bytes<Math>(DenseGradientTile::kRows) + pixel_row_bytes<Math>(DenseGradientTile::kColumns));
}

template <typename Math>
constexpr size_t dense_weight_gradient_shared_bytes() {
  static_assert(kDenseStages * dense_stage_bytes<Math>() >=
                    DenseGradientTile::kRows * kDenseSumsRow * static_cast<int>(sizeof(float)),
                "the sums take the stages' place");
  return kDenseStages * dense_stage_bytes<Math>();
}

template <typename Math>
__global__ void __launch_bounds__(DenseGradientTile::kThreads, 2)
    dense_weight_gradient_kernel(DenseWeightGradientParams p) {
  wait_for_previous_kernel();
  using T = typename Math::Type;
  using Tile = DenseGradientTile;
  constexpr int kSize = Vector<T>::kSize, kARow = pixel_row_bytes<Math>(Tile::kRows);
  constexpr int kBRow = pixel_row_bytes<Math>(Tile::kColumns), kABytes = kDenseImages * kARow;
  constexpr int kPieces = Tile::kColumns / kSize;  // in an image's row of a tile, of either operand
  static_assert(Tile::kRows / kPixelPiece == kPieces, "a thread's columns must be fixed");
  char* stages = static_cast<char*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  const int column_tile = static_cast<int>(blockIdx.x) / p.row_tiles;
  const int first_row = (static_cast<int>(blockIdx.x) - column_tile * p.row_tiles) * Tile::kRows;
  const int first_image = static_cast<int>(blockIdx.z) * p.images_per_split;
  const int images = p.batch - first_image < p.images_per_split ? p.batch - first_image : p.images_per_split;

  const int piece = thread % kPieces, a_column = first_row + piece * kPixelPiece;
  const int b_column =
      p.by_channel ? piece * p.channels + column_tile * kSize : column_tile * Tile::kColumns + piece * kSize;
  const T* small = static_cast<const T*>(p.small) + a_column;
  const T* large = static_cast<const T*>(p.large) + b_column;
  const auto load_stage = [&](char* stage, int image) {
#pragma unroll
    for (int step = 0; step < kDenseImages; step += Tile::kThreads / kPieces) {
      const int row = step + thread / kPieces;
      const int64_t n = first_image + image + row;
      const bool exists = image + row < images;
      const bool a_valid = exists && a_column < p.small_channels, b_valid = exists && b_column < p.columns;
      copy_async_half(stage + row * kARow + piece * 8, a_valid ? small + n * p.small_channels : p.small, a_valid);
      copy_async(stage + kABytes + row * kBRow + piece * 16, b_valid ? large + n * p.columns : p.large, b_valid);
    }
  };
  for (int i = 0; i < kDenseStages - 1; ++i) {
    if (i * kDenseImages < images) load_stage(stages + i * dense_stage_bytes<Math>(), i * kDenseImages);
    copy_async_commit();
  }

  Accumulators<Tile> sums;
  int current = 0;
  for (int image = 0; image < images; image += kDenseImages) {
    copy_async_wait<kDenseStages - 2>();
    block_barrier();  // this stage is complete, and everyone has left the one that is overwritten below
    const int next = image + (kDenseStages - 1) * kDenseImages;
    if (next < images) {
      load_stage(stages + (current == 0 ? kDenseStages - 1 : current - 1) * dense_stage_bytes<Math>(), next);
    }
    copy_async_commit();
    const char* stage = stages + current * dense_stage_bytes<Math>();
#pragma unroll
    for (int n = 0; n < kDenseImages; n += pixels_per_stage<Math>()) {
      multiply_pixel_stage<Math, Tile>(stage + n * kARow, stage + kABytes + n * kBRow, sums);
    }
    current = current == kDenseStages - 1 ? 0 : current + 1;
  }
  copy_async_wait<0>();
  block_barrier();

  float* tile = static_cast<float*>(shared_memory());
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int column = sums.column(j, e);
        float* pair = tile + sums.row(i, e) * kDenseSumsRow + column + column / 32 * 8;
        *reinterpret_cast<float2*>(pair) = float2{sums.values[i][j][e], sums.values[i][j][e + 1]};
      }
    }
  }
  block_barrier();

  // A warp stores a row. By channel, a lane has four taps of channel lane % 8; their columns are tap * 8 + channel.
  const int lane = thread % kWarpSize, group = lane / 8;
  const int column =
      column_tile * Tile::kColumns + (p.by_channel ? lane % 8 * kTaps + group * 4 : lane * 4);  // in the gradient
  if (column >= p.columns) return;
  const int64_t split = int64_t{blockIdx.z} * p.small_channels * p.columns;
#pragma unroll 4
  for (int row = thread / kWarpSize; row < Tile::kRows; row += Tile::kThreads / kWarpSize) {
    const int k = first_row + row;
    if (k >= p.small_channels) break;
    const float* from = tile + row * kDenseSumsRow + group * 40;
    const float4 four = p.by_channel ? float4{from[lane % 8], from[8 + lane % 8], from[16 + lane % 8], from[24 + lane % 8]}
                                     : *reinterpret_cast<const float4*>(from + lane % 8 * 4);
    const int64_t to = split + int64_t{k} * p.columns + column;
    if (p.float32) {
      store_four(static_cast<float*>(p.gradient) + to, p.aligned, four);
    } else {
      store_four(static_cast<T*>(p.gradient) + to, p.aligned, four);
    }
  }
}

inline bool takes_dense(const Conv4x4WeightGradientArgs& args) {
  return is_dense(args.geometry, args.type) && is_aligned8(args.small) && is_aligned16(args.large) &&
         (args.weight_type == DataType::float32 || args.weight_type == args.type) &&
         (args.weight_layout == Conv4x4WeightLayout::channels_last || args.geometry.large_channels % 8 == 0);
}

// A block for every multiprocessor, as far as there are images.
inline int64_t dense_images_per_split(const Conv4x4WeightGradientArgs& args) {
  const Conv4x4Geometry& g = args.geometry;
  const int64_t tiles = divide_up(g.small_channels, DenseGradientTile::kRows) *
                        divide_up(kTaps * g.large_channels, DenseGradientTile::kColumns);
  const int64_t splits =
      std::clamp<int64_t>(args.multiprocessors / tiles, 1, std::max<int64_t>(1, g.batch / kDenseSplitImages));
  return divide_up(divide_up(g.batch, splits), kDenseImages) * kDenseImages;
}

// With one split the gradient itself, else float32 partial results in channels_last order.
template <typename Math>
cudaError_t dense_weight_gradient_launch(const Conv4x4WeightGradientArgs& args, int64_t images_per_split,
                                         cudaStream_t stream) {
  const Conv4x4Geometry& g = args.geometry;
  const int64_t splits = divide_up(g.batch, images_per_split);
  const int64_t columns = kTaps * g.large_channels, row_tiles = divide_up(g.small_channels, DenseGradientTile::kRows);
  DenseWeightGradientParams params{args.small,
                                   args.large,
                                   static_cast<int>(g.batch),
                                   static_cast<int>(images_per_split),
                                   static_cast<int>(g.small_channels),
                                   static_cast<int>(columns),
                                   static_cast<int>(g.large_channels),
                                   static_cast<int>(row_tiles),
                                   false,
                                   true,
                                   true,
                                   args.workspace};
  if (splits == 1) {
    params.by_channel = args.weight_layout == Conv4x4WeightLayout::contiguous;
    params.float32 = args.weight_type == DataType::float32;
    params.aligned = reinterpret_cast<uintptr_t>(args.grad_weight) % (4 * size_of(args.weight_type)) == 0;
    params.gradient = args.grad_weight;
  }
  const dim3 grid(static_cast<unsigned>(row_tiles * divide_up(columns, DenseGradientTile::kColumns)), 1,
                  static_cast<unsigned>(splits));
  return launch(dense_weight_gradient_kernel<Math>, grid, DenseGradientTile::kThreads,
                dense_weight_gradient_shared_bytes<Math>(), stream, params);
}

}  // namespace fastgan::cuda
