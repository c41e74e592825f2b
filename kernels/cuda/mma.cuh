// What tensor cores and pairs of bfloat16 are asked for, in PTX.
#pragma once

#include <cstdint>

namespace m2jax {

// sum += a b. Of a warp's 32 lanes lane 4 g + t holds, of a [16][16]: a[0] row g, columns
// 2 t and 2 t + 1; a[1] the same of row g + 8; a[2] and a[3] 8 columns further. Of
// b [16][8], in column g: b.x rows 2 t and 2 t + 1, b.y 8 rows further. Of sum [16][8]:
// columns 2 t and 2 t + 1 of row g, then of row g + 8.
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4],
                                    const uint2& b) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
#endif
}

// Two bfloat16 less two.
__device__ inline uint32_t subtract_pair(uint32_t pair, uint32_t other) {
  uint32_t difference = 0;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(difference) : "r"(pair), "r"(other));
#elif __CUDA_ARCH__ >= 800
  constexpr uint32_t one = 0x3F803F80, sign = 0x80008000;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;"
      : "=r"(difference)
      : "r"(pair), "r"(one), "r"(other ^ sign));
#endif
  return difference;
}

}  // namespace m2jax
