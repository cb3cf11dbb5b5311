// Instruction sets: baseline avx2 avx512
//
// A task takes an image. With few channels the compiler turns its loop over pixels into vectors and shuffles: their number is a
// constant. With more it is a matrix, transposed square by square.
#include "image_format.h"
#include "parallel.h"
#include "transpose.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

template <typename T, int kChannels, bool kToPixels>
void convert(const ImageFormatShape& s, const void* from, void* to) {
  parallel_for(s.images, [&](int64_t image) {
    const int64_t pixels = s.pixels;
    const T* __restrict src = static_cast<const T*>(from) + image * kChannels * pixels;
    T* __restrict dst = static_cast<T*>(to) + image * kChannels * pixels;
    for (int64_t p = 0; p < pixels; ++p)
      for (int c = 0; c < kChannels; ++c) {
        if constexpr (kToPixels)
          dst[p * kChannels + c] = src[c * pixels + p];
        else
          dst[c * pixels + p] = src[p * kChannels + c];
      }
  });
}

template <typename T, int kChannels>
void convert(const ImageFormatShape& s, bool to_pixels, const void* from, void* to) {
  (to_pixels ? convert<T, kChannels, true> : convert<T, kChannels, false>)(s, from, to);
}

template <typename T>
void convert(const ImageFormatShape& s, bool to_pixels, const void* from, void* to) {
  (s.channels == 2 ? convert<T, 2> : s.channels == 3 ? convert<T, 3> : convert<T, 4>)(s, to_pixels, from, to);
}

// from[rows][columns] -> to[columns][rows]
void transpose_matrix(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t r = 0; r < rows; r += kSide)
    for (int64_t c = 0; c < columns; c += kSide) transpose_square(from + r * columns + c, columns, to + c * rows + r, rows);
}

}  // namespace

void convert_image_format(const ImageFormatShape& shape, bool to_pixels, const void* from, void* to) {
  if (shape.channels > 4) {
    const int64_t rows = to_pixels ? shape.channels : shape.pixels, columns = to_pixels ? shape.pixels : shape.channels;
    parallel_for(shape.images, [&](int64_t image) {
      const int64_t first = image * rows * columns;
      transpose_matrix(static_cast<const float*>(from) + first, rows, columns, static_cast<float*>(to) + first);
    });
    return;
  }
  (shape.element_bytes == 2 ? convert<uint16_t> : convert<uint32_t>)(shape, to_pixels, from, to);
}

}  // namespace fastgan::cpu::FASTGAN_ISA
