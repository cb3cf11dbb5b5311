// Softmax entropy kernels. Blocks are persistent: each walks rows that lie a grid apart and keeps its share of the
// marginal on the chip; the block that finishes last adds the blocks' shares in a fixed order (float64), so that the
// result is the same in every run and small batches need one launch.
//
// By the number of classes a row belongs to
//   one thread  (up to 20): a warp copies tiles of rows into shared memory, some tiles ahead of the one it works on; of
//               10 dense classes a thread has as many rows as make whole vectors, which saves most address arithmetic;
//   one warp    (up to 1024): the next row is copied into shared memory while this one is worked on in registers;
//   one block   (more): two passes over the row, the second from the L2 cache.
// The copies are 16 bytes a lane where rows are aligned to that (tiles: dense), else element by element.
// Backward computes exponentials twice rather than keep them, and walks the rows from the last to the first: those that
// forward has left in the L2 cache.
//
// The version before the kernels of dense rows passed its tests on an H200; these are not measured.
#include "softmax_entropy.h"

#include <algorithm>

#include "softmax_entropy_common.cuh"
#include "softmax_entropy_thread.cuh"

namespace fastgan::cuda {
namespace {

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
  finish(params, gridDim.x == 1 ? out : params.shares);
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
  finish(params, params.shares);
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

// What both directions launch alike.
struct Plan {
  bool dense, thread_a_row, warp_a_row;
  int threads;
  unsigned blocks;

  Plan(const SoftmaxEntropyArgs& args, bool vectors)
      : dense(vectors && args.classes == kDenseClasses),
        thread_a_row(!dense && args.classes <= kMaxThreadClasses),
        warp_a_row(args.classes > kMaxThreadClasses && args.classes <= kMaxWarpClasses),
        threads(kRowThreads) {
    int64_t wanted = args.rows, resident = int64_t{args.multiprocessors} * 4;
    if (dense) {
      const int64_t tiles = divide_up(args.rows, args.type == DataType::float32
                                                     ? DenseTiles<float, kDenseClasses>::kTileRows
                                                     : DenseTiles<Half, kDenseClasses>::kTileRows);
      threads = static_cast<int>(std::min<int64_t>(tiles, kDenseThreads / kWarpSize)) * kWarpSize;
      wanted = divide_up(tiles, threads / kWarpSize);
      resident = int64_t{args.multiprocessors} * kDenseBlocks;
    } else if (thread_a_row || warp_a_row) {
      const int64_t warps = thread_a_row ? divide_up(args.rows, kWarpSize) : args.rows;
      threads = static_cast<int>(std::min<int64_t>(warps, kMaxWarps)) * kWarpSize;
      wanted = divide_up(warps, threads / kWarpSize);
      resident = int64_t{args.multiprocessors} * (warp_a_row && args.classes <= 256 ? 2 : 1);
    }
    blocks = static_cast<unsigned>(std::min(wanted, resident));
  }
};

// Of the tiles or rows in flight, kept in shared memory.
template <typename T>
size_t thread_bytes(const Plan& plan, int64_t classes) {
  const int stages = classes <= 10 ? Tiles<T, 10>::kStages : Tiles<T, kMaxThreadClasses>::kStages;
  return static_cast<size_t>(plan.threads * classes) * stages * sizeof(T);
}

template <typename T>
size_t dense_bytes(const Plan& plan) {
  return kFinishBytes + share_bytes(kDenseClasses) +
         static_cast<size_t>(plan.threads / kWarpSize) * DenseTiles<T, kDenseClasses>::kWarpBytes;
}

template <typename T>
size_t warp_bytes(const Plan& plan, int64_t classes) {
  return static_cast<size_t>(plan.threads) * (classes <= 256 ? 8 : 32) * sizeof(T);
}

template <typename F>
cudaError_t dispatch(DataType type, const F& f) {
  switch (type) {
    case DataType::float32: return f(float{});
    case DataType::bfloat16: return f(BFloat16{});
    case DataType::float16: return f(Half{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace

size_t softmax_entropy_workspace_bytes(const SoftmaxEntropyArgs& args) {
  const unsigned blocks = std::max(Plan(args, true).blocks, Plan(args, false).blocks);
  return 16 + static_cast<size_t>(blocks * (args.classes + kExtra)) * sizeof(float);
}

cudaError_t softmax_entropy_forward_launch(const SoftmaxEntropyArgs& args, cudaStream_t stream) {
  const int64_t classes = args.classes;
  const bool vectors = reads_vectors(args) && is_aligned16(args.log_normalizer);
  const Plan plan(args, vectors);
  const ForwardParams params{args, FastDivisor(classes), vectors, static_cast<float*>(args.workspace) + 4,
                             static_cast<unsigned*>(args.workspace)};
  if (plan.blocks > 1) {
    const cudaError_t error = clear_async(params.counter, sizeof(unsigned), stream);
    if (error != cudaSuccess) return error;
  }
  const size_t common_bytes = kFinishBytes + share_bytes(classes), columns = classes + kExtra;
  return dispatch(args.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kSize = Vector<T>::kSize;
    const auto run = [&](void (*kernel)(ForwardParams), size_t bytes) {
      return launch(kernel, plan.blocks, plan.threads, bytes, stream, params);
    };
    if (plan.dense) return run(forward_dense_kernel<T, kDenseClasses>, dense_bytes<T>(plan));
    if (plan.thread_a_row) {
      const size_t bytes =
          common_bytes + std::max(thread_bytes<T>(plan, classes), plan.threads * columns * sizeof(float));
      return run(classes <= 10 ? forward_thread_kernel<T, 10> : forward_thread_kernel<T, kMaxThreadClasses>, bytes);
    }
    if (plan.warp_a_row) {
      const size_t bytes =
          common_bytes + std::max(warp_bytes<T>(plan, classes), plan.threads / kWarpSize * columns * sizeof(float));
      return run(classes <= 256 ? forward_warp_kernel<T, 8 / kSize> : forward_warp_kernel<T, 32 / kSize>, bytes);
    }
    return run(forward_block_kernel<T>, kFinishBytes);
  });
}

cudaError_t softmax_entropy_backward_launch(const SoftmaxEntropyArgs& args, cudaStream_t stream) {
  const int64_t classes = args.classes;
  const bool vectors = reads_vectors(args) && is_aligned16(args.grad_logits);
  const Plan plan(args, vectors);
  const BackwardParams params{args, FastDivisor(classes), vectors};
  return dispatch(args.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kSize = Vector<T>::kSize;
    const auto run = [&](void (*kernel)(BackwardParams), size_t bytes) {
      return launch(kernel, plan.blocks, plan.threads, bytes, stream, params);
    };
    if (plan.dense) return run(backward_dense_kernel<T, kDenseClasses>, dense_bytes<T>(plan));
    if (plan.thread_a_row) {
      const size_t bytes = kFinishBytes + share_bytes(classes) + thread_bytes<T>(plan, classes);
      return run(classes <= 10 ? backward_thread_kernel<T, 10> : backward_thread_kernel<T, kMaxThreadClasses>, bytes);
    }
    if (plan.warp_a_row) {
      const size_t bytes = warp_bytes<T>(plan, classes) + (classes <= 256 ? 256 : 1024) * sizeof(float);
      return run(classes <= 256 ? backward_warp_kernel<T, 8 / kSize> : backward_warp_kernel<T, 32 / kSize>, bytes);
    }
    return run(backward_block_kernel<T>, kFinishBytes);
  });
}

}  // namespace fastgan::cuda
