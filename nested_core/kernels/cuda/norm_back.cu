// RMS normalisation, backwards.
//
// A block takes a row of n, a thread up to PACKS loads of it. With i = 1 / sqrt(mean(x^2) + eps):
// dx = w g i - x i^3 mean(w g x).
KERNEL norm_back(
    const T* x, const T* w, const T* g, T* dx, int n, float eps) {
  __shared__ float sums[2][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long row = (long)blockIdx.x * n;
  Pack given[PACKS], above[PACKS];
  float square = 0, along = 0;
  #pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    int at = (p * blockDim.x + threadIdx.x) * W;
    if (at < n) given[p] = load(x + row + at), above[p] = load(g + row + at);
  }
  #pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    int at = (p * blockDim.x + threadIdx.x) * W;
    if (at >= n) break;
    Pack weight = load(w + at);
    #pragma unroll
    for (int k = 0; k < W; ++k) {
      float a = wide(given[p].value[k]);
      square += a * a;
      along += a * wide(above[p].value[k]) * wide(weight.value[k]);
    }
  }
  #pragma unroll
  for (int o = 16; o > 0; o /= 2) {
    square += __shfl_xor_sync(0xffffffff, square, o);
    along += __shfl_xor_sync(0xffffffff, along, o);
  }
  if (lane == 0) sums[0][warp] = square, sums[1][warp] = along;
  __syncthreads();
  square = along = 0;
  for (int i = 0; i < blockDim.x / 32; ++i) square += sums[0][i], along += sums[1][i];
  const float inverse = rsqrtf(square / n + eps);
  const float factor = along / n * inverse * inverse * inverse;
  #pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    int at = (p * blockDim.x + threadIdx.x) * W;
    if (at >= n) break;
    Pack weight = load(w + at);
    #pragma unroll
    for (int k = 0; k < W; ++k) {
      given[p].value[k] = narrowed(wide(above[p].value[k]) * wide(weight.value[k]) * inverse
                                      - wide(given[p].value[k]) * factor);
    }
    store(dx + row + at, given[p]);
  }
}
