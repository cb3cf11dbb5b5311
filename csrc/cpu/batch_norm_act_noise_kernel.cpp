// Compiled once per instruction set (see isa.h).
//
// Sums run in the accumulation type over stretches of at most 256 rows, which double precision then merges: means and
// squared deviations by the update of Chan, Golub and LeVeque (1979). A task never waits for another.
#include "batch_norm_act_noise.h"

#include "activate.h"
#include "load.h"
#include "parallel.h"
#include "counter_normal.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int kWidth = kNormals;  // channels of a task, or elements of a stretch of a plane
constexpr int64_t kRows = 256;    // rows added up before double precision takes over

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// What one task works on: `width` columns of the tensor seen as rows. Where inner = 1 a row is an outer index and the
// columns are channels; else a row is a stretch of up to 64 elements of a channel's plane, and all columns are that
// channel's.
struct Columns {
  int64_t outer, pieces, stride_outer, stride_piece;  // rows are (outer index, piece); offsets in elements
  int64_t offset, inner, width;                       // of row 0; length of a plane; columns (but the last piece's)
  int64_t chunk_outer, chunk;                         // number of the noise's chunk: chunk_outer * outer + piece + chunk

  int64_t columns(int64_t piece) const { return inner == 1 ? width : least(kWidth, inner - piece * kWidth); }
};

// f(offset, columns, chunk) for the rows from `begin` on, `rows` of them.
template <typename F>
inline void for_rows(const Columns& task, int64_t begin, int64_t rows, const F& f) {
  int64_t n = begin / task.pieces, piece = begin % task.pieces;
  for (int64_t row = 0; row < rows; ++row) {
    f(task.offset + n * task.stride_outer + piece * task.stride_piece, static_cast<int>(task.columns(piece)),
      static_cast<uint64_t>(task.chunk_outer * n + piece + task.chunk));
    if (++piece == task.pieces) piece = 0, ++n;
  }
}

// f(i) for i in [0, columns); a whole row has a length the compiler knows.
template <typename F>
inline void for_columns(int columns, const F& f) {
  if (columns == kWidth) {
#pragma GCC ivdep
    for (int i = 0; i < kWidth; ++i) f(i);
  } else {
#pragma GCC ivdep
    for (int i = 0; i < columns; ++i) f(i);
  }
}

// Calls f(columns, first channel, channels) for every task.
template <typename F>
void for_each_task(const BnActShape& shape, const F& f) {
  const int64_t C = shape.channels, blocks = (C + kWidth - 1) / kWidth;
  if (shape.inner == 1) {
    parallel_for(blocks, [&](int64_t block) {
      const int64_t first = block * kWidth, width = least(kWidth, C - first);
      f(Columns{shape.outer, 1, C, 0, first, 1, width, blocks, block}, first, static_cast<int>(width));
    });
    return;
  }
  const int64_t pieces = (shape.inner + kWidth - 1) / kWidth;
  parallel_for(C, [&](int64_t c) {
    f(Columns{shape.outer, pieces, C * shape.inner, kWidth, c * shape.inner, shape.inner, kWidth, C * pieces,
              c * pieces},
      c, 1);
  });
}

// Sums over the columns of a plane's channel, which is one.
template <typename A>
inline double add_up(const A* sums) {
  double sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += sums[i];
  return sum;
}

template <typename T>
void forward(const BnActShape& shape, const T* input, const Accumulate<T>* gamma, const Accumulate<T>* beta, double eps,
             bool training, ActivationSpec activation, GaussianNoise noise, Accumulate<T>* mean, Accumulate<T>* var,
             Accumulate<T>* invstd, T* output) {
  using A = Accumulate<T>;
  with_activation<A>(activation, [&](auto chosen) {
    for_each_task(shape, [&](const Columns& task, int64_t first, int channels) {
      const auto act = chosen;  // a copy: its slope, read by reference in a branch, would keep loops from vectorising
      const int64_t rows = task.outer * task.pieces;
      if (training) {
        double task_mean[kWidth] = {}, task_m2[kWidth] = {}, count = 0;
        for (int64_t begin = 0; begin < rows; begin += kRows) {
          const int64_t stretch = least(kRows, rows - begin);
          A sums[kWidth] = {}, squares[kWidth] = {}, deviations[kWidth] = {}, centre[kWidth] = {};
          double n = 0;
          for_rows(task, begin, stretch, [&](int64_t offset, int columns, uint64_t) {
            const T* x = input + offset;
            for_columns(columns, [&](int i) { sums[i] += Load<T>::from(x[i]); });
            n += shape.inner == 1 ? 1 : columns;
          });
          if (shape.inner == 1)
            for (int i = 0; i < channels; ++i) centre[i] = sums[i] / static_cast<A>(n);
          else
            for (int i = 0; i < kWidth; ++i) centre[i] = static_cast<A>(i == 0 ? add_up(sums) / n : centre[0]);
          for_rows(task, begin, stretch, [&](int64_t offset, int columns, uint64_t) {
            const T* x = input + offset;
            for_columns(columns, [&](int i) {
              const A d = Load<T>::from(x[i]) - centre[i];
              deviations[i] += d;
              squares[i] += d * d;
            });
          });
          for (int i = 0; i < channels; ++i) {
            // The sum of the deviations, 0 but for rounding, corrects both (see bn_act_kernel.cpp).
            const double off = shape.inner == 1 ? static_cast<double>(deviations[i]) : add_up(deviations);
            const double m2 = (shape.inner == 1 ? static_cast<double>(squares[i]) : add_up(squares)) - off * off / n;
            const double delta = centre[i] + off / n - task_mean[i], total = count + n;
            task_mean[i] += delta * (n / total);
            task_m2[i] += m2 + delta * delta * (count * n / total);
          }
          count += n;
        }
        for (int i = 0; i < channels; ++i) {
          mean[first + i] = static_cast<A>(task_mean[i]);
          var[first + i] = static_cast<A>(task_m2[i] > 0 ? task_m2[i] / count : task_m2[i] * 0);
        }
      }
      A scale[kWidth], shift[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const int64_t c = first + (i < channels ? i : channels - 1);
        invstd[c] = static_cast<A>(1.0 / __builtin_sqrt(static_cast<double>(var[c]) + eps));
        scale[i] = gamma != nullptr ? gamma[c] * invstd[c] : invstd[c];
        shift[i] = (beta != nullptr ? beta[c] : A(0)) - mean[c] * scale[i];
      }
      const bool noisy = noise.std != 0;
      const A std = static_cast<A>(noise.std);
      for_rows(task, 0, rows, [&](int64_t offset, int columns, uint64_t chunk) {
        const T* x = input + offset;
        T* y = output + offset;
        if (noisy) {
          float normals[kNormals];
          counter_normals(noise.seed, chunk, normals);
          for_columns(columns, [&](int i) {
            y[i] = Load<T>::to(act.forward(scale[i] * Load<T>::from(x[i]) + shift[i]) + std * normals[i]);
          });
        } else {
          for_columns(columns, [&](int i) {
            y[i] = Load<T>::to(act.forward(scale[i] * Load<T>::from(x[i]) + shift[i]));
          });
        }
      });
    });
  });
}

template <typename T>
void backward(const BnActShape& shape, const T* grad_output, const T* input, const Accumulate<T>* gamma,
              const Accumulate<T>* beta, const Accumulate<T>* mean, const Accumulate<T>* invstd, bool training,
              ActivationSpec activation, Accumulate<T>* sum_dz, Accumulate<T>* sum_dz_xhat, T* grad_input) {
  using A = Accumulate<T>;
  with_activation<A>(activation, [&](auto chosen) {
    for_each_task(shape, [&](const Columns& task, int64_t first, int channels) {
      const auto act = chosen;  // a copy: its slope, read by reference in a branch, would keep loops from vectorising
      const int64_t rows = task.outer * task.pieces;
      A scale[kWidth], shift[kWidth], m[kWidth], inverse[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const int64_t c = first + (i < channels ? i : channels - 1);
        m[i] = mean[c];
        inverse[i] = invstd[c];
        scale[i] = gamma != nullptr ? gamma[c] * invstd[c] : invstd[c];
        shift[i] = (beta != nullptr ? beta[c] : A(0)) - mean[c] * scale[i];
      }
      double total0[kWidth] = {}, total1[kWidth] = {}, count = 0;
      for (int64_t begin = 0; begin < rows; begin += kRows) {
        A sum0[kWidth] = {}, sum1[kWidth] = {};
        for_rows(task, begin, least(kRows, rows - begin), [&](int64_t offset, int columns, uint64_t) {
          const T *x = input + offset, *g = grad_output + offset;
          for_columns(columns, [&](int i) {
            const A v = Load<T>::from(x[i]);
            const A dz = act.derivative(Load<T>::from(g[i]), scale[i] * v + shift[i]);
            sum0[i] += dz;
            sum1[i] += dz * (v - m[i]);
          });
          count += shape.inner == 1 ? 1 : columns;
        });
        if (shape.inner == 1) {
          for (int i = 0; i < channels; ++i) total0[i] += sum0[i], total1[i] += sum1[i] * inverse[i];
        } else {
          total0[0] += add_up(sum0);
          total1[0] += add_up(sum1) * inverse[0];
        }
      }
      for (int i = 0; i < channels; ++i) {
        sum_dz[first + i] = static_cast<A>(total0[i]);
        sum_dz_xhat[first + i] = static_cast<A>(total1[i]);
      }
      if (grad_input == nullptr) return;
      // dx = scale * dz + b * x + c0: batch norm's backward (Ioffe and Szegedy 2015, section 3).
      A b[kWidth], c0[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const int j = i < channels ? i : channels - 1;
        b[i] = training ? static_cast<A>(-scale[i] * inverse[i] * (total1[j] / count)) : A(0);
        c0[i] = training ? static_cast<A>(-scale[i] * (total0[j] / count)) - b[i] * m[i] : A(0);
      }
      for_rows(task, 0, rows, [&](int64_t offset, int columns, uint64_t) {
        const T *x = input + offset, *g = grad_output + offset;
        T* d = grad_input + offset;
        for_columns(columns, [&](int i) {
          const A v = Load<T>::from(x[i]);
          const A dz = act.derivative(Load<T>::from(g[i]), scale[i] * v + shift[i]);
          d[i] = Load<T>::to(scale[i] * dz + (b[i] * v + c0[i]));
        });
      });
    });
  });
}

}  // namespace

template <typename T>
BatchNormActNoiseKernels<T> batch_norm_act_noise_kernels() {
  return {forward<T>, backward<T>};
}

template BatchNormActNoiseKernels<float> batch_norm_act_noise_kernels<float>();
template BatchNormActNoiseKernels<double> batch_norm_act_noise_kernels<double>();
template BatchNormActNoiseKernels<BFloat16> batch_norm_act_noise_kernels<BFloat16>();
template BatchNormActNoiseKernels<Half> batch_norm_act_noise_kernels<Half>();

}  // namespace fastgan::cpu::FASTGAN_ISA
