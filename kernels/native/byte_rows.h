// A few tokens times rows of codes, by products of bytes: gate and up, and matrices.
#pragma once

#include "bytes.h"

#if M2JAX_BYTES

namespace m2jax {

constexpr int64_t kPanel = simd::kLanes;
// Rows whose codes are unpacked together, and inputs of them: with their sums they stay
// in a second-level cache, and long stretches of a row are read faster.
constexpr int64_t kByteRows = 64, kByteInputs = 1024;
// Sums of two panels and a tile of tokens.
constexpr int64_t kByteSums = 2 * kByteTokens * kPanel;

// x [tokens][width] by groups, those of low nibbles and of high ones in turn: what is
// multiplied together lies together.
struct ByteTokens {
  int64_t tiles, of_tile;
  simd::Array<int32_t> numbers;  // [tiles][groups][kByteTokens][group]
  simd::Array<float> steps;      // [tiles][groups][kByteTokens]
  simd::Array<int32_t> offsets;  // [tiles][groups][kByteTokens][4]

  ByteTokens(ffi::ThreadPool& pool, const Matrix& x, int64_t group, int64_t units,
             int32_t zero)
      : tiles(divide_up(x.dimensions()[0], kByteTokens)),
        of_tile(2 * units * kByteTokens),
        numbers(tiles * of_tile * group),
        steps(tiles * of_tile),
        offsets(4 * tiles * of_tile) {
    const int64_t width = x.dimensions()[1], tokens = x.dimensions()[0];
    parallel(pool, tiles, [&, this](int64_t tile) {
      const int64_t first = tile * kByteTokens;
      for (int64_t g = 0; g < 2 * units; ++g)
        for (int64_t t = 0; t < std::min<int64_t>(kByteTokens, tokens - first); ++t) {
          const float* from =
              x.typed_data() + (first + t) * width + g / 2 * group + g % 2 * width / 2;
          const int64_t to = tile * of_tile + g * kByteTokens + t;
          this->steps[to] =
              round_bytes(group, this->numbers.data() + to * group, zero,
                          this->offsets.data() + 4 * to,
                          [=](int64_t i) { return simd::load<Floats>(from + i); });
        }
    });
  }
};

// A panel's rows, `first` and on, at most `last`; those behind are the last again, and
// nobody reads their sums.
template <bool kBoth, class Rows>
struct RowPanel {
  const Rows& rows;
  int64_t at[kPanel];
  const uint16_t* scales[kPanel];

  RowPanel(const Rows& rows, int64_t first, int64_t last) : rows(rows) {
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      at[lane] = rows.at(std::min(first + lane, last));
      scales[lane] = rows.scales_of(std::min(first + lane, last));
    }
  }

  // Of some units, to [units][low, high][2][kPanel], of which this is one.
  void unpack_scales(int64_t first, int64_t some, float* to) const {
    const Floats step = simd::splat(kBoth ? 1 : rows.step);
    alignas(16) float few[kPanel][4];
    for (int64_t side = 0; side < 2; ++side)
      for (int64_t unit = 0; unit < some; unit += 4) {
        const int64_t there = std::min<int64_t>(4, some - unit);
        for (int64_t lane = 0; lane < kPanel; ++lane) {
          const uint16_t* from = scales[lane] + side * rows.groups / 2 + first + unit;
          const __m128i halves =
              _mm_maskz_loadu_epi16(__mmask8((1 << there) - 1), from);
          _mm_store_ps(few[lane], _mm_cvtph_ps(halves));
        }
        const Across across([&](int lane) { return few[lane]; });
        for (int64_t k = 0; k < there; ++k)
          simd::store(to + (4 * (unit + k) + 2 * side) * kPanel,
                      step * (Floats)across.four[k]);
      }
  }

  // Both groups of a unit, to [low, high][2][group / 4][kPanel], of which this is one.
  // ahead: bytes to what is wanted next.
  void unpack(int64_t unit, int64_t group, int64_t ahead, int32_t* to) const {
    const int64_t first = unit * group;
    for (int64_t lane = 0; lane < kPanel; ++lane)
      for (int64_t i = at[lane] + first + ahead; i < at[lane] + first + ahead + group;
           i += 64) {
        __builtin_prefetch(rows.codes + i);
        if constexpr (kBoth) __builtin_prefetch(rows.residual + i);
      }
    for (int64_t i = first; i < first + group; i += 16, to += 4 * kPanel) {
      const Across q([&](int lane) { return rows.codes + at[lane] + i; });
      const Across r([&](int lane) {
        return (kBoth ? rows.residual : rows.codes) + at[lane] + i;
      });
      for (int k = 0; k < 4; ++k) {
        simd::store(to + k * kPanel, low_bytes<kBoth>(q.four[k], r.four[k]));
        simd::store(to + (group / 2 + k) * kPanel,
                    high_bytes<kBoth>(q.four[k], r.four[k]));
      }
    }
  }
};

// Calls put(row, token, sum) for all rows. Rows: as `CodeRows` (project.cc).
template <bool kBoth, class Rows, class Put>
void project_bytes(ffi::ThreadPool& pool, const Matrix& x, const Rows& rows,
                   int64_t group, Put put) {
  const int64_t tokens = x.dimensions()[0], units = rows.groups / 2;
  const int64_t most = std::max<int64_t>(1, kByteInputs / (2 * group));
  const ByteTokens given(pool, x, group, units, int32_t(kBoth ? 17 * kZero : kZero));
  const int64_t tiles = given.tiles, of_unit = group * kPanel;
  parallel(pool, divide_up(rows.all, kByteRows), [&](int64_t task) {
    const int64_t first_row = task * kByteRows;
    const int64_t count = std::min(kByteRows, rows.all - first_row);
    const int64_t pairs = divide_up(count, 2 * kPanel), all = tiles * pairs * kByteSums;
    int32_t* codes = simd::kept<int32_t, 2>(pairs * most * of_unit);
    float* sums = simd::kept<float, 2>(all + pairs * most * 4 * kPanel);
    float* scales = sums + all;
    std::memset(sums, 0, 4 * all);
    for (int64_t first = 0; first < units; first += most) {
      const int64_t some = std::min(most, units - first);
      for (int64_t n = 0; n < 2 * pairs; ++n) {
        const RowPanel<kBoth, Rows> panel(rows, first_row + n * kPanel,
                                          first_row + count - 1);
        const int64_t to = n / 2 * some;
        panel.unpack_scales(first, some, scales + (4 * to + n % 2) * kPanel);
        for (int64_t unit = 0; unit < some; ++unit)
          panel.unpack(first + unit, group, some * group,
                       codes + (to + unit) * of_unit + n % 2 * group / 4 * kPanel);
      }
      for (int64_t tile = 0; tile < tiles; ++tile)
        for (int64_t pair = 0; pair < pairs; ++pair)
          for (int64_t g = 0; g < 2 * some; ++g) {
            const int64_t at = tile * given.of_tile + (2 * first + g) * kByteTokens;
            const int64_t of_pair = 2 * pair * some + g;
            const float* own = scales + 2 * of_pair * kPanel;
            add_some_bytes<2>(
                tokens - tile * kByteTokens, codes + of_pair * of_unit / 2,
                given.numbers.data() + at * group, given.steps.data() + at,
                given.offsets.data() + 4 * at, group / 4,
                {simd::load<Floats>(own), simd::load<Floats>(own + kPanel)},
                sums + (tile * pairs + pair) * kByteSums);
          }
    }
    for (int64_t n = 0; n < count; ++n)
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t tile = t / kByteTokens * pairs + n / (2 * kPanel);
        const int64_t in_pair = n / kPanel % 2 * kByteTokens + t % kByteTokens;
        put(first_row + n, t, sums[tile * kByteSums + in_pair * kPanel + n % kPanel]);
      }
  });
}

}  // namespace m2jax

#endif
