// How a reduction over [outer, channels, inner] is cut into blocks of outer indices: by the shape alone.
#pragma once

#include "bn_act.h"

namespace fastgan::cpu {
namespace {

struct ReductionBlocks {
  int64_t size;   // outer indices a block
  int64_t count;  // blocks
};

// A block of a channels_last tensor is a slab of rows of about 64 KiB of floats; one of a contiguous tensor holds
// about as many elements of one channel.
inline ReductionBlocks reduction_blocks(const BnActShape& shape) {
  constexpr int64_t kElements = 16384, kMostBlocks = 1024;
  const int64_t row = shape.inner == 1 ? shape.channels : shape.inner;
  int64_t size = kElements / (row > 0 ? row : 1);
  if (size < 1) size = 1;
  const int64_t least = (shape.outer + kMostBlocks - 1) / kMostBlocks;
  if (size < least) size = least;
  return {size, (shape.outer + size - 1) / size};
}

}  // namespace
}  // namespace fastgan::cpu
