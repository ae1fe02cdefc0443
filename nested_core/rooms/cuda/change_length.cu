#include "common.cuh"

// Up to three arrays (examples, length, width) copied to another length, each in a row of the grid:
// positions that there were not are zero, those beyond are left out. Widths are in units of 16 bytes.
KERNEL change_length(
    const uint4* a0, const uint4* a1, const uint4* a2, uint4* out0, uint4* out1, uint4* out2,
    int examples, int from, int to, int width0, int width1, int width2) {
  const int array = blockIdx.y;
  const uint4* a = array == 0 ? a0 : array == 1 ? a1 : a2;
  uint4* out = array == 0 ? out0 : array == 1 ? out1 : out2;
  const int width = array == 0 ? width0 : array == 1 ? width1 : width2;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= examples * to * width) return;
  const int row = i / width, example = row / to, position = row % to;
  uint4 value = {0, 0, 0, 0};
  if (position < from) value = a[((long)example * from + position) * width + i % width];
  out[i] = value;
}
