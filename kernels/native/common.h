// What the products share: arrays as XLA hands them over, and how work is cut.
//
// What is computed does not hang on the number of threads, nor on where records lie: a
// sum is always made in the same order.
#pragma once

#include <algorithm>
#include <type_traits>

#include "nibbles.h"
#include "numbers.h"
#include "parallel.h"
#include "simd.h"

namespace ffi = xla::ffi;

namespace m2jax {

using Matrix = ffi::Buffer<ffi::F32, 2>;
using Records = ffi::Buffer<ffi::U8, 2>;
using Scales = ffi::Buffer<ffi::F16, 3>;
using Ids = ffi::Buffer<ffi::S32, 1>;
using Rows = ffi::Buffer<ffi::F32, 3>;
using Flags = ffi::Buffer<ffi::PRED, 2>;

// Tokens that share the unpacking of a row.
constexpr int kTogether = 4;
// A task's bytes: worth waking a thread for, and few enough that all end together.
constexpr int64_t kLeastBytes = 16 << 10, kMostBytes = 256 << 10, kShares = 4;
// Rows between the one that is read and the one whose bytes are asked for.
constexpr int64_t kAhead = 8;
// Rows whose sum is made apart: fixes the order of a sum over neurons.
constexpr int64_t kSumRows = 256;
// Rows that stay in the first-level cache while their columns are taken.
constexpr int64_t kTileRows = 64;

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Which of `rows` rows stands k-th: those of ids, kept inside, or as they lie.
struct Picked {
  const int32_t* ids;
  int64_t rows;

  Picked(const Ids& given, int64_t rows)
      : ids(given.element_count() ? given.typed_data() : nullptr), rows(rows) {}

  int64_t operator[](int64_t k) const {
    return ids ? std::clamp<int64_t>(ids[k], 0, rows - 1) : k;
  }
};

template <class F>
ffi::Error for_group(int64_t group, F work) {
  switch (group) {
    case 16: work(std::integral_constant<int, 16>()); break;
    case 32: work(std::integral_constant<int, 32>()); break;
    case 64: work(std::integral_constant<int, 64>()); break;
    case 128: work(std::integral_constant<int, 128>()); break;
    default: return ffi::Error::InvalidArgument("groups of 16, 32, 64 or 128 wanted");
  }
  return ffi::Error::Success();
}

// Calls work(first, tokens as a constant) for all tokens, kTogether at a time.
template <class F>
void by_tokens(int64_t tokens, F work) {
  int64_t t = 0;
  for (; t + kTogether <= tokens; t += kTogether)
    work(t, std::integral_constant<int, kTogether>());
  for (; t + 2 <= tokens; t += 2) work(t, std::integral_constant<int, 2>());
  for (; t < tokens; ++t) work(t, std::integral_constant<int, 1>());
}

// Rows a task: long stretches are read faster than short ones, and yet every thread
// should have some.
inline int64_t task_rows(ffi::ThreadPool& pool, int64_t rows, int64_t row_bytes,
                         int64_t tokens) {
  const int64_t shares = kShares * std::max<int64_t>(1, pool.num_threads());
  const int64_t least = divide_up(kLeastBytes, row_bytes * tokens);
  const int64_t most = std::max<int64_t>(least, kMostBytes / row_bytes);
  return std::clamp(divide_up(rows, shares), least, most);
}

// Calls work(pointer) with the numbers' type.
template <class Buffer, class F>
ffi::Error for_numbers(const Buffer& records, F work) {
  const void* data = records.untyped_data();
  switch (records.element_type()) {
    case ffi::F32: work(static_cast<const float*>(data)); break;
    case ffi::F16: work(static_cast<const Half*>(data)); break;
    case ffi::U16: work(static_cast<const Bfloat*>(data)); break;
    default: return ffi::Error::InvalidArgument("float32, float16 or uint16 wanted");
  }
  return ffi::Error::Success();
}

// Adds partial sums [blocks][width] in order.
inline void add_up(const simd::Array<float>& parts, int64_t width, float* y) {
  std::memcpy(y, parts.data(), 4 * width);
  for (int64_t part = width; part < int64_t(parts.size()); part += width)
    for (int64_t i = 0; i < width; ++i) y[i] += parts[part + i];
}

}  // namespace m2jax

#define M2JAX_POOL ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
