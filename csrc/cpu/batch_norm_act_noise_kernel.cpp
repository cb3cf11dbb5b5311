// Instruction sets: baseline avx2 avx512
//
// Sums run in the accumulation type over stretches of at most 256 rows, which double precision then merges: means and
// squared deviations by the update of Chan, Golub and LeVeque (1979). A task never waits for another.
#include "batch_norm_act_noise.h"

#include <type_traits>

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

// float and double are worked on where they lie; rows of other types in a buffer of kWidth values.
template <typename T>
inline constexpr bool kInPlace = std::is_same_v<T, Accumulate<T>>;

// f(i) for the columns of a row of T, or for all of its buffer; a whole row has a length the compiler knows.
template <typename T, typename F>
inline void for_columns(int columns, const F& f) {
  if (!kInPlace<T> || columns == kWidth) {
#pragma GCC ivdep
    for (int i = 0; i < kWidth; ++i) f(i);
  } else {
#pragma GCC ivdep
    for (int i = 0; i < columns; ++i) f(i);
  }
}

// The row's values; in a buffer `padding` behind them.
template <typename T>
inline const Accumulate<T>* read_row(const T* row, int columns, Accumulate<T> padding, Accumulate<T>* buffer) {
  if constexpr (kInPlace<T>) {
    return row;
  } else if (columns == kWidth) {
    for (int i = 0; i < kWidth; ++i) buffer[i] = Load<T>::from(row[i]);
  } else {
    for (int i = 0; i < columns; ++i) buffer[i] = Load<T>::from(row[i]);
    for (int i = columns; i < kWidth; ++i) buffer[i] = padding;
  }
  return buffer;
}

// Where to write a row's values, and what then brings them there.
template <typename T>
inline Accumulate<T>* row_target(T* row, Accumulate<T>* buffer) {
  if constexpr (kInPlace<T>) return row;
  else return buffer;
}
template <typename T>
inline void write_row(const Accumulate<T>* buffer, T* row, int columns) {
  if constexpr (kInPlace<T>) return;
  if (columns == kWidth) {
    for (int i = 0; i < kWidth; ++i) row[i] = Load<T>::to(buffer[i]);
  } else {
    for (int i = 0; i < columns; ++i) row[i] = Load<T>::to(buffer[i]);
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

// The mean and the biased variance of a task's channels.
template <typename T>
void column_statistics(const Columns& task, int channels, const T* input, Accumulate<T>* mean, Accumulate<T>* var) {
  using A = Accumulate<T>;
  const int64_t rows = task.outer * task.pieces;
  double task_mean[kWidth] = {}, task_m2[kWidth] = {}, count = 0;
  A buffer[kWidth];
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    const int64_t stretch = least(kRows, rows - begin);
    A sums[kWidth] = {}, squares[kWidth] = {}, deviations[kWidth] = {}, centre[kWidth] = {};
    double n = 0;
    for_rows(task, begin, stretch, [&](int64_t offset, int columns, uint64_t) {
      const A* x = read_row(input + offset, columns, A(0), buffer);
      for_columns<T>(columns, [&](int i) { sums[i] += x[i]; });
      n += task.inner == 1 ? 1 : columns;
    });
    if (task.inner == 1)
      for (int i = 0; i < channels; ++i) centre[i] = sums[i] / static_cast<A>(n);
    else
      for (int i = 0; i < kWidth; ++i) centre[i] = static_cast<A>(i == 0 ? add_up(sums) / n : centre[0]);
    for_rows(task, begin, stretch, [&](int64_t offset, int columns, uint64_t) {
      const A* x = read_row(input + offset, columns, centre[0], buffer);
      for_columns<T>(columns, [&](int i) {
        const A d = x[i] - centre[i];
        deviations[i] += d;
        squares[i] += d * d;
      });
    });
    for (int i = 0; i < channels; ++i) {
      // The sum of the deviations, 0 but for rounding, corrects both (see bn_act_kernel.cpp).
      const double off = task.inner == 1 ? static_cast<double>(deviations[i]) : add_up(deviations);
      const double m2 = (task.inner == 1 ? static_cast<double>(squares[i]) : add_up(squares)) - off * off / n;
      const double delta = centre[i] + off / n - task_mean[i], total = count + n;
      task_mean[i] += delta * (n / total);
      task_m2[i] += m2 + delta * delta * (count * n / total);
    }
    count += n;
  }
  for (int i = 0; i < channels; ++i) {
    mean[i] = static_cast<A>(task_mean[i]);
    var[i] = static_cast<A>(task_m2[i] > 0 ? task_m2[i] / count : task_m2[i] * 0);
  }
}

template <typename T>
void forward(const BnActShape& shape, const T* input, const Accumulate<T>* gamma, const Accumulate<T>* beta, double eps,
             bool training, ActivationSpec activation, GaussianNoise noise, Accumulate<T>* mean, Accumulate<T>* var,
             Accumulate<T>* invstd, T* output) {
  using A = Accumulate<T>;
  for_each_task(shape, [&](const Columns& task, int64_t first, int channels) {
    if (training) column_statistics(task, channels, input, mean + first, var + first);
    A scale[kWidth], shift[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      const int64_t c = first + (i < channels ? i : channels - 1);
      invstd[c] = static_cast<A>(1.0 / __builtin_sqrt(static_cast<double>(var[c]) + eps));
      scale[i] = gamma != nullptr ? gamma[c] * invstd[c] : invstd[c];
      shift[i] = (beta != nullptr ? beta[c] : A(0)) - mean[c] * scale[i];
    }
    const bool noisy = noise.std != 0;
    const A std = static_cast<A>(noise.std);
    with_activation<A>(activation, [&](auto chosen) {
      const auto act = chosen;  // a copy: its slope, read by reference in a branch, would keep loops from vectorising
      A x_buffer[kWidth], y_buffer[kWidth];
      for_rows(task, 0, task.outer * task.pieces, [&](int64_t offset, int columns, uint64_t chunk) {
        const A* x = read_row(input + offset, columns, A(0), x_buffer);
        A* y = row_target(output + offset, y_buffer);
        if (noisy) {
          float normals[kNormals];
          counter_normals(noise.seed, chunk, normals);
          for_columns<T>(columns, [&](int i) { y[i] = act.forward(scale[i] * x[i] + shift[i]) + std * normals[i]; });
        } else {
          for_columns<T>(columns, [&](int i) { y[i] = act.forward(scale[i] * x[i] + shift[i]); });
        }
        write_row(y, output + offset, columns);
      });
    });
  });
}

template <typename T>
void backward(const BnActShape& shape, const T* grad_output, const T* input, const Accumulate<T>* gamma,
              const Accumulate<T>* beta, const Accumulate<T>* mean, const Accumulate<T>* invstd, bool training,
              ActivationSpec activation, Accumulate<T>* sum_dz, Accumulate<T>* sum_dz_xhat, T* grad_input) {
  using A = Accumulate<T>;
  for_each_task(shape, [&](const Columns& task, int64_t first, int channels) {
    const int64_t rows = task.outer * task.pieces;
    A scale[kWidth], shift[kWidth], m[kWidth], inverse[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      const int64_t c = first + (i < channels ? i : channels - 1);
      m[i] = mean[c];
      inverse[i] = invstd[c];
      scale[i] = gamma != nullptr ? gamma[c] * invstd[c] : invstd[c];
      shift[i] = (beta != nullptr ? beta[c] : A(0)) - mean[c] * scale[i];
    }
    with_activation<A>(activation, [&](auto chosen) {
      const auto act = chosen;  // a copy, as in forward
      A x_buffer[kWidth], g_buffer[kWidth], d_buffer[kWidth];
      double total0[kWidth] = {}, total1[kWidth] = {}, count = 0;
      for (int64_t begin = 0; begin < rows; begin += kRows) {
        A sum0[kWidth] = {}, sum1[kWidth] = {};
        for_rows(task, begin, least(kRows, rows - begin), [&](int64_t offset, int columns, uint64_t) {
          const A* x = read_row(input + offset, columns, A(0), x_buffer);
          const A* g = read_row(grad_output + offset, columns, A(0), g_buffer);
          for_columns<T>(columns, [&](int i) {
            const A dz = act.derivative(g[i], scale[i] * x[i] + shift[i]);
            sum0[i] += dz;
            sum1[i] += dz * (x[i] - m[i]);
          });
          count += task.inner == 1 ? 1 : columns;
        });
        if (task.inner == 1) {
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
      // dx = scale * dz + b * x + c0: batch norm's backward (Ioffe and Szegedy 2015, section 3); outside training the first term alone,
      // as b = 0 would make NaN of an infinite x.
      A b[kWidth], c0[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const int j = i < channels ? i : channels - 1;
        b[i] = static_cast<A>(-scale[i] * inverse[i] * (total1[j] / count));
        c0[i] = static_cast<A>(-scale[i] * (total0[j] / count)) - b[i] * m[i];
      }
      for_rows(task, 0, rows, [&](int64_t offset, int columns, uint64_t) {
        const A* x = read_row(input + offset, columns, A(0), x_buffer);
        const A* g = read_row(grad_output + offset, columns, A(0), g_buffer);
        A* d = row_target(grad_input + offset, d_buffer);
        const auto dz = [&](int i) { return act.derivative(g[i], scale[i] * x[i] + shift[i]); };
        if (training)
          for_columns<T>(columns, [&](int i) { d[i] = scale[i] * dz(i) + (b[i] * x[i] + c0[i]); });
        else
          for_columns<T>(columns, [&](int i) { d[i] = scale[i] * dz(i); });
        write_row(d, grad_input + offset, columns);
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
