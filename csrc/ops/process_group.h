// Batch norm over the processes of a torch.distributed group: one collective for its statistics, one for the sums of
// its backward. They are the functional collectives that PyTorch registers as operators, called by name through the
// dispatcher: no header of c10d is needed, and a build without torch.distributed links.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace fastgan {

// The processes that share a batch; `name` is that of a group in c10d's registry, empty for a process alone.
struct ProcessGroup {
  std::string name;
  int64_t size = 1;

  bool alone() const { return name.empty(); }
};

// mean, var [C] (float32 or float64, contiguous) of `count` values a channel of this process, which may be 0, become
// those of all processes, the same bits in each. Returns the count of all; it is an error if that is 1.
int64_t merge_statistics(const char* op, const ProcessGroup& group, const at::Tensor& mean, const at::Tensor& var,
                         int64_t count);

// sums [R, C] become the sums over all processes. Returns the sum of `count`.
int64_t add_over_processes(const ProcessGroup& group, const at::Tensor& sums, int64_t count);

}  // namespace fastgan
