// A token's activations as integers of 24 bits, a step a group: as fine as float32, and
// products with codes are exact.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace m2jax {

constexpr float kMostSteps = 8322000;

struct Activations {
  int64_t half, padded;            // inputs of a half; those of its whole registers
  simd::Array<float> steps, sums;  // [groups, and room]: step, and the values' sum

 protected:
  // Zeros behind: a last register of codes that is not whole has lanes of no group.
  Activations(int64_t width, int64_t group)
      : half(width / 2),
        padded((half + simd::kBytes - 1) / simd::kBytes * simd::kBytes),
        steps(((width / group - 1) / simd::kLanes + (half < padded ? 2 : 1)) *
              simd::kLanes),
        sums(steps.size()) {}

  // Calls put(half, input of that half, integer) for all values.
  template <class Put>
  void round(const float* x, int64_t group, Put put) {
    for (int64_t g = 0; g < 2 * half / group; ++g) {
      const float* values = x + g * group;
      float most = 0;
      bool finite = true;
      for (int64_t i = 0; i < group; ++i) {
        most = std::max(most, std::fabs(values[i]));
        finite &= std::isfinite(values[i]);
      }
      const float step = finite ? most / kMostSteps : NAN;
      const float inverse = finite && most > 1e-30f ? kMostSteps / most : 0;
      const int64_t side = g * group >= half, start = g * group - side * half;
      int64_t total = 0;
      for (int64_t i = 0; i < group; ++i) {
        const int32_t q = inverse ? int32_t(std::nearbyint(values[i] * inverse)) : 0;
        put(side, start + i, q);
        total += q;
      }
      steps[g] = step;
      sums[g] = step * float(total);
    }
  }
};

// To meet codes of 4 bits: value = step (65536 hi + 256 mid + lo).
struct ByteActivations : Activations {
  simd::Array<int8_t> parts[3];  // hi, mid, lo, each [2][padded]

  ByteActivations(const float* x, int64_t width, int64_t group)
      : Activations(width, group) {
    for (auto& part : parts) part.assign(2 * padded, 0);
    round(x, group, [&](int64_t side, int64_t i, int32_t q) {
      const int32_t upper = (q + 128) >> 8, hi = (upper + 128) >> 8;
      const int64_t at = side * padded + i;
      parts[0][at] = int8_t(hi);
      parts[1][at] = int8_t(upper - hi * 256);
      parts[2][at] = int8_t(q - upper * 256);
    });
  }
};

// To meet codes of 8 bits: value = step (kUpper hi + lo).
struct WordActivations : Activations {
  static constexpr int32_t kUpper = 4096;
  // hi, lo, each [padded / kBytes][2 halves][even and odd inputs][kBytes / 2]: as bytes
  // of a register come out as words.
  simd::Array<int16_t> parts[2];

  WordActivations(const float* x, int64_t width, int64_t group)
      : Activations(width, group) {
    for (auto& part : parts) part.assign(2 * padded, 0);
    round(x, group, [&](int64_t side, int64_t i, int32_t q) {
      const int64_t within = i % simd::kBytes, words = simd::kBytes / 2;
      const int64_t at =
          2 * (i - within) + (2 * side + within % 2) * words + within / 2;
      const int32_t hi = (q + kUpper / 2) >> 12;
      parts[0][at] = int16_t(hi);
      parts[1][at] = int16_t(q - hi * kUpper);
    });
  }
};

}  // namespace m2jax
