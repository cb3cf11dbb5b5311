// Launches of the 4x4 convolutions: geometry to kernel parameters, choice of tile and split, packing of weights.
//
// On Hopper 16-bit numbers run the loops of conv4x4s2_hopper.cuh wherever those take them; elsewhere tiles are chosen by occupancy alone,
// 128x128 where that fills the multiprocessors, else 64x64, which no measurement stands behind.
#include "conv4x4s2.h"

#include <algorithm>

#include "conv4x4s2_dense.cuh"
#include "conv4x4s2_gather.cuh"
#include "conv4x4s2_hopper_launch.cuh"
#include "conv4x4s2_pack.cuh"
#include "conv4x4s2_pixel.cuh"
#include "conv4x4s2_product.cuh"
#include "conv4x4s2_thin.cuh"
#include "conv4x4s2_thin_tf32.cuh"
#include "conv4x4s2_weight.cuh"

namespace fastgan::cuda {
namespace {

constexpr int64_t kMaxIndex = int64_t{1} << 31;  // rows and columns are 32-bit, offsets 64-bit

bool grid_matches(int64_t small, int64_t large, int stride) {
  return stride == 2 ? small >= 1 && (large == 2 * small || large == 2 * small + 1)
                     : stride == 1 && small >= 1 && large == small + 3;
}

bool uses_large_tile(int64_t rows, int64_t columns, int64_t repeats, DataType type, int multiprocessors) {
  if (type == DataType::float32) return false;
  if (columns <= SmallTile::kColumns || rows <= SmallTile::kRows) return false;
  return divide_up(rows, LargeTile::kRows) * divide_up(columns, LargeTile::kColumns) * repeats >= multiprocessors;
}

bool gather_uses_large_tile(const Conv4x4Args& args, const Product& product) {
  return uses_large_tile(product.rows, product.columns, product.phases, args.type, args.multiprocessors);
}

// Rows of a tile of sums, whichever kernel writes it.
int64_t tile_rows(const Conv4x4Args& args, const Product& product) {
  const bool large = hopper_gather_columns(args, product) != 0 || gather_uses_large_tile(args, product);
  return large ? LargeTile::kRows : SmallTile::kRows;
}

WindowOperand make_operand(const void* x, int64_t height, int64_t width, int64_t channels, int log2_taps,
                           DataType type) {
  WindowOperand o{};
  o.x = x;
  o.height = static_cast<int>(height), o.width = static_cast<int>(width), o.channels = static_cast<int>(channels);
  o.channel_divisor = FastDivisor(channels);
  o.log2_taps = log2_taps;
  o.columns = static_cast<int>(channels << (2 * log2_taps));
  o.aligned = channels % (16 / size_of(type)) == 0 && is_aligned16(x);
  o.halves = !o.aligned && channels * size_of(type) % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 8 == 0;
  return o;
}

// Calls f(Math{}) for the arithmetic of a storage type in the loops that take any layer.
template <typename F>
cudaError_t dispatch_math(DataType type, const F& f) {
  switch (type) {
    case DataType::bfloat16: return f(Bfloat16Math{});
    case DataType::float16: return f(Float16Math{});
#if defined(FASTGAN_CUDA_HOST)
    case DataType::float32: return host::float32_in_every_loop ? f(Float32Math{}) : cudaErrorInvalidValue;
#endif
    default: return cudaErrorInvalidValue;
  }
}

// Calls f(Tile{}); float32 has the small tile only.
template <typename Math, typename F>
cudaError_t dispatch_tile(bool large, const F& f) {
  if constexpr (Math::kTensorCore) {
    if (large) return f(LargeTile{});
  }
  return f(SmallTile{});
}

struct Split {
  int64_t splits, pixels_per_split;
  bool large_tile, hopper, thin, tf32_thin, dense;
};

// Enough blocks for two on every multiprocessor (Hopper's loop: for one), but no split shorter than eight stages.
Split split_of(const Conv4x4WeightGradientArgs& args) {
  const Conv4x4Geometry& g = args.geometry;
  const int64_t rows = g.small_channels, columns = kTaps * g.large_channels;
  Split split{};
  split.thin = is_thin_weight_gradient(args);
  split.tf32_thin = takes_tf32_thin(args);
  if (split.thin || split.tf32_thin) {
    split.splits = split.thin ? thin_weight_gradient_blocks(args) : tf32_weight_gradient_blocks(args);
    return split;
  }
  split.hopper = hopper_takes_weight_gradient(args);
  split.dense = !split.hopper && takes_dense(args);
  if (split.dense) {
    split.pixels_per_split = dense_images_per_split(args);
    split.splits = divide_up(g.batch, split.pixels_per_split);
    return split;
  }
  const int64_t pixels = g.batch * g.small_height * g.small_width;
  const int64_t stage = split.hopper ? 64 : kDepthBytes / size_of(args.type);
  const int64_t most = std::max<int64_t>(1, pixels / (8 * stage));
  split.large_tile = split.hopper || uses_large_tile(rows, columns, most, args.type, args.multiprocessors);
  const int64_t tile_rows = split.large_tile ? LargeTile::kRows : SmallTile::kRows;
  const int64_t tile_columns = split.hopper ? 256 : split.large_tile ? LargeTile::kColumns : SmallTile::kColumns;
  const int64_t tiles = divide_up(rows, tile_rows) * divide_up(columns, tile_columns);
  const int64_t wanted = split.hopper ? args.multiprocessors / tiles : divide_up(int64_t{args.multiprocessors} * 2, tiles);
  const int64_t splits = std::clamp<int64_t>(wanted, 1, std::min<int64_t>(most, 1024));
  split.pixels_per_split = divide_up(divide_up(pixels, splits), stage) * stage;
  split.splits = divide_up(pixels, split.pixels_per_split);
  return split;
}

// One partial result in the gradient's own order and type is the gradient.
bool partial_is_gradient(const Conv4x4WeightGradientArgs& args, const Split& split) {
  if (split.dense) return split.splits == 1;
  return !split.thin && !split.tf32_thin && split.splits == 1 && args.weight_type == DataType::float32 &&
         args.weight_layout == Conv4x4WeightLayout::channels_last;
}

bool indices_fit(const Conv4x4Geometry& g) {
  const int64_t pixels = g.batch * (g.large_height + 1) * (g.large_width + 1);
  return pixels < kMaxIndex - 128 && kTaps * g.large_channels < kMaxIndex - 256 &&
         4 * g.small_channels < kMaxIndex - 256;
}

}  // namespace

bool conv4x4s2_takes(DataType type) {
  return dispatch_math(type, [](auto) { return cudaSuccess; }) == cudaSuccess;
}

bool conv4x4s2_takes(const Conv4x4Args& args) {
  if (!conv4x4s2_supported(args.geometry, args.direction)) return false;
  return conv4x4s2_takes(args.type) || takes_pixel(args) || takes_tf32_thin(args) ||
         hopper_gather_columns(args, product_of(args.geometry, args.direction, args.type)) != 0;
}

bool conv4x4s2_takes(const Conv4x4WeightGradientArgs& args) {
  return conv4x4s2_weight_gradient_supported(args.geometry) &&
         (conv4x4s2_takes(args.type) || takes_pixel(args) || takes_tf32_thin(args));
}

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

bool conv4x4s2_is_packed(const Conv4x4PackArgs& args) {
  return args.direction == Conv4x4Direction::down && args.weight_layout == Conv4x4WeightLayout::channels_last &&
         args.weight_type == args.type && is_aligned16(args.weight);
}

cudaError_t conv4x4s2_pack_launch(const Conv4x4PackArgs* args, int count, cudaStream_t stream) {
  for (; count > 0; args += kMostPackLayers, count -= kMostPackLayers) {
    PackParams params{};
    int64_t blocks = 0;
    for (int i = 0; i < std::min(count, kMostPackLayers); ++i) {
      const Conv4x4Geometry& g = args[i].geometry;
      if (args[i].type != args->type || args[i].weight_type != args->weight_type ||
          g.small_channels * g.large_channels >= kMaxIndex / kTaps) {
        return cudaErrorInvalidValue;
      }
      const Product product = product_of(g, args[i].direction, args[i].type);
      params.layers[i] = make_pack_layer(args[i], padded_depth(product, args[i].type), product.paired);
      blocks += params.layers[i].blocks;
    }
    const dim3 grid(static_cast<unsigned>(blocks));
    const cudaError_t error = dispatch_type(args->type, [&](auto zero) {
      using T = decltype(zero);
      if (args->weight_type == DataType::float32) {
        return launch(pack_kernel<float, T>, grid, kPackThreads, 0, stream, params);
      }
      if (args->weight_type != args->type) return cudaErrorInvalidValue;
      return launch(pack_kernel<T, T>, grid, kPackThreads, 0, stream, params);
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
  if (takes_tf32_thin(args)) {
    return down ? tf32_down_launch(args, stream) : tf32_up_launch(args, padded_depth(product, args.type), stream);
  }
  if (takes_pixel(args)) {
    return dispatch_type(args.type, [&](auto zero) {
      using T = decltype(zero);
      if (down) return pixel_down_launch<T>(args, stream);
      return pixel_up_launch<T>(args, padded_depth(product, args.type), tile_rows(args, product), stream);
    });
  }
  const int hopper_columns = hopper_gather_columns(args, product);
  if (hopper_columns == 0 && takes_dense(args)) {
    return dispatch_math(args.type, [&](auto math) {
      using M = decltype(math);
      return dispatch_tile<M>(gather_uses_large_tile(args, product), [&](auto tile) -> cudaError_t {
        if constexpr (M::kTensorCore) return dense_up_launch<M, decltype(tile)>(args, product, stream);
        return cudaErrorInvalidValue;
      });
    });
  }
  GatherParams p{};
  p.input = make_operand(args.input, down ? g.large_height : g.small_height,
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
  if (hopper_columns != 0) return hopper_gather_launch(args, product, p, hopper_columns, stream);
  return dispatch_math(args.type, [&](auto math) {
    using M = decltype(math);
    return dispatch_tile<M>(gather_uses_large_tile(args, product), [&](auto tile) {
      using Tile = decltype(tile);
      const dim3 grid = set_tiles(Tile::kRows, Tile::kColumns);
      return launch(p.input.aligned ? gather_kernel<M, Tile, true> : gather_kernel<M, Tile, false>, grid, Tile::kThreads,
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
    return dispatch_type(args.type, [&](auto zero) { return pixel_weight_gradient_launch<decltype(zero)>(args, stream); });
  }
  const Split split = split_of(args);
  WeightGradientParams p{};
  p.small = make_operand(args.small, g.small_height, g.small_width, g.small_channels, 0, args.type);
  p.large = make_operand(args.large, g.large_height, g.large_width, g.large_channels, 2, args.type);
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
    if (split.hopper) return hopper_weight_gradient_launch(args, p, set_tiles(kHopperRows, 256), stream);
    if constexpr (M::kTensorCore) {
      if (split.dense) return dense_weight_gradient_launch<M>(args, split.pixels_per_split, stream);
    }
    return dispatch_tile<M>(split.large_tile, [&](auto tile) {
      using Tile = decltype(tile);
      return launch(weight_gradient_kernel<M, Tile>, set_tiles(Tile::kRows, Tile::kColumns), Tile::kThreads,
                    weight_gradient_shared_bytes<M, Tile>(), stream, p);
    });
  };
  const cudaError_t error = split.tf32_thin ? tf32_weight_gradient_launch(args, stream) : dispatch_math(args.type, run);
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
