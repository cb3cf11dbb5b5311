// What conv_stack on CUDA runs each layer as, and where it saves what backward needs. See cuda_conv_stack.cpp.
#pragma once

#include <array>
#include <vector>

#include "conv_stack.h"
#include "cuda_conv4x4s2.h"

namespace fastgan {

// What backward computes again instead of finding it saved: activated outputs of more bytes than this. Below it launches cost more
// than memory is worth.
#if defined(FASTGAN_CUDA_HOST)
constexpr int64_t kSavedBytes = 2 << 10, kWholeBytes = 4 << 10;  // so that tests meet both
#else
constexpr int64_t kSavedBytes = 8 << 20;
constexpr int64_t kWholeBytes = 32 << 20;  // a first layer's output beyond it is computed again half by half
#endif

struct LayerPlan {
  cuda::Conv4x4Geometry geometry;
  cuda::Conv4x4Direction forward, backward;
  std::array<int64_t, 4> sizes;  // of the output, [N, C, H, W]
  cuda::ActivationSpec activation;
  // Where the raw output, the activated output and (mean, invstd) stand in what is saved, in elements; -1: nowhere.
  int64_t raw_offset = -1, activated_offset = -1, statistics_offset = -1;
  // The activated output is not saved: backward has it from the raw one, or, of a first layer without batch norm, from the input.
  bool recomputed = false;

  int64_t channels() const { return sizes[1]; }
  int64_t values() const { return sizes[0] * sizes[2] * sizes[3]; }  // a channel
  cuda::BnActShape shape() const { return {values(), channels(), 1}; }
  // The same for some of the images.
  LayerPlan of(int64_t images) const {
    LayerPlan part = *this;
    part.geometry.batch = part.sizes[0] = images;
    return part;
  }
};

struct Plan {
  std::vector<LayerPlan> layers;
  int64_t saved_size = 0;       // elements of raw and activated outputs that are saved
  int64_t statistics_size = 0;  // of mean and invstd; as many of scale and shift follow in the same order
  int64_t most_channels = 0;
};

// Throws where the kernels do not take a layer. fastgan/ops/conv_stack.py has the same rules, and counts the same sizes.
Plan make_plan(const std::vector<StackLayer>& stack, const std::vector<LayerParameters>& split, const Tensor& input);

// What batch norm of a layer normalises by, [C] each, in what is saved.
struct Statistics {
  float *mean, *invstd, *scale, *shift;
  Statistics(const Tensor& statistics, const Plan& plan, const LayerPlan& layer)
      : mean(floats(statistics) + layer.statistics_offset),
        invstd(mean + layer.channels()),
        scale(mean + plan.statistics_size),
        shift(scale + layer.channels()) {}
};

// The pointers to images that lie one after the other.
class Saved {
 public:
  explicit Saved(const Tensor& memory)
      : data_(static_cast<char*>(memory.mutable_data_ptr())), bytes_(static_cast<int64_t>(memory.element_size())) {}
  void* raw(const LayerPlan& layer) const { return data_ + layer.raw_offset * bytes_; }
  void* activated(const LayerPlan& layer) const { return data_ + layer.activated_offset * bytes_; }

 private:
  char* data_;
  int64_t bytes_;
};

}  // namespace fastgan
