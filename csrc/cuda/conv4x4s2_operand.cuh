// An operand of the convolutions that is read pixel by pixel through a window of kernel taps: implicit im2col.
// Column j of the window around pixel (h0, w0) is channel j % channels of pixel (h0 + tap / taps, w0 + tap % taps),
// tap = j / channels; outside the picture it is 0.
#pragma once

#include "activation.cuh"
#include "conv4x4s2.h"
#include "device.cuh"

namespace fastgan::cuda {

struct WindowOperand {
  const void* x;
  Conv4x4Prologue prologue;
  int height, width, channels;
  FastDivisor channel_divisor;
  int log2_taps;  // taps on a side: 1, 2 or 4
  int columns;    // taps * taps * channels
  bool aligned;   // 16-byte accesses of one pixel's channels are possible
  bool halves;    // else: 8-byte ones are, and there is no prologue (100 latent numbers of 16 bits)
};

// Where a row of the summed or of the output dimension looks: an image and a window's first pixel.
struct Window {
  int64_t image;  // first pixel of the image, in pixels
  int h0, w0;
  bool valid;
};

// One 16-byte piece of a window as it comes from memory: all of it or nothing, or halves with zeros where there is
// nothing.
struct Fetched {
  Bytes16 x, y;
  bool valid;
};

// Offset of column j in elements, or -1 where there is nothing.
__device__ __forceinline__ int64_t window_offset(const WindowOperand& o, const Window& window, int j, int& channel) {
  const int tap = o.channel_divisor.divide(j);
  channel = j - tap * o.channels;
  const int h = window.h0 + (tap >> o.log2_taps), w = window.w0 + (tap & ((1 << o.log2_taps) - 1));
  const bool inside = window.valid && j < o.columns && static_cast<unsigned>(h) < static_cast<unsigned>(o.height) &&
                      static_cast<unsigned>(w) < static_cast<unsigned>(o.width);
  return inside ? (window.image + int64_t{h} * o.width + w) * o.channels + channel : -1;
}

template <typename T>
__device__ __forceinline__ void fetch(const WindowOperand& o, const Window& window, int j, Fetched& fetched) {
  int channel;
  if (!o.aligned) {
    if (!o.halves) return;  // read when it is stored, element by element
    uint2 halves[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t offset = window_offset(o, window, j + h * Vector<T>::kSize / 2, channel);
      halves[h] = offset >= 0 ? *reinterpret_cast<const uint2*>(static_cast<const T*>(o.x) + offset) : uint2{0, 0};
    }
    fetched.x.words = uint4{halves[0].x, halves[0].y, halves[1].x, halves[1].y};
    fetched.valid = true;
    return;
  }
  const int64_t offset = window_offset(o, window, j, channel);
  fetched.valid = offset >= 0;
  if (fetched.valid) {
    fetched.x.words = *reinterpret_cast<const uint4*>(static_cast<const T*>(o.x) + offset);
    if (o.prologue.kind == Conv4x4Prologue::Kind::batch_norm_backward) {
      fetched.y.words = *reinterpret_cast<const uint4*>(static_cast<const T*>(o.prologue.y) + offset);
    }
  }
}

// kSize consecutive entries of a per-channel array; a missing array is `otherwise` throughout.
template <int kSize>
__device__ __forceinline__ void load_coefficients(const float* array, int channel, float otherwise,
                                                  float (&values)[kSize]) {
#pragma unroll
  for (int e = 0; e < kSize; e += 4) {
    const float4 four = array != nullptr ? *reinterpret_cast<const float4*>(array + channel + e)
                                         : float4{otherwise, otherwise, otherwise, otherwise};
    values[e] = four.x;
    values[e + 1] = four.y;
    values[e + 2] = four.z;
    values[e + 3] = four.w;
  }
}

// The prologue for a piece of consecutive channels. What does not exist is 0, whatever the prologue makes of 0.
template <typename Math>
__device__ __forceinline__ uint4 transform(const WindowOperand& o, const Fetched& fetched, int j) {
  using T = typename Math::Type;
  constexpr int kSize = Vector<T>::kSize;
  const Conv4x4Prologue& p = o.prologue;
  if (!fetched.valid) return uint4{0, 0, 0, 0};
  if (p.kind == Conv4x4Prologue::Kind::none && !Math::kTf32) return fetched.x.words;
  Vector<T> x;
  unpack(fetched.x, x);
  if (p.kind != Conv4x4Prologue::Kind::none) {
    const int channel = j - o.channel_divisor.divide(j) * o.channels;
    float first[kSize], second[kSize];
    if (p.kind == Conv4x4Prologue::Kind::activate) {
      load_coefficients(p.scale, channel, 1.0f, first);
      load_coefficients(p.shift, channel, 0.0f, second);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        x.values[e] = activate(p.activation.kind, p.activation.negative_slope, fmaf(first[e], x.values[e], second[e]));
      }
    } else {
      Vector<T> y;
      unpack(fetched.y, y);
      load_coefficients(p.b, channel, 0.0f, first);
      load_coefficients(p.c, channel, 0.0f, second);
#pragma unroll
      for (int e = 0; e < kSize; ++e) y.values[e] = fmaf(first[e], y.values[e], second[e]);
      load_coefficients(p.a, channel, 1.0f, first);
#pragma unroll
      for (int e = 0; e < kSize; ++e) x.values[e] = fmaf(first[e], x.values[e], y.values[e]);
    }
  }
  if constexpr (Math::kTf32) {
#pragma unroll
    for (int e = 0; e < kSize; ++e) x.values[e] = round_to_tf32(x.values[e]);
  }
  return pack(x).words;
}

// The same for one element.
template <typename Math>
__device__ __forceinline__ float load_element(const WindowOperand& o, const Window& window, int j) {
  using T = typename Math::Type;
  const Conv4x4Prologue& p = o.prologue;
  int channel;
  const int64_t offset = window_offset(o, window, j, channel);
  if (offset < 0) return 0.0f;
  float x = to_float(static_cast<const T*>(o.x)[offset]);
  if (p.kind == Conv4x4Prologue::Kind::activate) {
    const float scale = p.scale != nullptr ? p.scale[channel] : 1.0f;
    const float shift = p.shift != nullptr ? p.shift[channel] : 0.0f;
    x = activate(p.activation.kind, p.activation.negative_slope, fmaf(scale, x, shift));
  } else if (p.kind == Conv4x4Prologue::Kind::batch_norm_backward) {
    x = fmaf(p.a[channel], x, fmaf(p.b[channel], to_float(static_cast<const T*>(p.y)[offset]), p.c[channel]));
  }
  if constexpr (Math::kTf32) x = round_to_tf32(x);
  return x;
}

// Puts columns j, j + 1, ... of a window into 16 bytes of shared memory. Operands whose channels come in neither
// 16-byte nor 8-byte pieces (pictures of 1 or 3 channels) go element by element: their convolutions are small.
template <typename Math>
__device__ __forceinline__ void store_piece(const WindowOperand& o, const Window& window, const Fetched& fetched, int j,
                                            char* shared) {
  using T = typename Math::Type;
  if (o.aligned || o.halves) {
    *reinterpret_cast<uint4*>(shared) = transform<Math>(o, fetched, j);
  } else {
#pragma unroll 4
    for (int e = 0; e < Vector<T>::kSize; ++e) {
      from_float(load_element<Math>(o, window, j + e), reinterpret_cast<T*>(shared)[e]);
    }
  }
}

}  // namespace fastgan::cuda
