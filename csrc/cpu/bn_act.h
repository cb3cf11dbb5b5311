// Batch normalisation + activation after a convolution, and activation alone: CPU kernels over raw pointers.
//
// Every tensor is described as [outer, channels, inner], dense, in elements:
//   contiguous  [N, C, H, W]: outer = N,         inner = H * W
//   channels_last           : outer = N * H * W, inner = 1
// T is the storage type (float, double, BFloat16, Half). Per-channel arrays, statistics and sums are
// Accumulate<T>: double for double, float for everything else.
//
// Statistics take one pass over memory: a block that fits the cache is summed, then its squared deviations are
// summed, and blocks are merged by the pairwise update of Chan, Golub and LeVeque (1979). E[x^2] - E[x]^2 was not
// used: it loses all digits where |mean| >> std. Blocks are cut by the shape alone and merged in order, so results
// do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "isa.h"

namespace fastgan::cpu {

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

template <typename T> struct AccumulateOf { using type = float; };
template <> struct AccumulateOf<double> { using type = double; };
template <typename T> using Accumulate = typename AccumulateOf<T>::type;

struct BnActShape {
  int64_t outer;
  int64_t channels;
  int64_t inner;
};

// An image as one plane, for what is the same to every channel: rows of few channels would keep loops from vectorising.
inline BnActShape image_planes(int64_t images, int64_t elements) { return {images, 1, images > 0 ? elements / images : 0}; }

struct ActivationSpec {
  Activation kind;
  double negative_slope;  // of leaky_relu
};

// Scratch for the reductions below, in elements of Accumulate<T>.
int64_t bn_act_workspace_size(const BnActShape& shape);

template <typename T>
struct BnActKernels {
  using A = Accumulate<T>;

  // Per-channel mean and biased variance.
  void (*batch_statistics)(const BnActShape& shape, const T* input, A* mean, A* var, A* workspace);

  // output = act(scale[c] * input + shift[c]); output may be input.
  void (*scale_shift_act)(const BnActShape& shape, const T* input, const A* scale, const A* shift,
                          ActivationSpec activation, T* output);

  // z = scale[c] * input + shift[c], dz = grad_output * act'(z):
  // sum_dz[c] = sum of dz, sum_dz_xhat[c] = sum of dz * (input - mean[c]) * invstd[c].
  void (*bn_act_backward_reduce)(const BnActShape& shape, const T* grad_output, const T* input, const A* scale,
                                 const A* shift, const A* mean, const A* invstd, ActivationSpec activation, A* sum_dz,
                                 A* sum_dz_xhat, A* workspace);

  // grad_input = a[c] * dz + b[c] * input + c0[c], with dz as above (cheaper recomputed than stored). Where b is null, a[c] * dz: b = 0
  // would make NaN of an infinite input.
  void (*bn_act_backward_apply)(const BnActShape& shape, const T* grad_output, const T* input, const A* scale,
                                const A* shift, const A* a, const A* b, const A* c0, ActivationSpec activation,
                                T* grad_input);

  // Activation without batch norm, its derivative taken from its own output (leaky_relu: negative_slope >= 0):
  // grad_input = grad_output * act'(output), sum_dz[c] = sum of grad_input.
  void (*act_backward)(const BnActShape& shape, const T* grad_output, const T* output, ActivationSpec activation,
                       T* grad_input, A* sum_dz, A* workspace);
};

FASTGAN_PER_ISA(template <typename T> BnActKernels<T>, bn_act_kernels, ())

// The kernels for active_isa().
template <typename T>
const BnActKernels<T>& bn_act_kernels() {
  static const BnActKernels<T> kernels = FASTGAN_ISA_CALL(bn_act_kernels<T>);
  return kernels;
}

// The arithmetic on per-channel arrays between those passes. A is float or double; gamma and beta may be null (1, 0).

// invstd = 1 / sqrt(var + eps), then fold_scale_shift.
template <typename A>
void fold_statistics(int64_t channels, const A* mean, const A* var, const A* gamma, const A* beta, double eps,
                     A* invstd, A* scale, A* shift);

// scale = gamma * invstd, shift = beta - mean * scale
template <typename A>
void fold_scale_shift(int64_t channels, const A* mean, const A* invstd, const A* gamma, const A* beta, A* scale,
                      A* shift);

// m2 (sums of squared deviations over `count` values) -> biased variances.
template <typename A>
void divide_by_count(int64_t channels, int64_t count, A* m2);

// Exponential averages of the mean and of the unbiased variance over `count` values a channel.
template <typename A>
void update_running_statistics(int64_t channels, int64_t count, double momentum, const A* mean, const A* var,
                               A* running_mean, A* running_var);

// dy = scale * dz + b * y + c0: the backward of a batch norm that trains (Ioffe and Szegedy 2015, section 3) with y in place of xhat.
// In evaluation mode the statistics are constants, and dy = scale * dz.
template <typename A>
void backward_coefficients(int64_t channels, int64_t count, const A* scale, const A* mean, const A* invstd,
                           const A* sum_dz, const A* sum_dz_xhat, A* b, A* c0);

}  // namespace fastgan::cpu
