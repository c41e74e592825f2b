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

// Rows that share the reading of activations.
constexpr int kRowsTogether = 2;

// sum_i weight[i] x[i] of kRowsTogether rows, for kTokens tokens.
//
// wide: [rows][room], from widen_scales. factors: scratch, [rows][kTokens][room].
// ahead: rows that will be wanted soon. out: [rows][kTokens].
template <int kGroup, int kTokens>
inline void rows_times(const uint8_t* const* rows, const uint8_t* const* ahead,
                       const float* wide, const ByteActivations* a, float* factors,
                       float* out) {
  const int64_t half = a->half, padded = a->padded, low_groups = half / kGroup;
  const int64_t room = int64_t(a->steps.size());
  Floats sum[kRowsTogether][kTokens];
  for (int r = 0; r < kRowsTogether; ++r)
    for (int t = 0; t < kTokens; ++t) {
      sum[r][t] = Floats{};
      for (int64_t g = 0; g < room; g += simd::kLanes) {
        const Floats scale = simd::load<Floats>(wide + r * room + g);
        simd::store(factors + (r * kTokens + t) * room + g,
                    scale * simd::load<Floats>(a[t].steps.data() + g));
        sum[r][t] -= kZero * scale * simd::load<Floats>(a[t].sums.data() + g);
      }
    }
  // Registers of one group whose products are added before they meet its scale: with
  // four, 16 codes of a lane times kMostSteps just fit 32 bits.
  constexpr int kRun = std::clamp(kGroup / simd::kBytes, 1, simd::kTogether);
  auto add = [&](const uint8_t* const* from, int64_t byte) {
    Bytes low[kRowsTogether][kRun], high[kRowsTogether][kRun];
    for (int r = 0; r < kRowsTogether; ++r)
      for (int i = 0; i < kRun; ++i) {
        const Bytes packed = simd::load<Bytes>(from[r] + i * simd::kBytes);
        low[r][i] = packed & 15;
        high[r][i] = packed >> 4;
      }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      Ints low_sum[kRowsTogether] = {}, high_sum[kRowsTogether] = {};
      for (const auto& part : a[t].parts) {
        Signed low_part[kRun], high_part[kRun];
        for (int i = 0; i < kRun; ++i) {
          const int8_t* at = part.data() + byte + i * simd::kBytes;
          low_part[i] = simd::load<Signed>(at);
          high_part[i] = simd::load<Signed>(at + padded);
        }
        for (int r = 0; r < kRowsTogether; ++r) {
          low_sum[r] = simd::dot4<kRun>(low_sum[r] << 8, low[r], low_part);
          high_sum[r] = simd::dot4<kRun>(high_sum[r] << 8, high[r], high_part);
        }
      }
      for (int r = 0; r < kRowsTogether; ++r) {
        const float* own = factors + (r * kTokens + t) * room + byte / kGroup;
        sum[r][t] += simd::to_float(low_sum[r]) * simd::spread<kGroup / 4>(own);
        sum[r][t] +=
            simd::to_float(high_sum[r]) * simd::spread<kGroup / 4>(own + low_groups);
      }
    }
  };
  int64_t byte = 0;
  // With runs of several a half is whole runs: it is whole groups.
  for (; byte + kRun * simd::kBytes <= half; byte += kRun * simd::kBytes) {
    const uint8_t* from[kRowsTogether];
    for (int r = 0; r < kRowsTogether; ++r) {
      for (int i = 0; i < kRun; ++i)
        __builtin_prefetch(ahead[r] + byte + i * simd::kBytes);
      from[r] = rows[r] + byte;
    }
    add(from, byte);
  }
  if (byte < half) {
    uint8_t rest[kRowsTogether][simd::kBytes] = {};
    const uint8_t* from[kRowsTogether];
    for (int r = 0; r < kRowsTogether; ++r) {
      from[r] = rest[r];
      std::memcpy(rest[r], rows[r] + byte, half - byte);
    }
    add(from, byte);
  }
  for (int r = 0; r < kRowsTogether; ++r)
    for (int t = 0; t < kTokens; ++t) out[r * kTokens + t] = simd::sum_lanes(sum[r][t]);
}

// A few codes as floats: low nibbles and high ones.
inline void few_codes(const uint8_t* from, Floats* low, Floats* high) {
  const Ints codes = simd::from_bytes(from);
  *low = simd::to_float(codes & 15);
  *high = simd::to_float(codes >> 4);
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
inline void add_rows(const uint8_t* const* rows, const uint8_t* const* ahead,
                     const float* factors, int64_t room, int64_t half, int64_t group,
                     float* part, float* offset) {
  const int64_t low_groups = half / group;
  note_offsets(factors, room, 2 * low_groups, offset);
  for (int64_t g = 0; g < low_groups; ++g)
    for (int64_t i = g * group; i < (g + 1) * group; i += simd::kLanes) {
      Floats low_sum = simd::load<Floats>(part + i);
      Floats high_sum = simd::load<Floats>(part + half + i);
      for (int r = 0; r < kRowsAdded; ++r) {
        Floats low, high;
        __builtin_prefetch(ahead[r] + i);
        few_codes(rows[r] + i, &low, &high);
        const float* own = factors + r * room + g;
        low_sum += low * own[0];
        high_sum += high * own[low_groups];
      }
      simd::store(part + i, low_sum);
      simd::store(part + half + i, high_sum);
    }
}

inline void take_off_zero(float zero, const float* offset, int64_t groups,
                          int64_t group, float* part) {
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = g * group; i < (g + 1) * group; ++i) part[i] -= zero * offset[g];
}

// part += sum over the taken rows of h[k] times their weights, in order.
// row_of(k), scales_of(k): a row's codes and its group scales.
template <class RowOf, class ScalesOf>
inline void add_nibbles(const std::vector<int64_t>& taken, const float* h, RowOf row_of,
                        ScalesOf scales_of, int64_t half, int64_t group, float step,
                        float* part) {
  const int64_t groups = 2 * half / group;
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
    add_rows(rows, ahead, factors.data(), room, half, group, part, offset.data());
  }
  take_off_zero(kZero, offset.data(), groups, group, part);
}

}  // namespace m2jax
