// What the host-shim tests share: random tensors in any storage type, the three thread schedules, comparison.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../../csrc/cuda/device.cuh"

namespace fastgan::cuda::testing {

using Values = std::vector<double>;

inline const char* name_of(DataType type) {
  return type == DataType::float32 ? "float32" : type == DataType::bfloat16 ? "bfloat16" : "float16";
}

// Half the distance between 1 and the next number.
inline double rounding_of(DataType type) {
  return type == DataType::float32 ? 6e-8 : type == DataType::bfloat16 ? 3.9e-3 : 4.9e-4;
}

// A "device" array: exactly as long as it must be, so that the address sanitizer sees an access one element too far;
// filled with NaN until something is written. `misaligned` puts it one element past a 16-byte boundary.
class Buffer {
 public:
  Buffer(DataType type, int64_t size, bool misaligned = false)
      : type_(type), size_(size), offset_(misaligned ? size_of(type) : 0) {
    bytes_.assign(offset_ + size * size_of(type), 0xFF);
  }

  Buffer(DataType type, const Values& values, bool misaligned = false)
      : Buffer(type, static_cast<int64_t>(values.size()), misaligned) {
    for (size_t i = 0; i < values.size(); ++i) {
      const float value = static_cast<float>(values[i]);
      uint8_t* at = bytes_.data() + offset_ + i * size_of(type);
      const auto store = [&](auto element) {
        from_float(value, element);
        std::memcpy(at, &element, sizeof(element));
      };
      if (type == DataType::float32) store(float{});
      if (type == DataType::bfloat16) store(BFloat16{});
      if (type == DataType::float16) store(Half{});
    }
  }

  void* data() { return bytes_.data() + offset_; }
  const void* data() const { return bytes_.data() + offset_; }
  float* floats() { return type_ == DataType::float32 ? static_cast<float*>(data()) : nullptr; }
  const std::vector<uint8_t>& bytes() const { return bytes_; }
  int64_t size() const { return size_; }

  Values values() const {
    Values result(size_);
    for (int64_t i = 0; i < size_; ++i) {
      const uint8_t* at = bytes_.data() + offset_ + i * size_of(type_);
      const auto load = [&](auto element) {
        std::memcpy(&element, at, sizeof(element));
        result[i] = to_float(element);
      };
      if (type_ == DataType::float32) load(float{});
      if (type_ == DataType::bfloat16) load(BFloat16{});
      if (type_ == DataType::float16) load(Half{});
    }
    return result;
  }

 private:
  DataType type_;
  int64_t size_;
  int64_t offset_;
  std::vector<uint8_t> bytes_;
};

inline std::mt19937_64& random_source() {
  static std::mt19937_64 source(20240607);
  return source;
}

inline int64_t random_integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_source());
}

template <typename T>
T random_choice(std::initializer_list<T> choices) {
  return choices.begin()[random_integer(0, static_cast<int64_t>(choices.size()) - 1)];
}

// Normal values, as they are after rounding to the storage type.
inline Values random_values(int64_t size, DataType type, double mean = 0.0, double deviation = 1.0) {
  std::normal_distribution<double> normal(mean, deviation);
  Values values(size);
  for (double& value : values) value = normal(random_source());
  return Buffer(type, values).values();
}

inline int failures = 0;

// Largest difference relative to the largest expected magnitude (or to `scale`, for sums in which terms cancel).
// NaN on either side fails.
inline void expect_close(const std::string& what, const Values& got, const Values& want, double tolerance,
                         double scale = 1e-6) {
  double worst = got.size() == want.size() ? 0.0 : std::numeric_limits<double>::infinity();
  for (double value : want) scale = std::max(scale, std::abs(value));
  for (size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
    const double difference = std::abs(got[i] - want[i]);
    if (!(difference <= worst)) worst = difference == difference ? difference : std::numeric_limits<double>::infinity();
  }
  if (!(worst <= tolerance * scale)) {
    std::printf("FAILED %s: error %.3g of %.3g, tolerance %.3g\n", what.c_str(), worst / scale, scale, tolerance);
    ++failures;
  }
}

// Runs the case under every order of threads, blocks and warps; it returns the bytes of all it wrote, which must not
// depend on the order.
inline void under_every_schedule(const std::string& what, const std::function<std::vector<Buffer>()>& run) {
  using host::Schedule;
  std::vector<Buffer> first;
  for (Schedule schedule : {Schedule::ascending, Schedule::descending, Schedule::random}) {
    host::set_schedule(schedule, 1);
    std::vector<Buffer> outputs = run();
    if (schedule == Schedule::ascending) {
      first = std::move(outputs);
      continue;
    }
    for (size_t i = 0; i < first.size(); ++i) {
      if (outputs[i].bytes() != first[i].bytes()) {
        std::printf("FAILED %s: output %zu depends on the order in which threads run\n", what.c_str(), i);
        ++failures;
      }
    }
  }
}

inline void expect_success(const std::string& what, cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("FAILED %s: launch refused\n", what.c_str());
  ++failures;
}

inline int report(const char* kernels, int cases) {
  std::printf("%s: %d cases, 3 thread schedules each, %d failures\n", kernels, cases, failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace fastgan::cuda::testing
