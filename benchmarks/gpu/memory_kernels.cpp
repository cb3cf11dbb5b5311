// Times the CUDA kernels that memory bounds, alone, without PyTorch: batch norm with its activation around a convolution of
// the 64-px DCGAN at batch 128, and CatGAN's loss:
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -DFASTGAN_HOPPER -x cu benchmarks/gpu/memory_kernels.cpp
//       csrc/cuda/bn_act.cu csrc/cuda/softmax_entropy.cu -o memory_kernels && ./memory_kernels          (one line)
//
// A figure is the median of 12 replays of a CUDA graph of 24 launches, in microseconds a launch. Launches go round several
// sets of arrays, which together are larger than the second-level cache where a set is not small. Nothing is checked here;
// tests/native/cuda does that.
#include "../../csrc/cuda/bn_act.h"
#include "../../csrc/cuda/softmax_entropy.h"
#include "timing.h"

using namespace fastgan;
using namespace fastgan::cuda;
using namespace fastgan::cuda::timing;

namespace {

constexpr int kLaunches = 24;
constexpr int64_t kTogether = 160'000'000;  // bytes of a tensor in all sets

int sets_of(int64_t bytes) { return static_cast<int>(std::clamp<int64_t>(kTogether / bytes, 2, kLaunches)); }

const char* name_of(DataType type) { return type == DataType::float32 ? "float32" : "bfloat16"; }

double time_sets(int sets, const std::function<cudaError_t(int)>& launch) {
  return microseconds([&](int i) { return launch(i % sets); }, kLaunches);
}

void time_batch_norm(int64_t values, int64_t channels, DataType type) {
  Memory memory;
  const BnActShape shape{values, channels, 1};
  const int64_t elements = values * channels, tiles = bn_act_tiles(shape);
  const int sets = sets_of(elements * size_of(type));
  std::vector<void*> x, dy, results;
  for (int i = 0; i < sets; ++i) {
    x.push_back(i == 0 ? memory.random(elements, type) : memory.bytes(static_cast<size_t>(elements * size_of(type))));
    dy.push_back(memory.bytes(static_cast<size_t>(elements * size_of(type))));
    results.push_back(memory.bytes(static_cast<size_t>(elements * size_of(type))));
    for (void* copy : {x[i], dy[i]}) {
      check(cudaMemcpy(copy, x[0], static_cast<size_t>(elements * size_of(type)), cudaMemcpyDeviceToDevice));
    }
  }
  const ActivationSpec activation{Activation::leaky_relu, 0.2f};
  const auto array = [&] { return memory.floats(channels); };
  const StatisticsTiles statistics{tiles, 1, memory.floats(tiles * channels), memory.floats(tiles * channels), memory.floats(tiles)};
  BatchNormForwardArgs norm;
  norm.channels = channels, norm.tiles = statistics, norm.count = static_cast<double>(values);
  norm.mean = array(), norm.invstd = array(), norm.scale = array(), norm.shift = array();
  BnActBackwardArgs backward;
  backward.shape = shape, backward.type = type, backward.activation = activation;
  backward.mean = norm.mean, backward.invstd = norm.invstd, backward.b = array(), backward.c = array();
  backward.tiles = {tiles, statistics.mean, statistics.m2};
  BatchNormBackwardArgs merge;
  merge.channels = channels, merge.tiles = backward.tiles, merge.count = norm.count;
  merge.mean = norm.mean, merge.invstd = norm.invstd, merge.sum_dz = array(), merge.sum_dz_xhat = array();
  merge.b = array(), merge.c = array();

  const auto of_set = [&](int i) {
    backward.grad_output = dy[i], backward.input = x[i], backward.grad_input = results[i];
    return backward;
  };
  const double times[] = {
      time_sets(sets, [&](int i) { return batch_statistics_launch({shape, type, x[i], statistics}, stream); }),
      time_sets(sets, [&](int) { return batch_norm_forward_launch(norm, stream); }),
      time_sets(sets, [&](int i) {
        return scale_shift_act_launch({shape, type, x[i], norm.scale, norm.shift, activation, results[i]}, stream);
      }),
      time_sets(sets, [&](int i) { return bn_act_backward_reduce_launch(of_set(i), stream); }),
      time_sets(sets, [&](int) { return batch_norm_backward_launch(merge, stream); }),
      time_sets(sets, [&](int i) { return bn_act_backward_apply_launch(of_set(i), stream); }),
      time_sets(sets, [&](int i) {
        return act_backward_launch({shape, type, dy[i], x[i], activation, results[i], {}}, stream);
      })};
  std::printf("[%6d, %3d] %-8s  statistics %5.1f  merge %4.1f  activate %5.1f | reduce %5.1f  merge %4.1f  apply %5.1f | activation alone, backward %5.1f\n",
              static_cast<int>(values), static_cast<int>(channels), name_of(type), times[0], times[1], times[2], times[3], times[4],
              times[5], times[6]);
}

void time_softmax_entropy(int64_t rows, int64_t classes, DataType type, int multiprocessors) {
  Memory memory;
  const int64_t elements = rows * classes;
  const int sets = std::min(8, sets_of(elements * size_of(type)));
  std::vector<SoftmaxEntropyArgs> args(static_cast<size_t>(sets));
  for (SoftmaxEntropyArgs& set : args) {
    const auto bytes = static_cast<size_t>(elements * size_of(type));
    void* logits = &set == &args[0] ? memory.random(elements, type) : memory.bytes(bytes);
    set.logits = logits;
    check(cudaMemcpy(logits, args[0].logits, bytes, cudaMemcpyDeviceToDevice));
    set.rows = rows, set.classes = set.row_stride = classes, set.type = type, set.multiprocessors = multiprocessors;
    set.workspace = memory.bytes(softmax_entropy_workspace_bytes(set));
    set.mean_probabilities = memory.floats(classes), set.log_normalizer = memory.floats(rows);
    set.conditional = memory.floats(1), set.marginal = memory.floats(1), set.cross_entropy = memory.floats(1);
    set.grad_conditional = memory.floats(1), set.grad_marginal = memory.floats(1);
    set.grad_logits = memory.bytes(bytes);
  }
  const auto forward = [&](int i) { return softmax_entropy_forward_launch(args[i], stream); };
  const auto backward = [&](int i) { return softmax_entropy_backward_launch(args[i], stream); };
  const auto both = [&](int i) {
    const cudaError_t error = forward(i);
    return error != cudaSuccess ? error : backward(i);
  };
  const double times[] = {time_sets(sets, forward), time_sets(sets, backward), time_sets(sets, both)};
  std::printf("softmax entropy [%7d, %4d] %-8s  forward %6.1f  backward %6.1f  both %6.1f\n", static_cast<int>(rows),
              static_cast<int>(classes), name_of(type), times[0], times[1], times[2]);
}

}  // namespace

int main() {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s\n", properties.name);
  for (const DataType type : {DataType::float32, DataType::bfloat16}) {
    time_batch_norm(131072, 64, type);
    time_batch_norm(32768, 128, type);
    time_batch_norm(8192, 256, type);
    time_batch_norm(2048, 512, type);
  }
  for (const DataType type : {DataType::float32, DataType::bfloat16}) {
    time_softmax_entropy(100, 10, type, properties.multiProcessorCount);
    time_softmax_entropy(1000000, 10, type, properties.multiProcessorCount);
  }
  time_softmax_entropy(100000, 1000, DataType::float32, properties.multiProcessorCount);
}
