// Launches of the 4x4 convolutions: geometry to kernel parameters, choice of tile and split, packing of weights.
//
// Not run on a GPU yet, so no variant has been measured. Tiles are chosen by occupancy alone: 128x128 where that fills
// the multiprocessors, else 64x64.
#include "conv4x4s2.h"

#include <algorithm>

#include "conv4x4s2_gather.cuh"
#include "conv4x4s2_hopper.cuh"
#include "conv4x4s2_pack.cuh"
#include "conv4x4s2_pixel.cuh"
#include "conv4x4s2_thin.cuh"
#include "conv4x4s2_weight.cuh"

namespace fastgan::cuda {
namespace {

constexpr int64_t kMaxIndex = int64_t{1} << 31;  // rows and columns are 32-bit, offsets 64-bit

bool grid_matches(int64_t small, int64_t large, int stride) {
  return stride == 2 ? small >= 1 && (large == 2 * small || large == 2 * small + 1)
                     : stride == 1 && small >= 1 && large == small + 3;
}

// The shape of the matrix product of one direction: rows windows of depth numbers, times columns.
struct Product {
  int64_t rows, columns, depth;
  int64_t grid_height, grid_width;
  int phases, log2_taps;
  bool from_pixel;  // up, stride 1: one row an image, all 16 output pixels as columns
  bool paired;      // weights are packed for pairs of phases, and Hopper's loop takes them so
};

#if defined(FASTGAN_HOPPER)
// Depends on nothing that one launch may change: weights are packed before. What Hopper's loop then does not take (a misaligned pointer)
// runs gather_kernel, which reads both orders.
bool packs_pairs_of_phases(const Conv4x4Geometry& g, Conv4x4Direction direction, DataType type) {
  return direction == Conv4x4Direction::up && g.stride == 2 && type != DataType::float32 && g.large_channels == 64 &&
         g.small_channels % kBoxChannels == 0 && g.large_width % 2 == 0 && device_generation() == 9;
}
#else
bool packs_pairs_of_phases(const Conv4x4Geometry&, Conv4x4Direction, DataType) { return false; }
#endif

Product product_of(const Conv4x4Geometry& g, Conv4x4Direction direction, DataType type) {
  Product p{};
  p.phases = 1;
  if (direction == Conv4x4Direction::down) {
    p.grid_height = g.small_height, p.grid_width = g.small_width;
    p.columns = g.small_channels, p.depth = kTaps * g.large_channels, p.log2_taps = 2;
  } else if (g.stride == 2) {
    p.grid_height = (g.large_height + 1) / 2, p.grid_width = (g.large_width + 1) / 2;
    p.columns = g.large_channels, p.depth = 4 * g.small_channels, p.log2_taps = 1, p.phases = 4;
  } else {
    p.grid_height = p.grid_width = 1;
    p.columns = kTaps * g.large_channels, p.depth = g.small_channels, p.log2_taps = 0, p.from_pixel = true;
  }
  p.rows = g.batch * p.grid_height * p.grid_width;
  p.paired = packs_pairs_of_phases(g, direction, type);
  return p;
}

int64_t padded_depth(const Product& product, DataType type) {
  if (product.paired) return product.depth / 4 * 6;
  const int64_t vector = 16 / size_of(type);
  return divide_up(product.depth, vector) * vector;
}

bool uses_large_tile(int64_t rows, int64_t columns, int64_t repeats, DataType type, Conv4x4Math math,
                     int multiprocessors) {
  if (type == DataType::float32 && math == Conv4x4Math::float32) return false;  // registers
  if (columns <= SmallTile::kColumns || rows <= SmallTile::kRows) return false;
  return divide_up(rows, LargeTile::kRows) * divide_up(columns, LargeTile::kColumns) * repeats >= multiprocessors;
}

bool gather_uses_large_tile(const Conv4x4Args& args, const Product& product) {
  return uses_large_tile(product.rows, product.columns, product.phases, args.type, args.math, args.multiprocessors);
}

[[maybe_unused]] constexpr int kHopperRows = 128;

#if !defined(FASTGAN_HOPPER)
int hopper_gather_columns(const Conv4x4Args&, const Product&) { return 0; }
bool hopper_takes_weight_gradient(const Conv4x4WeightGradientArgs&) { return false; }
#else
bool is_whole_blocks(int64_t channels) { return channels % kBoxChannels == 0; }

// Columns of a tile of gather_box_kernel, 0 where it does not take these arguments: as many as leave no multiprocessor without a block.
int hopper_gather_columns(const Conv4x4Args& args, const Product& product) {
  const bool down = args.direction == Conv4x4Direction::down;
  const int64_t channels = down ? args.geometry.large_channels : args.geometry.small_channels;
  const int64_t output_channels = down ? args.geometry.small_channels : args.geometry.large_channels;
  const int64_t step = down ? args.geometry.stride : 1;
  const PixelBox box(kHopperRows, product.grid_height, product.grid_width);
  if (args.type == DataType::float32 || args.prologue.kind != Conv4x4Prologue::Kind::none || !is_whole_blocks(channels) ||
      output_channels % 8 != 0 || product.columns <= 32 || product.rows <= SmallTile::kRows || !is_aligned16(args.input) ||
      !is_aligned16(args.output) || !is_aligned16(args.epilogue.y) || !box || box.width * step > 256 || box.height * step > 256 ||
      device_generation() != 9) {
    return 0;
  }
  const auto blocks = [&](int64_t columns) {
    return divide_up(product.rows, kHopperRows) * divide_up(product.columns, columns) * product.phases;
  };
  if (product.paired) return 128;
  if (product.columns <= 64 || blocks(128) * 2 <= args.multiprocessors) return 64;
  return product.columns % 256 == 0 && blocks(256) >= args.multiprocessors - 8 ? 256 : 128;
}

bool hopper_takes_weight_gradient(const Conv4x4WeightGradientArgs& args) {
  const Conv4x4Geometry& g = args.geometry;
  constexpr auto kNone = Conv4x4Prologue::Kind::none;
  const PixelBox box(kStagePixels, g.small_height, g.small_width);
  return args.type != DataType::float32 && args.small_prologue.kind == kNone && args.large_prologue.kind == kNone &&
         g.small_channels > 64 && is_whole_blocks(g.small_channels) && is_whole_blocks(g.large_channels) &&
         is_aligned16(args.small) && is_aligned16(args.large) && box && box.width * g.stride <= 256 &&
         box.height * g.stride <= 256 && device_generation() == 9;
}
#endif

// Rows of a tile of sums, whichever kernel writes it.
int64_t tile_rows(const Conv4x4Args& args, const Product& product) {
  const bool large = hopper_gather_columns(args, product) != 0 || gather_uses_large_tile(args, product);
  return large ? LargeTile::kRows : SmallTile::kRows;
}

bool aligned_prologue(const Conv4x4Prologue& p) {
  return is_aligned16(p.scale) && is_aligned16(p.shift) && is_aligned16(p.y) && is_aligned16(p.a) &&
         is_aligned16(p.b) && is_aligned16(p.c);
}

WindowOperand make_operand(const void* x, const Conv4x4Prologue& prologue, int64_t height, int64_t width,
                           int64_t channels, int log2_taps, DataType type) {
  WindowOperand o{};
  o.x = x;
  o.prologue = prologue;
  o.height = static_cast<int>(height), o.width = static_cast<int>(width), o.channels = static_cast<int>(channels);
  o.channel_divisor = FastDivisor(channels);
  o.log2_taps = log2_taps;
  o.columns = static_cast<int>(channels << (2 * log2_taps));
  o.aligned = channels % (16 / size_of(type)) == 0 && is_aligned16(x) && aligned_prologue(prologue);
  o.halves = !o.aligned && prologue.kind == Conv4x4Prologue::Kind::none && channels * size_of(type) % 8 == 0 &&
             reinterpret_cast<uintptr_t>(x) % 8 == 0;
  return o;
}

// Calls f(Math{}) for the arithmetic of a storage type.
template <typename F>
cudaError_t dispatch_math(DataType type, Conv4x4Math math, const F& f) {
  switch (type) {
    case DataType::bfloat16: return f(Bfloat16Math{});
    case DataType::float16: return f(Float16Math{});
    case DataType::float32: return math == Conv4x4Math::tf32 ? f(Tf32Math{}) : f(Float32Math{});
  }
  return cudaErrorInvalidValue;
}

// Calls f(Tile{}); exact float32 has the small tile only.
template <typename Math, typename F>
cudaError_t dispatch_tile(bool large, const F& f) {
  if constexpr (Math::kTensorCore) {
    if (large) return f(LargeTile{});
  }
  return f(SmallTile{});
}

struct Split {
  int64_t splits, pixels_per_split;
  bool large_tile, hopper, thin;
};

// Enough blocks for two on every multiprocessor (Hopper's loop: for one), but no split shorter than eight stages.
Split split_of(const Conv4x4WeightGradientArgs& args) {
  const Conv4x4Geometry& g = args.geometry;
  const int64_t rows = g.small_channels, columns = kTaps * g.large_channels;
  Split split{};
  split.thin = is_thin_weight_gradient(args);
  if (split.thin) {
    split.splits = thin_weight_gradient_blocks(args);
    return split;
  }
  split.hopper = hopper_takes_weight_gradient(args);
  const int64_t pixels = g.batch * g.small_height * g.small_width;
  const int64_t stage = split.hopper ? 64 : kDepthBytes / size_of(args.type);
  const int64_t most = std::max<int64_t>(1, pixels / (8 * stage));
  split.large_tile = split.hopper || uses_large_tile(rows, columns, most, args.type, args.math, args.multiprocessors);
  const int64_t tile_rows = split.large_tile ? LargeTile::kRows : SmallTile::kRows;
  const int64_t tile_columns = split.hopper ? 256 : split.large_tile ? LargeTile::kColumns : SmallTile::kColumns;
  const int64_t tiles = divide_up(rows, tile_rows) * divide_up(columns, tile_columns);
  const int64_t wanted = split.hopper ? args.multiprocessors / tiles : divide_up(int64_t{args.multiprocessors} * 2, tiles);
  const int64_t splits = std::clamp<int64_t>(wanted, 1, std::min<int64_t>(most, 1024));
  split.pixels_per_split = divide_up(divide_up(pixels, splits), stage) * stage;
  split.splits = divide_up(pixels, split.pixels_per_split);
  return split;
}

#if defined(FASTGAN_HOPPER)
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
    return cudaOccupancyMaxActiveClusters(&clusters, kKernel, &config) == cudaSuccess ? clusters * kClusterSize : 0;
  }();
  return most;
}

uint64_t size(int64_t value) { return static_cast<uint64_t>(value); }

cudaError_t map_windows(CUtensorMap& map, DataType type, const WindowOperand& operand, int64_t batch, const PixelBox& box, int step) {
  return make_box_map(
      map, type, operand.x, {size(operand.channels), size(operand.width), size(operand.height), size(batch)},
      {kBoxChannels, static_cast<uint32_t>(box.width), static_cast<uint32_t>(box.height), static_cast<uint32_t>(box.images)},
      static_cast<uint32_t>(step));
}

template <typename M, int kColumns, int kStages, int kBlocks, typename Cluster>
cudaError_t start_gather_box(GatherBoxParams& params, const Conv4x4Args& args, const Product& product, dim3 grid, cudaStream_t stream) {
  const PixelBox box(kHopperRows / Cluster::kColumns, product.grid_height, product.grid_width);
  const GatherParams& gather = params.gather;
  const int step = args.direction == Conv4x4Direction::down ? args.geometry.stride : 1;
  cudaError_t error = map_windows(params.windows, args.type, gather.input, args.geometry.batch, box, step);
  if (error != cudaSuccess) return error;
  error = make_box_map(params.weights, args.type, args.packed_weight,
                       {size(gather.depth_padded), size(product.phases * product.columns), 1, 1},
                       {kBoxChannels, kColumns / Cluster::kRows, 1, 1}, 1);
  if (error != cudaSuccess) return error;
  return launch(gather_box_kernel<M, kColumns, kStages, kBlocks, Cluster>, grid, 256,
                GatherPipeline<kColumns, kStages, Cluster>::shared_bytes(), stream, params);
}

// One block a multiprocessor gets all of its shared memory as stages; where there are more blocks, two live together.
template <typename M, int kColumns, typename Cluster>
cudaError_t choose_gather_stages(GatherBoxParams& params, const Conv4x4Args& args, const Product& product, dim3 grid, cudaStream_t stream) {
  if constexpr (kColumns == 256) {
    return start_gather_box<M, 256, 4, 1, Cluster>(params, args, product, grid, stream);
  } else {
    constexpr int kDeep = kColumns == 64 ? 8 : 6, kShallow = kDeep / 2;
    const int64_t at_once = blocks_at_once<gather_box_kernel<M, kColumns, kDeep, 1, Cluster>, Cluster::kSize,
                                           GatherPipeline<kColumns, kDeep, Cluster>::shared_bytes()>();
    return int64_t{grid.x} * grid.z <= at_once ? start_gather_box<M, kColumns, kDeep, 1, Cluster>(params, args, product, grid, stream)
                 : start_gather_box<M, kColumns, kShallow, 2, Cluster>(params, args, product, grid, stream);
  }
}

template <typename M, int kColumns>
cudaError_t launch_gather_box(GatherBoxParams& params, const Conv4x4Args& args, const Product& product, dim3 grid, cudaStream_t stream) {
  return params.gather.row_tiles % 2 == 0 ? choose_gather_stages<M, kColumns, Cluster<2, 1>>(params, args, product, grid, stream)
                                          : choose_gather_stages<M, kColumns, Cluster<1, 1>>(params, args, product, grid, stream);
}

template <typename M>
cudaError_t launch_weight_gradient_box(const Conv4x4WeightGradientArgs& args, const WeightGradientParams& gradient, dim3 grid,
                                       cudaStream_t stream) {
  const Conv4x4Geometry& g = args.geometry;
  WeightBoxParams params;
  params.gradient = gradient;
  cudaError_t error = make_box_map(params.small, args.type, args.small, {size(g.small_channels), size(gradient.pixels), 1, 1},
                                   {64, kStagePixels, 1, 1}, 1);
  if (error != cudaSuccess) return error;
  error = map_windows(params.large, args.type, gradient.large, g.batch, PixelBox(kStagePixels, g.small_height, g.small_width), g.stride);
  if (error != cudaSuccess) return error;
  using Pair = Cluster<1, 2>;
  return launch(weight_gradient_box_kernel<M, 4, Pair>, grid, 256, WeightPipeline<4, Pair>::shared_bytes(), stream, params);
}
#endif


// One partial result in the gradient's own order and type is the gradient.
bool partial_is_gradient(const Conv4x4WeightGradientArgs& args, const Split& split) {
  return !split.thin && split.splits == 1 && args.weight_type == DataType::float32 &&
         args.weight_layout == Conv4x4WeightLayout::channels_last;
}

bool indices_fit(const Conv4x4Geometry& g) {
  const int64_t pixels = g.batch * (g.large_height + 1) * (g.large_width + 1);
  return pixels < kMaxIndex - 128 && kTaps * g.large_channels < kMaxIndex - 256 &&
         4 * g.small_channels < kMaxIndex - 256;
}

}  // namespace

bool conv4x4s2_weight_gradient_supported(const Conv4x4Geometry& g) {
  return g.batch >= 1 && g.small_channels >= 1 && g.large_channels >= 1 &&
         grid_matches(g.small_height, g.large_height, g.stride) &&
         grid_matches(g.small_width, g.large_width, g.stride) && indices_fit(g);
}

bool conv4x4s2_supported(const Conv4x4Geometry& g, Conv4x4Direction direction) {
  const bool from_larger_grid = g.stride == 1 && (g.small_height != 1 || g.small_width != 1);
  return conv4x4s2_weight_gradient_supported(g) && !(direction == Conv4x4Direction::up && from_larger_grid);
}

size_t conv4x4s2_packed_bytes(const Conv4x4PackArgs& args) {
  const Product product = product_of(args.geometry, args.direction, args.type);
  return static_cast<size_t>(product.phases * product.columns * padded_depth(product, args.type) * size_of(args.type));
}

cudaError_t conv4x4s2_pack_launch(const Conv4x4PackArgs* args, int count, cudaStream_t stream) {
  for (; count > 0; args += kMostPackLayers, count -= kMostPackLayers) {
    PackParams params{};
    int64_t blocks = 0;
    for (int i = 0; i < std::min(count, kMostPackLayers); ++i) {
      const Conv4x4Geometry& g = args[i].geometry;
      if (args[i].type != args->type || args[i].math != args->math || args[i].weight_type != args->weight_type ||
          g.small_channels * g.large_channels >= kMaxIndex / kTaps) {
        return cudaErrorInvalidValue;
      }
      const Product product = product_of(g, args[i].direction, args[i].type);
      params.layers[i] = make_pack_layer(args[i], padded_depth(product, args[i].type), product.paired);
      blocks += params.layers[i].blocks;
    }
    const dim3 grid(static_cast<unsigned>(blocks));
    const cudaError_t error = dispatch_math(args->type, args->math, [&](auto math) {
      using M = decltype(math);
      if (args->weight_type == DataType::float32) {
        return launch(pack_kernel<float, M>, grid, kPackThreads, 0, stream, params);
      }
      if (args->weight_type != args->type) return cudaErrorInvalidValue;
      return launch(pack_kernel<typename M::Type, M>, grid, kPackThreads, 0, stream, params);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

StatisticsTiles conv4x4s2_statistics_shape(const Conv4x4Args& args) {
  StatisticsTiles tiles;
  if (is_thin_down(args)) {
    tiles.tiles = thin_down_blocks(args);
    return tiles;
  }
  const Product product = product_of(args.geometry, args.direction, args.type);
  const bool pairs = product.paired && hopper_gather_columns(args, product) != 0;
  const int64_t row_tiles = divide_up(product.rows, tile_rows(args, product));
  tiles.rows_per_count = product.from_pixel ? kTaps : pairs ? 2 : 1;
  tiles.tiles = product.phases * row_tiles * (product.from_pixel ? kTaps : 1);
  return tiles;
}

cudaError_t conv4x4s2_launch(const Conv4x4Args& args, cudaStream_t stream) {
  const Conv4x4Geometry& g = args.geometry;
  if (!conv4x4s2_supported(g, args.direction)) return cudaErrorInvalidValue;
  if (is_thin_down(args)) return thin_down_launch(args, stream);
  if (is_thin_up(args)) return thin_up_launch(args, stream);
  const bool down = args.direction == Conv4x4Direction::down;
  const Product product = product_of(g, args.direction, args.type);
  if (takes_pixel(args)) {
    return dispatch_math(args.type, args.math, [&](auto math) {
      using T = typename decltype(math)::Type;
      if (down) return pixel_down_launch<T>(args, stream);
      return pixel_up_launch<T>(args, padded_depth(product, args.type), tile_rows(args, product), stream);
    });
  }
  GatherParams p{};
  p.input = make_operand(args.input, args.prologue, down ? g.large_height : g.small_height,
                         down ? g.large_width : g.small_width, down ? g.large_channels : g.small_channels,
                         product.log2_taps, args.type);
  p.weight = args.packed_weight;
  p.output = args.output;
  p.epilogue = args.epilogue;
  p.input_image = int64_t{p.input.height} * p.input.width;
  p.rows = product.rows;
  p.columns = static_cast<int>(product.columns);
  p.depth_padded = static_cast<int>(padded_depth(product, args.type));
  p.grid_height = static_cast<int>(product.grid_height), p.grid_width = static_cast<int>(product.grid_width);
  p.grid_size = FastDivisor(product.grid_height * product.grid_width);
  p.grid_width_divisor = FastDivisor(product.grid_width);
  p.window_step = down ? g.stride : 1;
  p.window_origin = g.stride == 2 ? -1 : 0;
  p.output_height = p.output_width = 1;  // from_pixel: the whole picture is one pixel of 16 * channels columns
  p.output_step = p.output_step_w = product.phases == 4 ? 2 : 1;
  if (product.paired) p.paired_channels = static_cast<int>(g.small_channels);
  if (!product.from_pixel) {
    p.output_height = static_cast<int>(down ? g.small_height : g.large_height);
    p.output_width = static_cast<int>(down ? g.small_width : g.large_width);
  }
  p.channels = static_cast<int>(down ? g.small_channels : g.large_channels);
  p.channel_divisor = FastDivisor(p.channels);
  const size_t pair_bytes = static_cast<size_t>(size_of(args.type)) * 2;
  p.paired_output = p.columns % 2 == 0 && reinterpret_cast<uintptr_t>(args.output) % pair_bytes == 0 &&
                    reinterpret_cast<uintptr_t>(args.epilogue.y) % pair_bytes == 0;
  const auto set_tiles = [&](int64_t rows, int64_t columns) {
    p.row_tiles = static_cast<int>(divide_up(product.rows, rows));
    p.column_tiles = static_cast<int>(divide_up(product.columns, columns));
    return dim3(static_cast<unsigned>(p.row_tiles) * static_cast<unsigned>(p.column_tiles), 1,
                static_cast<unsigned>(product.phases));
  };
#if defined(FASTGAN_HOPPER)
  if (const int columns = hopper_gather_columns(args, product)) {
    GatherBoxParams params;
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
    params.gather = p;
    const auto run = [&](auto math) {
      using M = decltype(math);
      if (columns == 256) return launch_gather_box<M, 256>(params, args, boxed, grid, stream);
      return columns == 128 ? launch_gather_box<M, 128>(params, args, boxed, grid, stream)
                            : launch_gather_box<M, 64>(params, args, boxed, grid, stream);
    };
    return args.type == DataType::bfloat16 ? run(Bfloat16Math{}) : run(Float16Math{});
  }
#endif
  const bool direct = args.prologue.kind == Conv4x4Prologue::Kind::none && p.input.aligned;
  return dispatch_math(args.type, args.math, [&](auto math) {
    using M = decltype(math);
    return dispatch_tile<M>(gather_uses_large_tile(args, product), [&](auto tile) {
      using Tile = decltype(tile);
      const dim3 grid = set_tiles(Tile::kRows, Tile::kColumns);
      return launch(direct ? gather_kernel<M, Tile, true> : gather_kernel<M, Tile, false>, grid, Tile::kThreads,
                    gather_shared_bytes<Tile>(), stream, p);
    });
  });
}

size_t conv4x4s2_weight_gradient_workspace_bytes(const Conv4x4WeightGradientArgs& args) {
  const Conv4x4Geometry& g = args.geometry;
  const Split split = split_of(args);
  if (takes_pixel(args) || partial_is_gradient(args, split)) return 0;
  return static_cast<size_t>(split.splits * g.small_channels * kTaps * g.large_channels) * sizeof(float);
}

cudaError_t conv4x4s2_weight_gradient_launch(const Conv4x4WeightGradientArgs& args, cudaStream_t stream) {
  const Conv4x4Geometry& g = args.geometry;
  if (!conv4x4s2_weight_gradient_supported(g)) return cudaErrorInvalidValue;
  if (takes_pixel(args)) {
    return dispatch_math(args.type, args.math, [&](auto math) {
      return pixel_weight_gradient_launch<typename decltype(math)::Type>(args, stream);
    });
  }
  const Split split = split_of(args);
  WeightGradientParams p{};
  p.small =
      make_operand(args.small, args.small_prologue, g.small_height, g.small_width, g.small_channels, 0, args.type);
  p.large =
      make_operand(args.large, args.large_prologue, g.large_height, g.large_width, g.large_channels, 2, args.type);
  p.small_image = g.small_height * g.small_width;
  p.large_image = g.large_height * g.large_width;
  p.pixels = static_cast<int>(g.batch * p.small_image);
  p.pixels_per_split = static_cast<int>(split.pixels_per_split);
  p.grid_size = FastDivisor(p.small_image);
  p.grid_width_divisor = FastDivisor(g.small_width);
  p.grid_width = static_cast<int>(g.small_width);
  p.window_step = g.stride;
  p.window_origin = g.stride == 2 ? -1 : 0;
  const bool in_place = partial_is_gradient(args, split);
  p.partial = static_cast<float*>(in_place ? args.grad_weight : args.workspace);
  const auto set_tiles = [&](int64_t rows, int64_t columns) {
    p.row_tiles = static_cast<int>(divide_up(p.small.columns, rows));
    p.column_tiles = static_cast<int>(divide_up(p.large.columns, columns));
    return dim3(static_cast<unsigned>(p.row_tiles * p.column_tiles), 1, static_cast<unsigned>(split.splits));
  };
  const auto run = [&](auto math) {
    using M = decltype(math);
    if (split.thin) return thin_weight_gradient_launch(args, stream);
#if defined(FASTGAN_HOPPER)
    if constexpr (sizeof(typename M::Type) == 2) {
      if (split.hopper) {
        return launch_weight_gradient_box<M>(args, p, set_tiles(WeightTile::kRows, WeightTile::kColumns), stream);
      }
    }
#endif
    return dispatch_tile<M>(split.large_tile, [&](auto tile) {
      using Tile = decltype(tile);
      return launch(weight_gradient_kernel<M, Tile>, set_tiles(Tile::kRows, Tile::kColumns), Tile::kThreads,
                    weight_gradient_shared_bytes<M, Tile>(), stream, p);
    });
  };
  const cudaError_t error = dispatch_math(args.type, args.math, run);
  if (error != cudaSuccess || in_place) return error;
  const WeightReduceParams reduce =
      weight_reduce_params(g, p.partial, split.splits, args.weight_layout, args.weight_type, args.grad_weight);
  const dim3 grid(static_cast<unsigned>(divide_up(reduce.elements / 4 * reduce.lanes, kReduceThreads)));
  switch (args.weight_type) {
    case DataType::float32: return launch(weight_reduce_kernel<float>, grid, kReduceThreads, kReduceSharedBytes, stream, reduce);
    case DataType::bfloat16: return launch(weight_reduce_kernel<BFloat16>, grid, kReduceThreads, kReduceSharedBytes, stream, reduce);
    case DataType::float16: return launch(weight_reduce_kernel<Half>, grid, kReduceThreads, kReduceSharedBytes, stream, reduce);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastgan::cuda
