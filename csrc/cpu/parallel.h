// Threads for the torch-free kernels. Inside PyTorch the runner is at::parallel_for (set by csrc/library.cpp),
// so that torch.set_num_threads holds and only one thread pool exists; the native tests set their own or run serially.
//
// Kernels cut their work into tasks by the shapes alone, never by the number of threads, and combine partial
// results in task order: results are then the same for every number of threads.
#pragma once

#include <cstdint>

namespace fastgan::cpu {

// Calls body(context, task) once for every task in [0, tasks), possibly on several threads.
using ParallelRunner = void (*)(int64_t tasks, void (*body)(void* context, int64_t task), void* context);

extern ParallelRunner parallel_runner;

template <typename Body>
inline void parallel_for(int64_t tasks, const Body& body) {
  parallel_runner(
      tasks, [](void* context, int64_t task) { (*static_cast<const Body*>(context))(task); },
      const_cast<Body*>(&body));
}

}  // namespace fastgan::cpu
