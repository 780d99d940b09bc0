// What the CPU kernels share: the compiler's generic vectors, as wide as the machine's registers, and numbers of 16 bits.
//
// One source for AVX-512, AVX2 and NEON. A vector has W floats.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {
#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int SMALL = 16384;  // elements that one thread handles sooner than several can be woken

typedef float f32 __attribute__((vector_size(4 * W)));
typedef int32_t i32 __attribute__((vector_size(4 * W)));
typedef uint32_t u32 __attribute__((vector_size(4 * W)));
typedef uint16_t u16 __attribute__((vector_size(2 * W)));
typedef f32 f32_anywhere __attribute__((aligned(4), may_alias));
typedef u16 u16_anywhere __attribute__((aligned(2), may_alias));
struct bf16 {
  uint16_t bits;
};

inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float number(float x) { return x; }
inline float number(bf16 x) { return from_bits((uint32_t)x.bits << 16); }

inline f32 all(float x) { return x - f32{}; }  // which compilers know to be x, as + 0 is not of -0
inline f32 load(const float* p) { return *(const f32_anywhere*)p; }
inline f32 load(const bf16* p) { return (f32)(__builtin_convertvector((u16)*(const u16_anywhere*)p, u32) << 16); }
// sum + a * b, rounded once where the CPU has an instruction for it. Compilers are told not to make one of a sum and a
// product themselves: some do in one loop and not in the next, and then a row's bits depend on the rows beside it.
inline f32 plus_product(f32 sum, f32 a, f32 b) {
#if defined(__AVX512F__)
  return (f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
  return (f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__aarch64__)
  return (f32)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
  return sum + a * b;
#endif
}
// W bytes as integers, without a sign or with one. Compilers take a vector of bytes apart, so they are told.
inline i32 widen(const uint8_t* p) {
#if defined(__AVX512F__)
  return (i32)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (i32)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  i32 result;
  for (int i = 0; i < W; i++) result[i] = p[i];
  return result;
#endif
}
inline i32 widen(const int8_t* p) {
#if defined(__AVX512F__)
  return (i32)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (i32)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  i32 result;
  for (int i = 0; i < W; i++) result[i] = p[i];
  return result;
#endif
}
struct e4m3 {
  uint8_t bits;
};
inline f32 load(const int8_t* p) { return __builtin_convertvector(widen(p), f32); }
inline f32 load(const e4m3* p) {  // the exponent is multiplied into place, which also holds for denormals
  const u32 bits = (u32)widen(&p->bits);
  return (f32)((bits & 0x80) << 24 | (bits & 0x7f) << 20) * 0x1p120f;
}
inline u32 round_bits(f32 x) {  // the upper halves are bfloat16, to nearest, ties to even
  u32 bits = (u32)x;
  return bits + 0x7fff + ((bits >> 16) & 1);
}
inline void store(float* p, f32 x) { *(f32_anywhere*)p = x; }
inline void store(bf16* p, f32 x) { *(u16_anywhere*)p = __builtin_convertvector(round_bits(x) >> 16, u16); }
template <class T> f32 rounded(f32 x);
template <> inline f32 rounded<float>(f32 x) { return x; }
template <> inline f32 rounded<bf16>(f32 x) { return (f32)(round_bits(x) & 0xffff0000u); }

// The last vector of a row may be short: `left` elements, the other lanes 0.
template <class T> inline f32 load(const T* p, int64_t left) {
  if (left >= W) return load(p);
  T padded[W] = {};
  std::memcpy(padded, p, left * sizeof(T));
  return load(padded);
}
template <class T> inline void store(T* p, f32 x, int64_t left) {
  if (left >= W) return store(p, x);
  T padded[W];
  store(padded, x);
  std::memcpy(p, padded, left * sizeof(T));
}

// Interleaves a and b and adds the lower half to the upper: lanes a0 + a[W/2], b0 + b[W/2], a1 + a[W/2 + 1], ...
template <int... I> inline f32 fold(f32 a, f32 b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (I / 2 + I % 2 * W)...) +
         __builtin_shufflevector(a, b, (I / 2 + I % 2 * W + W / 2)...);
#else
  const i32 low = {(I / 2 + I % 2 * W)...}, high = low + W / 2;
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
#endif
}
inline f32 fold(f32 a, f32 b) { return fold(a, b, std::make_integer_sequence<int, W>()); }
inline float sum(f32 x) {
  for (int n = W; n > 1; n /= 2) x = fold(x, x);
  return x[0];
}
inline f32 sums(f32* x) {  // of W vectors, the sum of vector i in lane i
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] = fold(x[i], x[i + half]);
  return x[0];
}
inline f32 exponential(f32 x) {  // 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2], relative error < 2e-7; x clamped
  x = x < all(-87.0f) ? all(-87.0f) : x;
  x = x > all(88.0f) ? all(88.0f) : x;
  f32 scaled = x * 1.44269504f;
  i32 k = __builtin_convertvector(scaled + (scaled < 0.0f ? all(-0.5f) : all(0.5f)), i32);
  f32 n = __builtin_convertvector(k, f32);
  f32 r = plus_product(plus_product(x, n, all(-0.693359375f)), n, all(2.12194440e-4f));
  f32 y = plus_product(all(1.3981999507e-3f), all(1.9875691500e-4f), r);
  y = plus_product(all(8.3334519073e-3f), y, r);
  y = plus_product(all(4.1665795894e-2f), y, r);
  y = plus_product(all(1.6666665459e-1f), y, r);
  y = plus_product(all(5.0000001201e-1f), y, r);
  return (plus_product(r, y * r, r) + 1.0f) * (f32)((k + 127) << 23);
}
}  // namespace
