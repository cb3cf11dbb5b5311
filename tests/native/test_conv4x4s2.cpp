// conv4x4s2 kernels against a direct convolution in double, on every instruction set of this machine, with every operand
// mode and epilogue, for shapes that exercise every way an axis is cut; results must not depend on the thread count.
// For bfloat16 the operands of the products are rounded in the reference as well, so that what is left is the rounding of
// the output: the sums are float. Tensors and weights are multiples of a power of two there, so few that filtered products,
// which take differences and sums of them, round nothing more unless the operands are computed.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/conv4x4s2.h"
#include "../../csrc/cpu/conv4x4s2_kernel.h"
#include "testing.h"

using namespace fastgan;
using namespace fastgan::cpu;

namespace {

void expect(bool ok, const char* what, const char* detail) {
  if (ok) return;
  std::printf("FAILED [%s] %s: %s\n", isa_name(active_isa()), what, detail);
  ++failures;
}

float round_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Multiples of 1 / 2^bits: with numbers up to 1 in size and 6 bits, sums of two of them are bfloat16 as well.
Floats round_to_multiples(Floats values, int bits) {
  for (float& x : values) x = std::ldexp(std::nearbyint(std::ldexp(x, bits)), -bits);
  return values;
}
Floats random_elements(ConvDType dtype, int64_t n) {
  return dtype == ConvDType::float32 ? random_floats(n) : round_to_multiples(random_floats(n), 6);
}

// A tensor in the storage type of a layer.
struct Storage {
  ConvDType dtype;
  Floats floats;
  std::vector<uint16_t> halves;

  Storage(ConvDType type, size_t size) : dtype(type) {
    if (dtype == ConvDType::float32)
      floats.resize(size);
    else
      halves.resize(size);
  }
  Storage(ConvDType type, const Floats& values) : Storage(type, values.size()) {
    if (dtype == ConvDType::float32) floats = values;
    for (size_t i = 0; i < halves.size(); ++i) {
      uint32_t bits;
      const float rounded = round_to_bfloat16(values[i]);
      std::memcpy(&bits, &rounded, sizeof bits);
      halves[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
  void* data() { return dtype == ConvDType::float32 ? static_cast<void*>(floats.data()) : halves.data(); }
  Floats values() const {
    if (dtype == ConvDType::float32) return floats;
    Floats v(halves.size());
    for (size_t i = 0; i < v.size(); ++i) {
      const uint32_t bits = static_cast<uint32_t>(halves[i]) << 16;
      std::memcpy(&v[i], &bits, sizeof bits);
    }
    return v;
  }
};

struct AlignedBuffer {
  void* data;
  explicit AlignedBuffer(size_t bytes) : data(std::aligned_alloc(64, (bytes / 64 + 1) * 64)) {
    std::memset(data, 0xff, (bytes / 64 + 1) * 64);  // NaNs: scratch must not be read before it is written
  }
  ~AlignedBuffer() { std::free(data); }
};

double act(double z, Activation a, double slope) {
  switch (a) {
    case Activation::relu: return z > 0 ? z : 0;
    case Activation::leaky_relu: return z > 0 ? z : slope * z;
    case Activation::tanh: return std::tanh(z);
    case Activation::sigmoid: return 1 / (1 + std::exp(-z));
    default: return z;
  }
}

double act_derivative(double z, Activation a, double slope) {
  switch (a) {
    case Activation::relu: return z > 0 ? 1 : 0;
    case Activation::leaky_relu: return z > 0 ? 1 : slope;
    case Activation::tanh: return 1 - std::tanh(z) * std::tanh(z);
    case Activation::sigmoid: return act(z, a, slope) * (1 - act(z, a, slope));
    default: return 1;
  }
}

// A random operand of a mode, with its value in double.
struct Operand {
  Storage data, other;
  Floats scale, other_scale, shift;
  ConvOperand operand;
  Doubles value;

  Operand(ConvDType dtype, int64_t pixels, int64_t channels, ConvOperand::Mode mode, Activation activation)
      : data(dtype, random_elements(dtype, pixels * channels)), other(dtype, random_elements(dtype, pixels * channels)),
        scale(random_floats(channels)), other_scale(random_floats(channels)), shift(random_floats(channels)) {
    operand.data = data.data();
    operand.mode = mode;
    operand.activation = activation;
    operand.negative_slope = 0.3f;
    if (mode != ConvOperand::Mode::plain) {
      operand.scale = scale.data();
      operand.shift = shift.data();
    }
    if (mode == ConvOperand::Mode::batch_norm_backward) {
      operand.other = other.data();
      operand.other_scale = other_scale.data();
    }
    const Floats x = data.values(), y = other.values();
    value.resize(x.size());
    for (size_t i = 0; i < value.size(); ++i) {
      const size_t c = i % channels;
      value[i] = x[i];
      if (mode == ConvOperand::Mode::activated)
        value[i] = act(double(scale[c]) * x[i] + shift[c], activation, 0.3);
      if (mode == ConvOperand::Mode::batch_norm_backward)
        value[i] = double(scale[c]) * x[i] + double(other_scale[c]) * y[i] + shift[c];
      if (dtype == ConvDType::bfloat16) value[i] = round_to_bfloat16(static_cast<float>(value[i]));
    }
  }
};

// Calls f(large index, small index, weight index) for every product of the convolution.
template <typename F>
void for_products(const Conv4x4s2Shape& s, const F& f) {
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t i = 0; i < s.small_height; ++i)
      for (int64_t j = 0; j < s.small_width; ++j)
        for (int64_t r = 0; r < 4; ++r)
          for (int64_t t = 0; t < 4; ++t) {
            const int64_t y = 2 * i - 1 + r, x = 2 * j - 1 + t;
            if (y < 0 || y >= s.large_height || x < 0 || x >= s.large_width) continue;
            const int64_t large = ((n * s.large_height + y) * s.large_width + x) * s.large_channels;
            const int64_t small = ((n * s.small_height + i) * s.small_width + j) * s.small_channels;
            for (int64_t k = 0; k < s.small_channels; ++k)
              for (int64_t c = 0; c < s.large_channels; ++c) {
                const int64_t weight = s.weight_channels_last ? ((k * 4 + r) * 4 + t) * s.large_channels + c
                                                              : ((k * s.large_channels + c) * 4 + r) * 4 + t;
                f(large + c, small + k, weight);
              }
          }
}

// Largest difference relative to the largest value.
double error(const Floats& got, const Doubles& want) {
  double worst = 0, largest = 1e-30;
  for (size_t i = 0; i < want.size(); ++i) {
    const double difference = std::abs(got[i] - want[i]);
    if (!(difference <= worst)) worst = difference;  // keeps a NaN
    largest = std::max(largest, std::abs(want[i]));
  }
  return worst / largest;
}

void expect_close(const Floats& got, const Doubles& want, const char* what, const Conv4x4s2Shape& s, double tolerance) {
  char detail[200];
  const double e = error(got, want);
  std::snprintf(detail, sizeof detail, "%s batch %d large %dx%dx%d small channels %d: error %.2e",
                s.dtype == ConvDType::float32 ? "float32" : s.dtype == ConvDType::mixed ? "mixed" : "bfloat16", int(s.batch), int(s.large_height),
                int(s.large_width), int(s.large_channels), int(s.small_channels), e);
  expect(e <= tolerance, what, detail);
}

// The loops under test: those of conv4x4s2.h or, but for images, the direct ones of bfloat16, which AMX has, as they are on
// AVX512-BF16.
bool direct_bfloat16 = false;
bool is_direct(const Conv4x4s2Shape& s) { return direct_bfloat16 && s.large_channels > 4; }

#if defined(__x86_64__)
#define CALL(direct_one, ...) is_direct(s) ? avx512_bf16::conv4x4s2_bf16_##direct_one : __VA_ARGS__
#else
#define CALL(direct_one, ...) __VA_ARGS__
#endif

size_t packed_bytes(const Conv4x4s2Shape& s, Conv4x4s2Loop loop) {
  return CALL(packed_bytes(s, loop), conv4x4s2_packed_bytes(s, loop));
}
void pack(const Conv4x4s2Shape& s, Conv4x4s2Loop loop, const float* weight, void* packed) {
  CALL(pack(s, loop, weight, packed), conv4x4s2_pack(s, loop, weight, packed));
}
size_t workspace_bytes(const Conv4x4s2Shape& s, Conv4x4s2Loop loop, int threads) {
  return CALL(workspace_bytes(s, loop, threads), conv4x4s2_workspace_bytes(s, loop, threads));
}
void forward(const Conv4x4s2Shape& s, Conv4x4s2Loop loop, const ConvOperand& input, const void* packed, const ConvEpilogue& output,
             void* workspace, int threads) {
  const auto run = loop == Conv4x4s2Loop::down ? conv4x4s2_down : conv4x4s2_up;
  CALL(forward(s, loop, input, packed, output, workspace, threads), run(s, input, packed, output, workspace, threads));
}
void weight_gradient(const Conv4x4s2Shape& s, const ConvOperand& large, const ConvOperand& small, const ConvWeightGradient& result,
                     void* workspace, int threads) {
  CALL(weight_gradient(s, large, small, result, workspace, threads),
       conv4x4s2_weight_gradient(s, large, small, result, workspace, threads));
}
#undef CALL

struct Layer {
  Conv4x4s2Shape shape;
  int64_t large_pixels, small_pixels;
  Floats weight;

  Layer(int64_t batch, int64_t height, int64_t width, int64_t large_channels, int64_t small_channels,
        ConvDType dtype = ConvDType::float32)
      : shape{batch, height, width, large_channels, height / 2, width / 2, small_channels, dtype},
        large_pixels(batch * height * width), small_pixels(batch * (height / 2) * (width / 2)),
        weight(random_floats(large_channels * small_channels * 16, -0.1f, 0.1f)) {
    if (shape.dtype == ConvDType::bfloat16) weight = round_to_multiples(weight, 10);
  }

  Operand large(ConvOperand::Mode mode, Activation a) const {
    return Operand(shape.dtype, large_pixels, shape.large_channels, mode, a);
  }
  Operand small(ConvOperand::Mode mode, Activation a) const {
    return Operand(shape.dtype, small_pixels, shape.small_channels, mode, a);
  }

  // Half a unit in the last place of a bfloat16 is at most 2^-8 of it. Where a prologue computes the operand, some of its elements
  // round the other way in the kernel than here; in filtered products all differences are rounded, too.
  double sum_tolerance(bool prologue) const {
    if (shape.dtype != ConvDType::bfloat16 || !prologue) return 1.5e-6;
    const bool filtered = active_isa() == Isa::avx512_bf16 && shape.large_channels > 4 && !direct_bfloat16;
    return filtered ? 0x1p-7 : 5e-4;
  }
  double output_tolerance(bool prologue) const {
    return (shape.dtype != ConvDType::float32 ? 0x1p-8 : 0) + sum_tolerance(prologue);
  }

  void run(Conv4x4s2Loop loop, const ConvOperand& input, const ConvEpilogue& epilogue, int threads) const {
    runner_threads = threads;
    const size_t bytes = packed_bytes(shape, loop);
    AlignedBuffer packed(bytes), workspace(workspace_bytes(shape, loop, threads));
    if (bytes > 0) pack(shape, loop, weight.data(), packed.data);
    const void* taps = bytes > 0 ? packed.data : static_cast<const void*>(weight.data());
    forward(shape, loop, input, taps, epilogue, workspace.data, threads);
  }
};

void check_loop(const Layer& layer, Conv4x4s2Loop loop, ConvOperand::Mode mode, Activation activation, int threads) {
  const Conv4x4s2Shape& s = layer.shape;
  const bool down = loop == Conv4x4s2Loop::down;
  expect(conv4x4s2_supported(s), "supported", "");
  const Operand input = down ? layer.large(mode, activation) : layer.small(mode, activation);
  const bool prologue = mode != ConvOperand::Mode::plain;
  const double tolerance = layer.output_tolerance(prologue), sum_tolerance = std::max(1e-5, layer.sum_tolerance(prologue));
  const int64_t channels = down ? s.small_channels : s.large_channels, pixels = down ? layer.small_pixels : layer.large_pixels;
  Doubles result(static_cast<size_t>(channels * pixels));
  for_products(s, [&](int64_t large, int64_t small, int64_t w) {
    if (down)
      result[small] += input.value[large] * layer.weight[w];
    else
      result[large] += input.value[small] * layer.weight[w];
  });

  const Floats bias = random_floats(channels);
  Storage out(s.dtype, result.size());
  ConvEpilogue e;
  e.out = out.data();

  layer.run(loop, input.operand, e, threads);
  expect_close(out.values(), result, down ? "down, store" : "up, store", s, tolerance);

  // float32: what was stored, checked above, goes through the activation; its error counts once, however large the slope
  const Floats stored = out.values();
  Doubles want(result.size());
  e.bias = bias.data();
  e.mode = ConvEpilogue::Mode::activate;
  const Floats factors = random_floats(channels, 0.5, 2);
  for (Activation a : {Activation::leaky_relu, Activation::relu, Activation::tanh, Activation::sigmoid})
    for (bool scaled : {false, true}) {
      e.activation = a;
      e.scale = scaled ? factors.data() : nullptr;
      for (size_t i = 0; i < want.size(); ++i) {
        const double y = s.dtype == ConvDType::float32 ? stored[i] : result[i];
        want[i] = act((scaled ? factors[i % channels] : 1) * y + bias[i % channels], a, e.negative_slope);
      }
      layer.run(loop, input.operand, e, threads);
      expect_close(out.values(), want, down ? "down, activate" : "up, activate", s, tolerance);
    }
  e.scale = nullptr;

  e.mode = ConvEpilogue::Mode::statistics;
  const Floats offset = random_floats(channels, 100, 101);  // a mean far larger than the deviation must not hurt m2
  e.bias = offset.data();
  Floats mean(channels), m2(channels);
  e.mean = mean.data();
  e.m2 = m2.data();
  layer.run(loop, input.operand, e, threads);
  Doubles want_mean(channels), want_m2(channels);
  for (size_t i = 0; i < want.size(); ++i) want[i] = result[i] + offset[i % channels];
  for (size_t i = 0; i < want.size(); ++i) want_mean[i % channels] += want[i] / pixels;
  for (size_t i = 0; i < want.size(); ++i) want_m2[i % channels] += std::pow(want[i] - want_mean[i % channels], 2);
  expect_close(mean, want_mean, "mean", s, sum_tolerance);
  expect_close(m2, want_m2, "m2", s, sum_tolerance);
  expect_close(out.values(), want, down ? "down, statistics" : "up, statistics", s, tolerance);

  e.mode = ConvEpilogue::Mode::gradient;
  Storage stored_y(s.dtype, random_floats(channels * pixels));
  const Floats y = stored_y.values(), scale = random_floats(channels, 0.5, 2), shift = random_floats(channels),
               y_mean = random_floats(channels), y_invstd = random_floats(channels, 0.5, 2);
  Floats sum_dz(channels), sum_dz_xhat(channels);
  e.y = stored_y.data();
  e.y_mean = y_mean.data();
  e.y_invstd = y_invstd.data();
  e.sum_dz = sum_dz.data();
  e.sum_dz_xhat = sum_dz_xhat.data();
  for (Activation a : {Activation::identity, Activation::leaky_relu, Activation::relu, Activation::tanh, Activation::sigmoid})
    for (bool affine : {true, false}) {
      e.activation = a;
      e.scale = affine ? scale.data() : nullptr;
      e.shift = affine ? shift.data() : nullptr;
      layer.run(loop, input.operand, e, threads);
      Doubles want_dz(channels), want_dz_xhat(channels);
      for (size_t i = 0; i < want.size(); ++i) {
        const size_t c = i % channels;
        const float z = affine ? std::fma(scale[c], y[i], shift[c]) : y[i];
        want[i] = result[i] * act_derivative(z, a, e.negative_slope);
        want_dz[c] += want[i];
        want_dz_xhat[c] += want[i] * (double(y[i]) - y_mean[c]) * y_invstd[c];
      }
      expect_close(out.values(), want, down ? "down, gradient" : "up, gradient", s, tolerance);
      expect_close(sum_dz, want_dz, "sum_dz", s, sum_tolerance);
      expect_close(sum_dz_xhat, want_dz_xhat, "sum_dz_xhat", s, sum_tolerance);
    }
}

void check_weight_gradient(const Layer& layer, ConvOperand::Mode large_mode, ConvOperand::Mode small_mode, int threads) {
  const Conv4x4s2Shape& s = layer.shape;
  const Operand large = layer.large(large_mode, Activation::leaky_relu), small = layer.small(small_mode, Activation::relu);
  Doubles want(layer.weight.size());
  for_products(s, [&](int64_t l, int64_t k, int64_t w) { want[w] += large.value[l] * small.value[k]; });
  Floats got(want.size());
  runner_threads = threads;
  AlignedBuffer workspace(workspace_bytes(s, Conv4x4s2Loop::weight_gradient, threads));
  weight_gradient(s, large.operand, small.operand, {got.data()}, workspace.data, threads);
  Floats sum(want.size()), expected(want.size());
  for (size_t i = 0; i < sum.size(); ++i) sum[i] = static_cast<float>(i % 7) - 3, expected[i] = sum[i] + got[i];
  weight_gradient(s, large.operand, small.operand, {sum.data(), true}, workspace.data, threads);
  expect(sum == expected, "weight gradient, added", "");
  const bool prologue = large_mode != ConvOperand::Mode::plain || small_mode != ConvOperand::Mode::plain;
  expect_close(got, want, "weight gradient", s, layer.sum_tolerance(prologue));
}

void check_thread_independence(const Layer& layer, Conv4x4s2Loop loop) {
  const Conv4x4s2Shape& s = layer.shape;
  const Operand large = layer.large(ConvOperand::Mode::plain, Activation::identity);
  const Operand small = layer.small(ConvOperand::Mode::plain, Activation::identity);
  const bool down = loop == Conv4x4s2Loop::down;
  const int64_t channels = down ? s.small_channels : s.large_channels;
  Floats results[2][3];
  for (int run = 0; run < 2; ++run) {
    Floats* r = results[run];
    const int threads = run == 0 ? 1 : 3;
    if (loop == Conv4x4s2Loop::weight_gradient) {
      r[0].resize(layer.weight.size());
      runner_threads = threads;
      AlignedBuffer workspace(workspace_bytes(s, loop, threads));
      weight_gradient(s, large.operand, small.operand, {r[0].data()}, workspace.data, threads);
      continue;
    }
    Storage out(s.dtype, channels * (down ? layer.small_pixels : layer.large_pixels));
    r[1].resize(channels);
    r[2].resize(channels);
    ConvEpilogue e;
    e.mode = ConvEpilogue::Mode::statistics;
    e.out = out.data();
    e.mean = r[1].data();
    e.m2 = r[2].data();
    layer.run(loop, down ? large.operand : small.operand, e, threads);
    r[0] = out.values();
  }
  for (int i = 0; i < 3; ++i)
    expect(results[0][i] == results[1][i], "the same bits for 1 and 3 threads", down ? "down" : "up or weight gradient");
}

void check_all(const std::vector<Layer>& layers, const std::vector<Layer>& layers_of_modes, ConvDType dtype) {
  using Mode = ConvOperand::Mode;
  for (Layer layer : layers)
    for (bool channels_last : {false, true}) {
      if (channels_last && !conv4x4s2_takes_channels_last(layer.shape)) continue;
      layer.shape.weight_channels_last = channels_last;
      check_loop(layer, Conv4x4s2Loop::down, Mode::plain, Activation::identity, 2);
      check_loop(layer, Conv4x4s2Loop::up, Mode::plain, Activation::identity, 2);
      check_weight_gradient(layer, Mode::plain, Mode::plain, 2);
    }
  for (const Layer& layer : layers_of_modes) {
    for (Activation a : {Activation::identity, Activation::relu, Activation::leaky_relu, Activation::tanh, Activation::sigmoid}) {
      check_loop(layer, Conv4x4s2Loop::down, Mode::activated, a, 1);
      check_loop(layer, Conv4x4s2Loop::up, Mode::activated, a, 1);
    }
    check_loop(layer, Conv4x4s2Loop::down, Mode::batch_norm_backward, Activation::identity, 1);
    check_loop(layer, Conv4x4s2Loop::up, Mode::batch_norm_backward, Activation::identity, 1);
    for (Mode large : {Mode::plain, Mode::activated, Mode::batch_norm_backward})
      for (Mode small : {Mode::plain, Mode::activated, Mode::batch_norm_backward}) check_weight_gradient(layer, large, small, 1);
  }
  for (Conv4x4s2Loop loop : {Conv4x4s2Loop::down, Conv4x4s2Loop::up, Conv4x4s2Loop::weight_gradient})
    for (int64_t batch : {1, 20, 90})  // two, few and many tasks
      for (int64_t channels : {64, 3}) check_thread_independence(Layer(batch, 16, 16, channels, 48, dtype), loop);
}

// The ways that weights take to the products: packed, within the cache and past it; read as they lie. And that of their gradients
// into memory: from tasks that own a block, or that own an input parity and images of one.
void check_weights() {
  const bool gathers = active_isa() != Isa::baseline;
  const auto check = [](Layer layer, bool packed) {
    for (Conv4x4s2Loop loop : {Conv4x4s2Loop::down, Conv4x4s2Loop::up})
      for (bool channels_last : {false, true}) {
        layer.shape.weight_channels_last = channels_last;
        expect((packed_bytes(layer.shape, loop) > 0) == packed, "weights are packed", packed ? "yes" : "no");
        check_loop(layer, loop, ConvOperand::Mode::plain, Activation::identity, 2);
      }
  };
  check(Layer(2, 4, 6, 144, 144), !gathers);   // with AVX-512 half a panel at the end
  check(Layer(4, 96, 64, 32, 64), true);       // several blocks
  check(Layer(3, 8, 8, 160, 192), !gathers);   // several blocks of outputs, chunks of inputs
  for (Layer layer : {Layer(2, 6, 4, 256, 400), Layer(3, 7, 5, 208, 144), Layer(5, 48, 40, 32, 80)})
    for (bool channels_last : {false, true}) {
      layer.shape.weight_channels_last = channels_last;
      check_weight_gradient(layer, ConvOperand::Mode::plain, ConvOperand::Mode::plain, 2);
    }
}

// bfloat16 results of operands that were bfloat16 before: no more than twice the error of rounding the exact result.
void check_rounding() {
  if (active_isa() < Isa::avx512_bf16) return;
  Layer layer(32, 12, 12, 48, 64, ConvDType::bfloat16);
  const Conv4x4s2Shape& s = layer.shape;
  const int64_t large_size = layer.large_pixels * s.large_channels, small_size = layer.small_pixels * s.small_channels;
  Storage large(s.dtype, random_floats(large_size)), small(s.dtype, random_floats(small_size));
  const Floats large_values = large.values(), small_values = small.values();
  layer.weight = Storage(s.dtype, random_floats(static_cast<int64_t>(layer.weight.size()))).values();
  Doubles down(small_size), up(large_size), gradient(layer.weight.size());
  for_products(s, [&](int64_t l, int64_t k, int64_t w) {
    down[k] += double(large_values[l]) * layer.weight[w];
    up[l] += double(small_values[k]) * layer.weight[w];
    gradient[w] += double(large_values[l]) * small_values[k];
  });
  const auto check = [](const Floats& got, const Doubles& exact, const char* what) {
    double error = 0, rounding = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
      error += std::pow(got[i] - exact[i], 2);
      rounding += std::pow(round_to_bfloat16(static_cast<float>(exact[i])) - exact[i], 2);
    }
    char detail[60];
    std::snprintf(detail, sizeof detail, "%.2f times that of rounding the result", std::sqrt(error / rounding));
    expect(error <= 4 * rounding, what, detail);
  };
  ConvOperand x, z;
  x.data = large.data();
  z.data = small.data();
  Storage down_out(s.dtype, down.size()), up_out(s.dtype, up.size());
  ConvEpilogue e;
  e.out = down_out.data();
  layer.run(Conv4x4s2Loop::down, x, e, 1);
  check(down_out.values(), down, "error of down");
  e.out = up_out.data();
  layer.run(Conv4x4s2Loop::up, z, e, 1);
  check(up_out.values(), up, "error of up");
  Floats found(gradient.size());
  AlignedBuffer workspace(workspace_bytes(s, Conv4x4s2Loop::weight_gradient, 1));
  weight_gradient(s, x, z, {found.data()}, workspace.data, 1);
  check(found, gradient, "error of weight gradient");
}

void run_all() {
  parallel_runner = run_on_threads;
  // small sides 2 to 9, 16, odd large sides, channel counts with partial panels, chunks and blocks
  const std::vector<Layer> layers = {{3, 8, 8, 16, 32},  {2, 4, 6, 32, 16},   {2, 5, 7, 16, 16},  {1, 10, 12, 16, 16}, {5, 14, 14, 16, 48},
                          {2, 16, 18, 80, 16}, {2, 32, 32, 16, 16}, {1, 8, 8, 144, 80}, {20, 8, 8, 16, 16},  {1, 128, 96, 16, 16},
                          {3, 129, 97, 16, 32}, {70, 16, 18, 16, 80}, {40, 16, 24, 16, 80},
                          {2, 8, 6, 32, 96},  {1, 16, 24, 48, 16}, {9, 8, 8, 16, 16},  // two tasks by outputs, rows, images
                          {3, 8, 8, 3, 64},   {2, 14, 14, 1, 16},  {2, 7, 9, 3, 32},    {18, 4, 6, 2, 80},   {1, 96, 128, 4, 64}};
  check_all(layers, {layers[0], layers[12]}, ConvDType::float32);

  constexpr ConvDType mixed = ConvDType::mixed;
  const std::vector<Layer> mixed_layers = {{3, 8, 8, 16, 32, mixed},   {2, 5, 7, 16, 16, mixed},  {5, 14, 14, 16, 48, mixed},
                                           {1, 8, 8, 144, 80, mixed},  {40, 16, 24, 16, 80, mixed}, {3, 8, 8, 3, 64, mixed},
                                           {2, 7, 9, 1, 32, mixed}};
  check_all(mixed_layers, {mixed_layers[0], mixed_layers[5]}, mixed);

  constexpr ConvDType half = ConvDType::bfloat16;
  const bool supported = active_isa() >= Isa::avx512_bf16;
  expect(conv4x4s2_supported(Layer(16, 8, 8, 32, 32, half).shape) == supported, "bfloat16 supported", "");
  expect(!conv4x4s2_supported(Layer(15, 8, 8, 32, 32, half).shape), "few images not supported", "");
  if (!supported) return;
  // partial groups of images, odd widths, half lines of channels, several strips, splits and blocks of the weight
  const std::vector<Layer> half_layers = {{16, 4, 6, 32, 16, half},  {19, 5, 7, 16, 48, half},  {33, 8, 8, 80, 144, half},
                                          {17, 32, 34, 64, 32, half}, {40, 18, 14, 48, 160, half}, {16, 64, 6, 16, 16, half},
                                          {3, 8, 8, 3, 64, half},     {2, 7, 9, 1, 32, half},      {2, 6, 4, 4, 16, half}};
  check_all(half_layers, {half_layers[1], half_layers[6]}, half);
  direct_bfloat16 = active_isa() == Isa::avx512_bf16;
  if (direct_bfloat16) check_all({half_layers.begin(), half_layers.begin() + 6}, {half_layers[1]}, half);
  direct_bfloat16 = false;
}

}  // namespace

// The instruction set is chosen once a process, so each is tested in a child: the one that FASTGAN_CPU_ISA names, or all.
int main() {
  bool ok = true, any = false;
  const char* only = std::getenv("FASTGAN_CPU_ISA");
  for (int i = 0; i < kIsaCount; ++i) {
    if (!isa_available(static_cast<Isa>(i)) || (only != nullptr && std::strcmp(only, isa_name(static_cast<Isa>(i))) != 0)) continue;
    any = true;
    const pid_t child = fork();
    if (child == 0) {
      setenv("FASTGAN_CPU_ISA", isa_name(static_cast<Isa>(i)), 1);
      run_all();
      check_weights();
      check_rounding();
      std::fflush(stdout);
      _exit(failures == 0 ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    ok = ok && status == 0;
    std::printf("%s: %s\n", isa_name(static_cast<Isa>(i)), status == 0 ? "ok" : "FAILED");
    std::fflush(stdout);
  }
  if (!any) return 77;  // not on this machine
  return ok ? 0 : 1;
}
