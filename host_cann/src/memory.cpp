// Device memory: this process's own, counted by device. Every copy is checked against what was allocated.
#include <cstdlib>
#include <cstring>
#include <map>

#include "runtime.h"

using namespace host_cann;

namespace {

struct Block {
  size_t size;
  int device;
};

struct Heap {
  std::mutex mutex;
  std::map<uintptr_t, Block> blocks;
  size_t used[64] = {};
};

Heap& heap() {
  static Heap* its = new Heap;
  return *its;
}

uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// Whether [pointer, pointer + size) lies inside one live allocation. Under the mutex.
bool inside(const Heap& all, const void* pointer, size_t size) {
  auto next = all.blocks.upper_bound(address(pointer));
  if (next == all.blocks.begin()) return false;
  const auto& [start, block] = *std::prev(next);
  return address(pointer) - start <= block.size && size <= block.size - (address(pointer) - start);
}

enum Kind { HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE };

Error check(void* to, size_t room, const void* from, size_t size, int kind) {
  if (size > room) return fail(INVALID_PARAM, "host_cann: a copy is larger than its destination");
  if (size == 0) return SUCCESS;
  Heap& all = heap();
  std::lock_guard<std::mutex> lock(all.mutex);
  const bool writes = kind == HOST_TO_DEVICE || kind == DEVICE_TO_DEVICE;
  const bool reads = kind == DEVICE_TO_HOST || kind == DEVICE_TO_DEVICE;
  if ((writes && !inside(all, to, size)) || (reads && !inside(all, from, size))) {
    return fail(INVALID_PARAM, "host_cann: a copy touches memory that the device does not have");
  }
  return SUCCESS;
}

}  // namespace

EXPORT Error aclrtMalloc(void** pointer, size_t size, int) {
  CALLED();
  const int device = current_device();
  if (device < 0) return fail(NO_CONTEXT, "host_cann: this thread has no device");
  Heap& all = heap();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (size > device_memory() - all.used[device]) return fail(OUT_OF_MEMORY, "host_cann: the device's memory is full");
  if (posix_memalign(pointer, 512, size ? size : 512)) return fail(OUT_OF_MEMORY, "host_cann: the host has no memory");
  all.blocks[address(*pointer)] = {size, device};
  all.used[device] += size;
  return SUCCESS;
}
EXPORT Error aclrtMallocAlign32(void** pointer, size_t size, int policy) { return aclrtMalloc(pointer, size, policy); }

EXPORT Error aclrtFree(void* pointer) {
  CALLED();
  {
    Heap& all = heap();
    std::lock_guard<std::mutex> lock(all.mutex);
    auto found = all.blocks.find(address(pointer));
    if (found == all.blocks.end()) return fail(INVALID_PARAM, "host_cann: freed what was not allocated");
    all.used[found->second.device] -= found->second.size;
    all.blocks.erase(found);
  }
  std::free(pointer);
  return SUCCESS;
}

EXPORT Error aclrtMallocHost(void** pointer, size_t size) {
  CALLED();
  return posix_memalign(pointer, 512, size ? size : 512) ? fail(OUT_OF_MEMORY, "host_cann: no host memory") : SUCCESS;
}
EXPORT Error aclrtFreeHost(void* pointer) {
  CALLED();
  std::free(pointer);
  return SUCCESS;
}

EXPORT Error aclrtGetMemInfo(int, size_t* free, size_t* total) {
  CALLED();
  const int device = current_device();
  if (device < 0) return fail(NO_CONTEXT, "host_cann: this thread has no device");
  Heap& all = heap();
  std::lock_guard<std::mutex> lock(all.mutex);
  *total = device_memory();
  *free = *total - all.used[device];
  return SUCCESS;
}

EXPORT Error aclrtMemcpy(void* to, size_t room, const void* from, size_t size, int kind) {
  CALLED();
  if (Error code = check(to, room, from, size, kind)) return code;
  std::memmove(to, from, size);
  return SUCCESS;
}

EXPORT Error aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t size, int kind, void* stream) {
  CALLED_ON(stream);
  if (Error code = check(to, room, from, size, kind)) return code;
  return enqueue(stream, [=](Error prior) {
    if (!prior) std::memmove(to, from, size);
    return prior;
  });
}

EXPORT Error aclrtMemset(void* to, size_t room, int32_t value, size_t size) {
  CALLED();
  if (Error code = check(to, room, to, size, DEVICE_TO_DEVICE)) return code;
  std::memset(to, value, size);
  return SUCCESS;
}

EXPORT Error aclrtMemsetAsync(void* to, size_t room, int32_t value, size_t size, void* stream) {
  CALLED_ON(stream);
  if (Error code = check(to, room, to, size, DEVICE_TO_DEVICE)) return code;
  return enqueue(stream, [=](Error prior) {
    if (!prior) std::memset(to, value, size);
    return prior;
  });
}
