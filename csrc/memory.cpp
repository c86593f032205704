// Memory of large outputs on the CPU. What is larger than 32 MB the C library returns to the system as soon as it is
// freed, and the next output gets new pages, which the system takes longer to hand out than the warp takes to fill them.
// So the memory of freed outputs is kept for later ones, up to a limit, as PyTorch does on CUDA.
#include <cstdlib>
#include <mutex>
#include <vector>

#include "warp.h"

namespace minter {
namespace {

constexpr int64_t kLeast = int64_t{32} << 20;  // bytes; what is smaller, the C library keeps by itself
constexpr int64_t kPage = int64_t{2} << 20;    // a large page

struct Kept {
  std::mutex mutex;
  std::vector<Memory> freed;  // oldest first
  int64_t bytes = 0;          // of them together
  int64_t limit = int64_t{2} << 30;
};

Kept& kept = *new Kept;  // lives as long as the process: the last tensors may be freed after everything else

// Removes the oldest until the others are within the limit; for the caller to free, who holds the mutex no more then.
std::vector<Memory> remove_surplus() {
  std::vector<Memory> surplus;
  auto end = kept.freed.begin();
  for (; kept.bytes > kept.limit; ++end) kept.bytes -= end->bytes;
  surplus.assign(kept.freed.begin(), end);
  kept.freed.erase(kept.freed.begin(), end);
  return surplus;
}

void free_all(const std::vector<Memory>& blocks) {
  for (const Memory& block : blocks) std::free(block.data);
}

}  // namespace

Memory take_memory(int64_t bytes) {
#if defined(__linux__)
  if (bytes <= kLeast) return {};
  bytes = (bytes + kPage - 1) / kPage * kPage;
  {
    // Where another thread is at it (or was, when this process was forked), it does without.
    const std::unique_lock lock(kept.mutex, std::try_to_lock);
    if (!lock || bytes > kept.limit) return {};
    for (auto block = kept.freed.end(); block != kept.freed.begin();) {
      --block;
      if (block->bytes < bytes || block->bytes / 2 > bytes) continue;  // too small, or a waste
      const Memory found = *block;
      kept.freed.erase(block);
      kept.bytes -= found.bytes;
      return found;
    }
  }
  void* data = std::aligned_alloc(kPage, bytes);
  return {data, data ? bytes : 0};
#else
  return {};
#endif
}

void give_back(Memory memory) {
  std::vector<Memory> surplus;
  {
    const std::unique_lock lock(kept.mutex, std::try_to_lock);
    if (lock) {
      kept.freed.push_back(memory);
      kept.bytes += memory.bytes;
      surplus = remove_surplus();
    } else {
      surplus = {memory};
    }
  }
  free_all(surplus);
}

int64_t keep_memory(int64_t limit) {
  std::vector<Memory> surplus;
  int64_t before = 0;
  {
    const std::lock_guard lock(kept.mutex);
    before = kept.limit;
    kept.limit = limit;
    surplus = remove_surplus();
  }
  free_all(surplus);
  return before;
}

}  // namespace minter
