#include "common.cuh"

// Up to 32 arrays one after the other, each in a plane of the grid; ends are in units of 16 bytes.
#define EACH(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11) M(12) M(13) M(14)    \
  M(15) M(16) M(17) M(18) M(19) M(20) M(21) M(22) M(23) M(24) M(25) M(26) M(27) M(28) M(29) M(30)
#define ARRAY(i) const uint4* a##i,
#define END(i) int end##i,
#define CASE(i) case i: from = a##i, end = end##i; break;
#define NEXT(i) case i + 1: start = end##i; break;

KERNEL concatenate(EACH(ARRAY) const uint4* a31, uint4* out, EACH(END) int end31) {
  const uint4* from = a31;
  int start = 0, end = end31;
  switch (blockIdx.y) { EACH(CASE) }
  switch (blockIdx.y) { EACH(NEXT) }
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < end - start; i += gridDim.x * blockDim.x) {
    out[start + i] = from[i];
  }
}
