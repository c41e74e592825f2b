// Rows of 8-bit codes in two planes, q4 with their upper bits and r4 with the lower, in
// one pass: a product less than by each plane's nibbles.
#pragma once

#include "nibbles.h"

namespace m2jax {

using simd::SignedWords;
using simd::Words;

// A code n stands for scale * (n - kBothZero).
constexpr float kBothZero = 17 * kZero;

// Groups that are whole registers of codes; others go by planes.
template <int kGroup>
constexpr bool kInOctets = kGroup >= simd::kBytes;

// A register of low nibbles' codes, or of high ones'. Words shift in one step.
inline Bytes low_codes(Bytes q4, Bytes r4) {
  return ((Bytes)((Words)q4 << 4) & 0xf0) | (r4 & 15);
}
inline Bytes high_codes(Bytes q4, Bytes r4) { return (q4 & 0xf0) | r4 >> 4; }

// A row, and one that will be wanted soon.
struct Octets {
  const uint8_t *q4, *r4, *q4_ahead, *r4_ahead;

  void prefetch(int64_t byte) const {
    if (byte % 64) return;
    __builtin_prefetch(q4_ahead + byte);
    __builtin_prefetch(r4_ahead + byte);
  }
};

// sum_i weight[i] x[i] for kTokens tokens; wide, factors: as for the other.
template <int kGroup, int kTokens>
__attribute__((noinline)) void row_times(const Octets& row, const float* wide,
                                         const WordActivations* a, float* factors,
                                         float* out) {
  static_assert(kInOctets<kGroup>);
  const int64_t low_groups = a->half / kGroup, room = int64_t(a->steps.size());
  Floats sum[kTokens];
  for (int t = 0; t < kTokens; ++t)
    sum[t] = start_sum(kBothZero, wide, a[t], factors + t * room);
  constexpr int kRun = kGroup / simd::kBytes;
  for (int64_t g = 0; g < low_groups; ++g) {
    Words codes[kRun][4];
    for (int i = 0; i < kRun; ++i) {
      const int64_t byte = g * kGroup + i * simd::kBytes;
      row.prefetch(byte);
      const Bytes upper = simd::load<Bytes>(row.q4 + byte);
      const Bytes lower = simd::load<Bytes>(row.r4 + byte);
      const Words low = (Words)low_codes(upper, lower);
      const Words high = (Words)high_codes(upper, lower);
      codes[i][0] = low & 255;
      codes[i][1] = low >> 8;
      codes[i][2] = high & 255;
      codes[i][3] = high >> 8;
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      // Of each half and part. At most 32 products a lane: as floats still exact.
      Ints sums[2][2] = {};
      for (int part = 0; part < 2; ++part) {
        const int16_t* at = a[t].parts[part].data() + 2 * g * kGroup;
        for (int i = 0; i < kRun; ++i)
          for (int piece = 0; piece < 4; ++piece, at += simd::kBytes / 2) {
            Ints& to = sums[piece / 2][part];
            to = simd::dot2(to, codes[i][piece], simd::load<SignedWords>(at));
          }
      }
      const float* own = factors + t * room + g;
      for (int side = 0; side < 2; ++side)
        sum[t] += (float(WordActivations::kUpper) * simd::to_float(sums[side][0]) +
                   simd::to_float(sums[side][1])) *
                  own[side * low_groups];
    }
  }
  for (int t = 0; t < kTokens; ++t) out[t] = simd::sum_lanes(sum[t]);
}

// `add_rows` of both planes.
template <int kGroup>
__attribute__((noinline)) void add_rows(const Octets* rows, const float* factors,
                                        int64_t room, int64_t half, float* part,
                                        float* offset) {
  static_assert(kInOctets<kGroup>);
  note_offsets(factors, room, 2 * half / kGroup, offset);
  for (int64_t i = 0; i < half; i += simd::kBytes) {
    for (int r = 0; r < kRowsAdded; ++r) rows[r].prefetch(i);
    for (int side = 0; side < 2; ++side) {
      const float* own = factors + (i + side * half) / kGroup;
      simd::Spread sums(part + side * half + i);
      for (int r = 0; r < kRowsAdded; ++r) {
        const Bytes upper = simd::load<Bytes>(rows[r].q4 + i);
        const Bytes lower = simd::load<Bytes>(rows[r].r4 + i);
        sums.add(side ? high_codes(upper, lower) : low_codes(upper, lower),
                 simd::splat(own[r * room]));
      }
      sums.store(part + side * half + i);
    }
  }
}

}  // namespace m2jax
