// What the softmax entropy kernels have in common: parameters, the forms of the sums, and the merge of the blocks' shares.
#pragma once

#include "device.cuh"
#include "softmax_entropy.h"

namespace fastgan::cuda {
namespace {

constexpr int kThreads = 512;     // at most, in kernels of a thread or a warp a row
constexpr int kDenseThreads = 384, kDenseBlocks = 2;  // at most, of a block and of a multiprocessor, for dense rows
constexpr int kRowThreads = 256;  // in kernels of a block a row
constexpr int kMaxWarps = kThreads / kWarpSize;
constexpr int kExtra = 2;          // columns of a block's share after the classes: sum of H, sum of the cross-entropy
constexpr int kMaxThreadClasses = 20;
constexpr int kDenseClasses = 10;  // for which there are kernels of dense rows
constexpr int kMaxWarpClasses = 1024;
constexpr int kFinishBytes = 256;  // of shared memory, for finish()
static_assert((kMaxWarps + 1) * sizeof(double) <= kFinishBytes);

struct ForwardParams {
  SoftmaxEntropyArgs args;
  FastDivisor classes;
  bool vectors;       // rows (tiles of rows) are read 16 bytes at a time
  float* shares;      // [blocks, classes + kExtra]
  unsigned* counter;  // blocks that have written their share
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

// log s for s >= 1.
__device__ __forceinline__ float logarithm(float s) { return log2_approximate(s) * 0.693147181f; }

// d as a factor of e^d, finite: 0 log 0 = 0, for logits of -infinity.
__device__ __forceinline__ float finite(float d) { return fmaxf(d, -1e30f); }

__device__ __forceinline__ bool carries_label(const SoftmaxEntropyArgs& p, int64_t row, int64_t& label) {
  if (p.labels == nullptr) return false;
  label = p.labels[row];
  return label != p.ignore_index;
}

__device__ __forceinline__ bool out_of_range(const SoftmaxEntropyArgs& p, int64_t label) {
  return label < 0 || label >= p.classes;
}

__device__ __forceinline__ float not_a_number() { return bits_to_float(0x7FC00000u); }

// Shared memory: finish()'s, the share of a block that is alone, and what each kernel needs.
__host__ __device__ inline int64_t share_bytes(int64_t classes) { return (classes + kExtra + 3) / 4 * 16; }
__device__ __forceinline__ unsigned char* kernel_memory(int64_t classes) {
  return static_cast<unsigned char*>(shared_memory()) + kFinishBytes + share_bytes(classes);
}

// Where a block of the thread and warp kernels puts its share: a block that is alone keeps it in shared memory.
__device__ __forceinline__ float* block_share(const ForwardParams& p) {
  if (gridDim.x == 1) return reinterpret_cast<float*>(static_cast<unsigned char*>(shared_memory()) + kFinishBytes);
  return p.shares + int64_t{blockIdx.x} * (p.args.classes + kExtra);
}

// Adds the shares of all blocks in a fixed order and writes the results. Only the block that comes last does so. Every
// thread of every block calls this, after its block's share is written; `shares` is that of block 0.
__device__ inline void finish(const ForwardParams& p, const float* shares) {
  double* shared = static_cast<double*>(shared_memory());  // [kMaxWarps + 1]
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int blocks = static_cast<int>(gridDim.x);
  const int64_t classes = p.args.classes, columns = classes + kExtra;
  if (blocks > 1) {
    device_fence();
    block_barrier();
    if (thread == 0) shared[kMaxWarps] = atomic_increment(p.counter) == gridDim.x - 1 ? 1.0 : 0.0;
    block_barrier();
    if (shared[kMaxWarps] == 0.0) return;
    device_fence();
  } else {
    block_barrier();
  }
  const double rows = static_cast<double>(p.args.rows);
  int lanes = 1;  // of a warp, that share out the blocks of one column
  while (lanes < kWarpSize && lanes < blocks && 2 * lanes * columns <= threads) lanes *= 2;
  double entropy = 0.0;
  for (int64_t first = 0; first < columns; first += threads / lanes) {
    const int64_t column = first + thread / lanes;
    double sum = 0.0;
    if (column < columns) {
      constexpr int kAtOnce = 16;  // loads in flight
      for (int begin = thread % lanes; begin < blocks; begin += kAtOnce * lanes) {
        float loaded[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int block = begin + i * lanes;
          loaded[i] = block < blocks ? shares[block * columns + column] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) sum += double{loaded[i]};
      }
    }
    for (int mask = lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (thread % lanes != 0 || column >= columns) continue;
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
  entropy = warp_sum(entropy);
  if (lane_index() == 0) shared[warp_index()] = entropy;
  block_barrier();
  if (thread > 0) return;
  for (int warp = 1; warp < warp_count(); ++warp) entropy += shared[warp];
  *p.args.marginal = static_cast<float>(entropy);
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

  __device__ float of_mean(float q) const { return q == 0.0f ? 0.0f : marginal * logf(q); }
  __device__ float t(float d, float of_mean_k) const { return conditional * finite(d) + of_mean_k; }
  __device__ float of_label(bool labeled) const { return labeled ? cross_entropy : 0.0f; }
};

// A row's label as an index that no class equals if the row carries none or one out of range.
__device__ __forceinline__ int class_or_none(const SoftmaxEntropyArgs& p, bool labeled, int64_t label) {
  return labeled && !out_of_range(p, label) ? static_cast<int>(label) : -1;
}

}  // namespace
}  // namespace fastgan::cuda
