// The CPU kernels of a decoder layer, for float32 and bfloat16: twins of rms_norm.py, silu_and_mul.py,
// qkv_rope_store.py and of the decode part of paged_attention.py. `cpu_kernels.py` builds this file, checks arguments and
// allocates results.
//
// Layout    Every tensor is contiguous; the cache is [2, num_blocks, num_kv_heads, block_size, head_dim], keys first.
// Rounding  All arithmetic is float32. Results are rounded to the type where the PyTorch references round, no oftener.
// Sizes     Rows may have any length; a head_dim is at most MAX_DIM, and in attention a multiple of 16.
// Threads   OpenMP, in the pool that PyTorch uses. One thread computes a row, or a request under one KV head, in an
//           order that depends on nothing else: so results depend neither on the threads nor on the batch.
#include <algorithm>
#include <cmath>

#include "rows.h"

namespace {
constexpr int MAX_DIM = 256;   // of a head
constexpr int MAX_GROUP = 16;  // query heads that share a KV head
constexpr int TILE = 64;       // keys between two updates of the running softmax

// --- rows ---------------------------------------------------------------

// residual and total: both or neither.
template <class T>
void add_rms_norm(const T* x, const T* residual, const T* weight, T* out, T* total, int64_t rows, int64_t dim,
                  float eps) {
#pragma omp parallel for if (rows * dim > SMALL)
  for (int64_t row = 0; row < rows; row++) {
    const int64_t at = row * dim;
    add_and_norm_row(x + at, residual ? residual + at : nullptr, weight, out + at, total ? total + at : nullptr, dim,
                     eps);
  }
}

template <class T, bool GELU> void gate_and_mul(const T* gate_up, T* out, int64_t rows, int64_t dim) {
#pragma omp parallel for if (rows * dim > SMALL)
  for (int64_t row = 0; row < rows; row++) gate_row<T, GELU>(gate_up + row * 2 * dim, out + row * dim, dim);
}
template <class T> void silu_and_mul(const T* gate_up, T* out, int64_t rows, int64_t dim) {
  gate_and_mul<T, false>(gate_up, out, rows, dim);
}
template <class T> void gelu_and_mul(const T* gate_up, T* out, int64_t rows, int64_t dim) {
  gate_and_mul<T, true>(gate_up, out, rows, dim);
}

// One query or key head: the norm if there is a weight, the rotation if there are angles.
template <class T>
inline void norm_and_rotate(const T* in, const T* weight, const float* cos_sin, T* out, int64_t dim, float eps) {
  T normed[MAX_DIM];
  if (weight) {
    norm_row(in, weight, normed, dim, eps);
    in = normed;
  }
  if (!cos_sin) {
    std::memcpy(out, in, dim * sizeof(T));
    return;
  }
  for (int64_t i = 0, half = dim / 2; i < half; i += W) {
    int64_t left = half - i;
    f32 a = load(in + i, left), b = load(in + half + i, left);
    f32 cos = load(cos_sin + i, left), sin = load(cos_sin + half + i, left);
    store(out + i, plus_product(a * cos, -b, sin), left);
    store(out + half + i, plus_product(b * cos, a, sin), left);
  }
}

// --- cells of the KV cache: numbers, or codes with a scale (cache_codes.py) ------------------

constexpr uint32_t INFINITE = 0x7f800000, LEAST = 0x21800000, KEPT = 0x7fff0000;  // of a scale
template <class C> struct Codes;                                                  // largest: code that is used
template <> struct Codes<int8_t> {
  static constexpr float largest = 127;
  static int8_t encode(float x) { return (int8_t)std::nearbyint(x); }
};
template <> struct Codes<e4m3> {
  static constexpr float largest = 256;
  static e4m3 encode(float x) {  // to nearest, ties to even
    const uint32_t bits = to_bits(x), size = bits & 0x7fffffff;
    const uint32_t normal = ((size + 0x7ffff + ((size >> 20) & 1)) >> 20) - (120 << 3);
    const uint32_t denormal = to_bits(from_bits(size) + 0x1p14f) - to_bits(0x1p14f);  // of 2^-9
    return {(uint8_t)((bits >> 24 & 0x80) | (size < to_bits(0x1p-6f) ? denormal : normal))};
  }
};

template <class T> inline void store_cell(const T* row, T* cell, bf16*, int64_t, int64_t dim) {
  std::memcpy(cell, row, dim * sizeof(T));
}
template <class T, class C>
inline void store_cell(const T* row, C* cell, bf16* scales, int64_t nth, int64_t dim) {
  constexpr float largest = Codes<C>::largest;
  uint32_t highest = 0;  // sizes order as their bits do, and NaN is beyond infinity
  for (int64_t d = 0; d < dim; d++) highest = std::max(highest, to_bits(number(row[d])) & 0x7fffffff);
  highest = std::min(to_bits(from_bits(highest) / largest), INFINITE);
  highest = std::max((highest + 0xffff) & KEPT, LEAST);
  scales[nth].bits = highest >> 16;
  const float unit = from_bits(highest);
  for (int64_t d = 0; d < dim; d++)
    cell[d] = Codes<C>::encode(std::max(-largest, std::min(largest, number(row[d]) / unit)));
}

// cos_sin, both weights and scales may be null. A token whose slot is negative is not stored.
template <class T, class C>
void qkv_rope_store(const T* qkv, const float* cos_sin, C* cache, bf16* scales, const int64_t* slots,
                    const T* q_weight, const T* k_weight, T* q_out, int64_t tokens, int64_t heads, int64_t kv_heads,
                    int64_t dim, int64_t num_blocks, int64_t block_size, float eps) {
  const int64_t width = (heads + 2 * kv_heads) * dim, values = num_blocks * kv_heads * block_size * dim;
#pragma omp parallel for if (tokens * width > SMALL)
  for (int64_t token = 0; token < tokens; token++) {
    const T* in = qkv + token * width;
    const float* angles = cos_sin ? cos_sin + token * dim : nullptr;
    for (int64_t head = 0; head < heads; head++, in += dim)
      norm_and_rotate(in, q_weight, angles, q_out + (token * heads + head) * dim, dim, eps);
    if (slots[token] < 0) continue;
    const int64_t block = slots[token] / block_size, offset = slots[token] % block_size;
    for (int64_t head = 0; head < kv_heads; head++, in += dim) {
      const int64_t place = (block * kv_heads + head) * block_size + offset;
      T key[MAX_DIM];
      norm_and_rotate(in, k_weight, angles, key, dim, eps);
      store_cell(key, cache + place * dim, scales, 2 * place, dim);
      store_cell(in + kv_heads * dim, cache + place * dim + values, scales, 2 * place + 1, dim);
    }
  }
}

// --- attention of one query token per request --------------------------------

// A query head on its way through the keys: online softmax (Milakov and Gimelshein, 2018).
struct Head {
  float q[MAX_DIM];    // times the scale
  float acc[MAX_DIM];  // sum of exp(score - top) * value
  float top, total;    // highest score so far, sum of exp(score - top)
};

// Of TILE cells that codes are in, in turn: what their keys and their values are multiplied by.
struct Scales {
  float key[TILE], value[TILE];
};

template <class T> inline void prefetch_row(const T* row, int64_t dim) {
  for (int64_t i = 0; i < dim; i += 64 / sizeof(T)) __builtin_prefetch(row + i);
}

// Adds N vectors of weighted values, at dimension d, to G heads.
template <class T, int G, int N>
inline void add_values(Head* heads, const float (*weights)[TILE], const T* const* keys, int64_t values, int64_t count,
                       int64_t d) {
  f32 acc[G][N];
  for (int g = 0; g < G; g++)
    for (int n = 0; n < N; n++) acc[g][n] = load(heads[g].acc + d + n * W);
  for (int64_t t = 0; t < count; t++)
    for (int n = 0; n < N; n++) {
      f32 value = load(keys[t] + values + d + n * W);
      for (int g = 0; g < G; g++) acc[g][n] = plus_product(acc[g][n], all(weights[g][t]), value);
    }
  for (int g = 0; g < G; g++)
    for (int n = 0; n < N; n++) store(heads[g].acc + d + n * W, acc[g][n]);
}

// Takes G heads past `count` keys, 1 to TILE; values: the distance from a key to its value. Of the 2 * TILE pointers
// those from `count` on are readable too: some fill up a vector (their scores are dropped), the rest are fetched ahead.
// scales: null where cells are numbers.
template <class T, int G>
void attend(Head* heads, const T* const* keys, const Scales* scales, int64_t values, int64_t count, int64_t dim) {
  float weights[G][TILE];
  i32 lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  for (int64_t t = 0; t < count; t += W) {
    f32 products[G][W];
    for (int i = 0; i < W; i++) {
      f32 product[G] = {};
      for (int64_t d = 0; d < dim; d += W) {
        f32 key = load(keys[t + i] + d);
        for (int g = 0; g < G; g++) product[g] = plus_product(product[g], load(heads[g].q + d), key);
      }
      for (int g = 0; g < G; g++) products[g][i] = product[g];
      prefetch_row(keys[t + i] + values, dim);
      prefetch_row(keys[t + i + TILE], dim);
    }
    const f32 scale = scales ? load(scales->key + t) : all(1);
    for (int g = 0; g < G; g++)
      store(weights[g] + t, lane < (int32_t)(count - t) ? sums(products[g]) * scale : all(-INFINITY));
  }
  for (int g = 0; g < G; g++) {
    f32 highest = all(heads[g].top), total = {};
    for (int64_t t = 0; t < count; t += W) {
      f32 scores = load(weights[g] + t);
      highest = scores > highest ? scores : highest;
    }
    float top = highest[0];
    for (int i = 1; i < W; i++) top = std::max(top, highest[i]);
    for (int64_t t = 0; t < count; t += W) {
      f32 weight = exponential(load(weights[g] + t) - top);
      total += weight;
      store(weights[g] + t, scales ? weight * load(scales->value + t) : weight);
    }
    float shrink = std::exp(heads[g].top - top);
    heads[g].total = heads[g].total * shrink + sum(total);
    heads[g].top = top;
    for (int64_t d = 0; d < dim; d += W) store(heads[g].acc + d, load(heads[g].acc + d) * shrink);
  }
  int64_t d = 0;
  for (; d + 2 * W <= dim; d += 2 * W) add_values<T, G, 2>(heads, weights, keys, values, count, d);
  if (d < dim) add_values<T, G, 1>(heads, weights, keys, values, count, d);
}

// table [n, table_stride]; sinks [num_heads] may be null; window 0: none. All heads that share a KV head go through it
// together, so it is read once.
template <class T, class C>
void decode_attention(const T* q, const C* cache, const bf16* scales, const int32_t* table, const int32_t* seq_lens,
                      const float* sinks, T* out, int64_t n, int64_t num_heads, int64_t kv_heads, int64_t dim,
                      int64_t num_blocks, int64_t block_size, int64_t table_stride, int64_t window, float scale) {
  const int64_t group = num_heads / kv_heads, head_stride = block_size * dim, block_stride = kv_heads * head_stride;
  const int64_t values = num_blocks * block_stride;  // from a key to its value
  int64_t work = 0;
  for (int64_t r = 0; r < n; r++) work += seq_lens[r] * kv_heads * dim;
#pragma omp parallel for schedule(dynamic, 1) if (work > SMALL)
  for (int64_t task = 0; task < n * kv_heads; task++) {
    const int64_t request = task / kv_heads, kv_head = task % kv_heads, len = seq_lens[request];
    const int64_t first_row = (request * num_heads + kv_head * group) * dim;
    Head heads[MAX_GROUP];
    for (int64_t g = 0; g < group; g++) {
      heads[g].top = sinks ? sinks[kv_head * group + g] : -INFINITY, heads[g].total = sinks ? 1 : 0;
      for (int64_t d = 0; d < dim; d += W) {
        store(heads[g].q + d, load(q + first_row + g * dim + d) * scale);
        store(heads[g].acc + d, f32{});
      }
    }
    // Where the next 2 * TILE keys lie; behind the last one, that one again.
    const C* keys[2 * TILE];
    int64_t position = window > 0 ? std::max<int64_t>(0, len - window) : 0, ahead = position;
    const int32_t* block = table + request * table_stride + position / block_size;
    const C* first = cache + kv_head * head_stride;
    int64_t offset = position % block_size;
    const C* key = len ? first + *block * block_stride + offset * dim : nullptr;
    auto locate = [&](const C** rows) {
      for (int t = 0; t < TILE; t++) {
        rows[t] = key;
        if (++ahead >= len) continue;
        key += dim;
        if (++offset == block_size) offset = 0, key = first + *++block * block_stride;
      }
    };
    locate(keys);
    for (; position < len; position += TILE) {
      locate(keys + TILE);
      const int64_t count = std::min<int64_t>(TILE, len - position);
      Scales tile;
      for (int t = 0; scales && t < TILE; t++) {
        const bf16* pair = scales + (keys[t] - cache) / dim * 2;
        tile.key[t] = number(pair[0]), tile.value[t] = number(pair[1]);
      }
      const Scales* units = scales ? &tile : nullptr;
      for (int64_t g = 0; g < group;) switch (std::min<int64_t>(group - g, 4)) {
          case 4: attend<C, 4>(heads + g, keys, units, values, count, dim), g += 4; break;
          case 3: attend<C, 3>(heads + g, keys, units, values, count, dim), g += 3; break;
          case 2: attend<C, 2>(heads + g, keys, units, values, count, dim), g += 2; break;
          default: attend<C, 1>(heads + g, keys, units, values, count, dim), g += 1;
        }
      std::copy(keys + TILE, keys + 2 * TILE, keys);
    }
    for (int64_t g = 0; g < group; g++)
      for (int64_t d = 0; d < dim; d += W)
        store(out + first_row + g * dim + d, len ? load(heads[g].acc + d) / heads[g].total : f32{});
  }
}
}  // namespace

// Found by name, as pointers to functions.
#define EXPORT(NAME)                                \
  extern "C" {                                      \
  decltype(&NAME<float>) NAME##_float32 = NAME;     \
  decltype(&NAME<bf16>) NAME##_bfloat16 = NAME;     \
  }
EXPORT(add_rms_norm)
EXPORT(silu_and_mul)
EXPORT(gelu_and_mul)
// By the type of the inputs and that of the cache.
#define EXPORT_CACHED(NAME)                                                 \
  extern "C" {                                                              \
  decltype(&NAME<float, float>) NAME##_float32 = NAME;                      \
  decltype(&NAME<bf16, bf16>) NAME##_bfloat16 = NAME;                       \
  decltype(&NAME<float, int8_t>) NAME##_float32_int8 = NAME;                \
  decltype(&NAME<bf16, int8_t>) NAME##_bfloat16_int8 = NAME;                \
  decltype(&NAME<float, e4m3>) NAME##_float32_float8_e4m3fn = NAME;         \
  decltype(&NAME<bf16, e4m3>) NAME##_bfloat16_float8_e4m3fn = NAME;         \
  }
EXPORT_CACHED(qkv_rope_store)
EXPORT_CACHED(decode_attention)
