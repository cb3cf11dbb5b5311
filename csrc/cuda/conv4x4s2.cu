// Launches of the 4x4 convolutions: geometry to kernel parameters, choice of tile and split, packing of weights.
//
// Not run on a GPU yet, so no variant has been measured. Tiles are chosen by occupancy alone: 128x128 where that fills
// the multiprocessors, else 64x64.
#include "conv4x4s2.h"

#include <algorithm>

#include "conv4x4s2_gather.cuh"
#include "conv4x4s2_thin.cuh"
#include "conv4x4s2_weight.cuh"
#include "conv4x4s2_wgmma.cuh"

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
};

Product product_of(const Conv4x4Geometry& g, Conv4x4Direction direction) {
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
  return p;
}

int64_t padded_depth(const Product& product, DataType type) {
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

// Whether this build has code for Hopper's warpgroup products, and the current device runs it.
bool has_warpgroup_products() {
#if defined(FASTGAN_WGMMA)
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
#else
  return false;
#endif
}

constexpr int kWarpgroupRows = 128;
#ifndef FASTGAN_STAGES
#define FASTGAN_STAGES 5
#define FASTGAN_STAGES64 6
#endif

bool is_whole_blocks(int64_t channels) { return channels % 64 == 0; }

// Columns of a warpgroup's tile, 0 where the loops do not take it: 128, or 64 where that gives blocks to multiprocessors without any.
int gather_warpgroup_columns(const Conv4x4Args& args, const Product& product) {
  const bool down = args.direction == Conv4x4Direction::down;
  const int64_t channels = down ? args.geometry.large_channels : args.geometry.small_channels;
  if (args.type == DataType::float32 || args.prologue.kind != Conv4x4Prologue::Kind::none || !is_whole_blocks(channels) ||
      product.columns <= 32 || product.rows <= SmallTile::kRows || !is_aligned16(args.input) || !has_warpgroup_products()) {
    return 0;
  }
  const int64_t blocks = divide_up(product.rows, kWarpgroupRows) * divide_up(product.columns, 128) * product.phases;
  return product.columns <= 64 || blocks * 2 <= args.multiprocessors ? 64 : 128;
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

struct PackParams {
  const void* weight;
  WeightStrides strides;
  void* packed;
  int64_t small_channels, large_channels;
  int64_t columns, depth_padded;
  bool up, from_pixel;
};

constexpr int kPackThreads = 128;

// One thread a pair of channels; neighbouring threads write neighbouring elements.
template <typename W, typename Math>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(PackParams p) {
  using T = typename Math::Type;
  const int64_t pair = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  if (pair >= p.small_channels * p.large_channels) return;
  const int64_t inner = p.up ? p.small_channels : p.large_channels;
  const int64_t outer_index = pair / inner, inner_index = pair - outer_index * inner;
  const int64_t k = p.up ? inner_index : outer_index, c = p.up ? outer_index : inner_index;
  const W* taps = static_cast<const W*>(p.weight) + k * kTaps * p.large_channels + c * p.strides.channel;
  T* packed = static_cast<T*>(p.packed);
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    float value = to_float(taps[tap * p.strides.tap]);
    if constexpr (Math::kTf32) value = round_to_tf32(value);
    int64_t index;
    if (!p.up) {
      index = k * p.depth_padded + tap * p.large_channels + c;
    } else if (p.from_pixel) {
      index = (tap * p.large_channels + c) * p.depth_padded + k;
    } else {
      // Kernel row r meets output rows of parity (r + 1) % 2, of which it is tap (3 - r) / 2; columns alike.
      const int r = tap / 4, s = tap % 4;
      const int phase = (r + 1) % 2 * 2 + (s + 1) % 2, phase_tap = (3 - r) / 2 * 2 + (3 - s) / 2;
      index = (phase * p.columns + c) * p.depth_padded + phase_tap * p.small_channels + k;
    }
    from_float(value, packed[index]);
  }
}

struct Split {
  int64_t splits, pixels_per_split;
  bool large_tile, warpgroups, thin;
};

bool weight_gradient_uses_warpgroups(const Conv4x4WeightGradientArgs& args) {
  const Conv4x4Geometry& g = args.geometry;
  constexpr auto kNone = Conv4x4Prologue::Kind::none;
  return args.type != DataType::float32 && args.small_prologue.kind == kNone && args.large_prologue.kind == kNone &&
         g.small_channels > 64 && is_whole_blocks(g.small_channels) && is_whole_blocks(g.large_channels) &&
         is_aligned16(args.small) && is_aligned16(args.large) && has_warpgroup_products();
}

// Enough blocks for two on every multiprocessor (of warpgroups: for one), but no split shorter than eight stages.
Split split_of(const Conv4x4WeightGradientArgs& args) {
  const Conv4x4Geometry& g = args.geometry;
  const int64_t rows = g.small_channels, columns = kTaps * g.large_channels;
  Split split{};
  split.thin = is_thin_weight_gradient(args);
  if (split.thin) {
    split.splits = thin_weight_gradient_blocks(args);
    return split;
  }
  split.warpgroups = weight_gradient_uses_warpgroups(args);
  const int64_t pixels = g.batch * g.small_height * g.small_width;
  const int64_t stage = split.warpgroups ? 64 : kDepthBytes / size_of(args.type);
  const int64_t most = std::max<int64_t>(1, pixels / (8 * stage));
  split.large_tile = split.warpgroups || uses_large_tile(rows, columns, most, args.type, args.math, args.multiprocessors);
  const int64_t tile_rows = split.large_tile ? LargeTile::kRows : SmallTile::kRows;
  const int64_t tile_columns = split.large_tile ? LargeTile::kColumns : SmallTile::kColumns;
  const int64_t tiles = divide_up(rows, tile_rows) * divide_up(columns, tile_columns);
  const int64_t wanted = split.warpgroups ? args.multiprocessors / tiles : divide_up(int64_t{args.multiprocessors} * 2, tiles);
  const int64_t splits = std::clamp<int64_t>(wanted, 1, std::min<int64_t>(most, 1024));
  split.pixels_per_split = divide_up(divide_up(pixels, splits), stage) * stage;
  split.splits = divide_up(pixels, split.pixels_per_split);
  return split;
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
  const Product product = product_of(args.geometry, args.direction);
  return static_cast<size_t>(product.phases * product.columns * padded_depth(product, args.type) * size_of(args.type));
}

cudaError_t conv4x4s2_pack_launch(const Conv4x4PackArgs& args, cudaStream_t stream) {
  const Product product = product_of(args.geometry, args.direction);
  const WeightStrides strides(args.weight_layout, args.geometry.large_channels);
  const PackParams params{args.weight,
                          strides,
                          args.packed,
                          args.geometry.small_channels,
                          args.geometry.large_channels,
                          product.columns,
                          padded_depth(product, args.type),
                          args.direction == Conv4x4Direction::up,
                          product.from_pixel};
  if (params.depth_padded != product.depth) {
    const cudaError_t error = clear_async(args.packed, conv4x4s2_packed_bytes(args), stream);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(divide_up(params.small_channels * params.large_channels, kPackThreads)));
  return dispatch_math(args.type, args.math, [&](auto math) {
    using M = decltype(math);
    if (args.weight_type == DataType::float32) {
      return launch(pack_kernel<float, M>, grid, kPackThreads, 0, stream, params);
    }
    if (args.weight_type != args.type) return cudaErrorInvalidValue;
    return launch(pack_kernel<typename M::Type, M>, grid, kPackThreads, 0, stream, params);
  });
}

StatisticsTiles conv4x4s2_statistics_shape(const Conv4x4Args& args) {
  StatisticsTiles tiles;
  if (is_thin_down(args)) {
    tiles.tiles = thin_down_blocks(args);
    return tiles;
  }
  const Product product = product_of(args.geometry, args.direction);
  const bool large = gather_warpgroup_columns(args, product) != 0 || gather_uses_large_tile(args, product);
  const int64_t tile_rows = large ? LargeTile::kRows : SmallTile::kRows;
  tiles.rows_per_count = product.from_pixel ? kTaps : 1;
  tiles.tiles = product.phases * divide_up(product.rows, tile_rows) * tiles.rows_per_count;
  return tiles;
}

cudaError_t conv4x4s2_launch(const Conv4x4Args& args, cudaStream_t stream) {
  const Conv4x4Geometry& g = args.geometry;
  if (!conv4x4s2_supported(g, args.direction)) return cudaErrorInvalidValue;
  if (is_thin_down(args)) return thin_down_launch(args, stream);
  if (is_thin_up(args)) return thin_up_launch(args, stream);
  const bool down = args.direction == Conv4x4Direction::down;
  const Product product = product_of(g, args.direction);
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
  p.output_step = product.phases == 4 ? 2 : 1;
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
#if defined(FASTGAN_WGMMA)
  if (const int columns = gather_warpgroup_columns(args, product)) {
    const dim3 grid = set_tiles(kWarpgroupRows, columns);
    const auto run = [&](auto math) {
      using M = decltype(math);
      if (columns == 64) {
        return launch(gather_warpgroup_kernel<M, 64, FASTGAN_STAGES64>, grid, 256, warpgroup_shared_bytes<64, FASTGAN_STAGES64>(), stream, p);
      }
      return launch(gather_warpgroup_kernel<M, 128, FASTGAN_STAGES>, grid, 256, warpgroup_shared_bytes<128, FASTGAN_STAGES>(), stream, p);
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
  return static_cast<size_t>(split_of(args).splits * g.small_channels * kTaps * g.large_channels) * sizeof(float);
}

cudaError_t conv4x4s2_weight_gradient_launch(const Conv4x4WeightGradientArgs& args, cudaStream_t stream) {
  const Conv4x4Geometry& g = args.geometry;
  if (!conv4x4s2_weight_gradient_supported(g)) return cudaErrorInvalidValue;
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
  p.partial = static_cast<float*>(args.workspace);
  const auto set_tiles = [&](int64_t rows, int64_t columns) {
    p.row_tiles = static_cast<int>(divide_up(p.small.columns, rows));
    p.column_tiles = static_cast<int>(divide_up(p.large.columns, columns));
    return dim3(static_cast<unsigned>(p.row_tiles * p.column_tiles), 1, static_cast<unsigned>(split.splits));
  };
  const auto run = [&](auto math) {
    using M = decltype(math);
    if (split.thin) return thin_weight_gradient_launch(args, stream);
#if defined(FASTGAN_WGMMA)
    if constexpr (sizeof(typename M::Type) == 2) {
      if (split.warpgroups) {
        return launch(weight_gradient_warpgroup_kernel<M, 128, FASTGAN_STAGES>, set_tiles(kWarpgroupRows, 128), 256,
                      warpgroup_shared_bytes<128, FASTGAN_STAGES>(), stream, p);
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
  if (error != cudaSuccess) return error;
  const WeightReduceParams reduce{p.partial,        static_cast<int>(split.splits),
                                  g.small_channels, g.large_channels,
                                  args.grad_weight, WeightStrides(args.weight_layout, g.large_channels)};
  const dim3 grid(static_cast<unsigned>(divide_up(g.small_channels * g.large_channels, kReduceThreads)));
  switch (args.weight_type) {
    case DataType::float32: return launch(weight_reduce_kernel<float>, grid, kReduceThreads, 0, stream, reduce);
    case DataType::bfloat16: return launch(weight_reduce_kernel<BFloat16>, grid, kReduceThreads, 0, stream, reduce);
    case DataType::float16: return launch(weight_reduce_kernel<Half>, grid, kReduceThreads, 0, stream, reduce);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastgan::cuda
