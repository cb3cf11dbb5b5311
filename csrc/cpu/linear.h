// Layers of a perceptron: a matrix product with what follows it, batch norm, activation and Gaussian noise; forward, the
// gradient of its input with the derivative of what came before, and the gradient of the weight. float.
//
// Between layers a tensor lies *by feature*, [features][rows]: with a batch of some hundred rows a feature is then a few
// cache lines side by side, that a task has whole. So its batch statistics, its normalised values and their gradient are
// computed where its products have just been added up, and the weight, [outputs][inputs] in PyTorch, is read as it lies:
// the products broadcast its elements against vectors of rows. The weight's gradient alone sums over rows, for which
// the layer's input is kept *by row*, [rows][features], as well.
//
// A feature takes linear_stride(rows) floats, a row linear_stride(features). What lies by feature is zero past its rows.
#pragma once

#include <cstdint>

#include "batch_norm_act_noise.h"
#include "isa.h"

namespace fastgan::cpu {

struct LinearShape {
  int64_t rows, inputs, outputs;
};

// Floats from a feature, or a row, of `count` numbers to the next: an odd number of cache lines, as powers of two would put all
// features into a few places of the cache.
inline int64_t linear_stride(int64_t count) { return ((count + 15) / 16 | 1) * 16; }

// A batch norm. by_batch: normalises by the statistics of the batch.
struct LinearNorm {
  bool present, by_batch;
  double eps;
  const float *gamma, *beta;  // [features], or null: 1, 0
  float *mean, *var, *invstd;  // [features]; written by forward, mean and (biased) var only where by_batch; backward reads mean, invstd
};

// What follows a product, in this order: bias, batch norm, activation, noise.
struct LinearForward {
  const float* bias;  // [outputs], or null
  LinearNorm norm;
  ActivationSpec activation;
  GaussianNoise noise;  // a function of the seed and of the place in [rows, outputs]
  float* raw;           // by feature: products + bias, what backward needs
  float* output;        // by feature; may be raw, which is then overwritten
  float* by_row;        // the output, `stride` floats a row; or null
  int64_t stride;
};

// From the gradient of a layer's output to that of its products.
struct LinearBackward {
  LinearNorm norm;
  ActivationSpec activation;
  const float* raw;              // by feature; null where there is neither batch norm nor activation
  float *sum_dz, *sum_dz_xhat;  // [features]: sums of dz, the gradient after the norm, and of dz * xhat (with a norm only)
  float* gradient;               // by feature
};

struct LinearKernels {
  // input[rows][features] + noise, by feature and, unless null, by row
  void (*read)(int64_t rows, int64_t features, const float* input, GaussianNoise noise, float* by_feature, float* by_row);

  // input: by feature
  void (*forward)(const LinearShape& shape, const float* weight, const float* input, const LinearForward& forward);

  // gradient[rows][features] of the last layer's output
  void (*read_gradient)(int64_t rows, int64_t features, const float* gradient, const LinearBackward& backward);

  // From the gradient of a layer's products, by feature, to that of the products of the layer below, whose features are the inputs; or
  // to that of the stack's input, by_row[rows][inputs]: then of `below` only the memory at `gradient` is used.
  void (*input_gradient)(const LinearShape& shape, const float* weight, const float* gradient, const LinearBackward& below,
                         float* by_row);

  // weight_gradient[outputs][inputs], set or added to; input: by row, gradient: of the products, by feature
  void (*weight_gradient)(const LinearShape& shape, const float* gradient, const float* input, float* weight_gradient, bool add);
};

FASTGAN_PER_ISA(LinearKernels, linear_kernels, ())

// The kernels for active_isa(). They allocate nothing, and their results are the same for every number of threads.
inline const LinearKernels& linear_kernels() {
  static const LinearKernels kernels = FASTGAN_ISA_CALL(linear_kernels);
  return kernels;
}

}  // namespace fastgan::cpu
