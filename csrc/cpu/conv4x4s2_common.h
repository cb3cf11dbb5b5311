// What the conv4x4s2 kernel files share: reading operands, writing results with their epilogue, scratch slots.
#pragma once

#include <sched.h>

#include "conv4x4s2.h"
#include "conv4x4s2_vec.h"
#include "parallel.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t kLineBytes = 64;  // a cache line
constexpr int64_t kLineFloats = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// The first of `all` rows or images that part number `part` of `parts` nearly equal ones takes.
inline int64_t part_start(int64_t all, int64_t part, int64_t parts) { return all / parts * part + min64(part, all % parts); }

// A shape as a loop sees it: down, and the data side of weight_gradient, read the large tensor, up reads the small one.
struct LoopShape {
  bool up;
  bool half;          // the tensors are bfloat16
  bool weight_last;   // the weight is in channels_last
  int64_t batch;
  int64_t input_height, input_width, input_channels;
  int64_t output_height, output_width, output_channels;

  LoopShape(const Conv4x4s2Shape& s, Conv4x4s2Loop loop)
      : up(loop == Conv4x4s2Loop::up), half(s.dtype != ConvDType::float32), weight_last(s.weight_channels_last), batch(s.batch) {
    input_height = up ? s.small_height : s.large_height;
    input_width = up ? s.small_width : s.large_width;
    input_channels = up ? s.small_channels : s.large_channels;
    output_height = up ? s.large_height : s.small_height;
    output_width = up ? s.large_width : s.small_width;
    output_channels = up ? s.large_channels : s.small_channels;
  }

  // weight[small][large][16], or [small][16][large]: floats from an input channel to the next, from an output channel, from a tap
  int64_t weight_input_stride() const { return up ? output_channels * 16 : weight_large_stride(); }
  int64_t weight_output_stride() const { return up ? weight_large_stride() : input_channels * 16; }
  int64_t weight_tap_stride() const { return !weight_last ? 1 : up ? output_channels : input_channels; }

 private:
  int64_t weight_large_stride() const { return weight_last ? 1 : 16; }
};

// ---- operands

// dst[0, channels) = the operand's elements at `offset`, channels c0 and up; channels is a multiple of kLanes.
// T is the storage type of the tensor: float or bfloat16.
template <typename T>
void read_operand(const ConvOperand& operand, int64_t offset, int64_t c0, int64_t channels, float* dst) {
  const T* data = static_cast<const T*>(operand.data) + offset;
  switch (operand.mode) {
    case ConvOperand::Mode::plain:
      for (int64_t c = 0; c < channels; c += kLanes) store(dst + c, load(data + c));
      return;
    case ConvOperand::Mode::activated:
      with_activation(operand.activation, [&](auto tag) {
        const float slope = operand.negative_slope;
        if (operand.scale == nullptr)
          for (int64_t c = 0; c < channels; c += kLanes) store(dst + c, activate(load(data + c), tag.value, slope));
        else {
          const float *scale = operand.scale + c0, *shift = operand.shift + c0;
          for (int64_t c = 0; c < channels; c += kLanes)
            store(dst + c, activate(load(scale + c) * load(data + c) + load(shift + c), tag.value, slope));
        }
      });
      return;
    case ConvOperand::Mode::batch_norm_backward: {
      const T* other = static_cast<const T*>(operand.other) + offset;
      for (int64_t c = 0; c < channels; c += kLanes)
        store(dst + c, load(operand.scale + c0 + c) * load(data + c) +
                           (load(operand.other_scale + c0 + c) * load(other + c) + load(operand.shift + c0 + c)));
      return;
    }
  }
}

// Asks for what read_operand will read.
template <typename T>
void prefetch_operand(const ConvOperand& operand, int64_t offset, int64_t channels) {
  constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(T));
  const T* data = static_cast<const T*>(operand.data) + offset;
  for (int64_t c = 0; c < channels; c += kLine) __builtin_prefetch(data + c, 0, 2);
  if (operand.mode != ConvOperand::Mode::batch_norm_backward) return;
  const T* other = static_cast<const T*>(operand.other) + offset;
  for (int64_t c = 0; c < channels; c += kLine) __builtin_prefetch(other + c, 0, 2);
}

// ---- results

constexpr int64_t kPrefetchPixels = 8;  // how far ahead of its store an output line is asked for

// A box of output pixels: images [n0, n0 + images), rows y0 + i * row_step, all columns, channels [c0, c0 + channels).
struct OutputBox {
  int64_t height, width, all_channels;  // of the whole output tensor
  int64_t n0, images;
  int64_t y0, rows, row_step;
  int64_t c0, channels;

  int64_t offset(int64_t n, int64_t i) const {
    return (((n0 + n) * height + y0 + i * row_step) * width) * all_channels + c0;
  }
};

// Two float rows of statistics a task leaves behind: mean and m2, or sum_dz and sum_dz_xhat.
struct Partial {
  float* first;   // [all_channels]
  float* second;  // [all_channels]
};

// Where the results of a box lie in scratch: floats from one image to the next, and from one pixel to the next.
struct ResultStrides {
  int64_t image, pixel;
};

// The three functions below take kVectors vectors of channels from channel c of the box: results -> out, with the
// epilogue. T is the storage type.

// out = activation(scale * results + bias)
template <typename T, int kVectors>
void activate_channels(const ConvEpilogue& e, const OutputBox& box, const float* results, ResultStrides strides, int64_t c) {
  const int64_t ld = strides.pixel, step = box.all_channels, ahead = kPrefetchPixels * step;
  Vec bias[kVectors] = {}, scale[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = box.c0 + c + v * kLanes;
    if (e.bias != nullptr) bias[v] = load(e.bias + at);
    scale[v] = e.scale != nullptr ? load(e.scale + at) : splat(1.0f);
  }
  with_activation(e.mode == ConvEpilogue::Mode::store ? Activation::identity : e.activation, [&](auto tag) {
    const float slope = e.negative_slope;
    for (int64_t n = 0; n < box.images; ++n) {
      const float* src = results + n * strides.image + c;
      for (int64_t i = 0; i < box.rows; ++i) {
        T* q = static_cast<T*>(e.out) + box.offset(n, i) + c;
        for (int64_t j = 0; j < box.width; ++j, src += ld, q += step)
          for (int v = 0; v < kVectors; ++v) {
            __builtin_prefetch(q + ahead + v * kLanes, 1, 2);
            store(q + v * kLanes, activate(scale[v] * load(src + v * kLanes) + bias[v], tag.value, slope));
          }
      }
    }
  });
}

// out = results + bias, with mean and m2 of the results. Sums are taken image by image, then over images: rounding grows
// with the longer of the two counts only. The bias joins the mean in merge_partials: a large one would take digits from
// the differences between the tasks' means.
template <typename T, int kVectors>
void statistics_channels(const ConvEpilogue& e, const OutputBox& box, const float* results, ResultStrides strides, int64_t c,
                         const Partial& partial) {
  const int64_t ld = strides.pixel, step = box.all_channels;
  T* out = static_cast<T*>(e.out);
  Vec bias[kVectors] = {};
  if (e.bias != nullptr)
    for (int v = 0; v < kVectors; ++v) bias[v] = load(e.bias + box.c0 + c + v * kLanes);
  Vec mean[kVectors] = {};
  for (int64_t n = 0; n < box.images; ++n) {
    const float* p = results + n * strides.image + c;
    Vec sum[kVectors] = {};
    for (int64_t i = 0; i < box.rows; ++i) {
      const T* q = out + box.offset(n, i) + c;
      for (int64_t j = 0; j < box.width; ++j, p += ld, q += step)
        for (int v = 0; v < kVectors; ++v) {
          __builtin_prefetch(q + v * kLanes, 1, 2);
          sum[v] += load(p + v * kLanes);
        }
    }
    for (int v = 0; v < kVectors; ++v) mean[v] += sum[v];
  }
  for (int v = 0; v < kVectors; ++v) {
    mean[v] = mean[v] / static_cast<float>(box.images * box.rows * box.width);
    store(partial.first + box.c0 + c + v * kLanes, mean[v]);
  }
  Vec m2[kVectors] = {};
  for (int64_t n = 0; n < box.images; ++n) {
    const float* src = results + n * strides.image + c;
    Vec sum[kVectors] = {};
    for (int64_t i = 0; i < box.rows; ++i) {
      T* q = out + box.offset(n, i) + c;
      for (int64_t j = 0; j < box.width; ++j, src += ld, q += step)
        for (int v = 0; v < kVectors; ++v) {
          const Vec x = load(src + v * kLanes), deviation = x - mean[v];
          sum[v] += deviation * deviation;
          store(q + v * kLanes, x + bias[v]);
        }
    }
    for (int v = 0; v < kVectors; ++v) m2[v] += sum[v];
  }
  for (int v = 0; v < kVectors; ++v) store(partial.second + box.c0 + c + v * kLanes, m2[v]);
}

// out = results * activation'(scale * y + shift), with both sums of it.
template <typename T, int kVectors>
void gradient_channels(const ConvEpilogue& e, const OutputBox& box, const float* results, ResultStrides strides, int64_t c,
                       const Partial& partial) {
  const int64_t ld = strides.pixel, step = box.all_channels, ahead = kPrefetchPixels * step;
  Vec scale[kVectors], shift[kVectors], y_mean[kVectors], y_invstd[kVectors];
  Vec total_dz[kVectors] = {}, total_dz_xhat[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = box.c0 + c + v * kLanes;
    scale[v] = e.scale != nullptr ? load(e.scale + at) : splat(1.0f);
    shift[v] = e.shift != nullptr ? load(e.shift + at) : Vec{};
    y_mean[v] = e.y_mean != nullptr ? load(e.y_mean + at) : Vec{};
    y_invstd[v] = e.y_mean != nullptr ? load(e.y_invstd + at) : Vec{};
  }
  with_activation(e.activation, [&](auto tag) {
    const float slope = e.negative_slope;
    for (int64_t n = 0; n < box.images; ++n) {
      const float* src = results + n * strides.image + c;
      Vec sum_dz[kVectors] = {}, sum_dz_xhat[kVectors] = {};
      for (int64_t i = 0; i < box.rows; ++i) {
        const T* y = static_cast<const T*>(e.y) + box.offset(n, i) + c;
        T* out = static_cast<T*>(e.out) + box.offset(n, i) + c;
        for (int64_t j = 0; j < box.width; ++j, src += ld, y += step, out += step)
          for (int v = 0; v < kVectors; ++v) {
            __builtin_prefetch(out + ahead + v * kLanes, 1, 2);
            __builtin_prefetch(y + ahead + v * kLanes, 0, 2);
            const Vec raw = load(y + v * kLanes);
            const Vec dz = activate_backward(load(src + v * kLanes), scale[v] * raw + shift[v], tag.value, slope);
            sum_dz[v] += dz;
            sum_dz_xhat[v] += dz * (raw - y_mean[v]);
            store(out + v * kLanes, dz);
          }
      }
      for (int v = 0; v < kVectors; ++v) {
        total_dz[v] += sum_dz[v];
        total_dz_xhat[v] += sum_dz_xhat[v];
      }
    }
  });
  for (int v = 0; v < kVectors; ++v) {
    store(partial.first + box.c0 + c + v * kLanes, total_dz[v]);
    store(partial.second + box.c0 + c + v * kLanes, total_dz_xhat[v] * y_invstd[v]);
  }
}

template <typename T, int kVectors>
void finish_channels(const ConvEpilogue& e, const OutputBox& box, const float* results, ResultStrides strides, int64_t c,
                     const Partial& partial) {
  switch (e.mode) {
    case ConvEpilogue::Mode::statistics: return statistics_channels<T, kVectors>(e, box, results, strides, c, partial);
    case ConvEpilogue::Mode::gradient: return gradient_channels<T, kVectors>(e, box, results, strides, c, partial);
    default: return activate_channels<T, kVectors>(e, box, results, strides, c);
  }
}

// All channels of a box.
template <typename T>
void finish_box(const ConvEpilogue& e, const OutputBox& box, const float* results, ResultStrides strides,
                const Partial& partial) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= box.channels; c += 4 * kLanes) finish_channels<T, 4>(e, box, results, strides, c, partial);
  for (; c + 2 * kLanes <= box.channels; c += 2 * kLanes) finish_channels<T, 2>(e, box, results, strides, c, partial);
  for (; c < box.channels; c += kLanes) finish_channels<T, 1>(e, box, results, strides, c, partial);
}

inline bool has_partials(const ConvEpilogue& e) {
  return e.mode == ConvEpilogue::Mode::statistics ||
         (e.mode == ConvEpilogue::Mode::gradient && (e.sum_dz != nullptr || e.y_mean != nullptr));
}

constexpr int64_t kMergedChannels = 64;     // by a task
constexpr int64_t kMergedAtOnce = 1 << 13;  // up to so many numbers are merged by one thread

// Merges the partial statistics of `parts` tasks, in task order. partials: [parts, 2, channels]; count(i) pixels in part i.
template <typename Count>
void merge_partials(const ConvEpilogue& e, const float* partials, int64_t parts, int64_t channels, const Count& count) {
  if (!has_partials(e)) return;
  const auto merge = [&](int64_t task) {
    const int64_t c0 = task * kMergedChannels, together = min64(kMergedChannels, channels - c0);
    double first[kMergedChannels] = {}, second[kMergedChannels] = {}, n = 0;
    const float* a = partials + c0;
    for (int64_t i = 0; i < parts; ++i, a += 2 * channels) {
      const float* b = a + channels;
      if (e.mode == ConvEpilogue::Mode::statistics) {
        const double m = static_cast<double>(count(i)), share = m / (n + m), spread = n * share;
        for (int64_t c = 0; c < together; ++c) {
          const double delta = a[c] - first[c];
          second[c] += b[c] + delta * delta * spread;
          first[c] += delta * share;
        }
        n += m;
      } else {
        for (int64_t c = 0; c < together; ++c) {
          first[c] += a[c];
          second[c] += b[c];
        }
      }
    }
    for (int64_t c = 0; c < together; ++c) {
      if (e.mode == ConvEpilogue::Mode::statistics) {
        e.mean[c0 + c] = static_cast<float>(e.bias != nullptr ? first[c] + e.bias[c0 + c] : first[c]);
        e.m2[c0 + c] = static_cast<float>(second[c]);
      } else {
        if (e.sum_dz != nullptr) e.sum_dz[c0 + c] = static_cast<float>(first[c]);
        if (e.y_mean != nullptr) e.sum_dz_xhat[c0 + c] = static_cast<float>(second[c]);
      }
    }
  };
  const int64_t tasks = ceil_div(channels, kMergedChannels);
  if (parts * channels > kMergedAtOnce)
    parallel_for(tasks, merge);
  else
    for (int64_t task = 0; task < tasks; ++task) merge(task);
}

// ---- workspace

// One scratch area per thread, handed from task to task: parallel_for does not say which thread runs a task.
class ScratchSlots {
 public:
  static constexpr int64_t kAlignment = 256;

  static int64_t bytes(int threads, int64_t slot_bytes) {
    return round_up(threads * static_cast<int64_t>(sizeof(int)), kAlignment) + threads * round_up(slot_bytes, kAlignment);
  }
  ScratchSlots(void* memory, int threads, int64_t slot_bytes)
      : busy_(static_cast<int*>(memory)),
        slots_(static_cast<char*>(memory) + round_up(threads * static_cast<int64_t>(sizeof(int)), kAlignment)),
        slot_bytes_(round_up(slot_bytes, kAlignment)),
        threads_(threads) {
    for (int i = 0; i < threads; ++i) busy_[i] = 0;
  }

  // Holds a slot for the time of one task.
  class Lease {
   public:
    explicit Lease(const ScratchSlots& slots) : slots_(slots) {
      for (index_ = 0; __atomic_exchange_n(&slots_.busy_[index_], 1, __ATOMIC_ACQUIRE) != 0;)
        if (++index_ == slots_.threads_) {
          index_ = 0;
          sched_yield();
        }
    }
    ~Lease() { __atomic_store_n(&slots_.busy_[index_], 0, __ATOMIC_RELEASE); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    float* memory() const { return reinterpret_cast<float*>(slots_.slots_ + index_ * slots_.slot_bytes_); }

   private:
    const ScratchSlots& slots_;
    int index_;
  };

 private:
  int* busy_;
  char* slots_;
  int64_t slot_bytes_;
  int threads_;
};

}  // namespace
}  // namespace fastgan::cpu::FASTGAN_ISA
