// Main loops F and T and the matrix-product form: output[pixel, column] = sum over j of window(pixel)[j] weight[column,
// j], an implicit matrix product over the windows' columns.
//
//   down, stride 2     one window of 4x4 taps an output pixel
//   up, stride 2       four phases (output row and column parity), each a convolution with 2x2 taps: no multiplication
//                      by the zeros that a transposed convolution is usually described with
//   down, stride 1     4x4 taps; from a 4x4 picture to 1x1 this is a matrix product
//   up from 1x1        one tap, 16 * channels columns: a matrix product whose output row is the 4x4 picture
//
// Three stages of shared memory, one barrier an iteration. Weights come by cp.async. Windows do too (kDirect) where their
// channels come in pieces of 16 bytes; else they pass through registers, loaded two stages ahead and stored after the
// multiplication.
#pragma once

#include "activation.cuh"
#include "conv4x4s2_operand.cuh"
#include "conv4x4s2_tile.cuh"

namespace fastgan::cuda {

struct GatherParams {
  WindowOperand input;
  const void* weight;  // [phases, columns, depth_padded]
  void* output;
  Conv4x4Epilogue epilogue;
  int64_t input_image;  // pixels of an input image
  int64_t rows;         // batch * grid_height * grid_width
  int columns;
  int depth_padded;             // of a row of weights: input.columns rounded up to 16 bytes
  int grid_height, grid_width;  // windows an image has in one phase
  FastDivisor grid_size, grid_width_divisor;
  int window_step, window_origin;                // first pixel of window p: p * step + origin (+ phase parity)
  int output_height, output_width;  // in runs of `columns`
  int output_step, output_step_w;   // output row of window row p: p * step + phase parity; columns alike
  int paired_channels;              // of the input, where weights are packed for pairs of phases (conv4x4s2_hopper.cuh); else 0
  int channels;  // epilogue arrays have this many entries; column j is channel j % channels
  FastDivisor channel_divisor;
  int row_tiles, column_tiles;
  bool paired_output;  // two neighbouring columns can be stored and read as one access
};

template <typename T>
__device__ __forceinline__ void load_pair(const T* p, bool paired, bool second, float (&values)[2]) {
  if (paired) {
    struct alignas(2 * sizeof(T)) Pair {
      T first, second;
    };
    const Pair pair = *reinterpret_cast<const Pair*>(p);
    values[0] = to_float(pair.first);
    values[1] = to_float(pair.second);
  } else {
    values[0] = to_float(p[0]);
    values[1] = second ? to_float(p[1]) : 0.0f;
  }
}

template <typename T>
__device__ __forceinline__ void store_pair(T* p, bool paired, bool second, const float (&values)[2]) {
  if (paired) {
    struct alignas(2 * sizeof(T)) Pair {
      T first, second;
    } pair;
    from_float(values[0], pair.first);
    from_float(values[1], pair.second);
    *reinterpret_cast<Pair*>(p) = pair;
  } else {
    from_float(values[0], p[0]);
    if (second) from_float(values[1], p[1]);
  }
}

// Image, and row and column of the window grid, of row m.
__device__ __forceinline__ void split_row(const GatherParams& p, int m, int& n, int& h, int& w) {
  n = p.grid_size.divide(m);
  const int rest = m - n * static_cast<int>(p.grid_size.divisor);
  h = p.grid_width_divisor.divide(rest);
  w = rest - h * p.grid_width;
}

// Of the output pixel of row m of the product, in elements; -1: none.
__device__ __forceinline__ int64_t output_offset(const GatherParams& p, int m, int phase) {
  int n, h, w;
  split_row(p, m < p.rows ? m : 0, n, h, w);
  h = h * p.output_step + (phase >> 1);
  w = w * p.output_step_w + (phase & 1);
  const bool valid = m < p.rows && h < p.output_height && w < p.output_width;
  return valid ? ((int64_t{n} * p.output_height + h) * p.output_width + w) * p.columns : -1;
}

// What is added, applied and stored; see Conv4x4Epilogue.
template <typename T, typename Tile>
__device__ __forceinline__ void gather_epilogue(const GatherParams& p, Accumulators<Tile>& sums, int first_row,
                                                int first_column, int row_tile, int phase, float* shared) {
  using Kind = Conv4x4Epilogue::Kind;
  constexpr int kRowsPerThread = Tile::kRowTiles * 2;
  const Conv4x4Epilogue& epilogue = p.epilogue;
  int64_t offsets[kRowsPerThread];
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    offsets[r] = output_offset(p, first_row + sums.row(r / 2, r % 2 * 2), phase);
  }

  T* output = static_cast<T*>(p.output);
  const T* y = static_cast<const T*>(epilogue.y);
  float first_sums[Tile::kColumnTiles][2] = {}, second_sums[Tile::kColumnTiles][2] = {};  // over this thread's rows
#pragma unroll
  for (int j = 0; j < Tile::kColumnTiles; ++j) {
    const int column = first_column + sums.column(j, 0);
    const bool first = column < p.columns, second = column + 1 < p.columns;
    float bias[2] = {}, scale[2] = {1.0f, 1.0f}, shift[2] = {}, mean[2] = {}, invstd[2] = {1.0f, 1.0f};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!(h == 0 ? first : second)) continue;
      const int channel = column + h - p.channel_divisor.divide(column + h) * p.channels;
      if (epilogue.bias != nullptr) bias[h] = epilogue.bias[channel];
      if (epilogue.kind == Kind::activation_backward) {
        load_of_channel(epilogue, channel, scale[h], shift[h], mean[h], invstd[h]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      float* v = sums.values[r / 2][j] + r % 2 * 2;
      const bool valid = offsets[r] >= 0 && first;
      const bool paired = p.paired_output && second;
      float out[2] = {v[0] + bias[0], v[1] + bias[1]};
      if (epilogue.kind == Kind::bias_activation) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          out[h] = activate(epilogue.activation.kind, epilogue.activation.negative_slope, out[h]);
        }
      } else if (epilogue.kind == Kind::activation_backward) {
        float previous[2] = {};
        if (valid) load_pair(y + offsets[r] + column, paired, second, previous);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          out[h] *= activation_derivative(epilogue.activation.kind, epilogue.activation.negative_slope,
                                          fmaf(scale[h], previous[h], shift[h]));
          if (valid) second_sums[j][h] += out[h] * ((previous[h] - mean[h]) * invstd[h]);
        }
      }
      if (valid) {
        store_pair(output + offsets[r] + column, paired, second, out);
        first_sums[j][0] += out[0];
        first_sums[j][1] += out[1];
      }
      v[0] = out[0];
      v[1] = out[1];
    }
  }

  const int thread = static_cast<int>(threadIdx.x);
  const int64_t tile = int64_t{phase} * p.row_tiles + row_tile;
  const int64_t tile_offset = tile * p.columns + first_column;
  const auto write_columns = [&](const float* totals, float* out) {
    if (thread < Tile::kColumns && first_column + thread < p.columns) {
      out[tile_offset + thread] = column_total<Tile>(totals, thread);
    }
  };
  if (epilogue.kind == Kind::statistics) {
    float* row_counts = shared + Tile::kWarpRows * Tile::kColumns;
    float count = 0.0f;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) count += offsets[r] >= 0 ? 1.0f : 0.0f;
#pragma unroll
    for (int mask = 4; mask < kWarpSize; mask *= 2) count += shuffle_xor(count, mask);
    if (sums.lane() == 0 && sums.first_column() == 0) row_counts[sums.warp_row()] = count;
    sum_columns<Tile>(shared, first_sums);
    float total_count = 0.0f;
    for (int warp_row = 0; warp_row < Tile::kWarpRows; ++warp_row) total_count += row_counts[warp_row];
    const float inverse = total_count > 0.0f ? 1.0f / total_count : 0.0f;
    float mean[Tile::kColumnTiles][2];
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) mean[j][h] = column_total<Tile>(shared, sums.column(j, h)) * inverse;
    }
    if (thread < Tile::kColumns && first_column + thread < p.columns) {
      epilogue.statistics.mean[tile_offset + thread] = column_total<Tile>(shared, thread) * inverse;
      if (first_column + thread == 0) epilogue.statistics.count[tile] = total_count;
    }
    block_barrier();
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float deviation = sums.values[r / 2][j][r % 2 * 2 + h] - mean[j][h];
          if (offsets[r] >= 0) second_sums[j][h] += deviation * deviation;
        }
      }
    }
    sum_columns<Tile>(shared, second_sums);
    write_columns(shared, epilogue.statistics.m2);
  } else if (epilogue.kind == Kind::activation_backward) {
    if (epilogue.gradients.sum_dz != nullptr) {
      sum_columns<Tile>(shared, first_sums);
      write_columns(shared, epilogue.gradients.sum_dz);
      block_barrier();
    }
    if (epilogue.gradients.sum_dz_xhat != nullptr) {
      sum_columns<Tile>(shared, second_sums);
      write_columns(shared, epilogue.gradients.sum_dz_xhat);
    }
  }
}

template <typename Math, typename Tile, bool kDirect>
__global__ void __launch_bounds__(Tile::kThreads) gather_kernel(GatherParams p) {
  wait_for_previous_kernel();
  using T = typename Math::Type;
  constexpr int kSize = Vector<T>::kSize;
  constexpr int kDepth = kDepthBytes / static_cast<int>(sizeof(T));
  constexpr int kABytes = Tile::kRows * kRowBytes, kStageBytes = kABytes + Tile::kColumns * kRowBytes;
  constexpr int kAChunks = Tile::kRows * kChunksPerRow / Tile::kThreads;
  constexpr int kBChunks = Tile::kColumns * kChunksPerRow / Tile::kThreads;
  char* stages = static_cast<char*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  const int phase = static_cast<int>(blockIdx.z);
  // Blocks that share rows run next to each other: activations are the larger operand, and stay in the cache.
  const int row_tile = static_cast<int>(blockIdx.x) / p.column_tiles;
  const int first_row = row_tile * Tile::kRows;
  const int first_column = (static_cast<int>(blockIdx.x) - row_tile * p.column_tiles) * Tile::kColumns;

  Window windows[kAChunks];
#pragma unroll
  for (int i = 0; i < kAChunks; ++i) {
    const int m = first_row + (thread + i * Tile::kThreads) / kChunksPerRow;
    int n, h, w;
    split_row(p, m < p.rows ? m : 0, n, h, w);
    windows[i].image = n * p.input_image;
    windows[i].h0 = h * p.window_step + p.window_origin + (phase >> 1);
    windows[i].w0 = w * p.window_step + p.window_origin + (phase & 1);
    windows[i].valid = m < p.rows;
  }
  // Every thread's 16-byte chunks are at the same place of their rows.
  static_assert(Tile::kThreads % kChunksPerRow == 0, "chunks of a thread must share their depth");
  const int chunk = thread % kChunksPerRow;
  const T* weight = static_cast<const T*>(p.weight) + int64_t{phase} * p.columns * p.depth_padded;

  const auto load_weights = [&](char* stage, int depth) {
#pragma unroll
    for (int i = 0; i < kBChunks; ++i) {
      const int row = (thread + i * Tile::kThreads) / kChunksPerRow;
      const int column = first_column + row, j = depth + chunk * kSize;
      const bool valid = column < p.columns && j < (p.paired_channels ? 4 * p.paired_channels : p.depth_padded);
      const int at = j + p.paired_channels * ((phase & 1) + (j >= 2 * p.paired_channels ? 1 : 0));
      copy_async(stage + kABytes + row * kRowBytes + chunk * 16,
                 weight + (valid ? int64_t{column} * p.depth_padded + at : 0), valid);
    }
  };
  const auto load_windows_direct = [&](char* stage, int depth) {
#pragma unroll
    for (int i = 0; i < kAChunks; ++i) {
      const int64_t offset = window_offset(p.input, windows[i], depth + chunk * kSize);
      const int row = (thread + i * Tile::kThreads) / kChunksPerRow;
      copy_async(stage + row * kRowBytes + chunk * 16, static_cast<const T*>(p.input.x) + (offset < 0 ? 0 : offset),
                 offset >= 0);
    }
  };
  uint4 fetched[kAChunks];
  const auto fetch_windows = [&](int depth) {
#pragma unroll
    for (int i = 0; i < kAChunks; ++i) fetched[i] = fetch<T>(p.input, windows[i], depth + chunk * kSize);
  };
  const auto store_windows = [&](char* stage, int depth) {
#pragma unroll
    for (int i = 0; i < kAChunks; ++i) {
      const int row = (thread + i * Tile::kThreads) / kChunksPerRow;
      store_piece<T>(p.input, windows[i], fetched[i], depth + chunk * kSize, stage + row * kRowBytes + chunk * 16);
    }
  };

  const int iterations = (p.input.columns + kDepth - 1) / kDepth;
  for (int i = 0; i < kStages - 1; ++i) {
    char* stage = stages + i * kStageBytes;
    if (i < iterations) {
      load_weights(stage, i * kDepth);
      if constexpr (kDirect) {
        load_windows_direct(stage, i * kDepth);
      } else {
        fetch_windows(i * kDepth);
        store_windows(stage, i * kDepth);
      }
    }
    copy_async_commit();
  }

  Accumulators<Tile> sums;
  int current = 0;
  for (int i = 0; i < iterations; ++i) {
    copy_async_wait<kStages - 2>();
    block_barrier();  // this stage is complete, and everyone has left the one that is overwritten below
    const int next = i + kStages - 1;
    char* next_stage = stages + (current == 0 ? kStages - 1 : current - 1) * kStageBytes;
    if (next < iterations) {
      load_weights(next_stage, next * kDepth);
      if constexpr (kDirect) {
        load_windows_direct(next_stage, next * kDepth);
      } else {
        fetch_windows(next * kDepth);
      }
    }
    copy_async_commit();
    const char* stage = stages + current * kStageBytes;
    multiply_stage<Math, Tile>(stage, stage + kABytes, sums);
    if constexpr (!kDirect) {
      if (next < iterations) store_windows(next_stage, next * kDepth);
    }
    current = current == kStages - 1 ? 0 : current + 1;
  }
  copy_async_wait<0>();
  block_barrier();
  gather_epilogue<T>(p, sums, first_row, first_column, row_tile, phase, static_cast<float*>(shared_memory()));
}

template <typename Tile>
constexpr size_t gather_shared_bytes() {
  return kStages * (Tile::kRows + Tile::kColumns) * kRowBytes;
}

}  // namespace fastgan::cuda
