constexpr int HEADS = 4;  // that a thread turns by the angles it has read

// x and out are (tokens, heads, 2 half), table (length, 2 half): cosines, then sines; sign is -1 for
// the way back.
KERNEL turn(
    const T* x, const float* table, T* out, int tokens, int length, int heads, int half,
    float sign) {
  const int columns = half / W, groups = heads / HEADS;
  const long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (long)tokens * groups * columns) return;
  const long token = i / columns / groups;
  const int group = i / columns % groups, column = i % columns * W;
  const float* angle = table + token % length * 2 * half + column;
  float c[W], s[W];
  #pragma unroll
  for (int k = 0; k < W; ++k) c[k] = angle[k], s[k] = sign * angle[half + k];
  long at = (token * heads + group * HEADS) * 2 * half + column;
  #pragma unroll
  for (int h = 0; h < HEADS; ++h, at += 2 * half) {
    Pack low = load(x + at), high = load(x + at + half);
    #pragma unroll
    for (int k = 0; k < W; ++k) {
      float a = wide(low.value[k]), b = wide(high.value[k]);
      low.value[k] = narrowed(a * c[k] - b * s[k]);
      high.value[k] = narrowed(a * s[k] + b * c[k]);
    }
    store(out + at, low);
    store(out + at + half, high);
  }
}
