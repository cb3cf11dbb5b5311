// Softmax entropy kernels. Blocks are persistent: each takes rows blockIdx, blockIdx + gridDim, ... and keeps its
// share of the marginal in registers; the block that finishes last adds the blocks' shares in block order (float64),
// so that the result is the same in every run and small batches need one launch.
//
// By the number of classes a row belongs to
//   one thread  (up to 20): no shuffles, rows staged through shared memory so that global accesses are coalesced;
//   one warp    (up to 1024): a lane holds classes lane, lane + 32, ... in registers;
//   one block   (more): two passes over the row, the second from the L2 cache.
//
// Its tests pass on an H200; no variant has been measured there.
#include "softmax_entropy.h"

#include <algorithm>

#include "device.cuh"

namespace fastgan::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kExtra = 2;  // columns of a block's share after the classes: sum of H, sum of the cross-entropy
constexpr int kMaxThreadClasses = 20;
constexpr int kMaxWarpClasses = 1024;

struct ForwardParams {
  SoftmaxEntropyArgs args;
  FastDivisor classes;
  float* shares;      // [blocks, classes + kExtra]
  unsigned* counter;  // blocks that have written their share
};

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}

// d e^d with 0 log 0 = 0, for logits of -infinity
__device__ __forceinline__ float weighted(float d, float e) { return e > 0.0f ? d * e : 0.0f; }

__device__ __forceinline__ bool carries_label(const SoftmaxEntropyArgs& p, int64_t row, int64_t& label) {
  if (p.labels == nullptr) return false;
  label = p.labels[row];
  return label != p.ignore_index;
}

__device__ __forceinline__ bool out_of_range(const SoftmaxEntropyArgs& p, int64_t label) {
  return label < 0 || label >= p.classes;
}

__device__ __forceinline__ float not_a_number() { return bits_to_float(0x7FC00000u); }

// Adds the shares of all blocks, in block order within each of a fixed number of lanes, and writes the results.
// Only the block that comes last does so. Every thread of every block calls this, after its block's share is written.
__device__ void finish(const ForwardParams& p) {
  double* shared = static_cast<double*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t classes = p.args.classes, columns = classes + kExtra;
  if (gridDim.x > 1) {
    device_fence();
    block_barrier();
    if (thread == 0) shared[0] = atomic_increment(p.counter) == gridDim.x - 1 ? 1.0 : 0.0;
    block_barrier();
    const bool last = shared[0] != 0.0;
    block_barrier();
    if (!last) return;
    device_fence();
  } else {
    block_barrier();
  }
  const double rows = static_cast<double>(p.args.rows);
  int width = 1;  // columns side by side, a power of two; the rest of the threads share out the blocks
  while (width < columns && width < kThreads) width *= 2;
  const int lanes = kThreads / width, lane = thread / width;
  double entropy = 0.0;
  for (int64_t first = 0; first < columns; first += width) {
    const int64_t column = first + thread % width;
    double sum = 0.0;
    if (column < columns) {
      for (int64_t block = lane; block < gridDim.x; block += lanes) sum += double{p.shares[block * columns + column]};
    }
    shared[thread] = sum;
    block_barrier();
    if (lane == 0 && column < columns) {
      for (int i = 1; i < lanes; ++i) sum += shared[thread + i * width];
      if (column < classes) {
        const double q = sum / rows;
        p.args.mean_probabilities[column] = static_cast<float>(q);
        if (q != 0.0) entropy -= q * double{logf(static_cast<float>(q))};
      } else if (column == classes) {
        *p.args.conditional = static_cast<float>(sum / rows);
      } else {
        const int64_t count = p.args.labels != nullptr ? *p.args.label_count : 0;
        *p.args.cross_entropy = count > 0 ? static_cast<float>(sum / static_cast<double>(count)) : 0.0f;
      }
    }
    block_barrier();
  }
  shared[thread] = entropy;
  block_barrier();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (thread < step) shared[thread] += shared[thread + step];
    block_barrier();
  }
  if (thread == 0) *p.args.marginal = static_cast<float>(shared[0]);
}

// Sum over the block's threads, in a fixed order; valid in thread 0. `shared`: [kWarps]
__device__ float block_sum(float value, float* shared) {
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  block_barrier();
  float total = 0.0f;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kWarps; ++warp) total += shared[warp];
  }
  block_barrier();
  return total;
}

__device__ float block_max(float value, float* shared) {
  value = warp_max(value);
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  block_barrier();
  value = shared[0];
  for (int warp = 1; warp < kWarps; ++warp) value = fmaxf(value, shared[warp]);
  block_barrier();
  return value;
}

// Rows of a tile in shared memory, an odd number of floats apart: a thread walking its row meets no bank conflict.
__device__ __forceinline__ int staged_stride(int64_t classes) { return static_cast<int>(classes) | 1; }

template <typename T>
__device__ void stage_rows(const SoftmaxEntropyArgs& p, const FastDivisor& classes, int64_t first_row, int rows,
                           float* staged) {
  const T* logits = static_cast<const T*>(p.logits);
  const int k_count = static_cast<int>(p.classes);
  for (int i = static_cast<int>(threadIdx.x); i < rows * k_count; i += kThreads) {
    const int row = classes.divide(i), k = i - row * k_count;
    staged[row * staged_stride(p.classes) + k] = to_float(logits[(first_row + row) * p.row_stride + k]);
  }
}

template <typename T, int kMaxClasses>
__global__ void __launch_bounds__(kThreads) forward_thread_kernel(ForwardParams params) {
  wait_for_previous_kernel();
  const SoftmaxEntropyArgs& p = params.args;
  float* staged = static_cast<float*>(shared_memory());
  const int k_count = static_cast<int>(p.classes), thread = static_cast<int>(threadIdx.x);
  float share[kMaxClasses] = {};
  float entropy = 0.0f, cross_entropy = 0.0f;
  for (int64_t first = int64_t{blockIdx.x} * kThreads; first < p.rows; first += int64_t{gridDim.x} * kThreads) {
    const int rows = p.rows - first < kThreads ? static_cast<int>(p.rows - first) : kThreads;
    stage_rows<T>(p, params.classes, first, rows, staged);
    block_barrier();
    if (thread < rows) {
      const float* row = staged + thread * staged_stride(p.classes);
      float d[kMaxClasses], max = row[0];
#pragma unroll
      for (int k = 0; k < kMaxClasses; ++k) {
        d[k] = k < k_count ? row[k] : 0.0f;
        if (k < k_count) max = fmaxf(max, d[k]);
      }
      float s = 0.0f, u = 0.0f;
#pragma unroll
      for (int k = 0; k < kMaxClasses; ++k) {
        if (k < k_count) {
          const float e = expf(d[k] - max);
          s += e;
          u += weighted(d[k] - max, e);
          d[k] = e;
        }
      }
      const float inverse = 1.0f / s, log_s = logf(s);
#pragma unroll
      for (int k = 0; k < kMaxClasses; ++k) {
        if (k < k_count) share[k] += d[k] * inverse;
      }
      entropy += log_s - u * inverse;
      p.log_normalizer[first + thread] = log_s;
      int64_t label;
      if (carries_label(p, first + thread, label)) {
        cross_entropy += out_of_range(p, label) ? not_a_number() : log_s - (row[label] - max);
      }
    }
    block_barrier();
  }
  float* out = params.shares + int64_t{blockIdx.x} * (p.classes + kExtra);
#pragma unroll
  for (int k = 0; k < kMaxClasses; ++k) {
    if (k < k_count) {
      const float sum = block_sum(share[k], staged);
      if (thread == 0) out[k] = sum;
    }
  }
  const float entropy_sum = block_sum(entropy, staged), cross_entropy_sum = block_sum(cross_entropy, staged);
  if (thread == 0) {
    out[k_count] = entropy_sum;
    out[k_count + 1] = cross_entropy_sum;
  }
  finish(params);
}

// What one lane holds of its warp's row: e^d and d for classes lane + 32 i; s, u and log s of the whole row.
template <int kPerLane>
struct WarpRow {
  float d[kPerLane], e[kPerLane];
  float s, u;

  template <typename T>
  __device__ WarpRow(const T* row, int classes, int lane) {
    float max = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int k = lane + i * kWarpSize;
      d[i] = k < classes ? to_float(row[k]) : -INFINITY;
      max = fmaxf(max, d[i]);
    }
    max = warp_max(max);
    s = u = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      d[i] -= max;
      e[i] = lane + i * kWarpSize < classes ? expf(d[i]) : 0.0f;
      s += e[i];
      u += weighted(d[i], e[i]);
    }
    s = warp_sum(s);
    u = warp_sum(u);
  }
};

template <typename T, int kPerLane>
__global__ void __launch_bounds__(kThreads) forward_warp_kernel(ForwardParams params) {
  wait_for_previous_kernel();
  const SoftmaxEntropyArgs& p = params.args;
  const int classes = static_cast<int>(p.classes);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const T* logits = static_cast<const T*>(p.logits);
  float share[kPerLane] = {};
  float entropy = 0.0f, cross_entropy = 0.0f;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + warp; row < p.rows; row += int64_t{gridDim.x} * kWarps) {
    const WarpRow<kPerLane> r(logits + row * p.row_stride, classes, lane);
    const float inverse = 1.0f / r.s, log_s = logf(r.s);
    int64_t label = -1;
    const bool labeled = carries_label(p, row, label);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      share[i] += r.e[i] * inverse;
      if (labeled && label == lane + i * kWarpSize && label < classes) cross_entropy += log_s - r.d[i];
    }
    if (lane == 0) {
      entropy += log_s - r.u * inverse;
      p.log_normalizer[row] = log_s;
      if (labeled && out_of_range(p, label)) cross_entropy = not_a_number();
    }
  }
  // Each warp's share in shared memory, then added over the warps in order.
  float* shared = static_cast<float*>(shared_memory());
  float* out = params.shares + int64_t{blockIdx.x} * (p.classes + kExtra);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int k = lane + i * kWarpSize;
    if (k < classes) shared[warp * classes + k] = share[i];
  }
  block_barrier();
  for (int k = static_cast<int>(threadIdx.x); k < classes; k += kThreads) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += shared[w * classes + k];
    out[k] = sum;
  }
  block_barrier();
  const float entropy_sum = block_sum(entropy, shared), cross_entropy_sum = block_sum(cross_entropy, shared);
  if (threadIdx.x == 0) {
    out[classes] = entropy_sum;
    out[classes + 1] = cross_entropy_sum;
  }
  finish(params);
}

// Max and the two sums of a row that a whole block walks; valid in every thread. `shared`: [kWarps + 2]
template <typename T>
__device__ void block_row(const T* row, int64_t classes, float* shared, float& max, float& s, float& u) {
  max = -INFINITY;
  for (int64_t k = threadIdx.x; k < classes; k += kThreads) max = fmaxf(max, to_float(row[k]));
  max = block_max(max, shared);
  s = u = 0.0f;
  for (int64_t k = threadIdx.x; k < classes; k += kThreads) {
    const float d = to_float(row[k]) - max, e = expf(d);
    s += e;
    u += weighted(d, e);
  }
  s = block_sum(s, shared);
  u = block_sum(u, shared);
  if (threadIdx.x == 0) {
    shared[kWarps] = s;
    shared[kWarps + 1] = u;
  }
  block_barrier();
  s = shared[kWarps];
  u = shared[kWarps + 1];
}

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_block_kernel(ForwardParams params) {
  wait_for_previous_kernel();
  const SoftmaxEntropyArgs& p = params.args;
  float* shared = static_cast<float*>(shared_memory());
  float* out = params.shares + int64_t{blockIdx.x} * (p.classes + kExtra);
  float entropy = 0.0f, cross_entropy = 0.0f;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* logits = static_cast<const T*>(p.logits) + row * p.row_stride;
    float max, s, u;
    block_row(logits, p.classes, shared, max, s, u);
    const float inverse = 1.0f / s, log_s = logf(s);
    const bool first = row == blockIdx.x;
    for (int64_t k = threadIdx.x; k < p.classes; k += kThreads) {
      const float probability = expf(to_float(logits[k]) - max) * inverse;
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
  finish(params);
}

// The gradient of a logit is p (sum_j p_j t_j - t) / N + g_ce (p - [k = label]) / count,
// with t_k = g_conditional log p_k + g_marginal log q_k.
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

  // log_p: clamped, so that 0 log 0 = 0
  __device__ float t(float log_p, float log_q) const { return conditional * fmaxf(log_p, -1e30f) + marginal * log_q; }

  __device__ float logit(float probability, float t_k, float mean_t, bool labeled, bool is_label) const {
    const float entropy = probability * (mean_t - t_k);
    return labeled ? entropy + cross_entropy * (probability - (is_label ? 1.0f : 0.0f)) : entropy;
  }
};

__device__ __forceinline__ float log_or_zero(float q) { return q == 0.0f ? 0.0f : logf(q); }

struct BackwardParams {
  SoftmaxEntropyArgs args;
  FastDivisor classes;
};

template <typename T, int kMaxClasses>
__global__ void __launch_bounds__(kThreads) backward_thread_kernel(BackwardParams params) {
  wait_for_previous_kernel();
  const SoftmaxEntropyArgs& p = params.args;
  float* staged = static_cast<float*>(shared_memory());
  const int k_count = static_cast<int>(p.classes), thread = static_cast<int>(threadIdx.x);
  const int stride = staged_stride(p.classes);
  const Gradients g(p);
  float* log_q = staged + kThreads * stride;
  if (thread < k_count) log_q[thread] = log_or_zero(p.mean_probabilities[thread]);
  const int64_t first = int64_t{blockIdx.x} * kThreads;
  const int rows = p.rows - first < kThreads ? static_cast<int>(p.rows - first) : kThreads;
  stage_rows<T>(p, params.classes, first, rows, staged);
  block_barrier();
  if (thread < rows) {
    float* row = staged + thread * stride;
    float d[kMaxClasses], e[kMaxClasses], max = row[0], s = 0.0f;
#pragma unroll
    for (int k = 0; k < kMaxClasses; ++k) {
      d[k] = k < k_count ? row[k] : 0.0f;
      if (k < k_count) max = fmaxf(max, d[k]);
    }
#pragma unroll
    for (int k = 0; k < kMaxClasses; ++k) {
      d[k] -= max;
      e[k] = k < k_count ? expf(d[k]) : 0.0f;
      s += e[k];
    }
    const float inverse = 1.0f / s, log_s = logf(s);
    float mean_t = 0.0f;
#pragma unroll
    for (int k = 0; k < kMaxClasses; ++k) {
      e[k] *= inverse;
      d[k] = k < k_count ? g.t(d[k] - log_s, log_q[k]) : 0.0f;
      mean_t += e[k] * d[k];
    }
    int64_t label = -1;
    const bool labeled = carries_label(p, first + thread, label);
#pragma unroll
    for (int k = 0; k < kMaxClasses; ++k) {
      if (k < k_count) row[k] = g.logit(e[k], d[k], mean_t, labeled, k == label);
    }
  }
  block_barrier();
  T* grad = static_cast<T*>(p.grad_logits) + first * p.classes;
  for (int i = thread; i < rows * k_count; i += kThreads) {
    const int row = params.classes.divide(i);
    from_float(staged[row * stride + i - row * k_count], grad[i]);
  }
}

template <typename T, int kPerLane>
__global__ void __launch_bounds__(kThreads) backward_warp_kernel(BackwardParams params) {
  wait_for_previous_kernel();
  const SoftmaxEntropyArgs& p = params.args;
  const int classes = static_cast<int>(p.classes);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const T* logits = static_cast<const T*>(p.logits);
  T* grad = static_cast<T*>(p.grad_logits);
  const Gradients g(p);
  float log_q[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int k = lane + i * kWarpSize;
    log_q[i] = k < classes ? log_or_zero(p.mean_probabilities[k]) : 0.0f;
  }
  for (int64_t row = int64_t{blockIdx.x} * kWarps + warp; row < p.rows; row += int64_t{gridDim.x} * kWarps) {
    WarpRow<kPerLane> r(logits + row * p.row_stride, classes, lane);
    const float inverse = 1.0f / r.s, log_s = logf(r.s);
    float mean_t = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      r.e[i] *= inverse;
      r.d[i] = g.t(r.d[i] - log_s, log_q[i]);
      mean_t += r.e[i] * r.d[i];
    }
    mean_t = warp_sum(mean_t);
    int64_t label = -1;
    const bool labeled = carries_label(p, row, label);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int k = lane + i * kWarpSize;
      if (k < classes) from_float(g.logit(r.e[i], r.d[i], mean_t, labeled, k == label), grad[row * classes + k]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_block_kernel(BackwardParams params) {
  wait_for_previous_kernel();
  const SoftmaxEntropyArgs& p = params.args;
  float* shared = static_cast<float*>(shared_memory());
  const Gradients g(p);
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* logits = static_cast<const T*>(p.logits) + row * p.row_stride;
    T* grad = static_cast<T*>(p.grad_logits) + row * p.classes;
    float max, s, u;
    block_row(logits, p.classes, shared, max, s, u);
    const float inverse = 1.0f / s, log_s = logf(s);
    float mean_t = 0.0f;
    for (int64_t k = threadIdx.x; k < p.classes; k += kThreads) {
      const float d = to_float(logits[k]) - max;
      mean_t += expf(d) * inverse * g.t(d - log_s, log_or_zero(p.mean_probabilities[k]));
    }
    mean_t = block_sum(mean_t, shared);
    if (threadIdx.x == 0) shared[kWarps] = mean_t;
    block_barrier();
    mean_t = shared[kWarps];
    int64_t label = -1;
    const bool labeled = carries_label(p, row, label);
    for (int64_t k = threadIdx.x; k < p.classes; k += kThreads) {
      const float d = to_float(logits[k]) - max;
      const float t = g.t(d - log_s, log_or_zero(p.mean_probabilities[k]));
      from_float(g.logit(expf(d) * inverse, t, mean_t, labeled, k == label), grad[k]);
    }
    block_barrier();
  }
}

int64_t rows_per_block(int64_t classes) {
  return classes <= kMaxThreadClasses ? kThreads : classes <= kMaxWarpClasses ? kWarps : 1;
}

// Blocks that are resident at once, or fewer.
int64_t block_count(const SoftmaxEntropyArgs& args) {
  return std::min<int64_t>(divide_up(args.rows, rows_per_block(args.classes)), int64_t{args.multiprocessors} * 4);
}

int64_t staged_floats(int64_t classes) { return kThreads * (classes | 1); }

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
  return 16 + static_cast<size_t>(block_count(args) * (args.classes + kExtra)) * sizeof(float);
}

cudaError_t softmax_entropy_forward_launch(const SoftmaxEntropyArgs& args, cudaStream_t stream) {
  const int64_t classes = args.classes;
  const dim3 grid(static_cast<unsigned>(block_count(args)));
  const ForwardParams params{args, FastDivisor(classes), static_cast<float*>(args.workspace) + 4,
                             static_cast<unsigned*>(args.workspace)};
  if (grid.x > 1) {
    const cudaError_t error = clear_async(params.counter, sizeof(unsigned), stream);
    if (error != cudaSuccess) return error;
  }
  const size_t finish_bytes = kThreads * sizeof(double);
  return dispatch(args.type, [&](auto zero) {
    using T = decltype(zero);
    if (classes <= kMaxThreadClasses) {
      const size_t bytes = std::max(finish_bytes, staged_floats(classes) * sizeof(float));
      return launch(classes <= 10 ? forward_thread_kernel<T, 10> : forward_thread_kernel<T, kMaxThreadClasses>, grid,
                    kThreads, bytes, stream, params);
    }
    if (classes <= kMaxWarpClasses) {
      const size_t bytes = std::max(finish_bytes, static_cast<size_t>(kWarps * classes) * sizeof(float));
      return launch(classes <= 256 ? forward_warp_kernel<T, 8> : forward_warp_kernel<T, 32>, grid, kThreads, bytes,
                    stream, params);
    }
    return launch(forward_block_kernel<T>, grid, kThreads, finish_bytes, stream, params);
  });
}

cudaError_t softmax_entropy_backward_launch(const SoftmaxEntropyArgs& args, cudaStream_t stream) {
  const int64_t classes = args.classes;
  const BackwardParams params{args, FastDivisor(classes)};
  return dispatch(args.type, [&](auto zero) {
    using T = decltype(zero);
    if (classes <= kMaxThreadClasses) {
      const dim3 grid(static_cast<unsigned>(divide_up(args.rows, kThreads)));
      const size_t bytes = (staged_floats(classes) + classes) * sizeof(float);
      return launch(classes <= 10 ? backward_thread_kernel<T, 10> : backward_thread_kernel<T, kMaxThreadClasses>, grid,
                    kThreads, bytes, stream, params);
    }
    const dim3 grid(static_cast<unsigned>(block_count(args)));
    if (classes <= kMaxWarpClasses) {
      return launch(classes <= 256 ? backward_warp_kernel<T, 8> : backward_warp_kernel<T, 32>, grid, kThreads, 0,
                    stream, params);
    }
    return launch(backward_block_kernel<T>, grid, kThreads, (kWarps + 2) * sizeof(float), stream, params);
  });
}

}  // namespace fastgan::cuda
