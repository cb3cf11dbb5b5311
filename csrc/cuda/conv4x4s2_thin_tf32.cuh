// The loops of conv4x4s2_thin.cuh (thin images under channels in 64s, stride 2) for float32 activations, multiplied in
// TF32. Simpler than those of 16 bits: the small grid's traffic is twice as large and hides more.
//
//   down             tiles are some rows of the small grid, at most 128 pixels: the image rows under them are copied ahead into
//                    shared memory with their zero border, the weights stay in registers.
//   up               a block has some gaps between neighbouring rows of the small grid, under each of which lie two rows
//                    of the image. Products [small pixel, 16 taps * channels] of the rows on both sides go to shared
//                    memory, from which every pixel of the image takes the four that are its own.
//   weight gradient  every warp takes 16 pixels of a tile and sums the whole 64 x 16 * channels result.
//
// Down and the weight gradient walk over the tiles with as many blocks as the device holds at a time.
// Operands that come from the small grid are loaded as fragments, 16 bytes a lane: the order of what is summed (up:
// channels) and of the result's rows (weight gradient: channels) is free as long as both sides agree.
#pragma once

#include "conv4x4s2_thin.cuh"

namespace fastgan::cuda {

constexpr int kTf32UpPixels = 256;   // most of the small grid in a block
constexpr int kTf32UpPadding = 16;   // of a row of weights: eight lanes' 16 bytes of two rows meet no bank twice
constexpr int kTf32SumPadding = 8;   // of a row of products: nor do the four words of eight rows

// ---- down and weight gradient: tiles of whole rows -------------------------------------------------------------------

struct Tf32Tiles : ThinGrid {
  FastDivisor row_stride;  // of a staged row: a pixel of padding, and as far as the last window reaches
  int staged;              // elements
};

inline Tf32Tiles tf32_tiles(const Conv4x4Geometry& g, const void* image) {
  Tf32Tiles t{};
  static_cast<ThinGrid&>(t) = thin_grid(g, image);
  t.row_stride = FastDivisor((2 * g.small_width + 2) * g.large_channels);
  t.staged = static_cast<int>((2 * t.rows + 2) * t.row_stride.divisor);
  return t;
}

// Copies the image rows under a tile ahead.
template <int kChannels>
__device__ __forceinline__ void copy_image_rows(const Tf32Tiles& t, int tile, float* stage) {
  int n;
  const int first_row = 2 * thin_row_of_tile(t, tile, n) - 1;
  const float* image = static_cast<const float*>(t.image) + int64_t{n} * t.large_height * t.row_elements;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < t.staged; i += kThinThreads) {
    const int row = t.row_stride.divide(i);
    const int element = i - row * static_cast<int>(t.row_stride.divisor) - kChannels, h = first_row + row;
    const bool exists = static_cast<unsigned>(h) < static_cast<unsigned>(t.large_height) &&
                        static_cast<unsigned>(element) < static_cast<unsigned>(t.row_elements);
    copy_async_word(stage + i, exists ? image + int64_t{h} * t.row_elements + element : image, exists);
  }
}

// Where the window of a tile's pixel begins in the stage; pixels beyond the tile look at its first one.
template <int kChannels>
__device__ __forceinline__ int tf32_window(const Tf32Tiles& t, int pixel) {
  if (pixel >= t.rows * t.small_width) pixel = 0;
  const int row = t.width.divide(pixel);
  return 2 * (row * static_cast<int>(t.row_stride.divisor) + (pixel - row * t.small_width) * kChannels);
}

// Of element first + j of a window, j < kGroup: where a kernel row is whole groups, the compiler knows the row.
template <int kChannels, int kGroup>
__device__ __forceinline__ int tf32_window_element(const Tf32Tiles& t, int first, int j) {
  constexpr int kRow = 4 * kChannels;
  const int row_stride = static_cast<int>(t.row_stride.divisor);
  if constexpr (kRow % kGroup == 0) return first / kRow * row_stride + first % kRow + j;
  return (first + j) / kRow * row_stride + (first + j) % kRow;
}

struct Tf32DownParams {
  Tf32Tiles tiles;
  const float* weight;  // [small_channels, 16 * channels]
  float* output;        // [batch, small_height, small_width, small_channels]
  const float* bias;    // [small_channels], null: 0
  ActivationSpec activation;
  int small_channels;
};

// A warp has 32 pixels and 32 channels of a block's 128 x 64.
template <int kChannels>
__global__ void __launch_bounds__(kThinThreads, kChannels > 3 ? 1 : 2) tf32_down_kernel(Tf32DownParams p) {
  wait_for_previous_kernel();
  constexpr int kSteps = 2 * kChannels;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int group = lane / 4, member = lane % 4, first_pixel = warp % 4 * 32;
  const int first_channel = static_cast<int>(blockIdx.y) * kThinColumns + warp / 4 * 32;
  const Tf32Tiles& t = p.tiles;
  float* stages = static_cast<float*>(shared_memory());
  const int first_tile = static_cast<int>(blockIdx.x), tile_step = static_cast<int>(gridDim.x);
  copy_image_rows<kChannels>(t, first_tile, stages);
  copy_async_commit();

  uint32_t weights[kSteps][4][2];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* row = p.weight + int64_t{first_channel + j * 8 + group} * (16 * kChannels) + step * 8 + member;
      weights[step][j][0] = to_tf32(row[0]);
      weights[step][j][1] = to_tf32(row[4]);
    }
  }
  int windows[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) windows[r] = tf32_window<kChannels>(t, first_pixel + group + r * 8);

  int current = 0;
  for (int tile = first_tile; tile < t.tiles; tile += tile_step, current ^= 1) {
    const float* stage = stages + current * t.staged;
    copy_async_wait<0>();
    block_barrier();  // this tile's rows are complete, and everyone has left those that are overwritten from here on
    if (tile + tile_step < t.tiles) {
      copy_image_rows<kChannels>(t, tile + tile_step, stages + (current ^ 1) * t.staged);
      copy_async_commit();
    }
    float sums[2][4][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int first = tf32_window_element<kChannels, 4>(t, step * 8, member);
      const int second = tf32_window_element<kChannels, 4>(t, step * 8 + 4, member);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float *low = stage + windows[2 * i], *high = stage + windows[2 * i + 1];
        const uint32_t a[4] = {to_tf32(low[first]), to_tf32(high[first]), to_tf32(low[second]), to_tf32(high[second])};
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_m16n8k8(sums[i][j], a, weights[step][j]);
      }
    }

    int count;
    const int64_t tile_pixel = thin_pixels(t, tile, count);
    ThinPair bias[4] = {};
    if (p.bias != nullptr) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* pair = p.bias + first_channel + j * 8 + member * 2;
        bias[j] = ThinPair{pair[0], pair[1]};
      }
    }
    with_activation(p.activation.kind, [&](auto kind) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int pixel = first_pixel + group + r * 8;
        if (pixel >= count) continue;
        float* output = p.output + (tile_pixel + pixel) * p.small_channels + first_channel + member * 2;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* sum = sums[r / 2][j] + r % 2 * 2;
          *reinterpret_cast<ThinPair*>(output + j * 8) =
              ThinPair{activate(kind, p.activation.negative_slope, sum[0] + bias[j].first),
                       activate(kind, p.activation.negative_slope, sum[1] + bias[j].second)};
        }
      }
    });
  }
}

struct Tf32WeightGradientParams {
  Tf32Tiles tiles;
  const float* small;  // [batch, small_height, small_width, small_channels]
  int small_channels;
  float* partial;  // [splits, small_channels, 16, channels]
};

// Row r of a block's 64 of the result is channel r % 8 * 4 + r / 16 of 32, the second 32 where r / 8 is odd: a lane's 16
// bytes of a pixel are a row of each of four fragments.
template <int kChannels>
__global__ void __launch_bounds__(kThinThreads, 1) tf32_weight_gradient_kernel(Tf32WeightGradientParams p) {
  wait_for_previous_kernel();
  constexpr int kTiles = 2 * kChannels;  // of eight columns
  const Tf32Tiles& t = p.tiles;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int group = lane / 4, member = lane % 4, warp_pixel = warp * 16 + member;
  const int block_channel = static_cast<int>(blockIdx.y) * kThinColumns;
  float* stages = static_cast<float*>(shared_memory());

  int windows[4], elements[kTiles];
#pragma unroll
  for (int r = 0; r < 4; ++r) windows[r] = tf32_window<kChannels>(t, warp_pixel + r * 4);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) elements[j] = tf32_window_element<kChannels, 8>(t, j * 8, group);

  // This lane's four pixels of a tile, two times four channels each.
  float4 ahead[4][2];
  const auto load_ahead = [&](int tile, float* stage) {
    int count;
    const int64_t tile_pixel = thin_pixels(t, tile, count);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int pixel = warp_pixel + r * 4;
      const float* row = p.small + (tile_pixel + pixel) * p.small_channels + block_channel + group * 4;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        ahead[r][h] = pixel < count ? *reinterpret_cast<const float4*>(row + h * 32) : float4{0.0f, 0.0f, 0.0f, 0.0f};
      }
    }
    copy_image_rows<kChannels>(t, tile, stage);
    copy_async_commit();
  };

  float sums[4][kTiles][4] = {};
  int current = 0;
  const int first_tile = static_cast<int>(blockIdx.x), tile_step = static_cast<int>(gridDim.x);
  load_ahead(first_tile, stages);
  for (int tile = first_tile; tile < t.tiles; tile += tile_step, current ^= 1) {
    const float* stage = stages + current * t.staged;
    copy_async_wait<0>();
    block_barrier();  // this tile's rows are complete, and everyone has left those that are overwritten from here on
    uint32_t small[4][2][4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        small[r][h][0] = to_tf32(ahead[r][h].x), small[r][h][1] = to_tf32(ahead[r][h].y);
        small[r][h][2] = to_tf32(ahead[r][h].z), small[r][h][3] = to_tf32(ahead[r][h].w);
      }
    }
    if (tile + tile_step < t.tiles) load_ahead(tile + tile_step, stages + (current ^ 1) * t.staged);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const uint32_t b[2] = {to_tf32(stage[windows[2 * step] + elements[j]]),
                               to_tf32(stage[windows[2 * step + 1] + elements[j]])};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t a[4] = {small[2 * step][0][i], small[2 * step][1][i], small[2 * step + 1][0][i],
                                 small[2 * step + 1][1][i]};
          mma_m16n8k8(sums[i][j], a, b);
        }
      }
    }
  }
  block_barrier();
  store_thin_partial<kChannels>(sums, p.partial + (int64_t{blockIdx.x} * p.small_channels + block_channel) * 16 * kChannels,
                                [](int tile, int half, int row) { return half * 32 + row * 4 + tile; });
}

// ---- up --------------------------------------------------------------------------------------------------------------

struct Tf32UpParams {
  const float* input;   // [batch, small_height, small_width, small_channels]
  const float* weight;  // [4 phases, channels, depth_padded], of which the first 4 taps * small_channels
  float* output;        // [batch, large_height, large_width, channels]
  const float* bias;    // [channels], null: 0
  ActivationSpec activation;
  int small_height, small_width, small_channels, depth_padded, large_height, large_width;
  int strip_gaps;  // gaps of a block, the one above the first row and the one below the last among those of an image
  FastDivisor strips_per_image, row_elements, width;  // row_elements: large_width * channels; width: small_width
};

template <int kChannels>
constexpr int kTf32SumStride = 16 * kChannels + kTf32SumPadding;

// Small channels are taken in 64s, whose products add up in registers.
template <int kChannels>
__global__ void __launch_bounds__(kThinThreads, kChannels > 3 ? 1 : 2) tf32_up_kernel(Tf32UpParams p) {
  wait_for_previous_kernel();
  constexpr int kColumns = 16 * kChannels, kTiles = kColumns / 8, kStride = kTf32SumStride<kChannels>;
  constexpr int kWeightStride = kThinColumns + kTf32UpPadding, kShare = kChannels > 2 ? 1 : 2;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int group = lane / 4, member = lane % 4;
  const int image = p.strips_per_image.divide(static_cast<int>(blockIdx.x));
  const int first_gap = (static_cast<int>(blockIdx.x) - image * static_cast<int>(p.strips_per_image.divisor)) * p.strip_gaps;
  const int gaps_left = p.small_height + 1 - first_gap, gaps = gaps_left < p.strip_gaps ? gaps_left : p.strip_gaps;
  const int first_row = first_gap - 1;  // of the small grid; -1: none
  // The block's pixels, counted from the beginning of first_row, and this lane's first one of the warp's 32.
  const int pixels_begin = first_row < 0 ? p.small_width : 0, first_pixel = warp * 32 + group;
  const int pixels_end = ((first_gap + gaps <= p.small_height ? first_gap + gaps : p.small_height) - first_row) * p.small_width;
  const float* input = p.input +
      (int64_t{image} * p.small_height * p.small_width + first_row * p.small_width + first_pixel) * p.small_channels + member * 4;
  float* weights = static_cast<float*>(shared_memory());  // [columns, 64 channels]: phase, tap and channel of the image
  float* products = weights + kColumns * kWeightStride;   // [pixels, columns]

  float sums[2][kTiles][4] = {};
  for (int first_channel = 0; first_channel < p.small_channels; first_channel += kThinColumns) {
    if (first_channel > 0) block_barrier();
#pragma unroll 4
    for (int i = thread; i < kColumns * kThinColumns; i += kThinThreads) {
      const int column = i / kThinColumns, k = i % kThinColumns, c = column % kChannels, tap = column / kChannels % 4;
      const float* row = p.weight + int64_t{column / kChannels / 4 * kChannels + c} * p.depth_padded;
      weights[column * kWeightStride + k] = bits_to_float(to_tf32(row[tap * p.small_channels + first_channel + k]));
    }
    block_barrier();
    // Some of the channels at a time, so that what is on its way fits the registers.
#pragma unroll 1
    for (int part = 0; part < kThinColumns; part += 16 * kShare) {
      float4 x[4][kShare];  // of this lane's four pixels
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int pixel = first_pixel + r * 8;
        const bool exists = pixel >= pixels_begin && pixel < pixels_end;
        const float* row = input + r * 8 * p.small_channels + first_channel + part;
#pragma unroll
        for (int s = 0; s < kShare; ++s) {
          x[r][s] = exists ? *reinterpret_cast<const float4*>(row + s * 16) : float4{0.0f, 0.0f, 0.0f, 0.0f};
        }
      }
#pragma unroll
      for (int s = 0; s < kShare; ++s) {
        // Channels 16 s + 4 member + {0, 1} are this lane's share of one product, + {2, 3} of the next.
        uint32_t a[2][2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 low = x[2 * i][s], high = x[2 * i + 1][s];
          a[i][0][0] = to_tf32(low.x), a[i][0][1] = to_tf32(high.x), a[i][0][2] = to_tf32(low.y), a[i][0][3] = to_tf32(high.y);
          a[i][1][0] = to_tf32(low.z), a[i][1][1] = to_tf32(high.z), a[i][1][2] = to_tf32(low.w), a[i][1][3] = to_tf32(high.w);
        }
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const float* row = weights + (j * 8 + group) * kWeightStride + part + s * 16 + member * 4;
          const float4 w = *reinterpret_cast<const float4*>(row);
          const uint32_t b[2][2] = {{float_to_bits(w.x), float_to_bits(w.y)}, {float_to_bits(w.z), float_to_bits(w.w)}};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            mma_m16n8k8(sums[i][j], a[i][0], b[0]);
            mma_m16n8k8(sums[i][j], a[i][1], b[1]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    float* row = products + (first_pixel + r * 8) * kStride + member * 2;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const float* sum = sums[r / 2][j] + r % 2 * 2;
      *reinterpret_cast<ThinPair*>(row + j * 8) = ThinPair{sum[0], sum[1]};
    }
  }
  block_barrier();

  // Image row 2 gap - 1 + b, of phase 1 - b, meets tap row t of the small row gap - 1 + t; columns alike.
  const int row_elements = static_cast<int>(p.row_elements.divisor);
  float* output = p.output + int64_t{image} * p.large_height * row_elements;
  with_activation(p.activation.kind, [&](auto kind) {
#pragma unroll 2
    for (int i = thread; i < 2 * gaps * row_elements; i += kThinThreads) {
      const int row = p.row_elements.divide(i), element = i - row * row_elements;
      const int column = element / kChannels, c = element % kChannels, h = 2 * first_gap - 1 + row;
      if (h < 0 || h >= p.large_height) continue;
      const int phase = (1 - row % 2) * 2 + column % 2, first_column = (column + 1) / 2 - 1;
      float sum = p.bias != nullptr ? p.bias[c] : 0.0f;
#pragma unroll
      for (int tap = 0; tap < 4; ++tap) {
        const int q = first_column + tap % 2;
        if (q < 0 || q >= p.small_width) continue;
        sum += products[((row / 2 + tap / 2) * p.small_width + q) * kStride + (phase * 4 + tap) * kChannels + c];
      }
      output[int64_t{h} * row_elements + element] = activate(kind, p.activation.negative_slope, sum);
    }
  });
}

// ---- launches --------------------------------------------------------------------------------------------------------

template <int kChannels>
constexpr size_t tf32_up_shared_bytes(int64_t pixels) {
  return sizeof(float) * static_cast<size_t>(16 * kChannels * (kThinColumns + kTf32UpPadding) + pixels * kTf32SumStride<kChannels>);
}

inline bool takes_tf32_thin(const Conv4x4Args& args) {
  if (args.type != DataType::float32 || !args.tf32 || !is_thin(args.geometry) || !has_plain_epilogue(args)) return false;
  if (args.direction == Conv4x4Direction::down) return is_aligned16(args.output);
  return 2 * args.geometry.small_width <= kTf32UpPixels && is_aligned16(args.input);
}

inline bool takes_tf32_thin(const Conv4x4WeightGradientArgs& args) {
  return args.type == DataType::float32 && args.tf32 && is_thin(args.geometry) && is_aligned16(args.small);
}

inline cudaError_t tf32_down_launch(const Conv4x4Args& args, cudaStream_t stream) {
  const Conv4x4Geometry& g = args.geometry;
  const Tf32DownParams p{tf32_tiles(g, args.input),
                         static_cast<const float*>(args.packed_weight),
                         static_cast<float*>(args.output),
                         args.epilogue.bias,
                         activation_of(args.epilogue),
                         static_cast<int>(g.small_channels)};
  const int64_t column_blocks = g.small_channels / kThinColumns;
  const int64_t blocks = std::min<int64_t>(p.tiles.tiles, std::max<int64_t>(1, int64_t{args.multiprocessors} * 2 / column_blocks));
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(column_blocks));
  return dispatch_thin_channels(g.large_channels, [&](auto channels) {
    return launch(tf32_down_kernel<channels.value>, grid, kThinThreads, 2 * p.tiles.staged * sizeof(float), stream, p);
  });
}

inline cudaError_t tf32_up_launch(const Conv4x4Args& args, int64_t depth_padded, cudaStream_t stream) {
  const Conv4x4Geometry& g = args.geometry;
  Tf32UpParams p{};
  p.input = static_cast<const float*>(args.input), p.weight = static_cast<const float*>(args.packed_weight);
  p.output = static_cast<float*>(args.output);
  p.bias = args.epilogue.bias, p.activation = activation_of(args.epilogue);
  p.small_height = static_cast<int>(g.small_height), p.small_width = static_cast<int>(g.small_width);
  p.small_channels = static_cast<int>(g.small_channels), p.depth_padded = static_cast<int>(depth_padded);
  p.large_height = static_cast<int>(g.large_height), p.large_width = static_cast<int>(g.large_width);
  p.row_elements = FastDivisor(g.large_width * g.large_channels);
  p.width = FastDivisor(g.small_width);
  // Strips as long as pays: each costs a row that its neighbour computes too, and the last round of blocks takes as long as
  // the others.
  const int64_t gaps = g.small_height + 1, blocks_at_once = int64_t{args.multiprocessors} * 2;
  int64_t best = 0;
  for (int64_t strip_gaps = std::min(gaps, kTf32UpPixels / g.small_width - 1); strip_gaps >= 1; --strip_gaps) {
    const int64_t rounds = divide_up(g.batch * divide_up(gaps, strip_gaps), blocks_at_once);
    const int64_t rows = rounds * (strip_gaps + 1);
    if (best != 0 && rows >= best) continue;
    best = rows;
    p.strip_gaps = static_cast<int>(strip_gaps);
  }
  const int64_t strips = divide_up(gaps, p.strip_gaps);
  p.strips_per_image = FastDivisor(strips);
  return dispatch_thin_channels(g.large_channels, [&](auto channels) {
    return launch(tf32_up_kernel<channels.value>, dim3(static_cast<unsigned>(g.batch * strips)), kThinThreads,
                  tf32_up_shared_bytes<channels.value>(kTf32UpPixels), stream, p);
  });
}

inline size_t tf32_weight_gradient_shared_bytes(const Tf32Tiles& t, int channels) {
  return std::max(2 * t.staged * sizeof(float), thin_partial_shared_bytes(channels));
}

inline int64_t tf32_weight_gradient_blocks(const Conv4x4WeightGradientArgs& args) {
  return std::min<int64_t>(tf32_tiles(args.geometry, nullptr).tiles, args.multiprocessors);
}

inline cudaError_t tf32_weight_gradient_launch(const Conv4x4WeightGradientArgs& args, cudaStream_t stream) {
  const Conv4x4Geometry& g = args.geometry;
  const Tf32WeightGradientParams p{tf32_tiles(g, args.large), static_cast<const float*>(args.small),
                                   static_cast<int>(g.small_channels), static_cast<float*>(args.workspace)};
  const dim3 grid(static_cast<unsigned>(tf32_weight_gradient_blocks(args)), static_cast<unsigned>(g.small_channels / kThinColumns));
  return dispatch_thin_channels(g.large_channels, [&](auto channels) {
    return launch(tf32_weight_gradient_kernel<channels.value>, grid, kThinThreads,
                  tf32_weight_gradient_shared_bytes(p.tiles, channels.value), stream, p);
  });
}

}  // namespace fastgan::cuda
