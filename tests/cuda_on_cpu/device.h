// A device on one core: blocks run one after the other, the threads of a block as fibers
// that meet at barriers. What a GPU would leave undefined ends in an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <utility>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulated {

constexpr int kLanes = 32, kMostThreads = 1024;
constexpr int kStackBytes = 64 << 10;
constexpr int kUsualShared = 48 << 10;
// What shared memory holds before someone writes there: NaN as a float. Past its end the
// same, to see who writes there.
constexpr int kPoison = 0xFF, kMargin = 64;

enum State { kRuns, kAtWarpBarrier, kAtBlockBarrier, kDone };

struct Fiber {
  jmp_buf at;
  State state = kDone;
  bool started = false;
  unsigned shuffles = 0;
  std::unique_ptr<char[]> stack;
};

struct Device {
  Fiber fibers[kMostThreads];
  jmp_buf scheduler;
  ucontext_t first;
  void (*work)(void*) = nullptr;
  void* arguments = nullptr;
  int running = 0, threads = 0;
  std::vector<char> shared;
  int most_shared = 227 << 10;
  uint64_t blocks = 0;
  // Of tensor cores, counted by lane.
  int64_t products = 0;
  // By kernel: what it may ask for.
  std::map<const void*, int> shared_of;
  const char* error = nullptr;
  // Memory that a streaming read may touch, as [begin, end).
  std::vector<std::pair<uintptr_t, uintptr_t>> readable;
};
inline Device device;

inline void fail(const char* what) {
  if (!device.error) device.error = what;
}

// Opaque, so that no register holds what another thread may have changed.
__attribute__((noinline)) inline void wait(State state) {
  Fiber& self = device.fibers[device.running];
  self.state = state;
  if (!_setjmp(self.at)) _longjmp(device.scheduler, 1);
  asm volatile("" ::: "memory");
}

// A fiber takes one thread after another, so it is made once.
inline void live() {
  for (;;) {
    device.work(device.arguments);
    wait(kDone);
  }
}

__attribute__((noinline)) inline void resume(int thread) {
  Fiber& fiber = device.fibers[thread];
  device.running = thread;
  threadIdx = {unsigned(thread), 0, 0};
  fiber.state = kRuns;
  if (_setjmp(device.scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  fiber.stack.reset(new char[kStackBytes]);
  getcontext(&device.first);
  device.first.uc_stack.ss_sp = fiber.stack.get();
  device.first.uc_stack.ss_size = kStackBytes;
  device.first.uc_link = nullptr;
  makecontext(&device.first, live, 0);
  setcontext(&device.first);
}

// Each of the warp's threads as far as the block's barrier or its end.
inline void run_warp(int begin, int end, bool backwards) {
  for (;;) {
    int at_warp = 0, elsewhere = 0;
    for (int i = begin; i < end; ++i) {
      const int thread = backwards ? begin + end - 1 - i : i;
      if (device.fibers[thread].state == kRuns) resume(thread);
    }
    for (int i = begin; i < end; ++i)
      (device.fibers[i].state == kAtWarpBarrier ? at_warp : elsewhere) += 1;
    if (!at_warp) return;
    if (elsewhere) fail("a shuffle that not all threads of a warp take part in");
    for (int i = begin; i < end; ++i)
      if (device.fibers[i].state == kAtWarpBarrier) device.fibers[i].state = kRuns;
  }
}

inline void run_block() {
  const int threads = device.threads;
  ++device.blocks;
  for (int i = 0; i < threads; ++i) {
    device.fibers[i].state = kRuns;
    device.fibers[i].shuffles = 0;
  }
  // Now the first thread is ahead, now the last: a missing barrier must show.
  for (bool backwards = device.blocks % 2;; backwards = !backwards) {
    const int warps = (threads + kLanes - 1) / kLanes;
    for (int i = 0; i < warps; ++i) {
      const int begin = (backwards ? warps - 1 - i : i) * kLanes;
      run_warp(begin, begin + kLanes < threads ? begin + kLanes : threads, backwards);
    }
    int waiting = 0;
    for (int i = 0; i < threads; ++i)
      if (device.fibers[i].state == kAtBlockBarrier) {
        device.fibers[i].state = kRuns;
        ++waiting;
      }
    if (!waiting) return;
    if (waiting < threads) fail("a barrier that not all threads of a block reach");
  }
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(device.shared.data());
}

// Memory of the block, by the place that asks for it.
template <class T, int kPlace>
T& static_shared() {
  static T memory;
  static uint64_t block = 0;
  if (block != device.blocks) {
    block = device.blocks;
    memset(&memory, kPoison, sizeof(T));
  }
  return memory;
}

template <class... P>
struct Launch {
  void (*kernel)(P...);
  dim3 grid, block;
  size_t shared;

  void operator()(std::decay_t<P>... arguments) const {
    const int threads = block.x;
    if (!grid.x || !grid.y || !grid.z || !threads || threads > kMostThreads ||
        block.y != 1 || block.z != 1)
      return fail("invalid configuration argument");
    const auto allowed = device.shared_of.find(reinterpret_cast<const void*>(kernel));
    if (int(shared) >
        (allowed == device.shared_of.end() ? kUsualShared : allowed->second))
      return fail("too much shared memory asked for");
    gridDim = grid, blockDim = block, device.threads = threads;
    const auto call = [&] { kernel(arguments...); };
    device.arguments = const_cast<void*>(static_cast<const void*>(&call));
    device.work = [](void* it) { (*static_cast<decltype(call)*>(it))(); };
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = {x, y, z};
          device.shared.assign(shared + kMargin, char(kPoison));
          run_block();
          for (int i = 0; i < kMargin; ++i)
            if (device.shared[shared + i] != char(kPoison))
              return fail("a write past the end of shared memory");
        }
  }
};

template <class... P>
Launch<P...> launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, void*) {
  return {kernel, grid, block, shared};
}

}  // namespace emulated
