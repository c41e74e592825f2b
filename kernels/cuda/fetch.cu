// Rows of host memory that the device may read: over the link goes what is wanted, and
// no core gathers it first.
#include "products.cuh"

namespace m2jax {

using Address = ffi::Buffer<ffi::U32, 1>;

constexpr int kThreads = 128;

// out[places[m]] = the ids[m]-th row; without places, out[m]. An id that is no row is
// left out.
__global__ void __launch_bounds__(kThreads)
    copy_rows(const uint32_t* address, const int32_t* ids, const int32_t* places,
              uint4* out, const int row_pieces, const int rows, const int out_rows) {
  const int id = ids[blockIdx.x], place = places ? places[blockIdx.x] : blockIdx.x;
  if (id < 0 || id >= rows || place < 0 || place >= out_rows) return;
  const uint64_t base = uint64_t(address[1]) << 32 | address[0];
  const uint4* from = reinterpret_cast<const uint4*>(base) + int64_t(id) * row_pieces;
  uint4* to = out + int64_t(place) * row_pieces;
  for (int i = threadIdx.x; i < row_pieces; i += kThreads) to[i] = __ldcs(from + i);
}

ffi::Error copy(cudaStream_t stream, Address address, Ids ids, const int32_t* places,
                ffi::Result<ffi::AnyBuffer> out, int64_t rows) {
  const int64_t out_rows = out->dimensions()[0];
  const int64_t row_bytes = out->size_bytes() / std::max<int64_t>(1, out_rows);
  if (address.element_count() != 2 || row_bytes % sizeof(uint4))
    return ffi::Error::InvalidArgument("two words of address, rows of 16 bytes wanted");
  copy_rows<<<ids.element_count(), kThreads, 0, stream>>>(
      address.typed_data(), ids.typed_data(), places,
      static_cast<uint4*>(out->untyped_data()), int(row_bytes / sizeof(uint4)), int(rows),
      int(out_rows));
  return launched();
}

ffi::Error rows_from_host(cudaStream_t stream, Address address, Ids ids,
                          ffi::Result<ffi::AnyBuffer> out, int64_t rows) {
  return copy(stream, address, ids, nullptr, out, rows);
}

// The pool is the result's own memory.
ffi::Error fill_from_host(cudaStream_t stream, ffi::AnyBuffer pool, Address address,
                          Ids ids, Ids slots, ffi::Result<ffi::AnyBuffer> out,
                          int64_t rows) {
  if (pool.untyped_data() != out->untyped_data())
    return ffi::Error::Internal("the pool was copied");
  return copy(stream, address, ids, slots.typed_data(), out, rows);
}

}  // namespace m2jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_cuda_rows_from_host, m2jax::rows_from_host,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<m2jax::Address>()
                                  .Arg<m2jax::Ids>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("rows"),
                              m2jax::kTraits);

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_cuda_fill_from_host, m2jax::fill_from_host,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<m2jax::Address>()
                                  .Arg<m2jax::Ids>()
                                  .Arg<m2jax::Ids>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("rows"),
                              m2jax::kTraits);
