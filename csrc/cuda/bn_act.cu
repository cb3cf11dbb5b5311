// Batch norm + activation kernels. One traversal serves all of them: a block owns a tile of the tensor, a thread a
// fixed vector of channels (channels_last) or a fixed channel (contiguous), so that per-channel coefficients stay in
// registers while the thread walks down its tile with 16-byte accesses.
//
// Measured on an H200 and given up: one vector of a tensor in flight a thread (2.6 TB/s of 4.3 TB/s), and
// merges in two passes by 256 threads a block (64 channels: 1024 tiles 32 us, 8192 tiles 240 us).
#include "bn_act.h"

#include <algorithm>
#include <type_traits>

#include "activation.cuh"
#include "reduce.cuh"

namespace fastgan::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMergeChannels = 8;       // one 32-byte sector of a row of tiles
constexpr int kMergeGroups = 8;         // of lanes, added up before the groups are
constexpr int kMostMergeLanes = 128;    // rows of tiles that a block reads at a time
constexpr int kMergeBatch = 8;          // rows of tiles that a thread has in flight
constexpr int kBatch = 4;               // vectors of a tensor that a thread has in flight
constexpr int kMostChannelLanes = 8;    // side by side they read whole 128-byte lines
constexpr int64_t kMostRows = 8;        // vectors a thread takes where nothing is summed
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

// `summed`: every block writes a tile's sums. Else blocks are as short as their per-channel coefficients allow.
Traversal make_traversal(const BnActShape& shape, DataType type, bool pointers_aligned, bool summed) {
  const int size = vector_size(type);
  Traversal t{};
  t.channels = shape.channels;
  t.inner = shape.inner;
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
    while (t.channel_lanes < channel_vectors && t.channel_lanes < kMostChannelLanes) t.channel_lanes *= 2;
    t.channel_blocks = static_cast<int>(divide_up(channel_vectors, t.channel_lanes));
  }
  if (summed) {
    t.tiles = tile_count(shape);
    t.rows_per_tile = divide_up(t.rows, t.tiles);
  } else {
    const int64_t row_lanes = kThreads / t.channel_lanes;
    const int64_t rows = t.rows * t.channel_blocks / (row_lanes * kTargetTiles);
    t.rows_per_tile = row_lanes * std::clamp<int64_t>(rows, 1, kMostRows);
    t.tiles = divide_up(t.rows, t.rows_per_tile);
  }
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

// The vectors of a thread's next kBatch rows: all of them are under way before the first one is needed.
template <typename T, bool kPlanar>
struct Batch {
  int64_t offsets[kBatch];
  int valid[kBatch];  // elements a vector has; 0 beyond the last row
  bool aligned;

  __device__ Batch(const Traversal& t, const Walk<T, kPlanar>& walk, int64_t first_row) : aligned(t.aligned) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int64_t row = first_row + u * walk.row_step;
      valid[u] = 0;
      offsets[u] = 0;
      if (row < walk.row_end) offsets[u] = walk.offset(t, row, valid[u]);
    }
  }
  // Zeros beyond the last row.
  __device__ void load(const T* p, Bytes16 (&bytes)[kBatch]) const {
    if (aligned) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        bytes[u].words = uint4{0, 0, 0, 0};
        if (valid[u] > 0) bytes[u] = load_bytes(p + offsets[u], valid[u], true);
      }
    } else {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) bytes[u] = load_bytes(p + offsets[u], valid[u], false);
    }
  }
  __device__ void store(T* p, int u, const Vector<T>& vector) const {
    if (valid[u] > 0) store_vector(p + offsets[u], valid[u], aligned, vector);
  }
};

// A per-channel array's entries for the channels of one vector.
template <typename T, bool kPlanar>
struct Coefficients {
  static constexpr int kSize = kPlanar ? 1 : Vector<T>::kSize;
  float values[kSize];

  __device__ Coefficients(const float* array, const Walk<T, kPlanar>& walk, float otherwise) {
    const float* first = array + (array != nullptr ? walk.channel : 0);
    if (!kPlanar && array != nullptr && walk.count == kSize && reinterpret_cast<uintptr_t>(first) % 16 == 0) {
#pragma unroll
      for (int i = 0; i + 3 < kSize; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(first + i);
        values[i] = four.x;
        values[i + 1] = four.y;
        values[i + 2] = four.z;
        values[i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) values[i] = array != nullptr && i < walk.count ? first[i] : otherwise;
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

struct StatisticsParams {
  Traversal traversal;
  const void* input;
  StatisticsTiles tiles;
};

// A thread sums deviations from its first value and their squares. That value is among the squares, so that however
// odd it is, the cancellation in m2 costs no more than a factor of the thread's number of rows.
template <typename T, bool kPlanar>
__global__ void __launch_bounds__(kThreads) batch_statistics_kernel(StatisticsParams p) {
  wait_for_previous_kernel();
  constexpr int kSize = Vector<T>::kSize, kChannels = kPlanar ? 1 : kSize;
  const Traversal& t = p.traversal;
  const Walk<T, kPlanar> walk(t);
  const T* input = static_cast<const T*>(p.input);
  float pivot[kChannels] = {}, sums[kSize] = {}, squares[kSize] = {};
  int count = 0;  // values of a channel
  for (int64_t row = walk.row; row < walk.row_end; row += kBatch * walk.row_step) {
    const Batch<T, kPlanar> batch(t, walk, row);
    Bytes16 bytes[kBatch];
    batch.load(input, bytes);
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      Vector<T> x;
      unpack(bytes[u], x);
      if (u == 0 && row == walk.row) {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) pivot[i] = x.values[i];
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (i < batch.valid[u]) {
          const float deviation = x.values[i] - pivot[kPlanar ? 0 : i];
          sums[i] += deviation;
          squares[i] = fmaf(deviation, deviation, squares[i]);
        }
      }
      count += kPlanar ? batch.valid[u] : batch.valid[u] > 0;
    }
  }
  if constexpr (kPlanar) {
#pragma unroll
    for (int i = 1; i < kSize; ++i) {
      sums[0] += sums[i];
      squares[0] += squares[i];
    }
  }
  Moments moments[kChannels];
  const float n = static_cast<float>(count), inverse = count > 0 ? 1.0f / n : 0.0f;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const float m2 = fmaf(-sums[i] * inverse, sums[i], squares[i]);
    moments[i] = {n, fmaf(sums[i], inverse, pivot[i]), m2 < 0.0f ? 0.0f : m2};
  }
  reduce_rows<kThreads>(static_cast<Moments*>(shared_memory()), moments, t.channel_lanes,
                        [](Moments a, Moments b) { return merge(a, b); });
  if (threadIdx.x >= static_cast<unsigned>(t.channel_lanes)) return;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    if (i >= walk.count) continue;
    p.tiles.mean[walk.tile * t.channels + walk.channel + i] = moments[i].mean;
    p.tiles.m2[walk.tile * t.channels + walk.channel + i] = moments[i].m2;
    if (walk.channel + i == 0) p.tiles.count[walk.tile] = moments[i].count;
  }
}

struct ScaleShiftActParams {
  Traversal traversal;
  ScaleShiftActArgs args;
};

template <typename T, bool kPlanar>
__global__ void __launch_bounds__(kThreads) scale_shift_act_kernel(ScaleShiftActParams p) {
  wait_for_previous_kernel();
  const Traversal& t = p.traversal;
  const Walk<T, kPlanar> walk(t);
  const T* input = static_cast<const T*>(p.args.input);
  T* output = static_cast<T*>(p.args.output);
  const Coefficients<T, kPlanar> scale(p.args.scale, walk, 1.0f);
  const Coefficients<T, kPlanar> shift(p.args.shift, walk, 0.0f);
  const float slope = p.args.activation.negative_slope;
  for (int64_t row = walk.row; row < walk.row_end; row += kBatch * walk.row_step) {
    const Batch<T, kPlanar> batch(t, walk, row);
    Bytes16 bytes[kBatch];
    batch.load(input, bytes);
    for_activation(p.args.activation.kind, [&](auto kind) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        Vector<T> x;
        unpack(bytes[u], x);
#pragma unroll
        for (int i = 0; i < Vector<T>::kSize; ++i) {
          x.values[i] = activate(kind.value, slope, fmaf(scale[i], x.values[i], shift[i]));
        }
        batch.store(output, u, x);
      }
    });
  }
}

struct BackwardParams {
  Traversal traversal;
  BnActBackwardArgs args;
};

// Writes this block's sums per channel of kQuantities quantities, those whose array is not null. Element i of
// quantity q is in sums[q * kSize + i].
template <typename T, bool kPlanar, int kQuantities>
__device__ __forceinline__ void write_tile_sums(const Traversal& t, const Walk<T, kPlanar>& walk,
                                                const float (&sums)[kQuantities * Vector<T>::kSize],
                                                float* const (&arrays)[kQuantities]) {
  constexpr int kSize = Vector<T>::kSize, kChannels = kPlanar ? 1 : kSize;
  float totals[kQuantities * kChannels] = {};
#pragma unroll
  for (int i = 0; i < kQuantities * kSize; ++i) totals[kPlanar ? i / kSize : i] += sums[i];
  reduce_rows<kThreads>(static_cast<float*>(shared_memory()), totals, t.channel_lanes, Add{});
  if (threadIdx.x >= static_cast<unsigned>(t.channel_lanes)) return;
#pragma unroll
  for (int q = 0; q < kQuantities; ++q) {
    if (arrays[q] == nullptr) continue;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      if (i < walk.count) arrays[q][walk.tile * t.channels + walk.channel + i] = totals[q * kChannels + i];
    }
  }
}

template <typename T, bool kPlanar>
__global__ void __launch_bounds__(kThreads, 2) bn_act_backward_reduce_kernel(BackwardParams p) {
  wait_for_previous_kernel();
  constexpr int kSize = Vector<T>::kSize;
  const Traversal& t = p.traversal;
  const Walk<T, kPlanar> walk(t);
  const T* grad_output = static_cast<const T*>(p.args.grad_output);
  const T* input = static_cast<const T*>(p.args.input);
  const Coefficients<T, kPlanar> scale(p.args.scale, walk, 1.0f), shift(p.args.shift, walk, 0.0f);
  const Coefficients<T, kPlanar> mean(p.args.mean, walk, 0.0f), invstd(p.args.invstd, walk, 1.0f);
  const float slope = p.args.activation.negative_slope;
  float sums[2 * kSize] = {};  // of dz, of dz * xhat
  for (int64_t row = walk.row; row < walk.row_end; row += kBatch * walk.row_step) {
    const Batch<T, kPlanar> batch(t, walk, row);
    Bytes16 g_bytes[kBatch], y_bytes[kBatch];
    batch.load(grad_output, g_bytes);
    batch.load(input, y_bytes);
    for_activation(p.args.activation.kind, [&](auto kind) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        Vector<T> g, y;
        unpack(g_bytes[u], g);
        unpack(y_bytes[u], y);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {  // what does not exist has gradient 0
          const float z = fmaf(scale[i], y.values[i], shift[i]);
          const float dz = g.values[i] * activation_derivative(kind.value, slope, z);
          sums[i] += dz;
          sums[kSize + i] += dz * ((y.values[i] - mean[i]) * invstd[i]);
        }
      }
    });
  }
  write_tile_sums<T, kPlanar, 2>(t, walk, sums, {p.args.tiles.sum_dz, p.args.tiles.sum_dz_xhat});
}

template <typename T, bool kPlanar>
__global__ void __launch_bounds__(kThreads, 2) bn_act_backward_apply_kernel(BackwardParams p) {
  wait_for_previous_kernel();
  const Traversal& t = p.traversal;
  const Walk<T, kPlanar> walk(t);
  const T* grad_output = static_cast<const T*>(p.args.grad_output);
  const T* input = static_cast<const T*>(p.args.input);
  T* grad_input = static_cast<T*>(p.args.grad_input);
  const Coefficients<T, kPlanar> scale(p.args.scale, walk, 1.0f), shift(p.args.shift, walk, 0.0f);
  const Coefficients<T, kPlanar> a(p.args.a, walk, 1.0f), b(p.args.b, walk, 0.0f), c(p.args.c, walk, 0.0f);
  const float slope = p.args.activation.negative_slope;
  for (int64_t row = walk.row; row < walk.row_end; row += kBatch * walk.row_step) {
    const Batch<T, kPlanar> batch(t, walk, row);
    Bytes16 g_bytes[kBatch], y_bytes[kBatch];
    batch.load(grad_output, g_bytes);
    batch.load(input, y_bytes);
    for_activation(p.args.activation.kind, [&](auto kind) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        Vector<T> g, y;
        unpack(g_bytes[u], g);
        unpack(y_bytes[u], y);
#pragma unroll
        for (int i = 0; i < Vector<T>::kSize; ++i) {
          const float z = fmaf(scale[i], y.values[i], shift[i]);
          const float dz = g.values[i] * activation_derivative(kind.value, slope, z);
          g.values[i] = fmaf(a[i], dz, fmaf(b[i], y.values[i], c[i]));
        }
        batch.store(grad_input, u, g);
      }
    });
  }
}

struct ActBackwardParams {
  Traversal traversal;
  ActBackwardArgs args;
};

template <typename T, bool kPlanar>
__global__ void __launch_bounds__(kThreads, 2) act_backward_kernel(ActBackwardParams p) {
  wait_for_previous_kernel();
  constexpr int kSize = Vector<T>::kSize;
  const Traversal& t = p.traversal;
  const Walk<T, kPlanar> walk(t);
  const T* grad_output = static_cast<const T*>(p.args.grad_output);
  const T* output = static_cast<const T*>(p.args.output);
  T* grad_input = static_cast<T*>(p.args.grad_input);
  const float slope = p.args.activation.negative_slope;
  float sum_dz[kSize] = {};
  for (int64_t row = walk.row; row < walk.row_end; row += kBatch * walk.row_step) {
    const Batch<T, kPlanar> batch(t, walk, row);
    Bytes16 g_bytes[kBatch], y_bytes[kBatch];
    batch.load(grad_output, g_bytes);
    batch.load(output, y_bytes);
    for_activation(p.args.activation.kind, [&](auto kind) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        Vector<T> g, y;
        unpack(g_bytes[u], g);
        unpack(y_bytes[u], y);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          g.values[i] *= activation_derivative_from_output(kind.value, slope, y.values[i]);
          sum_dz[i] += g.values[i];
        }
        batch.store(grad_input, u, g);
      }
    });
  }
  if (p.args.tiles.sum_dz != nullptr) write_tile_sums<T, kPlanar, 1>(t, walk, sum_dz, {p.args.tiles.sum_dz});
}

struct MergedSums {
  double first, second;
};

// Sums over the tiles of two quantities for kMergeChannels channels a block, in an order that the number of lanes
// fixes; valid in the first kMergeChannels threads. load(tile, values) reads what add(values, sums) needs: a thread
// has kMergeBatch rows of tiles on their way at a time.
template <int kValues, typename Load, typename Add>
__device__ __forceinline__ MergedSums merge_tiles(int lanes, int tiles, const Load& load, const Add& add) {
  MergedSums* shared = static_cast<MergedSums*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  MergedSums sums{0.0, 0.0};
  for (int first = thread / kMergeChannels; first < tiles; first += kMergeBatch * lanes) {
    float values[kMergeBatch][kValues] = {};
#pragma unroll
    for (int u = 0; u < kMergeBatch; ++u) {
      if (first + u * lanes < tiles) load(first + u * lanes, values[u]);
    }
#pragma unroll
    for (int u = 0; u < kMergeBatch; ++u) add(values[u], sums);
  }
  shared[thread] = sums;
  block_barrier();
  const auto add_slots = [&](int slots, int step) {
    sums = shared[thread];
    for (int i = 1; i < slots; ++i) {
      sums.first += shared[thread + i * step].first;
      sums.second += shared[thread + i * step].second;
    }
  };
  constexpr int kGroupThreads = kMergeChannels * kMergeGroups;
  if (thread < kGroupThreads) {
    add_slots(lanes / kMergeGroups, kGroupThreads);
    shared[thread] = sums;
  }
  block_barrier();
  if (thread < kMergeChannels) add_slots(kMergeGroups, kMergeChannels);
  return sums;
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
  wait_for_previous_kernel();
  const int64_t channel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (channel < p.channels) fold(p.weight, p.bias, channel, p.mean[channel], p.invstd[channel], p.scale, p.shift);
}

// The merging kernels get 1 / count from the host: a float64 division costs the device a subroutine with spills.
struct MergeForwardParams {
  BatchNormForwardArgs args;
  double per_value;
  FastDivisor rows_per_count;
  int lanes;
};

struct MergeBackwardParams {
  BatchNormBackwardArgs args;
  double per_value;
  int lanes;
};

constexpr int kMergeThreads = kMergeChannels * kMostMergeLanes;

// One pass: in float64, the sum of squares may cancel against the square of the sum.
__global__ void __launch_bounds__(kMergeThreads) batch_norm_forward_kernel(MergeForwardParams params) {
  wait_for_previous_kernel();
  const BatchNormForwardArgs& p = params.args;
  const int64_t channel = int64_t{blockIdx.x} * kMergeChannels + threadIdx.x % kMergeChannels;
  const bool valid = channel < p.channels;
  const StatisticsTiles& t = p.tiles;
  const MergedSums sums = merge_tiles<3>(
      params.lanes, valid ? static_cast<int>(t.tiles) : 0,
      [&](int tile, float (&values)[3]) {
        values[0] = t.count[params.rows_per_count.divide(tile)];
        values[1] = t.mean[tile * p.channels + channel];
        values[2] = t.m2[tile * p.channels + channel];
      },
      [](const float (&values)[3], MergedSums& to) {
        const double mean = values[1], sum = double{values[0]} * mean;
        to.first += sum;
        to.second += double{values[2]} + sum * mean;
      });
  if (!valid || threadIdx.x >= kMergeChannels) return;
  const double mean = sums.first * params.per_value, difference = sums.second - sums.first * mean;
  const double m2 = difference < 0.0 ? 0.0 : difference;
  write_batch_norm(p, channel, static_cast<float>(mean), static_cast<float>(m2 * params.per_value));
  if (p.running_mean != nullptr) {
    const float factor = p.batches_tracked != nullptr ? 1.0f / static_cast<float>(*p.batches_tracked) : p.momentum;
    const float unbiased = static_cast<float>(m2) / static_cast<float>(p.count - 1.0);
    p.running_mean[channel] += factor * (static_cast<float>(mean) - p.running_mean[channel]);
    p.running_var[channel] += factor * (unbiased - p.running_var[channel]);
  }
}

__global__ void __launch_bounds__(kThreads) batch_norm_inference_kernel(BatchNormForwardArgs p) {
  wait_for_previous_kernel();
  const int64_t channel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (channel < p.channels) write_batch_norm(p, channel, p.running_mean[channel], p.running_var[channel]);
}

__global__ void __launch_bounds__(kMergeThreads) batch_norm_backward_kernel(MergeBackwardParams params) {
  wait_for_previous_kernel();
  const BatchNormBackwardArgs& p = params.args;
  const int64_t channel = int64_t{blockIdx.x} * kMergeChannels + threadIdx.x % kMergeChannels;
  const bool valid = channel < p.channels;
  const GradientTiles& t = p.tiles;
  const MergedSums sums = merge_tiles<2>(
      params.lanes, valid ? static_cast<int>(t.tiles) : 0,
      [&](int tile, float (&values)[2]) {
        values[0] = t.sum_dz[tile * p.channels + channel];
        if (t.sum_dz_xhat != nullptr) values[1] = t.sum_dz_xhat[tile * p.channels + channel];
      },
      [](const float (&values)[2], MergedSums& to) {
        to.first += double{values[0]};
        to.second += double{values[1]};
      });
  if (!valid || threadIdx.x >= kMergeChannels) return;
  const double sum_dz = sums.first, sum_dz_xhat = sums.second;
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

// Threads beyond what the tiles need would only make the block's barriers longer.
int merge_lanes(int64_t tiles) {
  constexpr int kFew = kMostMergeLanes / 4;
  return tiles <= kFew * kMergeBatch ? kFew : kMostMergeLanes;
}

size_t merge_shared_bytes(int lanes) { return static_cast<size_t>(lanes * kMergeChannels) * sizeof(MergedSums); }

// Of the kernels that write tiles of sums: `per_vector_element` of them for each of a thread's channels.
size_t reduce_shared_bytes(const BnActShape& shape, DataType type, size_t per_vector_element) {
  return kThreads * per_vector_element * static_cast<size_t>(shape.inner > 1 ? 1 : vector_size(type));
}

}  // namespace

int64_t bn_act_tiles(const BnActShape& shape) { return tile_count(shape); }

cudaError_t batch_statistics_launch(const BatchStatisticsArgs& args, cudaStream_t stream) {
  const StatisticsParams params{make_traversal(args.shape, args.type, is_aligned16(args.input), true), args.input,
                                args.tiles};
  return dispatch(args.type, args.shape, [&](auto zero, auto planar) {
    return launch(batch_statistics_kernel<decltype(zero), planar.value>, grid_of(params.traversal), kThreads,
                  reduce_shared_bytes(args.shape, args.type, sizeof(Moments)), stream, params);
  });
}

cudaError_t batch_norm_forward_launch(const BatchNormForwardArgs& args, cudaStream_t stream) {
  const int lanes = merge_lanes(args.tiles.tiles);
  return launch(batch_norm_forward_kernel, merge_grid(args.channels), lanes * kMergeChannels, merge_shared_bytes(lanes),
                stream, MergeForwardParams{args, 1.0 / args.count, FastDivisor(args.tiles.rows_per_count), lanes});
}

cudaError_t batch_norm_inference_launch(const BatchNormForwardArgs& args, cudaStream_t stream) {
  return launch(batch_norm_inference_kernel, channel_grid(args.channels), kThreads, 0, stream, args);
}

cudaError_t batch_norm_fold_launch(const BatchNormFoldArgs& args, cudaStream_t stream) {
  return launch(batch_norm_fold_kernel, channel_grid(args.channels), kThreads, 0, stream, args);
}

cudaError_t scale_shift_act_launch(const ScaleShiftActArgs& args, cudaStream_t stream) {
  const bool aligned = is_aligned16(args.input) && is_aligned16(args.output);
  const ScaleShiftActParams params{make_traversal(args.shape, args.type, aligned, false), args};
  return dispatch(args.type, args.shape, [&](auto zero, auto planar) {
    return launch(scale_shift_act_kernel<decltype(zero), planar.value>, grid_of(params.traversal), kThreads, 0, stream,
                  params);
  });
}

cudaError_t bn_act_backward_reduce_launch(const BnActBackwardArgs& args, cudaStream_t stream) {
  const bool aligned = is_aligned16(args.grad_output) && is_aligned16(args.input);
  const BackwardParams params{make_traversal(args.shape, args.type, aligned, true), args};
  return dispatch(args.type, args.shape, [&](auto zero, auto planar) {
    return launch(bn_act_backward_reduce_kernel<decltype(zero), planar.value>, grid_of(params.traversal), kThreads,
                  reduce_shared_bytes(args.shape, args.type, 2 * sizeof(float)), stream, params);
  });
}

cudaError_t bn_act_backward_apply_launch(const BnActBackwardArgs& args, cudaStream_t stream) {
  const bool aligned = is_aligned16(args.grad_output) && is_aligned16(args.input) && is_aligned16(args.grad_input);
  const BackwardParams params{make_traversal(args.shape, args.type, aligned, false), args};
  return dispatch(args.type, args.shape, [&](auto zero, auto planar) {
    return launch(bn_act_backward_apply_kernel<decltype(zero), planar.value>, grid_of(params.traversal), kThreads, 0,
                  stream, params);
  });
}

cudaError_t batch_norm_backward_launch(const BatchNormBackwardArgs& args, cudaStream_t stream) {
  const int lanes = merge_lanes(args.tiles.tiles);
  return launch(batch_norm_backward_kernel, merge_grid(args.channels), lanes * kMergeChannels,
                merge_shared_bytes(lanes), stream, MergeBackwardParams{args, 1.0 / args.count, lanes});
}

cudaError_t act_backward_launch(const ActBackwardArgs& args, cudaStream_t stream) {
  const bool aligned = is_aligned16(args.grad_output) && is_aligned16(args.output) && is_aligned16(args.grad_input);
  const ActBackwardParams params{make_traversal(args.shape, args.type, aligned, args.tiles.sum_dz != nullptr), args};
  return dispatch(args.type, args.shape, [&](auto zero, auto planar) {
    return launch(act_backward_kernel<decltype(zero), planar.value>, grid_of(params.traversal), kThreads,
                  reduce_shared_bytes(args.shape, args.type, sizeof(float)), stream, params);
  });
}

}  // namespace fastgan::cuda
