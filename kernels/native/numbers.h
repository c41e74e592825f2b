// Rows of float32, float16 or bfloat16 numbers, widened as they are read.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace m2jax {

using simd::Floats;

enum class Half : uint16_t {};
enum class Bfloat : uint16_t {};

inline Floats widen(const float* from) { return simd::load<Floats>(from); }
inline Floats widen(const Half* from) {
  return simd::from_half(reinterpret_cast<const uint16_t*>(from));
}
inline Floats widen(const Bfloat* from) {
  return simd::from_bfloat(reinterpret_cast<const uint16_t*>(from));
}

inline float half_value(uint16_t half) {
#if M2JAX_AVX512 || M2JAX_AVX2
  return _cvtsh_ss(half);
#endif
  const uint16_t few[simd::kLanes] = {half};
  return simd::from_half(few)[0];
}

// sum_i row[i] x[t][i] for kTokens tokens; x is padded with zeros to whole registers.
// ahead: a row that will be wanted soon.
template <int kTokens, class Number>
inline void numbers_times(const Number* row, const Number* ahead, int64_t width,
                          const float* x, int64_t stride, float* out) {
  // Independent sums, so that one need not wait for the other.
  constexpr int kSums = kTokens == 1 ? 4 : 1;
  Floats sum[kTokens][kSums] = {};
  int64_t i = 0;
  for (; i + kSums * simd::kLanes <= width; i += kSums * simd::kLanes)
    for (int s = 0; s < kSums; ++s) {
      const int64_t at = i + s * simd::kLanes;
      const Floats weights = widen(row + at);
      __builtin_prefetch(ahead + at);
      for (int t = 0; t < kTokens; ++t)
        sum[t][s] += weights * simd::load<Floats>(x + t * stride + at);
    }
  for (; i < width; i += simd::kLanes) {
    Number rest[simd::kLanes] = {};
    std::memcpy(rest, row + i,
                sizeof(Number) * (width - i < simd::kLanes ? width - i : simd::kLanes));
    const Floats weights = widen(rest);
    for (int t = 0; t < kTokens; ++t)
      sum[t][0] += weights * simd::load<Floats>(x + t * stride + i);
  }
  for (int t = 0; t < kTokens; ++t) {
    Floats all = sum[t][0];
    for (int s = 1; s < kSums; ++s) all += sum[t][s];
    out[t] = simd::sum_lanes(all);
  }
}

// part += sum over the taken rows of h[k] times row_of(k), in order; width is a multiple
// of 16.
template <class RowOf>
inline void add_numbers(const std::vector<int64_t>& taken, const float* h, RowOf row_of,
                        int64_t width, float* part) {
  constexpr int kRows = 4;
  const int64_t count = int64_t(taken.size());
  for (int64_t first = 0; first < count; first += kRows) {
    decltype(row_of(0)) rows[kRows], ahead[kRows];
    float weights[kRows];
    // Missing ones of the last few are the first again, times nothing.
    for (int r = 0; r < kRows; ++r) {
      const bool there = first + r < count;
      const int64_t k = taken[there ? first + r : first];
      rows[r] = row_of(k);
      ahead[r] = row_of(taken[std::min(first + kRows + r, count - 1)]);
      weights[r] = there ? h[k] : 0;
    }
    for (int64_t i = 0; i < width; i += simd::kLanes) {
      Floats sum = simd::load<Floats>(part + i);
      for (int r = 0; r < kRows; ++r) {
        __builtin_prefetch(ahead[r] + i);
        sum += weights[r] * widen(rows[r] + i);
      }
      simd::store(part + i, sum);
    }
  }
}

}  // namespace m2jax
