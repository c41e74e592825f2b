// Sums of rows weighted by h, for several tokens of which each takes only some rows.
#pragma once

#include "common.h"

namespace m2jax {

// Where each token takes less than this share of rows (its h is zero of the others), a
// token alone over its own is faster than several tokens over all.
constexpr double kMostTaken = 0.5;

// Rows that each token takes, a tile of kTileRows at a time, if they are few.
class Taken {
 public:
  Taken(ffi::ThreadPool& pool, const float* h, int64_t tokens, int64_t rows)
      : tokens_(tokens), wanted_(divide_up(rows, kTileRows)),
        counts_(wanted_.size() * tokens) {
    places_.resize(counts_.size() * kTileRows);
    parallel(pool, divide_up(rows, kTileRows), [&, this](int64_t tile) {
      const int64_t first = tile * kTileRows, there = std::min(rows - first, kTileRows);
      for (int64_t t = 0; t < tokens; ++t) {
        const float* weights = h + t * rows + first;
        uint8_t* to = &places_[(tile * tokens + t) * kTileRows];
        int64_t count = 0;
        for (int64_t k = 0; k < there; ++k) {
          to[count] = uint8_t(k);
          count += weights[k] != 0;
          wanted_[tile] |= uint64_t{weights[k] != 0} << k;
        }
        counts_[tile * tokens + t] = uint8_t(count);
      }
    });
    int64_t all = 0;
    for (uint8_t count : counts_) all += count;
    few_ = double(all) < kMostTaken * double(tokens * rows);
  }

  bool few() const { return few_; }
  // Whether any token takes row k of the tile.
  bool wants(int64_t tile, int64_t k) const { return wanted_[tile] >> k & 1; }
  int64_t count(int64_t tile, int64_t t) const { return counts_[tile * tokens_ + t]; }
  // Within the tile, ascending.
  const uint8_t* places(int64_t tile, int64_t t) const {
    return &places_[(tile * tokens_ + t) * kTileRows];
  }

 private:
  static_assert(kTileRows <= 64);
  int64_t tokens_;
  std::vector<uint64_t> wanted_;  // [tiles], a bit a row
  std::vector<uint8_t> counts_, places_;
  bool few_ = false;
};

// What `accumulate_columns` makes, to the last bit, from the rows that are taken.
//
// kEach: registers of a half that stay in place while a token's rows are added.
template <int kEach, class Fetch, class Widened>
void accumulate_taken(const Taken& taken, const float* h, int64_t tokens, int64_t rows,
                      int64_t count, float* y, int64_t half, Fetch fetch,
                      Widened widened) {
  constexpr int64_t kSpan = kEach * simd::kLanes;
  simd::Array<float> sums(tokens * 2 * count);
  simd::Array<Floats> tile_rows(kTileRows * 2 * kEach);
  decltype(fetch(0, 0)) fetched[kTileRows];
  for (int64_t first = 0; first < rows; first += kTileRows) {
    const int64_t tile = first / kTileRows, there = std::min(rows - first, kTileRows);
    for (int64_t k = 0; k < there; ++k)
      if (taken.wants(tile, k)) fetched[k] = fetch(k, first + k);
    for (int64_t i = 0; i < count; i += kSpan) {
      for (int64_t k = 0; k < there; ++k)
        if (taken.wants(tile, k))
          for (int e = 0; e < kEach; ++e) {
            Floats* to = &tile_rows[2 * kEach * k + e];
            widened(fetched[k], first + k, i + e * simd::kLanes, to, to + kEach);
          }
      for (int64_t t = 0; t < tokens; ++t) {
        float* own = sums.data() + 2 * t * count + i;
        Floats sum[2 * kEach];
        for (int e = 0; e < kEach; ++e) {
          sum[e] = simd::load<Floats>(own + e * simd::kLanes);
          sum[kEach + e] = simd::load<Floats>(own + count + e * simd::kLanes);
        }
        const float* weights = h + t * rows + first;
        const uint8_t* places = taken.places(tile, t);
        for (int64_t j = 0; j < taken.count(tile, t); ++j) {
          const Floats weight = simd::splat(weights[places[j]]);
          const Floats* row = &tile_rows[2 * kEach * places[j]];
          for (int e = 0; e < 2 * kEach; ++e) sum[e] += weight * row[e];
        }
        for (int e = 0; e < kEach; ++e) {
          simd::store(own + e * simd::kLanes, sum[e]);
          simd::store(own + count + e * simd::kLanes, sum[kEach + e]);
        }
      }
    }
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t side = 0; side < 2; ++side)
      std::copy_n(sums.data() + (2 * t + side) * count, count, y + (2 * t + side) * half);
}

}  // namespace m2jax
