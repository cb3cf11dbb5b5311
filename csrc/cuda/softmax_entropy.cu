// Softmax entropy kernels. Blocks are persistent: each walks rows that lie a grid apart and keeps its share of the
// marginal on the chip; a second kernel of one block adds the blocks' shares in a fixed order (float64), so that the
// result is the same in every run. A block that is alone does this itself, so that small batches need one launch.
//
// By the number of classes a row belongs to
//   one thread  (up to 20): a warp copies tiles of 32 rows into shared memory, one ahead of the one it works on; forward, of many
//               dense rows of 10: a thread takes the 2 or 4 rows of 80 bytes straight into registers;
//   one warp    (up to 1024): the next row is copied into shared memory while this one is worked on in registers;
//   one block   (more): two passes over the row, the second from the L2 cache.
// The copies are 16 bytes a lane where rows are aligned to that (tiles: dense), else element by element.
// Backward computes a warp's or a block's exponentials twice rather than keep them, and walks the rows (but those of a
// block each) from the last to the first: those that forward has left in the L2 cache.
//
// H200, float32, forward / backward, us: [100, 10] 2.8 / 2.3, [1M, 10] 18.9 / 25.9 (at a copy's speed 10 / 19), [1M, 1000] 1156 /
// 2135. [1M, 10] in tiles 20.5 forward; in registers 37 to 42 backward, whose stores of 16 bytes 80 apart cost more than they save; by
// one block of tiles a multiprocessor with three tiles ahead 21.3 / 26.1 (with labels 26.6 / 30.4 in place of 22.8 / 28.8).
#include "softmax_entropy.h"

#include <algorithm>

#include "device.cuh"

namespace fastgan::cuda {
namespace {

constexpr int kThreads = 512;     // at most, in kernels of a thread or a warp a row
constexpr int kRowThreads = 256;  // in kernels of a block a row
constexpr int kMaxWarps = kThreads / kWarpSize;
constexpr int kExtra = 2;          // columns of a block's share after the classes: sum of H, sum of the cross-entropy
constexpr int kMaxThreadClasses = 20;
constexpr int kMaxWarpClasses = 1024;
constexpr int kFinishThreads = 1024;
constexpr int kFinishBytes = kFinishThreads / kWarpSize * sizeof(double);  // of shared memory, for write_results()

struct ForwardParams {
  SoftmaxEntropyArgs args;
  FastDivisor classes;
  bool vectors;   // rows (tiles of rows) are read 16 bytes at a time
  unsigned blocks;
  float* shares;  // [blocks, classes + kExtra]
};

struct BackwardParams {
  SoftmaxEntropyArgs args;
  FastDivisor classes;
  bool vectors;  // rows (tiles of rows) of logits and of gradients are read and written 16 bytes at a time
};

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }
__device__ __forceinline__ int warp_count() { return static_cast<int>(blockDim.x) / kWarpSize; }

template <typename Value>
__device__ __forceinline__ Value warp_sum(Value value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}

// e^d for d <= 0, which is exact enough after the row's maximum is subtracted: where d is large, e^d is small.
__device__ __forceinline__ float exponential(float d) { return exp2_approximate(d * 1.44269504f); }

// d as a factor of e^d, finite also times a gradient: 0 log 0 = 0, for logits of -infinity.
__device__ __forceinline__ float finite(float d) { return fmaxf(d, -1000.0f); }

__device__ __forceinline__ bool carries_label(const SoftmaxEntropyArgs& p, int64_t row, int64_t& label) {
  if (p.labels == nullptr) return false;
  label = p.labels[row];
  return label != p.ignore_index;
}

__device__ __forceinline__ bool out_of_range(const SoftmaxEntropyArgs& p, int64_t label) {
  return label < 0 || label >= p.classes;
}

__device__ __forceinline__ float not_a_number() { return bits_to_float(0x7FC00000u); }

// Shared memory: write_results()'s, the share of a block that is alone, and what each kernel needs.
__host__ __device__ inline int64_t share_bytes(int64_t classes) { return (classes + kExtra + 3) / 4 * 16; }
__device__ __forceinline__ unsigned char* kernel_memory(int64_t classes) {
  return static_cast<unsigned char*>(shared_memory()) + kFinishBytes + share_bytes(classes);
}

// Where a block of the thread and warp kernels puts its share: a block that is alone keeps it in shared memory.
__device__ __forceinline__ float* block_share(const ForwardParams& p) {
  if (gridDim.x == 1) return reinterpret_cast<float*>(static_cast<unsigned char*>(shared_memory()) + kFinishBytes);
  return p.shares + int64_t{blockIdx.x} * (p.args.classes + kExtra);
}

// The sum of values[i * stride] for i = first, first + step, ... below `count`.
template <typename Value>
__device__ __forceinline__ double strided_sum(const Value* values, int64_t stride, int first, int count, int step) {
  constexpr int kAtOnce = 16;  // loads in flight
  double sum = 0.0;
  for (int begin = first; begin < count; begin += kAtOnce * step) {
    Value loaded[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = begin + i * step;
      loaded[i] = at < count ? values[at * stride] : Value{0};
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sum += double{loaded[i]};
  }
  return sum;
}

// Writes the results, given `count` (at least 1) rows of sums whose sum over these rows is that over all blocks.
template <typename Value>
__device__ __forceinline__ void write_results(const SoftmaxEntropyArgs& p, const Value* sums, int count) {
  double* shared = static_cast<double*>(shared_memory());  // [warp_count()]
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int64_t classes = p.classes, columns = classes + kExtra;
  const double rows = static_cast<double>(p.rows);
  int lanes = 1;  // of a warp, that share out one column
  while (lanes < kWarpSize && lanes < count && 2 * lanes * columns <= threads) lanes *= 2;
  double entropy = 0.0;
  for (int64_t first = 0; first < columns; first += threads / lanes) {
    const int64_t column = first + thread / lanes;
    double sum = column < columns ? strided_sum(sums + column, columns, thread % lanes, count, lanes) : 0.0;
    for (int mask = lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (thread % lanes != 0 || column >= columns) continue;
    if (column < classes) {
      const double q = sum / rows;
      p.mean_probabilities[column] = static_cast<float>(q);
      if (q != 0.0) entropy -= q * double{logf(static_cast<float>(q))};
    } else if (column == classes) {
      *p.conditional = static_cast<float>(sum / rows);
    } else {
      const int64_t labeled = p.labels != nullptr ? *p.label_count : 0;
      *p.cross_entropy = labeled > 0 ? static_cast<float>(sum / static_cast<double>(labeled)) : 0.0f;
    }
  }
  entropy = warp_sum(entropy);
  if (lane_index() == 0) shared[warp_index()] = entropy;
  block_barrier();
  if (thread > 0) return;
  for (int warp = 1; warp < warp_count(); ++warp) entropy += shared[warp];
  *p.marginal = static_cast<float>(entropy);
}

// The last thing that every thread of every block of the thread and warp kernels does, after the block's share is
// written: a block that is alone needs no other kernel.
__device__ void finish_alone(const ForwardParams& params, const float* share) {
  if (gridDim.x > 1) return;
  block_barrier();
  write_results(params.args, share, 1);
}

// One block adds up the shares of the blocks before it. Neighbouring threads read neighbouring columns; as many groups
// of them as there are threads for share out the blocks.
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(ForwardParams params) {
  wait_for_previous_kernel();
  const int64_t columns = params.args.classes + kExtra;
  const int thread = static_cast<int>(threadIdx.x), blocks = static_cast<int>(params.blocks);
  if (2 * columns > kFinishThreads) {
    write_results(params.args, params.shares, blocks);
    return;
  }
  double* sums = reinterpret_cast<double*>(static_cast<unsigned char*>(shared_memory()) + kFinishBytes);
  const int width = static_cast<int>(columns), groups = kFinishThreads / width;  // sums: [groups, columns]
  if (thread < groups * width) {
    sums[thread] = strided_sum(params.shares + thread % width, columns, thread / width, blocks, groups);
  }
  block_barrier();
  write_results(params.args, sums, groups);
}

// The gradient of a logit is p (sum_j p_j t_j - t) / N + g_ce (p - [k = label]) / count,
// with t_k = g_conditional d_k + g_marginal log q_k: log p_k = d_k - log s, whose log s falls out.
struct Gradients {
  float conditional, marginal, cross_entropy;

  __device__ explicit Gradients(const SoftmaxEntropyArgs& p) {
    const float rows = static_cast<float>(p.rows);
    conditional = p.grad_conditional != nullptr ? *p.grad_conditional / rows : 0.0f;
    marginal = p.grad_marginal != nullptr ? *p.grad_marginal / rows : 0.0f;
    const int64_t count = p.labels != nullptr ? *p.label_count : 0;
    cross_entropy =
        p.grad_cross_entropy != nullptr && count > 0 ? *p.grad_cross_entropy / static_cast<float>(count) : 0.0f;
  }

  // A NaN in q has no part in the gradient of the conditional entropy alone.
  __device__ float of_mean(float q) const { return marginal == 0.0f || q == 0.0f ? 0.0f : marginal * logf(q); }
  __device__ float t(float d, float of_mean_k) const { return conditional * finite(d) + of_mean_k; }
  __device__ float of_label(bool labeled) const { return labeled ? cross_entropy : 0.0f; }
};

// A row's label as an index that no class equals if the row carries none or one out of range.
__device__ __forceinline__ int class_or_none(const SoftmaxEntropyArgs& p, bool labeled, int64_t label) {
  return labeled && !out_of_range(p, label) ? static_cast<int>(label) : -1;
}

// ---- one thread a row or several

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Neighbours {
  T values[kCount];
};

// What forward adds up over a thread's rows.
template <int kMaxClasses>
struct ThreadSums {
  float probabilities[kMaxClasses] = {};
  float entropy = 0.0f, cross_entropy = 0.0f;

  // Adds the row x, which is lost, and returns its log s. `logits`: the row in memory, where the label's is looked up.
  template <typename T>
  __device__ __forceinline__ float add(const SoftmaxEntropyArgs& p, float (&x)[kMaxClasses], bool labeled,
                                       int64_t label, const T* logits) {
    float max = x[0], s = 0.0f, u = 0.0f;
#pragma unroll
    for (int k = 1; k < kMaxClasses; ++k) max = fmaxf(max, x[k]);
#pragma unroll
    for (int k = 0; k < kMaxClasses; ++k) {
      const float d = x[k] - max;
      x[k] = exponential(d);
      s += x[k];
      u += finite(d) * x[k];
    }
    const float inverse = reciprocal(s), log_s = logf(s);
#pragma unroll
    for (int k = 0; k < kMaxClasses; ++k) probabilities[k] += x[k] * inverse;
    entropy += log_s - u * inverse;
    if (labeled) cross_entropy += out_of_range(p, label) ? not_a_number() : log_s - (to_float(logits[label]) - max);
    return log_s;
  }

  // Ends the kernel: the threads' sums side by side in shared memory, then a warp a column.
  __device__ __forceinline__ void finish_block(const ForwardParams& params, int classes) const {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    float* sums = reinterpret_cast<float*>(kernel_memory(classes));  // [classes + kExtra, threads]
#pragma unroll
    for (int k = 0; k < kMaxClasses; ++k) {
      if (k < classes) sums[k * threads + thread] = probabilities[k];
    }
    sums[classes * threads + thread] = entropy;
    sums[(classes + 1) * threads + thread] = cross_entropy;
    block_barrier();
    float* out = block_share(params);
    for (int column = warp_index(); column < classes + kExtra; column += warp_count()) {
      float sum = 0.0f;
#pragma unroll 4
      for (int i = lane_index(); i < threads; i += kWarpSize) sum += sums[column * threads + i];
      sum = warp_sum(sum);
      if (lane_index() == 0) out[column] = sum;
    }
    finish_alone(params, out);
  }
};

// Backward: puts the gradient of a row's logits in their place.
template <int kMaxClasses>
__device__ __forceinline__ void replace_by_gradient(const Gradients& g, const float (&of_mean)[kMaxClasses],
                                                    bool labeled, int own, float (&x)[kMaxClasses]) {
  float e[kMaxClasses];
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
#pragma unroll
  for (int k = 0; k < kMaxClasses; ++k) x[k] = e[k] * inverse * (mean - x[k]) - (k == own ? of_label : 0.0f);
}

// ---- one thread a row

// A row in memory, kWidth elements at a time (a divisor of the classes); -infinity beyond its end.
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

constexpr int kTileStages = 2;  // the tile that a warp works on, and the next

// The tiles of one warp: 32 rows each, in shared memory side by side without gaps, kTileStages of them. With as wide an
// access as the number of classes allows, lanes that walk their rows meet no bank conflict but with 8 and 16 classes.
// kAll: the number of classes is kMaxClasses.
template <typename T, int kMaxClasses, bool kAll>
struct Tiles {
  static constexpr int kSize = Vector<T>::kSize;

  const SoftmaxEntropyArgs& p;
  const FastDivisor divisor;
  const bool vectors;
  const int classes, lane;
  T* const memory;  // [kTileStages, kWarpSize, classes]

  __device__ Tiles(const SoftmaxEntropyArgs& args, const FastDivisor& divisor_in, bool vectors_in)
      : p(args),
        divisor(divisor_in),
        vectors(vectors_in),
        classes(kAll ? kMaxClasses : static_cast<int>(args.classes)),
        lane(lane_index()),
        memory(reinterpret_cast<T*>(kernel_memory(classes)) + warp_index() * kTileStages * kWarpSize * classes) {}

  __device__ int count() const { return static_cast<int>((p.rows + kWarpSize - 1) / kWarpSize); }
  __device__ T* tile_memory(int stage) const { return memory + stage * kWarpSize * classes; }
  __device__ int rows_of(int tile) const {
    const int64_t rows = p.rows - int64_t{tile} * kWarpSize;
    return rows < kWarpSize ? static_cast<int>(rows) : kWarpSize;
  }

  // Starts a copy into a stage that no lane reads any more. One group of copies, empty for a tile that is not there.
  __device__ void start(int tile, int stage) const {
    if (tile >= 0 && tile < count()) {
      const int rows = rows_of(tile), elements = rows * classes;
      const T* logits = static_cast<const T*>(p.logits) + int64_t{tile} * kWarpSize * p.row_stride;
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

  // Waits for the oldest of kTileStages - 1 tiles that were started.
  __device__ void wait() const {
    copy_async_wait<kTileStages - 2>();
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
  __device__ void store(int tile, int stage) const {
    const int rows = rows_of(tile), elements = rows * classes;
    T* grad = static_cast<T*>(p.grad_logits) + int64_t{tile} * kWarpSize * classes;
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

// Blocks of the thread kernels that a multiprocessor must have room for.
__host__ __device__ constexpr int thread_blocks(bool ten_classes) { return ten_classes ? 2 : 1; }

template <typename T, int kMaxClasses, bool kAll>
__global__ void __launch_bounds__(kThreads, thread_blocks(kAll)) forward_thread_kernel(ForwardParams params) {
  using Walk = Tiles<T, kMaxClasses, kAll>;
  wait_for_previous_kernel();
  const SoftmaxEntropyArgs& p = params.args;
  const Walk tiles(p, params.classes, params.vectors);
  const int step = static_cast<int>(gridDim.x) * warp_count(), count = tiles.count();
  int tile = warp_index() * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
#pragma unroll 1
  for (int stage = 0; stage < kTileStages - 1; ++stage) tiles.start(tile + stage * step, stage);
  ThreadSums<kMaxClasses> sums;
  for (int stage = 0; tile < count; tile += step, stage = (stage + 1) % kTileStages) {
    const int64_t row = int64_t{tile} * kWarpSize + tiles.lane;
    const bool active = row < p.rows;
    int64_t label = -1;
    const bool labeled = active && carries_label(p, row, label);
    tiles.wait();
    tiles.start(tile + (kTileStages - 1) * step, (stage + kTileStages - 1) % kTileStages);
    if (!active) continue;
    float x[kMaxClasses];
    tiles.read(stage, x);
    p.log_normalizer[row] = sums.add(p, x, labeled, label, tiles.tile_memory(stage) + tiles.lane * tiles.classes);
  }
  copy_async_wait<0>();
  block_barrier();
  sums.finish_block(params, tiles.classes);
}

template <typename T, int kMaxClasses, bool kAll>
__global__ void __launch_bounds__(kThreads, thread_blocks(kAll)) backward_thread_kernel(BackwardParams params) {
  using Walk = Tiles<T, kMaxClasses, kAll>;
  wait_for_previous_kernel();
  const SoftmaxEntropyArgs& p = params.args;
  const Walk tiles(p, params.classes, params.vectors);
  const int classes = tiles.classes;
  const int step = static_cast<int>(gridDim.x) * warp_count();
  int tile = tiles.count() - 1 - (warp_index() * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x));
#pragma unroll 1
  for (int stage = 0; stage < kTileStages - 1; ++stage) tiles.start(tile - stage * step, stage);
  const Gradients g(p);
  float of_mean[kMaxClasses];
#pragma unroll
  for (int k = 0; k < kMaxClasses; ++k) of_mean[k] = k < classes ? p.mean_probabilities[k] : 0.0f;
#pragma unroll
  for (int k = 0; k < kMaxClasses; ++k) of_mean[k] = g.of_mean(of_mean[k]);
  for (int stage = 0; tile >= 0; tile -= step, stage = (stage + 1) % kTileStages) {
    const int64_t row = int64_t{tile} * kWarpSize + tiles.lane;
    const bool active = row < p.rows;
    int64_t label = -1;
    const bool labeled = active && carries_label(p, row, label);
    tiles.wait();
    tiles.start(tile - (kTileStages - 1) * step, (stage + kTileStages - 1) % kTileStages);
    if (active) {
      float x[kMaxClasses];
      tiles.read(stage, x);
      replace_by_gradient(g, of_mean, labeled, class_or_none(p, labeled, label), x);
      tiles.write(stage, x);
    }
    warp_barrier();
    tiles.store(tile, stage);
  }
  copy_async_wait<0>();
}

// ---- ten classes, forward: the rows that 80 bytes hold a thread, in registers

constexpr int kPieceClasses = 10;
constexpr int kPieceBytes = 80;
constexpr int kPieceThreads = 256;
constexpr int kPieceBlocks = 4;                    // that a multiprocessor holds
constexpr int kManyPieceRows = 4 * kPieceThreads;  // of a multiprocessor: half of its threads have some in float32

// Rows that lie side by side: kRows of them, kRowWords words each.
template <typename T>
struct Piece {
  static constexpr int kVectors = kPieceBytes / 16, kWords = kPieceBytes / 4;
  static constexpr int kRows = kPieceBytes / static_cast<int>(kPieceClasses * sizeof(T)), kRowWords = kWords / kRows;

  uint32_t words[kWords];

  __device__ __forceinline__ void load(const void* logits, int64_t piece) {
    const uint4* from = static_cast<const uint4*>(logits) + piece * kVectors;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint4 four = from[i];
      words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
    }
  }

  __device__ __forceinline__ void read(int row, float (&x)[kPieceClasses]) const {
#pragma unroll
    for (int i = 0; i < kRowWords; ++i) {
      const uint32_t word = words[row * kRowWords + i];
      if constexpr (kRowWords == kPieceClasses) {
        x[i] = bits_to_float(word);
      } else {
        float pair[2];
        unpack_pair(word, pair, T{});
        x[2 * i] = pair[0], x[2 * i + 1] = pair[1];
      }
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kPieceThreads, kPieceBlocks) forward_piece_kernel(ForwardParams params) {
  constexpr int kRows = Piece<T>::kRows;
  wait_for_previous_kernel();
  const SoftmaxEntropyArgs& p = params.args;
  const T* logits = static_cast<const T*>(p.logits);
  const int64_t pieces = p.rows / kRows, step = int64_t{gridDim.x} * kPieceThreads;
  const int64_t first = int64_t{blockIdx.x} * kPieceThreads + threadIdx.x;
  ThreadSums<kPieceClasses> sums;
  for (int64_t i = first; i < pieces; i += step) {
    Piece<T> piece;
    piece.load(logits, i);
    Neighbours<float, kRows> log_s;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float x[kPieceClasses];
      piece.read(r, x);
      const int64_t row = i * kRows + r;
      int64_t label = -1;
      const bool labeled = carries_label(p, row, label);
      log_s.values[r] = sums.add(p, x, labeled, label, logits + row * kPieceClasses);
    }
    reinterpret_cast<Neighbours<float, kRows>*>(p.log_normalizer)[i] = log_s;
  }
  const int64_t last = pieces * kRows + first;  // of the rows that fill no piece
  if (last < p.rows) {
    const T* row = logits + last * kPieceClasses;
    float x[kPieceClasses];
    read_row<1>(row, kPieceClasses, x);
    int64_t label = -1;
    const bool labeled = carries_label(p, last, label);
    p.log_normalizer[last] = sums.add(p, x, labeled, label, row);
  }
  sums.finish_block(params, kPieceClasses);
}

// ---- one warp a row

// The rows of one warp, one of them in shared memory. Lane l holds kVectors vectors of neighbouring classes, the i-th
// from first_class(i) = (32 i + l) * kSize on.
template <typename T, int kVectors>
struct WarpRows {
  static constexpr int kSize = Vector<T>::kSize, kPerLane = kVectors * kSize, kCapacity = kPerLane * kWarpSize;

  const SoftmaxEntropyArgs& p;
  const bool vectors;
  const int classes, lane;
  T* const buffer;  // [kCapacity]

  __device__ WarpRows(const SoftmaxEntropyArgs& args, bool vectors_in, unsigned char* memory)
      : p(args),
        vectors(vectors_in),
        classes(static_cast<int>(args.classes)),
        lane(lane_index()),
        buffer(reinterpret_cast<T*>(memory) + warp_index() * kCapacity) {}

  __device__ __forceinline__ int first_class(int i) const { return (i * kWarpSize + lane) * kSize; }

  // Starts the copy of a row. As vectors, a lane copies just what it reads itself, and need not wait for others.
  __device__ __forceinline__ void start(int64_t row) const {
    const T* logits = static_cast<const T*>(p.logits) + row * p.row_stride;
    if (vectors) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int k = first_class(i);
        if (k < classes) copy_async(buffer + k, logits + k, true);
      }
      copy_async_commit();
    } else {
      warp_barrier();
#pragma unroll 4
      for (int k = lane; k < kCapacity; k += kWarpSize) {
        T value;
        from_float(-INFINITY, value);
        buffer[k] = k < classes ? logits[k] : value;
      }
      warp_barrier();
    }
  }

  // The row that was started; -infinity beyond its end.
  __device__ __forceinline__ void read(float (&x)[kPerLane]) const {
    copy_async_wait<0>();
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      Vector<T> vector;
      const int k = first_class(i);
      const bool there = !vectors || k < classes;
      if (there) unpack(load_bytes(buffer + k, kSize, true), vector);
#pragma unroll
      for (int j = 0; j < kSize; ++j) x[i * kSize + j] = there ? vector.values[j] : -INFINITY;
    }
  }

  // Whether this lane holds the class, which then may be read from the buffer until the next row is started.
  __device__ __forceinline__ bool holds(int k) const { return k >= 0 && k / kSize % kWarpSize == lane; }

  // A vector of the gradient; without vectors, into the buffer.
  __device__ __forceinline__ void write(int64_t row, int i, const Vector<T>& vector) const {
    const int k = first_class(i);
    if (!vectors) {
      store_vector(buffer + k, kSize, true, vector);
    } else if (k < classes) {
      store_streaming(static_cast<T*>(p.grad_logits) + row * classes + k, pack(vector).words);
    }
  }

  // Copies a gradient that was written into the buffer.
  __device__ __forceinline__ void flush(int64_t row) const {
    T* grad = static_cast<T*>(p.grad_logits) + row * classes;
    warp_barrier();
#pragma unroll 8
    for (int k = lane; k < classes; k += kWarpSize) grad[k] = buffer[k];
  }
};

// Blocks of the warp kernels that a multiprocessor must have room for.
template <typename T>
constexpr int resident_blocks(int vectors) {
  return vectors * Vector<T>::kSize <= 8 ? 2 : 1;
}

template <typename T, int kVectors>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>(kVectors)) forward_warp_kernel(ForwardParams params) {
  using Rows = WarpRows<T, kVectors>;
  wait_for_previous_kernel();
  const SoftmaxEntropyArgs& p = params.args;
  const Rows rows(p, params.vectors, kernel_memory(p.classes));
  const int classes = rows.classes, lane = rows.lane, columns = classes + kExtra;
  const int64_t step = int64_t{gridDim.x} * warp_count();
  int64_t row = int64_t{warp_index()} * gridDim.x + blockIdx.x;
  if (row < p.rows) rows.start(row);
  float share[Rows::kPerLane] = {};
  float entropy = 0.0f, cross_entropy = 0.0f;
  for (; row < p.rows; row += step) {
    int64_t label = -1;
    const bool labeled = carries_label(p, row, label);
    float e[Rows::kPerLane];
    rows.read(e);
    const int own = class_or_none(p, labeled, label);
    const float own_logit = rows.holds(own) ? to_float(rows.buffer[own]) : 0.0f;
    if (row + step < p.rows) rows.start(row + step);
    float max = e[0], s = 0.0f, u = 0.0f;
#pragma unroll
    for (int i = 1; i < Rows::kPerLane; ++i) max = fmaxf(max, e[i]);
    max = warp_max(max);
#pragma unroll
    for (int i = 0; i < Rows::kPerLane; ++i) {
      const float d = e[i] - max;
      e[i] = exponential(d);
      s += e[i];
      u += finite(d) * e[i];
    }
    s = warp_sum(s);
    u = warp_sum(u);
    const float inverse = reciprocal(s), log_s = logf(s);
#pragma unroll
    for (int i = 0; i < Rows::kPerLane; ++i) share[i] += e[i] * inverse;
    if (rows.holds(own)) cross_entropy += log_s - (own_logit - max);
    if (lane == 0) {
      entropy += log_s - u * inverse;
      p.log_normalizer[row] = log_s;
      if (labeled && own < 0) cross_entropy = not_a_number();
    }
  }
  cross_entropy = warp_sum(cross_entropy);
  // The warps' shares in shared memory, then added in order.
  block_barrier();
  float* shares = reinterpret_cast<float*>(kernel_memory(classes));  // [warps, columns]
  float* mine = shares + warp_index() * columns;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < Rows::kSize; ++j) {
      if (rows.first_class(i) + j < classes) mine[rows.first_class(i) + j] = share[i * Rows::kSize + j];
    }
  }
  if (lane == 0) {
    mine[classes] = entropy;
    mine[classes + 1] = cross_entropy;
  }
  block_barrier();
  float* out = block_share(params);
  for (int column = static_cast<int>(threadIdx.x); column < columns; column += static_cast<int>(blockDim.x)) {
    float sum = 0.0f;
#pragma unroll 4
    for (int w = 0; w < warp_count(); ++w) sum += shares[w * columns + column];
    out[column] = sum;
  }
  finish_alone(params, out);
}

template <typename T, int kVectors>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>(kVectors)) backward_warp_kernel(BackwardParams params) {
  using Rows = WarpRows<T, kVectors>;
  wait_for_previous_kernel();
  const SoftmaxEntropyArgs& p = params.args;
  float* of_mean = static_cast<float*>(shared_memory());  // [kCapacity], zeros beyond the classes
  const Rows rows(p, params.vectors, reinterpret_cast<unsigned char*>(of_mean + Rows::kCapacity));
  const int64_t step = int64_t{gridDim.x} * warp_count();
  int64_t row = p.rows - 1 - (int64_t{warp_index()} * gridDim.x + blockIdx.x);
  if (row >= 0) rows.start(row);
  const Gradients g(p);
  for (int k = static_cast<int>(threadIdx.x); k < Rows::kCapacity; k += static_cast<int>(blockDim.x)) {
    of_mean[k] = k < rows.classes ? g.of_mean(p.mean_probabilities[k]) : 0.0f;
  }
  block_barrier();
  for (; row >= 0; row -= step) {
    int64_t label = -1;
    const bool labeled = carries_label(p, row, label);
    float x[Rows::kPerLane];
    rows.read(x);
    if (params.vectors && row >= step) rows.start(row - step);
    float max = x[0], s = 0.0f, mean_t = 0.0f;
#pragma unroll
    for (int i = 1; i < Rows::kPerLane; ++i) max = fmaxf(max, x[i]);
    max = warp_max(max);
    const auto of_means = [&](int i, float (&values)[Rows::kSize]) {
#pragma unroll
      for (int j = 0; j < Rows::kSize; j += 4) {
        const float4 four = *reinterpret_cast<const float4*>(of_mean + rows.first_class(i) + j);
        values[j] = four.x, values[j + 1] = four.y, values[j + 2] = four.z, values[j + 3] = four.w;
      }
    };
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float means[Rows::kSize];
      of_means(i, means);
#pragma unroll
      for (int j = 0; j < Rows::kSize; ++j) {
        float& d = x[i * Rows::kSize + j];
        d -= max;
        const float e = exponential(d);
        s += e;
        mean_t += e * g.t(d, means[j]);
      }
    }
    s = warp_sum(s);
    mean_t = warp_sum(mean_t);
    const float inverse = reciprocal(s), of_label = g.of_label(labeled), mean = mean_t * inverse + of_label;
    const int own = class_or_none(p, labeled, label) - rows.lane * Rows::kSize;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float means[Rows::kSize];
      of_means(i, means);
      Vector<T> grad;
#pragma unroll
      for (int j = 0; j < Rows::kSize; ++j) {
        const float d = x[i * Rows::kSize + j];
        grad.values[j] = exponential(d) * inverse * (mean - g.t(d, means[j])) -
                         (own == i * kWarpSize * Rows::kSize + j ? of_label : 0.0f);
      }
      rows.write(row, i, grad);
    }
    if (!params.vectors) {
      rows.flush(row);
      if (row >= step) rows.start(row - step);
    }
  }
}

// ---- one block a row

// Sum over the block's threads, in a fixed order; valid in every thread. `shared`: [kMaxWarps]
__device__ float block_sum(float value, float* shared) {
  value = warp_sum(value);
  if (lane_index() == 0) shared[warp_index()] = value;
  block_barrier();
  value = shared[0];
  for (int warp = 1; warp < warp_count(); ++warp) value += shared[warp];
  block_barrier();
  return value;
}

__device__ float block_max(float value, float* shared) {
  value = warp_max(value);
  if (lane_index() == 0) shared[warp_index()] = value;
  block_barrier();
  value = shared[0];
  for (int warp = 1; warp < warp_count(); ++warp) value = fmaxf(value, shared[warp]);
  block_barrier();
  return value;
}

template <typename T>
__device__ float block_row_max(const T* row, int64_t classes, float* shared) {
  float max = -INFINITY;
  for (int64_t k = threadIdx.x; k < classes; k += kRowThreads) max = fmaxf(max, to_float(row[k]));
  return block_max(max, shared);
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) forward_block_kernel(ForwardParams params) {
  wait_for_previous_kernel();
  const SoftmaxEntropyArgs& p = params.args;
  float* shared = static_cast<float*>(shared_memory());
  float* out = params.shares + int64_t{blockIdx.x} * (p.classes + kExtra);
  float entropy = 0.0f, cross_entropy = 0.0f;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* logits = static_cast<const T*>(p.logits) + row * p.row_stride;
    const float max = block_row_max(logits, p.classes, shared);
    float s = 0.0f, u = 0.0f;
    for (int64_t k = threadIdx.x; k < p.classes; k += kRowThreads) {
      const float d = to_float(logits[k]) - max, e = exponential(d);
      s += e;
      u += finite(d) * e;
    }
    s = block_sum(s, shared);
    u = block_sum(u, shared);
    const float inverse = reciprocal(s), log_s = logf(s);
    const bool first = row == blockIdx.x;
    for (int64_t k = threadIdx.x; k < p.classes; k += kRowThreads) {
      const float probability = exponential(to_float(logits[k]) - max) * inverse;
      out[k] = first ? probability : out[k] + probability;
    }
    if (threadIdx.x == 0) {
      entropy += log_s - u * inverse;
      p.log_normalizer[row] = log_s;
      int64_t label;
      if (carries_label(p, row, label)) {
        cross_entropy += out_of_range(p, label) ? not_a_number() : log_s - (to_float(logits[label]) - max);
      }
    }
  }
  if (threadIdx.x == 0) {
    out[p.classes] = entropy;
    out[p.classes + 1] = cross_entropy;
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) backward_block_kernel(BackwardParams params) {
  wait_for_previous_kernel();
  const SoftmaxEntropyArgs& p = params.args;
  float* shared = static_cast<float*>(shared_memory());
  const Gradients g(p);
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* logits = static_cast<const T*>(p.logits) + row * p.row_stride;
    T* grad = static_cast<T*>(p.grad_logits) + row * p.classes;
    const float max = block_row_max(logits, p.classes, shared);
    float s = 0.0f, mean_t = 0.0f;
    for (int64_t k = threadIdx.x; k < p.classes; k += kRowThreads) {
      const float d = to_float(logits[k]) - max, e = exponential(d);
      s += e;
      mean_t += e * g.t(d, g.of_mean(p.mean_probabilities[k]));
    }
    s = block_sum(s, shared);
    mean_t = block_sum(mean_t, shared);
    int64_t label = -1;
    const bool labeled = carries_label(p, row, label);
    const float inverse = reciprocal(s), of_label = g.of_label(labeled), mean = mean_t * inverse + of_label;
    for (int64_t k = threadIdx.x; k < p.classes; k += kRowThreads) {
      const float d = to_float(logits[k]) - max, t = g.t(d, g.of_mean(p.mean_probabilities[k]));
      from_float(exponential(d) * inverse * (mean - t) - (labeled && k == label ? of_label : 0.0f), grad[k]);
    }
  }
}

// ---- launch

// Whether rows (one thread a row: tiles of rows) begin at multiples of 16 bytes and end there.
bool reads_vectors(const SoftmaxEntropyArgs& args) {
  if (!is_aligned16(args.logits)) return false;
  if (args.classes <= kMaxThreadClasses) return args.row_stride == args.classes;
  const int64_t size = size_of(args.type);
  return args.row_stride * size % 16 == 0 && args.classes * size % 16 == 0;
}

struct Plan {
  bool vectors;
  bool pieces, thread_a_row, warp_a_row, block_a_row;
  int threads;
  unsigned blocks;

  Plan(const SoftmaxEntropyArgs& args, bool vectors_in, bool forward)
      : vectors(vectors_in),
        pieces(forward && vectors && args.classes == kPieceClasses &&
               args.rows >= int64_t{args.multiprocessors} * kManyPieceRows),
        thread_a_row(!pieces && args.classes <= kMaxThreadClasses),
        warp_a_row(!pieces && !thread_a_row && args.classes <= kMaxWarpClasses),
        block_a_row(!pieces && !thread_a_row && !warp_a_row),
        threads(kRowThreads) {
    int64_t wanted = args.rows, resident = int64_t{args.multiprocessors} * 4;
    if (pieces) {
      threads = kPieceThreads;
      wanted = divide_up(args.rows * kPieceClasses * size_of(args.type), int64_t{kPieceBytes} * kPieceThreads);
      resident = int64_t{args.multiprocessors} * kPieceBlocks;
    } else if (!block_a_row) {
      const int64_t warps = thread_a_row ? divide_up(args.rows, kWarpSize) : args.rows;
      threads = static_cast<int>(std::min<int64_t>(warps, kMaxWarps)) * kWarpSize;
      wanted = divide_up(warps, threads / kWarpSize);
      resident = int64_t{args.multiprocessors} * (thread_a_row ? thread_blocks(args.classes == 10) : args.classes <= 256 ? 2 : 1);
    }
    blocks = static_cast<unsigned>(std::min(wanted, resident));
  }
};

Plan forward_plan(const SoftmaxEntropyArgs& args) { return Plan(args, reads_vectors(args), true); }

// Of the tiles or rows in flight, kept in shared memory.
template <typename T>
size_t thread_bytes(const Plan& plan, int64_t classes) {
  return static_cast<size_t>(plan.threads * classes) * kTileStages * sizeof(T);
}

template <typename T>
size_t warp_bytes(const Plan& plan, int64_t classes) {
  return static_cast<size_t>(plan.threads) * (classes <= 256 ? 8 : 32) * sizeof(T);
}

}  // namespace

size_t softmax_entropy_workspace_bytes(const SoftmaxEntropyArgs& args) {
  return static_cast<size_t>(forward_plan(args).blocks * (args.classes + kExtra)) * sizeof(float);
}

cudaError_t softmax_entropy_forward_launch(const SoftmaxEntropyArgs& args, cudaStream_t stream) {
  const int64_t classes = args.classes;
  const Plan plan = forward_plan(args);
  const ForwardParams params{args, FastDivisor(classes), plan.vectors, plan.blocks,
                             static_cast<float*>(args.workspace)};
  const size_t common_bytes = kFinishBytes + share_bytes(classes), columns = classes + kExtra;
  const cudaError_t error = dispatch_type(args.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kSize = Vector<T>::kSize;
    const auto run = [&](void (*kernel)(ForwardParams), size_t bytes) {
      return launch(kernel, plan.blocks, plan.threads, bytes, stream, params);
    };
    if (plan.pieces) return run(forward_piece_kernel<T>, common_bytes + plan.threads * columns * sizeof(float));
    if (plan.thread_a_row) {
      const size_t bytes =
          common_bytes + std::max(thread_bytes<T>(plan, classes), plan.threads * columns * sizeof(float));
      if (classes == 10) return run(forward_thread_kernel<T, 10, true>, bytes);
      return run(classes < 10 ? forward_thread_kernel<T, 10, false> : forward_thread_kernel<T, 20, false>, bytes);
    }
    if (plan.warp_a_row) {
      const size_t bytes =
          common_bytes + std::max(warp_bytes<T>(plan, classes), plan.threads / kWarpSize * columns * sizeof(float));
      return run(classes <= 256 ? forward_warp_kernel<T, 8 / kSize> : forward_warp_kernel<T, 32 / kSize>, bytes);
    }
    return run(forward_block_kernel<T>, kFinishBytes);
  });
  if (error != cudaSuccess || (plan.blocks == 1 && !plan.block_a_row)) return error;
  return launch(finish_kernel, 1, kFinishThreads, kFinishBytes + kFinishThreads * sizeof(double), stream, params);
}

cudaError_t softmax_entropy_backward_launch(const SoftmaxEntropyArgs& args, cudaStream_t stream) {
  const int64_t classes = args.classes;
  const Plan plan(args, reads_vectors(args) && is_aligned16(args.grad_logits), false);
  const BackwardParams params{args, FastDivisor(classes), plan.vectors};
  return dispatch_type(args.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kSize = Vector<T>::kSize;
    const auto run = [&](void (*kernel)(BackwardParams), size_t bytes) {
      return launch(kernel, plan.blocks, plan.threads, bytes, stream, params);
    };
    if (plan.thread_a_row) {
      const size_t bytes = kFinishBytes + share_bytes(classes) + thread_bytes<T>(plan, classes);
      if (classes == 10) return run(backward_thread_kernel<T, 10, true>, bytes);
      return run(classes < 10 ? backward_thread_kernel<T, 10, false> : backward_thread_kernel<T, 20, false>, bytes);
    }
    if (plan.warp_a_row) {
      const size_t bytes = warp_bytes<T>(plan, classes) + (classes <= 256 ? 256 : 1024) * sizeof(float);
      return run(classes <= 256 ? backward_warp_kernel<T, 8 / kSize> : backward_warp_kernel<T, 32 / kSize>, bytes);
    }
    return run(backward_block_kernel<T>, kFinishBytes);
  });
}

}  // namespace fastgan::cuda
