// Batch normalisation + activation + Gaussian noise over what a matrix product or convolution wrote: CPU kernels over
// raw pointers.
//
// Tensors are [outer, channels, inner], dense, as in bn_act.h; a perceptron's [N, C] has outer = N, inner = 1. A task
// takes 64 channels side by side (inner = 1) or one channel, with all their rows: it reads them from memory once, for the
// statistics, and finds them in the cache for what follows. At the sizes of a perceptron (300 x 1000) a task has 77 KiB.
// With inner = 1, few channels and many rows (a channels_last image) there are few tasks.
//
// The noise is drawn where it is added, from a counter (counter_normal.h): a function of the seed and of the element's
// position in memory, whatever the number of threads.
#pragma once

#include <cstdint>

#include "bn_act.h"
#include "isa.h"

namespace fastgan::cpu {

struct GaussianNoise {
  double std;     // 0: none
  uint64_t seed;
};

template <typename T>
struct BatchNormActNoiseKernels {
  using A = Accumulate<T>;

  // output = act((input - mean[c]) * invstd[c] * gamma[c] + beta[c]) + noise; gamma and beta may be null (1, 0).
  // training: writes the batch's mean and biased variance to mean and var; else they are read. Writes invstd.
  void (*forward)(const BnActShape& shape, const T* input, const A* gamma, const A* beta, double eps, bool training,
                  ActivationSpec activation, GaussianNoise noise, A* mean, A* var, A* invstd, T* output);

  // dz = grad_output * act'(z): sum_dz[c] = sum of dz, sum_dz_xhat[c] = sum of dz * (input - mean[c]) * invstd[c], and
  // the gradient of input, which is not written where grad_input is null.
  void (*backward)(const BnActShape& shape, const T* grad_output, const T* input, const A* gamma, const A* beta,
                   const A* mean, const A* invstd, bool training, ActivationSpec activation, A* sum_dz, A* sum_dz_xhat,
                   T* grad_input);
};

FASTGAN_PER_ISA(template <typename T> BatchNormActNoiseKernels<T>, batch_norm_act_noise_kernels, ())

// The kernels for active_isa().
template <typename T>
const BatchNormActNoiseKernels<T>& batch_norm_act_noise_kernels() {
  static const BatchNormActNoiseKernels<T> kernels = FASTGAN_ISA_CALL(batch_norm_act_noise_kernels<T>);
  return kernels;
}

}  // namespace fastgan::cpu
