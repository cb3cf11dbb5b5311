#include "kept_memory.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include <cstring>
#include <list>
#include <mutex>

namespace fastgan {
namespace {

constexpr size_t kSmallest = size_t(1) << 20;  // what is allocated here at all
constexpr size_t kPage = size_t(1) << 21;      // a large page; sizes are multiples of it
constexpr size_t kMostKept = size_t(1) << 28;
constexpr size_t kLargestOnHeap = (size_t(1) << 25) - (size_t(1) << 16);

struct Block {
  void* data;
  size_t size;
};

class KeptMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kSmallest) return c10::GetCPUAllocator()->allocate(bytes);
    Block* block = take((bytes + kPage - 1) / kPage * kPage);
    c10::profiledCPUMemoryReporter().New(block->data, bytes);
    return {block->data, block, &release, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  // glibc takes blocks from its heap, which it gives back more rarely, up to the size of the largest that was ever freed and at
  // most 32 MiB (mallopt(3)). Since what is kept here is not freed, the rest of the program, such as an optimizer's temporary
  // tensors, would have it do with less than without fastgan: so one block is freed, untouched.
  KeptMemory() { c10::free_cpu(c10::alloc_cpu(kLargestOnHeap)); }

  static KeptMemory& instance() {
    static auto* memory = new KeptMemory;  // outlives the tensors of static objects
    return *memory;
  }

 private:
  // Nobody waits for the list: in a process forked while another thread had it, it would be for ever.
  using Lock = std::unique_lock<std::mutex>;

  // The smallest free block that is large enough, and at most a quarter larger, or a new one.
  Block* take(size_t size) {
    if (const Lock lock(mutex_, std::try_to_lock); lock.owns_lock()) {
      auto best = free_.end();
      for (auto i = free_.begin(); i != free_.end(); ++i)
        if ((*i)->size >= size && (*i)->size <= size + size / 4 && (best == free_.end() || (*i)->size < (*best)->size)) best = i;
      if (best != free_.end()) {
        Block* block = *best;
        kept_ -= block->size;
        free_.erase(best);
        return block;
      }
    }
    void* data = c10::alloc_cpu(size);
#ifdef MADV_HUGEPAGE
    const auto address = reinterpret_cast<uintptr_t>(data);
    const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + size) / kPage * kPage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
    return new Block{data, size};
  }

  // Where too much is kept, what was released first goes first.
  static void release(void* context) {
    KeptMemory& memory = instance();
    auto* block = static_cast<Block*>(context);
    c10::profiledCPUMemoryReporter().Delete(block->data);
    std::list<Block*> dropped;
    if (const Lock lock(memory.mutex_, std::try_to_lock); !lock.owns_lock()) {
      dropped.push_back(block);
    } else {
      memory.free_.push_back(block);
      memory.kept_ += block->size;
      while (memory.kept_ > kMostKept) {
        memory.kept_ -= memory.free_.front()->size;
        dropped.splice(dropped.end(), memory.free_, memory.free_.begin());
      }
    }
    for (Block* each : dropped) {
      c10::free_cpu(each->data);
      delete each;
    }
  }

  std::mutex mutex_;
  std::list<Block*> free_;  // in the order they were released
  size_t kept_ = 0;         // bytes of free_
};

}  // namespace

at::Tensor empty_kept(at::IntArrayRef sizes, at::ScalarType dtype, bool channels_last) {
  return at::detail::empty_generic(sizes, &KeptMemory::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype,
                                   channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

}  // namespace fastgan
