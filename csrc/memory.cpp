// Memory of large outputs on the CPU. What is larger than 32 MiB the C library returns to the system as soon as it is
// freed, and the next output gets new pages, which the system takes longer to hand out than the warp takes to fill them.
// So the memory of freed outputs is kept for later ones, up to a limit.
#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <unistd.h>
#endif

#include "warp.h"

namespace minter {
namespace {

constexpr int64_t kLeast = int64_t{32} << 20;  // bytes; what is smaller, the C library keeps by itself
constexpr int64_t kPage = int64_t{2} << 20;    // a large page
constexpr size_t kMost = 256;                  // blocks

struct Kept {
  std::mutex mutex;
  std::vector<Memory> freed;  // oldest first
  int64_t bytes = 0;          // of them together
  int64_t limit = int64_t{2} << 30;

  Kept() {
    freed.reserve(kMost);  // freeing an output is not to fail for want of memory
#if defined(__linux__)
    limit = std::min<int64_t>(limit, sysconf(_SC_PHYS_PAGES) / 8 * sysconf(_SC_PAGESIZE));
#endif
  }

  Memory remove(std::vector<Memory>::iterator block) {
    const Memory removed = *block;
    bytes -= removed.bytes;
    freed.erase(block);
    return removed;
  }

  void shrink(int64_t to) {
    while (bytes > to) std::free(remove(freed.begin()).data);
  }
};

// Lives as long as the process: the last tensors may be freed after everything else.
Kept& kept() {
  static Kept& instance = *new Kept;
  return instance;
}

}  // namespace

Memory take_memory(int64_t bytes) {
#if defined(__linux__)
  if (bytes <= kLeast) return {};
  bytes = (bytes + kPage - 1) / kPage * kPage;
  Kept& k = kept();
  // Where another thread is at it (or was, when this process was forked), it does without.
  const std::unique_lock lock(k.mutex, std::try_to_lock);
  if (!lock) return {};
  for (auto block = k.freed.end(); block != k.freed.begin();) {  // the newest that is not too small, nor a waste
    --block;
    if (block->bytes >= bytes && block->bytes / 2 <= bytes) return k.remove(block);
  }
  if (bytes > k.limit) {
    k.shrink(0);
    return {};
  }
  void* data = std::aligned_alloc(kPage, bytes);
  if (!data) {
    k.shrink(0);
    data = std::aligned_alloc(kPage, bytes);
  }
  return {data, data ? bytes : 0};
#else
  return {};
#endif
}

void give_back(Memory memory) {
  Kept& k = kept();
  const std::unique_lock lock(k.mutex, std::try_to_lock);
  if (!lock || memory.bytes > k.limit || k.freed.size() == kMost) return std::free(memory.data);
  k.freed.push_back(memory);
  k.bytes += memory.bytes;
  k.shrink(k.limit);
}

int64_t keep_memory(int64_t limit) {
  Kept& k = kept();
  const std::lock_guard lock(k.mutex);
  const int64_t before = k.limit;
  k.limit = limit;
  k.shrink(limit);
  return before;
}

}  // namespace minter
