// Rows of norms and gated activations in C++: shared by the kernels that do nothing else and those that go on with them.
#pragma once
#include <cmath>

#include "vectors.h"

namespace {
template <class T> inline void norm_row(const T* x, const T* weight, T* out, int64_t dim, float eps) {
  f32 squares = {};
  for (int64_t i = 0; i < dim; i += W) {
    f32 v = load(x + i, dim - i);
    squares = plus_product(squares, v, v);
  }
  float scale = 1.0f / std::sqrt(sum(squares) / dim + eps);
  for (int64_t i = 0; i < dim; i += W)
    store(out + i, rounded<T>(load(x + i, dim - i) * scale) * load(weight + i, dim - i), dim - i);
}

// The norm of x + residual, which goes to total; or of x alone. residual and total: both or neither.
template <class T>
inline void add_and_norm_row(const T* x, const T* residual, const T* weight, T* out, T* total, int64_t dim, float eps) {
  if (residual) {
    for (int64_t i = 0; i < dim; i += W) store(total + i, load(x + i, dim - i) + load(residual + i, dim - i), dim - i);
    x = total;
  }
  norm_row(x, weight, out, dim, eps);
}

// The activation is gate * logistic(slope): slope is the gate for SiLU; for GELU's tanh form it is twice tanh's argument.
template <class T, bool GELU> inline void gate_row(const T* gate_up, T* out, int64_t dim) {
  const T *gates = gate_up, *ups = gates + dim;
  for (int64_t i = 0; i < dim; i += W) {
    f32 gate = load(gates + i, dim - i);
    f32 slope = GELU ? 1.5957691216f * (gate + 0.044715f * gate * gate * gate) : gate;
    store(out + i, rounded<T>(gate / (1.0f + exponential(-slope))) * load(ups + i, dim - i), dim - i);
  }
}
}  // namespace
