// Rows times x, for one token or a few: gate and up of neurons, or a matrix.
#include "byte_rows.h"
#include "octets.h"
#include "widened.h"

namespace m2jax {

// Every row of every record in turn, gate and up of a neuron or rows of a matrix, in as
// many tasks as threads like.
struct CodeRows {
  const uint8_t *codes, *residual;  // residual: r4 behind q4, or none
  const uint16_t* scales;
  Picked place, neuron;
  int64_t record, row_bytes, kinds, groups;
  int64_t shift, all;
  float step;

  int64_t at(int64_t n) const {
    n = std::min(n, all - 1);
    return place[n >> shift] * record + (n & shift) * row_bytes;
  }
  const uint16_t* scales_of(int64_t n) const {
    n = std::min(n, all - 1);
    return scales + (neuron[n >> shift] * kinds + (n & shift)) * groups;
  }
};

// Calls put(row, token, sum). Planes whose groups fit no register are read one by one.
template <int kGroup, class Put>
void project_by_planes(ffi::ThreadPool& pool, const Matrix& x, const CodeRows& rows,
                       int64_t task, Put put) {
  const int64_t tokens = x.dimensions()[0], width = x.dimensions()[1];
  std::vector<ByteActivations> a;
  for (int64_t t = 0; t < tokens; ++t)
    a.emplace_back(x.typed_data() + t * width, width, kGroup);
  const int64_t room = a[0].steps.size();
  struct Plane {
    const uint8_t* codes;
    float step;
  };
  std::vector<Plane> planes{{rows.codes, rows.step}};
  if (rows.residual) planes.push_back({rows.residual, 1});
  parallel(pool, divide_up(rows.all, task), [&](int64_t block) {
    simd::Array<float> wide(room), factors(kTogether * room), sums(tokens);
    for (int64_t n = block * task; n < std::min(rows.all, (block + 1) * task); ++n) {
      std::fill(sums.begin(), sums.end(), 0);
      for (const Plane& plane : planes) {
        widen_scales(rows.scales_of(n), rows.groups, plane.step, wide.data());
        by_tokens(tokens, [&](int64_t t, auto together) {
          float some[together];
          row_times<kGroup, together>(plane.codes + rows.at(n),
                                      plane.codes + rows.at(n + kAhead), wide.data(),
                                      a.data() + t, factors.data(), some);
          for (int64_t i = 0; i < together; ++i) sums[t + i] += some[i];
        });
      }
      for (int64_t t = 0; t < tokens; ++t) put(n, t, sums[t]);
    }
  });
}

template <int kGroup, class Put>
void project_octets(ffi::ThreadPool& pool, const Matrix& x, const CodeRows& rows,
                    int64_t task, Put put) {
  const int64_t tokens = x.dimensions()[0], width = x.dimensions()[1];
  std::vector<WordActivations> a;
  for (int64_t t = 0; t < tokens; ++t)
    a.emplace_back(x.typed_data() + t * width, width, kGroup);
  const int64_t room = a[0].steps.size();
  parallel(pool, divide_up(rows.all, task), [&](int64_t block) {
    simd::Array<float> wide(room), factors(kTogether * room);
    for (int64_t n = block * task; n < std::min(rows.all, (block + 1) * task); ++n) {
      const int64_t now = rows.at(n), ahead = rows.at(n + kAhead);
      widen_scales(rows.scales_of(n), rows.groups, 1, wide.data());
      by_tokens(tokens, [&](int64_t t, auto together) {
        float sums[together];
        row_times<kGroup, together>(Octets{rows.codes + now, rows.residual + now,
                                           rows.codes + ahead, rows.residual + ahead},
                                    wide.data(), a.data() + t, factors.data(), sums);
        for (int64_t i = 0; i < together; ++i) put(n, t + i, sums[i]);
      });
    }
  });
}

template <bool kBoth, class IsWanted, class Put>
void project_codes(ffi::ThreadPool& pool, const Matrix& x, const CodeRows& rows,
                   int64_t group, int64_t task, IsWanted is_wanted, Put put) {
  const int64_t low_groups = rows.groups / 2;
  auto widen = [&](int64_t n, int64_t first, int64_t count, float* low, float* high,
                   int64_t ahead) {
    const int64_t now = rows.at(n) + first, soon = rows.at(ahead) + first;
    for (int64_t i = 0; i < count; i += 64) {
      __builtin_prefetch(rows.codes + soon + i);
      if constexpr (kBoth) __builtin_prefetch(rows.residual + soon + i);
    }
    widen_codes<kBoth>(rows.codes + now, kBoth ? rows.residual + now : nullptr, count,
                       group, rows.scales_of(n) + first / group, kBoth ? 1 : rows.step,
                       low_groups, low, high);
  };
  project_widened(pool, x, rows.all, task, widen, is_wanted, put);
}

// out[t][k] of `matrices` rows that lie one behind the other in each record. residual:
// plane r4, whose weights are added to those of records in plane q4, or none. wanted:
// [tokens][count], which are looked at, or none: all; others may be anything.
ffi::Error project_nibbles(ffi::ThreadPool pool, Matrix x, Records records,
                           Records residual, Scales scales, Ids slots, Ids ids,
                           Flags wanted, ffi::Result<Rows> out, float step) {
  const int64_t tokens = x.dimensions()[0], width = x.dimensions()[1];
  const int64_t matrices = out->dimensions()[0], count = out->dimensions()[2];
  const int64_t groups = scales.dimensions()[2];
  if (matrices > 2) return ffi::Error::InvalidArgument("one or two matrices wanted");
  const CodeRows rows{
      .codes = records.typed_data(),
      .residual = residual.element_count() ? residual.typed_data() : nullptr,
      .scales = reinterpret_cast<const uint16_t*>(scales.untyped_data()),
      .place = Picked(slots, records.dimensions()[0]),
      .neuron = Picked(ids, scales.dimensions()[0]),
      .record = records.dimensions()[1],
      .row_bytes = width / 2,
      .kinds = scales.dimensions()[1],
      .groups = groups,
      .shift = matrices - 1,
      .all = count * matrices,
      .step = step};
  const int64_t task =
      task_rows(pool, rows.all, rows.row_bytes * (rows.residual ? 2 : 1), tokens);
  return for_group(width / groups, [&](auto group) {
    const auto put = [&](int64_t n, int64_t t, float sum) {
      const int64_t k = n >> rows.shift, m = n & rows.shift;
      out->typed_data()[(m * tokens + t) * count + k] = sum;
    };
#if M2JAX_BYTES
    if (tokens > 1)
      return rows.residual ? project_bytes<true>(pool, x, rows, group, put)
                           : project_bytes<false>(pool, x, rows, group, put);
#endif
    if (tokens >= kWidenedCodes) {
      const bool* flags = wanted.element_count() ? wanted.typed_data() : nullptr;
      const auto is_wanted = [&](int64_t n, int64_t t) {
        return !flags || flags[t * count + (n >> rows.shift)];
      };
      return rows.residual
                 ? project_codes<true>(pool, x, rows, group, task, is_wanted, put)
                 : project_codes<false>(pool, x, rows, group, task, is_wanted, put);
    }
    if constexpr (kInOctets<group>)
      if (rows.residual) return project_octets<group>(pool, x, rows, task, put);
    project_by_planes<group>(pool, x, rows, task, put);
  });
}

template <class Number>
void project_rows(ffi::ThreadPool& pool, const Matrix& x, const Number* records,
                  int64_t record, const Picked& place, const Flags& wanted,
                  ffi::Result<Rows>& out) {
  const int64_t tokens = x.dimensions()[0], width = x.dimensions()[1];
  const int64_t matrices = out->dimensions()[0], rows = out->dimensions()[2];
  const bool* flags = wanted.element_count() ? wanted.typed_data() : nullptr;
  const bool many = tokens >= (flags ? kWidenedSome : kWidenedNumbers);
  if (many && width % (2 * simd::kLanes) == 0) {
    const int64_t half = width / 2, all = rows * matrices;
    auto at = [=, &place](int64_t n, int64_t first) {
      return records + place[n / matrices] * record + n % matrices * width + first;
    };
    auto widened = [=](int64_t n, int64_t first, int64_t count, float* low, float* high,
                       int64_t ahead) {
      const Number *from = at(n, first), *soon = at(ahead, first);
      for (int64_t i = 0; i < count; i += simd::kLanes) {
        __builtin_prefetch(soon + i);
        __builtin_prefetch(soon + half + i);
        simd::store(low + i, widen(from + i));
        simd::store(high + i, widen(from + half + i));
      }
    };
    auto put = [&](int64_t n, int64_t t, float sum) {
      out->typed_data()[(n % matrices * tokens + t) * rows + n / matrices] = sum;
    };
    const int64_t task = task_rows(pool, all, width * sizeof(Number), tokens);
    const auto is_wanted = [&](int64_t n, int64_t t) {
      return !flags || flags[t * rows + n / matrices];
    };
    return project_widened(pool, x, all, task, widened, is_wanted, put);
  }
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

// out[t][k] of `matrices` rows of numbers. wanted: as for `project_nibbles`.
ffi::Error project_numbers(ffi::ThreadPool pool, Matrix x, ffi::AnyBuffer records,
                           Ids slots, Flags wanted, ffi::Result<Rows> out) {
  return for_numbers(records, [&](const auto* data) {
    const Picked place(slots, records.dimensions()[0]);
    project_rows(pool, x, data, records.dimensions()[1], place, wanted, out);
  });
}

}  // namespace m2jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    m2jax_project_nibbles, m2jax::project_nibbles,
    M2JAX_POOL.Arg<m2jax::Matrix>()
        .Arg<m2jax::Records>()
        .Arg<m2jax::Records>()
        .Arg<m2jax::Scales>()
        .Arg<m2jax::Ids>()
        .Arg<m2jax::Ids>()
        .Arg<m2jax::Flags>()
        .Ret<m2jax::Rows>()
        .Attr<float>("step"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_project_numbers, m2jax::project_numbers,
                              M2JAX_POOL.Arg<m2jax::Matrix>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<m2jax::Ids>()
                                  .Arg<m2jax::Flags>()
                                  .Ret<m2jax::Rows>());
