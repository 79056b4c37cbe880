// Images [begin, end), a row of pixels at a time, in a plane of floats for each channel, which stay in the L1 cache:
// colour steps, blur, solarize, normalise, store. Contrast needs the mean of the whole image: that takes a pass before,
// over the steps that come before contrast. Red, green and blue are the channels of an image that has three; of others
// the steps that need colours are left out.

static constexpr float gray_weights[3] = {0.2989f, 0.587f, 0.114f};

// In which order the steps of the columns BRIGHTNESS to HUE come, by the column ORDER: ORDERS in Python.
static constexpr int orders[24][4] = {
    {0, 1, 2, 3}, {0, 1, 3, 2}, {0, 2, 1, 3}, {0, 2, 3, 1}, {0, 3, 1, 2}, {0, 3, 2, 1}, {1, 0, 2, 3}, {1, 0, 3, 2},
    {1, 2, 0, 3}, {1, 2, 3, 0}, {1, 3, 0, 2}, {1, 3, 2, 0}, {2, 0, 1, 3}, {2, 0, 3, 1}, {2, 1, 0, 3}, {2, 1, 3, 0},
    {2, 3, 0, 1}, {2, 3, 1, 0}, {3, 0, 1, 2}, {3, 0, 2, 1}, {3, 1, 0, 2}, {3, 1, 2, 0}, {3, 2, 0, 1}, {3, 2, 1, 0}};

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
  const float y = gray_weights[0] * r + gray_weights[1] * g + gray_weights[2] * b;
  return EXACT ? static_cast<float>(static_cast<int32_t>(y)) : y;
}

static FASTJEM_INLINE float stored_level(uint8_t x) { return x; }
static FASTJEM_INLINE float stored_level(float x) { return whole<false>(x); }

template <class In>
static inline void read_row(const In* in, int64_t width, int64_t channels, bool flip, float* row) {
  if (channels == 3) {
    float* r = row;
    float* g = row + width;
    float* b = row + 2 * width;
#pragma omp simd
    for (int64_t x = 0; x < width; ++x) {
      r[x] = stored_level(in[3 * x]);
      g[x] = stored_level(in[3 * x + 1]);
      b[x] = stored_level(in[3 * x + 2]);
    }
  } else if (channels == 1) {
#pragma omp simd
    for (int64_t x = 0; x < width; ++x) row[x] = stored_level(in[x]);
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      float* plane = row + c * width;
      for (int64_t x = 0; x < width; ++x) plane[x] = stored_level(in[channels * x + c]);
    }
  }
  if (!flip) return;
  // In a pass of its own: a loop that reads threes and writes backwards isn't vectorised.
  for (int64_t c = 0; c < channels; ++c) {
    float* left = row + c * width;
    float* right = left + width - 1;
#pragma omp simd
    for (int64_t x = 0; x < width / 2; ++x) {
      const float other = right[-x];
      right[-x] = left[x];
      left[x] = other;
    }
  }
}

// HSV with the hue turned by `turn` sixths, [0, 6). Each channel is the largest value less the chroma times a trapezium
// of the hue.
template <bool EXACT>
static inline void turn_hue(float* r, float* g, float* b, int64_t width, float turn) {
#pragma omp simd
  for (int64_t x = 0; x < width; ++x) {
    const float red = r[x], green = g[x], blue = b[x];
    const float high = red > green ? red : green;
    const float low = red < green ? red : green;
    const float top = high > blue ? high : blue;
    const float bottom = low < blue ? low : blue;
    const float chroma = top - bottom;
    const float inverse = 1.0f / (chroma > 0.0f ? chroma : 1.0f);
    const float near_green = (blue - red) * inverse + 2.0f;
    const float near_blue = (red - green) * inverse + 4.0f;
    float h = top == green ? near_green : near_blue;
    h = (top == red ? (green - blue) * inverse : h) + turn;  // [-1, 11)
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

// BRIGHTNESS and CONTRAST: x becomes x * factor + other. SATURATION: x * factor + gray value * other. HUE: it is turned
// by `factor` sixths.
struct Step {
  int column;
  float factor, other;
};

template <bool EXACT>
static inline void apply(const Step* steps, int count, float* row, int64_t width, int64_t channels) {
  float* r = row;
  float* g = row + width;
  float* b = row + 2 * width;
  for (int i = 0; i < count; ++i) {
    const float factor = steps[i].factor;
    const float other = steps[i].other;
    if (steps[i].column == HUE) {
      turn_hue<EXACT>(r, g, b, width, factor);
    } else if (steps[i].column == SATURATION) {
#pragma omp simd
      for (int64_t x = 0; x < width; ++x) {
        const float y = gray<EXACT>(r[x], g[x], b[x]) * other;
        r[x] = whole<EXACT>(r[x] * factor + y);
        g[x] = whole<EXACT>(g[x] * factor + y);
        b[x] = whole<EXACT>(b[x] * factor + y);
      }
    } else {
#pragma omp simd
      for (int64_t x = 0; x < channels * width; ++x) row[x] = whole<EXACT>(row[x] * factor + other);
    }
  }
}

// out[x] = first + the sum over k = 1 .. N of weights[k] * (before[k][x] + behind[k][x]), where first is out[x] (ADD),
// or middle[x] * weights[0].
template <int N, bool ADD>
static inline void symmetric_taps(const float* middle, const float* const* before, const float* const* behind,
                                  const float* weights, int64_t width, float* out) {
  float w[N + 1];
  const float* p[N + 1];
  const float* q[N + 1];
  std::copy(weights, weights + N + 1, w);
  std::copy(before, before + N + 1, p);
  std::copy(behind, behind + N + 1, q);
#pragma omp simd
  for (int64_t x = 0; x < width; ++x) {
    float sum = ADD ? out[x] : middle[x] * w[0];
    for (int k = 1; k <= N; ++k) sum += w[k] * (p[k][x] + q[k][x]);
    out[x] = sum;
  }
}

// symmetric_taps for any radius, four taps on each side in a pass.
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
    const float* const* p = before.data() + k;
    const float* const* q = behind.data() + k;
    switch (radius - k) {
      case 1: symmetric_taps<1, true>(middle, p, q, weights.data() + k, width, out); break;
      case 2: symmetric_taps<2, true>(middle, p, q, weights.data() + k, width, out); break;
      case 3: symmetric_taps<3, true>(middle, p, q, weights.data() + k, width, out); break;
      default: symmetric_taps<4, true>(middle, p, q, weights.data() + k, width, out);
    }
  }
}

// The weights at distances 0 .. radius; [1] alone where the sigma is 0 or the axis is too short.
static inline std::vector<float> gaussian(float sigma, int64_t size) {
  const double most = static_cast<double>((size - 1) / 2);
  const double wanted = std::ceil(3.0f * at_least_0(sigma));
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
  const int64_t w = a.width;
  const int64_t plane = a.height * w;
  const int64_t values = a.channels * w;
  if (EXACT && blurred) {
#pragma omp simd
    for (int64_t x = 0; x < values; ++x) row[x] = (row[x] + integer_shift) - integer_shift;  // rounded, ties to even
  }
  if (solarize) {
    const float threshold = a.threshold;
#pragma omp simd
    for (int64_t x = 0; x < values; ++x) row[x] = row[x] >= threshold ? 255.0f - row[x] : row[x];
  }
  T* out = static_cast<T*>(a.out) + a.channels * plane * image;
  if (a.channels_last && a.channels == 3) {
    out += values * y;
    const float scale[3] = {a.scale[0], a.scale[1], a.scale[2]};
    const float shift[3] = {a.shift[0], a.shift[1], a.shift[2]};
#pragma omp simd
    for (int64_t x = 0; x < w; ++x) {
      narrow(row[x] * scale[0] + shift[0], out[3 * x]);
      narrow(row[w + x] * scale[1] + shift[1], out[3 * x + 1]);
      narrow(row[2 * w + x] * scale[2] + shift[2], out[3 * x + 2]);
    }
    return;
  }
  for (int64_t c = 0; c < a.channels; ++c) {
    if (a.channels_last && a.channels > 1) {
      T* pixel = out + values * y + c;
      for (int64_t x = 0; x < w; ++x) narrow(row[c * w + x] * a.scale[c] + a.shift[c], pixel[a.channels * x]);
      continue;
    }
    T* line = out + c * plane + w * y;
    const float scale = a.scale[c];
    const float shift = a.shift[c];
    const float* from = row + c * w;
#pragma omp simd
    for (int64_t x = 0; x < w; ++x) narrow(from[x] * scale + shift, line[x]);
  }
}

// A Gaussian blur of an image whose rows come one after another: each is blurred across into a ring, which has as many
// rows as the blur down looks at. Beyond the borders the image is reflected (the edge pixel isn't repeated).
class Blur {
  const int64_t width, height, channels;
  std::vector<float> across, down;           // weights by distance
  std::vector<const float*> before, behind;  // [distance], what the weights are of on one side and on the other
  std::vector<float> padded;                 // one channel of a row with its reflections
  std::vector<float> ring;                   // [rows of the ring, channels, width]

  float* ring_row(int64_t y) { return ring.data() + channels * width * (y % (2 * below() + 1)); }

 public:
  Blur(int64_t width, int64_t height, int64_t channels)
      : width(width), height(height), channels(channels), padded(2 * width) {}

  void set(float sigma) {
    across = gaussian(sigma, width);
    down = gaussian(sigma, height);
    before.resize(std::max(across.size(), down.size()));
    behind.resize(before.size());
    if (active()) ring.resize(std::max<int64_t>(ring.size(), channels * width * (2 * below() + 1)));
  }

  bool active() const { return across.size() > 1 || down.size() > 1; }

  // How many rows below a row have to be added before it can be blurred down.
  int64_t below() const { return down.size() - 1; }

  void add_row(const float* row, int64_t y) {
    const int64_t left = across.size() - 1;
    for (int64_t c = 0; c < channels; ++c) {
      const float* from = row + c * width;
      std::copy(from, from + width, padded.data() + left);
      for (int64_t k = 1; k <= left; ++k) {
        padded[left - k] = from[k];
        padded[left + width - 1 + k] = from[width - 1 - k];
      }
      for (int64_t k = 0; k <= left; ++k) {
        before[k] = padded.data() + left - k;
        behind[k] = padded.data() + left + k;
      }
      symmetric(before, behind, across, width, ring_row(y) + c * width);
    }
  }

  void blur_down(int64_t y, float* out) {
    for (int64_t k = 0; k <= below(); ++k) {
      before[k] = ring_row(reflected(y - k, height));
      behind[k] = ring_row(reflected(y + k, height));
    }
    symmetric(before, behind, down, channels * width, out);
  }
};

// The mean that contrast is around: of the gray image or, of other channels than three, of all values.
template <class In, bool EXACT>
static inline float mean_level(const Augment& a, const In* in, bool flip, const Step* steps, int count, float* row) {
  const int64_t w = a.width;
  const int64_t counted = a.channels == 3 ? w : a.channels * w;  // values of a row
  double total = 0;
  for (int64_t y = 0; y < a.height; ++y) {
    read_row(in + a.channels * w * y, w, a.channels, flip, row);
    apply<EXACT>(steps, count, row, w, a.channels);
    float sum = 0;
    if (a.channels == 3) {
#pragma omp simd reduction(+ : sum)
      for (int64_t x = 0; x < w; ++x) sum += gray<EXACT>(row[x], row[w + x], row[2 * w + x]);
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t x = 0; x < counted; ++x) sum += row[x];
    }
    total += sum;
  }
  return static_cast<float>(total / static_cast<double>(a.height * counted));
}

// Sets the steps that change something, in their order; returns how many they are. `p` is the image's row of the table,
// `row` memory for a row of pixels.
template <class In, bool EXACT>
static inline int set_steps(const Augment& a, const In* in, const float* p, bool flip, float* row, Step* steps) {
  const float order = at_least_0(p[ORDER]);
  int count = 0;
  for (const int index : orders[static_cast<int>(order < 23.0f ? order : 23.0f)]) {
    const int column = BRIGHTNESS + index;
    const float factor = p[column];
    if (a.channels != 3 && (column == HUE || column == SATURATION)) continue;
    if (column == HUE) {
      const float turn = factor - std::floor(factor);
      if (turn > 0.0f && turn < 1.0f) steps[count++] = {HUE, 6.0f * turn, 0};
    } else if (factor != 1.0f) {
      float other = column == BRIGHTNESS ? 0.0f : 1.0f - factor;
      if (column == CONTRAST) other *= mean_level<In, EXACT>(a, in, flip, steps, count, row);
      steps[count++] = {column, factor, other};
    }
  }
  return count;
}

template <class T, class In, bool EXACT>
static void augment_images_as(const Augment& a, int64_t begin, int64_t end) {
  const int64_t w = a.width;
  const int64_t h = a.height;
  const int64_t values = a.channels * w;  // of a row
  std::vector<float> line(values);
  float* row = line.data();
  Blur blur(w, h, a.channels);
  for (int64_t image = begin; image < end; ++image) {
    const In* in = static_cast<const In*>(a.images) + values * h * image;
    const float* p = a.parameters + COLUMNS * image;
    const bool flip = p[FLIP] > 0.5f;
    const bool grayscale = a.channels == 3 && p[GRAYSCALE] > 0.5f;
    const bool solarize = p[SOLARIZE] > 0.5f;
    Step steps[4];
    const int count = set_steps<In, EXACT>(a, in, p, flip, row, steps);
    blur.set(p[SIGMA]);
    int64_t made = 0;  // rows whose colours are done
    for (int64_t y = 0; y < h; ++y) {
      for (; made <= std::min(y + blur.below(), h - 1); ++made) {
        read_row(in + values * made, w, a.channels, flip, row);
        apply<EXACT>(steps, count, row, w, a.channels);
        if (grayscale) {
#pragma omp simd
          for (int64_t x = 0; x < w; ++x) {
            row[x] = row[w + x] = row[2 * w + x] = whole<EXACT>(gray<EXACT>(row[x], row[w + x], row[2 * w + x]));
          }
        }
        if (blur.active()) blur.add_row(row, made);
      }
      if (blur.active()) blur.blur_down(y, row);
      finish_row<T, EXACT>(a, row, solarize, blur.active(), image, y);
    }
  }
}

static void augment_images(const Augment& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    if constexpr (std::is_same<T, double>::value) {
      return;  // no launcher calls it for float64: the reference computes that
    } else if (a.of_floats) {
      augment_images_as<T, float, false>(a, begin, end);
    } else if (a.exact) {
      augment_images_as<T, uint8_t, true>(a, begin, end);
    } else {
      augment_images_as<T, uint8_t, false>(a, begin, end);
    }
  });
}
