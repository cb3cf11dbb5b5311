// Instruction sets: avx512_bf16 amx
//
// The loops of conv4x4s2.h for bfloat16 images of 1 to 4 channels: direct products of patches (conv4x4s2_image.h), in tiles. On
// AMX the products are a small part; most of the time goes to patches and epilogues. Without it `down` takes the patches' rows from
// where the image's rows are staged.
#include "conv4x4s2_bf16_tiles.h"
#include "conv4x4s2_image.h"
#include "conv4x4s2_kernel.h"
#include "scalar_math.h"

namespace fastgan::cpu::FASTGAN_ISA {

namespace {

constexpr int64_t kBlock = 32;            // pixels multiplied at once, and columns
constexpr int64_t kUpFloats = 49152;      // products a task of up holds before it adds them up
constexpr int64_t kGradientPixels = 512;  // pixels multiplied at a time for the weight gradient
constexpr int64_t kGradientTasks = 16;    // the batch is split into up to this many sums
constexpr int64_t kPatchTiles = kPatch / kTileRows;

#if defined(__AMX_BF16__)

// result[pixels][columns] = left[pixels][depth] times packed [columns / 32][depth / 32][2 tiles]; columns and depth are multiples
// of 32, and there is memory for as many pixels.
void multiply_pixels(const bfloat16* left, const bfloat16* packed, int64_t pixels, int64_t columns, int64_t depth, float* result) {
  const int64_t steps = depth / kTileDepth;
  ProductBlock block;
  for (int64_t p = 0; p < pixels; p += kBlock)
    for (int64_t k = 0; k < columns; k += kBlock) {
      float* sums = result + p * columns + k;
      block.begin(sums, kTileRows * columns, columns, false);
      block.add<true>({left + p * depth, kTileRows * depth, kTileDepth, depth}, {packed + k * depth, kTile, 2 * kTile}, steps);
      block.end<true>(sums, kTileRows * columns, columns);
    }
}

#else

// kPixels pixels at a time, the last of which are multiplied again where they leave fewer, for kVectors vectors of columns.
template <int kVectors, int kPixels>
void multiply_vectors(const bfloat16* left, const bfloat16* packed, int64_t pixels, int64_t columns, int64_t depth, float* result) {
  for (int64_t at = 0; at < pixels; at += kPixels) {
    const int64_t first = max64(0, min64(at, pixels - kPixels));
    __m512 sums[kPixels][kVectors] = {};
    for (int64_t d = 0; d < depth; d += 2) {
      const bfloat16* tiles = packed + d / kTileDepth * 2 * kTile + d % kTileDepth * kTileRows;
      __m512bh right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) __builtin_memcpy(&right[v], tiles + v / 2 * kBlock * depth + v % 2 * kTile, sizeof right[v]);
      add_pair(sums, left + first * depth + d, depth, right);
    }
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(result + (first + p) * columns + v * kLanes, sums[p][v]);
  }
}

#endif

// ---- down

#if defined(__AMX_BF16__)

struct TiledDownPlan : DownStrips {
  int64_t columns;  // small channels rounded up to whole blocks
  int64_t depth, pixels;
  int64_t parameters, rows;  // elements
  explicit TiledDownPlan(const Conv4x4s2Shape& shape) : DownStrips(shape, round_up(shape.small_channels, kBlock)) {
    columns = round_up(g.small_channels, kBlock);
    depth = kPatch;
    pixels = round_up(strips.rows * g.small_width, kBlock);
    parameters = RowParameters::floats(g);
    rows = (2 * strips.rows + 2) * g.padded_row();
  }
  int64_t slot_bytes() const { return 4 * (pixels * columns + parameters) + 2 * (pixels * depth + rows); }
};

void image_down(const TiledDownPlan& plan, const ConvOperand& large, const bfloat16* packed, const ConvEpilogue& epilogue,
                void* workspace, int threads) {
  const Image& g = plan.g;
  for_each_strip(plan, epilogue, workspace, threads, [&](const OutputBox& box, float* result, const Partial& partial) {
    const RowParameters parameters(large, g, result + plan.pixels * plan.columns);
    bfloat16* patches = reinterpret_cast<bfloat16*>(result + plan.pixels * plan.columns + plan.parameters);
    bfloat16* rows = patches + plan.pixels * kPatch;
    __builtin_memset(static_cast<void*>(patches), 0, static_cast<size_t>(plan.pixels * kPatch) * 2);
    stage_rows<bfloat16>(large, parameters, g, box.n0, 2 * box.y0 - 1, 2 * box.rows + 2, rows);
    for (int64_t i = 0; i < box.rows; ++i)
      copy_patches(g, rows + 2 * i * g.padded_row(), patches + i * g.small_width * kPatch);
    multiply_pixels(patches, packed, box.rows * g.small_width, plan.columns, plan.depth, result);
    finish_box<bfloat16>(epilogue, box, result, {0, plan.columns}, partial);
  });
}

TiledDownPlan down_plan(const Conv4x4s2Shape& shape) { return TiledDownPlan(shape); }

#else

static_assert(kBlock == kPanel);

// Patches of kPixels pixels times a panel's tiles, a pair of elements at a time: `rows` is where the first one's begins in the first
// of its four rows.
template <int kChannels, int kPixels, typename Store>
void multiply_pixels(const bfloat16* rows, int64_t padded_row, const bfloat16* packed, int64_t pixel, const Store& store_output) {
  constexpr int kVectors = Store::kVectors;
  __m512 sums[kPixels][kVectors] = {};
  for (int64_t r = 0; r < 4; ++r)
    for (int64_t pair = 0; pair < 2 * kChannels; ++pair) {
      const int64_t d = 2 * (r * 2 * kChannels + pair);  // of the patch
      const bfloat16* tiles = packed + d / kTileDepth * 2 * kTile + d % kTileDepth * kTileRows;
      __m512bh right[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) __builtin_memcpy(&right[v], tiles + v * kTile, sizeof right[v]);
      add_pair(sums, rows + r * padded_row + 2 * pair, 2 * kChannels, right);
    }
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store_output(pixel + p, v, sums[p][v]);
}

// A row of outputs for a panel of channels.
template <int kChannels, typename Store>
void multiply_row(const Image& g, const bfloat16* rows, const bfloat16* packed, const Store& store_output) {
  const int64_t groups = ceil_div(g.small_width, kMaxRows);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = part_start(g.small_width, group, groups), end = part_start(g.small_width, group + 1, groups);
    const bfloat16* from = rows + first * 2 * kChannels;
    store_output.prefetch(first, end);
    switch (end - first) {
#define FASTGAN_PIXELS(n) \
  case n: multiply_pixels<kChannels, n>(from, g.padded_row(), packed, first, store_output); break;
      FASTGAN_PIXELS(1) FASTGAN_PIXELS(2) FASTGAN_PIXELS(3) FASTGAN_PIXELS(4) FASTGAN_PIXELS(5) FASTGAN_PIXELS(6) FASTGAN_PIXELS(7)
      FASTGAN_PIXELS(8) FASTGAN_PIXELS(9) FASTGAN_PIXELS(10) FASTGAN_PIXELS(11) FASTGAN_PIXELS(12) FASTGAN_PIXELS(13)
      FASTGAN_PIXELS(14)
#undef FASTGAN_PIXELS
    }
  }
}

DownPlan down_plan(const Conv4x4s2Shape& shape) { return {shape, sizeof(bfloat16)}; }

void image_down(const DownPlan& plan, const ConvOperand& large, const bfloat16* packed, const ConvEpilogue& epilogue,
                void* workspace, int threads) {
  const Image& g = plan.g;
  const auto stage = [&](const RowParameters& parameters, int64_t image, int64_t y0, int64_t count, void* memory) {
    stage_rows<bfloat16>(large, parameters, g, image, y0, count, static_cast<bfloat16*>(memory));
  };
  const auto multiply = [&](const void* memory, int64_t i, int64_t panel, const auto& store_output) {
    const bfloat16* rows = static_cast<const bfloat16*>(memory) + 2 * i * g.padded_row();
    with_channels(g, [&](auto channels) { multiply_row<channels.value>(g, rows, packed + panel * kBlock * kPatch, store_output); });
  };
  run_down<bfloat16>(plan, large, epilogue, workspace, threads, stage, multiply);
}

#endif

// ---- up

struct UpPlan {
  Image g;
  int64_t columns;  // a patch rounded up to whole blocks
  Strips strips;
  int64_t depth, pixels;
  int64_t parameters, rows;  // floats
  explicit UpPlan(const Conv4x4s2Shape& shape)
      : g(shape), columns(round_up(g.patch, kBlock)), strips(g, g.small_width * columns, kUpFloats) {
    depth = round_up(g.small_channels, kTileDepth);
    pixels = round_up((strips.rows + 2) * g.small_width, kBlock);
    parameters = RowParameters::floats(g);
    rows = (2 * strips.rows + 1) * g.padded_row();
  }
  int64_t slot_bytes() const { return 4 * (pixels * columns + parameters + rows) + 2 * pixels * depth; }
  int64_t partials_bytes() const {
    return round_up(2 * g.batch * strips.count * g.channels * static_cast<int64_t>(sizeof(float)), ScratchSlots::kAlignment);
  }
  int64_t packed_elements() const { return columns * depth; }
  int64_t first_row(int64_t strip) const { return 2 * strip * strips.rows; }
  int64_t end_row(int64_t strip) const { return strip + 1 == strips.count ? g.height : first_row(strip + 1); }
};

// products[pixels][columns]: what each pixel adds to the patch around it
void multiply_to_patches(const UpPlan& plan, const bfloat16* pixels, const bfloat16* packed, int64_t count, float* products) {
#if defined(__AMX_BF16__)
  multiply_pixels(pixels, packed, count, plan.columns, plan.depth, products);
#else
  // As many pixels as registers hold sums of
  switch (ceil_div(plan.g.patch, kLanes)) {
    case 1: return multiply_vectors<1, 14>(pixels, packed, count, plan.columns, plan.depth, products);
    case 2: return multiply_vectors<2, 14>(pixels, packed, count, plan.columns, plan.depth, products);
    case 3: return multiply_vectors<3, 8>(pixels, packed, count, plan.columns, plan.depth, products);
    default: return multiply_vectors<4, 6>(pixels, packed, count, plan.columns, plan.depth, products);
  }
#endif
}

void image_up(const UpPlan& plan, const ConvOperand& small, const bfloat16* packed, const ConvEpilogue& epilogue,
              void* workspace, int threads) {
  const Image& g = plan.g;
  float* partials = static_cast<float*>(workspace);
  const ScratchSlots slots(static_cast<char*>(workspace) + plan.partials_bytes(), threads, plan.slot_bytes());

  parallel_for(g.batch * plan.strips.count, [&](int64_t task) {
    const int64_t image = task / plan.strips.count, strip = task % plan.strips.count;
    const int64_t y0 = plan.first_row(strip), y1 = plan.end_row(strip);
    // small row i adds to image rows 2 i - 1 to 2 i + 2
    const int64_t i0 = max64(0, y0 / 2 - 1), i1 = min64(g.small_height, y1 / 2 + 1);
    const int64_t count = (i1 - i0) * g.small_width, first_pixel = (image * g.small_height + i0) * g.small_width;
    const ScratchSlots::Lease lease(slots);
    float* products = lease.memory();
    float* parameters = products + plan.pixels * plan.columns;
    float* rows = parameters + plan.parameters;
    bfloat16* pixels = reinterpret_cast<bfloat16*>(rows + plan.rows);
    for (int64_t p = 0; p < count; ++p)
      for (int64_t c = 0; c < g.small_channels; c += kChannels)
        _mm512_storeu_si512(pixels + p * plan.depth + c, read_line(small, (first_pixel + p) * g.small_channels + c, c,
                                                                   min64(kChannels, g.small_channels - c)));
    multiply_to_patches(plan, pixels, packed, count, products);

    for (int64_t x = 0; x < (y1 - y0) * g.padded_row(); ++x) rows[x] = 0;
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t r = 0; r < 4; ++r) {
        const int64_t y = 2 * i - 1 + r;
        if (y < y0 || y >= y1) continue;
        add_patch_row(g, products + (i - i0) * g.small_width * plan.columns + r * 4 * g.channels, plan.columns,
                      rows + (y - y0) * g.padded_row());
      }
    float* partial = partials + 2 * task * g.channels;
    finish_rows<bfloat16>(epilogue, g, image, y0, y1 - y0, rows, parameters, {partial, partial + g.channels});
  });

  merge_partials(epilogue, partials, g.batch * plan.strips.count, g.channels, [&](int64_t part) {
    const int64_t strip = part % plan.strips.count;
    return (plan.end_row(strip) - plan.first_row(strip)) * g.width;
  });
}

// ---- weight gradient

struct GradientPlan {
  Image g;
  int64_t block_rows;  // small rows multiplied at a time
  int64_t pixels;      // of them
  int64_t splits;      // sums over parts of the batch
  int64_t columns;     // of the sums: small channels rounded up to whole blocks
  int64_t parameters, rows, sums;  // elements
  explicit GradientPlan(const Conv4x4s2Shape& shape) : g(shape) {
    block_rows = max64(1, min64(g.small_height, kGradientPixels / g.small_width));
    pixels = round_up(block_rows * g.small_width, kTileDepth);
    splits = min64(g.batch, kGradientTasks);
    columns = round_up(g.small_channels, kBlock);
    parameters = RowParameters::floats(g);
    rows = (2 * block_rows + 2) * g.padded_row();
    sums = kPatch * columns;
  }
  int64_t slot_bytes() const { return 4 * parameters + 2 * (pixels * (2 * kPatch + columns) + rows); }
  int64_t partials_bytes() const { return round_up(splits * sums * 4, ScratchSlots::kAlignment); }
};

// patches[pixels][kPatch] -> tiles[pixels / 32][kPatchTiles][16 elements of a patch][32 pixels]
void transpose_patches(const bfloat16* patches, int64_t pixels, bfloat16* tiles) {
  for (int64_t p = 0; p < pixels; p += 2) {
    bfloat16* to = tiles + p / kTileDepth * kPatchTiles * kTile + p % kTileDepth * kTileRows;
    for (int64_t e = 0; e < kPatch; e += 32, to += 2 * kTile)
      store_pair(_mm512_load_si512(patches + p * kPatch + e), _mm512_load_si512(patches + (p + 1) * kPatch + e), to, to + kTile);
  }
  transpose_tiles(tiles, pixels / kTileDepth * kPatchTiles);
}

void image_weight_gradient(const GradientPlan& plan, const ConvOperand& large, const ConvOperand& small,
                           const ConvWeightGradient& result, void* workspace, int threads) {
  const Image& g = plan.g;
  float* partials = static_cast<float*>(workspace);  // [splits][kPatch][columns]
  const ScratchSlots slots(static_cast<char*>(workspace) + plan.partials_bytes(), threads, plan.slot_bytes());
  const int64_t column_tiles = plan.columns / kTileRows, patch_tiles = ceil_div(g.patch, kTileRows);

  parallel_for(plan.splits, [&](int64_t split) {
    const ScratchSlots::Lease lease(slots);
    const RowParameters parameters(large, g, lease.memory());
    bfloat16* patches = reinterpret_cast<bfloat16*>(lease.memory() + plan.parameters);
    bfloat16* left = patches + plan.pixels * kPatch;
    bfloat16* right = left + plan.pixels * kPatch;
    bfloat16* rows = right + plan.pixels * plan.columns;
    float* sums = partials + split * plan.sums;
    ProductBlock block;
    bool accumulate = false;
    // Elements beyond a patch and pixels beyond a block stay zero.
    __builtin_memset(static_cast<void*>(patches), 0, static_cast<size_t>(plan.pixels * kPatch) * 2);
    for (int64_t image = g.batch * split / plan.splits; image < g.batch * (split + 1) / plan.splits; ++image)
      for (int64_t i0 = 0; i0 < g.small_height; i0 += plan.block_rows) {
        const int64_t count = min64(plan.block_rows, g.small_height - i0), pixels = count * g.small_width;
        const int64_t depth = round_up(pixels, kTileDepth), first_pixel = (image * g.small_height + i0) * g.small_width;
        stage_rows<bfloat16>(large, parameters, g, image, 2 * i0 - 1, 2 * count + 2, rows);
        for (int64_t i = 0; i < count; ++i)
          copy_patches(g, rows + 2 * i * g.padded_row(), patches + i * g.small_width * kPatch);
        transpose_patches(patches, depth, left);
        for (int64_t p = 0; p < depth; p += 2)
          for (int64_t c = 0; c < g.small_channels; c += kChannels) {
            const auto line = [&](int64_t pixel) {
              if (pixel >= pixels) return _mm512_setzero_si512();
              return read_line(small, (first_pixel + pixel) * g.small_channels + c, c, min64(kChannels, g.small_channels - c));
            };
            bfloat16* to = right + (p / kTileDepth * column_tiles + c / kTileRows) * kTile + p % kTileDepth * kTileRows;
            store_pair(line(p), line(p + 1), to, to + kTile);
          }
        for (int64_t e = 0; e < patch_tiles; e += 2)
          for (int64_t k = 0; k < column_tiles; k += 2) {
            float* to = sums + e * kTileRows * plan.columns + k * kTileRows;
            const TileRun of_patch{left + e * kTile, kTile, kPatchTiles * kTile}, of_small{right + k * kTile, kTile, column_tiles * kTile};
            block.begin(to, kTileRows * plan.columns, plan.columns, accumulate);
            if (e + 1 < patch_tiles) {
              block.add<true>(of_patch, of_small, depth / kTileDepth);
              block.end<true>(to, kTileRows * plan.columns, plan.columns);
            } else {
              block.add<false>(of_patch, of_small, depth / kTileDepth);
              block.end<false>(to, kTileRows * plan.columns, plan.columns);
            }
          }
        accumulate = true;
      }
  });

  store_weight_gradient(g, partials, plan.splits, plan.sums, plan.columns, result);
}

}  // namespace

int64_t conv4x4s2_bf16_image_packed_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop) {
  if (loop == Conv4x4s2Loop::weight_gradient) return 0;
  return 2 * (loop == Conv4x4s2Loop::down ? round_up(shape.small_channels, kBlock) * kPatch : UpPlan(shape).packed_elements());
}

// Right tiles: [columns / 32][depth / 32][2 tiles]. down: depth is the patch, columns the small channels; up: the reverse.
void conv4x4s2_bf16_image_pack(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, void* packed) {
  const Image g(shape);
  const bool down = loop == Conv4x4s2Loop::down;
  const int64_t elements = conv4x4s2_bf16_image_packed_bytes(shape, loop) / 2, columns = down ? g.small_channels : g.patch;
  const int64_t blocks = ceil_div(columns, kBlock), tiles = elements / kTile / blocks;  // of a block
  const PatchWeights weights(g);
  parallel_for(blocks, [&](int64_t block) {
    uint16_t* out = static_cast<uint16_t*>(packed) + block * tiles * kTile;
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t i = 0; i < kTile; ++i, ++out) {
        const int64_t d = tile / 2 * kTileDepth + i / kTileDepth * 2 + i % 2;
        const int64_t column = block * kBlock + tile % 2 * kTileRows + i % kTileDepth / 2;
        const int64_t small = down ? column : d, p = down ? d : column;
        const bool inside = small < g.small_channels && p < g.patch;
        *out = inside ? float_to_bfloat16_bits(weight[small * g.patch + weights.at[p]]) : 0;
      }
  });
}

int64_t conv4x4s2_bf16_image_workspace_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, int threads) {
  const auto bytes = [&](const auto& plan) { return plan.partials_bytes() + ScratchSlots::bytes(threads, plan.slot_bytes()); };
  switch (loop) {
    case Conv4x4s2Loop::down: return bytes(down_plan(shape));
    case Conv4x4s2Loop::up: return bytes(UpPlan(shape));
    default: return bytes(GradientPlan(shape));
  }
}

void conv4x4s2_bf16_image_forward(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const ConvOperand& input,
                                  const void* packed, const ConvEpilogue& output, void* workspace, int threads) {
  const bfloat16* weights = static_cast<const bfloat16*>(packed);
  if (loop == Conv4x4s2Loop::down)
    image_down(down_plan(shape), input, weights, output, workspace, threads);
  else
    image_up(UpPlan(shape), input, weights, output, workspace, threads);
}

void conv4x4s2_bf16_image_weight_gradient(const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,
                                          const ConvWeightGradient& result, void* workspace, int threads) {
  image_weight_gradient(GradientPlan(shape), large, small, result, workspace, threads);
}

}  // namespace fastgan::cpu::FASTGAN_ISA
