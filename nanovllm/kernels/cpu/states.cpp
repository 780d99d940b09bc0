// Layers with a state, for float32 and bfloat16: twins of causal_conv.py, delta_net.py,
// kimi_delta.py and mamba2.py.
// `state_kernels.py` checks arguments and allocates results.
//
// Layout    Rows are contiguous; inputs have any stride between tokens, the states one between slots.
// Rounding  As in cpu_kernels.cpp; states are float32.
// Threads   One thread takes some channels of a request, or a head of it, token after token: so results depend neither
//           on the threads, nor on the batch, nor on where a prompt was cut.
#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace {
constexpr int MAX_WIDTH = 64;  // of a convolution
constexpr int CHUNK = 128;     // channels of one task

// bias may be null. gated: x holds b, c and x of each token side by side.
template <class T>
void causal_conv(const T* x, const T* weight, const T* bias, float* state, const int32_t* rows, const int32_t* starts,
                 const int32_t* seq_lens, const int32_t* snapshots, T* out, int64_t n, int64_t channels, int64_t width,
                 int64_t x_stride, int64_t slot_stride, int64_t gated) {
  const int64_t chunks = (channels + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(dynamic, 1) if (starts[n] * channels > SMALL)
  for (int64_t task = 0; task < n * chunks; task++) {
    const int64_t request = task / chunks, first = task % chunks * CHUNK;
    const int64_t end = std::min<int64_t>(CHUNK, channels - first), begin = starts[request], stop = starts[request + 1];
    if (rows[request] < 0) {  // padding: what its tokens are must be numbers
      for (int64_t token = begin; token < stop; token++)
        std::fill_n(out + token * channels + first, end, T{});
      continue;
    }
    float past[MAX_WIDTH - 1][CHUNK];  // inputs, oldest first
    float* own = state + rows[request] * slot_stride + first;
    const bool had_tokens = seq_lens[request] > stop - begin;
    for (int64_t j = 0; j < width - 1; j++)
      for (int64_t i = 0; i < end; i++) past[j][i] = had_tokens ? own[j * channels + i] : 0.0f;
    auto keep = [&](float* to) {
      for (int64_t j = 0; j < width - 1; j++) std::copy(past[j], past[j] + end, to + j * channels);
    };
    for (int64_t token = begin; token < stop; token++) {
      const T *in = x + token * x_stride + first, *w = weight + first;
      T* result = out + token * channels + first;
      for (int64_t i = 0; i < end; i += W) {
        const int64_t left = end - i;
        f32 value = load(in + i, left);
        if (gated) value = rounded<T>(value * load(in + 2 * channels + i, left));
        f32 y = value * load(w + (width - 1) * channels + i, left);
        if (bias) y += load(bias + first + i, left);
        for (int64_t j = 0; j < width - 1; j++) {
          f32 older = load(past[j] + i);
          y += older * load(w + j * channels + i, left);
          if (j) store(past[j - 1] + i, older);
        }
        store(past[width - 2] + i, value);
        y = gated ? rounded<T>(y) * load(in + channels + i, left) : y / (1.0f + exponential(-y));
        store(result + i, y, left);
      }
      if (snapshots[token] >= 0) keep(state + snapshots[token] * slot_stride + first);
    }
    if (stop > begin) keep(own);
  }
}

// --- matrices [keys, values] of heads ------------------------------------------

constexpr int MAX_KEY = 256;  // numbers of a key
constexpr int COLUMNS = 32;   // of a matrix that go through all tokens together, so that they stay in the cache

// `columns` of them, and zeros behind; without a matrix, zeros.
[[gnu::always_inline]] inline void read_columns(const float* matrix, float (*s)[COLUMNS], int64_t keys, int64_t values, int64_t columns) {
  for (int64_t i = 0; i < keys; i++)
    for (int64_t c = 0; c < COLUMNS; c++) s[i][c] = matrix && c < columns ? matrix[i * values + c] : 0.0f;
}
[[gnu::always_inline]] inline void keep_columns(const float (*s)[COLUMNS], float* matrix, int64_t keys, int64_t values, int64_t columns) {
  for (int64_t i = 0; i < keys; i++) std::copy(s[i], s[i] + columns, matrix + i * values);
}
// Of one token's values.
template <class T> [[gnu::always_inline]] inline void read_values(const T* value, float* v, int64_t columns) {
  for (int64_t c = 0; c < COLUMNS; c += W) store(v + c, c < columns ? load(value + c, columns - c) : f32{});
}
inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// --- delta nets ----------------------------------------------------------------

template <class T> inline void unit_length(const T* in, float* out, int64_t dim, float scale) {
  f32 squares = {};
  for (int64_t i = 0; i < dim; i += W) {
    f32 v = load(in + i, dim - i);
    squares = plus_product(squares, v, v);
  }
  scale /= std::sqrt(sum(squares) + 1e-6f);
  for (int64_t i = 0; i < dim; i += W) store(out + i, load(in + i, dim - i) * scale);
}

// What one token tells of a head. alpha: one number, or BY_NUMBER one for each of a key; faded is k times alpha then.
struct DeltaToken {
  float q[MAX_KEY + W], k[MAX_KEY + W], alpha[MAX_KEY + W], faded[MAX_KEY + W], v[COLUMNS], beta;
};

// Some columns of one token: S = alpha S + k (beta (v - k alpha S)), then q S. The columns of a row lie side by side.
template <bool BY_NUMBER>
inline void delta_step(float (*s)[COLUMNS], const DeltaToken& t, float* out, int64_t keys) {
  constexpr int N = COLUMNS / W;
  f32 known[N] = {}, change[N], result[N] = {};
  for (int64_t i = 0; i < keys; i++)
    for (int n = 0; n < N; n++) known[n] = plus_product(known[n], all(BY_NUMBER ? t.faded[i] : t.k[i]), load(s[i] + n * W));
  for (int n = 0; n < N; n++)
    change[n] = t.beta * (load(t.v + n * W) - (BY_NUMBER ? known[n] : t.alpha[0] * known[n]));
  for (int64_t i = 0; i < keys; i++)
    for (int n = 0; n < N; n++) {
      f32 next = plus_product(t.alpha[BY_NUMBER ? i : 0] * load(s[i] + n * W), all(t.k[i]), change[n]);
      store(s[i] + n * W, next);
      result[n] = plus_product(result[n], all(t.q[i]), next);
    }
  for (int n = 0; n < N; n++) store(out + n * W, result[n]);
}

// A head's matrix through a request's tokens. read(token, head, first, columns, t): a token, whose values are some
// columns; normed(token, head, i, x): W of its results. scratch [tokens, heads, values] holds q S until all columns of
// a head are there; what is normed is rounded before.
template <bool BY_NUMBER, class T, class Read, class Norm>
void delta_rule(float* state, const int32_t* rows, const int32_t* starts, const int32_t* seq_lens,
                const int32_t* snapshots, float* scratch, T* out, int64_t n, int64_t heads, int64_t keys,
                int64_t values, int64_t slot_stride, float eps, Read read, Norm normed) {
#pragma omp parallel for schedule(dynamic, 1) if (starts[n] * heads * keys * values > SMALL)
  for (int64_t task = 0; task < n * heads; task++) {
    const int64_t request = task / heads, head = task % heads, begin = starts[request], stop = starts[request + 1];
    if (rows[request] < 0) {
      for (int64_t token = begin; token < stop; token++)
        std::fill_n(out + (token * heads + head) * values, values, T{});
      continue;
    }
    float* own = state + rows[request] * slot_stride + head * keys * values;
    const bool had_tokens = seq_lens[request] > stop - begin;
    float s[MAX_KEY][COLUMNS], result[COLUMNS];
    DeltaToken t;
    for (int64_t first = 0; first < values; first += COLUMNS) {
      const int64_t columns = std::min<int64_t>(COLUMNS, values - first);
      read_columns(had_tokens ? own + first : nullptr, s, keys, values, columns);
      auto keep = [&](float* to) { keep_columns(s, to + first, keys, values, columns); };
      for (int64_t token = begin; token < stop; token++) {
        read(token, head, first, columns, t);
        delta_step<BY_NUMBER>(s, t, result, keys);
        std::copy(result, result + columns, scratch + (token * heads + head) * values + first);
        if (snapshots[token] >= 0) keep(state + snapshots[token] * slot_stride + head * keys * values);
      }
      if (stop > begin) keep(own);
    }
    for (int64_t token = begin; token < stop; token++) {
      const float* found = scratch + (token * heads + head) * values;
      f32 squares = {};
      for (int64_t i = 0; i < values; i += W) {
        f32 x = rounded<T>(load(found + i, values - i));
        squares += x * x;
      }
      const float scale = 1.0f / std::sqrt(sum(squares) / values + eps);
      for (int64_t i = 0; i < values; i += W)
        store(out + (token * heads + head) * values + i,
              normed(token, head, i, rounded<T>(load(found + i, values - i)) * scale), values - i);
    }
  }
}

// qkv: after the convolution.
template <class T>
void delta_net(const T* qkv, const T* z, const T* ba, const float* decay, const float* dt_bias, const T* norm,
               float* state, const int32_t* rows, const int32_t* starts, const int32_t* seq_lens,
               const int32_t* snapshots, float* scratch, T* out, int64_t n, int64_t key_heads, int64_t heads,
               int64_t keys, int64_t values, int64_t qkv_stride, int64_t z_stride, int64_t slot_stride, float eps) {
  const float unit = 1.0f / std::sqrt((float)keys);
  auto read = [=](int64_t token, int64_t head, int64_t first, int64_t columns, DeltaToken& t) {
    const int64_t query_at = head / (heads / key_heads) * keys;
    const T *in = qkv + token * qkv_stride, *gates = ba + token * 2 * heads;
    unit_length(in + query_at, t.q, keys, unit);
    unit_length(in + key_heads * keys + query_at, t.k, keys, 1.0f);
    read_values(in + 2 * key_heads * keys + head * values + first, t.v, columns);
    const float b = load(gates + head, 1)[0], a = load(gates + heads + head, 1)[0] + dt_bias[head];
    t.alpha[0] = std::exp(-decay[head] * softplus(a));
    t.beta = 1.0f / (1.0f + std::exp(-b));
  };
  auto normed = [=](int64_t token, int64_t head, int64_t i, f32 x) {
    f32 gate = load(z + token * z_stride + head * values + i, values - i);
    return rounded<T>(rounded<T>(x) * load(norm + i, values - i)) * (gate / (1.0f + exponential(-gate)));
  };
  delta_rule<false>(state, rows, starts, seq_lens, snapshots, scratch, out, n, heads, keys, values, slot_stride, eps,
                    read, normed);
}

// qkv: after the convolution. What is forgotten, f, is a number for each number of a key; alpha [tokens, heads, dim] is
// made of it first, as all columns of a matrix need it.
template <class T>
void kimi_delta(const T* qkv, const T* f, const T* b, const T* z, const float* decay, const float* dt_bias,
                const T* norm, float* state, const int32_t* rows, const int32_t* starts, const int32_t* seq_lens,
                const int32_t* snapshots, float* alpha, float* scratch, T* out, int64_t n, int64_t heads,
                int64_t dim, int64_t qkv_stride, int64_t f_stride, int64_t b_stride, int64_t z_stride,
                int64_t slot_stride, float eps) {
  const float unit = 1.0f / std::sqrt((float)dim);
#pragma omp parallel for if (starts[n] * heads * dim > SMALL)
  for (int64_t task = 0; task < starts[n] * heads; task++) {
    const int64_t token = task / heads, head = task % heads;
    const T* forget = f + token * f_stride + head * dim;
    for (int64_t i = 0; i < dim; i++)
      alpha[task * dim + i] = std::exp(-decay[head] * softplus(load(forget + i, 1)[0] + dt_bias[head * dim + i]));
  }
  auto read = [=](int64_t token, int64_t head, int64_t first, int64_t columns, DeltaToken& t) {
    const T* in = qkv + token * qkv_stride + head * dim;
    const float* stays = alpha + (token * heads + head) * dim;
    unit_length(in, t.q, dim, unit);
    unit_length(in + heads * dim, t.k, dim, 1.0f);
    read_values(in + 2 * heads * dim + first, t.v, columns);
    for (int64_t i = 0; i < dim; i += W) {
      f32 part = load(stays + i, dim - i);
      store(t.alpha + i, part);
      store(t.faded + i, load(t.k + i) * part);
    }
    t.beta = 1.0f / (1.0f + std::exp(-load(b + token * b_stride + head, 1)[0]));
  };
  auto normed = [=](int64_t token, int64_t head, int64_t i, f32 x) {
    f32 gate = load(z + token * z_stride + head * dim + i, dim - i);
    return x * load(norm + i, dim - i) / (1.0f + exponential(-gate));
  };
  delta_rule<true>(state, rows, starts, seq_lens, snapshots, scratch, out, n, heads, dim, dim, slot_stride, eps, read,
                   normed);
}

// --- Mamba-2 -------------------------------------------------------------------

// Some columns of one token: S = alpha S + b x, then c S. b is times the step already.
inline void mamba_step(float (*s)[COLUMNS], const float* b, const float* c, const float* x, float* out, int64_t keys,
                       float alpha) {
  constexpr int N = COLUMNS / W;
  f32 input[N], result[N] = {};
  for (int n = 0; n < N; n++) input[n] = load(x + n * W);
  for (int64_t i = 0; i < keys; i++)
    for (int n = 0; n < N; n++) {
      f32 next = alpha * load(s[i] + n * W) + b[i] * input[n];
      store(s[i] + n * W, next);
      result[n] += c[i] * next;
    }
  for (int n = 0; n < N; n++) store(out + n * W, result[n]);
}

// xbc: after the convolution; zxbcdt: z first, the steps behind xbc's place. norm may be null. gated [tokens, heads,
// values] holds what is normed until all heads of a group are there.
template <class T>
void mamba2(const T* xbc, const T* zxbcdt, const float* decay, const float* dt_bias, const float* skip, const T* norm,
            float* state, const int32_t* rows, const int32_t* starts, const int32_t* seq_lens, const int32_t* snapshots,
            float* gated, T* out, int64_t n, int64_t groups, int64_t heads, int64_t keys, int64_t values,
            int64_t xbc_stride, int64_t in_stride, int64_t slot_stride, float eps) {
  const int64_t inner = heads * values, channels = inner + 2 * groups * keys;
#pragma omp parallel for schedule(dynamic, 1) if (starts[n] * heads * keys * values > SMALL)
  for (int64_t task = 0; task < n * heads; task++) {
    const int64_t request = task / heads, head = task % heads, begin = starts[request], stop = starts[request + 1];
    if (rows[request] < 0) {
      for (int64_t token = begin; token < stop; token++)
        std::fill_n(gated + token * inner + head * values, values, 0.0f);
      continue;
    }
    float* own = state + rows[request] * slot_stride + head * keys * values;
    const bool had_tokens = seq_lens[request] > stop - begin;
    const int64_t b_at = inner + head / (heads / groups) * keys, c_at = b_at + groups * keys;
    float s[MAX_KEY][COLUMNS], b[MAX_KEY + W], c[MAX_KEY + W], x[COLUMNS], y[COLUMNS];
    for (int64_t first = 0; first < values; first += COLUMNS) {
      const int64_t columns = std::min<int64_t>(COLUMNS, values - first);
      read_columns(had_tokens ? own + first : nullptr, s, keys, values, columns);
      auto keep = [&](float* to) { keep_columns(s, to + first, keys, values, columns); };
      for (int64_t token = begin; token < stop; token++) {
        const T *in = xbc + token * xbc_stride, *whole = zxbcdt + token * in_stride;
        const float dt = softplus(load(whole + inner + channels + head, 1)[0] + dt_bias[head]);
        for (int64_t i = 0; i < keys; i += W) {
          store(b + i, load(in + b_at + i, keys - i) * dt);
          store(c + i, load(in + c_at + i, keys - i));
        }
        const T* z = whole + head * values + first;
        read_values(in + head * values + first, x, columns);
        mamba_step(s, b, c, x, y, keys, std::exp(-decay[head] * dt));
        for (int64_t j = 0; j < columns; j += W) {
          f32 gate = load(z + j, columns - j);
          store(y + j, (load(y + j) + skip[head] * load(x + j)) * (gate / (1.0f + exponential(-gate))));
        }
        std::copy(y, y + columns, gated + token * inner + head * values + first);
        if (snapshots[token] >= 0) keep(state + snapshots[token] * slot_stride + head * keys * values);
      }
      if (stop > begin) keep(own);
    }
  }
  const int64_t size = inner / groups;
#pragma omp parallel for if (starts[n] * inner > SMALL)
  for (int64_t task = 0; task < starts[n] * groups; task++) {
    const float* in = gated + task * size;
    f32 squares = {};
    for (int64_t i = 0; i < size; i += W) {
      f32 x = load(in + i, size - i);
      squares += x * x;
    }
    const float scale = norm ? 1.0f / std::sqrt(sum(squares) / size + eps) : 1.0f;
    for (int64_t i = 0; i < size; i += W) {
      const int64_t left = size - i;
      f32 x = load(in + i, left);
      if (norm) x = rounded<T>(x * scale) * load(norm + task % groups * size + i, left);
      store(out + task * size + i, x, left);
    }
  }
}
}  // namespace

// Found by name, as pointers to functions.
#define EXPORT(NAME)                            \
  extern "C" {                                  \
  decltype(&NAME<float>) NAME##_float32 = NAME; \
  decltype(&NAME<bf16>) NAME##_bfloat16 = NAME; \
  }
EXPORT(causal_conv)
EXPORT(delta_net)
EXPORT(kimi_delta)
EXPORT(mamba2)
