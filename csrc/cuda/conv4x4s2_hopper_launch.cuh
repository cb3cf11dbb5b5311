// Which launches run on Hopper's loops, and how: tensor maps, clusters, stages.
#pragma once

#include "conv4x4s2_product.cuh"

#if defined(FASTGAN_HOPPER)
#include "conv4x4s2_hopper.cuh"
#endif

namespace fastgan::cuda {

constexpr int kHopperRows = 128;  // of a tile

#if !defined(FASTGAN_HOPPER)
inline int hopper_gather_columns(const Conv4x4Args&, const Product&) { return 0; }
inline bool hopper_takes_weight_gradient(const Conv4x4WeightGradientArgs&) { return false; }
inline cudaError_t hopper_gather_launch(const Conv4x4Args&, const Product&, const GatherParams&, int, cudaStream_t) {
  return cudaErrorInvalidValue;
}
inline cudaError_t hopper_weight_gradient_launch(const Conv4x4WeightGradientArgs&, const WeightGradientParams&, dim3, cudaStream_t) {
  return cudaErrorInvalidValue;
}
#else
inline int box_channels(DataType type) { return kSwizzledRowBytes / size_of(type); }
inline bool is_whole_boxes(int64_t channels, DataType type) { return channels % box_channels(type) == 0; }

// Columns of a tile of gather_box_kernel, 0 where it does not take these arguments: as many as leave no multiprocessor without a block.
inline int hopper_gather_columns(const Conv4x4Args& args, const Product& product) {
  const bool down = args.direction == Conv4x4Direction::down;
  const int64_t channels = down ? args.geometry.large_channels : args.geometry.small_channels;
  const int64_t output_channels = down ? args.geometry.small_channels : args.geometry.large_channels;
  const int64_t step = down ? args.geometry.stride : 1;
  const PixelBox box(kHopperRows, product.grid_height, product.grid_width);
  if ((args.type == DataType::float32 && !(args.tf32 && has_plain_epilogue(args))) || !is_whole_boxes(channels, args.type) ||
      output_channels % 8 != 0 || product.columns <= 32 || product.rows <= SmallTile::kRows || !is_aligned16(args.input) ||
      !is_aligned16(args.output) || !is_aligned16(args.epilogue.y) || !box.copies_from(step) || !runs_hopper_code()) {
    return 0;
  }
  const auto blocks = [&](int64_t columns) {
    return divide_up(product.rows, kHopperRows) * divide_up(product.columns, columns) * product.phases;
  };
  if (product.paired) return 128;
  // In TF32 tiles of 64 columns are slower than cuDNN's (H200, batch 128, us: down to 4 px 49 against 36, up from 64 channels 57
  // against 51; those of 128 columns 30 to 33 against 27 to 70).
  if (product.columns <= 64 || blocks(128) * 2 <= args.multiprocessors) return args.type == DataType::float32 ? 0 : 64;
  return args.type != DataType::float32 && product.columns % 256 == 0 && blocks(256) >= args.multiprocessors - 8 ? 256 : 128;
}

inline bool hopper_takes_weight_gradient(const Conv4x4WeightGradientArgs& args) {
  const Conv4x4Geometry& g = args.geometry;
  const PixelBox box(kStagePixels, g.small_height, g.small_width);
  return args.type != DataType::float32 &&
         g.small_channels > 64 && is_whole_boxes(g.small_channels, args.type) && is_whole_boxes(g.large_channels, args.type) &&
         is_aligned16(args.small) && is_aligned16(args.large) && box.copies_from(g.stride) && runs_hopper_code();
}

// Blocks of a kernel that are on the device at once, in whole clusters. Asked once a kernel: of a machine's devices the first one counts.
template <auto kKernel, int kClusterSize, size_t kSharedBytes>
int64_t blocks_at_once() {
  static const int most = [] {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kClusterSize;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(kClusterSize), config.blockDim = dim3(256);
    config.dynamicSmemBytes = kSharedBytes, config.attrs = &attribute, config.numAttrs = 1;
    int clusters = 0;
    cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedBytes));
    if (cudaOccupancyMaxActiveClusters(&clusters, kKernel, &config) == cudaSuccess) return clusters * kClusterSize;
    cudaGetLastError();  // or the next launch would report it
    return 0;
  }();
  return most;
}

inline uint64_t size(int64_t value) { return static_cast<uint64_t>(value); }

inline cudaError_t map_windows(CUtensorMap& map, DataType type, const WindowOperand& operand, int64_t batch, const PixelBox& box, int step) {
  return make_box_map(
      map, type, operand.x, {size(operand.channels), size(operand.width), size(operand.height), size(batch)},
      {static_cast<uint32_t>(box_channels(type)), static_cast<uint32_t>(box.width), static_cast<uint32_t>(box.height), static_cast<uint32_t>(box.images)},
      static_cast<uint32_t>(step));
}

template <typename M, int kColumns, int kStages, int kBlocks, int kCluster>
cudaError_t start_gather_box(GatherBoxParams& params, const Conv4x4Args& args, const Product& product, dim3 grid, cudaStream_t stream) {
  const PixelBox box(kHopperRows, product.grid_height, product.grid_width);
  const GatherParams& gather = params.gather;
  const int step = args.direction == Conv4x4Direction::down ? args.geometry.stride : 1;
  cudaError_t error = map_windows(params.windows, args.type, gather.input, args.geometry.batch, box, step);
  if (error != cudaSuccess) return error;
  error = make_box_map(params.weights, args.type, args.packed_weight,
                       {size(gather.depth_padded), size(product.phases * product.columns), 1, 1},
                       {static_cast<uint32_t>(box_channels(args.type)), kColumns / kCluster, 1, 1}, 1);
  if (error != cudaSuccess) return error;
  return launch(gather_box_kernel<M, kColumns, kStages, kBlocks, kCluster>, grid, 256,
                GatherPipeline<kColumns, kStages, kCluster>::shared_bytes(), stream, params);
}

// One block a multiprocessor gets all of its shared memory as stages; where there are more blocks, two live together.
template <typename M, int kColumns, int kCluster>
cudaError_t choose_gather_stages(GatherBoxParams& params, const Conv4x4Args& args, const Product& product, dim3 grid, cudaStream_t stream) {
  if constexpr (kColumns == 256) {
    return start_gather_box<M, 256, 4, 1, kCluster>(params, args, product, grid, stream);
  } else {
    constexpr int kDeep = kColumns == 64 ? 8 : 6, kShallow = kDeep / 2;
    const int64_t at_once = blocks_at_once<gather_box_kernel<M, kColumns, kDeep, 1, kCluster>, kCluster,
                                           GatherPipeline<kColumns, kDeep, kCluster>::shared_bytes()>();
    return int64_t{grid.x} * grid.z <= at_once
               ? start_gather_box<M, kColumns, kDeep, 1, kCluster>(params, args, product, grid, stream)
               : start_gather_box<M, kColumns, kShallow, 2, kCluster>(params, args, product, grid, stream);
  }
}

template <typename M, int kColumns>
cudaError_t launch_gather_box(GatherBoxParams& params, const Conv4x4Args& args, const Product& product, dim3 grid, cudaStream_t stream) {
  return params.gather.row_tiles % 2 == 0 ? choose_gather_stages<M, kColumns, 2>(params, args, product, grid, stream)
                                          : choose_gather_stages<M, kColumns, 1>(params, args, product, grid, stream);
}

// `columns` as hopper_gather_columns has it; `gather` complete but for its tiles.
inline cudaError_t hopper_gather_launch(const Conv4x4Args& args, const Product& product, const GatherParams& gather, int columns,
                                        cudaStream_t stream) {
  GatherBoxParams params;
  params.gather = gather;
  GatherParams& p = params.gather;
  Product boxed = product;
  params.tap_rows = params.tap_columns = 1 << product.log2_taps, params.phase_step = 1;
  if (product.paired) {
    params.tap_columns = 3, params.phase_step = 2;
    boxed.columns *= 2, boxed.phases /= 2;
    p.columns *= 2, p.output_width /= 2, p.output_step_w = 1;
  }
  p.row_tiles = static_cast<int>(divide_up(boxed.rows, kHopperRows));
  p.column_tiles = static_cast<int>(divide_up(boxed.columns, columns));
  const dim3 grid(static_cast<unsigned>(p.row_tiles * p.column_tiles), 1, static_cast<unsigned>(boxed.phases));
  const auto run = [&](auto math) {
    using M = decltype(math);
    if constexpr (sizeof(typename M::Type) == 2) {
      if (columns == 256) return launch_gather_box<M, 256>(params, args, boxed, grid, stream);
      if (columns == 64) return launch_gather_box<M, 64>(params, args, boxed, grid, stream);
    }
    return launch_gather_box<M, 128>(params, args, boxed, grid, stream);
  };
  if (args.type == DataType::float32) return run(Tf32Math{});
  return args.type == DataType::bfloat16 ? run(Bfloat16Math{}) : run(Float16Math{});
}

inline cudaError_t hopper_weight_gradient_launch(const Conv4x4WeightGradientArgs& args, const WeightGradientParams& gradient,
                                                 dim3 grid, cudaStream_t stream) {
  const Conv4x4Geometry& g = args.geometry;
  WeightBoxParams params;
  params.gradient = gradient;
  cudaError_t error = make_box_map(params.small, args.type, args.small, {size(g.small_channels), size(gradient.pixels), 1, 1},
                                   {64, kStagePixels, 1, 1}, 1);
  if (error != cudaSuccess) return error;
  error = map_windows(params.large, args.type, gradient.large, g.batch, PixelBox(kStagePixels, g.small_height, g.small_width), g.stride);
  if (error != cudaSuccess) return error;
  constexpr int kPair = 2;  // blocks of a cluster
  const auto run = [&](auto math) {
    return launch(weight_gradient_box_kernel<decltype(math), 4, kPair>, grid, 256, WeightPipeline<4, kPair>::shared_bytes(), stream, params);
  };
  return args.type == DataType::bfloat16 ? run(Bfloat16Math{}) : run(Float16Math{});
}
#endif

}  // namespace fastgan::cuda
