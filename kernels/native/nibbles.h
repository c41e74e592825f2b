// Rows of 4-bit codes with a float16 scale a group, as `m2jax.quant` packs them: a
// row's first half in the low nibbles, its second half in the high ones.
#pragma once

#include <algorithm>
#include <vector>

#include "activations.h"
#include "numbers.h"
#include "simd.h"

namespace m2jax {

using simd::Bytes;
using simd::Floats;
using simd::Ints;
using simd::Signed;

// A code n stands for scale * step * (n - kZero); step is 16 in plane q4, 1 in r4.
constexpr float kZero = 8;

// The scales of one row, widened and times the plane's step.
inline void widen_scales(const uint16_t* scales, int64_t groups, float step,
                         float* wide) {
  int64_t g = 0;
  for (; g + simd::kLanes <= groups; g += simd::kLanes)
    simd::store(wide + g, step * simd::from_half(scales + g));
  if (g < groups) {
    uint16_t rest[simd::kLanes] = {};
    std::memcpy(rest, scales + g, 2 * (groups - g));
    simd::store(wide + g, step * simd::from_half(rest));
  }
}

// A row's factors for a token, its scales times the steps, and what the codes' zero
// takes off its sum.
inline Floats start_sum(float zero, const float* wide, const Activations& a,
                        float* factors) {
  Floats sum{};
  for (std::size_t g = 0; g < a.steps.size(); g += simd::kLanes) {
    const Floats scale = simd::load<Floats>(wide + g);
    simd::store(factors + g, scale * simd::load<Floats>(a.steps.data() + g));
    sum -= scale * simd::load<Floats>(a.sums.data() + g);
  }
  return zero * sum;
}

// sum_i weight[i] x[i] of a row, for kTokens tokens.
//
// wide: [room], from widen_scales. factors: scratch, [kTokens][room]. ahead: a row that
// will be wanted soon. Not inline: among other code compilers run out of registers.
template <int kGroup, int kTokens>
__attribute__((noinline)) void row_times(const uint8_t* row, const uint8_t* ahead,
                                         const float* wide, const ByteActivations* a,
                                         float* factors, float* out) {
  const int64_t half = a->half, padded = a->padded, low_groups = half / kGroup;
  const int64_t room = int64_t(a->steps.size());
  Floats sum[kTokens];
  for (int t = 0; t < kTokens; ++t)
    sum[t] = start_sum(kZero, wide, a[t], factors + t * room);
  // Registers of one group whose products are added before they meet its scale: with
  // four, 16 codes of a lane times kMostSteps just fit 32 bits.
  constexpr int kRun = std::clamp(kGroup / simd::kBytes, 1, simd::kTogether);
  auto add = [&](const uint8_t* from, int64_t byte) {
    Bytes low[kRun], high[kRun];
    for (int i = 0; i < kRun; ++i) {
      const Bytes packed = simd::load<Bytes>(from + i * simd::kBytes);
      low[i] = packed & 15;
      high[i] = packed >> 4;
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const int8_t* hi = a[t].parts[0].data() + byte;
      const int8_t* mid = a[t].parts[1].data() + byte;
      const int8_t* lo = a[t].parts[2].data() + byte;
      const float* own = factors + t * room + byte / kGroup;
      sum[t] += simd::to_float(simd::dot4<kRun>(low, hi, mid, lo)) *
                simd::spread<kGroup / 4>(own);
      sum[t] += simd::to_float(
                    simd::dot4<kRun>(high, hi + padded, mid + padded, lo + padded)) *
                simd::spread<kGroup / 4>(own + low_groups);
    }
  };
  int64_t byte = 0;
  // With runs of several a half is whole runs: it is whole groups.
  for (; byte + kRun * simd::kBytes <= half; byte += kRun * simd::kBytes) {
    for (int i = 0; i < kRun * simd::kBytes; i += 64)
      __builtin_prefetch(ahead + byte + i);
    add(row + byte, byte);
  }
  if (byte < half) {
    uint8_t rest[simd::kBytes] = {};
    std::memcpy(rest, row + byte, half - byte);
    add(rest, byte);
  }
  for (int t = 0; t < kTokens; ++t) out[t] = simd::sum_lanes(sum[t]);
}

// A few codes as floats: low nibbles and high ones.
inline void few_codes(const uint8_t* from, Floats* low, Floats* high) {
  const Ints codes = simd::from_bytes(from);
  *low = simd::to_float(codes & 15);
  *high = simd::to_float(codes >> 4);
}

// The same of 8 bits, from q4 and r4.
inline void both_codes(const uint8_t* q4, const uint8_t* r4, Floats* low, Floats* high) {
  const Ints upper = simd::from_bytes(q4), lower = simd::from_bytes(r4);
  *low = simd::to_float((upper & 15) << 4 | (lower & 15));
  *high = simd::to_float((upper & 0xf0) | lower >> 4);
}

// Rows that share the reading of sums.
constexpr int kRowsAdded = 4;

// offset += the rows' factors: how much of the codes' zero is to be taken off.
inline void note_offsets(const float* factors, int64_t room, int64_t groups,
                         float* offset) {
  for (int r = 0; r < kRowsAdded; ++r)
    for (int64_t g = 0; g < groups; g += simd::kLanes)
      simd::store(offset + g, simd::load<Floats>(offset + g) +
                                  simd::load<Floats>(factors + r * room + g));
}

// part += sum of kRowsAdded rows of codes times their factors.
//
// factors: [rows][room], a row's scales times its weight. The codes' zero is not yet
// taken off; see `note_offsets` for offset, [room].
template <int kGroup>
__attribute__((noinline)) void add_rows(const uint8_t* const* rows,
                                        const uint8_t* const* ahead,
                                        const float* factors, int64_t room,
                                        int64_t half, float* part, float* offset) {
  const int64_t low_groups = half / kGroup;
  note_offsets(factors, room, 2 * low_groups, offset);
  // Sums stay in registers while all rows are added.
  constexpr int kChunk = std::min(kGroup, simd::kBytes);
  constexpr int kSums = kChunk / simd::kLanes;
  for (int64_t i = 0; i < half; i += kChunk) {
    float *low_part = part + i, *high_part = low_part + half;
    Floats low_sums[kSums], high_sums[kSums];
    for (int k = 0; k < kSums; ++k) {
      low_sums[k] = simd::load<Floats>(low_part + k * simd::kLanes);
      high_sums[k] = simd::load<Floats>(high_part + k * simd::kLanes);
    }
    for (int r = 0; r < kRowsAdded; ++r) {
      if (i % 64 == 0) __builtin_prefetch(ahead[r] + i);
      const float* own = factors + r * room + i / kGroup;
      const Floats low_factor = simd::splat(own[0]);
      const Floats high_factor = simd::splat(own[low_groups]);
      for (int k = 0; k < kSums; ++k) {
        Floats low, high;
        few_codes(rows[r] + i + k * simd::kLanes, &low, &high);
        low_sums[k] += low * low_factor;
        high_sums[k] += high * high_factor;
      }
    }
    for (int k = 0; k < kSums; ++k) {
      simd::store(low_part + k * simd::kLanes, low_sums[k]);
      simd::store(high_part + k * simd::kLanes, high_sums[k]);
    }
  }
}

inline void take_off_zero(float zero, const float* offset, int64_t groups,
                          int64_t group, float* part) {
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = g * group; i < (g + 1) * group; ++i) part[i] -= zero * offset[g];
}

// part += sum over the taken rows of h[k] times their weights, in order.
// row_of(k), scales_of(k): a row's codes and its group scales.
template <int kGroup, class RowOf, class ScalesOf>
inline void add_nibbles(const std::vector<int64_t>& taken, const float* h, RowOf row_of,
                        ScalesOf scales_of, int64_t half, float step, float* part) {
  const int64_t groups = 2 * half / kGroup;
  const int64_t room = (groups / simd::kLanes + 1) * simd::kLanes;
  simd::Array<float> factors(kRowsAdded * room), offset(room);
  const int64_t count = int64_t(taken.size());
  for (int64_t first = 0; first < count; first += kRowsAdded) {
    const uint8_t *rows[kRowsAdded], *ahead[kRowsAdded];
    // Missing ones of the last few are the first again, times nothing.
    for (int r = 0; r < kRowsAdded; ++r) {
      const bool there = first + r < count;
      const int64_t k = taken[there ? first + r : first];
      rows[r] = row_of(k);
      ahead[r] = row_of(taken[std::min(first + kRowsAdded + r, count - 1)]);
      widen_scales(scales_of(k), groups, there ? step * h[k] : 0,
                   factors.data() + r * room);
    }
    add_rows<kGroup>(rows, ahead, factors.data(), room, half, part, offset.data());
  }
  take_off_zero(kZero, offset.data(), groups, kGroup, part);
}

}  // namespace m2jax
