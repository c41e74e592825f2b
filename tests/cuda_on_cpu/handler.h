// Handlers for XLA's CPU client: without a stream, one at a time, their results fenced.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "cuda_runtime.h"
#include "xla/ffi/api/ffi.h"

namespace emulated {

using xla::ffi::AnyBuffer;
inline std::mutex one_at_a_time;
// How often handlers were called; what they may read beside their arguments.
inline int64_t calls = 0;
inline std::pair<uintptr_t, uintptr_t> host_memory;

// What stands before and behind each result, to see who writes there.
constexpr int kFence = 128 << 10;

// A result in memory of our own between two fences, which the handler sees instead.
// An argument that lies in the same memory moves along.
class Fenced {
 public:
  Fenced(XLA_FFI_Buffer* result, const XLA_FFI_Args& args)
      : buffers_{result}, data_(result->data), size_(AnyBuffer(result).size_bytes()) {
    memory_.resize((2 * kFence + size_) / sizeof(Line) + 1);
    memset(memory_.data(), kPoison, memory_.size() * sizeof(Line));
    for (int64_t i = 0; i < args.size; ++i) {
      auto* argument = static_cast<XLA_FFI_Buffer*>(args.args[i]);
      if (size_ && argument->data == data_) buffers_.push_back(argument);
    }
    if (buffers_.size() > 1) memcpy(inside(), data_, size_);
    for (auto* buffer : buffers_) buffer->data = inside();
  }

  ~Fenced() {
    for (auto* buffer : buffers_) buffer->data = data_;
    if (size_) memcpy(data_, inside(), size_);
  }

  bool broken() {
    char* const behind = inside() + size_;
    for (int i = 1; i <= kFence; ++i)
      if (inside()[-i] != char(kPoison) || behind[i - 1] != char(kPoison)) return true;
    return false;
  }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };

  char* inside() { return reinterpret_cast<char*>(memory_.data()) + kFence; }

  std::vector<Line> memory_;
  std::vector<XLA_FFI_Buffer*> buffers_;
  void* data_;
  size_t size_;
};

inline XLA_FFI_Error* call(XLA_FFI_Handler* handler, XLA_FFI_CallFrame* frame) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  std::vector<std::unique_ptr<Fenced>> results;
  for (int64_t i = 0; i < frame->rets.size; ++i) {
    auto* result = static_cast<XLA_FFI_Buffer*>(frame->rets.rets[i]);
    results.push_back(std::make_unique<Fenced>(result, frame->args));
  }
  device.readable = {host_memory};
  for (int64_t i = 0; i < frame->args.size; ++i) {
    const AnyBuffer buffer(static_cast<XLA_FFI_Buffer*>(frame->args.args[i]));
    const auto begin = reinterpret_cast<uintptr_t>(buffer.untyped_data());
    device.readable.push_back({begin, begin + buffer.size_bytes()});
  }
  if (!results.empty()) ++calls;
  XLA_FFI_Error* error = handler(frame);
  for (auto& result : results) {
    if (error || !result->broken()) continue;
    XLA_FFI_Error_Create_Args about = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr,
                                       "a write outside of a result",
                                       XLA_FFI_Error_Code_INTERNAL};
    error = frame->api->XLA_FFI_Error_Create(&about);
  }
  return error;
}

// The handler without the stream that only a GPU has.
template <auto kHandler>
struct OnCpu;

template <class... A, xla::ffi::Error (*kHandler)(cudaStream_t, A...)>
struct OnCpu<kHandler> {
  static xla::ffi::Error call(A... arguments) { return kHandler(nullptr, arguments...); }
};

}  // namespace emulated

#define EMULATED_HANDLER(symbol, work, ...)                                        \
  extern "C" XLA_FFI_Error* symbol(XLA_FFI_CallFrame* frame) {                     \
    XLA_FFI_DEFINE_HANDLER(handler, emulated::OnCpu<work>::call, __VA_ARGS__);     \
    return emulated::call(handler, frame);                                         \
  }                                                                                \
  static_assert(true)

extern "C" {
__attribute__((used)) inline void emulated_most_shared(int bytes) {
  emulated::device.most_shared = bytes;
}
__attribute__((used)) inline int64_t emulated_calls() { return emulated::calls; }
__attribute__((used)) inline int64_t emulated_products() {
  return emulated::device.products;
}
__attribute__((used)) inline void emulated_host_memory(uintptr_t begin, int64_t bytes) {
  emulated::host_memory = {begin, begin + bytes};
}
}
