// What the tests of the CPU kernels share: numbers, threads, and how a test of one instruction set begins and ends.
#pragma once

#include <cstdint>
#include <cstdio>
#include <exception>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/parallel.h"

inline int failures = 0;
inline std::mt19937 generator(7);

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

inline Floats random_floats(int64_t n, float low = -1, float high = 1) {
  std::uniform_real_distribution<float> d(low, high);
  Floats v(static_cast<size_t>(n));
  for (float& x : v) x = d(generator);
  return v;
}

// Threads for the kernels under test: `parallel_runner = run_on_threads;` and runner_threads of them.
inline int runner_threads = 1;

inline void run_on_threads(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  std::vector<std::thread> pool;
  for (int t = 0; t < runner_threads; ++t)
    pool.emplace_back([=] {
      for (int64_t i = t; i < tasks; i += runner_threads) body(context, i);
    });
  for (auto& t : pool) t.join();
}

inline void expect_the_same_for_every_number_of_threads(bool same) {
  if (same) return;
  std::printf("FAILED [%s] results depend on the number of threads\n", fastgan::cpu::isa_name(fastgan::cpu::active_isa()));
  ++failures;
}

// Runs the checks on the instruction set that FASTGAN_CPU_ISA names. Returns main's status: 77 if this machine has not got it.
inline int run_checks(void (*checks)()) {
  try {
    fastgan::cpu::active_isa();
  } catch (const std::exception&) {
    return 77;
  }
  fastgan::cpu::parallel_runner = run_on_threads;
  checks();
  std::printf("%s: %s\n", fastgan::cpu::isa_name(fastgan::cpu::active_isa()), failures == 0 ? "ok" : "FAILED");
  return failures == 0 ? 0 : 1;
}
