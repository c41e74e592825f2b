// Work shared by XLA's own threads. The caller takes part and waits only for blocks
// that somebody has begun, so a busy pool delays nothing and nobody waits for ever.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace m2jax {

struct Shared {
  std::function<void(int64_t)> work;
  int64_t blocks;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};

  void take_part() {
    for (int64_t block; (block = next.fetch_add(1)) < blocks;) {
      work(block);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

inline void parallel(xla::ffi::ThreadPool& pool, int64_t blocks,
                     std::function<void(int64_t)> work) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), blocks) - 1;
  if (helpers < 1) {
    for (int64_t block = 0; block < blocks; ++block) work(block);
    return;
  }
  auto shared = std::make_shared<Shared>();
  shared->work = std::move(work);
  shared->blocks = blocks;
  for (int64_t helper = 0; helper < helpers; ++helper)
    pool.Schedule([shared] { shared->take_part(); });
  shared->take_part();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < blocks;)
    if (++spins > 1000) std::this_thread::yield();
}

}  // namespace m2jax
