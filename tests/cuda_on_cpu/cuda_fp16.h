#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }

// Without float32's subnormal numbers: XLA has the CPU take those for zero.
inline float __half2float(__half half) {
  const uint32_t sign = uint32_t(half.bits & 0x8000) << 16;
  const uint32_t rest = uint32_t(half.bits & 0x7FFF) << 13;
  uint32_t bits = rest + (112 << 23);
  if (rest >= 0x7C00 << 13) bits = rest | 0x7F800000;
  float value = __uint_as_float(bits);
  if (rest < 0x400 << 13)
    value = __uint_as_float(rest | 0x38800000) - __uint_as_float(0x38800000);
  return sign ? -value : value;
}
