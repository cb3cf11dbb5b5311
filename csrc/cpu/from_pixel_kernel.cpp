// Instruction sets: baseline avx2 avx512
//
// The two matrix products of from_pixel.h. A task owns a panel of channels and up to kPixels pixels: it reorders what it reads
// of the weight, or of the gradient, into its own scratch and multiplies.
#include "from_pixel.h"

#include "conv4x4s2_common.h"
#include "conv4x4s2_gemm.h"
#include "transpose.h"

namespace fastgan::cpu::FASTGAN_ISA {
namespace {

constexpr int64_t kInputs = 128;  // inputs of a block: floats from one row of the product's left side to the next
constexpr int64_t kPixels = 16;   // most of a task: a cache line of the weight

struct Plan {
  int64_t blocks, panels, groups;  // of inputs, channels, pixels
  int64_t group;                   // pixels of a group
  int64_t left, right, sums;       // floats: shared, and a task's own

  explicit Plan(const FromPixelShape& s) {
    blocks = ceil_div(s.inputs, kInputs);
    panels = s.channels / kPanel;
    group = s.pixels % kPixels == 0 ? kPixels : kSide;  // where lines are shared anyway, small groups
    groups = ceil_div(s.pixels, group);
    left = blocks * s.batch * kInputs;
    right = group * max64(s.inputs, s.batch) * kPanel;
    sums = group * s.inputs * kPanel;
  }
  int64_t left_bytes() const { return round_up(left * static_cast<int64_t>(sizeof(float)), ScratchSlots::kAlignment); }
  int64_t slot_bytes() const { return (right + sums) * static_cast<int64_t>(sizeof(float)); }
};

// input[batch][inputs] -> left[block][batch][kInputs]
void block_inputs(const FromPixelShape& s, const float* input, float* left) {
  for (int64_t i = 0; i < s.inputs; i += kInputs, left += s.batch * kInputs)
    for (int64_t n = 0; n < s.batch; ++n) {
      const size_t count = static_cast<size_t>(min64(kInputs, s.inputs - i));
      __builtin_memcpy(left + n * kInputs, input + n * s.inputs + i, count * sizeof(float));
    }
}

// weight[kPanel channels][all_pixels], of which the first `pixels` are meant -> panel[pixel][kPanel], `stride` floats from pixel
// to pixel; or back.
template <bool kToPanel, typename Weight>
void reorder(Weight* weight, int64_t all_pixels, int64_t pixels, float* panel, int64_t stride) {
  int64_t p = 0;
  for (; kLanes >= kSide && p + kSide <= pixels; p += kSide)
    for (int64_t c = 0; c < kPanel; c += kSide) {
      Weight* in_weight = weight + c * all_pixels + p;
      float* in_panel = panel + p * stride + c;
      if constexpr (kToPanel)
        transpose_square(in_weight, all_pixels, in_panel, stride);
      else
        transpose_square(in_panel, stride, in_weight, all_pixels);
    }
  for (; p < pixels; ++p)
    for (int64_t c = 0; c < kPanel; ++c) {
      if constexpr (kToPanel)
        panel[p * stride + c] = weight[c * all_pixels + p];
      else
        weight[c * all_pixels + p] = panel[p * stride + c];
    }
}

// Calls body(left, right, sums, c0, p0, pixels) for every panel and group of pixels: the blocked inputs, the task's own
// scratch, and where the task starts.
template <typename Body>
void for_tasks(const FromPixelShape& s, const Plan& plan, const float* input, void* workspace, int threads, const Body& body) {
  float* left = static_cast<float*>(workspace);
  block_inputs(s, input, left);
  const ScratchSlots slots(static_cast<char*>(workspace) + plan.left_bytes(), threads, plan.slot_bytes());
  parallel_for(plan.panels * plan.groups, [&](int64_t task) {
    const int64_t c0 = task / plan.groups * kPanel, p0 = task % plan.groups * plan.group;
    const ScratchSlots::Lease lease(slots);
    body(left, lease.memory(), lease.memory() + plan.right, c0, p0, min64(plan.group, s.pixels - p0));
  });
}

}  // namespace

int64_t from_pixel_scratch_bytes(const FromPixelShape& shape, int threads) {
  const Plan plan(shape);
  return plan.left_bytes() + ScratchSlots::bytes(threads, plan.slot_bytes());
}

void from_pixel_products(const FromPixelShape& s, const float* input, const float* weight, float* output, void* workspace,
                         int threads) {
  const Plan plan(s);
  // right: [pixel][input][kPanel]
  const auto task = [&](const float* left, float* right, float*, int64_t c0, int64_t p0, int64_t pixels) {
    for (int64_t i = 0; i < s.inputs; ++i)
      reorder<true>(weight + (i * s.channels + c0) * s.pixels + p0, s.pixels, pixels, right + i * kPanel, s.inputs * kPanel);
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t block = 0; block < plan.blocks; ++block) {
        const int64_t i0 = block * kInputs;
        multiply<2, kInputs, 1, kPanel>(left + block * s.batch * kInputs, right + (p * s.inputs + i0) * kPanel,
                                        min64(kInputs, s.inputs - i0), output + (p0 + p) * s.channels + c0,
                                        s.pixels * s.channels, s.batch, block > 0);
      }
  };
  for_tasks(s, plan, input, workspace, threads, task);
}

void from_pixel_gradient_products(const FromPixelShape& s, const float* input, const float* gradient, float* weight_gradient,
                                  void* workspace, int threads) {
  const Plan plan(s);
  // right: [pixel][batch][kPanel], sums: [pixel][input][kPanel]
  const auto task = [&](const float* left, float* right, float* sums, int64_t c0, int64_t p0, int64_t pixels) {
    for (int64_t n = 0; n < s.batch; ++n)
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t lane = 0; lane < kPanel; lane += kLanes)
          store(right + (p * s.batch + n) * kPanel + lane, load(gradient + (n * s.pixels + p0 + p) * s.channels + c0 + lane));
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t block = 0; block < plan.blocks; ++block) {
        const int64_t i0 = block * kInputs;
        multiply<2, 1, kInputs, kPanel>(left + block * s.batch * kInputs, right + p * s.batch * kPanel, s.batch,
                                        sums + (p * s.inputs + i0) * kPanel, kPanel, min64(kInputs, s.inputs - i0), false);
      }
    for (int64_t i = 0; i < s.inputs; ++i)
      reorder<false>(weight_gradient + (i * s.channels + c0) * s.pixels + p0, s.pixels, pixels, sums + i * kPanel,
                     s.inputs * kPanel);
  };
  for_tasks(s, plan, input, workspace, threads, task);
}

}  // namespace fastgan::cpu::FASTGAN_ISA
