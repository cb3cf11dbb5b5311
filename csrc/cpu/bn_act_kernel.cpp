// Instruction sets: baseline avx2 avx512
//
// Plain loops that the compiler vectorises: over channels in channels_last, over the plane in the contiguous layout.
#include "activate.h"
#include "bn_act.h"
#include "bn_act_blocks.h"
#include "load.h"
#include "parallel.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int kLanes = 16;  // partial sums of an inner loop: fixed, so that every instruction set adds in one order

// Elementwise work: rows(offset) for every pixel in channels_last, where the channel runs from 0 with the offset;
// planes(offset, channel, elements) in the contiguous layout. Both capture by value and are copied before their loops: what they
// hold would otherwise be read again after every store, and the loops stay scalar.
template <typename Rows, typename Planes>
void for_each_stretch(const BnActShape& shape, const Rows& rows, const Planes& planes) {
  const ReductionBlocks blocks(shape);
  parallel_for(blocks.count(), [&](int64_t index) {
    const ReductionBlock block = blocks[index];
    if (shape.inner == 1) {
      const Rows of_row = rows;
      for (int64_t n = block.begin; n < block.end; ++n) of_row(n * shape.channels);
      return;
    }
    const Planes of_plane = planes;
    for (int64_t n = block.begin; n < block.end; ++n)
      for (int64_t c = 0; c < shape.channels; ++c)
        of_plane((n * shape.channels + c) * shape.inner + block.first, c, block.last - block.first);
  });
}

constexpr int64_t kRow = 128;  // channels from which on a row of them is long enough for itself

// Calls f(shape, arrays, first element): in channels_last several pixels of few channels count as one of many, and the arrays of
// parameters, unless null, are repeated; what is left over comes in a second call.
template <typename A, int kArrays, typename F>
void on_long_rows(const BnActShape& shape, const A* const (&arrays)[kArrays], const F& f) {
  const int64_t pixels = shape.inner == 1 && shape.channels > 0 ? kRow / shape.channels : 0;
  if (pixels < 2) return f(shape, arrays, 0);
  A repeated[kArrays][kRow];
  const A* of_row[kArrays];
  const int64_t length = pixels * shape.channels, rows = shape.outer / pixels, left = shape.outer % pixels;
  for (int i = 0; i < kArrays; ++i) {
    of_row[i] = arrays[i] != nullptr ? repeated[i] : nullptr;
    if (arrays[i] == nullptr) continue;
    for (int64_t c = 0; c < length; ++c) repeated[i][c] = arrays[i][c % shape.channels];
  }
  if (rows > 0) f(BnActShape{rows, length, 1}, of_row, 0);
  if (left > 0) f(BnActShape{left, shape.channels, 1}, arrays, rows * length);
}

template <typename T>
void scale_shift_rows(const BnActShape& shape, const T* input, const Accumulate<T>* scale, const Accumulate<T>* shift,
                      ActivationSpec activation, T* output) {
  using A = Accumulate<T>;
  with_activation<A>(activation, [&](auto act) {
    for_each_stretch(
        shape,
        [=, channels = shape.channels](int64_t offset) {
          const T* x = input + offset;
          T* y = output + offset;
#pragma GCC ivdep
          for (int64_t c = 0; c < channels; ++c)
            y[c] = Load<T>::to(act.forward(scale[c] * Load<T>::from(x[c]) + shift[c]));
        },
        [=](int64_t offset, int64_t c, int64_t elements) {
          const T* x = input + offset;
          T* y = output + offset;
          const A s = scale[c], t = shift[c];
#pragma GCC ivdep
          for (int64_t i = 0; i < elements; ++i) y[i] = Load<T>::to(act.forward(s * Load<T>::from(x[i]) + t));
        });
  });
}

template <typename T>
void scale_shift_act(const BnActShape& shape, const T* input, const Accumulate<T>* scale, const Accumulate<T>* shift,
                     ActivationSpec activation, T* output) {
  const Accumulate<T>* const arrays[] = {scale, shift};
  on_long_rows(shape, arrays, [&](const BnActShape& part, const auto& of_part, int64_t first) {
    scale_shift_rows(part, input + first, of_part[0], of_part[1], activation, output + first);
  });
}

// kByBatch: whether there are b and c0.
template <typename T, bool kByBatch>
void backward_apply_rows(const BnActShape& shape, const T* grad_output, const T* input, const Accumulate<T>* scale,
                         const Accumulate<T>* shift, const Accumulate<T>* a, const Accumulate<T>* b,
                         const Accumulate<T>* c0, ActivationSpec activation, T* grad_input) {
  using A = Accumulate<T>;
  with_activation<A>(activation, [&](auto act) {
    for_each_stretch(
        shape,
        [=, channels = shape.channels](int64_t offset) {
          const T *g = grad_output + offset, *x = input + offset;
          T* d = grad_input + offset;
#pragma GCC ivdep
          for (int64_t c = 0; c < channels; ++c) {
            const A v = Load<T>::from(x[c]);
            const A dz = act.derivative(Load<T>::from(g[c]), scale[c] * v + shift[c]);
            d[c] = Load<T>::to(kByBatch ? a[c] * dz + (b[c] * v + c0[c]) : a[c] * dz);
          }
        },
        [=](int64_t offset, int64_t c, int64_t elements) {
          const T *g = grad_output + offset, *x = input + offset;
          T* d = grad_input + offset;
          const A s = scale[c], t = shift[c], ac = a[c], bc = kByBatch ? b[c] : A(0), cc = kByBatch ? c0[c] : A(0);
#pragma GCC ivdep
          for (int64_t i = 0; i < elements; ++i) {
            const A v = Load<T>::from(x[i]);
            const A dz = act.derivative(Load<T>::from(g[i]), s * v + t);
            d[i] = Load<T>::to(kByBatch ? ac * dz + (bc * v + cc) : ac * dz);
          }
        });
  });
}

template <typename T>
void bn_act_backward_apply(const BnActShape& shape, const T* grad_output, const T* input, const Accumulate<T>* scale,
                           const Accumulate<T>* shift, const Accumulate<T>* a, const Accumulate<T>* b,
                           const Accumulate<T>* c0, ActivationSpec activation, T* grad_input) {
  const Accumulate<T>* const arrays[] = {scale, shift, a, b, c0};
  const auto apply_rows = b != nullptr ? backward_apply_rows<T, true> : backward_apply_rows<T, false>;
  on_long_rows(shape, arrays, [&](const BnActShape& part, const auto& of_part, int64_t first) {
    apply_rows(part, grad_output + first, input + first, of_part[0], of_part[1], of_part[2], of_part[3], of_part[4], activation,
               grad_input + first);
  });
}

// Contiguous layout: f(offset, lane) for every element of channel c in the block.
template <typename F>
void for_each_in_channel(const BnActShape& shape, ReductionBlock block, int64_t c, const F& f) {
  for (int64_t n = block.begin; n < block.end; ++n) {
    const int64_t offset = (n * shape.channels + c) * shape.inner;
    int64_t i = block.first;
    for (; i + kLanes <= block.last; i += kLanes)
#pragma GCC ivdep
      for (int k = 0; k < kLanes; ++k) f(offset + i + k, k);
    for (; i < block.last; ++i) f(offset + i, 0);
  }
}

template <typename A>
A add_lanes(const A (&lanes)[kLanes]) {
  A sum = 0;
  for (int k = 0; k < kLanes; ++k) sum += lanes[k];
  return sum;
}

// Two sums a channel over the whole tensor. term(offset, channel, sum0, sum1) adds one element's share.
// Partial sums of a block: workspace[block][0 or 1][channel]; blocks are added in order, in double.
template <typename T, typename Term>
void reduce_two(const BnActShape& shape, const Term& term, Accumulate<T>* sum0, Accumulate<T>* sum1,
                Accumulate<T>* workspace) {
  using A = Accumulate<T>;
  const int64_t C = shape.channels;
  const ReductionBlocks blocks(shape);
  parallel_for(blocks.count(), [&](int64_t index) {
    const Term one_term = term;  // as in for_each_stretch
    const ReductionBlock block = blocks[index];
    A* p0 = workspace + 2 * index * C;
    A* p1 = p0 + C;
    if (shape.inner == 1) {
      for (int64_t c = 0; c < C; ++c) p0[c] = p1[c] = A(0);
      for (int64_t n = block.begin; n < block.end; ++n)
#pragma GCC ivdep
        for (int64_t c = 0; c < C; ++c) one_term(n * C + c, c, p0[c], p1[c]);
      return;
    }
    for (int64_t c = 0; c < C; ++c) {
      A l0[kLanes] = {}, l1[kLanes] = {};
      for_each_in_channel(shape, block, c, [&](int64_t offset, int k) { one_term(offset, c, l0[k], l1[k]); });
      p0[c] = add_lanes(l0);
      p1[c] = add_lanes(l1);
    }
  });
  for (int64_t c = 0; c < C; ++c) {
    double s0 = 0, s1 = 0;
    for (int64_t block = 0; block < blocks.count(); ++block) {
      s0 += workspace[2 * block * C + c];
      s1 += workspace[(2 * block + 1) * C + c];
    }
    sum0[c] = static_cast<A>(s0);
    if (sum1 != nullptr) sum1[c] = static_cast<A>(s1);
  }
}

template <typename T>
void bn_act_backward_reduce(const BnActShape& shape, const T* grad_output, const T* input, const Accumulate<T>* scale,
                            const Accumulate<T>* shift, const Accumulate<T>* mean, const Accumulate<T>* invstd,
                            ActivationSpec activation, Accumulate<T>* sum_dz, Accumulate<T>* sum_dz_xhat,
                            Accumulate<T>* workspace) {
  using A = Accumulate<T>;
  with_activation<A>(activation, [&](auto act) {
    reduce_two<T>(
        shape,
        [=](int64_t offset, int64_t c, A& s0, A& s1) {
          const A v = Load<T>::from(input[offset]);
          const A dz = act.derivative(Load<T>::from(grad_output[offset]), scale[c] * v + shift[c]);
          s0 += dz;
          s1 += dz * ((v - mean[c]) * invstd[c]);
        },
        sum_dz, sum_dz_xhat, workspace);
  });
}

template <typename T>
void act_backward(const BnActShape& shape, const T* grad_output, const T* output, ActivationSpec activation,
                  T* grad_input, Accumulate<T>* sum_dz, Accumulate<T>* workspace) {
  using A = Accumulate<T>;
  with_activation<A>(activation, [&](auto act) {
    reduce_two<T>(
        shape,
        [=](int64_t offset, int64_t, A& s0, A&) {
          const A dz = act.derivative_from_output(Load<T>::from(grad_output[offset]), Load<T>::from(output[offset]));
          grad_input[offset] = Load<T>::to(dz);
          s0 += dz;
        },
        sum_dz, nullptr, workspace);
  });
}

// Of one channel.
int64_t elements_of(const ReductionBlock& block) { return (block.end - block.begin) * (block.last - block.first); }

// Mean and sum of squared deviations (M2) of one block, then Chan's merge over the blocks in double. The sum of the
// deviations themselves, 0 but for rounding, corrects both: a constant channel gets its exact mean and variance 0.
// workspace[block][mean, M2, sum of deviations][channel]
template <typename T>
void batch_statistics(const BnActShape& shape, const T* input, Accumulate<T>* mean, Accumulate<T>* var,
                      Accumulate<T>* workspace) {
  using A = Accumulate<T>;
  const int64_t C = shape.channels;
  const ReductionBlocks blocks(shape);
  parallel_for(blocks.count(), [&](int64_t index) {
    const ReductionBlock block = blocks[index];
    A* block_mean = workspace + 3 * index * C;
    A* block_m2 = block_mean + C;
    A* deviation = block_m2 + C;
    const A count = static_cast<A>(elements_of(block));
    if (shape.inner == 1) {
      for (int64_t c = 0; c < C; ++c) block_mean[c] = block_m2[c] = deviation[c] = A(0);
      for (int64_t n = block.begin; n < block.end; ++n)
#pragma GCC ivdep
        for (int64_t c = 0; c < C; ++c) block_mean[c] += Load<T>::from(input[n * C + c]);
      for (int64_t c = 0; c < C; ++c) block_mean[c] /= count;
      for (int64_t n = block.begin; n < block.end; ++n)
#pragma GCC ivdep
        for (int64_t c = 0; c < C; ++c) {
          const A d = Load<T>::from(input[n * C + c]) - block_mean[c];
          deviation[c] += d;
          block_m2[c] += d * d;
        }
    } else {
      for (int64_t c = 0; c < C; ++c) {
        A sums[kLanes] = {}, squares[kLanes] = {}, deviations[kLanes] = {};
        for_each_in_channel(shape, block, c, [&](int64_t offset, int k) { sums[k] += Load<T>::from(input[offset]); });
        const A m = add_lanes(sums) / count;
        for_each_in_channel(shape, block, c, [&](int64_t offset, int k) {
          const A d = Load<T>::from(input[offset]) - m;
          deviations[k] += d;
          squares[k] += d * d;
        });
        block_mean[c] = m;
        block_m2[c] = add_lanes(squares);
        deviation[c] = add_lanes(deviations);
      }
    }
    for (int64_t c = 0; c < C; ++c) {
      block_mean[c] += deviation[c] / count;
      block_m2[c] -= deviation[c] * (deviation[c] / count);
    }
  });
  for (int64_t c = 0; c < C; ++c) {
    double m = 0, m2 = 0, count = 0;
    blocks.for_each([&](int64_t index, const ReductionBlock& block) {
      const double n = static_cast<double>(elements_of(block));
      const double delta = workspace[3 * index * C + c] - m;
      const double total = count + n;
      m += delta * (n / total);
      m2 += workspace[(3 * index + 1) * C + c] + delta * delta * (count * n / total);
      count = total;
    });
    mean[c] = static_cast<A>(m);
    var[c] = static_cast<A>(count > 0 && m2 > 0 ? m2 / count : m2 * 0);
  }
}

}  // namespace

template <typename T>
BnActKernels<T> bn_act_kernels() {
  return {batch_statistics<T>, scale_shift_act<T>, bn_act_backward_reduce<T>, bn_act_backward_apply<T>,
          act_backward<T>};
}

template BnActKernels<float> bn_act_kernels<float>();
template BnActKernels<double> bn_act_kernels<double>();
template BnActKernels<BFloat16> bn_act_kernels<BFloat16>();
template BnActKernels<Half> bn_act_kernels<Half>();

}  // namespace fastgan::cpu::FASTGAN_ISA
