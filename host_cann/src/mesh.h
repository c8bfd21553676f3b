// Every rank of a communicator joined to every other, through shared memory.
//
// Between each ordered pair of ranks lies a ring of bytes with one writer and one reader. All collectives are made of
// one primitive: move these messages out and those in, all at once, so that no order of peers can block.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime.h"

namespace host_cann {

// A message of a collective, to or from a peer. Messages between two ranks keep their order.
struct Message {
  int peer;
  void* data;
  uint64_t size;
};

class Mesh {
 public:
  // Join the ranks of a name that all of them know. Null where the others do not come in time.
  static std::shared_ptr<Mesh> join(const std::string& name, int ranks, int rank, double timeout_s);
  ~Mesh();

  // Move all messages. `what` is the call's kind: a peer that is in another kind of call, or has another size, is an
  // error (EXCHANGE_FAILED); so is one that does not come within timeout_s (WAIT_TIMEOUT).
  Error exchange(const char* what, std::vector<Message> out, std::vector<Message> in, double timeout_s);

  const int ranks, rank;

 private:
  struct Ring;
  struct Memory;
  Mesh(Memory* memory, size_t size, int ranks, int rank) : ranks(ranks), rank(rank), memory_(memory), size_(size) {}
  Ring& ring(int from, int to);

  Memory* memory_;
  size_t size_;
};

}  // namespace host_cann
