// Sums of rows of codes weighted by h, for many tokens: down columns of neurons.
#include "simd.h"

#if M2JAX_AMX
#include "code_tiles.h"

namespace m2jax {
namespace {

// Most units whose columns are unpacked together.
constexpr int64_t kUnitsTogether = 4;

// A task of `accumulate`: some units of all neurons.
struct Columns {
  int64_t first, count;  // units
  int64_t of_group;      // tiles of a group; one of 16 has another that nobody reads
  int64_t steps, most;   // of inputs: all, and unpacked at a time

  int64_t of_unit() const { return 2 * of_group; }
};

// Steps [first, first + some) of the units' columns as tiles [units][low, high][of_group]
// [steps].
template <bool kBoth>
void unpack(const CodeTiles<kBoth> weights, const Columns task, int64_t neurons,
            int64_t first, int64_t some, uint16_t* tiles) {
  const int64_t group = weights.group, high_next = task.of_group * some * kTile;
  const int64_t base = (weights.kinds - 1) * weights.half + task.first * group;
  for (int64_t s = 0; s < some; ++s)
    for (int64_t input = 0; input < kSide; ++input) {
      // Inputs behind the last meet scales of zero.
      const int64_t n = (first + s) * kInputs + input, last = neurons - 1;
      const int64_t one = std::min(n, last) * weights.record + base;
      const int64_t two = std::min(n + kSide, last) * weights.record + base;
      weights.prefetch(std::min(n + kInputs, last) * weights.record + base,
                       task.count * group);
      weights.prefetch(std::min(n + kInputs + kSide, last) * weights.record + base,
                       task.count * group);
      uint16_t* to = tiles + s * kTile + input * kInputs;
      for (int64_t unit = 0; unit < task.count; ++unit)
        for (int64_t tile = 0; tile < group / kSide; ++tile) {
          const int64_t byte = unit * group + tile * kSide;
          weights.pairs(one + byte, two + byte,
                        to + (unit * task.of_unit() + tile) * some * kTile, high_next);
        }
    }
}

// Tokens' numbers [tokens][neurons] times the neurons' scales, as tiles of rows
// [2][steps][parts].
inline void scaled_rows(const float* h, int64_t tokens, int64_t neurons, int64_t there,
                        int64_t steps, const float* scales, uint16_t* tiles) {
  for (int64_t t = 0; t < std::min(2 * kSide, tokens); ++t) {
    const float* from = h + t * neurons;
    uint16_t* to = tiles + t / kSide * steps * kParts * kTile;
    for (int64_t s = 0; s < steps; ++s, to += kParts * kTile) {
      const int64_t at = s * kInputs;
      amx::Parts<kParts>(
          amx::some(from + at, there - at) * simd::load<Floats>(scales + at),
          amx::some(from + at + kSide, there - at - kSide) *
              simd::load<Floats>(scales + at + kSide))
          .to_row(to, t % kSide);
    }
  }
}

// y[t][d]: tokens in rows, weights in columns.
template <bool kBoth>
void accumulate(ffi::ThreadPool& pool, const Matrix& h, const CodeTiles<kBoth>& weights,
                ffi::Result<Matrix>& y) {
  const int64_t tokens = h.dimensions()[0], neurons = h.dimensions()[1];
  const int64_t padded = divide_up(tokens, 2 * kSide) * 2 * kSide;
  const int64_t group = weights.group, units = weights.units(), half = weights.half;
  // Neighbours share a row's pages.
  const int64_t shares = kShares * std::max<int64_t>(1, pool.num_threads());
  const int64_t together = std::clamp<int64_t>(units / shares, 1, kUnitsTogether);
  parallel(pool, divide_up(units, together), [&, weights](int64_t block) {
    const amx::Tiles at_work;
    const Columns task{block * together, std::min(together, units - block * together),
                       std::max<int64_t>(2, group / kSide), divide_up(neurons, kInputs),
                       amx::kSteps / 4};
    const int64_t stride = task.of_unit() * kSide, inputs = task.steps * kInputs;
    uint16_t* columns = simd::kept<uint16_t>(
        (task.count * task.of_unit() + 2 * kParts) * task.most * kTile);
    uint16_t* rows = columns + task.count * task.of_unit() * task.most * kTile;
    float* sums = simd::kept<float>(task.count * (padded * stride + 2 * inputs));
    float* scales = sums + task.count * padded * stride;
    std::memset(sums, 0, 4 * task.count * (padded * stride + 2 * inputs));
    for (int64_t n = 0; n < neurons; ++n) {
      const uint16_t* own = weights.scales_of(n, weights.kinds - 1) + task.first;
      for (int64_t unit = 0; unit < task.count; ++unit) {
        scales[2 * unit * inputs + n] = weights.step * half_value(own[unit]);
        scales[(2 * unit + 1) * inputs + n] =
            weights.step * half_value(own[unit + units]);
      }
    }
    for (int64_t first = 0; first < task.steps; first += task.most) {
      const int64_t some = std::min(task.most, task.steps - first);
      unpack(weights, task, neurons, first, some, columns);
      for (int64_t token = 0; token < padded; token += 2 * kSide)
        for (int64_t side = 0; side < 2 * task.count; ++side) {
          scaled_rows(h.typed_data() + token * neurons + first * kInputs, tokens - token,
                      neurons, neurons - first * kInputs, some,
                      scales + side * inputs + first * kInputs, rows);
          for (int64_t tile = 0; tile < task.of_group; tile += 2)
            amx::multiply<kParts, 1>(
                rows, some * kParts * kTile,
                columns + (side * task.of_group + tile) * some * kTile, some * kTile, some,
                sums + (side / 2 * padded + token) * stride +
                    (side % 2 * task.of_group + tile) * kSide,
                stride);
        }
    }
    for (int64_t unit = 0; unit < task.count; ++unit)
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t side = 0; side < 2; ++side)
          std::memcpy(
              y->typed_data() + (2 * t + side) * half + (task.first + unit) * group,
              sums + (unit * padded + t) * stride + side * task.of_group * kSide,
              4 * group);
  });
}

}  // namespace

ffi::Error accumulate_block(ffi::ThreadPool pool, Matrix h, Records codes,
                            Records residual, Scales scales, ffi::Result<Matrix> y,
                            float step) {
  for_codes(codes, residual, scales, y->dimensions()[1], step,
            [&](auto weights) { accumulate(pool, h, as_tiles(weights), y); });
  return ffi::Error::Success();
}

}  // namespace m2jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_accumulate_block, m2jax::accumulate_block,
                              M2JAX_CODES(Matrix));

#endif
