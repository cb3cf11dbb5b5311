// How the rows of softmax_entropy are cut into blocks, and what scratch a block gets: by the shape alone.
#pragma once

#include <cstdint>

namespace fastgan::cpu {
namespace {

constexpr int kRowLanes = 16;  // rows the widest instruction set works on side by side

struct SoftmaxEntropyBlocks {
  int64_t size;   // rows a block, a multiple of kRowLanes
  int64_t count;  // blocks
};

inline SoftmaxEntropyBlocks softmax_entropy_blocks(int64_t rows, int64_t classes) {
  constexpr int64_t kElements = 32768, kMostBlocks = 256;
  int64_t size = kElements / classes;
  const int64_t least = (rows + kMostBlocks - 1) / kMostBlocks;
  if (size < least) size = least;
  size = (size + kRowLanes - 1) / kRowLanes * kRowLanes;
  if (size < kRowLanes) size = kRowLanes;
  return {size, (rows + size - 1) / size};
}

// Two tiles [classes][kRowLanes], then the block's sums: classes probabilities, entropy, cross-entropy. A multiple of
// kRowLanes, so that the tiles of every block are aligned as the workspace is.
inline int64_t softmax_entropy_block_scratch(int64_t classes) {
  return 2 * classes * kRowLanes + (classes + 2 + kRowLanes - 1) / kRowLanes * kRowLanes;
}

}  // namespace
}  // namespace fastgan::cpu
