// Rows of host memory that the device may read: over the link goes what is wanted, and
// no core gathers it first.
#include "products.cuh"

namespace m2jax {

using Address = ffi::Buffer<ffi::U32, 1>;

constexpr int kThreads = 128;

// out[m] = the ids[m]-th row; an id that is no row is left out, as it lies.
__global__ void __launch_bounds__(kThreads)
    copy_rows(const uint32_t* address, const int32_t* ids, uint4* out,
              const int64_t row_words, const int64_t rows) {
  const int64_t m = blockIdx.x, id = ids[m];
  if (id < 0 || id >= rows) return;
  const uint64_t base = uint64_t(address[1]) << 32 | address[0];
  const uint4* from = reinterpret_cast<const uint4*>(base) + id * row_words;
  for (int64_t i = threadIdx.x; i < row_words; i += kThreads)
    out[m * row_words + i] = __ldcs(from + i);
}

ffi::Error rows_from_host(cudaStream_t stream, Address address, Ids ids,
                          ffi::Result<ffi::AnyBuffer> out, int64_t rows) {
  const int64_t count = ids.element_count();
  if (address.element_count() != 2)
    return ffi::Error::InvalidArgument("an address in two words wanted");
  if (out->size_bytes() % (count * sizeof(uint4)))
    return ffi::Error::InvalidArgument("rows of whole 16 bytes wanted");
  copy_rows<<<count, kThreads, 0, stream>>>(
      address.typed_data(), ids.typed_data(), static_cast<uint4*>(out->untyped_data()),
      int64_t(out->size_bytes() / (count * sizeof(uint4))), rows);
  return launched();
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
