// An operand of the convolutions that is read pixel by pixel through a window of kernel taps: implicit im2col.
// Column j of the window around pixel (h0, w0) is channel j % channels of pixel (h0 + tap / taps, w0 + tap % taps),
// tap = j / channels; outside the picture it is 0.
#pragma once

#include "conv4x4s2.h"
#include "device.cuh"

namespace fastgan::cuda {

struct WindowOperand {
  const void* x;
  int height, width, channels;
  FastDivisor channel_divisor;
  int log2_taps;  // taps on a side: 1, 2 or 4
  int columns;    // taps * taps * channels
  bool aligned;   // 16-byte accesses of one pixel's channels are possible
  bool halves;    // else: 8-byte ones are (100 latent numbers of 16 bits)
};

// Where a row of the summed or of the output dimension looks: an image and a window's first pixel.
struct Window {
  int64_t image;  // first pixel of the image, in pixels
  int h0, w0;
  bool valid;
};

// Offset of column j in elements, or -1 where there is nothing.
__device__ __forceinline__ int64_t window_offset(const WindowOperand& o, const Window& window, int j) {
  const int tap = o.channel_divisor.divide(j), channel = j - tap * o.channels;
  const int h = window.h0 + (tap >> o.log2_taps), w = window.w0 + (tap & ((1 << o.log2_taps) - 1));
  const bool inside = window.valid && j < o.columns && static_cast<unsigned>(h) < static_cast<unsigned>(o.height) &&
                      static_cast<unsigned>(w) < static_cast<unsigned>(o.width);
  return inside ? (window.image + int64_t{h} * o.width + w) * o.channels + channel : -1;
}

// 16 bytes of a window from column j on, with zeros where there is nothing: what store_piece() will store, but for
// operands that it reads element by element.
template <typename T>
__device__ __forceinline__ uint4 fetch(const WindowOperand& o, const Window& window, int j) {
  const T* x = static_cast<const T*>(o.x);
  if (o.aligned) {
    const int64_t offset = window_offset(o, window, j);
    return offset >= 0 ? *reinterpret_cast<const uint4*>(x + offset) : uint4{0, 0, 0, 0};
  }
  uint2 halves[2] = {};
  if (o.halves) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t offset = window_offset(o, window, j + h * Vector<T>::kSize / 2);
      if (offset >= 0) halves[h] = *reinterpret_cast<const uint2*>(x + offset);
    }
  }
  return uint4{halves[0].x, halves[0].y, halves[1].x, halves[1].y};
}

// Puts columns j, j + 1, ... of a window into 16 bytes of shared memory. Operands whose channels come in neither
// 16-byte nor 8-byte pieces (pictures of 1 or 3 channels) go element by element: their convolutions are small.
template <typename T>
__device__ __forceinline__ void store_piece(const WindowOperand& o, const Window& window, uint4 fetched, int j,
                                            char* shared) {
  if (o.aligned || o.halves) {
    *reinterpret_cast<uint4*>(shared) = fetched;
  } else {
#pragma unroll 4
    for (int e = 0; e < Vector<T>::kSize; ++e) {
      const int64_t offset = window_offset(o, window, j + e);
      reinterpret_cast<T*>(shared)[e] = offset >= 0 ? static_cast<const T*>(o.x)[offset] : T{};
    }
  }
}

}  // namespace fastgan::cuda
