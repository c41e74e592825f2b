// Both products for many tokens, where the CPU has tile registers: weights are unpacked
// once, some at a time, and meet all tokens.
#include "amx.h"

#if M2JAX_AMX

namespace m2jax {
namespace {

using amx::kInputs;
using amx::kParts;
using amx::kSide;
using amx::kTile;

// Which inputs of a row a step takes: of rows of nibbles those of 32 bytes, low ones and
// high ones in turn.
struct Order {
  int64_t width, half;  // half = width: as they lie

  int64_t steps() const { return divide_up(half, kInputs) * (width / half); }
  int64_t first(int64_t step) const {
    return half == width ? step * kInputs : step / 2 * kInputs + step % 2 * half;
  }
  int64_t count(int64_t step) const {
    return std::min(kInputs, half - (half == width ? step : step / 2) * kInputs);
  }
};

// Codes of plane q4 or r4, or of q4 with r4 behind it. A weight has 4 bits, or 8, times
// the scale's 11.
template <bool kBoth>
struct Nibbles {
  static constexpr int kParts = kBoth ? 3 : 2;
  const uint8_t *codes, *residual;
  const uint16_t* scales;
  int64_t record, kinds, groups, group, half;
  float step;

  Order order() const { return {2 * half, half}; }

  // 16 weights of matrix m of record n; `at` is a multiple of 16.
  Floats weights(int64_t n, int64_t m, int64_t at) const {
    const bool high = at >= half;
    const int64_t byte = n * record + m * half + (high ? at - half : at);
    const auto code = [&](const uint8_t* from) {
      const Ints both = simd::from_bytes(from + byte);
      return simd::to_float(high ? both >> 4 : both & 15) - kZero;
    };
    Floats value = step * code(codes);
    if constexpr (kBoth) value += code(residual);
    return value * amx::spread_half(scales[(n * kinds + m) * groups + at / group]);
  }
  Floats some_weights(int64_t n, int64_t m, int64_t at, int64_t count) const {
    return count > 0 ? weights(n, m, at) : Floats{};  // halves are whole groups
  }
};

template <class Number>
struct Numbers {
  static constexpr int kParts = std::is_same_v<Number, Bfloat> ? 1
                                : std::is_same_v<Number, Half> ? 2
                                                               : 3;
  const Number* numbers;
  int64_t record, width;

  Order order() const { return {width, width}; }

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

Floats some(const float* from, int64_t count) {
  const int64_t there = std::clamp<int64_t>(count, 0, simd::kLanes);
  return (Floats)_mm512_maskz_loadu_ps((1u << there) - 1, from);
}

// x [tokens][width] as tiles [tokens / 16][steps], a token a row or a column.
template <bool kRows>
simd::Array<uint16_t> tiles_of(ffi::ThreadPool& pool, const float* x, int64_t tokens,
                               const Order& order) {
  const int64_t tiles = divide_up(tokens, 2 * kSide) * 2, steps = order.steps();
  simd::Array<uint16_t> made(tiles * steps * kParts * kTile);
  parallel(pool, tiles, [&, to = made.data()](int64_t tile) {
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t t = 0; t < std::min(kSide, tokens - tile * kSide); ++t) {
        const float* from = x + (tile * kSide + t) * order.width + order.first(s);
        const int64_t count = order.count(s);
        const amx::Parts<kParts> parts(some(from, count), some(from + 16, count - 16));
        uint16_t* at = to + (tile * steps + s) * kParts * kTile;
        kRows ? parts.to_row(at, t) : parts.to_column(at, t);
      }
  });
  return made;
}

// out[m][t][n]: tokens in columns, weights in rows.
template <class Weights>
void project(ffi::ThreadPool& pool, const Matrix& x, const Weights& weights,
             ffi::Result<Rows>& out) {
  constexpr int64_t kOwn = Weights::kParts * kTile, kOfX = kParts * kTile;
  const Order order = weights.order();
  const int64_t tokens = x.dimensions()[0], steps = order.steps();
  const int64_t matrices = out->dimensions()[0], neurons = out->dimensions()[2];
  const int64_t padded = divide_up(tokens, 2 * kSide) * 2 * kSide;
  const int64_t together = amx::kTogether / matrices;
  const auto tiles = tiles_of<false>(pool, x.typed_data(), tokens, order);
  parallel(pool, divide_up(neurons, together), [&](int64_t block) {
    const amx::Tiles at_work;
    uint16_t* rows = amx::kept<uint16_t>(amx::kTogether / kSide * amx::kSteps * kOwn);
    float* sums = amx::kept<float>(amx::kTogether * padded);
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
          const int64_t at = order.first(first + s), there = order.count(first + s);
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
  const int64_t width = y->dimensions()[1], half = width / 2;
  const int64_t padded = divide_up(tokens, 2 * kSide) * 2 * kSide;
  const Order order{neurons, neurons};
  const int64_t steps = order.steps(), each = amx::kTogether / 2;
  const auto tiles = tiles_of<true>(pool, h.typed_data(), tokens, order);
  parallel(pool, divide_up(half, each), [&](int64_t block) {
    const amx::Tiles at_work;
    uint16_t* columns = amx::kept<uint16_t>(amx::kTogether / kSide * amx::kSteps * kOwn);
    float* sums = amx::kept<float>(amx::kTogether * padded);
    std::memset(sums, 0, 4 * amx::kTogether * padded);
    // The same columns of both halves of a row: they share their bytes.
    const int64_t count = std::min(each, half - block * each);
    const auto column = [&](int64_t tile) {
      const int64_t in_half = block * each + tile / 2 * kSide;
      return std::min(in_half, half - kSide) + tile % 2 * half;
    };
    const int64_t pairs = divide_up(count, kSide);
    for (int64_t first = 0; first < steps; first += amx::kSteps) {
      const int64_t some_steps = std::min(amx::kSteps, steps - first);
      for (int64_t s = 0; s < some_steps; ++s)
        for (int64_t input = 0; input < kInputs; input += 2) {
          const int64_t n = (first + s) * kInputs + input;
          // Inputs behind the last meet zeros.
          const int64_t one = std::min(n, neurons - 1), two = std::min(n + 1, neurons - 1);
          for (int64_t tile = 0; tile < 2 * pairs; ++tile) {
            const int64_t at = column(tile);
            const amx::Parts<Weights::kParts> parts(weights.weights(one, 2, at),
                                                    weights.weights(two, 2, at));
            parts.to_pairs(columns + (tile * some_steps + s) * kOwn, input / 2);
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
      for (int64_t tile = 0; tile < 2 * pairs; ++tile)
        std::memcpy(y->typed_data() + t * width + column(tile),
                    sums + t * amx::kTogether + tile * kSide, 4 * kSide);
  });
}

// Calls work(weights) with those of one plane or of two.
template <class F>
void for_nibbles(const Records& codes, const Records& residual, const Scales& scales,
                 int64_t width, float step, F work) {
  const auto made = [&](auto both) {
    const int64_t groups = scales.dimensions()[2];
    work(Nibbles<both>{codes.typed_data(), residual.typed_data(),
                       reinterpret_cast<const uint16_t*>(scales.untyped_data()),
                       codes.dimensions()[1], scales.dimensions()[1], groups,
                       width / groups, width / 2, step});
  };
  residual.element_count() ? made(std::true_type()) : made(std::false_type());
}

}  // namespace

ffi::Error project_block(ffi::ThreadPool pool, Matrix x, Records codes, Records residual,
                         Scales scales, ffi::Result<Rows> out, float step) {
  for_nibbles(codes, residual, scales, x.dimensions()[1], step,
              [&](const auto& weights) { project(pool, x, weights, out); });
  return ffi::Error::Success();
}

ffi::Error project_block_numbers(ffi::ThreadPool pool, Matrix x, ffi::AnyBuffer records,
                                 ffi::Result<Rows> out) {
  return for_numbers(records, [&](const auto* data) {
    using Number = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    const int64_t width = x.dimensions()[1];
    project(pool, x, Numbers<Number>{data, records.dimensions()[1], width}, out);
  });
}

ffi::Error accumulate_block(ffi::ThreadPool pool, Matrix h, Records codes,
                            Records residual, Scales scales, ffi::Result<Matrix> y,
                            float step) {
  for_nibbles(codes, residual, scales, y->dimensions()[1], step,
              [&](const auto& weights) { accumulate(pool, h, weights, y); });
  return ffi::Error::Success();
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_project_block, m2jax::project_block,
                              M2JAX_POOL.Arg<m2jax::Matrix>()
                                  .Arg<m2jax::Records>()
                                  .Arg<m2jax::Records>()
                                  .Arg<m2jax::Scales>()
                                  .Ret<m2jax::Rows>()
                                  .Attr<float>("step"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    m2jax_project_block_numbers, m2jax::project_block_numbers,
    M2JAX_POOL.Arg<m2jax::Matrix>().Arg<ffi::AnyBuffer>().Ret<m2jax::Rows>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_accumulate_block, m2jax::accumulate_block,
                              M2JAX_POOL.Arg<m2jax::Matrix>()
                                  .Arg<m2jax::Records>()
                                  .Arg<m2jax::Records>()
                                  .Arg<m2jax::Scales>()
                                  .Ret<m2jax::Matrix>()
                                  .Attr<float>("step"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    m2jax_accumulate_block_numbers, m2jax::accumulate_block_numbers,
    M2JAX_POOL.Arg<m2jax::Matrix>().Arg<ffi::AnyBuffer>().Ret<m2jax::Matrix>());

#endif

// Whether this library has the products above and the kernel lets it use them: it saves
// tile registers only for a process that asks.
extern "C" bool m2jax_has_blocks() {
#if M2JAX_AMX
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
