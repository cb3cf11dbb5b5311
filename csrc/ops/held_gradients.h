// Weight gradients that are added to what the parameters hold while they are computed, in place of being returned to be added.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace fastgan {

// Whether backward passes on this thread do so: for backward() only. Returns what was so before.
bool add_gradients_in_place(bool wanted);

// The gradients that the parameters hold, one for each of output_mask, which is of an operator's input and then of its parameters;
// undefined where it says false, or where adding at once is not what the parameter's AccumulateGrad would do. Empty
// where nothing is to be added in place.
std::vector<at::Tensor> held_gradients(at::TensorList parameters, at::IntArrayRef output_mask);

// What a backward pass returns for `found`, in which [0] stands for what was added to held: undefined there.
void take_gradients(const std::vector<at::Tensor>& found, const std::vector<at::Tensor>& held, at::IntArrayRef output_mask,
                    std::vector<at::Tensor>& gradients);

}  // namespace fastgan
