// softmax_entropy kernels against a float64 reference: one, few and many rows, 1 to 4096 classes, strided rows,
// labels with ignored rows, extreme logits and logits of -infinity, rows that are and are not aligned to 16 bytes, many
// dense rows of ten classes.
#include "../../../csrc/cuda/softmax_entropy.h"

#include "testing.h"

using namespace fastgan::cuda;
using namespace fastgan::cuda::testing;

namespace {

constexpr int kMultiprocessors = 2;            // few: small inputs use several rows a warp, and several blocks
constexpr int64_t kMany = 1024 * kMultiprocessors;  // from so many dense rows on, 10 classes have kernels of their own

struct Case {
  int64_t rows, classes, row_stride;
  DataType type;
  bool with_labels;
  double deviation;              // of the logits
  bool misaligned = false;       // logits and gradient, from 16 bytes
  bool with_infinities = false;  // some logits are -infinity, whose probability is 0

  std::string name() const {
    return "softmax_entropy [" + std::to_string(rows) + ", " + std::to_string(classes) + "] stride " +
           std::to_string(row_stride) + " " + name_of(type) + (with_labels ? " labels" : "") + " deviation " +
           std::to_string(deviation) + (misaligned ? " misaligned" : "") + (with_infinities ? " infinities" : "");
  }
};

void run(const Case& c) {
  const int64_t n = c.rows, k_count = c.classes;
  Values logits = random_values((n - 1) * c.row_stride + k_count, c.type, 0.0, c.deviation);
  DeviceVector<int64_t> labels(n), counts(1);
  int64_t& label_count = counts[0];
  for (int64_t i = 0; i < n; ++i) {
    labels[i] = random_integer(0, 3) == 0 ? -100 : random_integer(0, k_count - 1);
    label_count += labels[i] != -100;
    if (!c.with_infinities) continue;
    const int64_t kept = labels[i] < 0 ? random_integer(0, k_count - 1) : labels[i];
    for (int64_t k = 0; k < k_count; ++k) {  // class 0 in no row but those that need it: a mean probability near or of 0
      if (k != kept && (k == 0 || random_integer(0, 2) == 0)) {
        logits[i * c.row_stride + k] = -std::numeric_limits<double>::infinity();
      }
    }
  }
  const Values upstream = random_values(3, DataType::float32);
  std::vector<Buffer> outputs;
  under_two_schedules(c.name(), [&] {
    Buffer input(c.type, logits, c.misaligned), q(DataType::float32, k_count), log_normalizer(DataType::float32, n);
    Buffer scalars(DataType::float32, 3), grad_scalars(DataType::float32, upstream);
    Buffer grad(c.type, n * k_count, c.misaligned);
    SoftmaxEntropyArgs args;
    args.rows = n, args.classes = k_count, args.row_stride = c.row_stride, args.type = c.type;
    args.logits = input.data();
    if (c.with_labels) args.labels = labels.data(), args.label_count = counts.data();
    args.multiprocessors = kMultiprocessors;
    Buffer workspace(DataType::float32, static_cast<int64_t>(softmax_entropy_workspace_bytes(args) / 4));
    args.workspace = workspace.data();
    args.mean_probabilities = q.floats(), args.log_normalizer = log_normalizer.floats();
    args.conditional = scalars.floats(), args.marginal = scalars.floats() + 1,
    args.cross_entropy = scalars.floats() + 2;
    args.grad_conditional = grad_scalars.floats(), args.grad_marginal = grad_scalars.floats() + 1;
    args.grad_cross_entropy = grad_scalars.floats() + 2;
    args.grad_logits = grad.data();
    expect_success(c.name(), softmax_entropy_forward_launch(args, nullptr));
    expect_success(c.name(), softmax_entropy_backward_launch(args, nullptr));
    outputs = {scalars, q, log_normalizer, grad};
    return outputs;
  });

  Values p(n * k_count), log_p(n * k_count), q(k_count), log_normalizer(n), scalars(3), grad(n * k_count);
  for (int64_t i = 0; i < n; ++i) {
    const double* row = logits.data() + i * c.row_stride;
    const double max = *std::max_element(row, row + k_count);
    double s = 0;
    for (int64_t k = 0; k < k_count; ++k) s += std::exp(row[k] - max);
    log_normalizer[i] = std::log(s);
    for (int64_t k = 0; k < k_count; ++k) {
      log_p[i * k_count + k] = row[k] - max - std::log(s);
      p[i * k_count + k] = std::exp(log_p[i * k_count + k]);
      q[k] += p[i * k_count + k] / static_cast<double>(n);
      if (p[i * k_count + k] > 0) scalars[0] -= p[i * k_count + k] * log_p[i * k_count + k] / static_cast<double>(n);
    }
    if (c.with_labels && labels[i] >= 0) {
      scalars[2] -= log_p[i * k_count + labels[i]] / static_cast<double>(label_count);
    }
  }
  for (double value : q) scalars[1] -= value > 0 ? value * std::log(value) : 0;
  for (int64_t i = 0; i < n; ++i) {
    double mean_t = 0;
    const auto t = [&](int64_t k) {
      return upstream[0] * std::max(log_p[i * k_count + k], -1e300) + upstream[1] * (q[k] > 0 ? std::log(q[k]) : 0.0);
    };
    for (int64_t k = 0; k < k_count; ++k) mean_t += p[i * k_count + k] * t(k);
    for (int64_t k = 0; k < k_count; ++k) {
      double& g = grad[i * k_count + k];
      g = p[i * k_count + k] * (mean_t - t(k)) / static_cast<double>(n);
      if (c.with_labels && labels[i] >= 0) {
        g += upstream[2] * (p[i * k_count + k] - (labels[i] == k)) / static_cast<double>(label_count);
      }
    }
  }
  const double exact = 4e-6 * (1 + c.deviation / 30);
  expect_close(c.name() + " conditional, marginal, cross-entropy", outputs[0].values(), scalars, exact);
  expect_close(c.name() + " mean probabilities", outputs[1].values(), q, exact);
  expect_close(c.name() + " log normalizer", outputs[2].values(), log_normalizer, exact);
  expect_close(c.name() + " grad", outputs[3].values(), grad, 4 * exact + rounding_of(c.type));
}

// A label outside [0, classes) must not go unnoticed: that of the last row, or of a row of a full piece.
void out_of_range_label_gives_nan() {
  const auto check = [](int64_t rows, int64_t classes, int64_t row, int64_t label) {
    Buffer input(DataType::float32, random_values(rows * classes, DataType::float32));
    Buffer q(DataType::float32, classes), log_normalizer(DataType::float32, rows), scalars(DataType::float32, 3);
    const DeviceVector<int64_t> label_count{2};
    DeviceVector<int64_t> labels(rows, -100);
    labels[0] = 1, labels[row] = label;
    SoftmaxEntropyArgs args;
    args.rows = rows, args.classes = classes, args.row_stride = classes, args.logits = input.data();
    args.labels = labels.data(), args.label_count = label_count.data();
    args.multiprocessors = kMultiprocessors;
    Buffer workspace(DataType::float32, static_cast<int64_t>(softmax_entropy_workspace_bytes(args) / 4));
    args.workspace = workspace.data(), args.mean_probabilities = q.floats();
    args.log_normalizer = log_normalizer.floats();
    args.conditional = scalars.floats(), args.marginal = scalars.floats() + 1,
    args.cross_entropy = scalars.floats() + 2;
    expect_success("out-of-range label", softmax_entropy_forward_launch(args, nullptr));
    const Values values = scalars.values();
    if (!std::isnan(values[2]) || std::isnan(values[0])) {
      std::printf("FAILED out-of-range label with %d rows and %d classes gave %g\n", static_cast<int>(rows),
                  static_cast<int>(classes), values[2]);
      ++failures;
    }
  };
  for (int64_t classes : {5, 10, 16, 40, 256, 1000, 1100}) {
    check(2, classes, 1, classes == 40 ? (int64_t{1} << 32) + 1 : classes);
  }
  check(kMany + 1, 10, kMany, 10);
  check(kMany + 1, 10, kMany - 1, -1);
  check(kMany + 1, 10, 2, (int64_t{1} << 32) + 1);
}

// The kernels for many dense rows of ten classes have more blocks, and so more shares, than those they stand in for:
// the cases below mean to run both.
void many_dense_rows_have_kernels_of_their_own() {
  Buffer input(DataType::float32, 4);
  SoftmaxEntropyArgs args;
  args.classes = args.row_stride = 10, args.logits = input.data(), args.multiprocessors = kMultiprocessors;
  const auto bytes = [&](int64_t rows, int64_t row_stride) {
    args.rows = rows, args.row_stride = row_stride;
    return softmax_entropy_workspace_bytes(args);
  };
  if (bytes(8 * kMany, 10) > bytes(8 * kMany, 11)) return;
  std::printf("FAILED many dense rows of ten classes have no kernels of their own\n");
  ++failures;
}

}  // namespace

int main(int argc, char** argv) {
  int cases = 0;
  const int most = argc > 1 ? std::atoi(argv[1]) : 1000;  // fewer under slow tools
  const auto check = [&](const Case& c) {
    if (cases == most) return;
    run(c);
    ++cases;
  };
  check({1, 2, 2, DataType::float32, true, 1.0});
  check({1, 1, 1, DataType::float32, false, 1.0});
  check({100, 10, 10, DataType::float32, true, 3.0});  // one block
  check({300, 20, 23, DataType::bfloat16, true, 2.0});
  check({100, 10, 10, DataType::float32, false, 5000.0});  // one-hot rows: entropies of 0, nothing infinite
  check({50, 300, 300, DataType::float32, false, 5000.0});
  check({5, 4096, 4096, DataType::float32, true, 2.0});
  check({6, 1025, 1030, DataType::float16, true, 2.0});
  check({40, 1000, 1000, DataType::float32, true, 2.0});
  check({5000, 8, 8, DataType::float32, true, 3.0});  // more tiles a warp than are in flight, the last one not full
  check({4700, 10, 12, DataType::float32, true, 3.0});
  check({2100, 16, 16, DataType::bfloat16, true, 3.0});
  check({10, 1024, 1024, DataType::float16, true, 2.0});
  for (int64_t classes : {1, 3, 6, 8, 10, 16, 20, 21, 24, 256, 257, 1000, 1024, 1025}) {
    for (DataType type : {DataType::float32, DataType::bfloat16, DataType::float16}) {
      const int64_t rows = classes <= 20 ? random_integer(33, 200) : random_integer(1, 80000 / classes < 70 ? 40 : 70);
      check({rows, classes, classes, type, true, 1.0, random_integer(0, 3) == 0, true});
      check({rows, classes, classes + random_choice({1, 8}), type, random_integer(0, 1) == 0, 1.0});
    }
  }
  check({40, 21, 24, DataType::float32, true, 1.0});  // rows that begin at multiples of 16 bytes and do not end there
  check({20, 257, 264, DataType::bfloat16, true, 1.0});
  for (int64_t classes : {10, 16, 24, 1000}) {  // dense rows, misaligned arrays
    check({70, classes, classes, random_choice({DataType::float32, DataType::bfloat16}), true, 1.0, true});
  }
  for (int64_t rows : {kMany - 1, kMany, kMany + 3}) {  // ten classes, few and many rows
    for (DataType type : {DataType::float32, DataType::bfloat16, DataType::float16}) {
      check({rows, 10, 10, type, rows != kMany, 1.0, false, rows == kMany + 3});
    }
  }
  check({2 * kMany + 1061, 10, 10, DataType::float32, true, 3.0});  // several pieces a thread, and rows that fill none
  check({4 * kMany + 1063, 10, 10, DataType::bfloat16, true, 3.0});
  check({kMany, 10, 10, DataType::float32, false, 5000.0});
  check({kMany, 10, 10, DataType::float32, true, 1.0, true});
  check({kMany + 1, 10, 12, DataType::float16, true, 1.0});
  for (int i = 0; i < 16; ++i) {
    Case c{};
    c.classes = random_choice({2, 3, 10, 11, 20, 21, 33, 100, 257, 1024});
    c.rows = random_integer(1, c.classes <= 20 ? 600 : 40);
    c.row_stride = c.classes + random_choice({0, 0, 5});
    c.type = random_choice({DataType::float32, DataType::bfloat16, DataType::float16});
    c.with_labels = random_integer(0, 1) == 0;
    c.deviation = random_choice({0.1, 1.0, 10.0});
    check(c);
  }
  out_of_range_label_gives_nan();
  many_dense_rows_have_kernels_of_their_own();
  return report("softmax_entropy: forward and backward, several rows a thread; thread, warp and block a row", cases);
}
