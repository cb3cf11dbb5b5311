// adam_ on CUDA: checks and launch.
#include <torch/library.h>

#include <vector>

#include "../cuda/adam.h"
#include "adam.h"
#include "cuda.h"
#include "tensors.h"

namespace fastgan {
namespace {

void check_float_on_device(const char* argument, const Tensor& tensor, const Tensor& like) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.device() == like.device(), "adam_: ", argument,
              " must be float32 on ", like.device(), ", got ", tensor.scalar_type(), " on ", tensor.device());
}

void check_scalar_on_device(const char* argument, const Tensor& tensor, const Tensor& like) {
  check_float_on_device(argument, tensor, like);
  TORCH_CHECK(tensor.numel() == 1, "adam_: ", argument, " must have one element, got shape ", tensor.sizes());
}

void check_like_parameter(const char* argument, const Tensor& tensor, const Tensor& parameter) {
  check_float_on_device(argument, tensor, parameter);
  TORCH_CHECK(same_order(tensor, parameter), "adam_: ", argument, " must have the shape and strides of its parameter, ",
              parameter.sizes(), " and ", parameter.strides(), ", got ", tensor.sizes(), " and ", tensor.strides());
}

void adam_cuda(at::TensorList parameters, at::TensorList gradients, at::TensorList exp_avgs,
               at::TensorList exp_avg_sqs, at::TensorList steps, const Tensor& blocks_arrived, double lr, double beta1,
               double beta2, double eps, double weight_decay, bool decoupled_weight_decay,
               const OptionalTensor& lr_on_device, const OptionalTensor& found_inf) {
  const auto check_count = [&](const char* argument, at::TensorList list) {
    TORCH_CHECK(list.size() == parameters.size(), "adam_: ", argument, " must be as many as parameters, ",
                parameters.size(), ", got ", list.size());
  };
  check_count("gradients", gradients);
  check_count("exp_avgs", exp_avgs);
  check_count("exp_avg_sqs", exp_avg_sqs);
  check_count("steps", steps);
  if (parameters.empty()) return;
  const Tensor& first = parameters[0];
  TORCH_CHECK(blocks_arrived.scalar_type() == at::kInt && blocks_arrived.device() == first.device() &&
                  blocks_arrived.numel() == 1,
              "adam_: blocks_arrived must be one int32 on ", first.device(), ", got ", blocks_arrived.sizes(), " ",
              blocks_arrived.scalar_type(), " on ", blocks_arrived.device());
  if (lr_on_device.has_value()) check_scalar_on_device("lr_on_device", *lr_on_device, first);
  if (found_inf.has_value()) check_scalar_on_device("found_inf", *found_inf, first);

  std::vector<cuda::AdamTensor> tensors;
  tensors.reserve(parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Tensor& parameter = parameters[i];
    check_float_on_device("parameters", parameter, first);
    TORCH_CHECK(parameter.is_non_overlapping_and_dense(), "adam_: parameters must be dense in memory, got shape ",
                parameter.sizes(), " with strides ", parameter.strides());
    check_like_parameter("gradients", gradients[i], parameter);
    check_like_parameter("exp_avgs", exp_avgs[i], parameter);
    check_like_parameter("exp_avg_sqs", exp_avg_sqs[i], parameter);
    check_scalar_on_device("steps", steps[i], parameter);
    tensors.push_back({parameter.mutable_data_ptr<float>(), gradients[i].const_data_ptr<float>(),
                       exp_avgs[i].mutable_data_ptr<float>(), exp_avg_sqs[i].mutable_data_ptr<float>(),
                       steps[i].mutable_data_ptr<float>(), parameter.numel()});
  }
  cuda::AdamArgs args;
  args.tensors = tensors.data(), args.count = static_cast<int64_t>(tensors.size());
  args.lr = static_cast<float>(lr);
  args.lr_on_device = lr_on_device.has_value() ? lr_on_device->const_data_ptr<float>() : nullptr;
  args.beta1 = static_cast<float>(beta1), args.beta2 = static_cast<float>(beta2), args.eps = static_cast<float>(eps);
  args.weight_decay = static_cast<float>(weight_decay), args.decoupled_weight_decay = decoupled_weight_decay;
  args.found_inf = found_inf.has_value() ? found_inf->const_data_ptr<float>() : nullptr;
  args.blocks_arrived = reinterpret_cast<unsigned*>(blocks_arrived.mutable_data_ptr<int>());
  const DeviceGuard device_guard(first.device());
  C10_CUDA_CHECK(adam_launch(args, current_stream()));
  count_as_written({parameters, exp_avgs, exp_avg_sqs, steps});
}

}  // namespace

#if defined(FASTGAN_CUDA_HOST)
TORCH_LIBRARY_IMPL(fastgan, CPU, m) { m.impl("adam_", &adam_cuda); }
#else
TORCH_LIBRARY_IMPL(fastgan, CUDA, m) { m.impl("adam_", &adam_cuda); }
#endif

}  // namespace fastgan
