// What the kernels share: numbers of 16 bits, loads of eight of them, fragments of matrices.
//
// Compiled by NVRTC without any header. KIND is the arrays' type, sums are in float32. A kernel has
// the name of its file, and takes the arrays that MLX gives, the arrays that it fills, and numbers.

struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };
using T = KIND;

__device__ inline float wide(bf16 v) { return __uint_as_float(static_cast<unsigned>(v.bits) << 16); }
__device__ inline float wide(f16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}

template <typename N> __device__ inline N narrowed(float f);
template <> __device__ inline bf16 narrowed<bf16>(float f) {
  bf16 v;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
  return v;
}
template <> __device__ inline f16 narrowed<f16>(float f) {
  f16 v;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
  return v;
}

constexpr int W = 8;  // elements of a load
struct alignas(16) Pack { T value[W]; };

__device__ inline Pack load(const T* from) { return *reinterpret_cast<const Pack*>(from); }
__device__ inline void store(T* to, const Pack& pack) { *reinterpret_cast<Pack*>(to) = pack; }

// Tiles are those of mma.sync m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"). Which of the
// summed elements goes into which place of a fragment is free where both factors agree, so a thread
// takes eight neighbours at once. In a warp, g is a thread's group of four and t its place in it.

constexpr int WARPS = 8;

#define MULTIPLY_ADD(KIND)                                                                         \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 "                      \
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                      \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                             \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))

template <typename N> constexpr bool is_bf16 = false;
template <> constexpr bool is_bf16<bf16> = true;

__device__ inline void multiply_add(
    float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  if constexpr (is_bf16<T>) MULTIPLY_ADD("bf16"); else MULTIPLY_ADD("f16");
}

#define KERNEL extern "C" __global__ __launch_bounds__(32 * WARPS) void
