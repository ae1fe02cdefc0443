"""The narrow products of low-rank layers as CUDA kernels, for half-precision arrays.

Each reads its wide array once, with 16 bytes a load, and keeps what is narrow in registers: cuBLAS
takes a product, a sum over splits and a clearing of memory for the same, for every layer. Tiles are
those of mma.sync m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"); which of the summed
elements goes into which place of a fragment is free, so a thread takes eight neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import mlx.core as mx

from nested_core.kernels.constants import constant

WARPS = 8
THREADS = 32 * WARPS
TILE = 8  # rows of a factor in one fragment
DEPTH = 32  # elements of a row that a warp takes at once
COLUMNS = 64  # of a wide array that a block takes
BLOCKS = 264  # two for each multiprocessor of an H200

Pairs = Sequence[tuple[mx.array, mx.array]]

FRAGMENTS = """
template <typename T>
__device__ inline void multiply_add(
    float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  if constexpr (cuda::std::is_same_v<T, __half>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}
"""

# out[n, row] = scales[n] sum_k m[n, k] x[row, k] for 16 rows a block and all n; a warp takes every
# WARPS-th 32 of k, and the warps' sums are added in their order.
NARROW = """
template <typename T, int NT>
__device__ void narrow(
    const T* x, const T* m, const float* scales, T* out, int rows, int k, float* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first = blockIdx.x * 16;
  const uint4* upper = reinterpret_cast<const uint4*>(x + (long)min(first + g, rows - 1) * k) + t;
  const uint4* lower =
      reinterpret_cast<const uint4*>(x + (long)min(first + 8 + g, rows - 1) * k) + t;
  const uint4* factor = reinterpret_cast<const uint4*>(m + (long)g * k) + t;
  float c[NT][4] = {};
  #pragma unroll 2
  for (int chunk = warp; chunk < k / 32; chunk += WARPS) {
    uint4 a = upper[4 * chunk], e = lower[4 * chunk], b[NT];
    #pragma unroll
    for (int n = 0; n < NT; ++n) b[n] = factor[(long)n * k + 4 * chunk];
    #pragma unroll
    for (int n = 0; n < NT; ++n) {
      multiply_add<T>(c[n], a.x, e.x, a.y, e.y, b[n].x, b[n].y);
      multiply_add<T>(c[n], a.z, e.z, a.w, e.w, b[n].z, b[n].w);
    }
  }
  #pragma unroll
  for (int n = 0; n < NT; ++n) {
    #pragma unroll
    for (int j = 0; j < 4; ++j) {
      int row = g + 8 * (j / 2), column = 8 * n + 2 * t + j % 2;
      shared[(warp * 8 * NT + column) * 17 + row] = c[n][j];
    }
  }
  __syncthreads();
  for (int place = threadIdx.x; place < 16 * 8 * NT; place += WARPS * 32) {
    int row = place % 16, column = place / 16;
    float sum = 0;
    for (int w = 0; w < WARPS; ++w) sum += shared[(w * 8 * NT + column) * 17 + row];
    if (first + row < rows) {
      out[(long)column * rows + first + row] = static_cast<T>(sum * scales[column]);
    }
  }
}
"""

# out[r, column] = sum over rows of z[r, row] x[row, column], for 64 columns a block and its share
# of the rows; a warp takes every WARPS-th 16 of them.
OUTER = """
template <typename T>
__device__ inline unsigned two(const T* z, int row, int end) {
  unsigned short low = 0, high = 0;
  if (row < end) low = reinterpret_cast<const unsigned short*>(z)[row];
  if (row + 1 < end) high = reinterpret_cast<const unsigned short*>(z)[row + 1];
  return low | (unsigned)high << 16;
}

template <typename T, int NT>
__device__ void outer(
    const T* z, const T* x, float* out, int rows, int n, int tile, int begin, int end,
    float* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float c[NT][4][4] = {};
  const T* from = x + tile * 64 + 8 * g;
  #pragma unroll 2
  for (int first = begin + 16 * warp; first < end; first += 16 * WARPS) {
    uint4 v[4];
    #pragma unroll
    for (int q = 0; q < 4; ++q) {
      int row = first + 2 * t + q % 2 + 8 * (q / 2);
      v[q] = make_uint4(0, 0, 0, 0);
      if (row < end) v[q] = *reinterpret_cast<const uint4*>(from + (long)row * n);
    }
    const unsigned (*w)[4] = reinterpret_cast<const unsigned (*)[4]>(v);
    #pragma unroll
    for (int i = 0; i < NT; ++i) {
      const T* factor = z + (long)(8 * i + g) * rows;
      unsigned b0 = two(factor, first + 2 * t, end), b1 = two(factor, first + 2 * t + 8, end);
      #pragma unroll
      for (int j = 0; j < 4; ++j) {
        multiply_add<T>(c[i][j],
            __byte_perm(w[0][j], w[1][j], 0x5410), __byte_perm(w[0][j], w[1][j], 0x7632),
            __byte_perm(w[2][j], w[3][j], 0x5410), __byte_perm(w[2][j], w[3][j], 0x7632), b0, b1);
      }
    }
  }
  for (int i = 0; i < NT; ++i) {
    #pragma unroll
    for (int j = 0; j < 4; ++j) {
      #pragma unroll
      for (int p = 0; p < 4; ++p) {
        int r = 2 * t + p % 2, column = 8 * g + 2 * j + p / 2;
        shared[(warp * 8 + r) * 66 + column] = c[i][j][p];
      }
    }
    __syncthreads();
    for (int place = threadIdx.x; place < 8 * 64; place += WARPS * 32) {
      int r = place / 64, column = place % 64;
      float sum = 0;
      for (int u = 0; u < WARPS; ++u) sum += shared[(u * 8 + r) * 66 + column];
      out[(long)(8 * i + r) * n + tile * 64 + column] = sum;
    }
    __syncthreads();
  }
}
"""

SUM = """
    int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    int total = parts_shape[1];
    if (i >= total) return;
    float4 sum = *reinterpret_cast<const float4*>(parts + i);
    for (int s = 1; s < parts_shape[0]; ++s) {
        float4 next = *reinterpret_cast<const float4*>(parts + (long)s * total + i);
        sum.x += next.x; sum.y += next.y; sum.z += next.z; sum.w += next.w;
    }
    struct alignas(8) Pack { T value[4]; };
    Pack pack = {{static_cast<T>(sum.x), static_cast<T>(sum.y),
                  static_cast<T>(sum.z), static_cast<T>(sum.w)}};
    *reinterpret_cast<Pack*>(out + i) = pack;
"""


def narrow(pairs: Pairs, scales: Sequence[float]) -> mx.array:
    """Each pair's m @ x.T, one above the other, times scales: (ranks, rows).

    m is (rank, width of its own), x (rows, width); a scale for each row.
    """
    rows, dtype = pairs[0][1].shape[0], pairs[0][1].dtype
    tiles = [m.shape[0] // TILE for m, _ in pairs]
    (found,) = _narrow(tuple(tiles))(
        inputs=[*(each for pair in pairs for each in pair), constant(tuple(scales))],
        template=[("T", dtype)],
        grid=(-(-rows // 16) * THREADS, len(pairs), 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(TILE * sum(tiles), rows)],
        output_dtypes=[dtype],
    )
    result: mx.array = found
    return result


@cache
def _narrow(tiles: tuple[int, ...]) -> Any:
    names = [name for i in range(len(tiles)) for name in (f"m{i}", f"x{i}")]
    starts = [TILE * start for start in accumulate(tiles, initial=0)]
    cases = [
        f"case {i}: narrow<T, {tiles[i]}>(x{i}, m{i}, scales + {starts[i]}, "
        f"out + (long){starts[i]} * rows, rows, x{i}_shape[1], shared); break;"
        for i in range(len(tiles))
    ]
    size = WARPS * TILE * max(tiles) * 17
    return mx.fast.cuda_kernel(
        name="_".join(["narrow", *map(str, tiles)]),
        input_names=[*names, "scales"],
        output_names=["out"],
        source=f"__shared__ float shared[{size}]; int rows = x0_shape[0];\n"
        f"switch (blockIdx.y) {{ {' '.join(cases)} }}",
        header=f"#define WARPS {WARPS}\n{FRAGMENTS}{NARROW}",
    )


def outer(pairs: Pairs) -> list[mx.array]:
    """Each pair's z @ x; z is (rank, rows), x (rows, width of its own)."""
    rows = pairs[0][1].shape[0]
    tiles = [z.shape[0] // TILE for z, _ in pairs]
    widths = [x.shape[1] for _, x in pairs]
    total = sum(TILE * t * w for t, w in zip(tiles, widths, strict=True))
    blocks = sum(widths) // COLUMNS
    splits = max(1, min(-(-BLOCKS // blocks), rows // (16 * WARPS)))
    (parts,) = _outer(tuple(tiles))(
        inputs=[each for pair in pairs for each in pair],
        template=[("T", pairs[0][0].dtype)],
        grid=(blocks * THREADS, splits, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(splits, total)],
        output_dtypes=[mx.float32],
    )
    (whole,) = _sum()(
        inputs=[parts],
        template=[("T", pairs[0][0].dtype)],
        grid=(-(-total // 4), 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(total,)],
        output_dtypes=[pairs[0][0].dtype],
    )
    found, start = [], 0
    for t, w in zip(tiles, widths, strict=True):
        found.append(whole[start : start + TILE * t * w].reshape(TILE * t, w))
        start += TILE * t * w
    return found


@cache
def _outer(tiles: tuple[int, ...]) -> Any:
    names = [name for i in range(len(tiles)) for name in (f"z{i}", f"x{i}")]
    lines = [
        "int rows = x0_shape[0], tile = blockIdx.x;",
        "int span = (rows + 16 * gridDim.y - 1) / (16 * gridDim.y) * 16;",
        "int begin = blockIdx.y * span, end = min(rows, begin + span);",
        "long total = 0, start = 0;",
    ]
    lines += [f"total += {TILE * tile}l * x{i}_shape[1];" for i, tile in enumerate(tiles)]
    lines += ["out += blockIdx.y * total;"]
    for i, tile in enumerate(tiles):
        lines += [
            f"if (tile >= 0 && tile < x{i}_shape[1] / 64)"
            f" outer<T, {tile}>(z{i}, x{i}, out + start, rows, x{i}_shape[1], tile, begin, end,"
            f" shared);",
            f"tile -= x{i}_shape[1] / 64; start += {TILE * tile}l * x{i}_shape[1];",
        ]
    return mx.fast.cuda_kernel(
        name="_".join(["outer", *map(str, tiles)]),
        input_names=names,
        output_names=["out"],
        source=f"__shared__ float shared[{WARPS * TILE * 66}];\n" + "\n".join(lines),
        header=f"#define WARPS {WARPS}\n{FRAGMENTS}{OUTER}",
    )


@cache
def _sum() -> Any:
    return mx.fast.cuda_kernel(
        name="sum_of_parts", input_names=["parts"], output_names=["out"], source=SUM
    )
