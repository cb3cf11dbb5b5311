// Instruction sets: baseline avx2 avx512
//
// The three loops of to_pixel.h. Weights are few, and put in the image's order, [output][pixel][channel], before each.
#include "to_pixel.h"

#include "conv4x4s2_common.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t kStaged = 128;          // channels that are read at a time
constexpr int64_t kTaskFloats = 1 << 15;  // of the images of a task, about
constexpr int64_t kSummed = 64;           // images whose products are added up before a longer sum takes them

struct Plan {
  int64_t pixels, features;  // of an image
  int64_t images, tasks;     // of a task, and of the batch

  explicit Plan(const ToPixelShape& s) : pixels(s.height * s.width), features(pixels * s.channels) {
    images = min64(s.batch, max64(1, kTaskFloats / features));
    tasks = ceil_div(s.batch, images);
  }
  int64_t weight_bytes(const ToPixelShape& s) const { return aligned(s.outputs * features); }
  int64_t partial_bytes(const ToPixelShape& s) const { return aligned(2 * tasks * s.channels); }
  int64_t slot_bytes() const { return images * features * static_cast<int64_t>(sizeof(float)); }

 private:
  static int64_t aligned(int64_t floats) { return round_up(floats * static_cast<int64_t>(sizeof(float)), ScratchSlots::kAlignment); }
};

// weight[output][channel][pixel] -> matrix[output][pixel][channel], or back
template <bool kToMatrix, typename Weight, typename Matrix>
void reorder(const ToPixelShape& s, const Plan& plan, Weight* weight, Matrix* matrix) {
  for (int64_t k = 0; k < s.outputs; ++k, weight += plan.features, matrix += plan.features)
    for (int64_t p = 0; p < plan.pixels; ++p)
      for (int64_t c = 0; c < s.channels; ++c) {
        if constexpr (kToMatrix)
          matrix[p * s.channels + c] = weight[c * plan.pixels + p];
        else
          weight[c * plan.pixels + p] = matrix[p * s.channels + c];
      }
}

// Sum of a[i] * b[i]; n is a multiple of kLanes.
Vec dot(const float* a, const float* b, int64_t n) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sums[v] += load(a + i + v * kLanes) * load(b + i + v * kLanes);
  for (; i < n; i += kLanes) sums[0] += load(a + i) * load(b + i);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace

int64_t to_pixel_scratch_bytes(const ToPixelShape& shape, int threads) {
  const Plan plan(shape);
  return plan.weight_bytes(shape) + plan.partial_bytes(shape) + ScratchSlots::bytes(threads, plan.slot_bytes());
}

void to_pixel_sums(const ToPixelShape& s, const ConvOperand& input, const float* weight, const float* bias, float* output,
                   void* workspace) {
  const Plan plan(s);
  float* matrix = static_cast<float*>(workspace);
  reorder<true>(s, plan, weight, matrix);
  parallel_for(plan.tasks, [&](int64_t task) {
    alignas(kLineBytes) float staged[kStaged];
    for (int64_t n = task * plan.images; n < min64(s.batch, (task + 1) * plan.images); ++n) {
      Vec sums[kMostToPixelOutputs] = {};
      for (int64_t p = 0; p < plan.pixels; ++p)
        for (int64_t c0 = 0; c0 < s.channels; c0 += kStaged) {
          const int64_t at = p * s.channels + c0, channels = min64(kStaged, s.channels - c0);
          read_operand<float>(input, n * plan.features + at, c0, channels, staged);
          for (int64_t k = 0; k < s.outputs; ++k) sums[k] += dot(staged, matrix + k * plan.features + at, channels);
        }
      for (int64_t k = 0; k < s.outputs; ++k) {
        double sum = bias != nullptr ? bias[k] : 0.0;
        for (int lane = 0; lane < kLanes; ++lane) sum += sums[k][lane];
        output[n * s.outputs + k] = static_cast<float>(sum);
      }
    }
  });
}

void to_pixel_spread(const ToPixelShape& s, const float* gradient, const float* weight, const ConvEpilogue& epilogue,
                     void* workspace, int threads) {
  const Plan plan(s);
  char* memory = static_cast<char*>(workspace);
  float* matrix = reinterpret_cast<float*>(memory);
  float* partials = reinterpret_cast<float*>(memory + plan.weight_bytes(s));
  const ScratchSlots slots(memory + plan.weight_bytes(s) + plan.partial_bytes(s), threads, plan.slot_bytes());
  reorder<true>(s, plan, weight, matrix);
  const auto image_count = [&](int64_t task) { return min64(plan.images, s.batch - task * plan.images); };
  parallel_for(plan.tasks, [&](int64_t task) {
    const ScratchSlots::Lease lease(slots);
    float* results = lease.memory();
    const int64_t first = task * plan.images;
    for (int64_t n = 0; n < image_count(task); ++n) {
      const float* dy = gradient + (first + n) * s.outputs;
      for (int64_t i = 0; i < plan.features; i += kLanes) {
        Vec sum = dy[0] * load(matrix + i);
        for (int64_t k = 1; k < s.outputs; ++k) sum += dy[k] * load(matrix + k * plan.features + i);
        store(results + n * plan.features + i, sum);
      }
    }
    float* partial = partials + 2 * task * s.channels;
    const OutputBox box{s.height, s.width, s.channels, first, image_count(task), 0, s.height, 1, 0, s.channels};
    finish_box<float>(epilogue, box, results, {plan.features, s.channels}, {partial, partial + s.channels});
  });
  merge_partials(epilogue, partials, plan.tasks, s.channels, [&](int64_t task) { return image_count(task) * plan.pixels; });
}

void to_pixel_weight_sums(const ToPixelShape& s, const ConvOperand& input, const float* gradient, float* weight_gradient,
                          void* workspace) {
  const Plan plan(s);
  float* matrix = static_cast<float*>(workspace);
  const int64_t pieces = ceil_div(s.channels, kStaged);
  parallel_for(plan.pixels * pieces, [&](int64_t task) {
    alignas(kLineBytes) float staged[kStaged], sums[kMostToPixelOutputs][kStaged], totals[kMostToPixelOutputs][kStaged] = {};
    const int64_t c0 = task % pieces * kStaged, channels = min64(kStaged, s.channels - c0);
    const int64_t at = task / pieces * s.channels + c0;
    for (int64_t begin = 0; begin < s.batch; begin += kSummed) {
      __builtin_memset(sums, 0, sizeof sums);
      for (int64_t n = begin; n < min64(s.batch, begin + kSummed); ++n) {
        prefetch_operand<float>(input, (n + 4) * plan.features + at, channels);
        read_operand<float>(input, n * plan.features + at, c0, channels, staged);
        for (int64_t k = 0; k < s.outputs; ++k) {
          const float dy = gradient[n * s.outputs + k];
          for (int64_t c = 0; c < channels; c += kLanes) store(sums[k] + c, load(sums[k] + c) + dy * load(staged + c));
        }
      }
      for (int64_t k = 0; k < s.outputs; ++k)
        for (int64_t c = 0; c < channels; c += kLanes) store(totals[k] + c, load(totals[k] + c) + load(sums[k] + c));
    }
    for (int64_t k = 0; k < s.outputs; ++k)
      __builtin_memcpy(matrix + k * plan.features + at, totals[k], static_cast<size_t>(channels) * sizeof(float));
  });
  reorder<false>(s, plan, weight_gradient, matrix);
}

}  // namespace fastgan::cpu::FASTGAN_ISA
