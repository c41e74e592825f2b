// Sums of rows weighted by h, for one token or a few: down columns of neurons.
#include "byte_columns.h"
#include "taken.h"

namespace m2jax {

// One token: rows in the order they lie in, kSumRows of them a partial sum.
template <class AddRows>
void accumulate_one(ffi::ThreadPool& pool, const float* h, int64_t rows, int64_t width,
                    float* y, AddRows add_rows) {
  const int64_t blocks = divide_up(rows, kSumRows);
  simd::Array<float> parts(blocks * width);
  parallel(pool, blocks, [&](int64_t block) {
    std::vector<int64_t> taking;
    for (int64_t k = block * kSumRows; k < std::min(rows, (block + 1) * kSumRows); ++k)
      if (h[k] != 0) taking.push_back(k);
    add_rows(taking, parts.data() + block * width);
  });
  add_up(parts, width, y);
}

// `count` columns of each half of y for all tokens, rows in order.
// fetch(place, row): where a row's numbers are, once for all columns; place: in a tile.
// widened(fetched, row, column, low, high): two registers of its numbers.
template <class Fetch, class Widened>
void accumulate_columns(const float* h, int64_t tokens, int64_t rows, int64_t count,
                        float* y, int64_t half, Fetch fetch, Widened widened) {
  // In y, tokens of a width of 4096 would share a few lines of the cache.
  simd::Array<float> sums(tokens * 2 * count);
  // Two registers of each row of a tile: widened once for all tokens.
  Floats both[2 * kTileRows];
  decltype(fetch(0, 0)) fetched[kTileRows];
  for (int64_t tile = 0; tile < rows; tile += kTileRows) {
    const int64_t there = std::min(rows - tile, kTileRows);
    for (int64_t k = 0; k < there; ++k) fetched[k] = fetch(k, tile + k);
    for (int64_t i = 0; i < count; i += simd::kLanes) {
      for (int64_t k = 0; k < there; ++k)
        widened(fetched[k], tile + k, i, &both[2 * k], &both[2 * k + 1]);
      by_tokens(tokens, [&](int64_t t, auto together) {
        float* own = sums.data() + 2 * t * count + i;
        Floats low[together], high[together];
        for (int j = 0; j < together; ++j) {
          low[j] = simd::load<Floats>(own + 2 * j * count);
          high[j] = simd::load<Floats>(own + (2 * j + 1) * count);
        }
        const float* weights = h + t * rows + tile;
        for (int64_t k = 0; k < there; ++k) {
          const Floats one = simd::held(both[2 * k]), other = simd::held(both[2 * k + 1]);
          for (int j = 0; j < together; ++j) {
            const Floats weight = simd::splat(weights[j * rows + k]);
            low[j] += weight * one;
            high[j] += weight * other;
          }
        }
        for (int j = 0; j < together; ++j) {
          simd::store(own + 2 * j * count, low[j]);
          simd::store(own + (2 * j + 1) * count, high[j]);
        }
      });
    }
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t side = 0; side < 2; ++side)
      std::copy_n(sums.data() + (2 * t + side) * count, count, y + (2 * t + side) * half);
}

// By the rows that tokens take where these are few; arguments as above, h apart.
template <class... Rest>
void accumulate_some(const Taken& taken, const float* h, int64_t tokens, int64_t rows,
                     int64_t count, Rest... rest) {
  // 32 columns of each half, if there are: as many sums as hide what an addition takes.
  constexpr int kFew = std::max(16 / simd::kLanes, 1), kMore = 32 / simd::kLanes;
  if (!taken.few())
    accumulate_columns(h, tokens, rows, count, rest...);
  else if (count % 32)
    accumulate_taken<kFew>(taken, h, tokens, rows, count, rest...);
  else
    accumulate_taken<kMore>(taken, h, tokens, rows, count, rest...);
}

#if M2JAX_BYTES
// Down columns of the wanted records, as `accumulate_bytes` takes them.
struct DownRows {
  const uint8_t *codes, *residual;
  const uint16_t* scales;
  Picked place, neuron;
  int64_t record, half, kinds, groups, all;
  float step;

  int64_t at(int64_t k) const {
    return (place[std::min(k, all - 1)] + 1) * record - half;
  }
  const uint16_t* scales_of(int64_t k) const {
    return scales + (neuron[std::min(k, all - 1)] * kinds + kinds - 1) * groups;
  }
};
#endif

// residual: plane r4, whose weights are added to those of records in plane q4, or none.
ffi::Error accumulate_nibbles(ffi::ThreadPool pool, Matrix h, Records records,
                              Records residual, Scales scales, Ids slots, Ids ids,
                              ffi::Result<Matrix> y, float step) {
  const int64_t tokens = h.dimensions()[0], rows = h.dimensions()[1];
  const int64_t width = y->dimensions()[1], half = width / 2;
  const int64_t record = records.dimensions()[1], groups = scales.dimensions()[2];
  const int64_t group = width / groups;
  const auto* halves = reinterpret_cast<const uint16_t*>(scales.untyped_data());
  const int64_t kinds = scales.dimensions()[1];
  const uint8_t* more = residual.element_count() ? residual.typed_data() : nullptr;
  const Picked place(slots, records.dimensions()[0]), neuron(ids, scales.dimensions()[0]);
  const auto rows_of = [&](const uint8_t* first) {
    return [=, &place](int64_t k) { return first + (place[k] + 1) * record - half; };
  };
  const auto row_of = rows_of(records.typed_data()), more_of = rows_of(more);
  auto scales_of = [&](int64_t k) {
    return halves + (neuron[k] * kinds + kinds - 1) * groups;
  };
#if M2JAX_BYTES
  if (tokens > 1 && is_striped(group)) {
    const DownRows down{.codes = records.typed_data(),
                        .residual = more,
                        .scales = halves,
                        .place = place,
                        .neuron = neuron,
                        .record = record,
                        .half = half,
                        .kinds = kinds,
                        .groups = groups,
                        .all = rows,
                        .step = step};
    const float* given = h.typed_data();
    more ? accumulate_bytes<true>(pool, given, tokens, down, group, y->typed_data())
         : accumulate_bytes<false>(pool, given, tokens, down, group, y->typed_data());
    return ffi::Error::Success();
  }
#endif
  if (tokens == 1 && !more)
    return for_group(group, [&](auto of) {
      accumulate_one(pool, h.typed_data(), rows, width, y->typed_data(),
                     [&](const std::vector<int64_t>& taking, float* part) {
                       add_nibbles<of>(taking, h.typed_data(), row_of, scales_of, half,
                                       step, part);
                     });
    });
  const Taken taken(pool, h.typed_data(), tokens, rows);
  parallel(pool, half / group, [&](int64_t block) {
    // A weight is scale * (code - zero).
    const float by = more ? 1 : step;
    std::vector<float> low_scale(rows), high_scale(rows);
    for (int64_t k = 0; k < rows; ++k) {
      const uint16_t* own = scales_of(k);
      low_scale[k] = by * half_value(own[block]);
      high_scale[k] = by * half_value(own[half / group + block]);
    }
    // Where they lie, rows share a few lines of the cache.
    simd::Array<uint8_t> near(2 * kTileRows * group);
    const auto fetch = [&](int64_t k, int64_t row) {
      uint8_t* to = near.data() + 2 * k * group;
      const int64_t ahead = std::min(row + kAhead, rows - 1);
      __builtin_prefetch(row_of(ahead) + block * group);
      std::copy_n(row_of(row) + block * group, group, to);
      if (more) {
        __builtin_prefetch(more_of(ahead) + block * group);
        std::copy_n(more_of(row) + block * group, group, to + group);
      }
      return static_cast<const uint8_t*>(to);
    };
    const auto add = [&](auto codes) {
      accumulate_some(
          taken, h.typed_data(), tokens, rows, group, y->typed_data() + block * group, half,
          fetch, [&](const uint8_t* from, int64_t k, int64_t i, Floats* low, Floats* high) {
            codes(from + i, low, high);
            *low *= low_scale[k];
            *high *= high_scale[k];
          });
    };
    if (more)
      add([&](const uint8_t* from, Floats* low, Floats* high) {
        both_codes(from, from + group, low, high);
        *low -= 17 * kZero;
        *high -= 17 * kZero;
      });
    else
      add([](const uint8_t* from, Floats* low, Floats* high) {
        few_codes(from, low, high);
        *low -= kZero;
        *high -= kZero;
      });
  });
  return ffi::Error::Success();
}

ffi::Error accumulate_numbers(ffi::ThreadPool pool, Matrix h, ffi::AnyBuffer records,
                              Ids slots, ffi::Result<Matrix> y) {
  const int64_t tokens = h.dimensions()[0], rows = h.dimensions()[1];
  const int64_t width = y->dimensions()[1], half = width / 2;
  const Picked place(slots, records.dimensions()[0]);
  const int64_t record = records.dimensions()[1];
  return for_numbers(records, [&](const auto* data) {
    auto row_of = [&](int64_t k) {
      return data + (place[k] + 1) * record - width;
    };
    if (tokens == 1) {
      accumulate_one(pool, h.typed_data(), rows, width, y->typed_data(),
                     [&](const std::vector<int64_t>& taking, float* part) {
                       add_numbers(taking, h.typed_data(), row_of, width, part);
                     });
      return;
    }
    const Taken taken(pool, h.typed_data(), tokens, rows);
    // Widths are whole groups of 16 in each half; whole cache lines are read faster.
    const int64_t count = half % 64 ? 16 : 64;
    parallel(pool, half / count, [&](int64_t block) {
      accumulate_some(
          taken, h.typed_data(), tokens, rows, count, y->typed_data() + block * count, half,
          [&](int64_t, int64_t row) { return row_of(row) + block * count; },
          [&](const auto* from, int64_t, int64_t i, Floats* low, Floats* high) {
            *low = widen(from + i);
            *high = widen(from + half + i);
          });
    });
  });
}

}  // namespace m2jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    m2jax_accumulate_nibbles, m2jax::accumulate_nibbles,
    M2JAX_POOL.Arg<m2jax::Matrix>()
        .Arg<m2jax::Records>()
        .Arg<m2jax::Records>()
        .Arg<m2jax::Scales>()
        .Arg<m2jax::Ids>()
        .Arg<m2jax::Ids>()
        .Ret<m2jax::Matrix>()
        .Attr<float>("step"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_accumulate_numbers, m2jax::accumulate_numbers,
                              M2JAX_POOL.Arg<m2jax::Matrix>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<m2jax::Ids>()
                                  .Ret<m2jax::Matrix>());
