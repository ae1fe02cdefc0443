#include "low_rank_sum.cuh"

// silu(gate) up, where both are sums; a block takes `steps` times 16 rows.
__device__ inline void gated(float (&gate)[W], const float (&up)[W]) {
  #pragma unroll
  for (int k = 0; k < W; ++k) gate[k] *= sigmoid(gate[k]) * up[k];
}

KERNEL_BESIDE(MOST == 1 ? 4 : 1) gated_product(
    const T* gate, const T* z_gate, const T* b_gate, const T* up, const T* z_up, const T* b_up,
    T* out, int rows, int steps, int width, int n_gate, int n_up) {
  const int column = column_of_warp(), first = blockIdx.y * steps * 16;
  if (column >= width) return;
  const Factor of_gate = load_factor(b_gate, n_gate, width, column);
  const Factor of_up = load_factor(b_up, n_up, width, column);
  for (int row = first; row < min(rows, first + steps * 16); row += 16) {
    const Term a = load_term(gate, z_gate, n_gate, rows, width, row, column);
    const Term b = load_term(up, z_up, n_up, rows, width, row, column);
    Sum v = sum(a, of_gate, n_gate);
    const Sum u = sum(b, of_up, n_up);
    gated(v.upper, u.upper);
    gated(v.lower, u.lower);
    store(out, v, rows, width, row, column);
  }
}
