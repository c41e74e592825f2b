// The feed-forward and matrix products of one token or a few, as XLA FFI calls on a CPU.
//
// What is computed does not hang on the number of threads, nor on where records lie: a
// sum is always made in the same order.
#include <cmath>
#include <type_traits>

#include "nibbles.h"
#include "numbers.h"
#include "parallel.h"
#include "simd.h"

namespace ffi = xla::ffi;

namespace m2jax {

using Matrix = ffi::Buffer<ffi::F32, 2>;
using Records = ffi::Buffer<ffi::U8, 2>;
using Scales = ffi::Buffer<ffi::F16, 3>;
using Ids = ffi::Buffer<ffi::S32, 1>;
using Rows = ffi::Buffer<ffi::F32, 3>;

// Tokens that share the unpacking of a row.
constexpr int kTogether = 4;
// A task's bytes: worth waking a thread for, and few enough that all end together.
constexpr int64_t kLeastBytes = 16 << 10, kMostBytes = 256 << 10, kShares = 4;
// Rows between the one that is read and the one whose bytes are asked for.
constexpr int64_t kAhead = 8;
// Rows whose sum is made apart: fixes the order of a sum over neurons.
constexpr int64_t kSumRows = 256;
// Rows that stay in the first-level cache while their columns are taken.
constexpr int64_t kTileRows = 64;

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Which of `rows` rows stands k-th: those of ids, kept inside, or as they lie.
struct Picked {
  const int32_t* ids;
  int64_t rows;

  Picked(const Ids& given, int64_t rows)
      : ids(given.element_count() ? given.typed_data() : nullptr), rows(rows) {}

  int64_t operator[](int64_t k) const {
    return ids ? std::clamp<int64_t>(ids[k], 0, rows - 1) : k;
  }
};

template <class F>
ffi::Error for_group(int64_t group, F work) {
  switch (group) {
    case 16: work(std::integral_constant<int, 16>()); break;
    case 32: work(std::integral_constant<int, 32>()); break;
    case 64: work(std::integral_constant<int, 64>()); break;
    case 128: work(std::integral_constant<int, 128>()); break;
    default: return ffi::Error::InvalidArgument("groups of 16, 32, 64 or 128 wanted");
  }
  return ffi::Error::Success();
}

// Calls work(first, tokens as a constant) for all tokens, kTogether at a time.
template <class F>
void by_tokens(int64_t tokens, F work) {
  int64_t t = 0;
  for (; t + kTogether <= tokens; t += kTogether)
    work(t, std::integral_constant<int, kTogether>());
  for (; t < tokens; ++t) work(t, std::integral_constant<int, 1>());
}

// Rows a task, kRowsTogether at least: long stretches are read faster than short ones,
// and yet every thread should have some.
int64_t task_rows(ffi::ThreadPool& pool, int64_t rows, int64_t row_bytes,
                  int64_t tokens) {
  const int64_t shares = kShares * std::max<int64_t>(1, pool.num_threads());
  const int64_t least = divide_up(kLeastBytes, row_bytes * tokens);
  const int64_t most = std::max<int64_t>(least, kMostBytes / row_bytes);
  const int64_t task = std::clamp(divide_up(rows, shares), least, most);
  return divide_up(task, kRowsTogether) * kRowsTogether;
}

// ---- products of rows with x -------------------------------------------------------

// out[t][k] of `matrices` rows that lie one behind the other in each record.
ffi::Error project_nibbles(ffi::ThreadPool pool, Matrix x,
                           Records records,
                           Scales scales, Ids slots, Ids ids,
                           ffi::Result<Rows> out, float step) {
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
                  int64_t record, const Picked& place,
                  ffi::Result<Rows>& out) {
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
          numbers_times<together>(row + m * width, ahead + m * width, width, xs.data() + t * padded, padded,
                                  sums);
          for (int i = 0; i < together; ++i) to[(t + i) * rows] = sums[i];
        });
      }
    }
  });
}

// Calls work(pointer) with the numbers' type.
template <class Buffer, class F>
ffi::Error for_numbers(const Buffer& records, F work) {
  const void* data = records.untyped_data();
  switch (records.element_type()) {
    case ffi::F32: work(static_cast<const float*>(data)); break;
    case ffi::F16: work(static_cast<const Half*>(data)); break;
    case ffi::U16: work(static_cast<const Bfloat*>(data)); break;
    default: return ffi::Error::InvalidArgument("float32, float16 or uint16 wanted");
  }
  return ffi::Error::Success();
}

ffi::Error project_numbers(ffi::ThreadPool pool, Matrix x, ffi::AnyBuffer records,
                           Ids slots, ffi::Result<Rows> out) {
  return for_numbers(records, [&](const auto* data) {
    const Picked place(slots, records.dimensions()[0]);
    project_rows(pool, x, data, records.dimensions()[1], place, out);
  });
}

// ---- sums of rows weighted by h ----------------------------------------------------

// Adds partial sums [blocks][width] in order.
void add_up(const simd::Array<float>& parts, int64_t width, float* y) {
  std::memcpy(y, parts.data(), 4 * width);
  for (int64_t part = width; part < int64_t(parts.size()); part += width)
    for (int64_t i = 0; i < width; ++i) y[i] += parts[part + i];
}

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

// Columns [first, first + count) of y for all tokens, rows in order.
// widened(k, column, low, high): two registers of row k's numbers.
template <class Widened>
void accumulate_columns(const float* h, int64_t tokens, int64_t rows, int64_t count,
                        float* low_sums, float* high_sums, int64_t stride,
                        Widened widened) {
  for (int64_t tile = 0; tile < rows; tile += kTileRows) {
    const int64_t end = std::min(rows, tile + kTileRows);
    for (int64_t i = 0; i < count; i += simd::kLanes)
      by_tokens(tokens, [&](int64_t t, auto together) {
        Floats low[together], high[together];
        for (int j = 0; j < together; ++j) {
          low[j] = simd::load<Floats>(low_sums + (t + j) * stride + i);
          high[j] = simd::load<Floats>(high_sums + (t + j) * stride + i);
        }
        for (int64_t k = tile; k < end; ++k) {
          Floats one, other;
          widened(k, i, &one, &other);
          for (int j = 0; j < together; ++j) {
            const Floats weight = simd::splat(h[(t + j) * rows + k]);
            low[j] += weight * one;
            high[j] += weight * other;
          }
        }
        for (int j = 0; j < together; ++j) {
          simd::store(low_sums + (t + j) * stride + i, low[j]);
          simd::store(high_sums + (t + j) * stride + i, high[j]);
        }
      });
  }
}

ffi::Error accumulate_nibbles(ffi::ThreadPool pool, Matrix h,
                              Records records,
                              Scales scales, Ids slots, Ids ids,
                              ffi::Result<Matrix> y, float step) {
  const int64_t tokens = h.dimensions()[0], rows = h.dimensions()[1];
  const int64_t width = y->dimensions()[1], half = width / 2;
  const int64_t record = records.dimensions()[1], groups = scales.dimensions()[2];
  const int64_t group = width / groups;
  const auto* halves = reinterpret_cast<const uint16_t*>(scales.untyped_data());
  const int64_t kinds = scales.dimensions()[1];
  const Picked place(slots, records.dimensions()[0]), neuron(ids, scales.dimensions()[0]);
  auto row_of = [&, first = records.typed_data()](int64_t k) {
    return first + (place[k] + 1) * record - half;
  };
  auto scales_of = [&](int64_t k) {
    return halves + (neuron[k] * kinds + kinds - 1) * groups;
  };
  if (tokens == 1) {
    accumulate_one(pool, h.typed_data(), rows, width, y->typed_data(),
                   [&](const std::vector<int64_t>& taking, float* part) {
                     add_nibbles(taking, h.typed_data(), row_of, scales_of, half, group,
                                 step, part);
                   });
    return ffi::Error::Success();
  }
  std::memset(y->typed_data(), 0, 4 * tokens * width);
  parallel(pool, half / group, [&](int64_t block) {
    // A weight is scale * code + offset.
    std::vector<float> low_scale(rows), high_scale(rows);
    for (int64_t k = 0; k < rows; ++k) {
      const uint16_t* own = scales_of(k);
      low_scale[k] = step * half_value(own[block]);
      high_scale[k] = step * half_value(own[half / group + block]);
    }
    float* sums = y->typed_data() + block * group;
    accumulate_columns(h.typed_data(), tokens, rows, group, sums, sums + half, width,
                       [&](int64_t k, int64_t i, Floats* low, Floats* high) {
                         few_codes(row_of(k) + block * group + i, low, high);
                         *low = (*low - kZero) * low_scale[k];
                         *high = (*high - kZero) * high_scale[k];
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
    std::memset(y->typed_data(), 0, 4 * tokens * width);
    // Widths are whole groups of 16 in each half.
    const int64_t count = 16;
    parallel(pool, half / count, [&](int64_t block) {
      float* sums = y->typed_data() + block * count;
      accumulate_columns(h.typed_data(), tokens, rows, count, sums, sums + half, width,
                         [&](int64_t k, int64_t i, Floats* low, Floats* high) {
                           const auto* from = row_of(k) + block * count + i;
                           *low = widen(from);
                           *high = widen(from + half);
                         });
    });
  });
}

// ---- the whole block for one token, every neuron at the same precision ---------------

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

#define M2JAX_POOL ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    m2jax_accumulate_nibbles, m2jax::accumulate_nibbles,
    M2JAX_POOL.Arg<m2jax::Matrix>()
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_swiglu_nibbles, m2jax::swiglu_nibbles,
                              M2JAX_POOL.Arg<m2jax::Matrix>()
                                  .Arg<m2jax::Records>()
                                  .Arg<m2jax::Records>()
                                  .Arg<m2jax::Scales>()
                                  .Ret<m2jax::Matrix>()
                                  .Attr<int64_t>("activation"));
