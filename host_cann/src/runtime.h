// What the files of the stand-in share: error codes, injected faults, streams.
//
// A "device" is a share of this process's memory, a stream is a queue with one thread. Everything that a stream is
// given is done in its order and later than the call that gave it, as on a chip.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define SHARED __attribute__((visibility("default")))  // between our own libraries

namespace host_cann {

using Error = int;

enum : Error {
  SUCCESS = 0,
  INVALID_PARAM = 100000,
  BAD_DEVICE = 107001,
  NO_CONTEXT = 107002,
  BAD_HANDLE = 107017,
  SYNC_TIMEOUT = 107020,
  REFUSED_CALL = 100024,   // "single operator not found"; torch_npu lets 207000, "not supported", pass with a warning
  OUT_OF_MEMORY = 207001,
  EXCHANGE_FAILED = 507022,  // the ranks of a communicator do not do the same
  WAIT_TIMEOUT = 507046,     // a peer did not come in time
};

// What an injected fault asks of a call. `later`: the call succeeds, and its stream fails when it gets there.
struct Verdict {
  Error code = SUCCESS;
  bool later = false;
};

// Count a call, and say whether a rule of HOST_CANN_FAULTS is for it (fault.cpp).
SHARED Verdict called(const char* name);

// A call that can be made to fail. The macros below put one of each into a section of their library, so that a rule for
// a call that nobody counts is known as wrong when it is read.
struct Entry {
  const char* name;
  bool on_stream;  // it gives a stream work
};

// Make a library's entries known.
SHARED void know(const Entry* from, const Entry* to);

// Keep the code and the text for aclrtGetLastError and aclGetRecentErrMsg, and return the code.
SHARED Error fail(Error code, const std::string& text);

// The same for an error that somebody met before: the text of that time is kept.
SHARED Error fail_again(Error code, const std::string& otherwise);

// A compute call: says its name on stderr and fails.
SHARED Error refuse(const char* name);

// A number from the environment.
SHARED long setting(const char* name, long otherwise);

// Work for a stream. `prior` is the error that the stream failed with before, or SUCCESS: then do nothing but what
// others wait for. Returns the error that the stream fails with.
using Task = std::function<Error(Error prior)>;

// Give a stream work. `stream` may be null: the device's default stream.
SHARED Error enqueue(void* stream, Task task);

// Wait until everything that the stream has been given by now is done; its error. No call is counted.
SHARED Error drain(void* stream, long timeout_ms = -1);

int current_device();                      // -1 where the thread has none
int device_count();
size_t device_memory();                    // bytes of one device
Error drain_device(int device, long timeout_ms);

}  // namespace host_cann

#define HOST_CANN_ENTRY(on_stream)                                                            \
  static host_cann::Entry entry __attribute__((section("host_cann_entries"), used)) = {__func__, on_stream}

// Once in every library that has entry points, inside of namespace host_cann.
#define HOST_CANN_ENTRIES()                                                                   \
  extern "C" Entry __start_host_cann_entries[] __attribute__((visibility("hidden")));         \
  extern "C" Entry __stop_host_cann_entries[] __attribute__((visibility("hidden")));          \
  __attribute__((constructor)) static void know_own() {                                       \
    know(__start_host_cann_entries, __stop_host_cann_entries);                                \
  }

// The first line of an entry point: count it, and fail where a rule says so.
#define CALLED()                                                    \
  do {                                                              \
    HOST_CANN_ENTRY(false);                                         \
    if (host_cann::Error code = host_cann::called(__func__).code) { \
      return code;                                                  \
    }                                                               \
  } while (0)

// The same where the call gives a stream work: a fault may come at once or in the stream's order.
#define CALLED_ON(stream)                                                                    \
  do {                                                                                       \
    HOST_CANN_ENTRY(true);                                                                   \
    host_cann::Verdict verdict = host_cann::called(__func__);                                \
    if (verdict.code && verdict.later) {                                                     \
      return host_cann::enqueue(stream, [code = verdict.code](host_cann::Error prior) {      \
        return prior ? prior : code;                                                         \
      });                                                                                    \
    }                                                                                        \
    if (verdict.code) {                                                                      \
      return verdict.code;                                                                   \
    }                                                                                        \
  } while (0)
