// Many tokens times rows of codes: gate and up, and matrices of few bits.
#include "simd.h"

#if M2JAX_AMX
#include "code_tiles.h"

namespace m2jax {
namespace {

// Sums of four tiles of rows and two of tokens, which lie together: rows that begin a
// power of two apart would share few places of a cache.
constexpr int64_t kSums = 8 * kSide * kSide;

// x [tokens][width] as tiles of columns [tokens / 16][units][low, high][steps][parts].
template <bool kBoth>
const uint16_t* columns_of(ffi::ThreadPool& pool, const Matrix& x,
                           const CodeTiles<kBoth>& weights) {
  const int64_t tokens = x.dimensions()[0], tiles = divide_up(tokens, kSide);
  const int64_t units = weights.units(), steps = weights.steps();
  const __mmask16 behind = weights.inputs() == kInputs ? 0xffff : 0;
  const int64_t of_tile = units * 2 * steps * kParts * kTile;
  uint16_t* made = simd::kept<uint16_t, 1>(tiles * of_tile);
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
void unpack(const CodeTiles<kBoth> weights, int64_t first_neuron, int64_t count,
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
void project(ffi::ThreadPool& pool, const Matrix& x, const CodeTiles<kBoth>& weights,
             ffi::Result<Rows>& out) {
  const int64_t tokens = x.dimensions()[0], token_tiles = divide_up(tokens, kSide);
  const int64_t pairs = divide_up(token_tiles, 2);
  const int64_t matrices = out->dimensions()[0], neurons = out->dimensions()[2];
  const int64_t units = weights.units(), steps = weights.steps();
  const int64_t of_unit = 2 * steps * kTile;
  const int64_t together = amx::kTogether / matrices;
  const int64_t most = std::max<int64_t>(1, amx::kSteps / (2 * steps));
  const uint16_t* columns = columns_of(pool, x, weights);
  parallel(pool, divide_up(neurons, together), [&, weights](int64_t block) {
    const amx::Tiles at_work;
    uint16_t* rows = simd::kept<uint16_t>(amx::kTogether / kSide * most * of_unit);
    const int64_t all_sums = amx::kTogether / (4 * kSide) * pairs * kSums;
    float* sums = simd::kept<float>(all_sums + 2 * most * amx::kTogether);
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
        const int64_t pair = t / (2 * kSide);
        const int64_t across = std::min<int64_t>(2, token_tiles - 2 * pair) * kSide;
        const float* from = sums + (quad * pairs + pair) * kSums + t % (2 * kSide);
        const int64_t n = quad * 4 * kSide / matrices;
        const int64_t some = std::min(4 * kSide / matrices, count - n);
        for (int64_t m = 0; m < matrices; ++m)
          amx::gather(from + m * across, matrices * across, some,
                      out->typed_data() + (m * tokens + t) * neurons + first_neuron + n);
      }
  });
}

}  // namespace

ffi::Error project_block(ffi::ThreadPool pool, Matrix x, Records codes, Records residual,
                         Scales scales, ffi::Result<Rows> out, float step) {
  for_codes(codes, residual, scales, x.dimensions()[1], step,
            [&](auto weights) { project(pool, x, as_tiles(weights), out); });
  return ffi::Error::Success();
}

}  // namespace m2jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_project_block, m2jax::project_block,
                              M2JAX_CODES(Rows));

#endif
