// Batch norm + activation kernels. One traversal serves all of them: a block owns a tile of the tensor, a thread a
// fixed vector of channels (channels_last) or a fixed channel (contiguous), so that per-channel coefficients stay in
// registers while the thread walks down its tile with 16-byte accesses.
//
// Not run on a GPU yet, so no variant has been measured.
#include "bn_act.h"

#include <algorithm>

#include "activation.cuh"

namespace fastgan::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMergeChannels = 8;  // one 32-byte sector of a row of tiles
constexpr int kMergeLanes = 32;
constexpr int64_t kTargetTiles = 1024;  // several blocks for each of up to 148 multiprocessors
constexpr int64_t kMinTileVectors = 2;  // vectors a thread handles at least, so that partial results stay few

// Cuts [outer, channels, inner] for blocks. channels_last (kPlanar false): threads are channel_lanes x row_lanes, a
// block takes rows_per_tile rows. Contiguous (kPlanar true): a block takes one channel, and rows_per_tile vectors of
// that channel's outer * inner_vectors.
struct Traversal {
  int64_t channels, inner;
  int64_t rows;  // outer, or outer * inner_vectors
  int64_t rows_per_tile;
  int64_t tiles;
  int64_t inner_vectors;
  int channel_blocks;
  int channel_lanes;  // a power of two
  bool aligned;       // every vector is whole and aligned to 16 bytes
};

int vector_size(DataType type) { return 16 / size_of(type); }

// The tile count must not depend on the type or on alignment: the caller allocates by shape alone.
int64_t tile_count(const BnActShape& shape) {
  const int64_t values = shape.outer * shape.inner;
  const bool planar = shape.inner > 1;
  const int64_t columns = planar ? shape.channels : divide_up(shape.channels, 64);
  const int64_t per_tile_at_least = planar ? kThreads * 4 * kMinTileVectors : 64;
  return std::max<int64_t>(1, std::min(divide_up(kTargetTiles, columns), divide_up(values, per_tile_at_least)));
}

Traversal make_traversal(const BnActShape& shape, DataType type, bool pointers_aligned) {
  const int size = vector_size(type);
  Traversal t{};
  t.channels = shape.channels;
  t.inner = shape.inner;
  t.tiles = tile_count(shape);
  if (shape.inner > 1) {
    t.aligned = pointers_aligned && shape.inner % size == 0;
    t.inner_vectors = divide_up(shape.inner, size);
    t.rows = shape.outer * t.inner_vectors;
    t.channel_blocks = static_cast<int>(shape.channels);
    t.channel_lanes = 1;
  } else {
    t.aligned = pointers_aligned && shape.channels % size == 0;
    t.inner_vectors = 1;
    t.rows = shape.outer;
    const int64_t channel_vectors = divide_up(shape.channels, size);
    t.channel_lanes = 1;
    while (t.channel_lanes < channel_vectors && t.channel_lanes < kWarpSize) t.channel_lanes *= 2;
    t.channel_blocks = static_cast<int>(divide_up(channel_vectors, t.channel_lanes));
  }
  t.rows_per_tile = divide_up(t.rows, t.tiles);
  return t;
}

// What one thread walks over.
template <typename T, bool kPlanar>
struct Walk {
  int64_t tile, channel;  // channel: the first one of the vector
  int64_t row, row_end;
  int row_step, count;  // count: valid channels of the vector (channels_last only)

  __device__ explicit Walk(const Traversal& t) {
    const int lane = static_cast<int>(threadIdx.x) % t.channel_lanes;
    const int row_lane = static_cast<int>(threadIdx.x) / t.channel_lanes;
    tile = blockIdx.x / t.channel_blocks;
    const int64_t block = blockIdx.x % t.channel_blocks;
    row_step = kThreads / t.channel_lanes;
    row = tile * t.rows_per_tile + row_lane;
    row_end = (tile + 1) * t.rows_per_tile < t.rows ? (tile + 1) * t.rows_per_tile : t.rows;
    if constexpr (kPlanar) {
      channel = block;
      count = 1;
    } else {
      channel = (block * t.channel_lanes + lane) * Vector<T>::kSize;
      const int64_t left = t.channels - channel;
      count = left < 0 ? 0 : left < Vector<T>::kSize ? static_cast<int>(left) : Vector<T>::kSize;
      if (count == 0) row = row_end;
    }
  }

  // Offset of the vector at `r`, in elements; `valid` gets the number of elements it has.
  __device__ int64_t offset(const Traversal& t, int64_t r, int& valid) const {
    if constexpr (kPlanar) {
      const int64_t n = r / t.inner_vectors;
      const int64_t i = (r - n * t.inner_vectors) * Vector<T>::kSize;
      valid = t.inner - i < Vector<T>::kSize ? static_cast<int>(t.inner - i) : Vector<T>::kSize;
      return (n * t.channels + channel) * t.inner + i;
    } else {
      valid = count;
      return r * t.channels + channel;
    }
  }
};

// A per-channel array's entries for the channels of one vector.
template <typename T, bool kPlanar>
struct Coefficients {
  float values[kPlanar ? 1 : Vector<T>::kSize];

  __device__ Coefficients(const float* array, const Walk<T, kPlanar>& walk, float otherwise) {
#pragma unroll
    for (int i = 0; i < (kPlanar ? 1 : Vector<T>::kSize); ++i) {
      values[i] = array != nullptr && i < walk.count ? array[walk.channel + i] : otherwise;
    }
  }
  __device__ float operator[](int i) const { return values[kPlanar ? 0 : i]; }
};

struct Moments {
  float count, mean, m2;
};

// Chan, Golub and LeVeque (1979).
__device__ __forceinline__ Moments merge(Moments a, Moments b) {
  const float count = a.count + b.count;
  if (count == 0.0f) return a;
  const float delta = b.mean - a.mean;
  const float share = b.count / count;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// Reduces over the row lanes of the block, for every channel lane, in a fixed tree; valid in row lane 0 afterwards.
template <typename Value, typename Combine>
__device__ Value reduce_rows(Value value, int channel_lanes, const Combine& combine) {
  Value* shared = static_cast<Value*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = value;
  block_barrier();
  for (int step = kThreads / 2; step >= channel_lanes; step /= 2) {
    if (thread < step) shared[thread] = combine(shared[thread], shared[thread + step]);
    block_barrier();
  }
  value = shared[thread];
  block_barrier();
  return value;
}

struct StatisticsParams {
  Traversal traversal;
  const void* input;
  StatisticsTiles tiles;
};

template <typename T, bool kPlanar>
__global__ void __launch_bounds__(kThreads) batch_statistics_kernel(StatisticsParams p) {
  constexpr int kSize = Vector<T>::kSize;
  const Traversal& t = p.traversal;
  const Walk<T, kPlanar> walk(t);
  const T* input = static_cast<const T*>(p.input);
  Moments moments[kSize];  // one a vector element; all of them are one channel's if kPlanar
#pragma unroll
  for (int i = 0; i < kSize; ++i) moments[i] = {0.0f, 0.0f, 0.0f};
  for (int64_t row = walk.row; row < walk.row_end; row += walk.row_step) {
    int valid;
    const int64_t offset = walk.offset(t, row, valid);
    Vector<T> x;
    load_vector(input + offset, valid, t.aligned, x);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i < valid) {  // Welford (1962)
        Moments& m = moments[i];
        const float delta = x.values[i] - m.mean;
        m.count += 1.0f;
        m.mean += delta * reciprocal(m.count);
        m.m2 += delta * (x.values[i] - m.mean);
      }
    }
  }
  const auto combine = [](Moments a, Moments b) { return merge(a, b); };
  if constexpr (kPlanar) {
#pragma unroll
    for (int i = 1; i < kSize; ++i) moments[0] = merge(moments[0], moments[i]);
  }
#pragma unroll
  for (int i = 0; i < (kPlanar ? 1 : kSize); ++i) {
    const Moments m = reduce_rows(moments[i], t.channel_lanes, combine);
    if (threadIdx.x < static_cast<unsigned>(t.channel_lanes) && i < walk.count) {
      p.tiles.mean[walk.tile * t.channels + walk.channel + i] = m.mean;
      p.tiles.m2[walk.tile * t.channels + walk.channel + i] = m.m2;
      if (walk.channel + i == 0) p.tiles.count[walk.tile] = m.count;
    }
  }
}

struct ScaleShiftActParams {
  Traversal traversal;
  ScaleShiftActArgs args;
};

template <typename T, bool kPlanar>
__global__ void __launch_bounds__(kThreads) scale_shift_act_kernel(ScaleShiftActParams p) {
  const Traversal& t = p.traversal;
  const Walk<T, kPlanar> walk(t);
  const T* input = static_cast<const T*>(p.args.input);
  T* output = static_cast<T*>(p.args.output);
  const Coefficients<T, kPlanar> scale(p.args.scale, walk, 1.0f);
  const Coefficients<T, kPlanar> shift(p.args.shift, walk, 0.0f);
  const ActivationSpec activation = p.args.activation;
  for (int64_t row = walk.row; row < walk.row_end; row += walk.row_step) {
    int valid;
    const int64_t offset = walk.offset(t, row, valid);
    Vector<T> x;
    load_vector(input + offset, valid, t.aligned, x);
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) {
      x.values[i] = activate(activation.kind, activation.negative_slope, fmaf(scale[i], x.values[i], shift[i]));
    }
    store_vector(output + offset, valid, t.aligned, x);
  }
}

struct BackwardParams {
  Traversal traversal;
  BnActBackwardArgs args;
};

__device__ __forceinline__ float add(float a, float b) { return a + b; }

// Writes this block's sums of one quantity per channel: sums[i] is element i's of this thread.
template <typename T, bool kPlanar>
__device__ void write_tile_sums(const Traversal& t, const Walk<T, kPlanar>& walk, float (&sums)[Vector<T>::kSize],
                                float* tile_sums) {
  if constexpr (kPlanar) {
#pragma unroll
    for (int i = 1; i < Vector<T>::kSize; ++i) sums[0] += sums[i];
  }
#pragma unroll
  for (int i = 0; i < (kPlanar ? 1 : Vector<T>::kSize); ++i) {
    const float sum = reduce_rows(sums[i], t.channel_lanes, add);
    if (threadIdx.x < static_cast<unsigned>(t.channel_lanes) && i < walk.count) {
      tile_sums[walk.tile * t.channels + walk.channel + i] = sum;
    }
  }
}

template <typename T, bool kPlanar>
__global__ void __launch_bounds__(kThreads) bn_act_backward_reduce_kernel(BackwardParams p) {
  constexpr int kSize = Vector<T>::kSize;
  const Traversal& t = p.traversal;
  const Walk<T, kPlanar> walk(t);
  const T* grad_output = static_cast<const T*>(p.args.grad_output);
  const T* input = static_cast<const T*>(p.args.input);
  const Coefficients<T, kPlanar> scale(p.args.scale, walk, 1.0f), shift(p.args.shift, walk, 0.0f);
  const Coefficients<T, kPlanar> mean(p.args.mean, walk, 0.0f), invstd(p.args.invstd, walk, 1.0f);
  const ActivationSpec activation = p.args.activation;
  float sum_dz[kSize] = {}, sum_dz_xhat[kSize] = {};
  for (int64_t row = walk.row; row < walk.row_end; row += walk.row_step) {
    int valid;
    const int64_t offset = walk.offset(t, row, valid);
    Vector<T> g, y;
    load_vector(grad_output + offset, valid, t.aligned, g);
    load_vector(input + offset, valid, t.aligned, y);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {  // elements beyond `valid` have gradient 0
      const float z = fmaf(scale[i], y.values[i], shift[i]);
      const float dz = g.values[i] * activation_derivative(activation.kind, activation.negative_slope, z);
      sum_dz[i] += dz;
      sum_dz_xhat[i] += dz * ((y.values[i] - mean[i]) * invstd[i]);
    }
  }
  write_tile_sums(t, walk, sum_dz, p.args.tiles.sum_dz);
  if (p.args.tiles.sum_dz_xhat != nullptr) write_tile_sums(t, walk, sum_dz_xhat, p.args.tiles.sum_dz_xhat);
}

template <typename T, bool kPlanar>
__global__ void __launch_bounds__(kThreads) bn_act_backward_apply_kernel(BackwardParams p) {
  const Traversal& t = p.traversal;
  const Walk<T, kPlanar> walk(t);
  const T* grad_output = static_cast<const T*>(p.args.grad_output);
  const T* input = static_cast<const T*>(p.args.input);
  T* grad_input = static_cast<T*>(p.args.grad_input);
  const Coefficients<T, kPlanar> scale(p.args.scale, walk, 1.0f), shift(p.args.shift, walk, 0.0f);
  const Coefficients<T, kPlanar> a(p.args.a, walk, 1.0f), b(p.args.b, walk, 0.0f), c(p.args.c, walk, 0.0f);
  const ActivationSpec activation = p.args.activation;
  for (int64_t row = walk.row; row < walk.row_end; row += walk.row_step) {
    int valid;
    const int64_t offset = walk.offset(t, row, valid);
    Vector<T> g, y;
    load_vector(grad_output + offset, valid, t.aligned, g);
    load_vector(input + offset, valid, t.aligned, y);
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) {
      const float z = fmaf(scale[i], y.values[i], shift[i]);
      const float dz = g.values[i] * activation_derivative(activation.kind, activation.negative_slope, z);
      g.values[i] = fmaf(a[i], dz, fmaf(b[i], y.values[i], c[i]));
    }
    store_vector(grad_input + offset, valid, t.aligned, g);
  }
}

struct ActBackwardParams {
  Traversal traversal;
  ActBackwardArgs args;
};

template <typename T, bool kPlanar>
__global__ void __launch_bounds__(kThreads) act_backward_kernel(ActBackwardParams p) {
  constexpr int kSize = Vector<T>::kSize;
  const Traversal& t = p.traversal;
  const Walk<T, kPlanar> walk(t);
  const T* grad_output = static_cast<const T*>(p.args.grad_output);
  const T* output = static_cast<const T*>(p.args.output);
  T* grad_input = static_cast<T*>(p.args.grad_input);
  const ActivationSpec activation = p.args.activation;
  float sum_dz[kSize] = {};
  for (int64_t row = walk.row; row < walk.row_end; row += walk.row_step) {
    int valid;
    const int64_t offset = walk.offset(t, row, valid);
    Vector<T> g, y;
    load_vector(grad_output + offset, valid, t.aligned, g);
    load_vector(output + offset, valid, t.aligned, y);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      g.values[i] *= activation_derivative_from_output(activation.kind, activation.negative_slope, y.values[i]);
      sum_dz[i] += g.values[i];
    }
    store_vector(grad_input + offset, valid, t.aligned, g);
  }
  if (p.args.tiles.sum_dz != nullptr) write_tile_sums(t, walk, sum_dz, p.args.tiles.sum_dz);
}

// Sums over the tiles of `value(tile)` for kMergeChannels channels a block; the total is valid in every lane.
template <typename F>
__device__ double merge_tiles(int64_t tiles, const F& value) {
  double* shared = static_cast<double*>(shared_memory());
  const int column = static_cast<int>(threadIdx.x) % kMergeChannels;
  const int lane = static_cast<int>(threadIdx.x) / kMergeChannels;
  double sum = 0.0;
  for (int64_t tile = lane; tile < tiles; tile += kMergeLanes) sum += value(tile);
  shared[threadIdx.x] = sum;
  block_barrier();
  double total = 0.0;
  for (int i = 0; i < kMergeLanes; ++i) total += shared[i * kMergeChannels + column];
  block_barrier();
  return total;
}

__device__ __forceinline__ void fold(const float* weight, const float* bias, int64_t channel, float mean, float invstd,
                                     float* scale, float* shift) {
  const float product = (weight != nullptr ? weight[channel] : 1.0f) * invstd;
  scale[channel] = product;
  shift[channel] = fmaf(-mean, product, bias != nullptr ? bias[channel] : 0.0f);
}

__device__ __forceinline__ void write_batch_norm(const BatchNormForwardArgs& p, int64_t channel, float mean,
                                                 float var) {
  const float invstd = 1.0f / sqrtf(var + p.eps);
  p.mean[channel] = mean;
  p.invstd[channel] = invstd;
  fold(p.weight, p.bias, channel, mean, invstd, p.scale, p.shift);
}

__global__ void __launch_bounds__(kThreads) batch_norm_fold_kernel(BatchNormFoldArgs p) {
  const int64_t channel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (channel < p.channels) fold(p.weight, p.bias, channel, p.mean[channel], p.invstd[channel], p.scale, p.shift);
}

// The merging kernels get 1 / count from the host: a float64 division costs the device a subroutine with spills.
struct MergeForwardParams {
  BatchNormForwardArgs args;
  double per_value;
};

struct MergeBackwardParams {
  BatchNormBackwardArgs args;
  double per_value;
};

__global__ void __launch_bounds__(kThreads) batch_norm_forward_kernel(MergeForwardParams params) {
  const BatchNormForwardArgs& p = params.args;
  const int64_t channel = int64_t{blockIdx.x} * kMergeChannels + threadIdx.x % kMergeChannels;
  const bool valid = channel < p.channels;
  const StatisticsTiles& t = p.tiles;
  const auto count_of = [&](int64_t tile) { return double{t.count[tile / t.rows_per_count]}; };
  const double mean =
      merge_tiles(valid ? t.tiles : 0,
                  [&](int64_t tile) { return count_of(tile) * double{t.mean[tile * p.channels + channel]}; }) *
      params.per_value;
  const double m2 = merge_tiles(valid ? t.tiles : 0, [&](int64_t tile) {
    const double delta = double{t.mean[tile * p.channels + channel]} - mean;
    return double{t.m2[tile * p.channels + channel]} + count_of(tile) * delta * delta;
  });
  if (!valid || threadIdx.x >= kMergeChannels) return;
  write_batch_norm(p, channel, static_cast<float>(mean), static_cast<float>(m2 * params.per_value));
  if (p.running_mean != nullptr) {
    const float factor = p.batches_tracked != nullptr ? 1.0f / static_cast<float>(*p.batches_tracked) : p.momentum;
    const float unbiased = static_cast<float>(m2) / static_cast<float>(p.count - 1.0);
    p.running_mean[channel] += factor * (static_cast<float>(mean) - p.running_mean[channel]);
    p.running_var[channel] += factor * (unbiased - p.running_var[channel]);
  }
}

__global__ void __launch_bounds__(kThreads) batch_norm_inference_kernel(BatchNormForwardArgs p) {
  const int64_t channel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (channel < p.channels) write_batch_norm(p, channel, p.running_mean[channel], p.running_var[channel]);
}

__global__ void __launch_bounds__(kThreads) batch_norm_backward_kernel(MergeBackwardParams params) {
  const BatchNormBackwardArgs& p = params.args;
  const int64_t channel = int64_t{blockIdx.x} * kMergeChannels + threadIdx.x % kMergeChannels;
  const bool valid = channel < p.channels;
  const GradientTiles& t = p.tiles;
  const double sum_dz =
      merge_tiles(valid ? t.tiles : 0, [&](int64_t tile) { return double{t.sum_dz[tile * p.channels + channel]}; });
  const double sum_dz_xhat = merge_tiles(valid && t.sum_dz_xhat != nullptr ? t.tiles : 0, [&](int64_t tile) {
    return double{t.sum_dz_xhat[tile * p.channels + channel]};
  });
  if (!valid || threadIdx.x >= kMergeChannels) return;
  p.sum_dz[channel] = static_cast<float>(sum_dz);
  if (p.sum_dz_xhat != nullptr) p.sum_dz_xhat[channel] = static_cast<float>(sum_dz_xhat);
  if (p.a == nullptr) return;
  const double scale = p.scale[channel];
  p.a[channel] = p.scale[channel];
  if (p.training) {
    const double b = -scale * double{p.invstd[channel]} * (sum_dz_xhat * params.per_value);
    p.b[channel] = static_cast<float>(b);
    p.c[channel] = static_cast<float>(-scale * (sum_dz * params.per_value) - b * double{p.mean[channel]});
  } else {
    p.b[channel] = 0.0f;
    p.c[channel] = 0.0f;
  }
}

// Calls f(T{}, planar) with the storage type and the layout as compile-time values.
template <typename F>
cudaError_t dispatch(DataType type, const BnActShape& shape, const F& f) {
  const auto layout = [&](auto zero) {
    return shape.inner > 1 ? f(zero, std::true_type{}) : f(zero, std::false_type{});
  };
  switch (type) {
    case DataType::float32: return layout(float{});
    case DataType::bfloat16: return layout(BFloat16{});
    case DataType::float16: return layout(Half{});
  }
  return cudaErrorInvalidValue;
}

dim3 grid_of(const Traversal& t) { return dim3(static_cast<unsigned>(t.tiles * t.channel_blocks)); }

dim3 merge_grid(int64_t channels) { return dim3(static_cast<unsigned>(divide_up(channels, kMergeChannels))); }

dim3 channel_grid(int64_t channels) { return dim3(static_cast<unsigned>(divide_up(channels, kThreads))); }

constexpr size_t kMergeSharedBytes = kThreads * sizeof(double);

static_assert(kMergeChannels * kMergeLanes == kThreads, "merge_tiles gives every thread one column and one lane");

}  // namespace

int64_t bn_act_tiles(const BnActShape& shape) { return tile_count(shape); }

cudaError_t batch_statistics_launch(const BatchStatisticsArgs& args, cudaStream_t stream) {
  const StatisticsParams params{make_traversal(args.shape, args.type, is_aligned16(args.input)), args.input,
                                args.tiles};
  return dispatch(args.type, args.shape, [&](auto zero, auto planar) {
    return launch(batch_statistics_kernel<decltype(zero), planar.value>, grid_of(params.traversal), kThreads,
                  kThreads * sizeof(Moments), stream, params);
  });
}

cudaError_t batch_norm_forward_launch(const BatchNormForwardArgs& args, cudaStream_t stream) {
  return launch(batch_norm_forward_kernel, merge_grid(args.channels), kThreads, kMergeSharedBytes, stream,
                MergeForwardParams{args, 1.0 / args.count});
}

cudaError_t batch_norm_inference_launch(const BatchNormForwardArgs& args, cudaStream_t stream) {
  return launch(batch_norm_inference_kernel, channel_grid(args.channels), kThreads, 0, stream, args);
}

cudaError_t batch_norm_fold_launch(const BatchNormFoldArgs& args, cudaStream_t stream) {
  return launch(batch_norm_fold_kernel, channel_grid(args.channels), kThreads, 0, stream, args);
}

cudaError_t scale_shift_act_launch(const ScaleShiftActArgs& args, cudaStream_t stream) {
  const bool aligned = is_aligned16(args.input) && is_aligned16(args.output);
  const ScaleShiftActParams params{make_traversal(args.shape, args.type, aligned), args};
  return dispatch(args.type, args.shape, [&](auto zero, auto planar) {
    return launch(scale_shift_act_kernel<decltype(zero), planar.value>, grid_of(params.traversal), kThreads, 0, stream,
                  params);
  });
}

cudaError_t bn_act_backward_reduce_launch(const BnActBackwardArgs& args, cudaStream_t stream) {
  const bool aligned = is_aligned16(args.grad_output) && is_aligned16(args.input);
  const BackwardParams params{make_traversal(args.shape, args.type, aligned), args};
  return dispatch(args.type, args.shape, [&](auto zero, auto planar) {
    return launch(bn_act_backward_reduce_kernel<decltype(zero), planar.value>, grid_of(params.traversal), kThreads,
                  kThreads * sizeof(float), stream, params);
  });
}

cudaError_t bn_act_backward_apply_launch(const BnActBackwardArgs& args, cudaStream_t stream) {
  const bool aligned = is_aligned16(args.grad_output) && is_aligned16(args.input) && is_aligned16(args.grad_input);
  const BackwardParams params{make_traversal(args.shape, args.type, aligned), args};
  return dispatch(args.type, args.shape, [&](auto zero, auto planar) {
    return launch(bn_act_backward_apply_kernel<decltype(zero), planar.value>, grid_of(params.traversal), kThreads, 0,
                  stream, params);
  });
}

cudaError_t batch_norm_backward_launch(const BatchNormBackwardArgs& args, cudaStream_t stream) {
  return launch(batch_norm_backward_kernel, merge_grid(args.channels), kThreads, kMergeSharedBytes, stream,
                MergeBackwardParams{args, 1.0 / args.count});
}

cudaError_t act_backward_launch(const ActBackwardArgs& args, cudaStream_t stream) {
  const bool aligned = is_aligned16(args.grad_output) && is_aligned16(args.output) && is_aligned16(args.grad_input);
  const ActBackwardParams params{make_traversal(args.shape, args.type, aligned), args};
  return dispatch(args.type, args.shape, [&](auto zero, auto planar) {
    return launch(act_backward_kernel<decltype(zero), planar.value>, grid_of(params.traversal), kThreads,
                  kThreads * sizeof(float), stream, params);
  });
}

}  // namespace fastgan::cuda
