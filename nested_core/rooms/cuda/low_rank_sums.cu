#include "low_rank_sum.cuh"

// Up to four sums, one in each plane of the grid; a block takes `steps` times 16 rows.
KERNEL low_rank_sums(
    const T* x0, const T* z0, const T* b0, const T* x1, const T* z1, const T* b1, const T* x2,
    const T* z2, const T* b2, const T* x3, const T* z3, const T* b3, T* out0, T* out1, T* out2,
    T* out3, int rows, int steps, int n0, int w0, int n1, int w1, int n2, int w2, int n3, int w3) {
  const T *x = x0, *z = z0, *b = b0;
  T* out = out0;
  int n = n0, width = w0;
  if (blockIdx.z == 1) x = x1, z = z1, b = b1, out = out1, n = n1, width = w1;
  if (blockIdx.z == 2) x = x2, z = z2, b = b2, out = out2, n = n2, width = w2;
  if (blockIdx.z == 3) x = x3, z = z3, b = b3, out = out3, n = n3, width = w3;
  const int column = column_of_warp(), first = blockIdx.y * steps * 16;
  if (column >= width) return;
  const Factor factor = load_factor(b, n, width, column);
  for (int row = first; row < min(rows, first + steps * 16); row += 16) {
    const Term term = load_term(x, z, n, rows, width, row, column);
    store(out, sum(term, factor, n), rows, width, row, column);
  }
}
