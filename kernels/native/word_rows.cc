// Many tokens times rows of codes, as words: gate and up, and matrices of few bits.
#include "simd.h"

#if M2JAX_WORDS
#include "words.h"

namespace m2jax {
namespace {

// Rows whose codes are widened together, and inputs of them: with their sums they stay in
// a second-level cache.
constexpr int64_t kRows = 64, kInputs = 512;
// Sums of two panels and a tile of tokens.
constexpr int64_t kPairSums = 2 * kWordTokens * kPanel;

// x [tokens][width] by groups, those of low nibbles and of high ones in turn: what is
// multiplied together lies together.
struct RoundedTokens {
  int64_t tiles, of_tile;
  simd::Array<int16_t> words;  // [tiles][groups][kWordTokens][group]
  simd::Array<float> steps;    // [tiles][groups][kWordTokens]

  RoundedTokens(ffi::ThreadPool& pool, const Matrix& x, int64_t group, int64_t units)
      : tiles(divide_up(x.dimensions()[0], kWordTokens)),
        of_tile(2 * units * kWordTokens),
        words(tiles * of_tile * group),
        steps(tiles * of_tile) {
    const int64_t width = x.dimensions()[1], tokens = x.dimensions()[0];
    parallel(pool, tiles, [&, this](int64_t tile) {
      const int64_t first = tile * kWordTokens;
      for (int64_t g = 0; g < 2 * units; ++g)
        for (int64_t t = 0; t < std::min(kWordTokens, tokens - first); ++t) {
          const float* from =
              x.typed_data() + (first + t) * width + g / 2 * group + g % 2 * width / 2;
          const int64_t to = tile * of_tile + g * kWordTokens + t;
          this->steps[to] =
              round_words(group, this->words.data() + to * group,
                          [=](int64_t i) { return simd::load<Floats>(from + i); });
        }
    });
  }
};

// A task: a block of rows, matrix by matrix in panels, and what it holds of them.
template <bool kBoth>
struct Block {
  const Codes<kBoth>& weights;
  int64_t first, count, matrices;  // neurons

  int64_t panels() const { return divide_up(count, kPanel) * matrices; }
  int64_t pairs() const { return divide_up(panels(), 2); }
  // Rows behind the last are the last again; nobody reads their sums.
  int64_t neuron(int64_t panel, int64_t lane) const {
    return first + std::min(panel / matrices * kPanel + lane, count - 1);
  }

  // Both groups of a unit of one panel: codes [low, high][2 panels][pairs][kPanel], of
  // which this is one, scales [low, high][2][kPanel].
  void unpack(int64_t panel, int64_t unit, int32_t* codes, float* scales) const {
    const int64_t group = weights.group, m = panel % matrices;
    int64_t at[kPanel];
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t n = neuron(panel, lane);
      at[lane] = n * weights.record + m * weights.half + unit * group;
      const uint16_t* own = weights.scales_of(n, m) + unit;
      scales[lane] = weights.step * half_value(own[0]);
      scales[2 * kPanel + lane] = weights.step * half_value(own[weights.units()]);
    }
    for (int64_t i = 0; i < group; i += 4, codes += 2 * kPanel) {
      const Pairs<kBoth> pairs(fours(weights.codes, at, i),
                               kBoth ? fours(weights.residual, at, i) : Ints{});
      for (int k = 0; k < 2; ++k) {
        simd::store(codes + k * kPanel, pairs.low[k]);
        simd::store(codes + (group + k) * kPanel, pairs.high[k]);
      }
    }
  }

 private:
  static Ints fours(const uint8_t* from, const int64_t* at, int64_t i) {
    Ints found;
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      int32_t four;
      std::memcpy(&four, from + at[lane] + i, 4);
      found[lane] = four;
    }
    return found;
  }
};

// out[m][t][n]
template <bool kBoth>
void project(ffi::ThreadPool& pool, const Matrix& x, const Codes<kBoth>& weights,
             ffi::Result<Rows>& out) {
  const int64_t tokens = x.dimensions()[0];
  const int64_t matrices = out->dimensions()[0], neurons = out->dimensions()[2];
  const int64_t group = weights.group, units = weights.units();
  const int64_t together = kRows / matrices;
  const int64_t most = std::max<int64_t>(1, kInputs / (2 * group));
  const RoundedTokens rounded(pool, x, group, units);
  const int64_t tiles = rounded.tiles;
  parallel(pool, divide_up(neurons, together), [&, weights](int64_t task) {
    const int64_t first_neuron = task * together;
    const Block<kBoth> block{weights, first_neuron,
                             std::min(together, neurons - first_neuron), matrices};
    const int64_t pairs = block.pairs(), of_unit = 2 * group * kPanel;
    const int64_t of_tile = pairs * kPairSums, all = tiles * of_tile;
    int32_t* codes = simd::kept<int32_t>(pairs * most * of_unit);
    float* sums = simd::kept<float>(all + pairs * most * 4 * kPanel);
    float* scales = sums + all;
    std::memset(sums, 0, 4 * all);
    for (int64_t first = 0; first < units; first += most) {
      const int64_t some = std::min(most, units - first);
      for (int64_t panel = 0; panel < 2 * pairs; ++panel)
        for (int64_t unit = 0; unit < some; ++unit) {
          const int64_t to = panel / 2 * some + unit;
          block.unpack(panel, first + unit,
                       codes + to * of_unit + panel % 2 * group / 2 * kPanel,
                       scales + (4 * to + panel % 2) * kPanel);
        }
      for (int64_t tile = 0; tile < tiles; ++tile)
        for (int64_t pair = 0; pair < pairs; ++pair)
          for (int64_t g = 0; g < 2 * some; ++g) {
            const int64_t at = tile * rounded.of_tile + (2 * first + g) * kWordTokens;
            const int64_t of_pair = 2 * pair * some + g;
            const float* own = scales + 2 * of_pair * kPanel;
            add_words<2>(codes + of_pair * of_unit / 2, rounded.words.data() + at * group,
                         rounded.steps.data() + at, group / 2,
                         {simd::load<Floats>(own), simd::load<Floats>(own + kPanel)},
                         sums + tile * of_tile + pair * kPairSums);
          }
    }
    for (int64_t panel = 0; panel < block.panels(); ++panel) {
      const int64_t n = panel / matrices * kPanel, m = panel % matrices;
      const int64_t some = std::min(kPanel, block.count - n);
      float* to = out->typed_data() + m * tokens * neurons + first_neuron + n;
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t in_pair = panel % 2 * kWordTokens + t % kWordTokens;
        const float* from = sums + t / kWordTokens * of_tile + panel / 2 * kPairSums;
        std::memcpy(to + t * neurons, from + in_pair * kPanel, 4 * some);
      }
    }
  });
}

}  // namespace

ffi::Error project_block(ffi::ThreadPool pool, Matrix x, Records codes, Records residual,
                         Scales scales, ffi::Result<Rows> out, float step) {
  for_codes(codes, residual, scales, x.dimensions()[1], step,
            [&](const auto& weights) { project(pool, x, weights, out); });
  return ffi::Error::Success();
}

}  // namespace m2jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_project_block, m2jax::project_block,
                              M2JAX_CODES(Rows));

#endif
