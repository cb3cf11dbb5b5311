// Times the CUDA main loops alone, without PyTorch, on the layers of a 64-px DCGAN with 64 base channels (and a 1-channel image at 32 px),
// bfloat16, weights float32 in channels_last:
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -DFASTGAN_HOPPER -x cu benchmarks/gpu/main_loops.cpp
//       csrc/cuda/conv4x4s2.cu csrc/cuda/bn_act.cu -o main_loops && ./main_loops 128 && ./main_loops 1024      (one line)
//
// `./main_loops 128 tf32`: float32 by TF32, the loops alone; "-" where they do not take a layer.
//
// A figure is the median of 12 replays of a CUDA graph of 20 launches, in microseconds a launch: inputs stay in the L2 cache where they
// fit. Nothing is checked here; tests/native/cuda/test_conv4x4s2.cpp does that.
#include "../../csrc/cuda/conv4x4s2.h"
#include "timing.h"

using namespace fastgan;
using namespace fastgan::cuda;
using namespace fastgan::cuda::timing;

namespace {

// One direction: packing, the loop with each epilogue that training uses, the merge of its statistics.
void time_direction(Conv4x4Args args, double flops) {
  Memory memory;
  const bool down = args.direction == Conv4x4Direction::down;
  const Conv4x4Geometry& g = args.geometry;
  const int64_t channels = down ? g.small_channels : g.large_channels;
  Conv4x4PackArgs pack{g, args.direction, args.type, DataType::float32, Conv4x4WeightLayout::channels_last, nullptr, nullptr};
  pack.weight = memory.random(16 * g.small_channels * g.large_channels, DataType::float32);
  pack.packed = memory.bytes(conv4x4s2_packed_bytes(pack));
  args.packed_weight = pack.packed;
  const double packing = microseconds([&](int) { return conv4x4s2_pack_launch(&pack, 1, stream); });
  const auto loop = [&](int) { return conv4x4s2_launch(args, stream); };
  const bool taken = conv4x4s2_takes(args);
  const double store = taken ? microseconds(loop) : 0.0;
  if (args.type == DataType::float32) {
    std::printf(taken ? " | %-4s pack %4.1f  store %6.1f" : " | %-4s pack %4.1f  store      -", down ? "down" : "up", packing, store);
    return;
  }

  args.epilogue.kind = Conv4x4Epilogue::Kind::statistics;
  StatisticsTiles tiles = conv4x4s2_statistics_shape(args);
  tiles.mean = memory.floats(tiles.tiles * channels), tiles.m2 = memory.floats(tiles.tiles * channels);
  tiles.count = memory.floats(tiles.tiles / tiles.rows_per_count);
  args.epilogue.statistics = tiles;
  const double statistics = microseconds(loop);
  BatchNormForwardArgs norm;
  norm.channels = channels, norm.tiles = tiles, norm.count = 1000;
  norm.mean = memory.floats(channels), norm.invstd = memory.floats(channels);
  norm.scale = memory.floats(channels), norm.shift = memory.floats(channels);
  const double merge = microseconds([&](int) { return batch_norm_forward_launch(norm, stream); });

  args.epilogue.kind = Conv4x4Epilogue::Kind::activation_backward;
  args.epilogue.activation = {Activation::leaky_relu, 0.2f};
  args.epilogue.y = memory.random(g.batch * channels * (down ? g.small_height * g.small_width : g.large_height * g.large_width), args.type);
  args.epilogue.scale = norm.scale, args.epilogue.shift = norm.shift, args.epilogue.mean = norm.mean, args.epilogue.invstd = norm.invstd;
  args.epilogue.gradients.tiles = conv4x4s2_statistics_shape(args).tiles;
  args.epilogue.gradients.sum_dz = memory.floats(args.epilogue.gradients.tiles * channels);
  args.epilogue.gradients.sum_dz_xhat = memory.floats(args.epilogue.gradients.tiles * channels);
  const double backward = microseconds(loop);
  std::printf(" | %-4s pack %4.1f  store %6.1f (%3.0f TFLOP/s)  statistics %6.1f  merge %4.1f  derivative %6.1f", down ? "down" : "up",
              packing, store, flops / store * 1e-6, statistics, merge, backward);
}

void time_layer(int64_t batch, int64_t large_size, int64_t large_channels, int64_t small_channels, int stride, DataType type) {
  Memory memory;
  const int64_t small_size = stride == 2 ? large_size / 2 : 1;
  const Conv4x4Geometry g{batch, small_size, small_size, small_channels, large_size, large_size, large_channels, stride};
  const int64_t small_elements = batch * small_size * small_size * small_channels, large_elements = batch * large_size * large_size * large_channels;
  const double flops = 32.0 * static_cast<double>(small_elements * large_channels);
  void *small = memory.random(small_elements, type), *large = memory.random(large_elements, type);
  std::printf("%3d px %3d <-> %3d", static_cast<int>(large_size), static_cast<int>(large_channels), static_cast<int>(small_channels));
  for (const Conv4x4Direction direction : {Conv4x4Direction::down, Conv4x4Direction::up}) {
    const bool down = direction == Conv4x4Direction::down;
    Conv4x4Args args;
    args.geometry = g, args.direction = direction, args.type = type, args.tf32 = true;
    args.input = down ? large : small;
    args.output = memory.bytes(static_cast<size_t>((down ? small_elements : large_elements) * size_of(type)));
    time_direction(args, flops);
  }
  Conv4x4WeightGradientArgs args;
  args.geometry = g, args.type = type, args.tf32 = true, args.small = small, args.large = large;
  args.weight_layout = Conv4x4WeightLayout::channels_last;
  args.grad_weight = memory.floats(16 * small_channels * large_channels);
  if (!conv4x4s2_takes(args)) return static_cast<void>(std::printf(" | weight gradient      -\n"));
  args.workspace = memory.bytes(conv4x4s2_weight_gradient_workspace_bytes(args));
  const double weight_gradient = microseconds([&](int) { return conv4x4s2_weight_gradient_launch(args, stream); });
  if (type == DataType::float32) return static_cast<void>(std::printf(" | weight gradient %6.1f\n", weight_gradient));

  const BnActShape shape{batch * small_size * small_size, small_channels, 1};
  float *scale = memory.floats(small_channels), *shift = memory.floats(small_channels);
  void* output = memory.bytes(static_cast<size_t>(small_elements * size_of(type)));
  const ScaleShiftActArgs activate{shape, type, small, scale, shift, {Activation::relu, 0.0f}, output};
  const double activation = microseconds([&](int) { return scale_shift_act_launch(activate, stream); });
  BnActBackwardArgs apply;
  apply.shape = shape, apply.type = type, apply.grad_output = apply.grad_input = output, apply.input = small;
  apply.weight = apply.invstd = apply.b = apply.c = scale;
  const double application = microseconds([&](int) { return bn_act_backward_apply_launch(apply, stream); });
  std::printf(" | weight gradient %6.1f (%3.0f TFLOP/s) | activate %5.1f  apply %5.1f\n", weight_gradient,
              flops / weight_gradient * 1e-6, activation, application);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t batch = argc > 1 ? std::atoi(argv[1]) : 128;
  const DataType type = argc > 2 && std::strcmp(argv[2], "tf32") == 0 ? DataType::float32 : DataType::bfloat16;
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s, batch %d, %s\n", properties.name, static_cast<int>(batch), type == DataType::float32 ? "TF32" : "bfloat16");
  time_layer(batch, 64, 3, 64, 2, type);
  time_layer(batch, 32, 64, 128, 2, type);
  time_layer(batch, 16, 128, 256, 2, type);
  time_layer(batch, 8, 256, 512, 2, type);
  time_layer(batch, 4, 512, 1, 1, type);
  time_layer(batch, 4, 512, 100, 1, type);
  time_layer(batch, 4, 256, 100, 1, type);
  time_layer(batch, 32, 1, 64, 2, type);
}
