// Products of many tokens with rows of codes where the CPU has no tile registers.
//
// Tokens' numbers become integers of 16 bits, a step for each run of them: products with
// codes and their sums are exact, and two are made at a time. A panel is a register's
// lanes of rows or columns, its inputs in pairs. Tokens are taken by tiles of a few. What
// is multiplied together lies together: a power of two apart it would share a few lines
// of a cache.
#pragma once

#include "codes.h"

#if M2JAX_WORDS

namespace m2jax {

constexpr int64_t kPanel = simd::kLanes;
// Tokens that are multiplied together by two panels: all sums stay in registers.
constexpr int64_t kWordTokens = 4;
constexpr float kMostWord = 32767;

// to[i] = value(i) / step; value(i) are simd::kLanes numbers.
//
// Returns: the step; NaN where a number is none or infinite.
template <class Value>
inline float round_words(int64_t count, int16_t* to, Value value) {
  // Of numbers without sign the larger has the larger bits, and infinity and NaN more.
  Ints most{};
  for (int64_t i = 0; i < count; i += simd::kLanes) {
    const Ints bits = (Ints)value(i) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t largest = 0;
  for (int lane = 0; lane < simd::kLanes; ++lane) largest = std::max(largest, most[lane]);
  float magnitude;
  std::memcpy(&magnitude, &largest, 4);
  const bool finite = largest < 0x7f800000;
  const float inverse = finite && magnitude > 1e-30f ? kMostWord / magnitude : 0;
  const Floats factor = simd::splat(inverse);
  if (inverse == 0) {
    std::memset(to, 0, 2 * count);
  } else {
    for (int64_t i = 0; i < count; i += simd::kLanes)
      simd::to_words(to + i, value(i) * factor);
  }
  return finite ? magnitude / kMostWord : NAN;
}

// Eight or more rows' codes less their zero as pairs of words, from four bytes of each in
// a lane: two pairs of low nibbles, two of high ones.
template <bool kBoth>
struct Pairs {
  Ints low[2], high[2];

  Pairs(Ints q, Ints r) {
    for (int k = 0; k < 2; ++k) {
      low[k] = code(q, r, 16 * k);
      high[k] = code(q, r, 16 * k + 4);
    }
  }

 private:
  typedef uint32_t Unsigned __attribute__((vector_size(simd::kBytes)));
  // The nibbles at `bit` and 8 bits above as words.
  static Unsigned nibbles(Ints four, int bit) {
    const Unsigned there = (Unsigned)four >> bit;
    return (there & 15) | ((there << 8) & 0xf0000);
  }
  static Ints code(Ints q, Ints r, int bit) {
    if constexpr (kBoth)
      return (Ints)((simd::Words)(nibbles(q, bit) << 4 | nibbles(r, bit)) - 136);
    return (Ints)((simd::Words)nibbles(q, bit) - 8);
  }
};

// sums [kPanels][kWordTokens][kPanel] += products of kPanels panels and kWordTokens tokens.
//
// codes: [kPanels][pairs][kPanel] pairs of words. words: [kWordTokens][2 pairs]. steps: of
// the tokens. scales: of the panels.
template <int kPanels>
inline void add_words(const int32_t* codes, const int16_t* words, const float* steps,
                      int64_t pairs, const Floats (&scales)[kPanels], float* sums) {
  Ints products[kPanels][kWordTokens] = {};
  for (int64_t p = 0; p < pairs; ++p, codes += kPanel) {
    simd::Words panel[kPanels];
    for (int j = 0; j < kPanels; ++j)
      panel[j] = simd::held(simd::load<simd::Words>(codes + j * pairs * kPanel));
    for (int t = 0; t < kWordTokens; ++t) {
      int32_t pair;
      std::memcpy(&pair, words + 2 * (t * pairs + p), 4);
      const auto both = (simd::SignedWords)(pair - Ints{});
      for (int j = 0; j < kPanels; ++j)
        products[j][t] = simd::dot2(products[j][t], panel[j], both);
    }
  }
  for (int j = 0; j < kPanels; ++j)
    for (int t = 0; t < kWordTokens; ++t, sums += kPanel)
      simd::store(sums, simd::load<Floats>(sums) +
                            simd::to_float(products[j][t]) * (scales[j] * steps[t]));
}

}  // namespace m2jax

#endif
