// from_pixel kernels against sums in double, on the instruction set that FASTGAN_CPU_ISA names: whole and partial groups of
// pixels, more inputs than a block holds, and the same results for every number of threads.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/from_pixel.h"
#include "testing.h"

using namespace fastgan::cpu;

namespace {

// Elements that differ by more than float rounding of `terms` summands of at most 1.
void expect_close(const Floats& got, const std::vector<double>& want, int64_t terms, const char* what, const FromPixelShape& s) {
  const double tolerance = 1e-7 * static_cast<double>(terms);
  size_t wrong = 0;
  for (size_t i = 0; i < want.size(); ++i)
    if (!(std::abs(static_cast<double>(got[i]) - want[i]) <= tolerance)) ++wrong;
  if (wrong == 0) return;
  std::printf("FAILED [%s] %s: %zu of %zu wrong; batch %d, inputs %d, channels %d, pixels %d\n", isa_name(active_isa()), what,
              wrong, want.size(), static_cast<int>(s.batch), static_cast<int>(s.inputs), static_cast<int>(s.channels),
              static_cast<int>(s.pixels));
  ++failures;
}

void check(const FromPixelShape& s) {
  const Floats input = random_floats(s.batch * s.inputs), weight = random_floats(s.inputs * s.channels * s.pixels);
  const Floats gradient = random_floats(s.batch * s.pixels * s.channels);
  std::vector<double> want_output(gradient.size()), want_gradient(weight.size());
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t i = 0; i < s.inputs; ++i)
      for (int64_t c = 0; c < s.channels; ++c)
        for (int64_t p = 0; p < s.pixels; ++p) {
          const size_t w = static_cast<size_t>((i * s.channels + c) * s.pixels + p);
          const size_t y = static_cast<size_t>((n * s.pixels + p) * s.channels + c);
          const double x = input[static_cast<size_t>(n * s.inputs + i)];
          want_output[y] += x * weight[w];
          want_gradient[w] += x * gradient[y];
        }
  Floats first_output, first_gradient;
  for (runner_threads = 1; runner_threads <= 3; ++runner_threads) {
    Floats output(want_output.size(), NAN), weight_gradient(want_gradient.size(), NAN);
    const size_t bytes = static_cast<size_t>(from_pixel_workspace_bytes(s, runner_threads));
    void* workspace = std::aligned_alloc(64, (bytes / 64 + 1) * 64);
    std::memset(workspace, 0xff, bytes);  // NaNs: scratch must not be read before it is written
    from_pixel_forward(s, input.data(), weight.data(), output.data(), workspace, runner_threads);
    from_pixel_weight_gradient(s, input.data(), gradient.data(), weight_gradient.data(), workspace, runner_threads);
    std::free(workspace);
    if (runner_threads == 1) {
      expect_close(output, want_output, s.inputs, "output", s);
      expect_close(weight_gradient, want_gradient, s.batch, "weight gradient", s);
      first_output = output, first_gradient = weight_gradient;
    } else {
      expect_the_same_for_every_number_of_threads(output == first_output && weight_gradient == first_gradient);
    }
  }
}

void check_all() {
  check({5, 100, 64, 16});
  check({17, 130, 32, 49});
  check({1, 3, 96, 1});
  check({33, 64, 32, 9});
  if (from_pixel_supported({4, 100, 48, 16})) {
    std::printf("FAILED: 48 channels are no whole number of panels\n");
    ++failures;
  }
}

}  // namespace

int main() { return run_checks(check_all); }
