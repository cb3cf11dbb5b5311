// What the programs here that time kernels alone share: device memory, and CUDA graphs of many launches.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "../../csrc/cuda/runtime.h"

namespace fastgan::cuda::timing {

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(error));
  std::exit(EXIT_FAILURE);
}

inline const cudaStream_t stream = [] {
  cudaStream_t created;
  check(cudaStreamCreate(&created));
  return created;
}();

// Device memory that lives until the end of a layer.
class Memory {
 public:
  ~Memory() {
    for (void* memory : allocations_) cudaFree(memory);
  }
  void* bytes(size_t count) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, std::max<size_t>(count, 16)));
    allocations_.push_back(memory);
    return memory;
  }
  // Uniform in [-1, 1], as float32 or bfloat16.
  void* random(int64_t elements, DataType type) {
    static std::minstd_rand source(1);
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    const size_t size = static_cast<size_t>(size_of(type));
    std::vector<unsigned char> host(static_cast<size_t>(elements) * size);
    for (int64_t i = 0; i < elements; ++i) {
      const float value = uniform(source);  // its upper half is a bfloat16
      std::memcpy(host.data() + static_cast<size_t>(i) * size, reinterpret_cast<const char*>(&value) + 4 - size, size);
    }
    void* memory = bytes(host.size());
    check(cudaMemcpy(memory, host.data(), host.size(), cudaMemcpyHostToDevice));
    return memory;
  }
  float* floats(int64_t count) { return static_cast<float*>(random(count, DataType::float32)); }

 private:
  std::vector<void*> allocations_;
};

// Of one launch: the median of 12 replays of a graph of `launches`, launch(i) being the i-th.
inline double microseconds(const std::function<cudaError_t(int)>& launch, int launches = 20) {
  constexpr int kReplays = 12;
  check(launch(0));
  check(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches; ++i) check(launch(i));
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < kReplays; ++i) {
    check(cudaEventRecord(begin, stream));
    check(cudaGraphLaunch(executable, stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    check(cudaEventElapsedTime(&times.emplace_back(), begin, end));
  }
  std::sort(times.begin(), times.end());
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  check(cudaGraphExecDestroy(executable));
  check(cudaGraphDestroy(graph));
  return times[times.size() / 2] * 1e3 / launches;
}

}  // namespace fastgan::cuda::timing
