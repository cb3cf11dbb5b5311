// Threads for the kernels under test: `parallel_runner = run_on_threads;` and runner_threads of them.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

inline int runner_threads = 1;

inline void run_on_threads(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  std::vector<std::thread> pool;
  for (int t = 0; t < runner_threads; ++t)
    pool.emplace_back([=] {
      for (int64_t i = t; i < tasks; i += runner_threads) body(context, i);
    });
  for (auto& t : pool) t.join();
}
