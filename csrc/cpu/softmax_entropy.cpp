#include "softmax_entropy.h"

#include "softmax_entropy_blocks.h"

namespace fastgan::cpu {

int64_t check_labels(const int64_t* labels, int64_t rows, int64_t classes, int64_t ignore_index, int64_t* count) {
  *count = 0;
  for (int64_t n = 0; n < rows; ++n) {
    if (labels[n] == ignore_index) continue;
    if (labels[n] < 0 || labels[n] >= classes) return n;
    ++*count;
  }
  return -1;
}

int64_t softmax_entropy_workspace_size(int64_t rows, int64_t classes) {
  return softmax_entropy_blocks(rows, classes).count * softmax_entropy_block_scratch(classes);
}

}  // namespace fastgan::cpu
