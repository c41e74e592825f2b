// Stands for the product's file of this name: what its PTX gives, by PTX's tables.
#pragma once

#include <cstdint>

#include "cuda_runtime.h"

namespace m2jax {

// The bfloat16 in the lower or the upper half of a word.
inline float half_of(uint32_t pair, int upper) {
  return __uint_as_float(upper ? pair & 0xFFFF0000 : pair << 16);
}

// mma.m16n8k16 of bfloat16: all 32 lanes of a warp at once.
inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint2& b) {
  // Two, in turn, as for a shuffle.
  static uint32_t as[2][emulated::kMostThreads][4], bs[2][emulated::kMostThreads][2];
  const int self = emulated::device.running, lane = self % emulated::kLanes;
  const int turn = emulated::device.fibers[self].shuffles++ % 2;
  for (int i = 0; i < 4; ++i) as[turn][self][i] = a[i];
  bs[turn][self][0] = b.x, bs[turn][self][1] = b.y;
  emulated::wait(emulated::kAtWarpBarrier);
  ++emulated::device.products;
  const auto* of_a = as[turn] + self - lane;
  const auto* of_b = bs[turn] + self - lane;
  for (int i = 0; i < 4; ++i) {
    // c0, c1: row g, columns 2 t and 2 t + 1; c2, c3: row g + 8.
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int t = k % 8 / 2, further = k / 8;
      const uint32_t pair_a = of_a[row % 8 * 4 + t][further * 2 + row / 8];
      const uint32_t pair_b = of_b[column * 4 + t][further];
      sum[i] += half_of(pair_a, k % 2) * half_of(pair_b, k % 2);
    }
  }
}

// Small whole numbers alone: their difference is exact, not rounded here.
inline uint32_t subtract_pair(uint32_t pair, uint32_t other) {
  uint32_t difference = 0;
  for (int upper = 0; upper < 2; ++upper) {
    const uint32_t bits =
        __float_as_uint(half_of(pair, upper) - half_of(other, upper));
    if (bits & 0xFFFF) emulated::fail("a difference that is no bfloat16");
    difference |= upper ? bits : bits >> 16;
  }
  return difference;
}

}  // namespace m2jax
