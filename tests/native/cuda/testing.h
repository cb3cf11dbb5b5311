// What the kernels' tests share: random tensors in any storage type, the three thread schedules, comparison.
//
// With -DFASTGAN_CUDA_HOST kernels run on the host shim. Without it the same tests run on a GPU, with arrays in managed
// memory; a case is then simply run three times, and must give the same bytes each time.
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

#include "../../../csrc/cuda/bn_act.h"
#include "../../../csrc/cuda/host/convert.h"
#include "../../../csrc/cuda/runtime.h"

#if defined(FASTGAN_CUDA_HOST)
#include "../../../csrc/cuda/host/fibers.h"
#endif

namespace fastgan::cuda::testing {

#if defined(FASTGAN_CUDA_HOST)
template <typename T>
using DeviceVector = std::vector<T>;
#else
template <typename T>
struct ManagedAllocator {
  using value_type = T;
  ManagedAllocator() = default;
  template <typename U>
  ManagedAllocator(const ManagedAllocator<U>&) {}
  T* allocate(size_t count) {
    void* memory = nullptr;
    if (cudaMallocManaged(&memory, count * sizeof(T)) != cudaSuccess) std::abort();
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) { cudaFree(memory); }
  bool operator==(const ManagedAllocator&) const { return true; }
  bool operator!=(const ManagedAllocator&) const { return false; }
};
template <typename T>
using DeviceVector = std::vector<T, ManagedAllocator<T> >;
#endif

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
      if (type == DataType::float32) {
        std::memcpy(at, &value, 4);
      } else {
        const uint16_t bits = type == DataType::bfloat16 ? host::float_to_bfloat16(value) : host::float_to_half(value);
        std::memcpy(at, &bits, 2);
      }
    }
  }

  void* data() { return bytes_.data() + offset_; }
  const void* data() const { return bytes_.data() + offset_; }
  float* floats() { return type_ == DataType::float32 ? static_cast<float*>(data()) : nullptr; }
  const DeviceVector<uint8_t>& bytes() const { return bytes_; }
  int64_t size() const { return size_; }

  Values values() const {
    Values result(size_);
    for (int64_t i = 0; i < size_; ++i) {
      const uint8_t* at = bytes_.data() + offset_ + i * size_of(type_);
      if (type_ == DataType::float32) {
        float value;
        std::memcpy(&value, at, 4);
        result[i] = value;
      } else {
        uint16_t bits;
        std::memcpy(&bits, at, 2);
        result[i] = type_ == DataType::bfloat16 ? host::bfloat16_to_float(bits) : host::half_to_float(bits);
      }
    }
    return result;
  }

 private:
  DataType type_;
  int64_t size_;
  int64_t offset_;
  DeviceVector<uint8_t> bytes_;
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

// Runs the case under two orders of threads, blocks and warps: the ascending one, and the descending and random ones in turn from
// case to case. It returns the bytes of all it wrote, which must not depend on the order.
inline void under_two_schedules(const std::string& what, const std::function<std::vector<Buffer>()>& run) {
  static bool descending = false;
  descending = !descending;
  std::vector<Buffer> first;
  for (const bool other : {false, true}) {
#if defined(FASTGAN_CUDA_HOST)
    using host::Schedule;
    host::set_schedule(!other ? Schedule::ascending : descending ? Schedule::descending : Schedule::random, 1);
#endif
    std::vector<Buffer> outputs = run();
    if (!other) {
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

// On a GPU also waits for the kernels, so that the test may read what they wrote.
inline void expect_success(const std::string& what, cudaError_t error) {
#if !defined(FASTGAN_CUDA_HOST)
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
#endif
  if (error == cudaSuccess) return;
  std::printf("FAILED %s: error %d\n", what.c_str(), static_cast<int>(error));
  ++failures;
}

inline int report(const char* kernels, int cases) {
  std::printf("%s: %d cases, each in 2 of 3 thread orders, %d failures\n", kernels, cases, failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

// What the activations' kernels compute.
inline double act(ActivationSpec a, double z) {
  switch (a.kind) {
    case Activation::relu: return z > 0 ? z : 0;
    case Activation::leaky_relu: return z > 0 ? z : z * double{a.negative_slope};
    case Activation::tanh: return std::tanh(z);
    case Activation::sigmoid: return 1 / (1 + std::exp(-z));
    default: return z;
  }
}

inline double act_derivative(ActivationSpec a, double z) {
  const double y = act(a, z);
  switch (a.kind) {
    case Activation::relu: return z > 0;
    case Activation::leaky_relu: return z > 0 ? 1 : double{a.negative_slope};
    case Activation::tanh: return 1 - y * y;
    case Activation::sigmoid: return y * (1 - y);
    default: return 1;
  }
}

}  // namespace fastgan::cuda::testing
