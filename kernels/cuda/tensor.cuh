// Products on tensor cores, as exact as float32: a code less its zero is a bfloat16 by
// itself, and a float the sum of three. Its columns [K][8] are tokens' parts.
#pragma once

#include "mma.cuh"
#include "products.cuh"

namespace m2jax {

// Lanes 4 g + t of a warp: g of 8 rows, t of 4 runs along a row.
constexpr int kRowsOfTile = 16, kLanesOfRow = 4;

// Three bfloat16, each in the upper half of a word, whose sum is x.
__device__ inline void split(float x, uint32_t (&parts)[3]) {
  for (int p = 0; p < 3; ++p) {
    parts[p] = __float_as_uint(x) & 0xFFFF0000;
    x -= __uint_as_float(parts[p]);
  }
}

__device__ inline uint32_t pair_of(uint32_t first, uint32_t second) {
  return first >> 16 | (second & 0xFFFF0000);
}

// Four bits at the end of either half of a word, less 8, as bfloat16: 128 + code, whose
// last bits are the code, less 136. threadIdx.y is nought, which the compiler does not
// know: else it makes the mask anew for each use, a tenth of all instructions.
__device__ inline uint32_t codes_of(uint32_t word) {
  const uint32_t mask = 0x000F000F | threadIdx.y;
  return subtract_pair((word & mask) | 0x43004300, 0x43084308);
}

// The kinds of rows that tensor cores take.
template <class Kind>
constexpr bool kOnTensorCores =
    std::is_same_v<Kind, Nibbles> || std::is_same_v<Kind, Halves<Bfloat>>;

// Four weights of a row as what a tensor core multiplies, two and two; order(k):
// which of them the k-th is.
template <class Kind>
struct Fours;

template <>
struct Fours<Nibbles> {
  __device__ static constexpr int order(int k) { return k / 2 + k % 2 * 2; }

  template <int j>
  __device__ static void pairs(const uint4& bytes, uint32_t& first, uint32_t& second) {
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    constexpr int shift = j < 4 ? 0 : 4;
    first = codes_of(words[j % 4] >> shift);
    second = codes_of(words[j % 4] >> (shift + 8));
  }
};

template <>
struct Fours<Halves<Bfloat>> {
  __device__ static constexpr int order(int k) { return k; }

  template <int j>
  __device__ static void pairs(const uint4& bytes, uint32_t& first, uint32_t& second) {
    first = j ? bytes.z : bytes.x;
    second = j ? bytes.w : bytes.y;
  }
};

// Calls work(how many as a constant, the first) for `first`, every `by`-th, up to `end`:
// four at once, so that their bytes are asked for at once, then what is left.
template <class F>
__device__ inline void in_fours(int first, int end, int by, F work) {
  for (; first + 3 * by < end; first += 4 * by)
    work(std::integral_constant<int, 4>(), first);
  if (first + by < end) {
    work(std::integral_constant<int, 2>(), first);
    first += 2 * by;
  }
  if (first < end) work(std::integral_constant<int, 1>(), first);
}

// Where tokens' parts stand. kFew: a token's three and an empty column follow each other
// (two tokens a tile); else each of three tiles holds one part of eight tokens.
template <int kTokensAtOnce>
struct Columns {
  static constexpr bool kFew = kTokensAtOnce <= 4;
  static constexpr int kTokens = kTokensAtOnce;
  static constexpr int kTiles = kFew ? (kTokens + 1) / 2 : 3;
  // One token's four columns serve for eight: what the others give is not looked at.
  static constexpr int kWide = kTokens == 1 ? 4 : 8;

  __device__ static int tile(int token, int part) { return kFew ? token / 2 : part; }
  __device__ static int column(int token, int part) {
    return kFew ? (token % 2) * 4 + part : token;
  }
  // A row's sums of this lane as [kTiles][2], of all its parts: calls put(token, sum).
  template <class Put>
  __device__ static void add_parts(const float (&sums)[kTiles][2], Put put) {
    const int t = threadIdx.x % kLanesOfRow;
    if constexpr (kFew) {
      for (int i = 0; i < kTiles; ++i) {
        float sum = t % 2 ? sums[i][0] : sums[i][0] + sums[i][1];
        const float other = __shfl_xor_sync(~0u, sum, 1);
        const int token = 2 * i + t / 2;
        if (t % 2 == 0 && token < kTokens) put(token, sum + other);
      }
    } else {
      for (int k = 0; k < 2; ++k)
        put(2 * t + k, sums[0][k] + sums[1][k] + sums[2][k]);
    }
  }
};

}  // namespace m2jax
