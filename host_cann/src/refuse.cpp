// What the wheel imports and this stand-in does not have. Each says its name and fails: a call that reported success
// without having computed would give silently wrong numbers.
#include <cstdarg>

#include "runtime.h"

using namespace host_cann;

#define REFUSED(name) \
  EXPORT Error name() { return refuse(#name); }

// Kernels, graphs, dumps.
REFUSED(aclmdlInitDump)
REFUSED(aclmdlSetDump)
REFUSED(aclmdlFinalizeDump)
REFUSED(aclrtBinaryLoadFromData)
REFUSED(aclrtBinaryGetFunction)
REFUSED(aclrtGetFunctionAddr)
REFUSED(rtDevBinaryRegister)
REFUSED(rtFunctionRegister)
REFUSED(rtGetC2cCtrlAddr)
REFUSED(rtKernelLaunch)

// Virtual memory (expandable segments) and sharing between processes.
REFUSED(aclrtReserveMemAddress)
REFUSED(aclrtReleaseMemAddress)
REFUSED(aclrtMallocPhysical)
REFUSED(aclrtFreePhysical)
REFUSED(aclrtMapMem)
REFUSED(aclrtUnmapMem)
REFUSED(aclrtMemExportToShareableHandle)
REFUSED(aclrtMemImportFromShareableHandle)
REFUSED(aclrtMemSetPidToShareableHandle)

// Callbacks by polling.
REFUSED(aclrtSubscribeReport)
REFUSED(aclrtUnSubscribeReport)
REFUSED(aclrtProcessReport)

// Logs and profiles go nowhere.
EXPORT void aclAppLog(int, const char*, const char*, uint32_t, const char*, ...) {}
#define SILENT(name) \
  EXPORT int name() { return 0; }
SILENT(MsprofRegisterCallback)
SILENT(MsprofReportApi)
SILENT(MsprofReportCompactInfo)
SILENT(MsprofReportAdditionalInfo)
EXPORT uint64_t MsprofGetHashId(const char*, size_t) { return 0; }
EXPORT uint64_t MsprofSysCycleTime() { return 0; }
