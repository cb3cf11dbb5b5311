#include "image_format.h"

#include <ATen/core/dispatch/Dispatcher.h>
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

// input: dense, in the other format
Tensor convert_images_cpu(const Tensor& input, bool channels_last) {
  const cpu::ImageFormatShape shape = image_shape(input);
  TORCH_CHECK(cpu::image_format_supported(shape) && input.is_contiguous(format_of(!channels_last)),
              "convert_images: input must be dense, in the other memory format, with 2 to 4 channels of 2 or 4 bytes, or of 4 bytes "
              "with channels and pixels in multiples of 8");
  const Tensor output = empty_kept(input.sizes(), input.scalar_type(), channels_last);
  cpu::convert_images(shape, channels_last, input.const_data_ptr(), output.mutable_data_ptr());
  return output;
}

// The operator
Tensor convert_images(const Tensor& input, bool channels_last) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("fastgan::convert_images", "")
                       .typed<decltype(convert_images_cpu)>();
  return op.call(input, channels_last);
}

struct ConvertImages : torch::autograd::Function<ConvertImages> {
  static Tensor forward(torch::autograd::AutogradContext*, const Tensor& input, bool channels_last) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return convert_images(input, channels_last);
  }
  // As clone's: a gradient in any memory format is one.
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 const torch::autograd::variable_list& gradients) {
    return {gradients[0], Tensor()};
  }
};

Tensor convert_images_meta(const Tensor& input, bool channels_last) {
  return at::empty_like(input, at::TensorOptions(), format_of(channels_last));
}

Tensor convert_images_autograd(const Tensor& input, bool channels_last) { return ConvertImages::apply(input, channels_last); }

}  // namespace

Tensor contiguous_images(const Tensor& t, MemoryFormat format) {
  const bool channels_last = format == MemoryFormat::ChannelsLast;
  if (!t.is_cpu() || t.dim() != 4 || t.unsafeGetTensorImpl()->has_symbolic_sizes_strides() || t.is_contiguous(format) ||
      !t.is_contiguous(format_of(!channels_last)) || !cpu::image_format_supported(image_shape(t)))
    return t.contiguous(format);
  return convert_images(t, channels_last);
}

TORCH_LIBRARY_IMPL(fastgan, CompositeImplicitAutograd, m) {
  m.impl("contiguous_images", [](const Tensor& input, bool channels_last) {
    return contiguous_images(input, format_of(channels_last));
  });
}
TORCH_LIBRARY_IMPL(fastgan, CPU, m) { m.impl("convert_images", &convert_images_cpu); }
TORCH_LIBRARY_IMPL(fastgan, Meta, m) { m.impl("convert_images", &convert_images_meta); }
TORCH_LIBRARY_IMPL(fastgan, Autograd, m) { m.impl("convert_images", &convert_images_autograd); }

}  // namespace fastgan
