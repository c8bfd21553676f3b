// HCCL between processes of this machine. Every collective is a task of its stream; those of one communicator are done
// in the order of their calls, whatever their streams. Sums are taken in the order of ranks, so bits repeat.
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>

#include "mesh.h"
#include "reduce.h"

using namespace host_cann;

namespace {

enum Result { OK = 0, BAD_PARAMETER = 1, UNSUPPORTED = 5, TIMEOUT = 9 };

constexpr size_t ROOT_INFO = 4108;
constexpr size_t NAME = 128;

struct Communicator {
  std::shared_ptr<Mesh> mesh;
  std::string name;
  std::mutex mutex;
  std::condition_variable turns;
  uint64_t given = 0, served = 0;
  std::atomic<int> error{OK};
};

using Handle = std::shared_ptr<Communicator>;

Handle& of(void* handle) { return *static_cast<Handle*>(handle); }

char* at(void* base, uint64_t bytes) { return static_cast<char*>(base) + bytes; }
char* at(const void* base, uint64_t bytes) { return const_cast<char*>(static_cast<const char*>(base)) + bytes; }

double timeout() { return static_cast<double>(setting("HCCL_EXEC_TIMEOUT", 1800)); }

// Queue a collective: `body` moves the bytes when the stream and the communicator get there.
Result post(void* handle, void* stream, std::function<Error(Mesh&)> body) {
  Handle its = of(handle);
  uint64_t turn = 0;
  {
    std::lock_guard<std::mutex> lock(its->mutex);
    turn = its->given++;
  }
  const Error code = enqueue(stream, [its, turn, body = std::move(body)](Error prior) {
    std::unique_lock<std::mutex> lock(its->mutex);
    its->turns.wait(lock, [&] { return its->served == turn; });
    lock.unlock();
    const Error code = prior ? prior : body(*its->mesh);
    lock.lock();
    ++its->served;
    its->turns.notify_all();
    if (code && !prior) its->error = code == WAIT_TIMEOUT ? TIMEOUT : 4;
    return code;
  });
  return code ? BAD_PARAMETER : OK;
}

Result open(const std::string& name, uint32_t ranks, uint32_t rank, void** handle) {
  const auto seconds = static_cast<double>(setting("HCCL_CONNECT_TIMEOUT", 120));
  auto mesh = Mesh::join(name, static_cast<int>(ranks), static_cast<int>(rank), seconds);
  if (!mesh) {
    fail(WAIT_TIMEOUT, "EI0006 host_cann: the ranks of a communicator did not come together");
    return TIMEOUT;
  }
  auto its = std::make_shared<Communicator>();
  its->mesh = mesh;
  its->name = name;
  *handle = new Handle(its);
  return OK;
}

// Everybody's part to everybody: out[r] = rank r's `mine`.
Error gather(Mesh& mesh, const char* what, const void* mine, void* out, const std::vector<uint64_t>& sizes,
             const std::vector<uint64_t>& starts) {
  std::vector<Message> going, coming;
  for (int r = 0; r < mesh.ranks; ++r) {
    going.push_back({r, at(mine, 0), sizes[static_cast<size_t>(mesh.rank)]});
    coming.push_back({r, at(out, starts[static_cast<size_t>(r)]), sizes[static_cast<size_t>(r)]});
  }
  return mesh.exchange(what, going, coming, timeout());
}

// Rank r gets the reduction of everybody's slice r; `starts` and `counts` are in elements.
Error scatter_reduced(Mesh& mesh, const char* what, const void* mine, void* out, const std::vector<uint64_t>& counts,
                      const std::vector<uint64_t>& starts, int type, int operation) {
  const uint64_t unit = size_of(type), own = counts[static_cast<size_t>(mesh.rank)];
  std::vector<char> parts(static_cast<size_t>(own * unit) * static_cast<size_t>(mesh.ranks));
  std::vector<Message> going, coming;
  std::vector<const void*> ordered;
  for (int r = 0; r < mesh.ranks; ++r) {
    const auto index = static_cast<size_t>(r);
    going.push_back({r, at(mine, starts[index] * unit), counts[index] * unit});
    coming.push_back({r, parts.data() + index * own * unit, own * unit});
    ordered.push_back(coming.back().data);
  }
  if (Error code = mesh.exchange(what, going, coming, timeout())) return code;
  return reduce(out, ordered.data(), ordered.size(), own, type, operation);
}

// Equal shares of `count` elements, the first ones larger by one where they do not divide.
std::pair<std::vector<uint64_t>, std::vector<uint64_t>> shares(uint64_t count, int ranks) {
  std::vector<uint64_t> counts, starts;
  uint64_t start = 0;
  for (int r = 0; r < ranks; ++r) {
    counts.push_back(count / static_cast<uint64_t>(ranks) + (static_cast<uint64_t>(r) < count % static_cast<uint64_t>(ranks)));
    starts.push_back(start);
    start += counts.back();
  }
  return {counts, starts};
}

std::vector<uint64_t> scaled(const void* numbers, size_t count, uint64_t unit) {
  std::vector<uint64_t> found(count);
  for (size_t i = 0; i < count; ++i) found[i] = static_cast<const uint64_t*>(numbers)[i] * unit;
  return found;
}

Result known(int type) { return size_of(type) ? OK : UNSUPPORTED; }

}  // namespace

namespace host_cann {
HOST_CANN_ENTRIES()
}  // namespace host_cann

#define TYPED(type) \
  CALLED_ON(stream); \
  if (known(type)) return known(type)

EXPORT int HcclGetRootInfo(char* info) {
  CALLED();
  static std::atomic<unsigned> made{0};
  timespec t{};
  clock_gettime(CLOCK_REALTIME, &t);
  std::memset(info, 0, ROOT_INFO);
  std::snprintf(info, 64, "host_cann_%d_%u_%lx", getpid(), made++, static_cast<unsigned long>(t.tv_sec * 1000000000 + t.tv_nsec));
  return OK;
}

EXPORT int HcclCommInitRootInfo(uint32_t ranks, const char* info, uint32_t rank, void** handle) {
  CALLED();
  return open(std::string(info, strnlen(info, NAME - 1)), ranks, rank, handle);
}
EXPORT int HcclCommInitRootInfoConfig(uint32_t ranks, const char* info, uint32_t rank, const void*, void** handle) {
  CALLED();
  return open(std::string(info, strnlen(info, NAME - 1)), ranks, rank, handle);
}

// Some ranks of a communicator as one of their own. `sub_rank`: this process's place among them.
EXPORT int HcclCreateSubCommConfig(void** parent, uint32_t count, const uint32_t* ranks, uint64_t id, uint32_t sub_rank,
                                   const void*, void** handle) {
  CALLED();
  *handle = nullptr;
  if (!ranks) return OK;  // this process has no part in it
  return open(of(*parent)->name + "_" + std::to_string(id) + "_" + std::to_string(ranks[0]), count, sub_rank, handle);
}

EXPORT int HcclCommDestroy(void* handle) {
  CALLED();
  delete static_cast<Handle*>(handle);  // tasks under way keep what they need
  return OK;
}

EXPORT int HcclGetCommName(void* handle, char* name) {
  CALLED();
  std::strncpy(name, of(handle)->name.c_str(), NAME - 1);
  name[NAME - 1] = 0;
  return OK;
}
EXPORT int HcclGetRankSize(void* handle, uint32_t* ranks) {
  *ranks = static_cast<uint32_t>(of(handle)->mesh->ranks);
  return OK;
}
EXPORT int HcclGetRankId(void* handle, uint32_t* rank) {
  *rank = static_cast<uint32_t>(of(handle)->mesh->rank);
  return OK;
}
EXPORT int HcclGetCommAsyncError(void* handle, int* error) {
  CALLED();
  *error = of(handle)->error;
  return OK;
}
EXPORT uint32_t HcclGetCommConfigCapability() { return 0; }  // no optional field of the config is read
EXPORT int HcclSetConfig(int, int32_t) { return OK; }        // it asks for repeatable sums: they always are

EXPORT const char* HcclGetErrorString(int code) {
  switch (code) {
    case OK: return "no error";
    case BAD_PARAMETER: return "parameter error";
    case UNSUPPORTED: return "not supported";
    case TIMEOUT: return "timeout";
    default: return "HCCL error";
  }
}

EXPORT int HcclAllReduce(void* in, void* out, uint64_t count, int type, int operation, void* handle, void* stream) {
  TYPED(type);
  return post(handle, stream, [=](Mesh& mesh) {
    const uint64_t unit = size_of(type);
    auto [counts, starts] = shares(count, mesh.ranks);
    const auto own = static_cast<size_t>(mesh.rank);
    std::vector<char> slice(counts[own] * unit);
    if (Error code = scatter_reduced(mesh, "AllReduce", in, slice.data(), counts, starts, type, operation)) return code;
    for (size_t r = 0; r < counts.size(); ++r) counts[r] *= unit, starts[r] *= unit;
    return gather(mesh, "AllReduce", slice.data(), out, counts, starts);
  });
}

EXPORT int HcclReduce(void* in, void* out, uint64_t count, int type, int operation, uint32_t root, void* handle,
                      void* stream) {
  TYPED(type);
  return post(handle, stream, [=](Mesh& mesh) {
    const uint64_t size = count * size_of(type);
    if (mesh.rank != static_cast<int>(root)) {
      return mesh.exchange("Reduce", {{static_cast<int>(root), in, size}}, {}, timeout());
    }
    std::vector<uint64_t> counts(static_cast<size_t>(mesh.ranks), 0), starts(counts);
    counts[root] = count;
    std::vector<char> parts(static_cast<size_t>(size) * static_cast<size_t>(mesh.ranks));
    std::vector<Message> coming;
    std::vector<const void*> ordered;
    for (int r = 0; r < mesh.ranks; ++r) {
      coming.push_back({r, parts.data() + static_cast<size_t>(r) * size, size});
      ordered.push_back(coming.back().data);
    }
    if (Error code = mesh.exchange("Reduce", {{mesh.rank, in, size}}, coming, timeout())) return code;
    return reduce(out, ordered.data(), ordered.size(), count, type, operation);
  });
}

EXPORT int HcclReduceScatter(void* in, void* out, uint64_t count, int type, int operation, void* handle, void* stream) {
  TYPED(type);
  return post(handle, stream, [=](Mesh& mesh) {
    std::vector<uint64_t> counts(static_cast<size_t>(mesh.ranks), count), starts;
    for (size_t r = 0; r < counts.size(); ++r) starts.push_back(r * count);
    return scatter_reduced(mesh, "ReduceScatter", in, out, counts, starts, type, operation);
  });
}

EXPORT int HcclReduceScatterV(void* in, const void* counts_in, const void* starts_in, void* out, uint64_t, int type,
                              int operation, void* handle, void* stream) {
  TYPED(type);
  const auto ranks = static_cast<size_t>(of(handle)->mesh->ranks);
  auto counts = scaled(counts_in, ranks, 1), starts = scaled(starts_in, ranks, 1);  // the caller's may go with the call
  return post(handle, stream, [=](Mesh& mesh) {
    return scatter_reduced(mesh, "ReduceScatterV", in, out, counts, starts, type, operation);
  });
}

EXPORT int HcclAllGather(void* in, void* out, uint64_t count, int type, void* handle, void* stream) {
  TYPED(type);
  return post(handle, stream, [=](Mesh& mesh) {
    const uint64_t size = count * size_of(type);
    std::vector<uint64_t> sizes(static_cast<size_t>(mesh.ranks), size), starts;
    for (size_t r = 0; r < sizes.size(); ++r) starts.push_back(r * size);
    return gather(mesh, "AllGather", in, out, sizes, starts);
  });
}

EXPORT int HcclAllGatherV(void* in, uint64_t, void* out, const void* counts, const void* displacements, int type,
                          void* handle, void* stream) {
  TYPED(type);
  const auto ranks = static_cast<size_t>(of(handle)->mesh->ranks);
  auto sizes = scaled(counts, ranks, size_of(type)), starts = scaled(displacements, ranks, size_of(type));
  return post(handle, stream, [=](Mesh& mesh) { return gather(mesh, "AllGatherV", in, out, sizes, starts); });
}

EXPORT int HcclBroadcast(void* buffer, uint64_t count, int type, uint32_t root, void* handle, void* stream) {
  TYPED(type);
  return post(handle, stream, [=](Mesh& mesh) {
    const uint64_t size = count * size_of(type);
    const int from = static_cast<int>(root);
    if (mesh.rank != from) return mesh.exchange("Broadcast", {}, {{from, buffer, size}}, timeout());
    std::vector<Message> going;
    for (int r = 0; r < mesh.ranks; ++r) {
      if (r != from) going.push_back({r, buffer, size});
    }
    return mesh.exchange("Broadcast", going, {}, timeout());
  });
}

EXPORT int HcclScatter(void* in, void* out, uint64_t count, int type, uint32_t root, void* handle, void* stream) {
  TYPED(type);
  return post(handle, stream, [=](Mesh& mesh) {
    const uint64_t size = count * size_of(type);
    std::vector<Message> going;
    for (int r = 0; r < mesh.ranks && mesh.rank == static_cast<int>(root); ++r) {
      going.push_back({r, at(in, static_cast<uint64_t>(r) * size), size});
    }
    return mesh.exchange("Scatter", going, {{static_cast<int>(root), out, size}}, timeout());
  });
}

EXPORT int HcclSend(void* buffer, uint64_t count, int type, uint32_t peer, void* handle, void* stream) {
  TYPED(type);
  return post(handle, stream, [=](Mesh& mesh) {
    return mesh.exchange("SendRecv", {{static_cast<int>(peer), buffer, count * size_of(type)}}, {}, timeout());
  });
}
EXPORT int HcclRecv(void* buffer, uint64_t count, int type, uint32_t peer, void* handle, void* stream) {
  TYPED(type);
  return post(handle, stream, [=](Mesh& mesh) {
    return mesh.exchange("SendRecv", {}, {{static_cast<int>(peer), buffer, count * size_of(type)}}, timeout());
  });
}

// As the wheel lays it out.
struct SendRecvItem {
  int receives;
  void* buffer;
  uint64_t count;
  int type;
  uint32_t peer;
};

EXPORT int HcclBatchSendRecv(const SendRecvItem* items, uint32_t count, void* handle, void* stream) {
  CALLED_ON(stream);
  std::vector<Message> going, coming;
  for (uint32_t i = 0; i < count; ++i) {
    if (known(items[i].type)) return UNSUPPORTED;
    auto& line = items[i].receives ? coming : going;
    line.push_back({static_cast<int>(items[i].peer), items[i].buffer, items[i].count * size_of(items[i].type)});
  }
  return post(handle, stream, [=](Mesh& mesh) { return mesh.exchange("SendRecv", going, coming, timeout()); });
}

EXPORT int HcclAlltoAll(const void* in, uint64_t out_count, int type, const void* out, uint64_t in_count, int in_type,
                        void* handle, void* stream) {
  TYPED(type);
  if (known(in_type)) return UNSUPPORTED;
  return post(handle, stream, [=](Mesh& mesh) {
    std::vector<Message> going, coming;
    const uint64_t sent = out_count * size_of(type), received = in_count * size_of(in_type);
    for (int r = 0; r < mesh.ranks; ++r) {
      going.push_back({r, at(in, static_cast<uint64_t>(r) * sent), sent});
      coming.push_back({r, at(out, static_cast<uint64_t>(r) * received), received});
    }
    return mesh.exchange("AlltoAll", going, coming, timeout());
  });
}

EXPORT int HcclAlltoAllV(const void* in, const void* out_counts, const void* out_starts, int type, const void* out,
                         const void* in_counts, const void* in_starts, int in_type, void* handle, void* stream) {
  TYPED(type);
  if (known(in_type)) return UNSUPPORTED;
  const auto ranks = static_cast<size_t>(of(handle)->mesh->ranks);
  auto sent = scaled(out_counts, ranks, size_of(type)), from = scaled(out_starts, ranks, size_of(type));
  auto received = scaled(in_counts, ranks, size_of(in_type)), to = scaled(in_starts, ranks, size_of(in_type));
  return post(handle, stream, [=](Mesh& mesh) {
    std::vector<Message> going, coming;
    for (size_t r = 0; r < ranks; ++r) {
      going.push_back({static_cast<int>(r), at(in, from[r]), sent[r]});
      coming.push_back({static_cast<int>(r), at(out, to[r]), received[r]});
    }
    return mesh.exchange("AlltoAllV", going, coming, timeout());
  });
}

EXPORT int HcclBarrier(void* handle, void* stream) {
  CALLED_ON(stream);
  return post(handle, stream, [](Mesh& mesh) {
    char mine = 0;
    std::vector<char> all(static_cast<size_t>(mesh.ranks));
    std::vector<uint64_t> sizes(all.size(), 1), starts;
    for (size_t r = 0; r < all.size(); ++r) starts.push_back(r);
    return gather(mesh, "Barrier", &mine, all.data(), sizes, starts);
  });
}
