#include "parallel.h"

namespace fastgan::cpu {
namespace {
void run_serially(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  for (int64_t task = 0; task < tasks; ++task) body(context, task);
}
}  // namespace

ParallelRunner parallel_runner = run_serially;

}  // namespace fastgan::cpu
