// The three loops of conv4x4s2.h where the large side is an image of 1 to 4 channels: the discriminator's first and the
// generator's last layer.
//
// Direct products, not minimal filtering: with so few channels the transforms would cost more than they save. A patch is
// the 4x4 window an output of `down` sees: 16 * channels floats, ordered (row, column, channel), so that in NHWC each of
// its four rows is one contiguous run of the image.
//
//   down: copy patches, multiply by the weights
//   up:   multiply pixels by the weights to patches, add the patches up where they overlap
//   weight_gradient: copy patches, multiply patches^T by the gradient, summed over pixels
#include "conv4x4s2_common.h"
#include "conv4x4s2_gemm.h"
#include "conv4x4s2_kernel.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t kPatch = 64;             // floats kept for a patch: 16 * 4 channels
constexpr int64_t kChunk = 64;             // channels of the small side handled at a time
constexpr int64_t kDownFloats = 16384;     // results a task of down holds before its epilogue
constexpr int64_t kUpFloats = 49152;       // products a task of up holds before it adds them up
constexpr int64_t kGradientPixels = 128;   // pixels multiplied at a time for the weight gradient
constexpr int64_t kGradientTasks = 16;     // the batch is split into up to this many sums

typedef float Quad __attribute__((vector_size(16)));

struct Image {
  int64_t batch, height, width, channels;            // large
  int64_t small_height, small_width, small_channels;
  int64_t patch;       // floats of a patch
  int64_t packed_columns;  // of down: small channels rounded up to whole panels

  explicit Image(const Conv4x4s2Shape& s)
      : batch(s.batch), height(s.large_height), width(s.large_width), channels(s.large_channels),
        small_height(s.small_height), small_width(s.small_width), small_channels(s.small_channels),
        patch(16 * s.large_channels), packed_columns(round_up(s.small_channels, kPanel)) {}

  // A row of the image with one pixel of padding left and right, and room for whole vectors.
  int64_t padded_row() const { return round_up((2 * small_width + 3) * channels, kLanes) + kLanes; }
  int64_t image_row() const { return width * channels; }
};

// How the small rows of an image are cut into strips.
struct Strips {
  int64_t count, rows;
  Strips(const Image& g, int64_t row_floats, int64_t strip_floats) {
    count = ceil_div(g.small_height * row_floats, strip_floats);
    count = min64(count, g.small_height);
    rows = ceil_div(g.small_height, count);
    count = ceil_div(g.small_height, rows);
  }
};

template <typename T>
Vec load_some(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T buffer[kLanes] = {};
  __builtin_memcpy(buffer, p, static_cast<size_t>(count) * sizeof(T));
  return load(buffer);
}

template <typename T>
void store_some(T* p, Vec v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  T buffer[kLanes];
  store(buffer, v);
  __builtin_memcpy(p, buffer, static_cast<size_t>(count) * sizeof(T));
}

// values[channels] repeated along a row
void repeat_channels(const float* values, int64_t channels, float otherwise, int64_t length, float* row) {
  for (int64_t i = 0; i < length; ++i) row[i] = values != nullptr ? values[i % channels] : otherwise;
}

// ---- patches

// Per-channel parameters of an image operand, repeated along a row.
struct RowParameters {
  float *scale, *shift, *other_scale;
  RowParameters(const ConvOperand& operand, const Image& g, float* memory)
      : scale(memory), shift(memory + g.padded_row()), other_scale(memory + 2 * g.padded_row()) {
    if (operand.mode == ConvOperand::Mode::plain) return;
    repeat_channels(operand.scale, g.channels, 1, g.image_row(), scale);
    repeat_channels(operand.shift, g.channels, 0, g.image_row(), shift);
    repeat_channels(operand.other_scale, g.channels, 0, g.image_row(), other_scale);
  }
  static int64_t floats(const Image& g) { return 3 * g.padded_row(); }
};

// rows[count][padded_row]: rows y0, y0 + 1, ... of one image, with zeros where they lie outside
template <typename T>
void stage_rows(const ConvOperand& operand, const RowParameters& parameters, const Image& g, int64_t image, int64_t y0,
                int64_t count, float* rows) {
  const int64_t length = g.image_row();
  for (int64_t i = 0; i < count; ++i, rows += g.padded_row()) {
    const int64_t y = y0 + i;
    if (y < 0 || y >= g.height) {
      for (int64_t x = 0; x < g.padded_row(); ++x) rows[x] = 0;
      continue;
    }
    float* dst = rows + g.channels;
    for (int64_t c = 0; c < g.channels; ++c) rows[c] = 0;
    const int64_t offset = (image * g.height + y) * length;
    const T* data = static_cast<const T*>(operand.data) + offset;
    const T* other = static_cast<const T*>(operand.other) + offset;
    for (int64_t x = 0; x < length; x += kLanes) {
      Vec v = load_some(data + x, length - x);
      if (operand.mode == ConvOperand::Mode::activated)
        v = activate(load_some(parameters.scale + x, length - x) * v + load_some(parameters.shift + x, length - x),
                     operand.activation, operand.negative_slope);
      if (operand.mode == ConvOperand::Mode::batch_norm_backward)
        v = load_some(parameters.scale + x, length - x) * v +
            (load_some(parameters.other_scale + x, length - x) * load_some(other + x, length - x) +
             load_some(parameters.shift + x, length - x));
      store(dst + x, v);
    }
    for (int64_t x = length; x < g.padded_row() - g.channels; ++x) dst[x] = 0;
  }
}

// patches[width][kPatch] of one output row, from its four staged rows
template <int kChannels>
void copy_patches(const float* rows, int64_t padded_row, int64_t width, float* patches) {
  for (int64_t j = 0; j < width; ++j, patches += kPatch)
    for (int64_t r = 0; r < 4; ++r)
      __builtin_memcpy(patches + r * 4 * kChannels, rows + r * padded_row + j * 2 * kChannels, 4 * kChannels * sizeof(float));
}

void copy_patches(const Image& g, const float* rows, float* patches) {
  switch (g.channels) {
    case 1: return copy_patches<1>(rows, g.padded_row(), g.small_width, patches);
    case 2: return copy_patches<2>(rows, g.padded_row(), g.small_width, patches);
    case 3: return copy_patches<3>(rows, g.padded_row(), g.small_width, patches);
    default: return copy_patches<4>(rows, g.padded_row(), g.small_width, patches);
  }
}

// ---- down

struct DownPlan {
  Image g;
  Strips strips;
  int64_t parameters, rows, patches, result;  // floats
  explicit DownPlan(const Conv4x4s2Shape& shape) : g(shape), strips(g, g.small_width * g.packed_columns, kDownFloats) {
    parameters = RowParameters::floats(g);
    rows = (2 * strips.rows + 2) * g.padded_row();
    patches = g.small_width * kPatch;
    result = strips.rows * g.small_width * g.packed_columns;
  }
  int64_t slot_bytes() const { return (parameters + rows + patches + result) * static_cast<int64_t>(sizeof(float)); }
  int64_t partials_bytes() const {
    return round_up(2 * g.batch * strips.count * g.small_channels * static_cast<int64_t>(sizeof(float)), ScratchSlots::kAlignment);
  }
};

template <typename T>
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
    stage_rows<T>(large, parameters, g, image, 2 * first - 1, 2 * count + 2, rows);
    for (int64_t i = 0; i < count; ++i) {
      copy_patches(g, rows + 2 * i * g.padded_row(), patches);
      for (int64_t k = 0; k < g.packed_columns; k += kPanel)
        multiply<2, kPatch, 1, kPanel>(patches, packed + k * g.patch, g.patch,
                                       result + i * g.small_width * g.packed_columns + k, g.packed_columns, g.small_width, false);
    }
    float* partial = partials + 2 * task * g.small_channels;
    const OutputBox box{g.small_height, g.small_width, g.small_channels, image, 1, first, count, 1, 0, g.small_channels};
    finish_box<T>(epilogue, box, result, {0, g.packed_columns}, {partial, partial + g.small_channels});
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

// row[2 * j * kChannels + [0, 4 * kChannels)] += products[j * stride + ...]. Neighbours overlap by half: even and odd pixels
// go in passes of their own, so that no addition waits for the store of the one before.
template <int kChannels>
void add_patch_row(const float* products, int64_t stride, int64_t width, float* row) {
  for (int64_t parity = 0; parity < 2; ++parity)
    for (int64_t j = parity; j < width; j += 2)
      for (int64_t c = 0; c < kChannels; ++c) {
        float* at = row + j * 2 * kChannels + 4 * c;
        Quad sum, value;
        __builtin_memcpy(&sum, at, sizeof sum);
        __builtin_memcpy(&value, products + j * stride + 4 * c, sizeof value);
        sum += value;
        __builtin_memcpy(at, &sum, sizeof sum);
      }
}

void add_patch_row(const Image& g, const float* products, int64_t stride, float* row) {
  switch (g.channels) {
    case 1: return add_patch_row<1>(products, stride, g.small_width, row);
    case 2: return add_patch_row<2>(products, stride, g.small_width, row);
    case 3: return add_patch_row<3>(products, stride, g.small_width, row);
    default: return add_patch_row<4>(products, stride, g.small_width, row);
  }
}

// Writes rows [y0, y0 + count) of an image: padded rows in `rows`, whose first pixel is padding.
template <typename T>
void finish_rows(const ConvEpilogue& e, const Image& g, int64_t image, int64_t y0, int64_t count, float* rows,
                 float* parameters, const Partial& partial) {
  const int64_t length = g.image_row(), pixels = count * g.width;
  const bool gradient = e.mode == ConvEpilogue::Mode::gradient;
  float *scale = parameters, *shift = parameters + g.padded_row();
  repeat_channels(gradient ? e.scale : nullptr, g.channels, 1, length, scale);
  repeat_channels(gradient ? e.shift : e.bias, g.channels, 0, length, shift);
  const Activation activation = e.mode == ConvEpilogue::Mode::activate ? e.activation : Activation::identity;
  const int64_t offset = (image * g.height + y0) * length;
  T* out = static_cast<T*>(e.out) + offset;
  const T* y = static_cast<const T*>(e.y) + offset;
  for (int64_t i = 0; i < count; ++i) {
    float* row = rows + i * g.padded_row() + g.channels;
    for (int64_t x = 0; x < length; x += kLanes) {
      const int64_t left = length - x;
      Vec v = load(row + x);
      if (gradient)
        v = activate_backward(v, load(scale + x) * load_some(y + i * length + x, left) + load(shift + x), e.activation,
                              e.negative_slope);
      else
        v = activate(v + load(shift + x), activation, e.negative_slope);
      store_some(row + x, v, left);
      store_some(out + i * length + x, v, left);
    }
  }
  if (!has_partials(e)) return;
  for (int64_t c = 0; c < g.channels; ++c) {
    double first = 0, second = 0;
    const auto each = [&](const auto& f) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t x = 0; x < g.width; ++x) f(rows[i * g.padded_row() + (x + 1) * g.channels + c], i * length + x * g.channels + c);
    };
    each([&](double value, int64_t) { first += value; });
    if (!gradient) {
      first /= static_cast<double>(pixels);
      each([&](double value, int64_t) { second += (value - first) * (value - first); });
      if (e.bias != nullptr) first -= e.bias[c];  // merge_partials adds it
    } else if (e.y_mean != nullptr) {
      each([&](double value, int64_t at) { second += value * (to_float(y[at]) - e.y_mean[c]); });
      second *= e.y_invstd[c];
    }
    partial.first[c] = static_cast<float>(first);
    partial.second[c] = static_cast<float>(second);
  }
}

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
                           float* weight_gradient, void* workspace, int threads) {
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

  for (int64_t p = 0; p < g.patch; ++p)
    for (int64_t k = 0; k < g.small_channels; ++k) {
      float sum = 0;
      for (int64_t split = 0; split < plan.splits; ++split) sum += partials[split * plan.sums + p * plan.columns + k];
      weight_gradient[(k * g.channels + p % g.channels) * 16 + p / g.channels] = sum;
    }
}

// Calls f with a value of the storage type. bfloat16 exists from AVX512-BF16 on (conv4x4s2_supported sees to that).
template <typename F>
void for_dtype(ConvDType dtype, const F& f) {
#if defined(__AVX512BF16__)
  if (dtype == ConvDType::bfloat16) return f(bfloat16{});
#endif
  (void)dtype;
  f(float{});
}

}  // namespace

int64_t conv4x4s2_image_packed_bytes(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop) {
  const Image g(shape);
  if (loop == Conv4x4s2Loop::weight_gradient) return 0;
  const int64_t floats = loop == Conv4x4s2Loop::down ? g.patch * g.packed_columns : round_up(g.patch, kLanes) * g.small_channels;
  return floats * static_cast<int64_t>(sizeof(float));
}

// down: [panel of small channels][patch][kPanel]; up: [panel of the patch][small channels][kPanel, or kLanes for the last]
void conv4x4s2_image_pack(const Conv4x4s2Shape& shape, Conv4x4s2Loop loop, const float* weight, void* packed) {
  const Image g(shape);
  float* out = static_cast<float*>(packed);
  const bool down = loop == Conv4x4s2Loop::down;
  const int64_t columns = down ? g.packed_columns : round_up(g.patch, kLanes), depth = down ? g.patch : g.small_channels;
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
  for_dtype(shape.dtype, [&](auto element) {
    using T = decltype(element);
    (loop == Conv4x4s2Loop::down ? image_down<T> : image_up<T>)(shape, input, static_cast<const float*>(packed), output,
                                                                workspace, threads);
  });
}

void conv4x4s2_image_weight_gradient(const Conv4x4s2Shape& shape, const ConvOperand& large, const ConvOperand& small,
                                     float* weight_gradient, void* workspace, int threads) {
  for_dtype(shape.dtype, [&](auto element) {
    image_weight_gradient<decltype(element)>(shape, large, small, weight_gradient, workspace, threads);
  });
}

}  // namespace fastgan::cpu::FASTGAN_ISA
