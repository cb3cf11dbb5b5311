// The three loops of conv4x4s2.h where the large side is an image of 1 to 4 channels: the discriminator's first and the
// generator's last layer; float32. Direct products of patches (conv4x4s2_image.h):
//
//   down: copy patches, multiply by the weights
//   up:   multiply pixels by the weights to patches, add the patches up where they overlap
//   weight_gradient: copy patches, multiply patches^T by the gradient, summed over pixels
#include "conv4x4s2_gemm.h"
#include "conv4x4s2_image.h"
#include "conv4x4s2_kernel.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t kChunk = 64;             // channels of the small side handled at a time
constexpr int64_t kDownFloats = 16384;     // results a task of down holds before its epilogue
constexpr int64_t kUpFloats = 49152;       // products a task of up holds before it adds them up
constexpr int64_t kGradientPixels = 128;   // pixels multiplied at a time for the weight gradient
constexpr int64_t kGradientTasks = 16;     // the batch is split into up to this many sums

// Small channels rounded up to whole panels
int64_t packed_columns(const Image& g) { return round_up(g.small_channels, kPanel); }

// ---- down

struct DownPlan {
  Image g;
  Strips strips;
  int64_t parameters, rows, patches, result;  // floats
  explicit DownPlan(const Conv4x4s2Shape& shape) : g(shape), strips(g, g.small_width * packed_columns(g), kDownFloats) {
    parameters = RowParameters::floats(g);
    rows = (2 * strips.rows + 2) * g.padded_row();
    patches = g.small_width * kPatch;
    result = strips.rows * g.small_width * packed_columns(g);
  }
  int64_t slot_bytes() const { return (parameters + rows + patches + result) * static_cast<int64_t>(sizeof(float)); }
  int64_t partials_bytes() const {
    return round_up(2 * g.batch * strips.count * g.small_channels * static_cast<int64_t>(sizeof(float)), ScratchSlots::kAlignment);
  }
};

void image_down(const Conv4x4s2Shape& shape, const ConvOperand& large, const float* packed, const ConvEpilogue& epilogue,
                void* workspace, int threads) {
  const DownPlan plan(shape);
  const Image& g = plan.g;
  float* partials = static_cast<float*>(workspace);
  const ScratchSlots slots(static_cast<char*>(workspace) + plan.partials_bytes(), threads, plan.slot_bytes());

  parallel_for(g.batch * plan.strips.count, [&](int64_t task) {
    const int64_t image = task / plan.strips.count, first = task % plan.strips.count * plan.strips.rows;
    const int64_t count = min64(plan.strips.rows, g.small_height - first);
    const ScratchSlots::Lease lease(slots);
    float* rows = lease.memory() + plan.parameters;
    float* patches = rows + plan.rows;
    float* result = patches + plan.patches;
    const RowParameters parameters(large, g, lease.memory());
    stage_rows<float>(large, parameters, g, image, 2 * first - 1, 2 * count + 2, rows);
    for (int64_t i = 0; i < count; ++i) {
      copy_patches(g, rows + 2 * i * g.padded_row(), patches);
      for (int64_t k = 0; k < packed_columns(g); k += kPanel)
        multiply<2, kPatch, 1, kPanel>(patches, packed + k * g.patch, g.patch,
                                       result + i * g.small_width * packed_columns(g) + k, packed_columns(g), g.small_width, false);
    }
    float* partial = partials + 2 * task * g.small_channels;
    const OutputBox box{g.small_height, g.small_width, g.small_channels, image, 1, first, count, 1, 0, g.small_channels};
    finish_box<float>(epilogue, box, result, {0, packed_columns(g)}, {partial, partial + g.small_channels});
  });

  merge_partials(epilogue, partials, g.batch * plan.strips.count, g.small_channels, [&](int64_t part) {
    return g.small_width * min64(plan.strips.rows, g.small_height - part % plan.strips.count * plan.strips.rows);
  });
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
          prefetch_operand<float>(small, (row + ahead + j) * g.small_channels + c0, chunk);
          read_operand<float>(small, (row + j) * g.small_channels + c0, c0, chunk, pixels + j * kChunk);
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
    finish_rows<float>(epilogue, g, image, y0, y1 - y0, rows, lease.memory(), {partial, partial + g.channels});
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
        stage_rows<float>(large, parameters, g, image, 2 * i0 - 1, 2 * count + 2, rows);
        for (int64_t i = 0; i < count; ++i)
          copy_patches(g, rows + 2 * i * g.padded_row(), patches + i * g.small_width * kPatch);
        for (int64_t k0 = 0; k0 < g.small_channels; k0 += kChunk) {
          const int64_t chunk = min64(kChunk, g.small_channels - k0);
          const int64_t first_pixel = (image * g.small_height + i0) * g.small_width;
          for (int64_t j = 0; j < pixels; ++j) {
            prefetch_operand<float>(small, (first_pixel + pixels + j) * g.small_channels + k0, chunk);
            read_operand<float>(small, (first_pixel + j) * g.small_channels + k0, k0, chunk, gradients + j * kChunk);
          }
          for (int64_t k = 0; k < chunk; k += kPanel)
            multiply<2, 1, kPatch, kChunk>(patches, gradients + k, pixels, sums + k0 + k, plan.columns, g.patch, accumulate);
        }
        accumulate = true;
      }
  });

  for (int64_t p = 0; p < g.patch; ++p)
    for (int64_t k = 0; k < g.small_channels; ++k) {
      float sum = 0;
      for (int64_t split = 0; split < plan.splits; ++split) sum += partials[split * plan.sums + p * plan.columns + k];
      float& to = result.data[(k * g.channels + p % g.channels) * 16 + p / g.channels];
      to = result.add ? to + sum : sum;
    }
}

}  // namespace

int64_t conv4x4s2_image_packed_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop) {
  const Image g(shape);
  if (loop == Conv4x4s2Loop::weight_gradient) return 0;
  const int64_t floats = loop == Conv4x4s2Loop::down ? g.patch * packed_columns(g) : round_up(g.patch, kLanes) * g.small_channels;
  return floats * static_cast<int64_t>(sizeof(float));
}

// down: [panel of small channels][patch][kPanel]; up: [panel of the patch][small channels][kPanel, or kLanes for the last]
void conv4x4s2_image_pack(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, void* packed) {
  const Image g(shape);
  float* out = static_cast<float*>(packed);
  const bool down = loop == Conv4x4s2Loop::down;
  const int64_t columns = down ? packed_columns(g) : round_up(g.patch, kLanes), depth = down ? g.patch : g.small_channels;
  for (int64_t k = 0; k < columns; k += kPanel) {
    const int64_t panel = min64(kPanel, columns - k);
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t lane = 0; lane < panel; ++lane, ++out) {
        const int64_t small = down ? k + lane : d, p = down ? d : k + lane;
        const bool inside = small < g.small_channels && p < g.patch;
        *out = inside ? weight[(small * g.channels + p % g.channels) * 16 + p / g.channels] : 0;
      }
  }
}

int64_t conv4x4s2_image_workspace_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, int threads) {
  const auto bytes = [&](const auto& plan) { return plan.partials_bytes() + ScratchSlots::bytes(threads, plan.slot_bytes()); };
  switch (loop) {
    case Conv4x4s2Loop::down: return bytes(DownPlan(shape));
    case Conv4x4s2Loop::up: return bytes(UpPlan(shape));
    default: return bytes(GradientPlan(shape));
  }
}

void conv4x4s2_image_forward(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const ConvOperand& input, const void* packed,
                             const ConvEpilogue& output, void* workspace, int threads) {
  (loop == Conv4x4s2Loop::down ? image_down : image_up)(shape, input, static_cast<const float*>(packed), output, workspace,
                                                        threads);
}

void conv4x4s2_image_weight_gradient(const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,
                                     const ConvWeightGradient& result, void* workspace, int threads) {
  image_weight_gradient(shape, large, small, result, workspace, threads);
}

}  // namespace fastgan::cpu::FASTGAN_ISA
