// conv4x4s2 kernels (main loops F, T and W, the matrix-product forms, every epilogue) against naive float64 loops: odd channel counts, odd grids, all storage types, both tiles, misaligned pointers.
#include "../../../csrc/cuda/conv4x4s2.h"

#include <optional>

#include "testing.h"

using namespace fastgan;
using namespace fastgan::cuda;
using namespace fastgan::cuda::testing;

namespace {

struct Case {
  Conv4x4Geometry g;
  DataType type;
  bool large_tile;  // by pretending that the device has one multiprocessor
  bool misaligned;  // activations one element past a 16-byte boundary
  int device_multiprocessors = 0;  // pretended, in place of what large_tile says
  bool tf32 = false;               // float32 that may be rounded to TF32

  int64_t small_size() const { return g.batch * g.small_height * g.small_width * g.small_channels; }
  int64_t large_size() const { return g.batch * g.large_height * g.large_width * g.large_channels; }
  int64_t weight_size() const { return g.small_channels * g.large_channels * 16; }
  int multiprocessors() const { return device_multiprocessors ? device_multiprocessors : large_tile ? 1 : 1000000; }
  // float32 sums, one rounding of the result.
  // In TF32 both factors of every product are rounded besides, by up to 2^-11: 8 leaves room for the worst of many sums.
  double tolerance() const { return 1e-5 + (tf32 ? 8.0 / 2048 : 2 * rounding_of(type)); }

  std::string name() const {
    return "conv4x4 batch " + std::to_string(g.batch) + " small " + std::to_string(g.small_height) + "x" +
           std::to_string(g.small_width) + "x" + std::to_string(g.small_channels) + " large " +
           std::to_string(g.large_height) + "x" + std::to_string(g.large_width) + "x" +
           std::to_string(g.large_channels) + " stride " + std::to_string(g.stride) + " " + name_of(type) +
           (tf32 ? " tf32" : "") + (large_tile ? " large tile" : "") +
           (misaligned ? " misaligned" : "");
  }
};

// Calls f(small pixel, large pixel, tap) for every product of the sums.
template <typename F>
void for_each_tap(const Conv4x4Geometry& g, const F& f) {
  const int64_t padding = g.stride == 2 ? 1 : 0;
  for (int64_t n = 0; n < g.batch; ++n) {
    for (int64_t p = 0; p < g.small_height; ++p) {
      for (int64_t q = 0; q < g.small_width; ++q) {
        for (int64_t tap = 0; tap < 16; ++tap) {
          const int64_t h = p * g.stride - padding + tap / 4, w = q * g.stride - padding + tap % 4;
          if (h < 0 || h >= g.large_height || w < 0 || w >= g.large_width) continue;
          f((n * g.small_height + p) * g.small_width + q, (n * g.large_height + h) * g.large_width + w, tap);
        }
      }
    }
  }
}

Values convolve(const Case& c, Conv4x4Direction direction, const Values& input, const Values& weight) {
  const int64_t small = c.g.small_channels, large = c.g.large_channels;
  const bool down = direction == Conv4x4Direction::down;
  Values output(down ? c.small_size() : c.large_size());
  for_each_tap(c.g, [&](int64_t small_pixel, int64_t large_pixel, int64_t tap) {
    for (int64_t k = 0; k < small; ++k) {
      for (int64_t i = 0; i < large; ++i) {
        const double w = weight[(k * large + i) * 16 + tap];
        if (down) {
          output[small_pixel * small + k] += input[large_pixel * large + i] * w;
        } else {
          output[large_pixel * large + i] += input[small_pixel * small + k] * w;
        }
      }
    }
  });
  return output;
}

// The same weight [small, large, 16] in the order of a layout.
Values in_layout(const Case& c, Conv4x4WeightLayout layout, const Values& weight) {
  if (layout == Conv4x4WeightLayout::contiguous) return weight;
  Values result(weight.size());
  const int64_t large = c.g.large_channels;
  for (int64_t k = 0; k < c.g.small_channels; ++k) {
    for (int64_t i = 0; i < large; ++i) {
      for (int64_t tap = 0; tap < 16; ++tap) result[(k * 16 + tap) * large + i] = weight[(k * large + i) * 16 + tap];
    }
  }
  return result;
}

const std::initializer_list<Conv4x4WeightLayout> kLayouts = {Conv4x4WeightLayout::contiguous,
                                                             Conv4x4WeightLayout::channels_last};

using Epilogue = Conv4x4Epilogue::Kind;

// That the loops in TF32 have run, not those in float32, which the host build has as well.
void expect_rounded(const std::string& name, const Values& got, const Values& want) {
  double worst = 0, largest = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    worst = std::max(worst, std::abs(got[i] - want[i]));
    largest = std::max(largest, std::abs(want[i]));
  }
  if (worst > 5e-6 * largest) return;
  std::printf("FAILED %s: an error of %.3g of %.3g is not that of TF32\n", name.c_str(), worst, largest);
  ++failures;
}

void check_direction(const Case& c, Conv4x4Direction direction, Epilogue epilogue_kind) {
  const bool down = direction == Conv4x4Direction::down;
  const int64_t input_size = down ? c.large_size() : c.small_size(),
                output_size = down ? c.small_size() : c.large_size();
  const int64_t input_channels = down ? c.g.large_channels : c.g.small_channels;
  const int64_t channels = down ? c.g.small_channels : c.g.large_channels;
  const std::string name = c.name() + (down ? " down" : " up") + " epilogue " +
                           std::to_string(static_cast<int>(epilogue_kind));
  const double depth =
      down ? 16.0 * static_cast<double>(input_channels) : (c.g.stride == 2 ? 4.0 : 1.0) * input_channels;
  const Values x = random_values(input_size, c.type);
  const DataType weight_type = random_integer(0, 1) == 0 ? DataType::float32 : c.type;
  const Values weight = random_values(c.weight_size(), weight_type, 0.0, 1 / std::sqrt(depth));
  const Conv4x4WeightLayout layout = random_choice(kLayouts);
  const Values bias = random_values(channels, DataType::float32, 0.5, 0.5);
  const Values y = random_values(output_size, c.type), scale = random_values(channels, DataType::float32, 1.0, 0.2);
  const Values shift = random_values(channels, DataType::float32, 0.0, 0.3);
  const Values mean = random_values(channels, DataType::float32, 0.0, 0.3), invstd(channels, 1.25);
  const ActivationSpec activation{static_cast<Activation>(random_integer(0, 4)), 0.2f};
  const bool with_bias = epilogue_kind != Epilogue::activation_backward && random_integer(0, 2) != 0;

  int64_t tiles = 0, rows_per_count = 1;
  bool taken = true;
  std::vector<Buffer> outputs;
  under_two_schedules(name, [&] {
    Buffer input(c.type, x, c.misaligned), w(weight_type, in_layout(c, layout, weight)),
        output(c.type, output_size, c.misaligned);
    Buffer bias_buffer(DataType::float32, bias), previous(c.type, y, c.misaligned);
    Buffer scales(DataType::float32, scale), shifts(DataType::float32, shift);
    Buffer means(DataType::float32, mean), invstds(DataType::float32, invstd);

    Conv4x4PackArgs pack{c.g, direction, c.type, weight_type, layout, w.data(), nullptr};
    Buffer packed(c.type, static_cast<int64_t>(conv4x4s2_packed_bytes(pack)) / size_of(c.type));
    pack.packed = packed.data();
    expect_success(name, conv4x4s2_pack_launch(&pack, 1, nullptr));

    Conv4x4Args args;
    args.geometry = c.g, args.direction = direction, args.type = c.type;
    args.multiprocessors = c.multiprocessors(), args.tf32 = c.tf32;
    args.input = input.data(), args.packed_weight = packed.data(), args.output = output.data();
    args.epilogue.kind = epilogue_kind;
    args.epilogue.activation = activation;
    if (with_bias) args.epilogue.bias = bias_buffer.floats();
    const StatisticsTiles shape = conv4x4s2_statistics_shape(args);
    tiles = shape.tiles, rows_per_count = shape.rows_per_count;
    const bool has_tiles = epilogue_kind == Epilogue::statistics || epilogue_kind == Epilogue::activation_backward;
    Buffer first(DataType::float32, has_tiles ? tiles * channels : 0), second = first;
    Buffer counts(DataType::float32, epilogue_kind == Epilogue::statistics ? tiles / rows_per_count : 0);
    args.epilogue.statistics = {tiles, rows_per_count, first.floats(), second.floats(), counts.floats()};
    args.epilogue.gradients = {tiles, first.floats(), second.floats()};
    args.epilogue.y = previous.data();
    args.epilogue.scale = scales.floats(), args.epilogue.shift = shifts.floats();
    args.epilogue.mean = means.floats(), args.epilogue.invstd = invstds.floats();
    taken = conv4x4s2_takes(args);
    if (!taken) return outputs;
    expect_success(name, conv4x4s2_launch(args, nullptr));
    outputs = {output, first, second, counts};
    return outputs;
  });

  if (!taken) return;  // float32 on a GPU

  Values want = convolve(c, direction, x, Buffer(c.type, weight).values());  // packed in the type of the activations
  double squares = 0;
  for (double value : x) squares += value * value;
  const double typical =
      std::sqrt(squares / static_cast<double>(input_size));  // of a sum, with weights ~ 1 / sqrt(depth)
  Values xhat(output_size);
  for (int64_t i = 0; i < output_size; ++i) {
    const int64_t k = i % channels;
    if (with_bias) want[i] += bias[k];
    if (epilogue_kind == Epilogue::bias_activation) want[i] = act(activation, want[i]);
    if (epilogue_kind == Epilogue::activation_backward)
      want[i] *= act_derivative(activation, scale[k] * y[i] + shift[k]);
    xhat[i] = (y[i] - mean[k]) * invstd[k];
  }
  expect_close(name, outputs[0].values(), want, c.tolerance(), typical);
  if (c.tf32 && !c.misaligned && (epilogue_kind == Epilogue::store || epilogue_kind == Epilogue::bias_activation)) {
    expect_rounded(name, outputs[0].values(), want);
  }

  const double n = static_cast<double>(output_size / channels);
  const Values first = outputs[1].values(), second = outputs[2].values(), counts = outputs[3].values();
  if (epilogue_kind == Epilogue::statistics) {
    Values got_mean(channels), got_var(channels), want_mean(channels), want_var(channels);
    double total = 0;
    for (double count : counts) total += count * static_cast<double>(rows_per_count);
    expect_close(name + " count", {total}, {n}, 0);
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t k = 0; k < channels; ++k) got_mean[k] += counts[t / rows_per_count] * first[t * channels + k] / n;
    }
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t k = 0; k < channels; ++k) {
        got_var[k] += (second[t * channels + k] +
                       counts[t / rows_per_count] * std::pow(first[t * channels + k] - got_mean[k], 2)) /
                      n;
      }
    }
    for (int64_t i = 0; i < output_size; ++i) want_mean[i % channels] += want[i] / n;
    for (int64_t i = 0; i < output_size; ++i)
      want_var[i % channels] += std::pow(want[i] - want_mean[i % channels], 2) / n;
    // The mean of a single channel may be 0 but for rounding.
    expect_close(name + " mean", got_mean, want_mean, c.tolerance(), 0.1 * typical);
    expect_close(name + " variance", got_var, want_var, 2 * c.tolerance());
  }
  if (epilogue_kind == Epilogue::activation_backward) {
    Values got_dz(channels), got_xhat(channels), want_dz(channels), want_xhat(channels), terms(channels);
    for (int64_t i = 0; i < tiles * channels; ++i) {
      got_dz[i % channels] += first[i];
      got_xhat[i % channels] += second[i];
    }
    for (int64_t i = 0; i < output_size; ++i) {
      want_dz[i % channels] += want[i];
      want_xhat[i % channels] += want[i] * xhat[i];
      terms[i % channels] += std::abs(want[i]);
    }
    const double scale = *std::max_element(terms.begin(), terms.end());
    expect_close(name + " sum dz", got_dz, want_dz, c.tolerance(), scale);
    expect_close(name + " sum dz xhat", got_xhat, want_xhat, 2 * c.tolerance(), scale);
  }
}

void check_weight_gradient(const Case& c, std::optional<DataType> wanted_type = {},
                           std::optional<Conv4x4WeightLayout> wanted_layout = {}) {
  const std::string name = c.name() + " weight gradient";
  const Values small = random_values(c.small_size(), c.type), large = random_values(c.large_size(), c.type);
  const DataType weight_type = wanted_type.value_or(random_integer(0, 1) == 0 ? DataType::float32 : c.type);
  const Conv4x4WeightLayout layout = wanted_layout.value_or(random_choice(kLayouts));
  bool taken = true;
  std::vector<Buffer> outputs;
  under_two_schedules(name, [&] {
    Buffer small_buffer(c.type, small, c.misaligned), large_buffer(c.type, large, c.misaligned);
    Buffer grad(weight_type, c.weight_size());
    Conv4x4WeightGradientArgs args;
    args.geometry = c.g, args.type = c.type, args.multiprocessors = c.multiprocessors(), args.tf32 = c.tf32;
    args.small = small_buffer.data(), args.large = large_buffer.data();
    args.weight_type = weight_type, args.weight_layout = layout, args.grad_weight = grad.data();
    taken = conv4x4s2_takes(args);
    if (!taken) return outputs;
    Buffer workspace(DataType::float32, static_cast<int64_t>(conv4x4s2_weight_gradient_workspace_bytes(args)) / 4);
    args.workspace = workspace.data();
    expect_success(name, conv4x4s2_weight_gradient_launch(args, nullptr));
    outputs = {grad};
    return outputs;
  });
  if (!taken) return;
  const int64_t k_count = c.g.small_channels, c_count = c.g.large_channels;
  Values want(c.weight_size());
  for_each_tap(c.g, [&](int64_t small_pixel, int64_t large_pixel, int64_t tap) {
    for (int64_t k = 0; k < k_count; ++k) {
      for (int64_t i = 0; i < c_count; ++i) {
        want[(k * c_count + i) * 16 + tap] += small[small_pixel * k_count + k] * large[large_pixel * c_count + i];
      }
    }
  });
  expect_close(name, outputs[0].values(), in_layout(c, layout, want), c.tolerance());
  if (c.tf32 && !c.misaligned) expect_rounded(name, outputs[0].values(), in_layout(c, layout, want));
}

Conv4x4Geometry halving(int64_t batch, int64_t large_height, int64_t large_width, int64_t small_channels,
                        int64_t large_channels) {
  return {batch, large_height / 2, large_width / 2, small_channels, large_height, large_width, large_channels, 2};
}

Conv4x4Geometry pixel(int64_t batch, int64_t small_channels, int64_t large_channels) {
  return {batch, 1, 1, small_channels, 4, 4, large_channels, 1};
}

// A weight in the order that Conv4x4Direction's main loop reads, zeros where rows are padded.
Values packed_order(const Conv4x4PackArgs& pack, const Values& weight) {
  const Conv4x4Geometry& g = pack.geometry;
  const int64_t small = g.small_channels, large = g.large_channels;
  Values packed(conv4x4s2_packed_bytes(pack) / size_of(pack.type));
  const int64_t size = static_cast<int64_t>(packed.size());
  for (int64_t k = 0; k < small; ++k) {
    for (int64_t c = 0; c < large; ++c) {
      for (int64_t tap = 0; tap < 16; ++tap) {
        const int64_t r = tap / 4, s = tap % 4;
        const int64_t phase = (r + 1) % 2 * 2 + (s + 1) % 2, phase_tap = (3 - r) / 2 * 2 + (3 - s) / 2;
        const int64_t index = pack.direction == Conv4x4Direction::down ? k * (size / small) + tap * large + c
                              : g.stride == 1 ? (tap * large + c) * (size / (16 * large)) + k
                                              : (phase * large + c) * (size / (4 * large)) + phase_tap * small + k;
        packed[index] = weight[(k * large + c) * 16 + tap];
      }
    }
  }
  return packed;
}

// More layers than one launch takes, in every combination: as expected, and each as it is when packed alone.
void check_packs(DataType type, DataType weight_type) {
  const std::string name = std::string("packs of ") + name_of(weight_type) + " for " + name_of(type);
  struct Layer {
    Conv4x4Geometry g;
    bool misaligned;
  };
  const Layer layers[] = {{halving(1, 4, 4, 72, 40), false}, {halving(1, 4, 4, 65, 3), false},
                          {pixel(1, 100, 24), false},        {halving(1, 4, 4, 16, 8), true},
                          {halving(1, 4, 4, 8, 136), false}, {pixel(1, 7, 5), false}};
  std::vector<Values> values;
  for (const Layer& layer : layers) {
    values.push_back(random_values(layer.g.small_channels * layer.g.large_channels * 16, weight_type));
  }
  std::vector<Conv4x4PackArgs> packs;
  std::vector<Values> weights;
  std::vector<Buffer> outputs;
  under_two_schedules(name, [&] {
    std::vector<Buffer> sources;
    packs.clear(), weights.clear(), outputs.clear();
    for (size_t i = 0; i < values.size(); ++i) {
      for (const Conv4x4WeightLayout layout : kLayouts) {
        for (const Conv4x4Direction direction : {Conv4x4Direction::down, Conv4x4Direction::up}) {
          const Conv4x4PackArgs pack{layers[i].g, direction, type, weight_type, layout, nullptr, nullptr};
          const Case c{layers[i].g, type, false, false};
          sources.emplace_back(weight_type, in_layout(c, layout, values[i]), layers[i].misaligned);
          outputs.emplace_back(type, static_cast<int64_t>(conv4x4s2_packed_bytes(pack)) / size_of(type));
          packs.push_back(pack), weights.push_back(values[i]);
        }
      }
    }
    for (size_t i = 0; i < packs.size(); ++i) packs[i].weight = sources[i].data(), packs[i].packed = outputs[i].data();
    expect_success(name, conv4x4s2_pack_launch(packs.data(), static_cast<int>(packs.size()), nullptr));
    for (size_t i = 0; i < packs.size(); ++i) {
      Buffer alone(type, outputs[i].size());
      packs[i].packed = alone.data();
      expect_success(name, conv4x4s2_pack_launch(&packs[i], 1, nullptr));
      if (conv4x4s2_is_packed(packs[i]) && sources[i].bytes() != alone.bytes()) {
        std::printf("FAILED %s: %zu is not packed as it is\n", name.c_str(), i);
        ++failures;
      }
      if (alone.bytes() == outputs[i].bytes()) continue;
      std::printf("FAILED %s: %zu differs from itself packed alone\n", name.c_str(), i);
      ++failures;
    }
    return outputs;
  });
  const double tolerance = rounding_of(type);
  for (size_t i = 0; i < packs.size(); ++i) {
    expect_close(name + " " + std::to_string(i), outputs[i].values(), packed_order(packs[i], weights[i]), tolerance);
  }
}

}  // namespace

int main(int argc, char** argv) {
  int cases = 0;
  const int most = argc > 1 ? std::atoi(argv[1]) : 1000;  // fewer under slow tools
  const auto run = [&](const Case& c) {
    if (cases == most) return;
    const auto epilogue = static_cast<Epilogue>(cases % 4), other_epilogue = static_cast<Epilogue>((cases + 2) % 4);
    check_direction(c, Conv4x4Direction::down, epilogue);
    if (conv4x4s2_supported(c.g, Conv4x4Direction::up)) check_direction(c, Conv4x4Direction::up, other_epilogue);
    check_weight_gradient(c);
    ++cases;
  };
  const auto f32 = DataType::float32, bf16 = DataType::bfloat16, f16 = DataType::float16;

  // Every type on the small tile: vector path with a remainder of rows, columns and depth.
  run({halving(3, 8, 12, 72, 24), bf16, false, false});
  run({halving(2, 7, 10, 40, 16), f16, false, false});
  run({halving(3, 6, 10, 72, 12), f32, false, false});
  run({halving(2, 9, 8, 68, 20), f32, false, false});
  // Large tile: several tiles in both directions.
  run({halving(3, 16, 14, 136, 72), bf16, true, false});
  run({halving(2, 16, 18, 72, 132), f32, true, false});
  run({halving(5, 11, 13, 88, 72), f16, true, false});
  // Pictures: 1 and 3 channels, and channel counts that are no multiple of a vector.
  run({halving(2, 28, 28, 16, 1), bf16, false, false});
  run({halving(1, 32, 32, 8, 3), f32, false, false});
  run({halving(2, 14, 14, 100, 3), f32, false, false});
  run({halving(3, 6, 6, 3, 100), bf16, false, false});
  run({halving(4, 4, 4, 1, 5), f16, false, false});
  run({halving(1, 2, 2, 1, 1), f32, false, false});
  run({halving(1, 3, 3, 7, 9), f32, false, false});
  // k4 s1 p0: matrix products to and from 1x1, and a larger stride-1 convolution.
  run({pixel(5, 100, 24), bf16, false, false});
  run({pixel(70, 8, 8), f32, false, false});
  run({pixel(3, 1, 72), f16, false, false});
  run({pixel(130, 96, 16), bf16, true, false});
  run({pixel(4, 33, 3), f32, false, false});
  run({{2, 3, 5, 24, 6, 8, 16, 1}, bf16, false, false});
  // Misaligned pointers take the element path.
  run({halving(2, 6, 4, 16, 8), bf16, false, true});
  run({halving(2, 6, 4, 16, 8), f32, false, true});
  for (int i = 0; i < 12; ++i) {
    Case c{};
    const int64_t channels[] = {1, 3, 4, 8, 16, 24, 31, 64, 100};
    c.g = random_integer(0, 4) == 0
              ? pixel(random_integer(1, 40), channels[random_integer(0, 8)], channels[random_integer(0, 6)])
              : halving(random_integer(1, 4), random_integer(2, 14), random_integer(2, 14),
                        channels[random_integer(0, 8)], channels[random_integer(0, 7)]);
    c.type = random_choice({f32, bf16, f16});
    c.large_tile = random_integer(0, 3) == 0;
    run(c);
  }

#if !defined(FASTGAN_CUDA_HOST)
  // Channels in 64s: Hopper's own loops where the device has them, on grids that boxes of 128 and 64
  // pixels fit and, at the beginning, on others.
  for (const Case& c :
       {Case{halving(3, 16, 14, 128, 64), bf16, true, false}, Case{halving(2, 11, 17, 192, 128), f16, true, false},
        Case{halving(3, 16, 16, 128, 64), bf16, true, false}, Case{halving(9, 8, 8, 256, 64), f16, true, false},
        Case{halving(2, 32, 8, 192, 128), bf16, false, false}, Case{halving(9, 8, 9, 128, 192), f16, false, false},
        Case{halving(4, 16, 16, 128, 128), bf16, false, false, 3}, Case{halving(17, 8, 8, 128, 64), bf16, false, false, 20},
        Case{pixel(70, 128, 64), bf16, false, false}, Case{pixel(250, 128, 64), f16, true, false}}) {
    if (cases == most) break;
    for (const Epilogue epilogue : {Epilogue::store, Epilogue::statistics, Epilogue::bias_activation, Epilogue::activation_backward}) {
      check_direction(c, Conv4x4Direction::down, epilogue);
      check_direction(c, Conv4x4Direction::up, epilogue);
    }
    check_weight_gradient(c);
    ++cases;
  }
  // Down and up in TF32 too, of channels in 32s.
  for (const Case& c :
       {Case{halving(3, 16, 16, 128, 64), f32, true, false, 0, true}, Case{halving(9, 8, 8, 256, 32), f32, false, false, 0, true},
        Case{halving(2, 32, 8, 96, 160), f32, false, false, 3, true}, Case{halving(9, 8, 9, 128, 192), f32, false, false, 0, true},
        Case{pixel(250, 128, 64), f32, true, false, 0, true}, Case{halving(3, 16, 16, 64, 64), f32, false, true, 0, true}}) {
    if (cases == most) break;
    for (const Epilogue epilogue : {Epilogue::store, Epilogue::bias_activation}) {
      check_direction(c, Conv4x4Direction::down, epilogue);
      check_direction(c, Conv4x4Direction::up, epilogue);
    }
    ++cases;
  }
#endif

  // One pixel of up to four channels: kernels of their own, in both tiles of images; what they do not take (a large side
  // that is misaligned or has odd channels, the other epilogues) goes the generic way.
  for (const Case& c :
       {Case{pixel(70, 1, 16), bf16, false, false}, Case{pixel(131, 1, 72), f16, true, false},
        Case{pixel(5, 3, 8), bf16, false, false}, Case{pixel(300, 4, 8), f32, false, false},
        Case{pixel(9, 2, 132), f32, false, false}, Case{pixel(3, 1, 3), bf16, false, false},
        Case{pixel(3, 1, 8), f16, false, true}}) {
    if (cases == most) break;
    for (const Epilogue epilogue :
         {Epilogue::store, Epilogue::statistics, Epilogue::bias_activation, Epilogue::activation_backward}) {
      check_direction(c, Conv4x4Direction::down, epilogue);
      check_direction(c, Conv4x4Direction::up, epilogue);
    }
    for (const Conv4x4WeightLayout layout : kLayouts) {
      for (const DataType type : {f32, c.type}) check_weight_gradient(c, type, layout);
    }
    ++cases;
  }

  // Weight gradients whose partial results are reduced by several lanes (many splits), by one lane, or not at all.
  for (const Case& c :
       {Case{halving(17, 32, 32, 4, 4), f32, false, false}, Case{halving(17, 32, 32, 8, 3), f32, false, false},
        Case{halving(9, 32, 32, 40, 12), bf16, false, false}, Case{halving(2, 4, 4, 24, 20), f16, false, false}}) {
    if (cases == most) break;
    for (const Conv4x4WeightLayout layout : kLayouts) {
      for (const DataType type : {f32, c.type}) check_weight_gradient(c, type, layout);
    }
    ++cases;
  }

  // Channels in 8-byte pieces: both tiles, one tap and several to a window.
  for (const Case& c : {Case{pixel(33, 100, 8), bf16, false, false}, Case{pixel(130, 20, 24), f16, true, false},
                        Case{halving(2, 7, 6, 12, 20), bf16, false, false}, Case{pixel(9, 34, 6), f32, false, false},
                        Case{pixel(9, 6, 10), f32, false, false}}) {
    if (cases == most) break;
    check_direction(c, Conv4x4Direction::down, Epilogue::store);
    check_direction(c, Conv4x4Direction::up, Epilogue::statistics);
    check_weight_gradient(c);
    ++cases;
  }

  // One pixel of many channels: products of its own up and in the weight gradient, in both tiles, with remainders of rows,
  // columns and depth; what they do not take (misaligned, depths beyond 176, channels that are no multiple of 4, of the
  // large side 8 in a contiguous gradient) goes the generic way. The last one's gradient is split.
  for (const Case& c :
       {Case{pixel(5, 100, 24), bf16, false, false}, Case{pixel(128, 100, 32), bf16, true, false},
        Case{pixel(70, 8, 8), f16, false, false}, Case{pixel(131, 136, 12), f16, true, false},
        Case{pixel(64, 20, 3), bf16, false, false}, Case{pixel(200, 68, 1), bf16, true, false},
        Case{pixel(9, 100, 8), f16, false, true}, Case{pixel(3, 176, 16), f16, false, false},
        Case{pixel(3, 180, 8), bf16, false, false}, Case{pixel(2060, 12, 8), bf16, false, false}}) {
    if (cases == most) break;
    for (const Epilogue epilogue :
         {Epilogue::store, Epilogue::statistics, Epilogue::bias_activation, Epilogue::activation_backward}) {
      if (c.g.batch <= 1000 || epilogue == Epilogue::statistics) check_direction(c, Conv4x4Direction::up, epilogue);
    }
    for (const Conv4x4WeightLayout layout : kLayouts) {
      for (const DataType type : {f32, c.type}) check_weight_gradient(c, type, layout);
    }
    ++cases;
  }

  // Thin images under channels in 64s: loops of their own. On one multiprocessor a block has several tiles.
  const Case thin_cases[] = {
      {halving(3, 64, 64, 64, 3), bf16, true, false},   {halving(5, 28, 28, 64, 1), f16, true, false},
      {halving(3, 27, 31, 128, 3), bf16, false, false}, {halving(7, 9, 13, 64, 2), f16, true, false},
      {halving(2, 21, 18, 64, 4), bf16, true, false},   {halving(2, 7, 33, 128, 1), bf16, true, false},
      {halving(40, 4, 5, 64, 3), bf16, true, false},    {halving(2, 5, 129, 64, 3), f16, true, false},
      {halving(1, 2, 2, 64, 3), f16, false, false},     {halving(3, 10, 12, 64, 3), bf16, true, true},
      {halving(2, 4, 257, 64, 1), bf16, true, false},   {halving(1, 67, 35, 64, 3), f16, false, false},
  };
  for (const Case& c : thin_cases) {
    if (cases == most) break;
    for (const Epilogue epilogue :
         {Epilogue::store, Epilogue::statistics, Epilogue::bias_activation, Epilogue::activation_backward}) {
      check_direction(c, Conv4x4Direction::down, epilogue);
      check_direction(c, Conv4x4Direction::up, epilogue);
    }
    check_weight_gradient(c);
    ++cases;
  }

  // The same in float32 by TF32, with as many small channels as one block takes and more; misaligned ones are computed in
  // float32, or not taken.
  const Case tf32_cases[] = {
      {halving(3, 64, 64, 64, 3), f32, true, false, 0, true},  {halving(5, 28, 28, 64, 1), f32, true, false, 0, true},
      {halving(3, 27, 31, 128, 3), f32, false, false, 0, true}, {halving(7, 9, 13, 64, 2), f32, true, false, 3, true},
      {halving(2, 21, 18, 128, 4), f32, true, false, 0, true}, {halving(2, 7, 33, 128, 1), f32, true, false, 0, true},
      {halving(40, 4, 5, 64, 3), f32, true, false, 0, true},   {halving(2, 5, 129, 64, 3), f32, true, false, 0, true},
      {halving(1, 2, 2, 64, 3), f32, false, false, 0, true},   {halving(3, 10, 12, 64, 3), f32, true, true, 0, true},
      {halving(1, 67, 35, 64, 3), f32, false, false, 5, true},
  };
  for (const Case& c : tf32_cases) {
    if (cases == most) break;
    for (const Epilogue epilogue : {Epilogue::store, Epilogue::bias_activation}) {
      check_direction(c, Conv4x4Direction::down, epilogue);
      check_direction(c, Conv4x4Direction::up, epilogue);
    }
    for (const Conv4x4WeightLayout layout : kLayouts) check_weight_gradient(c, f32, layout);
    ++cases;
  }

  for (const DataType type : {f32, bf16, f16}) check_packs(type, type);
  check_packs(bf16, f32);
  check_packs(f16, f32);

  // What the kernels do not take must be refused, not computed wrongly.
  const auto expect_refused = [&](const char* what, bool supported) {
    if (supported) std::printf("FAILED %s is not refused\n", what), ++failures;
  };
  Conv4x4Geometry wrong = halving(1, 8, 8, 4, 4);
  wrong.large_width = 10;
  expect_refused("a large grid that is not twice the small one", conv4x4s2_supported(wrong, Conv4x4Direction::down));
  wrong = {1, 2, 2, 4, 5, 5, 4, 1};
  expect_refused("stride 1 up from 2x2", conv4x4s2_supported(wrong, Conv4x4Direction::up));
  wrong = halving(int64_t{1} << 24, 16, 16, 4, 4);
  expect_refused("more than 2^31 rows", conv4x4s2_supported(wrong, Conv4x4Direction::down));
  return report("conv4x4s2: down, up, weight gradient, pack; all epilogues", cases);
}
