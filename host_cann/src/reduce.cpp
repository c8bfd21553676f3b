#include "reduce.h"

#include "bfloat16.h"

namespace host_cann {
namespace {

template <class Wide>
Wide combine(Wide a, Wide b, int operation) {
  switch (operation) {
    case 0: return static_cast<Wide>(a + b);
    case 1: return static_cast<Wide>(a * b);
    case 2: return b > a || b != b ? b : a;  // NaN stays
    default: return b < a || b != b ? b : a;
  }
}

template <class Stored, class Wide = Stored>
Error over(void* out, const void* const* parts, size_t count, size_t elements, int operation) {
  for (size_t i = 0; i < elements; ++i) {
    Wide value = static_cast<Wide>(static_cast<const Stored*>(parts[0])[i]);
    for (size_t part = 1; part < count; ++part) {
      value = combine<Wide>(value, static_cast<Wide>(static_cast<const Stored*>(parts[part])[i]), operation);
    }
    static_cast<Stored*>(out)[i] = static_cast<Stored>(value);
  }
  return SUCCESS;
}

}  // namespace

size_t size_of(int type) {
  static const size_t sizes[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2, 16, 0, 1, 1, 1, 1};
  return type >= 0 && type < 18 ? sizes[type] : 0;
}

Error reduce(void* out, const void* const* parts, size_t count, size_t elements, int type, int operation) {
  if (operation < 0 || operation > 3) return fail(REFUSED_CALL, "host_cann: HCCL has no such reduction");
  switch (type) {
    case 0: return over<int8_t>(out, parts, count, elements, operation);
    case 1: return over<int16_t>(out, parts, count, elements, operation);
    case 2: return over<int32_t>(out, parts, count, elements, operation);
    case 3: return over<_Float16, float>(out, parts, count, elements, operation);
    case 4: return over<float>(out, parts, count, elements, operation);
    case 5: return over<int64_t>(out, parts, count, elements, operation);
    case 6: return over<uint64_t>(out, parts, count, elements, operation);
    case 7: return over<uint8_t>(out, parts, count, elements, operation);
    case 8: return over<uint16_t>(out, parts, count, elements, operation);
    case 9: return over<uint32_t>(out, parts, count, elements, operation);
    case 10: return over<double>(out, parts, count, elements, operation);
    case 11: return over<BFloat16, float>(out, parts, count, elements, operation);
    default: return fail(REFUSED_CALL, "host_cann: HCCL does not reduce this type");
  }
}

}  // namespace host_cann
