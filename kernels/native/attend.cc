// Attention of a few tokens: only keys that somebody sees are read.
#include "common.h"

namespace m2jax {
namespace {

// Keys whose weights are summed apart: fixes the order of a sum over positions, whoever
// else is in the block and however many threads there are.
constexpr int64_t kSpan = 128;

// e^x to about a last bit; nothing below e^-87, NaN for NaN.
Floats exponential(Floats x) {
  // Adding it rounds to a whole number, which then stands in the last bits.
  const Floats rounder = simd::splat(12582912.0f), least = simd::splat(-87.0f);
  const Ints tiny = (Ints)(x < least);
  x = (Floats)((~tiny & (Ints)x) | (tiny & (Ints)least));
  const Floats shifted = x * 1.44269504f + rounder;
  const Floats whole = shifted - rounder;
  const Floats rest = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
  Floats sum = rest * (1.0f / 720) + 1.0f / 120;
  for (float factor : {1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * rest + factor;
  const Ints power = ((Ints)shifted - (Ints)rounder) << 23;
  return (Floats)(((Ints)sum + power) & ~tiny);
}

Floats some(const float* from, int64_t count) {
  if (count >= simd::kLanes) return simd::load<Floats>(from);
  float padded[simd::kLanes] = {};
  std::memcpy(padded, from, 4 * count);
  return simd::load<Floats>(padded);
}

// A row's largest score, sum of weights and weighted values over one span.
struct Partial {
  float *largest, *total, *mixed;
};

struct Group {
  const float *q, *keys, *values;  // [rows][width], [C][width]
  int64_t width;
};

// Rows [row, row + kRows) over keys [first, end), all of one span; seen[r]: the keys that
// row r sees, from and to.
template <int kRows>
void over_span(const Group& of, int64_t row, int64_t first, int64_t end,
               const int64_t (*seen)[2], const Partial* out) {
  constexpr int kChunk = 4;
  const int64_t width = of.width;
  float weights[kRows][kSpan];
  for (int64_t c = first; c < end; ++c) {
    Floats sum[kRows] = {};
    for (int64_t i = 0; i < width; i += simd::kLanes) {
      const Floats key = some(of.keys + c * width + i, width - i);
      for (int r = 0; r < kRows; ++r)
        sum[r] += key * some(of.q + (row + r) * width + i, width - i);
    }
    for (int r = 0; r < kRows; ++r) weights[r][c % kSpan] = simd::sum_lanes(sum[r]);
  }
  for (int r = 0; r < kRows; ++r) {
    const int64_t from = std::max(first, seen[r][0]), to = std::min(end, seen[r][1]);
    float largest = -INFINITY;
    for (int64_t c = from; c < to; ++c)
      largest = std::max(largest, weights[r][c % kSpan]);
    const int64_t start = first / kSpan * kSpan;
    for (int64_t c = start; c < start + kSpan; ++c)
      if (c < from || c >= to) weights[r][c - start] = -INFINITY;
    Floats total{};
    for (int64_t c = 0; c < kSpan; c += simd::kLanes) {
      Floats weight{};
      if (from < to)
        weight = exponential(simd::load<Floats>(weights[r] + c) - simd::splat(largest));
      total += weight;
      simd::store(weights[r] + c, weight);
    }
    *out[r].largest = largest;
    *out[r].total = simd::sum_lanes(total);
  }
  for (int64_t i = 0; i < width; i += kChunk * simd::kLanes) {
    Floats sum[kRows][kChunk] = {};
    const int64_t there = width - i;
    for (int64_t c = first; c < end; ++c) {
      const float* value = of.values + c * width + i;
      if (there >= kChunk * simd::kLanes) {
        for (int part = 0; part < kChunk; ++part)
          for (int r = 0; r < kRows; ++r)
            sum[r][part] += weights[r][c % kSpan] *
                            simd::load<Floats>(value + part * simd::kLanes);
        continue;
      }
      for (int part = 0; part * simd::kLanes < there; ++part)
        for (int r = 0; r < kRows; ++r)
          sum[r][part] += weights[r][c % kSpan] *
                          some(value + part * simd::kLanes, there - part * simd::kLanes);
    }
    for (int r = 0; r < kRows; ++r)
      std::memcpy(out[r].mixed + i, sum[r],
                  4 * std::min<int64_t>(there, kChunk * simd::kLanes));
  }
}

}  // namespace

// softmax(q k) v, group by group. q, out: [groups][tokens * heads][width], a token's heads
// together. keys, values: [groups][C][width]. positions: of the tokens, consecutive.
ffi::Error attend(ffi::ThreadPool pool, Rows q, Rows keys, Rows values, Ids positions,
                  Ids window, ffi::Result<Rows> out) {
  const int64_t groups = q.dimensions()[0], rows = q.dimensions()[1];
  const int64_t width = q.dimensions()[2], capacity = keys.dimensions()[1];
  const int64_t tokens = positions.dimensions()[0], heads = rows / tokens;
  const auto seen_from = [&](int64_t token) {
    const int64_t at = positions.typed_data()[token];
    return std::max<int64_t>(0, at - window.typed_data()[0] + 1);
  };
  const auto seen_to = [&](int64_t token) {
    return std::min<int64_t>(capacity, int64_t{positions.typed_data()[token]} + 1);
  };
  const int64_t first = seen_from(0), end = seen_to(tokens - 1);
  const int64_t first_span = first / kSpan, spans = divide_up(end, kSpan) - first_span;
  const int64_t of_row = width + 2;
  simd::Array<float> partials(groups * spans * rows * of_row);
  const auto partial = [&](int64_t group, int64_t span, int64_t row) {
    float* at = partials.data() + ((group * spans + span) * rows + row) * of_row;
    return Partial{at, at + 1, at + 2};
  };
  const auto task = [&](int64_t number) {
    const int64_t group = number / spans, span = number % spans;
    const int64_t from = std::max(first, (first_span + span) * kSpan);
    const int64_t to = std::min(end, (first_span + span + 1) * kSpan);
    const int64_t behind = group * capacity * width;
    const Group of{q.typed_data() + group * rows * width, keys.typed_data() + behind,
                   values.typed_data() + behind, width};
    by_tokens(rows, [&](int64_t row, auto together) {
      int64_t seen[together][2];
      Partial made[together];
      for (int r = 0; r < together; ++r) {
        seen[r][0] = seen_from((row + r) / heads);
        seen[r][1] = seen_to((row + r) / heads);
        made[r] = partial(group, span, row + r);
      }
      over_span<together>(of, row, from, to, seen, made);
    });
  };
  const int64_t bytes = 8 * width * std::min(kSpan, end - first) * rows;
  const int64_t each = divide_up(kLeastBytes, bytes), tasks = groups * spans;
  parallel(pool, divide_up(tasks, each), [&](int64_t block) {
    for (int64_t n = block * each; n < std::min(tasks, (block + 1) * each); ++n) task(n);
  });
  for (int64_t row = 0; row < groups * rows; ++row) {
    const int64_t group = row / rows, own = row % rows;
    float largest = -INFINITY, total = 0;
    for (int64_t span = 0; span < spans; ++span)
      largest = std::max(largest, *partial(group, span, own).largest);
    float* to = out->typed_data() + row * width;
    std::memset(to, 0, 4 * width);
    for (int64_t span = 0; span < spans; ++span) {
      const Partial part = partial(group, span, own);
      // A span of which the row sees nothing adds nothing.
      const float share = *part.total == 0 ? 0 : std::exp(*part.largest - largest);
      total += share * *part.total;
      for (int64_t i = 0; i < width; ++i) to[i] += share * part.mixed[i];
    }
    for (int64_t i = 0; i < width; ++i) to[i] /= total;
  }
  return ffi::Error::Success();
}

}  // namespace m2jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_attend, m2jax::attend,
                              M2JAX_POOL.Arg<m2jax::Rows>()
                                  .Arg<m2jax::Rows>()
                                  .Arg<m2jax::Rows>()
                                  .Arg<m2jax::Ids>()
                                  .Arg<m2jax::Ids>()
                                  .Ret<m2jax::Rows>());
