#include "process_group.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>

#include <cmath>
#include <vector>

#include "../cpu/merge_statistics.h"

namespace fastgan {
namespace {

// Boxed: the schemas' type of a group's name differs between versions of PyTorch, and all of them take a string.
at::Tensor call(const char* op, std::vector<c10::IValue> arguments) {
  c10::Dispatcher::singleton().findSchemaOrThrow(op, "").callBoxed(&arguments);
  return arguments.back().toTensor();
}

// One row for a collective: the values, then the count.
at::Tensor with_count(std::vector<at::Tensor> values, int64_t count) {
  values.push_back(at::full({1}, count, values[0].options()));
  return at::cat(values);
}

at::Tensor collective(const char* op, std::vector<c10::IValue> arguments) {
  return call("_c10d_functional::wait_tensor", {call(op, std::move(arguments))});
}

}  // namespace

int64_t merge_statistics(const char* op, const ProcessGroup& group, const at::Tensor& mean, const at::Tensor& var,
                         int64_t count) {
  const int64_t channels = mean.numel();
  const at::Tensor rows = collective("_c10d_functional::all_gather_into_tensor",
                                     {with_count({mean, var}, count), group.size, group.name});
  const auto merge = [&](auto tag) {
    using A = decltype(tag);
    return cpu::merge_statistics<A>(group.size, channels, rows.const_data_ptr<A>(), mean.mutable_data_ptr<A>(),
                                    var.mutable_data_ptr<A>());
  };
  const int64_t total = mean.scalar_type() == at::kDouble ? merge(double()) : merge(float());
  TORCH_CHECK_VALUE(total != 1, op,
                    ": input must give more than one value per channel when training=True, got one in all processes of "
                    "process_group together");
  return total;
}

int64_t add_over_processes(const ProcessGroup& group, const at::Tensor& sums, int64_t count) {
  const at::Tensor total = collective("_c10d_functional::all_reduce",
                                      {with_count({sums.reshape({-1})}, count), std::string("sum"), group.name});
  sums.copy_(total.narrow(0, 0, sums.numel()).view(sums.sizes()));
  return std::llround(total[sums.numel()].item<double>());
}

}  // namespace fastgan
