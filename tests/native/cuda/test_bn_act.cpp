// bn_act kernels against a float64 reference: both layouts, all storage types, odd sizes, misaligned pointers.
#include "../../../csrc/cuda/bn_act.h"

#include "testing.h"

using namespace fastgan;
using namespace fastgan::cuda;
using namespace fastgan::cuda::testing;

namespace {

struct Case {
  BnActShape shape;
  DataType type;
  ActivationSpec activation;
  bool misaligned;
  double mean;

  std::string name() const {
    return std::string("bn_act [") + std::to_string(shape.outer) + ", " + std::to_string(shape.channels) + ", " +
           std::to_string(shape.inner) + "] " + name_of(type) + " activation " +
           std::to_string(static_cast<int>(activation.kind)) + (misaligned ? " misaligned" : "");
  }
  int64_t size() const { return shape.outer * shape.channels * shape.inner; }
  int64_t channel_of(int64_t i) const { return i / shape.inner % shape.channels; }
};

StatisticsTiles tiles_in(Buffer& buffer, int64_t tiles, int64_t channels) {
  return {tiles, 1, buffer.floats(), buffer.floats() + tiles * channels, buffer.floats() + 2 * tiles * channels};
}

void training_case(const Case& c) {
  const int64_t channels = c.shape.channels, size = c.size(), tiles = bn_act_tiles(c.shape);
  const Values x = random_values(size, c.type, c.mean), g = random_values(size, c.type);
  const Values weight = random_values(channels, DataType::float32, 1.0, 0.3);
  const Values bias = random_values(channels, DataType::float32, 0.0, 0.5);
  const Values running_mean = random_values(channels, DataType::float32), running_var(channels, 0.75);
  const bool affine = random_integer(0, 3) != 0, cumulative = random_integer(0, 1) != 0;
  const DeviceVector<int64_t> batches_tracked{4};

  std::vector<Buffer> outputs;
  under_two_schedules(c.name(), [&] {
    const Buffer input(c.type, x, c.misaligned), grad_output(c.type, g, c.misaligned);
    const Buffer w(DataType::float32, weight), b(DataType::float32, bias);
    Buffer partial(DataType::float32, tiles * (2 * channels + 1));
    // mean, invstd, scale, shift, sum_dz, sum_dz_xhat, b, c
    Buffer vectors(DataType::float32, 8 * channels);
    Buffer running(DataType::float32, running_mean), running_variance(DataType::float32, running_var);
    Buffer output(c.type, size, c.misaligned), grad_input(c.type, size, c.misaligned);
    const auto vector = [&](int i) { return vectors.floats() + i * channels; };

    BatchStatisticsArgs statistics{c.shape, c.type, input.data(), tiles_in(partial, tiles, channels)};
    expect_success(c.name(), batch_statistics_launch(statistics, nullptr));
    BatchNormForwardArgs forward;
    forward.channels = channels;
    forward.tiles = statistics.tiles;
    forward.count = static_cast<double>(c.shape.outer * c.shape.inner);
    if (affine) {
      forward.weight = static_cast<const float*>(w.data());
      forward.bias = static_cast<const float*>(b.data());
    }
    forward.batches_tracked = cumulative ? batches_tracked.data() : nullptr;
    forward.running_mean = running.floats();
    forward.running_var = running_variance.floats();
    forward.mean = vector(0), forward.invstd = vector(1), forward.scale = vector(2), forward.shift = vector(3);
    expect_success(c.name(), batch_norm_forward_launch(forward, nullptr));
    ScaleShiftActArgs apply{c.shape, c.type, input.data(), vector(2), vector(3), c.activation, output.data()};
    expect_success(c.name(), scale_shift_act_launch(apply, nullptr));

    BnActBackwardArgs backward;
    backward.shape = c.shape, backward.type = c.type;
    backward.grad_output = grad_output.data(), backward.input = input.data();
    backward.weight = forward.weight, backward.bias = forward.bias;
    backward.mean = vector(0), backward.invstd = vector(1);
    backward.activation = c.activation;
    backward.tiles = {tiles, partial.floats(), partial.floats() + tiles * channels};
    backward.b = vector(6), backward.c = vector(7);
    backward.grad_input = grad_input.data();
    expect_success(c.name(), bn_act_backward_reduce_launch(backward, nullptr));
    BatchNormBackwardArgs merge;
    merge.channels = channels, merge.tiles = backward.tiles;
    merge.count = static_cast<double>(c.shape.outer * c.shape.inner);
    merge.weight = forward.weight, merge.mean = vector(0), merge.invstd = vector(1);
    merge.sum_dz = vector(4), merge.sum_dz_xhat = vector(5);
    merge.b = vector(6), merge.c = vector(7);
    expect_success(c.name(), batch_norm_backward_launch(merge, nullptr));
    expect_success(c.name(), bn_act_backward_apply_launch(backward, nullptr));
    outputs = {vectors, running, running_variance, output, grad_input};
    return outputs;
  });

  const double n = static_cast<double>(c.shape.outer * c.shape.inner), eps = 1e-5f;
  const double factor = cumulative ? 1.0 / static_cast<double>(batches_tracked[0]) : double{0.1f};
  Values mean(channels), var(channels), want_running_mean(channels), want_running_var(channels);
  for (int64_t i = 0; i < size; ++i) mean[c.channel_of(i)] += x[i] / n;
  for (int64_t i = 0; i < size; ++i) var[c.channel_of(i)] += std::pow(x[i] - mean[c.channel_of(i)], 2) / n;
  for (int64_t k = 0; k < channels; ++k) {
    want_running_mean[k] = (1 - factor) * running_mean[k] + factor * mean[k];
    want_running_var[k] = (1 - factor) * running_var[k] + factor * var[k] * n / (n - 1);
  }
  Values want(size), dz(size), want_grad(size), sum_dz(channels), sum_dz_xhat(channels), xhat(size);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t k = c.channel_of(i);
    xhat[i] = (x[i] - mean[k]) / std::sqrt(var[k] + eps);
    const double z = affine ? xhat[i] * weight[k] + bias[k] : xhat[i];
    want[i] = act(c.activation, z);
    dz[i] = g[i] * act_derivative(c.activation, z);
    sum_dz[k] += dz[i];
    sum_dz_xhat[k] += dz[i] * xhat[i];
  }
  for (int64_t i = 0; i < size; ++i) {
    const int64_t k = c.channel_of(i);
    want_grad[i] =
        (affine ? weight[k] : 1.0) / std::sqrt(var[k] + eps) * (dz[i] - sum_dz[k] / n - xhat[i] * sum_dz_xhat[k] / n);
  }
  // A kink of the activation may fall on the other side of 0 by rounding; the inputs are random, so it does not.
  const double exact = 3e-6 * (1 + std::abs(c.mean)), stored = exact + rounding_of(c.type);
  const Values vectors = outputs[0].values();
  const auto vector = [&](int i) {
    return Values(vectors.begin() + i * channels, vectors.begin() + (i + 1) * channels);
  };
  expect_close(c.name() + " mean", vector(0), mean, exact, 1.0);  // of the deviation: a mean near 0 is a difference
  expect_close(c.name() + " running mean", outputs[1].values(), want_running_mean, exact);
  expect_close(c.name() + " running var", outputs[2].values(), want_running_var, exact);
  expect_close(c.name() + " output", outputs[3].values(), want, stored);
  expect_close(c.name() + " sum dz", vector(4), sum_dz, 10 * exact);
  expect_close(c.name() + " sum dz xhat", vector(5), sum_dz_xhat, 10 * exact);
  expect_close(c.name() + " grad input", outputs[4].values(), want_grad, 3 * stored);
}

// Evaluation mode's coefficients, and activation without batch norm from its output.
void inference_case(const Case& c) {
  const int64_t channels = c.shape.channels, size = c.size(), tiles = bn_act_tiles(c.shape);
  const Values mean = random_values(channels, DataType::float32), var(channels, 0.5);
  const Values y = random_values(size, c.type, 0.0, 0.4), g = random_values(size, c.type);
  std::vector<Buffer> outputs;
  under_two_schedules(c.name(), [&] {
    Buffer running_mean(DataType::float32, mean), running_var(DataType::float32, var);
    Buffer vectors(DataType::float32, 5 * channels), partial(DataType::float32, tiles * channels);
    Buffer grad_output(c.type, g, c.misaligned), output(c.type, y, c.misaligned), grad(c.type, size, c.misaligned);
    BatchNormForwardArgs inference;
    inference.channels = channels;
    inference.running_mean = running_mean.floats(), inference.running_var = running_var.floats();
    inference.mean = vectors.floats(), inference.invstd = vectors.floats() + channels;
    inference.scale = vectors.floats() + 2 * channels, inference.shift = vectors.floats() + 3 * channels;
    expect_success(c.name(), batch_norm_inference_launch(inference, nullptr));
    ActBackwardArgs backward{c.shape,
                             c.type,
                             grad_output.data(),
                             output.data(),
                             c.activation,
                             grad.data(),
                             {tiles, partial.floats(), nullptr}};
    expect_success(c.name(), act_backward_launch(backward, nullptr));
    BatchNormBackwardArgs merge;
    merge.channels = channels, merge.tiles = backward.tiles, merge.sum_dz = vectors.floats() + 4 * channels;
    expect_success(c.name(), batch_norm_backward_launch(merge, nullptr));
    outputs = {vectors, grad};
    return outputs;
  });
  Values want_shift(channels), sums(channels), want(size);
  for (int64_t k = 0; k < channels; ++k) want_shift[k] = -mean[k] / std::sqrt(var[k] + double{1e-5f});
  for (int64_t i = 0; i < size; ++i) {
    double derivative = 1;
    if (c.activation.kind == Activation::relu) derivative = y[i] > 0;
    if (c.activation.kind == Activation::leaky_relu) derivative = y[i] > 0 ? 1 : double{c.activation.negative_slope};
    if (c.activation.kind == Activation::tanh) derivative = 1 - y[i] * y[i];
    if (c.activation.kind == Activation::sigmoid) derivative = y[i] * (1 - y[i]);
    want[i] = g[i] * derivative;
    sums[c.channel_of(i)] += want[i];
  }
  const Values vectors = outputs[0].values();
  const auto vector = [&](int i) {
    return Values(vectors.begin() + i * channels, vectors.begin() + (i + 1) * channels);
  };
  expect_close(c.name() + " inference shift", vector(3), want_shift, 1e-6);
  expect_close(c.name() + " activation grad", outputs[1].values(), want, 1e-6 + rounding_of(c.type));
  expect_close(c.name() + " activation bias grad", vector(4), sums, 3e-5);
}

// Tiles of channels_last statistics, each against float64, where the first row of every tile, the kernel's pivot, is
// `odd` deviations away from the rest.
void statistics_case(const BnActShape& shape, DataType type, double mean, double deviation, double odd) {
  const std::string name = "statistics [" + std::to_string(shape.outer) + ", " + std::to_string(shape.channels) + "] " +
                           name_of(type) + " mean " + std::to_string(mean) + " first row " + std::to_string(odd);
  const int64_t channels = shape.channels, tiles = bn_act_tiles(shape), rows = (shape.outer + tiles - 1) / tiles;
  Values x = random_values(shape.outer * channels, DataType::float32, mean, deviation);
  for (int64_t row = 0; row < shape.outer; row += rows) {
    for (int64_t k = 0; k < channels; ++k) x[row * channels + k] += odd * deviation;
  }
  x = Buffer(type, x).values();
  std::vector<Buffer> outputs;
  under_two_schedules(name, [&] {
    const Buffer input(type, x);
    Buffer partial(DataType::float32, tiles * (2 * channels + 1));
    BatchStatisticsArgs statistics{shape, type, input.data(), tiles_in(partial, tiles, channels)};
    expect_success(name, batch_statistics_launch(statistics, nullptr));
    outputs = {partial};
    return outputs;
  });
  const Values got = outputs[0].values();
  const double rounding = rounding_of(DataType::float32);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = std::min(tile * rows, shape.outer), last = std::min(first + rows, shape.outer);
    const auto n = static_cast<double>(last - first);
    expect_close(name + " count", {got[2 * tiles * channels + tile]}, {n}, 0);
    for (int64_t k = 0; k < channels; ++k) {
      double want_mean = 0, want_m2 = 0;
      for (int64_t row = first; row < last; ++row) want_mean += x[row * channels + k] / n;
      for (int64_t row = first; row < last; ++row) want_m2 += std::pow(x[row * channels + k] - want_mean, 2);
      const double got_mean = got[tile * channels + k], got_m2 = got[(tiles + tile) * channels + k];
      expect_close(name + " mean", {got_mean}, {want_mean}, 8 * rounding,
                   std::abs(want_mean) + std::abs(odd * deviation) + deviation);
      // An odd pivot's squared deviation counts once in m2, and once a row in what cancels.
      expect_close(name + " m2", {got_m2}, {want_m2}, rounding * (odd != 0 ? 12 * n : 50));
      if (got_m2 < 0) expect_close(name + " negative m2", {got_m2}, {0.0}, 0);
    }
  }
}

// The merging kernels alone, on tiles as convolutions write them: more of them than a block reads at a time, and
// several to a count.
void merge_case(int64_t tiles, int64_t rows_per_count, int64_t channels, double mean) {
  const std::string name = "merge of " + std::to_string(tiles) + " tiles, " + std::to_string(rows_per_count) +
                           " to a count, " + std::to_string(channels) + " channels";
  const Values means = random_values(tiles * channels, DataType::float32, mean);
  Values m2 = random_values(tiles * channels, DataType::float32, 30.0), counts(tiles / rows_per_count);
  double n = 0;
  for (double& count : counts) n += (count = static_cast<double>(random_integer(0, 64))) * rows_per_count;
  std::vector<Buffer> outputs;
  under_two_schedules(name, [&] {
    Buffer first(DataType::float32, means), second(DataType::float32, m2), count(DataType::float32, counts);
    Buffer forward_out(DataType::float32, 4 * channels), backward_out(DataType::float32, 2 * channels);
    BatchNormForwardArgs forward;
    forward.channels = channels, forward.count = n;
    forward.tiles = {tiles, rows_per_count, first.floats(), second.floats(), count.floats()};
    forward.mean = forward_out.floats(), forward.invstd = forward_out.floats() + channels;
    forward.scale = forward_out.floats() + 2 * channels, forward.shift = forward_out.floats() + 3 * channels;
    expect_success(name, batch_norm_forward_launch(forward, nullptr));
    BatchNormBackwardArgs backward;
    backward.channels = channels, backward.tiles = {tiles, first.floats(), second.floats()};
    backward.sum_dz = backward_out.floats(), backward.sum_dz_xhat = backward_out.floats() + channels;
    expect_success(name, batch_norm_backward_launch(backward, nullptr));
    outputs = {forward_out, backward_out};
    return outputs;
  });
  Values want(2 * channels), want_sums(2 * channels), square(channels);
  for (int64_t i = 0; i < tiles * channels; ++i) {
    want[i % channels] += counts[i / channels / rows_per_count] * means[i] / n;
    want_sums[i % channels] += means[i];
    want_sums[channels + i % channels] += m2[i];
  }
  for (int64_t i = 0; i < tiles * channels; ++i) {
    const double deviation = means[i] - want[i % channels];
    square[i % channels] += m2[i] + counts[i / channels / rows_per_count] * deviation * deviation;
  }
  for (int64_t k = 0; k < channels; ++k) want[channels + k] = 1 / std::sqrt(square[k] / n + double{1e-5f});
  const Values got = outputs[0].values(), got_sums = outputs[1].values();
  const auto half = [&](const Values& values, int i) {
    return Values(values.begin() + i * channels, values.begin() + (i + 1) * channels);
  };
  for (int i = 0; i < 2; ++i) {
    expect_close(name + (i == 0 ? " mean" : " invstd"), half(got, i), half(want, i), 1e-6);
    expect_close(name + (i == 0 ? " sum dz" : " sum dz xhat"), half(got_sums, i), half(want_sums, i), 1e-6);
  }
}

}  // namespace

int main(int argc, char** argv) {
  int cases = 0;
  const int most = argc > 1 ? std::atoi(argv[1]) : 1000;  // fewer under slow tools
  const auto run = [&](const Case& c) {
    if (cases == most) return;
    training_case(c);
    inference_case(c);
    ++cases;
  };
  const ActivationSpec relu{Activation::relu, 0.0f};
  run({{37, 64, 1}, DataType::float32, relu, false, 100.0});  // |mean| >> deviation
  run({{2, 3, 45}, DataType::float32, relu, false, 1000.0});
  run({{700, 3, 1}, DataType::bfloat16, relu, false, 0.0});  // several tiles
  run({{3, 5, 32 * 32}, DataType::float16, relu, false, 0.0});
  run({{5, 1, 1}, DataType::float32, relu, false, 0.0});
  run({{20, 520, 1}, DataType::bfloat16, relu, false, 0.0});  // several blocks of channels
  for (int i = 0; i < 30; ++i) {
    Case c{};
    c.shape.channels = random_choice({1, 3, 8, 16, 31, 64, 100});
    c.shape.outer = random_integer(1, 9);
    c.shape.inner = random_choice({1, 4, 7, 9, 16, 49, 64});
    if (c.shape.inner == 1) c.shape.outer = random_integer(2, 200);
    if (c.shape.outer * c.shape.inner < 8) c.shape.outer = 8;  // fewer make xhat ill-conditioned
    c.type = random_choice({DataType::float32, DataType::bfloat16, DataType::float16});
    c.activation = {static_cast<Activation>(i % 5), 0.2f};
    c.misaligned = random_integer(0, 3) == 0;
    run(c);
  }
  // Several batches of rows a thread, summed and not.
  run({{9000, 512, 1}, DataType::float32, {Activation::leaky_relu, 0.2f}, false, 3.0});
  run({{40000, 3, 1}, DataType::bfloat16, relu, false, 0.0});
  run({{2100, 72, 1}, DataType::float32, {Activation::leaky_relu, 0.2f}, false, 3.0});
  run({{4, 2, 9000}, DataType::bfloat16, relu, false, 0.0});
  for (const DataType type : {DataType::float32, DataType::bfloat16}) {
    statistics_case({2500, 72, 1}, type, 0.0, 1.0, 1e3);
    statistics_case({2500, 72, 1}, type, 0.5, 1.0, 0.0);
  }
  statistics_case({17000, 260, 1}, DataType::float32, 0.0, 1.0, 1e3);
  statistics_case({2500, 72, 1}, DataType::float32, 1e4, 0.1, 0.0);
  statistics_case({2500, 72, 1}, DataType::float32, 1e4, 0.1, 1e3);
  statistics_case({1, 40, 1}, DataType::float32, 1e4, 0.1, 0.0);
  merge_case(16, 16, 5, 0.0);
  merge_case(1000, 1, 20, 1000.0);  // |mean| >> deviation
  merge_case(4160, 16, 8, 1.0);
  return report("bn_act: statistics, merge, apply, backward reduce, merge, apply, inference, act backward", cases);
}
