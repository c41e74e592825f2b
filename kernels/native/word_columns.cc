// Sums of rows of codes weighted by h, for many tokens, as words: down columns.
#include "simd.h"

#if M2JAX_WORDS
#include "words.h"

namespace m2jax {
namespace {

// Neurons whose products are added before they meet a step, 136 kMostWord each at most:
// fewer than 482 fit 32 bits. And most units whose columns are widened together.
constexpr int64_t kRun = 128, kUnits = 4;

// Calls work(first, how many as a constant) for all panels, two at a time.
template <class F>
void for_panels(int64_t panels, F work) {
  int64_t panel = 0;
  for (; panel + 2 <= panels; panel += 2) work(panel, std::integral_constant<int, 2>());
  for (; panel < panels; ++panel) work(panel, std::integral_constant<int, 1>());
}

// Some neurons' columns of a unit as pairs [low, high][panels][kRun / 2][kPanel], and
// their scales [low, high][kRun]. Neurons behind the last have scales of zero.
template <bool kBoth>
void unpack(const Codes<kBoth>& weights, int64_t unit, int64_t first, int64_t neurons,
            int32_t* codes, float* scales) {
  const int64_t group = weights.group, last = neurons - 1;
  const int64_t base = (weights.kinds - 1) * weights.half + unit * group;
  const int64_t high = group * kRun / 2;
  for (int64_t n = 0; n < kRun; ++n) {
    const bool there = first + n <= last;
    const uint16_t* own =
        weights.scales_of(std::min(first + n, last), weights.kinds - 1) + unit;
    scales[n] = there ? weights.step * half_value(own[0]) : 0;
    scales[kRun + n] = there ? weights.step * half_value(own[weights.units()]) : 0;
  }
  for (int64_t pair = 0; pair < kRun / 2; ++pair) {
    const int64_t n = first + 2 * pair;
    const int64_t one = std::min(n, last) * weights.record + base;
    const int64_t two = std::min(n + 1, last) * weights.record + base;
    weights.prefetch(std::min(n + kAhead, last) * weights.record + base, group);
    weights.prefetch(std::min(n + 1 + kAhead, last) * weights.record + base, group);
    const auto both = [&](const uint8_t* from, int64_t i) {
      return simd::from_bytes(from + one + i) | simd::from_bytes(from + two + i) << 8;
    };
    int32_t* to = codes + pair * kPanel;
    for (int64_t i = 0; i < group; i += kPanel, to += kRun / 2 * kPanel) {
      const Pairs<kBoth> made(both(weights.codes, i),
                              kBoth ? both(weights.residual, i) : Ints{});
      simd::store(to, made.low[0]);
      simd::store(to + high, made.high[0]);
    }
  }
}

// y[t][d]
template <bool kBoth>
void accumulate(ffi::ThreadPool& pool, const Matrix& h, const Codes<kBoth>& weights,
                ffi::Result<Matrix>& y) {
  const int64_t tokens = h.dimensions()[0], neurons = h.dimensions()[1];
  const int64_t tiles = divide_up(tokens, kWordTokens), padded = tiles * kWordTokens;
  const int64_t group = weights.group, units = weights.units(), half = weights.half;
  const int64_t panels = group / kPanel, of_unit = group * kRun;
  const int64_t of_side = tiles * panels * kWordTokens * kPanel;
  // Neighbours share a row's pages.
  const int64_t shares = kShares * std::max<int64_t>(1, pool.num_threads());
  const int64_t together = std::clamp<int64_t>(units / shares, 1, kUnits);
  parallel(pool, divide_up(units, together), [&, weights](int64_t task) {
    const int64_t first_unit = task * together;
    const int64_t count = std::min(together, units - first_unit);
    int32_t* codes = simd::kept<int32_t>(count * of_unit);
    int16_t* words = simd::kept<int16_t>(padded * kRun);
    float* sums = simd::kept<float>(count * 2 * (of_side + kRun) + padded);
    float* scales = sums + count * 2 * of_side;
    float* steps = scales + count * 2 * kRun;
    std::memset(sums, 0, 4 * count * 2 * of_side);
    std::memset(words, 0, 2 * padded * kRun);
    for (int64_t first = 0; first < neurons; first += kRun) {
      const int64_t there = std::min(kRun, neurons - first);
      for (int64_t unit = 0; unit < count; ++unit)
        unpack(weights, first_unit + unit, first, neurons, codes + unit * of_unit,
               scales + 2 * unit * kRun);
      for (int64_t side = 0; side < 2 * count; ++side) {
        const float* own = scales + side * kRun;
        for (int64_t t = 0; t < tokens; ++t) {
          const float* from = h.typed_data() + t * neurons + first;
          float rest[kRun];
          if (there < kRun) {
            std::fill_n(std::copy_n(from, there, rest), kRun - there, 0);
            from = rest;
          }
          steps[t] = round_words(kRun, words + t * kRun, [=](int64_t i) {
            return simd::load<Floats>(from + i) * simd::load<Floats>(own + i);
          });
        }
        for (int64_t tile = 0; tile < tiles; ++tile)
          for_panels(panels, [&](int64_t panel, auto together) {
            Floats ones[together];
            for (Floats& one : ones) one = simd::splat(1);
            add_words<together>(codes + side * of_unit / 2 + panel * kRun / 2 * kPanel,
                                words + tile * kWordTokens * kRun,
                                steps + tile * kWordTokens, kRun / 2, ones,
                                sums + side * of_side +
                                    (tile * panels + panel) * kWordTokens * kPanel);
          });
      }
    }
    for (int64_t side = 0; side < 2 * count; ++side)
      for (int64_t panel = 0; panel < panels; ++panel) {
        float* to = y->typed_data() + side % 2 * half + (first_unit + side / 2) * group +
                    panel * kPanel;
        const float* from = sums + side * of_side + panel * kWordTokens * kPanel;
        for (int64_t t = 0; t < tokens; ++t) {
          const int64_t tile = t / kWordTokens * panels * kWordTokens;
          std::memcpy(to + 2 * t * half, from + (tile + t % kWordTokens) * kPanel,
                      simd::kBytes);
        }
      }
  });
}

}  // namespace

ffi::Error accumulate_block(ffi::ThreadPool pool, Matrix h, Records codes,
                            Records residual, Scales scales, ffi::Result<Matrix> y,
                            float step) {
  for_codes(codes, residual, scales, y->dimensions()[1], step,
            [&](const auto& weights) { accumulate(pool, h, weights, y); });
  return ffi::Error::Success();
}

}  // namespace m2jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_accumulate_block, m2jax::accumulate_block,
                              M2JAX_CODES(Matrix));

#endif
