// Rows of codes or numbers times several tokens in float32: a stretch of a few rows is
// widened once and meets all tokens, two rows and four tokens at a time.
#pragma once

#include "common.h"

namespace m2jax {

// From so many tokens on this is faster; for codes only where dot products of bytes take
// several steps.
constexpr int64_t kWidenedCodes = simd::kTogether > 1 ? 6 : INT64_MAX;
constexpr int64_t kWidenedNumbers = 12;
// The same where each token wants only some rows, which the other form does not leave out.
constexpr int64_t kWidenedSome = 4;

// Rows together, and numbers of each half of one: they stay in a first-level cache.
constexpr int64_t kWideRows = 8, kWide = 128;

// x [tokens][width] as stretches of both halves of a row: [half / kWide][2][tokens]
// [kWide]. In place, tokens of a width of 4096 would share a few lines of the cache.
struct Stretches {
  simd::Array<float> values;
  int64_t tokens;

  Stretches(const float* x, int64_t tokens, int64_t width) : tokens(tokens) {
    const int64_t half = width / 2;
    values.resize(divide_up(half, kWide) * 2 * tokens * kWide);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t side = 0; side < 2; ++side)
        for (int64_t first = 0; first < half; first += kWide)
          std::copy_n(x + t * width + side * half + first,
                      std::min(kWide, half - first),
                      values.begin() + place(first, side, t));
  }
  int64_t place(int64_t first, int64_t side, int64_t t) const {
    return ((2 * first / kWide + side) * tokens + t) * kWide;
  }
};

// Some codes as weights: [count] of low nibbles to `low`, of high ones to `high`.
//
// scales: of the row, from the first group here on; those of the other half lie
// low_groups behind. r4: the lower bits of 8-bit codes, or none.
template <bool kBoth>
inline void widen_codes(const uint8_t* q4, const uint8_t* r4, int64_t count,
                        int64_t group, const uint16_t* scales, float step,
                        int64_t low_groups, float* low, float* high) {
  constexpr float zero = kBoth ? 17 * kZero : kZero;
  for (int64_t first = 0; first < count; first += group, ++scales) {
    const Floats low_scale = simd::splat(step * half_value(scales[0]));
    const Floats high_scale = simd::splat(step * half_value(scales[low_groups]));
    for (int64_t i = first; i < first + group; i += simd::kLanes) {
      Floats low_codes, high_codes;
      if constexpr (kBoth)
        both_codes(q4 + i, r4 + i, &low_codes, &high_codes);
      else
        few_codes(q4 + i, &low_codes, &high_codes);
      simd::store(low + i, (low_codes - zero) * low_scale);
      simd::store(high + i, (high_codes - zero) * high_scale);
    }
  }
}

// sums[row][t] += row * x[t] lane by lane, for two rows and kTokens tokens, those named.
template <int kTokens>
inline void add_pair(const float* one, const float* two, int64_t count, const float* x,
                     const int32_t* named, Floats* sums, int64_t next) {
  Floats sum[2][kTokens];
  const float* from[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    sum[0][t] = sums[named[t]];
    sum[1][t] = sums[next + named[t]];
    from[t] = x + named[t] * kWide;
  }
  for (int64_t i = 0; i < count; i += simd::kLanes) {
    const Floats first = simd::held(simd::load<Floats>(one + i));
    const Floats second = simd::held(simd::load<Floats>(two + i));
    for (int t = 0; t < kTokens; ++t) {
      const Floats value = simd::held(simd::load<Floats>(from[t] + i));
      sum[0][t] += first * value;
      sum[1][t] += second * value;
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    sums[named[t]] = sum[0][t];
    sums[next + named[t]] = sum[1][t];
  }
}

// Calls put(row, token, sum) for `all` rows, `task` at a time.
//
// widen(row, first, count, low, high, ahead): numbers `first` and on of a row to `low`,
// those half a row behind to `high`; `ahead` is a row whose numbers come soon. Halves of
// a row are whole registers. is_wanted(row, token): whether that sum is, of every even row
// and the one behind it; others come out as 0, and rows that no token wants are not read.
template <class Widen, class IsWanted, class Put>
void project_widened(ffi::ThreadPool& pool, const Matrix& x, int64_t all, int64_t task,
                     Widen widen, IsWanted is_wanted, Put put) {
  const int64_t tokens = x.dimensions()[0], half = x.dimensions()[1] / 2;
  const Stretches stretches(x.typed_data(), tokens, 2 * half);
  task = divide_up(task, kWideRows) * kWideRows;
  parallel(pool, divide_up(all, task), [&](int64_t block) {
    simd::Array<float> values(kWideRows * 2 * kWide);
    simd::Array<Floats> sums(kWideRows * tokens);
    std::vector<int32_t> named(kWideRows / 2 * tokens);  // tokens, of two rows each
    int64_t counts[kWideRows / 2];
    const int64_t end = std::min(all, (block + 1) * task);
    for (int64_t n = block * task; n < end; n += kWideRows) {
      std::fill(sums.begin(), sums.end(), Floats{});
      for (int64_t r = 0; r < kWideRows; r += 2) {
        counts[r / 2] = 0;
        for (int64_t t = 0; t < tokens; ++t)
          if (is_wanted(std::min(n + r, all - 1), t))
            named[r / 2 * tokens + counts[r / 2]++] = int32_t(t);
      }
      for (int64_t first = 0; first < half; first += kWide) {
        const int64_t count = std::min(kWide, half - first);
        for (int64_t r = 0; r < kWideRows; ++r) {
          float* to = values.data() + 2 * r * kWide;
          if (counts[r / 2])
            widen(std::min(n + r, all - 1), first, count, to, to + kWide,
                  std::min(n + r + kWideRows, all - 1));
        }
        for (int64_t side = 0; side < 2; ++side) {
          const float* from = &stretches.values[stretches.place(first, side, 0)];
          for (int64_t r = 0; r < kWideRows; r += 2)
            by_tokens(counts[r / 2], [&](int64_t t, auto together) {
              const float* one = values.data() + (2 * r + side) * kWide;
              add_pair<together>(one, one + 2 * kWide, count, from,
                                 named.data() + r / 2 * tokens + t,
                                 sums.data() + r * tokens, tokens);
            });
        }
      }
      for (int64_t r = 0; r < std::min(kWideRows, end - n); ++r)
        for (int64_t t = 0; t < tokens; ++t)
          put(n + r, t, simd::sum_lanes(sums[r * tokens + t]));
    }
  });
}

}  // namespace m2jax
