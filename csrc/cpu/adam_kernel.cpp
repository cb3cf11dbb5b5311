// Instruction sets: baseline avx2 avx512
//
// A task has the same part of every tensor: a core then steps most of the rows whose gradients it computed, and a small tensor is no
// task of its own.
#include "adam.h"
#include "conv4x4s2_common.h"
#include "parallel.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t kParts = 32;
constexpr int64_t kLeast = 1 << 14;  // elements for which more than one task is worth it

// A weight that is not finite has no part in the averages where nothing decays.
template <bool decays>
void step_part(const AdamTensor& t, int64_t begin, int64_t end, const AdamSettings& s) {
  float *__restrict parameter = t.parameter, *__restrict mean = t.exp_avg, *__restrict square = t.exp_avg_sq;
  const float* __restrict gradient = t.gradient;
  const float step_size = t.step_size, root_correction = t.root_correction;
  const float beta1 = s.beta1, beta2 = s.beta2, rest1 = s.rest1, rest2 = s.rest2, eps = s.eps, decay = s.weight_decay,
              scale = s.parameter_scale;
  for (int64_t i = begin; i < end; ++i) {
    const float g = decays ? gradient[i] + decay * parameter[i] : gradient[i];
    const float m = beta1 * mean[i] + rest1 * g, v = beta2 * square[i] + rest2 * g * g;
    mean[i] = m;
    square[i] = v;
    parameter[i] = parameter[i] * scale - step_size * m / (__builtin_sqrtf(v) * root_correction + eps);
  }
}

}  // namespace

void adam_step(const AdamTensor* tensors, int64_t count, const AdamSettings& settings) {
  int64_t elements = 0;
  for (int64_t i = 0; i < count; ++i) elements += tensors[i].size;
  const int64_t parts = elements < kLeast ? 1 : kParts;
  const auto step = settings.weight_decay != 0.0f ? &step_part<true> : &step_part<false>;
  parallel_for(parts, [&](int64_t part) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t size = tensors[i].size, lines = ceil_div(size, kLineFloats);
      const int64_t begin = part_start(lines, part, parts) * kLineFloats, end = part_start(lines, part + 1, parts) * kLineFloats;
      step(tensors[i], begin, min64(size, end), settings);
    }
  });
}

}  // namespace fastgan::cpu::FASTGAN_ISA
