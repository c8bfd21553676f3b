// Streams and events. A stream is a queue with one thread that begins with its first task; an event counts how often
// it was recorded (at the call) and reached (in the stream's order), so that a wait means the record before it.
#include <time.h>
#include <unistd.h>

#include <chrono>
#include <memory>
#include <set>
#include <thread>

#include "runtime.h"

using namespace host_cann;

namespace {

class Stream {
 public:
  explicit Stream(int id, int device)
      : id(id), device(device), jitter_(setting("HOST_CANN_JITTER_US", 0)),
        random_(static_cast<uint32_t>(id) * 2654435761u + 1) {}

  void push(Task task) {
    std::lock_guard<std::mutex> lock(mutex_);
    tasks_.push_back(std::move(task));
    ++given_;
    if (!running_) {
      running_ = true;
      std::thread([this] { work(); }).detach();  // a stream lives as long as the process: see destroy
    }
    more_.notify_one();
  }

  Error wait(long timeout_ms) {
    std::unique_lock<std::mutex> lock(mutex_);
    const uint64_t target = given_;
    auto reached = [&] { return done_ >= target; };
    if (timeout_ms < 0) {
      progress_.wait(lock, reached);
    } else if (!progress_.wait_for(lock, std::chrono::milliseconds(timeout_ms), reached)) {
      return fail(SYNC_TIMEOUT, "host_cann: the stream was not done in time");
    }
    return error_ ? fail_again(error_, "host_cann: stream " + std::to_string(id) + " failed") : SUCCESS;
  }

  bool idle() {
    std::lock_guard<std::mutex> lock(mutex_);
    return done_ == given_;
  }

  const int id, device;

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      more_.wait(lock, [this] { return !tasks_.empty(); });
      Task task = std::move(tasks_.front());
      tasks_.pop_front();
      const Error prior = error_;
      lock.unlock();
      if (jitter_ > 0) {
        random_ = random_ * 1664525u + 1013904223u;
        usleep(static_cast<useconds_t>((random_ >> 8) % static_cast<uint32_t>(jitter_)));
      }
      const Error code = task(prior);
      task = nullptr;
      lock.lock();
      if (!error_) error_ = code;
      ++done_;
      progress_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable more_, progress_;
  std::deque<Task> tasks_;
  uint64_t given_ = 0, done_ = 0;
  Error error_ = SUCCESS;
  bool running_ = false;
  const long jitter_;
  uint32_t random_;
};

struct Registry {
  std::mutex mutex;
  std::set<Stream*> all;
  Stream* defaults[64] = {};
  int next = 1;

  Stream* make(int device) {
    auto* stream = new Stream(next++, device);
    all.insert(stream);
    return stream;
  }
};

Registry& registry() {
  static Registry* its = new Registry;
  return *its;
}

// The stream of a handle, or null where there is none. A null handle is the default stream of the thread's device.
Stream* find(void* handle) {
  Registry& its = registry();
  std::lock_guard<std::mutex> lock(its.mutex);
  if (handle) {
    auto* stream = static_cast<Stream*>(handle);
    return its.all.count(stream) ? stream : nullptr;
  }
  const int device = current_device();
  if (device < 0) return nullptr;
  if (!its.defaults[device]) its.defaults[device] = its.make(device);
  return its.defaults[device];
}

Error bad_stream() { return fail(BAD_HANDLE, "host_cann: no such stream"); }

struct Event {
  std::mutex mutex;
  std::condition_variable reached;
  uint64_t recorded = 0, done = 0;
  double at_ms = 0;
  Error error = SUCCESS;  // of the stream that recorded it: who waits for it fails too
};

using Handle = std::shared_ptr<Event>;

Handle& event_of(void* handle) { return *static_cast<Handle*>(handle); }

double now_ms() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) * 1e3 + static_cast<double>(t.tv_nsec) / 1e6;
}

Error create_event(void** handle) {
  *handle = new Handle(std::make_shared<Event>());
  return SUCCESS;
}

}  // namespace

namespace host_cann {

Error enqueue(void* handle, Task task) {
  Stream* stream = find(handle);
  if (!stream) return bad_stream();
  stream->push(std::move(task));
  return SUCCESS;
}

Error drain(void* handle, long timeout_ms) {
  Stream* stream = find(handle);
  return stream ? stream->wait(timeout_ms) : bad_stream();
}

Error drain_device(int device, long timeout_ms) {
  std::set<Stream*> streams;
  {
    Registry& its = registry();
    std::lock_guard<std::mutex> lock(its.mutex);
    streams = its.all;
  }
  Error first = SUCCESS;
  for (Stream* stream : streams) {
    if (stream->device != device) continue;
    const Error code = stream->wait(timeout_ms);
    if (!first) first = code;
  }
  return first;
}

}  // namespace host_cann

EXPORT Error host_cann_drain(void* stream) { return drain(stream); }

EXPORT Error aclrtCreateStreamWithConfig(void** handle, uint32_t, uint32_t) {
  CALLED();
  const int device = current_device();
  if (device < 0) return fail(NO_CONTEXT, "host_cann: this thread has no device");
  Registry& its = registry();
  std::lock_guard<std::mutex> lock(its.mutex);
  *handle = its.make(device);
  return SUCCESS;
}
EXPORT Error aclrtCreateStream(void** handle) { return aclrtCreateStreamWithConfig(handle, 0, 0); }

// The object stays, with its sleeping thread: a process makes few streams, and a late task must find it.
EXPORT Error aclrtDestroyStreamForce(void* handle) {
  CALLED();
  Registry& its = registry();
  std::lock_guard<std::mutex> lock(its.mutex);
  return its.all.erase(static_cast<Stream*>(handle)) ? SUCCESS : bad_stream();
}
EXPORT Error aclrtDestroyStream(void* handle) {
  CALLED();
  drain(handle);
  return aclrtDestroyStreamForce(handle);
}

EXPORT Error aclrtSynchronizeStream(void* stream) {
  CALLED();
  return drain(stream);
}
EXPORT Error aclrtSynchronizeStreamWithTimeout(void* stream, int32_t timeout_ms) {
  CALLED();
  return drain(stream, timeout_ms);
}

EXPORT Error aclrtStreamQuery(void* handle, int* status) {
  CALLED();
  Stream* stream = find(handle);
  if (!stream) return bad_stream();
  *status = stream->idle() ? 0 : 1;
  return SUCCESS;
}

EXPORT Error aclrtStreamGetId(void* handle, int32_t* id) {
  CALLED();
  Stream* stream = find(handle);
  if (!stream) return bad_stream();
  *id = stream->id;
  return SUCCESS;
}

EXPORT Error aclrtSetStreamFailureMode(void*, uint64_t) { return SUCCESS; }  // a failed stream always stops here
EXPORT Error aclrtSetStreamAttribute(void*, int, void*) { return SUCCESS; }
EXPORT Error aclrtSetStreamOverflowSwitch(void*, uint32_t) { return SUCCESS; }
EXPORT Error aclrtGetStreamOverflowSwitch(void*, uint32_t* flag) {
  *flag = 0;
  return SUCCESS;
}

EXPORT Error aclrtLaunchHostFunc(void* stream, void (*function)(void*), void* argument) {
  CALLED_ON(stream);
  return enqueue(stream, [=](Error prior) {
    function(argument);
    return prior;
  });
}

EXPORT Error aclrtCreateEventWithFlag(void** event, uint32_t) {
  CALLED();
  return create_event(event);
}
EXPORT Error aclrtCreateEventExWithFlag(void** event, uint32_t) {
  CALLED();
  return create_event(event);
}
EXPORT Error aclrtDestroyEvent(void* event) {
  CALLED();
  delete static_cast<Handle*>(event);
  return SUCCESS;
}

EXPORT Error aclrtRecordEvent(void* handle, void* stream) {
  CALLED_ON(stream);
  Handle event = event_of(handle);
  uint64_t turn = 0;
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    turn = ++event->recorded;
  }
  return enqueue(stream, [event, turn](Error prior) {
    std::lock_guard<std::mutex> lock(event->mutex);
    if (turn > event->done) event->done = turn;
    event->at_ms = now_ms();
    event->error = prior;
    event->reached.notify_all();
    return prior;
  });
}

EXPORT Error aclrtStreamWaitEvent(void* stream, void* handle) {
  CALLED_ON(stream);
  Handle event = event_of(handle);
  uint64_t turn = 0;
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    turn = event->recorded;
  }
  return enqueue(stream, [event, turn](Error prior) {
    std::unique_lock<std::mutex> lock(event->mutex);
    event->reached.wait(lock, [&] { return event->done >= turn; });
    return prior ? prior : event->error;
  });
}

EXPORT Error aclrtSynchronizeEvent(void* handle) {
  CALLED();
  Handle event = event_of(handle);
  std::unique_lock<std::mutex> lock(event->mutex);
  event->reached.wait(lock, [&, turn = event->recorded] { return event->done >= turn; });
  return event->error ? fail_again(event->error, "host_cann: the event's stream failed") : SUCCESS;
}

// Generations do what a reset is for: a wait means the record before it.
EXPORT Error aclrtResetEvent(void*, void*) {
  CALLED();
  return SUCCESS;
}

EXPORT Error aclrtQueryEventStatus(void* handle, int* status) {
  CALLED();
  Handle event = event_of(handle);
  std::lock_guard<std::mutex> lock(event->mutex);
  *status = event->done >= event->recorded ? 1 : 0;
  return SUCCESS;
}
EXPORT Error aclrtQueryEventWaitStatus(void* handle, int* status) {
  CALLED();
  Handle event = event_of(handle);
  std::lock_guard<std::mutex> lock(event->mutex);
  *status = event->done >= event->recorded ? 0 : 1;
  return SUCCESS;
}

EXPORT Error aclrtEventElapsedTime(float* ms, void* first, void* second) {
  CALLED();
  Handle a = event_of(first), b = event_of(second);
  double begun = 0, ended = 0;
  {
    std::lock_guard<std::mutex> lock(a->mutex);
    begun = a->at_ms;
  }
  {
    std::lock_guard<std::mutex> lock(b->mutex);
    ended = b->at_ms;
  }
  if (begun == 0 || ended == 0) return fail(107006, "host_cann: an event was not reached");
  *ms = static_cast<float>(ended - begun);
  return SUCCESS;
}
