// Products of a few tokens with codes by sums of four products of bytes.
//
// What meets codes becomes integers of 24 bits, a step for each run of numbers: as fine
// as float32. Their three bytes each meet codes of 4 or 8 bits, and the sums are exact. A
// panel is a register's lanes of rows or columns, its inputs in fours.
#pragma once

#include "activations.h"
#include "common.h"

#if M2JAX_BYTES

namespace m2jax {

// Tokens that are multiplied together by two panels: all sums stay in registers.
constexpr int kByteTokens = 4;

// sum[l] += a[4 l] b[4 l] + .. + a[4 l + 3] b[4 l + 3], bytes without sign and with one.
// As an intrinsic GCC moves sums about, and where they fill the registers to memory.
inline void add_dot4(__m512i& sum, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

// Bytes of four integers: lo, mid, hi and one that nobody reads, of one after the other.
// A part is what is left of 24 bits when those above are taken off, -128 to 127.
inline __m512i in_fours(__m512i parts) {
  return _mm512_shuffle_epi8(
      parts, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14,
                                                  3, 7, 11, 15)));
}
inline __m512i to_parts(Floats steps) {
  const __m512i bias = _mm512_set1_epi32(0x808080);
  const __m512i rounded = _mm512_cvtps_epi32((__m512)steps);
  return _mm512_xor_si512(_mm512_add_epi32(rounded, bias), bias);
}

// What the codes' zero takes off each part's sum: that of `sums`, [4][lo, mid, hi, -].
inline void note_zero(__m512i sums, int32_t zero, int32_t* offsets) {
  const __m256i eight = _mm256_add_epi32(_mm512_castsi512_si256(sums),
                                         _mm512_extracti64x4_epi64(sums, 1));
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight),
                                     _mm256_extracti128_si256(eight, 1));
  _mm_storeu_si128((__m128i*)offsets, _mm_mullo_epi32(four, _mm_set1_epi32(-zero)));
}
inline __m512i add_parts(__m512i sums, __m512i fours) {
  return _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), fours);
}

// Of numbers without sign the larger has the larger bits, and infinity and NaN more.
inline Floats larger(Floats most, Floats value) {
  const __m512i bits = _mm512_and_si512((__m512i)value, _mm512_set1_epi32(0x7fffffff));
  return (Floats)_mm512_max_epi32((__m512i)most, bits);
}

// to [count / 4][lo, mid, hi, -][4] = value(i) / step; value(i) are simd::kLanes numbers.
//
// offsets: [lo, mid, hi, -], the sums' when all codes are zero. Returns: the step.
template <class Value>
inline float round_bytes(int64_t count, int32_t* to, int32_t zero, int32_t* offsets,
                         Value value) {
  Floats most{};
  for (int64_t i = 0; i < count; i += simd::kLanes) most = larger(most, value(i));
  const int32_t largest = _mm512_reduce_max_epi32((__m512i)most);
  float magnitude;
  std::memcpy(&magnitude, &largest, 4);
  const bool finite = largest < 0x7f800000;
  const Floats inverse =
      simd::splat(finite && magnitude > 1e-30f ? kMostSteps / magnitude : 0);
  __m512i sums{};
  for (int64_t i = 0; i < count; i += simd::kLanes) {
    const __m512i fours = in_fours(to_parts(value(i) * inverse));
    sums = add_parts(sums, fours);
    _mm512_storeu_si512(to + i, fours);
  }
  note_zero(sums, zero, offsets);
  return finite ? magnitude / kMostSteps : NAN;
}

// Sums of the parts as one number; each is exact as a float.
inline Floats whole_sum(__m512i lo, __m512i mid, __m512i hi) {
  const auto number = [](__m512i part) { return (Floats)_mm512_cvtepi32_ps(part); };
  return (number(hi) * 256.0f + number(mid)) * 256.0f + number(lo);
}

// Register k: bytes 4 k to 4 k + 3 of each of 16 rows, a row a lane. at(lane): where a
// row's 16 bytes lie.
struct Across {
  __m512i four[4];

  template <class At>
  explicit Across(At at) {
    __m512i rows[4];
    const auto load = [&](int lane) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at(lane)));
    };
    for (int j = 0; j < 4; ++j) {
      rows[j] = _mm512_castsi128_si512(load(j));
      rows[j] = _mm512_inserti32x4(rows[j], load(j + 4), 1);
      rows[j] = _mm512_inserti32x4(rows[j], load(j + 8), 2);
      rows[j] = _mm512_inserti32x4(rows[j], load(j + 12), 3);
    }
    const __m512i low[2] = {_mm512_unpacklo_epi32(rows[0], rows[1]),
                            _mm512_unpacklo_epi32(rows[2], rows[3])};
    const __m512i high[2] = {_mm512_unpackhi_epi32(rows[0], rows[1]),
                             _mm512_unpackhi_epi32(rows[2], rows[3])};
    four[0] = _mm512_unpacklo_epi64(low[0], low[1]);
    four[1] = _mm512_unpackhi_epi64(low[0], low[1]);
    four[2] = _mm512_unpacklo_epi64(high[0], high[1]);
    four[3] = _mm512_unpackhi_epi64(high[0], high[1]);
  }
};

// Bytes of four rows in turn: lane l of register k are those of column
// `column_of(16 k + l)`.
struct InTurn {
  __m512i four[4];

  InTurn(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i low[2] = {_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d)};
    const __m512i high[2] = {_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d)};
    four[0] = _mm512_unpacklo_epi16(low[0], low[1]);
    four[1] = _mm512_unpackhi_epi16(low[0], low[1]);
    four[2] = _mm512_unpacklo_epi16(high[0], high[1]);
    four[3] = _mm512_unpackhi_epi16(high[0], high[1]);
  }
  // Four columns lie together; the same permutation leads back.
  static int64_t column_of(int64_t i) { return i % 16 / 4 * 16 + i / 16 * 4 + i % 4; }
};

// A register of codes, of low nibbles or of high ones; r: of plane r4, or nothing.
template <bool kBoth>
inline __m512i low_bytes(__m512i q, __m512i r) {
  const __m512i nibble = _mm512_set1_epi8(15);
  if constexpr (!kBoth) return _mm512_and_si512(q, nibble);
  // Bits of r where those of the mask are set, else of q.
  return _mm512_ternarylogic_epi32(_mm512_slli_epi16(q, 4), r, nibble, 0xd8);
}
template <bool kBoth>
inline __m512i high_bytes(__m512i q, __m512i r) {
  const __m512i nibble = _mm512_set1_epi8(15);
  if constexpr (!kBoth) return _mm512_and_si512(_mm512_srli_epi16(q, 4), nibble);
  return _mm512_ternarylogic_epi32(q, _mm512_srli_epi16(r, 4), nibble, 0xd8);
}

// sums [kPanels][kByteTokens][kPanel] += products of kPanels panels and kTokens tokens.
//
// codes: [kPanels][fours][kPanel] fours of bytes. numbers: [kByteTokens][fours][4], of
// round_bytes, as are steps [kByteTokens] and offsets [kByteTokens][4]. scales: of the
// panels. Not inline: among other code compilers run out of registers.
template <int kPanels, int kTokens>
__attribute__((noinline)) void add_bytes(const int32_t* codes, const int32_t* numbers,
                                         const float* steps, const int32_t* offsets,
                                         int64_t fours, const Floats (&scales)[kPanels],
                                         float* sums) {
  __m512i products[kPanels][kTokens][3];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 3
    for (int p = 0; p < 3; ++p)
#pragma GCC unroll 2
      for (int j = 0; j < kPanels; ++j)
        products[j][t][p] = _mm512_set1_epi32(offsets[4 * t + p]);
  for (int64_t f = 0; f < fours; ++f, codes += simd::kLanes, numbers += 4) {
    __m512i panel[kPanels];
#pragma GCC unroll 2
    for (int j = 0; j < kPanels; ++j)
      panel[j] = simd::held(simd::load<__m512i>(codes + j * fours * simd::kLanes));
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 3
      for (int p = 0; p < 3; ++p) {
        const __m512i part = _mm512_set1_epi32(numbers[4 * t * fours + p]);
#pragma GCC unroll 2
        for (int j = 0; j < kPanels; ++j)
          add_dot4(products[j][t][p], panel[j], part);
      }
  }
#pragma GCC unroll 2
  for (int j = 0; j < kPanels; ++j)
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const auto& parts = products[j][t];
      float* to = sums + (j * kByteTokens + t) * simd::kLanes;
      simd::store(to, simd::load<Floats>(to) + whole_sum(parts[0], parts[1], parts[2]) *
                                                   (scales[j] * steps[t]));
    }
}

// The same for `tokens` of them, at most kByteTokens.
template <int kPanels>
inline void add_some_bytes(int64_t tokens, const int32_t* codes, const int32_t* numbers,
                           const float* steps, const int32_t* offsets, int64_t fours,
                           const Floats (&scales)[kPanels], float* sums) {
  const auto add = [&](auto count) {
    add_bytes<kPanels, count>(codes, numbers, steps, offsets, fours, scales, sums);
  };
  switch (tokens) {
    case 1: return add(std::integral_constant<int, 1>());
    case 2: return add(std::integral_constant<int, 2>());
    case 3: return add(std::integral_constant<int, 3>());
    default: return add(std::integral_constant<int, kByteTokens>());
  }
}

}  // namespace m2jax

#endif
