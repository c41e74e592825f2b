// Rows of codes as tiles of weights.
//
// A code less its zero is a bfloat16 by itself, so a group of codes is one part. Its scale
// is the sum's: of gate and up that of a row's group; of down the neuron's, and then it
// goes to the token's number first.
#pragma once

#include "amx.h"
#include "codes.h"

#if M2JAX_AMX

namespace m2jax {

using amx::kInputs;
using amx::kParts;
using amx::kSide;
using amx::kTile;

template <bool kBoth>
struct CodeTiles : Codes<kBoth> {
  using Codes<kBoth>::codes, Codes<kBoth>::residual, Codes<kBoth>::group;

  // Tiles of inputs of a group; one of 16 fills half a tile.
  int64_t steps() const { return divide_up(group, kInputs); }
  int64_t inputs() const { return std::min(group, kInputs); }

  // Codes in 16-bit lanes as bfloat16, low nibbles and high ones.
  static void widen(__m512i q, __m512i r, __m512i* low, __m512i* high) {
    const __m512i nibble = _mm512_set1_epi16(15);
    if constexpr (kBoth) {
      *low = number(_mm512_or_si512(
          _mm512_slli_epi16(_mm512_and_si512(q, nibble), 4), _mm512_and_si512(r, nibble)));
      *high = number(
          _mm512_or_si512(_mm512_andnot_si512(nibble, q), _mm512_srli_epi16(r, 4)));
    } else {
      // -8 to 7.
      const __m512i values = _mm512_broadcast_i64x4(_mm256_setr_epi16(
          int16_t(0xc100), int16_t(0xc0e0), int16_t(0xc0c0), int16_t(0xc0a0),
          int16_t(0xc080), int16_t(0xc040), int16_t(0xc000), int16_t(0xbf80), 0, 0x3f80,
          0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
      *low = _mm512_permutexvar_epi16(_mm512_and_si512(q, nibble), values);
      *high = _mm512_permutexvar_epi16(_mm512_srli_epi16(q, 4), values);
    }
  }
  static __m512i number(__m512i code) {
    code = _mm512_sub_epi16(code, _mm512_set1_epi16(136));
    const auto floats = [](__m256i some) {
      return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(some));
    };
    return (__m512i)_mm512_cvtne2ps_pbh(floats(_mm512_extracti64x4_epi64(code, 1)),
                                        floats(_mm512_castsi512_si256(code)));
  }

  // 16 codes at `one` and 16 at `two` side by side, low nibbles and high ones.
  void pairs(int64_t one, int64_t two, uint16_t* to, int64_t high_next) const {
    const auto words = [&](const uint8_t* from) {
      return _mm512_or_si512(
          (__m512i)simd::from_bytes(from + one),
          _mm512_slli_epi32((__m512i)simd::from_bytes(from + two), 16));
    };
    __m512i low, high;
    widen(words(codes), kBoth ? words(residual) : __m512i{}, &low, &high);
    _mm512_store_si512(to, low);
    _mm512_store_si512(to + high_next, high);
  }
  // A unit's codes of one row, as a row of tiles [low, high][steps]. The second half of
  // a group of 16 meets zeros.
  void row(int64_t at, uint16_t* to) const {
    const int64_t steps = this->steps(), second = inputs() - kSide;
    for (int64_t s = 0; s < steps; ++s, at += kInputs, to += kTile)
      pairs(at, at + second, to, steps * kTile);
  }
};

template <bool kBoth>
CodeTiles<kBoth> as_tiles(const Codes<kBoth>& codes) {
  return {codes};
}

}  // namespace m2jax

#endif
