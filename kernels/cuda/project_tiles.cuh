// Rows times x on tensor cores, for up to eight tokens at once.
#pragma once

#include "rows.cuh"
#include "tensor.cuh"

namespace m2jax {

// The warps of a block share sixteen rows: each takes every eighth 64 bytes of them.
constexpr int kWarpsOfTile = 8;
constexpr int kStep = 64;

// Bytes of shared memory that x takes.
template <class Kind, int T>
int bytes_of_x(int row_bytes) {
  using Layout = Columns<T>;
  constexpr int of_four = Layout::kTiles * Layout::kWide * kLanesOfRow;
  return row_bytes / kStep * Kind::kFours * of_four * int(sizeof(uint2));
}

template <class Kind, int T>
__global__ void __launch_bounds__(kLanes* kWarpsOfTile, T == 8 ? 1 : 2)
    project_tiles(const Work work, const int first_token) {
  using Layout = Columns<T>;
  constexpr int kFours = Kind::kFours, kParts = Kind::kParts, kOfPart = kFours / kParts;
  constexpr int kTiles = Layout::kTiles;
  constexpr int of_tile = Layout::kWide * kLanesOfRow;
  // What each four of a row meets, as a tensor core wants it: [steps][kFours][kTiles]
  // [columns][kLanesOfRow].
  extern __shared__ uint2 parts_of_x[];
  __shared__ float sums_of[2][kWarpsOfTile][kRowsOfTile][T];
  const int steps = work.row_bytes / kStep;
  const int fours = steps * kLanesOfRow * kFours;
  for (int i = threadIdx.x; i < T * fours; i += blockDim.x) {
    const int token = i / fours, within = i % fours;
    // Neighbours read what lies beside each other.
    const int j = within % kOfPart, chunk = within / kOfPart % (fours / kFours);
    const int p = within / kOfPart / (fours / kFours);
    float four[4] = {0, 0, 0, 0};
    if (first_token + token < work.tokens) {
      const int at = Kind::start(chunk, p, work.width) + 4 * j;
      const float* x = work.x + int64_t(first_token + token) * work.width + at;
      const float4 read = *reinterpret_cast<const float4*>(x);
      four[0] = read.x, four[1] = read.y, four[2] = read.z, four[3] = read.w;
    }
    uint32_t parts[4][3];
    for (int k = 0; k < 4; ++k) split(four[Fours<Kind>::order(k)], parts[k]);
    const int place = (chunk / kLanesOfRow * kFours + p * kOfPart + j) * kTiles;
    for (int part = 0; part < 3; ++part) {
      uint2 pairs;
      pairs.x = pair_of(parts[0][part], parts[1][part]);
      pairs.y = pair_of(parts[2][part], parts[3][part]);
      parts_of_x[(place + Layout::tile(token, part)) * of_tile +
                 Layout::column(token, part) * kLanesOfRow + chunk % kLanesOfRow] =
          pairs;
    }
  }
  __syncthreads();
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int g = lane / kLanesOfRow, t = lane % kLanesOfRow;
  const uint2* own = parts_of_x + g % Layout::kWide * kLanesOfRow + t;
  const int all = work.rows * work.matrices, shift = work.matrices - 1;
  int turn = 0;
  for (int tile = blockIdx.x; tile * kRowsOfTile < all; tile += gridDim.x, turn ^= 1) {
    const uint4* row[2];
    const __half* scale[2];
    for (int r = 0; r < 2; ++r) {
      // A missing last row is the one before again.
      const int n = min(tile * kRowsOfTile + g + 8 * r, all - 1);
      const int k = n >> shift, m = n & shift;
      row[r] = reinterpret_cast<const uint4*>(
          work.records + work.place[k] * work.record_bytes + m * work.row_bytes);
      if (Kind::kScaled)
        scale[r] = work.scales + (work.neuron[k] * work.kinds + m) * work.groups;
    }
    float sums[2][kTiles][2] = {};
    in_fours(warp, steps, kWarpsOfTile, [&](auto count, int first) {
      uint4 bytes[count][2];
      float factor[count][2][kParts];
#pragma unroll
      for (int a = 0; a < count; ++a) {
        const int chunk = (first + a * kWarpsOfTile) * kLanesOfRow;
        for (int r = 0; r < 2; ++r) {
          bytes[a][r] = __ldcs(row[r] + chunk + t);
          for (int p = 0; p < kParts; ++p) {
            const int group = Kind::start(chunk, p, work.width) >> work.group_bits;
            factor[a][r][p] = Kind::kScaled ? __half2float(scale[r][group]) : 1;
          }
        }
      }
      // No read moves behind this: a compiler would have one at a time in flight.
      __syncwarp();
#pragma unroll
      for (int a = 0; a < count; ++a) {
        const uint2* meets =
            own + (first + a * kWarpsOfTile) * (kFours * kTiles * of_tile);
        for_each<kParts>([&](auto p) {
          float part[kTiles][4] = {};
          for_each<kOfPart>([&](auto i) {
            constexpr int j = p * kOfPart + i;
            uint32_t four[4];
            Fours<Kind>::template pairs<j>(bytes[a][0], four[0], four[2]);
            Fours<Kind>::template pairs<j>(bytes[a][1], four[1], four[3]);
            for (int n = 0; n < kTiles; ++n)
              multiply_add(part[n], four, meets[(j * kTiles + n) * of_tile]);
          });
          for (int n = 0; n < kTiles; ++n)
            for (int c = 0; c < 4; ++c)
              sums[c / 2][n][c % 2] =
                  fmaf(part[n][c], factor[a][c / 2][p], sums[c / 2][n][c % 2]);
        });
      }
    });
    for (int r = 0; r < 2; ++r)
      Layout::add_parts(sums[r], [&](int token, float sum) {
        sums_of[turn][warp][g + 8 * r][token] = sum;
      });
    __syncthreads();
    for (int i = threadIdx.x; i < kRowsOfTile * T; i += blockDim.x) {
      const int r = i % kRowsOfTile, token = i / kRowsOfTile;
      const int n = tile * kRowsOfTile + r, k = n >> shift, m = n & shift;
      if (n >= all || first_token + token >= work.tokens) continue;
      float sum = 0;
      for (int w = 0; w < kWarpsOfTile; ++w) sum += sums_of[turn][w][r][token];
      work.out[int64_t(m * work.tokens + first_token + token) * work.rows + k] =
          sum * work.step;
    }
  }
}

template <class Kind, int T>
ffi::Error launch_tiles(cudaStream_t stream, const Work& work, int first_token) {
  const int shared = bytes_of_x<Kind, T>(work.row_bytes);
  auto* kernel = project_tiles<Kind, T>;
  int device = 0, processors = 0, fit = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, kLanes * kWarpsOfTile,
                                                shared);
  const int tiles = divide_up(work.rows * work.matrices, kRowsOfTile);
  const int grid = std::min(tiles, processors * std::max(1, fit));
  kernel<<<grid, kLanes * kWarpsOfTile, shared, stream>>>(work, first_token);
  return launched();
}

// As many tokens at once as shared memory holds. Rows are whole steps, and no group is
// shorter than one.
template <class Kind>
ffi::Error project_all_tiles(cudaStream_t stream, const Work& work) {
  constexpr int beside = sizeof(float) * 2 * kWarpsOfTile * kRowsOfTile * 8;
  const int most = shared_bytes() - beside;
  if (work.row_bytes % kStep || (Kind::kScaled && 1 << work.group_bits < kStep) ||
      bytes_of_x<Kind, 1>(work.row_bytes) > most)
    return ffi::Error::InvalidArgument("no rows for tensor cores");
  for (int t = 0; t < work.tokens;) {
    const int left = work.tokens - t;
    ffi::Error error = ffi::Error::Success();
    if (left > 4 && bytes_of_x<Kind, 8>(work.row_bytes) <= most) {
      error = launch_tiles<Kind, 8>(stream, work, t), t += 8;
    } else if (left > 2 && bytes_of_x<Kind, 4>(work.row_bytes) <= most) {
      error = launch_tiles<Kind, 4>(stream, work, t), t += 4;
    } else if (left > 1 && bytes_of_x<Kind, 2>(work.row_bytes) <= most) {
      error = launch_tiles<Kind, 2>(stream, work, t), t += 2;
    } else {
      error = launch_tiles<Kind, 1>(stream, work, t), t += 1;
    }
    if (error.failure()) return error;
  }
  return ffi::Error::Success();
}

}  // namespace m2jax
