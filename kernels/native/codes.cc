// Both products of many tokens with rows of codes, where the CPU has tile registers.
//
// A code less its zero is a bfloat16 by itself, so a group of codes is one part. Its scale
// is the sum's: of gate and up that of a row's group; of down the neuron's, and then it
// goes to the token's number first.
#include "amx.h"

#if M2JAX_AMX

namespace m2jax {
namespace {

using amx::kInputs;
using amx::kParts;
using amx::kSide;
using amx::kTile;

// Sums of four tiles of rows and two of tokens, which lie together: rows that begin a
// power of two apart would share few places of a cache.
constexpr int64_t kSums = 8 * kSide * kSide;
// Most units whose columns are unpacked together.
constexpr int64_t kUnitsTogether = 4;

// Rows of plane q4 or r4, or of q4 with r4 behind it. A unit is `group` bytes, that is a
// group of low nibbles and one of high ones.
template <bool kBoth>
struct Codes {
  const uint8_t *codes, *residual;
  const uint16_t* scales;
  int64_t record, kinds, groups, group, half;
  float step;

  int64_t units() const { return half / group; }
  // Tiles of inputs of a group; one of 16 fills half a tile.
  int64_t steps() const { return divide_up(group, kInputs); }
  int64_t inputs() const { return std::min(group, kInputs); }

  const uint16_t* scales_of(int64_t n, int64_t m) const {
    return scales + (n * kinds + m) * groups;
  }

  // Codes in 16-bit lanes as bfloat16, low nibbles and high ones.
  static void widen(__m512i q, __m512i r, __m512i* low, __m512i* high) {
    const __m512i nibble = _mm512_set1_epi16(15);
    if constexpr (kBoth) {
      *low = number(_mm512_or_si512(
          _mm512_slli_epi16(_mm512_and_si512(q, nibble), 4), _mm512_and_si512(r, nibble)));
      *high = number(
          _mm512_or_si512(_mm512_andnot_si512(nibble, q), _mm512_srli_epi16(r, 4)));
    } else {
      // -8 to 7.
      const __m512i values = _mm512_broadcast_i64x4(_mm256_setr_epi16(
          int16_t(0xc100), int16_t(0xc0e0), int16_t(0xc0c0), int16_t(0xc0a0),
          int16_t(0xc080), int16_t(0xc040), int16_t(0xc000), int16_t(0xbf80), 0, 0x3f80,
          0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
      *low = _mm512_permutexvar_epi16(_mm512_and_si512(q, nibble), values);
      *high = _mm512_permutexvar_epi16(_mm512_srli_epi16(q, 4), values);
    }
  }
  static __m512i number(__m512i code) {
    code = _mm512_sub_epi16(code, _mm512_set1_epi16(136));
    const auto floats = [](__m256i some) {
      return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(some));
    };
    return (__m512i)_mm512_cvtne2ps_pbh(floats(_mm512_extracti64x4_epi64(code, 1)),
                                        floats(_mm512_castsi512_si256(code)));
  }

  // 16 codes at `one` and 16 at `two` side by side, low nibbles and high ones.
  void pairs(int64_t one, int64_t two, uint16_t* to, int64_t high_next) const {
    const auto words = [&](const uint8_t* from) {
      return _mm512_or_si512(
          (__m512i)simd::from_bytes(from + one),
          _mm512_slli_epi32((__m512i)simd::from_bytes(from + two), 16));
    };
    __m512i low, high;
    widen(words(codes), kBoth ? words(residual) : __m512i{}, &low, &high);
    _mm512_store_si512(to, low);
    _mm512_store_si512(to + high_next, high);
  }
  // A unit's codes of one row, as a row of tiles [low, high][steps]. The second half of
  // a group of 16 meets zeros.
  void row(int64_t at, uint16_t* to) const {
    const int64_t steps = this->steps(), second = inputs() - kSide;
    for (int64_t s = 0; s < steps; ++s, at += kInputs, to += kTile)
      pairs(at, at + second, to, steps * kTile);
  }
  void prefetch(int64_t at, int64_t bytes) const {
    for (int64_t i = 0; i < bytes; i += simd::kBytes) {
      __builtin_prefetch(codes + at + i);
      if constexpr (kBoth) __builtin_prefetch(residual + at + i);
    }
  }
};

// x [tokens][width] as tiles of columns [tokens / 16][units][low, high][steps][parts].
template <bool kBoth>
const uint16_t* columns_of(ffi::ThreadPool& pool, const Matrix& x,
                           const Codes<kBoth>& weights) {
  const int64_t tokens = x.dimensions()[0], tiles = divide_up(tokens, kSide);
  const int64_t units = weights.units(), steps = weights.steps();
  const __mmask16 behind = weights.inputs() == kInputs ? 0xffff : 0;
  const int64_t of_tile = units * 2 * steps * kParts * kTile;
  uint16_t* made = amx::kept<uint16_t, 1>(tiles * of_tile);
  parallel(pool, tiles, [&](int64_t tile) {
    uint16_t* to = made + tile * of_tile;
    for (int64_t unit = 0; unit < units; ++unit)
      for (int64_t at : {unit * weights.group, unit * weights.group + weights.half})
        for (int64_t s = 0; s < steps; ++s, to += kParts * kTile)
          for (int64_t t = 0; t < std::min(kSide, tokens - tile * kSide); ++t) {
            const float* from = x.typed_data() + (tile * kSide + t) * 2 * weights.half;
            from += at + s * kInputs;
            amx::Parts<kParts>((Floats)_mm512_loadu_ps(from),
                               (Floats)_mm512_maskz_loadu_ps(behind, from + kSide))
                .to_column(to, t);
          }
  });
  return made;
}

// sums[16 kRowTiles][16 kColumnTiles] += rows times columns, group by group, times its
// scale.
//
// rows: tiles of kRowTiles, `row_next` apart. columns: tiles of kColumnTiles, in parts,
// `column_next` apart. scales: [groups][amx::kTogether], of the rows.
template <int kRowTiles, int kColumnTiles>
void multiply(const uint16_t* rows, int64_t row_next, const uint16_t* columns,
              int64_t column_next, int64_t groups, int64_t steps, const float* scales,
              float* sums) {
  static_assert(kRowTiles * kColumnTiles == 4 && kColumnTiles <= 2);
  alignas(64) float products[2][4][kSide * kSide];
  for (int64_t g = 0; g < groups; ++g, scales += amx::kTogether) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < steps; ++s, rows += kTile, columns += kParts * kTile) {
      if constexpr (kColumnTiles == 2) {
        _tile_loadd(4, rows, 64);
        _tile_loadd(5, rows + row_next, 64);
      }
      // Small ones first.
      for (int p = kParts - 1; p >= 0; --p) {
        _tile_loadd(6, columns + p * kTile, 64);
        if constexpr (kColumnTiles == 2) {
          _tile_loadd(7, columns + column_next + p * kTile, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        } else {
          _tile_loadd(4, rows, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(5, rows + row_next, 64);
          _tile_dpbf16ps(1, 5, 6);
          _tile_loadd(4, rows + 2 * row_next, 64);
          _tile_dpbf16ps(2, 4, 6);
          _tile_loadd(5, rows + 3 * row_next, 64);
          _tile_dpbf16ps(3, 5, 6);
        }
      }
    }
    auto& product = products[g % 2];
    _tile_stored(0, product[0], 64);
    _tile_stored(1, product[1], 64);
    _tile_stored(2, product[2], 64);
    _tile_stored(3, product[3], 64);
    for (int tile = 0; tile < kRowTiles; ++tile)
      for (int64_t r = 0; r < kSide; ++r) {
        const Floats scale = simd::splat(scales[tile * kSide + r]);
        float* to = sums + (tile * kSide + r) * kColumnTiles * kSide;
        for (int c = 0; c < kColumnTiles; ++c) {
          const float* own = product[tile * kColumnTiles + c] + r * kSide;
          simd::store(to + c * kSide, simd::load<Floats>(to + c * kSide) +
                                          scale * simd::load<Floats>(own));
        }
      }
  }
}

// Some units of the rows of `count` neurons, matrix by matrix, as tiles
// [rows / 16][units][low, high][steps], and their scales.
template <bool kBoth>
void unpack(const Codes<kBoth> weights, int64_t first_neuron, int64_t count,
            int64_t matrices, int64_t rows, int64_t first, int64_t some, uint16_t* tiles,
            float* scales) {
  const int64_t of_unit = 2 * weights.steps() * kTile, units = weights.units();
  for (int64_t row = 0; row < rows; ++row) {
    // Rows behind the last are the last again; nobody reads their sums.
    const int64_t in_block = std::min(row / matrices, count - 1), m = row % matrices;
    const int64_t n = first_neuron + in_block;
    const int64_t ahead = std::min(in_block + kAhead / matrices, count - 1) - in_block;
    const int64_t byte = n * weights.record + m * weights.half + first * weights.group;
    weights.prefetch(byte + ahead * weights.record, some * weights.group);
    uint16_t* to = tiles + row / kSide * some * of_unit + row % kSide * kInputs;
    const uint16_t* own = weights.scales_of(n, m) + first;
    for (int64_t unit = 0; unit < some; ++unit) {
      float* of = scales + 2 * unit * amx::kTogether + row;
      of[0] = weights.step * half_value(own[unit]);
      of[amx::kTogether] = weights.step * half_value(own[unit + units]);
      weights.row(byte + unit * weights.group, to + unit * of_unit);
    }
  }
}

// out[m][t][n]: tokens in columns, weights in rows.
template <bool kBoth>
void project(ffi::ThreadPool& pool, const Matrix& x, const Codes<kBoth>& weights,
             ffi::Result<Rows>& out) {
  const int64_t tokens = x.dimensions()[0], token_tiles = divide_up(tokens, kSide);
  const int64_t pairs = divide_up(token_tiles, 2);
  const int64_t matrices = out->dimensions()[0], neurons = out->dimensions()[2];
  const int64_t units = weights.units(), steps = weights.steps();
  const int64_t of_unit = 2 * steps * kTile;
  const int64_t together = amx::kTogether / matrices;
  const int64_t most = std::max<int64_t>(1, amx::kSteps / (2 * steps));
  const auto columns = columns_of(pool, x, weights);
  parallel(pool, divide_up(neurons, together), [&, weights](int64_t block) {
    const amx::Tiles at_work;
    uint16_t* rows = amx::kept<uint16_t>(amx::kTogether / kSide * most * of_unit);
    const int64_t all_sums = amx::kTogether / (4 * kSide) * pairs * kSums;
    float* sums = amx::kept<float>(all_sums + 2 * most * amx::kTogether);
    float* scales = sums + all_sums;
    std::memset(sums, 0, 4 * all_sums);
    const int64_t first_neuron = block * together;
    const int64_t count = std::min(together, neurons - first_neuron);
    const int64_t quads = divide_up(count * matrices, 4 * kSide);
    for (int64_t first = 0; first < units; first += most) {
      const int64_t some = std::min(most, units - first);
      const int64_t next = some * of_unit;
      unpack(weights, first_neuron, count, matrices, quads * 4 * kSide, first, some, rows,
             scales);
      const int64_t of_tile = units * of_unit * kParts;
      const uint16_t* from = columns + first * of_unit * kParts;
      // A unit of two tiles of tokens stays in the first-level cache for all rows.
      for (int64_t tile = 0; tile < token_tiles; tile += 2)
        for (int64_t unit = 0; unit < some; ++unit)
          for (int64_t quad = 0; quad < quads; ++quad) {
            const uint16_t* own = rows + 4 * quad * next + unit * of_unit;
            const uint16_t* meets = from + tile * of_tile + unit * of_unit * kParts;
            const float* by = scales + 2 * unit * amx::kTogether + 4 * quad * kSide;
            float* to = sums + (quad * pairs + tile / 2) * kSums;
            if (tile + 1 == token_tiles) {
              multiply<4, 1>(own, next, meets, of_tile, 2, steps, by, to);
              continue;
            }
            for (int pair = 0; pair < 2; ++pair)
              multiply<2, 2>(own + 2 * pair * next, next, meets, of_tile, 2, steps,
                             by + 2 * pair * kSide, to + pair * kSums / 2);
          }
    }
    for (int64_t quad = 0; quad < quads; ++quad)
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t across = std::min(2 * kSide, (token_tiles - t / (2 * kSide) * 2) * kSide);
        const float* from = sums + (quad * pairs + t / (2 * kSide)) * kSums + t % (2 * kSide);
        const int64_t n = quad * 4 * kSide / matrices;
        const int64_t some = std::min(4 * kSide / matrices, count - n);
        for (int64_t m = 0; m < matrices; ++m)
          amx::gather(from + m * across, matrices * across, some,
                      out->typed_data() + (m * tokens + t) * neurons + first_neuron + n);
      }
  });
}

// A task of `accumulate`: some units of all neurons.
struct Columns {
  int64_t first, count;   // units
  int64_t of_group;       // tiles of a group; one of 16 has another that nobody reads
  int64_t steps, most;    // of inputs: all, and unpacked at a time

  int64_t of_unit() const { return 2 * of_group; }
};

// Steps [first, first + some) of the units' columns as tiles [units][low, high][of_group]
// [steps].
template <bool kBoth>
void unpack(const Codes<kBoth> weights, const Columns task, int64_t neurons,
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
void accumulate(ffi::ThreadPool& pool, const Matrix& h, const Codes<kBoth>& weights,
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
    uint16_t* columns = amx::kept<uint16_t>(
        (task.count * task.of_unit() + 2 * kParts) * task.most * kTile);
    uint16_t* rows = columns + task.count * task.of_unit() * task.most * kTile;
    float* sums = amx::kept<float>(task.count * (padded * stride + 2 * inputs));
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

}  // namespace

ffi::Error project_block(ffi::ThreadPool pool, Matrix x, Records codes, Records residual,
                         Scales scales, ffi::Result<Rows> out, float step) {
  for_codes(codes, residual, scales, x.dimensions()[1], step,
            [&](const auto& weights) { project(pool, x, weights, out); });
  return ffi::Error::Success();
}

ffi::Error accumulate_block(ffi::ThreadPool pool, Matrix h, Records codes,
                            Records residual, Scales scales, ffi::Result<Matrix> y,
                            float step) {
  for_codes(codes, residual, scales, y->dimensions()[1], step,
            [&](const auto& weights) { accumulate(pool, h, weights, y); });
  return ffi::Error::Success();
}

}  // namespace m2jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_project_block, m2jax::project_block,
                              M2JAX_POOL.Arg<m2jax::Matrix>()
                                  .Arg<m2jax::Records>()
                                  .Arg<m2jax::Records>()
                                  .Arg<m2jax::Scales>()
                                  .Ret<m2jax::Rows>()
                                  .Attr<float>("step"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_accumulate_block, m2jax::accumulate_block,
                              M2JAX_POOL.Arg<m2jax::Matrix>()
                                  .Arg<m2jax::Records>()
                                  .Arg<m2jax::Records>()
                                  .Arg<m2jax::Scales>()
                                  .Ret<m2jax::Matrix>()
                                  .Attr<float>("step"));

#endif
