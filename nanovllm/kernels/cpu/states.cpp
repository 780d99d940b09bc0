// Layers with a state, for float32 and bfloat16: twins of causal_conv.py. `state_kernels.py` checks arguments and
// allocates results.
//
// Layout    Everything but `x` is contiguous: it has any stride between tokens, the states one between slots.
// Rounding  As in cpu_kernels.cpp; states are float32.
// Threads   One thread takes some channels of a request, or a head of it, token after token: so results depend neither
//           on the threads, nor on the batch, nor on where a prompt was cut.
#include <algorithm>

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
    if (rows[request] < 0) continue;
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
}  // namespace

// Found by name, as pointers to functions.
#define EXPORT(NAME)                            \
  extern "C" {                                  \
  decltype(&NAME<float>) NAME##_float32 = NAME; \
  decltype(&NAME<bf16>) NAME##_bfloat16 = NAME; \
  }
EXPORT(causal_conv)
