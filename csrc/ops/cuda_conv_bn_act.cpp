// The convolution family on CUDA. 4x4 kernels with stride 2 padding 1 or stride 1 padding 0 run our main loops in
// channels_last (float32: what conv4x4s2.h names); everything else runs ATen's convolution (cuDNN) between the fused
// batch-norm and activation kernels. float64 runs on ATen's operators.
//
// All launches are on the current stream, allocate through PyTorch and never synchronise: a CUDA graph can capture
// them.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/native/ConvUtils.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/util/strides.h>
#include <torch/library.h>

#include "conv_bn_act.h"
#include "cuda_conv4x4s2.h"

namespace fastgan {
namespace {

using cuda::Conv4x4Direction;
using cuda::Conv4x4Geometry;

// ---- tensors to kernel arguments ---------------------------------------------------------------------------------

cuda::BnActShape kernel_shape(const Tensor& tensor) {  // [N, C, H, W], dense
  const int64_t plane = tensor.size(2) * tensor.size(3);
  if (dense_format(tensor) == at::MemoryFormat::Contiguous) return {tensor.size(0), tensor.size(1), plane};
  return {tensor.size(0) * plane, tensor.size(1), 1};
}

Tensor as_float(const OptionalTensor& array) { return defined(array) ? array->to(at::kFloat).contiguous() : Tensor(); }

// Sizes of the convolution's output.
std::vector<int64_t> output_sizes(const Tensor& input, const Tensor& weight, const ConvLayer& layer) {
  if (!layer.transposed) {
    return at::native::conv_output_size(input.sizes(), weight.sizes(), layer.padding, layer.stride, layer.dilation);
  }
  return at::native::conv_input_size(input.sizes(), weight.sizes(), layer.padding, layer.output_padding, layer.stride,
                                     layer.dilation, layer.groups);
}

// The memory format that F.conv2d gives its output.
at::MemoryFormat output_format(const Tensor& input, const Tensor& weight) {
#if defined(FASTGAN_CUDA_HOST)  // where PyTorch may be one without cuDNN, for which ATen's rule has another answer
  const auto channels_last = [](const Tensor& tensor) { return tensor.suggest_memory_format() == kChannelsLast; };
  return channels_last(input) || channels_last(weight) ? kChannelsLast : at::MemoryFormat::Contiguous;
#else
  return at::native::cudnn_conv_suggest_memory_format(input, weight);
#endif
}

bool allows_tf32() { return at::globalContext().allowTF32CuDNN(at::Float32Op::CONV); }

// Whether the main loops take whatever layer they know. Of float32 they take some; by portable loops for any layer a whole step
// took 8.2 ms, by cuDNN's 3.4 (TF32, H200, 64 px, batch 128).
bool takes_every_layer(const Tensor& images) { return cuda::conv4x4s2_takes(cuda_type(images.scalar_type())); }

// The layer as the main loops know it, or nothing where they do not, or, in float32, where they would have to copy tensors into
// channels_last and back.
std::optional<Conv4x4Geometry> known_geometry(const Tensor& input, const Tensor& weight, const ConvLayer& layer,
                                              at::IntArrayRef output) {
  const auto both = [](IntArrayRef pair, int64_t value) { return pair[0] == value && pair[1] == value; };
  const bool shape_known =
      weight.size(2) == 4 && weight.size(3) == 4 && layer.groups == 1 && both(layer.dilation, 1) &&
      ((both(layer.stride, 2) && both(layer.padding, 1)) || (both(layer.stride, 1) && both(layer.padding, 0)));
  if (!shape_known || input.scalar_type() == at::kDouble || input.numel() == 0) return std::nullopt;
  if (!takes_every_layer(input) && output_format(input, weight) != kChannelsLast) return std::nullopt;
  const at::IntArrayRef small = layer.transposed ? input.sizes() : output;
  const at::IntArrayRef large = layer.transposed ? output : input.sizes();
  const Conv4x4Geometry geometry{small[0], small[2], small[3], small[1],
                                 large[2], large[3], large[1], static_cast<int>(layer.stride[0])};
  if (!conv4x4s2_supported(geometry, Conv4x4Direction::down)) return std::nullopt;
  if (!conv4x4s2_supported(geometry, Conv4x4Direction::up)) return std::nullopt;
  return geometry;
}

Conv4x4Direction forward_direction(const ConvLayer& layer) {
  return layer.transposed ? Conv4x4Direction::up : Conv4x4Direction::down;
}

Conv4x4Direction backward_direction(const ConvLayer& layer) {
  return layer.transposed ? Conv4x4Direction::down : Conv4x4Direction::up;
}

// One main loop: images through the weight in the given direction. Its result [sizes] in channels_last, or nothing where the
// loops do not take it. Called with an epilogue whose tile arrays are still to be allocated; `tiles` keeps them alive for the
// caller.
Tensor run_main_loop(const std::optional<Conv4x4Geometry>& geometry, Conv4x4Direction direction, const Tensor& images,
                     const Tensor& weight, IntArrayRef sizes, cuda::Conv4x4Epilogue& epilogue, Tensor& tiles) {
  if (!geometry) return {};
  cuda::Conv4x4Args args;
  args.geometry = *geometry;
  args.direction = direction;
  args.type = cuda_type(images.scalar_type());
  args.tf32 = allows_tf32();
  args.multiprocessors = multiprocessors();
  args.input = images.const_data_ptr();
  args.epilogue = epilogue;
  if (!conv4x4s2_takes(args)) return {};

  const Tensor input = images.contiguous(kChannelsLast);
  args.input = input.const_data_ptr();
  const Tensor dense_weight = weight.contiguous(weight_format(weight));
  cuda::Conv4x4PackArgs pack{*geometry,
                             direction,
                             args.type,
                             cuda_type(weight.scalar_type()),
                             weight_layout(weight_format(weight)),
                             dense_weight.const_data_ptr(),
                             nullptr};
  Tensor packed = dense_weight;
  if (!conv4x4s2_is_packed(pack)) {
    packed = scratch(input, conv4x4s2_packed_bytes(pack));
    pack.packed = packed.mutable_data_ptr();
    C10_CUDA_CHECK(conv4x4s2_pack_launch(&pack, 1, current_stream()));
  }
  args.packed_weight = packed.const_data_ptr();

  const Tensor output = at::empty(sizes, input.options().memory_format(kChannelsLast));
  args.output = output.mutable_data_ptr();
  if (epilogue.kind == cuda::Conv4x4Epilogue::Kind::statistics) {
    epilogue.statistics = conv4x4s2_statistics_shape(args);
    const int64_t rows = epilogue.statistics.tiles, channels = output.size(1);
    tiles = empty_floats(input, {2 * rows * channels + rows / epilogue.statistics.rows_per_count});
    epilogue.statistics.mean = floats(tiles);
    epilogue.statistics.m2 = floats(tiles) + rows * channels;
    epilogue.statistics.count = floats(tiles) + 2 * rows * channels;
  }
  args.epilogue = epilogue;
  C10_CUDA_CHECK(conv4x4s2_launch(args, current_stream()));
  return output;
}

// Gradients of input and weight from that of the convolution's output; undefined where nobody wants them.
std::tuple<Tensor, Tensor> gradients_of_convolution(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                                    const ConvLayer& layer, bool want_input, bool want_weight) {
  Tensor grad_input, grad_weight;
  const auto geometry = known_geometry(input, weight, layer, grad.sizes());
  if (geometry && (want_input || want_weight)) {
    const Tensor dy = grad.contiguous(kChannelsLast);
    if (want_input) {
      cuda::Conv4x4Epilogue epilogue;
      Tensor no_tiles;
      grad_input = run_main_loop(geometry, backward_direction(layer), dy, weight, input.sizes(), epilogue, no_tiles);
      if (grad_input.defined()) grad_input = grad_input.contiguous(input.suggest_memory_format());
    }
    cuda::Conv4x4WeightGradientArgs args;
    args.geometry = *geometry;
    args.type = cuda_type(input.scalar_type());
    args.tf32 = allows_tf32();
    args.multiprocessors = multiprocessors();
    (layer.transposed ? args.large : args.small) = dy.const_data_ptr();
    const void*& images = layer.transposed ? args.small : args.large;
    images = input.const_data_ptr();
    if (want_weight && conv4x4s2_takes(args)) {
      const Tensor x = input.contiguous(kChannelsLast);
      images = x.const_data_ptr();
      grad_weight = at::empty(weight.sizes(), weight.options().memory_format(weight_format(weight)));
      args.weight_type = cuda_type(weight.scalar_type());
      args.weight_layout = weight_layout(weight_format(weight));
      args.grad_weight = grad_weight.mutable_data_ptr();
      const Tensor workspace = scratch(input, conv4x4s2_weight_gradient_workspace_bytes(args));
      args.workspace = workspace.mutable_data_ptr();
      C10_CUDA_CHECK(conv4x4s2_weight_gradient_launch(args, current_stream()));
    }
  }
  want_input &= !grad_input.defined(), want_weight &= !grad_weight.defined();
  if (want_input || want_weight) {
    const auto [of_input, of_weight] = convolution_backward(grad, input, weight, layer, {want_input, want_weight});
    if (want_input) grad_input = of_input;
    if (want_weight) grad_weight = of_weight;
  }
  return {grad_input, grad_weight};
}

Tensor in_output_format(const Tensor& output, const Tensor& input, const Tensor& weight) {
  const at::MemoryFormat format = output_format(input, weight);
  const Tensor formatted = output.contiguous(format);
  // With one channel or one pixel the bytes are the same in both formats, and only the strides tell the next layer
  // which one it is.
  if (format == kChannelsLast || !formatted.is_contiguous(kChannelsLast)) return formatted;
  return formatted.as_strided(output.sizes(), c10::contiguous_strides(output.sizes()));
}

// ---- float64 on ATen's operators ---------------------------------------------------------------------------------

Tensor channels(const Tensor& array) { return array.view({1, -1, 1, 1}); }

// act'(z) from y = act(z)
Tensor derivative_from_output(const Tensor& y, Activation activation, double negative_slope) {
  switch (activation) {
    case Activation::relu: return (y > 0).to(y.scalar_type());
    case Activation::leaky_relu: return at::where(y > 0, at::ones_like(y), at::full_like(y, negative_slope));
    case Activation::tanh: return 1 - y * y;
    case Activation::sigmoid: return y * (1 - y);
    default: return at::ones_like(y);
  }
}

Tensor with_bn_parameters(const Tensor& xhat, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias) {
  Tensor z = xhat;
  if (defined(bn_weight)) z = z * channels(*bn_weight);
  if (defined(bn_bias)) z = z + channels(*bn_bias);
  return z;
}

// ---- the operators -----------------------------------------------------------------------------------------------

// fastgan/ops runs PyTorch's own operators there.
void refuse_process_group(c10::string_view name) {
  TORCH_CHECK_NOT_IMPLEMENTED(name.empty(), "conv_bn_act: the CUDA kernels take no process_group, got '", name, "'");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_act_forward_cuda(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& bn_weight,
    const OptionalTensor& bn_bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
    int64_t groups, bool training, double momentum, double eps, c10::string_view activation_name, double negative_slope,
    bool save_for_backward, c10::string_view process_group, int64_t) {
  refuse_process_group(process_group);
  const DeviceGuard device_guard(input.device());
  const ConvLayer layer{stride, padding, dilation, transposed, output_padding, groups};
  const cuda::ActivationSpec activation{parse_activation("conv_bn_act_forward", activation_name),
                                        static_cast<float>(negative_slope)};
  const auto saved = [&](const Tensor& y) { return save_for_backward ? y : at::empty({0}, y.options()); };
  if (input.scalar_type() == at::kDouble) {
    const Tensor y = convolution(input, weight, bias, layer);
    if (y.numel() == 0) return {y, saved(y), at::zeros({y.size(1)}, y.options()), at::zeros({y.size(1)}, y.options())};
    const double count = static_cast<double>(y.numel()) / static_cast<double>(y.size(1));
    const Tensor mean = training ? y.mean({0, 2, 3}) : running_mean->to(at::kDouble);
    const Tensor var = training ? (y - channels(mean)).square().mean({0, 2, 3}) : running_var->to(at::kDouble);
    if (training && defined(running_mean)) running_mean->lerp_(mean.to(running_mean->scalar_type()), momentum);
    if (training && defined(running_var)) {
      running_var->lerp_((var * (count / (count - 1))).to(running_var->scalar_type()), momentum);
    }
    const Tensor invstd = (var + eps).rsqrt();
    const Tensor xhat = (y - channels(mean)) * channels(invstd);
    return {dense(activate(with_bn_parameters(xhat, bn_weight, bn_bias), activation.kind, negative_slope)),
            saved(y), mean.clone(), invstd};
  }

  const auto sizes = output_sizes(input, weight, layer);
  const auto geometry = known_geometry(input, weight, layer, sizes);
  const bool with_statistics = training && geometry && takes_every_layer(input);
  cuda::BatchNormForwardArgs batch_norm;
  const Tensor float_bias = geometry ? as_float(bias) : Tensor();
  cuda::Conv4x4Epilogue epilogue;
  epilogue.kind = with_statistics ? cuda::Conv4x4Epilogue::Kind::statistics : cuda::Conv4x4Epilogue::Kind::store;
  epilogue.bias = floats(float_bias);
  Tensor tiles, y = run_main_loop(geometry, forward_direction(layer), input, weight, sizes, epilogue, tiles);
  batch_norm.tiles = epilogue.statistics;
  if (!y.defined()) y = dense(convolution(input, weight, bias, layer));
  const int64_t count = y.size(1);
  const Tensor mean = empty_floats(y, {count}), invstd = empty_floats(y, {count}), folded = empty_floats(y, {2, count});
  if (y.numel() == 0) return {y, saved(y), mean.zero_(), invstd.zero_()};

  const cuda::DataType type = cuda_type(y.scalar_type());
  const cuda::BnActShape shape = kernel_shape(y);
  if (training && !with_statistics) {
    const int64_t rows = cuda::bn_act_tiles(shape);
    tiles = empty_floats(y, {2 * rows * count + rows});
    batch_norm.tiles = {rows, 1, floats(tiles), floats(tiles) + rows * count, floats(tiles) + 2 * rows * count};
    C10_CUDA_CHECK(
        cuda::batch_statistics_launch({shape, type, y.const_data_ptr(), batch_norm.tiles}, current_stream()));
  }
  const Tensor gamma = as_float(bn_weight), beta = as_float(bn_bias);
  const Tensor new_mean = as_float(running_mean), new_var = as_float(running_var);
  batch_norm.channels = count;
  batch_norm.count = static_cast<double>(y.numel() / count);
  batch_norm.weight = floats(gamma);
  batch_norm.bias = floats(beta);
  batch_norm.eps = static_cast<float>(eps);
  batch_norm.momentum = static_cast<float>(momentum);
  batch_norm.running_mean = floats(new_mean);
  batch_norm.running_var = floats(new_var);
  batch_norm.mean = floats(mean);
  batch_norm.invstd = floats(invstd);
  batch_norm.scale = floats(folded);
  batch_norm.shift = floats(folded) + count;
  C10_CUDA_CHECK(training ? batch_norm_forward_launch(batch_norm, current_stream())
                          : batch_norm_inference_launch(batch_norm, current_stream()));
  if (training) write_back(running_mean, new_mean), write_back(running_var, new_var);

  const Tensor output = save_for_backward ? at::empty_like(y) : y;
  C10_CUDA_CHECK(cuda::scale_shift_act_launch(
      {shape, type, y.const_data_ptr(), batch_norm.scale, batch_norm.shift, activation, output.mutable_data_ptr()},
      current_stream()));
  return {in_output_format(output, input, weight), saved(y), mean, invstd};
}

// The gradients the mask does not ask for come back with shape [0].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_act_backward_cuda(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& conv_output, const Tensor& mean,
    const Tensor& invstd, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups,
    bool training, c10::string_view activation_name, double negative_slope, std::array<bool, 5> output_mask,
    c10::string_view process_group, int64_t) {
  refuse_process_group(process_group);
  const DeviceGuard device_guard(input.device());
  const ConvLayer layer{stride, padding, dilation, transposed, output_padding, groups};
  const cuda::ActivationSpec activation{parse_activation("conv_bn_act_backward", activation_name),
                                        static_cast<float>(negative_slope)};
  const Tensor& y = conv_output;
  const int64_t channel_count = y.size(1);
  const double count = static_cast<double>(y.numel()) / static_cast<double>(channel_count);
  Tensor dy, sum_dz, sum_dz_xhat;
  const auto scale = [&] { return defined(bn_weight) ? invstd * bn_weight->to(invstd.scalar_type()) : invstd; };
  if (y.scalar_type() == at::kDouble) {
    const Tensor xhat = (y - channels(mean)) * channels(invstd);
    // By the sign of z itself: that of a leaky ReLU's output does not tell where negative_slope < 0.
    const Tensor z = with_bn_parameters(xhat, bn_weight, bn_bias);
    const bool by_sign = activation.kind == Activation::relu || activation.kind == Activation::leaky_relu;
    const Tensor from = by_sign ? z : activate(z, activation.kind, negative_slope);
    const Tensor dz = grad_output * derivative_from_output(from, activation.kind, negative_slope);
    sum_dz = dz.sum({0, 2, 3});
    sum_dz_xhat = (dz * xhat).sum({0, 2, 3});
    dy = training ? channels(scale()) * (dz - channels(sum_dz) / count - xhat * (channels(sum_dz_xhat) / count))
                  : channels(scale()) * dz;
  } else {
    const Tensor grad = grad_output.contiguous(dense_format(y));
    sum_dz = empty_floats(y, {channel_count}), sum_dz_xhat = empty_floats(y, {channel_count});
    const Tensor gamma = as_float(bn_weight), beta = as_float(bn_bias);
    dy = at::empty_like(y);
    if (y.numel() == 0) {
      sum_dz.zero_();
      sum_dz_xhat.zero_();
    } else {
      const cuda::BnActShape shape = kernel_shape(y);
      const int64_t tile_count = cuda::bn_act_tiles(shape);
      const Tensor tiles = empty_floats(y, {2 * tile_count * channel_count});
      const Tensor of_dy = training ? empty_floats(y, {2, channel_count}) : Tensor();  // b, c
      cuda::BnActBackwardArgs args;
      args.shape = shape;
      args.type = cuda_type(y.scalar_type());
      args.grad_output = grad.const_data_ptr();
      args.input = y.const_data_ptr();
      args.weight = floats(gamma);
      args.bias = floats(beta);
      args.mean = floats(mean);
      args.invstd = floats(invstd);
      args.activation = activation;
      args.tiles = {tile_count, floats(tiles), floats(tiles) + tile_count * channel_count};
      args.grad_input = dy.mutable_data_ptr();
      C10_CUDA_CHECK(bn_act_backward_reduce_launch(args, current_stream()));
      cuda::BatchNormBackwardArgs merge;
      merge.channels = channel_count;
      merge.tiles = args.tiles;
      merge.count = count;
      merge.sum_dz = floats(sum_dz);
      merge.sum_dz_xhat = floats(sum_dz_xhat);
      if (training) {
        args.b = merge.b = floats(of_dy);
        args.c = merge.c = floats(of_dy) + channel_count;
        merge.weight = floats(gamma);
        merge.mean = floats(mean);
        merge.invstd = floats(invstd);
      }
      C10_CUDA_CHECK(batch_norm_backward_launch(merge, current_stream()));
      if (output_mask[0] || output_mask[1]) C10_CUDA_CHECK(bn_act_backward_apply_launch(args, current_stream()));
    }
  }
  const Tensor none = at::empty({0}, y.options());
  const auto [grad_input, grad_weight] =
      gradients_of_convolution(dy, input, weight, layer, output_mask[0], output_mask[1]);
  // Batch statistics cancel the bias, so its gradient in training mode is exactly 0.
  Tensor grad_bias = none.clone();
  if (output_mask[2]) {
    grad_bias = training ? at::zeros({channel_count}, y.options()) : (scale() * sum_dz).to(y.scalar_type());
  }
  const auto parameter = [&](const Tensor& sum, const OptionalTensor& like) {
    return defined(like) ? sum.to(like->scalar_type()) : none.clone();
  };
  return {output_mask[0] ? grad_input : none, output_mask[1] ? grad_weight : none.clone(), grad_bias,
          output_mask[3] ? parameter(sum_dz_xhat, bn_weight) : none.clone(),
          output_mask[4] ? parameter(sum_dz, bn_bias) : none.clone()};
}

Tensor conv_act_forward_cuda(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                             IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                             int64_t groups, c10::string_view activation_name, double negative_slope) {
  const DeviceGuard device_guard(input.device());
  const ConvLayer layer{stride, padding, dilation, transposed, output_padding, groups};
  const cuda::ActivationSpec activation{parse_activation("conv_act_forward", activation_name),
                                        static_cast<float>(negative_slope)};
  if (input.scalar_type() == at::kDouble) {
    return dense(activate(convolution(input, weight, bias, layer), activation.kind, negative_slope));
  }
  const auto sizes = output_sizes(input, weight, layer);
  const auto geometry = known_geometry(input, weight, layer, sizes);
  const Tensor float_bias = geometry ? as_float(bias) : Tensor();
  cuda::Conv4x4Epilogue epilogue;
  epilogue.kind = cuda::Conv4x4Epilogue::Kind::bias_activation;
  epilogue.bias = floats(float_bias);
  epilogue.activation = activation;
  Tensor no_tiles;
  const Tensor output = run_main_loop(geometry, forward_direction(layer), input, weight, sizes, epilogue, no_tiles);
  if (output.defined()) return in_output_format(output, input, weight);
  const Tensor y = dense(convolution(input, weight, bias, layer));
  if (activation.kind == Activation::identity || y.numel() == 0) return y;
  C10_CUDA_CHECK(cuda::scale_shift_act_launch({kernel_shape(y), cuda_type(y.scalar_type()), y.const_data_ptr(), nullptr,
                                               nullptr, activation, y.mutable_data_ptr()},
                                              current_stream()));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> conv_act_backward_cuda(const Tensor& grad_output, const Tensor& input,
                                                          const Tensor& weight, const Tensor& output,
                                                          IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                          bool transposed, IntArrayRef output_padding, int64_t groups,
                                                          c10::string_view activation_name, double negative_slope,
                                                          std::array<bool, 3> output_mask) {
  const DeviceGuard device_guard(input.device());
  const ConvLayer layer{stride, padding, dilation, transposed, output_padding, groups};
  const cuda::ActivationSpec activation{parse_activation("conv_act_backward", activation_name),
                                        static_cast<float>(negative_slope)};
  Tensor dy, sum;
  if (output.scalar_type() == at::kDouble) {
    dy = grad_output * derivative_from_output(output, activation.kind, negative_slope);
    sum = dy.sum({0, 2, 3});
  } else {
    // Our main loops want channels_last; beside cuDNN the output's own format is kept.
    const bool known = known_geometry(input, weight, layer, output.sizes()).has_value();
    const Tensor y = known ? output.contiguous(kChannelsLast) : dense(output);
    const Tensor grad = grad_output.contiguous(dense_format(y));
    sum = empty_floats(y, {y.size(1)});
    dy = at::empty_like(y);
    if (y.numel() == 0) {
      sum.zero_();
    } else {
      const cuda::BnActShape shape = kernel_shape(y);
      const int64_t tile_count = cuda::bn_act_tiles(shape);
      const Tensor tiles = output_mask[2] ? empty_floats(y, {tile_count * y.size(1)}) : Tensor();
      const cuda::GradientTiles sums{tile_count, floats(tiles), nullptr};
      C10_CUDA_CHECK(cuda::act_backward_launch({shape, cuda_type(y.scalar_type()), grad.const_data_ptr(),
                                                y.const_data_ptr(), activation, dy.mutable_data_ptr(), sums},
                                               current_stream()));
      if (output_mask[2]) {
        cuda::BatchNormBackwardArgs merge;
        merge.channels = y.size(1);
        merge.tiles = sums;
        merge.sum_dz = floats(sum);
        C10_CUDA_CHECK(batch_norm_backward_launch(merge, current_stream()));
      }
    }
  }
  const Tensor none = at::empty({0}, output.options());
  const auto [grad_input, grad_weight] =
      gradients_of_convolution(dy, input, weight, layer, output_mask[0], output_mask[1]);
  return {output_mask[0] ? grad_input : none, output_mask[1] ? grad_weight : none.clone(),
          output_mask[2] ? sum.to(output.scalar_type()) : none.clone()};
}

}  // namespace

FASTGAN_CUDA_OPERATORS(m) {
  m.impl("conv_bn_act_forward", &conv_bn_act_forward_cuda);
  m.impl("conv_bn_act_backward", &conv_bn_act_backward_cuda);
  m.impl("conv_act_forward", &conv_act_forward_cuda);
  m.impl("conv_act_backward", &conv_act_backward_cuda);
}

}  // namespace fastgan
