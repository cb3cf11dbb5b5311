// conv_stack on CUDA: a run of 4x4 convolutions [+ batch norm] [+ activation], from end to end in channels_last.
//
// A layer with batch norm is a main loop whose epilogue takes the statistics, a merge of its tiles, and one pass for
// normalisation and activation; a layer without is a main loop alone. Backward, the main loop of the input gradient
// multiplies by the activation's derivative and sums what batch norm's backward needs of the layer below, so that one
// merge and one pass remain. Main loops read activated tensors as they lie: on their way to the tensor cores nothing
// is computed. Weights are packed for all main loops of a call by one launch at its beginning.
//
// Backward needs, of every layer, the raw output where batch norm follows, and the activated output, which is the operand
// of the next weight gradient; without batch norm the activation's derivative is taken from it. Raw outputs are saved.
// Activated ones are saved where they are small; others are computed again, in memory that the layer's gradient then
// takes: from the raw output by one pass, or, of a first layer without batch norm, by its convolution, for half of the
// images after the other. The last layer's activated output is the operator's. Images are bfloat16 or float16, everything else
// float32.
//
// All launches are on the current stream, allocate through PyTorch and never synchronise: a CUDA graph can capture
// them.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "cuda_conv_stack_plan.h"

namespace fastgan {
namespace {

using cuda::Conv4x4Direction;
using cuda::Conv4x4Epilogue;

// Memory that one launch after the other uses, as large as the largest of them has asked for.
class Workspace {
 public:
  explicit Workspace(const Tensor& like) : like_(like) {}

  void* take(size_t bytes) {
    if (!memory_.defined() || static_cast<size_t>(memory_.numel()) < bytes) memory_ = scratch(like_, bytes);
    return memory_.mutable_data_ptr();
  }

  // A tile's sums of dz and, if sums is 2, of dz * xhat.
  cuda::GradientTiles take_sums(int64_t tiles, int64_t channels, int sums) {
    if (sums == 0) return {};
    auto* first = static_cast<float*>(take(sizeof(float) * static_cast<size_t>(sums * tiles * channels)));
    return {tiles, first, sums == 2 ? first + tiles * channels : nullptr};
  }

 private:
  const Tensor& like_;
  Tensor memory_;
};

// The launches of one call, on the current stream.
class Launches {
 public:
  explicit Launches(const Tensor& images)
      : type(cuda_type(images.scalar_type())),
        stream(current_stream()),
        tiles(images),
        multiprocessors_(multiprocessors()),
        packed_(images),
        partial_(images) {}

  // Packs, by one launch, a layer's weights for the main loop in a direction, for each of `wanted`. Returns them in that
  // order.
  std::vector<const void*> pack(const Plan& plan, const std::vector<LayerParameters>& parameters,
                                const std::vector<std::pair<int64_t, Conv4x4Direction>>& wanted) {
    constexpr size_t kAlignment = 256;
    std::vector<cuda::Conv4x4PackArgs> packs;
    std::vector<size_t> offsets;
    size_t bytes = 0;
    for (const auto& [layer, direction] : wanted) {
      const Tensor& weight = parameters[layer].weight;
      cuda::Conv4x4PackArgs& pack = packs.emplace_back();
      pack.geometry = plan.layers[layer].geometry;
      pack.direction = direction;
      pack.type = type;
      pack.weight_layout = weight_layout(weight_format(weight));
      pack.weight = weight.const_data_ptr();
      offsets.push_back(bytes);
      bytes += (conv4x4s2_packed_bytes(pack) + kAlignment - 1) / kAlignment * kAlignment;
    }
    auto* memory = static_cast<char*>(packed_.take(bytes));
    std::vector<const void*> packed;
    for (size_t i = 0; i < packs.size(); ++i) packed.push_back(packs[i].packed = memory + offsets[i]);
    C10_CUDA_CHECK(conv4x4s2_pack_launch(packs.data(), static_cast<int>(packs.size()), stream));
    return packed;
  }

  // A main loop. The epilogue's tiles are allocated here: for statistics, or `sums` of them for activation_backward.
  void convolve(const LayerPlan& layer, Conv4x4Direction direction, const void* packed_weight, const void* input,
                void* output, Conv4x4Epilogue& epilogue, int sums = 0) {
    cuda::Conv4x4Args args;
    args.geometry = layer.geometry;
    args.direction = direction;
    args.type = type;
    args.multiprocessors = multiprocessors_;
    args.input = input;
    args.packed_weight = packed_weight;
    args.output = output;
    args.epilogue = epilogue;
    const bool down = direction == Conv4x4Direction::down;
    const int64_t channels = down ? layer.geometry.small_channels : layer.geometry.large_channels;
    if (epilogue.kind == Conv4x4Epilogue::Kind::statistics) {
      epilogue.statistics = conv4x4s2_statistics_shape(args);
      const int64_t rows = epilogue.statistics.tiles, counts = rows / epilogue.statistics.rows_per_count;
      auto* first = static_cast<float*>(tiles.take(sizeof(float) * static_cast<size_t>(2 * rows * channels + counts)));
      epilogue.statistics.mean = first;
      epilogue.statistics.m2 = first + rows * channels;
      epilogue.statistics.count = first + 2 * rows * channels;
    } else if (sums > 0) {
      epilogue.gradients = tiles.take_sums(conv4x4s2_statistics_shape(args).tiles, channels, sums);
    }
    args.epilogue = epilogue;
    C10_CUDA_CHECK(conv4x4s2_launch(args, stream));
  }

  // In the weight's memory format.
  Tensor weight_gradient(const LayerPlan& layer, const Tensor& weight, const void* input, const void* dy) {
    const Tensor grad_weight = at::empty_like(weight);
    const bool up = layer.forward == Conv4x4Direction::up;
    cuda::Conv4x4WeightGradientArgs args;
    args.geometry = layer.geometry;
    args.type = type;
    args.multiprocessors = multiprocessors_;
    args.small = up ? input : dy;
    args.large = up ? dy : input;
    args.weight_layout = weight_layout(weight_format(weight));
    args.grad_weight = grad_weight.mutable_data_ptr();
    args.workspace = partial_.take(conv4x4s2_weight_gradient_workspace_bytes(args));
    C10_CUDA_CHECK(conv4x4s2_weight_gradient_launch(args, stream));
    return grad_weight;
  }

  const cuda::DataType type;
  const cudaStream_t stream;
  Workspace tiles;

 private:
  const int multiprocessors_;
  Workspace packed_;   // weights
  Workspace partial_;  // sums of a weight gradient
};

// Parameters as the kernels read them: weights in either memory format, arrays dense.
std::vector<LayerParameters> dense_parameters(std::vector<LayerParameters> split) {
  for (LayerParameters& p : split) {
    p.weight = p.weight.contiguous(weight_format(p.weight));
    for (Tensor* array : {&p.bias, &p.bn_weight, &p.bn_bias})
      if (array->defined()) *array = array->contiguous();
  }
  return split;
}

Tensor empty_images(const Tensor& like, const LayerPlan& layer) {
  return at::empty(layer.sizes, like.options().memory_format(kChannelsLast));
}

// (output, raw and activated outputs, statistics); the last two have shape [0] unless save_for_backward.
std::tuple<Tensor, Tensor, Tensor> conv_stack_forward_cuda(const Tensor& input, at::TensorList parameters,
                                                           at::TensorList running, at::IntArrayRef layers,
                                                           at::ArrayRef<double> numbers, bool save_for_backward,
                                                           c10::string_view, int64_t) {
  const DeviceGuard device_guard(input.device());
  const auto stack = parse_stack(layers, numbers);
  const auto split = dense_parameters(split_parameters(stack, parameters));
  check_parameters(stack, split, running, input);
  const Plan plan = make_plan(stack, split, input);
  const Tensor images = input.contiguous(kChannelsLast);
  const auto options = images.options().memory_format(at::MemoryFormat::Contiguous);
  const Tensor memory = at::empty({save_for_backward ? plan.saved_size : 0}, options);
  const Tensor statistics = empty_floats(images, 2 * plan.statistics_size);
  const Saved saved(memory);
  Launches launches(images);
  std::vector<std::pair<int64_t, Conv4x4Direction>> packs;
  for (const LayerPlan& p : plan.layers) packs.emplace_back(packs.size(), p.forward);
  const auto packed = launches.pack(plan, split, packs);

  Tensor output, unsaved;  // unsaved: of the layer before, and then of this one
  const void* x = images.const_data_ptr();
  size_t next_running = 0;
  for (size_t i = 0; i < stack.size(); ++i) {
    const StackLayer& layer = stack[i];
    const LayerPlan& p = plan.layers[i];
    Tensor before;  // lives while this layer's convolution reads it
    const auto activated_output = [&] {
      if (i + 1 == stack.size()) return (output = empty_images(images, p)).mutable_data_ptr();
      if (save_for_backward && !p.recomputed) return saved.activated(p);
      before = std::exchange(unsaved, Tensor());
      return (unsaved = empty_images(images, p)).mutable_data_ptr();
    };
    void* activated;
    Conv4x4Epilogue epilogue;
    epilogue.bias = floats(split[i].bias);
    if (!layer.has_batch_norm) {
      epilogue.kind = Conv4x4Epilogue::Kind::bias_activation;
      epilogue.activation = p.activation;
      activated = activated_output();
      launches.convolve(p, p.forward, packed[i], x, activated, epilogue);
    } else {
      void* raw = save_for_backward ? saved.raw(p) : activated_output();
      epilogue.kind = layer.training ? Conv4x4Epilogue::Kind::statistics : Conv4x4Epilogue::Kind::store;
      launches.convolve(p, p.forward, packed[i], x, raw, epilogue);
      activated = raw;
      if (save_for_backward) {
        unsaved = Tensor();  // read, so that its memory may become this layer's
        activated = activated_output();
      }
      const Statistics s(statistics, plan, p);
      cuda::BatchNormForwardArgs merge;
      merge.channels = p.channels();
      merge.tiles = epilogue.statistics;
      merge.count = static_cast<double>(p.values());
      merge.weight = floats(split[i].bn_weight);
      merge.bias = floats(split[i].bn_bias);
      merge.eps = static_cast<float>(layer.eps);
      merge.momentum = static_cast<float>(layer.momentum);
      if (layer.has_running) {
        merge.running_mean = floats(running[next_running++]);
        merge.running_var = floats(running[next_running++]);
      }
      merge.mean = s.mean, merge.invstd = s.invstd, merge.scale = s.scale, merge.shift = s.shift;
      const auto launch = layer.training ? cuda::batch_norm_forward_launch : cuda::batch_norm_inference_launch;
      C10_CUDA_CHECK(launch(merge, launches.stream));
      C10_CUDA_CHECK(cuda::scale_shift_act_launch(
          {p.shape(), launches.type, raw, s.scale, s.shift, p.activation, activated}, launches.stream));
    }
    x = activated;
  }
  return {output, memory, save_for_backward ? statistics : empty_floats(images, 0)};
}

// The backward pass, layer by layer from the last one down.
class StackBackward {
 public:
  StackBackward(const Tensor& input, at::TensorList parameters, const Tensor& output, const Tensor& raw, const Tensor& statistics,
                at::IntArrayRef layers, at::ArrayRef<double> numbers, at::IntArrayRef output_mask)
      : input_(input),
        output_(output),
        statistics_(statistics),
        parameters_(parameters),
        output_mask_(output_mask),
        stack_(parse_stack(layers, numbers)),
        split_(dense_parameters(split_parameters(stack_, parameters))),
        plan_(make_plan(stack_, split_, input)),
        wanted_(wanted_gradients(stack_, output_mask)),
        last_(static_cast<int64_t>(stack_.size()) - 1),
        saved_(raw),
        launches_(input),
        rows_(empty_floats(input, 4 * plan_.most_channels)),
        results_(output_mask.size()) {
    together_ = last_ > 0 && plan_.layers[0].recomputed && !stack_[0].has_batch_norm && wanted_.lowest <= 1 &&
                (wants_weight(1) || wants_input(1));
    pack_weights();
  }

  // Gradients of input and of every parameter, with shape [0] where output_mask says false.
  std::vector<Tensor> run(const Tensor& grad_output) {
    Tensor dy = last_layer(grad_output.contiguous(kChannelsLast));
    for (int64_t i = last_; i >= wanted_.lowest; --i) {
      if (i == 1 && together_) {
        first_two_layers(dy);
        break;
      }
      Tensor recomputed;  // the activated output of the layer below
      if (wants_weight(i)) recomputed = weight_gradient(i, dy);
      if (!wants_input(i)) break;
      if (i == 0) {
        results_[0] = at::empty(input_.sizes(), input_.options().memory_format(kChannelsLast));
        Conv4x4Epilogue store;
        const LayerPlan& p = plan_.layers[0];
        launches_.convolve(p, p.backward, packed_[0], dy.const_data_ptr(), results_[0].mutable_data_ptr(), store);
        break;
      }
      dy = through_layer_below(i, dy, recomputed);
    }
    for (size_t k = 0; k < results_.size(); ++k)
      if (!output_mask_[k]) results_[k] = at::empty({0}, (k == 0 ? input_ : parameters_[k - 1]).options());
    return results_;
  }

 private:
  // The places of a layer's arrays in the results; 0 where there is none, or nobody wants its gradient.
  struct Arrays {
    size_t bias, bn_weight, bn_bias;
  };

  bool wants_weight(int64_t i) const { return output_mask_[wanted_.first_parameter[i]] != 0; }
  bool wants_input(int64_t i) const { return i > wanted_.lowest || (i == 0 && output_mask_[0]); }

  Arrays wanted_arrays(int64_t i) const {
    size_t next = wanted_.first_parameter[i] + 1;
    const auto place = [&](bool present) { return present && output_mask_[next++] ? next - 1 : size_t{0}; };
    Arrays arrays;
    arrays.bias = place(stack_[i].has_bias);
    arrays.bn_weight = place(stack_[i].has_bn_weight);
    arrays.bn_bias = place(stack_[i].has_bn_bias);
    return arrays;
  }

  // How many sums over a layer's dz are needed: none, of dz, or also of dz * xhat.
  int sums_needed(int64_t i) const {
    const Arrays arrays = wanted_arrays(i);
    if ((stack_[i].has_batch_norm && stack_[i].training) || arrays.bn_weight) return 2;
    return arrays.bias || arrays.bn_bias ? 1 : 0;
  }

  // One of the four of rows_: b and c of a layer's batch norm backward, and sums whose gradients nobody wants; of one layer at a time.
  float* row(int64_t i) const { return floats(rows_) + i * plan_.most_channels; }

  Statistics statistics(int64_t i) const { return Statistics(statistics_, plan_, plan_.layers[i]); }

  void pack_weights() {
    std::vector<std::pair<int64_t, Conv4x4Direction>> packs;
    for (int64_t i = 0; i <= last_; ++i)
      if (wants_input(i)) packs.emplace_back(i, plan_.layers[i].backward);
    if (together_) packs.emplace_back(0, plan_.layers[0].forward);
    const auto in_order = launches_.pack(plan_, split_, packs);
    packed_.resize(stack_.size());
    for (size_t k = 0; k < packs.size() - together_; ++k) packed_[packs[k].first] = in_order[k];
    if (together_) packed_forward_ = in_order.back();
  }

  // Merges the tiles' sums into the gradients of layer i's arrays, and into b and c.
  void merge(int64_t i, const cuda::GradientTiles& tiles) {
    if (tiles.sum_dz == nullptr) return;
    const StackLayer& layer = stack_[i];
    const LayerPlan& p = plan_.layers[i];
    const Arrays arrays = wanted_arrays(i);
    const auto result = [&](size_t place, int64_t otherwise) {
      if (place == 0) return row(otherwise);
      results_[place] = empty_floats(input_, p.channels());
      return floats(results_[place]);
    };
    cuda::BatchNormBackwardArgs args;
    args.channels = p.channels();
    args.tiles = tiles;
    args.count = static_cast<double>(p.values());
    args.sum_dz = result(layer.has_batch_norm ? arrays.bn_bias : arrays.bias, 2);
    if (tiles.sum_dz_xhat != nullptr) args.sum_dz_xhat = result(arrays.bn_weight, 3);
    if (layer.has_batch_norm && layer.training) {
      const Statistics s = statistics(i);
      args.weight = floats(split_[i].bn_weight), args.mean = s.mean, args.invstd = s.invstd;
      args.b = row(0), args.c = row(1);
    }
    C10_CUDA_CHECK(batch_norm_backward_launch(args, launches_.stream));
    if (!layer.has_batch_norm || arrays.bias == 0) return;
    // Batch statistics cancel the bias, so its gradient in training mode is exactly 0.
    if (layer.training) {
      results_[arrays.bias] = at::zeros({p.channels()}, rows_.options());
    } else {
      const Tensor sum_dz = arrays.bn_bias ? results_[arrays.bn_bias]
                                           : rows_.narrow(0, 2 * plan_.most_channels, p.channels());
      results_[arrays.bias] =
          at::mul(statistics_.narrow(0, plan_.statistics_size + p.statistics_offset, p.channels()), sum_dz);
    }
  }

  // Layer i's raw output, and what batch norm's backward applies to dz; in evaluation mode that is weight * invstd alone.
  cuda::BnActBackwardArgs batch_norm_backward(int64_t i) const {
    cuda::BnActBackwardArgs args;
    args.shape = plan_.layers[i].shape();
    args.type = launches_.type;
    args.input = saved_.raw(plan_.layers[i]);
    args.weight = floats(split_[i].bn_weight), args.invstd = statistics(i).invstd;
    if (stack_[i].training) args.b = row(0), args.c = row(1);
    return args;
  }

  // From the gradient of the output to that of the last layer's convolution.
  Tensor last_layer(const Tensor& grad) {
    const LayerPlan& p = plan_.layers[last_];
    const int sums = sums_needed(last_);
    const cuda::GradientTiles tiles = launches_.tiles.take_sums(cuda::bn_act_tiles(p.shape()), p.channels(), sums);
    if (stack_[last_].has_batch_norm) {
      cuda::BnActBackwardArgs args = batch_norm_backward(last_);
      args.grad_output = grad.const_data_ptr();
      args.bias = floats(split_[last_].bn_bias), args.mean = statistics(last_).mean;
      args.activation = p.activation;
      args.tiles = tiles;
      if (sums > 0) C10_CUDA_CHECK(bn_act_backward_reduce_launch(args, launches_.stream));
      merge(last_, tiles);
      if (!wants_weight(last_) && !wants_input(last_)) return Tensor();
      const Tensor dy = empty_images(grad, p);
      args.grad_input = dy.mutable_data_ptr();
      C10_CUDA_CHECK(bn_act_backward_apply_launch(args, launches_.stream));
      return dy;
    }
    if (sums == 0 && p.activation.kind == Activation::identity) return grad;
    const Tensor dy = empty_images(grad, p), kept = output_.contiguous(kChannelsLast);
    C10_CUDA_CHECK(cuda::act_backward_launch({p.shape(), launches_.type, grad.const_data_ptr(), kept.const_data_ptr(),
                                              p.activation, dy.mutable_data_ptr(), tiles},
                                             launches_.stream));
    merge(last_, tiles);
    return dy;
  }

  // Of layer i. Returns the activated output of the layer below where that was computed again, else nothing.
  Tensor weight_gradient(int64_t i, const Tensor& dy) {
    Tensor& result = results_[wanted_.first_parameter[i]];
    if (i == 0) {
      const Tensor images = input_.contiguous(kChannelsLast);
      result = launches_.weight_gradient(plan_.layers[0], split_[0].weight, images.const_data_ptr(), dy.const_data_ptr());
      return Tensor();
    }
    const LayerPlan& below = plan_.layers[i - 1];
    Tensor recomputed;
    if (below.recomputed) {
      recomputed = empty_images(input_, below);
      const Statistics s = statistics(i - 1);
      C10_CUDA_CHECK(cuda::scale_shift_act_launch({below.shape(), launches_.type, saved_.raw(below), s.scale, s.shift,
                                                   below.activation, recomputed.mutable_data_ptr()},
                                                  launches_.stream));
    }
    const void* x = below.recomputed ? recomputed.const_data_ptr() : saved_.activated(below);
    result = launches_.weight_gradient(plan_.layers[i], split_[i].weight, x, dy.const_data_ptr());
    return recomputed;
  }

  // From the gradient of layer i's convolution to that of the one below, in the memory of `recomputed` where that is there.
  Tensor through_layer_below(int64_t i, const Tensor& dy, const Tensor& recomputed) {
    const LayerPlan &p = plan_.layers[i], &below = plan_.layers[i - 1];
    const bool has_batch_norm = stack_[i - 1].has_batch_norm;
    const Tensor dz = recomputed.defined() ? recomputed : empty_images(input_, below);
    Conv4x4Epilogue epilogue;
    epilogue.kind = Conv4x4Epilogue::Kind::activation_backward;
    epilogue.activation = below.activation;
    epilogue.y = has_batch_norm ? saved_.raw(below) : saved_.activated(below);
    if (has_batch_norm) {
      const Statistics s = statistics(i - 1);
      epilogue.scale = s.scale, epilogue.shift = s.shift, epilogue.mean = s.mean, epilogue.invstd = s.invstd;
    }
    launches_.convolve(p, p.backward, packed_[i], dy.const_data_ptr(), dz.mutable_data_ptr(), epilogue, sums_needed(i - 1));
    merge(i - 1, epilogue.gradients);
    if (has_batch_norm && (wants_weight(i - 1) || wants_input(i - 1))) {
      cuda::BnActBackwardArgs args = batch_norm_backward(i - 1);
      args.grad_output = dz.const_data_ptr();
      args.grad_input = dz.mutable_data_ptr();
      C10_CUDA_CHECK(bn_act_backward_apply_launch(args, launches_.stream));
    }
    return dz;
  }

  // Where the first layer's output is not saved: it is computed again, for half of the images after the other, and read at
  // once by the second layer's weight gradient. The second layer's input gradient then takes its memory.
  void first_two_layers(const Tensor& dy) {
    const LayerPlan &first_layer = plan_.layers[0], &second_layer = plan_.layers[1];
    const Tensor images = input_.contiguous(kChannelsLast);
    const int sums = wants_input(1) ? sums_needed(0) : 0;  // over all images, which are taken at once then
    const int64_t batch = input_.size(0), element = input_.element_size();
    const int64_t output_bytes = first_layer.values() / batch * first_layer.channels() * element;
    const int64_t most = sums > 0 || batch * output_bytes <= kWholeBytes ? batch : (batch + 1) / 2;
    const Tensor memory = empty_images(input_, first_layer.of(most));
    if (wants_input(0)) results_[0] = at::empty(input_.sizes(), input_.options().memory_format(kChannelsLast));
    for (int64_t begin = 0; begin < batch; begin += most) {
      const int64_t count = std::min(most, batch - begin);
      const LayerPlan lower = first_layer.of(count), upper = second_layer.of(count);
      const Tensor x = images.narrow(0, begin, count), grad = dy.narrow(0, begin, count);
      const auto add = [&](int64_t i, const void* small_or_input, const void* grad_output) {
        Tensor& sum = results_[wanted_.first_parameter[i]];
        const Tensor part = launches_.weight_gradient(i == 0 ? lower : upper, split_[i].weight, small_or_input, grad_output);
        sum = sum.defined() ? sum.add_(part) : part;
      };
      Conv4x4Epilogue activate;
      activate.kind = Conv4x4Epilogue::Kind::bias_activation;
      activate.bias = floats(split_[0].bias);
      activate.activation = lower.activation;
      launches_.convolve(lower, lower.forward, packed_forward_, x.const_data_ptr(), memory.mutable_data_ptr(), activate);
      if (wants_weight(1)) add(1, memory.const_data_ptr(), grad.const_data_ptr());
      if (!wants_input(1)) continue;
      Conv4x4Epilogue derive;
      derive.kind = Conv4x4Epilogue::Kind::activation_backward;
      derive.activation = lower.activation;
      derive.y = memory.const_data_ptr();
      launches_.convolve(upper, upper.backward, packed_[1], grad.const_data_ptr(), memory.mutable_data_ptr(), derive, sums);
      merge(0, derive.gradients);
      if (wants_weight(0)) add(0, x.const_data_ptr(), memory.const_data_ptr());
      if (!wants_input(0)) continue;
      Conv4x4Epilogue store;
      launches_.convolve(lower, lower.backward, packed_[0], memory.const_data_ptr(),
                         results_[0].narrow(0, begin, count).mutable_data_ptr(), store);
    }
  }

  const Tensor &input_, &output_, &statistics_;
  const at::TensorList parameters_;
  const at::IntArrayRef output_mask_;
  const std::vector<StackLayer> stack_;
  const std::vector<LayerParameters> split_;
  const Plan plan_;
  const WantedGradients wanted_;
  const int64_t last_;
  const Saved saved_;
  Launches launches_;
  const Tensor rows_;
  std::vector<Tensor> results_;
  bool together_;  // whether the lowest two layers' gradients are computed together: first_two_layers
  std::vector<const void*> packed_;  // weights for the loops of input gradients
  const void* packed_forward_ = nullptr;  // the first layer's for its forward loop, if together_
};

std::vector<Tensor> conv_stack_backward_cuda(const Tensor& grad_output, const Tensor& input, at::TensorList parameters,
                                             const Tensor& output, const Tensor& raw, const Tensor& statistics,
                                             at::IntArrayRef layers, at::ArrayRef<double> numbers,
                                             at::IntArrayRef output_mask, c10::string_view, int64_t) {
  const DeviceGuard device_guard(input.device());
  return StackBackward(input, parameters, output, raw, statistics, layers, numbers, output_mask).run(grad_output);
}

}  // namespace

FASTGAN_CUDA_OPERATORS(m) {
  m.impl("conv_stack_forward", &conv_stack_forward_cuda);
  m.impl("conv_stack_backward", &conv_stack_backward_cuda);
}

}  // namespace fastgan
