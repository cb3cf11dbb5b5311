// Which layers conv_stack takes on CUDA, and the sizes of what it saves.
#include "cuda_conv_stack_plan.h"

#include <algorithm>
#include <utility>

namespace fastgan {

Plan make_plan(const std::vector<StackLayer>& stack, const std::vector<LayerParameters>& split, const Tensor& input) {
  TORCH_CHECK_NOT_IMPLEMENTED(cuda::conv4x4s2_takes(cuda_type(input.scalar_type())),
                              "conv_stack: the CUDA kernels take bfloat16 and float16, got ", input.scalar_type());
  constexpr int64_t kImageChannels = 4;  // from so many a layer is cheap to repeat
  Plan plan;
  const int64_t N = input.size(0);
  int64_t C = input.size(1), H = input.size(2), W = input.size(3);
  const auto take = [&](int64_t elements) {
    constexpr int64_t kAligned = 32;  // elements: at least 64 bytes
    return std::exchange(plan.saved_size, plan.saved_size + (elements + kAligned - 1) / kAligned * kAligned);
  };
  for (size_t i = 0; i < stack.size(); ++i) {
    const StackLayer& layer = stack[i];
    const Tensor& weight = split[i].weight;
    const bool last = i + 1 == stack.size();
    const LayerSizes out = output_sizes(layer, weight, H, W);
    LayerPlan p;
    p.geometry = layer.transposed ? cuda::Conv4x4Geometry{N, H, W, C, out.height, out.width, out.channels}
                                  : cuda::Conv4x4Geometry{N, out.height, out.width, out.channels, H, W, C};
    p.geometry.stride = static_cast<int>(layer.stride[0]);
    p.forward = layer.transposed ? cuda::Conv4x4Direction::up : cuda::Conv4x4Direction::down;
    p.backward = layer.transposed ? cuda::Conv4x4Direction::down : cuda::Conv4x4Direction::up;
    const auto both = [](const int64_t(&pair)[2], int64_t value) { return pair[0] == value && pair[1] == value; };
    TORCH_CHECK_NOT_IMPLEMENTED(
        weight.size(2) == 4 && weight.size(3) == 4 && weight.size(layer.transposed ? 0 : 1) == C &&
            ((both(layer.stride, 2) && both(layer.padding, 1)) || (both(layer.stride, 1) && both(layer.padding, 0))) &&
            conv4x4s2_supported(p.geometry, p.forward) && conv4x4s2_supported(p.geometry, p.backward),
        "conv_stack: the CUDA kernels take kernel 4 with stride 2 and padding 1, or from or to one pixel; layer ", i,
        " has weight ", weight.sizes(), " for an input of ", C, " x ", H, " x ", W);
    // Without batch norm the derivative comes from the output: where a layer follows, in its epilogue, by the sign.
    const bool by_sign = layer.activation == Activation::identity || layer.activation == Activation::relu ||
                         layer.activation == Activation::leaky_relu;
    TORCH_CHECK_NOT_IMPLEMENTED(
        layer.has_batch_norm || ((last || by_sign) && invertible(layer)),
        "conv_stack: the activation of layer ", i, " needs batch norm before it on CUDA");
    TORCH_CHECK_NOT_IMPLEMENTED(!layer.together, "conv_stack: the CUDA kernels take no process_group");
    C = out.channels, H = out.height, W = out.width;
    p.sizes = {N, C, H, W};
    p.activation = {layer.activation, static_cast<float>(layer.negative_slope)};
    if (layer.has_batch_norm) {
      p.raw_offset = take(N * C * H * W);
      p.statistics_offset = std::exchange(plan.statistics_size, plan.statistics_size + 2 * C);
    }
    const bool from_image = i == 0 && input.size(1) <= kImageChannels;
    p.recomputed = !last && (layer.has_batch_norm || from_image) && N * C * H * W * input.element_size() > kSavedBytes;
    if (!last && !p.recomputed) p.activated_offset = take(N * C * H * W);
    plan.most_channels = std::max(plan.most_channels, C);
    plan.layers.push_back(p);
  }
  return plan;
}

}  // namespace fastgan
