// Rows times x, for up to a few tokens: gate and up of neurons, or a matrix.
#include "project_tiles.cuh"

namespace m2jax {

// Rows that a warp takes at once: what they meet is read once for all.
constexpr int kRowsTogether = 4, kWarps = 8;

template <class Kind, int T>
__global__ void __launch_bounds__(kLanes* kWarps)
    project_rows(const Work work, const int first_token) {
  extern __shared__ float4 xs[];  // [T][steps][kFours][kLanes]
  constexpr int kFours = Kind::kFours, kParts = Kind::kParts;
  const int chunks = work.row_bytes / 16, steps = divide_up(chunks, kLanes);
  const int each = steps * kFours * kLanes;
  for (int i = threadIdx.x; i < T * each; i += blockDim.x) {
    const int t = first_token + i / each, within = i % each;
    const int chunk = within / (kFours * kLanes) * kLanes + within % kLanes;
    const int j = within / kLanes % kFours;
    float four[4] = {0, 0, 0, 0};
    if (chunk < chunks && t < work.tokens) {
      constexpr int of_part = kFours / kParts;
      const int at = Kind::start(chunk, j / of_part, work.width) + 4 * (j % of_part);
      const float* x = work.x + int64_t(t) * work.width + at;
      for (int k = 0; k < 4; ++k) four[k] = x[k] * Kind::factor(j, k);
    }
    xs[i] = make_float4(four[0], four[1], four[2], four[3]);
  }
  __syncthreads();
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int all = work.rows * work.matrices, shift = work.matrices - 1;
  for (int first = (blockIdx.x * kWarps + warp) * kRowsTogether; first < all;
       first += gridDim.x * kWarps * kRowsTogether) {
    const uint4* row[kRowsTogether];
    const __half* scale[kRowsTogether];
    for (int r = 0; r < kRowsTogether; ++r) {
      // A missing last row is the one before again.
      const int n = min(first + r, all - 1), k = n >> shift, m = n & shift;
      row[r] = reinterpret_cast<const uint4*>(
          work.records + work.place[k] * work.record_bytes + m * work.row_bytes);
      if (Kind::kScaled)
        scale[r] = work.scales + (work.neuron[k] * work.kinds + m) * work.groups;
    }
    float sums[kRowsTogether][T] = {};
#pragma unroll 2
    for (int s = 0; s < steps; ++s) {
      const int chunk = s * kLanes + lane;
      const bool here = chunk < chunks;
      uint4 bytes[kRowsTogether];
      float factor[kRowsTogether][kParts];
      for (int r = 0; r < kRowsTogether; ++r) {
        bytes[r] = here ? __ldcs(row[r] + chunk) : make_uint4(0, 0, 0, 0);
        for (int p = 0; p < kParts; ++p)
          if (Kind::kScaled)
            factor[r][p] = here ? __half2float(scale[r][Kind::start(
                                      chunk, p, work.width) >> work.group_bits])
                                : 0;
      }
      float parts[kRowsTogether][T][kParts] = {};
      for_each<kFours>([&](auto j) {
        float4 meets[T];
        for (int t = 0; t < T; ++t)
          meets[t] = xs[t * each + (s * kFours + j) * kLanes + lane];
        for (int r = 0; r < kRowsTogether; ++r) {
          float w[4];
          Kind::template widen<j>(bytes[r], w);
          for (int t = 0; t < T; ++t) {
            float& sum = parts[r][t][j / (kFours / kParts)];
            sum = fmaf(w[0], meets[t].x, sum);
            sum = fmaf(w[1], meets[t].y, sum);
            sum = fmaf(w[2], meets[t].z, sum);
            sum = fmaf(w[3], meets[t].w, sum);
          }
        }
      });
      for (int r = 0; r < kRowsTogether; ++r)
        for (int t = 0; t < T; ++t)
          for (int p = 0; p < kParts; ++p)
            sums[r][t] = Kind::kScaled
                             ? fmaf(parts[r][t][p], factor[r][p], sums[r][t])
                             : sums[r][t] + parts[r][t][p];
    }
    for (int r = 0; r < kRowsTogether; ++r) {
      const int n = first + r, k = n >> shift, m = n & shift;
      for (int t = 0; t < T; ++t) {
        float sum = sums[r][t];
        for (int by = kLanes / 2; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
        if (lane == 0 && n < all && first_token + t < work.tokens)
          work.out[int64_t(m * work.tokens + first_token + t) * work.rows + k] =
              sum * work.step;
      }
    }
  }
}

template <class Kind, int T>
ffi::Error launch(cudaStream_t stream, const Work& work, int first_token) {
  const int steps = divide_up(work.row_bytes / 16, kLanes);
  const int shared = T * steps * Kind::kFours * kLanes * sizeof(float4);
  auto* kernel = project_rows<Kind, T>;
  int device = 0, processors = 0, fit = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, kLanes * kWarps, shared);
  const int blocks = divide_up(work.rows * work.matrices, kRowsTogether * kWarps);
  const int grid = std::min(blocks, processors * std::max(1, fit));
  kernel<<<grid, kLanes * kWarps, shared, stream>>>(work, first_token);
  return launched();
}

// As many tokens at once as shared memory holds.
template <class Kind>
ffi::Error project_all(cudaStream_t stream, const Work& work) {
  const int steps = divide_up(work.row_bytes / 16, kLanes);
  const int most = shared_bytes() / (steps * Kind::kFours * kLanes * int(sizeof(float4)));
  if (most < 1) return ffi::Error::InvalidArgument("rows are too long");
  for (int t = 0; t < work.tokens;) {
    const int left = std::min(work.tokens - t, most);
    ffi::Error error = ffi::Error::Success();
    if (left >= 5 && most >= 8) {
      error = launch<Kind, 8>(stream, work, t), t += 8;
    } else if (left >= 3 && most >= 4) {
      error = launch<Kind, 4>(stream, work, t), t += 4;
    } else if (left >= 2) {
      error = launch<Kind, 2>(stream, work, t), t += 2;
    } else {
      error = launch<Kind, 1>(stream, work, t), t += 1;
    }
    if (error.failure()) return error;
  }
  return ffi::Error::Success();
}

// out[m][t][k] of `matrices` rows that lie one behind the other in each record.
ffi::Error project(cudaStream_t stream, Matrix x, ffi::AnyBuffer records,
                   Scales scales, Ids slots, Ids ids,
                   ffi::Result<Rows> out, float step, bool tensor) {
  const auto record = records.dimensions();
  const int64_t matrices = out->dimensions()[0];
  const int64_t record_bytes = records.size_bytes() / std::max<int64_t>(1, record[0]);
  const int64_t width = x.dimensions()[1];
  if (matrices > 2) return ffi::Error::InvalidArgument("one or two matrices wanted");
  return for_kind(records.element_type(), [&](auto kind) {
    using Kind = decltype(kind);
    const int64_t groups = std::max<int64_t>(1, scales.dimensions()[2]);
    const Work work = {
        x.typed_data(),
        static_cast<const uint8_t*>(records.untyped_data()),
        reinterpret_cast<const __half*>(scales.untyped_data()),
        out->typed_data(),
        Picked(slots, record[0]),
        Picked(ids, scales.dimensions()[0]),
        record_bytes,
        int(x.dimensions()[0]),
        int(width),
        int(out->dimensions()[2]),
        int(matrices),
        int(width * 4 / Kind::kFours),
        int(groups),
        bits_of(width / groups),
        int(scales.dimensions()[1]),
        step,
    };
    if (!tensor) return project_all<Kind>(stream, work);
    if constexpr (kOnTensorCores<Kind>) return project_all_tiles<Kind>(stream, work);
    return ffi::Error::InvalidArgument("tensor cores take codes and bfloat16");
  });
}

}  // namespace m2jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_cuda_project, m2jax::project,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<m2jax::Matrix>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<m2jax::Scales>()
                                  .Arg<m2jax::Ids>()
                                  .Arg<m2jax::Ids>()
                                  .Ret<m2jax::Rows>()
                                  .Attr<float>("step")
                                  .Attr<bool>("tensor"),
                              m2jax::kTraits);
