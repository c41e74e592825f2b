// The sum of down columns weighted by activations, for up to a few tokens.
//
// Neurons are cut into runs by their count alone; each run's sum is made apart and the
// sums are added in order, so the result does not hang on who ran first.
#include "accumulate_strips.cuh"

namespace m2jax {

constexpr int kThreads = 256;
// Neurons whose bytes are asked for at once, and how many factors a block keeps.
constexpr int kAhead = 8;
constexpr int kTile = 32;
// Columns of a block of the last sum, and threads that share each.
constexpr int kColumns = 32, kSharers = 8;

// Eight bytes of a row, a thread's columns: kFours / 2 times four weights. Enough
// threads for all columns of a row, few enough sums in each.
template <class Kind>
struct Eight {
  static constexpr int kFours = Kind::kFours / 2, kParts = Kind::kParts;

  __device__ static int start(int piece, int part, int width) {
    return Kind::start(piece / 2, part, width) +
           (piece % 2) * (4 * kFours / kParts);
  }
  // The j-th of its fours; the fours of part p follow each other.
  template <int j>
  __device__ static void widen(const uint2& bytes, float (&out)[4]) {
    constexpr int of_part = kFours / kParts;
    constexpr int whole = j / of_part * (2 * of_part) + j % of_part;
    Kind::template widen<whole>(make_uint4(bytes.x, bytes.y, 0, 0), out);
  }
  __device__ static float factor(int j, int i) {
    constexpr int of_part = kFours / kParts;
    return Kind::factor(j / of_part * (2 * of_part) + j % of_part, i);
  }
};

template <>
struct Eight<Floats> {
  static constexpr int kFours = 1, kParts = 1;
};

template <class Kind, int T>
__global__ void __launch_bounds__(kThreads)
    sum_run(const Weighted work, const int first_token) {
  using Piece = Eight<Kind>;
  constexpr int kFours = Piece::kFours, kParts = Piece::kParts;
  // h times scale, of a tile of neurons: [T][kTile][groups]; without scales h alone.
  extern __shared__ float factors[];
  const int piece = blockIdx.y * kThreads + threadIdx.x;
  const int pieces = work.row_bytes / 8;
  const bool here = piece < pieces;
  const int groups = Kind::kScaled ? work.groups : 1;
  int of_group[kParts];
  for (int p = 0; p < kParts; ++p)
    of_group[p] = Kind::kScaled && here
                      ? Piece::start(piece, p, work.width) >> work.group_bits
                      : 0;
  float sums[T][kFours][4] = {};
  const int begin = blockIdx.x * work.run, end = min(begin + work.run, work.rows);
  for (int first = begin; first < end; first += kTile) {
    const int count = min(kTile, end - first);
    __syncthreads();
    for (int i = threadIdx.x; i < T * kTile * groups; i += kThreads) {
      const int t = i / (kTile * groups), n = i / groups % kTile, g = i % groups;
      const int k = first + n;
      float factor = 0;
      if (n < count && first_token + t < work.tokens) {
        factor = work.h[int64_t(first_token + t) * work.rows + k];
        if (Kind::kScaled)
          factor *= work.step *
                    __half2float(
                        work.scales[(work.neuron[k] * work.kinds + 2) * groups + g]);
      }
      factors[i] = factor;
    }
    __syncthreads();
    if (!here) continue;
    for (int n = 0; n < count; n += kAhead) {
      uint2 bytes[kAhead];
      for (int a = 0; a < kAhead; ++a) {
        const int k = first + min(n + a, count - 1);
        const auto* row = reinterpret_cast<const uint2*>(
            work.records + work.place[k] * work.record_bytes + 2 * work.row_bytes);
        bytes[a] = __ldcs(row + piece);
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (n + a >= count) break;
        for_each<kFours>([&](auto j) {
          float w[4];
          Piece::template widen<j>(bytes[a], w);
          for (int t = 0; t < T; ++t) {
            const float factor =
                factors[(t * kTile + n + a) * groups + of_group[j / (kFours / kParts)]];
            for (int i = 0; i < 4; ++i)
              sums[t][j][i] = fmaf(factor, w[i], sums[t][j][i]);
          }
        });
      }
    }
  }
  if (!here) return;
  for_each<kFours>([&](auto j) {
    constexpr int of_part = kFours / kParts;
    const int at = Piece::start(piece, j / of_part, work.width) + 4 * (j % of_part);
    for (int t = 0; t < T; ++t) {
      if (first_token + t >= work.tokens) break;
      float* part =
          work.parts +
          (int64_t(blockIdx.x) * work.tokens + first_token + t) * work.width + at;
      for (int i = 0; i < 4; ++i) part[i] = sums[t][j][i] * Piece::factor(j, i);
    }
  });
}

// y[i] = sum of parts[r][i] over the runs r, in a fixed order.
__global__ void __launch_bounds__(kColumns* kSharers)
    add_runs(const float* parts, float* y, const int runs, const int size) {
  __shared__ float sums[kSharers][kColumns];
  const int column = threadIdx.x % kColumns, sharer = threadIdx.x / kColumns;
  const int i = blockIdx.x * kColumns + column;
  float sum = 0;
  if (i < size)
#pragma unroll 8
    for (int r = sharer; r < runs; r += kSharers) sum += parts[int64_t(r) * size + i];
  sums[sharer][column] = sum;
  __syncthreads();
  if (sharer || i >= size) return;
  for (int s = 1; s < kSharers; ++s) sum += sums[s][column];
  y[i] = sum;
}

template <class Kind, int T>
ffi::Error launch_sums(cudaStream_t stream, const Weighted& work, int runs,
                       int first_token) {
  const int groups = Kind::kScaled ? work.groups : 1;
  const int shared = T * kTile * groups * sizeof(float);
  auto* kernel = sum_run<Kind, T>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  const dim3 grid(runs, divide_up(work.row_bytes / 8, kThreads));
  kernel<<<grid, kThreads, shared, stream>>>(work, first_token);
  return launched();
}

// As many tokens at once as shared memory holds.
template <class Kind>
ffi::Error sum_all_runs(cudaStream_t stream, const Weighted& work, int runs) {
  const int of_token = kTile * (Kind::kScaled ? work.groups : 1) * int(sizeof(float));
  const int most = shared_bytes() / of_token;
  if (most < 1) return ffi::Error::InvalidArgument("too many groups");
  for (int t = 0; t < work.tokens;) {
    const int left = std::min(work.tokens - t, most);
    ffi::Error error = ffi::Error::Success();
    if (left >= 3 && most >= 4) {
      error = launch_sums<Kind, 4>(stream, work, runs, t), t += 4;
    } else if (left >= 2) {
      error = launch_sums<Kind, 2>(stream, work, runs, t), t += 2;
    } else {
      error = launch_sums<Kind, 1>(stream, work, runs, t), t += 1;
    }
    if (error.failure()) return error;
  }
  return ffi::Error::Success();
}

// y [T, W]; parts [runs, T, W] is room for the sums of runs of neurons.
ffi::Error accumulate(cudaStream_t stream, Matrix h, ffi::AnyBuffer records,
                      Scales scales, Ids slots, Ids ids,
                      ffi::Result<Matrix> y, ffi::Result<Rows> parts, float step,
                      bool tensor) {
  const auto record = records.dimensions();
  const int64_t record_bytes = records.size_bytes() / std::max<int64_t>(1, record[0]);
  const int tokens = h.dimensions()[0], rows = h.dimensions()[1];
  const int runs = parts->dimensions()[0], width = y->dimensions()[1];
  const int groups = std::max<int>(1, scales.dimensions()[2]);
  return for_kind(records.element_type(), [&](auto kind) {
    using Kind = decltype(kind);
    if constexpr (std::is_same_v<Kind, Floats>) {
      return ffi::Error::InvalidArgument("float32 has no such kernel");
    } else {
      const Weighted work = {
          h.typed_data(),
          static_cast<const uint8_t*>(records.untyped_data()),
          reinterpret_cast<const __half*>(scales.untyped_data()),
          parts->typed_data(),
          Picked(slots, record[0]),
          Picked(ids, scales.dimensions()[0]),
          record_bytes,
          tokens,
          rows,
          width,
          int(record_bytes / 3),
          groups,
          bits_of(width / groups),
          int(scales.dimensions()[1]),
          divide_up(rows, runs),
          step,
      };
      ffi::Error error = ffi::Error::Success();
      if (!tensor) {
        error = sum_all_runs<Kind>(stream, work, runs);
      } else if constexpr (kOnTensorCores<Kind>) {
        error = sum_all_strips<Kind>(stream, work, runs);
      } else {
        error = ffi::Error::InvalidArgument("tensor cores take codes and bfloat16");
      }
      if (error.failure()) return error;
      const int size = tokens * width;
      add_runs<<<divide_up(size, kColumns), kColumns * kSharers, 0, stream>>>(
          parts->typed_data(), y->typed_data(), runs, size);
      return launched();
    }
  });
}

}  // namespace m2jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_cuda_accumulate, m2jax::accumulate,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<m2jax::Matrix>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<m2jax::Scales>()
                                  .Arg<m2jax::Ids>()
                                  .Arg<m2jax::Ids>()
                                  .Ret<m2jax::Matrix>()
                                  .Ret<m2jax::Rows>()
                                  .Attr<float>("step")
                                  .Attr<bool>("tensor"),
                              m2jax::kTraits);
