// Rows times x, for one token or a few: gate and up of neurons, or a matrix.
#include "common.h"

namespace m2jax {

// out[t][k] of `matrices` rows that lie one behind the other in each record.
ffi::Error project_nibbles(ffi::ThreadPool pool, Matrix x, Records records,
                           Scales scales, Ids slots, Ids ids, ffi::Result<Rows> out,
                           float step) {
  const int64_t tokens = x.dimensions()[0], width = x.dimensions()[1];
  const int64_t matrices = out->dimensions()[0], rows = out->dimensions()[2];
  const int64_t record = records.dimensions()[1], groups = scales.dimensions()[2];
  const int64_t row_bytes = width / 2;
  if (matrices > 2) return ffi::Error::InvalidArgument("one or two matrices wanted");
  std::vector<Activations> a;
  for (int64_t t = 0; t < tokens; ++t)
    a.push_back(round_activations(x.typed_data() + t * width, width, width / groups));
  const int64_t room = a[0].steps.size();
  const int64_t task = task_rows(pool, rows * matrices, row_bytes, tokens);
  const auto* halves = reinterpret_cast<const uint16_t*>(scales.untyped_data());
  // Every row of every record in turn: gate and up of a neuron, or rows of a matrix.
  const int64_t all = rows * matrices, shift = matrices - 1;
  const Picked place(slots, records.dimensions()[0]), neuron(ids, scales.dimensions()[0]);
  const int64_t kinds = scales.dimensions()[1];
  auto row_of = [&, first = records.typed_data()](int64_t n) {
    n = std::min(n, all - 1);
    return first + place[n >> shift] * record + (n & shift) * row_bytes;
  };
  auto scales_of = [&](int64_t n) {
    n = std::min(n, all - 1);
    return halves + (neuron[n >> shift] * kinds + (n & shift)) * groups;
  };
  return for_group(width / groups, [&](auto group) {
    parallel(pool, divide_up(all, task), [&](int64_t block) {
      simd::Array<float> wide(kRowsTogether * room);
      simd::Array<float> factors(kRowsTogether * kTogether * room);
      const int64_t end = std::min(all, (block + 1) * task);
      for (int64_t n = block * task; n < end; n += kRowsTogether) {
        const uint8_t *now[kRowsTogether], *ahead[kRowsTogether];
        // A missing last row is the one before again.
        for (int r = 0; r < kRowsTogether; ++r) {
          now[r] = row_of(n + r);
          ahead[r] = row_of(n + r + kAhead);
          widen_scales(scales_of(n + r), groups, step, wide.data() + r * room);
        }
        by_tokens(tokens, [&](int64_t t, auto together) {
          float sums[kRowsTogether * together];
          rows_times<group, together>(now, ahead, wide.data(), a.data() + t,
                                      factors.data(), sums);
          for (int64_t r = 0; r < std::min<int64_t>(kRowsTogether, end - n); ++r) {
            const int64_t k = (n + r) >> shift, m = (n + r) & shift;
            for (int64_t i = 0; i < together; ++i)
              out->typed_data()[(m * tokens + t + i) * rows + k] =
                  sums[r * together + i];
          }
        });
      }
    });
  });
}

template <class Number>
void project_rows(ffi::ThreadPool& pool, const Matrix& x, const Number* records,
                  int64_t record, const Picked& place, ffi::Result<Rows>& out) {
  const int64_t tokens = x.dimensions()[0], width = x.dimensions()[1];
  const int64_t matrices = out->dimensions()[0], rows = out->dimensions()[2];
  const int64_t padded = divide_up(width, simd::kLanes) * simd::kLanes;
  simd::Array<float> xs(tokens * padded);
  for (int64_t t = 0; t < tokens; ++t)
    std::memcpy(xs.data() + t * padded, x.typed_data() + t * width, 4 * width);
  const int64_t task =
      task_rows(pool, rows, matrices * width * sizeof(Number), tokens);
  parallel(pool, divide_up(rows, task), [&](int64_t block) {
    for (int64_t k = block * task; k < std::min(rows, (block + 1) * task); ++k) {
      const Number* row = records + place[k] * record;
      const Number* ahead = records + place[std::min(k + 2, rows - 1)] * record;
      for (int64_t m = 0; m < matrices; ++m) {
        float* to = out->typed_data() + m * tokens * rows + k;
        by_tokens(tokens, [&](int64_t t, auto together) {
          float sums[together];
          numbers_times<together>(row + m * width, ahead + m * width, width,
                                  xs.data() + t * padded, padded, sums);
          for (int i = 0; i < together; ++i) to[(t + i) * rows] = sums[i];
        });
      }
    }
  });
}

ffi::Error project_numbers(ffi::ThreadPool pool, Matrix x, ffi::AnyBuffer records,
                           Ids slots, ffi::Result<Rows> out) {
  return for_numbers(records, [&](const auto* data) {
    const Picked place(slots, records.dimensions()[0]);
    project_rows(pool, x, data, records.dimensions()[1], place, out);
  });
}

}  // namespace m2jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    m2jax_project_nibbles, m2jax::project_nibbles,
    M2JAX_POOL.Arg<m2jax::Matrix>()
        .Arg<m2jax::Records>()
        .Arg<m2jax::Scales>()
        .Arg<m2jax::Ids>()
        .Arg<m2jax::Ids>()
        .Ret<m2jax::Rows>()
        .Attr<float>("step"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_project_numbers, m2jax::project_numbers,
                              M2JAX_POOL.Arg<m2jax::Matrix>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<m2jax::Ids>()
                                  .Ret<m2jax::Rows>());
