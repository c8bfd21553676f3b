// bfloat16 as its bits, to and from float32; rounds to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace host_cann {

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value = 0;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  BFloat16() = default;
  explicit BFloat16(float value) {
    uint32_t wide = 0;
    std::memcpy(&wide, &value, sizeof wide);
    const bool nan = value != value;
    bits = static_cast<uint16_t>(nan ? 0x7fc0 : (wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
  }
};

}  // namespace host_cann
