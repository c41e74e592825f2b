// Both products of many tokens with rows of numbers, where the CPU has tile registers:
// weights are cut into parts once, some at a time, and meet all tokens.
#include "simd.h"

#if M2JAX_AMX
#include "amx.h"

namespace m2jax {
namespace {

using amx::kInputs;
using amx::kParts;
using amx::kSide;
using amx::kTile;

template <class Number>
struct Numbers {
  static constexpr int kParts = std::is_same_v<Number, Bfloat> ? 1
                                : std::is_same_v<Number, Half> ? 2
                                                               : 3;
  const Number* numbers;
  int64_t record, width;

  Floats weights(int64_t n, int64_t m, int64_t at) const {
    return widen(numbers + n * record + m * width + at);
  }
  Floats some_weights(int64_t n, int64_t m, int64_t at, int64_t count) const {
    if (count >= simd::kLanes) return weights(n, m, at);
    Number padded[simd::kLanes] = {};
    if (count > 0)
      std::memcpy(padded, numbers + n * record + m * width + at, sizeof(Number) * count);
    return widen(padded);
  }
};

// x [tokens][width] as tiles [tokens / 16][steps], a token a row or a column.
template <bool kRows>
simd::Array<uint16_t> tiles_of(ffi::ThreadPool& pool, const Matrix& x) {
  const int64_t tokens = x.dimensions()[0], width = x.dimensions()[1];
  const int64_t tiles = divide_up(tokens, 2 * kSide) * 2;
  const int64_t steps = divide_up(width, kInputs);
  simd::Array<uint16_t> made(tiles * steps * kParts * kTile);
  parallel(pool, tiles, [&, to = made.data()](int64_t tile) {
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t t = 0; t < std::min(kSide, tokens - tile * kSide); ++t) {
        const int64_t at = s * kInputs, there = width - at;
        const float* from = x.typed_data() + (tile * kSide + t) * width + at;
        const amx::Parts<kParts> parts(amx::some(from, there),
                                       amx::some(from + kSide, there - kSide));
        uint16_t* own = to + (tile * steps + s) * kParts * kTile;
        kRows ? parts.to_row(own, t) : parts.to_column(own, t);
      }
  });
  return made;
}

// out[m][t][n]: tokens in columns, weights in rows.
template <class Weights>
void project(ffi::ThreadPool& pool, const Matrix& x, const Weights& weights,
             ffi::Result<Rows>& out) {
  constexpr int64_t kOwn = Weights::kParts * kTile, kOfX = kParts * kTile;
  const int64_t tokens = x.dimensions()[0], width = x.dimensions()[1];
  const int64_t steps = divide_up(width, kInputs);
  const int64_t matrices = out->dimensions()[0], neurons = out->dimensions()[2];
  const int64_t padded = divide_up(tokens, 2 * kSide) * 2 * kSide;
  const int64_t together = amx::kTogether / matrices;
  const auto tiles = tiles_of<false>(pool, x);
  parallel(pool, divide_up(neurons, together), [&](int64_t block) {
    const amx::Tiles at_work;
    uint16_t* rows = simd::kept<uint16_t>(amx::kTogether / kSide * amx::kSteps * kOwn);
    float* sums = simd::kept<float>(amx::kTogether * padded);
    std::memset(sums, 0, 4 * amx::kTogether * padded);
    const int64_t first_neuron = block * together;
    const int64_t count = std::min(together, neurons - first_neuron);
    const int64_t pairs = divide_up(count * matrices, 2 * kSide);
    for (int64_t first = 0; first < steps; first += amx::kSteps) {
      const int64_t some_steps = std::min(amx::kSteps, steps - first);
      for (int64_t row = 0; row < pairs * 2 * kSide; ++row) {
        // Rows behind the last are the last again; nobody reads their sums.
        const int64_t n = first_neuron + std::min(row / matrices, count - 1);
        uint16_t* to = rows + row / kSide * some_steps * kOwn;
        for (int64_t s = 0; s < some_steps; ++s) {
          const int64_t at = (first + s) * kInputs, there = width - at;
          const int64_t m = row % matrices;
          const amx::Parts<Weights::kParts> parts(
              weights.some_weights(n, m, at, there),
              weights.some_weights(n, m, at + 16, there - 16));
          parts.to_row(to + s * kOwn, row % kSide);
        }
      }
      for (int64_t token = 0; token < padded; token += 2 * kSide)
        for (int64_t pair = 0; pair < pairs; ++pair)
          amx::multiply<Weights::kParts, kParts>(
              rows + 2 * pair * some_steps * kOwn, some_steps * kOwn,
              tiles.data() + (token / kSide * steps + first) * kOfX, steps * kOfX,
              some_steps, sums + pair * 2 * kSide * padded + token, padded);
    }
    for (int64_t m = 0; m < matrices; ++m)
      for (int64_t t = 0; t < tokens; ++t)
        amx::gather(sums + m * padded + t, matrices * padded, count,
                    out->typed_data() + (m * tokens + t) * neurons + first_neuron);
  });
}

// y[t][d]: tokens in rows, weights in columns.
template <class Weights>
void accumulate(ffi::ThreadPool& pool, const Matrix& h, const Weights& weights,
                ffi::Result<Matrix>& y) {
  constexpr int64_t kOwn = Weights::kParts * kTile, kOfH = kParts * kTile;
  const int64_t tokens = h.dimensions()[0], neurons = h.dimensions()[1];
  const int64_t width = y->dimensions()[1], steps = divide_up(neurons, kInputs);
  const int64_t padded = divide_up(tokens, 2 * kSide) * 2 * kSide;
  const auto tiles = tiles_of<true>(pool, h);
  parallel(pool, divide_up(width, amx::kTogether), [&](int64_t block) {
    const amx::Tiles at_work;
    uint16_t* columns = simd::kept<uint16_t>(amx::kTogether / kSide * amx::kSteps * kOwn);
    float* sums = simd::kept<float>(amx::kTogether * padded);
    std::memset(sums, 0, 4 * amx::kTogether * padded);
    // Widths are whole pairs of tiles.
    const int64_t column = block * amx::kTogether;
    const int64_t pairs = std::min(amx::kTogether, width - column) / (2 * kSide);
    for (int64_t first = 0; first < steps; first += amx::kSteps) {
      const int64_t some_steps = std::min(amx::kSteps, steps - first);
      for (int64_t s = 0; s < some_steps; ++s)
        for (int64_t input = 0; input < kSide; ++input) {
          const int64_t n = (first + s) * kInputs + input;
          // Inputs behind the last meet zeros.
          const int64_t one = std::min(n, neurons - 1);
          const int64_t two = std::min(n + kSide, neurons - 1);
          for (int64_t tile = 0; tile < 2 * pairs; ++tile) {
            const int64_t at = column + tile * kSide;
            const amx::Parts<Weights::kParts> parts(weights.weights(one, 2, at),
                                                    weights.weights(two, 2, at));
            parts.to_row(columns + (tile * some_steps + s) * kOwn, input);
          }
        }
      for (int64_t token = 0; token < padded; token += 2 * kSide)
        for (int64_t pair = 0; pair < pairs; ++pair)
          amx::multiply<kParts, Weights::kParts>(
              tiles.data() + (token / kSide * steps + first) * kOfH, steps * kOfH,
              columns + 2 * pair * some_steps * kOwn, some_steps * kOwn, some_steps,
              sums + token * amx::kTogether + pair * 2 * kSide, amx::kTogether);
    }
    for (int64_t t = 0; t < tokens; ++t)
      std::memcpy(y->typed_data() + t * width + column, sums + t * amx::kTogether,
                  8 * kSide * pairs);
  });
}

}  // namespace

ffi::Error project_block_numbers(ffi::ThreadPool pool, Matrix x, ffi::AnyBuffer records,
                                 ffi::Result<Rows> out) {
  return for_numbers(records, [&](const auto* data) {
    using Number = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    const int64_t width = x.dimensions()[1];
    project(pool, x, Numbers<Number>{data, records.dimensions()[1], width}, out);
  });
}

ffi::Error accumulate_block_numbers(ffi::ThreadPool pool, Matrix h,
                                    ffi::AnyBuffer records, ffi::Result<Matrix> y) {
  return for_numbers(records, [&](const auto* data) {
    using Number = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    const int64_t width = y->dimensions()[1];
    accumulate(pool, h, Numbers<Number>{data, records.dimensions()[1], width}, y);
  });
}

}  // namespace m2jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    m2jax_project_block_numbers, m2jax::project_block_numbers,
    M2JAX_POOL.Arg<m2jax::Matrix>().Arg<ffi::AnyBuffer>().Ret<m2jax::Rows>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    m2jax_accumulate_block_numbers, m2jax::accumulate_block_numbers,
    M2JAX_POOL.Arg<m2jax::Matrix>().Arg<ffi::AnyBuffer>().Ret<m2jax::Matrix>());

#endif

// Which products of blocks this library has: 2 the four by tile registers, if the kernel
// lets it use them, which it saves only for a process that asks; 1 those of codes by
// words; 0 none.
extern "C" int m2jax_has_blocks() {
#if M2JAX_AMX
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? 2 : 0;
#elif M2JAX_WORDS
  return 1;
#else
  return 0;
#endif
}
