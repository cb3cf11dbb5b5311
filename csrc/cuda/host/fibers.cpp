#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

// swapcontext() makes a system call for the signal mask, several microseconds in some sandboxes, and one
// tensor-core instruction is 64 switches: hence our own switch of the callee-saved registers.
#if !defined(__x86_64__)
#error "the host shim switches stacks by x86-64 assembly"
#endif
extern "C" void fastgan_switch_stack(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.globl fastgan_switch_stack
.type fastgan_switch_stack, @function
fastgan_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastgan_switch_stack, .-fastgan_switch_stack
)");

namespace fastgan::cuda::host {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr size_t kMaxSharedBytes = 99 * 1024;  // what one block gets on the smallest target, sm_86
constexpr int kWarp = 32;

enum class State { ready, at_barrier, in_warp_operation, done };

struct Copy {
  void* shared;
  const void* global;
  int bytes;
  bool valid;
};

struct Fiber {
  void* stack_pointer;
  char* stack;
  State state;
  void* operand;
  Combine combine;
  void* fake_stack;  // of the address sanitizer
  std::vector<std::vector<Copy>> committed;
  std::vector<Copy> open_group;
};

struct Launch {
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  std::vector<Fiber> fibers;
  int waiting_lanes[1024 / kWarp] = {};  // of each warp, in a warp operation
  int current = 0;
  int threads = 0;
  void* scheduler_stack_pointer = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack_bottom = nullptr;
  size_t scheduler_stack_size = 0;
  void* shared = nullptr;
};

Launch launch;
Schedule schedule = Schedule::ascending;
std::mt19937_64 random_source;

void start_switch([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* bottom,
                  [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, bottom, size);
#endif
}

void finish_switch([[maybe_unused]] void* fake_stack, [[maybe_unused]] const void** bottom,
                   [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, bottom, size);
#endif
}

void yield_to_scheduler() {
  Fiber& fiber = launch.fibers[launch.current];
  start_switch(fiber.state == State::done ? nullptr : &fiber.fake_stack, launch.scheduler_stack_bottom,
               launch.scheduler_stack_size);
  fastgan_switch_stack(&fiber.stack_pointer, launch.scheduler_stack_pointer);
  finish_switch(fiber.fake_stack, &launch.scheduler_stack_bottom, &launch.scheduler_stack_size);
}

void fiber_main() {
  finish_switch(nullptr, &launch.scheduler_stack_bottom, &launch.scheduler_stack_size);
  launch.body(launch.context);
  Fiber& fiber = launch.fibers[launch.current];
  copy_async_commit();
  for (const auto& group : fiber.committed) {
    if (!group.empty()) fail("a thread ended with cp.async copies that it never waited for");
  }
  fiber.state = State::done;
  yield_to_scheduler();
}

void resume(int thread) {
  Fiber& fiber = launch.fibers[thread];
  launch.current = thread;
  threadIdx = dim3(thread, 0, 0);
  start_switch(&launch.scheduler_fake_stack, fiber.stack, kStackBytes);
  fastgan_switch_stack(&launch.scheduler_stack_pointer, fiber.stack_pointer);
  finish_switch(launch.scheduler_fake_stack, nullptr, nullptr);
}

void prepare_fibers(int threads) {
  while (static_cast<int>(launch.fibers.size()) < threads) {
    void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) fail("no memory for fiber stacks");
    Fiber fiber{};
    fiber.stack = static_cast<char*>(memory) + kGuardBytes;
    launch.fibers.push_back(std::move(fiber));
  }
  launch.threads = threads;
}

void reset_fiber(Fiber& fiber) {
  // The frame that fastgan_switch_stack pops: six registers, then the address it returns to. On entry to a function
  // the stack pointer is 8 past a multiple of 16.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 2;
  top[0] = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = top - 6;
  std::fill(top - 6, top, nullptr);
  fiber.state = State::ready;
  fiber.fake_stack = nullptr;
  fiber.committed.clear();
  fiber.open_group.clear();
}

void order(std::vector<int>& indices) {
  if (schedule == Schedule::descending) std::reverse(indices.begin(), indices.end());
  if (schedule == Schedule::random) std::shuffle(indices.begin(), indices.end(), random_source);
}

std::vector<int> ordered(int count) {
  std::vector<int> indices(count);
  std::iota(indices.begin(), indices.end(), 0);
  order(indices);
  return indices;
}

// Runs lanes of one warp until none of them can go on (or, in random order, until a pause). True if any lane ran.
bool run_warp(int warp) {
  bool progressed = false;
  const int first = warp * kWarp;
  const int last = std::min(first + kWarp, launch.threads);
  for (bool any = true; any;) {
    any = false;
    for (int i = 0; i < last - first; ++i) {
      const int thread = schedule == Schedule::descending ? last - 1 - i : first + i;
      if (launch.fibers[thread].state != State::ready) continue;
      resume(thread);
      any = progressed = true;
    }
    if (schedule == Schedule::random && random_source() % 16 == 0) break;
  }
  return progressed;
}

void run_block() {
  const int warps = (launch.threads + kWarp - 1) / kWarp;
  for (int thread = 0; thread < launch.threads; ++thread) reset_fiber(launch.fibers[thread]);
  std::fill(std::begin(launch.waiting_lanes), std::end(launch.waiting_lanes), 0);
  for (;;) {
    bool progressed = false;
    for (int warp : ordered(warps)) progressed = run_warp(warp) || progressed;
    int waiting = 0, done = 0;
    for (int thread = 0; thread < launch.threads; ++thread) {
      waiting += launch.fibers[thread].state == State::at_barrier;
      done += launch.fibers[thread].state == State::done;
    }
    if (done == launch.threads) return;
    if (waiting + done == launch.threads) {
      for (int thread = 0; thread < launch.threads; ++thread) {
        if (launch.fibers[thread].state == State::at_barrier) launch.fibers[thread].state = State::ready;
      }
    } else if (!progressed) {
      fail("deadlock: some lanes wait in a warp operation that the rest of their warp never reaches");
    }
  }
}

}  // namespace

void fail(const char* message) {
  std::fprintf(stderr, "host shim: %s (block %u %u %u, thread %u)\n", message, blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x);
  std::abort();
}

void set_schedule(Schedule new_schedule, uint64_t seed) {
  schedule = new_schedule;
  random_source.seed(seed);
}

void run_grid(dim3 grid, int threads, size_t shared_bytes, void (*body)(void*), void* context) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) fail("grid size out of range");
  if (threads <= 0 || threads > 1024 || threads % kWarp != 0) fail("block size must be a multiple of 32 up to 1024");
  if (shared_bytes > kMaxSharedBytes) fail("more shared memory than one block gets on sm_86");
  prepare_fibers(threads);
  launch.body = body;
  launch.context = context;
  if (posix_memalign(&launch.shared, 128, shared_bytes) != 0) fail("no memory");
  gridDim = grid;
  blockDim = dim3(threads);
  for (int block : ordered(static_cast<int>(grid.x * grid.y * grid.z))) {
    blockIdx = dim3(block % grid.x, block / grid.x % grid.y, block / (grid.x * grid.y));
    std::memset(launch.shared, 0xFF, shared_bytes);
    run_block();
  }
  std::free(launch.shared);
}

void* shared_memory() { return launch.shared; }

void block_barrier() {
  launch.fibers[launch.current].state = State::at_barrier;
  yield_to_scheduler();
}

void warp_collective(void* operand, Combine combine) {
  Fiber& fiber = launch.fibers[launch.current];
  fiber.operand = operand;
  fiber.combine = combine;
  fiber.state = State::in_warp_operation;
  const int warp = launch.current / kWarp;
  if (++launch.waiting_lanes[warp] < kWarp) return yield_to_scheduler();
  launch.waiting_lanes[warp] = 0;
  Fiber* const lanes = &launch.fibers[warp * kWarp];
  void* operands[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    if (lanes[lane].combine != combine) fail("lanes of one warp met in different warp operations");
    operands[lane] = lanes[lane].operand;
    lanes[lane].state = State::ready;
  }
  combine(operands);
}

void copy_async(void* shared, const void* global, int bytes, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes != 0) fail("cp.async: shared address not aligned to its bytes");
  if (valid && reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    fail("cp.async: global address not aligned to its bytes");
  }
  launch.fibers[launch.current].open_group.push_back({shared, global, bytes, valid});
}

void copy_async_commit() {
  Fiber& fiber = launch.fibers[launch.current];
  fiber.committed.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}

void copy_async_wait(int pending_groups) {
  auto& groups = launch.fibers[launch.current].committed;
  while (static_cast<int>(groups.size()) > pending_groups) {
    for (const Copy& copy : groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.shared, copy.global, copy.bytes);
      } else {
        std::memset(copy.shared, 0, copy.bytes);
      }
    }
    groups.erase(groups.begin());
  }
}

}  // namespace fastgan::cuda::host
