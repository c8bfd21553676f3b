#include "mesh.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>

namespace host_cann {
namespace {

constexpr uint64_t ROOM = 256 << 10;  // bytes of a ring
constexpr int MOST_RANKS = 64;

double now_s() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) / 1e9;
}

// A number that others wait for to change.
struct Bell {
  std::atomic<uint32_t> rung;

  void ring() {
    rung.fetch_add(1);
    syscall(SYS_futex, &rung, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
  }
  void wait(uint32_t before) {
    const timespec most{0, 50'000'000};  // then look at the time
    syscall(SYS_futex, &rung, FUTEX_WAIT, before, &most, nullptr, 0);
  }
};

// What precedes a message's bytes.
struct Head {
  char what[16];
  uint64_t size;
};

}  // namespace

struct Mesh::Ring {
  alignas(64) std::atomic<uint64_t> written;
  alignas(64) std::atomic<uint64_t> read;
  alignas(64) char bytes[ROOM];

  // Move up to `size` bytes; how many.
  uint64_t put(const char* from, uint64_t size) {
    const uint64_t at = written.load(std::memory_order_relaxed), free = ROOM - (at - read.load(std::memory_order_acquire));
    const uint64_t count = std::min(size, free), first = std::min(count, ROOM - at % ROOM);
    std::memcpy(bytes + at % ROOM, from, first);
    std::memcpy(bytes, from + first, count - first);
    written.store(at + count, std::memory_order_release);
    return count;
  }
  uint64_t take(char* to, uint64_t size) {
    const uint64_t at = read.load(std::memory_order_relaxed), there = written.load(std::memory_order_acquire) - at;
    const uint64_t count = std::min(size, there), first = std::min(count, ROOM - at % ROOM);
    std::memcpy(to, bytes + at % ROOM, first);
    std::memcpy(to + first, bytes, count - first);
    read.store(at + count, std::memory_order_release);
    return count;
  }
};

struct Mesh::Memory {
  std::atomic<uint32_t> joined;
  Bell bells[MOST_RANKS];  // rung when a ring to or from a rank moved
  Ring* rings() { return reinterpret_cast<Ring*>(reinterpret_cast<char*>(this) + 4096); }
};

Mesh::Ring& Mesh::ring(int from, int to) { return memory_->rings()[from * ranks + to]; }

std::shared_ptr<Mesh> Mesh::join(const std::string& name, int ranks, int rank, double timeout_s) {
  if (ranks < 1 || ranks > MOST_RANKS || rank < 0 || rank >= ranks) return nullptr;
  const std::string path = "/" + name;
  const size_t size = 4096 + sizeof(Ring) * static_cast<size_t>(ranks * ranks);
  const int file = shm_open(path.c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0) return nullptr;
  void* memory = ftruncate(file, static_cast<off_t>(size)) ? MAP_FAILED
                 : mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) return nullptr;
  std::shared_ptr<Mesh> mesh(new Mesh(static_cast<Memory*>(memory), size, ranks, rank));
  std::atomic<uint32_t>& joined = mesh->memory_->joined;
  joined.fetch_add(1);
  const double start = now_s();
  bool together = true;
  while (together && joined.load() < static_cast<uint32_t>(ranks)) {
    usleep(200);
    together = now_s() - start < timeout_s;
  }
  if (rank == 0 || !together) shm_unlink(path.c_str());
  return together ? mesh : nullptr;
}

Mesh::~Mesh() { munmap(memory_, size_); }

namespace {

// A message on its way: first its head, then its bytes.
struct Moving {
  Message message;
  Head head;
  uint64_t moved = 0;

  bool done() const { return moved == sizeof(Head) + message.size; }
  char* place() {
    return moved < sizeof(Head) ? reinterpret_cast<char*>(&head) + moved
                                : static_cast<char*>(message.data) + (moved - sizeof(Head));
  }
  uint64_t left() const { return moved < sizeof(Head) ? sizeof(Head) - moved : sizeof(Head) + message.size - moved; }
};

std::vector<std::vector<Moving>> by_peer(const char* what, const std::vector<Message>& messages, int ranks) {
  std::vector<std::vector<Moving>> lines(static_cast<size_t>(ranks));
  for (const Message& message : messages) {
    Moving moving{message, {}, 0};
    std::strncpy(moving.head.what, what, sizeof(moving.head.what) - 1);
    moving.head.size = message.size;
    lines[static_cast<size_t>(message.peer)].push_back(moving);
  }
  return lines;
}

}  // namespace

Error Mesh::exchange(const char* what, std::vector<Message> out, std::vector<Message> in, double timeout_s) {
  auto going = by_peer(what, out, ranks), coming = by_peer(what, in, ranks);
  std::vector<size_t> gone(static_cast<size_t>(ranks)), come(static_cast<size_t>(ranks));
  double last = now_s();
  Bell& bell = memory_->bells[rank];
  while (true) {
    const uint32_t before = bell.rung.load();
    bool moved = false, open = false;
    for (int peer = 0; peer < ranks; ++peer) {
      const auto index = static_cast<size_t>(peer);
      bool touched = false;
      for (; gone[index] < going[index].size(); ++gone[index]) {
        Moving& one = going[index][gone[index]];
        while (!one.done()) {
          const uint64_t count = ring(rank, peer).put(one.place(), one.left());
          if (count == 0) break;
          one.moved += count;
          touched = true;
        }
        if (!one.done()) break;
      }
      for (; come[index] < coming[index].size(); ++come[index]) {
        Moving& one = coming[index][come[index]];
        const Head expected = one.head;
        while (!one.done()) {
          const uint64_t count = ring(peer, rank).take(one.place(), one.left());
          if (count == 0) break;
          one.moved += count;
          touched = true;
          if (one.moved == sizeof(Head) && std::memcmp(&one.head, &expected, sizeof(Head)) != 0) {
            return fail(EXCHANGE_FAILED, "host_cann: rank " + std::to_string(rank) + " is in " + what + " of " +
                                             std::to_string(expected.size) + " bytes, rank " + std::to_string(peer) +
                                             " in " + one.head.what + " of " + std::to_string(one.head.size));
          }
        }
        if (!one.done()) break;
      }
      if (touched) memory_->bells[peer].ring();
      moved = moved || touched;
      open = open || gone[index] < going[index].size() || come[index] < coming[index].size();
    }
    if (!open) return SUCCESS;
    if (moved) {
      last = now_s();
    } else if (now_s() - last > timeout_s) {
      return fail(WAIT_TIMEOUT, std::string("EI0002 host_cann: rank ") + std::to_string(rank) + " waited in " + what +
                                    " for a peer that did not come");
    } else {
      bell.wait(before);
    }
  }
}

}  // namespace host_cann
