// Adam: one kernel for all tensors of a group, each block a chunk of one tensor.
//
// Arithmetic and its order are those of PyTorch's fused Adam, in float32 throughout. Betas enter as float32 on both sides of
// a quotient, (1 - beta) and (1 - beta^step), so that their rounding cancels.
//
// A tensor's step count is read by all of its blocks and must not change before the last of them has read it: blocks are
// counted after that, and the last one of the grid advances all counts.
#include <algorithm>

#include "adam.h"
#include "device.cuh"

namespace fastgan::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;  // of 16 bytes, that a thread reads of each array before it computes
constexpr int kVectorSize = Vector<float>::kSize;
constexpr int kChunk = kThreads * kVectors * kVectorSize;

struct AdamParams {
  AdamTensor tensors[kMostAdamTensors];
  int first_block[kMostAdamTensors];
  int count;
  float lr, beta1, beta2, eps, weight_decay;
  bool decoupled_weight_decay;
  const float* lr_on_device;
  const float* found_inf;
  unsigned* blocks_arrived;
};
static_assert(sizeof(AdamParams) <= 4096, "the parameters of a kernel");

struct Scalars {
  float lr, step_size, bias_correction2_sqrt;
  bool skip;
};

// What a block's first thread tells the others.
struct Shared {
  Scalars scalars;
  bool last;  // of the grid's blocks
};

// The tensor to which the block belongs: the last one that does not begin after it.
__device__ __forceinline__ int find_tensor(const AdamParams& p, int block) {
  int low = 0, high = p.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.first_block[middle] <= block ? low : high) = middle;
  }
  return low;
}

__device__ __forceinline__ uintptr_t address(const float* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

__device__ __forceinline__ void update(const AdamParams& p, const Scalars& s, float& parameter, float gradient,
                                       float& exp_avg, float& exp_avg_sq) {
  if (p.weight_decay != 0.0f) {
    if (p.decoupled_weight_decay) {
      parameter -= s.lr * p.weight_decay * parameter;
    } else {
      gradient += parameter * p.weight_decay;
    }
  }
  const float square = gradient * gradient;
  exp_avg = fmaf(p.beta1, exp_avg, fmaf(-p.beta1, gradient, gradient));
  exp_avg_sq = fmaf(p.beta2, exp_avg_sq, fmaf(-p.beta2, square, square));
  const float denominator = sqrtf(exp_avg_sq) / s.bias_correction2_sqrt + p.eps;
  parameter -= s.step_size * exp_avg / denominator;
}

__global__ void __launch_bounds__(kThreads, 4) adam_kernel(const __grid_constant__ AdamParams params) {
  wait_for_previous_kernel();
  Shared& shared = *static_cast<Shared*>(shared_memory());
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int index = find_tensor(params, block);
  const AdamTensor tensor = params.tensors[index];
  const int64_t begin = int64_t{block - params.first_block[index]} * kChunk + thread * kVectorSize;
  const bool aligned = (address(tensor.parameter) | address(tensor.gradient) | address(tensor.exp_avg) |
                        address(tensor.exp_avg_sq)) % 16 == 0;

  // Loads come before everything that waits.
  Bytes16 parameter[kVectors], gradient[kVectors], exp_avg[kVectors], exp_avg_sq[kVectors];
  int64_t at[kVectors];
  int count[kVectors];
  bool whole[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t start = begin + i * kThreads * kVectorSize, left = tensor.size - start;
    at[i] = left > 0 ? start : 0;
    count[i] = left >= kVectorSize ? kVectorSize : left > 0 ? static_cast<int>(left) : 0;
    whole[i] = aligned && count[i] == kVectorSize;
    parameter[i] = load_bytes(tensor.parameter + at[i], count[i], whole[i]);
    gradient[i] = load_bytes(tensor.gradient + at[i], count[i], whole[i]);
    exp_avg[i] = load_bytes(tensor.exp_avg + at[i], count[i], whole[i]);
    exp_avg_sq[i] = load_bytes(tensor.exp_avg_sq + at[i], count[i], whole[i]);
  }

  if (thread == 0) {
    const float step = *tensor.step + 1.0f;
    const float lr = params.lr_on_device != nullptr ? *params.lr_on_device : params.lr;
    const bool skip = params.found_inf != nullptr && *params.found_inf != 0.0f;
    shared.scalars = {lr, lr / (1.0f - powf(params.beta1, step)), sqrtf(1.0f - powf(params.beta2, step)), skip};
  }
  block_barrier();
  const Scalars s = shared.scalars;
  if (s.skip) return;  // in all blocks alike: none is counted

  unsigned arrived = 0;
  if (thread == 0) {
    device_fence();
    arrived = atomic_increment(params.blocks_arrived);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    Vector<float> p, g, m, v;
    unpack(parameter[i], p);
    unpack(gradient[i], g);
    unpack(exp_avg[i], m);
    unpack(exp_avg_sq[i], v);
#pragma unroll
    for (int j = 0; j < kVectorSize; ++j) update(params, s, p.values[j], g.values[j], m.values[j], v.values[j]);
    store_vector(tensor.parameter + at[i], count[i], whole[i], p);
    store_vector(tensor.exp_avg + at[i], count[i], whole[i], m);
    store_vector(tensor.exp_avg_sq + at[i], count[i], whole[i], v);
  }

  if (thread == 0) shared.last = arrived == gridDim.x - 1;
  block_barrier();
  if (!shared.last) return;
  if (thread == 0) *params.blocks_arrived = 0;
  for (int i = thread; i < params.count; i += kThreads) *params.tensors[i].step += 1.0f;
}

}  // namespace

cudaError_t adam_launch(const AdamArgs& args, cudaStream_t stream) {
  AdamParams params{};
  params.lr = args.lr, params.lr_on_device = args.lr_on_device;
  params.beta1 = args.beta1, params.beta2 = args.beta2, params.eps = args.eps;
  params.weight_decay = args.weight_decay, params.decoupled_weight_decay = args.decoupled_weight_decay;
  params.found_inf = args.found_inf, params.blocks_arrived = args.blocks_arrived;
  for (int64_t first = 0; first < args.count; first += kMostAdamTensors) {
    params.count = static_cast<int>(std::min<int64_t>(kMostAdamTensors, args.count - first));
    int64_t blocks = 0;
    for (int i = 0; i < params.count; ++i) {
      params.tensors[i] = args.tensors[first + i];
      params.first_block[i] = static_cast<int>(blocks);
      blocks += std::max<int64_t>(1, divide_up(params.tensors[i].size, kChunk));  // an empty tensor has steps too
      if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    }
    const cudaError_t error =
        launch(adam_kernel, dim3(static_cast<unsigned>(blocks)), kThreads, sizeof(Shared), stream, params);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fastgan::cuda
