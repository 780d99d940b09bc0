// Products with weights of 4 and 8 bits on a CPU, from the codes: twins of quantized_linear.py.
//
// W = (code - zero) * scale, or code * scale + low; x W^T with x float32 or bfloat16, summed in float32.
//
// Rounding  None but that of the result: codes become numbers exactly, inputs stay as they are.
// Order     A sum is of W inputs a lane, group by group; it depends on the sizes alone, not on threads or other rows.
// Sizes     Inputs fill groups; a group has a multiple of 32 inputs ("int4") or of 16 ("int8").
// Vectors   Float32 everywhere; bfloat16 inputs in pairs, where the CPU multiplies those (AVX-512 BF16).
#include <memory>

#include "quantized_weights.h"

namespace {
// Four bits each as what they stand for: integers, or e2m1 (sign, two of exponent, one of mantissa).
template <bool E2M1> inline f32 values_of(i32 codes) {
  if (!E2M1) return __builtin_convertvector(codes, f32);
#if defined(__AVX512F__)
  const __m512 table = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
  return (f32)_mm512_permutexvar_ps((__m512i)codes, table);
#elif defined(__AVX2__)
  const __m256 table = {0, .5f, 1, 1.5f, 2, 3, 4, 6};
  return (f32)((u32)_mm256_permutevar8x32_ps(table, (__m256i)codes) | (u32)(codes & 8) << 28);
#else
  const i32 size = codes & 7, over4 = size - 4, over6 = size - 6;
  const i32 twice = size + (over4 & (over4 > 0)) + 2 * (over6 & (over6 > 0));
  return (f32)((u32)(__builtin_convertvector(twice, f32) * 0.5f) | (u32)(codes & 8) << 28);
#endif
}

// --- sums of products ----------------------------------------------------------------------
//
// A form says how codes meet inputs, a vector of codes at a time: LANE inputs for each lane of float32 sums, so that
// BLOCK / LANE lanes have one scale (all of them, where LANE is 0). `prepare` brings a row of x into the order in which
// `add` reads it, with zeros behind it; OFFSET is what `add` has too much in every code.

// Of 32 inputs of "int4", the place of input i among halves of bytes: byte i % 16, the lower half first.
inline int64_t nibble(int64_t i) { return i % 16 * 2 + i % 32 / 16; }

// "int4" or "e2m1", float32: a lane has eight inputs, four bytes.
template <bool E2M1> struct Fours {
  typedef float element;
  static constexpr int BITS = 4, LANE = 8, STEP = 8 * W;
  static constexpr float OFFSET = 0;

  template <class X> static void prepare(const X* x, float* to, int64_t inputs) {
    for (int64_t i = 0; i < inputs; i++) {
      const int64_t place = i % STEP / BLOCK * BLOCK + nibble(i);
      to[i / STEP * STEP + place % 8 * W + place / 8] = number(x[i]);
    }
  }
  template <int N, int R>
  static inline void add(const uint8_t* const* codes, const float* const* x, int64_t i, int64_t left, f32 (&sums)[N][R]) {
    for (int n = 0; n < N; n++) {
      u32 bits;
      load_or_zeros(codes[n] + i / 2, left / 2, bits);
      for (int j = 0; j < 8; j++) {
        const f32 values = values_of<E2M1>((i32)(bits >> (4 * j) & 15));
        for (int r = 0; r < R; r++) sums[n][r] = plus_product(sums[n][r], values, load(x[r] + i + j * W));
      }
    }
  }
};

// "int8", float32, blocks of SIZE inputs.
template <int SIZE> struct Eights {
  typedef float element;
  static constexpr int BITS = 8, LANE = 0, STEP = SIZE;
  static constexpr float OFFSET = 0;

  template <class X> static void prepare(const X* x, float* to, int64_t inputs) {
    for (int64_t i = 0; i < inputs; i += W) store(to + i, load(x + i));
  }
  template <int N, int R>
  static inline void add(const uint8_t* const* codes, const float* const* x, int64_t i, int64_t, f32 (&sums)[N][R]) {
    for (int n = 0; n < N; n++)
      for (int j = 0; j < SIZE; j += W) {
        const f32 values = load((const int8_t*)codes[n] + i + j);
        for (int r = 0; r < R; r++) sums[n][r] = plus_product(sums[n][r], values, load(x[r] + i + j));
      }
  }
};

#ifdef __AVX512BF16__
inline __m512bh e2m1_pairs(u32 codes) {
  const u32 sizes = {0x3f000000, 0x3fc03f80, 0x40404000, 0x40c04080}, signs = sizes | 0x80008000;
  const u32 table = {sizes[0], sizes[1], sizes[2], sizes[3], signs[0], signs[1], signs[2], signs[3]};
  return (__m512bh)_mm512_permutexvar_epi16((__m512i)codes, (__m512i)table);
}

// Pairs of bfloat16. Four bits below an exponent are one: 128 and they, or 2048 and 16 times they. A lane has four bytes,
// so in turn four pairs of halves of bytes: eight inputs of "int4", or four of "int8", each in two parts. "e2m1" is looked
// up.
template <int BITS_, bool E2M1> struct Pairs {
  typedef bf16 element;
  static constexpr int BITS = BITS_, LANE = 32 / BITS, STEP = LANE * W;
  static constexpr float OFFSET = E2M1 ? 0 : BITS == 4 ? 128 : 128 + 2048 + 128;  // the last: codes of 8 bits without their sign

  template <class X> static void prepare(const X* x, bf16* to, int64_t inputs) {
    for (int64_t i = 0; i < inputs; i++) {
      const int64_t place = BITS == 4 ? i % STEP / BLOCK * BLOCK + nibble(i) : i % STEP;
      const int64_t lane = place / LANE, in_lane = place % LANE, half = LANE / 2;
      to[i / STEP * STEP + in_lane % half * 2 * W + lane * 2 + in_lane / half] = x[i];
    }
  }
  template <int N, int R>
  static inline void add(const uint8_t* const* codes, const bf16* const* x, int64_t i, int64_t left, f32 (&sums)[N][R]) {
    const __mmask16 mask = left >= STEP ? 0xffff : (1 << left / LANE) - 1;
    for (int n = 0; n < N; n++) {
      const u32 bits = (u32)_mm512_maskz_loadu_epi32(mask, codes[n] + i * BITS / 8);
      for (int j = 0; j < 4; j++) {
        const u32 exponents = u32{} + (BITS == 4 || j % 2 == 0 ? 0x43004300 : 0x45084508);
        const u32 halves = bits >> (4 * j) & 0x000f000f;
        const __m512bh pairs = E2M1 ? e2m1_pairs(halves) : (__m512bh)(halves ^ exponents);
        for (int r = 0; r < R; r++) {
          const bf16* inputs = x[r] + i + (BITS == 4 ? j : j / 2) * 2 * W;
          sums[n][r] = (f32)_mm512_dpbf16_ps((__m512)sums[n][r], pairs, (__m512bh)_mm512_loadu_si512(inputs));
        }
      }
    }
  }
};
#endif

// R rows of x with N outputs from `output` on. sums_of_x: of each row, by block, with zeros to the end of a vector.
template <class Form, int N, int R, class S, class X>
void multiply(const Weight<S>& w, int64_t output, const typename Form::element* const* x,
              const float* const* sums_of_x, const X* bias, X* const* out) {
  constexpr int SIZE = Form::LANE ? BLOCK : Form::STEP;  // of a block
  const int64_t blocks = w.inputs / SIZE;
  const uint8_t* codes[N];
  for (int n = 0; n < N; n++) codes[n] = w.codes + (output + n) * (w.inputs * Form::BITS / 8);
  f32 acc[N][R] = {};
  float scale[N][STRETCH + W] = {}, low[STRETCH] = {};
  for (int64_t first = 0; first < blocks; first += STRETCH) {
    const int64_t count = std::min<int64_t>(STRETCH, blocks - first);
    for (int n = 0; n < N; n++) {
      read_blocks<Form::BITS>(w, output + n, SIZE, first, count, scale[n], low);
      for (int64_t b = 0; b < count; b += W) {
        const f32 of_nothing = load(low + b) - Form::OFFSET * load(scale[n] + b);
        for (int r = 0; r < R; r++) acc[n][r] = plus_product(acc[n][r], of_nothing, load(sums_of_x[r] + first + b));
      }
    }
    for (int64_t b = 0; b < count; b += Form::STEP / SIZE) {
      f32 sums[N][R] = {};
      for (int n = 0; n < N; n++) __builtin_prefetch(codes[n] + (first + b) * SIZE * Form::BITS / 8 + AHEAD);
      Form::template add<N, R>(codes, x, (first + b) * SIZE, (count - b) * SIZE, sums);
      for (int n = 0; n < N; n++) {
        f32 scales = all(scale[n][b]);
        if (Form::LANE)
          scales = spread<BLOCK / (Form::LANE ? Form::LANE : BLOCK), 0>(load(scale[n] + b), std::make_integer_sequence<int, W>());
        for (int r = 0; r < R; r++) acc[n][r] = plus_product(acc[n][r], sums[n][r], scales);
      }
    }
  }
  for (int n = 0; n < N; n++)
    for (int r = 0; r < R; r++)
      put(out[r] + output + n, sum(acc[n][r]) + (bias ? number(bias[output + n]) : 0));
}

template <class Form, class S, class X>
void multiply_all(const Weight<S>& w, const X* x, const X* bias, X* out, int64_t rows) {
  typedef typename Form::element Element;
  constexpr int SIZE = Form::LANE ? BLOCK : Form::STEP;
  const int64_t blocks = w.inputs / SIZE, x_stride = (w.inputs + Form::STEP - 1) / Form::STEP * Form::STEP;
  const int64_t sums_stride = (blocks + W - 1) / W * W, tiles = (w.outputs + OUTPUTS - 1) / OUTPUTS;
  const std::unique_ptr<Element[]> prepared(new Element[rows * x_stride]());
  const std::unique_ptr<float[]> sums_of_x(new float[rows * sums_stride]());
#pragma omp parallel if (rows * w.inputs * w.outputs > SMALL)
  {
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
      const X* in = x + row * w.inputs;
      Form::prepare(in, prepared.get() + row * x_stride, w.inputs);
      for (int64_t b = 0; b < blocks; b++) {
        f32 total = {};
        for (int i = 0; i < SIZE; i += W) total += load(in + b * SIZE + i);
        sums_of_x[row * sums_stride + b] = sum(total);
      }
    }
#pragma omp for
    for (int64_t tile = 0; tile < tiles; tile++)
      for (int64_t row = 0; row < rows;) {
        const Element* some_x[ROWS];
        const float* some_sums[ROWS];
        X* some_out[ROWS];
        const int64_t count = rows - row >= ROWS ? ROWS : 1, end = std::min((tile + 1) * OUTPUTS, w.outputs);
        for (int64_t r = 0; r < count; r++) {
          some_x[r] = prepared.get() + (row + r) * x_stride;
          some_sums[r] = sums_of_x.get() + (row + r) * sums_stride;
          some_out[r] = out + (row + r) * w.outputs;
        }
        int64_t output = tile * OUTPUTS;
        if (count == 1 && output + OUTPUTS == end)
          multiply<Form, OUTPUTS, 1>(w, output, some_x, some_sums, bias, some_out), output = end;
        for (; count == ROWS && output + 2 <= end; output += 2)
          multiply<Form, 2, ROWS>(w, output, some_x, some_sums, bias, some_out);
        for (; output < end; output++)
          if (count == ROWS)
            multiply<Form, 1, ROWS>(w, output, some_x, some_sums, bias, some_out);
          else
            multiply<Form, 1, 1>(w, output, some_x, some_sums, bias, some_out);
        row += count;
      }
  }
}

template <class X, bool E2M1> struct Forms {
  typedef Fours<E2M1> four_bits;
  typedef Eights<32> eight_bits;
};
#ifdef __AVX512BF16__
template <bool E2M1> struct Forms<bf16, E2M1> {
  typedef Pairs<4, E2M1> four_bits;
  typedef Pairs<8, false> eight_bits;
};
#endif

// --- W itself ------------------------------------------------------------------------------

template <int BITS, class S, class X> void dense_rows(const Weight<S>& w, X* out) {
  const int64_t size = w.inputs / w.groups;
#pragma omp parallel for if (w.outputs * w.inputs > SMALL)
  for (int64_t output = 0; output < w.outputs; output++) {
    const uint8_t* codes = w.codes + output * (w.inputs * BITS / 8);
    X* to = out + output * w.inputs;
    float scale[STRETCH], zero[STRETCH], low[STRETCH];
    for (int64_t first = 0; first < w.groups; first += STRETCH) {
      const int64_t count = std::min<int64_t>(STRETCH, w.groups - first);
      read_groups<BITS>(w, output, first, count, scale, zero, low);
      for (int64_t g = 0; g < count; g++)
        for (int64_t i = (first + g) * size, end = i + size; i < end; i += W)
          if (BITS == 4) {
            if (i % BLOCK >= 16) continue;
            const i32 bytes = widen(codes + i / BLOCK * 16 + i % 16);
            store(to + i, (values_of<IS_E2M1<S>>(bytes & 15) - zero[g]) * scale[g] + low[g]);
            store(to + i + 16, (values_of<IS_E2M1<S>>(bytes >> 4) - zero[g]) * scale[g] + low[g]);
          } else {
            const f32 values = load((const int8_t*)codes + i);
            store(to + i, (values - zero[g]) * scale[g] + low[g]);
          }
    }
  }
}

template <class X, class S>
void with_scales(const Weight<S>& w, const X* x, const X* bias, X* out, int64_t rows, int64_t bits) {
  if (!x)
    bits == 4 ? dense_rows<4>(w, out) : dense_rows<8>(w, out);
  else if (bits == 4)
    multiply_all<typename Forms<X, IS_E2M1<S>>::four_bits>(w, x, bias, out, rows);
  else if (w.inputs / w.groups % BLOCK)
    multiply_all<Eights<16>>(w, x, bias, out, rows);
  else
    multiply_all<typename Forms<X, false>::eight_bits>(w, x, bias, out, rows);
}

// bits: 4 or 8. scale_bytes: of scale and low, float32, float16 or, of codes in e2m1, e8m0. x null: out [outputs, inputs] becomes W itself.
template <class X>
void quantized_linear(const uint8_t* codes, const void* scale, const void* low, const int8_t* zero, const X* x,
                      const X* bias, X* out, int64_t rows, int64_t outputs, int64_t inputs, int64_t groups,
                      int64_t bits, int64_t scale_bytes) {
  if (scale_bytes == 1) {
    const Weight<e8m0> w = {codes, (const e8m0*)scale, nullptr, nullptr, outputs, inputs, groups};
    with_scales(w, x, bias, out, rows, bits);
  } else if (scale_bytes == 2) {
    const Weight<fp16> w = {codes, (const fp16*)scale, (const fp16*)low, zero, outputs, inputs, groups};
    with_scales(w, x, bias, out, rows, bits);
  } else {
    const Weight<float> w = {codes, (const float*)scale, (const float*)low, zero, outputs, inputs, groups};
    with_scales(w, x, bias, out, rows, bits);
  }
}
}  // namespace

extern "C" {
decltype(&quantized_linear<float>) quantized_linear_float32 = quantized_linear;
decltype(&quantized_linear<bf16>) quantized_linear_bfloat16 = quantized_linear;
}
