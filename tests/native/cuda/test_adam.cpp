// The Adam kernel against a float64 reference: several steps of groups of tensors of odd sizes, misaligned and empty ones, more
// tensors than one kernel takes, both kinds of weight decay, the learning rate on the device, and steps that are left out.
#include "../../../csrc/cuda/adam.h"

#include "testing.h"

using namespace fastgan::cuda;
using namespace fastgan::cuda::testing;

namespace {

constexpr int kSteps = 4;

struct Case {
  std::vector<int64_t> sizes;
  float weight_decay = 0.0f;
  bool decoupled = false;
  bool misaligned = false;  // one array of four in turn
  bool lr_on_device = false;
  int skipped = -1;  // the step whose found_inf is 1
  double first_step = 0;
  float beta1 = 0.5f, beta2 = 0.999f;

  std::string name() const {
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    return "adam " + std::to_string(sizes.size()) + " tensors, " + std::to_string(total) + " elements, weight decay " +
           std::to_string(weight_decay) + (decoupled ? " decoupled" : "") + (misaligned ? " misaligned" : "") +
           (lr_on_device ? " lr on device" : "") + (skipped >= 0 ? " one skipped" : "") + " from step " +
           std::to_string(static_cast<int>(first_step));
  }
};

// The four arrays of one tensor, and its step count.
struct Host {
  Values parameter, exp_avg, exp_avg_sq;
  std::vector<Values> gradients;  // of every step
  double step;
};

// One step in float64, of the betas and rates that the kernel has.
void reference_step(const Case& c, const AdamArgs& args, double lr, Host& h, const Values& gradient) {
  h.step += 1;
  const double beta1 = args.beta1, beta2 = args.beta2, decay = args.weight_decay;
  const double correction1 = 1 - std::pow(beta1, h.step), correction2 = std::sqrt(1 - std::pow(beta2, h.step));
  for (size_t i = 0; i < gradient.size(); ++i) {
    double g = gradient[i];
    if (c.decoupled) {
      h.parameter[i] -= lr * decay * h.parameter[i];
    } else {
      g += decay * h.parameter[i];
    }
    h.exp_avg[i] = beta1 * h.exp_avg[i] + (1 - beta1) * g;
    h.exp_avg_sq[i] = beta2 * h.exp_avg_sq[i] + (1 - beta2) * g * g;
    h.parameter[i] -= lr / correction1 * h.exp_avg[i] / (std::sqrt(h.exp_avg_sq[i]) / correction2 + double{args.eps});
  }
}

void run(const Case& c) {
  const float lr = 0.01f;
  const int64_t count = static_cast<int64_t>(c.sizes.size());
  std::vector<Host> hosts;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t size = c.sizes[i];
    Host h{random_values(size, DataType::float32), Values(size), Values(size), {}, c.first_step + double(i % 3)};
    if (h.step > 0) {
      h.exp_avg = random_values(size, DataType::float32);
      for (int64_t j = 0; j < size; ++j) {
        h.exp_avg_sq[j] = static_cast<float>(h.exp_avg[j] * h.exp_avg[j] + 0.1);
      }
    }
    for (int step = 0; step < kSteps; ++step) h.gradients.push_back(random_values(size, DataType::float32));
    hosts.push_back(h);
  }

  AdamArgs args;
  args.count = count;
  args.beta1 = c.beta1, args.beta2 = c.beta2;
  args.weight_decay = c.weight_decay, args.decoupled_weight_decay = c.decoupled;
  args.lr = c.lr_on_device ? std::numeric_limits<float>::quiet_NaN() : lr;
  std::vector<Buffer> outputs;
  under_two_schedules(c.name(), [&] {
    outputs.clear();
    const DeviceVector<float> rate{lr};
    DeviceVector<float> found_inf{0.0f};
    DeviceVector<unsigned> blocks_arrived{0};
    const auto misaligned = [&](int64_t tensor, int array) { return c.misaligned && tensor % 5 == array; };
    for (int64_t i = 0; i < count; ++i) {
      outputs.emplace_back(DataType::float32, hosts[i].parameter, misaligned(i, 0));
      outputs.emplace_back(DataType::float32, hosts[i].exp_avg, misaligned(i, 1));
      outputs.emplace_back(DataType::float32, hosts[i].exp_avg_sq, misaligned(i, 2));
      outputs.emplace_back(DataType::float32, Values{hosts[i].step});
    }
    args.lr_on_device = c.lr_on_device ? rate.data() : nullptr;
    args.found_inf = c.skipped >= 0 ? found_inf.data() : nullptr;
    args.blocks_arrived = blocks_arrived.data();
    for (int step = 0; step < kSteps; ++step) {
      std::vector<Buffer> gradients;
      std::vector<AdamTensor> tensors;
      for (int64_t i = 0; i < count; ++i) {
        gradients.emplace_back(DataType::float32, hosts[i].gradients[step], misaligned(i, 3));
      }
      for (int64_t i = 0; i < count; ++i) {
        Buffer* of = &outputs[4 * i];
        tensors.push_back(
            {of[0].floats(), gradients[i].floats(), of[1].floats(), of[2].floats(), of[3].floats(), c.sizes[i]});
      }
      args.tensors = tensors.data();
      found_inf[0] = step == c.skipped ? 1.0f : 0.0f;
      expect_success(c.name(), adam_launch(args, nullptr));
      if (blocks_arrived[0] != 0) expect_close(c.name() + " blocks arrived", {double(blocks_arrived[0])}, {0.0}, 0);
    }
    return outputs;
  });

  for (int64_t i = 0; i < count; ++i) {
    Host& h = hosts[i];
    for (int step = 0; step < kSteps; ++step) {
      if (step != c.skipped) reference_step(c, args, double{lr}, h, h.gradients[step]);
    }
    const std::string name = c.name() + " tensor " + std::to_string(i);
    expect_close(name + " parameter", outputs[4 * i].values(), h.parameter, 2e-6);
    expect_close(name + " exp_avg", outputs[4 * i + 1].values(), h.exp_avg, 5e-7);
    expect_close(name + " exp_avg_sq", outputs[4 * i + 2].values(), h.exp_avg_sq, 5e-7);
    expect_close(name + " step", outputs[4 * i + 3].values(), {h.step}, 0);
  }
}

}  // namespace

int main(int argc, char** argv) {
  int cases = 0;
  const int most = argc > 1 ? std::atoi(argv[1]) : 1000;  // fewer under slow tools
  const auto next = [&](const Case& c) {
    if (cases == most) return;
    run(c);
    ++cases;
  };
  std::vector<int64_t> many;
  for (int i = 0; i < 2 * kMostAdamTensors + 1; ++i) many.push_back(random_integer(0, 40));
  many[5] = 9000;
  Case c;
  c.sizes = {1, 3, 4, 1023, 1024, 1025, 2047, 2048, 2049, 5000};
  next(c);
  c.misaligned = c.lr_on_device = true;
  next(c);
  c.sizes = many;
  next(c);
  c.skipped = 2, c.weight_decay = 0.1f;
  next(c);
  c.misaligned = false, c.decoupled = true;
  next(c);
  c.sizes = {0, 7, 0}, c.skipped = 0;
  next(c);
  c = Case();
  c.sizes = {0, 0};
  next(c);
  c.sizes = {};
  next(c);
  c.sizes = {2048 * 7 + 5, 12, 2048}, c.first_step = 100000;
  next(c);
  c.beta1 = 0.0f, c.beta2 = 0.9f;
  next(c);
  c.beta1 = 0.9f, c.first_step = 16777210;  // near the last whole number that float32 counts to
  c.weight_decay = 0.01f;
  next(c);
  return report("adam: parameters, averages and step counts", cases);
}
