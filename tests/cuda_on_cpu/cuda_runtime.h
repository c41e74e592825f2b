// As much of CUDA's header as the kernels use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "device.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }

inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float __fmul_rn(float a, float b) { return a * b; }

// Byte i is the one of x (0 to 3) and y (4 to 7) that nibble i of `pick` names.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t pick) {
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = pick >> 4 * i & 7, word = which < 4 ? x : y;
    picked |= (word >> which % 4 * 8 & 0xFF) << 8 * i;
  }
  return picked;
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

inline int atomicAdd(int* to, int value) { return std::exchange(*to, *to + value); }

inline uint32_t atomicOr(uint32_t* to, uint32_t bits) {
  return std::exchange(*to, *to | bits);
}

inline void __syncthreads() { emulated::wait(emulated::kAtBlockBarrier); }

inline void __syncwarp() { emulated::wait(emulated::kAtWarpBarrier); }

inline float __shfl_xor_sync(unsigned mask, float value, int by) {
  // Two, in turn: the next shuffle begins before the last thread has read this one's.
  static float given[2][emulated::kMostThreads];
  if (mask != ~0u) emulated::fail("a shuffle of some lanes");
  const int self = emulated::device.running;
  float* turn = given[emulated::device.fibers[self].shuffles++ % 2];
  turn[self] = value;
  emulated::wait(emulated::kAtWarpBarrier);
  return turn[self ^ by];
}

template <class T>
T __ldcs(const T* from) {
  const auto begin = reinterpret_cast<uintptr_t>(from), end = begin + sizeof(T);
  if (begin % sizeof(T)) emulated::fail("misaligned address");
  for (const auto& [low, high] : emulated::device.readable)
    if (low <= begin && end <= high) return *from;
  emulated::fail("an illegal memory access was encountered");
  return {};
}

using cudaStream_t = void*;
using cudaError_t = const char*;
constexpr cudaError_t cudaSuccess = nullptr;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};

inline cudaError_t cudaGetLastError() {
  return std::exchange(emulated::device.error, nullptr);
}
inline const char* cudaGetErrorString(cudaError_t error) { return error; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Two processors of one block each: soon a grid is too small for all rows at once.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? 2 : emulated::device.most_shared;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int,
                                                          size_t) {
  *blocks = 1;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulated::device.most_shared) emulated::fail("invalid argument");
  emulated::device.shared_of[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}
