// The whole block for one token, every neuron at the same precision.
#include <cmath>

#include "common.h"
#include "octets.h"

namespace m2jax {

// kind: a place in `sparse_swiglu.activation.ACTIVATIONS`.
float activate(int64_t kind, float gate) {
  if (kind == 0) return gate / (1 + std::exp(-gate));
  if (kind == 1) return gate > 0 || std::isnan(gate) ? gate : 0;
  return 0.5f * gate * (1 + std::erf(gate * float(M_SQRT1_2)));
}

// Planes of all neurons of a layer.
struct Layer {
  const uint8_t *q4, *r4;  // r4: with the other four bits, or none
  const uint16_t* scales;
  int64_t rows, record, kinds, width, groups;

  int64_t half() const { return width / 2; }
  // Matrix m of neuron n, or of the last one: gate, up, down.
  int64_t at(int64_t n, int64_t m) const {
    return std::min(n, rows - 1) * record + m * half();
  }
  const uint16_t* scales_of(int64_t n, int64_t m) const {
    return scales + (n * kinds + m) * groups;
  }
};

// A task's scratch, and what it does with each plane.
template <int kGroup>
class ByPlanes {
 public:
  using Rounded = ByteActivations;

  ByPlanes(const Layer& layer, const Rounded& a)
      : layer_(layer), a_(a), room_(a.steps.size()), wide_(room_),
        factors_(kRowsAdded * room_) {
    planes_.push_back({layer.q4, 16, simd::Array<float>(room_)});
    if (layer.r4) planes_.push_back({layer.r4, 1, simd::Array<float>(room_)});
  }

  // Gate and up of neuron n.
  void project(int64_t n, float* sums) {
    sums[0] = sums[1] = 0;
    for (const Plane& plane : planes_)
      for (int m = 0; m < 2; ++m) {
        widen_scales(layer_.scales_of(n, m), layer_.groups, plane.step, wide_.data());
        float some;
        row_times<kGroup, 1>(plane.first + layer_.at(n, m),
                             plane.first + layer_.at(n + kRowsAdded, m), wide_.data(),
                             &a_, factors_.data(), &some);
        sums[m] += some;
      }
  }

  // part += sum of kRowsAdded columns from that of neuron n on, none behind `last`.
  void add(int64_t n, int64_t last, const float* h, float* part) {
    for (Plane& plane : planes_) {
      const uint8_t *now[kRowsAdded], *ahead[kRowsAdded];
      for (int64_t r = 0; r < kRowsAdded; ++r) {
        const int64_t own = std::min(n + r, last);
        now[r] = plane.first + layer_.at(own, 2);
        ahead[r] = plane.first + layer_.at(own + kRowsAdded, 2);
        widen_scales(layer_.scales_of(own, 2), layer_.groups, plane.step * h[r],
                     factors_.data() + r * room_);
      }
      add_rows<kGroup>(now, ahead, factors_.data(), room_, layer_.half(), part,
                       plane.offset.data());
    }
  }

  void end(float* part) const {
    for (const Plane& plane : planes_)
      take_off_zero(kZero, plane.offset.data(), layer_.groups, kGroup, part);
  }

 private:
  struct Plane {
    const uint8_t* first;
    float step;
    simd::Array<float> offset;
  };
  const Layer& layer_;
  const Rounded& a_;
  int64_t room_;
  simd::Array<float> wide_, factors_;
  std::vector<Plane> planes_;
};

// The same for both planes in one pass.
template <int kGroup>
class InOctets {
 public:
  using Rounded = WordActivations;

  InOctets(const Layer& layer, const Rounded& a)
      : layer_(layer), a_(a), room_(a.steps.size()), wide_(room_),
        factors_(kRowsAdded * room_), offset_(room_) {}

  void project(int64_t n, float* sums) {
    for (int m = 0; m < 2; ++m) {
      widen_scales(layer_.scales_of(n, m), layer_.groups, 1, wide_.data());
      row_times<kGroup, 1>(octets(n, m), wide_.data(), &a_, factors_.data(), sums + m);
    }
  }

  void add(int64_t n, int64_t last, const float* h, float* part) {
    Octets rows[kRowsAdded];
    for (int64_t r = 0; r < kRowsAdded; ++r) {
      const int64_t own = std::min(n + r, last);
      rows[r] = octets(own, 2);
      widen_scales(layer_.scales_of(own, 2), layer_.groups, h[r],
                   factors_.data() + r * room_);
    }
    add_rows<kGroup>(rows, factors_.data(), room_, layer_.half(), part, offset_.data());
  }

  void end(float* part) const {
    take_off_zero(kBothZero, offset_.data(), layer_.groups, kGroup, part);
  }

 private:
  Octets octets(int64_t n, int64_t m) const {
    const int64_t now = layer_.at(n, m), ahead = layer_.at(n + kRowsAdded, m);
    return {layer_.q4 + now, layer_.r4 + now, layer_.q4 + ahead, layer_.r4 + ahead};
  }

  const Layer& layer_;
  const Rounded& a_;
  int64_t room_;
  simd::Array<float> wide_, factors_, offset_;
};

// y = sum_n act(gate_n) up_n down_n. Each record is read once, from end to end, which
// memory likes best.
template <class Pass>
void whole(ffi::ThreadPool& pool, const float* x, const Layer& layer, int64_t kind,
           float* y) {
  const int64_t width = layer.width, blocks = divide_up(layer.rows, kSumRows);
  const typename Pass::Rounded a(x, width, width / layer.groups);
  simd::Array<float> parts(blocks * width);
  parallel(pool, blocks, [&](int64_t block) {
    Pass pass(layer, a);
    float* part = parts.data() + block * width;
    const int64_t end = std::min(layer.rows, (block + 1) * kSumRows);
    for (int64_t first = block * kSumRows; first < end; first += kRowsAdded) {
      float h[kRowsAdded] = {};
      for (int64_t r = 0; r < std::min<int64_t>(kRowsAdded, end - first); ++r) {
        float sums[2];
        pass.project(first + r, sums);
        h[r] = activate(kind, sums[0]) * sums[1];
      }
      pass.add(first, end - 1, h, part);
    }
    pass.end(part);
  });
  add_up(parts, width, y);
}

ffi::Error swiglu_nibbles(ffi::ThreadPool pool, Matrix x, Records q4, Records r4,
                          Scales scales, ffi::Result<Matrix> y, int64_t activation) {
  const Layer layer{
      .q4 = q4.typed_data(),
      .r4 = r4.element_count() ? r4.typed_data() : nullptr,
      .scales = reinterpret_cast<const uint16_t*>(scales.untyped_data()),
      .rows = q4.dimensions()[0],
      .record = q4.dimensions()[1],
      .kinds = scales.dimensions()[1],
      .width = x.dimensions()[1],
      .groups = scales.dimensions()[2]};
  return for_group(layer.width / layer.groups, [&](auto group) {
    if constexpr (kInOctets<group>)
      if (layer.r4)
        return whole<InOctets<group>>(pool, x.typed_data(), layer, activation,
                                      y->typed_data());
    whole<ByPlanes<group>>(pool, x.typed_data(), layer, activation, y->typed_data());
  });
}

}  // namespace m2jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_swiglu_nibbles, m2jax::swiglu_nibbles,
                              M2JAX_POOL.Arg<m2jax::Matrix>()
                                  .Arg<m2jax::Records>()
                                  .Arg<m2jax::Records>()
                                  .Arg<m2jax::Scales>()
                                  .Ret<m2jax::Matrix>()
                                  .Attr<int64_t>("activation"));
