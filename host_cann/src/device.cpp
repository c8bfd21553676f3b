// Devices: how many, which one a thread uses, what they say about themselves.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "runtime.h"

using namespace host_cann;

namespace {

thread_local int chosen = -1;
char contexts[64];  // a context is an address in here: its device is its index

// HOST_CANN_DEVICES, as ASCEND_RT_VISIBLE_DEVICES narrows it: up to the first entry that names no device.
int visible_devices() {
  const int present = static_cast<int>(std::min(64L, setting("HOST_CANN_DEVICES", 8)));
  const char* visible = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (!visible) return present;
  std::istringstream entries(visible);
  int count = 0;
  for (std::string entry; std::getline(entries, entry, ','); ++count) {
    char* end = nullptr;
    long index = std::strtol(entry.c_str(), &end, 10);
    if (end == entry.c_str() || index < 0 || index >= present) break;
  }
  return count;
}

bool known(int device) { return device >= 0 && device < device_count(); }

}  // namespace

namespace host_cann {

int current_device() { return chosen; }

int device_count() {
  static const int count = visible_devices();
  return count;
}

size_t device_memory() { return static_cast<size_t>(setting("HOST_CANN_MEMORY_MB", 4096)) << 20; }

}  // namespace host_cann

EXPORT Error aclInit(const char*) {
  CALLED();
  return SUCCESS;
}
EXPORT Error aclFinalize() { return SUCCESS; }

EXPORT const char* aclrtGetSocName() {
  const char* name = std::getenv("HOST_CANN_SOC");
  return name && *name ? name : "Ascend910B3";
}

EXPORT Error aclrtGetDeviceCount(uint32_t* count) {
  CALLED();
  *count = static_cast<uint32_t>(device_count());
  return SUCCESS;
}

EXPORT Error aclrtSetDevice(int32_t device) {
  CALLED();
  if (!known(device)) return fail(BAD_DEVICE, "host_cann: there is no such device");
  chosen = device;
  return SUCCESS;
}

EXPORT Error aclrtGetDevice(int32_t* device) {
  CALLED();
  if (chosen < 0) return fail(NO_CONTEXT, "host_cann: this thread has no device");
  *device = chosen;
  return SUCCESS;
}

EXPORT Error aclrtResetDevice(int32_t device) {
  CALLED();
  return known(device) ? drain_device(device, -1), SUCCESS : BAD_DEVICE;
}

EXPORT Error aclrtGetCurrentContext(void** context) {
  CALLED();
  if (chosen < 0) return fail(NO_CONTEXT, "host_cann: this thread has no context");
  *context = contexts + chosen;
  return SUCCESS;
}

EXPORT Error aclrtSetCurrentContext(void* context) {
  CALLED();
  const auto device = static_cast<char*>(context) - contexts;
  if (device < 0 || device >= 64) return fail(NO_CONTEXT, "host_cann: no such context");
  chosen = static_cast<int>(device);
  return SUCCESS;
}

EXPORT Error aclrtGetPrimaryCtxState(int32_t device, uint32_t* flags, int32_t* active) {
  CALLED();
  if (!known(device)) return BAD_DEVICE;
  if (flags) *flags = 0;
  *active = 1;
  return SUCCESS;
}

EXPORT Error aclrtSynchronizeDeviceWithTimeout(int32_t timeout) {
  CALLED();
  if (chosen < 0) return fail(NO_CONTEXT, "host_cann: this thread has no device");
  return drain_device(chosen, timeout);
}
EXPORT Error aclrtSynchronizeDevice() {
  CALLED();
  if (chosen < 0) return fail(NO_CONTEXT, "host_cann: this thread has no device");
  return drain_device(chosen, -1);
}

// The stand-in has no cores and no level-2 cache; torch_npu wants numbers and divides by them.
EXPORT Error aclGetDeviceCapability(uint32_t device, int what, int64_t* value) {
  CALLED();
  if (!known(static_cast<int>(device))) return BAD_DEVICE;
  static const int64_t figures[] = {20, 40, int64_t{192} << 20};  // cube cores, vector cores, bytes of cache
  if (what < 0 || what > 2) return fail(INVALID_PARAM, "host_cann: no such device figure");
  *value = figures[what];
  return SUCCESS;
}

EXPORT Error aclrtGetDeviceInfo(uint32_t device, int what, int64_t* value) {
  CALLED();
  if (!known(static_cast<int>(device))) return BAD_DEVICE;
  switch (what) {
    case 101: case 102: *value = 20; return SUCCESS;
    case 201: *value = 40; return SUCCESS;
    case 301: *value = static_cast<int64_t>(device_memory()); return SUCCESS;
    case 302: *value = int64_t{192} << 20; return SUCCESS;
    default: return fail(REFUSED_CALL, "host_cann: no such device attribute");
  }
}

EXPORT Error aclrtDeviceGetUuid(int32_t device, void* uuid) {
  CALLED();
  if (!known(device)) return BAD_DEVICE;
  std::memset(uuid, 0, 16);
  std::memcpy(uuid, "host_cann", 9);
  static_cast<char*>(uuid)[15] = static_cast<char>(device);
  return SUCCESS;
}

EXPORT Error aclrtGetDeviceUtilizationRate(int32_t device, void* rates) {
  CALLED();
  if (!known(device)) return BAD_DEVICE;
  std::memset(rates, 0, 4 * sizeof(int32_t));  // cube, vector, AI CPU, memory, in per cent
  return SUCCESS;
}

EXPORT Error aclrtDeviceCanAccessPeer(int32_t* can, int32_t device, int32_t peer) {
  CALLED();
  *can = known(device) && known(peer) && device != peer;
  return SUCCESS;
}
EXPORT Error aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t) {
  CALLED();
  return known(peer) ? SUCCESS : BAD_DEVICE;
}

EXPORT Error aclrtDeviceGetBareTgid(int32_t*) { return refuse(__func__); }

// Settings of hardware that is not there. Accepted, as they change nothing that the stand-in does.
EXPORT Error aclrtSetOpWaitTimeout(uint32_t) { return SUCCESS; }
EXPORT Error aclrtSetOpExecuteTimeOut(uint32_t) { return SUCCESS; }
EXPORT Error aclrtSetOpExecuteTimeOutV2(uint64_t, uint64_t*) { return SUCCESS; }
EXPORT Error aclrtSetDeviceSatMode(int) { return SUCCESS; }
EXPORT Error aclrtSetSysParamOpt(int, int64_t) { return SUCCESS; }
EXPORT Error aclrtCtxSetSysParamOpt(int, int64_t) { return SUCCESS; }
EXPORT Error aclrtGetSysParamOpt(int, int64_t* value) {
  *value = 0;
  return SUCCESS;
}
