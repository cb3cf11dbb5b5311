// A ConvLayer in what an autograd function saves for its backward pass.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <vector>

#include "conv_bn_act.h"

namespace fastgan {

inline void save_layer(torch::autograd::AutogradContext* ctx, const ConvLayer& layer) {
  ctx->saved_data["stride"] = layer.stride;
  ctx->saved_data["padding"] = layer.padding;
  ctx->saved_data["dilation"] = layer.dilation;
  ctx->saved_data["transposed"] = layer.transposed;
  ctx->saved_data["output_padding"] = layer.output_padding;
  ctx->saved_data["groups"] = layer.groups;
}

// Owns the lists that a ConvLayer points to.
struct SavedConvLayer {
  explicit SavedConvLayer(torch::autograd::AutogradContext* ctx)
      : stride(ctx->saved_data["stride"].toIntVector()),
        padding(ctx->saved_data["padding"].toIntVector()),
        dilation(ctx->saved_data["dilation"].toIntVector()),
        output_padding(ctx->saved_data["output_padding"].toIntVector()),
        layer{stride, padding, dilation, ctx->saved_data["transposed"].toBool(), output_padding,
              ctx->saved_data["groups"].toInt()} {}
  std::vector<int64_t> stride, padding, dilation, output_padding;
  ConvLayer layer;
};

}  // namespace fastgan
