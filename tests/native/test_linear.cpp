// linear kernels against sums in double, on the instruction set that FASTGAN_CPU_ISA names: whole and partial vectors, panels and
// blocks, with and without batch norm, the noise of batch_norm_act_noise, and the same results for every number of threads.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "../../csrc/cpu/linear.h"
#include "testing.h"

using namespace fastgan;
using namespace fastgan::cpu;

namespace {

constexpr float kSlope = 0.2f, kStd = 0.5f;
constexpr uint64_t kSeed = 0x123456789abcdefull;
constexpr double kEps = 1e-5;

struct Case {
  LinearShape shape;
  bool norm, by_batch;
  Activation activation;
  bool noise;
};

void expect_close(const Case& c, const char* what, const Floats& got, const Doubles& want, double tolerance) {
  double largest = 1e-30, worst = 0;
  for (double w : want) largest = std::max(largest, std::abs(w));
  for (size_t i = 0; i < want.size(); ++i) {
    const double difference = std::abs(static_cast<double>(got[i]) - want[i]);
    worst = difference <= worst ? worst : difference;  // NaN is the worst
  }
  if (got.size() == want.size() && worst <= tolerance * largest) return;
  std::printf("FAILED [%s] %s: off by %g of %g; rows %d, inputs %d, outputs %d, norm %d %d, activation %d\n",
              isa_name(active_isa()), what, worst, largest, static_cast<int>(c.shape.rows), static_cast<int>(c.shape.inputs),
              static_cast<int>(c.shape.outputs), c.norm, c.by_batch, static_cast<int>(c.activation));
  ++failures;
}

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED [%s] %s\n", isa_name(active_isa()), what);
  ++failures;
}

// by_feature[features][linear_stride(rows)] -> [rows][features]; past the rows there have to be zeros.
Floats rows_of(const Floats& by_feature, int64_t rows, int64_t features) {
  const int64_t stride = linear_stride(rows);
  Floats by_row(static_cast<size_t>(rows * features));
  bool zeros = true;
  for (int64_t f = 0; f < features; ++f)
    for (int64_t n = 0; n < stride; ++n) {
      const float x = by_feature[static_cast<size_t>(f * stride + n)];
      if (n < rows) by_row[static_cast<size_t>(n * features + f)] = x;
      else zeros = zeros && x == 0;
    }
  expect(zeros, "zeros past the rows");
  return by_row;
}

Floats by_feature(const Floats& by_row, int64_t rows, int64_t features) {
  const int64_t stride = linear_stride(rows);
  Floats result(static_cast<size_t>(features * stride));
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t f = 0; f < features; ++f) result[static_cast<size_t>(f * stride + n)] = by_row[static_cast<size_t>(n * features + f)];
  return result;
}

Floats uninitialised(int64_t n) { return Floats(static_cast<size_t>(n), NAN); }

// The noise of [rows, features]: what batch_norm_act_noise adds to [rows * blocks, 64], whose rows are a chunk of normals each, cut to the
// features of the block. Blocks are even in number above one and begin at multiples of 8.
Floats noise_of(int64_t rows, int64_t features) {
  const int64_t least = (features + 63) / 64, blocks = least > 1 ? least + least % 2 : least, eights = (features + 7) / 8;
  const Floats zeros(static_cast<size_t>(rows * blocks * 64));
  Floats mean(64), var(64, 1.0f), invstd(64), chunks(zeros), noise(static_cast<size_t>(rows * features));
  batch_norm_act_noise_kernels<float>().forward({rows * blocks, 64, 1}, zeros.data(), nullptr, nullptr, 0.0, false,
                                                {Activation::identity, 0.0}, {kStd, kSeed}, mean.data(), var.data(), invstd.data(),
                                                chunks.data());
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * eights / blocks * 8, end = std::min((block + 1) * eights / blocks * 8, features);
      for (int64_t f = begin; f < end; ++f)
        noise[static_cast<size_t>(n * features + f)] = chunks[static_cast<size_t>((n * blocks + block) * 64 + f - begin)];
    }
  return noise;
}

double activated(Activation a, double z) {
  return a == Activation::leaky_relu ? (z > 0 ? z : z * kSlope) : a == Activation::tanh ? std::tanh(z) : z;
}
double derivative(Activation a, double z) {
  return a == Activation::leaky_relu ? (z > 0 ? 1 : kSlope) : a == Activation::tanh ? 1 - std::tanh(z) * std::tanh(z) : 1;
}

// One layer in double: products, statistics, normalised values; [rows][features].
struct Exact {
  Doubles y, z, mean, var, scale;

  Exact(const Case& c, const Doubles& products, int64_t features, const Floats& gamma, const Floats& beta, const Floats& running)
      : y(products), z(products), mean(static_cast<size_t>(features)), var(mean), scale(mean.size(), 1.0) {
    const int64_t rows = c.shape.rows;
    if (!c.norm) return;
    for (int64_t f = 0; f < features; ++f) {
      const auto at = [&](int64_t n) { return static_cast<size_t>(n * features + f); };
      double m = running[static_cast<size_t>(f)], v = 1 + std::abs(m), count = static_cast<double>(rows);
      if (c.by_batch) {
        m = v = 0;
        for (int64_t n = 0; n < rows; ++n) m += y[at(n)] / count;
        for (int64_t n = 0; n < rows; ++n) v += (y[at(n)] - m) * (y[at(n)] - m) / count;
      }
      const auto i = static_cast<size_t>(f);
      mean[i] = m, var[i] = v, scale[i] = static_cast<double>(gamma[i]) / std::sqrt(v + kEps);
      for (int64_t n = 0; n < rows; ++n) z[at(n)] = (y[at(n)] - m) * scale[i] + static_cast<double>(beta[i]);
    }
  }
};

void check(const Case& c) {
  const auto [rows, inputs, outputs] = c.shape;
  const LinearKernels& kernels = linear_kernels();
  const GaussianNoise noise{c.noise ? kStd : 0.0, kSeed};
  const ActivationSpec activation{c.activation, kSlope};
  const Floats input = random_floats(rows * inputs), weight = random_floats(outputs * inputs), bias = random_floats(outputs);
  const Floats gamma = random_floats(outputs, 0.5f, 1.5f), beta = random_floats(outputs), running = random_floats(outputs);
  const Floats gradient = random_floats(rows * outputs), held = random_floats(outputs * inputs);
  const Floats input_noise = noise_of(rows, inputs), output_noise = noise_of(rows, outputs);
  const int64_t row_stride = linear_stride(rows), input_stride = linear_stride(inputs);

  Doubles x(input.begin(), input.end());
  if (c.noise)
    for (size_t i = 0; i < x.size(); ++i) x[i] += input_noise[i];
  Doubles products(static_cast<size_t>(rows * outputs));
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = bias[static_cast<size_t>(o)];
      for (int64_t k = 0; k < inputs; ++k)
        sum += x[static_cast<size_t>(n * inputs + k)] * static_cast<double>(weight[static_cast<size_t>(o * inputs + k)]);
      products[static_cast<size_t>(n * outputs + o)] = sum;
    }
  const Exact exact(c, products, outputs, gamma, beta, running);
  Doubles output(products.size()), dz(products.size()), dy(products.size());
  Doubles sum_dz(static_cast<size_t>(outputs)), sum_dz_xhat(sum_dz);
  for (size_t i = 0; i < output.size(); ++i) {
    const size_t f = i % static_cast<size_t>(outputs);
    output[i] = activated(c.activation, exact.z[i]) + static_cast<double>(c.noise ? output_noise[i] : 0.0f);
    dz[i] = static_cast<double>(gradient[i]) * derivative(c.activation, exact.z[i]);
    sum_dz[f] += dz[i];
    sum_dz_xhat[f] += dz[i] * (exact.y[i] - exact.mean[f]) / std::sqrt(exact.var[f] + kEps);
  }
  for (size_t i = 0; i < output.size(); ++i) {
    const size_t f = i % static_cast<size_t>(outputs);
    const double count = static_cast<double>(rows), xhat = (exact.y[i] - exact.mean[f]) / std::sqrt(exact.var[f] + kEps);
    dy[i] = c.norm && c.by_batch ? exact.scale[f] * (dz[i] - sum_dz[f] / count - xhat * sum_dz_xhat[f] / count) : exact.scale[f] * dz[i];
  }

  Floats first;
  for (runner_threads = 1; runner_threads <= 3; ++runner_threads) {
    Floats read = uninitialised(inputs * row_stride), kept = uninitialised(rows * input_stride);
    kernels.read(rows, inputs, input.data(), noise, read.data(), kept.data());
    Floats raw = uninitialised(outputs * row_stride), out(raw), by_row = uninitialised(rows * outputs);
    Floats mean(running), var(static_cast<size_t>(outputs)), invstd(var);
    for (size_t f = 0; f < var.size(); ++f) var[f] = 1 + std::abs(running[f]);
    const LinearNorm norm{c.norm, c.by_batch, kEps, gamma.data(), beta.data(), mean.data(), var.data(), invstd.data()};
    kernels.forward(c.shape, weight.data(), read.data(),
                    {bias.data(), norm, activation, noise, raw.data(), out.data(), by_row.data(), outputs});

    Floats from_rows = uninitialised(outputs * row_stride), dz_sums(static_cast<size_t>(outputs)), xhat_sums(dz_sums);
    LinearBackward backward{norm, activation, raw.data(), dz_sums.data(), xhat_sums.data(), from_rows.data()};
    if (!c.norm && c.activation == Activation::identity) backward.raw = nullptr;
    kernels.read_gradient(rows, outputs, gradient.data(), backward);

    // The same as the layer below of one whose products have the gradient g and whose weight is the unit matrix.
    Floats unit(static_cast<size_t>(outputs * outputs)), from_layer = uninitialised(outputs * row_stride);
    for (int64_t o = 0; o < outputs; ++o) unit[static_cast<size_t>(o * outputs + o)] = 1;
    const Floats above = by_feature(gradient, rows, outputs);
    Floats again_dz(dz_sums.size()), again_xhat(dz_sums.size());
    LinearBackward below = backward;
    below.gradient = from_layer.data(), below.sum_dz = again_dz.data(), below.sum_dz_xhat = again_xhat.data();
    kernels.input_gradient({rows, outputs, outputs}, unit.data(), above.data(), below, nullptr);
    expect(rows_of(from_layer, rows, outputs) == rows_of(from_rows, rows, outputs), "the same gradient from above and from rows");
    expect(again_dz == dz_sums, "the same sums");

    Floats dx = uninitialised(rows * inputs), scratch = uninitialised(inputs * row_stride);
    LinearBackward bottom{};
    bottom.gradient = scratch.data();
    kernels.input_gradient(c.shape, weight.data(), from_rows.data(), bottom, dx.data());
    Floats dw = uninitialised(outputs * inputs), added(held);
    kernels.weight_gradient(c.shape, from_rows.data(), kept.data(), dw.data(), false);
    kernels.weight_gradient(c.shape, from_rows.data(), kept.data(), added.data(), true);

    Floats all = by_row;
    for (const Floats* each : {&dx, &dw, &added, &mean, &invstd, &dz_sums, &xhat_sums}) all.insert(all.end(), each->begin(), each->end());
    if (runner_threads > 1) {
      expect_the_same_for_every_number_of_threads(all == first);
      continue;
    }
    first = all;
    const double depth = 1e-7 * static_cast<double>(inputs + rows + outputs), statistics = c.norm ? 4e-5 : 0;
    expect(rows_of(out, rows, outputs) == by_row, "the output by feature and by row");
    bool same = true;
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t k = 0; k < inputs; ++k)
        same = same && kept[static_cast<size_t>(n * input_stride + k)] == read[static_cast<size_t>(k * row_stride + n)];
    expect(same, "the input by feature and by row");
    expect_close(c, "read", rows_of(read, rows, inputs), x, 1e-6);
    expect_close(c, "products", rows_of(raw, rows, outputs), products, depth + 1e-6);
    expect_close(c, "output", by_row, output, depth + statistics + 1e-6);
    if (c.norm) {
      expect_close(c, "mean", mean, exact.mean, depth + 1e-5);
      expect_close(c, "sum of dz * xhat", xhat_sums, sum_dz_xhat, depth + statistics);
    }
    expect_close(c, "sum of dz", dz_sums, sum_dz, depth + statistics + 1e-6);
    expect_close(c, "gradient of the products", rows_of(from_rows, rows, outputs), dy, depth + statistics + 1e-6);
    Doubles want_dx(x.size()), want_dw(dw.size()), want_added(held.begin(), held.end());
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t o = 0; o < outputs; ++o) {
        const double g = dy[static_cast<size_t>(n * outputs + o)];
        for (int64_t k = 0; k < inputs; ++k) {
          want_dx[static_cast<size_t>(n * inputs + k)] += g * static_cast<double>(weight[static_cast<size_t>(o * inputs + k)]);
          want_dw[static_cast<size_t>(o * inputs + k)] += g * x[static_cast<size_t>(n * inputs + k)];
        }
      }
    for (size_t i = 0; i < want_dw.size(); ++i) want_added[i] += want_dw[i];
    expect_close(c, "gradient of the input", dx, want_dx, depth + statistics + 1e-6);
    expect_close(c, "gradient of the weight", dw, want_dw, depth + statistics + 1e-6);
    expect_close(c, "gradient added to the weight's", added, want_added, depth + statistics + 1e-6);
  }
}

void check_all() {
  const LinearShape shapes[] = {{7, 2, 1},     {5, 3, 7},      {16, 16, 16},   {24, 40, 8},   {37, 250, 10}, {56, 56, 56},
                                {100, 100, 64}, {100, 300, 130}, {200, 70, 65}, {130, 48, 500}, {300, 17, 33}, {53, 784, 100}};
  for (const LinearShape& shape : shapes) {
    check({shape, true, true, Activation::leaky_relu, true});
    check({shape, true, false, Activation::tanh, false});
    check({shape, false, false, Activation::leaky_relu, false});
    check({shape, false, false, Activation::identity, true});
  }
}

}  // namespace

int main() { return run_checks(check_all); }
