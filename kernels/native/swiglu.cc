// The whole block for one token, every neuron at the same precision.
#include <cmath>

#include "common.h"

namespace m2jax {

// kind: a place in `sparse_swiglu.activation.ACTIVATIONS`.
float activate(int64_t kind, float gate) {
  if (kind == 0) return gate / (1 + std::exp(-gate));
  if (kind == 1) return gate > 0 || std::isnan(gate) ? gate : 0;
  return 0.5f * gate * (1 + std::erf(gate * float(M_SQRT1_2)));
}

// y = sum_n act(gate_n) up_n down_n. Each record is read once, from end to end, which
// memory likes best; r4, if any, adds the other four bits.
ffi::Error swiglu_nibbles(ffi::ThreadPool pool, Matrix x, Records q4, Records r4,
                          Scales scales, ffi::Result<Matrix> y, int64_t activation) {
  const int64_t width = x.dimensions()[1], half = width / 2;
  const int64_t rows = q4.dimensions()[0], record = q4.dimensions()[1];
  const int64_t groups = scales.dimensions()[2], kinds = scales.dimensions()[1];
  const auto* halves = reinterpret_cast<const uint16_t*>(scales.untyped_data());
  const Activations a = round_activations(x.typed_data(), width, width / groups);
  const int64_t room = a.steps.size(), blocks = divide_up(rows, kSumRows);
  struct Codes {
    const uint8_t* first;
    float step;
  };
  std::vector<Codes> planes{{q4.typed_data(), 16}};
  if (r4.element_count()) planes.push_back({r4.typed_data(), 1});
  simd::Array<float> parts(blocks * width);
  const ffi::Error done = for_group(width / groups, [&](auto group) {
    parallel(pool, blocks, [&](int64_t block) {
      simd::Array<float> wide(kRowsTogether * room), factors(kRowsAdded * room);
      std::vector<simd::Array<float>> offsets(planes.size(), simd::Array<float>(room));
      float* part = parts.data() + block * width;
      const int64_t end = std::min(rows, (block + 1) * kSumRows);
      for (int64_t first = block * kSumRows; first < end; first += kRowsAdded) {
        float h[kRowsAdded];
        for (int64_t r = 0; r < kRowsAdded; ++r) {
          const int64_t n = std::min(first + r, end - 1);
          float sums[kRowsTogether] = {};
          for (const Codes& plane : planes) {
            const uint8_t* row = plane.first + n * record;
            const uint8_t* now[] = {row, row + half};
            const uint8_t* later =
                plane.first + std::min(n + kRowsAdded, rows - 1) * record;
            const uint8_t* ahead[] = {later, later + half};
            for (int m = 0; m < kRowsTogether; ++m)
              widen_scales(halves + (n * kinds + m) * groups, groups, plane.step,
                           wide.data() + m * room);
            float some[kRowsTogether];
            rows_times<group, 1>(now, ahead, wide.data(), &a, factors.data(), some);
            for (int m = 0; m < kRowsTogether; ++m) sums[m] += some[m];
          }
          h[r] = first + r < end ? activate(activation, sums[0]) * sums[1] : 0;
        }
        for (std::size_t p = 0; p < planes.size(); ++p) {
          const uint8_t *down[kRowsAdded], *ahead[kRowsAdded];
          for (int64_t r = 0; r < kRowsAdded; ++r) {
            const int64_t n = std::min(first + r, end - 1);
            down[r] = planes[p].first + n * record + width;
            ahead[r] = planes[p].first + std::min(n + kRowsAdded, rows - 1) * record +
                       width;
            widen_scales(halves + (n * kinds + 2) * groups, groups,
                         planes[p].step * h[r], factors.data() + r * room);
          }
          add_rows(down, ahead, factors.data(), room, half, group, part,
                   offsets[p].data());
        }
      }
      for (const auto& offset : offsets)
        take_off_zero(offset.data(), groups, group, part);
    });
  });
  if (done.success()) add_up(parts, width, y->typed_data());
  return done;
}

}  // namespace m2jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_swiglu_nibbles, m2jax::swiglu_nibbles,
                              M2JAX_POOL.Arg<m2jax::Matrix>()
                                  .Arg<m2jax::Records>()
                                  .Arg<m2jax::Records>()
                                  .Arg<m2jax::Scales>()
                                  .Ret<m2jax::Matrix>()
                                  .Attr<int64_t>("activation"));
