// Weights of 4 and 8 bits in memory, and what stands beside their codes: shared by the products with them.
#pragma once
#include <algorithm>
#include <type_traits>

#include "vectors.h"

namespace {
constexpr int BLOCK = 32;     // inputs that have one scale, at most
constexpr int STRETCH = 64;   // blocks whose scales are made ready at a time
constexpr int OUTPUTS = 4;    // rows of W that one thread reads side by side
constexpr int ROWS = 4;       // rows of x for which a code is made ready once
constexpr int AHEAD = 4096;   // bytes of codes that are asked for early
struct fp16 {
  uint16_t bits;
};
struct e8m0 {  // 2^(bits - 127); the codes beside such scales are e2m1
  uint8_t bits;
};
template <class S> constexpr bool IS_E2M1 = std::is_same<S, e8m0>::value;

inline void put(float* to, float x) { *to = x; }
inline void put(bf16* to, float x) {  // to nearest, ties to even
  const uint32_t bits = to_bits(x);
  to->bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline void numbers(const float* from, float* to, int64_t n) { std::copy(from, from + n, to); }
inline void numbers(const fp16* from, float* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  for (; i < n; i++) to[i] = _cvtsh_ss(from[i].bits);
#endif
  for (; i < n; i++) {  // the exponent is moved and multiplied into place, which also holds for denormals
    const uint32_t sign = (uint32_t)(from[i].bits & 0x8000) << 16;
    const float value = from_bits((uint32_t)(from[i].bits & 0x7fff) << 13);
    const bool is_finite = (from[i].bits & 0x7c00) != 0x7c00;
    to[i] = from_bits(to_bits(is_finite ? value * 0x1p112f : value + __builtin_inff()) | sign);
  }
}
inline void numbers(const e8m0* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = from_bits((uint32_t)from[i].bits << 23);
}

template <class S> struct Weight {
  const uint8_t* codes;  // "int4", "e2m1": inputs i and i + 16 of 32 in a byte; "int8": as they are
  const S* scale;        // [outputs, groups]
  const S* low;          // what code 0 stands for, or null
  const int8_t* zero;    // what is taken off a code, or null
  int64_t outputs, inputs, groups;
};

// Of n groups of an output: W = (code - zero) * scale + low. An "int4" code of 8 is 0 where there is no `low`.
template <int BITS, class S>
inline void read_groups(const Weight<S>& w, int64_t output, int64_t first, int64_t n, float* scale, float* zero,
                        float* low) {
  const int64_t place = output * w.groups + first;
  numbers(w.scale + place, scale, n);
  std::fill(zero, zero + n, BITS == 4 && !w.low && !IS_E2M1<S> ? 8 : 0);
  if (w.low)
    numbers(w.low + place, low, n);
  else
    std::fill(low, low + n, 0);
  for (int64_t g = 0; w.zero && g < n; g++) zero[g] += w.zero[place + g];
}

// By blocks of `block` inputs, of which a group has one or more, scales and what a code of no bits stands for.
template <int BITS, class S>
inline void read_blocks(const Weight<S>& w, int64_t output, int64_t block, int64_t first, int64_t n, float* scale,
                        float* low) {
  const int64_t per_group = w.inputs / w.groups / block;
  float zero[STRETCH + 1];
  if (per_group == 1) {
    read_groups<BITS>(w, output, first, n, scale, zero, low);
    for (int64_t b = 0; b < n; b++) low[b] -= zero[b] * scale[b];
    return;
  }
  float group_scale[STRETCH + 1], group_low[STRETCH + 1];
  const int64_t begin = first / per_group, end = (first + n - 1) / per_group + 1;
  read_groups<BITS>(w, output, begin, end - begin, group_scale, zero, group_low);
  for (int64_t b = 0; b < n; b++) {
    const int64_t g = (first + b) / per_group - begin;
    scale[b] = group_scale[g], low[b] = group_low[g] - zero[g] * scale[b];
  }
}

template <class T> inline void load_or_zeros(const uint8_t* p, int64_t bytes, T& to) {
  if (bytes >= (int64_t)sizeof(T)) {
    std::memcpy(&to, p, sizeof(T));
  } else {
    to = T{};
#ifdef __AVX512F__
    if (sizeof(T) == 64 && bytes % 4 == 0) {
      const __m512i some = _mm512_maskz_loadu_epi32((1 << bytes / 4) - 1, p);
      std::memcpy(&to, &some, sizeof(T));
      return;
    }
#endif
    std::memcpy(&to, p, bytes);
  }
}

// Of vector PART of those that the W lanes of x are for, PER lanes each: lane l becomes what its lane of x was.
template <int PER, int PART, int... I> inline f32 spread(f32 x, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(x, x, ((PART * W + I) / PER)...);
#else
  return __builtin_shuffle(x, i32{((PART * W + I) / PER)...});
#endif
}
}  // namespace
