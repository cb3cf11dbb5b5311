// What the image kernels of conv4x4s2 share: 1 to 4 large channels, float32 and bfloat16.
//
// Direct products, not minimal filtering: with so few channels the transforms would cost more than they save. A patch is
// the 4x4 window an output of `down` sees: 16 * channels elements, ordered (row, column, channel), so that in NHWC each of
// its four rows is one contiguous run of the image.
#pragma once

#include "conv4x4s2_common.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t kPatch = 64;  // elements kept for a patch: 16 * 4 channels

typedef float Quad __attribute__((vector_size(16)));

struct Image {
  int64_t batch, height, width, channels;            // large
  int64_t small_height, small_width, small_channels;
  int64_t patch;  // elements of a patch

  explicit Image(const Conv4x4s2Shape& s)
      : batch(s.batch), height(s.large_height), width(s.large_width), channels(s.large_channels),
        small_height(s.small_height), small_width(s.small_width), small_channels(s.small_channels),
        patch(16 * s.large_channels) {}

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
inline void repeat_channels(const float* values, int64_t channels, float otherwise, int64_t length, float* row) {
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

// rows[count][padded_row]: rows y0, y0 + 1, ... of one image, with zeros where they lie outside. T is the storage type, E
// that of the patches.
template <typename T, typename E>
void stage_rows(const ConvOperand& operand, const RowParameters& parameters, const Image& g, int64_t image, int64_t y0,
                int64_t count, E* rows) {
  const int64_t length = g.image_row();
  for (int64_t i = 0; i < count; ++i, rows += g.padded_row()) {
    const int64_t y = y0 + i;
    if (y < 0 || y >= g.height) {
      for (int64_t x = 0; x < g.padded_row(); ++x) rows[x] = E{};
      continue;
    }
    E* dst = rows + g.channels;
    for (int64_t c = 0; c < g.channels; ++c) rows[c] = E{};
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
    for (int64_t x = length; x < g.padded_row() - g.channels; ++x) dst[x] = E{};
  }
}

// patches[width][kPatch] of one output row, from its four staged rows
template <int kChannels, typename E>
void copy_patches(const E* rows, int64_t padded_row, int64_t width, E* patches) {
  for (int64_t j = 0; j < width; ++j, patches += kPatch)
    for (int64_t r = 0; r < 4; ++r)
      __builtin_memcpy(patches + r * 4 * kChannels, rows + r * padded_row + j * 2 * kChannels, 4 * kChannels * sizeof(E));
}

template <typename E>
void copy_patches(const Image& g, const E* rows, E* patches) {
  switch (g.channels) {
    case 1: return copy_patches<1>(rows, g.padded_row(), g.small_width, patches);
    case 2: return copy_patches<2>(rows, g.padded_row(), g.small_width, patches);
    case 3: return copy_patches<3>(rows, g.padded_row(), g.small_width, patches);
    default: return copy_patches<4>(rows, g.padded_row(), g.small_width, patches);
  }
}

// ---- results of up

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

inline void add_patch_row(const Image& g, const float* products, int64_t stride, float* row) {
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
  repeat_channels(e.scale, g.channels, 1, length, scale);
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
        v = activate(load(scale + x) * v + load(shift + x), activation, e.negative_slope);
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

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
