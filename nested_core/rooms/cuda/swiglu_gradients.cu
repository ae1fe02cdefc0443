#include "common.cuh"

// The gradients with respect to gate and x.
KERNEL swiglu_gradients(
    const T* gate, const T* x, const T* g, T* d_gate, T* d_x, int packs) {
  long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= packs) return;
  i *= W;
  Pack a = load(gate + i), b = load(x + i), c = load(g + i);
  #pragma unroll
  for (int k = 0; k < W; ++k) {
    float v = wide(a.value[k]), u = wide(b.value[k]), given = wide(c.value[k]);
    float s = sigmoid(v);
    a.value[k] = narrowed(given * u * slope_of_silu(v, s));
    b.value[k] = narrowed(given * v * s);
  }
  store(d_gate + i, a);
  store(d_x + i, b);
}
