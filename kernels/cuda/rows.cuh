// What the products of rows are made of.
#pragma once

#include "products.cuh"

namespace m2jax {

// Rows times x: out[m][t][k] of `matrices` rows, one behind the other in each record.
struct Work {
  const float* x;
  const uint8_t* records;
  const __half* scales;
  float* out;
  Picked place, neuron;
  int64_t record_bytes;
  int tokens, width, rows, matrices, row_bytes, groups, group_bits, kinds;
  float step;
};

// The sum of down columns times h, in runs of `run` neurons: parts[r][t][column].
struct Weighted {
  const float* h;
  const uint8_t* records;
  const __half* scales;
  float* parts;
  Picked place, neuron;
  int64_t record_bytes;
  int tokens, rows, width, row_bytes, groups, group_bits, kinds, run;
  float step;
};

}  // namespace m2jax
