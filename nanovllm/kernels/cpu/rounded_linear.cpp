// Products of inputs rounded to 8 bits with weights of 4 and 8 bits on a CPU, in whole numbers: twins of
// `rounded_linear` in quantized_linear.py.
//
// x is rounded in blocks of 32 inputs, each with a scale: x' = q * scale(x). Of a block, sum(q * code) is exact; in
// float32 it is multiplied by both scales and added up.
//
// Rounding  x to q, to nearest, ties to even, as `round_rows` does; and that of the result.
// Order     A sum is of W lanes, block after block; it depends on the sizes alone: a row's bits are the same whatever
//           the other rows are, and however many.
// Sizes     Inputs are a multiple of 32; a group, which has a scale in float16, has 32 of them, or 16 ("int8").
// Vectors   Four products to a lane of 32 bits: in one instruction with VNNI, else in three with AVX2 or AVX-512.
#include <memory>

#include "quantized_weights.h"
#include "rows.h"

namespace {
constexpr int BYTES = 4 * W;  // in a vector
constexpr int LONG = 512;     // bytes

// --- four products to a lane ---------------------------------------------------------------

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr bool IS_SHIFTED = true;  // signed codes are taken without their sign, with 128 too much
inline i32 add_products(i32 sums, u32 codes, u32 x) {
  return (i32)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)x);
}
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
constexpr bool IS_SHIFTED = true;
inline i32 add_products(i32 sums, u32 codes, u32 x) {
  return (i32)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, (__m256i)x);
}
#elif defined(__AVX512BW__)
constexpr bool IS_SHIFTED = false;
inline i32 add_products(i32 sums, u32 codes, u32 x) {  // of two products, 16 bits hold the sum: 2 * 128 * 127
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)codes, (__m512i)x);
  return sums + (i32)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
inline i32 add_signed_products(i32 sums, u32 codes, u32 x) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i turned = _mm512_mask_sub_epi8((__m512i)x, _mm512_movepi8_mask((__m512i)codes), zero, (__m512i)x);
  return add_products(sums, (u32)_mm512_abs_epi8((__m512i)codes), (u32)turned);
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool IS_SHIFTED = false;
inline i32 add_products(i32 sums, u32 codes, u32 x) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, (__m256i)x);
  return sums + (i32)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
inline i32 add_signed_products(i32 sums, u32 codes, u32 x) {  // |code| times x with the sign of the code
  return add_products(sums, (u32)_mm256_abs_epi8((__m256i)codes),
                      (u32)_mm256_sign_epi8((__m256i)x, (__m256i)codes));
}
#else
constexpr bool IS_SHIFTED = false;
inline i32 add_signed_products(i32 sums, u32 codes, u32 x) {  // a byte at a time, its sign drawn out by shifts
  for (int shift = 24; shift >= 0; shift -= 8)
    sums += ((i32)(codes << shift) >> 24) * ((i32)(x << shift) >> 24);
  return sums;
}
inline i32 add_products(i32 sums, u32 codes, u32 x) { return add_signed_products(sums, codes, x); }  // below 128
#endif
#if (defined(__AVX512VNNI__) && defined(__AVX512BW__)) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
inline i32 add_signed_products(i32 less, u32 codes, u32 x) { return add_products(less, codes ^ 0x80808080u, x); }
#endif

// --- inputs --------------------------------------------------------------------------------

// A row of x in the order in which vectors of codes meet it, with zeros behind it.
struct Rounded {
  const int8_t* codes;
  const float* scales;  // by lane
  const i32* less;      // by lane, what signed codes have too much: null where nothing
  const float* sums;    // of a block of weights
};

// BITS of a code; SIZE inputs that a scale of weights is read for. A vector of codes is STEP inputs, and LANES of its
// lanes have one scale.
template <int BITS_, int SIZE_> struct Form {
  static constexpr int BITS = BITS_, SIZE = SIZE_, STEP = BYTES * 8 / BITS, LANES = BITS == 4 ? 4 : SIZE / 4;
  // Of inputs i .. i + 15, the place among the STEP of their vector: "int4" has both halves of its bytes in turn.
  static int64_t place(int64_t i) { return BITS == 4 ? i / 16 % 2 * BYTES + i / 32 * 16 : i; }
  static int64_t lane(int64_t i) { return place(i) % BYTES / 4; }
};

// Rounds 32 inputs to codes; returns their scale. NaN and infinity, in whose place nothing would tell, are in the scale.
template <class X> inline float round_block(const X* x, int8_t* codes) {
  uint32_t largest = 0;
  for (int i = 0; i < BLOCK; i++) largest = std::max(largest, to_bits(number(x[i])) & 0x7fffffffu);  // NaN is most
  const float found = from_bits(largest), scale = (found < 1e-12f ? 1e-12f : found) / 127.0f;
  for (int i = 0; i < BLOCK; i++) {
    const float scaled = number(x[i]) / scale;
    codes[i] = (int8_t)((scaled + 12582912.0f) - 12582912.0f);  // 1.5 * 2^23: what is added to it becomes whole
  }
  return scale;
}

template <class F, class X>
void round_row(const X* x, int64_t inputs, int8_t* codes, float* scales, i32* less, float* sums) {
  alignas(64) int8_t rounded[BLOCK];
  for (int64_t i = 0; i < inputs; i += BLOCK) {
    float scale = round_block(x + i, rounded);
    if (!(scale < __builtin_inff())) std::fill(rounded, rounded + BLOCK, 1);  // so that it is found in every sum
    for (int64_t half = 0; half < BLOCK; half += 16) {
      const int64_t step = (i + half) / F::STEP, in_step = (i + half) % F::STEP;
      std::memcpy(codes + step * F::STEP + F::place(in_step), rounded + half, 16);
      int total = 0;
      for (int64_t lane = 0; lane < 4; lane++) {
        int of_lane = 0;
        for (int64_t j = 0; j < 4; j++) of_lane += rounded[half + lane * 4 + j];
        scales[step * W + F::lane(in_step) + lane] = scale;
        if (F::BITS == 8 && IS_SHIFTED) less[step][F::lane(in_step) + lane] = -128 * of_lane;
        total += of_lane;
      }
      sums[(i + half) / F::SIZE] += (float)total * scale;
    }
  }
}

// --- products ------------------------------------------------------------------------------

inline u32 load_codes(const int8_t* p) {
  u32 codes;
  std::memcpy(&codes, p, BYTES);
  return codes;
}

// Scales from p on, `left` of them and then zeros.
inline f32 read_scales(const fp16* p, int64_t left) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return (f32)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(left >= W ? 0xffff : (1 << left) - 1, p));
#else
#if defined(__AVX2__) && defined(__F16C__) && !defined(__AVX512F__)
  if (left >= W) return (f32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
  float some[W] = {};
  numbers(p, some, std::min<int64_t>(W, left));
  return load(some);
#endif
}

// Adds vector `step` of codes of N outputs, for R rows of x; PART of those whose scales are in one vector. Of the last
// one, `left` bytes are there.
template <class F, int PART, bool IS_WHOLE, int N, int R>
[[gnu::always_inline]] inline void add_vector(const uint8_t* const (&codes)[N], const f32 (&scale)[N],
                                              const Rounded (&x)[R], int64_t step, int64_t left, f32 (&acc)[N][R]) {
  for (int n = 0; n < N; n++) {
    const uint8_t* p = codes[n] + step * BYTES;
    __builtin_prefetch(p + AHEAD);
    u32 bits;
    IS_WHOLE ? (void)std::memcpy(&bits, p, BYTES) : load_or_zeros(p, left, bits);
    const f32 scales = spread<F::LANES, PART>(scale[n], std::make_integer_sequence<int, W>());
    for (int r = 0; r < R; r++) {
      const int8_t* q = x[r].codes + step * F::STEP;
      i32 sums = {};
      if (F::BITS == 4) {
        sums = add_products(sums, bits & 0x0f0f0f0fu, load_codes(q));
        sums = add_products(sums, bits >> 4 & 0x0f0f0f0fu, load_codes(q + BYTES));
      } else {
        if (IS_SHIFTED) sums = x[r].less[step];
        sums = add_signed_products(sums, bits, load_codes(q));
      }
      const f32 both = scales * load(x[r].scales + step * W);
      acc[n][r] = plus_product(acc[n][r], __builtin_convertvector(sums, f32), both);
    }
  }
}

// Those vectors whose scales are here, from `step` on.
template <class F, int N, int R, int... PARTS>
[[gnu::always_inline]] inline void add_vectors(const uint8_t* const (&codes)[N], const f32 (&scale)[N],
                                               const Rounded (&x)[R], int64_t step, int64_t row_bytes, f32 (&acc)[N][R],
                                               std::integer_sequence<int, PARTS...>) {
  const int64_t left = row_bytes - step * BYTES;
  if (left >= F::LANES * BYTES) {
    (add_vector<F, PARTS, true>(codes, scale, x, step + PARTS, BYTES, acc), ...);
    return;
  }
  ((left >= (PARTS + 1) * BYTES ? add_vector<F, PARTS, true>(codes, scale, x, step + PARTS, BYTES, acc)
    : left > PARTS * BYTES ? add_vector<F, PARTS, false>(codes, scale, x, step + PARTS, left - PARTS * BYTES, acc)
                           : (void)0),
   ...);
}

// R rows of x with N outputs from `output` on: acc[n * R + r], whose lanes are to be added up.
template <class F, int N, int R>
void multiply(const Weight<fp16>& w, int64_t output, const Rounded* rows, f32* sums) {
  const int64_t blocks = w.inputs / F::SIZE, row_bytes = w.inputs * F::BITS / 8;
  const uint8_t* codes[N];
  Rounded x[R];
  f32 acc[N][R] = {}, scale[N];
  for (int n = 0; n < N; n++) codes[n] = w.codes + (output + n) * row_bytes;
  std::copy(rows, rows + R, x);
  for (int64_t first = 0; first < blocks; first += W) {
    for (int n = 0; n < N; n++) {
      const int64_t place = (output + n) * blocks + first;
      scale[n] = read_scales(w.scale + place, blocks - first);
      if (F::BITS == 8 && !w.low) continue;
      const f32 low = w.low ? read_scales(w.low + place, blocks - first) : -8 * scale[n];
      for (int r = 0; r < R; r++) acc[n][r] = plus_product(acc[n][r], low, load(x[r].sums + first));
    }
    add_vectors<F>(codes, scale, x, first * F::LANES / W, row_bytes, acc, std::make_integer_sequence<int, F::LANES>());
  }
  for (int n = 0; n < N; n++) std::copy(acc[n], acc[n] + R, sums + n * R);
}

// `count` outputs, at most W, from `output` on, of one row of x. Long rows of codes are read one after the other: memory
// is faster at one stream than at several. Short ones follow each other closely enough.
template <class F>
void multiply_row(const Weight<fp16>& w, int64_t output, int64_t count, const Rounded* x, float* to) {
  f32 acc[W] = {};
  int64_t n = 0;
  if (w.inputs * F::BITS / 8 < LONG)
    for (; n + 4 <= count; n += 4) multiply<F, 4, 1>(w, output + n, x, acc + n);
  for (; n < count; n++) multiply<F, 1, 1>(w, output + n, x, acc + n);
  store(to, sums(acc));
}

// The same of ROWS rows: row r is at to + r * W.
template <class F>
void multiply_rows(const Weight<fp16>& w, int64_t output, int64_t count, const Rounded* x, float* to) {
  constexpr int N = W / ROWS;
  int64_t n = 0;
  for (; n + N <= count; n += N) {
    f32 acc[W];
    multiply<F, N, ROWS>(w, output + n, x, acc);
    const f32 some = sums(acc);
    for (int i = 0; i < W; i++) to[i % ROWS * W + n + i / ROWS] = some[i];
  }
  if (n == count) return;
  for (int r = 0; r < ROWS; r++) {
    float rest[W];
    multiply_row<F>(w, output + n, count - n, x + r, rest);
    std::copy(rest, rest + (count - n), to + r * W + n);
  }
}

// What stands around the product, if anything: the norm of x + residual before it, an activation of its halves after it.
template <class X> struct Around {
  const X *residual, *norm_weight;  // null: there is none
  X* total;                         // x + residual
  float eps;
  int64_t gate;  // 0: none, 1: SiLU, 2: GELU
};

template <class F, class X>
void multiply_all(const Weight<fp16>& w, const Around<X>& around, const X* x, const X* bias, X* out, int64_t rows) {
  const int64_t steps = (w.inputs + F::STEP - 1) / F::STEP, blocks = (w.inputs / F::SIZE + W - 1) / W * W;
  const int64_t tiles = (w.outputs + W - 1) / W;
  const std::unique_ptr<int8_t[]> codes(new int8_t[rows * steps * F::STEP]());
  const std::unique_ptr<float[]> scales(new float[rows * steps * W]()), sums(new float[rows * blocks]());
  const std::unique_ptr<i32[]> less(F::BITS == 8 && IS_SHIFTED ? new i32[rows * steps]() : nullptr);
  const std::unique_ptr<Rounded[]> rounded(new Rounded[rows]);
  const std::unique_ptr<X[]> normed(around.norm_weight ? new X[rows * w.inputs] : nullptr);
  const std::unique_ptr<X[]> halves(around.gate ? new X[rows * w.outputs] : nullptr);
  X* const product = around.gate ? halves.get() : out;
#pragma omp parallel if (rows * w.inputs * w.outputs > SMALL)
  {
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
      const int64_t at = row * w.inputs;
      const X* in = x + at;
      if (around.norm_weight) {
        add_and_norm_row(in, around.residual ? around.residual + at : nullptr, around.norm_weight, normed.get() + at,
                         around.total ? around.total + at : nullptr, w.inputs, around.eps);
        in = normed.get() + at;
      }
      int8_t* to = codes.get() + row * steps * F::STEP;
      float *own_scales = scales.get() + row * steps * W, *own_sums = sums.get() + row * blocks;
      i32* own_less = less ? less.get() + row * steps : nullptr;
      round_row<F>(in, w.inputs, to, own_scales, own_less, own_sums);
      rounded[row] = {to, own_scales, own_less, own_sums};
    }
#pragma omp for
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t output = tile * W, num_outputs = std::min<int64_t>(W, w.outputs - output);
      for (int64_t row = 0, count; row < rows; row += count) {
        float products[ROWS * W];
        count = rows - row >= ROWS ? ROWS : 1;
        (count == ROWS ? multiply_rows<F> : multiply_row<F>)(w, output, num_outputs, rounded.get() + row, products);
        for (int64_t r = 0; r < count; r++)
          for (int64_t n = 0; n < num_outputs; n++)
            put(product + (row + r) * w.outputs + output + n,
                products[r * W + n] + (bias ? number(bias[output + n]) : 0));
      }
    }
    if (around.gate) {
#pragma omp for
      for (int64_t row = 0; row < rows; row++)
        (around.gate == 1 ? gate_row<X, false> : gate_row<X, true>)(product + row * w.outputs,
                                                                   out + row * w.outputs / 2, w.outputs / 2);
    }
  }
}

template <class X>
void rounded_linear(const uint8_t* codes, const fp16* scale, const fp16* low, const X* x, const X* bias, X* out,
                    const X* residual, const X* norm_weight, X* total, int64_t rows, int64_t outputs, int64_t inputs,
                    int64_t groups, int64_t bits, int64_t gate, float eps) {
  const Weight<fp16> w = {codes, scale, low, nullptr, outputs, inputs, groups};
  const Around<X> around = {residual, norm_weight, total, eps, gate};
  if (bits == 4)
    multiply_all<Form<4, 32>>(w, around, x, bias, out, rows);
  else if (inputs / groups == 16)
    multiply_all<Form<8, 16>>(w, around, x, bias, out, rows);
  else
    multiply_all<Form<8, 32>>(w, around, x, bias, out, rows);
}
}  // namespace

extern "C" {
decltype(&rounded_linear<float>) rounded_linear_float32 = rounded_linear;
decltype(&rounded_linear<bf16>) rounded_linear_bfloat16 = rounded_linear;
}
