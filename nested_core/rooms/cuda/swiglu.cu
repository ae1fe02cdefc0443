#include "common.cuh"

// silu(gate) x.
KERNEL swiglu(const T* gate, const T* x, T* out, int packs) {
  long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= packs) return;
  i *= W;
  Pack a = load(gate + i), b = load(x + i);
  #pragma unroll
  for (int k = 0; k < W; ++k) {
    float v = wide(a.value[k]);
    a.value[k] = narrowed(v * sigmoid(v) * wide(b.value[k]));
  }
  store(out + i, a);
}
