// Types of HCCL and their reductions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime.h"

namespace host_cann {

size_t size_of(int type);  // bytes of an element; 0 for a type that HCCL does not have

// out[i] = the reduction of parts[0][i], parts[1][i], ... in this order. Half-precision types are summed in float32
// and rounded once. REFUSED_CALL where the type has no arithmetic.
Error reduce(void* out, const void* const* parts, size_t count, size_t elements, int type, int operation);

}  // namespace host_cann
