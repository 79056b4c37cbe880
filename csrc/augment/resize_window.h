// One axis of a window in Pillow's own whole numbers: a sum of levels times weights, in parts of 2^22, begins at a
// half, is shifted down and cut to a level. So it has Pillow's bits, whichever instruction set adds up.

static constexpr int64_t columns_per_block = 64;  // of the pass down: its sums stay in the first cache

static FASTJEM_INLINE uint8_t to_level(int32_t sum) {
  const int32_t level = sum >> weight_bits;
  return static_cast<uint8_t>(level < 0 ? 0 : level > 255 ? 255 : level);
}

// Red, green, blue and what stands behind them as one vector: sums of three stay scalar.
#if defined(__GNUC__)
typedef int32_t PixelSums __attribute__((vector_size(16)));
#else
struct PixelSums {
  int32_t v[4];
  PixelSums& operator+=(const PixelSums& o) {
    for (int i = 0; i < 4; ++i) v[i] += o.v[i];
    return *this;
  }
};
static inline PixelSums operator*(int32_t w, const PixelSums& p) {
  return {{w * p.v[0], w * p.v[1], w * p.v[2], w * p.v[3]}};
}
#endif
static FASTJEM_INLINE PixelSums load_sums(const int32_t* from) {
  PixelSums sums;
  std::memcpy(&sums, from, sizeof(sums));
  return sums;
}

// Rows [rows, length, 3] -> [rows, size, 3]. Each is widened before and narrowed after, as a contiguous whole. A pixel
// is read with the red of the next, and written with a fourth sum that the next one overwrites.
static void resize_across(const uint8_t* in, int64_t stride, int64_t rows, const WindowAxis& axis, int32_t* wide,
                          int32_t* sums, uint8_t* out) {
  for (int64_t y = 0; y < rows; ++y, in += stride, out += 3 * axis.size) {
#pragma omp simd
    for (int64_t x = 0; x < 3 * axis.length; ++x) wide[x] = in[x];
    const int32_t* weight = axis.weights;
    for (int64_t j = 0; j < axis.size; ++j) {
      const int32_t* from = wide + 3 * axis.first[j];
      PixelSums pixel = {half_weight, half_weight, half_weight, half_weight};
      for (int64_t t = 0; t < axis.taps; ++t) pixel += *weight++ * load_sums(from + 3 * t);
      std::memcpy(sums + 3 * j, &pixel, sizeof(pixel));
    }
#pragma omp simd
    for (int64_t x = 0; x < 3 * axis.size; ++x) out[x] = to_level(sums[x]);
  }
}

// `n` levels of one row, from the rows above each other that it is made of.
static FASTJEM_INLINE void block_down(const uint8_t* in, int64_t stride, const int32_t* weights, int64_t taps,
                                      uint8_t* out, int64_t n) {
  int32_t sums[columns_per_block];
  for (int64_t i = 0; i < n; ++i) sums[i] = half_weight;
  for (int64_t t = 0; t < taps; ++t, in += stride) {
    const int32_t weight = weights[t];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sums[i] += weight * in[i];
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = to_level(sums[i]);
}

// Rows [length, columns] -> [size, columns].
static void resize_down(const uint8_t* in, int64_t stride, int64_t columns, const WindowAxis& axis, uint8_t* out) {
  for (int64_t j = 0; j < axis.size; ++j, out += columns) {
    const int32_t* weights = axis.weights + axis.taps * j;
    const uint8_t* from = in + stride * axis.first[j];
    int64_t x = 0;
    for (; x + columns_per_block <= columns; x += columns_per_block) {
      block_down(from + x, stride, weights, axis.used[j], out + x, columns_per_block);
    }
    if (x < columns) block_down(from + x, stride, weights, axis.used[j], out + x, columns - x);
  }
}

static void resize_window(const Window& w) {
  const int64_t across = 3 * w.across.size;
  const int64_t length = 3 * w.across.length;
  if (w.down_first) {
    resize_down(w.pixels, w.stride, length, w.down, w.between);
    resize_across(w.between, length, w.down.size, w.across, w.wide, w.sums, w.out);
  } else {
    resize_across(w.pixels, w.stride, w.down.length, w.across, w.wide, w.sums, w.between);
    resize_down(w.between, across, across, w.down, w.out);
  }
}
