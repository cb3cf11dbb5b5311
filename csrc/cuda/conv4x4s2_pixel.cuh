// Stride 1 between a 4x4 picture and one pixel of up to four channels (a discriminator's last layer): too few columns
// for tiles of a matrix product. An image is a row of 16 * large_channels numbers, x its large side, dy its small one:
//
//   down             output[n, k] = sum over j of x[n, j] weight[k, j]: one block an image
//   up               dx[n, j] = sum over k of dy[n, k] weight[k, j]: a block takes some columns of a tile of images
//   weight gradient  grad[k, j] = sum over n of dy[n, k] x[n, j]: a block takes some columns of all images
//
// All of it is bound by reading and writing the large side, in 16-byte vectors; sums are float32 in a fixed order.
// kChannels is 1, or 4 for two to four small channels.
#pragma once

#include "activation.cuh"
#include "conv4x4s2_operand.cuh"
#include "conv4x4s2_product.cuh"
#include "conv4x4s2_weight.cuh"
#include "reduce.cuh"

namespace fastgan::cuda {

constexpr int kPixelChannels = 4;  // the most
constexpr int kPixelBatch = 4;     // vectors of the large side that a thread has in flight

inline bool is_to_pixel(const Conv4x4Geometry& g) {
  return g.stride == 1 && g.small_height == 1 && g.small_width == 1 && g.small_channels <= kPixelChannels;
}

// Calls f with the number of channels that kernels are compiled for.
template <typename F>
cudaError_t dispatch_pixel_channels(int64_t small_channels, const F& f) {
  if (small_channels == 1) return f(std::integral_constant<int, 1>{});
  return f(std::integral_constant<int, kPixelChannels>{});
}

template <typename T>
__device__ __forceinline__ Bytes16 load_whole(const T* p) {
  return load_bytes(p, Vector<T>::kSize, true);
}

// kSize consecutive entries of a per-channel array; a missing array is `otherwise` throughout.
template <int kSize>
__device__ __forceinline__ void load_coefficients(const float* array, int channel, float otherwise,
                                                  float (&values)[kSize]) {
#pragma unroll
  for (int e = 0; e < kSize; e += 4) {
    const float4 four = array != nullptr ? *reinterpret_cast<const float4*>(array + channel + e)
                                         : float4{otherwise, otherwise, otherwise, otherwise};
    values[e] = four.x;
    values[e + 1] = four.y;
    values[e + 2] = four.z;
    values[e + 3] = four.w;
  }
}

struct PixelDownParams {
  const void* input;   // [batch, columns]
  const void* weight;  // [small_channels, columns]
  void* output;        // [batch, small_channels]
  int columns, small_channels;
  const float* bias;  // [small_channels], null: 0
  ActivationSpec activation;
};

constexpr int kPixelDownThreads = 256;

template <typename T, int kChannels>
__global__ void __launch_bounds__(kPixelDownThreads) pixel_down_kernel(PixelDownParams p) {
  wait_for_previous_kernel();
  constexpr int kSize = Vector<T>::kSize, kWarps = kPixelDownThreads / kWarpSize;
  const T* input = static_cast<const T*>(p.input) + int64_t{blockIdx.x} * p.columns;
  const T* weight = static_cast<const T*>(p.weight);
  const int thread = static_cast<int>(threadIdx.x);
  float sums[kChannels] = {};
  for (int first = thread * kSize; first < p.columns; first += kPixelBatch * kPixelDownThreads * kSize) {
    Bytes16 x_bytes[kPixelBatch], w_bytes[kChannels][kPixelBatch];
#pragma unroll
    for (int u = 0; u < kPixelBatch; ++u) {
      const int column = first + u * kPixelDownThreads * kSize;
      const bool valid = column < p.columns;
      x_bytes[u] = valid ? load_whole(input + column) : Bytes16{};
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        const bool exists = valid && k < p.small_channels;
        w_bytes[k][u] = exists ? load_whole(weight + int64_t{k} * p.columns + column) : Bytes16{};
      }
    }
#pragma unroll
    for (int u = 0; u < kPixelBatch; ++u) {
      Vector<T> x;
      unpack(x_bytes[u], x);
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        Vector<T> w;
        unpack(w_bytes[k][u], w);
#pragma unroll
        for (int i = 0; i < kSize; ++i) sums[k] = fmaf(x.values[i], w.values[i], sums[k]);
      }
    }
  }
  float* shared = static_cast<float*>(shared_memory());  // [kChannels, kWarps]
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sums[k] += shuffle_xor(sums[k], mask);
    if (thread % kWarpSize == 0) shared[k * kWarps + thread / kWarpSize] = sums[k];
  }
  block_barrier();
  if (thread >= p.small_channels) return;
  float sum = p.bias != nullptr ? p.bias[thread] : 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += shared[thread * kWarps + warp];
  from_float(activate(p.activation.kind, p.activation.negative_slope, sum),
             static_cast<T*>(p.output)[int64_t{blockIdx.x} * p.small_channels + thread]);
}

struct PixelUpParams {
  const void* input;   // [batch, small_channels]
  const void* weight;  // [columns, depth_padded], zeros beyond small_channels
  void* output;        // [batch, columns]
  Conv4x4Epilogue epilogue;
  int batch, columns, small_channels, depth_padded;
  FastDivisor channels;  // of the large side: column j is channel j % channels
  int images_per_tile, column_blocks;
};

constexpr int kPixelUpThreads = 256;
constexpr int kPixelUpVectors = 16;  // side by side in a block; the rest of the threads share out the images

template <typename T, int kChannels>
__global__ void __launch_bounds__(kPixelUpThreads, kChannels == 1 ? 2 : 1) pixel_up_kernel(PixelUpParams p) {
  wait_for_previous_kernel();
  using Kind = Conv4x4Epilogue::Kind;
  constexpr int kSize = Vector<T>::kSize, kLanes = kPixelUpThreads / kPixelUpVectors;
  const int thread = static_cast<int>(threadIdx.x), tile = static_cast<int>(blockIdx.x) / p.column_blocks;
  const int column_block = static_cast<int>(blockIdx.x) - tile * p.column_blocks;
  const int column = (column_block * kPixelUpVectors + thread % kPixelUpVectors) * kSize;
  const int channel = column - p.channels.divide(column) * static_cast<int>(p.channels.divisor);
  const Conv4x4Epilogue& epilogue = p.epilogue;
  const bool backward = epilogue.kind == Kind::activation_backward;
  const T* input = static_cast<const T*>(p.input);
  const T* y = static_cast<const T*>(epilogue.y);

  float weight[kChannels][kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    Vector<T> of_column;
    unpack(load_whole(static_cast<const T*>(p.weight) + int64_t{column + i} * p.depth_padded), of_column);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) weight[k][i] = of_column.values[k];
  }
  float bias[kSize], scale[kSize], shift[kSize], mean[kSize], invstd[kSize];
  load_coefficients(epilogue.bias, channel, 0.0f, bias);
  load_coefficients(epilogue.scale, channel, 1.0f, scale);
  load_coefficients(epilogue.shift, channel, 0.0f, shift);
  load_coefficients(epilogue.mean, channel, 0.0f, mean);
  load_coefficients(epilogue.invstd, channel, 1.0f, invstd);

  const int first_image = tile * p.images_per_tile;
  const int last_image = p.batch - first_image < p.images_per_tile ? p.batch : first_image + p.images_per_tile;
  float sums[2 * kSize] = {};  // of dz, of dz * xhat
  for (int image = first_image + thread / kPixelUpVectors; image < last_image; image += kPixelBatch * kLanes) {
    Bytes16 y_bytes[kPixelBatch];
    float dy[kPixelBatch][kChannels];
#pragma unroll
    for (int u = 0; u < kPixelBatch; ++u) {
      const int64_t n = image + u * kLanes;
      const bool valid = n < last_image;
      y_bytes[u] = valid && backward ? load_whole(y + n * p.columns + column) : Bytes16{};
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        dy[u][k] = valid && k < p.small_channels ? to_float(input[n * p.small_channels + k]) : 0.0f;
      }
    }
    const auto finish = [&](auto kind) {
#pragma unroll
      for (int u = 0; u < kPixelBatch; ++u) {
        const int64_t n = image + u * kLanes;
        if (n >= last_image) continue;
        Vector<T> previous, out;
        unpack(y_bytes[u], previous);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          float value = bias[i];
#pragma unroll
          for (int k = 0; k < kChannels; ++k) value = fmaf(dy[u][k], weight[k][i], value);
          const float z = fmaf(scale[i], previous.values[i], shift[i]);
          value *= activation_derivative(kind.value, epilogue.activation.negative_slope, z);
          sums[i] += value;
          sums[kSize + i] += value * ((previous.values[i] - mean[i]) * invstd[i]);
          out.values[i] = value;
        }
        store_vector(static_cast<T*>(p.output) + n * p.columns + column, kSize, true, out);
      }
    };
    for_activation(backward ? epilogue.activation.kind : Activation::identity, finish);
  }
  if (!backward) return;
  reduce_rows<kPixelUpThreads>(static_cast<float*>(shared_memory()), sums, kPixelUpVectors);
  if (thread >= kPixelUpVectors) return;
  const int64_t offset = int64_t{tile} * p.columns + column;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (epilogue.gradients.sum_dz != nullptr) epilogue.gradients.sum_dz[offset + i] = sums[i];
    if (epilogue.gradients.sum_dz_xhat != nullptr) epilogue.gradients.sum_dz_xhat[offset + i] = sums[kSize + i];
  }
}

// Whether a direction's arguments suit the kernels above; the generic loop takes what does not.
inline bool takes_pixel(const Conv4x4Args& args) {
  using Kind = Conv4x4Epilogue::Kind;
  const Conv4x4Epilogue& e = args.epilogue;
  if (!is_to_pixel(args.geometry)) return false;
  if (args.direction == Conv4x4Direction::down) {
    return has_plain_epilogue(args) && is_aligned16(args.input);
  }
  return (e.kind == Kind::store || e.kind == Kind::activation_backward) &&
         args.geometry.large_channels % (16 / size_of(args.type)) == 0 && is_aligned16(args.output) &&
         is_aligned16(e.y) && is_aligned16(e.bias) && is_aligned16(e.scale) && is_aligned16(e.shift) &&
         is_aligned16(e.mean) && is_aligned16(e.invstd);
}

template <typename T>
cudaError_t pixel_down_launch(const Conv4x4Args& args, cudaStream_t stream) {
  const Conv4x4Geometry& g = args.geometry;
  const PixelDownParams params{args.input,
                               args.packed_weight,
                               args.output,
                               static_cast<int>(kTaps * g.large_channels),
                               static_cast<int>(g.small_channels),
                               args.epilogue.bias,
                               activation_of(args.epilogue)};
  return dispatch_pixel_channels(g.small_channels, [&](auto channels) {
    constexpr size_t kSharedBytes = channels.value * kPixelDownThreads / kWarpSize * sizeof(float);
    return launch(pixel_down_kernel<T, channels.value>, dim3(static_cast<unsigned>(g.batch)), kPixelDownThreads,
                  kSharedBytes, stream, params);
  });
}

// Tiles of `images_per_tile` images, 16 rows of sums to each: one a tap.
template <typename T>
cudaError_t pixel_up_launch(const Conv4x4Args& args, int64_t depth_padded, int64_t images_per_tile,
                            cudaStream_t stream) {
  const Conv4x4Geometry& g = args.geometry;
  const int64_t columns = kTaps * g.large_channels, column_blocks = columns / (kPixelUpVectors * Vector<T>::kSize);
  const PixelUpParams params{args.input,
                             args.packed_weight,
                             args.output,
                             args.epilogue,
                             static_cast<int>(g.batch),
                             static_cast<int>(columns),
                             static_cast<int>(g.small_channels),
                             static_cast<int>(depth_padded),
                             FastDivisor(g.large_channels),
                             static_cast<int>(images_per_tile),
                             static_cast<int>(column_blocks)};
  const dim3 grid(static_cast<unsigned>(divide_up(g.batch, images_per_tile) * column_blocks));
  return dispatch_pixel_channels(g.small_channels, [&](auto channels) {
    return launch(pixel_up_kernel<T, channels.value>, grid, kPixelUpThreads,
                  2 * Vector<T>::kSize * reduce_slots(kPixelUpThreads, kPixelUpVectors) * sizeof(float), stream,
                  params);
  });
}

struct PixelWeightGradientParams {
  const void* small;  // [batch, small_channels]
  const void* large;  // [batch, columns]
  int batch, columns, small_channels;
  FastDivisor channels;  // of the large side
  bool contiguous;       // layout of the gradient
  DataType weight_type;
  void* grad_weight;
};

constexpr int kPixelWeightThreads = 512;
constexpr int kPixelWeightVectors = 8;  // side by side in a block, a line of 128 bytes

__device__ __forceinline__ void store_as(DataType type, void* array, int64_t index, float value) {
  switch (type) {
    case DataType::float32: return from_float(value, static_cast<float*>(array)[index]);
    case DataType::bfloat16: return from_float(value, static_cast<BFloat16*>(array)[index]);
    case DataType::float16: return from_float(value, static_cast<Half*>(array)[index]);
  }
}

template <typename T, int kChannels>
__global__ void __launch_bounds__(kPixelWeightThreads) pixel_weight_gradient_kernel(PixelWeightGradientParams p) {
  wait_for_previous_kernel();
  constexpr int kSize = Vector<T>::kSize, kLanes = kPixelWeightThreads / kPixelWeightVectors;
  const int thread = static_cast<int>(threadIdx.x);
  const int column = (static_cast<int>(blockIdx.x) * kPixelWeightVectors + thread % kPixelWeightVectors) * kSize;
  const bool column_valid = column < p.columns;
  const T* small = static_cast<const T*>(p.small);
  const T* large = static_cast<const T*>(p.large) + column;
  float sums[kChannels][kSize] = {};
  for (int image = thread / kPixelWeightVectors; image < p.batch; image += kPixelBatch * kLanes) {
    Bytes16 bytes[kPixelBatch];
    float dy[kPixelBatch][kChannels];
#pragma unroll
    for (int u = 0; u < kPixelBatch; ++u) {
      const int64_t n = image + u * kLanes;
      const bool valid = n < p.batch;
      bytes[u] = valid && column_valid ? load_whole(large + n * p.columns) : Bytes16{};
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        dy[u][k] = valid && k < p.small_channels ? to_float(small[n * p.small_channels + k]) : 0.0f;
      }
    }
#pragma unroll
    for (int u = 0; u < kPixelBatch; ++u) {
      Vector<T> x;
      unpack(bytes[u], x);
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) sums[k][i] = fmaf(dy[u][k], x.values[i], sums[k][i]);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    if (k > 0) block_barrier();  // the channel before has been read
    reduce_rows<kPixelWeightThreads>(static_cast<float*>(shared_memory()), sums[k], kPixelWeightVectors);
  }
  if (thread >= kPixelWeightVectors || !column_valid) return;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    if (k >= p.small_channels) continue;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int tap = p.channels.divide(column + i);
      const int channel = column + i - tap * static_cast<int>(p.channels.divisor);
      const int index = p.contiguous ? channel * kTaps + tap : column + i;
      store_as(p.weight_type, p.grad_weight, int64_t{k} * p.columns + index, sums[k][i]);
    }
  }
}

inline bool takes_pixel(const Conv4x4WeightGradientArgs& args) {
  return is_to_pixel(args.geometry) && is_aligned16(args.large);
}

template <typename T>
cudaError_t pixel_weight_gradient_launch(const Conv4x4WeightGradientArgs& args, cudaStream_t stream) {
  const Conv4x4Geometry& g = args.geometry;
  const int64_t columns = kTaps * g.large_channels;
  const PixelWeightGradientParams params{args.small,
                                         args.large,
                                         static_cast<int>(g.batch),
                                         static_cast<int>(columns),
                                         static_cast<int>(g.small_channels),
                                         FastDivisor(g.large_channels),
                                         args.weight_layout == Conv4x4WeightLayout::contiguous,
                                         args.weight_type,
                                         args.grad_weight};
  const dim3 grid(static_cast<unsigned>(divide_up(columns, kPixelWeightVectors * Vector<T>::kSize)));
  return dispatch_pixel_channels(g.small_channels, [&](auto channels) {
    return launch(pixel_weight_gradient_kernel<T, channels.value>, grid, kPixelWeightThreads,
                  Vector<T>::kSize * reduce_slots(kPixelWeightThreads, kPixelWeightVectors) * sizeof(float), stream,
                  params);
  });
}

}  // namespace fastgan::cuda
