// Images [begin, end), a row of pixels at a time in float planes that stay in the L1 cache: colour steps, the
// horizontal blur into a ring of as many rows as the vertical blur looks at, that blur, solarize, normalise, store. The
// mean that contrast needs takes a pass of its own before, over the steps that come before it.

static constexpr float kGray[3] = {0.2989f, 0.587f, 0.114f};
static constexpr int kOrders[24][4] = {
    {0, 1, 2, 3}, {0, 1, 3, 2}, {0, 2, 1, 3}, {0, 2, 3, 1}, {0, 3, 1, 2}, {0, 3, 2, 1}, {1, 0, 2, 3}, {1, 0, 3, 2},
    {1, 2, 0, 3}, {1, 2, 3, 0}, {1, 3, 0, 2}, {1, 3, 2, 0}, {2, 0, 1, 3}, {2, 0, 3, 1}, {2, 1, 0, 3}, {2, 1, 3, 0},
    {2, 3, 0, 1}, {2, 3, 1, 0}, {3, 0, 1, 2}, {3, 0, 2, 1}, {3, 1, 0, 2}, {3, 1, 2, 0}, {3, 2, 0, 1}, {3, 2, 1, 0}};
static constexpr int kBrightness = 0, kContrast = 1, kSaturation = 2, kHue = 3;

static FASTJEM_INLINE float at_least_0(float x) { return x > 0.0f ? x : 0.0f; }  // NaN becomes 0

// To [0, 255], and with EXACT cut off to a whole number.
template <bool EXACT>
static FASTJEM_INLINE float whole(float x) {
  x = at_least_0(x);
  x = x < 255.0f ? x : 255.0f;
  return EXACT ? static_cast<float>(static_cast<int32_t>(x)) : x;
}

template <bool EXACT>
static FASTJEM_INLINE float gray(float r, float g, float b) {
  const float y = kGray[0] * r + kGray[1] * g + kGray[2] * b;
  return EXACT ? static_cast<float>(static_cast<int32_t>(y)) : y;
}

static inline void read_row(const uint8_t* in, int64_t width, bool flip, float* row) {
  float *r = row, *g = row + width, *b = row + 2 * width;
#pragma omp simd
  for (int64_t x = 0; x < width; ++x) {
    r[x] = in[3 * x];
    g[x] = in[3 * x + 1];
    b[x] = in[3 * x + 2];
  }
  if (!flip) return;
  for (int c = 0; c < 3; ++c) {  // a loop that reads threes and writes backwards isn't vectorised
    float *left = row + c * width, *right = left + width - 1;
#pragma omp simd
    for (int64_t x = 0; x < width / 2; ++x) {
      const float other = right[-x];
      right[-x] = left[x];
      left[x] = other;
    }
  }
}

// HSV with the hue turned by `turn` sixths, [0, 6).
template <bool EXACT>
static inline void turn_hue(float* r, float* g, float* b, int64_t width, float turn) {
#pragma omp simd
  for (int64_t x = 0; x < width; ++x) {
    const float red = r[x], green = g[x], blue = b[x];
    const float high = red > green ? red : green, low = red < green ? red : green;
    const float top = high > blue ? high : blue, bottom = low < blue ? low : blue;
    const float chroma = top - bottom;
    const float over = 1.0f / (chroma > 0.0f ? chroma : 1.0f);
    const float of_green = (blue - red) * over + 2.0f, of_blue = (red - green) * over + 4.0f;
    float h = top == green ? of_green : of_blue;
    h = (top == red ? (green - blue) * over : h) + turn;  // [-1, 11)
    h = h < 0.0f ? h + 6.0f : h;
    h = h >= 6.0f ? h - 6.0f : h;
    const float distances[3] = {std::fabs(h - 3.0f) - 1.0f, 2.0f - std::fabs(h - 2.0f), 2.0f - std::fabs(h - 4.0f)};
    float out[3];
    for (int c = 0; c < 3; ++c) {
      const float d = at_least_0(distances[c]);
      out[c] = top - chroma * (1.0f - (d < 1.0f ? d : 1.0f));
      if (EXACT) out[c] *= 255.999f / 255.0f;
      out[c] = whole<EXACT>(out[c]);
    }
    r[x] = out[0];
    g[x] = out[1];
    b[x] = out[2];
  }
}

struct Step {
  int kind;
  float factor, other;  // x -> x * factor + other, and the gray value times 1 - factor where the kind is saturation
};

template <bool EXACT>
static inline void apply(const Step* steps, int count, float* row, int64_t width) {
  float *r = row, *g = row + width, *b = row + 2 * width;
  for (int i = 0; i < count; ++i) {
    const float factor = steps[i].factor, other = steps[i].other;
    if (steps[i].kind == kHue) {
      turn_hue<EXACT>(r, g, b, width, factor);
    } else if (steps[i].kind == kSaturation) {
#pragma omp simd
      for (int64_t x = 0; x < width; ++x) {
        const float y = gray<EXACT>(r[x], g[x], b[x]) * other;
        r[x] = whole<EXACT>(r[x] * factor + y);
        g[x] = whole<EXACT>(g[x] * factor + y);
        b[x] = whole<EXACT>(b[x] * factor + y);
      }
    } else {
#pragma omp simd
      for (int64_t x = 0; x < 3 * width; ++x) row[x] = whole<EXACT>(row[x] * factor + other);
    }
  }
}

// out[x] = (ADD ? out[x] : 0) + middle[x] * weights[0] + the sum over k = 1 .. N of weights[k] * (before[k][x] +
// behind[k][x]).
template <int N, bool ADD>
static inline void symmetric_taps(const float* middle, const float* const* before, const float* const* behind,
                                  const float* weights, int64_t width, float* out) {
  float w[N + 1];
  const float *p[N + 1], *q[N + 1];
  for (int k = 0; k <= N; ++k) w[k] = weights[k], p[k] = before[k], q[k] = behind[k];
#pragma omp simd
  for (int64_t x = 0; x < width; ++x) {
    float sum = ADD ? out[x] : middle[x] * w[0];
    for (int k = 1; k <= N; ++k) sum += w[k] * (p[k][x] + q[k][x]);
    out[x] = sum;
  }
}

// The same for any radius, four taps on each side in a pass.
static inline void symmetric(const std::vector<const float*>& before, const std::vector<const float*>& behind,
                             const std::vector<float>& weights, int64_t width, float* out) {
  const int radius = static_cast<int>(weights.size()) - 1;
  const float* middle = before[0];
  const int first = radius < 4 ? radius : 4;
  const auto begin = [&](auto... x) {
    switch (first) {
      case 0: return symmetric_taps<0, false>(x...);
      case 1: return symmetric_taps<1, false>(x...);
      case 2: return symmetric_taps<2, false>(x...);
      case 3: return symmetric_taps<3, false>(x...);
      default: return symmetric_taps<4, false>(x...);
    }
  };
  begin(middle, before.data(), behind.data(), weights.data(), width, out);
  for (int k = first; k < radius; k += 4) {
    const float *const *p = before.data() + k, *const *q = behind.data() + k;
    switch (radius - k) {
      case 1: symmetric_taps<1, true>(middle, p, q, weights.data() + k, width, out); break;
      case 2: symmetric_taps<2, true>(middle, p, q, weights.data() + k, width, out); break;
      case 3: symmetric_taps<3, true>(middle, p, q, weights.data() + k, width, out); break;
      default: symmetric_taps<4, true>(middle, p, q, weights.data() + k, width, out);
    }
  }
}

// weights[k] at distance k; no more than [1] where the sigma is 0 or the axis is too short.
static inline std::vector<float> gaussian(float sigma, int64_t size) {
  const double most = static_cast<double>((size - 1) / 2), wanted = std::ceil(3.0f * at_least_0(sigma));
  const int radius = static_cast<int>(wanted < most ? wanted : most);
  std::vector<double> w(radius + 1, 1.0);
  double sum = 1;
  for (int k = 1; k <= radius; ++k) {
    w[k] = std::exp(-0.5 * (k / static_cast<double>(sigma)) * (k / static_cast<double>(sigma)));
    sum += 2 * w[k];
  }
  std::vector<float> weights(radius + 1);
  for (int k = 0; k <= radius; ++k) weights[k] = static_cast<float>(w[k] / sum);
  return weights;
}

static inline int64_t reflected(int64_t i, int64_t size) { return i < 0 ? -i : i >= size ? 2 * (size - 1) - i : i; }

template <class T, bool EXACT>
static inline void finish_row(const Augment& a, float* row, bool solarize, bool blurred, int64_t image, int64_t y) {
  const int64_t w = a.width, plane = a.height * w;
  if (EXACT && blurred) {
#pragma omp simd
    for (int64_t x = 0; x < 3 * w; ++x) row[x] = (row[x] + 12582912.0f) - 12582912.0f;  // to the nearest, ties to even
  }
  if (solarize) {
    const float threshold = a.threshold;
#pragma omp simd
    for (int64_t x = 0; x < 3 * w; ++x) row[x] = row[x] >= threshold ? 255.0f - row[x] : row[x];
  }
  T* out = static_cast<T*>(a.out) + 3 * plane * image;
  if (a.channels_last) {
    out += 3 * w * y;
#pragma omp simd
    for (int64_t x = 0; x < w; ++x) {
      narrow(row[x] * a.scale[0] + a.shift[0], out[3 * x]);
      narrow(row[w + x] * a.scale[1] + a.shift[1], out[3 * x + 1]);
      narrow(row[2 * w + x] * a.scale[2] + a.shift[2], out[3 * x + 2]);
    }
    return;
  }
  for (int c = 0; c < 3; ++c) {
    T* line = out + c * plane + w * y;
    const float scale = a.scale[c], shift = a.shift[c], *from = row + c * w;
#pragma omp simd
    for (int64_t x = 0; x < w; ++x) narrow(from[x] * scale + shift, line[x]);
  }
}

template <bool EXACT>
static inline float gray_mean(const Augment& a, const uint8_t* in, bool flip, const Step* steps, int count,
                              float* row) {
  const int64_t w = a.width;
  double total = 0;
  for (int64_t y = 0; y < a.height; ++y) {
    read_row(in + 3 * w * y, w, flip, row);
    apply<EXACT>(steps, count, row, w);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t x = 0; x < w; ++x) sum += gray<EXACT>(row[x], row[w + x], row[2 * w + x]);
    total += sum;
  }
  return static_cast<float>(total / static_cast<double>(a.height * w));
}

template <class T, bool EXACT>
static void augment_images_as(const Augment& a, int64_t begin, int64_t end) {
  const int64_t w = a.width, h = a.height;
  std::vector<float> line(3 * w), padded(2 * w), ring;
  for (int64_t image = begin; image < end; ++image) {
    const uint8_t* in = a.images + 3 * w * h * image;
    const float* p = a.parameters + 13 * image;
    const bool flip = p[4] > 0.5f, grayscale = p[10] > 0.5f, solarize = p[12] > 0.5f;
    const float order = at_least_0(p[9]);

    Step steps[4];
    int count = 0;
    for (const int kind : kOrders[static_cast<int>(order < 23.0f ? order : 23.0f)]) {
      const float factor = p[5 + kind];
      if (kind == kHue) {
        const float turn = factor - std::floor(factor);
        if (turn > 0.0f && turn < 1.0f) steps[count++] = {kind, 6.0f * turn, 0};
      } else if (factor != 1.0f) {
        const float other = 1.0f - factor;
        steps[count] = {kind, factor, kind == kBrightness ? 0.0f : other};
        if (kind == kContrast) steps[count].other *= gray_mean<EXACT>(a, in, flip, steps, count, line.data());
        ++count;
      }
    }

    const std::vector<float> across = gaussian(p[11], w), down = gaussian(p[11], h);
    const int64_t left = across.size() - 1, above = down.size() - 1, rows = 2 * above + 1;
    std::vector<const float*> before(std::max(across.size(), down.size())), behind(before.size());
    if (left || above) ring.resize(std::max<int64_t>(ring.size(), 3 * w * rows));
    int64_t made = 0;
    for (int64_t y = 0; y < h; ++y) {
      for (; made <= std::min(y + above, h - 1); ++made) {
        read_row(in + 3 * w * made, w, flip, line.data());
        apply<EXACT>(steps, count, line.data(), w);
        if (grayscale) {
#pragma omp simd
          for (int64_t x = 0; x < w; ++x) {
            line[x] = line[w + x] = line[2 * w + x] = whole<EXACT>(gray<EXACT>(line[x], line[w + x], line[2 * w + x]));
          }
        }
        if (!left && !above) continue;
        for (int c = 0; c < 3; ++c) {
          const float* from = line.data() + c * w;
          std::copy(from, from + w, padded.data() + left);
          for (int64_t k = 1; k <= left; ++k) {
            padded[left - k] = from[k];
            padded[left + w - 1 + k] = from[w - 1 - k];
          }
          for (int64_t k = 0; k <= left; ++k)
            before[k] = padded.data() + left - k, behind[k] = padded.data() + left + k;
          symmetric(before, behind, across, w, ring.data() + 3 * w * (made % rows) + c * w);
        }
      }
      if (left || above) {
        for (int64_t k = 0; k <= above; ++k) {
          before[k] = ring.data() + 3 * w * (reflected(y - k, h) % rows);
          behind[k] = ring.data() + 3 * w * (reflected(y + k, h) % rows);
        }
        symmetric(before, behind, down, 3 * w, line.data());
      }
      finish_row<T, EXACT>(a, line.data(), solarize, left || above, image, y);
    }
  }
}

static void augment_images(const Augment& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    if constexpr (std::is_same<T, double>::value)
      return;  // the reference's
    else if (a.exact)
      augment_images_as<T, true>(a, begin, end);
    else
      augment_images_as<T, false>(a, begin, end);
  });
}
