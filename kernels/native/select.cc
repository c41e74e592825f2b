// Who of each row scores best: only the scores at the ends of the classes are looked for.
#include "common.h"

namespace m2jax {
namespace {

using Marks = ffi::Buffer<ffi::S32, 2>;

// Of one row how many of the ends each score's place is below; ties to the lower one.
struct Levels {
  std::vector<int32_t> keys, rest, level;

  explicit Levels(int64_t count) : keys(count), rest(count), level(count) {}

  void find(const float* scores, const int32_t* ends, int64_t classes) {
    const int64_t count = int64_t(keys.size());
    for (int64_t i = 0; i < count; ++i) {
      // Order of the floats as order of integers; -0 is 0.
      int32_t bits;
      std::memcpy(&bits, scores + i, 4);
      keys[i] = scores[i] == 0 ? 0 : bits ^ ((bits >> 31) & 0x7fffffff);
    }
    rest = keys;
    std::fill(level.begin(), level.end(), 0);
    // From the last: the better ones of an end stand before it.
    int64_t before = count;
    for (int64_t c = classes - 1; c >= 0; --c) {
      const int64_t end = std::clamp<int64_t>(ends[c], 0, count);
      if (end == 0) break;
      if (end < before)
        std::nth_element(rest.begin(), rest.begin() + end - 1, rest.begin() + before,
                         std::greater<>());
      before = end;
      const int32_t least =
          end == count ? INT32_MIN : *std::min_element(rest.begin(), rest.begin() + end);
      int64_t room = end - std::count_if(rest.begin(), rest.begin() + end,
                                         [&](int32_t key) { return key > least; });
      for (int64_t i = 0; i < count; ++i)
        if (keys[i] > least || (keys[i] == least && room-- > 0)) ++level[i];
    }
  }
};

}  // namespace

ffi::Error levels(ffi::ThreadPool pool, Matrix scores, Ids ends, ffi::Result<Marks> found) {
  const int64_t count = scores.dimensions()[1], classes = ends.dimensions()[0];
  parallel(pool, scores.dimensions()[0], [&](int64_t row) {
    Levels of_row(count);
    of_row.find(scores.typed_data() + row * count, ends.typed_data(), classes);
    std::copy(of_row.level.begin(), of_row.level.end(), found->typed_data() + row * count);
  });
  return ffi::Error::Success();
}

// Class by class, ascending in each.
ffi::Error best(ffi::ThreadPool pool, Matrix scores, Ids ends, ffi::Result<Marks> ids) {
  const int64_t count = scores.dimensions()[1], classes = ends.dimensions()[0];
  parallel(pool, scores.dimensions()[0], [&](int64_t row) {
    Levels of_row(count);
    of_row.find(scores.typed_data() + row * count, ends.typed_data(), classes);
    std::vector<int64_t> place(classes + 1);
    for (int64_t c = 1; c < classes; ++c) place[c] = ends.typed_data()[c - 1];
    int32_t* to = ids->typed_data() + row * ids->dimensions()[1];
    for (int64_t i = 0; i < count; ++i)
      if (of_row.level[i]) to[place[classes - of_row.level[i]]++] = int32_t(i);
  });
  return ffi::Error::Success();
}

}  // namespace m2jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    m2jax_levels, m2jax::levels,
    M2JAX_POOL.Arg<m2jax::Matrix>().Arg<m2jax::Ids>().Ret<m2jax::Marks>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    m2jax_best, m2jax::best,
    M2JAX_POOL.Arg<m2jax::Matrix>().Arg<m2jax::Ids>().Ret<m2jax::Marks>());
