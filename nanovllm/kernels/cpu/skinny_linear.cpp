// Products of few rows in float32 on a CPU, from weights as they are: a twin of skinny_linear.py's `skinny_linear`.
//
// A decode step reads every weight once, so what counts is that a weight is read once for all rows, in order, and that
// nothing else is. One row goes along the inputs, a vector of them at a time. More rows are turned, so that a vector
// holds an input of W rows, and a weight is a number that multiplies it.
//
// Order     A sum of one row is of W inputs a lane; of more, of the inputs in turn. It depends on the sizes alone.
// Threads   Each has outputs of its own.
#include <algorithm>
#include <memory>

#include "vectors.h"

namespace {
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
constexpr int OUTPUTS = 4;   // that one row goes through side by side
constexpr int LINE = 16;     // floats that memory sends together
constexpr int AHEAD = 256;   // floats of a row of W that are asked for early

template <int N> inline void one_row(const float* x, const float* weight, const float* bias, float* out, int64_t inputs) {
  f32 sums_of[N][2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= inputs; i += 2 * W) {
    f32 low = load(x + i), high = load(x + i + W);
    for (int n = 0; n < N; n++) {
      const float* row = weight + n * inputs + i;
      __builtin_prefetch(row + AHEAD);
      sums_of[n][0] = plus_product(sums_of[n][0], load(row), low);
      sums_of[n][1] = plus_product(sums_of[n][1], load(row + W), high);
    }
  }
  for (; i < inputs; i += W)
    for (int n = 0; n < N; n++)
      sums_of[n][0] = plus_product(sums_of[n][0], load(weight + n * inputs + i, inputs - i), load(x + i, inputs - i));
  for (int n = 0; n < N; n++) out[n] = sum(sums_of[n][0] + sums_of[n][1]) + (bias ? bias[n] : 0.0f);
}

// V vectors of rows times N outputs. turned [inputs, V * W].
template <int V, int N>
inline void tile(const float* turned, const float* weight, const float* bias, float* out, int64_t rows, int64_t inputs,
                 int64_t outputs) {
  f32 acc[N][V];
  for (int n = 0; n < N; n++)
    for (int v = 0; v < V; v++) acc[n][v] = all(bias ? bias[n] : 0.0f);
  for (int64_t begin = 0; begin < inputs; begin += LINE) {
    for (int n = 0; n < N; n++) __builtin_prefetch(weight + (N + n) * inputs + begin);  // for the next tile
    for (int64_t i = begin, end = std::min(inputs, begin + LINE); i < end; i++) {
      f32 x[V];
      for (int v = 0; v < V; v++) x[v] = load(turned + (i * V + v) * W);
      for (int n = 0; n < N; n++) {
        f32 w = all(weight[n * inputs + i]);
        for (int v = 0; v < V; v++) acc[n][v] = plus_product(acc[n][v], x[v], w);
      }
    }
  }
  for (int n = 0; n < N; n++)
    for (int v = 0; v < V; v++)
      for (int lane = 0; lane < W && v * W + lane < rows; lane++) out[(v * W + lane) * outputs + n] = acc[n][v][lane];
}

// All outputs first .. last of the rows that one `turned` holds.
template <int V>
void columns(const float* turned, const float* weight, const float* bias, float* out, int64_t rows, int64_t inputs,
             int64_t outputs, int64_t first, int64_t last) {
  constexpr int N = V == 1 ? std::min(12, REGISTERS - 4) : (REGISTERS - V - 2) / V;
  int64_t n = first;
  for (; n + N <= last; n += N)
    tile<V, N>(turned, weight + n * inputs, bias ? bias + n : nullptr, out + n, rows, inputs, outputs);
  for (; n < last; n++)
    tile<V, 1>(turned, weight + n * inputs, bias ? bias + n : nullptr, out + n, rows, inputs, outputs);
}

// Block i of x's rows, from `begin` on, with an input of all of them side by side; zeros where there are fewer.
void turn(const float* x, float* turned, int64_t rows, int64_t inputs, int64_t stride, int width, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++)
    for (int r = 0; r < width; r++) turned[i * width + r] = r < rows ? x[r * stride + i] : 0.0f;
}

// bias may be null. Rows of x are `stride` apart; W and out are contiguous.
void skinny_linear_rows(const float* x, const float* weight, const float* bias, float* out, int64_t rows, int64_t stride,
                        int64_t outputs, int64_t inputs) {
  constexpr int64_t PART = 48;  // outputs of a thread at a time: a multiple of all tiles' but few
  const int64_t parts = (outputs + PART - 1) / PART;
  if (rows == 1) {
#pragma omp parallel for schedule(static) if (outputs * inputs > SMALL)
    for (int64_t part = 0; part < parts; part++) {
      int64_t n = part * PART, last = std::min(outputs, n + PART);
      for (; n + OUTPUTS <= last; n += OUTPUTS)
        one_row<OUTPUTS>(x, weight + n * inputs, bias ? bias + n : nullptr, out + n, inputs);
      for (; n < last; n++) one_row<1>(x, weight + n * inputs, bias ? bias + n : nullptr, out + n, inputs);
    }
    return;
  }
  constexpr int64_t WIDE = 2 * W;
  const int64_t groups = (rows + WIDE - 1) / WIDE;
  std::unique_ptr<float[]> turned(new float[groups * WIDE * inputs]);
#pragma omp parallel if (rows * outputs * inputs > SMALL)
  {
#pragma omp for schedule(static) collapse(2)
    for (int64_t group = 0; group < groups; group++)
      for (int64_t begin = 0; begin < inputs; begin += 64) {
        const int64_t first = group * WIDE, left = rows - first;
        turn(x + first * stride, turned.get() + group * WIDE * inputs, left, inputs, stride, left > W ? WIDE : W, begin,
             std::min(inputs, begin + 64));
      }
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts; part++)
      for (int64_t group = 0; group < groups; group++) {
        const int64_t first = group * WIDE, left = rows - first;
        const float* own = turned.get() + group * WIDE * inputs;
        float* to = out + first * outputs;
        const int64_t begin = part * PART, end = std::min(outputs, begin + PART);
        if (left > W) columns<2>(own, weight, bias, to, left, inputs, outputs, begin, end);
        else columns<1>(own, weight, bias, to, left, inputs, outputs, begin, end);
      }
  }
}
}  // namespace

extern "C" {
extern const int num_lanes = W;
decltype(&skinny_linear_rows) skinny_linear_float32 = skinny_linear_rows;
}
