// conv_stack: a run of [transposed] convolution [+ batch norm] [+ activation] layers, from end to end, on the CPU.
//
// Between layers only the convolution's raw output exists, in channels_last. Batch norm and activation of a layer are
// applied where the next layer loads it, the batch statistics come out of the loop that wrote it, and backward runs
// the same way: the loop for the input gradient multiplies by the activation's derivative and sums what batch norm
// needs, and the next loop applies batch norm's backward while loading. The kernel-4 stride-2 layers run on
// csrc/cpu/conv4x4s2.h, those from one pixel and to one on csrc/cpu/from_pixel.h and to_pixel.h or, where these do not take
// them, on ATen's matrix products; others call ATen's convolution.
// torch.profiler sees the parts by the names given to RECORD_FUNCTION.
//
// Images (inputs, raw outputs, their gradients) are float32 or bfloat16; parameters, statistics and sums are float32
// either way. bfloat16 images are what autocast asks for: weights are rounded where a loop multiplies bfloat16. The loops from one
// pixel and to one have few values to read, and take them as floats.
#include "conv_stack.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../cpu/bn_act.h"
#include "../cpu/conv4x4s2.h"
#include "../cpu/from_pixel.h"
#include "../cpu/isa.h"
#include "../cpu/to_pixel.h"
#include "held_gradients.h"
#include "image_format.h"
#include "kept_memory.h"

namespace fastgan {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void* image_data(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

// Calls f(kernels, data) for the dtype of image, where data(t) is the typed pointer of an image.
template <typename F>
void on_images(const Tensor& image, const F& f) {
  const auto call = [&](auto tag) {
    using T = decltype(tag);
    f(cpu::bn_act_kernels<T>(), [](const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); });
  };
  image.scalar_type() == at::kBFloat16 ? call(cpu::BFloat16()) : call(float());
}

at::TensorOptions float_options() { return at::TensorOptions().dtype(at::kFloat); }

cpu::BnActShape rows_of(const Tensor& t) {  // [N, C, H, W] in channels_last
  return {t.size(0) * t.size(2) * t.size(3), t.size(1), 1};
}

Tensor empty_image(const Tensor& like, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  return empty_kept({batch, channels, height, width}, like.scalar_type(), true);
}

Tensor empty_image_like(const Tensor& t) { return empty_image(t, t.size(0), t.size(1), t.size(2), t.size(3)); }

Tensor image_copy(const Tensor& t) {
  const Tensor copy = empty_image_like(t);
  copy.copy_(t);
  return copy;
}

Tensor bytes(size_t count) { return empty_kept({static_cast<int64_t>(count)}, at::kByte); }

// Numbers by channel that live as long as a call, zero to begin with: rows of plain memory, since a tensor each, and a view of each
// of its rows, would take longer than what is computed of them.
class ChannelRows {
 public:
  explicit ChannelRows(int64_t floats) : memory_(static_cast<size_t>(floats)) {}

  float* take(int64_t channels) {
    const size_t at = used_;
    used_ += static_cast<size_t>(channels);
    TORCH_INTERNAL_ASSERT(used_ <= memory_.size());
    return memory_.data() + at;
  }

 private:
  std::vector<float> memory_;
  size_t used_ = 0;
};

// The tensor between two layers: activation(scale * raw + shift) without ever being stored.
struct Lazy {
  Tensor raw;                                // [N, C, H, W], channels_last
  float *scale = nullptr, *shift = nullptr;  // [C], or null without batch norm
  float *mean = nullptr, *invstd = nullptr;  // [C], or null
  cpu::ActivationSpec activation{Activation::identity, 0.0};

  bool plain() const { return scale == nullptr && activation.kind == Activation::identity; }

  cpu::ConvOperand operand() const {
    cpu::ConvOperand o;
    o.data = image_data(raw);
    if (plain()) return o;
    o.mode = cpu::ConvOperand::Mode::activated;
    o.scale = scale;
    o.shift = shift;
    o.activation = activation.kind;
    o.negative_slope = static_cast<float>(activation.negative_slope);
    return o;
  }

  // With over_raw in the memory of the raw output, which nobody reads again then.
  Tensor store(bool over_raw = false) const {
    if (plain()) return raw;
    RECORD_FUNCTION("fastgan::scale_shift_act", {});
    const Tensor out = over_raw ? raw : empty_image_like(raw);
    const std::vector<float> ones(scale == nullptr ? raw.size(1) : 0, 1.0f), zeros(ones.size());
    on_images(raw, [&](const auto& kernels, const auto& data) {
      kernels.scale_shift_act(rows_of(raw), data(raw), scale == nullptr ? ones.data() : scale,
                              scale == nullptr ? zeros.data() : shift, activation, data(out));
    });
    return out;
  }
};

// One that outlives the call that it was computed in, and what takes the place of its raw output.
class LazyCopy {
 public:
  explicit LazyCopy(const Lazy& lazy) : lazy_(lazy) {
    lazy_.raw = image_copy(lazy.raw);
    if (lazy.scale == nullptr) return;
    scale_.assign(lazy.scale, lazy.scale + lazy.raw.size(1));
    shift_.assign(lazy.shift, lazy.shift + lazy.raw.size(1));
  }

  cpu::ConvOperand operand() const {
    cpu::ConvOperand o = lazy_.operand();
    if (lazy_.scale != nullptr) o.scale = scale_.data(), o.shift = shift_.data();
    return o;
  }

 private:
  Lazy lazy_;
  std::vector<float> scale_, shift_;
};

// The gradient of a convolution's raw output: grad, or a * grad + b * y + c where batch norm's backward is still to
// be applied; of one that does not train b is null and c zero.
struct LazyGrad {
  Tensor grad;                                     // [N, C, H, W], channels_last
  float *a = nullptr, *b = nullptr, *c = nullptr;  // [C], or null
  Tensor y;

  cpu::ConvOperand operand() const {
    cpu::ConvOperand o;
    o.data = image_data(grad);
    if (a == nullptr) return o;
    o.mode = b != nullptr ? cpu::ConvOperand::Mode::batch_norm_backward : cpu::ConvOperand::Mode::activated;  // by the identity
    o.scale = a;
    o.shift = c;
    if (b == nullptr) return o;
    o.other = image_data(y);
    o.other_scale = b;
    return o;
  }

  // In place of grad, which is always a tensor of this backward's own, or, with over_y, of y.
  Tensor store(bool over_y = false) const {
    if (a == nullptr) return grad;
    RECORD_FUNCTION("fastgan::bn_act_backward", {});
    const std::vector<float> ones(y.size(1), 1.0f), zeros(y.size(1));
    const Tensor& result = over_y ? y : grad;
    on_images(y, [&](const auto& kernels, const auto& data) {
      kernels.bn_act_backward_apply(rows_of(y), data(grad), data(y), ones.data(), zeros.data(), a, b, c,
                                    {Activation::identity, 0.0}, data(result));
    });
    return result;
  }
};

// Which main loop a layer takes.
enum class Path { conv4x4s2, from_pixel, to_pixel, aten };

struct Geometry {
  Path path;
  cpu::Conv4x4s2Shape shape;  // conv4x4s2 only
  int64_t batch, channels, height, width;  // of the output
  // Where the layer's raw output and its (mean, invstd) stand in what is saved; -1: not saved.
  int64_t raw_offset, statistics_offset;
};

struct Plan {
  std::vector<Geometry> layers;
  int64_t raw_size, statistics_size;  // elements to save
};

bool is(at::IntArrayRef pair, int64_t value) { return pair[0] == value && pair[1] == value; }

// Whether the channels fill whole lines of bfloat16.
bool fills_lines(const cpu::Conv4x4s2Shape& shape) {
  return shape.large_channels <= 4 || (shape.large_channels % 32 == 0 && shape.small_channels % 32 == 0);
}

// Images and products of the loops of conv4x4s2.h for a layer. bfloat16 images are multiplied as floats where the loops that multiply
// them as they are do not run or are slower, as with a last line half full, and where a layer alone has bfloat16 weights, whose
// sums those loops would round: near a ReLU's 0 that was 13 times PyTorch's error. Not on AMX, beside which products of floats are slow.
cpu::ConvDType loop_dtype(cpu::Conv4x4s2Shape shape, const Tensor& weight, at::ScalarType images, bool alone) {
  if (images != at::kBFloat16) return cpu::ConvDType::float32;
  shape.dtype = cpu::ConvDType::bfloat16;
  if (cpu::active_isa() == cpu::Isa::amx) return shape.dtype;
  const bool rounds = alone && weight.scalar_type() != at::kFloat && cpu::conv4x4s2_rounds_sums(shape);
  const bool does = cpu::conv4x4s2_supported(shape) && fills_lines(shape) && !rounds;
  return does ? cpu::ConvDType::bfloat16 : cpu::ConvDType::mixed;
}

Geometry geometry(const StackLayer& layer, int64_t N, int64_t C, int64_t H, int64_t W, const Tensor& weight,
                  at::ScalarType image_dtype, bool alone) {
  const int64_t kh = weight.size(2), kw = weight.size(3);
  const LayerSizes out = output_sizes(layer, weight, H, W);
  Geometry g;
  g.batch = N, g.channels = out.channels, g.height = out.height, g.width = out.width;
  g.shape = layer.transposed ? cpu::Conv4x4s2Shape{N, g.height, g.width, g.channels, H, W, C}
                             : cpu::Conv4x4s2Shape{N, H, W, C, g.height, g.width, g.channels};
  g.shape.dtype = loop_dtype(g.shape, weight, image_dtype, alone);
  const bool unpadded = is(layer.padding, 0);
  g.path = Path::aten;
  if (layer.transposed && unpadded && H == 1 && W == 1) g.path = Path::from_pixel;
  if (!layer.transposed && unpadded && H == kh && W == kw) g.path = Path::to_pixel;
  if (kh == 4 && kw == 4 && is(layer.stride, 2) && is(layer.padding, 1) && cpu::conv4x4s2_supported(g.shape))
    g.path = Path::conv4x4s2;
  g.shape.weight_channels_last = g.path == Path::conv4x4s2 && cpu::conv4x4s2_takes_channels_last(g.shape) && !weight.is_contiguous() &&
                                 weight.is_contiguous(at::MemoryFormat::ChannelsLast);
  return g;
}

Plan make_plan(const std::vector<StackLayer>& stack, const std::vector<LayerParameters>& split, const Tensor& input) {
  Plan plan{{}, 0, 0};
  int64_t N = input.size(0), C = input.size(1), H = input.size(2), W = input.size(3);
  for (size_t i = 0; i < stack.size(); ++i) {
    Geometry g = geometry(stack[i], N, C, H, W, split[i].weight, input.scalar_type(), stack.size() == 1);
    C = g.channels, H = g.height, W = g.width;
    // The last layer, where there is no batch norm, keeps its output instead of its raw output.
    const bool keeps_raw = i + 1 < stack.size() || stack[i].has_batch_norm || !invertible(stack[i]);
    g.raw_offset = keeps_raw ? plan.raw_size : -1;
    g.statistics_offset = stack[i].has_batch_norm ? plan.statistics_size : -1;
    constexpr int64_t kAligned = 32;  // elements: at least 64 bytes
    if (keeps_raw) plan.raw_size += (N * C * H * W + kAligned - 1) / kAligned * kAligned;
    if (stack[i].has_batch_norm) plan.statistics_size += 2 * C;
    plan.layers.push_back(g);
  }
  return plan;
}

// A layer's raw output as a view of what is saved: [N, C, H, W] in channels_last.
Tensor raw_view(const Tensor& raw, const Geometry& g) {
  return raw.as_strided({g.batch, g.channels, g.height, g.width},
                        {g.height * g.width * g.channels, 1, g.width * g.channels, g.channels}, g.raw_offset);
}

// A layer's mean and invstd, [C] each, in what is saved.
struct Statistics {
  float *mean, *invstd;
  Statistics(const Tensor& statistics, const Geometry& g)
      : mean(floats(statistics) + g.statistics_offset), invstd(mean + g.channels) {}
};

// Runs a loop of conv4x4s2 that writes `out`.
void run_loop(const Geometry& g, cpu::Conv4x4s2Loop loop, const cpu::ConvOperand& operand, const Tensor& weight,
              const cpu::ConvEpilogue& epilogue) {
  const int threads = at::get_num_threads();
  const size_t packed_bytes = cpu::conv4x4s2_packed_bytes(g.shape, loop);
  const Tensor packed = packed_bytes ? bytes(packed_bytes) : weight;
  const Tensor workspace = bytes(cpu::conv4x4s2_workspace_bytes(g.shape, loop, threads));
  if (packed_bytes) {
    RECORD_FUNCTION("fastgan::conv4x4s2_pack", {});
    cpu::conv4x4s2_pack(g.shape, loop, floats(weight), packed.mutable_data_ptr());
  }
  const bool down = loop == cpu::Conv4x4s2Loop::down;
  RECORD_FUNCTION(down ? "fastgan::conv4x4s2_down" : "fastgan::conv4x4s2_up", {});
  const auto run = down ? cpu::conv4x4s2_down : cpu::conv4x4s2_up;
  run(g.shape, operand, packed.mutable_data_ptr(), epilogue, workspace.mutable_data_ptr(), threads);
}

void weight_gradient(const Geometry& g, bool transposed, const cpu::ConvOperand& x, const cpu::ConvOperand& dy,
                     const Tensor& grad_weight, bool add) {
  const int threads = at::get_num_threads();
  const Tensor workspace = bytes(cpu::conv4x4s2_workspace_bytes(g.shape, cpu::Conv4x4s2Loop::weight_gradient, threads));
  RECORD_FUNCTION("fastgan::conv4x4s2_weight_gradient", {});
  cpu::conv4x4s2_weight_gradient(g.shape, transposed ? dy : x, transposed ? x : dy, {floats(grad_weight), add},
                                 workspace.mutable_data_ptr(), threads);
}

// Whether a layer's images, kept until its weight gradient is computed, take so much less memory than that gradient that putting it
// off is worth their copies.
bool outweighs_images(const Tensor& weight, const Tensor& x, const Tensor& dy) {
  return weight.nbytes() > 2 * (x.nbytes() + dy.nbytes());
}

// weight [A, B, kH, kW] -> [A, kH * kW * B], the order of a channels_last pixel block.
Tensor as_matrix(const Tensor& weight) { return weight.permute({0, 2, 3, 1}).reshape({weight.size(0), -1}); }

Tensor from_matrix(const Tensor& matrix, const Tensor& like) {
  return matrix.view({like.size(0), like.size(2), like.size(3), like.size(1)}).permute({0, 3, 1, 2}).contiguous();
}

// [N, C, H, W] in channels_last <-> [N, H * W * C], the same memory.
Tensor flat(const Tensor& image) {
  const int64_t features = image.size(1) * image.size(2) * image.size(3);
  return image.as_strided({image.size(0), features}, {features, 1});
}
Tensor unflat(const Tensor& matrix, int64_t channels, int64_t height, int64_t width) {
  return matrix.as_strided({matrix.size(0), channels, height, width}, {height * width * channels, 1, width * channels, channels});
}

Tensor dense_channels_last(const Tensor& t) { return contiguous_images(t, at::MemoryFormat::ChannelsLast); }

constexpr int64_t kZeros[2] = {0, 0}, kOnes[2] = {1, 1};

ConvLayer conv_layer(const StackLayer& layer) {
  return {layer.stride, layer.padding, kOnes, layer.transposed, kZeros, 1};
}

Tensor aten_convolution(const StackLayer& layer, const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const auto dtype = input.scalar_type();
  return convolution(input, weight.to(dtype), bias.has_value() ? OptionalTensor(bias->to(dtype)) : std::nullopt,
                     conv_layer(layer));
}

// Where a loop that writes floats leaves its result: in `image`, or in a copy that store_floats() rounds into it.
Tensor floats_for(const Tensor& image) {
  return image.scalar_type() == at::kFloat ? image : empty_kept(image.sizes(), at::kFloat, true);
}
void store_floats(const Tensor& result, const Tensor& image) {
  if (!result.is_same(image)) image.copy_(result);
}

// The shape of a layer from one pixel.
cpu::FromPixelShape from_pixel_shape(const Geometry& g, const Tensor& weight) {
  return {g.batch, weight.size(0), weight.size(1), weight.size(2) * weight.size(3)};
}

// Whether such a layer runs on a loop of its own; otherwise on ATen's matrix product.
bool runs_from_pixel(const Geometry& g, const Tensor& weight) {
  return g.path == Path::from_pixel && cpu::from_pixel_supported(from_pixel_shape(g, weight));
}

// The shape of a layer to one pixel.
cpu::ToPixelShape to_pixel_shape(const Geometry& g, const Tensor& weight) {
  return {g.batch, weight.size(2), weight.size(3), weight.size(1), weight.size(0)};
}

// Whether such a layer runs on loops of its own; otherwise on ATen's matrix product.
bool runs_to_pixel(const Geometry& g, const Tensor& weight) {
  return g.path == Path::to_pixel && cpu::to_pixel_supported(to_pixel_shape(g, weight));
}

Tensor to_pixel_workspace(const cpu::ToPixelShape& shape) {
  return bytes(static_cast<size_t>(cpu::to_pixel_workspace_bytes(shape, at::get_num_threads())));
}

// Whether ATen's product for a layer from one pixel takes the weight [A, B, kH, kW] as it lies, with its output in the default layout,
// because the output has fewer elements to reorder than the weight.
bool keeps_weight(const Geometry& g, const Tensor& weight) {
  return g.path == Path::from_pixel && g.batch < weight.size(0);
}

// The raw output for the paths without a fused loop, into y; the bias is added.
void plain_forward(const StackLayer& layer, const Geometry& g, const Tensor& input, const LayerParameters& p,
                   const Tensor& y) {
  if (g.path == Path::aten) {
    y.copy_(aten_convolution(layer, input, p.weight, p.bias.defined() ? OptionalTensor(p.bias) : std::nullopt));
    return;
  }
  if (runs_from_pixel(g, p.weight)) {
    RECORD_FUNCTION("fastgan::from_pixel", {});
    const cpu::FromPixelShape shape = from_pixel_shape(g, p.weight);
    const int threads = at::get_num_threads();
    const Tensor workspace = bytes(cpu::from_pixel_workspace_bytes(shape, threads)), x = flat(input).to(at::kFloat).contiguous();
    const Tensor out = floats_for(y);
    cpu::from_pixel_forward(shape, floats(x), floats(p.weight), floats(out), workspace.mutable_data_ptr(), threads);
    if (p.bias.defined()) out.add_(p.bias.view({1, -1, 1, 1}));
    store_floats(out, y);
    return;
  }
  const Tensor weight = p.weight.to(y.scalar_type());
  if (keeps_weight(g, weight)) {
    y.copy_(at::mm(flat(input), weight.flatten(1)).view(y.sizes()));
  } else {
    const Tensor matrix = as_matrix(weight);
    Tensor out = flat(y);
    at::mm_out(out, flat(input), g.path == Path::from_pixel ? matrix : matrix.t());
  }
  if (p.bias.defined()) y.add_(p.bias.view({1, -1, 1, 1}));
}

// Gradients of the same paths; undefined where not wanted.
std::pair<Tensor, Tensor> plain_backward(const StackLayer& layer, const Geometry& g, const Tensor& dy,
                                         const Tensor& input, const Tensor& parameter, bool want_input,
                                         bool want_weight) {
  const bool own_loop = runs_from_pixel(g, parameter);
  const auto dtype = own_loop ? at::kFloat : input.scalar_type();
  const Tensor weight = parameter.to(dtype);
  if (g.path == Path::aten) {
    auto [grad_input, grad_weight] = convolution_backward(dy, input, weight, conv_layer(layer), {want_input, want_weight});
    return {want_input ? dense_channels_last(grad_input) : Tensor(),
            want_weight ? grad_weight.to(parameter.scalar_type()) : Tensor()};
  }
  const Tensor x = flat(input).to(dtype), d = flat(dy).to(dtype);
  const bool from_pixel = g.path == Path::from_pixel;
  Tensor grad_input, grad_weight;
  if (want_input)
    grad_input = unflat(at::mm(d, from_pixel ? as_matrix(weight).t() : as_matrix(weight)), input.size(1), input.size(2),
                        input.size(3)).to(input.scalar_type());
  if (want_weight && own_loop) {
    RECORD_FUNCTION("fastgan::from_pixel_weight_gradient", {});
    grad_weight = empty_kept(weight.sizes(), at::kFloat);
    const cpu::FromPixelShape shape = from_pixel_shape(g, weight);
    const int threads = at::get_num_threads();
    const Tensor workspace = bytes(cpu::from_pixel_workspace_bytes(shape, threads));
    cpu::from_pixel_weight_gradient(shape, floats(x.contiguous()), floats(d.contiguous()), floats(grad_weight),
                                    workspace.mutable_data_ptr(), threads);
  } else if (want_weight && keeps_weight(g, weight)) {
    grad_weight = at::mm(x.t(), dy.contiguous().flatten(1)).view(weight.sizes()).to(parameter.scalar_type());
  } else if (want_weight) {
    grad_weight = from_matrix(from_pixel ? at::mm(x.t(), d) : at::mm(d.t(), x), weight).to(parameter.scalar_type());
  }
  return {grad_input, grad_weight};
}

// In which a layer's loops read its weight, and its gradient comes
at::MemoryFormat weight_format(const Geometry& g) {
  return g.shape.weight_channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// Parameters as the loops read them: float32, elements side by side.
void arrange(const Plan& plan, std::vector<LayerParameters>& split) {
  for (size_t i = 0; i < split.size(); ++i) {
    LayerParameters& p = split[i];
    p.weight = contiguous_images(p.weight, weight_format(plan.layers[i]));
    if (p.weight.scalar_type() != at::kFloat) {
      const Tensor copy = empty_kept(p.weight.sizes(), at::kFloat, plan.layers[i].shape.weight_channels_last);
      copy.copy_(p.weight);
      p.weight = copy;
    }
    for (Tensor* array : {&p.bias, &p.bn_weight, &p.bn_bias})
      if (array->defined()) *array = array->to(at::kFloat).contiguous();
  }
}

// (output, raw outputs, statistics); the last two have shape [0] unless save_for_backward.
std::tuple<Tensor, Tensor, Tensor> conv_stack_forward_cpu(const Tensor& input, at::TensorList parameters,
                                                          at::TensorList running, at::IntArrayRef layers,
                                                          at::ArrayRef<double> numbers, bool save_for_backward,
                                                          c10::string_view process_group, int64_t processes) {
  const auto stack = parse_stack(layers, numbers);
  const ProcessGroup group{std::string(process_group), processes};
  auto split = split_parameters(stack, parameters);
  check_parameters(stack, split, running, input);
  const Plan plan = make_plan(stack, split, input);
  arrange(plan, split);
  const auto options = float_options();
  const Tensor raw = empty_kept({save_for_backward ? plan.raw_size : 0}, input.scalar_type());
  const Tensor statistics = at::empty({plan.statistics_size}, options);
  int64_t channels = 0;
  for (const Geometry& g : plan.layers) channels += g.channels;
  ChannelRows rows(4 * channels);
  Lazy current{dense_channels_last(input)};
  size_t next_running = 0;
  for (size_t i = 0; i < stack.size(); ++i) {
    const StackLayer& layer = stack[i];
    const Geometry& g = plan.layers[i];
    const LayerParameters& p = split[i];
    const int64_t C = g.channels;
    const bool from_batch = layer.has_batch_norm && layer.training;
    const bool keeps_raw = g.raw_offset >= 0;
    const Tensor y = save_for_backward && keeps_raw ? raw_view(raw, g) : empty_image(input, g.batch, C, g.height, g.width);
    Lazy next{y};
    float* var = nullptr;
    if (layer.has_batch_norm) {
      const Statistics saved(statistics, g);
      next.mean = saved.mean, next.invstd = saved.invstd;
      next.scale = rows.take(C), next.shift = rows.take(C), var = rows.take(C);
    }
    const auto fold = [&] {
      cpu::fold_statistics<float>(C, next.mean, var, floats(p.bn_weight), floats(p.bn_bias), layer.eps, next.invstd, next.scale,
                                  next.shift);
    };
    if (layer.has_batch_norm && !from_batch) {
      std::copy_n(floats(running[next_running++]), C, next.mean);
      std::copy_n(floats(running[next_running++]), C, var);
      fold();
    }
    bool activated = false;
    if (g.path == Path::conv4x4s2) {
      // What no backward pass reads is stored as the next layer wants it.
      activated = !keeps_raw || (!save_for_backward && !from_batch);
      cpu::ConvEpilogue e;
      e.mode = from_batch  ? cpu::ConvEpilogue::Mode::statistics
               : activated ? cpu::ConvEpilogue::Mode::activate
                           : cpu::ConvEpilogue::Mode::store;
      e.out = image_data(y);
      e.bias = floats(p.bias);
      e.activation = layer.activation;
      e.negative_slope = static_cast<float>(layer.negative_slope);
      e.mean = next.mean;
      e.m2 = var;
      if (activated && layer.has_batch_norm) {
        e.scale = next.scale;
        e.bias = next.shift;
        if (p.bias.defined()) {
          float* bias = rows.take(C);
          for (int64_t c = 0; c < C; ++c) bias[c] = next.scale[c] * floats(p.bias)[c] + next.shift[c];
          e.bias = bias;
        }
      }
      run_loop(g, layer.transposed ? cpu::Conv4x4s2Loop::up : cpu::Conv4x4s2Loop::down, current.operand(), p.weight, e);
      if (from_batch) cpu::divide_by_count(C, rows_of(y).outer, var);
    } else {
      if (runs_to_pixel(g, p.weight)) {
        RECORD_FUNCTION("fastgan::to_pixel", {});
        const cpu::ToPixelShape shape = to_pixel_shape(g, p.weight);
        const Tensor workspace = to_pixel_workspace(shape), out = floats_for(y);
        current.raw = current.raw.to(at::kFloat);
        cpu::to_pixel_forward(shape, current.operand(), floats(p.weight), floats(p.bias), floats(out), workspace.mutable_data_ptr());
        store_floats(out, y);
      } else {
        plain_forward(layer, g, current.store(!save_for_backward), p, y);
      }
      if (from_batch) {
        RECORD_FUNCTION("fastgan::batch_statistics", {});
        const Tensor workspace = at::empty({cpu::bn_act_workspace_size(rows_of(y))}, options);
        on_images(y, [&](const auto& kernels, const auto& data) {
          kernels.batch_statistics(rows_of(y), data(y), next.mean, var, floats(workspace));
        });
      }
    }
    int64_t values = rows_of(y).outer;  // a channel
    if (from_batch && layer.together)
      values = merge_statistics("conv_stack", group, at::from_blob(next.mean, {C}, options), at::from_blob(var, {C}, options), values);
    if (from_batch) {
      if (layer.has_running) {
        float *running_mean = floats(running[next_running++]), *running_var = floats(running[next_running++]);
        cpu::update_running_statistics<float>(C, values, layer.momentum, next.mean, var, running_mean, running_var);
      }
      fold();
    }
    if (activated) next.scale = next.shift = nullptr;
    else next.activation = {layer.activation, layer.negative_slope};
    current = next;
  }
  Tensor output = current.store(!save_for_backward);
  // An operator's results share no memory: after batch norm with no activation the raw output would be both.
  if (save_for_backward && plan.layers.back().raw_offset >= 0 && output.is_same(current.raw)) output = output.clone();
  return {output, raw, save_for_backward ? statistics : at::empty({0}, options)};
}

// The backward pass, layer by layer from the last one down. Weight gradients that the loops of conv4x4s2.h compute are added to
// `held`, one a result, where that is defined, or put off; they then have shape [0], like those that nobody wants. With
// overwrites_raw a layer's gradient takes the place of its raw output as soon as nothing else reads that.
class StackBackward {
 public:
  StackBackward(const Tensor& input, at::TensorList parameters, const Tensor& output, const Tensor& raw, const Tensor& statistics,
                at::IntArrayRef layers, at::ArrayRef<double> numbers, at::IntArrayRef output_mask, const ProcessGroup& group,
                const std::vector<Tensor>& held, bool overwrites_raw)
      : input_(input),
        output_(output),
        parameters_(parameters),
        output_mask_(output_mask),
        group_(group),
        held_(held),
        overwrites_raw_(overwrites_raw),
        stack_(parse_stack(layers, numbers)),
        split_(split_parameters(stack_, parameters)),
        plan_(make_plan(stack_, split_, input)),
        wanted_(wanted_gradients(stack_, output_mask)),
        rows_(kRows * channels_of(plan_)),
        inputs_(stack_.size() + 1),
        results_(output_mask.size()) {
    arrange(plan_, split_);
    inputs_[0] = Lazy{dense_channels_last(input)};
    for (size_t i = 0; i < stack_.size(); ++i) {
      Lazy& next = inputs_[i + 1];
      if (plan_.layers[i].raw_offset >= 0) next.raw = raw_view(raw, plan_.layers[i]);
      next.activation = {stack_[i].activation, stack_[i].negative_slope};
      if (!stack_[i].has_batch_norm) continue;
      const Statistics saved(statistics, plan_.layers[i]);
      const int64_t C = plan_.layers[i].channels;
      next.mean = saved.mean, next.invstd = saved.invstd;
      next.scale = rows_.take(C), next.shift = rows_.take(C);
      cpu::fold_scale_shift<float>(C, next.mean, next.invstd, floats(split_[i].bn_weight), floats(split_[i].bn_bias), next.scale,
                                   next.shift);
    }
  }

  // Gradients of input and of every parameter, with shape [0] where output_mask says false.
  std::vector<Tensor> run(const Tensor& grad_output) {
    int64_t i = static_cast<int64_t>(stack_.size()) - 1;
    for (LazyGrad grad = activation_backward(i, dense_channels_last(grad_output)); i >= wanted_.lowest; --i) {
      const Geometry& g = plan_.layers[i];
      const bool to_pixel = runs_to_pixel(g, split_[i].weight);
      if (g.path != Path::conv4x4s2 && !to_pixel) {
        const Tensor grad_input = plain_gradients(i, grad);
        if (i > wanted_.lowest) grad = activation_backward(i - 1, grad_input);
        continue;
      }
      // Two loops would each apply batch norm's backward while loading; one pass before them is faster then.
      if ((wants_weight(i) && wants_input(i)) || to_pixel) grad = LazyGrad{grad.store(overwrites_raw_)};
      Lazy below = inputs_[i];
      if (to_pixel) grad.grad = grad.grad.to(at::kFloat), below.raw = below.raw.to(at::kFloat);
      if (wants_weight(i)) to_pixel ? to_pixel_weight_gradient(i, below, grad) : loop_weight_gradient(i, below, grad);
      if (wants_input(i)) grad = input_gradient(i, below, grad, to_pixel);
    }
    return finished_results();
  }

 private:
  // Of a layer in rows_: scale and shift, two sums, and two coefficients of batch norm's backward.
  static constexpr int64_t kRows = 6;
  // The sums that finish_layer takes: of dz, and of dz * xhat; one after the other.
  struct Sums {
    float *dz, *dz_xhat;
  };

  static int64_t channels_of(const Plan& plan) {
    int64_t channels = 0;
    for (const Geometry& g : plan.layers) channels += g.channels;
    return channels;
  }

  bool wants_weight(int64_t i) const { return output_mask_[wanted_.first_parameter[i]] != 0; }
  bool wants_input(int64_t i) const { return i > wanted_.lowest || (i == 0 && output_mask_[0]); }

  Sums take_sums(int64_t C) {
    float* first = rows_.take(2 * C);
    return {first, first + C};
  }

  Tensor result(const float* row, int64_t size) const {
    const Tensor t = at::empty({size}, float_options());
    std::copy_n(row, size, floats(t));
    return t;
  }

  // Fills in the gradients of layer i's bias and batch norm and returns what the convolution below has to apply to dz.
  LazyGrad finish_layer(int64_t i, const Tensor& dz, const Sums& sums) {
    const StackLayer& layer = stack_[i];
    const Lazy& above = inputs_[i + 1];
    const int64_t C = plan_.layers[i].channels;
    size_t k = wanted_.first_parameter[i] + 1;
    LazyGrad grad{dz};
    if (!layer.has_batch_norm) {
      if (layer.has_bias) results_[k] = result(sums.dz, C);
      return grad;
    }
    if (layer.has_bias) {
      // Batch statistics cancel the bias, so its gradient in training mode is exactly 0.
      const Tensor bias = at::empty({C}, float_options());
      for (int64_t c = 0; c < C; ++c) floats(bias)[c] = layer.training ? 0.0f : above.scale[c] * sums.dz[c];
      results_[k++] = bias;
    }
    if (layer.has_bn_weight) results_[k++] = result(sums.dz_xhat, C);
    if (layer.has_bn_bias) results_[k++] = result(sums.dz, C);
    // The results above stay this process's, like the gradients of all parameters.
    int64_t values = rows_of(above.raw).outer;
    if (layer.training && layer.together) values = add_over_processes(group_, at::from_blob(sums.dz, {2, C}, float_options()), values);
    grad.a = above.scale, grad.c = rows_.take(C);
    grad.y = above.raw;
    if (!layer.training) return grad;
    grad.b = rows_.take(C);
    cpu::backward_coefficients<float>(C, values, above.scale, above.mean, above.invstd, sums.dz, sums.dz_xhat, grad.b, grad.c);
    return grad;
  }

  // From the gradient of layer i's activation to that of its raw output, by passes of their own.
  LazyGrad activation_backward(int64_t i, const Tensor& grad) {
    RECORD_FUNCTION("fastgan::bn_act_backward", {});
    const Lazy& above = inputs_[i + 1];
    const int64_t C = grad.size(1);
    const Sums sums = take_sums(C);
    const Tensor dz = empty_image_like(grad);
    // Where one sum is enough, or none is wanted.
    const bool as_planes = !above.raw.defined() && (C == 1 || !stack_[i].has_bias);
    const cpu::BnActShape shape = as_planes ? cpu::image_planes(grad.size(0), grad.numel()) : rows_of(grad);
    const Tensor workspace = at::empty({cpu::bn_act_workspace_size(shape)}, float_options());
    if (!above.raw.defined()) {  // the last layer, which kept its output instead
      const Tensor kept = dense_channels_last(output_);
      on_images(grad, [&](const auto& kernels, const auto& data) {
        kernels.act_backward(shape, data(grad), data(kept), above.activation, data(dz), sums.dz, floats(workspace));
      });
      return finish_layer(i, dz, sums);
    }
    const bool bn = above.scale != nullptr;
    const std::vector<float> ones(bn ? 0 : C, 1.0f), zeros(bn ? 0 : C);
    const float *scale = bn ? above.scale : ones.data(), *shift = bn ? above.shift : zeros.data();
    on_images(grad, [&](const auto& kernels, const auto& data) {
      kernels.bn_act_backward_reduce(shape, data(grad), data(above.raw), scale, shift, bn ? above.mean : zeros.data(),
                                     bn ? above.invstd : ones.data(), above.activation, sums.dz, sums.dz_xhat,
                                     floats(workspace));
      const LazyGrad lazy = finish_layer(i, dz, sums);
      kernels.bn_act_backward_apply(shape, data(grad), data(above.raw), scale, shift, bn ? lazy.a : ones.data(), lazy.b, lazy.c,
                                    above.activation, data(dz));
    });
    return LazyGrad{dz};
  }

  // Both gradients of a layer that has no loop of its own. Returns the input's, undefined where nobody wants it.
  Tensor plain_gradients(int64_t i, const LazyGrad& grad) {
    auto [grad_input, grad_weight] = plain_backward(stack_[i], plan_.layers[i], grad.store(), inputs_[i].store(), split_[i].weight,
                                                    wants_input(i), wants_weight(i));
    if (wants_weight(i)) results_[wanted_.first_parameter[i]] = grad_weight;
    if (i == 0 && wants_input(i)) results_[0] = grad_input;
    return grad_input;
  }

  void to_pixel_weight_gradient(int64_t i, const Lazy& below, const LazyGrad& grad) {
    RECORD_FUNCTION("fastgan::to_pixel_weight_gradient", {});
    const Tensor& weight = split_[i].weight;
    const cpu::ToPixelShape shape = to_pixel_shape(plan_.layers[i], weight);
    const Tensor grad_weight = empty_kept(weight.sizes(), at::kFloat), workspace = to_pixel_workspace(shape);
    cpu::to_pixel_weight_gradient(shape, below.operand(), floats(grad.grad), floats(grad_weight), workspace.mutable_data_ptr());
    results_[wanted_.first_parameter[i]] = grad_weight;
  }

  // Computed now, added to what is held, or put off.
  void loop_weight_gradient(int64_t i, const Lazy& below, const LazyGrad& grad) {
    const Geometry& g = plan_.layers[i];
    const Tensor& weight = split_[i].weight;
    const size_t k = wanted_.first_parameter[i];
    const bool transposed = stack_[i].transposed, as_held = parameters_[k - 1].is_contiguous(weight_format(g));
    const bool later = as_held && !held_.empty() && outweighs_images(weight, below.raw, grad.grad) && may_put_off(parameters_[k - 1]);
    const bool add = as_held && k < held_.size() && held_[k].defined();
    if (later || add) results_[k] = at::empty({0}, float_options());
    if (later) {
      put_off(parameters_[k - 1], [g, transposed, x = LazyCopy(below), dy = image_copy(grad.store())](const Tensor& grad_weight,
                                                                                                     bool add_to) {
        weight_gradient(g, transposed, x.operand(), LazyGrad{dy}.operand(), grad_weight, add_to);
      });
      return;
    }
    const Tensor grad_weight = add ? held_[k] : empty_kept(weight.sizes(), at::kFloat, g.shape.weight_channels_last);
    weight_gradient(g, transposed, below.operand(), grad.operand(), grad_weight, add);
    if (!add) results_[k] = grad_weight;
  }

  // The gradient of layer i's input by a loop, whose epilogue goes on through the layer below. Returns that layer's, if there is one.
  LazyGrad input_gradient(int64_t i, const Lazy& below, const LazyGrad& grad, bool to_pixel) {
    const Geometry& g = plan_.layers[i];
    const Tensor& weight = split_[i].weight;
    // Batch norm's backward still reads the raw output; an activation's reads it here, element by element before it is written.
    const bool in_place = overwrites_raw_ && i > 0 && below.scale == nullptr && (g.path == Path::conv4x4s2 || to_pixel);
    Tensor grad_input = in_place ? below.raw : empty_image_like(below.raw);
    Sums sums{};
    cpu::ConvEpilogue e;
    e.out = image_data(grad_input);
    if (i > 0) {
      sums = take_sums(below.raw.size(1));
      e.mode = cpu::ConvEpilogue::Mode::gradient;
      e.activation = below.activation.kind;
      e.negative_slope = static_cast<float>(below.activation.negative_slope);
      e.y = image_data(below.raw);
      e.scale = below.scale;
      e.shift = below.shift;
      e.y_mean = below.mean;
      e.y_invstd = below.invstd;
      e.sum_dz = sums.dz;
      e.sum_dz_xhat = below.mean != nullptr ? sums.dz_xhat : nullptr;
    }
    if (to_pixel) {
      RECORD_FUNCTION("fastgan::to_pixel_input_gradient", {});
      const cpu::ToPixelShape shape = to_pixel_shape(g, weight);
      const Tensor workspace = to_pixel_workspace(shape);
      cpu::to_pixel_input_gradient(shape, floats(grad.grad), floats(weight), e, workspace.mutable_data_ptr(), at::get_num_threads());
      grad_input = grad_input.to(input_.scalar_type());
    } else {
      run_loop(g, stack_[i].transposed ? cpu::Conv4x4s2Loop::down : cpu::Conv4x4s2Loop::up, grad.operand(), weight, e);
    }
    if (i > 0) return finish_layer(i - 1, grad_input, sums);
    results_[0] = grad_input;
    return LazyGrad{};
  }

  // In the dtypes of what they are gradients of.
  std::vector<Tensor> finished_results() {
    for (size_t k = 0; k < results_.size(); ++k) {
      const Tensor& of = k == 0 ? input_ : parameters_[k - 1];
      Tensor& found = results_[k];
      if (!output_mask_[k]) found = at::empty({0}, of.options());
      else if (!found.defined()) found = at::zeros_like(of);
      else if (k > 0 && of.dim() == 4 && found.numel() > 0)  // in the weight's format, or autograd would copy it
        found = contiguous_images(found, of.suggest_memory_format()).to(of.scalar_type());
      else found = found.to(of.scalar_type());
    }
    return results_;
  }

  const Tensor &input_, &output_;
  const at::TensorList parameters_;
  const at::IntArrayRef output_mask_;
  const ProcessGroup& group_;
  const std::vector<Tensor>& held_;
  const bool overwrites_raw_;
  const std::vector<StackLayer> stack_;
  std::vector<LayerParameters> split_;
  const Plan plan_;
  const WantedGradients wanted_;
  ChannelRows rows_;
  std::vector<Lazy> inputs_;  // what each layer's input was
  std::vector<Tensor> results_;
};

std::vector<Tensor> conv_stack_backward_cpu(const Tensor& grad_output, const Tensor& input, at::TensorList parameters,
                                            const Tensor& output, const Tensor& raw, const Tensor& statistics,
                                            at::IntArrayRef layers, at::ArrayRef<double> numbers,
                                            at::IntArrayRef output_mask, c10::string_view process_group,
                                            int64_t processes) {
  const ProcessGroup group{std::string(process_group), processes};
  return StackBackward(input, parameters, output, raw, statistics, layers, numbers, output_mask, group, {}, false).run(grad_output);
}

// ---- autograd ----------------------------------------------------------------------------------------------------

class ConvStack : public torch::autograd::Function<ConvStack> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, at::TensorList parameters, const variable_list& running,
                        std::vector<int64_t> layers, std::vector<double> numbers, bool save_for_backward,
                        const ProcessGroup& group) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("fastgan::conv_stack_forward", "")
                         .typed<decltype(conv_stack_forward_cpu)>();
    const auto [output, raw, statistics] =
        op.call(input, parameters, running, layers, numbers, save_for_backward, group.name, group.size);
    if (save_for_backward) {
      // What backward takes from the last layer is the raw output after batch norm and nothing without an activation: then the caller may
      // change the output.
      const StackLayer last = parse_stack(layers, numbers).back();
      variable_list saved{input, last.has_batch_norm || last.activation == Activation::identity ? Tensor() : output, raw, statistics};
      saved.insert(saved.end(), parameters.begin(), parameters.end());
      ctx->save_for_backward(saved);
      ctx->set_materialize_grads(false);
      ctx->saved_data["layers"] = layers;
      ctx->saved_data["numbers"] = numbers;
      ctx->saved_data["process_group"] = group.name;
      ctx->saved_data["processes"] = group.size;
    }
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &output = saved[1].defined() ? saved[1] : grad_outputs[0];
    const Tensor raw = saved[2].contiguous(), statistics = saved[3].contiguous();  // a hook may have unpacked them otherwise
    const at::TensorList parameters = at::TensorList(saved).slice(4);
    const auto layers = ctx->saved_data["layers"].toIntVector();
    const auto numbers = ctx->saved_data["numbers"].toDoubleVector();
    std::vector<int64_t> mask;
    for (size_t i = 0; i <= parameters.size(); ++i) mask.push_back(ctx->needs_input_grad(i));
    const ProcessGroup group{ctx->saved_data["process_group"].toStringRef(), ctx->saved_data["processes"].toInt()};
    variable_list gradients(parameters.size() + 6);  // input and parameters, then five arguments without one
    if (!grad_outputs[0].defined()) return gradients;
    if (must_be_differentiable(grad_outputs[0])) {
      refuse_second_derivative("conv_stack", group);
      variable_list inputs{input};
      inputs.insert(inputs.end(), parameters.begin(), parameters.end());
      const auto whole = [&](const variable_list& from) {
        return differentiable_stack(from[0], at::TensorList(from).slice(1), statistics, layers, numbers);
      };
      const auto found = differentiable_gradients(whole, inputs, std::vector<bool>(mask.begin(), mask.end()), grad_outputs[0]);
      std::copy(found.begin(), found.end(), gradients.begin());
      return gradients;
    }
    if (const auto held = input.is_cpu() ? held_gradients(parameters, mask) : std::vector<Tensor>(); !held.empty()) {
      RECORD_FUNCTION("fastgan::conv_stack_backward", {});
      at::AutoDispatchBelowADInplaceOrView below;
      StackBackward backward(input, parameters, output, raw, statistics, layers, numbers, mask, group, held,
                             !torch::autograd::get_current_graph_task_keep_graph());
      const auto found = backward.run(grad_outputs[0]);
      take_gradients(found, held, mask, gradients);
      return gradients;
    }
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("fastgan::conv_stack_backward", "")
                         .typed<decltype(conv_stack_backward_cpu)>();
    const auto found = op.call(grad_outputs[0], input, parameters, output, raw, statistics, layers, numbers, mask,
                               group.name, group.size);
    take_gradients(found, {}, mask, gradients);
    return gradients;
  }

 private:
  // The whole run from differentiable operators, for backward passes that are differentiated themselves.
  static Tensor differentiable_stack(const Tensor& input, at::TensorList parameters, const Tensor& statistics,
                                     at::IntArrayRef layers, at::ArrayRef<double> numbers) {
    const auto stack = parse_stack(layers, numbers);
    const auto split = split_parameters(stack, parameters);
    int64_t offset = 0;  // of a layer's mean and invstd: the same on every device
    Tensor x = input;
    for (size_t i = 0; i < stack.size(); ++i) {
      const StackLayer& layer = stack[i];
      const LayerParameters& p = split[i];
      const auto dtype = x.scalar_type();
      x = differentiable_convolution(x, p.weight.to(dtype), p.bias.defined() ? OptionalTensor(p.bias.to(dtype)) : std::nullopt,
                                     conv_layer(layer));
      if (layer.has_batch_norm) {
        const int64_t channels = x.size(1);
        const Tensor mean = statistics.narrow(0, offset, channels);
        const Tensor invstd = statistics.narrow(0, offset + channels, channels);
        offset += 2 * channels;
        x = differentiable_batch_norm(x, p.bn_weight, p.bn_bias, mean, invstd, layer.training, layer.eps);
      }
      x = activate(x, layer.activation, layer.negative_slope);
    }
    return x;
  }
};

bool wants_gradients(const Tensor& input, at::TensorList parameters) {
  bool wanted = input.requires_grad();
  for (const Tensor& parameter : parameters) wanted = wanted || parameter.requires_grad();
  return wanted && at::GradMode::is_enabled();
}

Tensor conv_stack(const Tensor& input, at::TensorList parameters, at::TensorList running, at::IntArrayRef layers,
                  at::ArrayRef<double> numbers, c10::string_view process_group, int64_t processes) {
  // Reordered once, here: what backward reads is then saved in the order in which it reads it.
  return ConvStack::apply(dense_channels_last(input), parameters, running.vec(), layers.vec(), numbers.vec(),
                          wants_gradients(input, parameters), ProcessGroup{std::string(process_group), processes});
}

// Whether PyTorch's convolution is faster for a single operator in bfloat16: to many pixels, without its gradients, where fastgan's
// loops multiply floats, and on AMX with a line half full.
bool leaves_to_aten(const Geometry& g, bool transposed, bool gradients) {
  constexpr int64_t kManyPixels = 2048;
  if (g.path != Path::conv4x4s2 || g.shape.dtype == cpu::ConvDType::float32) return false;
  if (cpu::active_isa() == cpu::Isa::amx) return !fills_lines(g.shape);
  return g.shape.dtype == cpu::ConvDType::mixed && cpu::active_isa() == cpu::Isa::avx512_bf16 && !transposed && !gradients &&
         g.batch * g.height * g.width >= kManyPixels;
}

}  // namespace

OptionalTensor conv_stack_single(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                 const BatchNormArguments* bn, const ConvLayer& layer, Activation activation,
                                 double negative_slope) {
  const bool concrete = !input.unsafeGetTensorImpl()->has_symbolic_sizes_strides() &&
                        !weight.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  const auto dtype = input.scalar_type();
  if (!concrete || !input.device().is_cpu() || (dtype != at::kFloat && dtype != at::kBFloat16) || input.dim() != 4 ||
      layer.groups != 1 || !is(layer.dilation, 1) || !is(layer.output_padding, 0) ||
      !input.is_contiguous(at::MemoryFormat::ChannelsLast))
    return std::nullopt;
  StackLayer one{layer.transposed, {layer.stride[0], layer.stride[1]}, {layer.padding[0], layer.padding[1]}, defined(bias),
                 bn != nullptr, bn && defined(bn->weight), bn && defined(bn->bias), bn && defined(bn->running_mean),
                 bn && bn->training, bn && bn->training && !bn->group.alone(), activation,
                 bn ? bn->momentum : 0.0, bn ? bn->eps : 0.0, negative_slope};
  const Geometry g = geometry(one, input.size(0), input.size(1), input.size(2), input.size(3), weight, dtype, true);
  const bool from_pixel = runs_from_pixel(g, weight);
  // What comes as pixels has no memory format; otherwise the caller has to have chosen this one. One channel is in both at once:
  // its strides tell, as to PyTorch.
  if (!from_pixel && (input.suggest_memory_format() != at::MemoryFormat::ChannelsLast || (g.path != Path::conv4x4s2 && !runs_to_pixel(g, weight))))
    return std::nullopt;
  std::vector<Tensor> running;
  if (one.has_running) running = {*bn->running_mean, *bn->running_var};
  for (const Tensor& t : running)  // updated in place
    if (!t.is_contiguous() || t.scalar_type() != at::kFloat) return std::nullopt;
  std::vector<Tensor> parameters{weight};
  if (one.has_bias) parameters.push_back(*bias);
  if (one.has_bn_weight) parameters.push_back(*bn->weight);
  if (one.has_bn_bias) parameters.push_back(*bn->bias);
  if (leaves_to_aten(g, layer.transposed, wants_gradients(input, parameters))) return std::nullopt;
  const int64_t integers[StackLayer::kIntegers] = {
      one.transposed, one.stride[0], one.stride[1], one.padding[0], one.padding[1], one.has_bias, one.has_batch_norm,
      one.has_bn_weight, one.has_bn_bias, one.has_running, one.together ? 2 : one.training, static_cast<int64_t>(activation)};
  const double numbers[StackLayer::kNumbers] = {one.momentum, one.eps, one.negative_slope};
  const ProcessGroup group = one.together ? bn->group : ProcessGroup{};
  const Tensor output = conv_stack(input, parameters, running, integers, numbers, group.name, group.size);
  const auto suggests = [](const Tensor& t) { return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast; };
  const bool channels_last = !from_pixel || suggests(input) || suggests(weight);
  return channels_last ? output : contiguous_images(output, at::MemoryFormat::Contiguous);
}

TORCH_LIBRARY_IMPL(fastgan, CompositeImplicitAutograd, m) { m.impl("conv_stack", &conv_stack); }

TORCH_LIBRARY_IMPL(fastgan, CPU, m) {
  m.impl("conv_stack_forward", &conv_stack_forward_cpu);
  m.impl("conv_stack_backward", &conv_stack_backward_cpu);
}

TORCH_LIBRARY_IMPL(fastgan, Autograd, m) {
  m.impl("conv_stack_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("conv_stack_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastgan
