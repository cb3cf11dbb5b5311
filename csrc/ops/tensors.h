// How all operators name tensors, and arguments that may be left out.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fastgan {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline bool defined(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }
inline OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// Gives an array what was computed in `converted`, which is itself where there was nothing to convert.
inline void write_back(const OptionalTensor& array, const Tensor& converted) {
  if (defined(array) && !converted.is_same(*array)) array->copy_(converted);
}

}  // namespace fastgan
