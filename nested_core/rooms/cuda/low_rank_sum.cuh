#include "common.cuh"

// What low-rank layers add: x + z^T b, where x is (rows, width), z (8 n, rows) and b (8 n, width).
//
// A warp takes 32 columns and 16 rows after 16 rows, a thread eight neighbours in two rows. Rows are
// even, and widths multiples of 32. MOST tiles are what a kernel is made for: n <= MOST.

// Four columns of a factor's rows 2t and 2t + 1, in each tile.
struct Factor { uint2 even[MOST], odd[MOST]; };

// What a thread reads for one sum: its eights, and two columns of z in the same rows.
struct Term { Pack upper, lower; unsigned even[MOST], odd[MOST]; };

struct Sum { float upper[W], lower[W]; };

__device__ inline Factor load_factor(const T* b, int n, int width, int column) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  Factor found;
  #pragma unroll
  for (int i = 0; i < MOST; ++i) {
    const T* from = b + (8 * min(i, n - 1) + 2 * t) * width + column + 4 * g;
    found.even[i] = load_four(from);
    found.odd[i] = load_four(from + width);
  }
  return found;
}

__device__ inline Term load_term(
    const T* x, const T* z, int n, int rows, int width, int row, int column) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int at = min(row + 2 * g, rows - 2);
  const T* from = x + (long)at * width + column + 8 * t;
  Term found = {load(from), load(from + width)};
  #pragma unroll
  for (int i = 0; i < MOST; ++i) {
    const T* narrow = z + (8 * min(i, n - 1) + 2 * t) * rows + at;
    found.even[i] = load_two(narrow);
    found.odd[i] = load_two(narrow + rows);
  }
  return found;
}

// Column 4 i + j of a warp's 32 is column i of the jth tile, so that a thread reads four neighbours
// of a factor, and has eight of a sum.
__device__ inline Sum sum(const Term& term, const Factor& b, int n) {
  float c[4][4];
  #pragma unroll
  for (int j = 0; j < 4; ++j) {
    c[j][0] = wide(term.upper.value[j]), c[j][1] = wide(term.upper.value[4 + j]);
    c[j][2] = wide(term.lower.value[j]), c[j][3] = wide(term.lower.value[4 + j]);
  }
  #pragma unroll
  for (int i = 0; i < MOST; ++i) {
    if (i >= n) break;
    unsigned a0 = __byte_perm(term.even[i], term.odd[i], 0x5410);
    unsigned a1 = __byte_perm(term.even[i], term.odd[i], 0x7632);
    multiply_add(c[0], a0, a1, __byte_perm(b.even[i].x, b.odd[i].x, 0x5410));
    multiply_add(c[1], a0, a1, __byte_perm(b.even[i].x, b.odd[i].x, 0x7632));
    multiply_add(c[2], a0, a1, __byte_perm(b.even[i].y, b.odd[i].y, 0x5410));
    multiply_add(c[3], a0, a1, __byte_perm(b.even[i].y, b.odd[i].y, 0x7632));
  }
  Sum found;
  #pragma unroll
  for (int j = 0; j < 4; ++j) {
    found.upper[j] = c[j][0], found.upper[4 + j] = c[j][1];
    found.lower[j] = c[j][2], found.lower[4 + j] = c[j][3];
  }
  return found;
}

__device__ inline Pack narrowed(const float (&values)[W]) {
  Pack found;
  #pragma unroll
  for (int k = 0; k < W; ++k) found.value[k] = narrowed(values[k]);
  return found;
}

__device__ inline void store(T* to, const Sum& sum, int rows, int width, int row, int column) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, at = row + 2 * g;
  if (at >= rows) return;
  T* first = to + (long)at * width + column + 8 * t;
  store(first, narrowed(sum.upper));
  store(first + width, narrowed(sum.lower));
}

// The first column of a warp, which may lie beyond the last.
__device__ inline int column_of_warp() {
  return (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * 32;
}
