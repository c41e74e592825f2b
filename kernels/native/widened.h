// Rows of codes times several tokens in float32: a stretch of a few rows is widened once
// and meets all tokens, two rows and four tokens at a time.
#pragma once

#include "common.h"

namespace m2jax {

// Where dot products of bytes take several steps, from so many tokens on this is faster.
constexpr int64_t kWidenedTokens = simd::kTogether > 1 ? 6 : INT64_MAX;

// Rows together, and bytes of each: what they become stays in a first-level cache.
constexpr int64_t kWideRows = 8, kWideBytes = 128;

// x [tokens][width] as stretches of both halves of a row: [half / kWideBytes][2][tokens]
// [kWideBytes]. In place, tokens of a width of 4096 would share a few lines of the cache.
struct Stretches {
  simd::Array<float> values;
  int64_t tokens;

  Stretches(const float* x, int64_t tokens, int64_t width) : tokens(tokens) {
    const int64_t half = width / 2;
    values.resize(divide_up(half, kWideBytes) * 2 * tokens * kWideBytes);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t side = 0; side < 2; ++side)
        for (int64_t byte = 0; byte < half; byte += kWideBytes)
          std::copy_n(x + t * width + side * half + byte,
                      std::min(kWideBytes, half - byte), at(byte, side, t));
  }
  float* at(int64_t byte, int64_t side, int64_t t) {
    return values.data() + ((2 * byte / kWideBytes + side) * tokens + t) * kWideBytes;
  }
  const float* at(int64_t byte, int64_t side, int64_t t) const {
    return const_cast<Stretches*>(this)->at(byte, side, t);
  }
};

// Some codes as weights: [count] of low nibbles to `low`, of high ones to `high`.
//
// wide: the row's scales times the plane's step, of the first group here. r4: the lower
// bits of 8-bit codes, or none.
template <bool kBoth>
inline void widen_codes(const uint8_t* q4, const uint8_t* r4, int64_t count,
                        int64_t group, const float* wide, int64_t low_groups,
                        float* low, float* high) {
  constexpr float zero = kBoth ? 17 * kZero : kZero;
  for (int64_t first = 0; first < count; first += group, ++wide) {
    const Floats low_scale = simd::splat(wide[0]);
    const Floats high_scale = simd::splat(wide[low_groups]);
    for (int64_t i = first; i < first + group; i += simd::kLanes) {
      const Ints q = simd::from_bytes(q4 + i);
      Ints low_codes = q & 15, high_codes = q >> 4;
      if constexpr (kBoth) {
        const Ints r = simd::from_bytes(r4 + i);
        low_codes = low_codes << 4 | (r & 15);
        high_codes = high_codes << 4 | r >> 4;
      }
      simd::store(low + i, (simd::to_float(low_codes) - zero) * low_scale);
      simd::store(high + i, (simd::to_float(high_codes) - zero) * high_scale);
    }
  }
}

// sums[row][t] += row * x[t] lane by lane, for two rows and kTokens tokens.
template <int kTokens>
inline void add_pair(const float* one, const float* two, int64_t count, const float* x,
                     Floats* sums, int64_t next) {
  Floats sum[2][kTokens];
  for (int t = 0; t < kTokens; ++t) {
    sum[0][t] = sums[t];
    sum[1][t] = sums[next + t];
  }
  for (int64_t i = 0; i < count; i += simd::kLanes) {
    const Floats first = simd::held(simd::load<Floats>(one + i));
    const Floats second = simd::held(simd::load<Floats>(two + i));
    for (int t = 0; t < kTokens; ++t) {
      const Floats value = simd::held(simd::load<Floats>(x + t * kWideBytes + i));
      sum[0][t] += first * value;
      sum[1][t] += second * value;
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    sums[t] = sum[0][t];
    sums[next + t] = sum[1][t];
  }
}

}  // namespace m2jax
