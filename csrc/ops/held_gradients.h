// Weight gradients that are added to what the parameters hold while they are computed, in place of being returned to be added.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace fastgan {

// Whether backward passes on this thread do so: for backward() only. Returns what was so before.
bool add_gradients_in_place(bool wanted);

// Whether they may put weight gradients off, too, until finish_gradients(). Returns what was so before and forgets what was put off.
bool put_off_gradients(bool wanted);

// Computes what was put off, in the order in which it was.
void finish_gradients();

// The gradients that the parameters hold, one for each of output_mask, which is of an operator's input and then of its parameters;
// undefined where it says false, or where adding at once is not what the parameter's AccumulateGrad would do. Empty
// where nothing is to be added in place.
std::vector<at::Tensor> held_gradients(at::TensorList parameters, at::IntArrayRef output_mask);

// Fills in a gradient, or adds to it.
using ComputeGradient = std::function<void(const at::Tensor& gradient, bool add)>;

// For a backward pass with held_gradients: whether the gradient of a parameter may be put off; has that done.
bool may_put_off(const at::Tensor& parameter);
void put_off(const at::Tensor& parameter, ComputeGradient compute);

// What a backward pass returns for `found`: undefined where it has shape [0], which stands for what was added to held or put off.
void take_gradients(const std::vector<at::Tensor>& found, const std::vector<at::Tensor>& held, at::IntArrayRef output_mask,
                    std::vector<at::Tensor>& gradients);

}  // namespace fastgan
