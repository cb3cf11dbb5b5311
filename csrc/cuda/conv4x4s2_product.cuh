// A main loop of the 4x4 convolutions as the matrix product that it is.
#pragma once

#include "conv4x4s2.h"
#include "conv4x4s2_weight.cuh"

namespace fastgan::cuda {

// No more than bias and activation.
inline bool has_plain_epilogue(const Conv4x4Args& args) {
  return args.epilogue.kind == Conv4x4Epilogue::Kind::store || args.epilogue.kind == Conv4x4Epilogue::Kind::bias_activation;
}

inline ActivationSpec activation_of(const Conv4x4Epilogue& plain) {
  return plain.kind == Conv4x4Epilogue::Kind::bias_activation ? plain.activation : ActivationSpec{};
}

// The shape of the matrix product of one direction: rows windows of depth numbers, times columns.
struct Product {
  int64_t rows, columns, depth;
  int64_t grid_height, grid_width;
  int phases, log2_taps;
  bool from_pixel;  // up, stride 1: one row an image, all 16 output pixels as columns
  bool paired;      // weights are packed for pairs of phases, and Hopper's loop takes them so
};

// Depends on nothing that one launch may change: weights are packed before. What Hopper's loop then does not take (a misaligned pointer)
// runs gather_kernel, which reads both orders.
inline bool packs_pairs_of_phases(const Conv4x4Geometry& g, Conv4x4Direction direction, DataType type) {
  return runs_hopper_code() && direction == Conv4x4Direction::up && g.stride == 2 && type != DataType::float32 &&
         g.large_channels == 64 && g.small_channels % 64 == 0 && g.large_width % 2 == 0;
}

inline Product product_of(const Conv4x4Geometry& g, Conv4x4Direction direction, DataType type) {
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
  p.paired = packs_pairs_of_phases(g, direction, type);
  return p;
}

inline int64_t padded_depth(const Product& product, DataType type) {
  if (product.paired) return product.depth / 4 * 6;
  const int64_t vector = 16 / size_of(type);
  return divide_up(product.depth, vector) * vector;
}

}  // namespace fastgan::cuda
