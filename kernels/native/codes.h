// Rows of codes as the blocks' kernels meet them, for products of many tokens.
#pragma once

#include "common.h"

namespace m2jax {

// Rows of plane q4 or r4, or of q4 with r4 behind it. A unit is `group` bytes, that is a
// group of low nibbles and one of high ones.
template <bool kBoth>
struct Codes {
  const uint8_t *codes, *residual;
  const uint16_t* scales;
  int64_t record, kinds, groups, group, half;
  float step;

  int64_t units() const { return half / group; }
  const uint16_t* scales_of(int64_t n, int64_t m) const {
    return scales + (n * kinds + m) * groups;
  }
  void prefetch(int64_t at, int64_t bytes) const {
    for (int64_t i = 0; i < bytes; i += simd::kBytes) {
      __builtin_prefetch(codes + at + i);
      if constexpr (kBoth) __builtin_prefetch(residual + at + i);
    }
  }
};

// Calls work(weights) with those of one plane or of two.
template <class F>
void for_codes(const Records& codes, const Records& residual, const Scales& scales,
               int64_t width, float step, F work) {
  const auto made = [&](auto both) {
    const int64_t groups = scales.dimensions()[2];
    work(Codes<both>{codes.typed_data(), residual.typed_data(),
                     reinterpret_cast<const uint16_t*>(scales.untyped_data()),
                     codes.dimensions()[1], scales.dimensions()[1], groups,
                     width / groups, width / 2, both ? 1.0f : step});
  };
  residual.element_count() ? made(std::true_type()) : made(std::false_type());
}

}  // namespace m2jax

// Products of blocks of tokens with codes: numbers, q4 or r4, r4 or none, scales.
#define M2JAX_CODES(Result)       \
  M2JAX_POOL.Arg<m2jax::Matrix>() \
      .Arg<m2jax::Records>()      \
      .Arg<m2jax::Records>()      \
      .Arg<m2jax::Scales>()       \
      .Ret<m2jax::Result>()       \
      .Attr<float>("step")
