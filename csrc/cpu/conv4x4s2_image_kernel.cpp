// Instruction sets: baseline avx2 avx512 avx512_bf16
//
// The three loops of conv4x4s2.h where the large side is an image of 1 to 4 channels: the discriminator's first and the
// generator's last layer; products of floats. T is the storage type of the tensors.
//
//   down: two neighbouring outputs of a row at a time, from three products in place of four: F(2, 2) along the row
//   up:   multiply pixels by the weights to patches, add the patches up where they overlap
//   weight_gradient: copy patches, multiply patches^T by the gradient, summed over pixels
//
// The latter two are direct products of patches (conv4x4s2_image.h).
#include "conv4x4s2_image.h"
#include "conv4x4s2_kernel.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t kChunk = 64;             // channels of the small side handled at a time
constexpr int64_t kUpFloats = 49152;       // products a task of up holds before it adds them up
constexpr int64_t kGradientPixels = 128;   // pixels multiplied at a time for the weight gradient
constexpr int64_t kGradientTasks = 16;     // the batch is split into up to this many sums

// ---- down
//
// Outputs j and j + 1 see pixels x = 2 j to x + 5 of a padded row. Every tap t of the first two goes with tap t + 2:
//
//   (p[x + t] - p[x + t + 2]) w[t],  p[x + t + 2] (w[t] + w[t + 2]),  (p[x + t + 2] - p[x + t + 4]) w[t + 2]
//
// The first output is the sum of the first two products over t, channels and rows, the second one the difference of the others.

constexpr int kMostPairs = kMaxRows / 3;  // pairs of outputs at a time: three products of each are held in registers

// Both outputs of kPairs pairs for a panel of channels: finish(pair, vector of the panel, first output, second output).
// pixels: the first that the first pair sees, in the first of four padded rows; differences: between pixels and the ones two behind
// them, in the same places; packed: [row][pixel of two][channel][product][kPanel].
template <int kChannels, int kVectors, int kPairs, typename Finish>
void multiply_pairs(const float* pixels, const float* differences, int64_t padded_row, const float* packed, const Finish& finish) {
  constexpr int kDepth = 2 * kChannels, kNext = 2 * kDepth;  // floats that a product sums up a row, and from a pair to the next
  Vec sums[3][kPairs][kVectors] = {};
  for (int64_t r = 0; r < 4; ++r) {
    const float* sources[3] = {differences + r * padded_row, pixels + r * padded_row + kDepth, differences + r * padded_row + kDepth};
    for (int64_t d = 0; d < kDepth; ++d)
#pragma GCC unroll 3
      for (int m = 0; m < 3; ++m) {
        Vec right[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) right[v] = load(packed + v * kLanes);
        packed += kPanel;
#pragma GCC unroll 4
        for (int pair = 0; pair < kPairs; ++pair) {
          const Vec left = splat(sources[m][d + pair * kNext]);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sums[m][pair][v] += left * right[v];
        }
      }
  }
#pragma GCC unroll 4
  for (int pair = 0; pair < kPairs; ++pair)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      finish(pair, v, sums[0][pair][v] + sums[1][pair][v], sums[1][pair][v] - sums[2][pair][v]);
}

// A row of outputs for a panel of channels: store_output(pixel, vector of the panel, sums).
template <int kChannels, typename Store>
void multiply_row(const Image& g, const float* pixels, const float* differences, const float* packed, const Store& store_output) {
  const int64_t pairs = ceil_div(g.small_width, 2), groups = ceil_div(pairs, kMostPairs);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = part_start(pairs, group, groups), count = part_start(pairs, group + 1, groups) - first;
    const int64_t x = first * 4 * kChannels, begin = 2 * first, end = min64(g.small_width, 2 * (first + count));
    store_output.prefetch(begin, end);
    const auto finish = [&](int pair, int v, Vec even, Vec odd) {
      store_output(begin + 2 * pair, v, even);
      if (begin + 2 * pair + 1 < end) store_output(begin + 2 * pair + 1, v, odd);
    };
    switch (count) {
#define FASTGAN_PAIRS(n)                                                                                            \
  case n:                                                                                                           \
    if constexpr (n <= kMostPairs)                                                                                  \
      multiply_pairs<kChannels, Store::kVectors, n>(pixels + x, differences + x, g.padded_row(), packed, finish);   \
    break;
      FASTGAN_PAIRS(1) FASTGAN_PAIRS(2) FASTGAN_PAIRS(3) FASTGAN_PAIRS(4)
#undef FASTGAN_PAIRS
    }
  }
}

// A panel's weights: three products for each of the patch's first two columns.
int64_t panel_floats(const Image& g) { return 4 * 2 * g.channels * 3 * kPanel; }

DownPlan down_plan(const Conv4x4s2Shape& shape) { return {shape, 2 * static_cast<int64_t>(sizeof(float))}; }

template <typename T>
void image_down(const Conv4x4s2Shape& shape, const ConvOperand& large, const float* packed, const ConvEpilogue& epilogue,
                void* workspace, int threads) {
  const DownPlan plan = down_plan(shape);
  const Image& g = plan.g;
  const int64_t all_rows = plan.staged_rows * g.padded_row();  // floats to the differences
  const auto stage = [&](const RowParameters& parameters, int64_t image, int64_t y0, int64_t count, void* memory) {
    float *rows = static_cast<float*>(memory), *differences = rows + all_rows;
    stage_rows<T>(large, parameters, g, image, y0, count, rows);
    for (int64_t x = 0; x < count * g.padded_row() - 2 * g.channels; x += kLanes)
      store(differences + x, load(rows + x) - load(rows + x + 2 * g.channels));
  };
  const auto multiply = [&](const void* memory, int64_t i, int64_t panel, const auto& store_output) {
    const float* row = static_cast<const float*>(memory) + 2 * i * g.padded_row();
    with_channels(g, [&](auto channels) {
      multiply_row<channels.value>(g, row, row + all_rows, packed + panel * panel_floats(g), store_output);
    });
  };
  run_down<T>(plan, large, epilogue, workspace, threads, stage, multiply);
}

// ---- up

struct UpPlan {
  Image g;
  Strips strips;
  int64_t patch;                                        // floats between products of neighbouring pixels
  int64_t parameters, pixels, products, rows;  // floats
  explicit UpPlan(const Conv4x4s2Shape& shape) : g(shape), strips(g, g.small_width * g.patch, kUpFloats), patch(round_up(g.patch, kLanes)) {
    parameters = RowParameters::floats(g);
    pixels = g.small_width * kChunk;
    products = (strips.rows + 2) * g.small_width * patch;
    rows = (2 * strips.rows + 1) * g.padded_row();
  }
  int64_t slot_bytes() const { return (parameters + pixels + products + rows) * static_cast<int64_t>(sizeof(float)); }
  int64_t partials_bytes() const {
    return round_up(2 * g.batch * strips.count * g.channels * static_cast<int64_t>(sizeof(float)), ScratchSlots::kAlignment);
  }
  int64_t first_row(int64_t strip) const { return 2 * strip * strips.rows; }
  int64_t end_row(int64_t strip) const { return strip + 1 == strips.count ? g.height : first_row(strip + 1); }
};

template <typename T>
void image_up(const Conv4x4s2Shape& shape, const ConvOperand& small, const float* packed, const ConvEpilogue& epilogue,
              void* workspace, int threads) {
  const UpPlan plan(shape);
  const Image& g = plan.g;
  const int64_t ld = plan.patch;
  float* partials = static_cast<float*>(workspace);
  const ScratchSlots slots(static_cast<char*>(workspace) + plan.partials_bytes(), threads, plan.slot_bytes());

  parallel_for(g.batch * plan.strips.count, [&](int64_t task) {
    const int64_t image = task / plan.strips.count, strip = task % plan.strips.count;
    const int64_t y0 = plan.first_row(strip), y1 = plan.end_row(strip);
    // small row i adds to image rows 2 i - 1 to 2 i + 2
    const int64_t i0 = max64(0, y0 / 2 - 1), i1 = min64(g.small_height, y1 / 2 + 1);
    const ScratchSlots::Lease lease(slots);
    float* pixels = lease.memory() + plan.parameters;
    float* products = pixels + plan.pixels;
    float* rows = products + plan.products;

    for (int64_t i = i0; i < i1; ++i)
      for (int64_t c0 = 0; c0 < g.small_channels; c0 += kChunk) {
        const int64_t chunk = min64(kChunk, g.small_channels - c0);
        const int64_t row = (image * g.small_height + i) * g.small_width;
        const int64_t ahead = i + 1 < i1 ? g.small_width : 0;
        for (int64_t j = 0; j < g.small_width; ++j) {
          prefetch_operand<T>(small, (row + ahead + j) * g.small_channels + c0, chunk);
          read_operand<T>(small, (row + j) * g.small_channels + c0, c0, chunk, pixels + j * kChunk);
        }
        float* out = products + (i - i0) * g.small_width * ld;
        int64_t k = 0;
        for (; k + kPanel <= ld; k += kPanel)
          multiply<2, kChunk, 1, kPanel>(pixels, packed + k * g.small_channels + c0 * kPanel, chunk, out + k, ld, g.small_width,
                                         c0 > 0);
        if (k < ld)
          multiply<1, kChunk, 1, kLanes>(pixels, packed + k * g.small_channels + c0 * kLanes, chunk, out + k, ld, g.small_width,
                                         c0 > 0);
      }

    for (int64_t x = 0; x < (y1 - y0) * g.padded_row(); ++x) rows[x] = 0;
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t r = 0; r < 4; ++r) {
        const int64_t y = 2 * i - 1 + r;
        if (y < y0 || y >= y1) continue;
        add_patch_row(g, products + (i - i0) * g.small_width * ld + r * 4 * g.channels, ld, rows + (y - y0) * g.padded_row());
      }
    float* partial = partials + 2 * task * g.channels;
    finish_rows<T>(epilogue, g, image, y0, y1 - y0, rows, lease.memory(), {partial, partial + g.channels});
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
  int64_t splits;      // sums over parts of the batch
  int64_t columns;     // of the sums: small channels rounded up to whole chunks
  int64_t parameters, rows, patches, gradients, sums;  // floats
  explicit GradientPlan(const Conv4x4s2Shape& shape) : g(shape) {
    block_rows = max64(1, min64(g.small_height, kGradientPixels / g.small_width));
    splits = min64(g.batch, kGradientTasks);
    columns = round_up(g.small_channels, kChunk);
    parameters = RowParameters::floats(g);
    rows = (2 * block_rows + 2) * g.padded_row();
    patches = block_rows * g.small_width * kPatch;
    gradients = block_rows * g.small_width * kChunk;
    sums = g.patch * columns;
  }
  int64_t slot_bytes() const { return (parameters + rows + patches + gradients) * static_cast<int64_t>(sizeof(float)); }
  int64_t partials_bytes() const {
    return round_up(splits * sums * static_cast<int64_t>(sizeof(float)), ScratchSlots::kAlignment);
  }
};

template <typename T>
void image_weight_gradient(const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,
                           const ConvWeightGradient& result, void* workspace, int threads) {
  const GradientPlan plan(shape);
  const Image& g = plan.g;
  float* partials = static_cast<float*>(workspace);  // [splits][patch][columns]
  const ScratchSlots slots(static_cast<char*>(workspace) + plan.partials_bytes(), threads, plan.slot_bytes());

  parallel_for(plan.splits, [&](int64_t split) {
    const ScratchSlots::Lease lease(slots);
    float* rows = lease.memory() + plan.parameters;
    float* patches = rows + plan.rows;
    float* gradients = patches + plan.patches;
    float* sums = partials + split * plan.sums;
    const RowParameters parameters(large, g, lease.memory());
    bool accumulate = false;
    for (int64_t image = g.batch * split / plan.splits; image < g.batch * (split + 1) / plan.splits; ++image)
      for (int64_t i0 = 0; i0 < g.small_height; i0 += plan.block_rows) {
        const int64_t count = min64(plan.block_rows, g.small_height - i0), pixels = count * g.small_width;
        stage_rows<T>(large, parameters, g, image, 2 * i0 - 1, 2 * count + 2, rows);
        for (int64_t i = 0; i < count; ++i)
          copy_patches(g, rows + 2 * i * g.padded_row(), patches + i * g.small_width * kPatch);
        for (int64_t k0 = 0; k0 < g.small_channels; k0 += kChunk) {
          const int64_t chunk = min64(kChunk, g.small_channels - k0);
          const int64_t first_pixel = (image * g.small_height + i0) * g.small_width;
          for (int64_t j = 0; j < pixels; ++j) {
            prefetch_operand<T>(small, (first_pixel + pixels + j) * g.small_channels + k0, chunk);
            read_operand<T>(small, (first_pixel + j) * g.small_channels + k0, k0, chunk, gradients + j * kChunk);
          }
          for (int64_t k = 0; k < chunk; k += kPanel)
            multiply<2, 1, kPatch, kChunk>(patches, gradients + k, pixels, sums + k0 + k, plan.columns, g.patch, accumulate);
        }
        accumulate = true;
      }
  });

  store_weight_gradient(g, partials, plan.splits, plan.sums, plan.columns, result);
}

}  // namespace

int64_t conv4x4s2_image_packed_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop) {
  const Image g(shape);
  if (loop == Conv4x4s2Loop::weight_gradient) return 0;
  const int64_t floats = loop == Conv4x4s2Loop::down ? ceil_div(g.small_channels, kPanel) * panel_floats(g)
                                                     : round_up(g.patch, kLanes) * g.small_channels;
  return floats * static_cast<int64_t>(sizeof(float));
}

// down: [panel of small channels][row][column, channel of two][three products][kPanel];
// up: [panel of the patch][small channels][kPanel, or kLanes for the last]
void conv4x4s2_image_pack(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, void* packed) {
  const Image g(shape);
  const PatchWeights weights(g);
  if (loop == Conv4x4s2Loop::down) {
    const int64_t half = 2 * g.channels;  // of a row of the patch
    parallel_for(ceil_div(g.small_channels, kPanel), [&](int64_t panel) {
      float* out = static_cast<float*>(packed) + panel * panel_floats(g);
      const float* first = weight + panel * kPanel * g.patch;
      const int64_t columns = min64(kPanel, g.small_channels - panel * kPanel);
      for (int64_t r = 0; r < 4; ++r)
        for (int64_t p = 2 * r * half; p < (2 * r + 1) * half; ++p, out += 3 * kPanel)
          for (int64_t lane = 0; lane < kPanel; ++lane) {
            const float near = lane < columns ? first[lane * g.patch + weights.at[p]] : 0;
            const float far = lane < columns ? first[lane * g.patch + weights.at[p + half]] : 0;
            out[lane] = near;
            out[kPanel + lane] = near + far;
            out[2 * kPanel + lane] = far;
          }
    });
    return;
  }
  float* out = static_cast<float*>(packed);
  const int64_t columns = round_up(g.patch, kLanes);
  for (int64_t k = 0; k < columns; k += kPanel)
    for (int64_t small = 0; small < g.small_channels; ++small)
      for (int64_t p = k; p < min64(k + kPanel, columns); ++p, ++out)
        *out = p < g.patch ? weight[small * g.patch + weights.at[p]] : 0;
}

int64_t conv4x4s2_image_workspace_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, int threads) {
  const auto bytes = [&](const auto& plan) { return plan.partials_bytes() + ScratchSlots::bytes(threads, plan.slot_bytes()); };
  switch (loop) {
    case Conv4x4s2Loop::down: return bytes(down_plan(shape));
    case Conv4x4s2Loop::up: return bytes(UpPlan(shape));
    default: return bytes(GradientPlan(shape));
  }
}

void conv4x4s2_image_forward(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const ConvOperand& input, const void* packed,
                             const ConvEpilogue& output, void* workspace, int threads) {
  const bool down = loop == Conv4x4s2Loop::down;
  const auto run = shape.dtype == ConvDType::float32 ? (down ? image_down<float> : image_up<float>)
                                                     : (down ? image_down<bfloat16> : image_up<bfloat16>);
  run(shape, input, static_cast<const float*>(packed), output, workspace, threads);
}

void conv4x4s2_image_weight_gradient(const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,
                                     const ConvWeightGradient& result, void* workspace, int threads) {
  (shape.dtype == ConvDType::float32 ? image_weight_gradient<float> : image_weight_gradient<bfloat16>)(shape, large, small, result, workspace,
                                                                                               threads);
}

}  // namespace fastgan::cpu::FASTGAN_ISA
