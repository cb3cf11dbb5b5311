#include "image_format.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../cpu/image_format.h"
#include "kept_memory.h"

namespace fastgan {
namespace {

using at::MemoryFormat;
using at::Tensor;

cpu::ImageFormatShape image_shape(const Tensor& t) {
  return {t.size(0), t.size(1), t.size(2) * t.size(3), static_cast<int64_t>(t.element_size())};
}

MemoryFormat format_of(bool channels_last) { return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous; }

// On CUDA by ATen's copy
Tensor convert_images_kernel(const Tensor& input, bool channels_last) {
  TORCH_CHECK_VALUE(input.dim() == 4, "convert_images: input must have shape [N, C, H, W], got ", input.sizes());
  const cpu::ImageFormatShape shape = image_shape(input);
  if (!input.is_cpu() || !cpu::image_format_supported(shape) || !input.is_contiguous(format_of(!channels_last)))
    return input.clone(format_of(channels_last));
  const Tensor output = empty_kept(input.sizes(), input.scalar_type(), channels_last);
  cpu::convert_images(shape, channels_last, input.const_data_ptr(), output.mutable_data_ptr());
  return output;
}

// The operator
Tensor convert_images(const Tensor& input, bool channels_last) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("fastgan::convert_images", "")
                       .typed<decltype(convert_images_kernel)>();
  return op.call(input, channels_last);
}

struct ConvertImages : torch::autograd::Function<ConvertImages> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& input, bool channels_last) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->set_materialize_grads(false);
    ctx->saved_data["channels_last"] = channels_last;
    return convert_images(input, channels_last);
  }
  // The gradient of contiguous images is contiguous, as of PyTorch's layers: gradient penalties take view() of it. The other way
  // it stays as it comes, for what has written the images reads any.
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& gradients) {
    const bool converts = ctx->saved_data["channels_last"].toBool() && gradients[0].defined();
    return {converts ? contiguous_images(gradients[0], MemoryFormat::Contiguous) : gradients[0], Tensor()};
  }
};

Tensor convert_images_meta(const Tensor& input, bool channels_last) {
  return at::empty_like(input, at::TensorOptions(), format_of(channels_last));
}

Tensor convert_images_autograd(const Tensor& input, bool channels_last) { return ConvertImages::apply(input, channels_last); }

}  // namespace

Tensor contiguous_images(const Tensor& t, MemoryFormat format) {
  if (is_batched(t)) return t;
  const bool channels_last = format == MemoryFormat::ChannelsLast;
  if ((!t.is_cpu() && !t.is_cuda()) || t.dim() != 4 || t.unsafeGetTensorImpl()->has_symbolic_sizes_strides() || t.is_contiguous(format))
    return t.contiguous(format);
  const bool own = t.is_cpu() && t.is_contiguous(format_of(!channels_last)) && cpu::image_format_supported(image_shape(t));
  if (!own && !(channels_last && t.requires_grad() && at::GradMode::is_enabled())) return t.contiguous(format);
  return convert_images(t, channels_last);
}

TORCH_LIBRARY_IMPL(fastgan, CompositeImplicitAutograd, m) {
  m.impl("contiguous_images", [](const Tensor& input, bool channels_last) {
    return contiguous_images(input, format_of(channels_last));
  });
}
TORCH_LIBRARY_IMPL(fastgan, CPU, m) { m.impl("convert_images", &convert_images_kernel); }
TORCH_LIBRARY_IMPL(fastgan, CUDA, m) { m.impl("convert_images", &convert_images_kernel); }
TORCH_LIBRARY_IMPL(fastgan, Meta, m) { m.impl("convert_images", &convert_images_meta); }
TORCH_LIBRARY_IMPL(fastgan, Autograd, m) { m.impl("convert_images", &convert_images_autograd); }

}  // namespace fastgan
