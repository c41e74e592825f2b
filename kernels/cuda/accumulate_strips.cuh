// The sum of down columns on tensor cores, for up to eight tokens at once.
#pragma once

#include "rows.cuh"
#include "tensor.cuh"

namespace m2jax {

// Neurons of a product, and such products whose bytes are asked for at once, at most.
constexpr int kNeurons = 16, kMostSets = 4;
// A warp's columns are those of 64 bytes of a row, eight bytes a lane of eight.
constexpr int kStrip = 64, kWarpsOfStrips = 8;

// Eight bytes of four neurons as columns times neurons: columns 2 i and 2 i + 1 of part p
// by lanes, neurons two and two.
template <class Kind>
struct Strips;

template <>
struct Strips<Nibbles> {
  static constexpr int kParts = 2, kPairs = 4;

  template <int p, int byte>
  __device__ static uint32_t column(const uint2& one, const uint2& next) {
    constexpr uint32_t b = byte % 4, pick = b | (4 + b) << 8 | b << 4 | (4 + b) << 12;
    const uint32_t both = byte < 4 ? __byte_perm(one.x, next.x, pick)
                                   : __byte_perm(one.y, next.y, pick);
    return codes_of(both >> (p ? 4 : 0));
  }
};

template <>
struct Strips<Halves<Bfloat>> {
  static constexpr int kParts = 1, kPairs = 2;

  template <int p, int half>
  __device__ static uint32_t column(const uint2& one, const uint2& next) {
    constexpr uint32_t pick = half % 2 ? 0x7632 : 0x5410;
    return half < 2 ? __byte_perm(one.x, next.x, pick)
                    : __byte_perm(one.y, next.y, pick);
  }
};

template <class Kind, int T>
__global__ void __launch_bounds__(kLanes* kWarpsOfStrips)
    sum_strips(const Weighted work, const int first_token) {
  using Layout = Columns<T>;
  using Strip = Strips<Kind>;
  constexpr int kParts = Strip::kParts, kPairs = Strip::kPairs;
  constexpr int kTiles = Layout::kTiles, kWide = Layout::kWide;
  // h times scale, as a tensor core wants it: a lane's four neurons beside each other.
  __shared__ uint2 factors[kWarpsOfStrips][kMostSets][kParts][kTiles][kWide][kLanesOfRow];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int g = lane / kLanesOfRow, t = lane % kLanesOfRow;
  const int strip = blockIdx.y * kWarpsOfStrips + warp;
  if (strip * kStrip >= work.row_bytes) return;
  float sums[kParts][kPairs][kTiles][4] = {};
  const int begin = blockIdx.x * work.run, end = min(begin + work.run, work.rows);
  in_fours(begin, end, kNeurons, [&](auto count, int first) {
    uint2 bytes[count][4];
#pragma unroll
    for (int a = 0; a < count; ++a)
      for (int i = 0; i < 4; ++i) {
        // One past the end is the last one again, times nothing.
        const int k = min(first + a * kNeurons + 2 * t + i / 2 * 8 + i % 2, end - 1);
        const auto* row = reinterpret_cast<const uint2*>(
            work.records + work.place[k] * work.record_bytes + 2 * work.row_bytes);
        bytes[a][i] = __ldcs(row + strip * (kStrip / 8) + g);
      }
    // A lane makes the factors of one neuron and part.
    const int i = lane % kNeurons, p = lane / kNeurons;
    for (int a = 0; a < count; ++a) {
      const int k = first + a * kNeurons + i;
      const int at = min(k, end - 1);
      float scale = 1;
      if (Kind::kScaled) {
        const int column = p * (work.width / 2) + strip * kStrip;
        const int64_t neuron = work.neuron[at] * work.kinds + 2;
        scale = work.step * __half2float(work.scales[neuron * work.groups +
                                                     (column >> work.group_bits)]);
      }
      for (int token = 0; token < T; ++token) {
        const bool there = k < end && first_token + token < work.tokens;
        const float h =
            there ? work.h[int64_t(first_token + token) * work.rows + at] : 0;
        uint32_t parts[3];
        split(__fmul_rn(h, scale), parts);
        if (p < kParts)
          for (int part = 0; part < 3; ++part) {
            auto* to = reinterpret_cast<uint16_t*>(
                factors[warp][a][p][Layout::tile(token, part)]
                       [Layout::column(token, part)]);
            to[i % 8 / 2 * 4 + i / 8 * 2 + i % 2] = uint16_t(parts[part] >> 16);
          }
      }
    }
    __syncwarp();
#pragma unroll
    for (int a = 0; a < count; ++a) {
      for_each<kParts>([&](auto part) {
        for_each<kPairs>([&](auto pair) {
          const uint32_t four[4] = {
              Strip::template column<part, 2 * pair>(bytes[a][0], bytes[a][1]),
              Strip::template column<part, 2 * pair + 1>(bytes[a][0], bytes[a][1]),
              Strip::template column<part, 2 * pair>(bytes[a][2], bytes[a][3]),
              Strip::template column<part, 2 * pair + 1>(bytes[a][2], bytes[a][3])};
          for (int n = 0; n < kTiles; ++n)
            multiply_add(sums[part][pair][n], four,
                         factors[warp][a][part][n][g % kWide][t]);
        });
      });
    }
    __syncwarp();
  });
  for_each<kParts>([&](auto part) {
    for_each<kPairs>([&](auto pair) {
      for (int r = 0; r < 2; ++r) {
        float of_row[kTiles][2];
        for (int n = 0; n < kTiles; ++n)
          for (int c = 0; c < 2; ++c) of_row[n][c] = sums[part][pair][n][2 * r + c];
        const int column = part * (work.width / 2) +
                           (strip * 8 + g) * (2 * kPairs) + 2 * pair + r;
        Layout::add_parts(of_row, [&](int token, float sum) {
          if (first_token + token < work.tokens)
            work.parts[(int64_t(blockIdx.x) * work.tokens + first_token + token) *
                           work.width +
                       column] = sum;
        });
      }
    });
  });
}

template <class Kind, int T>
ffi::Error launch_strips(cudaStream_t stream, const Weighted& work, int runs,
                         int first_token) {
  const dim3 grid(runs, divide_up(work.row_bytes, kStrip * kWarpsOfStrips));
  auto* kernel = sum_strips<Kind, T>;
  kernel<<<grid, kLanes * kWarpsOfStrips, 0, stream>>>(work, first_token);
  return launched();
}

// Rows are whole strips, and no group is shorter than one.
template <class Kind>
ffi::Error sum_all_strips(cudaStream_t stream, const Weighted& work, int runs) {
  if (work.row_bytes % kStrip || (Kind::kScaled && 1 << work.group_bits < kStrip))
    return ffi::Error::InvalidArgument("no rows for tensor cores");
  for (int t = 0; t < work.tokens;) {
    const int left = work.tokens - t;
    ffi::Error error = ffi::Error::Success();
    if (left > 4) {
      error = launch_strips<Kind, 8>(stream, work, runs, t), t += 8;
    } else if (left > 2) {
      error = launch_strips<Kind, 4>(stream, work, runs, t), t += 4;
    } else if (left > 1) {
      error = launch_strips<Kind, 2>(stream, work, runs, t), t += 2;
    } else {
      error = launch_strips<Kind, 1>(stream, work, runs, t), t += 1;
    }
    if (error.failure()) return error;
  }
  return ffi::Error::Success();
}

}  // namespace m2jax
