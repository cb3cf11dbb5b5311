#include "bn_act.h"

#include <cmath>

#include "bn_act_blocks.h"

namespace fastgan::cpu {

int64_t bn_act_workspace_size(const BnActShape& shape) {
  return 3 * ReductionBlocks(shape).count() * shape.channels;
}

template <typename A>
void fold_scale_shift(int64_t channels, const A* mean, const A* invstd, const A* gamma, const A* beta, A* scale,
                      A* shift) {
  for (int64_t c = 0; c < channels; ++c) {
    scale[c] = gamma != nullptr ? gamma[c] * invstd[c] : invstd[c];
    shift[c] = (beta != nullptr ? beta[c] : A(0)) - mean[c] * scale[c];
  }
}

template <typename A>
void fold_statistics(int64_t channels, const A* mean, const A* var, const A* gamma, const A* beta, double eps,
                     A* invstd, A* scale, A* shift) {
  for (int64_t c = 0; c < channels; ++c) invstd[c] = static_cast<A>(1.0 / std::sqrt(static_cast<double>(var[c]) + eps));
  fold_scale_shift(channels, mean, invstd, gamma, beta, scale, shift);
}

template <typename A>
void divide_by_count(int64_t channels, int64_t count, A* m2) {
  for (int64_t c = 0; c < channels; ++c) m2[c] /= static_cast<A>(count);
}

template <typename A>
void update_running_statistics(int64_t channels, int64_t count, double momentum, const A* mean, const A* var,
                               A* running_mean, A* running_var) {
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  for (int64_t c = 0; c < channels; ++c) {
    running_mean[c] = static_cast<A>((1.0 - momentum) * running_mean[c] + momentum * mean[c]);
    running_var[c] = static_cast<A>((1.0 - momentum) * running_var[c] + momentum * (var[c] * unbiased));
  }
}

template <typename A>
void backward_coefficients(int64_t channels, int64_t count, const A* scale, const A* mean, const A* invstd,
                           const A* sum_dz, const A* sum_dz_xhat, A* b, A* c0) {
  for (int64_t c = 0; c < channels; ++c) {
    b[c] = -scale[c] * invstd[c] * (sum_dz_xhat[c] / static_cast<A>(count));
    c0[c] = -scale[c] * (sum_dz[c] / static_cast<A>(count)) - b[c] * mean[c];
  }
}

#define FASTGAN_INSTANTIATE(A)                                                                                       \
  template void fold_scale_shift<A>(int64_t, const A*, const A*, const A*, const A*, A*, A*);                         \
  template void fold_statistics<A>(int64_t, const A*, const A*, const A*, const A*, double, A*, A*, A*);              \
  template void divide_by_count<A>(int64_t, int64_t, A*);                                                             \
  template void update_running_statistics<A>(int64_t, int64_t, double, const A*, const A*, A*, A*);                   \
  template void backward_coefficients<A>(int64_t, int64_t, const A*, const A*, const A*, const A*, const A*, A*, A*);
FASTGAN_INSTANTIATE(float)
FASTGAN_INSTANTIATE(double)
#undef FASTGAN_INSTANTIATE

}  // namespace fastgan::cpu
