// Softmax entropy by threads that take whole rows: one at a time, or several of a fixed number of classes.
#pragma once

#include <numeric>

#include "softmax_entropy_common.cuh"

namespace fastgan::cuda {
namespace {

// ---- one thread a row

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Neighbours {
  T values[kCount];
};

// A row in shared memory, kWidth elements at a time (a divisor of the classes); -infinity beyond its end.
template <int kWidth, typename T, int kMaxClasses>
__device__ __forceinline__ void read_row(const T* row, int classes, float (&x)[kMaxClasses]) {
#pragma unroll
  for (int first = 0; first < kMaxClasses; first += kWidth) {
    Neighbours<T, kWidth> loaded{};
    if (first < classes) loaded = *reinterpret_cast<const Neighbours<T, kWidth>*>(row + first);
#pragma unroll
    for (int i = 0; i < kWidth && first + i < kMaxClasses; ++i) {
      x[first + i] = first < classes ? to_float(loaded.values[i]) : -INFINITY;
    }
  }
}

template <int kWidth, typename T, int kMaxClasses>
__device__ __forceinline__ void write_row(const float (&x)[kMaxClasses], int classes, T* row) {
#pragma unroll
  for (int first = 0; first < kMaxClasses; first += kWidth) {
    if (first >= classes) continue;
    Neighbours<T, kWidth> stored{};
#pragma unroll
    for (int i = 0; i < kWidth && first + i < kMaxClasses; ++i) from_float(x[first + i], stored.values[i]);
    *reinterpret_cast<Neighbours<T, kWidth>*>(row + first) = stored;
  }
}

// The tiles of one warp: 32 rows each, in shared memory side by side without gaps, kStages of them. With as wide an
// access as the number of classes allows, lanes that walk their rows meet no bank conflict but with 8 and 16 classes.
template <typename T, int kMaxClasses>
struct Tiles {
  static constexpr int kStages = kMaxClasses * static_cast<int>(sizeof(T)) <= 40 ? 4 : 2;
  static constexpr int kSize = Vector<T>::kSize;

  const SoftmaxEntropyArgs& p;
  const FastDivisor divisor;
  const bool vectors;
  const int classes, lane;
  T* const memory;  // [kStages, kWarpSize, classes]

  __device__ Tiles(const SoftmaxEntropyArgs& args, const FastDivisor& divisor_in, bool vectors_in)
      : p(args),
        divisor(divisor_in),
        vectors(vectors_in),
        classes(static_cast<int>(args.classes)),
        lane(lane_index()),
        memory(reinterpret_cast<T*>(kernel_memory(classes)) + warp_index() * kStages * kWarpSize * classes) {}

  __device__ int64_t count() const { return (p.rows + kWarpSize - 1) / kWarpSize; }
  __device__ T* tile_memory(int stage) const { return memory + stage * kWarpSize * classes; }
  __device__ int rows_of(int64_t tile) const {
    const int64_t rows = p.rows - tile * kWarpSize;
    return rows < kWarpSize ? static_cast<int>(rows) : kWarpSize;
  }

  // Starts a copy into a stage that no lane reads any more. One group of copies, empty for a tile that is not there.
  __device__ void start(int64_t tile, int stage) const {
    if (tile >= 0 && tile < count()) {
      const int rows = rows_of(tile), elements = rows * classes;
      const T* logits = static_cast<const T*>(p.logits) + tile * kWarpSize * p.row_stride;
      T* staged = tile_memory(stage);
      if (vectors && rows == kWarpSize) {
#pragma unroll 4
        for (int i = lane * kSize; i < kWarpSize * classes; i += kWarpSize * kSize) {
          copy_async(staged + i, logits + i, true);
        }
      } else {
#pragma unroll 2
        for (int i = lane; i < elements; i += kWarpSize) {
          const int row = divisor.divide(i);
          staged[i] = logits[row * p.row_stride + i - row * classes];
        }
      }
    }
    copy_async_commit();
  }

  // Waits for the oldest of kStages - 1 tiles that were started.
  __device__ void wait() const {
    copy_async_wait<kStages - 2>();
    warp_barrier();
  }

  __device__ void read(int stage, float (&x)[kMaxClasses]) const {
    const T* row = tile_memory(stage) + lane * classes;
    if (classes % 4 == 0) {
      read_row<4>(row, classes, x);
    } else if (classes % 2 == 0) {
      read_row<2>(row, classes, x);
    } else {
      read_row<1>(row, classes, x);
    }
  }

  __device__ void write(int stage, const float (&x)[kMaxClasses]) const {
    T* row = tile_memory(stage) + lane * classes;
    if (classes % 4 == 0) {
      write_row<4>(x, classes, row);
    } else if (classes % 2 == 0) {
      write_row<2>(x, classes, row);
    } else {
      write_row<1>(x, classes, row);
    }
  }

  // Copies a tile that all lanes have written to the gradient.
  __device__ void store(int64_t tile, int stage) const {
    const int rows = rows_of(tile), elements = rows * classes;
    T* grad = static_cast<T*>(p.grad_logits) + tile * kWarpSize * classes;
    const T* staged = tile_memory(stage);
    if (vectors && rows == kWarpSize) {
#pragma unroll 4
      for (int i = lane * kSize; i < kWarpSize * classes; i += kWarpSize * kSize) {
        store_streaming(grad + i, load_bytes(staged + i, kSize, true).words);
      }
    } else {
#pragma unroll 2
      for (int i = lane; i < elements; i += kWarpSize) grad[i] = staged[i];
    }
  }
};

template <typename T, int kMaxClasses>
__global__ void __launch_bounds__(kThreads, 1) forward_thread_kernel(ForwardParams params) {
  using Walk = Tiles<T, kMaxClasses>;
  wait_for_previous_kernel();
  const SoftmaxEntropyArgs& p = params.args;
  const Walk tiles(p, params.classes, params.vectors);
  const int classes = tiles.classes, thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t step = int64_t{gridDim.x} * warp_count(), count = tiles.count();
  int64_t tile = int64_t{warp_index()} * gridDim.x + blockIdx.x;
#pragma unroll 1
  for (int stage = 0; stage < Walk::kStages - 1; ++stage) tiles.start(tile + stage * step, stage);
  float share[kMaxClasses] = {};
  float entropy = 0.0f, cross_entropy = 0.0f;
  for (int stage = 0; tile < count; tile += step, stage = (stage + 1) % Walk::kStages) {
    const int64_t row = tile * kWarpSize + tiles.lane;
    const bool active = row < p.rows;
    int64_t label = -1;
    const bool labeled = active && carries_label(p, row, label);
    tiles.wait();
    tiles.start(tile + (Walk::kStages - 1) * step, (stage + Walk::kStages - 1) % Walk::kStages);
    if (!active) continue;
    float e[kMaxClasses];
    tiles.read(stage, e);
    float max = e[0], s = 0.0f, u = 0.0f;
#pragma unroll
    for (int k = 1; k < kMaxClasses; ++k) max = fmaxf(max, e[k]);
#pragma unroll
    for (int k = 0; k < kMaxClasses; ++k) {
      const float d = e[k] - max;
      e[k] = exponential(d);
      s += e[k];
      u += finite(d) * e[k];
    }
    const float inverse = reciprocal(s), log_s = logf(s);
#pragma unroll
    for (int k = 0; k < kMaxClasses; ++k) share[k] += e[k] * inverse;
    entropy += log_s - u * inverse;
    p.log_normalizer[row] = log_s;
    if (labeled) {
      const T* staged = tiles.tile_memory(stage) + tiles.lane * classes;
      cross_entropy += out_of_range(p, label) ? not_a_number() : log_s - (to_float(staged[label]) - max);
    }
  }
  // The threads' sums side by side, then a warp a column.
  copy_async_wait<0>();
  block_barrier();
  float* sums = reinterpret_cast<float*>(kernel_memory(classes));  // [classes + kExtra, threads]
#pragma unroll
  for (int k = 0; k < kMaxClasses; ++k) {
    if (k < classes) sums[k * threads + thread] = share[k];
  }
  sums[classes * threads + thread] = entropy;
  sums[(classes + 1) * threads + thread] = cross_entropy;
  block_barrier();
  float* out = block_share(params);
  for (int column = warp_index(); column < classes + kExtra; column += warp_count()) {
    float sum = 0.0f;
#pragma unroll 4
    for (int i = tiles.lane; i < threads; i += kWarpSize) sum += sums[column * threads + i];
    sum = warp_sum(sum);
    if (tiles.lane == 0) out[column] = sum;
  }
  finish(params, gridDim.x == 1 ? out : params.shares);
}

template <typename T, int kMaxClasses>
__global__ void __launch_bounds__(kThreads, 1) backward_thread_kernel(BackwardParams params) {
  using Walk = Tiles<T, kMaxClasses>;
  wait_for_previous_kernel();
  const SoftmaxEntropyArgs& p = params.args;
  const Walk tiles(p, params.classes, params.vectors);
  const int classes = tiles.classes;
  const int64_t step = int64_t{gridDim.x} * warp_count();
  int64_t tile = tiles.count() - 1 - (int64_t{warp_index()} * gridDim.x + blockIdx.x);
#pragma unroll 1
  for (int stage = 0; stage < Walk::kStages - 1; ++stage) tiles.start(tile - stage * step, stage);
  const Gradients g(p);
  float of_mean[kMaxClasses];
#pragma unroll
  for (int k = 0; k < kMaxClasses; ++k) of_mean[k] = k < classes ? p.mean_probabilities[k] : 0.0f;
#pragma unroll
  for (int k = 0; k < kMaxClasses; ++k) of_mean[k] = g.of_mean(of_mean[k]);
  for (int stage = 0; tile >= 0; tile -= step, stage = (stage + 1) % Walk::kStages) {
    const int64_t row = tile * kWarpSize + tiles.lane;
    const bool active = row < p.rows;
    int64_t label = -1;
    const bool labeled = active && carries_label(p, row, label);
    tiles.wait();
    tiles.start(tile - (Walk::kStages - 1) * step, (stage + Walk::kStages - 1) % Walk::kStages);
    if (active) {
      float x[kMaxClasses], e[kMaxClasses];
      tiles.read(stage, x);
      float max = x[0], s = 0.0f, mean_t = 0.0f;
#pragma unroll
      for (int k = 1; k < kMaxClasses; ++k) max = fmaxf(max, x[k]);
#pragma unroll
      for (int k = 0; k < kMaxClasses; ++k) {
        const float d = x[k] - max;
        e[k] = exponential(d);
        x[k] = g.t(d, of_mean[k]);
        s += e[k];
        mean_t += e[k] * x[k];
      }
      const float inverse = reciprocal(s), of_label = g.of_label(labeled), mean = mean_t * inverse + of_label;
      const int own = class_or_none(p, labeled, label);
#pragma unroll
      for (int k = 0; k < kMaxClasses; ++k) x[k] = e[k] * inverse * (mean - x[k]) - (k == own ? of_label : 0.0f);
      tiles.write(stage, x);
    }
    warp_barrier();
    tiles.store(tile, stage);
  }
  copy_async_wait<0>();
}

// ---- one thread several rows

// Tiles of dense rows of kClasses classes: a lane has kRows rows side by side, together kVectors whole vectors. With an
// odd kVectors, lanes that walk their own vectors meet no bank conflict.
template <typename T, int kClasses>
struct DenseTiles {
  static constexpr int kStages = 2;
  static constexpr int kSize = Vector<T>::kSize;
  static constexpr int kRows = kSize / std::gcd(kSize, kClasses), kVectors = kRows * kClasses / kSize;
  static constexpr int kTileRows = kWarpSize * kRows, kElements = kTileRows * kClasses;
  static constexpr int kWarpBytes = kStages * kElements * static_cast<int>(sizeof(T));
  static_assert(kClasses % 2 == 0 && kVectors % 2 == 1);

  const SoftmaxEntropyArgs& p;
  const int lane;
  const int full;  // tiles of kTileRows rows; one more may have fewer
  const int rest;  // rows of this lane in that one
  T* const memory;  // [kStages, kTileRows, kClasses]

  __device__ explicit DenseTiles(const SoftmaxEntropyArgs& args)
      : p(args),
        lane(lane_index()),
        full(static_cast<int>(args.rows / kTileRows)),
        rest(clamp(static_cast<int>(args.rows % kTileRows) - lane * kRows)),
        memory(reinterpret_cast<T*>(kernel_memory(kClasses) + warp_index() * kWarpBytes)) {}

  static __device__ int clamp(int rows) { return rows < 0 ? 0 : rows < kRows ? rows : kRows; }
  __device__ int count() const { return full + (p.rows % kTileRows != 0 ? 1 : 0); }
  __device__ int rest_elements() const { return static_cast<int>(p.rows % kTileRows) * kClasses; }
  __device__ T* tile_memory(int stage) const { return memory + stage * kElements; }
  __device__ int64_t first_row(int tile) const { return int64_t{tile} * kTileRows + lane * kRows; }
  __device__ int rows_of(int tile) const { return tile < full ? kRows : rest; }

  // Starts a copy into a stage that no lane reads any more; zeros for rows that are not there. One group of copies,
  // empty for a tile that is not there.
  __device__ __forceinline__ void start(int tile, int stage) const {
    const T* logits = static_cast<const T*>(p.logits) + int64_t{tile} * kElements;
    T* staged = tile_memory(stage);
    if (tile >= 0 && tile < full) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int at = (i * kWarpSize + lane) * kSize;
        copy_async(staged + at, logits + at, true);
      }
    } else if (tile == full) {
#pragma unroll 1
      for (int i = lane; i < kElements; i += kWarpSize) staged[i] = i < rest_elements() ? logits[i] : T{};
    }
    copy_async_commit();
  }

  // Waits for the oldest of kStages - 1 tiles that were started.
  __device__ __forceinline__ void wait() const {
    copy_async_wait<kStages - 2>();
    warp_barrier();
  }

  __device__ __forceinline__ void read(int stage, Bytes16 (&rows)[kVectors]) const {
    const T* own = tile_memory(stage) + lane * kRows * kClasses;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) rows[i] = load_bytes(own + i * kSize, kSize, true);
  }

  __device__ __forceinline__ void write(int stage, const Bytes16 (&rows)[kVectors]) const {
    T* own = tile_memory(stage) + lane * kRows * kClasses;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) *reinterpret_cast<uint4*>(own + i * kSize) = rows[i].words;
  }

  // Copies a tile that all lanes have written to the gradient.
  __device__ __forceinline__ void store(int tile, int stage) const {
    T* grad = static_cast<T*>(p.grad_logits) + int64_t{tile} * kElements;
    const T* staged = tile_memory(stage);
    if (tile < full) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int at = (i * kWarpSize + lane) * kSize;
        store_streaming(grad + at, load_bytes(staged + at, kSize, true).words);
      }
    } else {
#pragma unroll 1
      for (int i = lane; i < rest_elements(); i += kWarpSize) grad[i] = staged[i];
    }
  }

  // The labels of this lane's rows in a tile; ignore_index for rows that are not there.
  __device__ __forceinline__ void read_labels(int tile, int64_t (&labels)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) labels[r] = p.ignore_index;
    if (p.labels == nullptr) return;
    const int rows = rows_of(tile);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < rows) labels[r] = p.labels[first_row(tile) + r];
    }
  }
};

// Row r of a lane's rows, as float32.
template <int kClasses, typename T, int kVectors>
__device__ __forceinline__ void unpack_row(Bytes16 (&rows)[kVectors], int r, T, float (&x)[kClasses]) {
#pragma unroll
  for (int k = 0; k < kClasses; ++k) {
    const int i = r * kClasses + k;
    x[k] = to_float(rows[i / Vector<T>::kSize].elements(T{})[i % Vector<T>::kSize]);
  }
}

template <int kClasses, typename T, int kVectors>
__device__ __forceinline__ void pack_row(const float (&x)[kClasses], int r, T, Bytes16 (&rows)[kVectors]) {
  constexpr int kAtOnce = static_cast<int>(4 / sizeof(T));  // elements of a word
#pragma unroll
  for (int k = 0; k < kClasses; k += kAtOnce) {
    const int word = (r * kClasses + k) / kAtOnce;
    float& packed = rows[word / 4].floats[word % 4];
    if constexpr (kAtOnce == 1) {
      packed = x[k];
    } else {
      packed = bits_to_float(pack_pair(x[k], x[k + 1], T{}));
    }
  }
}

// One step of a sum over the warp: the lanes of which one has the bit `mask` and the other has not each go on with half
// of the columns, the former with the second half.
template <int kColumns>
__device__ __forceinline__ void fold_columns(float* values, int mask) {
  const bool upper = (lane_index() & mask) != 0;
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    const float low = values[i], high = values[i + kColumns / 2];
    values[i] = (upper ? high : low) + shuffle_xor(upper ? low : high, mask);
  }
}

template <typename T, int kClasses>
__global__ void __launch_bounds__(kDenseThreads, kDenseBlocks) forward_dense_kernel(ForwardParams params) {
  using Walk = DenseTiles<T, kClasses>;
  constexpr int kRows = Walk::kRows, kColumns = kClasses + kExtra, kQuarter = kColumns / 4;
  static_assert(kColumns % 4 == 0 && kColumns <= kWarpSize);
  wait_for_previous_kernel();
  const SoftmaxEntropyArgs& p = params.args;
  const Walk tiles(p);
  const int step = static_cast<int>(gridDim.x) * warp_count(), count = tiles.count();
  int tile = warp_index() * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
#pragma unroll
  for (int stage = 0; stage < Walk::kStages - 1; ++stage) tiles.start(tile + stage * step, stage);
  float share[kColumns] = {};  // the classes, then as kExtra
  for (int stage = 0; tile < count; tile += step, stage = (stage + 1) % Walk::kStages) {
    const int rows = tiles.rows_of(tile);
    int64_t labels[kRows];
    tiles.read_labels(tile, labels);
    tiles.wait();
    tiles.start(tile + (Walk::kStages - 1) * step, (stage + Walk::kStages - 1) % Walk::kStages);
    Bytes16 packed[Walk::kVectors];
    tiles.read(stage, packed);
    float max[kRows];
    Neighbours<float, kRows> log_s;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float e[kClasses];
      unpack_row(packed, r, T{}, e);
      float s = 0.0f, u = 0.0f;
      max[r] = e[0];
#pragma unroll
      for (int k = 1; k < kClasses; ++k) max[r] = fmaxf(max[r], e[k]);
#pragma unroll
      for (int k = 0; k < kClasses; ++k) {
        const float d = e[k] - max[r];
        e[k] = exponential(d);
        s += e[k];
        u += finite(d) * e[k];
      }
      log_s.values[r] = logarithm(s);
      const float inverse = r < rows ? reciprocal(s) : 0.0f;
#pragma unroll
      for (int k = 0; k < kClasses; ++k) share[k] += e[k] * inverse;
      share[kClasses] += (r < rows ? log_s.values[r] : 0.0f) - u * inverse;
    }
    float* log_normalizer = p.log_normalizer + tiles.first_row(tile);
    if (rows == kRows) {
      *reinterpret_cast<Neighbours<float, kRows>*>(log_normalizer) = log_s;
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < rows) log_normalizer[r] = log_s.values[r];
      }
    }
    if (p.labels == nullptr) continue;
    const T* own = tiles.tile_memory(stage) + tiles.lane * kRows * kClasses;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (labels[r] == p.ignore_index) continue;
      share[kClasses + 1] += out_of_range(p, labels[r])
                                 ? not_a_number()
                                 : log_s.values[r] - (to_float(own[r * kClasses + labels[r]]) - max[r]);
    }
  }
  // Every eight lanes come to have the warp's sums of a quarter of the columns; then a thread a column over the warps.
  fold_columns<kColumns>(share, 16);
  fold_columns<kColumns / 2>(share, 8);
#pragma unroll
  for (int i = 0; i < kQuarter; ++i) {
#pragma unroll
    for (int mask = 4; mask > 0; mask /= 2) share[i] += shuffle_xor(share[i], mask);
  }
  copy_async_wait<0>();
  warp_barrier();
  float* warp_sums = reinterpret_cast<float*>(tiles.memory);  // [columns] in each warp's memory
  if (tiles.lane % 8 == 0) {
    const int first = tiles.lane / 8 * kQuarter;
#pragma unroll
    for (int i = 0; i < kQuarter; ++i) warp_sums[first + i] = share[i];
  }
  block_barrier();
  float* out = block_share(params);
  const int column = static_cast<int>(threadIdx.x);
  if (column < kColumns) {
    float sum = 0.0f;
#pragma unroll 4
    for (int w = 0; w < warp_count(); ++w) sum += warp_sums[w * (Walk::kWarpBytes / 4) + column];
    out[column] = sum;
  }
  finish(params, gridDim.x == 1 ? out : params.shares);
}

template <typename T, int kClasses>
__global__ void __launch_bounds__(kDenseThreads, kDenseBlocks) backward_dense_kernel(BackwardParams params) {
  using Walk = DenseTiles<T, kClasses>;
  constexpr int kRows = Walk::kRows;
  wait_for_previous_kernel();
  const SoftmaxEntropyArgs& p = params.args;
  const Walk tiles(p);
  const int step = static_cast<int>(gridDim.x) * warp_count();
  int tile = tiles.count() - 1 - (warp_index() * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x));
#pragma unroll
  for (int stage = 0; stage < Walk::kStages - 1; ++stage) tiles.start(tile - stage * step, stage);
  const Gradients g(p);
  float of_mean[kClasses];
#pragma unroll
  for (int k = 0; k < kClasses; ++k) of_mean[k] = p.mean_probabilities[k];
#pragma unroll
  for (int k = 0; k < kClasses; ++k) of_mean[k] = g.of_mean(of_mean[k]);
  for (int stage = 0; tile >= 0; tile -= step, stage = (stage + 1) % Walk::kStages) {
    int64_t labels[kRows];
    tiles.read_labels(tile, labels);
    tiles.wait();
    tiles.start(tile - (Walk::kStages - 1) * step, (stage + Walk::kStages - 1) % Walk::kStages);
    Bytes16 packed[Walk::kVectors];
    tiles.read(stage, packed);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool labeled = labels[r] != p.ignore_index;
      float x[kClasses], e[kClasses];
      unpack_row(packed, r, T{}, x);
      float max = x[0], s = 0.0f, mean_t = 0.0f;
#pragma unroll
      for (int k = 1; k < kClasses; ++k) max = fmaxf(max, x[k]);
#pragma unroll
      for (int k = 0; k < kClasses; ++k) {
        const float d = x[k] - max;
        e[k] = exponential(d);
        x[k] = g.t(d, of_mean[k]);
        s += e[k];
        mean_t += e[k] * x[k];
      }
      const float inverse = reciprocal(s), of_label = g.of_label(labeled), mean = mean_t * inverse + of_label;
#pragma unroll
      for (int k = 0; k < kClasses; ++k) x[k] = e[k] * inverse * (mean - x[k]);
      if (p.labels != nullptr) {
        const int own = class_or_none(p, labeled, labels[r]);
#pragma unroll
        for (int k = 0; k < kClasses; ++k) x[k] -= k == own ? of_label : 0.0f;
      }
      pack_row(x, r, T{}, packed);
    }
    tiles.write(stage, packed);
    warp_barrier();
    tiles.store(tile, stage);
  }
  copy_async_wait<0>();
}

}  // namespace
}  // namespace fastgan::cuda
