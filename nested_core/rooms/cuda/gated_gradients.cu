#include "low_rank_sum.cuh"

// What `gated_product` gives, again, and the gradients with respect to gate and up; its own gradient is a sum
// too.
__device__ inline void through(float (&gate)[W], float (&up)[W], float (&g)[W]) {
  #pragma unroll
  for (int k = 0; k < W; ++k) {
    float v = gate[k], u = up[k], given = g[k], s = sigmoid(v);
    gate[k] = given * u * slope_of_silu(v, s);
    up[k] = given * v * s;
    g[k] = v * s * u;
  }
}

KERNEL_BESIDE(MOST == 1 ? 3 : 1) gated_gradients(
    const T* gate, const T* z_gate, const T* b_gate, const T* up, const T* z_up, const T* b_up,
    const T* g, const T* z_g, const T* b_g, T* d_gate, T* d_up, T* out, int rows, int steps,
    int width, int n_gate, int n_up, int n_g) {
  const int column = column_of_warp(), first = blockIdx.y * steps * 16;
  if (column >= width) return;
  const Factor of_gate = load_factor(b_gate, n_gate, width, column);
  const Factor of_up = load_factor(b_up, n_up, width, column);
  const Factor of_g = load_factor(b_g, n_g, width, column);
  for (int row = first; row < min(rows, first + steps * 16); row += 16) {
    const Term a = load_term(gate, z_gate, n_gate, rows, width, row, column);
    const Term b = load_term(up, z_up, n_up, rows, width, row, column);
    const Term c = load_term(g, z_g, n_g, rows, width, row, column);
    Sum v = sum(a, of_gate, n_gate), u = sum(b, of_up, n_up), d = sum(c, of_g, n_g);
    through(v.upper, u.upper, d.upper);
    through(v.lower, u.lower, d.lower);
    store(d_gate, v, rows, width, row, column);
    store(d_up, u, rows, width, row, column);
    store(out, d, rows, width, row, column);
  }
}
