// to_pixel kernels against sums in double, on the instruction set that FASTGAN_CPU_ISA names: one to four outputs, images that are
// tasks of their own and images that share one, inputs with and without batch norm and activation, and the same results for
// every number of threads.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/to_pixel.h"
#include "testing.h"

using namespace fastgan;
using namespace fastgan::cpu;

namespace {

// Elements that differ by more than float rounding of summands whose magnitudes add up to `terms`.
void expect_close(const Floats& got, const Doubles& want, double terms, const char* what, const ToPixelShape& s) {
  size_t wrong = 0;
  for (size_t i = 0; i < want.size(); ++i)
    if (!(std::abs(static_cast<double>(got[i]) - want[i]) <= 2e-7 * terms)) ++wrong;
  if (wrong == 0) return;
  std::printf("FAILED [%s] %s: %zu of %zu wrong; batch %d, %d x %d, channels %d, outputs %d\n", isa_name(active_isa()), what, wrong,
              want.size(), static_cast<int>(s.batch), static_cast<int>(s.height), static_cast<int>(s.width),
              static_cast<int>(s.channels), static_cast<int>(s.outputs));
  ++failures;
}

struct Results {
  Floats output, dz, sum_dz, sum_dz_xhat, plain_gradient, weight_gradient;

  bool operator==(const Results& o) const {
    return output == o.output && dz == o.dz && sum_dz == o.sum_dz && sum_dz_xhat == o.sum_dz_xhat &&
           plain_gradient == o.plain_gradient && weight_gradient == o.weight_gradient;
  }
};

void check(const ToPixelShape& s, bool batch_norm) {
  constexpr float kSlope = 0.2f;
  const int64_t pixels = s.height * s.width, features = pixels * s.channels;
  const size_t elements = static_cast<size_t>(s.batch * features), channels = static_cast<size_t>(s.channels);
  const Floats raw = random_floats(s.batch * features), weight = random_floats(s.outputs * features);
  const Floats bias = random_floats(s.outputs), gradient = random_floats(s.batch * s.outputs);
  const Floats scale = random_floats(s.channels, 0.5f, 1.5f), shift = random_floats(s.channels, -0.5f, 0.5f);
  const Floats mean = random_floats(s.channels, -0.5f, 0.5f), invstd = random_floats(s.channels, 0.5f, 1.5f);

  Doubles output(gradient.size()), dz(elements), sum_dz(channels), sum_dz_xhat(channels), plain(elements), weights(weight.size());
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t k = 0; k < s.outputs; ++k) output[static_cast<size_t>(n * s.outputs + k)] = bias[static_cast<size_t>(k)];
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0; c < s.channels; ++c) {
        const size_t at = static_cast<size_t>((n * pixels + p) * s.channels + c), channel = static_cast<size_t>(c);
        const double z = batch_norm ? static_cast<double>(scale[channel]) * raw[at] + shift[channel] : raw[at];
        const double x = z > 0 ? z : z * kSlope;
        for (int64_t k = 0; k < s.outputs; ++k) {
          const size_t i = static_cast<size_t>(n * s.outputs + k), w = static_cast<size_t>((k * s.channels + c) * pixels + p);
          output[i] += x * weight[w];
          plain[at] += static_cast<double>(gradient[i]) * weight[w];
          weights[w] += gradient[i] * x;
        }
        dz[at] = z > 0 ? plain[at] : plain[at] * kSlope;
        sum_dz[channel] += dz[at];
        sum_dz_xhat[channel] += dz[at] * (static_cast<double>(raw[at]) - mean[channel]) * invstd[channel];
      }

  ConvOperand input;
  input.data = raw.data();
  input.mode = ConvOperand::Mode::activated;
  input.activation = Activation::leaky_relu;
  input.negative_slope = kSlope;
  if (batch_norm) input.scale = scale.data(), input.shift = shift.data();

  Results first;
  for (runner_threads = 1; runner_threads <= 3; ++runner_threads) {
    const auto nans = [](size_t n) { return Floats(n, NAN); };
    Results r{nans(output.size()), nans(elements), nans(channels), nans(channels), nans(elements), nans(weights.size())};
    const size_t bytes = static_cast<size_t>(to_pixel_workspace_bytes(s, runner_threads));
    void* workspace = std::aligned_alloc(64, (bytes / 64 + 1) * 64);
    const auto spoil = [&] { std::memset(workspace, 0xff, bytes); };  // NaNs: scratch must not be read before it is written
    ConvEpilogue store, derivative;
    store.out = r.plain_gradient.data();
    derivative.mode = ConvEpilogue::Mode::gradient;
    derivative.out = r.dz.data();
    derivative.activation = Activation::leaky_relu;
    derivative.negative_slope = kSlope;
    derivative.y = raw.data();
    derivative.sum_dz = r.sum_dz.data();
    if (batch_norm) {
      derivative.scale = scale.data(), derivative.shift = shift.data();
      derivative.y_mean = mean.data(), derivative.y_invstd = invstd.data(), derivative.sum_dz_xhat = r.sum_dz_xhat.data();
    } else {
      r.sum_dz_xhat.assign(channels, 0.0f);
    }
    spoil(), to_pixel_forward(s, input, weight.data(), bias.data(), r.output.data(), workspace);
    spoil(), to_pixel_input_gradient(s, gradient.data(), weight.data(), store, workspace, runner_threads);
    spoil(), to_pixel_input_gradient(s, gradient.data(), weight.data(), derivative, workspace, runner_threads);
    spoil(), to_pixel_weight_gradient(s, input, gradient.data(), r.weight_gradient.data(), workspace);
    std::free(workspace);
    if (runner_threads == 1) {
      const double outputs = static_cast<double>(s.outputs), values = outputs * static_cast<double>(s.batch * pixels);
      expect_close(r.output, output, static_cast<double>(features), "output", s);
      expect_close(r.plain_gradient, plain, outputs, "input gradient", s);
      expect_close(r.dz, dz, outputs, "input gradient through an activation", s);
      expect_close(r.sum_dz, sum_dz, values, "sum of dz", s);
      if (batch_norm) expect_close(r.sum_dz_xhat, sum_dz_xhat, 2 * values, "sum of dz * xhat", s);
      expect_close(r.weight_gradient, weights, 2 * static_cast<double>(s.batch), "weight gradient", s);
      first = r;
    } else {
      expect_the_same_for_every_number_of_threads(r == first);
    }
  }
}

void check_all() {
  for (const bool batch_norm : {false, true}) {
    check({128, 7, 7, 128, 1}, batch_norm);
    check({9, 4, 4, 256, 1}, batch_norm);
    check({70, 2, 3, 48, 3}, batch_norm);
    check({1, 1, 1, 16, 4}, batch_norm);
    check({3, 8, 8, 640, 2}, batch_norm);
  }
  if (to_pixel_supported({4, 4, 4, 24, 1}) || to_pixel_supported({4, 4, 4, 32, 5}) || to_pixel_supported({0, 4, 4, 32, 1})) {
    std::printf("FAILED: 24 channels, five outputs or no image are not refused\n");
    ++failures;
  }
}

}  // namespace

int main() { return run_checks(check_all); }
