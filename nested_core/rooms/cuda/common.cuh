// What the kernels share: numbers of 16 bits, loads of eight of them, fragments of matrices.
//
// Compiled by NVRTC without any header. Arrays are of bfloat16, sums in float32. A kernel has the
// name of its file, and takes the arrays that MLX gives, the arrays that it fills, and numbers.

struct T { unsigned short bits; };  // bfloat16: the upper half of a float32

__device__ inline float wide(T v) { return __uint_as_float((unsigned)v.bits << 16); }
__device__ inline T narrowed(float f) {
  T v;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
  return v;
}

// silu(v) = v s, where s = sigmoid(v); its derivative is s (1 + v (1 - s)).
__device__ inline float sigmoid(float v) { return __fdividef(1.f, 1.f + __expf(-v)); }
__device__ inline float slope_of_silu(float v, float s) { return s + v * s * (1.f - s); }

constexpr int W = 8;  // elements of a load
struct alignas(16) Pack { T value[W]; };

// What a kernel is given does not change while it runs, so a load may be moved over a store.
__device__ inline unsigned load_two(const T* from) {
  unsigned v;
  asm("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}
__device__ inline uint2 load_four(const T* from) {
  uint2 v;
  asm("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}
__device__ inline uint4 load_eight(const T* from) {
  uint4 v;
  asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}
__device__ inline Pack load(const T* from) {
  uint4 v = load_eight(from);
  return *reinterpret_cast<Pack*>(&v);
}
__device__ inline void store(T* to, const Pack& pack) { *reinterpret_cast<Pack*>(to) = pack; }

// Tiles are those of mma.sync m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"). Which of the
// summed elements goes into which place of a fragment is free where both factors agree, so a thread
// takes eight neighbours at once. In a warp, g is a thread's group of four and t its place in it.

constexpr int WARPS = 8;

__device__ inline void multiply_add(
    float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline void multiply_add(float (&c)[4], unsigned a0, unsigned a1, unsigned b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b));
}

#define KERNEL extern "C" __global__ __launch_bounds__(32 * WARPS) void
// The same with at least so many blocks on a multiprocessor: fewer registers, more loads at once.
#define KERNEL_BESIDE(BLOCKS) extern "C" __global__ __launch_bounds__(32 * WARPS, BLOCKS) void
