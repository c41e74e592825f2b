// Memory for vectors of the widest registers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace simd {

// Begins on a register's boundary: loads across two cache lines take twice as long. Much
// of it lies in huge pages where the system gives them: looking pages up takes longer
// than reading them in order, the more so on virtual machines.
template <class T>
struct Allocator {
  using value_type = T;
  Allocator() = default;
  template <class U>
  Allocator(const Allocator<U>&) {}
  static constexpr std::size_t kHuge = 2 << 20;
  static std::align_val_t alignment(std::size_t count) {
    return std::align_val_t(count * sizeof(T) < kHuge ? 64 : kHuge);
  }
  T* allocate(std::size_t count) {
    void* made = ::operator new(count * sizeof(T), alignment(count));
#if defined(__linux__)
    if (count * sizeof(T) >= kHuge) madvise(made, count * sizeof(T), MADV_HUGEPAGE);
#endif
    return static_cast<T*>(made);
  }
  void deallocate(T* at, std::size_t count) { ::operator delete(at, alignment(count)); }
  template <class U>
  bool operator==(const Allocator<U>&) const { return true; }
  template <class U>
  bool operator!=(const Allocator<U>&) const { return false; }
};
template <class T>
using Array = std::vector<T, Allocator<T>>;

// Memory that a thread keeps, for one purpose: fresh pages cost more than what is done
// with them. What it holds is left from before.
template <class T, int kPurpose = 0>
T* kept(int64_t count) {
  thread_local Array<T> array;
  if (int64_t(array.size()) < count) array.resize(count);
  return array.data();
}

}  // namespace simd
