// Sums of rows of codes weighted by h, by products of bytes: down columns.
#pragma once

#include "byte_rows.h"

#if M2JAX_BYTES

namespace m2jax {

// Columns of a register of codes come four rows together; other groups go by numbers.
constexpr int64_t kStrip = simd::kBytes;
constexpr bool is_striped(int64_t group) { return group % kStrip == 0; }

// Neurons whose products are added before they meet a step, and most units whose columns
// are unpacked together.
constexpr int64_t kByteRun = 128, kByteUnits = 4;

// Some rows' columns of a unit as fours [low, high][panels][kByteRun / 4][kPanel], and
// their scales [low, high][kByteRun]. Rows behind the last have scales of zero.
template <bool kBoth, class Rows>
void unpack_columns(const Rows& rows, int64_t unit, int64_t first, int64_t group,
                    int32_t* codes, float* scales) {
  const int64_t last = rows.all - 1, high = group / 4 * kByteRun;
  for (int64_t n = 0; n < kByteRun; ++n) {
    const bool there = first + n <= last;
    const uint16_t* own = rows.scales_of(first + n) + unit;
    const float step = kBoth ? 1 : rows.step;
    scales[n] = there ? step * half_value(own[0]) : 0;
    scales[kByteRun + n] = there ? step * half_value(own[rows.groups / 2]) : 0;
  }
  for (int64_t n = 0; n < kByteRun; n += 4) {
    int64_t at[4];
    for (int64_t r = 0; r < 4; ++r) {
      at[r] = rows.at(first + n + r) + unit * group;
      const int64_t ahead = rows.at(first + n + r + kAhead) + unit * group;
      for (int64_t i = 0; i < group; i += 64) {
        __builtin_prefetch(rows.codes + ahead + i);
        if constexpr (kBoth) __builtin_prefetch(rows.residual + ahead + i);
      }
    }
    int32_t* to = codes + n / 4 * kPanel;
    for (int64_t i = 0; i < group; i += kStrip) {
      const auto four = [&](const uint8_t* from) {
        const auto load = [&](int r) { return simd::load<__m512i>(from + at[r] + i); };
        return InTurn(load(0), load(1), load(2), load(3));
      };
      const InTurn q = four(rows.codes), r = kBoth ? four(rows.residual) : q;
      for (int k = 0; k < 4; ++k, to += kByteRun / 4 * kPanel) {
        simd::store(to, low_bytes<kBoth>(q.four[k], r.four[k]));
        simd::store(to + high, high_bytes<kBoth>(q.four[k], r.four[k]));
      }
    }
  }
}

// y[t][d] of h [tokens][rows.all].
template <bool kBoth, class Rows>
void accumulate_bytes(ffi::ThreadPool& pool, const float* h, int64_t tokens,
                      const Rows& rows, int64_t group, float* y) {
  const int64_t tiles = divide_up(tokens, kByteTokens), padded = tiles * kByteTokens;
  const int64_t units = rows.groups / 2, half = units * group;
  const int64_t panels = group / kPanel, of_unit = group / 2 * kByteRun;
  const int64_t of_side = tiles * panels * kByteTokens * kPanel;
  // Neighbours share a row's pages.
  const int64_t shares = kShares * std::max<int64_t>(1, pool.num_threads());
  const int64_t together = std::clamp<int64_t>(units / shares, 1, kByteUnits);
  parallel(pool, divide_up(units, together), [&](int64_t task) {
    const int64_t first_unit = task * together;
    const int64_t count = std::min(together, units - first_unit);
    int32_t* codes = simd::kept<int32_t, 2>(count * of_unit);
    int32_t* numbers = simd::kept<int32_t, 3>(padded * (kByteRun + 4));
    int32_t* offsets = numbers + padded * kByteRun;
    float* sums = simd::kept<float, 2>(count * 2 * (of_side + kByteRun) + padded);
    float* scales = sums + count * 2 * of_side;
    float* steps = scales + count * 2 * kByteRun;
    std::memset(sums, 0, 4 * count * 2 * of_side);
    for (int64_t first = 0; first < rows.all; first += kByteRun) {
      const int64_t there = std::min(kByteRun, rows.all - first);
      for (int64_t unit = 0; unit < count; ++unit)
        unpack_columns<kBoth>(rows, first_unit + unit, first, group,
                              codes + unit * of_unit, scales + 2 * unit * kByteRun);
      for (int64_t side = 0; side < 2 * count; ++side) {
        const float* own = scales + side * kByteRun;
        for (int64_t t = 0; t < tokens; ++t) {
          const float* from = h + t * rows.all + first;
          float rest[kByteRun];
          if (there < kByteRun) {
            std::fill_n(std::copy_n(from, there, rest), kByteRun - there, 0);
            from = rest;
          }
          steps[t] = round_bytes(
              kByteRun, numbers + t * kByteRun, int32_t(kBoth ? 17 * kZero : kZero),
              offsets + 4 * t, [=](int64_t i) {
                return simd::load<Floats>(from + i) * simd::load<Floats>(own + i);
              });
        }
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t t = tile * kByteTokens;
          for (int64_t panel = 0; panel < panels; panel += 2)
            add_some_bytes<2>(tokens - t,
                              codes + side * of_unit / 2 + panel * kByteRun / 4 * kPanel,
                              numbers + t * kByteRun, steps + t, offsets + 4 * t,
                              kByteRun / 4, {simd::splat(1), simd::splat(1)},
                              sums + side * of_side +
                                  (tile * panels + panel) * kByteTokens * kPanel);
        }
      }
    }
    for (int64_t side = 0; side < 2 * count; ++side)
      for (int64_t t = 0; t < tokens; ++t) {
        float* to = y + 2 * t * half + side % 2 * half + (first_unit + side / 2) * group;
        const float* from = sums + side * of_side +
                            (t / kByteTokens * panels * kByteTokens + t % kByteTokens) *
                                kPanel;
        for (int64_t i = 0; i < group; i += 4) {
          const int64_t panel = i / kPanel;
          std::copy_n(from + panel * kByteTokens * kPanel + i % kPanel, 4,
                      to + i / kStrip * kStrip + InTurn::column_of(i % kStrip));
        }
      }
  });
}

}  // namespace m2jax

#endif
