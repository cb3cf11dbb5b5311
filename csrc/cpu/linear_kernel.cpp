// Instruction sets: baseline avx2 avx512
//
// Tasks are blocks of up to kBlock features: of the outputs, or of the inputs for their gradient. Depths are cut so that a panel of
// the right operand stays in the second-level cache, or the first, while the block's rows pass over it.
#include "linear.h"

#include "conv4x4s2_common.h"
#include "conv4x4s2_vec.h"
#include "counter_normal.h"
#include "transpose.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t kBlock = kNormals;      // features whose noise is drawn at a time
constexpr int64_t kStretch = 256;         // values added up before double precision takes over
constexpr int64_t kGradientTasks = 32;    // about so many tasks share a weight's gradient

#if defined(__AVX512F__)
constexpr int kWide = 3;  // vectors of a panel: 8 x 3 sums, 3 vectors of the right operand and a broadcast in 32 registers
constexpr int kMostSums = 24;
constexpr int kMostRows = 8;
constexpr int64_t kDepth = 512;  // most of a product's depth at a time
constexpr bool kGathers = false;
#else
constexpr int kWide = 2;  // 6 x 2 sums of 16 registers
constexpr int kMostSums = 12;
constexpr int kMostRows = 6;
constexpr int64_t kDepth = 256;
constexpr bool kGathers = true;  // columns of the weight before they are the left operand of so many, narrow panels
#endif

// Features first .. first + count.
struct Block {
  int64_t first, count;
};

// Blocks are even in number and nearly equal, so that two threads have the same to do, and begin at a multiple of kSide.
inline int64_t count_blocks(int64_t features) {
  const int64_t blocks = ceil_div(features, kBlock);
  return blocks > 1 ? blocks + blocks % 2 : blocks;
}
inline Block block_of(int64_t features, int64_t block, int64_t blocks) {
  const int64_t sides = ceil_div(features, kSide), first = block * sides / blocks * kSide;
  return {first, min64((block + 1) * sides / blocks * kSide, features) - first};
}

// ---- products

// Half a vector of 64 bytes, for what is left of a panel: those take two turns where this takes one.
typedef float Half __attribute__((vector_size(32)));
constexpr int kHalf = 8;
constexpr bool kHalves = kLanes == 2 * kHalf;

// The left operand, `stride` floats from a row to the next where depth lies side by side (along rows), else from a depth to the next,
// where rows lie side by side. Unless it has been gathered, what comes after these rows is asked for while they are read.
struct Left {
  const float* at;
  int64_t stride;
};

// c[r][columns] (+)= sum over k of left[r][k] * right[k][columns]: kVectors vectors of columns, and a half more with kTail.
template <int kRows, int kVectors, bool kTail, bool kAlongRows>
void multiply_tile(const Left& left, const float* right, int64_t right_stride, int64_t depth, float* c, int64_t ldc,
                   bool accumulate) {
  Vec sum[kRows][kVectors];
  Half half[kRows];
  const float* row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    row[r] = left.at + r * (kAlongRows ? left.stride : 1);
    half[r] = Half{};
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = Vec{};
      __builtin_prefetch(c + r * ldc + v * kLanes, 1);
    }
  }
  const int64_t step = kAlongRows ? 1 : kGathers ? kBlock : left.stride;
  const float* next = left.at + (kAlongRows ? kRows * left.stride : kLineFloats);
  for (int64_t k = 0; k < depth; ++k) {
    if constexpr (kAlongRows)
      __builtin_prefetch(next + (k & 7) * left.stride + (k >> 3) * kLineFloats);
    else if (!kGathers)
      __builtin_prefetch(next + k * step);
    Vec x[kVectors];
    Half tail{};
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) x[v] = load(right + v * kLanes);
    if constexpr (kTail) __builtin_memcpy(&tail, right + kVectors * kLanes, sizeof tail);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float a = row[r][k * step];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[r][v] += splat(a) * x[v];
      if constexpr (kTail) half[r] += (a - Half{}) * tail;
    }
    right += right_stride;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    float* p = c + r * ldc;
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v, p += kLanes) store(p, accumulate ? load(p) + sum[r][v] : sum[r][v]);
    if constexpr (kTail) {
      Half before{};
      if (accumulate) __builtin_memcpy(&before, p, sizeof before);
      before += half[r];
      __builtin_memcpy(p, &before, sizeof before);
    }
  }
}

// Any number of rows, in groups of nearly equal size.
template <int kVectors, bool kTail, bool kAlongRows>
void multiply_panel(Left left, int64_t rows, const float* right, int64_t right_stride, int64_t depth, float* c, int64_t ldc,
                    bool accumulate) {
  constexpr int kFit = kMostSums / (kVectors + kTail), kRows = kFit < kMostRows ? kFit : kMostRows;
  const int64_t groups = ceil_div(rows, kRows);
  for (int64_t g = 0, r = 0; g < groups; ++g) {
    const int64_t next = part_start(rows, g + 1, groups);
    switch (next - r) {
#define FASTGAN_ROWS(n)                                                                                             \
  case n:                                                                                                           \
    if constexpr (n <= kRows)                                                                                       \
      multiply_tile<n, kVectors, kTail, kAlongRows>(left, right, right_stride, depth, c + r * ldc, ldc, accumulate); \
    break;
      FASTGAN_ROWS(1) FASTGAN_ROWS(2) FASTGAN_ROWS(3) FASTGAN_ROWS(4) FASTGAN_ROWS(5) FASTGAN_ROWS(6) FASTGAN_ROWS(7)
      FASTGAN_ROWS(8)
#undef FASTGAN_ROWS
    }
    left.at += (next - r) * (kAlongRows ? left.stride : 1);
    r = next;
  }
}

// c[rows][columns] (+)= left * right. Whole vectors of columns are read and written, or a half at the end.
template <bool kAlongRows>
void multiply(const Left& left, int64_t rows, const float* right, int64_t right_stride, int64_t depth, float* c, int64_t ldc,
              int64_t columns, bool accumulate) {
  for (int64_t done = 0; done < columns;) {
    const int64_t vectors = (columns - done) / kLanes, rest = (columns - done) % kLanes;
    const bool tail = kHalves && 0 < vectors && vectors <= kWide && 0 < rest && rest <= kHalf;
    const int64_t whole = min64(kWide, vectors + (rest > 0 && !tail));
    const auto run = [&](auto panel) { panel(left, rows, right + done, right_stride, depth, c + done, ldc, accumulate); };
    switch (2 * whole + tail) {
      case 2: run(multiply_panel<1, false, kAlongRows>); break;
      case 3: run(multiply_panel<1, kHalves, kAlongRows>); break;
      case 4: run(multiply_panel<2, false, kAlongRows>); break;
      case 5: run(multiply_panel<2, kHalves, kAlongRows>); break;
      case 6: run(multiply_panel<kWide, false, kAlongRows>); break;
      case 7: run(multiply_panel<kWide, kHalves, kAlongRows>); break;
    }
    done += whole * kLanes + (tail ? kHalf : 0);
  }
}

// ---- features

// A sum of lanes, in double precision every kStretch values.
struct Sum {
  Vec part{};
  double total = 0;
  void end_stretch() {
    double lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<double>(part[i]);
#pragma GCC unroll 4
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    total += lanes[0];
    part = Vec{};
  }
};

// The lanes of a vector of a feature's values that are the batch's: all of them, or the first few of the last vector.
struct WholeVector {
  static Vec lanes(Vec v) { return v; }
};
struct LastVector {
  IntVec inside;
  explicit LastVector(int64_t count) {
    for (int i = 0; i < kLanes; ++i) inside[i] = i < count ? -1 : 0;
  }
  Vec lanes(Vec v) const { return inside ? v : Vec{}; }
};

// f(i, vector) for each vector, at row i, of a feature's `rows` values; sums... end their stretches.
template <typename F, typename... Sums>
inline void for_rows(int64_t rows, const F& f, Sums&... sums) {
  const int64_t whole = rows / kLanes * kLanes;
  for (int64_t i = 0; i < rows;) {
    for (const int64_t end = min64(i + kStretch, whole); i < end; i += kLanes) f(i, WholeVector());
    if (i == whole && i < rows) f(i, LastVector(rows - i)), i += kLanes;
    (sums.end_stretch(), ...);
  }
}

// Zeros from the last vector of a feature's `rows` values to its stride.
inline void clear_rest(int64_t rows, float* p) {
  for (int64_t i = ceil_div(rows, kLanes) * kLanes; i < linear_stride(rows); i += kLanes) store(p + i, Vec{});
}

// gamma * invstd and beta - mean * scale of feature f; 1 and 0 without a norm.
struct Affine {
  float scale = 1, shift = 0;
  Affine(const LinearNorm& norm, int64_t f) {
    if (!norm.present) return;
    scale = norm.gamma != nullptr ? norm.gamma[f] * norm.invstd[f] : norm.invstd[f];
    shift = (norm.beta != nullptr ? norm.beta[f] : 0.0f) - norm.mean[f] * scale;
  }
};

// [features][rows], `from_stride` floats a feature -> [rows][features], `to_stride` floats a row
void transpose_features(int64_t rows, int64_t features, const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  for (int64_t n = 0; n < rows; n += kSide)
    for (int64_t f = 0; f < features; f += kSide) {
      const int64_t height = min64(kSide, features - f), width = min64(kSide, rows - n);
      if (height == kSide && width == kSide) {
        transpose_square(from + f * from_stride + n, from_stride, to + n * to_stride + f, to_stride);
      } else {
        for (int64_t i = 0; i < height; ++i)
          for (int64_t j = 0; j < width; ++j) to[(n + j) * to_stride + f + i] = from[(f + i) * from_stride + n + j];
      }
    }
}

// by_feature[f][n] += std * the normal of row n and feature f, of block number `block` of `blocks`
void add_noise(int64_t rows, int64_t features, int64_t blocks, int64_t block, GaussianNoise noise, float* by_feature,
               int64_t stride) {
  const float std = static_cast<float>(noise.std);
  for (int64_t n = 0; n < rows; n += kSide) {
    float normals[kSide][kBlock] = {};
    for (int64_t j = 0; j < min64(kSide, rows - n); ++j)
      counter_normals(noise.seed, static_cast<uint64_t>((n + j) * blocks + block), normals[j]);
    for (int64_t f = 0; f < features; f += kSide) {
      Side<float> square[kSide];
#pragma GCC unroll 8
      for (int j = 0; j < kSide; ++j) __builtin_memcpy(square + j, normals[j] + f, sizeof square[j]);
      transpose<float>(square);
      for (int64_t i = 0; i < min64(kSide, features - f); ++i) {
        float* p = by_feature + (f + i) * stride + n;
        Side<float> value;
        __builtin_memcpy(&value, p, sizeof value);
        value += square[i] * std;
        __builtin_memcpy(p, &value, sizeof value);
      }
    }
  }
}

void read(int64_t rows, int64_t features, const float* input, GaussianNoise noise, float* by_feature, float* by_row) {
  const int64_t stride = linear_stride(rows), blocks = count_blocks(features);
  parallel_for(blocks, [&](int64_t block) {
    const auto [f0, count] = block_of(features, block, blocks);
    float* to = by_feature + f0 * stride;
    transpose_features(count, rows, input + f0, features, to, stride);
    for (int64_t f = 0; f < count; ++f)
      for (int64_t n = rows; n < stride; ++n) to[f * stride + n] = 0;
    if (noise.std != 0) add_noise(rows, count, blocks, block, noise, to, stride);
    if (by_row != nullptr) transpose_features(rows, count, to, stride, by_row + f0, linear_stride(features));
  });
}

// ---- forward

// A feature's products -> its output
void finish_feature(const LinearForward& to, int64_t rows, int64_t f) {
  const int64_t stride = linear_stride(rows);
  float *raw = to.raw + f * stride, *output = to.output + f * stride;
  const float bias = to.bias != nullptr ? to.bias[f] : 0.0f;
  const LinearNorm& norm = to.norm;
  Sum sum, squares;
  for_rows(rows, [&](int64_t i, const auto& vector) {
    const Vec y = vector.lanes(load(raw + i) + bias);
    store(raw + i, y);
    sum.part += y;
  }, sum);
  if (norm.present) {
    if (norm.by_batch) {
      const double count = static_cast<double>(rows);
      const float mean = static_cast<float>(sum.total / count);
      for_rows(rows, [&](int64_t i, const auto& vector) {
        const Vec d = vector.lanes(load(raw + i) - mean);
        squares.part += d * d;
      }, squares);
      norm.mean[f] = mean;
      norm.var[f] = static_cast<float>(squares.total / count);
    }
    norm.invstd[f] = static_cast<float>(1 / __builtin_sqrt(static_cast<double>(norm.var[f]) + norm.eps));
  }
  const Affine affine(norm, f);
  const float slope = static_cast<float>(to.activation.negative_slope);
  with_activation(to.activation.kind, [&](auto tag) {
    for_rows(rows, [&](int64_t i, const auto& vector) {
      store(output + i, vector.lanes(activate(load(raw + i) * affine.scale + affine.shift, tag.value, slope)));
    });
  });
  clear_rest(rows, raw), clear_rest(rows, output);
}

void forward(const LinearShape& shape, const float* weight, const float* input, const LinearForward& to) {
  const int64_t stride = linear_stride(shape.rows), blocks = count_blocks(shape.outputs);
  const int64_t cuts = ceil_div(shape.inputs, kDepth);
  parallel_for(blocks, [&](int64_t block) {
    const auto [f0, count] = block_of(shape.outputs, block, blocks);
    for (int64_t cut = 0; cut < cuts; ++cut) {
      const int64_t k = part_start(shape.inputs, cut, cuts), depth = part_start(shape.inputs, cut + 1, cuts) - k;
      multiply<true>(Left{weight + f0 * shape.inputs + k, shape.inputs}, count, input + k * stride, stride, depth,
                     to.raw + f0 * stride, stride, shape.rows, cut > 0);
    }
    for (int64_t f = f0; f < f0 + count; ++f) finish_feature(to, shape.rows, f);
    float* output = to.output + f0 * stride;
    if (to.noise.std != 0) add_noise(shape.rows, count, blocks, block, to.noise, output, stride);
    if (to.by_row != nullptr) transpose_features(shape.rows, count, output, stride, to.by_row + f0, to.stride);
  });
}

// ---- backward

// The gradient of a feature's output, in place -> that of its products
void finish_gradient(const LinearBackward& to, int64_t rows, int64_t f) {
  const int64_t stride = linear_stride(rows);
  float* gradient = to.gradient + f * stride;
  const LinearNorm& norm = to.norm;
  const float slope = static_cast<float>(to.activation.negative_slope);
  const float* raw = to.raw != nullptr ? to.raw + f * stride : gradient;  // any numbers, where there is nothing to undo
  const Affine affine(norm, f);
  const float mean = norm.present ? norm.mean[f] : 0.0f;
  Sum sum, centred;
  with_activation(to.raw != nullptr ? to.activation.kind : Activation::identity, [&](auto tag) {
    for_rows(rows, [&](int64_t i, const auto& vector) {
      const Vec y = load(raw + i);
      const Vec dz = vector.lanes(activate_backward(load(gradient + i), y * affine.scale + affine.shift, tag.value, slope));
      store(gradient + i, dz);
      sum.part += dz;
      centred.part += dz * vector.lanes(y - mean);
    }, sum, centred);
  });
  to.sum_dz[f] = static_cast<float>(sum.total);
  if (norm.present) {
    const double invstd = static_cast<double>(norm.invstd[f]), sum_xhat = invstd * centred.total;
    to.sum_dz_xhat[f] = static_cast<float>(sum_xhat);
    if (norm.by_batch) {
      // Batch norm's backward (Ioffe and Szegedy 2015, section 3) with y - mean in place of xhat
      const double count = static_cast<double>(rows), scale = static_cast<double>(affine.scale);
      const float b = static_cast<float>(-scale * invstd * (sum_xhat / count)), c = static_cast<float>(-scale * (sum.total / count));
      for_rows(rows, [&](int64_t i, const auto& vector) {
        store(gradient + i, vector.lanes(load(gradient + i) * affine.scale + ((load(raw + i) - mean) * b + c)));
      });
    } else {
      for_rows(rows, [&](int64_t i, const auto& vector) { store(gradient + i, vector.lanes(load(gradient + i) * affine.scale)); });
    }
  }
  clear_rest(rows, gradient);
}

void read_gradient(int64_t rows, int64_t features, const float* gradient, const LinearBackward& to) {
  const int64_t stride = linear_stride(rows), blocks = count_blocks(features);
  parallel_for(blocks, [&](int64_t block) {
    const auto [f0, count] = block_of(features, block, blocks);
    transpose_features(count, rows, gradient + f0, features, to.gradient + f0 * stride, stride);
    for (int64_t f = f0; f < f0 + count; ++f) finish_gradient(to, rows, f);
  });
}

// to[depth][kBlock] = the first `count` of weight's columns; as many at `next` are asked for.
void gather(const float* weight, int64_t stride, int64_t depth, int64_t count, const float* next, float* to) {
  for (int64_t i = 0; i < depth; ++i, weight += stride, next += stride, to += kBlock) {
    for (int64_t c = 0; c < count; c += kLineFloats) __builtin_prefetch(next + c, 0, 2);
    if (count == kBlock)
      __builtin_memcpy(to, weight, kBlock * sizeof(float));
    else
      __builtin_memcpy(to, weight, static_cast<size_t>(count) * sizeof(float));
  }
}

void input_gradient(const LinearShape& shape, const float* weight, const float* gradient, const LinearBackward& below,
                    float* by_row) {
  const int64_t stride = linear_stride(shape.rows), cuts = ceil_div(shape.outputs, kDepth), blocks = count_blocks(shape.inputs);
  parallel_for(blocks, [&](int64_t block) {
    const auto [k0, count] = block_of(shape.inputs, block, blocks);
    float gathered[kGathers ? kDepth * kBlock : 1];  // the weight's columns of this block
    float* sums = below.gradient + k0 * stride;
    for (int64_t cut = 0; cut < cuts; ++cut) {
      const int64_t o = part_start(shape.outputs, cut, cuts), depth = part_start(shape.outputs, cut + 1, cuts) - o;
      Left left{weight + o * shape.inputs + k0, shape.inputs};
      if (kGathers) {
        const bool last = cut + 1 == cuts;
        gather(left.at, left.stride, depth, count, last ? weight + k0 + kBlock : left.at + depth * left.stride, gathered);
        left = {gathered, kBlock};
      }
      multiply<false>(left, count, gradient + o * stride, stride, depth, sums, stride, shape.rows, cut > 0);
    }
    if (by_row != nullptr)
      transpose_features(shape.rows, count, sums, stride, by_row + k0, shape.inputs);
    else
      for (int64_t k = k0; k < k0 + count; ++k) finish_gradient(below, shape.rows, k);
  });
}

void weight_gradient(const LinearShape& shape, const float* gradient, const float* input, float* result, bool add) {
  constexpr int64_t kColumns = kWide * kLanes;
  const int64_t stride = linear_stride(shape.rows), input_stride = linear_stride(shape.inputs);
  const int64_t panels = ceil_div(shape.inputs, kColumns), cuts = ceil_div(shape.rows, kDepth);
  const int64_t blocks = min64(ceil_div(shape.outputs, kBlock), ceil_div(kGradientTasks, panels));
  parallel_for(panels * blocks, [&](int64_t task) {
    const int64_t block = task / panels, k = task % panels * kColumns, columns = min64(kColumns, shape.inputs - k);
    const int64_t first = part_start(shape.outputs, block, blocks), end = part_start(shape.outputs, block + 1, blocks);
    for (int64_t cut = 0; cut < cuts; ++cut) {
      const int64_t n = part_start(shape.rows, cut, cuts), depth = part_start(shape.rows, cut + 1, cuts) - n;
      const Left left{gradient + first * stride + n, stride};
      const float* right = input + n * input_stride + k;
      float* to = result + first * shape.inputs + k;
      if (columns % kLanes == 0 || (kHalves && columns > kLanes && columns % kLanes == kHalf)) {
        multiply<true>(left, end - first, right, input_stride, depth, to, shape.inputs, columns, add || cut > 0);
        continue;
      }
      // Products go where whole vectors have room first.
      float sums[kBlock * kColumns];
      for (int64_t o = 0; o < end - first; o += kBlock) {
        const int64_t count = min64(kBlock, end - first - o);
        multiply<true>(Left{left.at + o * stride, stride}, count, right, input_stride, depth, sums, kColumns, columns, false);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t c = 0; c < columns; ++c) {
            float& w = to[(o + i) * shape.inputs + c];
            w = add || cut > 0 ? w + sums[i * kColumns + c] : sums[i * kColumns + c];
          }
      }
    }
  });
}

}  // namespace

LinearKernels linear_kernels() { return {read, forward, read_gradient, input_gradient, weight_gradient}; }

}  // namespace fastgan::cpu::FASTGAN_ISA
