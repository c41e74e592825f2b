// What the products share: how 16 bytes of a row become numbers, and which rows stand
// where.
//
// A row's product is one warp's work, in an order that hangs on the row's length alone:
// neither on the other rows, nor on where it lies, nor on the tokens beside one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace m2jax {

using Matrix = ffi::Buffer<ffi::F32, 2>;
using Rows = ffi::Buffer<ffi::F32, 3>;
using Scales = ffi::Buffer<ffi::F16, 3>;
using Ids = ffi::Buffer<ffi::S32, 1>;

// A launch is all that a handler does: XLA may record it once and replay it.
inline constexpr std::initializer_list<ffi::Traits> kTraits = {
    ffi::Traits::kCmdBufferCompatible};

constexpr int kLanes = 32;

// Indices are 32 bits wide: a division of 64 bits takes a GPU a hundred instructions.
__host__ __device__ inline int divide_up(int value, int by) {
  return (value + by - 1) / by;
}

// Of a power of two.
inline int bits_of(int64_t value) {
  int bits = 0;
  while (value >> (bits + 1)) ++bits;
  return bits;
}

// Which of `rows` rows stands k-th: those of ids, kept inside, or as they lie.
struct Picked {
  const int32_t* ids;
  int rows;

  explicit Picked(const Ids& given, int64_t rows)
      : ids(given.element_count() ? given.typed_data() : nullptr), rows(int(rows)) {}

  __device__ int64_t operator[](int k) const {
    return ids ? min(max(ids[k], 0), rows - 1) : k;
  }
};

// 2^23: a small integer in the last bits of its mantissa is that integer, added.
constexpr uint32_t kMagic = 0x4B000000;

// Four weights of one word of codes. Two of each four are 256 times, those of the high
// nibbles 16 times too large: `factor` is what puts that right, in what they meet.
template <bool kHigh>
__device__ inline void widen_codes(uint32_t word, float (&out)[4]) {
  constexpr uint32_t low = kHigh ? 0xF0 : 0xF;
  constexpr float one = kHigh ? 16 : 1;
  constexpr float zero = 8388608 + 8 * one, far_zero = 8388608 + 8 * 256 * one;
  const uint32_t upper = word >> 16;
  out[0] = __uint_as_float((word & low) | kMagic) - zero;
  out[1] = __uint_as_float((word & low << 8) | kMagic) - far_zero;
  out[2] = __uint_as_float((upper & low) | kMagic) - zero;
  out[3] = __uint_as_float((upper & low << 8) | kMagic) - far_zero;
}

// Kinds of rows. Sixteen bytes hold kFours times four weights, in kParts runs: the run
// p of the c-th sixteen bytes begins at weight start(c, p) of the row.
struct Nibbles {
  static constexpr int kFours = 8, kParts = 2;
  static constexpr bool kScaled = true;

  __device__ static int start(int chunk, int part, int width) {
    return 16 * chunk + part * (width / 2);
  }
  template <int j>
  __device__ static void widen(const uint4& bytes, float (&out)[4]) {
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    widen_codes<(j >= 4)>(words[j % 4], out);
  }
  __device__ static float factor(int j, int i) {
    return (j < 4 ? 1.0f : 1.0f / 16) * (i % 2 ? 1.0f / 256 : 1.0f);
  }
};

template <class Bits>
struct Halves {
  static constexpr int kFours = 2, kParts = 1;
  static constexpr bool kScaled = false;

  __device__ static int start(int chunk, int, int) { return 8 * chunk; }
  template <int j>
  __device__ static void widen(const uint4& bytes, float (&out)[4]) {
    const uint32_t words[2] = {j ? bytes.z : bytes.x, j ? bytes.w : bytes.y};
    for (int i = 0; i < 4; ++i) out[i] = Bits::number(words[i / 2] >> 16 * (i % 2));
  }
  __device__ static float factor(int, int) { return 1; }
};

struct Half {
  __device__ static float number(uint32_t bits) {
    return __half2float(__ushort_as_half(uint16_t(bits)));
  }
};

struct Bfloat {
  __device__ static float number(uint32_t bits) { return __uint_as_float(bits << 16); }
};

struct Floats {
  static constexpr int kFours = 1, kParts = 1;
  static constexpr bool kScaled = false;

  __device__ static int start(int chunk, int, int) { return 4 * chunk; }
  template <int j>
  __device__ static void widen(const uint4& bytes, float (&out)[4]) {
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    for (int i = 0; i < 4; ++i) out[i] = __uint_as_float(words[i]);
  }
  __device__ static float factor(int, int) { return 1; }
};

// Calls work(kind) with the kind of rows that the records hold.
template <class F>
ffi::Error for_kind(ffi::DataType type, F work) {
  switch (type) {
    case ffi::U8: return work(Nibbles());
    case ffi::F16: return work(Halves<Half>());
    case ffi::U16: return work(Halves<Bfloat>());
    case ffi::F32: return work(Floats());
    default:
      return ffi::Error::InvalidArgument("uint8, float16, uint16 or float32 wanted");
  }
}

// Calls work(j as a constant) for j of 0 to kCount - 1.
template <int kCount, class F>
__device__ inline void for_each(F work) {
  if constexpr (kCount > 0) {
    for_each<kCount - 1>(work);
    work(std::integral_constant<int, kCount - 1>());
  }
}

// Shared memory that a block may ask for: a third as much on some cards as on others.
inline int shared_bytes() {
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return most;
}

inline ffi::Error launched() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(cudaGetErrorString(error));
}

}  // namespace m2jax
