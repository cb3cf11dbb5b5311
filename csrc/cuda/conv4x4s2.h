// Convolutions and transposed convolutions with a 4x4 kernel (stride 2 padding 1, and stride 1 padding 0), with what
// surrounds them in a GAN fused in: CUDA kernels over raw pointers.
//
// Both networks are described by one geometry. A convolution maps the large grid to the small one ("down"), a
// transposed convolution the small to the large ("up"); the input gradient of each is the forward of the other with
// the same weight tensor, and both have the same weight gradient. So there are three main loops for everything:
//
//   conv4x4s2_launch, down      convolution forward,             transposed convolution's input gradient
//   conv4x4s2_launch, up        transposed convolution forward,  convolution's input gradient
//   conv4x4s2_weight_gradient_launch
//
// Activations are bfloat16 or float16, channels_last, dense: [batch, height, width, channels]; sums are float32. float32
// activations are taken to and from one pixel of up to four channels and, with TF32 allowed, for images of as many, on
// Hopper also up and down of more channels; the rest cuDNN does as well. (Built for the host all of it is there, unless
// host::float32_in_every_loop is off, and tests compare it with float64.) Weights are PyTorch's: [small_channels,
// large_channels, 4, 4] for both kinds of layer, in either memory format. Per-channel arrays are float32.
//
// Every function launches on `stream`, allocates nothing, does not synchronise, and returns the launch's error.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bn_act.h"
#include "runtime.h"

namespace fastgan::cuda {

struct Conv4x4Geometry {
  int64_t batch = 0;
  int64_t small_height = 0, small_width = 0, small_channels = 0;
  int64_t large_height = 0, large_width = 0, large_channels = 0;
  int stride = 2;  // 2 with padding 1: large is 2 * small or 2 * small + 1; 1 with padding 0: large is small + 3
};

enum class Conv4x4Direction : int { down = 0, up };

// Whether activations may be of that type, whatever the layer.
bool conv4x4s2_takes(DataType type);

// True if the geometry holds together and the kernels take it. Stride 1 goes up from a 1x1 grid only.
bool conv4x4s2_supported(const Conv4x4Geometry& geometry, Conv4x4Direction direction);
bool conv4x4s2_weight_gradient_supported(const Conv4x4Geometry& geometry);

// What happens to the float32 sums before they are stored.
struct Conv4x4Epilogue {
  enum class Kind : int {
    store = 0,            // + bias
    statistics,           // + bias; also the tiles' mean and squared deviations, from the float32 sums
    bias_activation,      // act(sum + bias)
    activation_backward,  // dz = sum * act'(scale * y + shift); also the tiles' sums of dz and dz (y - mean) invstd
  };
  Kind kind = Kind::store;
  const float* bias = nullptr;  // [output channels]; null: 0
  ActivationSpec activation;
  StatisticsTiles statistics;     // out, see conv4x4s2_statistics_shape
  const void* y = nullptr;        // activation_backward: raw output of the layer before, shaped like the output here; may be its memory
  const float* scale = nullptr;   // [output channels]; null: 1
  const float* shift = nullptr;   // null: 0
  const float* mean = nullptr;    // null: 0
  const float* invstd = nullptr;  // null: 1
  GradientTiles gradients;        // out; either array may be null
};

struct Conv4x4Args {
  Conv4x4Geometry geometry;
  Conv4x4Direction direction = Conv4x4Direction::down;
  DataType type = DataType::bfloat16;
  int multiprocessors = 132;  // of the device
  bool tf32 = false;          // float32 may be rounded to TF32 for the tensor cores
  const void* input = nullptr;
  const void* packed_weight = nullptr;  // by conv4x4s2_pack_launch
  void* output = nullptr;
  Conv4x4Epilogue epilogue;
};

// Memory order of a weight [small_channels, large_channels, 4, 4]: as written, or with large_channels innermost.
enum class Conv4x4WeightLayout : int { contiguous = 0, channels_last };

// Weights in the order in which the main loop reads them, in the storage type of the activations.
struct Conv4x4PackArgs {
  Conv4x4Geometry geometry;
  Conv4x4Direction direction = Conv4x4Direction::down;
  DataType type = DataType::bfloat16;  // of the activations and of the packed weights
  DataType weight_type = DataType::float32;  // float32 master weights need no separate cast
  Conv4x4WeightLayout weight_layout = Conv4x4WeightLayout::contiguous;
  const void* weight = nullptr;  // [small_channels, large_channels, 4, 4]
  void* packed = nullptr;        // conv4x4s2_packed_bytes, aligned to 16 bytes
};
size_t conv4x4s2_packed_bytes(const Conv4x4PackArgs& args);
// Whether the weight as it is serves as a packed one.
bool conv4x4s2_is_packed(const Conv4x4PackArgs& args);
// Of `count` layers at once, all with the same types: one launch for every eight.
cudaError_t conv4x4s2_pack_launch(const Conv4x4PackArgs* args, int count, cudaStream_t stream);

// tiles and rows_per_count that `args` will write; the pointers are the caller's. For the statistics epilogue and, with
// the same number of tiles, for activation_backward. Entries of `count`: tiles / rows_per_count.
StatisticsTiles conv4x4s2_statistics_shape(const Conv4x4Args& args);

// Whether conv4x4s2_launch takes all of that; packed_weight is not looked at.
bool conv4x4s2_takes(const Conv4x4Args& args);
cudaError_t conv4x4s2_launch(const Conv4x4Args& args, cudaStream_t stream);

// grad_weight[k, c, r, s] = sum over batch and small grid of small[n, p, q, k] * large[n, 2p - 1 + r, 2q - 1 + s, c]
// (stride 1: large[n, p + r, q + s, c]).
struct Conv4x4WeightGradientArgs {
  Conv4x4Geometry geometry;
  DataType type = DataType::bfloat16;
  int multiprocessors = 132;
  bool tf32 = false;
  const void* small = nullptr;  // [batch, small_height, small_width, small_channels]
  const void* large = nullptr;  // [batch, large_height, large_width, large_channels]
  DataType weight_type = DataType::float32;
  Conv4x4WeightLayout weight_layout = Conv4x4WeightLayout::contiguous;
  void* grad_weight = nullptr;  // [small_channels, large_channels, 4, 4]
  void* workspace = nullptr;    // conv4x4s2_weight_gradient_workspace_bytes, aligned to 16 bytes
};
bool conv4x4s2_takes(const Conv4x4WeightGradientArgs& args);  // but for grad_weight and workspace
size_t conv4x4s2_weight_gradient_workspace_bytes(const Conv4x4WeightGradientArgs& args);
cudaError_t conv4x4s2_weight_gradient_launch(const Conv4x4WeightGradientArgs& args, cudaStream_t stream);

}  // namespace fastgan::cuda
