// Vectors of the widest registers that the compiler may use, by its own vector
// extension. Only what that cannot say is written per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "array.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace simd {

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define M2JAX_AVX512 1
constexpr int kBytes = 64;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define M2JAX_AVX2 1
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;
// Tile registers; without them blocks of tokens meet codes as words (`words.h`).
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define M2JAX_AMX 1
#elif M2JAX_AVX512 || M2JAX_AVX2
#define M2JAX_WORDS 1
#endif
// Beside words, four products of bytes a lane in one step: for a few tokens (`bytes.h`).
#if M2JAX_WORDS && M2JAX_AVX512 && defined(__AVX512VNNI__)
#define M2JAX_BYTES 1
#endif

typedef uint8_t Bytes __attribute__((vector_size(kBytes)));
typedef int8_t Signed __attribute__((vector_size(kBytes)));
typedef uint16_t Words __attribute__((vector_size(kBytes)));
typedef int16_t SignedWords __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef float Floats __attribute__((vector_size(kBytes)));

template <class V>
inline V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class V>
inline void store(void* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

inline Floats splat(float value) { return value - Floats{}; }
// Stays in a register: as an operand in memory it is loaded anew at every use, and loads
// are what products of a few tokens wait for.
template <class V>
inline V held(V value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__AVX__)
  asm("" : "+x"(value));
#endif
  return value;
}
inline Floats to_float(Ints value) {
  return __builtin_convertvector(value, Floats);
}

#if M2JAX_WORDS
// Rounded to words, as many as a register has lanes.
inline void to_words(int16_t* to, Floats value) {
#if M2JAX_AVX512
  const __m256i words = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)value));
  _mm256_storeu_si256((__m256i*)to, words);
#else
  const __m256i ints = _mm256_cvtps_epi32((__m256)value);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(ints),
                                        _mm256_extracti128_si256(ints, 1));
  _mm_storeu_si128((__m128i*)to, words);
#endif
}
#endif

// sum[l] + a[4 l] b[4 l] + .. + a[4 l + 3] b[4 l + 3]; a at most 15.
inline Ints dot4(Ints sum, Bytes a, Signed b) {
#if M2JAX_AVX512 && defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif M2JAX_AVX2 && defined(__AVXVNNI__)
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__ARM_FEATURE_DOTPROD)
  return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)a, (int8x16_t)b);
#else
  for (int lane = 0; lane < kLanes; ++lane)
    for (int byte = 4 * lane; byte < 4 * lane + 4; ++byte)
      sum[lane] += int32_t{a[byte]} * int32_t{b[byte]};
  return sum;
#endif
}

// Registers whose products of bytes are added faster when there are several: sums of two
// products have 16 bits, and take part in one step to 32 bits. Eight would still fit.
#if (M2JAX_AVX512 && !defined(__AVX512VNNI__)) || (M2JAX_AVX2 && !defined(__AVXVNNI__))
constexpr int kTogether = 4;
#else
constexpr int kTogether = 1;
#endif

// dot4 of kCount registers with 65536 hi + 256 mid + lo.
template <int kCount>
inline Ints dot4(const Bytes* a, const int8_t* hi, const int8_t* mid, const int8_t* lo) {
#if M2JAX_AVX512 && !defined(__AVX512VNNI__)
  const auto times = [&](const int8_t* b, int16_t by) {
    __m512i sum = _mm512_maddubs_epi16((__m512i)a[0], load<__m512i>(b));
    for (int i = 1; i < kCount; ++i)
      sum = _mm512_add_epi16(
          sum, _mm512_maddubs_epi16((__m512i)a[i], load<__m512i>(b + i * kBytes)));
    return (Ints)_mm512_madd_epi16(sum, _mm512_set1_epi16(by));
  };
  return (times(hi, 256) << 8) + times(mid, 256) + times(lo, 1);
#elif M2JAX_AVX2 && !defined(__AVXVNNI__)
  const auto times = [&](const int8_t* b, int16_t by) {
    __m256i sum = _mm256_maddubs_epi16((__m256i)a[0], load<__m256i>(b));
    for (int i = 1; i < kCount; ++i)
      sum = _mm256_add_epi16(
          sum, _mm256_maddubs_epi16((__m256i)a[i], load<__m256i>(b + i * kBytes)));
    return (Ints)_mm256_madd_epi16(sum, _mm256_set1_epi16(by));
  };
  return (times(hi, 256) << 8) + times(mid, 256) + times(lo, 1);
#else
  Ints sum{};
  for (const int8_t* part : {hi, mid, lo}) {
    sum <<= 8;
    for (int i = 0; i < kCount; ++i)
      sum = dot4(sum, a[i], load<Signed>(part + i * kBytes));
  }
  return sum;
#endif
}

// sum[l] + a[2 l] b[2 l] + a[2 l + 1] b[2 l + 1]; on NEON of other words, as many a lane.
inline Ints dot2(Ints sum, Words a, SignedWords b) {
#if M2JAX_AVX512 && defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif M2JAX_AVX512
  return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif M2JAX_AVX2 && defined(__AVXVNNI__)
  return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif M2JAX_AVX2
  return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__aarch64__)
  const int16x8_t words = vreinterpretq_s16_u16((uint16x8_t)a);
  const int32x4_t low =
      vmlal_s16((int32x4_t)sum, vget_low_s16(words), vget_low_s16((int16x8_t)b));
  return (Ints)vmlal_high_s16(low, words, (int16x8_t)b);
#else
  for (int lane = 0; lane < kLanes; ++lane)
    for (int word = 2 * lane; word < 2 * lane + 2; ++word)
      sum[lane] += int32_t{a[word]} * int32_t{b[word]};
  return sum;
#endif
}

// By halves: in the same order whatever the compiler.
inline float sum_lanes(Floats value) {
#if M2JAX_AVX512
  const __m512 all = (__m512)value;
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all),
                               (__m256)_mm512_extractf64x4_pd((__m512d)all, 1));
#elif M2JAX_AVX2
  __m256 eight = (__m256)value;
#endif
#if M2JAX_AVX512 || M2JAX_AVX2
  __m128 four =
      _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
#else
  return (value[0] + value[2]) + (value[1] + value[3]);
#endif
}

// As many bytes as a register has 32-bit lanes.
inline Ints from_bytes(const uint8_t* from) {
#if M2JAX_AVX512
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif M2JAX_AVX2
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  Ints value;
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = from[lane];
  return value;
#endif
}

inline Floats from_half(const uint16_t* from) {
#if M2JAX_AVX512
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif M2JAX_AVX2
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#elif defined(__aarch64__)
  return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#else
  Floats value;
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t half = from[lane];
    // Exponent and mantissa in place, then scaled by 2^112: subnormals come out too.
    uint32_t bits = (half & 0x7fff) << 13;
    float number;
    std::memcpy(&number, &bits, 4);
    number *= 0x1p112f;
    if ((half & 0x7c00) == 0x7c00) {
      bits |= 0x7f800000;
      std::memcpy(&number, &bits, 4);
    }
    value[lane] = half & 0x8000 ? -number : number;
  }
  return value;
#endif
}

inline Floats from_bfloat(const uint16_t* from) {
#if M2JAX_AVX512
  const __m256i bits = _mm256_loadu_si256((const __m256i*)from);
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif M2JAX_AVX2
  const __m128i bits = _mm_loadu_si128((const __m128i*)from);
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
  Ints value;
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = int32_t(from[lane]) << 16;
  return (Floats)value;
#endif
}

// factors[0] in the first kEach lanes, factors[1] in the next, and so on.
template <int kEach>
inline Floats spread(const float* factors) {
  if constexpr (kEach >= kLanes) return splat(*factors);
#if M2JAX_AVX512 && defined(__AVX512DQ__)
  if constexpr (kEach == 8)
    return (Floats)_mm512_insertf32x8(_mm512_set1_ps(factors[0]),
                                      _mm256_set1_ps(factors[1]), 1);
#endif
#if M2JAX_AVX512
  if constexpr (kEach == 4)
    return (Floats)_mm512_permutexvar_ps(
        _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
        _mm512_castps128_ps512(_mm_loadu_ps(factors)));
#elif M2JAX_AVX2
  if constexpr (kEach == 4)
    return (Floats)_mm256_permutevar8x32_ps(
        _mm256_castps128_ps256(_mm_castsi128_ps(_mm_loadl_epi64((__m128i*)factors))),
        _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
#endif
  Floats value{};
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = factors[lane / kEach];
  return value;
}

// As many floats as a register has bytes, in the order in which bytes widen fastest.
struct Spread {
  Floats parts[4];

  explicit Spread(const float* from) {
    for (int k = 0; k < 4; ++k) parts[k] = load<Floats>(from + k * kLanes);
    exchange<false>();
  }
  void store(float* to) {
    exchange<true>();
    for (int k = 0; k < 4; ++k) simd::store(to + k * kLanes, parts[k]);
  }
  // Adds factor times the bytes.
  void add(Bytes bytes, Floats factor) {
#if M2JAX_AVX2
    // Four bytes of each half register at a time.
    const auto quarter = [](int k) {
      const int at = 0x01010101 * 4 * k;
      const __m256i each = _mm256_setr_epi32(0x80808000, 0x80808001, 0x80808002,
                                             0x80808003, 0x80808000, 0x80808001,
                                             0x80808002, 0x80808003);
      return _mm256_add_epi32(each, _mm256_set1_epi32(at & 0xff));
    };
    for (int k = 0; k < 4; ++k) {
      const __m256i some = _mm256_shuffle_epi8((__m256i)bytes, quarter(k));
      parts[k] += factor * to_float((Ints)some);
    }
#else
    uint8_t each[kBytes];
    simd::store(each, bytes);
    for (int k = 0; k < 4; ++k)
      parts[k] += factor * to_float(from_bytes(each + k * kLanes));
#endif
  }

 private:
  template <bool kBack>
  void exchange() {
#if M2JAX_AVX2
    const auto lower = [](Floats a, Floats b) {
      return (Floats)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20);
    };
    const auto upper = [](Floats a, Floats b) {
      return (Floats)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31);
    };
    const Floats a = parts[0], b = parts[1], c = parts[2], d = parts[3];
    parts[0] = lower(a, kBack ? b : c);
    parts[1] = kBack ? lower(c, d) : upper(a, c);
    parts[2] = kBack ? upper(a, b) : lower(b, d);
    parts[3] = kBack ? upper(c, d) : upper(b, d);
#endif
  }
};

}  // namespace simd
