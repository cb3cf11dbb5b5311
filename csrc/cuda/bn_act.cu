// Batch norm + activation kernels. One traversal serves all of them: a block owns a tile of the tensor, a thread a
// fixed vector of channels (channels_last) or a fixed channel (contiguous), so that per-channel coefficients stay in
// registers while the thread walks down its tile with 16-byte accesses.
//
// Measured on an H200 and given up: one vector of a tensor in flight a thread (2.6 TB/s of 4.3 TB/s),
// merges in two passes by 256 threads a block (64 channels: 1024 tiles 32 us, 8192 tiles 240 us), and
// sums by blocks of two vectors a thread with a barrier for each level of a tree ([32768, 128] in float32: statistics
// 17.6 us, backward reduction 22 us).
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
constexpr int kMostChannelLanes = 8;    // side by side they read whole 128-byte lines
constexpr int64_t kMostRows = 8;        // vectors a thread takes where nothing is summed
constexpr int64_t kTargetBlocks = 512;  // where nothing is summed: one wave, of whole batches of loads
// Kernels that sum make one wave of an H200's 132 multiprocessors: four blocks each in float32, and half as many in
// 16-bit types, whose threads take twice the channels. Fewer tiles are also fewer to merge.
constexpr int64_t kTargetSumBlocks = 512;
constexpr int64_t kMinTileVectors = 4;  // float32 vectors a thread handles at least: as many as it has in flight
template <typename T>
constexpr int kSumBlocks = static_cast<int>(sizeof(T));  // of a multiprocessor
// Vectors of a tensor that a thread has in flight: by kSumBlocks, 64 KiB a multiprocessor.
template <typename T, int kTensors>
constexpr int kBatch = Vector<T>::kSize / kTensors;
constexpr int kScaleShiftBatch = 4;

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

int lanes_of_channels(int64_t channels, int size) {
  int lanes = 1;
  while (lanes * size < channels && lanes < kMostChannelLanes) lanes *= 2;
  return lanes;
}

// The tile count must not depend on the type or on alignment: the caller allocates by shape alone. It is made for
// float32.
int64_t tile_count(const BnActShape& shape) {
  constexpr int kSize = Vector<float>::kSize;
  const bool planar = shape.inner > 1;
  const int lanes = planar ? 1 : lanes_of_channels(shape.channels, kSize);
  const int64_t columns = planar ? shape.channels : divide_up(shape.channels, lanes * kSize);
  const int64_t rows = planar ? divide_up(shape.outer * shape.inner, kSize) : shape.outer;
  const int64_t most = divide_up(rows, kThreads / lanes * kMinTileVectors);
  return std::clamp<int64_t>(kTargetSumBlocks / columns, 1, std::max<int64_t>(1, most));
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
    t.channel_lanes = lanes_of_channels(shape.channels, size);
    t.channel_blocks = static_cast<int>(divide_up(shape.channels, t.channel_lanes * size));
  }
  if (summed) {
    t.tiles = tile_count(shape);
    t.rows_per_tile = divide_up(t.rows, t.tiles);
  } else {
    const int64_t row_lanes = kThreads / t.channel_lanes;
    const int64_t rows = t.rows * t.channel_blocks / (row_lanes * kTargetBlocks);
    t.rows_per_tile = row_lanes * std::clamp<int64_t>(rows, 1, kMostRows);
    t.tiles = divide_up(t.rows, t.rows_per_tile);
  }
  return t;
}

// What one thread walks over.
template <typename T, bool kPlanar>
struct Walk {
  int64_t tile, channel;  // channel: the first one of the vector
  int64_t first_row, row, row_end;  // of the tile, of the thread, beyond the tile
  int row_step, count;  // count: valid channels of the vector (channels_last only)

  __device__ explicit Walk(const Traversal& t) {
    const int lane = static_cast<int>(threadIdx.x) % t.channel_lanes;
    const int row_lane = static_cast<int>(threadIdx.x) / t.channel_lanes;
    tile = blockIdx.x / t.channel_blocks;
    const int64_t block = blockIdx.x % t.channel_blocks;
    row_step = kThreads / t.channel_lanes;
    first_row = tile * t.rows_per_tile;
    row = first_row + row_lane;
    row_end = first_row + t.rows_per_tile < t.rows ? first_row + t.rows_per_tile : t.rows;
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

  // Values of a channel in the rows before `r`.
  __device__ int64_t values_before(const Traversal& t, int64_t r) const {
    if constexpr (!kPlanar) return r;
    const int64_t n = r / t.inner_vectors, i = (r - n * t.inner_vectors) * Vector<T>::kSize;
    return n * t.inner + i;  // a last vector that is not whole ends an image
  }
};

// Where the vectors of a thread's next kCount rows are.
template <typename T, bool kPlanar, int kCount>
class Batch {
 public:
  __device__ Batch(const Traversal& t, const Walk<T, kPlanar>& walk, int64_t first_row) : aligned_(t.aligned) {
    if constexpr (kPlanar) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        const int64_t row = first_row + u * walk.row_step;
        valid_[u] = 0;
        offsets_[u] = 0;
        if (row < walk.row_end) offsets_[u] = walk.offset(t, row, valid_[u]);
      }
    } else {
      offsets_[0] = walk.offset(t, first_row, valid_[0]);
      step_ = walk.row_step * t.channels;
      row_step_ = walk.row_step;
      rows_left_ = static_cast<int>(walk.row_end - first_row);
    }
  }

  // Elements that a vector has; 0 beyond the last row.
  __device__ int valid(int u) const {
    if constexpr (kPlanar) return valid_[u];
    return u * row_step_ < rows_left_ ? valid_[0] : 0;
  }
  // Zeros beyond the last row.
  __device__ void load(const T* p, Bytes16 (&bytes)[kCount]) const {
    if (aligned_) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        bytes[u].words = uint4{0, 0, 0, 0};
        if (valid(u) > 0) bytes[u] = load_bytes(p + offset(u), valid(u), true);
      }
    } else {
#pragma unroll
      for (int u = 0; u < kCount; ++u) bytes[u] = load_bytes(p + offset(u), valid(u), false);
    }
  }
  __device__ void store(T* p, int u, const Vector<T>& vector) const {
    if (valid(u) > 0) store_vector(p + offset(u), valid(u), aligned_, vector);
  }

 private:
  __device__ int64_t offset(int u) const {
    if constexpr (kPlanar) return offsets_[u];
    return offsets_[0] + u * step_;
  }

  static constexpr int kOffsets = kPlanar ? kCount : 1;  // channels_last: rows are evenly spaced
  int64_t offsets_[kOffsets], step_ = 0;
  int valid_[kOffsets], row_step_ = 0, rows_left_ = 0;
  bool aligned_;
};

// Takes a thread down its tile, kCount rows of kTensors tensors at a time: all of them are under way before the first one
// is needed, and those of the first rows before whatever a kernel computes between making this and reading `bytes`.
template <typename T, bool kPlanar, int kCount, int kTensors>
class Rows {
 public:
  Bytes16 bytes[kTensors][kCount];

  __device__ Rows(const Traversal& t, const Walk<T, kPlanar>& walk, const T* const (&tensors)[kTensors])
      : batch_(t, walk, walk.row), row_(walk.row) {
    load(tensors);
  }
  __device__ bool any(const Walk<T, kPlanar>& walk) const { return row_ < walk.row_end; }
  __device__ void next(const Traversal& t, const Walk<T, kPlanar>& walk, const T* const (&tensors)[kTensors]) {
    row_ += kCount * walk.row_step;
    batch_ = Batch<T, kPlanar, kCount>(t, walk, row_);
    load(tensors);
  }
  __device__ const Batch<T, kPlanar, kCount>& batch() const { return batch_; }

 private:
  __device__ void load(const T* const (&tensors)[kTensors]) {
#pragma unroll
    for (int i = 0; i < kTensors; ++i) batch_.load(tensors[i], bytes[i]);
  }

  Batch<T, kPlanar, kCount> batch_;
  int64_t row_;
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

// Adds up over the block, for each of a thread's channels, the sums that its threads have of kQuantities quantities.
// Element i of quantity q is in sums[q * kSize + i]; totals are valid in the first channel_lanes threads.
template <typename T, bool kPlanar, int kQuantities, int kTotals>
__device__ __forceinline__ void total_sums(const Traversal& t, const float (&sums)[kQuantities * Vector<T>::kSize],
                                           float (&totals)[kTotals]) {
  constexpr int kSize = Vector<T>::kSize;
  static_assert(kTotals == kQuantities * (kPlanar ? 1 : kSize), "one for each channel of each quantity");
#pragma unroll
  for (int i = 0; i < kTotals; ++i) totals[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < kQuantities * kSize; ++i) totals[kPlanar ? i / kSize : i] += sums[i];
  reduce_rows<kThreads>(static_cast<float*>(shared_memory()), totals, t.channel_lanes);
}

struct StatisticsParams {
  Traversal traversal;
  const void* input;
  StatisticsTiles tiles;
};

// A block sums deviations from the first value of its tile and their squares. That value is among the squares, so that
// however odd it is, the cancellation in m2 costs no more than a factor of the tile's number of values.
template <typename T, bool kPlanar>
__global__ void __launch_bounds__(kThreads, kSumBlocks<T>) batch_statistics_kernel(StatisticsParams p) {
  wait_for_previous_kernel();
  constexpr int kSize = Vector<T>::kSize, kChannels = kPlanar ? 1 : kSize, kRows = kBatch<T, 1>;
  const Traversal& t = p.traversal;
  const Walk<T, kPlanar> walk(t);
  const T* input = static_cast<const T*>(p.input);
  Bytes16 pivot_bytes[1];
  Batch<T, kPlanar, 1>(t, walk, walk.first_row).load(input, pivot_bytes);
  Vector<T> pivot{};
  float sums[2 * kSize] = {};  // of deviations, of their squares
  for (int64_t row = walk.row; row < walk.row_end; row += kRows * walk.row_step) {
    const Batch<T, kPlanar, kRows> batch(t, walk, row);
    Bytes16 bytes[kRows];
    batch.load(input, bytes);
    if (row == walk.row) unpack(pivot_bytes[0], pivot);  // not sooner: the first rows' way should not wait for it
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int valid = batch.valid(u);
      Vector<T> x;
      unpack(bytes[u], x);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const bool exists = kPlanar ? i < valid : valid > 0;
        const float deviation = exists ? x.values[i] - pivot.values[kPlanar ? 0 : i] : 0.0f;
        sums[i] += deviation;
        sums[kSize + i] = fmaf(deviation, deviation, sums[kSize + i]);
      }
    }
  }
  float totals[2 * kChannels];
  total_sums<T, kPlanar, 2>(t, sums, totals);
  if (threadIdx.x >= static_cast<unsigned>(t.channel_lanes)) return;
  const int64_t last_row = walk.first_row < walk.row_end ? walk.row_end : walk.first_row;
  const auto count = static_cast<float>(walk.values_before(t, last_row) - walk.values_before(t, walk.first_row));
  const float inverse = count > 0.0f ? 1.0f / count : 0.0f;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    if (i >= walk.count) continue;
    const float sum = totals[i], m2 = fmaf(-sum * inverse, sum, totals[kChannels + i]);
    p.tiles.mean[walk.tile * t.channels + walk.channel + i] = fmaf(sum, inverse, pivot.values[i]);
    p.tiles.m2[walk.tile * t.channels + walk.channel + i] = m2 < 0.0f ? 0.0f : m2;
    if (walk.channel + i == 0) p.tiles.count[walk.tile] = count;
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
  const T* const input[1] = {static_cast<const T*>(p.args.input)};
  T* output = static_cast<T*>(p.args.output);
  Rows<T, kPlanar, kScaleShiftBatch, 1> rows(t, walk, input);
  const Coefficients<T, kPlanar> scale(p.args.scale, walk, 1.0f);
  const Coefficients<T, kPlanar> shift(p.args.shift, walk, 0.0f);
  const float slope = p.args.activation.negative_slope;
  for (; rows.any(walk); rows.next(t, walk, input)) {
    for_activation(p.args.activation.kind, [&](auto kind) {
#pragma unroll
      for (int u = 0; u < kScaleShiftBatch; ++u) {
        Vector<T> x;
        unpack(rows.bytes[0][u], x);
#pragma unroll
        for (int i = 0; i < Vector<T>::kSize; ++i) {
          x.values[i] = activate(kind.value, slope, fmaf(scale[i], x.values[i], shift[i]));
        }
        rows.batch().store(output, u, x);
      }
    });
  }
}

struct BackwardParams {
  Traversal traversal;
  BnActBackwardArgs args;
};

// scale and shift of a thread's channels, rounded as batch_norm_forward rounds them.
template <typename T, bool kPlanar>
struct ScaleAndShift {
  Coefficients<T, kPlanar> scale, shift;

  __device__ ScaleAndShift(const BnActBackwardArgs& args, const Walk<T, kPlanar>& walk,
                           const Coefficients<T, kPlanar>& mean, const Coefficients<T, kPlanar>& invstd)
      : scale(args.weight, walk, 1.0f), shift(args.bias, walk, 0.0f) {
#pragma unroll
    for (int i = 0; i < Coefficients<T, kPlanar>::kSize; ++i) {
      scale.values[i] *= invstd.values[i];
      shift.values[i] = fmaf(-mean.values[i], scale.values[i], shift.values[i]);
    }
  }
};

// Writes what the block's first channel_lanes threads have of kQuantities quantities, those whose array is not null.
template <typename T, bool kPlanar, int kQuantities, int kTotals>
__device__ __forceinline__ void write_tile_sums(const Traversal& t, const Walk<T, kPlanar>& walk,
                                                const float (&totals)[kTotals], float* const (&arrays)[kQuantities]) {
  constexpr int kChannels = kTotals / kQuantities;
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
__global__ void __launch_bounds__(kThreads, kSumBlocks<T>) bn_act_backward_reduce_kernel(BackwardParams p) {
  wait_for_previous_kernel();
  constexpr int kSize = Vector<T>::kSize, kChannels = kPlanar ? 1 : kSize, kRows = kBatch<T, 2>;
  const Traversal& t = p.traversal;
  const Walk<T, kPlanar> walk(t);
  const T* const tensors[2] = {static_cast<const T*>(p.args.grad_output), static_cast<const T*>(p.args.input)};
  Rows<T, kPlanar, kRows, 2> rows(t, walk, tensors);
  const Coefficients<T, kPlanar> mean(p.args.mean, walk, 0.0f), invstd(p.args.invstd, walk, 1.0f);
  const ScaleAndShift<T, kPlanar> z_of(p.args, walk, mean, invstd);
  const float slope = p.args.activation.negative_slope;
  float sums[2 * kSize] = {};  // of dz, of dz * (input - mean)
  for (; rows.any(walk); rows.next(t, walk, tensors)) {
    for_activation(p.args.activation.kind, [&](auto kind) {
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        Vector<T> g, y;
        unpack(rows.bytes[0][u], g);
        unpack(rows.bytes[1][u], y);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {  // what does not exist has gradient 0
          const float z = fmaf(z_of.scale[i], y.values[i], z_of.shift[i]);
          const float dz = g.values[i] * activation_derivative(kind.value, slope, z);
          sums[i] += dz;
          sums[kSize + i] = fmaf(dz, y.values[i] - mean[i], sums[kSize + i]);
        }
      }
    });
  }
  float totals[2 * kChannels];
  total_sums<T, kPlanar, 2>(t, sums, totals);
#pragma unroll
  for (int i = 0; i < kChannels; ++i) totals[kChannels + i] *= invstd[i];
  write_tile_sums<T, kPlanar, 2>(t, walk, totals, {p.args.tiles.sum_dz, p.args.tiles.sum_dz_xhat});
}

template <typename T, bool kPlanar>
__global__ void __launch_bounds__(kThreads, kSumBlocks<T>) bn_act_backward_apply_kernel(BackwardParams p) {
  wait_for_previous_kernel();
  constexpr int kRows = kBatch<T, 2>;
  const Traversal& t = p.traversal;
  const Walk<T, kPlanar> walk(t);
  const T* const tensors[2] = {static_cast<const T*>(p.args.grad_output), static_cast<const T*>(p.args.input)};
  Rows<T, kPlanar, kRows, 2> rows(t, walk, tensors);
  T* grad_input = static_cast<T*>(p.args.grad_input);
  const Coefficients<T, kPlanar> b(p.args.b, walk, 0.0f), c(p.args.c, walk, 0.0f);
  const Coefficients<T, kPlanar> mean(p.args.mean, walk, 0.0f), invstd(p.args.invstd, walk, 1.0f);
  const ScaleAndShift<T, kPlanar> z_of(p.args, walk, mean, invstd);
  const float slope = p.args.activation.negative_slope;
  for (; rows.any(walk); rows.next(t, walk, tensors)) {
    for_activation(p.args.activation.kind, [&](auto kind) {
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        Vector<T> g, y;
        unpack(rows.bytes[0][u], g);
        unpack(rows.bytes[1][u], y);
#pragma unroll
        for (int i = 0; i < Vector<T>::kSize; ++i) {
          const float z = fmaf(z_of.scale[i], y.values[i], z_of.shift[i]);
          const float dz = g.values[i] * activation_derivative(kind.value, slope, z);
          g.values[i] = fmaf(z_of.scale[i], dz, fmaf(b[i], y.values[i], c[i]));
        }
        rows.batch().store(grad_input, u, g);
      }
    });
  }
}

struct ActBackwardParams {
  Traversal traversal;
  ActBackwardArgs args;
};

template <typename T, bool kPlanar>
__global__ void __launch_bounds__(kThreads, kSumBlocks<T>) act_backward_kernel(ActBackwardParams p) {
  wait_for_previous_kernel();
  constexpr int kSize = Vector<T>::kSize, kChannels = kPlanar ? 1 : kSize, kRows = kBatch<T, 2>;
  const Traversal& t = p.traversal;
  const Walk<T, kPlanar> walk(t);
  const T* const tensors[2] = {static_cast<const T*>(p.args.grad_output), static_cast<const T*>(p.args.output)};
  Rows<T, kPlanar, kRows, 2> rows(t, walk, tensors);
  T* grad_input = static_cast<T*>(p.args.grad_input);
  const float slope = p.args.activation.negative_slope;
  float sum_dz[kSize] = {};
  for (; rows.any(walk); rows.next(t, walk, tensors)) {
    for_activation(p.args.activation.kind, [&](auto kind) {
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        Vector<T> g, y;
        unpack(rows.bytes[0][u], g);
        unpack(rows.bytes[1][u], y);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          g.values[i] *= activation_derivative_from_output(kind.value, slope, y.values[i]);
          sum_dz[i] += g.values[i];
        }
        rows.batch().store(grad_input, u, g);
      }
    });
  }
  if (p.args.tiles.sum_dz == nullptr) return;
  float totals[kChannels];
  total_sums<T, kPlanar, 1>(t, sum_dz, totals);
  write_tile_sums<T, kPlanar, 1>(t, walk, totals, {p.args.tiles.sum_dz});
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

__device__ __forceinline__ void write_batch_norm(const BatchNormForwardArgs& p, int64_t channel, float mean,
                                                 float var) {
  const float invstd = 1.0f / sqrtf(var + p.eps);
  const float scale = (p.weight != nullptr ? p.weight[channel] : 1.0f) * invstd;
  p.mean[channel] = mean;
  p.invstd[channel] = invstd;
  p.scale[channel] = scale;
  p.shift[channel] = fmaf(-mean, scale, p.bias != nullptr ? p.bias[channel] : 0.0f);
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
  if (p.b == nullptr) return;
  const double scale = (p.weight != nullptr ? p.weight[channel] : 1.0f) * p.invstd[channel];
  const double b = -scale * double{p.invstd[channel]} * (sum_dz_xhat * params.per_value);
  p.b[channel] = static_cast<float>(b);
  p.c[channel] = static_cast<float>(-scale * (sum_dz * params.per_value) - b * double{p.mean[channel]});
}

// Calls f(T{}, planar) with the storage type and the layout as compile-time values.
template <typename F>
cudaError_t dispatch(DataType type, const BnActShape& shape, const F& f) {
  return dispatch_type(type, [&](auto zero) {
    return shape.inner > 1 ? f(zero, std::true_type{}) : f(zero, std::false_type{});
  });
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

// Of the kernels that write tiles of `quantities` sums for each of a thread's channels.
size_t sum_shared_bytes(const Traversal& t, DataType type, int quantities) {
  const int channels = t.inner > 1 ? 1 : vector_size(type);
  return static_cast<size_t>(quantities * channels * reduce_slots(kThreads, t.channel_lanes)) * sizeof(float);
}

}  // namespace

int64_t bn_act_tiles(const BnActShape& shape) { return tile_count(shape); }

cudaError_t batch_statistics_launch(const BatchStatisticsArgs& args, cudaStream_t stream) {
  const StatisticsParams params{make_traversal(args.shape, args.type, is_aligned16(args.input), true), args.input,
                                args.tiles};
  return dispatch(args.type, args.shape, [&](auto zero, auto planar) {
    return launch(batch_statistics_kernel<decltype(zero), planar.value>, grid_of(params.traversal), kThreads,
                  sum_shared_bytes(params.traversal, args.type, 2), stream, params);
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
                  sum_shared_bytes(params.traversal, args.type, 2), stream, params);
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
                  sum_shared_bytes(params.traversal, args.type, 1), stream, params);
  });
}

}  // namespace fastgan::cuda
