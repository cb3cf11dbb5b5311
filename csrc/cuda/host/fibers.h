// Host shim, part 2: a block's threads as fibers.
//
// What the scheduler does so that mistakes show:
//   * dynamic shared memory is a heap block of exactly the requested size (the address sanitizer sees one byte
//     too far), filled with 0xFF (NaN in every floating type) before each block;
//   * a warp runs as far as it can before the next one starts, in one of three orders (ascending, descending,
//     random with random pauses): a missing __syncthreads() lets some warp read what is not written yet, or
//     write what is not read yet, in at least one of them;
//   * cp.async copies land only when their thread waits for them;
//   * lanes that meet in different warp operations, and blocks in which nobody can go on, stop the program.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime.h"

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fastgan::cuda::host {

enum class Schedule { ascending, descending, random };

// Order in which blocks, warps and lanes run from now on.
void set_schedule(Schedule schedule, uint64_t seed = 0);

// Runs body(context) once for every thread of every block.
void run_grid(dim3 grid, int threads, size_t shared_bytes, void (*body)(void* context), void* context);

void* shared_memory();
void block_barrier();

// All 32 lanes of the calling thread's warp meet here, each with its operand; the last one runs `combine` on all
// of them, in lane order. `combine` also identifies the operation: meeting with different ones is an error.
using Combine = void (*)(void* const operands[32]);
void warp_collective(void* operand, Combine combine);

// cp.async of 4, 8 or 16 bytes (zeros if !valid), its commit, and the wait that leaves `pending_groups` groups in flight.
void copy_async(void* shared, const void* global, int bytes, bool valid);
void copy_async_commit();
void copy_async_wait(int pending_groups);

[[noreturn]] void fail(const char* message);

}  // namespace fastgan::cuda::host
