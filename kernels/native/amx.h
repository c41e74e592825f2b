// Matrix products of many tokens, by the CPU's tile registers (Intel AMX, bfloat16).
//
// A float32 is the sum of three bfloat16 of 8 bits each, its parts; weights of fewer bits
// are the sum of fewer. A product is that of all parts, but for those below the last bit
// of a float32: sums are as exact as any in float32. A tile is 16 rows of 32 inputs, or
// 16 pairs of inputs by 16 columns: 1 KiB either way; tiles of all parts lie together.
#pragma once

#include "common.h"

#if M2JAX_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace m2jax::amx {

constexpr int64_t kSide = 16, kInputs = 32, kTile = kSide * kInputs;
constexpr int kParts = 3;
// Steps of kInputs whose weights are unpacked at a time, and rows or columns of them:
// what they take, at most 768 KiB, stays in a second-level cache.
constexpr int64_t kSteps = 32, kTogether = 128;

#if M2JAX_AMX

// The first `count` of 16 numbers, and zeros.
inline Floats some(const float* from, int64_t count) {
  const int64_t there = std::clamp<int64_t>(count, 0, simd::kLanes);
  return (Floats)_mm512_maskz_loadu_ps((1u << there) - 1, from);
}

// to[i] = from[i stride]
inline void gather(const float* from, int64_t stride, int64_t count, float* to) {
  const __m512i lanes = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
      _mm512_set1_epi32(int32_t(stride)));
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(to + i, _mm512_i32gather_ps(lanes, from + i * stride, 4));
  for (; i < count; ++i) to[i] = from[i * stride];
}

// Tile registers at work for a scope.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, rest[15] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
};

// The parts of 32 numbers, each with the first 8 bits of what is left, so that they add
// up to the number exactly. The second 16 stand beside the first 16, one by one: so do
// the inputs of every tile.
template <int kCount>
struct Parts {
  __m512i part[kCount];

  Parts(Floats first, Floats second) {
    const __m512i upper = _mm512_set1_epi32(int32_t(0xffff0000));
    for (int p = 0; p < kCount; ++p) {
      const __m512i one = _mm512_and_si512((__m512i)first, upper);
      const __m512i two = _mm512_and_si512((__m512i)second, upper);
      part[p] = _mm512_or_si512(_mm512_srli_epi32(one, 16), two);
      first -= (Floats)one;
      second -= (Floats)two;
    }
  }

  // Row `row` of tiles: 32 inputs, or two inputs by 16 columns.
  void to_row(uint16_t* tiles, int64_t row) const {
    for (int p = 0; p < kCount; ++p)
      _mm512_store_si512(tiles + p * kTile + row * kInputs, part[p]);
  }
  // Column `column` of tiles of pairs: the 32 numbers are inputs.
  void to_column(uint16_t* tiles, int64_t column) const {
    const __m512i lanes = _mm512_slli_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
    for (int p = 0; p < kCount; ++p)
      _mm512_i32scatter_epi32(tiles + p * kTile + 2 * column, lanes, part[p], 4);
  }
};

// Adds part i of a times part j of b to tiles 0 .. 3, if there are such parts and they
// matter. Tiles 4 to 7 hold what the step before loaded: part kHeldA of a, kHeldB of b.
template <int kA, int kB, int i, int j, int kHeldA, int kHeldB>
inline void add_product(const uint16_t* a, int64_t a_next, const uint16_t* b,
                        int64_t b_next) {
  if constexpr (i < kA && j < kB) {
    if constexpr (i != kHeldA) {
      _tile_loadd(4, a + i * kTile, 64);
      _tile_loadd(5, a + a_next + i * kTile, 64);
    }
    if constexpr (j != kHeldB) {
      _tile_loadd(6, b + j * kTile, 64);
      _tile_loadd(7, b + b_next + j * kTile, 64);
    }
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// sums[32][stride] += rows a, in kA parts, times columns b, in kB parts; of both two
// tiles side by side, the second ones a_next and b_next behind the first.
template <int kA, int kB>
inline void multiply(const uint16_t* a, int64_t a_next, const uint16_t* b,
                     int64_t b_next, int64_t steps, float* sums, int64_t stride) {
  float* lower = sums + kSide * stride;
  _tile_loadd(0, sums, 4 * stride);
  _tile_loadd(1, sums + kSide, 4 * stride);
  _tile_loadd(2, lower, 4 * stride);
  _tile_loadd(3, lower + kSide, 4 * stride);
  for (int64_t s = 0; s < steps; ++s, a += kA * kTile, b += kB * kTile) {
    // Every next one keeps a part of one side; a part that is not there counts as held.
    constexpr int kNone = -1;
    add_product<kA, kB, 0, 2, kNone, kNone>(a, a_next, b, b_next);
    add_product<kA, kB, 0, 1, (kB == 3) ? 0 : kNone, kNone>(a, a_next, b, b_next);
    add_product<kA, kB, 1, 1, kNone, 1>(a, a_next, b, b_next);
    add_product<kA, kB, 1, 0, (kB > 1) ? 1 : kNone, kNone>(a, a_next, b, b_next);
    add_product<kA, kB, 2, 0, kNone, 0>(a, a_next, b, b_next);
    add_product<kA, kB, 0, 0, (kA == 1 && kB > 1) ? 0 : kNone, (kA > 1) ? 0 : kNone>(
        a, a_next, b, b_next);
  }
  _tile_stored(0, sums, 4 * stride);
  _tile_stored(1, sums + kSide, 4 * stride);
  _tile_stored(2, lower, 4 * stride);
  _tile_stored(3, lower + kSide, 4 * stride);
}

#endif

}  // namespace m2jax::amx
