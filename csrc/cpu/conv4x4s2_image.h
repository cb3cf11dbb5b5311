// What the image kernels of conv4x4s2 share: 1 to 4 large channels, float32 and bfloat16.
//
// With so few channels minimal filtering pays in `down` alone, along rows, in float32: what it transforms is the image. A patch
// is the 4x4 window an output of `down` sees: 16 * channels elements, ordered (row, column, channel), so that in NHWC each of its
// four rows is one contiguous run of the image.
#pragma once

#include "conv4x4s2_gemm.h"

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

// Where the weights of a patch's elements lie: floats behind the first weight of a small channel, [channels][4][4].
struct PatchWeights {
  int64_t at[kPatch];
  explicit PatchWeights(const Image& g) {
    for (int64_t p = 0; p < g.patch; ++p) at[p] = p % g.channels * 16 + p / g.channels;
  }
};

// result (+)= the sum of `splits` arrays [patch][columns] that lie `stride` floats apart, in the order of the weight
inline void store_weight_gradient(const Image& g, const float* partials, int64_t splits, int64_t stride, int64_t columns,
                                  const ConvWeightGradient& result) {
  constexpr int64_t kTogether = 32;  // small channels
  const PatchWeights weights(g);
  parallel_for(ceil_div(g.small_channels, kTogether), [&](int64_t task) {
    const int64_t first = task * kTogether, end = min64(first + kTogether, g.small_channels);
    for (int64_t p = 0; p < g.patch; ++p)
      for (int64_t k = first; k < end; ++k) {
        float sum = 0;
        for (int64_t split = 0; split < splits; ++split) sum += partials[split * stride + p * columns + k];
        float& to = result.data[k * g.patch + weights.at[p]];
        to = result.add ? to + sum : sum;
      }
  });
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls f with the Constant of the image's channels.
template <typename F>
inline void with_channels(const Image& g, const F& f) {
  switch (g.channels) {
    case 1: return f(Constant<1>());
    case 2: return f(Constant<2>());
    case 3: return f(Constant<3>());
    default: return f(Constant<4>());
  }
}

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
  with_channels(g, [&](auto channels) { copy_patches<channels.value>(rows, g.padded_row(), g.small_width, patches); });
}

// ---- down: staged rows times panels of weights

constexpr int64_t kDownFloats = 16384;  // results a task holds before its epilogue

// The strips of small rows that tasks take.
struct DownStrips {
  Image g;
  Strips strips;

  // columns: those of the results that a task holds.
  DownStrips(const Conv4x4s2Shape& shape, int64_t columns) : g(shape), strips(g, g.small_width * columns, kDownFloats) {}
  int64_t partials_bytes() const {
    return round_up(2 * g.batch * strips.count * g.small_channels * static_cast<int64_t>(sizeof(float)), ScratchSlots::kAlignment);
  }
};

// Calls run(box, memory, partial) for every strip of every image: the outputs, scratch of plan.slot_bytes(), and where the strip's
// share of the statistics goes; these are merged at the end. Plan: a DownStrips.
template <typename Plan, typename Run>
void for_each_strip(const Plan& plan, const ConvEpilogue& epilogue, void* workspace, int threads, const Run& run) {
  const Image& g = plan.g;
  float* partials = static_cast<float*>(workspace);
  const ScratchSlots slots(static_cast<char*>(workspace) + plan.partials_bytes(), threads, plan.slot_bytes());
  parallel_for(g.batch * plan.strips.count, [&](int64_t task) {
    const int64_t image = task / plan.strips.count, first = task % plan.strips.count * plan.strips.rows;
    const int64_t count = min64(plan.strips.rows, g.small_height - first);
    const ScratchSlots::Lease lease(slots);
    float* partial = partials + 2 * task * g.small_channels;
    const OutputBox box{g.small_height, g.small_width, g.small_channels, image, 1, first, count, 1, 0, g.small_channels};
    run(box, lease.memory(), Partial{partial, partial + g.small_channels});
  });
  merge_partials(epilogue, partials, g.batch * plan.strips.count, g.small_channels, [&](int64_t part) {
    return g.small_width * min64(plan.strips.rows, g.small_height - part % plan.strips.count * plan.strips.rows);
  });
}

struct DownPlan : DownStrips {
  int64_t staged_rows;         // of the image, for a strip
  int64_t parameters, result;  // floats
  int64_t staged_bytes;

  // element_bytes: what is kept of an element of the image.
  DownPlan(const Conv4x4s2Shape& shape, int64_t element_bytes) : DownStrips(shape, shape.small_channels) {
    staged_rows = 2 * strips.rows + 2;
    parameters = RowParameters::floats(g);
    result = strips.rows * g.small_width * g.small_channels;
    staged_bytes = staged_rows * g.padded_row() * element_bytes + kLineBytes;  // whole vectors are read
  }
  int64_t slot_bytes() const { return (parameters + result) * static_cast<int64_t>(sizeof(float)) + staged_bytes; }
};

// Where the sums of a row and a panel, of which there are kPanelVectors vectors, go: to out[pixel * stride + ...].
template <typename T, int kPanelVectors>
struct PanelStore {
  static constexpr int kVectors = kPanelVectors;
  T* out;
  int64_t stride;

  void prefetch(int64_t pixel, int64_t end) const {
    for (; pixel < end; ++pixel)
      for (int64_t at = 0; at < kVectors * kLanes; at += kLineBytes / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(out + pixel * stride + at, 1);
  }
  void operator()(int64_t pixel, int v, Vec sum) const { store(out + pixel * stride + v * kLanes, sum); }
};

// The same with the epilogues `store` and `activate`, of which it takes leaky ReLU and no activation.
template <typename T, int kPanelVectors>
struct FinishedPanelStore : PanelStore<T, kPanelVectors> {
  Vec scale[kPanelVectors], bias[kPanelVectors];
  float slope;

  // c: the panel's first channel
  FinishedPanelStore(const ConvEpilogue& e, T* row, int64_t stride, int64_t c) : PanelStore<T, kPanelVectors>{row + c, stride} {
    const bool activated = e.mode == ConvEpilogue::Mode::activate;
    for (int v = 0; v < kPanelVectors; ++v, c += kLanes) {
      scale[v] = activated && e.scale != nullptr ? load(e.scale + c) : splat(1.0f);
      bias[v] = e.bias != nullptr ? load(e.bias + c) : Vec{};
    }
    slope = activated && e.activation == Activation::leaky_relu ? e.negative_slope : 1.0f;
  }
  void operator()(int64_t pixel, int v, Vec sum) const {
    PanelStore<T, kPanelVectors>::operator()(pixel, v, activate(scale[v] * sum + bias[v], Activation::leaky_relu, slope));
  }
};

inline bool finishes_panels(const ConvEpilogue& e) {
  return e.mode == ConvEpilogue::Mode::store ||
         (e.mode == ConvEpilogue::Mode::activate && (e.activation == Activation::leaky_relu || e.activation == Activation::identity));
}

// T is the storage type. Per task stage(parameters, image, first row, rows, memory) reads rows of the image, and
// multiply(memory, row of the strip, panel, store) calls store(pixel, vector of the panel, sums) for every pixel of the row, and
// store.prefetch(first pixel, end) before.
template <typename T, typename Stage, typename Multiply>
void run_down(const DownPlan& plan, const ConvOperand& large, const ConvEpilogue& epilogue, void* workspace, int threads,
              const Stage& stage, const Multiply& multiply) {
  const Image& g = plan.g;
  const bool finishes = finishes_panels(epilogue);
  for_each_strip(plan, epilogue, workspace, threads, [&](const OutputBox& box, float* memory, const Partial& partial) {
    float *result = memory + plan.parameters, *staged = result + plan.result;
    stage(RowParameters(large, g, memory), box.n0, 2 * box.y0 - 1, 2 * box.rows + 2, staged);
    const auto multiply_panel = [&](int64_t i, int64_t c, auto vectors) {
      if (finishes) {
        T* row = static_cast<T*>(epilogue.out) + box.offset(0, i);
        multiply(staged, i, c / kPanel, FinishedPanelStore<T, vectors.value>(epilogue, row, g.small_channels, c));
      } else {
        float* row = result + i * g.small_width * g.small_channels;
        multiply(staged, i, c / kPanel, PanelStore<float, vectors.value>{row + c, g.small_channels});
      }
    };
    for (int64_t i = 0; i < box.rows; ++i)
      for (int64_t c = 0; c < g.small_channels; c += kPanel)
        kPanel > 16 && g.small_channels - c < kPanel ? multiply_panel(i, c, Constant<1>()) : multiply_panel(i, c, Constant<2>());
    if (!finishes) finish_box<T>(epilogue, box, result, {0, g.small_channels}, partial);
  });
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
  with_channels(g, [&](auto channels) { add_patch_row<channels.value>(products, stride, g.small_width, row); });
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
