// Instruction sets: baseline avx2 avx512
//
// A vector of rows is worked on side by side: a tile [classes][kLanes] turns the sums over a short row (10 classes)
// into plain vector additions, where working along a row would leave most of a vector empty. A vector is as long as
// the instruction set's: GCC takes comparisons of longer ones apart into scalars. Rows become columns by transposing
// squares of 8 x 8 in registers.
//
// The marginal is reduced in two levels and a fixed order: lanes and rows of a block first, then the blocks, in
// double. Blocks depend on the shape alone, so the result does not depend on the number of threads.
#include "load.h"
#include "parallel.h"
#include "softmax_entropy.h"
#include "softmax_entropy_blocks.h"
#include "transpose.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are returned by inlined functions only

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
static_assert(kRowLanes % kLanes == 0, "blocks must be whole tiles");

template <typename A> using Lanes = typename VectorOf<A, kLanes>::type;
using IntLanes = typename VectorOf<float, kLanes>::integers;

// e^x for x <= 0, relative error below 2e-7; 0 below -87.3, where float32 ends. x = n ln 2 + r with
// |r| <= ln 2 / 2; e^r = 1 + r + r^2 P(r), P fitted to minimise the largest relative error of e^r, 4e-9.
inline Lanes<float> exp_nonpositive(const Lanes<float>& x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer kept in the low bits
  const Lanes<float> shifted = x * 1.44269504f + kMagic;
  const Lanes<float> n = shifted - kMagic;
  const Lanes<float> r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Lanes<float> p = r * 0.00139504787f + 0.00836888225f;
  p = p * r + 0.041666206f;
  p = p * r + 0.166665189f;
  p = p * r + 0.50000001f;
  p = p * r * r + r;
  const Lanes<float> power = (Lanes<float>)(((IntLanes)shifted + 127) << 23);
  return x < -87.3f ? Lanes<float>{} : power * p + power;
}

inline Lanes<double> exp_nonpositive(const Lanes<double>& x) {
  Lanes<double> value;
  for (int i = 0; i < kLanes; ++i) value[i] = __builtin_exp(x[i]);
  return value;
}

// log x for x >= 1, exact at 1, error below 1e-7 (relative near 1). x = 2^n (1 + f) with 1 + f in
// [sqrt 1/2, sqrt 2); log(1 + f) = f - f^2/2 + f^3 P(f), P fitted to minimise the largest relative error, 4e-8.
inline Lanes<float> log_value(const Lanes<float>& x) {
  const IntLanes n = ((IntLanes)x - 0x3f3504f3) >> 23;
  const Lanes<float> f = (Lanes<float>)((IntLanes)x - (n << 23)) - 1.0f;
  Lanes<float> p = f * 0.089178633f - 0.143502005f;
  p = p * f + 0.148769626f;
  p = p * f - 0.165656346f;
  p = p * f + 0.19965398f;
  p = p * f - 0.250017469f;
  p = p * f + 0.333338581f;
  const Lanes<float> series = f + f * f * (p * f - 0.5f);
  return __builtin_convertvector(n, Lanes<float>) * 0.693147181f + (x - x) + series;  // x - x: a NaN stays one
}

inline Lanes<double> log_value(const Lanes<double>& x) {
  Lanes<double> value;
  for (int i = 0; i < kLanes; ++i) value[i] = __builtin_log(x[i]);
  return value;
}

// l - max, at least -1000: a class of probability 0, as that is in float64 too, then adds 0 * 1000 = 0 to the entropy, also for a
// logit of -inf, and a gradient's factor of it stays finite.
template <typename L>
inline L below_max(const L& logit, const L& max) {
  const L d = logit - max, least = L{} - 1000.0f;
  return d < least ? least : d;
}

template <typename A>
inline double sum_lanes(const Lanes<A>& lanes) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

template <typename T, typename A>
inline Side<A> load_side(const T* from) {
  A values[kSide];
  for (int j = 0; j < kSide; ++j) values[j] = Load<T>::from(from[j]);
  Side<A> side;
  __builtin_memcpy(&side, values, sizeof(side));
  return side;
}

template <typename T, typename A>
inline void store_side(const Side<A>& side, T* to) {
  A values[kSide];
  __builtin_memcpy(values, &side, sizeof(side));
  for (int j = 0; j < kSide; ++j) to[j] = Load<T>::to(values[j]);
}

// Calls f(k) for the first class of every square; the last square overlaps the one before where kSide does not divide
// classes, and finds or writes the same values there.
template <typename F>
inline void for_each_square(int64_t classes, F&& f) {
  for (int64_t k = 0; k < classes; k += kSide) f(k + kSide <= classes ? k : classes - kSide);
}

// tile[k][i] = logits of row i, class k; rows past `valid` are zeros. Returns the maximum over the classes.
template <typename T, typename A>
inline Lanes<A> load_tile(const T* logits, int64_t row_stride, int64_t classes, int valid, Lanes<A>* tile) {
  if (kLanes % kSide == 0 && valid == kLanes && classes >= kSide) {
    for_each_square(classes, [&](int64_t k) {
      for (int half = 0; half < kLanes; half += kSide) {
        Side<A> square[kSide];
#pragma GCC unroll 8
        for (int i = 0; i < kSide; ++i) square[i] = load_side<T, A>(logits + (half + i) * row_stride + k);
        transpose<A>(square);
#pragma GCC unroll 8
        for (int j = 0; j < kSide; ++j)
          __builtin_memcpy(reinterpret_cast<char*>(tile + k + j) + half * sizeof(A), square + j, sizeof(square[j]));
      }
    });
  } else {
    for (int64_t k = 0; k < classes; ++k) {
      Lanes<A> column = {};
      for (int i = 0; i < valid; ++i) column[i] = Load<T>::from(logits[i * row_stride + k]);
      tile[k] = column;
    }
  }
  Lanes<A> max = tile[0];
  for (int64_t k = 1; k < classes; ++k) max = tile[k] > max ? tile[k] : max;
  return max;
}

template <typename T, typename A>
inline void store_tile(const Lanes<A>* tile, int64_t classes, int valid, T* output) {
  if (kLanes % kSide == 0 && valid == kLanes && classes >= kSide) {
    for_each_square(classes, [&](int64_t k) {
      for (int half = 0; half < kLanes; half += kSide) {
        Side<A> square[kSide];
#pragma GCC unroll 8
        for (int j = 0; j < kSide; ++j)
          __builtin_memcpy(square + j, reinterpret_cast<const char*>(tile + k + j) + half * sizeof(A), sizeof(square[j]));
        transpose<A>(square);
#pragma GCC unroll 8
        for (int i = 0; i < kSide; ++i) store_side<T, A>(square[i], output + (half + i) * classes + k);
      }
    });
  } else {
    for (int64_t k = 0; k < classes; ++k)
      for (int i = 0; i < valid; ++i) output[i * classes + k] = Load<T>::to(tile[k][i]);
  }
}

inline int rows_of_tile(int64_t first, int64_t end) {
  return end - first < kLanes ? static_cast<int>(end - first) : kLanes;
}

template <typename T>
typename SoftmaxEntropyKernels<T>::Values forward(const SoftmaxEntropyShape& shape, const T* logits,
                                                  const SoftmaxEntropyLabels& labels, Accumulate<T>* mean_probabilities,
                                                  Accumulate<T>* log_normalizer, Accumulate<T>* workspace) {
  using A = Accumulate<T>;
  const int64_t K = shape.classes;
  const SoftmaxEntropyBlocks blocks = softmax_entropy_blocks(shape.rows, K);
  const int64_t scratch = softmax_entropy_block_scratch(K);
  parallel_for(blocks.count, [&](int64_t block) {
    Lanes<A>* tile = reinterpret_cast<Lanes<A>*>(workspace + block * scratch);
    Lanes<A>* probabilities = tile + K;  // summed over the block's rows, lane by lane
    A* sums = reinterpret_cast<A*>(probabilities + K);
    for (int64_t k = 0; k < K; ++k) probabilities[k] = Lanes<A>{};
    Lanes<A> entropy = {};
    double cross_entropy = 0;
    const int64_t begin = block * blocks.size;
    const int64_t end = begin + blocks.size < shape.rows ? begin + blocks.size : shape.rows;
    for (int64_t n = begin; n < end; n += kLanes) {
      const int valid = rows_of_tile(n, end);
      const T* rows = logits + n * shape.row_stride;
      const Lanes<A> max = load_tile<T, A>(rows, shape.row_stride, K, valid, tile);
      Lanes<A> s = {}, u = {};
      for (int64_t k = 0; k < K; ++k) {
        const Lanes<A> d = below_max(tile[k], max), e = exp_nonpositive(d);
        tile[k] = e;
        s += e;
        u += d * e;
      }
      const Lanes<A> log_s = log_value(s);
      Lanes<A> weight = A(1) / s, row_entropy = log_s - u * weight;
      for (int i = valid; i < kLanes; ++i) weight[i] = row_entropy[i] = A(0);
      entropy += row_entropy;
      for (int64_t k = 0; k < K; ++k) probabilities[k] += weight * tile[k];
      for (int i = 0; i < valid; ++i) log_normalizer[n + i] = log_s[i];
      if (labels.labels != nullptr)
        for (int i = 0; i < valid; ++i) {
          const int64_t y = labels.labels[n + i];
          if (y != labels.ignore_index)
            cross_entropy += log_s[i] - (Load<T>::from(rows[i * shape.row_stride + y]) - max[i]);
        }
    }
    for (int64_t k = 0; k < K; ++k) sums[k] = static_cast<A>(sum_lanes<A>(probabilities[k]));
    sums[K] = static_cast<A>(sum_lanes<A>(entropy));
    sums[K + 1] = static_cast<A>(cross_entropy);
  });
  const A* sums = workspace + 2 * K * kLanes;
  const auto total = [&](int64_t j) {
    double sum = 0;
    for (int64_t block = 0; block < blocks.count; ++block) sum += sums[block * scratch + j];
    return sum;
  };
  double marginal = 0;
  for (int64_t k = 0; k < K; ++k) {
    const double q = total(k) / static_cast<double>(shape.rows);
    mean_probabilities[k] = static_cast<A>(q);
    marginal -= q == 0 ? 0 : q * __builtin_log(q);
  }
  return {static_cast<A>(total(K) / static_cast<double>(shape.rows)), static_cast<A>(marginal),
          static_cast<A>(labels.count > 0 ? total(K + 1) / static_cast<double>(labels.count) : 0.0)};
}

// With t_nk = gc log p_nk + gm log q_k:  grad_nk = p_nk (sum_j p_nj t_nj - t_nk) / N  + gce (p_nk - [k = y_n]) / labels.
template <typename T>
void backward(const SoftmaxEntropyShape& shape, const T* logits, const SoftmaxEntropyLabels& labels,
              const Accumulate<T>* mean_probabilities, const Accumulate<T>* log_normalizer,
              const typename SoftmaxEntropyKernels<T>::Values& grad, T* grad_logits, Accumulate<T>* workspace) {
  using A = Accumulate<T>;
  const int64_t K = shape.classes;
  const SoftmaxEntropyBlocks blocks = softmax_entropy_blocks(shape.rows, K);
  const int64_t scratch = softmax_entropy_block_scratch(K);
  const A rows_inverse = A(1) / static_cast<A>(shape.rows);
  const A label_weight = labels.count > 0 ? grad.cross_entropy / static_cast<A>(labels.count) : A(0);
  parallel_for(blocks.count, [&](int64_t block) {
    Lanes<A>* tile = reinterpret_cast<Lanes<A>*>(workspace + block * scratch);
    Lanes<A>* terms = tile + K;
    // gm log q_k; a class without any probability has no gradient, and a NaN in q no part in that of the conditional entropy alone.
    A* log_q = reinterpret_cast<A*>(terms + K);
    for (int64_t k = 0; k < K; ++k)
      log_q[k] = grad.marginal == A(0) || mean_probabilities[k] == A(0)
                     ? A(0)
                     : grad.marginal * static_cast<A>(__builtin_log(static_cast<double>(mean_probabilities[k])));
    const int64_t begin = block * blocks.size;
    const int64_t end = begin + blocks.size < shape.rows ? begin + blocks.size : shape.rows;
    for (int64_t n = begin; n < end; n += kLanes) {
      const int valid = rows_of_tile(n, end);
      const Lanes<A> max = load_tile<T, A>(logits + n * shape.row_stride, shape.row_stride, K, valid, tile);
      Lanes<A> log_s = {}, mean = {}, weight = {};
      for (int i = 0; i < valid; ++i) log_s[i] = log_normalizer[n + i];
      for (int64_t k = 0; k < K; ++k) {
        const Lanes<A> log_p = below_max(tile[k], max) - log_s, p = exp_nonpositive(log_p);
        const Lanes<A> t = grad.conditional * log_p + log_q[k];
        tile[k] = p;
        terms[k] = t;
        mean += p * t;
      }
      if (labels.labels != nullptr)
        for (int i = 0; i < valid; ++i) weight[i] = labels.labels[n + i] == labels.ignore_index ? A(0) : label_weight;
      for (int64_t k = 0; k < K; ++k) tile[k] *= (mean - terms[k]) * rows_inverse + weight;
      if (labels.labels != nullptr)
        for (int i = 0; i < valid; ++i)
          if (labels.labels[n + i] != labels.ignore_index) tile[labels.labels[n + i]][i] -= weight[i];
      store_tile<T, A>(tile, K, valid, grad_logits + n * K);
    }
  });
}

}  // namespace

template <typename T>
SoftmaxEntropyKernels<T> softmax_entropy_kernels() {
  return {forward<T>, backward<T>};
}

template SoftmaxEntropyKernels<float> softmax_entropy_kernels<float>();
template SoftmaxEntropyKernels<double> softmax_entropy_kernels<double>();
template SoftmaxEntropyKernels<BFloat16> softmax_entropy_kernels<BFloat16>();
template SoftmaxEntropyKernels<Half> softmax_entropy_kernels<Half>();

}  // namespace fastgan::cpu::FASTGAN_ISA
